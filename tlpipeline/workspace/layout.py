"""The layout of a workspace: names of its files, and functions that read them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from tlpipeline import records
from tlpipeline.choice.decision import Decision, Former
from tlpipeline.errors import DataError, WorkspaceError
from tlpipeline.files import unlink, write_json
from tlpipeline.params import NONE, Data, Params, load
from tlpipeline.progress import Event, Progress, silent
from tlpipeline.training.config import Epoch
from tlpipeline.versioning import git

if TYPE_CHECKING:
    from tlpipeline.backbones.classifier import Description
    from tlpipeline.checking.quality import Quality
    from tlpipeline.data.cache import Store
    from tlpipeline.data.facts import FactStore
    from tlpipeline.data.layouts import Layout
    from tlpipeline.data.sources import Rules, Source
    from tlpipeline.evaluation.metrics import Metrics
    from tlpipeline.profiling.profile import Profile

R = TypeVar("R", "Profile", Decision)
PARAMS = "params.yaml"
SPLITS = "splits.csv"
CLASS_MAP = "classes.csv"
MANIFEST, QUARANTINE = "manifest.parquet", "quarantine.csv"
PROFILE = "profile.json"
QUALITY, ALARMS = "quality.csv", "alarms.json"
CASE, RACE = "case.json", "race"
FORMER, START = "former.json", "start.json"
PLANE, PROBE = "plots/plane.csv", "plots/probe.csv"
FORMER_PLOT = "plots/cases.csv"  # expected by the dvc.yaml of an older workspace
MODEL, HISTORY = "model", "plots/history.csv"
METRICS, CLASSES = "metrics.json", "classes.json"
PREDICTIONS, CONFUSION = "predictions.parquet", "plots/confusion.csv"
RUN = "run.json"
OWN = Path(".tlpipeline")
GIGABYTE = 1e9
RUNS = OWN / "runs"
CACHE = OWN / "cache"


def params_of(root: Path) -> Params:
    """Read the workspace's params.yaml."""
    return load(root / PARAMS)


def params_at(root: Path, commit: str) -> Params:
    """Read params.yaml as a commit has it.

    Raises:
        ParamsError: it has none, or one of another version of tlpipeline.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / PARAMS
        path.write_text(git.read_at(root, commit, PARAMS) or "", encoding="utf-8")
        return load(path)


def source_of(
    root: Path,
    images: Path | None = None,
    labels: Path | None = None,
    known: "Layout | None" = None,
    labels_copy: Path | None = None,
) -> "Source":
    """Return where the classes, given splits and groups of the images come from.

    Args:
        images: another folder of images; None is the workspace's.
        labels: another table of labels; None is the workspace's, if it has one.
        known: the layout of the folders; None looks at them.
        labels_copy: what to read in place of the table of labels.

    Raises:
        DataError: there is no such folder, or its layout or the table cannot be used.
    """
    from tlpipeline.data.dataset import require_folder
    from tlpipeline.data.sources import Source

    data = params_of(root).data
    if data.labels != NONE and not (root / data.labels).resolve().is_relative_to(root.resolve()):
        raise DataError(f"expected data.labels inside the workspace, found {data.labels}. Copy the table to {root}, and name it there.")
    folder = images or root / data.images
    if known is None:
        require_folder(folder)
    return Source(folder, replace(rules(data, labels or (None if data.labels == NONE else root / data.labels)), copy=labels_copy), known)


def rules(data: Data, labels: Path | None) -> "Rules":
    """Return what the settings say about the images, with this table of labels."""
    from tlpipeline.data.sources import Rules

    return Rules(labels, data.group, data.class_folder if isinstance(data.class_folder, int) else None, data.rename)


def read_profile(root: Path) -> "Profile":
    """Return the measurements in profile.json.

    Raises:
        WorkspaceError: it is damaged, or another version of tlpipeline wrote it.
    """
    from tlpipeline.profiling.profile import Profile

    return _consistent(records.read(Profile, root / PROFILE, records.ANEW, extra="forbid"), root / PROFILE)


def read_quality(root: Path) -> "Quality":
    """Return what the stage check wrote.

    Raises:
        WorkspaceError: it is missing or damaged.
    """
    from tlpipeline.checking import quality

    return quality.read_quality(root / QUALITY, root / ALARMS)


def read_case(root: Path) -> Decision:
    """Return the decision in case.json.

    Raises:
        WorkspaceError: it is damaged, or another version of tlpipeline wrote it.
    """
    return _consistent(records.read(Decision, root / CASE, records.ANEW, extra="forbid"), root / CASE)


def read_former(root: Path) -> Former | None:
    """Return the decision of the model in production, as far as it was made with the present settings; None without one.

    The workspace of an older version whose dvc.yaml does not name it as an input of `choose` has none.

    Raises:
        WorkspaceError: former.json is damaged.
    """
    if not (root / FORMER).is_file() or f"- {FORMER}" not in (root / "dvc.yaml").read_text(encoding="utf-8"):
        return None
    former = records.read(Former | None, root / FORMER, "Write `null` into it; the next run fills it again.")  # type: ignore[arg-type]
    params = params_of(root)
    return former if former is not None and (former.network, former.rule) == decided_by(params) else None


def network_packages(root: Path) -> tuple[str, ...]:
    """Return the optional package that the workspace's network is made by, as a tuple of one or none."""
    from tlpipeline.backbones import packages

    package = packages.package_of(params_of(root).backbone.name)
    return (package,) if package else ()


