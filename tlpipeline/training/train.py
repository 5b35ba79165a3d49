"""Training as one plain torch job: solve the new head on frozen features, then, where the case says so, train everything.

The job knows neither Ray nor Prefect. A `DistributedContext` tells it who the other workers are and keeps its checkpoints; one process, plain gloo
processes and Ray workers each bring their own.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlpipeline.backbones import catalogue, taps
from tlpipeline.backbones.classifier import Classifier, Description, feature_extractor, save
from tlpipeline.backbones.features import FeatureExtractor
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.precision import extracts_in_bfloat16
from tlpipeline.data.augment import augmentation
from tlpipeline.data.cache import FeatureTable, Store
from tlpipeline.data.dataset import Row, read_manifest
from tlpipeline.data.loader import Images, batch_ranges
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.errors import ClusterError
from tlpipeline.files import write_json
from tlpipeline.stats import paired
from tlpipeline.training.checkpoint import MODEL, STATE, Checkpoints, State
from tlpipeline.training.config import OnProgress, ProgressWriter, TrainingConfig, TrainingPlan, clock, in_validation
from tlpipeline.training.distributed import DistributedContext, all_reduce, broadcast
from tlpipeline.training.heads import Labels, inverse_temperature, judged_penalty, solve_head, validated
from tlpipeline.training.recipe import BUDGET, Recipe
from tlpipeline.training.trainer import AT_ONCE, Datasets, TimeBudget, Trainer, batch_size

CHUNK = 1024
NO_TIME = f"{BUDGET} left no time to solve the head on what was trained"


def run(job: TrainingConfig, world: DistributedContext, scratch_folder: Path) -> Path | None:
    """Train the decided case.

    Args:
        scratch_folder: an empty folder of this worker's own for writing checkpoints.

    Returns:
        On the first worker the folder with the finished model (weights.safetensors, model.json) and history.json; None on the others.
    """
    plan = job.plan
    torch.manual_seed(job.seed)
    manifest = read_manifest(Path(job.manifest))
    classes = manifest.classes
    index = {label: i for i, label in enumerate(classes)}
    train, val = manifest.used(TRAIN), manifest.used(VAL)
    if len(train) < 2 * world.size:
        raise ClusterError(
            f"expected at least two training images for each of {world.size} workers, found {len(train)}. Set cluster.workers lower, or to 0."
        )
    frozen, recipe = plan.freeze, plan.recipe
    if not frozen:
        batch_size(job, recipe, len(train), world)  # what cannot be is said before anything is computed
    tell = ProgressWriter(Path(job.history), world.rank)
    store = Store(Path(job.cache) if job.cache else None, job.cache_bytes)
    backbone = catalogue.load(job.backbone, job.weights, md5=job.weights_md5, root=Path(job.workspace), size=plan.size, seed=job.seed)
    transforms = backbone.transforms.at(plan.size)
    half = extracts_in_bfloat16(world.device, job.precision)
    model = Classifier(backbone, plan.head_taps, len(classes), frozen, half).to(world.device)
    sides = Datasets(
        Path(job.images), train, val, np.array([index[r.label] for r in train]), np.array([index[r.label] for r in val]), transforms
    )
    checkpoint = Checkpoints(world, scratch_folder, model)
    state = checkpoint.restore(Path(job.start) if job.start else None)
    deadline = TimeBudget(job.budget_minutes, world, state.seconds if state else 0.0)
    if state is None:
        state = State(arm="head")
        if plan.init not in ("random", "plain"):
            _solve_head(model, sides, recipe, job, world, tell, state, store, deadline)
        state.seconds = deadline.spent if deadline.seconds else 0.0
        checkpoint.write(state)
    if state.finished:
        model = _as_finished(model, plan, checkpoint)
    elif not frozen:
        blocks: list[list[str]] = []
        if recipe.layer_decay(backbone.normalization) != 1:
            blocks = [[f"trunk.{name}" for name in block] for block in taps.parameters_by_tap(backbone, plan.slice)]
        fit = Trainer(model, sides, recipe, job, world, checkpoint, tell, backbone.normalization, store, deadline, blocks)
        _train_all(fit, model, plan, state)
        if job.checkpoint_only:
            checkpoint.write(state)
            return checkpoint.written if world.rank == 0 else None
        checkpoint.load_best()
        if recipe.solve_again:
            model = _refit_head(fit, model, plan.final_head_taps, state, scratch_folder)
    # Where fine-tuning was undone the backbone is as it came, and reads as it did when the head was solved.
    kept = frozen or state.best_arm == "head"
    if world.rank:
        world.report({"accuracy": state.best_accuracy}, None)
        return None
    description = Description(job.backbone, plan.slice, model.readings, classes, transforms, kept, in_bfloat16=kept and half)
    return _finish(model, description, state, world, scratch_folder / "finished")


def _train_all(fit: Trainer, model: Classifier, plan: TrainingPlan, state: State) -> None:
    """Fine-tune, or continue where the state stands; then train from random weights, if the plan asks for it and a whole model is wanted."""
    job, recipe, sides = fit.job, plan.recipe, fit.sides
    rate = recipe.rate(fit.normalization, plan.size)
    epochs = job.epochs if isinstance(job.epochs, int) else recipe.epochs(len(sides.train))
    if plan.init != "random" and state.arm in ("head", "fine-tune"):
        if state.arm == "head" and state.history and fit.deadline.passed():
            state.remark(f"{BUDGET} ended before fine-tuning began: the head on frozen features is what there is")
            fit.checkpoint.keep_best()
        else:
            fit.arm("fine-tune", epochs, rate, state)
    if job.checkpoint_only:
        return
    again = plan.init == "auto" and len(sides.train) >= recipe.scratch_from and len(sides.val) > 0 and not state.gained
    if plan.init == "random" or state.arm == "scratch" or (again and not fit.deadline.passed()):
        if state.arm != "scratch":
            fresh = catalogue.load(job.backbone, catalogue.NONE, size=plan.size, seed=job.seed)
            model.load_state_dict(Classifier(fresh, model.readings, model.head.out_features, frozen=False).state_dict())
        longer = round(recipe.scratch_times * job.epochs) if isinstance(job.epochs, int) else recipe.scratch_epochs(len(sides.train))
        fit.arm("scratch", longer, min(rate * recipe.scratch_times, 0.1), state)


def _as_finished(model: Classifier, plan: TrainingPlan, checkpoint: Checkpoints) -> Classifier:
    """Return the model of a finished run, which only has to be handed over, with the head that was solved last if there was one."""
    if len(checkpoint.best["head.weight"][0]) != model.head.in_features:
        device = model.head.weight.device
        model = Classifier(model.backbone[0], plan.final_head_taps, model.head.out_features, model.frozen, model.in_bfloat16).to(device)
    model.load_state_dict(checkpoint.best)
    return model


def _finish(model: Classifier, description: Description, state: State, world: DistributedContext, finished: Path) -> Path:
    """Write the finished model and what became of it, and report it."""
    save(model, replace(description, remarks=tuple(state.remarks)), finished / MODEL)
    speed = {"images_per_second": state.speed, "waited_for_data": state.waited}
    told = {"arm": state.best_arm, "validation": state.summary(), "remarks": state.remarks, "speed": speed, "history": state.history}
    write_json(told, finished / "history.json")
    write_json(asdict(state) | {"finished": True}, finished / STATE)
    world.report({"accuracy": state.best_accuracy}, finished)
    return finished


# --- the frozen head ------------------------------------------------------------------------------------------------------------------


def _solve_head(
    model: Classifier,
    sides: Datasets,
    recipe: Recipe,
    job: TrainingConfig,
    world: DistributedContext,
    tell: OnProgress,
    state: State,
    store: Store,
    deadline: TimeBudget,
) -> None:
    """Compute the frozen features that are not kept yet, each by one worker; solve the head on the first; validate it."""
    blocks, classes = model.blocks, model.head.out_features
    imbalance = recipe.head_imbalance
    found: tuple[Tensor, Tensor, float] | None = None
    reader = feature_extractor(model, store, sides.transforms, world.device, extracts_in_bfloat16(world.device, job.precision))
    # Where the time is up, some of the images are missing, which come in the order of their hashes: at random.
    passes = Passes(world, tell, deadline)
    seen = passes.of(reader, Images(sides.root, sides.val, sides.transforms))
    if len(seen) < len(sides.val):
        state.remark(f"{BUDGET} ended the features after {len(seen)} of {len(sides.val)} validation images")
    held, held_labels = [sides.val[i] for i in seen], sides.val_labels[seen]
    there = passes.of(reader, Images(sides.root, sides.train, sides.transforms))
    if len(there) < len(sides.train):
        state.remark(f"{BUDGET} ended the features after {len(there)} of {len(sides.train)} training images")
    train, labels = [sides.train[i] for i in there], sides.train_labels[there]
    readers = [reader]
    if model.frozen and len(there) == len(sides.train):
        readers += _random_views(reader, sides, recipe, job, state, passes)
    state.speed, state.waited = passes.pace
    views, chances = len(readers) - 1, torch.zeros(len(held), classes)
    if world.rank == 0:
        x, val = FeatureTable(reader.rows(train)), FeatureTable(reader.rows(held))
        for other in readers[1:]:
            x = x.concat(FeatureTable(other.rows(train)))
        y = np.tile(labels, views + 1)
        found = solve_head(x, y, blocks, classes, imbalance, job.seed, views=views, tolerance=1e-4, late=deadline.late)
        chances = head_probabilities(found, val)
        if deadline.late():
            more = ", and it was not solved once more with the validation images" if model.frozen else ""
            state.remark(f"{BUDGET} ended while the head was solved: it may lie short of its optimum{more}")
        elif model.frozen and len(val):
            # Nothing is left to select: the head is solved once more, on the validation images as well. Fine-tuning must start without them.
            both = np.concatenate([y, held_labels])
            found = solve_head(x.concat(val), both, blocks, classes, imbalance, job.seed, found[2], found[:2], late=deadline.late)
            found = calibrated(found, chances, held_labels)
    broadcast([chances], world)
    accuracy, loss, correct = validated(chances, held_labels)
    state.history.append({"arm": "head", "epoch": 0, "loss": 0.0, "accuracy": accuracy, "log_loss": loss, "correct": correct})
    state.better(accuracy, loss)
    if found is not None:
        model.head.weight.data.copy_(found[0])
        model.head.bias.data.copy_(found[1])
        state.head_penalty = found[2]
    broadcast([model.head.weight, model.head.bias], world)
    count = len(train) + len(held)
    tell(count, count, f"head solved, {in_validation(accuracy, len(held))}", important=True)


def _refit_head(fit: Trainer, model: Classifier, readings: Sequence[TapPooling], state: State, scratch_folder: Path) -> Classifier:
    """Return the trained network with a head on all of its readings, solved on the images as they are.

    The one that was trained knows random views, is a step behind the features, and reads one tap. It stays where it is clearly better on
    validation (two paired standard errors) than one that is solved on the training images.
    """
    sides, world, deadline = fit.sides, fit.world, fit.deadline
    images = [*sides.train, *sides.val]
    found: tuple[Tensor, Tensor, float] | None = None
    chances = torch.zeros(len(sides.val), model.head.out_features)
    # Where fine-tuning was undone the backbone is the one that profile and training have read images with, and will again.
    undone = state.best_arm == "head"
    half = undone and extracts_in_bfloat16(world.device, fit.job.precision)
    wide = Classifier(model.backbone[0], readings, model.head.out_features, undone, half).to(world.device)
    with tempfile.TemporaryDirectory(prefix="features-", dir=scratch_folder) as place:
        store = fit.store if undone else Store(Path(place))
        reader = feature_extractor(wide, store, sides.transforms, world.device, half, smaller_passes=not undone)
        late = deadline.passed()
        if late or len(frozen_features(reader, Images(sides.root, images, sides.transforms), world, fit.tell, deadline)) < len(images):
            state.remark(NO_TIME)
            return model
        if world.rank == 0:
            found, chances = _solved_last(fit, wide, reader)
            wide.head.weight.data.copy_(found[0])
            wide.head.bias.data.copy_(found[1])
    if deadline.passed():
        state.remark(NO_TIME)  # it may lie short of its optimum, and the one that was trained is there
        return model
    if len(sides.val):
        broadcast([chances], world)
        accuracy, loss, correct = validated(chances, sides.val_labels)
        kept = state.kept
        line = {"arm": "last head", "epoch": kept["epoch"], "loss": 0.0, "accuracy": accuracy, "log_loss": loss, "correct": correct}
        state.history.append(line)
        difference, error = paired(correct, str(kept["correct"]), len(sides.val))
        if difference < -2 * error:
            fit.tell(len(images), len(images), f"the head that was trained stays: one solved last reaches {accuracy:.1%}", important=True)
            return model
        state.best_accuracy, state.best_loss = accuracy, loss
    if found is not None:
        state.head_penalty = found[2]
    broadcast([wide.head.weight, wide.head.bias], world)
    fit.tell(len(images), len(images), f"head solved once more, on {' + '.join(r.tap for r in readings)}", important=True)
    return wide


def _solved_last(fit: Trainer, wide: Classifier, reader: FeatureExtractor) -> tuple[tuple[Tensor, Tensor, float], Tensor]:
    """Return the head (weight, bias, penalty) of all labeled images, and what one of the training images says of validation: (n, K).

    The validation images say which penalty is best: features that were trained on images are no measure of themselves. Then nothing is left to
    select, and they count as well.
    """
    sides, late = fit.sides, fit.deadline.late
    kind = wide.blocks, wide.head.out_features, fit.recipe.head_imbalance, fit.job.seed
    x, judges = FeatureTable(reader.rows(sides.train)), FeatureTable(reader.rows(sides.val))
    if not len(sides.val):
        return solve_head(x, sides.train_labels, *kind, tolerance=1e-4, late=late), torch.zeros(0, wide.head.out_features)
    near = judged_penalty(x, sides.train_labels, judges, sides.val_labels, *kind, late)
    first = solve_head(x, sides.train_labels, *kind, *near, tolerance=1e-4, late=late)
    both = np.concatenate([sides.train_labels, sides.val_labels])
    found, said = (
        solve_head(x.concat(judges), both, *kind, first[2], first[:2], tolerance=1e-4, late=late),
        head_probabilities(first, judges),
    )
    return calibrated(found, said, sides.val_labels), said


def calibrated(head: tuple[Tensor, Tensor, float], chances: Tensor, labels: Labels) -> tuple[Tensor, Tensor, float]:
    """Return a head (weight, bias, penalty) that gives the same answers, and is as sure as one of the training images was right.

    Args:
        chances, labels: what that one says of validation, and what is so (see `inverse_temperature`).
    """
    by = inverse_temperature(chances, labels)
    return head[0] * by, head[1] * by, head[2]


def head_probabilities(head: tuple[Tensor, Tensor, float], features: FeatureTable) -> Tensor:
    """Return a solved head's probabilities (n, K) of rows of features."""
    chances = torch.empty(len(features), len(head[1]))
    for part in batch_ranges(len(features), CHUNK):
        rows = slice(part.start, part.stop)
        chances[rows] = (features.take(rows) @ head[0].T + head[1]).softmax(1)
    return chances


