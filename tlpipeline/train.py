"""Training as one plain torch loop: solve the new head on frozen features, then, where the case says so, train everything.

The loop knows neither Ray nor Prefect. A `World` tells it who the other workers are and keeps its checkpoints; one process, plain gloo
processes and Ray workers each bring their own. All randomness follows from (seed, epoch, image), so an interrupted run that is started
again ends where the uninterrupted one ends.
"""

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tlpipeline import backbones, choice, dataset
from tlpipeline.backbones import Transforms
from tlpipeline.cases import Decision, Recipe
from tlpipeline.dataset import TRAIN, VAL, Row, read_manifest
from tlpipeline.errors import ClusterError
from tlpipeline.features import Images, extract, normalise, scaling, shard
from tlpipeline.model import Classifier, Description, probabilities, save, write_json, write_tensors
from tlpipeline.outlook import Evidence, fitted
from tlpipeline.params import AUTO, ChooseParams
from tlpipeline.probes import pack, paired, unpack
from tlpipeline.progress import Event, Progress

FOLDS = 3
CV_IMAGES = 2000
ROTATE_BELOW = 4000
HEAD_PENALTIES = tuple(10.0**e for e in (-1, -2, -3, -4, -5, -6, -7))
STATE, CURRENT, BEST, OPTIMISER, MODEL = "state.json", "current.safetensors", "best.safetensors", "optimiser.safetensors", "model"


@dataclass(frozen=True)
class Job:
    """All that a worker needs, as plain values; paths are absolute.

    Attributes:
        workspace, images, manifest: where the workspace, its images and their manifest are.
        backbone, weights, weights_md5: as in params.yaml.
        decision: case.json, with train.override applied.
        seed, epochs, batch_size, flip, precision: as in params.yaml.
        history: file to which the first worker appends its progress, a JSON line each.
        start: folder of a checkpoint to go on from where this run has none of its own, "" for none: what a race trained.
        race: None, or what the looks of a race need: evidence and rule as JSON, and who was right on validation by the frozen arm (packed).
    """

    workspace: str
    images: str
    manifest: str
    backbone: str
    weights: str
    weights_md5: str
    decision: Mapping[str, Any]
    seed: int
    epochs: int | str
    batch_size: int | str
    flip: bool
    precision: str
    history: str
    start: str = ""
    race: Mapping[str, Any] | None = None


class Tell(Protocol):
    """Passes on progress; what is not important may be dropped where it comes too often."""

    def __call__(self, done: int, total: int, text: str, important: bool = False) -> None: ...


class World(Protocol):
    """Who trains together, and where checkpoints go. `report` and `gather` must be called by all workers alike."""

    rank: int
    size: int
    device: torch.device

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Keep this checkpoint folder (given by the first worker only); returns when it is safe."""

    def restore(self) -> Any:
        """Return a context manager that gives the folder of the newest checkpoint, or None."""


# --- workers --------------------------------------------------------------------------------------------------------------------------


class Alone:
    """A world on plain torch: one process, or the members of an initialised process group that share a folder.

    Args:
        folder: where the newest checkpoint is kept; replaced as a whole, so a crash leaves the old or the new one.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if grouped else 0
        self.size = torch.distributed.get_world_size() if grouped else 1
        self.device = device or torch.device("cpu")
        self.folder = folder

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Replace the kept checkpoint."""
        if folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            new, kept, old = self.folder / "new", self.folder / "kept", self.folder / "old"
            for path in (new, old):
                shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(folder, new)
            if kept.exists():
                kept.rename(old)
            new.rename(kept)
            shutil.rmtree(old, ignore_errors=True)
        if self.size > 1:
            torch.distributed.barrier()

    @contextmanager
    def restore(self) -> Iterator[Path | None]:
        """Give the kept checkpoint."""
        # Killed between the two renames, the newest complete one is called old.
        yield next((path for name in ("kept", "old") if (path := self.folder / name).is_dir()), None)


def gather(part: Tensor, total: int, world: World) -> Tensor:
    """Put together what each worker computed for its `shard`: (total, ...), on every worker, each row exactly once."""
    if world.size == 1:
        return part
    longest = math.ceil(total / world.size)
    padded = torch.zeros(longest, *part.shape[1:], dtype=part.dtype, device=world.device)
    padded[: len(part)] = part.to(world.device)
    parts = [torch.zeros_like(padded) for _ in range(world.size)]
    torch.distributed.all_gather(parts, padded)
    whole = torch.zeros(total, *part.shape[1:], dtype=part.dtype)
    for rank, got in enumerate(parts):
        indices = shard(total, rank, world.size)
        whole[list(indices)] = got[: len(indices)].cpu()
    return whole


def _from_first(tensors: Sequence[Tensor], world: World) -> None:
    """Overwrite these tensors with the first worker's."""
    if world.size > 1:
        for tensor in tensors:
            moved = tensor.data.to(world.device)
            torch.distributed.broadcast(moved, 0)
            tensor.data.copy_(moved)


