"""The gain predictor: what fine-tuning would reach on these data, before anything is fine-tuned. A small fitted model, readable as JSON.

Frozen heads are measured by probes; fine-tuning is predicted. The difference of their log odds is a linear function of a few figures of the
profile. It is fitted by research/fitting.py on the rows of `research.regret`. On the scale of log odds a head at 98 % leaves little to gain,
whatever the data are.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from tlpipeline.choice.decision import OutOfRange
from tlpipeline.profiling.probes import Matrix
from tlpipeline.profiling.profile import Profile, SliceTest
from tlpipeline.stats import paired

FITTED = Path(__file__).with_name("predictor.json")
FORMAT = 2
DRAWS = 400
HEADS = ("cut", "multi", "over")
GROWING = ("log10 images", "log10 images per class")
# Figures that must lie in the range of the fit, and by how much of this range they may lie beyond it.
RANGES = ("log10 images", "log10 classes", "log10 images per class", "log10 parameters", "head similarity")
MARGIN = 0.1
# Figures with a coefficient of 0. A line through the sizes of three networks says nothing of a fourth, and the others make the prediction worse on
# left-out data sets (docs/log.md). The tangent probe measures capacity instead. These figures only show whether a data set and a network are like
# those of the fit.
UNUSED = ("log10 parameters", "log10 images per class", "head similarity", "slope", "gain of the tangent probe")
# Standard deviation (log odds) that is added for each range that a figure lies beyond the fit, and the most ranges that are counted.
UNKNOWN, FARTHEST = 0.25, 2.0


def _student(p: Matrix) -> Matrix:
    """Return quantiles of Student's t with four degrees of freedom (Shaw 2006), scaled so that its quartiles are those of a standard normal distribution."""
    alpha = 4 * p * (1 - p)
    t = np.sign(p - 0.5) * 2 * np.sqrt(np.cos(np.arccos(np.sqrt(alpha)) / 3) / np.sqrt(alpha) - 1)
    return np.asarray(t * NormalDist().inv_cdf(0.75) / 0.740697)


# Quantiles of that distribution at equal steps: the same in every run, so no seed is needed. The tails are heavy, so that the result of a race can
# overrule a prediction with a narrow interval.
QUANTILES: Matrix = _student((np.arange(DRAWS) + 0.5) / DRAWS)


@dataclass(frozen=True)
class Evidence:
    """The figures of a profile that decide, as one flat row.

    Attributes:
        images, classes, validation: training images, classes, images of the judging half of validation; majority: share of the largest class.
        parameters, forward_ops: of the network without its old head; cut_ops: up to the slice point, 0 where there is none.
        sampled: images of the probes.
        head_similarity: S, None without a source head.
        last, cut, multi: leave-one-out accuracy of the three heads (cut is that of `last` where there is no earlier tap).
        cut_gain, cut_error, multi_gain, multi_error: paired differences to `last`, and standard errors; over_gain, over_error: of multi to cut.
        slope: accuracy that the last doubling of the sample brought to the multi-tap head.
        gain, significance, similar, confirmed: of the slice test.
        tangent_gain: log odds of the tangent probe minus those of the multi-tap head on the same images; tangent_error: log ratio of the
            squared errors of the tangent kernel to the head's. Both 0 where it was not measured.
    """

    images: int
    classes: int
    validation: int
    majority: float
    parameters: int
    forward_ops: int
    cut_ops: int
    sampled: int
    head_similarity: float | None
    last: float
    cut: float
    multi: float
    cut_gain: float
    cut_error: float
    multi_gain: float
    multi_error: float
    over_gain: float
    over_error: float
    slope: float
    gain: float
    significance: float
    similar: float
    confirmed: bool
    tangent_gain: float = 0.0
    tangent_error: float = 0.0


def evidence(profile: Profile, test: SliceTest) -> Evidence:
    """Return the figures of a profile and of its slice test that decide."""
    cut = profile.cut or profile.last
    cut_gain, cut_error = paired(cut.correct, profile.last.correct, profile.sampled)
    multi_gain, multi_error = paired(profile.multi.correct, profile.last.correct, profile.sampled)
    over_gain, over_error = paired(profile.multi.correct, cut.correct, profile.sampled)
    ops = {tap.name: tap.forward_ops for tap in profile.taps}
    return Evidence(
        images=profile.images,
        classes=profile.classes,
        validation=profile.validation,
        majority=profile.majority,
        parameters=profile.parameters,
        forward_ops=profile.forward_ops,
        cut_ops=ops[profile.cut.taps[0]] if profile.cut else 0,
        sampled=profile.sampled,
        head_similarity=profile.head_similarity,
        last=profile.last.accuracy,
        cut=cut.accuracy,
        multi=profile.multi.accuracy,
        cut_gain=cut_gain,
        cut_error=cut_error,
        multi_gain=multi_gain,
        multi_error=multi_error,
        over_gain=over_gain,
        over_error=over_error,
        slope=profile.slope,
        gain=test.gain,
        significance=test.significance,
        similar=test.similar,
        confirmed=test.confirmed,
        **_tangent(profile),
    )


