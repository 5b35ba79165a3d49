"""Heads on features of a backbone that is not trained at that moment: the features are computed once, and the head is solved on them."""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlpipeline.backbones.classifier import Classifier, feature_extractor
from tlpipeline.backbones.features import FeatureExtractor
from tlpipeline.backbones.precision import extracts_in_bfloat16
from tlpipeline.data.cache import FeatureTable, Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images, batch_ranges
from tlpipeline.training.checkpoint import HEAD, clearly_worse
from tlpipeline.training.distributed import DistributedContext, all_reduce, broadcast
from tlpipeline.training.heads import Labels, inverse_temperature, judged_penalty, solve_head, validated
from tlpipeline.training.progress import clock, in_validation
from tlpipeline.training.recipe import BUDGET
from tlpipeline.training.trainer import Run

CHUNK = 1024
NO_TIME = f"{BUDGET} left no time to solve the head on what was trained"

SolvedHead = tuple[Tensor, Tensor, float]  # weight (K, d), bias (K,), penalty


def train_head(model: Classifier, run: Run) -> None:
    """Compute the frozen features that are not cached yet, each by one worker; solve the head on the first worker; validate it."""
    config, context, datasets = run.config, run.context, run.datasets
    half = extracts_in_bfloat16(context.device, config.precision)
    with _feature_store(run, kept=not config.champion) as store:
        _train_head(model, run, feature_extractor(model, store, datasets.transforms, context.device, half))


@contextmanager
def _feature_store(run: Run, kept: bool) -> Iterator[Store]:
    """Yield where features are kept: in the cache if other models share the backbone, else in a temporary folder."""
    if kept:
        yield run.store
        return
    with tempfile.TemporaryDirectory(prefix="features-", dir=run.scratch) as place:
        yield Store(Path(place))


def _train_head(model: Classifier, run: Run, extractor: FeatureExtractor) -> None:
    config, context, datasets, state, budget = run.config, run.context, run.datasets, run.state, run.budget
    passes = FeaturePasses(run)
    read_val = passes.compute(extractor, datasets.val, "validation")
    read_train = passes.compute(extractor, datasets.train, "training")
    state.speed, state.waited = passes.speed
    val, train = [datasets.val[i] for i in read_val], [datasets.train[i] for i in read_train]
    labels, val_labels = datasets.train_labels[read_train], datasets.val_labels[read_val]
    head: SolvedHead | None = None
    val_probabilities = torch.zeros(len(val), model.head.out_features)
    if context.rank == 0:
        kind = model.blocks, model.head.out_features, config.plan.recipe.head_imbalance, config.seed
        x, held_out = FeatureTable(extractor.rows(train)), FeatureTable(extractor.rows(val))
        head = solve_head(x, labels, *kind, tolerance=1e-4, expired=budget.expired_here)
        val_probabilities = head_probabilities(head, held_out)
        if budget.expired_here():
            more = ", and it was not solved once more with the validation images" if model.frozen else ""
            state.remark(f"{BUDGET} ended while the head was solved: it may not have reached its optimum{more}")
        elif model.frozen and len(val):
            # Nothing is left to select: the head is solved once more, on the validation images as well. Fine-tuning must start without them.
            both = np.concatenate([labels, val_labels])
            head = solve_head(x.concat(held_out), both, *kind, head[2], head[:2], expired=budget.expired_here)
            head = calibrated(head, val_probabilities, val_labels)
    broadcast([val_probabilities], context)
    accuracy, loss, correct = validated(val_probabilities, val_labels)
    state.history.append({"phase": HEAD, "epoch": 0, "loss": 0.0, "accuracy": accuracy, "log_loss": loss, "correct": correct})
    state.update_best(state.validation(accuracy, loss))
    _put(head, model, run)
    count = len(train) + len(val)
    run.on_progress(count, count, f"head solved, {in_validation(accuracy, len(val))}", important=True)


