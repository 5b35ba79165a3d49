"""Fine-tuning: epochs over the training side with all weights trained.

The steps are those of one process whatever the number of workers: each global batch is dealt out, and gradients are averaged weighted by
each worker's share. Order, crops and dropout follow from (seed, epoch, step, image), so that a run which was interrupted anywhere ends
where the uninterrupted one ends.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlpipeline.backbones.classifier import probabilities
from tlpipeline.backbones.precision import autocast, computes_in_bfloat16
from tlpipeline.data.augment import augmentation, mix, seed_of
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Augment, DecodedCache, Images, normalize, rank_slice, resized_cache, square_cache
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import ClusterError, OutOfMemory, TrainingError
from tlpipeline.params import AUTO
from tlpipeline.training.callbacks import EpochEnd
from tlpipeline.training.checkpoint import Checkpoints, State
from tlpipeline.training.config import OnProgress, TrainingConfig, clock, in_validation
from tlpipeline.training.distributed import DistributedContext, all_gather, all_reduce, broadcast
from tlpipeline.training.heads import image_weights, validated
from tlpipeline.training.optim import Average, optimizer, schedule, unflat
from tlpipeline.training.recipe import BUDGET, LOSS, SAMPLER, Recipe

# A longer epoch is kept in parts, so that an interruption costs no more than this, or what a checkpoint is worth.
CHECKPOINT_IMAGES = 100_000
SLOWER_AT_MOST = 2
LOOK_STEPS = {"cpu": 1, "cuda": 16}  # between two looks at whether gradients are numbers, and at the clock: a look stops a GPU
IN_MEMORY_BYTES = 1 << 30
AT_ONCE = 256  # images that a worker reads between two looks at the clock


@dataclass(frozen=True)
class Datasets:
    """Training and validation images with their class indices."""

    root: Path
    train: Sequence[Row]
    val: Sequence[Row]
    train_labels: npt.NDArray[np.int64]
    val_labels: npt.NDArray[np.int64]
    transforms: Transforms


class Diverged(Exception):
    """The gradient is no number any more; never leaves this file."""


class TimeBudget:
    """A bound on the seconds of a run, those before an interruption included. All workers ask together, and the first one's clock counts."""

    def __init__(self, minutes: float, world: DistributedContext, before: float) -> None:
        self.seconds, self.world, self.before, self.started = minutes * 60, world, before, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds of the run so far."""
        return self.before + time.monotonic() - self.started

    def late(self) -> bool:
        """Say whether the time is up by this worker's own clock."""
        return self.seconds > 0 and self.spent > self.seconds

    def passed(self) -> bool:
        """Say whether the time is up; every worker must call it."""
        if not self.seconds:
            return False
        answer = torch.tensor([float(self.late())])
        broadcast([answer], self.world)
        return bool(answer.item())


