"""Training jobs in this process and in a group of processes."""

import json
import socket
import subprocess
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.decisions import decision_for
from tests.helpers.processes import start_member
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice.cases import Case
from tlpipeline.choice.decision import Decision
from tlpipeline.training.config import TrainingConfig, TrainingPlan
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.recipe import Recipe
from tlpipeline.training.train import run

READ_LAST = (TapPooling("fc2", 128, (1,)),)


READ_CUT = (TapPooling("conv2", 64, (1, 2, 4)), TapPooling("conv1", 32, (1, 2, 4)))


def config_of(content: Mapping[str, Any]) -> TrainingConfig:
    """Return the training job that `asdict` wrote as JSON for another process."""
    plan = content["plan"]
    taps = {
        name: tuple(TapPooling(tap["tap"], tap["channels"], tuple(tap["grids"])) for tap in plan[name])
        for name in ("head_taps", "final_head_taps")
    }
    return TrainingConfig(**{**content, "plan": TrainingPlan(**{**plan, "recipe": Recipe(**plan["recipe"]), **taps}), "callbacks": ()})


def decided(case: Case, **recipe: Any) -> Decision:
    """A decision for this row on the demonstration network. No head is solved last unless it is asked for: what was trained is looked at."""
    made = decision_for(case, READ_CUT if case.keep == "slice" else READ_LAST, 32)
    return replace(made, recipe=replace(case.recipe, **{"solve_again": False} | recipe))


def trained(job: TrainingConfig, folder: Path) -> dict[str, torch.Tensor]:
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    finished = run(job, LocalContext(folder), scratch)
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
