"""The stages of the pipeline. `dvc.yaml` and the flow call the same functions.

What a stage writes depends on its inputs alone; seconds go to run.json, which git and DVC ignore. Its outputs are moved into place
together when they are complete, so an interrupted stage leaves nothing half-written.
"""

import csv
import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tlpipeline.choice.decision import Decision
from tlpipeline.errors import DataError
from tlpipeline.files import unlink
from tlpipeline.params import ChooseParams, Params
from tlpipeline.progress import Event, Progress
from tlpipeline.registry import versions
from tlpipeline.training.config import TrainingConfig
from tlpipeline.versioning import dvc, lock
from tlpipeline.workspace import alarming, pinning, settings, starting
from tlpipeline.workspace.layout import (
    ALARMS,
    CACHE,
    CASE,
    CLASS_MAP,
    CLASSES,
    CONFUSION,
    FORMER_PLOT,
    GIGABYTE,
    HISTORY,
    MANIFEST,
    METRICS,
    MODEL,
    PARAMS,
    PLANE,
    PREDICTIONS,
    PROBE,
    PROFILE,
    QUALITY,
    QUARANTINE,
    RACE,
    RUNS,
    SPLITS,
    delete_outdated,
    open_cache,
    open_facts,
    params_of,
    read_case,
    read_former,
    read_profile,
    record_seconds,
    record_training,
    source_of,
    with_recipe,
)
from tlpipeline.workspace.outputs import atomic_outputs
from tlpipeline.workspace.pinning import PinnedData, pins_of

if TYPE_CHECKING:
    import torch

    from tlpipeline.backbones.classifier import Start
    from tlpipeline.backbones.pooling import TapPooling
    from tlpipeline.backbones.taps import Backbone
    from tlpipeline.data.cache import Column, Store
    from tlpipeline.data.contents import ImageFolder
    from tlpipeline.data.dataset import Manifest, Row
    from tlpipeline.evaluation.metrics import Predictions
    from tlpipeline.profiling.profile import Profile

# The packages that determine what a training run does: an interrupted run is resumed only by the same code.
TRAINING_CODE = ("data", "backbones", "training", "profiling", "choice")


# --- the stages -----------------------------------------------------------------------------------------------------------------------


def ingest(root: Path, progress: Progress, pinned: PinnedData | None = None) -> None:
    """List the images in manifest.parquet, and rejected files with the reason in quarantine.csv."""
    from tlpipeline.data import classes, dataset, splits

    params = params_of(root)
    small_files = root / pinning.FOLDER if pinned else root
    manifest = dataset.ingest(
        pinning.folder_of(root, pinned),
        splits.read_exceptions(small_files / SPLITS),
        lambda done, total: progress(Event("ingest", done, total, f"{done} of {total} files listed")),
        hashes=dvc.listed_files(root, pinned.recorded[pinned.images]) if pinned else dvc.file_hashes(root, params.data.images),
        store=open_facts(root, "ingest", progress),
        source=pinned.source(root) if pinned else source_of(root),
        class_map=classes.read_map(small_files / CLASS_MAP),
        dropped=params.data.drop,
    )
    with atomic_outputs(root, MANIFEST, QUARANTINE) as (table, quarantine):
        dataset.write_manifest(manifest, table, quarantine)


def profile(root: Path, progress: Progress, pinned: PinnedData | None = None) -> None:
    """Measure the data set on a limited sample: profile.json."""
    from tlpipeline.backbones.precision import extracts_in_bfloat16
    from tlpipeline.choice import decide
    from tlpipeline.data import dataset
    from tlpipeline.profiling import measure
    from tlpipeline.profiling.profile import Profile

    params = params_of(root)
    manifest = dataset.read_manifest(root / MANIFEST)
    backbone, size = _backbone_and_size(root, params, manifest)

    def undecided(partial_profile: Profile) -> bool:
        # By the defaults: a profile measures, and stays valid when the settings of `choose` change.
        return decide.undecided(partial_profile, ChooseParams())

    device = device_of(params)
    with open_cache(root) as store:
        measured = measure.measure(
            backbone, pinning.folder_of(root, pinned), manifest, size, params.profile, undecided, progress, device, store,
            extracts_in_bfloat16(device, params.backbone.precision),
        )  # fmt: skip
    with atomic_outputs(root, PROFILE) as (path,):
        path.write_text(json.dumps(measured.to_json(), indent=1) + "\n", encoding="utf-8")