def refit_head(model: Classifier, run: Run) -> Classifier:
    """Return the trained network with a head on all final taps, solved on the images as they are.

    The head that was trained with the network was trained on random crops, is one step older than the features, and reads one tap. It stays if it
    is clearly better on validation (two paired standard errors) than one that is solved on the training images.
    """
    datasets, context, budget, state = run.datasets, run.context, run.budget, run.state
    taps, images = run.config.plan.final_head_taps, [*datasets.train, *datasets.val]
    head: SolvedHead | None = None
    val_probabilities = torch.zeros(len(datasets.val), model.head.out_features)
    # If fine-tuning from the source's weights was undone, the backbone is the one whose features the cache holds.
    undone = state.best.phase == HEAD and not run.config.champion
    half = undone and extracts_in_bfloat16(context.device, run.config.precision)
    wide = Classifier(model.backbone[0], taps, model.head.out_features, undone, half).to(context.device)
    with _feature_store(run, kept=undone) as store:
        extractor = feature_extractor(wide, store, datasets.transforms, context.device, half, smaller_passes=not undone)
        if budget.expired() or len(frozen_features(extractor, Images(datasets.root, images, datasets.transforms), run)) < len(images):
            state.remark(NO_TIME)
            return model
        if context.rank == 0:
            head, val_probabilities = _solve_final_head(wide, extractor, run)
    if budget.expired():
        state.remark(NO_TIME)  # the head may not have reached its optimum; the trained one is kept
        return model
    if len(datasets.val):
        broadcast([val_probabilities], context)
        accuracy, loss, correct = validated(val_probabilities, datasets.val_labels)
        line = {
            "phase": "last head",
            "epoch": state.best_line["epoch"],
            "loss": 0.0,
            "accuracy": accuracy,
            "log_loss": loss,
            "correct": correct,
        }
        worse = clearly_worse(correct, str(state.best_line["correct"]), len(datasets.val))
        state.history.append(line)
        if worse:
            text = f"the trained head stays: one solved on the final features reaches {accuracy:.1%}"
            run.on_progress(len(images), len(images), text, important=True)
            return model
        state.best = replace(state.best, accuracy=accuracy, loss=loss)
    _put(head, wide, run)
    text = f"head solved once more, on {' + '.join(reading.tap for reading in taps)}"
    run.on_progress(len(images), len(images), text, important=True)
    return wide


def _put(head: SolvedHead | None, model: Classifier, run: Run) -> None:
    """Give all workers' models the head that the first one solved."""
    if head is not None:
        model.head.weight.data.copy_(head[0])
        model.head.bias.data.copy_(head[1])
        run.state.head_penalty = head[2]
    broadcast([model.head.weight, model.head.bias], run.context)


def _solve_final_head(model: Classifier, extractor: FeatureExtractor, run: Run) -> tuple[SolvedHead, Tensor]:
    """Return the head on all labeled images, and the probabilities (n, K) of validation by a head on the training images.

    The penalty is chosen on the validation images, because the features were trained on the training images. Then nothing is left to select, and
    the head is solved on the validation images as well.
    """
    datasets, expired = run.datasets, run.budget.expired_here
    kind = model.blocks, model.head.out_features, run.config.plan.recipe.head_imbalance, run.config.seed
    x, val = FeatureTable(extractor.rows(datasets.train)), FeatureTable(extractor.rows(datasets.val))
    if not len(datasets.val):
        return solve_head(x, datasets.train_labels, *kind, tolerance=1e-4, expired=expired), torch.zeros(0, model.head.out_features)
    near = judged_penalty(x, datasets.train_labels, val, datasets.val_labels, *kind, expired)
    first = solve_head(x, datasets.train_labels, *kind, *near, tolerance=1e-4, expired=expired)
    both = np.concatenate([datasets.train_labels, datasets.val_labels])
    head = solve_head(x.concat(val), both, *kind, first[2], first[:2], tolerance=1e-4, expired=expired)
    val_probabilities = head_probabilities(first, val)
    return calibrated(head, val_probabilities, datasets.val_labels), val_probabilities


def calibrated(head: SolvedHead, probabilities: Tensor, labels: Labels) -> SolvedHead:
    """Return a head with the same predicted classes, and with probabilities calibrated by a head on the training images alone.

    Args:
        probabilities, labels: probabilities (n, K) of validation by that one, and the true classes (see `inverse_temperature`).
    """
    by = inverse_temperature(probabilities, labels)
    return head[0] * by, head[1] * by, head[2]


def head_probabilities(head: SolvedHead, features: FeatureTable) -> Tensor:
    """Return a solved head's probabilities (n, K) of rows of features."""
    probabilities = torch.empty(len(features), len(head[1]))
    for part in batch_ranges(len(features), CHUNK):
        rows = slice(part.start, part.stop)
        probabilities[rows] = (features.take(rows) @ head[0].T + head[1]).softmax(1)
    return probabilities


