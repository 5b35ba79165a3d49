"""The acts: what a run does to the world outside its stages. Version the data, judge, register, report.

Acts are no DVC stages: they read the champion, make commits and tags, and talk to remotes.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlpipeline import gate, registry, stages, versioning
from tlpipeline.errors import DataError, WorkspaceError
from tlpipeline.params import AUTO
from tlpipeline.progress import Event, Progress, silent

TEMPLATE = Path(__file__).with_name("template")
REPORT = "report.html"
TRACKED = (
    "dvc.lock", "dvc.yaml", stages.PARAMS, stages.SPLITS, stages.QUARANTINE, stages.PROFILE, stages.CASE, stages.METRICS, stages.CLASSES,
    registry.CARD, ".gitignore", ".dvcignore", "plots/.gitignore", ".dvc/config", ".dvc/.gitignore", ".dvc/plots",
)  # fmt: skip
PLOTS = ("plane.json", "probe.json", "cases.json")  # how `dvc plots show` draws the decision


# --- a new workspace ------------------------------------------------------------------------------------------------------------------


def init(root: Path, images: Path | None, backbone: str, weights: str, remote: str | None, progress: Progress = silent) -> None:
    """Make a workspace: a git and DVC repository with dvc.yaml, params.yaml, prefect.yaml and versioned images.

    Args:
        root: an empty or new folder.
        images: copied in; None takes the embedded sample.
        backbone, weights: as in params.yaml; a weights file is copied in, versioned, and pinned by its md5.
        remote: DVC remote; None is the folder .dvc-remote inside the workspace.

    Raises:
        WorkspaceError: the folder is not empty. DataError: there are no images. BackboneError: the network or its weights are not to be had.
    """
    from tlpipeline import backbones, dataset

    if root.exists() and (root.is_file() or any(root.iterdir())):
        raise WorkspaceError(
            f"expected a new or empty folder at {root}, found {'a file' if root.is_file() else 'files in it'}. Choose another one."
        )
    if images is not None and not images.is_dir():
        raise DataError(
            f"expected a folder of images at {images}, found {'a file' if images.exists() else 'nothing'}. "
            "Give --images a folder that holds one folder of images per class."
        )
    if images is not None and root.resolve().is_relative_to(images.resolve()):
        raise WorkspaceError(f"expected a folder outside the images to copy them to, found {root} inside {images}. Choose another one.")
    source = Path(weights)
    md5 = _md5(source) if source.is_file() else backbones.NONE
    # Everything that can be wrong is found before anything is written.
    backbones.load(backbone, weights, md5=md5)
    if images is not None:
        dataset.ingest(images, _preview(images), lambda done, total: progress(Event("init", done, total, "images checked")))
    root.mkdir(parents=True, exist_ok=True)
    try:
        _fill(root, images, backbone, source if source.is_file() else weights, md5, remote)
    except BaseException:
        shutil.rmtree(root)
        raise


def _preview(images: Path) -> dict[str, str]:
    """Return the sides that splits.csv would give small classes, so that a folder can be checked before it is taken over."""
    from tlpipeline import dataset

    hashes = {p.relative_to(images).as_posix(): _md5(p) for p in dataset.files(images) if p.stat().st_size}
    new, _ = dataset.needed_exceptions(images, hashes, {}, frozenset)
    return {line.md5: line.split for line in new}


def _fill(root: Path, images: Path | None, backbone: str, weights: Path | str, md5: str, remote: str | None) -> None:
    from tlpipeline import dataset

    for name in ("dvc.yaml", "params.yaml", "prefect.yaml"):
        shutil.copy(TEMPLATE / name, root / name)
    shutil.copy(TEMPLATE / "gitignore", root / ".gitignore")
    shutil.copy(TEMPLATE / "dvcignore", root / ".dvcignore")
    if images is None:
        dataset.write_digits(root / "images")
        _set(root, "train", "flip", "false")
    else:
        shutil.copytree(images, root / "images")
        _set(root, "data", "name", _name_from(root))
        deployments = root / "prefect.yaml"
        deployments.write_text(deployments.read_text(encoding="utf-8").replace("digits", _name_from(root)), encoding="utf-8")
    _set(root, "backbone", "name", backbone)
    if isinstance(weights, Path):
        (root / "weights").mkdir()
        shutil.copy(weights, root / "weights" / weights.name)
        _set(root, "backbone", "weights", f"weights/{weights.name}")
        _set(root, "backbone", "weights_md5", md5)
    else:
        _set(root, "backbone", "weights", weights)
    versioning.create(root, remote or str(root / ".dvc-remote"))
    (root / ".dvc" / "plots").mkdir(exist_ok=True)
    for name in PLOTS:
        shutil.copy(TEMPLATE / name, root / ".dvc" / "plots" / name)
    tracked = [*TRACKED, "prefect.yaml"]
    if isinstance(weights, Path):
        versioning.add(root, f"weights/{weights.name}")
        tracked += [f"weights/{weights.name}.dvc", "weights/.gitignore"]
    dataset.write_exceptions(root / stages.SPLITS, [])
    versioning.commit(root, "New workspace", tracked)
    commit_data(root, "First images")


def _name_from(root: Path) -> str:
    """Make a model's name of the folder's: lower-case letters, digits and dashes."""
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in root.resolve().name.lower()).strip("-")
    return name if name and name[0].isalpha() else f"images-{name}".strip("-")


def _set(root: Path, section: str, key: str, value: str) -> None:
    """Change one value of params.yaml, its comment kept."""
    path = root / stages.PARAMS
    lines = path.read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"{section}:")))
    at = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(f"  {key}:"))
    rest = lines[at].split("#", 1)
    comment = f"  # {rest[1].strip()}" if len(rest) > 1 else ""
    lines[at] = f"  {key}: {json.dumps(value) if ':' in value else value}".ljust(21) + comment
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def refstats(root: Path, images: Path, progress: Progress = silent) -> Path:
    """Measure reference statistics, name them in params.yaml, and commit both; return the file.

    Raises:
        DataError: there is no such folder, or it holds fewer than two images.
    """
    if not images.is_dir():
        raise DataError(
            f"expected a folder of images at {images}, found {'a file' if images.exists() else 'nothing'}. "
            "Give images like those that the weights were trained on; 500 are enough, and they need no labels."
        )
    checked(root)
    with versioning.workspace_lock(root):
        path = stages.reference(root, images, progress)
        where = path.relative_to(root).as_posix()
        _set(root, "profile", "reference", where)
        versioning.commit(root, f"Reference statistics {where}", [where, stages.PARAMS])
    return path


# --- data -----------------------------------------------------------------------------------------------------------------------------


def commit_data(root: Path, message: str | None = None) -> tuple[str, list[str]]:
    """Version the images: `dvc add`, exceptions for small classes, a git commit, `dvc push`.

    Returns:
        The hash of the data set, and remarks for people.
    """
    from tlpipeline import dataset

    params = stages.params_of(root)
    images = params.data.images
    if versioning.is_stage_output(root, images):
        versioning.reproduce_upstream(root, images)  # a stage writes them; there is nothing to add
        return versioning.data_hash(root, images), []
    dataset.files(root / images)
    digest = versioning.add(root, images)
    known = dataset.read_exceptions(root / stages.SPLITS)
    new, remarks = dataset.needed_exceptions(
        root / images, versioning.files(root, images), known, lambda: _trained_on(root, params.data.name)
    )
    dataset.write_exceptions(root / stages.SPLITS, new)
    parent = Path(images).parent
    versioning.commit(root, message or f"Data {digest[:8]}", [f"{images}.dvc", str(parent / ".gitignore"), stages.SPLITS])
    versioning.push(root)
    return digest, remarks


def _trained_on(root: Path, name: str) -> frozenset[str]:
    return frozenset().union(*(registry.trained_on(root, v) for v in registry.versions(root, name)))


# --- gate and registry ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registration:
    """What became of the model: the version it is registered as (or was already), the tag of its promotion, and what was decided."""

    version: str
    new: bool
    promoted: str
    verdict: gate.Verdict | None
    reason: str


def judge(root: Path, progress: Progress) -> gate.Verdict | None:
    """Compare the workspace's model with the champion on the same test images; None where this very model is registered already."""
    from tlpipeline import dataset, evaluate

    params = stages.params_of(root)
    if registry.registered_as(root, params.data.name, versioning.stage_output(root, "train", stages.MODEL)):
        return None
    challenger = evaluate.read_predictions(root / stages.PREDICTIONS)
    best = registry.champion(root, params.data.name)
    if best is None:
        return gate.against_majority(challenger, stages.read_metrics(root)["majority_class"], params.gate)
    rows = dataset.read_manifest(root / stages.MANIFEST).used(dataset.TEST)
    told = lambda done: progress(Event("gate", done, len(rows), f"{best} on {done} of {len(rows)} test images"))  # noqa: E731
    champion = stages.predict_rows(root, registry.folder(root, best), rows, told)
    return gate.against_champion(challenger, champion, str(best), registry.trained_on(root, best), params.gate)


