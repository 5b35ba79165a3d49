"""The figures of a rule over many units: regret, cost, and how good its probability is."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from research.replay import Chosen, Measured

Values = npt.NDArray[np.float64]
BINS = 5
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Figures:
    """What a rule reaches, by unit.

    Attributes:
        raw: upper bound of the regret, in points (see `Measured.regret`).
        half: lower bound of it (see `Measured.half_regret`).
        cost: in forward passes, as a share of always LP-FT.
        seconds: CPU seconds, as a share of always LP-FT.
        raced: 1 if the rule raced, else 0.
        within: predicted probability of having chosen within the tolerance of the best; NaN of rules that predict none.
        good: whether the choice was within the tolerance.
    """

    raw: Values
    half: Values
    cost: Values
    seconds: Values
    raced: Values
    within: Values
    good: npt.NDArray[np.bool_]


def figures(units: Sequence[Measured], choices: Sequence[Chosen], tolerance: float) -> Figures:
    """Return the figures of a rule's choices; the tolerance is in points."""
    pairs = list(zip(units, choices, strict=True))
    raw = np.array([unit.regret(choice.arm) for unit, choice in pairs])
    return Figures(
        raw,
        np.array([unit.half_regret(choice.arm) for unit, choice in pairs]),
        np.array([choice.cost / unit.cost("lpft") for unit, choice in pairs]),
        np.array([choice.seconds / unit.seconds("lpft") for unit, choice in pairs]),
        np.array([choice.raced for choice in choices], dtype=float),
        np.array([choice.within for choice in choices]),
        raw <= tolerance + 1e-9,
    )


def paired_by_data(units: Sequence[Measured], difference: Values) -> tuple[float, float, float]:
    """Return the mean of a difference over data sets, each with the same weight, and its 90 % bootstrap interval over data sets."""
    names = sorted({unit.data for unit in units})
    means = np.array([difference[[unit.data == name for unit in units]].mean() for name in names])
    draws = means[np.random.default_rng(0).integers(0, len(means), (DRAWS, len(means)))].mean(1)
    return float(means.mean()), float(np.quantile(draws, 0.05)), float(np.quantile(draws, 0.95))


def brier_skill(units: Sequence[Measured], f: Figures) -> tuple[float, float]:
    """Return the Brier score of `within`, and its skill against the base rate of the other data sets."""
    data = np.array([unit.data for unit in units])
    base = np.array([f.good[data != name].mean() if (data != name).any() else f.good.mean() for name in data])
    score, reference = float(((f.within - f.good) ** 2).mean()), float(((base - f.good) ** 2).mean())
    return score, 1 - score / reference if reference else 0.0


def reliability(f: Figures) -> list[tuple[float, float, int]]:
    """Return (mean probability, share within the tolerance, units) of five bins with as many units each."""
    order = np.argsort(f.within, kind="stable")
    return [(float(f.within[b].mean()), float(f.good[b].mean()), len(b)) for b in np.array_split(order, min(BINS, len(order)))]


def calibration_error(f: Figures) -> tuple[float, float]:
    """Return the expected calibration error over these bins, and the one that a perfectly calibrated forecast has on so many units."""

    def error(good: npt.NDArray[np.bool_]) -> float:
        bins = reliability(dataclasses.replace(f, good=good))
        return sum(n * abs(p - share) for p, share, n in bins) / len(good)

    rng = np.random.default_rng(0)
    floor = np.mean([error(rng.random(len(f.within)) < f.within) for _ in range(500)])
    return error(f.good), float(floor)
