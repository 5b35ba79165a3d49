"""The profile: what a data set looks like to a pretrained network, measured on a bounded sample of its training images.

One pass in eval mode reads all taps at once. At each tap an exact leave-one-out ridge probe says how well the labels can be read there
(the probe pools as the head will). From the probes follow the two axes: is the data set large enough for this network to be fine-tuned
(headroom), and is it similar to what the network knows (do the last layers still help)?
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tlpipeline import backbones
from tlpipeline.backbones import Backbone
from tlpipeline.dataset import TRAIN, VAL, Manifest, Row
from tlpipeline.errors import DataError
from tlpipeline.features import Images, Reading, extract, reading, scaling
from tlpipeline.params import ProfileParams
from tlpipeline.progress import Event, Progress

HELD_OUT = 512
FEW_CLASSES = 50
PENALTIES = tuple(10.0**e for e in range(-5, 2))

Bits = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """One tap, and how well the labels can be read there.

    Attributes:
        name, channels, height, width, parameters, forward_ops, grids: of the tap and the head's pyramid there.
        accuracy, low, high: leave-one-out accuracy of a ridge probe on this tap alone, with its Wilson 95 % interval.
        balanced: the mean of the per-class accuracies.
        penalty: the ridge penalty that was chosen.
        correct: one bit a sample image, hexadecimal: was it classified correctly when left out?
        head: taps that a head reads when the network is cut here, deepest first: this one and the two best earlier ones.
        held_out: accuracy of that head on held-out images, None where this tap is worse than the last.
        held_out_correct: bits, as above.
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
    penalty: float
    correct: str
    head: tuple[str, ...]
    held_out: float | None
    held_out_correct: str

    @property
    def reading(self) -> Reading:
        """Return what a head reads at this tap."""
        return Reading(self.name, self.channels, self.grids)


@dataclass(frozen=True)
class Profile:
    """The content of profile.json.

    Attributes:
        backbone, weights: name of the network and fingerprint of its weights.
        size: input side, pixels.
        images, classes: of the training side; majority: share of its largest class; smallest, largest: images of a class.
        sampled, held_out: images that were looked at: for the probes, and apart from them.
        head_similarity: S, the share of the labels' entropy that the source head's classes explain (cross-fitted LEEP); None without head.
        last_held_out, last_held_out_correct: as in Probe, for the head that reads the last tap alone.
        taps: first to last.
    """

    backbone: str
    weights: str
    size: int
    images: int
    classes: int
    majority: float
    smallest: int
    largest: int
    sampled: int
    held_out: int
    head_similarity: float | None
    last_held_out: float
    last_held_out_correct: str
    taps: tuple[Probe, ...]

    @property
    def best(self) -> Probe:
        """Return the tap with the most accurate probe, the deepest of equals."""
        return max(reversed(self.taps), key=lambda t: t.accuracy)

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
        return cls(**{**content, "taps": taps})


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
) -> Profile:
    """Profile the training side of a data set; the sample is doubled while the choice is open.

    Args:
        backbone: uncut.
        root: folder that the manifest's paths start from.
        size: input side, pixels.
        undecided: says of a profile whether more images could still change the choice.

    Raises:
        DataError: there are no training images.
    """
    rows = manifest.used(TRAIN)
    if not rows:
        raise DataError("expected training images to profile, found none. Check the quarantine list of ingest.")
    labels = {label: i for i, label in enumerate(manifest.classes)}
    taps = backbones.describe(backbone, size)
    readings = [reading(tap) for tap in taps]
    trunk = backbones.cut(backbone, [t.name for t in taps], logits=backbone.source_classes > 0).to(device)
    transforms = backbone.transforms.at(size)
    cache: dict[str, list[Tensor]] = {}

    def features(wanted: Sequence[Row]) -> list[Tensor]:
        new = [r for r in wanted if r.md5 not in cache]
        if new:
            told = lambda done: progress(Event("profile", done, len(new), f"features of {len(new)} images at {len(taps)} taps"))  # noqa: E731
            out = extract(trunk, [r.grids for r in readings], Images(root, new, transforms), device, told)
            cache.update({row.md5: [column[i] for column in out] for i, row in enumerate(new)})
        return [torch.stack([cache[r.md5][k] for r in wanted]) for k in range(len(cache[wanted[0].md5]))]

    aside = sample(manifest.used(VAL), HELD_OUT, params.seed)
    counts = Counter(r.label for r in rows)
    wanted = params.images
    while True:
        drawn = sample(rows, wanted, params.seed)
        there = {r.label for r in drawn}
        held = [r for r in aside if r.label in there] or drawn[:1]
        profile = _probe(
            taps,
            readings,
            features(drawn),
            np.array([labels[r.label] for r in drawn]),
            features(held),
            np.array([labels[r.label] for r in held]),
            has_logits=backbone.source_classes > 0,
        )
        profile = replace(
            profile,
            backbone=backbone.name,
            weights=backbone.fingerprint,
            size=size,
            images=len(rows),
            classes=len(counts),
            majority=max(counts.values()) / len(rows),
            smallest=min(counts.values()),
            largest=max(counts.values()),
        )
        wanted *= 2
        if wanted > params.images_max or len(drawn) == len(rows) or not undecided(profile):
            return profile


