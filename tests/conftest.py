"""Shared fixtures: small images with a known truth, a workspace, the real data, one Prefect server for the whole session."""

import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.images import paint
from tests.helpers.scenes import known  # noqa: F401  (a fixture)
from tests.helpers.workspaces import REPOSITORY, set_param
from tlpipeline.data import dataset, splits
from tlpipeline.data.dataset import Row

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("ITERATIVE_DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
for role in ("AUTHOR", "COMMITTER"):  # who runs the tests may have told git no name
    os.environ.setdefault(f"GIT_{role}_NAME", "tests")
    os.environ.setdefault(f"GIT_{role}_EMAIL", "tests@example.org")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real images and weights, or a skip."""
    folder = Path(os.environ.get("TLPIPELINE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "squeezenet1_0-imagenet.safetensors").exists():
        pytest.skip(f"no real data at {folder}: set TLPIPELINE_DATA")
    return folder


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The host and port of a server that lets everybody in and never says a word; half a second is waited for it."""
    monkeypatch.setenv("TLPIPELINE_TIMEOUT", "0.5")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes <class>/<index>.png and gives the folder."""

    def make(classes: int = 3, each: int = 20, name: str = "pictures", size: int = 32) -> Path:
        folder = tmp_path / name
        for label in range(classes):
            (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
            for index in range(each):
                paint(label, index, size).save(folder / f"class{label}" / f"{index:03d}.png")
        return folder

    return make


@pytest.fixture
def listed(make_images: Callable[..., Path]) -> tuple[Path, list[Row]]:
    """A folder of 21 images in three classes, and their rows."""
    folder = make_images(classes=3, each=7)
    return folder, dataset.ingest(folder, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample as a folder of images; read only."""
    from tlpipeline.data import digits

    folder = tmp_path_factory.mktemp("digits") / "images"
    digits.write(folder)
    return folder


@pytest.fixture(scope="session")
def _blank_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tlpipeline.workspace import create

    folder = tmp_path_factory.mktemp("blank")
    images = folder / "pictures"
    for label in range(3):
        (images / f"class{label}").mkdir(parents=True)
        for index in range(24):
            paint(label, index).save(images / f"class{label}" / f"{index:03d}.png")
    create.init(folder / "workspace", images, "demonstration", "DEFAULT", None)
    set_param(folder / "workspace", "cluster.workers", "0")
    set_param(folder / "workspace", "cluster.gpu", "false")  # bits are compared
    return folder / "workspace"


@pytest.fixture
def workspace(_blank_workspace: Path, tmp_path: Path) -> Path:
    """A fresh workspace of 72 small images in 3 classes that trains in this process."""
    target = tmp_path / "workspace"
    shutil.copytree(_blank_workspace, target, symlinks=True)
    return target


@pytest.fixture(scope="session")
def _registered_workspace(_blank_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tlpipeline.progress import silent
    from tlpipeline.workspace import release, stages

    folder = tmp_path_factory.mktemp("registered") / "workspace"
    shutil.copytree(_blank_workspace, folder, symlinks=True)
    for name in stages.STAGES:
        stages.bring_up_to_date(folder, name, silent)
    assert release.register(folder, release.evaluate_gate(folder, silent)).new
    return folder


@pytest.fixture
def registered(_registered_workspace: Path, tmp_path: Path) -> Path:
    """A workspace whose model is registered as workspace@v0.1.0; no flow ran in it yet."""
    target = tmp_path / "workspace"
    shutil.copytree(_registered_workspace, target, symlinks=True)
    return target


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server and database for all tests that run flows."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def steps() -> Iterator[list[tuple[float, float]]]:
    """The learning rate and the norm of the gradient of each optimizer step that is taken."""
    from torch.optim import Optimizer
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    taken: list[tuple[float, float]] = []

    def note(made: Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in made.param_groups for p in group["params"] if p.grad is not None]
        taken.append((made.param_groups[0]["lr"], math.sqrt(sum(float(g.square().sum()) for g in gradients))))

    hook = register_optimizer_step_pre_hook(note)
    yield taken
    hook.remove()


@pytest.fixture
def job(make_images: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Makes training jobs on three painted classes, ninety images."""
    from tests.helpers.training import EAGER
    from tlpipeline.data import dataset
    from tlpipeline.training.config import TrainingConfig

    folder = make_images(classes=3, each=30)
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    dataset.write_manifest(manifest, tmp_path / "manifest.parquet", tmp_path / "quarantine.csv")

    def make(decision: Any, name: str = "run", **changes: Any) -> TrainingConfig:
        plain = {
            "workspace": str(tmp_path), "images": str(folder), "manifest": str(tmp_path / "manifest.parquet"), "backbone": "demonstration",
            "weights": "DEFAULT", "weights_md5": "none", "plan": decision.plan, "seed": 0, "epochs": 3,
            "batch_size": 16, "flip": False, "precision": "float32", "history": str(tmp_path / f"{name}.jsonl"), "cadence": EAGER,
        }  # fmt: skip
        return TrainingConfig(**{**plain, **changes})

    return make