def register(root: Path, verdict: gate.Verdict | None) -> Registration:
    """Register the model where the gate accepted it; commit lock, metrics and data either way."""
    params = stages.params_of(root)
    name = params.data.name
    tracked = [*TRACKED, f"{params.data.images}.dvc"]
    already = registry.registered_as(root, name, versioning.stage_output(root, "train", stages.MODEL))
    if verdict is None and already is not None:
        versioning.commit(root, "Record the run", tracked)
        return Registration(str(already), False, "", None, f"this model is registered already as {already}: nothing to do.")
    assert verdict is not None, "the gate must speak before a new model is registered"
    case = stages.read_case(root)
    metrics = stages.read_metrics(root)
    if not verdict.accepted:
        versioning.commit(root, f"Rejected: {case.case}, accuracy {metrics['accuracy']:.4f}", tracked)
        versioning.push(root)
        return Registration("", False, "", verdict, verdict.reason)
    number = registry.next_number(root, name, list(metrics["classes"]), case.case)
    version = registry.Version(number, name, "")
    from tlpipeline import report

    (root / registry.CARD).write_text(report.card(str(version), card_facts(root, verdict)), encoding="utf-8")
    version = registry.publish(root, name, number, f"{version}: {case.case}, accuracy {metrics['accuracy']:.4f}", tracked)
    promoted = registry.promote(root, version) if params.gate.promote == "auto" else ""
    return Registration(str(version), True, promoted, verdict, verdict.reason)


