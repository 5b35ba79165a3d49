"""The outlook: what fine-tuning would reach on these data, before anything is fine-tuned. A small fitted model, readable as JSON.

Frozen heads are measured by probes. Fine-tuning is predicted: how far it lies above the frozen head, on the scale of log odds, is a linear
function of a few figures of the profile, fitted on the rows of `benchmarks/regret.py` (`python benchmarks/regret.py fit` refits it). On that
scale a head at 98 % leaves little to win whatever the data are: headroom is built in.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipeline.probes import Matrix, paired
from tlpipeline.profiling import Profile, SliceTest

FITTED = Path(__file__).with_name("outlook.json")
FORMAT = 2
DRAWS = 400
HEADS = ("cut", "multi", "over")
GROWING = ("log10 images", "log10 images per class")
# Figures of which the fit must have seen the like, and by how much of their range they may lie beyond it.
RANGES = ("log10 images", "log10 classes", "log10 images per class", "log10 parameters", "head similarity")
MARGIN = 0.1
# How much less is known for each range that a figure lies beyond what was seen (log odds), and at most so many ranges are counted.
UNKNOWN, FARTHEST = 0.25, 2.0
# What is known before anything was probed.
PRIOR = ("log10 images", "log10 images per class", "log10 parameters", "head similarity")


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
        outside: what lies outside the data that the model was fitted on, in words.
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
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Outlook:
    """The fitted model.

    Attributes:
        centre, spread, coefficients: of each figure; intercept.
        deviation: standard deviation of what the figures leave unexplained, on data sets that the fit has not seen (log odds).
        slant, offset: calibration of the probability: log odds of `within` are slant * raw + offset (Platt 1999).
        settled_slant, settled_offset: log odds that what is chosen is within the tolerance of the best of all arms, by log10 images.
        heads: what frozen heads win against each other (see head_gain): (at S = 0, slope by S, spread), as shares.
        lag: for each look of a race how far what it sees is behind the end, and the spread of that, as shares of the frozen head's errors.
        prior: coefficients (on standardised figures) and intercept of the log odds that fine-tuning wins more than the tolerance, from what
            is known before anything was probed.
        lowest, highest: range of each figure in the rows of the fit.
        rows, data: what it was fitted on.
    """

    centre: Mapping[str, float]
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
    prior: Mapping[str, float]
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

    def prior_chance(self, seen: Evidence) -> float:
        """Return P(fine-tuning wins more than the tolerance) from size, classes, capacity and head similarity alone."""
        x = self._within_range(seen, figures(seen, 0.5))
        odds = sum(self.prior.get(k, 0.0) * (x[k] - self.centre[k]) / self.spread[k] for k in PRIOR if k in self.centre)
        return float(_share(self.prior.get("intercept", 0.0) + odds))

    def _within_range(self, seen: Evidence, x: dict[str, float]) -> dict[str, float]:
        """Return the figures, those of RANGES brought to the edge of what the fit has seen: a line is not trusted beyond its points.

        The size is left as it is: that more images speak for fine-tuning is known without a fit.
        """
        bounded = [name for name in ranged(seen, x) if name in x and name not in GROWING]
        return x | {name: float(np.clip(x[name], *self._edges(name))) for name in bounded}

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
        x = self._within_range(seen, figures(seen, frozen))
        return self.intercept + sum(self.coefficients[k] * (x[k] - self.centre[k]) / self.spread[k] for k in self.coefficients)

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

    def settled(self, seen: Evidence) -> float:
        """Return P(what is chosen is not worse than the best of all arms by more than the tolerance).

        Measured on left-out data sets, the number of images tells this: with few of them the best arm is that of the draw. Neither what the
        prediction says of the two arms nor the width of its interval adds to that (docs/log.md).
        """
        return float(_share(self.settled_slant * math.log10(max(seen.images, 1)) + self.settled_offset))

    def outside(self, seen: Evidence, frozen: float) -> tuple[str, ...]:
        """Say which figures lie outside the rows of the fit, by more than a tenth of their range."""
        words = []
        values = ranged(seen, figures(seen, frozen))
        for name in self._beyond(seen, frozen):
            plain = name.removeprefix("log10 ")
            here, least, most = (
                f"{10**v:,.0f}" if name != plain else f"{v:.2f}" for v in (values[name], self.lowest[name], self.highest[name])
            )
            words.append(f"{plain} {here} lies outside the {least} to {most} that the choice was fitted on")
        if seen.head_similarity is None and self.data:
            words.append("without a source head the head similarity is unknown, and the choice was fitted on networks that have one")
        return tuple(words)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Outlook":
        """Read what `to_json` gave."""
        return cls(**{f.name: content[f.name] for f in fields(cls)})


# Knows nothing: fine-tuning is as good as the frozen head, give or take. Where the fit starts from.
NEUTRAL = Outlook(
    centre={},
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
    prior={},
    lowest={},
    highest={},
    rows=0,
    data=(),
)


def _share(odds: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(odds)))


@cache
def fitted() -> Outlook:
    """Return the model that comes with the package."""
    return Outlook.from_json(json.loads(FITTED.read_text(encoding="utf-8")))


# --- fitting --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observed:
    """A row of the fit.

    Attributes:
        data: which data set; evidence: of the profile.
        frozen: leave-one-out accuracy of the frozen head that would be trained.
        frozen_test, tuned_test: what that head and fine-tuning reached on so many test images.
        best_test: what the best of all arms reached there.
        cut_test, multi_test: what the heads of these names won there against the head on the last tap.
        looks: fine-tuning's validation accuracy at the looks of a race, the last one at the end of its schedule; validated: the frozen
            head's; on so many images.
    """

    data: str
    evidence: Evidence
    frozen: float
    frozen_test: float
    tuned_test: float
    test: int
    best_test: float
    cut_test: float
    multi_test: float
    looks: tuple[float, ...]
    validated: float
    validation: int

    @property
    def shift(self) -> float:
        """Log odds of fine-tuning minus those of the frozen head."""
        return log_odds(self.tuned_test, self.test) - log_odds(self.frozen_test, self.test)


def fit(rows: Sequence[Observed], penalty: float, tolerance: float) -> Outlook:
    """Fit by ridge regression; what it leaves unexplained and the calibration are measured on data sets left out one after the other.

    Every data set counts alike, however many rows it has. Outlying shifts are drawn in to three robust deviations.
    """
    model = _ridge(rows, penalty)
    names = sorted({row.data for row in rows})
    if len(names) < 3:
        return model
    held = {name: _ridge([r for r in rows if r.data != name], penalty) for name in names}
    errors = np.array([row.shift - held[row.data].shift(row.evidence, row.frozen) for row in rows])
    model = replace(model, deviation=max(1.4826 * float(np.median(np.abs(errors))), 0.05))
    raw, truth, settled, good = [], [], [], []
    for row in rows:
        seen = replace(held[row.data], deviation=model.deviation).predict(row.evidence, row.frozen, tolerance)
        raw.append(log_odds(seen.within, DRAWS))
        truth.append(row.tuned_test - row.frozen_test <= tolerance)
        tuned = seen.gain > tolerance
        settled.append(math.log10(max(row.evidence.images, 1)))
        good.append((row.tuned_test if tuned else row.frozen_test) >= row.best_test - tolerance)
    slant, offset = _platt(np.array(raw), np.array(truth))
    sizes = np.array(settled)
    settled_slant, settled_offset = _platt(sizes - sizes.mean(), np.array(good), 0.0, (5 * float(sizes.var()), 0.01))
    settled_slant = max(settled_slant, 0.0)
    settled_offset -= settled_slant * float(sizes.mean())
    return replace(
        model,
        slant=slant,
        offset=offset,
        settled_slant=settled_slant,
        settled_offset=round(settled_offset, 4),
        prior=_prior(model, rows, tolerance),
        heads=fit_heads(rows),
        lag=_lag(rows),
    )


def fit_heads(rows: Sequence[Observed]) -> dict[str, tuple[float, float, float]]:
    """Return what frozen heads win against each other (see `Outlook.head_gain`): (level, slope by S, spread), data sets counting alike."""
    weight = _alike(rows)
    s = np.array([r.evidence.head_similarity or 0.0 for r in rows])
    out = {}
    for name in HEADS:
        won = np.array([r.multi_test - r.cut_test if name == "over" else getattr(r, f"{name}_test") for r in rows])
        centre = float(weight @ s)
        slope = float(weight @ ((s - centre) * (won - weight @ won))) / (float(weight @ (s - centre) ** 2) + 0.01)
        level = float(weight @ won) - slope * centre
        spread = math.sqrt(float(weight @ (won - level - slope * s) ** 2))
        out[name] = (round(level, 4), round(slope, 4), round(max(spread, 0.005), 4))
    return out


def _lag(rows: Sequence[Observed]) -> Sequence[Sequence[float]]:
    """Return how far what a look sees is behind the gain in the end, as a share of the frozen head's errors, and the spread of that.

    The middle is that of the gain on the test side minus the difference on validation: it holds what fine-tuning still learns, and that the
    frozen head is solved once more with validation. The spread is that of fine-tuning's own way from the look to its end. Only validations
    that are large enough to tell are used.
    """
    told = [r for r in rows if r.validation >= 60]
    if len(told) < 5:
        return NEUTRAL.lag
    missing = np.array([max(1 - r.frozen, 0.02) for r in told])
    gain = np.array([r.tuned_test - r.frozen_test for r in told])
    out = []
    for part in range(len(told[0].looks)):
        seen = np.array([r.looks[part] - r.validated for r in told])
        way = np.array([r.looks[-1] - r.looks[part] for r in told]) / missing
        middle, spread = float(np.median((gain - seen) / missing)), 1.4826 * float(np.median(np.abs(way - np.median(way))))
        out.append((round(middle, 4), round(spread, 4)))
    return tuple(out)


def _ridge(rows: Sequence[Observed], penalty: float) -> Outlook:
    names = list(figures(rows[0].evidence, rows[0].frozen))
    x = np.array([[figures(r.evidence, r.frozen)[k] for k in names] for r in rows])
    y = np.array([r.shift for r in rows])
    classes = [math.log10(max(r.evidence.classes, 1)) for r in rows]
    middle = np.median(y)
    reach = max(3 * 1.4826 * float(np.median(np.abs(y - middle))), 0.1)
    y = y.clip(middle - reach, middle + reach)
    weight = _alike(rows)
    centre = weight @ x
    spread = np.sqrt(weight @ (x - centre) ** 2).clip(min=1e-3)
    z = (x - centre) / spread
    intercept = float(weight @ y)
    # More images never speak against fine-tuning: a figure of the size whose coefficient comes out negative is left out.
    used = np.ones(len(names), dtype=bool)
    while True:
        beta = np.zeros(len(names))
        inner = z[:, used].T @ (weight[:, None] * z[:, used]) + penalty * np.eye(int(used.sum()))
        beta[used] = np.linalg.solve(inner, z[:, used].T @ (weight * (y - intercept)))
        against = used & (beta < 0) & np.array([name in GROWING for name in names])
        if not against.any():
            break
        used &= ~against
    return Outlook(
        centre=_named(names, centre),
        spread=_named(names, spread),
        coefficients=_named(names, beta),
        intercept=round(intercept, 4),
        deviation=0.5,
        slant=1.0,
        offset=0.0,
        settled_slant=1.0,
        settled_offset=0.0,
        heads=NEUTRAL.heads,
        lag=NEUTRAL.lag,
        prior=NEUTRAL.prior,
        lowest=_named(names, x.min(0)) | {"log10 classes": round(min(classes), 4)},
        highest=_named(names, x.max(0)) | {"log10 classes": round(max(classes), 4)},
        rows=len(rows),
        data=sorted({r.data for r in rows}),
    )


def _prior(model: Outlook, rows: Sequence[Observed], tolerance: float) -> dict[str, float]:
    """Return a logistic regression of `fine-tuning won more than the tolerance` on PRIOR, data sets counting alike; more images never lower it."""
    from scipy.optimize import minimize

    x = np.array([[(figures(r.evidence, 0.5)[k] - model.centre[k]) / model.spread[k] for k in PRIOR] for r in rows])
    won = np.array([r.tuned_test - r.frozen_test > tolerance for r in rows])
    weight = _alike(rows) * len(rows)

    def loss(at: npt.NDArray[np.float64]) -> float:
        odds = x @ at[:-1] + at[-1]
        return float(weight @ np.logaddexp(0, np.where(won, -odds, odds)) + (at[:-1] ** 2).sum() / 2)

    bounds = [(0.0 if name in GROWING else None, None) for name in PRIOR] + [(None, None)]
    found = minimize(loss, np.zeros(len(PRIOR) + 1), bounds=bounds).x
    return _named([*PRIOR, "intercept"], found)


def _alike(rows: Sequence[Observed]) -> npt.NDArray[np.float64]:
    """Return weights of sum one by which every data set counts alike."""
    counts = Counter(r.data for r in rows)
    weight = np.array([1 / counts[r.data] for r in rows])
    return np.asarray(weight / weight.sum())


def _named(names: Sequence[str], values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def _platt(
    raw: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_], expected: float = 1.0, pulls: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """Return slant and offset by logistic regression of the truth on raw values, drawn towards (expected, 0) by these pulls.

    A slant that is expected to be positive cannot become negative.
    """
    from scipy.optimize import minimize

    def loss(at: npt.NDArray[np.float64]) -> float:
        odds = at[0] * raw + at[1]
        pulled = pulls[0] * (at[0] - expected) ** 2 + pulls[1] * at[1] ** 2
        return float(np.logaddexp(0, np.where(truth, -odds, odds)).sum() + pulled / 2)

    slant, offset = minimize(loss, (expected, 0.0), bounds=((0.0 if expected > 0 else None, None), (None, None))).x
    return round(float(slant), 4), round(float(offset), 4)
