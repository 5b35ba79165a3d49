"""Fine-tuning: epochs over the training images with all weights trained.

The steps are those of one process whatever the number of workers: each batch is dealt out, and gradients are averaged weighted by each
worker's share. Order, crops and dropout follow from (seed, epoch, step, image), so an interrupted run ends as the uninterrupted one would have.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlpipeline.backbones.classifier import probabilities
from tlpipeline.backbones.precision import autocast, computes_in_bfloat16
from tlpipeline.data.augment import augmentation, seed_of
from tlpipeline.data.cache import Store
from tlpipeline.data.loader import Images, normalize
from tlpipeline.errors import ClusterError, TrainingError
from tlpipeline.params import AUTO
from tlpipeline.training.accumulation import GradientAccumulation, buffers, restore
from tlpipeline.training.budget import TimeBudget
from tlpipeline.training.callbacks import EpochEnd
from tlpipeline.training.checkpoint import SCRATCH, Checkpoints, State
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.distributed import DistributedContext, all_gather, all_reduce, broadcast
from tlpipeline.training.divergence import Diverged, DivergenceGuard
from tlpipeline.training.heads import image_weights, validated
from tlpipeline.training.images import IN_MEMORY_BYTES, Datasets, training_images
from tlpipeline.training.optim import optimizer, schedule, unflat
from tlpipeline.training.progress import OnProgress, clock, in_validation
from tlpipeline.training.recipe import BUDGET, LOSS, SAMPLER, Recipe

MOST_LR_HALVINGS = 2
CHECK_STEPS = {"cpu": 1, "cuda": 16}  # between two checks of gradients and clock: a check waits for a GPU


@dataclass(frozen=True)
class Run:
    """What all parts of a training run share.

    Attributes:
        scratch: an empty folder of this worker for temporary files.
        store: keeps features and decoded images.
    """

    config: TrainingConfig
    context: DistributedContext
    datasets: Datasets
    state: State
    checkpoints: Checkpoints
    store: Store
    budget: TimeBudget
    on_progress: OnProgress
    scratch: Path


@dataclass(frozen=True)
class Epoch:
    """A trained epoch: mean loss, images/s, the share of time that waited for data, and whether it came to its end."""

    loss: float
    speed: float
    waited: float
    complete: bool


class Trainer:
    """Trains a model by the recipe of a run, and keeps the epoch that counts.

    Args:
        model: on the device of the run.
        normalization: of the network: batch, layer or none.
        blocks: names of the model's parameters for learning rates by depth, the backbone's blocks first to last.
    """

    def __init__(self, model: nn.Module, run: Run, normalization: str, blocks: Sequence[Sequence[str]] = ()) -> None:
        self.model, self.run, self.normalization, self.blocks = model, run, normalization, blocks
        self.config, self.recipe, self.context, self.datasets = run.config, run.config.plan.recipe, run.context, run.datasets
        self.state, self.checkpoints = run.state, run.checkpoints
        images = len(self.datasets.train)
        self.batch = batch_size(self.config, self.recipe, images, self.context)
        if self.config.batch_size == AUTO and self.batch > self.recipe.batch_size(images):
            run.on_progress(0, 0, f"batches of {self.batch} images: two for each of {self.context.size} workers", important=True)
        self.bfloat16 = self.config.precision == AUTO and computes_in_bfloat16(self.context.device)
        self.shares = image_weights(self.datasets.train_labels, self.recipe.imbalance)
        uneven = float(self.shares.max()) > float(self.shares.min())
        self.sampled = uneven and self.recipe.balance == SAMPLER
        self.freeze_bn = False
        self.class_weights: Tensor | None = None
        if uneven and self.recipe.balance == LOSS:
            weights = np.zeros(self.datasets.classes)
            weights[self.datasets.train_labels] = self.shares * images
            self.class_weights = torch.from_numpy(weights).float().to(self.context.device)

    # --- a phase ----------------------------------------------------------------------------------------------------------------------

    def fit(self, phase: str, epochs: int, lr: float) -> None:
        """Train for these epochs, or continue where the state stands.

        Args:
            phase: fine-tune or scratch.
            lr: learning rate at a batch of 64.

        Raises:
            TrainingError: the loss is not finite at a quarter of the learning rate, too; or a GPU's memory does not hold two images.
        """
        state, budget = self.state, self.run.budget
        if state.phase != phase:
            state.begin(phase)
            self.checkpoints.begin()
        if not self.checkpoints.best:
            self.checkpoints.keep_best()
        lr *= min(self.batch, len(self.datasets.train)) / 64
        self._prepare(phase)
        network = self._parallel()
        optimizer = self._optimizer(lr)
        images, val = self._images(epochs)
        while state.epoch < epochs and not state.stopped:
            try:
                epoch = self._epoch(network, images, optimizer, lr, epochs)
            except Diverged as error:
                optimizer = self._roll_back(lr, error)
                continue
            state.epoch, state.step, state.loss = state.epoch + 1, 0, 0.0
            self._synchronize_buffers()
            accuracy, correct = self._validate(val, epoch, epochs)
            end = EpochEnd(state, epochs, self.datasets.val, correct, self.run.on_progress)
            state.stopped = any([callback.on_epoch_end(end) for callback in self.config.callbacks])
            state.speed, state.waited = round(epoch.speed, 1), round(epoch.waited, 4)
            expired = not epoch.complete or (state.epoch < epochs and budget.expired())
            if expired:
                state.remark(f"{BUDGET} ended {phase} {'after' if epoch.complete else 'in'} epoch {state.epoch} of {epochs}")
                self._cut_short()
            self._checkpoint(optimizer)
            self._report(epoch, accuracy, epochs)
            if expired:
                self.run.on_progress(state.epoch, epochs, f"{state.remarks[-1]}; the best model so far is kept", important=True)
                return

    def _prepare(self, phase: str) -> None:
        """Set how a batch is taken in parts, and where batch normalization takes its statistics from."""
        state = self.state
        if self.config.gradient_accumulation_steps > max(state.gradient_accumulation_steps, self.recipe.gradient_accumulation_steps):
            state.set_accumulation(self.config.gradient_accumulation_steps)
        self.freeze_bn = phase != SCRATCH and self.recipe.freezes_statistics(self.datasets.transforms.size)
        part_images = 2 if self.normalization == "batch" and not self.freeze_bn else 1  # BatchNorm has no statistics of one image
        self.accumulation = GradientAccumulation(
            self.model, self.context, state, self.recipe.gradient_accumulation_steps, part_images, moving_buffers=not self.freeze_bn
        )
        if not self.freeze_bn and self.context.syncs_batch_norm and self.shares_statistics(self.accumulation.steps):
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[no-untyped-call]

    def shares_statistics(self, steps: int) -> bool:
        """Return whether a part of a worker's batch is too small for batch normalization to take its statistics from it alone."""
        images = self.batch // (self.context.size * max(steps, 1))
        return self.context.size > 1 and self.normalization == "batch" and images < self.recipe.sync_below

    def _images(self, epochs: int) -> tuple[Images, Images]:
        run = self.run
        room = self.config.cache_bytes if run.store.folder else IN_MEMORY_BYTES
        cadence = self.config.cadence
        return training_images(
            self.datasets, self.recipe.crop, epochs, run.store, room, self.context, run.budget, run.on_progress, cadence.read_images
        )

    def _optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Return the optimizer as the last checkpoint left it."""
        made = optimizer(self.model, self.recipe, self.normalization, lr, self.blocks, fused=self.context.device.type == "cuda")
        if self.checkpoints.optimizer:
            unflat(self.checkpoints.optimizer, made)
        return made

    def _roll_back(self, lr: float, error: Diverged) -> torch.optim.Optimizer:
        """Return to the last checkpoint with half the learning rate; all workers see the same gradient, and come here together."""
        state = self.state
        state.lr_halvings += 1
        if state.lr_halvings > MOST_LR_HALVINGS:
            raise TrainingError(
                f"expected {state.phase} to converge, but its gradient was not finite in epoch {state.epoch + 1}, even at a quarter of the "
                f"learning rate ({lr / 4:g}). Set a lower one in train.override (such as lr_batch), or look for damaged images."
            ) from error
        self.model.load_state_dict(self.checkpoints.current)
        text = f"{state.phase} diverged: back to epoch {state.epoch} with half the learning rate"
        self.run.on_progress(state.epoch, 0, text, important=True)
        return self._optimizer(lr)

    def _synchronize_buffers(self) -> None:
        """Give all workers the first one's buffers, because each takes BatchNorm's statistics from its own images.

        All of them validate the one model that is kept and exported, which is the first worker's.
        """
        broadcast([*self.model.buffers()], self.context)

    def _validate(self, val: Images, epoch: Epoch, epochs: int) -> tuple[float, str]:
        """Validate the epoch that was just trained, and keep the model if it counts; return the accuracy and who was right, packed."""
        state, count = self.state, len(self.datasets.val)
        predicted = all_gather(probabilities(self.model, val, self.context.device, lambda _: None), count, self.context)
        accuracy, log_loss, correct = validated(predicted, self.datasets.val_labels)
        line: dict[str, float | str] = {"phase": state.phase, "epoch": state.epoch, "loss": epoch.loss, "accuracy": accuracy}
        state.history.append(line | {"log_loss": log_loss, "correct": correct})
        candidate = state.validation(accuracy, log_loss)
        if epoch.complete and state.epoch == epochs:
            # The schedule runs to its end, and its last epoch is the one that counts.
            if state.end_phase(candidate, correct, count):
                self.checkpoints.keep_best()
        elif count and self.run.budget.seconds and state.update_interim(candidate):
            # If the time ends the schedule, this is the best there is; if not, it is forgotten.
            self.checkpoints.keep_interim()
        return accuracy, correct

    def _cut_short(self) -> None:
        """Keep the best epoch of a phase that time has ended, if it is better than what there was; without validation the last one."""
        if len(self.datasets.val):
            if self.state.cut_short():
                self.checkpoints.best = self.checkpoints.interim
        elif self.state.end_phase(self.state.validation(0.0, math.inf), "", 0):
            self.checkpoints.keep_best()

    def _checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember where the run stands, and write it if that is due."""
        self.state.seconds = self.run.budget.spent
        self.checkpoints.keep(optimizer)
        if self.checkpoints.due():
            self.checkpoints.write(self.state)

    def _report(self, epoch: Epoch, accuracy: float, epochs: int) -> None:
        state, images = self.state, len(self.datasets.train)
        remaining = clock((epochs - state.epoch) * images / max(epoch.speed, 1e-6))
        text = (
            f"{state.phase} epoch {state.epoch}/{epochs}, loss {epoch.loss:.3f}, {in_validation(accuracy, len(self.datasets.val))}, "
            f"{epoch.speed:.0f} images/s, waited {epoch.waited:.0%} for data, {remaining} left"
        )
        self.run.on_progress(state.epoch, epochs, text, important=True)

    # --- the network ------------------------------------------------------------------------------------------------------------------

    def train_mode(self) -> None:
        """Switch to training; batch normalization takes its statistics from where the recipe says."""
        self.model.train()
        for module in self.model.modules():
            if self.freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def _parallel(self) -> nn.Module:
        network = torch.compile(self.model) if self.recipe.compile else self.model
        if self.context.size == 1:
            return network  # type: ignore[return-value]
        ids = [self.context.device.index or 0] if self.context.device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        if self.context.size > 2 and self.context.device.type == "cpu":
            self._warm_up(parallel)
        return parallel

    def _warm_up(self, network: nn.Module) -> None:
        """Take a step that changes no weights.

        After its first step DistributedDataParallel reorders the gradients, and with more than two workers their sums depend on that order.
        Without this step, a run that continues in the middle of an epoch would differ in the last digits from an uninterrupted one.
        """
        before, side = buffers(self.model), self.datasets.transforms.size
        self.train_mode()
        with compiling():
            with autocast(self.context.device, self.bfloat16):
                logits = network(torch.zeros(2, 3, side, side, device=self.context.device))
            (0 * logits.float().sum()).backward()  # type: ignore[no-untyped-call]
        restore(before)

    # --- an epoch ---------------------------------------------------------------------------------------------------------------------

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the images of an epoch: each once, or drawn so that classes come alike; one that comes again has another turn (see Images)."""
        rng, images = np.random.default_rng([self.config.seed, epoch]), len(self.datasets.train)
        if not self.sampled:
            return rng.permutation(images)
        order, turns = rng.choice(images, images, p=self.shares), np.zeros(images, dtype=np.int64)
        out = np.empty_like(order)
        for place, image in enumerate(order):
            out[place] = image + images * turns[image]
            turns[image] += 1
        return out

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Return the batches of an epoch over all workers.

        A last batch of less than a quarter of a batch is left out: it would be a noisy step, and each worker needs two images for BatchNorm.
        Its images are in other batches in other epochs. The bound is the same for any number of workers with two images each in it. If there
        is only one batch, it is taken.
        """
        order = self.order(epoch)
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        return [b for b in batches if len(b) >= max(self.batch // 4, 2 * self.context.size)] or batches[:1]

    def _epoch(self, network: nn.Module, images: Images, optimizer: torch.optim.Optimizer, lr: float, epochs: int) -> Epoch:
        """Train for an epoch, or continue in the middle of one."""
        state, context, config = self.state, self.context, self.config
        batches = self.batches(state.epoch)
        steps = max(math.ceil(len(self.datasets.train) / self.batch), 1)
        checkpoint_steps = max(config.cadence.checkpoint_images // self.batch, 1)
        images.augment, images.waited = augmentation(self.recipe.crop, config.flip, config.seed, state.epoch), 0.0
        self.train_mode()
        guard = DivergenceGuard(context.device, config.cadence.check_steps or CHECK_STEPS[context.device.type])
        total, processed, started = torch.zeros((), dtype=torch.float64, device=context.device), 0, time.monotonic()
        trained, complete = sum(len(b) for b in batches[: state.step]), True
        mine = [[int(i) for i in batch[context.rank :: context.size]] for batch in batches[state.step :]]
        for step, (indices, pixels) in enumerate(images.batches(mine, pinned=context.device.type == "cuda"), state.step):
            now = lr * schedule(state.epoch * steps + step, epochs * steps, self.recipe.warm_up) * 0.5**state.lr_halvings
            for group in optimizer.param_groups:
                group["lr"] = now * group["share"]
            # Dropout: the same wherever the run was interrupted, different on each worker.
            torch.manual_seed(seed_of(config.seed, state.epoch, step, context.rank))
            losses = self._step(network, list(indices), pixels, images, len(batches[step]))
            guard.watch(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
            if guard.due(step + 1):
                guard.check()
            optimizer.step()
            total += losses
            processed, trained = processed + len(batches[step]), trained + len(batches[step])
            if self.run.on_progress.due():
                self._report_step(float(losses) / len(indices), processed, trained, images.waited, started, epochs)
            if step + 1 == len(batches):
                break
            if guard.due(step + 1) and self.run.budget.expired():
                complete = False
                break
            if (step + 1) % checkpoint_steps == 0:
                guard.check()
                state.step, state.loss = step + 1, state.loss + self._summed(total)
                total.zero_()
                self._synchronize_buffers()
                self._checkpoint(optimizer)
        guard.check()
        seconds = max(time.monotonic() - started, 1e-6)
        return Epoch((state.loss + self._summed(total)) / max(trained, 1), processed / seconds, images.waited / seconds, complete)

    def _summed(self, total: Tensor) -> float:
        """Return the sum of the workers' losses."""
        return float(all_reduce(total.cpu(), self.context, torch.distributed.ReduceOp.SUM))

    def _report_step(self, loss: float, processed: int, trained: int, waited: float, started: float, epochs: int) -> None:
        state, seconds = self.state, max(time.monotonic() - started, 1e-6)
        speed = processed / seconds
        remaining = clock(((epochs - state.epoch) * len(self.datasets.train) - trained) / max(speed, 1e-6))
        text = (
            f"{state.phase} epoch {state.epoch + 1}/{epochs}, loss {loss:.3f}, {speed:.0f} images/s, "
            f"waited {waited / seconds:.0%} for data, {remaining} left"
        )
        self.run.on_progress(state.epoch, epochs, text)

    def _step(self, network: nn.Module, indices: list[int], pixels: Tensor, images: Images, batch: int) -> Tensor:
        """Leave the gradient of a batch in the weights; return the summed loss of this worker's share."""
        labels = torch.from_numpy(self.datasets.train_labels[np.array(indices) % len(images)])

        def take(parts: int) -> Tensor:
            with compiling():
                return self._parts(network, pixels, labels, images, batch, parts)

        return self.accumulation.run(take, len(indices), batch)

    def _parts(self, network: nn.Module, pixels: Tensor, labels: Tensor, images: Images, batch: int, parts: int) -> Tensor:
        context, device = self.context, self.context.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        pieces = list(zip(pixels.tensor_split(parts), labels.tensor_split(parts), strict=True))
        for number, (piece, truth) in enumerate(pieces, 1):
            inputs = normalize(piece.to(device, non_blocking=True), images.transforms)
            wanted = truth.to(device, non_blocking=True)
            synchronization: AbstractContextManager[None] = nullcontext()
            if isinstance(network, nn.parallel.DistributedDataParallel) and number < len(pieces):
                synchronization = network.no_sync()
            with synchronization:
                with autocast(device, self.bfloat16):
                    logits = network(inputs)
                losses = functional.cross_entropy(logits.float(), wanted, weight=self.class_weights, reduction="sum")
                # DDP averages over workers; weighted like this the average is the mean over the whole batch, uneven shares included.
                (losses * context.size / batch).backward()  # type: ignore[no-untyped-call]
            total += losses.detach().double()
        return total


@contextmanager
def compiling() -> Iterator[None]:
    """Explain errors of torch.compile, which translates the network when it is first called."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise TrainingError(
            f"expected torch.compile to translate the network, but: {' '.join(str(error).split('Set TORCH')[0].split())[:300].rstrip('.')}. "
            "Install a C++ compiler, such as g++, if there is none, or take compile out of train.override."
        ) from error


def batch_size(config: TrainingConfig, recipe: Recipe, images: int, context: DistributedContext) -> int:
    """Return the images per step over all workers, at least two for each.

    Raises:
        ClusterError: the user asked for fewer.
    """
    least = 2 * context.size
    if not isinstance(config.batch_size, int):
        return max(recipe.batch_size(images), least)
    if config.batch_size < least:
        raise ClusterError(
            f"expected train.batch_size to hold two images for each of {context.size} workers, found {config.batch_size}. "
            f"Set it to {least} or more or to auto, or cluster.workers to at most {config.batch_size // 2}."
        )
    return config.batch_size
