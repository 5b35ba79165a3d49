"""Statistics of the profile: exact leave-one-out ridge probes, head similarity, intervals, and who was right as packed bits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PENALTIES = tuple(10.0**e for e in range(-5, 2))

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


def leave_one_out(
    kernel: Matrix,
    targets: Matrix,
    penalties: Sequence[float] = PENALTIES,
    features: Matrix | None = None,
    groups: Sequence[str] | None = None,
) -> Fit:
    """Ridge regression on a kernel of centered features, every image predicted from all the others, exactly and without fitting it again.

    With fitted values y and their leverages h (the diagonal of the smoother): y_i(left out) = (y_i - h_i Y_i) / (1 - h_i), the usual identity
    of linear smoothers. A group G is left out whole: its residuals are (1 - H_GG)^-1 (Y_G - y_G), with the block H_GG of the smoother. Many penalties share one decomposition: with X X' = U diag(s) U' and f = s / (s + lambda m), h_i = sum_j U_ij^2 f_j +
    1/m. One or two are cheaper by a Cholesky solution each. The penalty is the one with the smallest left-out squared error.

    Args:
        kernel: X X', (m, m), of features centered over these m images.
        targets: (m, K).
        features: X, where it is at hand: with fewer columns than rows it is cheaper to decompose.
        groups: name of each image's group, "" for an image that is independent of all others (m,); None if all are.
    """
    blocks = _blocks(groups)
    mean = targets.mean(0)
    y = torch.from_numpy(targets - mean)
    k = torch.from_numpy(np.asarray(kernel, dtype=np.float64))
    x = None if features is None or features.shape[1] >= len(kernel) else torch.from_numpy(np.asarray(features, dtype=np.float64))
    smooth = _by_decomposition(k, x, y) if len(penalties) > 2 else _by_cholesky(k, x, y)
    best: Fit | None = None
    least = math.inf
    for penalty in penalties:
        fitted, leverage, block_of = smooth(penalty * len(kernel))
        leverage = (leverage + 1 / len(kernel)).clamp(max=1 - 1e-9)[:, None]
        left_out = ((fitted + torch.from_numpy(mean) - leverage * torch.from_numpy(targets)) / (1 - leverage)).numpy()
        for block in blocks:
            smoother = block_of(block) + 1 / len(kernel)
            residual = targets[block] - (fitted[block].numpy() + mean)
            # A group without which the rest cannot be fitted at all has an eigenvalue of one; it is kept away as a single image's leverage is.
            values, vectors = np.linalg.eigh(smoother)
            inverse = (vectors / np.maximum(1 - values, 1e-9)) @ vectors.T
            left_out[block] = targets[block] - inverse @ residual
        error = float(((left_out - targets) ** 2).mean())
        if error < least:
            least = error
            best = Fit(left_out, penalty)
    assert best is not None
    return best


def _blocks(groups: Sequence[str] | None) -> list[npt.NDArray[np.int64]]:
    """Return the positions of the images of each group that has several."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups or ()):
        if group:
            members.setdefault(group, []).append(i)
    return [np.array(block) for block in members.values() if len(block) > 1]


_Smoothed = tuple[Tensor, Tensor, Callable[[npt.NDArray[np.int64]], Matrix]]


def _by_decomposition(kernel: Tensor, features: Tensor | None, targets: Tensor) -> Callable[[float], _Smoothed]:
    """Return what gives fitted values, leverages and blocks of the smoother at a ridge, from one decomposition."""
    if features is not None:
        values, right = torch.linalg.eigh(features.T @ features)
        kept = values > values.max() * 1e-12
        values = values[kept]
        vectors = features @ (right[:, kept] / values.sqrt())
    else:
        values, vectors = torch.linalg.eigh(kernel)
        values = values.clamp(min=0)
    rotated, squares = vectors.T @ targets, vectors**2

    def at(ridge: float) -> _Smoothed:
        shrink = values / (values + ridge)

        def block(rows: npt.NDArray[np.int64]) -> Matrix:
            own = vectors[torch.from_numpy(rows)]
            return np.asarray(((own * shrink) @ own.T).numpy())

        return vectors @ (shrink[:, None] * rotated), squares @ shrink, block

    return at


