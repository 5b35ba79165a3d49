"""Statistics of the profile: exact leave-one-out ridge probes, head similarity, intervals, and who was right as packed bits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

PENALTIES = tuple(10.0**e for e in range(-5, 2))

Bits = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float64]


def one_hot(labels: npt.NDArray[np.int64]) -> Matrix:
    """Return targets 1 for the class and -1 / (K - 1) for the others: (n, K)."""
    classes = np.unique(labels)
    own = labels[:, None] == classes[None, :]
    return np.where(own, 1.0, -1.0 / max(len(classes) - 1, 1))


# --- the probe ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A ridge fit: left-out scores (n, K), and the penalty that was chosen."""

    scores: Matrix
    penalty: float


def leave_one_out(kernel: Matrix, targets: Matrix, penalties: Sequence[float] = PENALTIES, features: Matrix | None = None) -> Fit:
    """Ridge regression on a kernel of centred features, every image predicted from all the others, exactly and from one decomposition.

    With X X' = U diag(s) U', f = s / (s + lambda m), h_i = sum_j U_ij^2 f_j + 1/m and fitted values y: y_i(left out) = (y_i - h_i Y_i) /
    (1 - h_i) (the usual leave-one-out identity of linear smoothers). The penalty is the one with the smallest left-out squared error.

    Args:
        kernel: X X', (m, m), of features centred over these m images.
        targets: (m, K).
        features: X, where it is at hand: with fewer columns than rows it is cheaper to decompose.
    """
    m = len(kernel)
    if features is not None and features.shape[1] < m:
        values, right = np.linalg.eigh(features.T @ features)
        kept = values > values.max(initial=0) * 1e-12
        values = values[kept]
        vectors = features @ (right[:, kept] / np.sqrt(values))
    else:
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
            best = Fit(left_out, penalty)
    assert best is not None
    return best


def guesses(scores: Matrix, targets: Matrix) -> npt.NDArray[np.int64]:
    """Return the class index that left-out scores (m, K) of targets (m, K) say.

    Leaving an image out lowers the mean of its own class a little and so favours the others: on pure noise of equally large classes the
    largest score would be right less often than chance. The class means of all images are put back.
    """
    return np.asarray((scores + (targets - targets.mean(0)) / max(len(targets) - 1, 1)).argmax(1))


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


def paired(one: str, other: str, count: int) -> tuple[float, float]:
    """Return the paired difference of two packed records of the same images, one minus the other, and its standard error."""
    difference = unpack(one, count).astype(float) - unpack(other, count)
    return float(difference.mean()), float(max(difference.std(), 0.5 / math.sqrt(count)) / math.sqrt(count))
