"""The outlook: what fine-tuning would reach on these data, before anything is fine-tuned. A small fitted model, readable as JSON.

Frozen heads are measured by probes. Fine-tuning is predicted: how far it lies above the frozen head, on the scale of log odds, is a linear
function of a few figures of the profile, fitted (fitting.py) on the rows of `benchmarks/regret.py`. On that scale a head at 98 % leaves little
to win whatever the data are: headroom is built in.
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
# Figures of which the fit must have seen the like, and by how much of their range they may lie beyond it.
RANGES = ("log10 images", "log10 classes", "log10 images per class", "log10 parameters", "head similarity")
MARGIN = 0.1
# Not predicted from: a line through the sizes of three networks says nothing of a fourth, and with the others the prediction errs more on data sets
# that it has not seen (docs/log.md). What capacity is worth on these data the gradients say; these figures tell whether a data set
# and a network are like those of the fit.
UNUSED = ("log10 parameters", "log10 images per class", "head similarity", "slope", "gain of the tangent probe")
# How much less is known for each range that a figure lies beyond what was seen (log odds), and at most so many ranges are counted.
UNKNOWN, FARTHEST = 0.25, 2.0


def _student(p: Matrix) -> Matrix:
    """Return quantiles of Student's t with four degrees of freedom (Shaw 2006), scaled so that half of it lies where half of a normal one does."""
    alpha = 4 * p * (1 - p)
    t = np.sign(p - 0.5) * 2 * np.sqrt(np.cos(np.arccos(np.sqrt(alpha)) / 3) / np.sqrt(alpha) - 1)
    return np.asarray(t * NormalDist().inv_cdf(0.75) / 0.740697)


# The middles of equal parts of that distribution: the same in every run, no seed needed. Its tails are heavy: what a race sees must be able
# to overrule the prediction, however sure that was.
QUANTILES: Matrix = _student((np.arange(DRAWS) + 0.5) / DRAWS)


@dataclass(frozen=True)
class Evidence:
    """What the choice looks at, as one flat row: the figures of a profile that decide.

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
    seen = profile.tangent
    if seen is None:
        return {}
    return {
        "tangent_gain": log_odds(seen.accuracy, seen.images) - log_odds(seen.frozen, seen.images),
        "tangent_error": math.log(seen.error / seen.frozen_error),
    }


# --- the model ------------------------------------------------------------------------------------------------------------------------


def log_odds(accuracy: float, images: float) -> float:
    """Return the log odds of an accuracy that was seen on so many images, half an image added to either side so that it stays finite."""
    hits = accuracy * images
    return math.log((hits + 0.5) / (images - hits + 0.5))


def figures(seen: Evidence, frozen: float) -> dict[str, float]:
    """Return the inputs of the model; `frozen` is the leave-one-out accuracy of the frozen head that would be trained."""
    return {
        "log10 images": math.log10(max(seen.images, 1)),
        "log10 images per class": math.log10(max(seen.images / seen.classes, 1)),
        "log10 parameters": math.log10(max(seen.parameters, 1)),
        "log odds of the frozen head": log_odds(frozen, seen.sampled),
        "head similarity": seen.head_similarity or 0.0,
        "slope": 10 * seen.slope,
        "gain of the tangent probe": seen.tangent_gain,
        "error of the tangent probe": seen.tangent_error,
    }


def ranged(seen: Evidence, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures whose range in the rows of the fit matters; classes are no input of the model, but have one, too."""
    return {name: value for name, value in {**figures, "log10 classes": math.log10(max(seen.classes, 1))}.items() if name in RANGES}


@dataclass(frozen=True)
class Prediction:
    """What fine-tuning is expected to win against the frozen head, as shares (0 to 1).

    Attributes:
        frozen, tuned: expected accuracies.
        gain, low, high: expected tuned minus frozen, with its central 80 % interval.
        frozen_regret, tuned_regret: expected loss of choosing either.
        within: calibrated probability that the frozen head is not worse by more than the tolerance; safe: that fine-tuning is not.
        outside: what lies outside the data that the model was fitted on.
    """

    frozen: float
    tuned: float
    gain: float
    low: float
    high: float
    frozen_regret: float
    tuned_regret: float
    within: float
    safe: float
    outside: tuple[OutOfRange, ...]


