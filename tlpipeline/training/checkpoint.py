"""Where a run stands, and the folder that it is kept in: all that a resumed run needs to end as the uninterrupted one would have."""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlpipeline.files import write_json, write_tensors
from tlpipeline.stats import paired
from tlpipeline.training.distributed import DistributedContext, broadcast
from tlpipeline.training.optim import Average, flat

SHARE = 0.1  # of the time that checkpoints between epochs may take: on a GPU a small epoch is shorter than its checkpoint

STATE, CURRENT, BEST, SPARE, OPTIMISER, AVERAGE, MODEL = (
    "state.json", "current.safetensors", "best.safetensors", "spare.safetensors", "optimizer.safetensors", "average.safetensors", "model",
)  # fmt: skip


@dataclass
class State:
    """Where a run stands; with the tensors beside it, all that a resumed run needs.

    Attributes:
        arm: head, fine-tune or scratch: what runs; epoch: epochs of it that are done; step: steps of the next one, loss: their summed loss.
        best_*: the best validation so far, and which arm reached it in which epoch.
        spare_*: the best epoch of the arm that runs, which counts only if time ends the arm before its schedule does.
        history: a line for each epoch.
        stopped: a callback ended the phase.
        records: JSON values that callbacks keep, each under a name of its own.
        slower: times that the rate was halved because training diverged; accumulate: parts of a batch, 0 for the recipe's.
        averaged: steps in the moving average of weights.
        speed, waited: of the first worker lately: images/s, and the share of time that it waited for data.
        seconds: that the run took before it was interrupted, counted only where they are bounded.
        remarks: what bounded the run: no equality is promised where there are any.
    """

    arm: str
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    best_arm: str = ""
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    spare_epoch: int = 0
    spare_accuracy: float = -1.0
    spare_loss: float = math.inf
    head_penalty: float = 0.0
    history: list[dict[str, float | str]] = field(default_factory=list)
    stopped: bool = False
    records: dict[str, Any] = field(default_factory=dict)
    slower: int = 0
    accumulate: int = 0
    averaged: int = 0
    speed: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    finished: bool = False

    def remark(self, text: str) -> None:
        """Note what bounded the run, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def in_parts(self, parts: int) -> None:
        """Have each batch taken in so many parts from now on, because a GPU's memory ran out."""
        self.accumulate = parts
        self.remark(f"the GPU's memory ran out: each batch was taken in {parts} parts")

    def better(self, accuracy: float, loss: float) -> bool:
        """Note a validation; say whether it is the best so far (by accuracy, equals by loss)."""
        if (accuracy, -loss) > (self.best_accuracy, -self.best_loss):
            self.best_arm, self.best_epoch, self.best_accuracy, self.best_loss = self.arm, self.epoch, accuracy, loss
            return True
        return False

    def spared(self, accuracy: float, loss: float) -> bool:
        """Note a validation before the end of an arm; say whether it is the arm's best so far."""
        if (accuracy, -loss) > (self.spare_accuracy, -self.spare_loss):
            self.spare_epoch, self.spare_accuracy, self.spare_loss = self.epoch, accuracy, loss
            return True
        return False

    def cut_short(self) -> bool:
        """Note that time ended the arm; say whether its best epoch is better than what there was."""
        if not self.spare_epoch or (self.spare_accuracy, -self.spare_loss) <= (self.best_accuracy, -self.best_loss):
            return False
        self.best_arm, self.best_epoch = self.arm, self.spare_epoch
        self.best_accuracy, self.best_loss = self.spare_accuracy, self.spare_loss
        return True

    def begin(self, arm: str) -> None:
        """Start an arm."""
        self.arm, self.epoch, self.step, self.slower, self.stopped = arm, 0, 0, 0, False
        self.spare_epoch, self.spare_accuracy, self.spare_loss = 0, -1.0, math.inf

    def replaced(self, accuracy: float, loss: float, correct: str, images: int) -> bool:
        """Note the end of an arm; say whether it takes the place of what there was.

        Fine-tuning takes the place of the head that it started from unless it is clearly worse (two paired standard errors): a validation
        of 20 images must not undo it, and one of none says nothing. Scratch must be better.
        """
        line = next((line for line in self.history if line["arm"] == "head"), None)
        if self.arm == "fine-tune" and line is not None:
            difference, error = paired(correct, str(line["correct"]), images) if images else (0.0, 0.0)
            if difference < -2 * error:
                return False
            self.best_accuracy, self.best_loss = -1.0, math.inf
        return self.better(accuracy, loss)

    @property
    def kept(self) -> dict[str, float | str]:
        """The line of the epoch that is kept."""
        return next(line for line in reversed(self.history) if (line["arm"], line["epoch"]) == (self.best_arm, self.best_epoch))

    @property
    def gained(self) -> bool:
        """Whether what fine-tuning left is better on validation than the frozen probe that it started from."""
        head = next((float(line["accuracy"]) for line in self.history if line["arm"] == "head"), -1.0)
        return self.best_arm == "fine-tune" and self.best_accuracy > head

    def best_epoch_of(self, arm: str) -> int:
        """Return the epoch of an arm's own best validation, 0 before its first: an arm that starts behind may still catch up."""
        lines = [line for line in self.history if line["arm"] == arm]
        best = max(lines, key=lambda line: (line["accuracy"], -float(line["log_loss"])), default=None)
        return int(best["epoch"]) if best else 0

    def summary(self) -> dict[str, float]:
        """Return the best validation."""
        return {"accuracy": self.best_accuracy, "log_loss": self.best_loss, "epoch": self.best_epoch, "head_penalty": self.head_penalty}