class Passes:
    """Reads frozen features, and counts the images that had to pass through the network for them, and the time."""

    def __init__(self, world: DistributedContext, tell: OnProgress, deadline: TimeBudget) -> None:
        self.world, self.tell, self.deadline = world, tell, deadline
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def of(self, reader: FeatureExtractor, images: Images) -> Labels:
        """Have these features computed (see `frozen_features`); return the indices of the images that are there."""
        lacking, started = int(reader.missing(images.rows).sum()), time.monotonic()
        there = frozen_features(reader, images, self.world, self.tell, self.deadline)
        self.images += lacking - (len(images.rows) - len(there))
        self.seconds += time.monotonic() - started
        self.waited += images.waited
        return there

    @property
    def pace(self) -> tuple[float, float]:
        """Images a second, and the share of the time that the first worker waited for data."""
        took = max(self.seconds, 1e-6)
        return round(self.images / took, 1), round(self.waited / took, 4)


def _random_views(
    reader: FeatureExtractor, sides: Datasets, recipe: Recipe, job: TrainingConfig, state: State, passes: Passes
) -> list[FeatureExtractor]:
    """Compute the features of random views of all training images; return the readers of those views that are all there."""
    whole: list[FeatureExtractor] = []
    for view in range(1, job.views + 1):
        augment = augmentation(recipe.crop, job.flip, job.seed, view)
        of_view = reader.for_view(f"view {view} (crop {recipe.crop:g}, flip {job.flip}, seed {job.seed})")
        images = Images(sides.root, sides.train, sides.transforms, augment)
        if passes.deadline.passed() or len(passes.of(of_view, images)) < len(sides.train):
            state.remark(f"{BUDGET} ended the features after {view - 1} of {job.views} random views")
            break
        whole.append(of_view)
    return whole