def sample(rows: Sequence[Row], wanted: int, seed: int) -> list[Row]:
    """Draw rows, classes in proportion but each at least once, by a hash of seed and content: neither order nor names play a part.

    With more classes than an eighth of the sample, 50 of them are drawn.
    """

    def rank(text: str) -> str:
        return hashlib.md5(f"{seed}:{text}".encode(), usedforsecurity=False).hexdigest()

    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: rank(r.md5)):
        groups.setdefault(row.label, []).append(row)
    if len(groups) > max(wanted / 8, FEW_CLASSES):
        kept = sorted(groups, key=lambda label: rank(groups[label][0].md5))[:FEW_CLASSES]
        groups = {label: groups[label] for label in kept}
    total = sum(len(g) for g in groups.values())
    if total <= wanted:
        return sorted((r for g in groups.values() for r in g), key=lambda r: r.md5)
    quota = {label: max(1, math.floor(wanted * len(g) / total)) for label, g in groups.items()}
    by_remainder = sorted(groups, key=lambda label: (-(wanted * len(groups[label]) / total % 1), rank(groups[label][0].md5)))
    for label in by_remainder[: max(0, wanted - sum(quota.values()))]:
        quota[label] += 1
    return sorted((r for label, g in groups.items() for r in g[: quota[label]]), key=lambda r: r.md5)


def _probe(
    taps: Sequence[backbones.Tap],
    readings: Sequence[Reading],
    features: Sequence[Tensor],
    labels: npt.NDArray[np.int64],
    held_features: Sequence[Tensor],
    held_labels: npt.NDArray[np.int64],
    has_logits: bool,
) -> Profile:
    targets = _one_hot(labels)
    kernels, across = [], []
    for read, x, z in zip(readings, features, held_features, strict=False):
        scale = scaling(x, read.blocks)
        a, b = scale(x).numpy(), scale(z).numpy()
        kernel = a @ a.T
        norm = kernel.trace() / len(a) or 1.0
        kernels.append(kernel / norm)
        across.append(b @ a.T / norm)
    fits = [leave_one_out(kernel, targets) for kernel in kernels]
    classes = np.unique(labels)
    right = [classes[fit.scores.argmax(1)] == labels for fit in fits]
    accuracy = [float(r.mean()) for r in right]

    def held_out(indices: Sequence[int]) -> Bits:
        # The penalty of the deepest tap's own probe serves the whole head: all kernels have the same norm, and a Cholesky solution costs a
        # thirtieth of another decomposition.
        dual = ridge(sum(kernels[i] for i in indices) / len(indices), targets, fits[indices[0]].penalty)
        scores = sum(across[i] for i in indices) / len(indices) @ dual + targets.mean(0)
        return np.asarray(classes[scores.argmax(1)] == held_labels)

    last_held = held_out([len(taps) - 1])
    probes = []
    for i, (tap, read, fit) in enumerate(zip(taps, readings, fits, strict=True)):
        low, high = wilson(int(right[i].sum()), len(labels))
        earlier = sorted(range(i), key=lambda j: (-accuracy[j], -j))[:2]
        held = held_out([i, *earlier]) if accuracy[i] >= accuracy[-1] else None
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
                balanced=float(np.mean([right[i][labels == c].mean() for c in classes])),
                penalty=fit.penalty,
                correct=pack(right[i]),
                head=tuple(taps[j].name for j in sorted([i, *earlier], reverse=True)),
                held_out=None if held is None else float(held.mean()),
                held_out_correct="" if held is None else pack(held),
            )
        )
    return Profile(
        backbone="",
        weights="",
        size=0,
        images=0,
        classes=0,
        majority=0.0,
        smallest=0,
        largest=0,
        sampled=len(labels),
        held_out=len(held_labels),
        head_similarity=head_similarity(features[-1].softmax(1).double().numpy(), labels) if has_logits else None,
        last_held_out=float(last_held.mean()),
        last_held_out_correct=pack(last_held),
        taps=tuple(probes),
    )


