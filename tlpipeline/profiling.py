"""The profile: what a data set looks like to a pretrained network, measured on a bounded sample of its training images.

One pass in eval mode reads all taps at once. At each tap an exact leave-one-out ridge probe says how well the labels can be read there
(the probe pools as the head will). From the probes follow the two axes: is the data set large enough for this network to be fine-tuned
(headroom), and is it similar to what the network knows (do the last layers still help)?
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from tlpipeline import backbones, dataset
from tlpipeline.backbones import Backbone
from tlpipeline.cache import Store
from tlpipeline.dataset import TRAIN, VAL, Manifest, Row
from tlpipeline.errors import DataError
from tlpipeline.features import Images, Reader, Reading, Scaling, extract, in_batches, normalise, reading, scaling
from tlpipeline.heads import IMBALANCE, solve_kernel
from tlpipeline.params import ProfileParams
from tlpipeline.probes import PENALTIES, Bits, Fit, Matrix, guesses, head_similarity, leave_one_out, one_hot, pack, unpack, wilson
from tlpipeline.progress import Event, Progress
from tlpipeline.shift import BATCH, FIRST_IMAGES, BatchNormShift, Reference, TapShift, Watcher, random_reference, sequential, tap_shift
from tlpipeline.tangent import BUCKETS, Sketcher, tangent_kernel

HELD_OUT = 512
EACH_CLASS = 8  # images of a class that a probe wants
HUNGER_DRAWS = 3
TANGENT_IMAGES = 512
SOLVERS = 0.3  # of the operations of the passes, which the solvers may cost when the sample grows
CONFIRMED_ON = 1024  # images of the sample that a head is solved on to confirm a slice


@dataclass(frozen=True)
class Probe:
    """One tap, and how well the labels can be read there.

    Attributes:
        name, channels, height, width, parameters, forward_ops, grids: of the tap and the head's pyramid there.
        accuracy, low, high: leave-one-out accuracy of a ridge probe on this tap alone, with its Wilson 95 % interval.
        balanced: the mean of the per-class accuracies.
        gain, gain_error: accuracy minus the last tap's, and the paired standard error of that difference.
        penalty: the ridge penalty that was chosen.
        correct: one bit a sample image, hexadecimal: was it classified correctly when left out?
        head: taps that a head reads when the network is cut here, deepest first: this one and the two best earlier ones.
    """

    name: str
    channels: int
    height: int
    width: int
    parameters: int
    forward_ops: int
    grids: tuple[int, ...]
    accuracy: float
    low: float
    high: float
    balanced: float
    gain: float
    gain_error: float
    penalty: float
    correct: str
    head: tuple[str, ...]

    @property
    def reading(self) -> Reading:
        """Return what a head reads at this tap."""
        return Reading(self.name, self.channels, self.grids)


@dataclass(frozen=True)
class Head:
    """A head that could be trained on frozen features.

    Attributes:
        taps: what it reads, deepest first.
        accuracy, low, high, correct: leave-one-out on the sample, as in Probe, for all its taps together.
        held_out: accuracy of the head itself, solved on the sample, on the half of validation that may select (judging is left to the other
            half); None where it was not asked or there are no such images.
    """

    taps: tuple[str, ...]
    accuracy: float
    low: float
    high: float
    correct: str
    held_out: float | None = None


@dataclass(frozen=True)
class Tangent:
    """What the tangent probe says, beside the multi-tap head on the same images (at most TANGENT_IMAGES).

    Attributes:
        images: how many.
        accuracy, error: leave-one-out accuracy and mean squared error of ridge on the tangent kernel.
        frozen, frozen_error: of the multi-tap features alone.
    """

    images: int
    accuracy: float
    error: float
    frozen: float
    frozen_error: float


@dataclass(frozen=True)
class Profile:
    """The content of profile.json.

    Attributes:
        backbone, weights: name of the network and fingerprint of its weights.
        size: input side, pixels.
        normalisation: batch, layer or none.
        images, classes: of the training side; majority: share of its largest class; smallest, largest: images of a class.
        validation: images of the half of the validation side that judges.
        sampled, held_out: images that were looked at: for the probes, and apart from them (the half of validation that selects).
        probed: classes in the sample.
        head_similarity: S, the share of the labels' entropy that the source head's classes explain (cross-fitted LEEP); None without head.
        hunger: (images, leave-one-out accuracy) of the multi-tap head on a quarter, half and all of the sample, three draws each.
        taps: first to last.
        last: the head on the last tap; multi: on the last tap and the two best earlier ones, nothing cut off; cut: on the taps at and below
            the best slice point, None where there is one tap only.
        shift: the BatchNorm shift curve, empty where there is no BatchNorm or where it was not asked for.
        distances: of the features at each tap from a reference, empty without one (profile.reference).
        affinity: best skill of the pretrained probes minus that of the same network with random weights, None where it was not asked for.
        tangent: what gradients say that fine-tuning could read, None where it was not asked for.
    """

    backbone: str
    weights: str
    size: int
    normalisation: str
    images: int
    classes: int
    majority: float
    smallest: int
    largest: int
    validation: int
    sampled: int
    held_out: int
    probed: int
    head_similarity: float | None
    hunger: tuple[tuple[int, float], ...]
    taps: tuple[Probe, ...]
    last: Head
    multi: Head
    cut: Head | None
    shift: tuple[BatchNormShift, ...] = ()
    distances: tuple[TapShift, ...] = ()
    affinity: float | None = None
    tangent: Tangent | None = None

    @property
    def best(self) -> Probe:
        """Return the tap with the most accurate probe, the deepest of equals."""
        return max(reversed(self.taps), key=lambda t: t.accuracy)

    @property
    def heads(self) -> tuple[Head, ...]:
        """Return the heads that could be trained on frozen features, the simplest first."""
        return (self.last, self.multi) if self.cut is None else (self.last, self.cut, self.multi)

    @property
    def parameters(self) -> int:
        """Parameters of the network without its old head: what fine-tuning would train."""
        return self.taps[-1].parameters

    @property
    def forward_ops(self) -> int:
        """Floating-point operations of one image's forward pass."""
        return self.taps[-1].forward_ops

    @property
    def slope(self) -> float:
        """Accuracy that the frozen features gained by the last doubling of the sample."""
        return self.hunger[-1][1] - self.hunger[-2][1] if len(self.hunger) > 1 else 0.0

    @property
    def last_head(self) -> tuple[Reading, ...]:
        """Return what the head of the uncut network reads: the last tap."""
        return (self.taps[-1].reading,)

    def head_at(self, tap: str) -> tuple[Reading, ...]:
        """Return what the head reads when the network is cut at this tap, deepest first."""
        by_name = {t.name: t for t in self.taps}
        return tuple(by_name[name].reading for name in by_name[tap].head)

    def correct(self) -> Bits:
        """Return who was right: (sampled, taps)."""
        return np.stack([unpack(t.correct, self.sampled) for t in self.taps], axis=1)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for profile.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Profile":
        """Read what `to_json` gave."""
        taps = tuple(Probe(**t | {"grids": tuple(t["grids"]), "head": tuple(t["head"])}) for t in content["taps"])
        heads = {
            k: None if content[k] is None else Head(**content[k] | {"taps": tuple(content[k]["taps"])}) for k in ("last", "multi", "cut")
        }
        hunger = tuple((int(n), float(a)) for n, a in content["hunger"])
        shift = tuple(BatchNormShift(**layer) for layer in content["shift"])
        tangent = None if content["tangent"] is None else Tangent(**content["tangent"])
        distances = tuple(TapShift(**tap) for tap in content["distances"])
        return cls(**{**content, **heads, "taps": taps, "hunger": hunger, "shift": shift, "distances": distances, "tangent": tangent})


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def measure(
    backbone: Backbone,
    root: Path,
    manifest: Manifest,
    size: int,
    params: ProfileParams,
    undecided: Callable[[Profile], bool],
    progress: Progress,
    device: torch.device,
    reference: Reference | None = None,
    store: Store | None = None,
) -> Profile:
    """Profile the training side of a data set; the sample is doubled while the choice is open.

    Args:
        backbone: uncut.
        root: folder that the manifest's paths start from.
        size: input side, pixels.
        undecided: says of a profile whether more images could still change the choice.
        reference: statistics of images like the weights' own, at the same input size.
        store: keeps what is computed of each image, for later stages and runs.

    Raises:
        DataError: there are no training images.
    """
    rows = manifest.used(TRAIN)
    if not rows:
        raise DataError("expected training images to profile, found none. Check the quarantine list of ingest.")
    labels = {label: i for i, label in enumerate(manifest.classes)}
    sight = _Sight(backbone, root, size, device, progress, store or Store(), params.shift)
    val = manifest.used(VAL)
    aside, judges = sample([r for r in val if dataset.selects(r)], HELD_OUT, params.seed), sum(not dataset.selects(r) for r in val)
    wanted = min(max(params.images, EACH_CLASS * len({r.label for r in rows})), params.images_max)
    penalties: dict[tuple[int, ...], float] = {}
    while True:
        drawn = sample(rows, wanted, params.seed)
        read = sight.features(drawn)
        indices = np.array([labels[r.label] for r in drawn])
        kernels = _kernels(sight.readings, read, indices, penalties)
        progress(Event("profile", len(drawn), len(drawn), f"probes of {len(drawn)} images at {len(sight.taps)} taps"))
        profile = _of_sample(sight, rows, judges, size, read, indices, kernels, params.seed)
        penalties = kernels.penalties
        wanted = 2 * len(drawn)
        more = wanted <= params.images_max and len(drawn) < len(rows)
        if not more or solving(sight.readings, wanted, profile.classes) > SOLVERS * sight.passing(wanted, params.tangent):
            break
        if not undecided(profile):
            break
    there = {r.label for r in drawn}
    held = [r for r in aside if r.label in there]
    if held and profile.cut is not None:
        truth = np.array([labels[r.label] for r in held])
        profile = kernels.confirm(profile, sight.features(held), truth, progress)
    if params.tangent:
        profile = replace(profile, tangent=sight.tangent(kernels, drawn, profile.multi.taps, params.seed))
    if sight.watched:
        batches = (batch.to(device) for batch in sight.inputs(drawn[:FIRST_IMAGES]))
        profile = replace(profile, shift=sight.watcher.curve(read[-1], sequential(sight.trunk, batches), reference, params.seed))
    if reference is not None:
        pooled = {r.tap: column for r, column in zip(sight.readings, read, strict=False)}
        profile = replace(profile, distances=tap_shift(pooled, reference, params.seed))
    if params.affinity:
        profile = replace(profile, affinity=sight.affinity(profile, drawn, indices))
    return profile


