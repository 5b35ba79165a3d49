"""Whether a workspace can run unattended: one check after another, each fine or with what to do."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tlpipeline.errors import PipelineError
from tlpipeline.versioning import dvc, git, lock
from tlpipeline.workspace import layout

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LEAST_FREE = 2_000_000_000  # bytes, below which a disk fills up within a few runs


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: what was checked.
        status: ok, warning (runs work, but something is missing), or problem (runs fail).
        text: what was found, and for a warning or problem the way out.
    """

    name: str
    status: str
    text: str


def checks(root: Path) -> Iterator[Check]:
    """Yield the checks of a workspace and of this machine, in the order in which a run would need them.

    Raises:
        WorkspaceError: this is not a workspace.
    """
    lock.require_workspace(root)
    for name, check in _CHECKS.items():
        yield checked(name, lambda check=check: check(root))  # type: ignore[misc]


def checked(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    """Return the result of a check that returns a status and a text, or raises what a user can mend."""
    try:
        return Check(name, *check())
    except PipelineError as error:
        return Check(name, PROBLEM, str(error))


def _packages(_: Path) -> tuple[str, str]:
    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("tlpipeline") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = "not installed"
        if installed == "not installed" or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} (found {installed})")
    if wrong:
        return PROBLEM, f"expected {', '.join(wrong)}. Install them again: pip install --upgrade tlpipeline"
    return OK, f"tlpipeline {metadata.version('tlpipeline')} and what it needs"


def _settings(root: Path) -> tuple[str, str]:
    params = layout.params_of(root)
    return OK, f"model {params.data.name}, network {params.backbone.name}"


def _identity(root: Path) -> tuple[str, str]:
    git.require_identity(root)
    return OK, git.run(root, "var", "GIT_COMMITTER_IDENT").rpartition(" ")[0].rpartition(" ")[0]


def _origin(root: Path) -> tuple[str, str]:
    if not git.has_origin(root):
        return WARNING, "no remote: commits and versions exist in this folder only. Add one: git remote add origin URL"
    git.require_branch(root)
    git.require_push(root)
    return OK, "the branch can be pushed"


def _remote(root: Path) -> tuple[str, str]:
    place = dvc.require_writable_remote(root)
    if Path(place).resolve().is_relative_to(root.resolve()):
        return WARNING, f"{place} is inside the workspace, so a lost disk loses the data. Name another: dvc remote modify storage url URL"
    return OK, f"{place} can be written"


def _disk(root: Path) -> tuple[str, str]:
    free = shutil.disk_usage(root).free
    if free < LEAST_FREE:
        return PROBLEM, f"expected {LEAST_FREE / 1e9:g} GB free at {root}, found {free / 1e9:.1f}. Free some space (tlpipeline cache clear)"
    return OK, f"{free / 1e9:.0f} GB free"


def _devices(root: Path) -> tuple[str, str]:
    import torch

    from tlpipeline.training import ray_train

    cluster = layout.params_of(root).cluster
    use_gpu = ray_train.preflight(cluster)
    gpus = torch.cuda.device_count()
    workers = f"{cluster.workers} Ray workers" if cluster.workers else "this process"
    return OK, f"{workers} on {'GPUs' if use_gpu else 'CPUs'}; {gpus} GPUs here"


def _cluster(root: Path) -> tuple[str, str]:
    from tlpipeline.training import ray_train

    cluster, address = layout.params_of(root).cluster, os.environ.get("RAY_ADDRESS", "")
    if not cluster.workers or not address:
        return OK, "not used: training stays on this machine"
    ray_train.require_reachable(address)
    if not cluster.storage:
        return WARNING, "cluster.storage is empty. Set it to a folder or URL that all nodes share, or checkpoints are lost with their node"
    return OK, f"{address} answers; checkpoints go to {cluster.storage}"


_CHECKS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "packages": _packages,
    "settings": _settings,
    "git identity": _identity,
    "git origin": _origin,
    "DVC remote": _remote,
    "disk": _disk,
    "devices": _devices,
    "Ray cluster": _cluster,
}