def card_facts(root: Path, verdict: gate.Verdict) -> dict[str, Any]:
    """Return all that is needed to rebuild this model, and how good it is."""
    params = stages.params_of(root)
    return {
        "name": params.data.name,
        "case": stages.read_case(root),
        "read": stages.taps_read(root),
        "bounded": bounded(root),
        "metrics": stages.read_metrics(root),
        "verdict": verdict,
        "data": versioning.data_hash(root, params.data.images),
        "model": versioning.stage_output(root, "train", stages.MODEL),
        "params_md5": hashlib.md5((root / stages.PARAMS).read_bytes(), usedforsecurity=False).hexdigest(),
        "params": dataclasses.asdict(params),
        "seed": params.train.seed,
        "parent": versioning.head(root),
        "environment": versioning.environment(["tlpipeline", "torch", "torchvision", "numpy", "scikit-learn", "pillow", "ray", "dvc"]),
    }


def bounded(root: Path) -> tuple[str, ...]:
    """Return what bounded the training of the workspace's model: time or memory that ran out."""
    from tlpipeline.cases import BUDGET

    remarks = tuple(stages.read_json(root, f"{stages.MODEL}/model.json").get("remarks", ()))
    raced = (stages.read_json(root, stages.CASE).get("race") or {}).get("ended", "")
    return remarks + ((f"the race: {raced}",) if raced.startswith(BUDGET) else ())


