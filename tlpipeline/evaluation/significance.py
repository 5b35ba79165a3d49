"""Tests and intervals for the difference of two models on the same images.

Each image is a win (only the challenger is right), a loss (only the champion is) or a tie. Without groups and weights, the test is the exact
unconditional one of paired proportions: its error probability is at most `alpha` whatever the number of images. It orders the results by
Tango's score statistic (Tango 1998, Statistics in Medicine 17:891), which is McNemar's at a null difference of 0, and takes the largest
probability over the unknown share of discordant images (Suissa and Shuster 1991, Biometrics 47:361; Lloyd and Moldovan 2008, Statistics in
Medicine 27:3540). It is valid as the exact conditional McNemar test is, and finds more.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipeline.stats import design_effect

Floats = npt.NDArray[np.float64]
DRAWS = 10_000
NUISANCE = 48  # values of the unknown share of losses over which the largest probability is taken
_NEGLIGIBLE = 8.0  # standard deviations beyond which a binomial count is left out: a probability below 1e-14


@dataclass(frozen=True)
class Sample:
    """Paired results on the same images.

    Attributes:
        gains: +1 for a win, -1 for a loss, 0 for a tie (n,).
        strata: number of the stratum of each image (n,), from 0. Each stratum has equal weight in the metric: one stratum gives accuracy,
            one for each class gives balanced accuracy.
        groups: number of the group of each image (n,); images of one group are not independent.
    """

    gains: Floats
    strata: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.gains)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Images in each stratum (strata,)."""
        return np.bincount(self.strata)

    @property
    def weights(self) -> Floats:
        """Weight of each image in the metric (n,), with sum 1."""
        sizes = self.sizes
        return 1.0 / (len(sizes) * sizes[self.strata])

    @property
    def difference(self) -> float:
        """Challenger minus champion in the metric, in [-1, 1]."""
        return float(self.weights @ self.gains) if self.images else 0.0

    @property
    def discordance(self) -> float:
        """Weighted share of images that only one of the two gets right."""
        return float(self.weights @ np.abs(self.gains)) if self.images else 0.0

    @property
    def design_effect(self) -> float:
        """By how much groups increase the variance of the difference."""
        return design_effect(self.gains, self.groups, self.weights, self.strata)

    @property
    def is_plain(self) -> bool:
        """Whether each image counts alike and stands for itself."""
        return len(self.sizes) <= 1 and len(np.unique(self.groups)) == self.images

    def reversed(self) -> "Sample":
        """Return the sample with the roles of the two models exchanged."""
        return Sample(-self.gains, self.strata, self.groups)

    def part(self, chosen: npt.NDArray[np.bool_]) -> "Sample":
        """Return the sample of some of the images."""
        return Sample(self.gains[chosen], *(np.unique(x[chosen], return_inverse=True)[1] for x in (self.strata, self.groups)))


# --- p-values and intervals -----------------------------------------------------------------------------------------------------------


def p_value(sample: Sample, null: float = 0.0) -> tuple[float, str]:
    """Return the one-sided p-value of `the challenger gains at most null`, and the name of the test.

    Args:
        sample: paired results.
        null: difference in the metric, in (-1, 1).
    """
    from scipy.stats import norm

    if not sample.images:
        return 1.0, "no test"
    if sample.is_plain:
        wins, losses = (int((sample.gains == sign).sum()) for sign in (1, -1))
        return exact_p_value(wins, losses, sample.images, null), "exact paired test"
    grouped = len(np.unique(sample.groups)) < sample.images
    if null == 0:
        # Under the null hypothesis a coin decides which of the two models each group favors.
        sums = np.bincount(sample.groups, sample.weights * sample.gains)
        sizes, counts = np.unique(np.round(np.abs(sums[sums != 0]), 15), return_counts=True)
        rng = np.random.default_rng(0)
        draws = sum(
            (size * (2 * rng.binomial(count, 0.5, DRAWS) - count) for size, count in zip(sizes, counts, strict=True)), np.zeros(DRAWS)
        )
        extreme = float((1 + (draws >= sums.sum() - 1e-12).sum()) / (1 + DRAWS))
        return extreme, "permutation test of groups" if grouped else "paired permutation test"
    return float(norm.sf(_score(sample, null))), "score test of groups" if grouped else "paired score test"