@dataclass(frozen=True)
class GainPredictor:
    """The fitted model.

    Attributes:
        center, spread, coefficients: of each figure; intercept.
        deviation: standard deviation of what the figures leave unexplained, on data sets that the fit has not seen (log odds).
        slant, offset: calibration of the probability: log odds of `within` are slant * raw + offset (Platt 1999).
        settled_slant, settled_offset: calibration of the probability that what is chosen is within the tolerance of the best of all arms.
        heads: what frozen heads win against each other (see head_gain): (at S = 0, slope by S, spread), as shares.
        lag: for each look of a race how far what it sees is behind the end, and the spread of that, as shares of the frozen head's errors.
        lowest, highest: range of each figure in the rows of the fit.
        rows, data: what it was fitted on.
    """

    center: Mapping[str, float]
    spread: Mapping[str, float]
    coefficients: Mapping[str, float]
    intercept: float
    deviation: float
    slant: float
    offset: float
    settled_slant: float
    settled_offset: float
    heads: Mapping[str, Sequence[float]]
    lag: Sequence[Sequence[float]]
    lowest: Mapping[str, float]
    highest: Mapping[str, float]
    rows: int
    data: Sequence[str]

    def head_gain(self, name: str, seen: Evidence) -> float:
        """Return what a frozen head is expected to win against another, as a share: cut or multi against last, over: multi against cut.

        What was measured on other data and what the probes say here, each weighted by its precision: with 80 images a paired difference of
        8 points is within the noise, but it is also what is usual.
        """
        level, slope, spread = self.heads[name]
        usual = level + slope * (seen.head_similarity or 0.0)
        measured, error = float(getattr(seen, f"{name}_gain")), float(getattr(seen, f"{name}_error"))
        return (usual * error**2 + measured * spread**2) / (error**2 + spread**2)

    def _within_range(self, x: dict[str, float]) -> dict[str, float]:
        """Return the figures brought to the edge of what the fit has seen: a line is not trusted beyond its points.

        The size is left as it is: that more images speak for fine-tuning is known without a fit.
        """
        return x | {name: float(np.clip(value, *self._edges(name))) for name, value in x.items() if name not in GROWING}

    def _edges(self, name: str) -> tuple[float, float]:
        low, high = self.lowest.get(name, -math.inf), self.highest.get(name, math.inf)
        margin = MARGIN * (high - low) if math.isfinite(high - low) else 0.0
        return low - margin, high + margin

    def _beyond(self, seen: Evidence, frozen: float) -> dict[str, float]:
        """Return by how many of their ranges figures lie beyond what the fit has seen."""
        out = {}
        for name, value in ranged(seen, figures(seen, frozen)).items():
            low, high = self._edges(name)
            if not low <= value <= high:
                width = max(self.highest[name] - self.lowest[name], 0.1)
                out[name] = max(low - value, value - high) / width
        return out

    def unexplained(self, seen: Evidence, frozen: float, size: bool = False) -> float:
        """Return the deviation of the shift (log odds): more where the network or the labels are unlike what the fit has seen.

        Args:
            size: whether the number of images counts as well. It does where doubt itself is asked for; in a prediction it would make more
                images speak against fine-tuning.
        """
        far = min(sum(ranges for name, ranges in self._beyond(seen, frozen).items() if size or name not in GROWING), FARTHEST)
        return math.hypot(self.deviation, UNKNOWN * far)

    def shift(self, seen: Evidence, frozen: float) -> float:
        """Return the expected log odds of fine-tuning minus those of the frozen head."""
        x = self._within_range(figures(seen, frozen))
        return self.intercept + sum(self.coefficients[k] * (x[k] - self.center[k]) / self.spread[k] for k in self.coefficients)

    def gains(self, seen: Evidence, frozen: float, size: bool = False) -> Matrix:
        """Return equally likely gains of fine-tuning against the frozen head, as shares: (DRAWS,). `size` as in `unexplained`."""
        return self._drawn(seen, frozen, self.unexplained(seen, frozen, size))

    def _drawn(self, seen: Evidence, frozen: float, deviation: float) -> Matrix:
        base = log_odds(frozen, seen.sampled)
        return np.asarray(_share(base + self.shift(seen, frozen) + deviation * QUANTILES) - _share(base))

    def predict(self, seen: Evidence, frozen: float, tolerance: float) -> Prediction:
        """Predict.

        Args:
            seen: the evidence.
            frozen: leave-one-out accuracy of the frozen head that would be trained.
            tolerance: as a share (0 to 1).
        """
        base, gains = log_odds(frozen, seen.sampled), self.gains(seen, frozen)
        # What is unlike the rows is doubted more, and doubt takes no side: spread wide, log odds would pull every gain below zero.
        expected = float(self._drawn(seen, frozen, self.deviation).mean())
        raw = log_odds(float((gains <= tolerance).mean()), DRAWS)
        return Prediction(
            frozen=float(_share(base)),
            tuned=float(_share(base)) + expected,
            gain=expected,
            low=float(np.quantile(gains, 0.1)),
            high=float(np.quantile(gains, 0.9)),
            frozen_regret=float(gains.clip(min=0).mean()),
            tuned_regret=float((-gains).clip(min=0).mean()),
            within=float(_share(self.slant * raw + self.offset)),
            safe=float((-gains <= tolerance).mean()),
            outside=self.outside(seen, frozen),
        )

    def settled(self, own: float) -> float:
        """Return P(what is chosen is not worse than the best of all arms by more than the tolerance).

        Args:
            own: what the prediction, or the last look of a race, gives what is chosen of not being worse than the other way by more than that.
        """
        return float(_share(self.settled_slant * log_odds(own, DRAWS) + self.settled_offset))

    def outside(self, seen: Evidence, frozen: float) -> tuple[OutOfRange, ...]:
        """Return the figures that lie outside the rows of the fit by more than a tenth of their range; counts as counts, not as logarithms."""

        def plain(name: str, value: float) -> float:
            return round(10**value if name.startswith("log10 ") else value, 2)

        values = ranged(seen, figures(seen, frozen))
        out = [
            OutOfRange(name.removeprefix("log10 "), *(plain(name, v) for v in (values[name], self.lowest[name], self.highest[name])))
            for name in self._beyond(seen, frozen)
        ]
        if seen.head_similarity is None and self.data:
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


# Knows nothing: fine-tuning is as good as the frozen head, give or take. Where the fit starts from.
NEUTRAL = GainPredictor(
    center={},
    spread={},
    coefficients={},
    intercept=0.0,
    deviation=1.0,
    slant=1.0,
    offset=0.0,
    settled_slant=1.0,
    settled_offset=0.0,
    heads=dict.fromkeys(HEADS, (0.0, 0.0, 0.05)),
    lag=((0.5, 0.5), (0.2, 0.3), (0.0, 0.05)),
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