def check(root: Path, progress: Progress, pinned: PinnedData | None = None) -> None:
    """Look for what is wrong with the data: images in quality.csv, alarms in alarms.json."""
    from tlpipeline.checking import checks, labels, quality
    from tlpipeline.data import copies, dataset, splits

    params = params_of(root)
    images, manifest, measured = pinning.folder_of(root, pinned), dataset.read_manifest(root / MANIFEST), read_profile(root)
    rows = manifest.used(*splits.SPLIT_NAMES)
    contents = open_facts(root, "check", progress)
    known = dataset.facts_of(
        images,
        rows,
        contents,
        lambda done, total: progress(Event("check", done, total, f"facts of {done} of {total} images")),
    )
    by_content = {row.md5: facts for row, facts in known}
    pairs = copies.find_copies({md5: facts.picture for md5, facts in by_content.items() if copies.comparable(facts)}, contents)
    labeled = labels.drawn(manifest, params.check.images, params.profile.seed)
    probabilities = None
    if labeled:
        with open_cache(root) as store:
            read = tap_reader(root, params, manifest, measured, store)(
                images, labeled, lambda done: progress(Event("check", done, len(labeled), f"labels of {len(labeled)} images"))
            )
        groups = [row.group for row in labeled] if any(row.group for row in labeled) else None
        probabilities = labels.left_out_probabilities(read, measured.best.reading, labels.numbered(labeled), groups)
    checked = checks.check(rows, [by_content[row.md5] for row in rows], pairs, measured, labeled, probabilities, params.check)
    with atomic_outputs(root, QUALITY, ALARMS) as (findings, alarms):
        quality.write_quality(checked, findings, alarms)


def choose(root: Path, progress: Progress, pinned: PinnedData | None = None) -> None:
    """Decide the case: case.json and its plots, and in race/ the checkpoints of a race, which the train stage reuses."""
    from tlpipeline.choice import decide, explain, policy, race, reasons

    params = params_of(root)
    measured = read_profile(root)
    former = read_former(root)
    decision = decide.choose(measured, params.choose, former)
    if decision.race_wanted and "init" in params.train.override:
        decision = dataclasses.replace(decision, race_wanted=False, no_race="other_weights")
    older = (FORMER_PLOT,) * (FORMER_PLOT in (root / "dvc.yaml").read_text(encoding="utf-8"))
    with atomic_outputs(root, CASE, RACE, PLANE, PROBE, *older) as (path, race_folder, *plots):
        race_folder.mkdir()
        if decision.race_wanted:
            runs = (root / RUNS).resolve()
            name = _code_key(dvc.stage_key(root, "choose", pins_of(pinned)), params)

            def start(arm: Decision) -> TrainingConfig:
                return _training_config(root, params, arm.overridden(params.train.override), runs / f"{name}-{arm.freeze}.jsonl", pinned)

            with open_cache(root):
                decision = race.run(
                    measured, policy.weigh(measured, params.choose, former=former), start, params.cluster, name, runs, race_folder, progress
                )
        progress(Event("choose", 1, 1, f"{decision.case}: {reasons.summary(decision, measured)}"))
        path.write_text(json.dumps(decision.to_json(), indent=2) + "\n", encoding="utf-8")
        # DVC's plots sort taps by name, so numbers come first.
        probe = explain.probe_rows(measured, with_recipe(decision, params))
        taps = [{"layer": f"{i:02d} {row['tap']}"} | row for i, row in enumerate(probe, 1)]
        plane = explain.plane_rows(decision)
        for plot, rows in zip(plots, (plane, taps, plane), strict=False):
            _write_csv(plot, list(rows[0]), [list(row.values()) for row in rows])


