"""Inner products of the sample's features, from which every probe, head and learning curve of the profile is solved."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from tlpipeline.backbones.features import Scaling, scaling
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.profiling.probes import PENALTIES, Fit, Matrix, guesses, leave_one_out, one_hot
from tlpipeline.profiling.profile import Head, Profile, Tangent
from tlpipeline.progress import Event, Progress
from tlpipeline.stats import Bits, pack, wilson
from tlpipeline.training.heads import solve_kernel
from tlpipeline.training.recipe import IMBALANCE

CURVE_DRAWS = 3
LEAST_PENALTY = PENALTIES[0] / 100
CONFIRMED_ON = 1024  # images of the sample that a head is solved on to confirm a slice


@dataclass(frozen=True)
class GramMatrices:
    """Scaled features of the sample at each tap, and their inner products.

    Args:
        read: scaled features at each tap; own: their inner products.
        scales: scaling of each tap, and the norm that is divided out afterwards.
        before: penalties of a smaller sample by taps, {} for the first sample; penalties: those of this sample.
        groups: name of each image's group, "" for none; None if there are no groups.
    """

    read: Sequence[npt.NDArray[np.float32]]
    own: Sequence[Matrix]
    scales: Sequence[tuple[Scaling, float]]
    labels: npt.NDArray[np.int64]
    before: Mapping[tuple[int, ...], float]
    penalties: dict[tuple[int, ...], float]
    groups: Sequence[str] | None = None

    def tried(self, taps: Sequence[int]) -> tuple[float, ...]:
        """Return the penalties to try: all for the first sample, then the best one of the smaller sample and a tenth of it."""
        if not self.before:
            return PENALTIES
        usual = self.before.get(tuple(taps), float(np.median(list(self.before.values()))))
        return usual, max(usual / 10, LEAST_PENALTY)

    def fit(self, taps: Sequence[int]) -> tuple[Fit, Bits]:
        """Return the leave-one-out fit on these taps together, and which images it classifies correctly."""
        together = None
        if sum(self.read[i].shape[1] for i in taps) < len(self.labels):
            together = np.concatenate([self.read[i] for i in taps], axis=1, dtype=np.float64) / math.sqrt(len(taps))
        fit = leave_one_out(_mean([self.own[i] for i in taps]), one_hot(self.labels), self.tried(taps), together, self.groups)
        self.penalties[tuple(taps)] = fit.penalty
        return fit, _right(fit, self.labels, self.groups)

    def head(self, taps: Sequence[int], names: Sequence[str]) -> Head:
        """Return the head on these taps, probed on the sample."""
        _, right = self.fit(taps)
        return Head(tuple(names), float(right.mean()), *wilson(int(right.sum()), len(right)), pack(right))

    def confirm(self, profile: Profile, features: Sequence[Tensor], labels: npt.NDArray[np.int64], progress: Progress) -> Profile:
        """Return the profile with its cut and its last head solved as in training, and evaluated on held-out images.

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
            # As in training, each block of a tap has a total variance of one. The norm that probes divide out is multiplied back in.
            kernel = sum(self.scales[i][1] ** 2 * self.own[i][few, few] for i in taps)
            alpha, logits = solve_kernel(np.asarray(kernel), self.labels[few], classes, IMBALANCE, 0, tolerance=1e-4)
            for i in taps:
                scale, norm = self.scales[i]
                logits = logits + scale(features[i]).float() @ (norm * alpha.float() @ torch.from_numpy(self.read[i][few])).T
            right = logits.argmax(1).numpy() == labels
            reached.append(replace(head, held_out=float(right.mean())))
            progress(Event("profile", number + 1, 2, f"head on {' + '.join(head.taps)} checked on {len(labels)} other images"))
        return replace(profile, held_out=len(labels), last=reached[0], cut=reached[1])

    def tangent(self, taps: Sequence[int], gradients: Matrix, first: Sequence[int]) -> Tangent:
        """Return how well the tangent kernel classifies some images of the sample, compared with these taps on the same images."""
        y, groups = self.labels[list(first)], self._groups_of(first)
        frozen = _centered(_mean([self.own[i] for i in taps])[np.ix_(first, first)])
        frozen = frozen / (frozen.trace() / len(y) or 1.0)
        reached: list[float] = []
        with threadpool_limits(1):
            for kernel in (gradients, frozen):
                fit = leave_one_out(kernel, one_hot(y), groups=groups)
                reached += [
                    float(_right(fit, y, groups).mean()),
                    round(float(((fit.scores - one_hot(y)) ** 2).mean()), 6),
                ]  # the last digits depend on threads
        return Tangent(len(y), *reached)

    def _groups_of(self, images: Iterable[int]) -> list[str] | None:
        return None if self.groups is None else [self.groups[i] for i in images]

    def learning_curve(self, taps: Sequence[int], whole: float, seed: int) -> tuple[tuple[int, float], ...]:
        """Return the learning curve of a head: (images, accuracy) at a quarter, half and all of the sample, each the mean of some draws.

        A draw takes every k-th image of a shuffled class, so that its classes keep their proportions.
        """
        kernel, penalty = _mean([self.own[i] for i in taps]), self.penalties[tuple(taps)]
        m, rng = len(kernel), np.random.default_rng(seed)
        # Classes in their order of appearance, which depends on the images only, not on the names of the classes.
        _, first, inverse = np.unique(self.labels, return_index=True, return_inverse=True)
        place = first[inverse]
        points = []
        for parts in (4, 2):
            if m // parts < 2 * len(np.unique(self.labels)):
                continue
            reached = []
            for _ in range(CURVE_DRAWS):
                order = rng.permutation(m)
                drawn = np.sort(order[np.argsort(place[order], kind="stable")][::parts])
                y = self.labels[drawn]
                inside = _centered(kernel[np.ix_(drawn, drawn)])
                # With fewer images the best penalty is that of all images, or a larger one.
                groups = self._groups_of(drawn)
                fit = leave_one_out(inside, one_hot(y), (penalty, 10 * penalty), groups=groups)
                reached.append(float(_right(fit, y, groups).mean()))
            points.append((len(drawn), float(np.mean(reached))))
        return (*points, (m, whole))


def _right(fit: Fit, labels: npt.NDArray[np.int64], groups: Sequence[str] | None) -> Bits:
    return np.asarray(np.unique(labels)[guesses(fit.scores, one_hot(labels), groups)] == labels)


def _centered(kernel: Matrix) -> Matrix:
    return np.asarray(kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean())


def _mean(kernels: Sequence[Matrix]) -> Matrix:
    return np.asarray(sum(kernels) / len(kernels))


def gram_matrices(
    readings: Sequence[TapPooling],
    features: Sequence[Tensor],
    labels: npt.NDArray[np.int64],
    before: Mapping[tuple[int, ...], float],
    groups: Sequence[str] | None = None,
) -> GramMatrices:
    """Scale features (images, features of a tap) at each tap and multiply them; `groups` as in `GramMatrices`."""
    scaled, own, scales = [], [], []
    for read, x in zip(readings, features, strict=False):
        scale = scaling(x, read.blocks)
        # Products in float32: their rounding error, about 1e-7 of the diagonal, is far below the weakest penalty.
        a = scale(x).float().numpy()
        norm = math.sqrt(float(np.square(a).sum(dtype=np.float64)) / len(a)) or 1.0
        a /= norm
        scaled.append(a)
        own.append((a @ a.T).astype(np.float64))
        scales.append((scale, norm))
    return GramMatrices(scaled, own, scales, labels, before, {}, groups)
