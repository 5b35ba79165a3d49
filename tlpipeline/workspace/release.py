"""The last steps of a run: gate, register, report.

They are not DVC stages, because they read the champion, make commits and tags, and use remotes.
"""

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlpipeline.alarms import Alarm, blocking
from tlpipeline.choice.decision import Decision
from tlpipeline.choice.forecast import Forecast, calibration, forecast
from tlpipeline.data.changes import Changes
from tlpipeline.display import Displayed, table
from tlpipeline.errors import RegistryError, WorkspaceError
from tlpipeline.evaluation import gate
from tlpipeline.evaluation.verdict import BALANCED, UNDECIDED, Verdict, with_wear
from tlpipeline.files import write_json
from tlpipeline.params import NONE
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import Event, Progress
from tlpipeline.registry import ledger, versions
from tlpipeline.registry.versions import Registration
from tlpipeline.versioning import dvc, git, lock
from tlpipeline.workspace import alarming, layout, pinning, stages
from tlpipeline.workspace.create import TRACKED
from tlpipeline.workspace.pinning import PinnedData

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tlpipeline.checking.quality import Finding
    from tlpipeline.data.dataset import Manifest
    from tlpipeline.evaluation.metrics import Predictions
    from tlpipeline.report.page import Examples, FindingsOfKind

REPORT, REPORTS = "report.html", "reports"
WORST = 6  # pictures of each kind of findings in the report
MISTAKES, UNCERTAIN, CONFUSED = 24, 12, 6  # pictures of errors and of doubtful images, and pairs of confused classes


# --- gate and registry ----------------------------------------------------------------------------------------------------------------


def evaluate_gate(root: Path, progress: Progress, pinned: PinnedData | None = None) -> Verdict | None:
    """Compare the workspace's model with the champion on the same test images; return None if the model is already registered.

    A version that a killed run registered is published first: it may be the champion.
    """
    from tlpipeline.data import classes, dataset, splits
    from tlpipeline.evaluation import metrics as evaluate

    params = layout.params_of(root)
    if resumed := versions.resume_publication(root, params.gate.promote == "auto"):
        progress(Event("gate", 1, 1, f"{resumed[0]} of an interrupted run is published now{' and promoted' if resumed[1] else ''}"))
    model = dvc.stage_output(root, "train", layout.MODEL)
    if versions.find_registered(root, params.data.name, model):
        return None
    challenger = evaluate.read_predictions(root / layout.PREDICTIONS)
    manifest = dataset.read_manifest(root / layout.MANIFEST)
    trained = Counter(row.label for row in manifest.used(splits.TRAIN))
    recipe = layout.with_recipe(layout.read_case(root), params).recipe
    uneven = max(trained.values()) > recipe.head_imbalance * min(trained.values())
    rows = manifest.used(splits.TEST)
    groups = [{row.md5: row.group for row in rows}[md5] for md5 in challenger.md5]
    git.fetch_tags(root)  # another clone may have promoted the champion
    best = versions.champion(root, params.data.name)
    if best is None:
        majority = layout.read_metrics(root).majority_class
        verdict = gate.compare_with_majority(challenger, majority, params.gate, uneven, groups)
    else:

        def on_progress(done: int) -> None:
            progress(Event("gate", done, len(rows), f"{best} on {done} of {len(rows)} test images"))

        champion = stages.predict_rows(root, versions.model_folder(root, best), rows, on_progress, pinned)
        known = versions.trained_on(root, best)
        listed = {row.md5 for row in versions.manifest_of(root, best).rows}
        # An image whose group the champion was trained on is no new one to it.
        known_groups = {row.group for row in manifest.rows if row.group and row.md5 in known}
        known |= {row.md5 for row in rows if row.group in known_groups}
        renames = classes.Renames(params.data.rename)
        rename = {label: renames(label) for label in champion.classes}
        gone = [renames(label) for label in params.data.drop]
        verdict = gate.compare_with_champion(challenger, champion, str(best), known, params.gate, uneven, groups, rename, gone)
        verdict = gate.with_new_images(verdict, challenger, champion, frozenset(challenger.md5) - listed, rename)
        started = layout.read_model(root).start
        if started is not None and started.warm:
            verdict = gate.with_forgotten(verdict, challenger, champion, known, rename)
    return with_wear(verdict, ledger.times_judged([e for e in ledger.read(root) if e.model != model], challenger.md5))