def frozen_features(
    reader: FeatureExtractor, images: Images, world: DistributedContext, tell: OnProgress, deadline: TimeBudget | None = None
) -> Labels:
    """Have the features of these images computed where no worker has them yet, each by one worker, and brought to the first one.

    Returns:
        The indices of the images that are there: all of them, unless the deadline passed.
    """
    kinds = torch.distributed.ReduceOp
    nobody = all_reduce(torch.from_numpy(reader.missing(images.rows)).int(), world, kinds.MIN).numpy().astype(bool)
    mine = [int(i) for i in np.flatnonzero(nobody)[world.rank :: world.size]]
    all_of_it, started = int(nobody.sum()), time.monotonic()

    def told(before: int, part: int) -> None:
        done = before + part
        if tell.due():
            took = max(time.monotonic() - started, 1e-6)
            rate = done * world.size / took
            left = max(all_of_it - done * world.size, 0) / rate
            text = f"features, {rate:.0f} images/s, waited {images.waited / took:.0%} for data, {clock(left)} left"
            tell(min(done * world.size, all_of_it), all_of_it, text)

    most = math.ceil(all_of_it / world.size)
    # Each part begins with nothing decoded: only who must look at the clock takes parts.
    each = AT_ONCE if deadline is not None and deadline.seconds else max(most, 1)
    for start in range(0, most, each):
        reader.compute(images, mine[start : start + each], partial(told, start))
        if deadline is not None and deadline.passed():
            break
    if world.size > 1:
        torch.distributed.barrier()
        _bring_to_first(reader, images.rows, world)
    missing = torch.from_numpy(reader.missing(images.rows)).int()
    broadcast([missing], world)
    return np.flatnonzero(missing.numpy() == 0)


def _bring_to_first(reader: FeatureExtractor, rows: Sequence[Row], world: DistributedContext) -> None:
    """Give the first worker the features that it cannot see on its own disk: other machines' that share none with it."""
    for column in reader.columns:
        column.refresh()
    lacking = torch.from_numpy(reader.missing(rows)).int()
    broadcast([lacking], world)
    if not int(lacking.sum()):
        return
    own = np.where(reader.missing(rows), world.size, world.rank)
    owner = all_reduce(torch.from_numpy(own).int(), world, torch.distributed.ReduceOp.MIN).numpy()
    for rank in range(1, world.size):
        indices = np.flatnonzero((lacking.numpy() == 1) & (owner == rank))
        for part in batch_ranges(len(indices), CHUNK):
            some = [rows[i] for i in indices[part.start : part.stop]]
            for column, width in zip(reader.columns, reader.widths, strict=True):
                if world.rank == rank:
                    torch.distributed.send(column.rows([r.md5 for r in some]).all().to(world.device), 0)
                elif world.rank == 0:
                    got = torch.empty(len(some), width, device=world.device)
                    torch.distributed.recv(got, rank)
                    column.add([r.md5 for r in some], got)