def _one_hot(labels: npt.NDArray[np.int64]) -> Matrix:
    """Return targets 1 for the class and -1 / (K - 1) for the others: (n, K)."""
    classes = np.unique(labels)
    own = labels[:, None] == classes[None, :]
    return np.where(own, 1.0, -1.0 / max(len(classes) - 1, 1))


# --- the probe ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A ridge fit: left-out scores (n, K), the dual coefficients (n, K) for other images, and the penalty that was chosen."""

    scores: Matrix
    dual: Matrix
    penalty: float


def leave_one_out(kernel: Matrix, targets: Matrix, penalties: Sequence[float] = PENALTIES) -> Fit:
    """Ridge regression on a kernel of centred features, every image predicted from all the others, exactly and from one decomposition.

    With X X' = U diag(s) U', f = s / (s + lambda m), h_i = sum_j U_ij^2 f_j + 1/m and fitted values y: y_i(left out) = (y_i - h_i Y_i) /
    (1 - h_i) (the usual leave-one-out identity of linear smoothers). The penalty is the one with the smallest left-out squared error.

    Args:
        kernel: X X', (m, m), of features centred over these m images.
        targets: (m, K).
    """
    m = len(kernel)
    values, vectors = np.linalg.eigh(kernel)
    values = values.clip(min=0)
    mean = targets.mean(0)
    rotated = vectors.T @ (targets - mean)
    best: Fit | None = None
    least = math.inf
    for penalty in penalties:
        shrink = values / (values + penalty * m)
        leverage = ((vectors**2) @ shrink + 1 / m).clip(max=1 - 1e-9)[:, None]
        fitted = vectors @ (shrink[:, None] * rotated) + mean
        left_out = (fitted - leverage * targets) / (1 - leverage)
        error = float(((left_out - targets) ** 2).mean())
        if error < least:
            least = error
            best = Fit(left_out, vectors @ (rotated / (values + penalty * m)[:, None]), penalty)
    assert best is not None
    return best


def ridge(kernel: Matrix, targets: Matrix, penalty: float) -> Matrix:
    """Return the dual coefficients (m, K) of ridge regression at one penalty."""
    from scipy.linalg import solve

    m = len(kernel)
    coefficients: Matrix = solve(kernel + penalty * m * np.eye(m), targets - targets.mean(0), assume_a="pos", check_finite=False)
    return coefficients