def interval(sample: Sample, confidence: float = 0.9) -> tuple[float, float]:
    """Return the interval of the difference in the metric that inverts the score test (Tango 1998), in [-1, 1]."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    if not sample.images:
        return -1.0, 1.0
    z, most = float(norm.isf((1 - confidence) / 2)), 1 - 1e-9

    def bound(sign: int) -> float:
        def beyond(null: float) -> float:
            return _score(sample, null) - sign * z

        return float(brentq(beyond, -most, most)) if beyond(-most) * beyond(most) < 0 else -sign * 1.0

    return bound(1), bound(-1)


def _score(sample: Sample, null: float) -> float:
    """Return Tango's score statistic, summed over strata, with the variance that groups give it."""
    variance = 0.0
    for stratum, size in enumerate(sample.sizes):
        gains = sample.gains[sample.strata == stratum]
        lost = _restricted_losses((gains > 0).sum(), (gains < 0).sum(), size, null)
        variance += float(max(size * (2 * lost + null * (1 - null)), 1e-12)) / (len(sample.sizes) * size) ** 2
    variance *= sample.design_effect
    return (sample.difference - null) / math.sqrt(variance)


def _restricted_losses(wins: Any, losses: Any, n: Any, null: float) -> Any:
    """Return the maximum-likelihood probability of a loss among those where wins are more probable by `null` (Tango 1998)."""
    b = -wins - losses + (2 * n - wins + losses) * null
    root = np.sqrt(np.maximum(b * b + 8 * n * losses * null * (1 - null), 0.0))
    return np.clip((root - b) / (4 * n), max(0.0, -null), (1 - null) / 2)


@lru_cache(maxsize=4096)
def exact_p_value(wins: int, losses: int, n: int, null: float = 0.0) -> float:
    """Return the p-value of the exact unconditional test of paired proportions.

    Args:
        wins, losses: images that only one of the two gets right.
        n: images.
        null: largest difference under the null hypothesis.
    """
    return largest_tail(float(_statistic(np.array(wins), np.array(losses), n, null)), n, null)


def _statistic(wins: Any, losses: Any, n: int, null: float) -> Floats:
    variance = n * (2 * _restricted_losses(wins, losses, n, null) + null * (1 - null))
    return np.asarray((wins - losses - n * null) / np.sqrt(np.maximum(variance, 1e-12)))


def largest_tail(bound: float, n: int, null: float, points: int = NUISANCE) -> float:
    """Return the largest probability, over the share of losses, of a statistic of at least `bound` where the difference is `null`."""
    lowest, highest = max(0.0, -null), (1 - null) / 2
    grid = lowest + (highest - lowest) * np.concatenate([[0.0], np.geomspace(min(0.02 / n, 0.01), 1.0, points)])
    needed = fewest_wins(bound, n, null)
    tails = [tail(needed, n, lost + null, lost) for lost in grid]
    peak = int(np.argmax(tails))
    around = np.linspace(grid[max(peak - 1, 0)], grid[min(peak + 1, points)], points // 4 + 2)
    return min(1.0, max(tails[peak], *(tail(needed, n, lost + null, lost) for lost in around)))


def fewest_wins(bound: float, n: int, null: float) -> npt.NDArray[np.int64]:
    """Return for each number of losses (n + 1,) the fewest wins whose statistic reaches `bound`; more than there are if none do."""
    losses = np.arange(n + 1)
    low, high = np.zeros(n + 1, dtype=np.int64), n - losses + 1
    while (low < high).any():  # the statistic rises with wins
        middle = (low + high) // 2
        reached = _statistic(middle, losses, n, null) >= bound - 1e-9
        open_ = low < high
        high = np.where(open_ & reached, middle, high)
        low = np.where(open_ & ~reached, middle + 1, low)
    return low


def tail(needed: npt.NDArray[np.int64], n: int, win: float, loss: float) -> float:
    """Return the probability of at least `needed` wins, by the number of losses, where images are won and lost with these probabilities."""
    from scipy.special import bdtrc, gammaln, xlog1py, xlogy  # scipy.stats takes five times as long

    win, loss = max(win, 0.0), max(loss, 0.0)
    around, spread = n * loss, _NEGLIGIBLE * math.sqrt(n * loss * (1 - loss)) + _NEGLIGIBLE**2
    losses = np.arange(max(0, int(around - spread)), min(n, math.ceil(around + spread)) + 1)
    rest = min(1.0, win / (1 - loss)) if loss < 1 else 0.0
    choices = gammaln(n + 1) - gammaln(losses + 1) - gammaln(n - losses + 1)
    chances = np.exp(choices + xlogy(losses, loss) + xlog1py(n - losses, -loss))
    return float(chances @ bdtrc(needed[losses] - 1.0, n - losses, rest))
