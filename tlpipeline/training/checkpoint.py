"""Where a run stands, and the folder that keeps it: all that a resumed run needs to end as the uninterrupted one would have."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlpipeline.files import CHECKSUMS, damage, write_checksums, write_json, write_tensors
from tlpipeline.stats import paired
from tlpipeline.training.distributed import DistributedContext, broadcast
from tlpipeline.training.optim import flat

STATE, CURRENT, BEST, INTERIM, OPTIMIZER, MODEL = (
    "state.json", "current.safetensors", "best.safetensors", "interim.safetensors", "optimizer.safetensors", "model",
)  # fmt: skip
HEAD, FINE_TUNE, SCRATCH = "head", "fine-tune", "scratch"


@dataclass(frozen=True)
class Best:
    """The best validation of some epochs: accuracy (0 to 1), log loss, and where it was reached."""

    phase: str = ""
    epoch: int = 0
    accuracy: float = -1.0
    loss: float = math.inf

    def beats(self, other: "Best") -> bool:
        """Return whether this one is better: by accuracy, and if that is equal by loss."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


@dataclass
class State:
    """Where a run stands; with the tensors beside it, all that a resumed run needs.

    Attributes:
        phase: what runs: head, fine-tune or scratch; epoch: its finished epochs; step: steps of the next one; loss: their summed loss.
        best: the validation of the model that is kept.
        interim: the best epoch of the phase that runs. It counts only if the time budget ends the phase before its schedule does.
        head_penalty: L2 penalty of the head that was solved last.
        history: a line for each epoch.
        stopped: a callback ended the phase.
        records: JSON values that callbacks keep, each under a name of its own.
        lr_halvings: how often the learning rate was halved because training diverged.
        gradient_accumulation_steps: parts that a batch is taken in, 0 for the recipe's.
        speed, waited: of the first worker lately: images/s, and the share of time that it waited for data.
        seconds: that the run took so far, 0 without a time budget.
        remarks: what bounded the run. A run with remarks may differ from another one.
        champion: hash of the model whose backbone the run started from, "" for the source's weights.
    """

    phase: str
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    best: Best = Best()
    interim: Best = Best()
    head_penalty: float = 0.0
    history: list[dict[str, float | str]] = field(default_factory=list)
    stopped: bool = False
    records: dict[str, Any] = field(default_factory=dict)
    lr_halvings: int = 0
    gradient_accumulation_steps: int = 0
    speed: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    finished: bool = False
    champion: str = ""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "State":
        """Read what `asdict` wrote as JSON."""
        return cls(**{**content, "best": Best(**content["best"]), "interim": Best(**content["interim"])})

    def remark(self, text: str) -> None:
        """Note what bounded the run, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def set_accumulation(self, steps: int) -> None:
        """Have each batch taken in this many parts from now on, because a GPU's memory ran out."""
        self.gradient_accumulation_steps = steps
        self.remark(f"the GPU's memory ran out: each batch was taken in {steps} parts")

    def begin(self, phase: str) -> None:
        """Start a phase."""
        self.phase, self.epoch, self.step, self.lr_halvings, self.stopped, self.interim = phase, 0, 0, 0, False, Best()

    def validation(self, accuracy: float, loss: float) -> Best:
        """Return the validation of the epoch that was just trained."""
        return Best(self.phase, self.epoch, accuracy, loss)

    def update_best(self, candidate: Best) -> bool:
        """Make this the best if it is; return whether it was."""
        if candidate.beats(self.best):
            self.best = candidate
            return True
        return False

    def update_interim(self, candidate: Best) -> bool:
        """Make this the best epoch of the phase if it is; return whether it was."""
        if candidate.beats(self.interim):
            self.interim = candidate
            return True
        return False

    def cut_short(self) -> bool:
        """End the phase with its best epoch; return whether that one is better than what there was before."""
        return bool(self.interim.epoch) and self.update_best(self.interim)

    def end_phase(self, candidate: Best, correct: str, images: int) -> bool:
        """End the phase with its last epoch; return whether that one replaces what there was before.

        Fine-tuning replaces the head that it started from, unless it is clearly worse (two paired standard errors). So a noisy
        difference on 20 validation images does not undo it. Training from random weights must be better.
        """
        head = self.head_line
        if self.phase == FINE_TUNE and head is not None:
            if clearly_worse(correct, str(head["correct"]), images):
                return False
            self.best = Best()
        return self.update_best(candidate)

    @property
    def head_line(self) -> dict[str, float | str] | None:
        """The line of the head on frozen features, None if none was solved."""
        return next((line for line in self.history if line["phase"] == HEAD), None)

    @property
    def best_line(self) -> dict[str, float | str]:
        """The line of the epoch that is kept."""
        return next(line for line in reversed(self.history) if (line["phase"], line["epoch"]) == (self.best.phase, self.best.epoch))

    @property
    def gained(self) -> bool:
        """Whether fine-tuning is better on validation than the head on frozen features that it started from."""
        head = self.head_line
        return self.best.phase == FINE_TUNE and self.best.accuracy > (float(head["accuracy"]) if head else -1.0)

    def summary(self) -> dict[str, float]:
        """Return the best validation."""
        return {"accuracy": self.best.accuracy, "log_loss": self.best.loss, "epoch": self.best.epoch, "head_penalty": self.head_penalty}