# --- the features -----------------------------------------------------------------------------------------------------------------------


class FeaturePasses:
    """Computes frozen features, and counts the images that had to pass through the network for them, and the time."""

    def __init__(self, run: Run) -> None:
        self.run, self.images, self.seconds, self.waited = run, 0, 0.0, 0.0

    def compute(self, extractor: FeatureExtractor, rows: Sequence[Row], name: str) -> Labels:
        """Compute the features of these images (see `frozen_features`); return the indices of the images that have them."""
        datasets = self.run.datasets
        images = Images(datasets.root, rows, datasets.transforms)
        missing, started = int(extractor.missing(rows).sum()), time.monotonic()
        done = frozen_features(extractor, images, self.run)
        self.images += missing - (len(rows) - len(done))
        self.seconds += time.monotonic() - started
        self.waited += images.waited
        if len(done) < len(rows):
            self.run.state.remark(f"{BUDGET} ended the features after {len(done)} of {len(rows)} {name} images")
        return done

    @property
    def speed(self) -> tuple[float, float]:
        """Images a second, and the share of the time that the first worker waited for data."""
        seconds = max(self.seconds, 1e-6)
        return round(self.images / seconds, 1), round(self.waited / seconds, 4)


def frozen_features(extractor: FeatureExtractor, images: Images, run: Run) -> Labels:
    """Compute the features of these images that no worker has yet, each by one worker, and bring them to the first one.

    Returns:
        The indices of the images that have features: all of them, unless the time was up. Images come in the order of their hashes, so
        those that are missing are a random part.
    """
    context, budget = run.context, run.budget
    missing = (
        all_reduce(torch.from_numpy(extractor.missing(images.rows)).int(), context, torch.distributed.ReduceOp.MIN).numpy().astype(bool)
    )
    mine = [int(i) for i in np.flatnonzero(missing)[context.rank :: context.size]]
    total, started = int(missing.sum()), time.monotonic()

    def report(before: int, part: int) -> None:
        if run.on_progress.due():
            done, seconds = (before + part) * context.size, max(time.monotonic() - started, 1e-6)
            remaining = clock(max(total - done, 0) * seconds / done)
            text = f"features, {done / seconds:.0f} images/s, waited {images.waited / seconds:.0%} for data, {remaining} left"
            run.on_progress(min(done, total), total, text)

    most = math.ceil(total / context.size)
    # Each part starts with nothing decoded: only a run with a time budget takes parts.
    each = run.config.cadence.read_images if budget.seconds else max(most, 1)
    for start in range(0, most, each):
        extractor.compute(images, mine[start : start + each], partial(report, start))
        if budget.expired():
            break
    if context.size > 1:
        torch.distributed.barrier()
        _bring_to_first(extractor, images.rows, context)
    lacking = torch.from_numpy(extractor.missing(images.rows)).int()
    broadcast([lacking], context)
    return np.flatnonzero(lacking.numpy() == 0)


def _bring_to_first(extractor: FeatureExtractor, rows: Sequence[Row], context: DistributedContext) -> None:
    """Give the first worker the features that it cannot see on its own disk: those of machines that share none with it."""
    for column in extractor.columns:
        column.refresh()
    lacking = torch.from_numpy(extractor.missing(rows)).int()
    broadcast([lacking], context)
    if not int(lacking.sum()):
        return
    own = np.where(extractor.missing(rows), context.size, context.rank)
    owner = all_reduce(torch.from_numpy(own).int(), context, torch.distributed.ReduceOp.MIN).numpy()
    for rank in range(1, context.size):
        indices = np.flatnonzero((lacking.numpy() == 1) & (owner == rank))
        for part in batch_ranges(len(indices), CHUNK):
            some = [rows[i] for i in indices[part.start : part.stop]]
            for column, width in zip(extractor.columns, extractor.widths, strict=True):
                if context.rank == rank:
                    torch.distributed.send(column.rows([r.md5 for r in some]).all().to(context.device), 0)
                elif context.rank == 0:
                    received = torch.empty(len(some), width, device=context.device)
                    torch.distributed.recv(received, rank)
                    column.add([r.md5 for r in some], received)
