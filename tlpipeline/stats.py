"""Intervals of proportions, what groups do to them, and paired comparisons of correct answers, which are stored as packed bits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

Bits = npt.NDArray[np.bool_]


def wilson(hits: int, n: int, confidence: float = 0.95, effect: float = 1.0) -> tuple[float, float]:
    """Return Wilson's interval of a proportion (Wilson 1927): (low, high).

    Args:
        hits, n: of how many.
        confidence: level of the interval.
        effect: design effect of groups: n observations tell as much as n / effect independent ones.
    """
    if n == 0:
        return 0.0, 1.0
    share, size = hits / n, max(n / effect, 1.0)
    z2 = float(norm.ppf((1 + confidence) / 2)) ** 2
    center, half = share + z2 / (2 * size), math.sqrt(z2 * share * (1 - share) / size + (z2 / (2 * size)) ** 2)
    # Rounding must not leave the last digits of an interval that begins at 0 or ends at 1 on the other side.
    low, high = (center - half) / (1 + z2 / size), (center + half) / (1 + z2 / size)
    return 0.0 if hits == 0 else max(low, 0.0), 1.0 if hits == n else min(high, 1.0)


def group_numbers(groups: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return a number for each group (n,); an observation without one ("") is a group of its own."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group or f"\0{i}", len(numbers)) for i, group in enumerate(groups)], dtype=np.int64)


def design_effect(values: Any, groups: npt.NDArray[np.int64], weights: Any = None, strata: Any = None) -> float:
    """Return by how much groups increase the variance of a mean: 1 where each observation stands for itself, else at least 1.

    The variance between groups is that of the linearized mean (Rao and Scott 1992, Biometrics 48:577). With few groups, Student's t takes
    the place of the normal distribution (Korn and Graubard 1998, Survey Methodology 24:193). Where all values are equal, those of a group are
    taken for copies of each other.

    Args:
        values: (n,).
        groups: their numbers, from 0 (n,).
        weights: in the mean (n,); None: alike.
        strata: numbers of the strata (n,), from 0; None: one. The mean is the sum of the strata's.
    """
    values, sizes = np.asarray(values, dtype=float), np.bincount(groups)
    if len(sizes) == len(values):
        return 1.0
    if len(sizes) < 2:
        return float(len(values))
    weights = np.full(len(values), 1 / len(values)) if weights is None else weights
    strata = np.zeros(len(values), dtype=np.int64) if strata is None else strata
    residuals = weights * (values - (np.bincount(strata, weights * values) / np.bincount(strata, weights))[strata])
    single, grouped = float(residuals @ residuals), float(np.sum(np.bincount(groups, residuals) ** 2))
    between = grouped / single if single > 0 else float(np.sum(sizes**2) / len(values))
    few = len(sizes) / (len(sizes) - 1) * float(t.ppf(0.95, len(sizes) - 1) / norm.ppf(0.95)) ** 2
    return max(1.0, between * few)


def pack(bits: Bits) -> str:
    """Return bits as hexadecimal digits, eight bits per byte."""
    return np.packbits(bits).tobytes().hex()


def unpack(text: str, count: int) -> Bits:
    """Return the first `count` bits of a text from `pack`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)


def paired(one: str, other: str, count: int) -> tuple[float, float]:
    """Return the mean difference between two packed records of the same images, one minus other, and its standard error."""
    difference = unpack(one, count).astype(float) - unpack(other, count)
    return float(difference.mean()), float(max(difference.std(), 0.5 / math.sqrt(count)) / math.sqrt(count))
