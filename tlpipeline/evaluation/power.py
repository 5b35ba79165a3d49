"""What a paired test can show: its power, and the images that it needs."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tlpipeline.evaluation.significance import NUISANCE, Sample, fewest_wins, largest_tail, p_value, tail

GAIN = 0.02  # the true gain whose chance of being shown is told
_FEW = 14  # mistakes of the champion; winning so many is significant at any alpha: 2^-14 is below 0.0001
_EXACT_BELOW = 2000  # images up to which that chance is computed exactly


def sensitivity(sample: Sample, wrong: npt.NDArray[np.bool_], alpha: float, null: float, discordance: float) -> tuple[str, float, int]:
    """Return a sentence about what these images can show, the power, and the images that a power of 0.8 needs.

    Args:
        sample: paired results.
        wrong: which images the champion classifies wrongly (n,): no more can be won.
        alpha: error probability of the test.
        null: difference that the test has to refute. If it is negative, the true gain is taken to be 0, else two points more.
        discordance: share of images to expect that only one of the two gets right.
    """
    if not (n := sample.images):
        return "", 0.0, 0
    gain = 0.0 if null < 0 else null + GAIN
    effect = sample.design_effect * n * float(np.sum(sample.weights**2))
    if sample.is_plain and n <= _EXACT_BELOW:
        power = exact_power(n, gain, discordance, alpha, null)
    else:
        power = approximate_power(n, gain, discordance, alpha, null, effect)
    needed = images_needed(gain, discordance, alpha, null, effect=effect)
    groups = len(np.unique(sample.groups))
    images = f"{n} test image{'s' * (n != 1)}{f' in {groups} groups' if groups < n else ''}"
    case = "that a model as good as the champion is not worse" if null < 0 else f"a gain of {100 * gain:g} points"
    best = Sample(wrong.astype(float), sample.strata, sample.groups)
    if (wrong.sum() < _FEW or not sample.is_plain) and p_value(best, null)[0] >= alpha:
        proof = f"even a model without mistakes would not be shown to be {'not worse' if null < 0 else 'better'}"
        return f"{images} cannot decide: {proof}. About {needed:,} show {case} four times in five.", power, needed
    return f"{images} show {case} {power:.0%} of the time; for four times in five, about {needed:,} are needed.", power, needed


@lru_cache(maxsize=64)
def critical_region(n: int, alpha: float, null: float = 0.0, points: int = NUISANCE, steps: int = 24) -> npt.NDArray[np.int64]:
    """Return the fewest wins for each number of losses (n + 1,) with which the exact test of n images has p < alpha.

    Args:
        n, alpha, null: as for `exact_power`.
        points, steps: of the search; the fewer, the rougher.
    """
    low, high = 0.5, 8.0  # no statistic below is significant, and each above is
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if largest_tail(middle, n, null, points) < alpha else (middle, high)
    return fewest_wins(high, n, null)


def exact_power(n: int, gain: float, discordance: float, alpha: float, null: float = 0.0) -> float:
    """Return the probability that the exact test of n images shows a gain of more than `null`.

    Args:
        n: images.
        gain: true difference.
        discordance: share of images that only one of the two gets right; at least the gain.
        alpha: error probability of the test.
        null: difference that the test has to refute.
    """
    discordance = max(discordance, abs(gain))
    return tail(critical_region(n, alpha, null, 24, 12), n, (discordance + gain) / 2, (discordance - gain) / 2)


def approximate_power(n: float, gain: float, discordance: float, alpha: float, null: float = 0.0, effect: float = 1.0) -> float:
    """Return the power by the normal approximation, for n images with a design effect."""
    from scipy.stats import norm

    spread_null, spread = _spreads(gain, discordance, null)
    return float(norm.cdf((math.sqrt(n / effect) * (gain - null) - norm.isf(alpha) * spread_null) / spread))


def images_needed(gain: float, discordance: float, alpha: float, null: float = 0.0, power: float = 0.8, effect: float = 1.0) -> int:
    """Return about how many images show a gain with this power (Lachin 1992, Statistics in Medicine 11:1239), to two digits."""
    from scipy.stats import norm

    spread_null, spread = _spreads(gain, discordance, null)
    n = effect * ((norm.isf(alpha) * spread_null + norm.ppf(power) * spread) / (gain - null)) ** 2
    digits = 10 ** max(0, math.floor(math.log10(max(n, 1))) - 1)
    return int(math.ceil(n / digits) * digits)


def _spreads(gain: float, discordance: float, null: float) -> tuple[float, float]:
    """Return the standard deviation of one image's result under the null hypothesis and where the gain is true."""
    discordance = max(discordance, abs(gain), abs(null))
    return math.sqrt(max(discordance - null**2, 1e-9)), math.sqrt(max(discordance - gain**2, 1e-9))


def assumed_discordance(samples: Sequence[Sample]) -> float:
    """Return the share of discordant images to expect: the seen one, with ten images' weight on a tenth."""
    images = sum(sample.images for sample in samples)
    return (sum(sample.discordance * sample.images for sample in samples) + 1) / (images + 10)