# --- the job --------------------------------------------------------------------------------------------------------------------------


def run(job: Job, world: World, scratch_folder: Path) -> Path | None:
    """Train the decided case.

    Args:
        scratch_folder: an empty folder of this worker's own for writing checkpoints.

    Returns:
        On the first worker the folder with the finished model (weights.safetensors, model.json) and history.json; None on the others.
    """
    decision = Decision.from_json(job.decision)
    torch.manual_seed(job.seed)
    manifest = read_manifest(Path(job.manifest))
    classes = manifest.classes
    index = {label: i for i, label in enumerate(classes)}
    train, val = manifest.used(TRAIN), manifest.used(VAL)
    if len(train) < 2 * world.size:
        raise ClusterError(
            f"expected at least two training images for each of {world.size} workers, found {len(train)}. Set cluster.workers lower, or to 0."
        )
    tell = _Teller(Path(job.history), world.rank)
    backbone = backbones.load(job.backbone, job.weights, md5=job.weights_md5, root=Path(job.workspace), size=decision.size, seed=job.seed)
    transforms = backbone.transforms.at(decision.size)
    frozen = decision.freeze == "kept"
    model = Classifier(backbone, decision.readings, len(classes), frozen).to(world.device)
    description = Description(job.backbone, decision.slice, decision.readings, classes, transforms)
    sides = Sides(
        Path(job.images), train, val, np.array([index[r.label] for r in train]), np.array([index[r.label] for r in val]), transforms
    )
    recipe = decision.recipe
    checkpoint = Checkpoints(world, scratch_folder, model)
    state = checkpoint.restore(Path(job.start) if job.start else None)
    if state is None:
        state = State(arm="head")
        if decision.init not in ("random", "plain"):
            _solve(model, sides, recipe, job.seed, world, tell, state)
        checkpoint.write(state)
    if not frozen:
        rate = recipe.rate(backbone.normalisation, decision.size)
        fit = Fit(model, sides, recipe, job, world, checkpoint, tell, adam=backbone.normalisation == "layer")
        epochs = job.epochs if isinstance(job.epochs, int) else recipe.epochs(len(train))
        if decision.init != "random" and state.arm in ("head", "fine-tune"):
            fit.arm("fine-tune", epochs, rate, state)
        if job.race is not None:
            checkpoint.write(state)
            return checkpoint.written if world.rank == 0 else None
        again = decision.init == "auto" and len(train) >= recipe.scratch_from and not state.gained
        if decision.init == "random" or state.arm == "scratch" or again:
            if state.arm != "scratch":
                fresh = backbones.load(job.backbone, backbones.NONE, size=decision.size, seed=job.seed)
                model.load_state_dict(Classifier(fresh, decision.readings, len(classes), frozen=False).state_dict())
            fit.arm("scratch", round(epochs * recipe.scratch_times), min(rate * recipe.scratch_times, 0.1), state)
        checkpoint.load_best()
    if world.rank:
        world.report({"accuracy": state.best_accuracy}, None)
        return None
    finished = scratch_folder / "finished"
    save(model, description, finished / MODEL)
    write_json({"arm": state.best_arm, "validation": state.summary(), "history": state.history}, finished / "history.json")
    write_json(asdict(state) | {"finished": True}, finished / STATE)
    world.report({"accuracy": state.best_accuracy}, finished)
    return finished