def _of_sample(
    sight: "_Sight",
    rows: Sequence[Row],
    judges: int,
    size: int,
    read: Sequence[Tensor],
    indices: npt.NDArray[np.int64],
    kernels: "_Kernels",
    seed: int,
) -> Profile:
    """Return what a sample's features at all taps say, nothing held against other images yet.

    Args:
        rows: all training images; judges: how many validation images select nothing.
    """
    backbone, logits = sight.backbone, len(sight.taps)
    counts = Counter(r.label for r in rows)
    similarity = head_similarity(read[logits].softmax(1).double().numpy(), indices) if backbone.source_classes else None
    with threadpool_limits(1):  # factorisations of a sample's size take longer with two
        probed = _probe(sight.taps, sight.readings, kernels, seed)
    return Profile(
        backbone=backbone.name,
        weights=backbone.fingerprint,
        size=size,
        normalisation=backbone.normalisation,
        images=len(rows),
        classes=len(counts),
        majority=max(counts.values()) / len(rows),
        smallest=min(counts.values()),
        largest=max(counts.values()),
        validation=judges,
        sampled=len(indices),
        held_out=0,
        probed=len(set(indices.tolist())),
        head_similarity=similarity,
        **probed,
    )


class _Sight:
    """How a network sees images: features at all its taps, and what else is asked of single passes. What was seen is kept by content."""

    def __init__(
        self, backbone: Backbone, root: Path, size: int, device: torch.device, progress: Progress, store: Store, shift: bool
    ) -> None:
        self.backbone, self.root, self.device, self.progress, self.store = backbone, root, device, progress, store
        self.transforms = backbone.transforms.at(size)
        self.taps = backbones.describe(backbone, size)
        self.readings = [reading(tap) for tap in self.taps]
        logits = backbone.source_classes > 0
        self.trunk = self._cut(backbone, [t.name for t in self.taps], logits)
        self.watcher = Watcher(self.trunk)
        self.watched = shift and self.watcher.channels > 0
        beside = self.watcher.taken if self.watched else None
        self.reader = Reader(
            store, backbone, self.trunk, self.readings, self.transforms, device, logits=logits, beside=beside, beside_key="batchnorm"
        )

    def _cut(self, backbone: Backbone, taps: Sequence[str], logits: bool = False) -> nn.Module:
        return backbones.cut(backbone, taps, logits=logits).to(self.device).to(memory_format=torch.channels_last)

    def features(self, wanted: Sequence[Row]) -> list[Tensor]:
        """Return the features at each tap: (images, features) each.

        Behind them come the source head's logits where it has one, and what the watcher saw where it was asked to look.
        """
        images = Images(self.root, wanted, self.transforms)
        told = self._told("features", int(self.reader.missing(wanted).sum()))
        with self.watcher if self.watched else nullcontext():
            return [rows.all() for rows in self.reader.read(images, told)]

    def inputs(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """Yield inputs (batch, 3, size, size) on the CPU."""
        batches = Images(self.root, rows, self.transforms).batches(in_batches(len(rows), BATCH))
        return (normalise(pixels, self.transforms) for _, pixels in batches)

    def tangent(self, kernels: "_Kernels", drawn: Sequence[Row], taps: Sequence[str], seed: int) -> Tangent:
        """Return what the gradients of at most TANGENT_IMAGES of the drawn images say, beside a head on these taps."""
        few = {r.md5 for r in sample(drawn, TANGENT_IMAGES, seed)}
        at = [i for i, r in enumerate(drawn) if r.md5 in few]
        chosen = [drawn[i] for i in at]
        name = self.taps[-1].name
        known = backbones.identities(self.backbone, [name])[name]
        column = self.store.column(
            f"{known}|gradients|{seed}|{BUCKETS}|{self.transforms}|{self.device.type}", f"{self.backbone.name} gradients at {name}"
        )
        new = [row for row, there in zip(chosen, column.has([r.md5 for r in chosen]), strict=True) if not there]
        told = self._told("gradients", len(new))
        sketcher = Sketcher(self._cut(self.backbone, [name]), self.device, seed) if new else None
        done = 0
        for batch in self.inputs(new):
            assert sketcher is not None
            part = new[done : done + len(batch)]
            column.add([row.md5 for row in part], sketcher.sketch(batch))
            done += len(batch)
            told(done)
        gradients = tangent_kernel(column.rows([r.md5 for r in chosen]).all())
        names = [t.name for t in self.taps]
        return kernels.tangent([names.index(tap) for tap in taps], gradients, at)

    def passing(self, images: int, tangent: bool) -> float:
        """Return the operations of the passes of a sample of so many images: a backward pass counts two."""
        return self.taps[-1].forward_ops * (images + 3 * min(images, TANGENT_IMAGES) * tangent)

    def affinity(self, profile: Profile, drawn: Sequence[Row], labels: npt.NDArray[np.int64]) -> float:
        """Return the best skill of the pretrained probes minus that of the same network with random weights, the mean of two seeds.

        Skill = (accuracy - majority) / (1 - majority). A cheap stand-in for the affinity of Head2Toe (Evci et al. 2022): linear minus scratch.
        """
        reached = []
        first = list(self.inputs(drawn[:FIRST_IMAGES]))
        for seed in (0, 1):
            trunk = self._cut(random_reference(self.backbone, first, seed), [r.tap for r in self.readings])
            images = Images(self.root, drawn, self.transforms)
            read = extract(trunk, [r.grids for r in self.readings], images, self.device, self._told("random features", len(drawn)))
            kernels = _kernels(self.readings, read, labels, {})
            reached.append(max(float(kernels.fit([i])[1].mean()) for i in range(len(self.readings))))
        return (profile.best.accuracy - float(np.mean(reached))) / (1 - min(profile.majority, 0.99))

    def _told(self, what: str, images: int) -> Callable[[int], None]:
        return lambda done: self.progress(Event("profile", done, images, f"{what} of {images} images at {len(self.taps)} taps"))


def sample(rows: Sequence[Row], wanted: int, seed: int) -> list[Row]:
    """Draw rows, classes in proportion but each at least once, by a hash of seed and content: neither order nor names play a part.

    With more classes than an eighth of the sample, so many of them are drawn.
    """

    def rank(text: str) -> str:
        return hashlib.md5(f"{seed}:{text}".encode(), usedforsecurity=False).hexdigest()

    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: rank(r.md5)):
        groups.setdefault(row.label, []).append(row)
    if len(groups) > max(wanted / EACH_CLASS, 1) and sum(len(g) for g in groups.values()) > wanted:
        kept = sorted(groups, key=lambda label: rank(groups[label][0].md5))[: max(wanted // EACH_CLASS, 2)]
        groups = {label: groups[label] for label in kept}
    total = sum(len(g) for g in groups.values())
    if total <= wanted:
        return sorted((r for g in groups.values() for r in g), key=lambda r: r.md5)
    quota = {label: max(1, math.floor(wanted * len(g) / total)) for label, g in groups.items()}
    by_remainder = sorted(groups, key=lambda label: (-(wanted * len(groups[label]) / total % 1), rank(groups[label][0].md5)))
    for label in by_remainder[: max(0, wanted - sum(quota.values()))]:
        quota[label] += 1
    return sorted((r for label, g in groups.items() for r in g[: quota[label]]), key=lambda r: r.md5)


def solving(readings: Sequence[Reading], images: int, classes: int) -> float:
    """Return the operations of the solvers for a sample of so many images: inner products, probes, and the two heads that confirm a slice.

    A probe costs two factorisations (after the first sample, which decides between all penalties), and there are four heads besides the taps;
    a head takes about 100 walks through a matrix of as many rows and columns as it has images, each of two products.
    """
    widths = [sum(r.blocks) for r in readings]
    products = sum(2 * images**2 * width for width in widths)
    probes = sum(2 * images * min(images, width) ** 2 for width in [*widths, *4 * [images]])
    heads = 2 * 100 * 4 * classes * min(images, CONFIRMED_ON) ** 2
    return float(products + probes + heads)


@dataclass(frozen=True)
class _Kernels:
    """Scaled features of the sample at each tap, and their inner products.

    Args:
        scales: of each tap, with the norm behind them; before: penalties of a smaller sample by taps, {} for the first; penalties: of this.
    """

    read: Sequence[npt.NDArray[np.float32]]
    own: Sequence[Matrix]
    scales: Sequence[tuple[Scaling, float]]
    labels: npt.NDArray[np.int64]
    before: Mapping[tuple[int, ...], float]
    penalties: dict[tuple[int, ...], float]

    def tried(self, taps: Sequence[int]) -> tuple[float, ...]:
        """Return the penalties worth trying: all at first, later what a smaller sample said, and less."""
        if not self.before:
            return PENALTIES
        usual = self.before.get(tuple(taps), float(np.median(list(self.before.values()))))
        return usual, usual / 10

    def fit(self, taps: Sequence[int]) -> tuple[Fit, Bits]:
        """Return the leave-one-out fit on these taps together, and who was right."""
        together = None
        if sum(self.read[i].shape[1] for i in taps) < len(self.labels):
            together = np.concatenate([self.read[i] for i in taps], axis=1, dtype=np.float64) / math.sqrt(len(taps))
        fit = leave_one_out(_mean([self.own[i] for i in taps]), one_hot(self.labels), self.tried(taps), features=together)
        self.penalties[tuple(taps)] = fit.penalty
        return fit, _right(fit, self.labels)

    def head(self, taps: Sequence[int], names: Sequence[str]) -> Head:
        """Return the head on these taps, probed on the sample."""
        _, right = self.fit(taps)
        return Head(tuple(names), float(right.mean()), *wilson(int(right.sum()), len(right)), pack(right))

    def confirm(self, profile: Profile, features: Sequence[Tensor], labels: npt.NDArray[np.int64], progress: Progress) -> Profile:
        """Return the profile with its cut and its last head solved as in training, and judged on held-out images.

        Args:
            features: of the held-out images at each tap.
        """
        names = [t.name for t in profile.taps]
        classes = int(max(self.labels.max(), labels.max())) + 1
        few = slice(0, CONFIRMED_ON)
        reached = []
        for number, head in enumerate((profile.last, profile.cut)):
            assert head is not None
            taps = [names.index(name) for name in head.taps]
            # Each tap counts as often as it has blocks, of a total variance of one each, as in training: without the norm that probes take out.
            kernel = sum(self.scales[i][1] ** 2 * self.own[i][few, few] for i in taps)
            alpha, logits = solve_kernel(np.asarray(kernel), self.labels[few], classes, IMBALANCE, 0, tolerance=1e-4)
            for i in taps:
                scale, norm = self.scales[i]
                logits = logits + scale(features[i]).float() @ (norm * alpha.float() @ torch.from_numpy(self.read[i][few])).T
            right = logits.argmax(1).numpy() == labels
            reached.append(replace(head, held_out=float(right.mean())))
            progress(Event("profile", number + 1, 2, f"head on {' + '.join(head.taps)} held against {len(labels)} other images"))
        return replace(profile, held_out=len(labels), last=reached[0], cut=reached[1])

    def tangent(self, taps: Sequence[int], gradients: Matrix, first: Sequence[int]) -> Tangent:
        """Return what the tangent kernel of some images of the sample reads, beside these taps on the same images."""
        y = self.labels[list(first)]
        frozen = _centred(_mean([self.own[i] for i in taps])[np.ix_(first, first)])
        frozen = frozen / (frozen.trace() / len(y) or 1.0)
        reached: list[float] = []
        with threadpool_limits(1):
            for kernel in (gradients, frozen):
                fit = leave_one_out(kernel, one_hot(y))
                reached += [float(_right(fit, y).mean()), float(((fit.scores - one_hot(y)) ** 2).mean())]
        return Tangent(len(y), *reached)

    def hunger(self, taps: Sequence[int], whole: float, seed: int) -> tuple[tuple[int, float], ...]:
        """Return the learning curve of a head: (images, accuracy) at a quarter, half and all of the sample, each the mean of some draws.

        A draw takes every k-th image of a shuffled class, so that its classes keep their proportions.
        """
        kernel, penalty = _mean([self.own[i] for i in taps]), self.penalties[tuple(taps)]
        m, rng = len(kernel), np.random.default_rng(seed)
        # Classes in the order in which they appear, which follows from the images: their names play no part.
        _, first, inverse = np.unique(self.labels, return_index=True, return_inverse=True)
        place = first[inverse]
        points = []
        for parts in (4, 2):
            if m // parts < 2 * len(np.unique(self.labels)):
                continue
            reached = []
            for _ in range(HUNGER_DRAWS):
                order = rng.permutation(m)
                drawn = np.sort(order[np.argsort(place[order], kind="stable")][::parts])
                y = self.labels[drawn]
                inside = _centred(kernel[np.ix_(drawn, drawn)])
                # Fewer images want the penalty of all of them, or a larger one.
                reached.append(float(_right(leave_one_out(inside, one_hot(y), (penalty, 10 * penalty)), y).mean()))
            points.append((len(drawn), float(np.mean(reached))))
        return (*points, (m, whole))


def _right(fit: Fit, labels: npt.NDArray[np.int64]) -> Bits:
    return np.asarray(np.unique(labels)[guesses(fit.scores, one_hot(labels))] == labels)


def _centred(kernel: Matrix) -> Matrix:
    return np.asarray(kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean())


def _mean(kernels: Sequence[Matrix]) -> Matrix:
    return np.asarray(sum(kernels) / len(kernels))


def _kernels(
    readings: Sequence[Reading], features: Sequence[Tensor], labels: npt.NDArray[np.int64], before: Mapping[tuple[int, ...], float]
) -> _Kernels:
    scaled, own, scales = [], [], []
    for read, x in zip(readings, features, strict=False):
        scale = scaling(x, read.blocks)
        # Products in the features' own precision: their rounding, about 1e-7 of the diagonal, is far below the weakest penalty.
        a = scale(x).float().numpy()
        norm = math.sqrt(float(np.square(a).sum(dtype=np.float64)) / len(a)) or 1.0
        a /= norm
        scaled.append(a)
        own.append((a @ a.T).astype(np.float64))
        scales.append((scale, norm))
    return _Kernels(scaled, own, scales, labels, before, {})


def _probe(taps: Sequence[backbones.Tap], readings: Sequence[Reading], kernels: _Kernels, seed: int) -> dict[str, Any]:
    """Return the parts of the profile that follow from the kernels: probes, heads, learning curve."""
    labels, names = kernels.labels, [t.name for t in taps]
    classes = np.unique(labels)
    fits = [kernels.fit([i]) for i in range(len(taps))]
    accuracy = [float(right.mean()) for _, right in fits]
    probes = []
    for i, (tap, read, (fit, right)) in enumerate(zip(taps, readings, fits, strict=True)):
        behind = right.astype(float) - fits[-1][1]
        earlier = sorted(range(i), key=lambda j: (-accuracy[j], -j))[:2]
        low, high = wilson(int(right.sum()), len(labels))
        probes.append(
            Probe(
                name=tap.name,
                channels=tap.channels,
                height=tap.height,
                width=tap.width,
                parameters=tap.parameters,
                forward_ops=tap.forward_ops,
                grids=read.grids,
                accuracy=accuracy[i],
                low=low,
                high=high,
                balanced=float(np.mean([right[labels == c].mean() for c in classes])),
                gain=float(behind.mean()),
                gain_error=float(behind.std() / math.sqrt(len(labels))),
                penalty=fit.penalty,
                correct=pack(right),
                head=tuple(names[j] for j in sorted([i, *earlier], reverse=True)),
            )
        )

    def head(read: Sequence[str]) -> Head:
        return kernels.head([names.index(name) for name in read], read)

    at = slice_point(np.stack([right for _, right in fits], axis=1))
    multi = head(probes[-1].head)
    return {
        "taps": tuple(probes),
        "last": head(names[-1:]),
        "multi": multi,
        "cut": None if at is None else head(probes[at].head),
        "hunger": kernels.hunger([names.index(name) for name in multi.taps], multi.accuracy, seed),
    }


# --- the two axes ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceTest:
    """Does an earlier tap beat the last one?

    Attributes:
        tap: the slice point: the deepest earlier tap within one standard error of the best one; None where there is one tap only.
        best_earlier: the earlier tap with the best probe; gain: its accuracy minus the last tap's (0 to 1).
        significance: family-wise p-value of `no earlier tap is better`.
        similar: the same of `no earlier tap is better by the asked gain`: P(similar).
        confirmed: there are held-out images, and the head at `tap` is not worse there than the last tap's.
    """

    tap: str | None
    best_earlier: str | None
    gain: float
    significance: float
    similar: float
    confirmed: bool

    def why_not(self, alpha: float, gain: float) -> str:
        """Say in words why there is no slice."""
        if self.tap is None:
            return "is not possible with one tap"
        if self.significance >= alpha:
            return f"gains nothing that is significant (p = {self.significance:.2f}, family-wise)"
        if self.gain < gain:
            return f"gains less than {gain * 100:g} points"
        return f"at {self.tap} was not confirmed on held-out images"


def slice_point(correct: Bits) -> int | None:
    """Return the index of the deepest earlier tap within one standard error of the best earlier one; None where there is one tap only.

    The one-standard-error rule (Breiman et al. 1984), here toward keeping more of the network.

    Args:
        correct: who was right at each tap, (images, taps).
    """
    if correct.shape[1] < 2:
        return None
    earlier = correct[:, :-1].astype(float)
    best = int(np.flatnonzero(earlier.mean(0) == earlier.mean(0).max())[-1])
    behind = earlier[:, [best]] - earlier
    return int(np.flatnonzero(behind.mean(0) <= behind.std(0) / math.sqrt(len(earlier)))[-1])


def slice_test(profile: Profile, gain: float, draws: int, seed: int = 0) -> SliceTest:
    """Compare every earlier tap with the last by a centred paired bootstrap of the largest t (max-T, Westfall and Young 1993).

    The correction for looking at many taps matters: the best of 16 taps of pure noise looks 4.7 points better than chance.

    Args:
        gain: what an earlier tap must win for the data to count as different, as a share (0 to 1).
    """
    correct = profile.correct()
    at = slice_point(correct)
    if at is None or profile.cut is None:
        return SliceTest(None, None, 0.0, 1.0, 1.0, False)
    m = len(correct)
    difference = correct[:, :-1].astype(float) - correct[:, -1:]
    gains = difference.mean(0)
    errors = (difference.std(0) / math.sqrt(m)).clip(min=0.5 / m)
    counts = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=draws) / m
    largest = ((counts @ difference - gains) / errors).max(1)

    def chance(asked: float) -> float:
        observed = ((gains - asked) / errors).max()
        return float((1 + (largest >= observed).sum()) / (1 + draws))

    best = int(np.flatnonzero(gains == gains.max())[-1])
    cut, last = profile.cut.held_out, profile.last.held_out
    confirmed = cut is not None and last is not None and cut >= last
    return SliceTest(profile.taps[at].name, profile.taps[best].name, float(gains[best]), chance(0.0), chance(gain), confirmed)