def _by_cholesky(kernel: Tensor, features: Tensor | None, targets: Tensor) -> Callable[[float], _Smoothed]:
    """Return the same by a factorization for each ridge: K (K + r)^-1 = 1 - r (K + r)^-1, or by the columns where they are fewer."""
    from scipy.linalg.lapack import dtrtri

    inner = kernel if features is None else features.T @ features

    def at(ridge: float) -> _Smoothed:
        factor = torch.linalg.cholesky(inner + ridge * torch.eye(len(inner), dtype=inner.dtype))
        if features is None:
            # Only the factor is inverted: half the work, and with it products and the diagonal are at hand.
            inverse, _ = dtrtri(factor.numpy().T)
            upper = torch.from_numpy(inverse)

            def block(rows: npt.NDArray[np.int64]) -> Matrix:
                own = upper[torch.from_numpy(rows)]
                return np.asarray(np.eye(len(rows)) - ridge * (own @ own.T).numpy())

            return targets - ridge * (upper @ (upper.T @ targets)), 1 - ridge * upper.square().sum(1), block
        half = torch.linalg.solve_triangular(factor, features.T, upper=False)

        def block_of_columns(rows: npt.NDArray[np.int64]) -> Matrix:
            own = half[:, torch.from_numpy(rows)]
            return np.asarray((own.T @ own).numpy())

        return half.T @ (half @ targets), (half**2).sum(0), block_of_columns

    return at


def guesses(scores: Matrix, targets: Matrix, groups: Sequence[str] | None = None) -> npt.NDArray[np.int64]:
    """Return the class index that left-out scores (m, K) of targets (m, K) say; `groups` as for `leave_one_out`."""
    return np.asarray(with_class_means(scores, targets, groups).argmax(1))


def with_class_means(scores: Matrix, targets: Matrix, groups: Sequence[str] | None = None) -> Matrix:
    """Return left-out scores (m, K) of targets (m, K) that favor no class.

    Leaving an image or a group out lowers the means of its classes a little, which favors the others. On pure noise with equally large
    classes, the largest score would be right less often than chance. So the class means of all images are put back.

    Args:
        groups: as for `leave_one_out`.
    """
    away = targets - targets.mean(0)
    shift = away / max(len(targets) - 1, 1)
    for block in _blocks(groups):
        shift[block] = away[block].sum(0) / max(len(targets) - len(block), 1)
    return np.asarray(scores + shift)


def head_similarity(probabilities: Matrix, labels: npt.NDArray[np.int64], folds: int = 5, groups: Sequence[str] | None = None) -> float:
    """S: the share of the labels' entropy that the source network's classes explain, cross-fitted; 0 none, 1 all.

    LEEP (Nguyen et al. 2020): P(y | z) = sum_i theta_iz [y_i = y] / sum_i theta_iz, scored as mean log sum_z P(y_i | z) theta_iz on left-out
    images, and divided by the entropy of the labels: S = 1 - NLL / H(Y), clipped to [0, 1]. Source classes that hold less than one image's
    worth of probability are pooled: spread over a thousand of them, smoothing would eat the score.

    Args:
        probabilities: theta, the source head's softmax, (m, source classes).
        labels: (m,).
        groups: as for `leave_one_out`; a group is in one fold.
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
    for block in _blocks(groups):
        fold[block] = fold[block[0]]
    loss = 0.0
    for k in range(folds):
        train, test = fold != k, fold == k
        if not test.any():
            continue
        own = np.eye(len(classes))[y[train]]
        joint = theta[train].T @ own + prior
        conditional = joint / (theta[train].sum(0)[:, None] + 1)
        loss -= float(np.log((theta[test] @ conditional)[np.arange(test.sum()), y[test]].clip(min=1e-12)).sum())
    return float(np.clip(1 - loss / len(y) / entropy, 0, 1))


# --- small things ---------------------------------------------------------------------------------------------------------------------