@dataclass
class State:
    """Where a run stands; with the tensors beside it, all that a resumed run needs.

    Attributes:
        arm: head, fine-tune or scratch: what runs; epoch: epochs of it that are done.
        best_*: the best validation so far, and which arm reached it in which epoch.
        history: a line for each epoch.
        looks, winner, ended: of a race (see cases.Look and cases.Race).
    """

    arm: str
    epoch: int = 0
    best_arm: str = ""
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    head_penalty: float = 0.0
    history: list[dict[str, float | str]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    winner: str = ""
    ended: str = ""
    finished: bool = False

    def better(self, accuracy: float, loss: float) -> bool:
        """Note a validation; say whether it is the best so far (by accuracy, equals by loss)."""
        if (accuracy, -loss) > (self.best_accuracy, -self.best_loss):
            self.best_arm, self.best_epoch, self.best_accuracy, self.best_loss = self.arm, self.epoch, accuracy, loss
            return True
        return False

    def replaced(self, accuracy: float, loss: float, correct: str, images: int) -> bool:
        """Note the end of an arm; say whether it takes the place of what there was.

        Fine-tuning takes the place of the head that it started from unless it is clearly worse (two paired standard errors): a validation
        of 20 images must not undo it. Scratch must be better.
        """
        line = next((line for line in self.history if line["arm"] == "head"), None)
        if self.arm == "fine-tune" and line is not None and images:
            difference, error = paired(correct, str(line["correct"]), images)
            if difference < -2 * error:
                return False
            self.best_accuracy, self.best_loss = -1.0, math.inf
        return self.better(accuracy, loss)

    @property
    def gained(self) -> bool:
        """Whether fine-tuning ended better on validation than the frozen probe that it started from."""
        last = {str(line["arm"]): float(line["accuracy"]) for line in self.history}
        return last.get("fine-tune", 0.0) > last.get("head", -1.0)

    def best_epoch_of(self, arm: str) -> int:
        """Return the epoch of an arm's own best validation, 0 before its first: an arm that starts behind may still catch up."""
        lines = [line for line in self.history if line["arm"] == arm]
        best = max(lines, key=lambda line: (line["accuracy"], -float(line["log_loss"])), default=None)
        return int(best["epoch"]) if best else 0

    def summary(self) -> dict[str, float]:
        """Return the best validation."""
        return {"accuracy": self.best_accuracy, "log_loss": self.best_loss, "epoch": self.best_epoch, "head_penalty": self.head_penalty}


class Checkpoints:
    """Writes and restores State, current and best weights, and the optimiser, as safetensors and JSON."""

    def __init__(self, world: World, folder: Path, model: nn.Module) -> None:
        self.world, self.folder, self.model = world, folder, model
        self.best: dict[str, Tensor] = {}
        self.optimiser: dict[str, Tensor] = {}
        self.written = folder / "checkpoint"

    def keep_best(self) -> None:
        """Remember the weights as the best so far."""
        self.best = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def load_best(self) -> None:
        """Go back to the best weights."""
        self.model.load_state_dict(self.best)

    def write(self, state: State, optimiser: torch.optim.Optimizer | None = None) -> None:
        """Keep everything; a barrier. Without an optimiser the state of the one that was written or restored last is kept."""
        if optimiser is not None:
            self.optimiser = _flat(optimiser)
        if self.world.rank:
            self.world.report({"accuracy": state.best_accuracy, "epoch": float(state.epoch)}, None)
            return
        folder = self.written
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_tensors(dict(self.model.state_dict()), folder / CURRENT)
        write_tensors(self.best, folder / BEST)
        write_tensors(self.optimiser, folder / OPTIMISER)
        write_json(asdict(state), folder / STATE)
        self.world.report({"accuracy": state.best_accuracy, "epoch": float(state.epoch)}, folder)

    def restore(self, start: Path | None) -> State | None:
        """Load the newest checkpoint into the model, or the one to start from; None where there is none."""
        from safetensors.torch import load_file

        with self.world.restore() as kept:
            folder = kept or start
            if folder is None:
                return None
            state = State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
            if state.finished:
                self.model.load_state_dict(load_file(folder / MODEL / "weights.safetensors"))
                self.keep_best()
                return state
            self.model.load_state_dict(load_file(folder / CURRENT))
            self.best = load_file(folder / BEST)
            self.optimiser = load_file(folder / OPTIMISER)
            return state


def _flat(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{parameter}.{name}": value.clone()
        for parameter, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _unflat(flat: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
    content = optimiser.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    optimiser.load_state_dict({**content, "state": state})


# --- the frozen head ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sides:
    """Training and validation images with their class indices."""

    root: Path
    train: Sequence[Row]
    val: Sequence[Row]
    train_labels: npt.NDArray[np.int64]
    val_labels: npt.NDArray[np.int64]
    transforms: Transforms


def _solve(model: Classifier, sides: Sides, recipe: Recipe, seed: int, world: World, tell: Tell, state: State) -> None:
    """Compute each worker's share of the frozen features once, put them together, solve the head, validate it."""
    rows = [*sides.train, *sides.val]
    mine = [rows[i] for i in shard(len(rows), world.rank, world.size)]
    started = time.monotonic()

    def told(done: int) -> None:
        rate = done * world.size / max(time.monotonic() - started, 1e-6)
        left = max(len(rows) - done * world.size, 0) / rate
        tell(min(done * world.size, len(rows)), len(rows), f"features, {rate:.0f} images/s, {_clock(left)} left")

    (part,) = extract(_Pooled(model), [], Images(sides.root, mine, sides.transforms), world.device, told)
    features = gather(part, len(rows), world)
    train, val = features[: len(sides.train)], features[len(sides.train) :]
    blocks, classes = model.blocks, model.head.out_features

    def put(found: tuple[Tensor, Tensor, float]) -> None:
        model.head.weight.data.copy_(found[0])
        model.head.bias.data.copy_(found[1])
        state.head_penalty = found[2]

    if world.rank == 0:
        put(solve_head(train, sides.train_labels, blocks, classes, recipe.imbalance, seed))
    _from_first([model.head.weight, model.head.bias], world)
    head = nn.Linear(model.head.in_features, classes)
    head.load_state_dict({k: v.cpu() for k, v in model.head.state_dict().items()})
    with torch.inference_mode():
        chances = head(val).softmax(1)
    accuracy, loss, correct = validated(chances, sides.val_labels)
    state.history.append({"arm": "head", "epoch": 0, "loss": 0.0, "accuracy": accuracy, "log_loss": loss, "correct": correct})
    state.better(accuracy, loss)
    if model.frozen and len(val):
        # Nothing is left to select: the head is solved once more, on the validation images as well. Fine-tuning must start without them.
        if world.rank == 0:
            both = np.concatenate([sides.train_labels, sides.val_labels])
            put(solve_head(features, both, blocks, classes, recipe.imbalance, seed, state.head_penalty))
        _from_first([model.head.weight, model.head.bias], world)
    tell(len(rows), len(rows), f"head solved, validation accuracy {accuracy:.1%}", important=True)


class _Pooled(nn.Module):
    """The pooled, concatenated readings as the single output of a trunk."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.model.features(images),)


def solve_head(
    features: Tensor,
    labels: npt.NDArray[np.int64],
    blocks: Sequence[int],
    classes: int,
    imbalance: float,
    seed: int,
    penalty: float | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Multinomial logistic regression by L-BFGS, its L2 penalty by cross-validation, standardisation folded into the result.

    Where there are fewer images than features the problem is rotated into the span of the images, which changes nothing but the cost: the
    penalty is rotation invariant.

    Args:
        features: (n, d) in consecutive blocks (see Scaling).
        labels: (n,) class indices.
        classes: K; classes without a training image keep zero weights and a strongly negative bias.
        imbalance: classes are weighted alike where the largest has more than this many times the images of the smallest.
        penalty: per image, where it is known.

    Returns:
        weight (K, d), bias (K,) on raw features, and the penalty per image.
    """
    scale = scaling(features, blocks)
    x = scale(features).numpy()
    basis: npt.NDArray[np.float64] | None = None
    n, d = x.shape
    if n < d and n <= ROTATE_BELOW:
        values, vectors = np.linalg.eigh(x @ x.T)
        kept = values > values.max() * 1e-10
        roots = np.sqrt(values[kept])
        basis = x.T @ (vectors[:, kept] / roots)
        x = vectors[:, kept] * roots
    counts = np.bincount(labels, minlength=classes)
    there = counts[counts > 0]
    weights = "balanced" if there.max() > imbalance * there.min() else None
    penalty = penalty or _cross_validated(x, labels, weights, seed)
    fit = _logistic(x, labels, penalty, weights, None)
    present, coefficients, intercept = fit
    w = coefficients if basis is None else coefficients @ basis.T
    weight = torch.zeros(classes, d, dtype=torch.float64)
    bias = torch.full((classes,), -1e4, dtype=torch.float64)
    weight[present] = torch.from_numpy(w) * scale.scale
    bias[present] = torch.from_numpy(intercept) - weight[present] @ scale.mean
    return weight.float(), bias.float(), penalty


_Solution = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _logistic(x: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], penalty: float, weights: str | None, start: Any) -> _Solution:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    solver = start or LogisticRegression(solver="lbfgs", max_iter=500, tol=1e-4, warm_start=True, class_weight=weights)
    solver.set_params(C=1 / (penalty * len(x)))
    with warnings.catch_warnings():
        # At the weakest penalties separable data have no finite optimum; 500 steps are then as good as any.
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver.fit(x, labels)
    coefficients, intercept = solver.coef_, solver.intercept_
    if len(coefficients) == 1:  # two classes: one row, for the second against the first
        coefficients, intercept = np.concatenate([-coefficients, coefficients]) / 2, np.concatenate([-intercept, intercept]) / 2
    return solver.classes_, coefficients, intercept


def _cross_validated(x: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], weights: str | None, seed: int) -> float:
    """Return the penalty with the smallest log loss over three stratified folds of at most 2,000 images, from strong to weak."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))[:CV_IMAGES]
    x, labels = x[order], labels[order]
    fold = np.zeros(len(labels), dtype=int)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        fold[members] = np.arange(len(members)) % FOLDS
    losses = np.zeros(len(HEAD_PENALTIES))
    for k in range(FOLDS):
        a, b = fold != k, fold == k
        if not b.any() or len(np.unique(labels[a])) < 2:
            continue
        solver = LogisticRegression(solver="lbfgs", max_iter=200, tol=1e-3, warm_start=True, class_weight=weights)
        worse = 0
        for i, penalty in enumerate(HEAD_PENALTIES):
            present, coefficients, intercept = _logistic(x[a], labels[a], penalty, weights, solver)
            logits = torch.from_numpy(x[b] @ coefficients.T + intercept)
            chances = torch.zeros(len(logits), int(labels.max()) + 1, dtype=torch.float64)
            chances[:, present] = logits.softmax(1)
            losses[i] += score(chances, labels[b])[1] * b.sum()
            worse = worse + 1 if i and losses[i] > losses[i - 1] * 1.5 else 0
            if worse == 2:  # clearly past the optimum: the rest of the path only gets slower
                losses[i + 1 :] = np.inf
                break
    return HEAD_PENALTIES[int(losses.argmin())]


def score(chances: Tensor, labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return accuracy and mean log loss of probabilities (n, K); (0, infinity) of no images."""
    if not len(labels):
        return 0.0, math.inf
    y = torch.from_numpy(np.asarray(labels)).long()
    accuracy = float((chances.argmax(1) == y).double().mean())
    return accuracy, float(-chances.double()[torch.arange(len(y)), y].clamp(min=1e-12).log().mean())


def validated(chances: Tensor, labels: npt.NDArray[np.int64]) -> tuple[float, float, str]:
    """Return accuracy, mean log loss, and who was right as packed bits."""
    return *score(chances, labels), pack(chances.argmax(1).numpy() == labels)


# --- training everything --------------------------------------------------------------------------------------------------------------


class Fit:
    """Epochs over the training side with all weights trained, the best epoch kept.

    The steps are those of one process whatever the number of workers: each global batch is dealt out, and gradients are averaged weighted
    by each worker's share.
    """

    def __init__(
        self, model: nn.Module, sides: Sides, recipe: Recipe, job: Job, world: World, checkpoint: Checkpoints, tell: Tell, adam: bool
    ) -> None:
        self.model, self.sides, self.recipe, self.job, self.world = model, sides, recipe, job, world
        self.checkpoint, self.tell, self.adam = checkpoint, tell, adam
        self.batch = job.batch_size if isinstance(job.batch_size, int) else recipe.batch_size(len(sides.train))
        self.half = job.precision == AUTO and computes_in_bfloat16(world.device)
        self.val = Images(sides.root, [sides.val[i] for i in shard(len(sides.val), world.rank, world.size)], sides.transforms)
        counts = np.bincount(sides.train_labels)
        there = counts[counts > 0]
        self.weights: Tensor | None = None
        if there.max() > recipe.imbalance * there.min():
            self.weights = torch.from_numpy(np.where(counts > 0, len(sides.train_labels) / (len(there) * counts.clip(min=1)), 0.0)).float()
            self.weights = self.weights.to(world.device)

    def arm(self, name: str, epochs: int, rate: float, state: State) -> None:
        """Train for these epochs, or go on where the state stands; with `patience`, stop after so many epochs without a better validation."""
        if state.arm != name:
            state.arm, state.epoch = name, 0
            self.checkpoint.optimiser = {}
        elif state.finished:
            return
        if not self.checkpoint.best:
            self.checkpoint.keep_best()
        steps = max(math.ceil(len(self.sides.train) / self.batch), 1)
        optimiser = self._optimiser(rate * self.batch / 64)
        if self.checkpoint.optimiser:
            _unflat(self.checkpoint.optimiser, optimiser)
        images = Images(self.sides.root, self.sides.train, self.sides.transforms, None)
        network = self._parallel()
        patience = self.recipe.patience or epochs
        while state.epoch < epochs and state.epoch - state.best_epoch_of(name) < patience and not (self.job.race and state.winner):
            loss, rate_images = self._epoch(network, images, optimiser, rate * self.batch / 64, state, epochs, steps)
            state.epoch += 1
            chances = gather(probabilities(self.model, self.val, self.world.device, lambda _: None), len(self.sides.val), self.world)
            accuracy, log_loss, correct = validated(chances, self.sides.val_labels)
            line: dict[str, float | str] = {"arm": name, "epoch": state.epoch, "loss": loss, "accuracy": accuracy, "log_loss": log_loss}
            state.history.append(line | {"correct": correct})
            if self.recipe.patience:
                keep = state.better(accuracy, log_loss)
            else:
                # The schedule runs to its end, and its last epoch is the one that counts.
                keep = state.epoch == epochs and state.replaced(accuracy, log_loss, correct, len(self.sides.val))
            if keep:
                self.checkpoint.keep_best()
            self._look(state, epochs, correct)
            self.checkpoint.write(state, optimiser)
            left = (epochs - state.epoch) * len(self.sides.train) / max(rate_images, 1e-6)
            self.tell(
                state.epoch,
                epochs,
                f"{name} epoch {state.epoch}/{epochs}, loss {loss:.3f}, validation accuracy {accuracy:.1%}, "
                f"{rate_images:.0f} images/s, {_clock(left)} left",
                important=True,
            )

    def _look(self, state: State, epochs: int, correct: str) -> None:
        """At a planned look of a race, say who is ahead; every worker comes to the same answer from the same predictions."""
        race, at = self.job.race, choice.look_epochs(epochs)
        if race is None or state.epoch not in at:
            return
        weighed = choice.Weighed(Evidence(**race["evidence"]), ChooseParams(**race["rule"]), fitted())
        judges = np.array([not dataset.selects(row) for row in self.sides.val])
        frozen, tuned = (unpack(bits, len(judges))[judges] for bits in (str(race["frozen"]), correct))
        part = choice.LOOKS - len(at) + at.index(state.epoch)
        seen = choice.look(weighed, part, state.epoch, epochs, frozen, tuned)
        state.looks.append(asdict(seen))
        state.winner, state.ended = choice.verdict(weighed, part, seen)
        self.tell(
            state.epoch,
            epochs,
            f"look {part + 1}: fine-tuned {seen.tuned:.1%}, frozen {seen.frozen:.1%}, {state.ended or 'still open'}",
            important=True,
        )

    def _optimiser(self, rate: float) -> torch.optim.Optimizer:
        # Norm layers and biases are not decayed.
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.requires_grad and p.dim() <= 1]
        if self.adam:
            return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=rate)
        groups = [{"params": decayed, "weight_decay": self.recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)

    def _parallel(self) -> nn.Module:
        if self.world.size == 1:
            return self.model
        ids = [self.world.device.index or 0] if self.world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.model, device_ids=ids)

    def _epoch(
        self, network: nn.Module, images: Images, optimiser: torch.optim.Optimizer, rate: float, state: State, epochs: int, steps: int
    ) -> tuple[float, float]:
        world, size = self.world, self.batch
        # Dropout and the like: the same on a resumed run, different on each worker.
        torch.manual_seed(hash_of(self.job.seed, state.epoch, world.rank))
        order = np.random.default_rng([self.job.seed, state.epoch]).permutation(len(self.sides.train))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        # Each worker needs two images for BatchNorm; the few left over by a short last batch come back in another epoch's order.
        batches = [b for b in batches if len(b) >= 2 * world.size] or batches[:1]
        images.augment = augmentation(self.recipe.crop, self.job.flip, self.job.seed, state.epoch)
        self.model.train()
        total, seen, started = torch.zeros((), dtype=torch.float64), 0, time.monotonic()
        mine = [[int(i) for i in batch[world.rank :: world.size]] for batch in batches]
        for step, (indices, pixels) in enumerate(images.batches(mine)):
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(state.epoch * steps + step, epochs * steps, self.recipe.warm_up)
            labels = torch.from_numpy(self.sides.train_labels[list(indices)]).to(world.device)
            with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=self.half):
                logits = network(normalise(pixels.to(world.device), images.transforms))
            losses = functional.cross_entropy(
                logits.float(), labels, weight=self.weights, label_smoothing=self.recipe.label_smoothing, reduction="sum"
            )
            # DDP averages over workers; weighted like this the average is the mean over the whole batch, uneven shares included.
            loss = losses * world.size / len(batches[step])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            optimiser.step()
            total += losses.detach().double().cpu()
            seen += len(batches[step])
            speed = seen / max(time.monotonic() - started, 1e-6)
            left = ((epochs - state.epoch) * len(order) - seen) / max(speed, 1e-6)
            self.tell(
                state.epoch,
                epochs,
                f"{state.arm} epoch {state.epoch + 1}/{epochs}, loss {losses.item() / len(indices):.3f}, {speed:.0f} images/s, "
                f"{_clock(left)} left",
            )
        if world.size > 1:
            total = total.to(world.device)
            torch.distributed.all_reduce(total)
        return float(total) / max(seen, 1), seen / max(time.monotonic() - started, 1e-6)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Say whether this device multiplies in bfloat16 natively; where it only imitates it, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Return the share of the learning rate at a step: linear warm-up (at most 500 steps), then half a cosine to zero."""
    warm = min(max(round(steps * warm_up), 1), 500)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def augmentation(crop: float, flip: bool, seed: int, epoch: int) -> Callable[[Image.Image, int], Image.Image]:
    """Return random resized crops (area share crop to 1, aspect 3/4 to 4/3) and mirroring, drawn from (seed, epoch, index of the image)."""

    def apply(image: Image.Image, index: int) -> Image.Image:
        rng = np.random.default_rng([seed, epoch, index])
        area = image.width * image.height * rng.uniform(crop, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width = min(max(round(math.sqrt(area * aspect)), 1), image.width)
        height = min(max(round(math.sqrt(area / aspect)), 1), image.height)
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        side = min(image.size)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and rng.random() < 0.5 else image

    return apply


def hash_of(*numbers: int) -> int:
    """Mix numbers into a seed."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


# --- progress -------------------------------------------------------------------------------------------------------------------------


class _Teller:
    """Appends what happens to the history file, what is not important at most five times a second; only the first worker speaks."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.silent, self.last = path, rank > 0, 0.0
        if not self.silent:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, done: int, total: int, text: str, important: bool = False) -> None:
        now = time.monotonic()
        if self.silent or (now - self.last < 0.2 and not important):
            return
        self.last = now
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"done": done, "total": total, "text": text}) + "\n")


class Tail:
    """Reads what a `_Teller` appends and passes it on as events."""

    def __init__(self, path: Path, stage: str, progress: Progress) -> None:
        self.path, self.stage, self.progress = path, stage, progress
        self.read = path.stat().st_size if path.exists() else 0

    def __call__(self) -> None:
        """Pass on what is new; an unfinished last line waits."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.read)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self.read += len(complete)
        for line in complete.splitlines():
            self.progress(Event(self.stage, **json.loads(line)))


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