def _tangent(profile: Profile) -> dict[str, float]:
    tangent = profile.tangent
    if tangent is None:
        return {}
    return {
        "tangent_gain": log_odds(tangent.accuracy, tangent.images) - log_odds(tangent.frozen, tangent.images),
        "tangent_error": math.log(tangent.error / tangent.frozen_error),
    }


# --- the model ------------------------------------------------------------------------------------------------------------------------


def log_odds(accuracy: float, images: float) -> float:
    """Return the log odds of an accuracy measured on so many images. Half an image is added to hits and misses, so that it stays finite."""
    hits = accuracy * images
    return math.log((hits + 0.5) / (images - hits + 0.5))


def figures(evidence: Evidence, frozen: float) -> dict[str, float]:
    """Return the inputs of the model; `frozen` is the leave-one-out accuracy of the frozen head that would be trained."""
    return {
        "log10 images": math.log10(max(evidence.images, 1)),
        "log10 images per class": math.log10(max(evidence.images / evidence.classes, 1)),
        "log10 parameters": math.log10(max(evidence.parameters, 1)),
        "log odds of the frozen head": log_odds(frozen, evidence.sampled),
        "head similarity": evidence.head_similarity or 0.0,
        "slope": 10 * evidence.slope,
        "gain of the tangent probe": evidence.tangent_gain,
        "error of the tangent probe": evidence.tangent_error,
    }