def head_similarity(probabilities: Matrix, labels: npt.NDArray[np.int64], folds: int = 5) -> float:
    """S: the share of the labels' entropy that the source network's classes explain, cross-fitted; 0 none, 1 all.

    LEEP (Nguyen et al. 2020): P(y | z) = sum_i theta_iz [y_i = y] / sum_i theta_iz, scored as mean log sum_z P(y_i | z) theta_iz on left-out
    images, and divided by the entropy of the labels: S = 1 - NLL / H(Y), clipped to [0, 1]. Source classes that hold less than one image's
    worth of probability are pooled: spread over a thousand of them, smoothing would eat the score.

    Args:
        probabilities: theta, the source head's softmax, (m, source classes).
        labels: (m,).
    """
    mass = probabilities.sum(0)
    kept = mass >= 1
    theta = np.concatenate([probabilities[:, kept], probabilities[:, ~kept].sum(1, keepdims=True)], axis=1)
    classes, y = np.unique(labels, return_inverse=True)
    prior = np.bincount(y) / len(y)
    entropy = -float((prior * np.log(prior)).sum())
    if entropy == 0:
        return 0.0
    # Folds by position within each class, so that every fold has every class.
    fold = np.zeros(len(y), dtype=int)
    for c in range(len(classes)):
        members = np.flatnonzero(y == c)
        fold[members] = np.arange(len(members)) % folds
    loss = 0.0
    for k in range(folds):
        train, test = fold != k, fold == k
        own = np.eye(len(classes))[y[train]]
        joint = theta[train].T @ own + prior
        conditional = joint / (theta[train].sum(0)[:, None] + 1)
        loss -= float(np.log((theta[test] @ conditional)[np.arange(test.sum()), y[test]].clip(min=1e-12)).sum())
    return float(np.clip(1 - loss / len(y) / entropy, 0, 1))


# --- the two axes ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceTest:
    """Does an earlier tap beat the last one?

    Attributes:
        tap: the slice point: the deepest earlier tap within one standard error of the best one; None where there is one tap only.
        best_earlier: the earlier tap with the best probe; gain: its accuracy minus the last tap's (0 to 1).
        significance: family-wise p-value of `no earlier tap is better`.
        similar: the same of `no earlier tap is better by the asked gain`: P(similar).
        confirmed: the head at `tap` is not worse than the last tap's on held-out images.
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


def slice_test(profile: Profile, gain: float, draws: int, seed: int = 0) -> SliceTest:
    """Compare every earlier tap with the last by a centred paired bootstrap of the largest t (max-T, Westfall and Young 1993).

    The correction for looking at many taps matters: the best of 16 taps of pure noise looks 4.7 points better than chance.
    """
    correct = profile.correct().astype(float)
    m, taps = correct.shape
    if taps < 2:
        return SliceTest(None, None, 0.0, 1.0, 1.0, False)
    difference = correct[:, :-1] - correct[:, -1:]
    gains = difference.mean(0)
    errors = (difference.std(0) / math.sqrt(m)).clip(min=0.5 / m)
    counts = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=draws) / m
    largest = ((counts @ difference - gains) / errors).max(1)

    def chance(asked: float) -> float:
        observed = ((gains - asked) / errors).max()
        return float((1 + (largest >= observed).sum()) / (1 + draws))

    best = int(np.flatnonzero(gains == gains.max())[-1])
    behind = correct[:, [best]] - correct[:, :-1]
    within = behind.mean(0) <= behind.std(0) / math.sqrt(m)
    chosen = int(np.flatnonzero(within)[-1])
    probe = profile.taps[chosen]
    confirmed = probe.held_out is not None and probe.held_out >= profile.last_held_out
    return SliceTest(probe.name, profile.taps[best].name, float(gains[best]), chance(0.0), chance(gain), confirmed)


def chance_of_large(profile: Profile, below: float, draws: int, seed: int = 0) -> float:
    """P(large): how likely the best probe's accuracy lies below this bound, by the same bootstrap. Headroom is what fine-tuning can win."""
    correct = profile.correct()[:, profile.taps.index(profile.best)].astype(float)
    m = len(correct)
    counts = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=draws) / m
    reached = counts @ correct
    # A draw exactly on the bound counts half.
    return float(((reached < below).sum() + 0.5 * (reached == below).sum() + 0.5) / (draws + 1))


# --- small things ---------------------------------------------------------------------------------------------------------------------


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion (Wilson 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, z2 = hits / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pack(bits: Bits) -> str:
    """Write bits as hexadecimal, eight a byte."""
    return np.packbits(bits).tobytes().hex()


def unpack(text: str, count: int) -> Bits:
    """Read what `pack` wrote."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)