def clearly_worse(correct: str, other: str, images: int) -> bool:
    """Return whether a model is worse on validation than another one by more than two paired standard errors.

    Args:
        correct, other: which of the images each one classified correctly, packed.
    """
    if not images:
        return False
    difference, error = paired(correct, other, images)
    return difference < -2 * error


class Checkpoints:
    """Remembers the state, the weights and the optimizer of a run; writes and restores them as JSON and safetensors.

    Args:
        folder: an empty folder of this worker for what it writes.
        share: of the time that checkpoints between epochs may take; on a GPU a small epoch takes less time than its checkpoint.
        champion: hash of the model whose backbone the run started from; a checkpoint of another start is not used.
        clock: returns seconds.
    """

    def __init__(
        self,
        context: DistributedContext,
        folder: Path,
        model: nn.Module,
        share: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        champion: str = "",
    ) -> None:
        self.context, self.folder, self.model, self.share, self.clock, self.champion = context, folder, model, share, clock, champion
        self.current: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        self.interim: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}
        self.written = folder / "checkpoint"
        self.damaged: list[str] = []  # sentences about checkpoints that could not be used
        self._took, self._ended = 0.0, clock()

    def keep_current(self) -> None:
        """Remember the weights as what training returns to if it diverges."""
        self.current = _copied(self.model)

    def keep_best(self) -> None:
        """Remember the weights as the best so far."""
        self.best = _copied(self.model)

    def keep_interim(self) -> None:
        """Remember the weights as the best of the phase that runs."""
        self.interim = _copied(self.model)

    def keep(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember all that `write` writes, whether it is written or not."""
        self.keep_current()
        self.optimizer = flat(optimizer)

    def begin(self) -> None:
        """Start a phase: with the weights as they are, and a new optimizer."""
        self.optimizer, self.interim = {}, {}
        self.keep_current()

    def load_best(self) -> None:
        """Load the best weights into the model."""
        self.model.load_state_dict(self.best)

    def due(self) -> bool:
        """Return whether another write keeps all of them below their share of the time. Every worker must call it; the first one's clock counts.

        How often checkpoints are written changes only how much an interrupted run repeats: nine times what a write takes.
        """
        answer = torch.tensor([float(self.clock() - self._ended >= self._took * (1 / self.share - 1))])
        broadcast([answer], self.context)
        return bool(answer.item())

    def write(self, state: State) -> None:
        """Write what is remembered; a barrier."""
        started = self.clock()
        if not self.current:
            self.keep_current()
        metrics = {"accuracy": state.best.accuracy, "epoch": float(state.epoch)}
        if self.context.rank:
            self.context.report(metrics, None)
            return
        folder = self.written
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, tensors in {CURRENT: self.current, BEST: self.best, INTERIM: self.interim, OPTIMIZER: self.optimizer}.items():
            write_tensors(tensors, folder / name)
        write_json(asdict(state), folder / STATE)
        write_checksums(folder)
        self.context.report(metrics, folder)
        self._ended = self.clock()
        self._took = self._ended - started

    def restore(self, start: Path | None) -> State | None:
        """Load the newest whole checkpoint into the model, or that of another run to start from; None if there is none. A finished one is `best`.

        A checkpoint of another run counts only if this version wrote it. A callback that stopped the other run does not stop this one.
        """
        with self.context.restore() as kept:
            for folder in kept:
                if content := self._state_of(folder):
                    return self._load(folder, State.from_json(content))
            if start is not None and (start / CHECKSUMS).exists() and (content := self._state_of(start)):
                if set(content) != {f.name for f in fields(State)}:
                    return None
                return self._load(start, State.from_json(content | {"stopped": False}))
            return None

    def _state_of(self, folder: Path) -> dict[str, Any] | None:
        """Return the state in a checkpoint, None if the checkpoint is damaged or its run started from other weights."""
        if problem := damage(folder):
            self.damaged.append(f"the checkpoint in {folder} is damaged ({problem}) and not used")
            return None
        content = dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
        if content.get("champion", "") != self.champion:
            self.damaged.append(f"the checkpoint in {folder} is of a run that started from other weights, and not used")
            return None
        return content

    def _load(self, folder: Path, state: State) -> State:
        from safetensors.torch import load_file

        if state.finished:
            self.best = load_file(folder / MODEL / "weights.safetensors")
            return state
        self.current, self.best, self.interim, self.optimizer = (load_file(folder / name) for name in (CURRENT, BEST, INTERIM, OPTIMIZER))
        self.model.load_state_dict(self.current)
        return state


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
