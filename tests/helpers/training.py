"""Training jobs in this process and in a group of processes."""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.decisions import decision_for
from tests.helpers.processes import start_member
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice.cases import Case
from tlpipeline.choice.decision import Decision
from tlpipeline.training.callbacks import EpochEnd
from tlpipeline.training.config import Cadence, TrainingConfig, TrainingPlan
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.recipe import Recipe
from tlpipeline.training.train import run

READ_LAST = (TapPooling("fc2", 128, (1,)),)


READ_CUT = (TapPooling("conv2", 64, (1, 2, 4)), TapPooling("conv1", 32, (1, 2, 4)))


EAGER = Cadence(checkpoint_share=1.0)  # checkpoints are written whenever they could be, however slow the machine is


class Interrupted(Exception):
    """Stands for a crash right after a checkpoint, or in the middle of the features."""


class Crashing(LocalContext):
    """Crashes right after so many checkpoints; 0: never."""

    def __init__(self, folder: Path, after: int = 0) -> None:
        super().__init__(folder)
        self.left = after

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        super().report(metrics, folder)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


class Recording(LocalContext):
    """Remembers the state and the weights of each checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.states: list[dict[str, Any]] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}  # by epoch
        self.phases: dict[str, dict[str, torch.Tensor]] = {}  # the last ones of each phase

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        super().report(metrics, folder)
        assert folder is not None
        self.states.append(json.loads((folder / "state.json").read_text()))
        if (folder / "current.safetensors").exists():
            current = load_file(folder / "current.safetensors")
            self.weights[self.states[-1]["epoch"]] = self.phases[self.states[-1]["phase"]] = current


class Clock:
    """A clock that stands still unless somebody moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Ticking:
    """A callback that moves a clock by so many seconds after each epoch, and crashes after the epoch `crash`."""

    clock: Clock
    seconds: float = 60.0
    crash: int = 0

    def on_epoch_end(self, epoch: EpochEnd) -> bool:
        self.clock.now += self.seconds
        if epoch.state.epoch == self.crash:
            raise Interrupted
        return False


def config_of(content: Mapping[str, Any]) -> TrainingConfig:
    """Return the training job that `asdict` wrote as JSON for another process."""
    plan = content["plan"]
    taps = {
        name: tuple(TapPooling(tap["tap"], tap["channels"], tuple(tap["grids"])) for tap in plan[name])
        for name in ("head_taps", "final_head_taps")
    }
    return TrainingConfig(
        **{
            **content,
            "plan": TrainingPlan(**{**plan, "recipe": Recipe(**plan["recipe"]), **taps}),
            "callbacks": (),
            "cadence": Cadence(**content["cadence"]),
        }
    )


def decided(case: Case, **recipe: Any) -> Decision:
    """A decision for this row on the demonstration network. No head is solved last unless it is asked for: what was trained is looked at."""
    made = decision_for(case, READ_CUT if case.keep == "slice" else READ_LAST, 32)
    return replace(made, recipe=replace(case.recipe, **{"refit_head": False} | recipe))


def trained(
    job: TrainingConfig, folder: Path, context: LocalContext | None = None, clock: Callable[[], float] = time.monotonic
) -> dict[str, torch.Tensor]:
    """Run a job in this process; return the weights of the finished model."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    finished = run(job, context or LocalContext(folder), scratch, clock)
    assert finished is not None
    return load_file(finished / "model" / "weights.safetensors")


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "scratch" / "finished" / "history.json").read_text())["history"]


def in_group(size: int, items: list[dict[str, Any]], spec: Path) -> None:
    """Run jobs in a group of so many processes."""
    spec.write_text(json.dumps(items))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [spec.with_name(f"{spec.stem}-{rank}.txt") for rank in range(size)]
    members = []
    for rank in range(size):
        with said[rank].open("w") as errors:
            members.append(start_member(rank, size, port, spec, stderr=errors))
    with ThreadPoolExecutor(size) as pool:
        # A member that fails leaves the others waiting for it: the first failure ends them all.
        wait([pool.submit(_succeeded, member) for member in members], timeout=400, return_when=FIRST_EXCEPTION)
        codes = [member.poll() for member in members]
        for member in members:
            member.kill()
    assert codes == [0] * size, "\n".join(path.read_text()[-3000:] for path in said)


def _succeeded(member: subprocess.Popen[bytes]) -> None:
    """Wait for a process, and raise where it failed."""
    assert member.wait() == 0


def finished_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scratch" / "finished" / "state.json").read_text())


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], atol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol, rtol=0) for k in a)