class Checkpoints:
    """Keeps State, current, averaged and best weights, and the optimizer, and writes and restores them as safetensors and JSON."""

    def __init__(self, world: DistributedContext, folder: Path, model: nn.Module) -> None:
        self.world, self.folder, self.model = world, folder, model
        self.current: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        self.spare: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.written = folder / "checkpoint"
        self._took, self._ended = 0.0, time.monotonic()

    def keep_current(self) -> None:
        """Remember the weights as what a step that fails goes back to."""
        self.current = _copied(self.model)

    def keep_best(self) -> None:
        """Remember the weights as the best so far."""
        self.best = _copied(self.model)

    def keep_spare(self) -> None:
        """Remember the weights as the best of the arm that runs."""
        self.spare = _copied(self.model)

    def keep(self, state: State, optimizer: torch.optim.Optimizer, average: Average) -> None:
        """Remember all that `write` writes: what a step that fails goes back to, whether it is written or not."""
        self.keep_current()
        self.optimizer = flat(optimizer)
        self.average, state.averaged = {k: v.to("cpu", copy=True) for k, v in average.weights.items()}, average.steps

    def load_best(self) -> None:
        """Go back to the best weights."""
        self.model.load_state_dict(self.best)

    def due(self) -> bool:
        """Say whether another write would leave all of them below their share of the time; every worker must call it, the first one's clock counts.

        When a checkpoint is written changes nothing but how much a run repeats that was interrupted: nine times what a write takes.
        """
        answer = torch.tensor([float(time.monotonic() - self._ended >= self._took * (1 / SHARE - 1))])
        broadcast([answer], self.world)
        return bool(answer.item())

    def write(self, state: State) -> None:
        """Write what is remembered; a barrier."""
        started = time.monotonic()
        if not self.current:
            self.keep_current()
        metrics = {"accuracy": state.best_accuracy, "epoch": float(state.epoch)}
        if self.world.rank:
            self.world.report(metrics, None)
            return
        folder = self.written
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kept = {CURRENT: self.current, BEST: self.best, SPARE: self.spare, OPTIMISER: self.optimizer, AVERAGE: self.average}
        for name, tensors in kept.items():
            write_tensors(tensors, folder / name)
        write_json(asdict(state), folder / STATE)
        self.world.report(metrics, folder)
        self._ended = time.monotonic()
        self._took = self._ended - started

    def restore(self, start: Path | None) -> State | None:
        """Load the newest checkpoint into the model, or that of another run to start from; None if there is none. A finished one is `best`.

        A checkpoint of another run counts only if this version wrote it. A callback that stopped the other run does not stop this one.
        """
        from safetensors.torch import load_file

        with self.world.restore() as kept:
            folder = kept or start
            if folder is None:
                return None
            content = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if kept is None:
                if set(content) != {f.name for f in fields(State)}:
                    return None
                content["stopped"] = False
            state = State(**content)
            if state.finished:
                self.best = load_file(folder / MODEL / "weights.safetensors")
                return state
            self.current, self.best, self.spare, self.optimizer, self.average = (
                load_file(folder / name) for name in (CURRENT, BEST, SPARE, OPTIMISER, AVERAGE)
            )
            self.model.load_state_dict(self.current)
            return state


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