def ranged(evidence: Evidence, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures whose range in the rows of the fit matters; classes are no input of the model, but have one, too."""
    return {name: value for name, value in {**figures, "log10 classes": math.log10(max(evidence.classes, 1))}.items() if name in RANGES}


@dataclass(frozen=True)
class Prediction:
    """What fine-tuning is expected to gain over the frozen head, as shares (0 to 1).

    Attributes:
        frozen, tuned: expected accuracies.
        gain, low, high: expected tuned minus frozen, with its central 80 % interval.
        frozen_regret, tuned_regret: expected loss of choosing either.
        p_frozen_within: calibrated probability that the frozen head is at most the tolerance worse than fine-tuning; p_tuned_within: that
            fine-tuning is at most the tolerance worse than the frozen head.
        outside: what lies outside the data that the model was fitted on.
    """

    frozen: float
    tuned: float
    gain: float
    low: float
    high: float
    frozen_regret: float
    tuned_regret: float
    p_frozen_within: float
    p_tuned_within: float
    outside: tuple[OutOfRange, ...]


@dataclass(frozen=True)
class GainPredictor:
    """The fitted model.

    Attributes:
        center, spread, coefficients: of each figure; intercept.
        deviation: standard deviation of the residual on left-out data sets (log odds).
        platt_slope, platt_intercept: calibration of `p_frozen_within` (Platt 1999): its log odds are platt_slope * raw + platt_intercept.
        choice_platt_slope, choice_platt_intercept: the same for the probability that the choice is within the tolerance of the best arm.
        heads: usual gains of frozen heads over each other (see head_gain): (at S = 0, slope by S, standard deviation), as shares.
        remaining_gain: for each interim analysis of a race, what fine-tuning still gains from there to its end, and the standard deviation of
            that, as shares of the frozen head's errors.
        lowest, highest: range of each figure in the rows of the fit.
        rows, data: what it was fitted on.
    """

    center: Mapping[str, float]
    spread: Mapping[str, float]
    coefficients: Mapping[str, float]
    intercept: float
    deviation: float
    platt_slope: float
    platt_intercept: float
    choice_platt_slope: float
    choice_platt_intercept: float
    heads: Mapping[str, Sequence[float]]
    remaining_gain: Sequence[Sequence[float]]
    lowest: Mapping[str, float]
    highest: Mapping[str, float]
    rows: int
    data: Sequence[str]

    def head_gain(self, name: str, evidence: Evidence) -> float:
        """Return what a frozen head is expected to gain over another, as a share: cut or multi over last; over: multi over cut.

        The usual gain on other data and the measured gain here are weighted by their precisions. With 80 images a paired difference of 8
        points is within the noise, but it is also usual.
        """
        level, slope, spread = self.heads[name]
        usual = level + slope * (evidence.head_similarity or 0.0)
        measured, error = float(getattr(evidence, f"{name}_gain")), float(getattr(evidence, f"{name}_error"))
        return (usual * error**2 + measured * spread**2) / (error**2 + spread**2)

    def _within_range(self, x: dict[str, float]) -> dict[str, float]:
        """Return the figures clipped to the range of the fit: a line is not trusted beyond its points.

        The number of images is not clipped: more images favor fine-tuning, which is known without a fit.
        """
        return x | {name: float(np.clip(value, *self._edges(name))) for name, value in x.items() if name not in GROWING}

    def _edges(self, name: str) -> tuple[float, float]:
        low, high = self.lowest.get(name, -math.inf), self.highest.get(name, math.inf)
        margin = MARGIN * (high - low) if math.isfinite(high - low) else 0.0
        return low - margin, high + margin

    def _beyond(self, evidence: Evidence, frozen: float) -> dict[str, float]:
        """Return by how many of their ranges figures lie beyond the fit."""
        out = {}
        for name, value in ranged(evidence, figures(evidence, frozen)).items():
            low, high = self._edges(name)
            if not low <= value <= high:
                width = max(self.highest[name] - self.lowest[name], 0.1)
                out[name] = max(low - value, value - high) / width
        return out

    def unexplained(self, evidence: Evidence, frozen: float, size: bool = False) -> float:
        """Return the standard deviation of the shift (log odds), which is larger for networks or labels outside the fit.

        Args:
            size: whether the number of images counts as well. In a prediction it must not: more images would then count against fine-tuning.
        """
        far = min(sum(ranges for name, ranges in self._beyond(evidence, frozen).items() if size or name not in GROWING), FARTHEST)
        return math.hypot(self.deviation, UNKNOWN * far)

    def shift(self, evidence: Evidence, frozen: float) -> float:
        """Return the expected log odds of fine-tuning minus those of the frozen head."""
        x = self._within_range(figures(evidence, frozen))
        return self.intercept + sum(self.coefficients[k] * (x[k] - self.center[k]) / self.spread[k] for k in self.coefficients)

    def gains(self, evidence: Evidence, frozen: float, size: bool = False) -> Matrix:
        """Return equally likely gains of fine-tuning against the frozen head, as shares: (DRAWS,). `size` as in `unexplained`."""
        return self._drawn(evidence, frozen, self.unexplained(evidence, frozen, size))

    def _drawn(self, evidence: Evidence, frozen: float, deviation: float) -> Matrix:
        base = log_odds(frozen, evidence.sampled)
        return np.asarray(_share(base + self.shift(evidence, frozen) + deviation * QUANTILES) - _share(base))

    def predict(self, evidence: Evidence, frozen: float, tolerance: float) -> Prediction:
        """Predict.

        Args:
            evidence: the figures that decide.
            frozen: leave-one-out accuracy of the frozen head that would be trained.
            tolerance: as a share (0 to 1).
        """
        base, gains = log_odds(frozen, evidence.sampled), self.gains(evidence, frozen)
        # The expected gain uses the deviation of the fit: a wider one, in log odds, would pull the mean of the gains below zero.
        expected = float(self._drawn(evidence, frozen, self.deviation).mean())
        raw = log_odds(float((gains <= tolerance).mean()), DRAWS)
        return Prediction(
            frozen=float(_share(base)),
            tuned=float(_share(base)) + expected,
            gain=expected,
            low=float(np.quantile(gains, 0.1)),
            high=float(np.quantile(gains, 0.9)),
            frozen_regret=float(gains.clip(min=0).mean()),
            tuned_regret=float((-gains).clip(min=0).mean()),
            p_frozen_within=float(_share(self.platt_slope * raw + self.platt_intercept)),
            p_tuned_within=float((-gains <= tolerance).mean()),
            outside=self.outside(evidence, frozen),
        )

    def p_within_tolerance(self, own: float) -> float:
        """Return the calibrated probability that the choice is not worse than the best of all arms by more than the tolerance.

        Args:
            own: probability by the prediction, or by the last interim analysis, that the choice is not worse than the other way by more than that.
        """
        return float(_share(self.choice_platt_slope * log_odds(own, DRAWS) + self.choice_platt_intercept))

    def outside(self, evidence: Evidence, frozen: float) -> tuple[OutOfRange, ...]:
        """Return the figures that lie outside the rows of the fit by more than a tenth of their range; counts as counts, not as logarithms."""

        def plain(name: str, value: float) -> float:
            return round(10**value if name.startswith("log10 ") else value, 2)

        values = ranged(evidence, figures(evidence, frozen))
        out = [
            OutOfRange(name.removeprefix("log10 "), *(plain(name, v) for v in (values[name], self.lowest[name], self.highest[name])))
            for name in self._beyond(evidence, frozen)
        ]
        if evidence.head_similarity is None and self.data:
            out.append(
                OutOfRange("head similarity", None, self.lowest.get("head similarity", 0.0), self.highest.get("head similarity", 1.0))
            )
        return tuple(out)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "GainPredictor":
        """Read what `to_json` gave."""
        return cls(**{f.name: content[f.name] for f in fields(cls)})


# The start of the fit: fine-tuning is expected to be as good as the frozen head.
NEUTRAL = GainPredictor(
    center={},
    spread={},
    coefficients={},
    intercept=0.0,
    deviation=1.0,
    platt_slope=1.0,
    platt_intercept=0.0,
    choice_platt_slope=1.0,
    choice_platt_intercept=0.0,
    heads=dict.fromkeys(HEADS, (0.0, 0.0, 0.05)),
    remaining_gain=((0.5, 0.5), (0.2, 0.3), (0.0, 0.05)),
    lowest={},
    highest={},
    rows=0,
    data=(),
)


def _share(odds: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(odds)))


@cache
def load_predictor() -> GainPredictor:
    """Return the model that comes with the package."""
    return GainPredictor.from_json(json.loads(FITTED.read_text(encoding="utf-8")))