def register(root: Path, verdict: Verdict | None, pinned: PinnedData | None = None) -> Registration:
    """Register the model if the gate accepted it, or if it is undecided and `gate.undecided` says so; commit the run in any case.

    An undecided version is not promoted. If newer data were committed during the run, the run is committed with its own data, on top of the
    commit that has them, and merged: the branch keeps the newer data, and the next run takes them.
    """
    with lock.recording(root):
        return _register(root, verdict, pinned)


def _register(root: Path, verdict: Verdict | None, pinned: PinnedData | None) -> Registration:
    params = layout.params_of(root)
    name = params.data.name
    newer, onto = _newer_data(root, pinned)
    tracked = [path for path in (*TRACKED, f"{params.data.images}.dvc") if path not in newer]
    model = dvc.stage_output(root, "train", layout.MODEL)
    registered = versions.find_registered(root, name, model)
    alarms = alarming.of_run(root)
    if verdict is None and registered is not None:
        git.commit(root, "Record the run", tracked, onto)
        if registered.number not in [version.number for version in versions.versions(root, name)]:
            reason = f"this model was registered as {registered}, which was withdrawn; it is not registered again."
            return Registration("", False, "", None, reason, alarms)
        reason = f"this model is already registered as {registered}: nothing to do."
        if not versions.is_accepted(root, registered):
            reason = f"this model is already registered as {registered}. The gate left it undecided. {_way_on(registered)}"
        return Registration(str(registered), False, "", None, reason, alarms)
    assert verdict is not None, "a new model needs the gate's verdict"
    summary = f"{layout.read_case(root).case}, accuracy {layout.read_metrics(root).accuracy:.4f}"
    kept = verdict.accepted or (verdict.outcome == UNDECIDED and params.gate.undecided == "register")
    write_json(list(map(dataclasses.asdict, alarms)), root / versions.ALARMS)
    if not kept:
        _record(root, model, "", verdict)
        git.commit(root, f"{verdict.outcome.capitalize()}: {summary}", tracked, onto)
        dvc.push(root)
        return Registration("", False, "", verdict, f"{verdict.text} {_WAY_IN}", alarms)
    case = layout.read_case(root)
    number = versions.next_number(root, name, list(layout.read_metrics(root).classes), case.case)
    version = versions.Version(number, name, "")
    from tlpipeline.registry.card import card

    (root / versions.CARD).write_text(card(str(version), card_facts(root, verdict, alarms, pinned)), encoding="utf-8")
    _record(root, model, str(version), verdict)
    standing = f" (accepted by hand: {verdict.because})" if verdict.because else "" if verdict.accepted else " (undecided)"
    blocked = () if verdict.because else blocking(alarms)  # who overrules the gate has seen them
    promoting = params.gate.promote == "auto" and verdict.accepted and not blocked
    stage = versions.PROD if promoting else ""
    version, promoted = versions.publish(root, name, number, f"{version}: {summary}{standing}", tracked, stage, onto)
    reason = verdict.text if verdict.accepted else f"{verdict.text} {_way_on(version)}"
    if blocked:
        kinds = ", ".join(dict.fromkeys(alarm.kind for alarm in blocked))
        reason += f' Alarms keep it from being promoted: {kinds}. To promote it all the same: `tlpipeline registry promote {version} --because "..."`.'
    return Registration(str(version), True, promoted, verdict, reason, alarms)


def _newer_data(root: Path, pinned: PinnedData | None) -> tuple[list[str], str]:
    """Return the files that say which data a run had, and the commit that has them, if the workspace has newer data by now.

    Args:
        pinned: the data that the run kept; None is a run that ended and was committed, or stages by hand, which have the present data.
    """
    if pinned:
        return ([], "") if pinned.is_current(root) else (pinned.inputs, pinned.commit)
    ended = git.run(root, "log", "-1", "--format=%H", "--", "dvc.lock", check=False)
    if not ended or git.read_at(root, ended, "dvc.lock") != (root / "dvc.lock").read_text(encoding="utf-8").strip():
        return [], ""
    data = layout.params_of(root).data
    inputs = [f"{data.images}.dvc", layout.SPLITS, layout.CLASS_MAP, *([] if data.labels == NONE else [data.labels])]
    return (inputs, ended) if git.run(root, "diff", "--name-only", ended, "--", *inputs) else ([], "")