def train(root: Path, progress: Progress, pinned: PinnedData | None = None) -> None:
    """Train the decided case: model/, and the history of its epochs. A checkpoint of the race is reused."""
    from tlpipeline.backbones import classifier
    from tlpipeline.data import dataset, splits
    from tlpipeline.training import ray_train

    params = params_of(root)
    decision = read_case(root).overridden(params.train.override)
    manifest = dataset.read_manifest(root / MANIFEST)
    champion, why_cold = starting.usable(root, params, decision, manifest)
    for remark in [*_without_effect(root, params, decision), *filter(None, [why_cold])]:
        progress(Event("train", 0, 0, remark))
    runs = (root / RUNS).resolve()
    name = f"{decision.case}-{_code_key(dvc.stage_key(root, 'train', pins_of(pinned)), params)}"
    race = str((root / RACE).resolve()) if decision.race is not None else ""
    job = dataclasses.replace(_training_config(root, params, decision, runs / f"{name}.jsonl", pinned), start=race)
    finished: dict[str, Path] = {}
    with open_cache(root):
        if champion is None or params.train.start == starting.BOTH:
            finished[starting.COLD] = ray_train.run(job, params.cluster, name, runs, progress)
        if champion is not None:
            warm = starting.warm(job, root, champion, runs / f"{name}-{starting.WARM}.jsonl", finished.get(starting.COLD))
            if warm is None:
                progress(Event("train", 0, 0, f"train.budget_minutes leaves no time to start from the weights of {champion.version}"))
            else:
                progress(Event("train", 0, 0, f"starting from the weights of {champion.version}"))
                finished[starting.WARM] = ray_train.run(warm, params.cluster, f"{name}-{starting.WARM}", runs, progress)
    kept: str = starting.COLD
    start: Start | None = None
    if champion is not None and starting.WARM in finished:
        kept, start = starting.choose(finished, champion, len(manifest.used(splits.VAL)))
        progress(Event("train", 1, 1, start.text))
    lines = json.loads((finished[kept] / "history.json").read_text(encoding="utf-8"))
    with atomic_outputs(root, MODEL, HISTORY) as (model, curve):
        record_training(root, lines["speed"])
        shutil.copytree(finished[kept] / MODEL, model)
        if start is not None:
            limits = [remark for folder in finished.values() for remark in classifier.describe(folder / MODEL).remarks]
            description = dataclasses.replace(classifier.describe(model), start=start, remarks=tuple(dict.fromkeys(limits)))
            classifier.redescribe(model, description)
        _write_csv(
            curve,
            ["epoch", "arm", "loss", "accuracy", "log_loss"],
            [[h["epoch"], h["phase"], h["loss"], h["accuracy"], h["log_loss"]] for h in lines["history"]],
        )
    # `dvc repro` has yet to record this run, and needs it again if that fails. Other runs are obsolete.
    for other in runs.iterdir():
        if not other.name.startswith(name):
            unlink(other)


def _without_effect(root: Path, params: Params, decision: Decision) -> list[str]:
    """Return remarks about settings that change nothing in this case."""
    from tlpipeline.training.override import unused_overrides

    changes = params.train.override
    if changes and (unused := unused_overrides(decision.plan, changes, _backbone(root, params).normalization)):
        why = "whose head is solved, not trained" if decision.plan.freeze else "with this network and these settings"
        return [f"train.override: {', '.join(unused)} changes nothing in {decision.case}, {why}"]
    return []


def _training_config(root: Path, params: Params, decision: Decision, history: Path, pinned: PinnedData | None) -> TrainingConfig:
    return TrainingConfig(
        workspace=str(root.resolve()),
        images=str((root / params.data.images).resolve()),
        contents=pinned.contents if pinned else "",
        manifest=str((root / MANIFEST).resolve()),
        backbone=params.backbone.name,
        weights=params.backbone.weights,
        weights_md5=params.backbone.weights_md5,
        code_md5=params.backbone.code_md5,
        plan=decision.plan,
        seed=params.train.seed,
        epochs=params.train.epochs,
        batch_size=params.train.batch_size,
        flip=params.train.flip,
        precision=params.backbone.precision,
        history=str(history),
        budget_minutes=params.train.budget_minutes,
        cache=str((root / CACHE).resolve()) if params.cache.max_gb else "",
        cache_bytes=params.cache.max_gb * GIGABYTE,
    )