class Trainer:
    """Trains a model by a recipe, and keeps the epoch that counts.

    Args:
        model: on the world's device; blocks: names of its parameters for rates by depth, the backbone's blocks first to last.
        store: keeps decoded images.
    """

    def __init__(
        self,
        model: nn.Module,
        sides: Datasets,
        recipe: Recipe,
        job: TrainingConfig,
        world: DistributedContext,
        checkpoint: Checkpoints,
        tell: OnProgress,
        normalization: str,
        store: Store,
        deadline: TimeBudget,
        blocks: Sequence[Sequence[str]] = (),
    ) -> None:
        self.model, self.sides, self.recipe, self.job, self.world = model, sides, recipe, job, world
        self.checkpoint, self.tell, self.normalization, self.blocks = checkpoint, tell, normalization, blocks
        self.store, self.deadline = store, deadline
        self.batch = batch_size(job, recipe, len(sides.train), world)
        if job.batch_size == AUTO and self.batch > recipe.batch_size(len(sides.train)):
            tell(0, 0, f"batches of {self.batch} images: two for each of {world.size} workers", important=True)
        self.half = job.precision == AUTO and computes_in_bfloat16(world.device)
        self.classes = int(max(sides.train_labels.max(), sides.val_labels.max(initial=0))) + 1
        self.shares = image_weights(sides.train_labels, recipe.imbalance)
        uneven = float(self.shares.max()) > float(self.shares.min())
        self.drawn = uneven and recipe.balance == SAMPLER
        self.still = False
        self.weights: Tensor | None = None
        if uneven and recipe.balance == LOSS:
            weights = np.zeros(self.classes)
            weights[sides.train_labels] = self.shares * len(sides.train)
            self.weights = torch.from_numpy(weights).float().to(world.device)

    # --- an arm -----------------------------------------------------------------------------------------------------------------------

    def arm(self, name: str, epochs: int, rate: float, state: State) -> None:
        """Train for these epochs, or go on where the state stands; with `patience`, stop after so many epochs without a better validation.

        Raises:
            TrainingError: the loss is no number at a quarter of the rate, too; or a GPU has no room for two images.
        """
        if state.arm != name:
            state.begin(name)
            self.checkpoint.optimizer, self.checkpoint.average, self.checkpoint.spare = {}, {}, {}
            self.checkpoint.keep_current()
        elif state.finished:
            return
        if not self.checkpoint.best:
            self.checkpoint.keep_best()
        rate *= min(self.batch, len(self.sides.train)) / 64
        if self.job.parts > max(state.accumulate, self.recipe.accumulate):
            state.in_parts(self.job.parts)
        self.still = name != "scratch" and self.recipe.keeps_statistics(self.sides.transforms.size)
        if not self.still and self._few_images_a_worker(max(state.accumulate, self.recipe.accumulate)):
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[no-untyped-call]
        network = self._parallel()
        moving, average = self._start(rate, state)
        images, val = self._images(epochs)
        patience = (self.recipe.patience or epochs) if len(self.sides.val) else epochs
        while state.epoch < epochs and state.epoch - state.best_epoch_of(name) < patience and not state.stopped:
            try:
                loss, speed, waited, whole = self._epoch(network, images, moving, average, rate, state, epochs)
            except Diverged as stopped:
                moving, average = self._go_back(rate, state, stopped)
                continue
            state.epoch, state.step, state.loss = state.epoch + 1, 0, 0.0
            self._one_model(average)
            average.swap()
            accuracy, correct = self._judge(val, loss, whole, state, epochs)
            average.swap()
            end = EpochEnd(state, epochs, self.sides.val, correct, self.tell)
            state.stopped = any([callback.on_epoch_end(end) for callback in self.job.callbacks])
            state.speed, state.waited = round(speed, 1), round(waited, 4)
            late = not whole or (state.epoch < epochs and self.deadline.passed())
            if late:
                state.remark(f"{BUDGET} ended {name} {'after' if whole else 'in'} epoch {state.epoch} of {epochs}")
                self._keep_what_there_is(state)
            state.seconds = self.deadline.spent if self.deadline.seconds else 0.0
            self.checkpoint.keep(state, moving, average)
            if self.checkpoint.due():
                self.checkpoint.write(state)
            left = (epochs - state.epoch) * len(self.sides.train) / max(speed, 1e-6)
            self.tell(
                state.epoch,
                epochs,
                f"{name} epoch {state.epoch}/{epochs}, loss {loss:.3f}, {in_validation(accuracy, len(self.sides.val))}, "
                f"{speed:.0f} images/s, waited {waited:.0%} for data, {clock(left)} left",
                important=True,
            )
            if late:
                self.tell(state.epoch, epochs, f"{state.remarks[-1]}; the best model so far is kept", important=True)
                return

    def _judge(self, val: Images, loss: float, whole: bool, state: State, epochs: int) -> tuple[float, str]:
        """Validate the epoch that was just trained, and keep the model if it counts; return the accuracy and who was right, packed.

        Args:
            loss: mean training loss of the epoch; whole: whether it came to its end.
        """
        chances = all_gather(probabilities(self.model, val, self.world.device, lambda _: None), len(self.sides.val), self.world)
        accuracy, log_loss, correct = validated(chances, self.sides.val_labels)
        line: dict[str, float | str] = {"arm": state.arm, "epoch": state.epoch, "loss": loss, "accuracy": accuracy, "log_loss": log_loss}
        state.history.append(line | {"correct": correct})
        ended, judged = whole and state.epoch == epochs, len(self.sides.val) > 0
        if judged and self.recipe.patience:
            if state.better(accuracy, log_loss):
                self.checkpoint.keep_best()
        elif ended:
            # The schedule runs to its end, and its last epoch is the one that counts.
            if state.replaced(accuracy, log_loss, correct, len(self.sides.val)):
                self.checkpoint.keep_best()
        elif judged and self.deadline.seconds and state.spared(accuracy, log_loss):
            # Should the time end the schedule, this is the best that there is; should it not, it is forgotten.
            self.checkpoint.keep_spare()
        return accuracy, correct

    def _keep_what_there_is(self, state: State) -> None:
        """Keep the best epoch of an arm that time has ended, if it is better than what there was; without validation what was trained."""
        if len(self.sides.val):
            if state.cut_short():
                self.checkpoint.best = self.checkpoint.spare
        elif state.replaced(0.0, math.inf, "", 0):
            self.checkpoint.keep_best()

    def _start(self, rate: float, state: State) -> tuple[torch.optim.Optimizer, Average]:
        """Return optimizer and moving average as the last checkpoint left them."""
        fused = self.world.device.type == "cuda"
        moving = optimizer(self.model, self.recipe, self.normalization, rate, self.blocks, fused)
        average = Average(self.model, self.recipe.average)
        if self.checkpoint.optimizer:
            unflat(self.checkpoint.optimizer, moving)
        if self.checkpoint.average:
            average.weights = {k: v.to(self.world.device) for k, v in self.checkpoint.average.items()}
            average.steps = state.averaged
        return moving, average

    def _go_back(self, rate: float, state: State, why: Diverged) -> tuple[torch.optim.Optimizer, Average]:
        """Return to the last checkpoint with half the rate; every worker sees the same gradient, and comes here."""
        state.slower += 1
        if state.slower > SLOWER_AT_MOST:
            raise TrainingError(
                f"expected {state.arm} to converge, but its gradient was no number in epoch {state.epoch + 1}, at a quarter of the rate "
                f"({rate / 4:g}), too. Set a lower rate in train.override (such as rate_batch), or look for images that are damaged."
            ) from why
        self.model.load_state_dict(self.checkpoint.current)
        self.tell(state.epoch, 0, f"{state.arm} diverged: back to epoch {state.epoch} with half the rate", important=True)
        return self._start(rate, state)

    def _one_model(self, average: Average) -> None:
        """Give all workers the first one's buffers: each takes BatchNorm's statistics from its own share of the images.

        What is validated by all of them must be the one model that is kept and exported, which is the first worker's.
        """
        broadcast([*self.model.buffers(), *average.buffers()], self.world)

    def _images(self, epochs: int) -> tuple[Images, Images]:
        """Return training images and this worker's validation images; decoded ones are kept where they come back and there is room.

        Where there is none they are decoded each time, to the same pixels.
        """
        sides, world = self.sides, self.world
        mine = [sides.val[i] for i in rank_slice(len(sides.val), world.rank, world.size)]
        size, short = sides.transforms.resize, statistics.median(min(row.width, row.height) for row in sides.train)
        # Twice as large as crops of the training size need, so that what is seen in training is as sharp as in validation (docs/log.md), but no
        # larger than the images are.
        side = max(size, min(math.ceil(2 * size / math.sqrt(self.recipe.crop)), 32 * math.ceil(short / 32)))
        room = self.job.cache_bytes if self.store.folder else IN_MEMORY_BYTES
        train, val = square_cache(self.store, sides.root, side), resized_cache(self.store, sides.root, sides.transforms)
        if epochs > 1 and 3 * (len(sides.train) * side**2 + len(sides.val) * sides.transforms.size**2) <= room:
            for decoded, rows, needed in ((train, list(sides.train), list(sides.train)), (val, list(sides.val), mine)):
                if not self._fill(decoded, rows):
                    break  # the time is up: no epoch will want them
                if world.size > 1:
                    torch.distributed.barrier()
                    decoded.fill(needed, lambda done: None)  # from a disk that is not shared the others' part cannot be read
                decoded.open(needed)
        return Images(sides.root, sides.train, sides.transforms, None, train), Images(sides.root, mine, sides.transforms, None, val)

    def _fill(self, decoded: DecodedCache, rows: Sequence[Row]) -> bool:
        """Decode this worker's share of these images; say whether it came to its end before the time was up."""
        mine = [rows[i] for i in rank_slice(len(rows), self.world.rank, self.world.size)]

        def told(before: int, part: int) -> None:
            self.tell(before + part, len(mine), f"{before + part} of {len(mine)} images decoded")

        for start in range(0, math.ceil(len(rows) / self.world.size), AT_ONCE):
            decoded.fill(mine[start : start + AT_ONCE], partial(told, start))
            if self.deadline.passed():
                return False
        return True

    def _few_images_a_worker(self, parts: int) -> bool:
        few = self.batch // (self.world.size * max(parts, 1)) < self.recipe.sync_below
        return self.world.size > 1 and self.world.device.type == "cuda" and self.normalization == "batch" and few

    def _views(self, epoch: int) -> Augment:
        """Return the random views of an epoch."""
        recipe, job = self.recipe, self.job
        return augmentation(recipe.crop, job.flip, job.seed, epoch, recipe.randaugment, recipe.randaugment_magnitude)

    def _train_mode(self) -> None:
        """Have dropout drop, and batch normalization take its statistics from where the recipe says."""
        self.model.train()
        for module in self.model.modules():
            if self.still and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def _parallel(self) -> nn.Module:
        network = torch.compile(self.model) if self.recipe.compile else self.model
        if self.world.size == 1:
            return network  # type: ignore[return-value]
        ids = [self.world.device.index or 0] if self.world.device.type == "cuda" else None
        together = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        if self.world.size > 2 and self.world.device.type == "cpu":
            self._settle(together)
        return together

    def _settle(self, network: nn.Module) -> None:
        """Take a step that counts for nothing.

        After its first step DistributedDataParallel sorts gradients anew, and the order in which more than two workers' are summed depends on
        that: a run that goes on in the middle of an epoch would differ in last digits from one that nothing interrupted.
        """
        before, side = self._buffers(), self.sides.transforms.size
        self._train_mode()
        with self._compiling():
            with autocast(self.world.device, self.half):
                logits = network(torch.zeros(2, 3, side, side, device=self.world.device))
            (0 * logits.float().sum()).backward()  # type: ignore[no-untyped-call]
        self._put_back(before)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Say what to do where torch.compile cannot translate the network: it does so when the network is first called."""
        try:
            yield
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise TrainingError(
                f"expected torch.compile to translate the network, but: {' '.join(str(error).split('Set TORCH')[0].split())[:300].rstrip('.')}. "
                "Install a C++ compiler, such as g++, if there is none, or take compile out of train.override."
            ) from error

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Return the model's buffers, batch normalization's statistics above all, each with what is in it now."""
        return [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    @staticmethod
    def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
        for buffer, value in buffers:
            buffer.copy_(value)

    # --- an epoch ---------------------------------------------------------------------------------------------------------------------

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the images of an epoch: each once, or drawn so that classes come alike, with the turn of those that come back (see Images)."""
        rng, images = np.random.default_rng([self.job.seed, epoch]), len(self.sides.train)
        if not self.drawn:
            return rng.permutation(images)
        order, turns = rng.choice(images, images, p=self.shares), np.zeros(images, dtype=np.int64)
        out = np.empty_like(order)
        for place, image in enumerate(order):
            out[place] = image + images * turns[image]
            turns[image] += 1
        return out

    def _epoch(
        self, network: nn.Module, images: Images, moving: torch.optim.Optimizer, average: Average, rate: float, state: State, epochs: int
    ) -> tuple[float, float, float, bool]:
        """Train for an epoch; return the mean loss, images/s, the share of time that waited for data, and whether it came to its end."""
        world, order = self.world, self._order(state.epoch)
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        # A last batch of a few images would be a noisy step, and each worker needs two for BatchNorm: what is left over comes back in another
        # epoch's order. A quarter of a batch is the same bound for any number of workers that have two images each in it. Where there is
        # nothing but one small batch it is taken: it has two images for each worker.
        batches = [b for b in batches if len(b) >= max(self.batch // 4, 2 * world.size)] or batches[:1]
        steps, each = max(math.ceil(len(order) / self.batch), 1), max(CHECKPOINT_IMAGES // self.batch, 1)
        images.augment, images.waited = self._views(state.epoch), 0.0
        self._train_mode()
        total, seen, started = torch.zeros((), dtype=torch.float64, device=world.device), 0, time.monotonic()
        # What is trained until a look is thrown away with the step that went wrong.
        finite, look = torch.ones((), dtype=torch.bool, device=world.device), LOOK_STEPS[world.device.type]
        trained, whole = sum(len(b) for b in batches[: state.step]), True
        mine = [[int(i) for i in batch[world.rank :: world.size]] for batch in batches[state.step :]]
        for step, (indices, pixels) in enumerate(images.batches(mine, pinned=world.device.type == "cuda"), state.step):
            now = rate * schedule(state.epoch * steps + step, epochs * steps, self.recipe.warm_up) * 0.5**state.slower
            for group in moving.param_groups:
                group["lr"] = now * group["share"]
            # Dropout and mixing: the same wherever the run was interrupted, different on each worker.
            torch.manual_seed(seed_of(self.job.seed, state.epoch, step, world.rank))
            losses = self._step(network, list(indices), pixels, images, len(batches[step]), state)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            finite &= torch.isfinite(norm)
            if (step + 1) % look == 0:
                self._sound(finite)
            moving.step()
            average.update()
            total += losses
            seen, trained = seen + len(batches[step]), trained + len(batches[step])
            if self.tell.due():
                speed = seen / max(time.monotonic() - started, 1e-6)
                left = ((epochs - state.epoch) * len(order) - trained) / max(speed, 1e-6)
                self.tell(
                    state.epoch,
                    epochs,
                    f"{state.arm} epoch {state.epoch + 1}/{epochs}, loss {float(losses) / len(indices):.3f}, {speed:.0f} images/s, "
                    f"waited {images.waited / max(time.monotonic() - started, 1e-6):.0%} for data, {clock(left)} left",
                )
            if step + 1 == len(batches):
                break
            if (step + 1) % look == 0 and self.deadline.passed():
                whole = False
                break
            if (step + 1) % each == 0:
                self._sound(finite)
                state.step, state.loss = step + 1, state.loss + float(all_reduce(total.cpu(), world, torch.distributed.ReduceOp.SUM))
                total.zero_()
                self._one_model(average)
                state.seconds = self.deadline.spent if self.deadline.seconds else 0.0
                self.checkpoint.keep(state, moving, average)
                if self.checkpoint.due():
                    self.checkpoint.write(state)
        self._sound(finite)
        summed = state.loss + float(all_reduce(total.cpu(), world, torch.distributed.ReduceOp.SUM))
        seconds = max(time.monotonic() - started, 1e-6)
        return summed / max(trained, 1), seen / seconds, images.waited / seconds, whole

    @staticmethod
    def _sound(finite: Tensor) -> None:
        """Raise if a gradient was no number; all workers have the same gradients."""
        if not finite:
            raise Diverged("the norm of the gradient is no number")

    def _step(self, network: nn.Module, indices: list[int], pixels: Tensor, images: Images, batch: int, state: State) -> Tensor:
        """Leave the gradient of a batch in the weights; return the summed loss of this worker's share. Memory that runs out halves the parts."""
        # No more parts than the smallest share has images, because all workers must take equally many; and BatchNorm has no statistics of one.
        least = 2 if self.normalization == "batch" and not self.still else 1
        most = max(batch // (self.world.size * least), 1)
        parts = max(state.accumulate, self.recipe.accumulate)
        taken: tuple[Tensor, Tensor] | None = None
        # Batch normalization moves its statistics with every part, and a part that was taken before memory ran out is taken again.
        before = [] if self.still else self._buffers()
        while True:
            for parameter in self.model.parameters():
                parameter.grad = None
            try:
                taken = taken or self._inputs(indices, pixels, images)
                with self._compiling():
                    return self._parts(network, *taken, images, batch, min(parts, most))
            except torch.cuda.OutOfMemoryError as error:
                found = f"expected room in the GPU's memory for {math.ceil(len(indices) / min(parts, most))} images at a time, found none. "
                if parts >= most:
                    raise TrainingError(found + "Set data.size or train.batch_size lower.") from error
                parts *= 2
                self._put_back(before)
                if self.world.size > 1:
                    # Other workers wait in the middle of this step: only a new start brings all to the same number of parts.
                    raise OutOfMemory(
                        found
                        + f"Set train.override.accumulate to {parts} (the batch stays as large), or data.size or train.batch_size lower.",
                        parts,
                    ) from error
                state.in_parts(parts)
                torch.cuda.empty_cache()

    def _inputs(self, indices: list[int], pixels: Tensor, images: Images) -> tuple[Tensor, Tensor]:
        """Return this worker's share of a batch and its labels: 8-bit pixels, or where images are mixed normalized ones on the device.

        Images are mixed before the share is taken in parts: how much memory there is changes no recipe.
        """
        recipe, device = self.recipe, self.world.device
        labels = torch.from_numpy(self.sides.train_labels[np.array(indices) % len(images)])
        if not (recipe.mixup or recipe.cutmix):
            return pixels, labels
        inputs = normalize(pixels.to(device, non_blocking=True), images.transforms)
        return mix(inputs, labels.to(device, non_blocking=True), self.classes, recipe.mixup, recipe.cutmix)

    def _parts(self, network: nn.Module, share: Tensor, labels: Tensor, images: Images, batch: int, parts: int) -> Tensor:
        world, device = self.world, self.world.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        pieces = list(zip(share.tensor_split(parts), labels.tensor_split(parts), strict=True))
        for number, (piece, truth) in enumerate(pieces, 1):
            inputs, wanted = piece.to(device, non_blocking=True), truth.to(device, non_blocking=True)
            if inputs.dtype == torch.uint8:
                inputs = normalize(inputs, images.transforms)
            quiet: AbstractContextManager[None] = nullcontext()
            if isinstance(network, nn.parallel.DistributedDataParallel) and number < len(pieces):
                quiet = network.no_sync()
            with quiet:
                with autocast(device, self.half):
                    logits = network(inputs)
                losses = summed_loss(logits.float(), wanted, self.weights, self.recipe.label_smoothing)
                # DDP averages over workers; weighted like this the average is the mean over the whole batch, uneven shares included.
                (losses * world.size / batch).backward()  # type: ignore[no-untyped-call]
            total += losses.detach().double()
        return total


def summed_loss(logits: Tensor, wanted: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Return the summed cross-entropy with labels smoothed, each image weighed by what its own class weighs.

    PyTorch weighs every class of a smoothed label by that class's weight: images of a large class would be taught the small ones.

    Args:
        wanted: class indices (batch,), or probabilities (batch, classes); weights: of the classes.
    """
    if weights is None or not smoothing:
        return functional.cross_entropy(logits, wanted, weight=weights, label_smoothing=smoothing, reduction="sum")
    own = weights[wanted] if wanted.dim() == 1 else wanted @ weights
    plain = functional.cross_entropy(logits, wanted, weight=weights, reduction="sum")
    return (1 - smoothing) * plain - smoothing * (own * logits.log_softmax(1).mean(1)).sum()


def batch_size(job: TrainingConfig, recipe: Recipe, images: int, world: DistributedContext) -> int:
    """Return the images per step over all workers, at least two for each.

    Raises:
        ClusterError: the user asked for fewer.
    """
    least = 2 * world.size
    if not isinstance(job.batch_size, int):
        return max(recipe.batch_size(images), least)
    if job.batch_size < least:
        raise ClusterError(
            f"expected train.batch_size to hold two images for each of {world.size} workers, found {job.batch_size}. "
            f"Set it to {least} or more or to auto, or cluster.workers to at most {job.batch_size // 2}."
        )
    return job.batch_size