_WAY_IN = 'To register it all the same: `tlpipeline registry accept --because "..."`.'


def _way_on(version: versions.Version) -> str:
    return (
        f"{version} is registered but not promoted. To use it: `tlpipeline registry promote {version}`. To have it count as accepted: "
        f'`tlpipeline registry accept {version} --because "..."`.'
    )


def _record(root: Path, model: str, version: str, verdict: Verdict) -> None:
    from tlpipeline.evaluation import metrics as evaluate

    test = ledger.sketch(evaluate.read_predictions(root / layout.PREDICTIONS).md5)
    ledger.record(root, ledger.Entry(model, version, test, verdict, forecast_of(root)))


def forecast_of(root: Path) -> Forecast | None:
    """Return what the decision of the last run expected, and what was measured; None where it expected nothing of its model."""
    metrics = layout.read_metrics(root)
    return forecast(*load_decision(root), metrics.accuracy, metrics.accuracy_low, metrics.accuracy_high)


def _met(root: Path) -> tuple[str, ...]:
    """Return in words how the expectation of the last run was met, and those of all models that were judged here."""
    present = forecast_of(root)
    known = calibration([entry.forecast for entry in ledger.read(root) if entry.forecast])
    return tuple(filter(None, [str(present) if present else "", known]))


def accept(root: Path, version: versions.Version | None, because: str) -> Registration:
    """Overrule the gate: register the workspace's model, or have an undecided version count as accepted. The reason is recorded in git.

    What `gate.promote` says of accepted versions holds for it, too.

    Args:
        version: registered but undecided; None is the workspace's model, whether it is registered or not.
        because: why, in a sentence.

    Raises:
        RegistryError: there is no reason, the gate has not judged the model, or it is accepted already.
    """
    params = layout.params_of(root)
    because = " ".join(because.split())
    if not because:
        raise RegistryError('expected a reason, found none. Say in a sentence why the verdict is overruled: --because "...".')
    model = dvc.stage_output(root, "train", layout.MODEL)
    version = version or versions.find_registered(root, params.data.name, model)
    if version is None:
        entry = ledger.find(ledger.read(root), model)
        if entry is None or dvc.content_md5(root / layout.MODEL) != model:
            raise RegistryError(
                f"expected a model in {root} that the gate has judged, found {'none' if entry is None else 'another one'}. `tlpipeline run` "
                "trains and judges one."
            )
        return register(root, dataclasses.replace(entry.verdict, because=because))
    verdict = versions.verdict_of(root, version)
    if verdict is None or verdict.accepted:
        raise RegistryError(
            f"expected an undecided version, found {version}, which is accepted. `tlpipeline registry promote {version}` uses it."
        )
    verdict = dataclasses.replace(verdict, because=because)
    git.fetch_tags(root)
    entry = next((e for e in ledger.read(root) if e.version == str(version)), None)
    stored = dvc.stage_output(root, "train", layout.MODEL, version.commit)
    ledger.record(root, dataclasses.replace(entry, verdict=verdict) if entry else ledger.Entry(stored, str(version), (), verdict))
    git.commit(root, f"Accept {version}: {because}", [ledger.LEDGER])
    git.push(root)
    promoted = versions.promote(root, version, because=because) if params.gate.promote == "auto" else ""
    way_on = "" if promoted else f" To use it: `tlpipeline registry promote {version}`."
    return Registration(str(version), False, promoted, verdict, f"{version} is accepted: {because}.{way_on}")