def evaluate(root: Path, progress: Progress, pinned: PinnedData | None = None) -> None:
    """Measure the model on the test split: metrics.json, classes.json, predictions.parquet, the confusion matrix."""
    from tlpipeline.data import dataset, splits
    from tlpipeline.evaluation import metrics as measuring

    params = params_of(root)
    manifest = dataset.read_manifest(root / MANIFEST)
    rows = manifest.used(splits.TEST)
    if not rows:
        raise DataError("expected test images, found none: there is nothing to evaluate. Add images, then run `tlpipeline data commit`.")
    predictions = predict_rows(
        root,
        root / MODEL,
        rows,
        lambda done: progress(Event("evaluate", done, len(rows), f"{done} of {len(rows)} test images")),
        pinned,
    )
    trained_on = measuring.class_counts(manifest.used(splits.TRAIN))
    content = dataclasses.asdict(
        measuring.compute_metrics(predictions, params.evaluate.confidence, trained_on, [row.group for row in rows])
    )
    in_training = {row.group for row in manifest.used(splits.TRAIN, splits.VAL)} - {""}
    content |= measuring.without_copies(predictions, [row.group in in_training for row in rows], params.evaluate.confidence)
    content = {name: value for name, value in content.items() if value is not None}
    # In a separate file, so that `dvc metrics show` stays readable with many classes.
    classes = content.pop("classes")
    with atomic_outputs(root, METRICS, CLASSES, PREDICTIONS, CONFUSION) as (path, classes_path, predictions_path, confusion_path):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        classes_path.write_text(json.dumps(classes, indent=2) + "\n", encoding="utf-8")
        measuring.write_predictions(predictions, predictions_path)
        measuring.write_confusion(predictions, confusion_path)


class Stage(Protocol):
    """A stage; it takes the images as a run pinned them, or as they are now."""

    def __call__(self, root: Path, progress: Progress, pinned: PinnedData | None = None) -> None:
        """Write the outputs of the stage."""


STAGES: dict[str, Stage] = {
    "ingest": ingest,
    "profile": profile,
    "check": check,
    "choose": choose,
    "train": train,
    "evaluate": evaluate,
}


# --- running a stage ------------------------------------------------------------------------------------------------------------------


def run(root: Path, name: str, progress: Progress) -> None:
    """Run one stage even if it is up to date, as `dvc repro` asks for; its seconds go to run.json.

    Raises:
        WorkspaceError: this is not a workspace, or an input of the stage is missing.
        PipelineError: an error of the stage.
    """
    lock.require_workspace(root)
    with lock.hold(root), lock.disk_errors(root), timed(root, name):
        settings.add_missing_sections(root / PARAMS, root / "dvc.yaml", name)
        settings.add_inputs(root / PARAMS, root / "dvc.yaml")
        dvc.require_inputs(root, name)
        if name == "choose":
            alarming.refuse_stopped(root)
        STAGES[name](root, progress)


def bring_up_to_date(root: Path, name: str, progress: Progress, pinned: PinnedData | None = None) -> bool:
    """Run one stage if it is stale, record it in dvc.lock, and return whether it ran. The flow calls this.

    Args:
        pinned: the data that the run keeps; None takes them as they are now.
    """

    def run_timed() -> None:
        with timed(root, name):
            STAGES[name](root, progress, pinned)

    with lock.disk_errors(root):
        settings.add_missing_sections(root / PARAMS, root / "dvc.yaml", name)
        settings.add_inputs(root / PARAMS, root / "dvc.yaml")
        delete_outdated(root, name)
        if name == "choose":  # the next step trains, or this one does in a race
            alarming.refuse_stopped(root)
        if dvc.has_stage(root, name):
            ran = dvc.run_stage(root, name, run_timed, pins_of(pinned))
        else:
            run_timed()  # the dvc.yaml of an older workspace does not list it
            ran = True
    if name in ("choose", "train") and ran:
        shutil.rmtree(root / RUNS, ignore_errors=True)  # a finished run of this name would be resumed without training
    if not ran:
        record_seconds(root, name, None)
    return ran


@contextmanager
def timed(root: Path, name: str) -> Iterator[None]:
    """Write the seconds of the body to run.json."""
    started = time.monotonic()
    yield
    record_seconds(root, name, round(time.monotonic() - started, 2))