def decided_by(params: Params) -> tuple[str, str]:
    """Return the settings of the network and of the choice as text: a decision that was made by others is no former one."""
    network = [params.backbone.name, params.backbone.weights, params.backbone.weights_md5, params.backbone.code_md5, str(params.data.size)]
    return " ".join(network), " ".join(f"{name}={value}" for name, value in asdict(params.choose).items())


def _consistent(value: R, path: Path) -> R:
    if contradiction := value.contradiction():
        raise records.unlike(path, contradiction, records.ANEW)
    return value


def delete_outdated(root: Path, stage: str) -> None:
    """Delete the profile or the decision if another version wrote it, so that its stage runs again."""
    for name, path, read in (("profile", PROFILE, read_profile), ("choose", CASE, read_case)):
        if name == stage and (root / path).is_file():
            try:
                read(root)
            except WorkspaceError:
                unlink(root / path)


def with_recipe(decision: Decision, params: Params) -> Decision:
    """Return a decision with the changes of `train.override` to its recipe, for display.

    `init` is left out: it may not fit the case. The train stage refuses it then, but the decision must stay readable.
    """
    return decision.overridden({name: value for name, value in params.train.override.items() if name != "init"})


def read_model(root: Path) -> "Description":
    """Return what model/model.json says of the trained model.

    Raises:
        RegistryError: it is missing or damaged.
    """
    from tlpipeline.backbones import classifier

    return classifier.describe(root / MODEL)


def read_metrics(root: Path) -> "Metrics":
    """Return metrics.json with the classes of classes.json.

    Raises:
        WorkspaceError: one of them is missing or damaged.
    """
    from tlpipeline.evaluation.metrics import ClassMetrics, Metrics

    classes = records.read(dict[str, ClassMetrics], root / CLASSES, records.ANEW)
    return replace(records.read(Metrics, root / METRICS, records.ANEW), classes=classes)


def read_history(root: Path) -> list[Epoch]:
    """Return the epochs in plots/history.csv.

    Raises:
        WorkspaceError: it is missing or damaged, or has no lines.
    """
    epochs = records.read_csv(Epoch, root / HISTORY, records.ANEW)
    if not epochs:
        raise records.unlike(root / HISTORY, "it has no lines", records.ANEW)
    return epochs


@dataclass
class RunRecord:
    """The content of run.json: what differs between equal runs.

    Attributes:
        seconds: of each step, None where it was up to date.
        training: its images a second, and the share of time that it waited for data.
    """

    seconds: dict[str, float | None] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)


def read_run(root: Path) -> RunRecord:
    """Return run.json, empty if it is missing or damaged: nothing depends on it."""
    try:
        return records.read(RunRecord, root / RUN, records.ANEW)
    except WorkspaceError:
        return RunRecord()


def record_seconds(root: Path, name: str, seconds: float | None) -> None:
    """Record the seconds of a stage in run.json; the first stage starts it anew."""
    record = RunRecord() if name == "ingest" else read_run(root)
    record.seconds[name] = seconds
    write_json(asdict(record), root / RUN)


def record_training(root: Path, training: dict[str, float]) -> None:
    """Record the speed of training in run.json."""
    write_json(asdict(replace(read_run(root), training=training)), root / RUN)


def open_facts(root: Path, stage: str, progress: Progress = silent) -> "FactStore":
    """Return the workspace's facts about image files; `progress` is told if they were damaged."""
    from tlpipeline.data.decoding import bytes_of
    from tlpipeline.data.facts import FactStore

    most_bytes = bytes_of(params_of(root).data.megapixels)
    return FactStore(root / CACHE, lambda text: progress(Event(stage, 0, 0, text)), most_bytes)


@contextmanager
def open_cache(root: Path) -> "Iterator[Store]":
    """Yield the workspace's cache of features and decoded images; afterwards it is pruned to cache.max_gb, even after an error."""
    import torch

    from tlpipeline.data import cache

    limit = params_of(root).cache.max_gb * GIGABYTE
    try:
        yield cache.Store(root / CACHE if limit else None, limit)
    finally:
        cache.prune(root / CACHE, limit)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            gc.collect()
            torch.cuda.empty_cache()  # free it for the workers of the next stage