def card_facts(root: Path, verdict: Verdict, alarms: Sequence[Alarm], pinned: PinnedData | None = None) -> dict[str, object]:
    """Return the content of the model card: everything needed to rebuild the model, and its metrics."""
    from tlpipeline.choice import reasons

    params, (case, profile) = layout.params_of(root), load_decision(root)
    return {
        "name": params.data.name,
        "case": case,
        "why": reasons.summary(case, profile),
        "read": [reading.tap for reading in layout.read_model(root).readings],
        "start": layout.read_model(root).start,
        "alarms": alarms,
        "metrics": layout.read_metrics(root),
        "verdict": verdict,
        "data": dvc.stage_input(root, "ingest", params.data.images),
        "model": dvc.stage_output(root, "train", layout.MODEL),
        "params_md5": hashlib.md5((root / layout.PARAMS).read_bytes(), usedforsecurity=False).hexdigest(),
        "params": dataclasses.asdict(params),
        "seed": params.train.seed,
        "parent": _newer_data(root, pinned)[1] or git.head(root),
        "environment": _environment(
            ["tlpipeline", "torch", "torchvision", "numpy", "scipy", "pillow", "ray", "dvc", *layout.network_packages(root)]
        ),
    }


def _environment(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of these packages."""
    installed = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


# --- report ---------------------------------------------------------------------------------------------------------------------------


def write_report(root: Path, registration: Registration, changes: Changes | None = None, pinned: PinnedData | None = None) -> Path:
    """Write report.html: one self-contained page about the run. The reports of judged models are also kept in reports/.

    Args:
        changes: of the images since the version that the model was compared with (see `history.diff_of_run`).
        pinned: the data that the run keeps; None takes the images as they are now.
    """
    from tlpipeline.data import dataset
    from tlpipeline.evaluation import metrics as evaluate
    from tlpipeline.report import page as report

    params, (case, profile) = layout.params_of(root), load_decision(root)
    manifest = dataset.read_manifest(root / layout.MANIFEST, root / layout.QUARANTINE)
    predictions = evaluate.read_predictions(root / layout.PREDICTIONS)
    page = report.page(
        name=params.data.name,
        registration=registration,
        case=case,
        start=layout.read_model(root).start,
        profile=profile,
        metrics=layout.read_metrics(root),
        forecast=_met(root),
        matrix=evaluate.confusion(predictions).tolist(),
        manifest=manifest,
        history=layout.read_history(root),
        examples=_examples(root, manifest, predictions, pinned),
        reliability=evaluate.reliability(predictions, params.evaluate.confidence),
        findings=_worst_findings(root, manifest, pinned),
        changes=changes,
        seconds=layout.read_run(root).seconds,
        training=layout.read_run(root).training,
        data_hash=dvc.stage_input(root, "ingest", params.data.images),
        commit=git.head(root),
    )
    path = root / REPORT
    path.write_text(page, encoding="utf-8")
    if registration.verdict is not None:  # a run that changed nothing needs no copy
        _keep(page, root / REPORTS, registration)
    return path


def _keep(page: str, folder: Path, registration: Registration) -> None:
    """Keep a report under the date and what became of the model; git ignores the folder."""
    assert registration.verdict is not None
    name = registration.version or registration.verdict.outcome
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    (folder / f"{date.today()}_{name}.html").write_text(page, encoding="utf-8")


def _examples(root: Path, manifest: "Manifest", predictions: "Predictions", pinned: PinnedData | None) -> "Examples":
    """Return the test images that a person should look at, each read once."""
    from tlpipeline.data import dataset, splits
    from tlpipeline.evaluation import metrics as evaluate
    from tlpipeline.report import page as report

    images, rows = pinning.folder_of(root, pinned), {row.md5: row for row in manifest.used(splits.TEST)}

    @cache
    def example(i: int) -> report.Example:
        row = rows[predictions.md5[i]]
        return report.Example(
            row.path,
            predictions.classes[predictions.labels[i]],
            predictions.classes[predictions.predicted[i]],
            float(predictions.probabilities[i].max()),
            report.thumbnail(dataset.read_image(images, row)),
        )

    pairs = evaluate.confused_pairs(predictions, CONFUSED)
    return report.Examples(
        list(map(example, evaluate.worst_mistakes(predictions, MISTAKES))),
        list(map(example, evaluate.least_certain(predictions, UNCERTAIN))),
        [report.Confused(p.actual, p.predicted, len(p.images), list(map(example, p.images[:3]))) for p in pairs],
    )


def _worst_findings(root: Path, manifest: "Manifest", pinned: PinnedData | None) -> "list[FindingsOfKind]":
    """Return the kinds of findings in quality.csv, each with pictures of the worst; the findings of a kind are listed the worst first."""
    from tlpipeline.data import dataset
    from tlpipeline.report import page as report

    if not (root / layout.QUALITY).is_file():
        return []
    images, rows = pinning.folder_of(root, pinned), {row.path: row for row in manifest.rows}
    by_kind: dict[str, list[Finding]] = {}
    for finding in layout.read_quality(root).findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    return [
        report.FindingsOfKind(
            kind,
            len(listed),
            [
                (f.path, f.detail, report.thumbnail(dataset.read_image(images, rows[f.path], report.THUMBNAIL)))
                for f in listed[:WORST]
                if f.path in rows
            ],
        )
        for kind, listed in by_kind.items()
    ]


@dataclass(frozen=True)
class Summary(Displayed):
    """What a run ended with.

    Attributes:
        images, classes: distinct images, and their classes; copies, rejected: files that are not counted, and that cannot be used.
        alarms: what is wrong with the data, the decision, the training or the test, the gravest first.
        case, reason: what was decided, and why.
        accuracy, low, high: on the test images, with its confidence interval.
        champion: what the accuracy was compared with, "" if with nothing.
        version: as which the model is registered, "" if it is not; new: whether this run registered it.
        outcome: what the comparison led to.
        report: path of the report page.
        seconds: of each step; None where it was up to date.
        verdict: "accepted", "undecided" or "rejected"; "" if the model was judged before.
        former: whether the case changed since the model in production, "" if there is none.
        forecast: whether the accuracy is what the decision expected; with a second sentence for all models so far, if there are several.
        start: which weights training started from, "" if there was only one possibility.
        changes: of the images since the version that the model was compared with, None if there is none.
    """

    images: int
    classes: int
    copies: int
    rejected: int
    alarms: tuple[Alarm, ...]
    case: str
    reason: str
    accuracy: float
    low: float
    high: float
    champion: str
    version: str
    new: bool
    outcome: str
    report: str
    seconds: dict[str, float | None]
    verdict: str = ""
    changes: Changes | None = None
    former: str = ""
    forecast: tuple[str, ...] = ()
    start: str = ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """The alarms as text."""
        return tuple(map(str, self.alarms))

    @property
    def blocked(self) -> tuple[Alarm, ...]:
        """The alarms that keep the model from being promoted without a reason that somebody gives."""
        return blocking(self.alarms)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the alarms first."""
        values = dataclasses.asdict(self)
        return {"alarms": values.pop("alarms"), **values}

    def __rich__(self) -> "RenderableType":
        left_out = [_counted(self.copies, "exact copy", "exact copies") + " not counted"] if self.copies else []
        left_out += [_counted(self.rejected, "file", "files") + " left out (quarantine.csv)"] if self.rejected else []
        against = [self.champion] if self.champion else []
        rows = [
            *[(alarm.word, str(alarm)) for alarm in self.alarms],
            ("images", ", ".join([f"{self.images} in {self.classes} classes", *left_out])),
            *([("changes", f"{self.changes.summary} since {self.changes.since}"), *self.changes.lines()] if self.changes else []),
            ("case", self.case),
            ("why", self.reason),
            *[("", self.former) for _ in range(bool(self.former))],
            *[("start", self.start) for _ in range(bool(self.start))],
            ("accuracy", ", ".join([f"{self.accuracy:.1%} ({self.low:.1%} to {self.high:.1%})", *against])),
            *[("", sentence) for sentence in self.forecast],
            ("version", self.version + ("" if self.new else " (unchanged)") if self.version else "none registered"),
            *[("verdict", self.verdict) for _ in range(bool(self.verdict))],
            ("", self.outcome),
            ("report", self.report),
            ("seconds", ", ".join(f"{name} {'up to date' if s is None else f'{s:.1f}'}" for name, s in self.seconds.items())),
        ]
        return table((), rows)


def _counted(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def summary(root: Path, registration: Registration, report: Path, changes: Changes | None = None) -> Summary:
    """Return the summary of a run.

    Args:
        report: path of the report page.
        changes: as in `write_report`.
    """
    from tlpipeline.choice import reasons
    from tlpipeline.data import dataset

    manifest = dataset.read_manifest(root / layout.MANIFEST, root / layout.QUARANTINE)
    metrics = layout.read_metrics(root)
    case, profile = load_decision(root)
    verdict = registration.verdict
    started = layout.read_model(root).start
    against = ""
    if verdict is not None:
        metric = f"balanced accuracy {verdict.challenger_score:.1%} against " if verdict.metric == BALANCED else "against "
        against = f"{metric}{verdict.champion_score:.1%} of {verdict.champion} on {verdict.images} images"
    return Summary(
        images=len([r for r in manifest.rows if not r.duplicate_of]),
        classes=len(manifest.classes),
        copies=len([r for r in manifest.rows if r.duplicate_of]),
        rejected=len(manifest.rejected),
        alarms=registration.alarms,
        case=case.case,
        reason=reasons.summary(case, profile),
        former=reasons.former_sentence(case, profile),
        forecast=_met(root),
        start=started.text if started else "",
        accuracy=metrics.accuracy,
        low=metrics.accuracy_low,
        high=metrics.accuracy_high,
        champion=against,
        version=registration.version,
        new=registration.new,
        verdict=verdict.outcome if verdict else "",
        changes=changes,
        outcome=registration.reason,
        report=str(report),
        seconds=layout.read_run(root).seconds,
    )


def verdict_markdown(root: Path, verdict: Verdict | None) -> str:
    """Return the alarms and the gate's verdict as markdown; None is a model that was judged before."""
    from tlpipeline.choice.explain import cell

    alarms = [f"- **{alarm.word}** {cell(str(alarm))}" for alarm in alarming.of_run(root)]
    judged = verdict.markdown() if verdict else "This model is registered already."
    met = [f"\n{cell(sentence[:1].upper() + sentence[1:])}." for sentence in _met(root)]
    return "\n".join([*alarms, *[""] * bool(alarms), judged, *met])


def load_decision(root: Path) -> tuple[Decision, Profile]:
    """Return the decision and its profile.

    Raises:
        WorkspaceError: this is not a workspace, there is no decision yet, or another version or profile made it.
    """
    for name in (layout.PROFILE, layout.CASE):
        if not (root / name).is_file():
            lock.require_workspace(root)
            raise WorkspaceError(
                f"expected a decision in {root / name}, found no such file. Run `tlpipeline run` or `dvc repro choose` to make it."
            )
    case, profile = layout.read_case(root), layout.read_profile(root)
    if case.slice not in [tap.name for tap in profile.taps]:
        raise WorkspaceError(
            f"expected a decision about {profile.backbone} in {root / layout.CASE}, found one that cuts at {case.slice}, which is not one of its "
            "taps. The decision is older than the profile. Run `dvc repro choose` to decide again."
        )
    return layout.with_recipe(case, layout.params_of(root)), profile


def decision_markdown(root: Path) -> str:
    """Return the decision as markdown."""
    from tlpipeline.choice import explain

    return explain.markdown(*load_decision(root))


def evaluation_markdown(root: Path) -> str:
    """Return the evaluation as markdown."""
    from tlpipeline.choice import explain

    metrics = layout.read_metrics(root)
    lines = [
        f"**accuracy {metrics.accuracy:.1%}** ({metrics.accuracy_low:.1%} to {metrics.accuracy_high:.1%}, {metrics.images} test images), "
        f"balanced {metrics.balanced_accuracy:.1%}, macro F1 {metrics.macro_f1:.3f}, calibration error {metrics.calibration_error:.3f}",
        "",
        "| class | images | precision | recall |",
        "|---|---:|---:|---:|",
    ]
    for label, c in metrics.classes.items():
        figures = f"{c.precision:.3f} | {c.recall:.3f}" if c.images else "not evaluated | "
        lines += [f"| {explain.cell(label)} | {c.images} | {figures} |"]
    return "\n".join(lines)