# --- report ---------------------------------------------------------------------------------------------------------------------------


def write_report(root: Path, registration: Registration) -> Path:
    """Write report.html: one self-contained page about the run."""
    from tlpipeline import dataset, evaluate, report
    from tlpipeline.profile import Profile

    params = stages.params_of(root)
    manifest = dataset.read_manifest(root / stages.MANIFEST, root / stages.QUARANTINE)
    found = evaluate.read_predictions(root / stages.PREDICTIONS)
    rows = {row.md5: row for row in manifest.used(dataset.TEST)}
    errors = [
        report.Mistake(
            rows[found.md5[i]].path,
            found.classes[found.labels[i]],
            found.classes[found.predicted[i]],
            float(found.chances[i].max()),
            report.thumbnail(dataset.read(root / params.data.images, rows[found.md5[i]])),
        )
        for i in evaluate.worst(found, 24)
    ]
    page = report.page(
        name=params.data.name,
        registration=registration,
        case=stages.with_recipe(stages.read_case(root), params),
        read=stages.taps_read(root),
        profile=Profile.from_json(stages.read_json(root, stages.PROFILE)),
        metrics=stages.read_metrics(root),
        matrix=evaluate.confusion(found).tolist(),
        manifest=manifest,
        history=(root / stages.HISTORY).read_text(encoding="utf-8"),
        mistakes=errors,
        remarks=manifest.remarks + shift(root) + bounded(root),
        seconds=stages.read_json(root, stages.RUN).get("seconds", {}),
        training=stages.read_json(root, stages.RUN).get("training", {}),
        data_hash=versioning.data_hash(root, params.data.images),
        commit=versioning.head(root),
    )
    path = root / REPORT
    path.write_text(page, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Summary:
    """What a run ends with, for the terminal."""

    images: int
    classes: int
    rejected: int
    remarks: tuple[str, ...]
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


def shift(root: Path) -> tuple[str, ...]:
    """Say so where the model does significantly worse on the test side than on the validation side: the two are then not of one kind.

    The best of several validations is a little optimistic, so five points are allowed beyond the test interval.
    """
    import csv

    with (root / stages.HISTORY).open(newline="", encoding="utf-8") as file:
        validated = max(float(line["accuracy"]) for line in csv.DictReader(file))
    metrics = stages.read_metrics(root)
    if validated <= metrics["accuracy_high"] + 0.05:
        return ()
    return (
        f"shift: {validated:.1%} on validation but {metrics['accuracy']:.1%} on test: the test images differ from the training images "
        "in kind, or the training side holds near copies",
    )


def summary(root: Path, registration: Registration, report: Path) -> Summary:
    """Return what a run ended with."""
    from tlpipeline import dataset

    manifest = dataset.read_manifest(root / stages.MANIFEST, root / stages.QUARANTINE)
    metrics = stages.read_metrics(root)
    case = stages.read_case(root)
    verdict = registration.verdict
    against = ""
    if verdict is not None:
        against = f"{verdict.champion_accuracy:.1%} of {verdict.champion} on {verdict.images} images"
    return Summary(
        images=len([r for r in manifest.rows if not r.duplicate_of]),
        classes=len(manifest.classes),
        rejected=len(manifest.rejected),
        remarks=manifest.remarks + shift(root) + bounded(root),
        case=case.case,
        reason=case.reason,
        accuracy=metrics["accuracy"],
        low=metrics["accuracy_low"],
        high=metrics["accuracy_high"],
        champion=against,
        version=registration.version,
        new=registration.new,
        outcome=registration.reason,
        report=str(report),
        seconds=stages.read_json(root, stages.RUN).get("seconds", {}),
    )


def decided(root: Path) -> tuple[Any, Any]:
    """Return the decision and the profile that it rests on.

    Raises:
        WorkspaceError: it is no workspace, nothing was decided in it yet, or by another version or profile.
    """
    from tlpipeline.profile import Profile

    for name in (stages.PROFILE, stages.CASE):
        if not (root / name).is_file():
            versioning.require(root)
            raise WorkspaceError(
                f"expected a decision in {root / name}, found no such file. `tlpipeline run` or `dvc repro choose` makes the decision."
            )
    try:
        case, profile = stages.read_case(root), Profile.from_json(stages.read_json(root, stages.PROFILE))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkspaceError(
            f"expected {stages.PROFILE} and {stages.CASE} in {root} as this version writes them, found others ({error!r}). "
            "`dvc repro --force choose` writes them anew."
        ) from error
    if case.slice not in [tap.name for tap in profile.taps]:
        raise WorkspaceError(
            f"expected a decision about {profile.backbone} in {root / stages.CASE}, found one that keeps it up to {case.slice}, which it does not "
            "have: it is older than the profile. `dvc repro choose` decides anew."
        )
    return stages.with_recipe(case, stages.params_of(root)), profile


def decision_markdown(root: Path) -> str:
    """Return the decision for people, as markdown."""
    from tlpipeline import explain

    return explain.markdown(*decided(root))


def evaluation_markdown(root: Path) -> str:
    """Return the evaluation for people, as markdown."""
    from tlpipeline import explain

    metrics = stages.read_metrics(root)
    lines = [
        f"**accuracy {metrics['accuracy']:.1%}** ({metrics['accuracy_low']:.1%} to {metrics['accuracy_high']:.1%}, {metrics['images']} test images), "
        f"balanced {metrics['balanced_accuracy']:.1%}, macro F1 {metrics['macro_f1']:.3f}, calibration error {metrics['calibration_error']:.3f}",
        "",
        "| class | images | precision | recall |",
        "|---|---:|---:|---:|",
    ]
    for label, c in metrics["classes"].items():
        figures = f"{c['precision']:.3f} | {c['recall']:.3f}" if c["images"] else "not evaluated | "
        lines += [f"| {explain.cell(label)} | {c['images']} | {figures} |"]
    return "\n".join(lines)


# --- a run ----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def alone(root: Path, wait_minutes: float) -> Iterator[None]:
    """Hold the workspace for a whole run, and stop the Ray runtime that the run may have started.

    Raises:
        WorkspaceError: it is no workspace, or another run is in it.
    """
    from tlpipeline import distributed

    checked(root)
    with versioning.workspace_lock(root, wait_minutes * 60):
        try:
            yield
        finally:
            distributed.shutdown()


def checked(root: Path, images: Path | None = None) -> None:
    """Check what can be checked before anything runs: the repository, params.yaml, the workers, the images' folder.

    Args:
        root: the workspace.
        images: a folder that is to replace the workspace's images.

    Raises:
        WorkspaceError, ParamsError, BackboneError, ClusterError, DataError: as the checks find.
    """
    from tlpipeline import backbones, cases, cutting, dataset, distributed

    versioning.require(root)
    params = stages.params_of(root)
    if params.choose.case != AUTO:
        cases.find(params.choose.case)
    cases.override(cases.CASES[0], params.train.override)  # type: ignore[arg-type]  # any row will do to check names and types
    backbones.check_name(params.backbone.name)
    if params.choose.slice != AUTO:
        b = params.backbone
        cutting.resolve_tap(backbones.load(b.name, b.weights, md5=b.weights_md5, root=root), params.choose.slice)
    distributed.preflight(params.cluster)
    own = root / params.data.images
    if images is not None:
        dataset.files(images)
    elif not own.is_dir() and not versioning.is_stage_output(root, params.data.images):
        raise DataError(
            f"expected the images in {own}, found no such folder. `dvc pull` brings the versioned ones back; or name others with --images."
        )


def name_of(root: Path) -> str:
    """Return the name under which the workspace's models are registered."""
    return stages.params_of(root).data.name


def count_images(root: Path) -> int:
    """Return the number of versioned files of the data set."""
    return len(versioning.files(root, stages.params_of(root).data.images))


def registered(root: Path) -> list[tuple[str, ...]]:
    """Return a row for each registered version, newest first: version, stages, case, accuracy, interval, data, commit."""
    versioning.require(root)
    rows: list[tuple[str, ...]] = []
    for version in reversed(registry.versions(root, name_of(root))):
        case = json.loads(versioning.show(root, version.commit, stages.CASE) or "{}")
        m = json.loads(versioning.show(root, version.commit, stages.METRICS) or "{}")
        data = versioning.stage_input(root, "ingest", stages.params_of(root).data.images, version.commit)
        rows.append(
            (
                str(version),
                ", ".join(version.stages),
                case.get("case", ""),
                f"{m['accuracy']:.1%}" if m else "",
                f"{m['accuracy_low']:.1%} to {m['accuracy_high']:.1%}" if m else "",
                data[:10],
                version.commit[:10],
            )
        )
    return rows


def card_of(root: Path, text: str) -> str:
    """Return the model card of a version (name@v1, name#prod)."""
    versioning.require(root)
    version = registry.resolve(root, text)
    return versioning.show(root, version.commit, registry.CARD) or f"{version} has no {registry.CARD}"


def take_over(root: Path, images: Path) -> None:
    """Replace the workspace's images by a copy of another folder.

    Raises:
        DataError: no data set can be made of that folder; the workspace keeps its own images then.
    """
    from tlpipeline import dataset

    target = root / stages.params_of(root).data.images
    if images.resolve() == target.resolve():
        return
    dataset.ingest(images, _preview(images), lambda done, total: None)
    draft = target.with_name(f".{target.name}.draft")
    versioning.unlink(draft)
    try:
        shutil.copytree(images, draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    versioning.unlink(target)
    draft.rename(target)


# --- predicting -----------------------------------------------------------------------------------------------------------------------


def predicted(root: Path, model: str, images: Sequence[Path]) -> list[Any]:
    """Return what a model (a folder, name@v1, name#prod) says of image files; in a workspace that can be written with its cache."""
    from tlpipeline import predict

    folder = predict.find(model, root)
    cached = (root / stages.PARAMS).is_file() and os.access(root, os.W_OK)
    with stages.store(root) if cached else nullcontext() as kept:
        return predict.predict(folder, images, kept)


# --- the cache ------------------------------------------------------------------------------------------------------------------------


def cached(root: Path) -> tuple[list[tuple[str, str, str, str]], str]:
    """Return what the cache of a workspace holds, a row each (what, files, MB, last used), and a sentence about all of it."""
    from datetime import datetime

    from tlpipeline import cache

    limit = stages.params_of(root).cache.max_gb
    found = cache.info(root / stages.CACHE)
    rows = [
        (k.label, str(k.files), f"{k.bytes / 1e6:.1f}", datetime.fromtimestamp(k.used).isoformat(sep=" ", timespec="minutes"))
        for k in found
    ]
    return rows, f"{sum(k.bytes for k in found) / 1e9:.3f} of {limit:g} GB (cache.max_gb) in {root / stages.CACHE}"


def clear_cache(root: Path) -> str:
    """Delete the cache of a workspace; return a sentence about it.

    Raises:
        WorkspaceError: a run is in the workspace.
    """
    from tlpipeline import cache

    stages.params_of(root)
    with versioning.workspace_lock(root):  # a run keeps what it computes there
        size = sum(k.bytes for k in cache.info(root / stages.CACHE))
        cache.clear(root / stages.CACHE)
    return f"{size / 1e6:.1f} MB deleted; the next run computes what it needs again"