def predict_rows(
    root: Path, folder: Path, rows: "Sequence[Row]", progress: Callable[[int], None], pinned: PinnedData | None = None
) -> "Predictions":
    """Return a model's predictions for rows of the manifest; `progress` is called with the number of images done."""
    from tlpipeline.backbones import classifier as models
    from tlpipeline.data.loader import Images
    from tlpipeline.evaluation import metrics as measuring

    params = params_of(root)
    device = device_of(params)
    classifier, description = models.load(folder, root, partial(versions.names_network, root))
    images = Images(pinning.folder_of(root, pinned), rows, description.transforms)
    with open_cache(root) as store:
        probabilities = models.probabilities(classifier.to(device), images, device, progress, store)
    return measuring.make_predictions(rows, description.classes, probabilities.numpy())


def _backbone(root: Path, params: Params, size: int | None = None) -> "Backbone":
    from tlpipeline.backbones import catalogue

    b = params.backbone
    return catalogue.load(b.name, b.weights, md5=b.weights_md5, code_md5=b.code_md5, root=root, size=size, seed=params.train.seed)


def _backbone_and_size(root: Path, params: Params, manifest: "Manifest") -> "tuple[Backbone, int]":
    """Return the network and its input side in pixels."""
    from tlpipeline.backbones import taps as cutting
    from tlpipeline.data import splits

    backbone = _backbone(root, params)
    short = [min(row.width, row.height) for row in manifest.used(splits.TRAIN)]
    if not short:
        raise DataError("expected training images to profile, found none. See quarantine.csv for the files that were rejected.")
    size = cutting.input_size(backbone, params.data.size, statistics.median(short))
    if size != backbone.transforms.size and backbone.positional:
        backbone = _backbone(root, params, size)
    return backbone, size


def tap_reader(
    root: Path, params: Params, manifest: "Manifest", measured: "Profile", store: "Store"
) -> "Callable[[ImageFolder, Sequence[Row], Callable[[int], None]], torch.Tensor]":
    """Return what reads features at the profile's best tap, given a folder, images in it, and what to call with the number of new ones."""
    from tlpipeline.backbones import features
    from tlpipeline.backbones.precision import extracts_in_bfloat16

    device = device_of(params)
    backbone, size = _backbone_and_size(root, params, manifest)
    half = extracts_in_bfloat16(device, params.backbone.precision)
    return lambda images, rows, progress: features.at_tap(
        backbone, measured.best.reading, size, images, rows, store, device, half, progress
    )


def cached_features(root: Path) -> "list[tuple[TapPooling, Column]]":
    """Return the features that the cache has, at the first tap, at the profile's best and at the last one. Nothing is computed or written.

    Raises:
        BackboneError: the network cannot be loaded, or is not the one of the profile.
        WorkspaceError: the profile is damaged, or another version wrote it.
    """
    from tlpipeline.backbones import features
    from tlpipeline.backbones.precision import extracts_in_bfloat16
    from tlpipeline.data import cache, dataset

    params, measured = params_of(root), read_profile(root)
    device = device_of(params)
    backbone, size = _backbone_and_size(root, params, dataset.read_manifest(root / MANIFEST))
    readings = list({probe.name: probe.reading for probe in (measured.taps[0], measured.best, measured.taps[-1])}.values())
    half = extracts_in_bfloat16(device, params.backbone.precision)
    columns = features.cached_columns(backbone, readings, size, cache.Store(root / CACHE), device, half)
    return [(reading, columns[reading.tap]) for reading in readings if reading.tap in columns]


def device_of(params: Params) -> "torch.device":
    """Return the device that passes run on by the settings."""
    import torch

    from tlpipeline.backbones.precision import enable_tf32

    return enable_tf32(torch.device("cuda" if torch.cuda.is_available() and params.cluster.gpu is not False else "cpu"))


def _code_key(key: str, params: Params) -> str:
    """Return the name of a run from its data, params, number of workers and code: only an equal run is resumed."""
    digest = hashlib.md5(f"{key}:{params.cluster.workers}".encode(), usedforsecurity=False)
    package = Path(__file__).parent.parent
    for path in sorted(path for name in TRAINING_CODE for path in (package / name).rglob("*") if path.suffix in (".py", ".json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)
