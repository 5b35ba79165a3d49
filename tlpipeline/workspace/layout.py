"""The layout of a workspace: names of its files, and functions that read them."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tlpipeline.choice.decision import Decision
from tlpipeline.errors import WorkspaceError
from tlpipeline.files import is_truncated_json, unlink, write_json
from tlpipeline.params import Params, load

if TYPE_CHECKING:
    from tlpipeline.data.cache import Store
    from tlpipeline.profiling.profile import Profile

T = TypeVar("T")
PARAMS = "params.yaml"
SPLITS = "splits.csv"
MANIFEST, QUARANTINE = "manifest.parquet", "quarantine.csv"
PROFILE = "profile.json"
CASE, RACE = "case.json", "race"
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


def read_profile(root: Path) -> "Profile":
    """Return the measurements in profile.json.

    Raises:
        WorkspaceError: another version of tlpipeline wrote it.
    """
    from tlpipeline.profiling.profile import Profile

    return _parsed(Profile.from_json, root / PROFILE)


def read_case(root: Path) -> Decision:
    """Return the decision in case.json.

    Raises:
        WorkspaceError: another version of tlpipeline wrote it.
    """
    return _parsed(Decision.from_json, root / CASE)


def _parsed(from_json: Callable[[Any], T], path: Path) -> T:
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkspaceError(
            f"expected {path} as this version writes it, found another content ({error!r}). `tlpipeline run` writes it anew; "
            "for `dvc repro`, delete the file first."
        ) from error


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


def head_taps(root: Path) -> tuple[str, ...]:
    """Return the taps that the model's head reads, deepest first."""
    return tuple(reading["tap"] for reading in read_json(root, f"{MODEL}/model.json")["readings"])


def read_metrics(root: Path) -> dict[str, Any]:
    """Return metrics.json, with the metrics of each class as `classes`."""
    return read_json(root, METRICS) | {"classes": read_json(root, CLASSES)}


def read_json(root: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file of the workspace, {} if it is missing."""
    path = root / name
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def read_run(root: Path) -> dict[str, Any]:
    """Return run.json, {} if it is missing or truncated: nothing depends on it."""
    return {} if is_truncated_json(root / RUN) else read_json(root, RUN)


def record_run(root: Path, name: str, value: Any) -> None:
    """Record in run.json what differs between equal runs: the seconds of a stage, or the speed of its training."""
    content = {} if name == "ingest" else read_run(root)
    if isinstance(value, dict):
        content[name] = value
    else:
        content.setdefault("seconds", {})[name] = value
    write_json(content, root / RUN)


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
