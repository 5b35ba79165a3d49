"""The fit of the gain predictor: ridge regression on the rows of many data sets, each data set with the same weight.

`python -m research.regret fit` runs it on the committed rows. The package itself fits nothing.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tlpipeline.choice.predictor import DRAWS, GROWING, HEADS, NEUTRAL, UNUSED, Evidence, GainPredictor, figures, log_odds


@dataclass(frozen=True)
class Observed:
    """A row of the fit.

    All accuracies are between 0 and 1.

    Attributes:
        data: name of the data set.
        evidence: of the profile.
        frozen: leave-one-out accuracy of the frozen head that would be trained.
        frozen_test: test accuracy of that head.
        tuned_test: test accuracy of fine-tuning.
        test: number of test images.
        best_test: test accuracy of the best arm.
        cut_test, multi_test: test accuracy of these heads minus that of the head on the last tap.
        looks: validation accuracy of fine-tuning at the interim analyses of a race; the last one is at the end of the schedule.
        validated: validation accuracy of the frozen head.
        validation: number of validation images.
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
        """Log odds of the test accuracy of fine-tuning minus those of the frozen head."""
        return log_odds(self.tuned_test, self.test) - log_odds(self.frozen_test, self.test)


def fit(rows: Sequence[Observed], penalty: float, tolerance: float) -> GainPredictor:
    """Fit by ridge regression; the residual deviation and the calibration are measured by leaving out one data set at a time.

    Each data set has the same weight, however many rows it has. Outlying shifts are clipped to three robust deviations.

    Args:
        rows: of at least three data sets, or the predictor is not calibrated.
        penalty: of the ridge regression, on standardized figures.
        tolerance: accuracy (0 to 1) by which a choice may be worse than the best.
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
        unseen = replace(held[row.data], deviation=model.deviation)
        seen, gains = unseen.predict(row.evidence, row.frozen, tolerance), unseen.gains(row.evidence, row.frozen)
        raw.append(log_odds(seen.within, DRAWS))
        truth.append(row.tuned_test - row.frozen_test <= tolerance)
        tuned = seen.gain > tolerance
        settled.append(log_odds(float(((-gains if tuned else gains) <= tolerance).mean()), DRAWS))
        good.append((row.tuned_test if tuned else row.frozen_test) >= row.best_test - tolerance)
    slant, offset = _platt(np.array(raw), np.array(truth))
    settled_slant, settled_offset = _platt(np.array(settled), np.array(good))
    return replace(
        model,
        slant=slant,
        offset=offset,
        settled_slant=settled_slant,
        settled_offset=settled_offset,
        heads=fit_heads(rows),
        lag=_lag(rows),
    )


def fit_heads(rows: Sequence[Observed]) -> dict[str, tuple[float, float, float]]:
    """Return (level, slope by head similarity, spread) of the gain of one frozen head over another (see `GainPredictor.head_gain`)."""
    weight = _alike(rows)
    s = np.array([r.evidence.head_similarity or 0.0 for r in rows])
    out = {}
    for name in HEADS:
        won = np.array([r.multi_test - r.cut_test if name == "over" else getattr(r, f"{name}_test") for r in rows])
        center = float(weight @ s)
        slope = float(weight @ ((s - center) * (won - weight @ won))) / (float(weight @ (s - center) ** 2) + 0.01)
        level = float(weight @ won) - slope * center
        spread = math.sqrt(float(weight @ (won - level - slope * s) ** 2))
        out[name] = (round(level, 4), round(slope, 4), round(max(spread, 0.005), 4))
    return out


def _lag(rows: Sequence[Observed]) -> Sequence[Sequence[float]]:
    """Return for each interim analysis (center, spread) of the gain that is still to come, as a share of the errors of the frozen head.

    The center is the median of the gain on the test images minus the difference on the validation images. It includes what fine-tuning
    still learns, its last head, and that both heads are solved again with the validation images. The spread is that of the validation
    accuracy of fine-tuning from the analysis to the end. Only rows with at least 60 validation images are used.
    """
    large = [r for r in rows if r.validation >= 60]
    if len(large) < 5:
        return NEUTRAL.lag
    missing = np.array([max(1 - r.frozen, 0.02) for r in large])
    gain = np.array([r.tuned_test - r.frozen_test for r in large])
    out = []
    for part in range(len(large[0].looks)):
        difference = np.array([r.looks[part] - r.validated for r in large])
        remaining = np.array([r.looks[-1] - r.looks[part] for r in large]) / missing
        center = float(np.median((gain - difference) / missing))
        spread = 1.4826 * float(np.median(np.abs(remaining - np.median(remaining))))
        out.append((round(center, 4), round(spread, 4)))
    return tuple(out)


def _ridge(rows: Sequence[Observed], penalty: float) -> GainPredictor:
    names = list(figures(rows[0].evidence, rows[0].frozen))
    x = np.array([[figures(r.evidence, r.frozen)[k] for k in names] for r in rows])
    y = np.array([r.shift for r in rows])
    classes = [math.log10(max(r.evidence.classes, 1)) for r in rows]
    middle = np.median(y)
    reach = max(3 * 1.4826 * float(np.median(np.abs(y - middle))), 0.1)
    y = y.clip(middle - reach, middle + reach)
    weight = _alike(rows)
    center = weight @ x
    spread = np.sqrt(weight @ (x - center) ** 2).clip(min=1e-3)
    z = (x - center) / spread
    intercept = float(weight @ y)
    # More images never count against fine-tuning: a figure of size with a negative coefficient is dropped.
    used = np.array([name not in UNUSED for name in names])
    while True:
        beta = np.zeros(len(names))
        inner = z[:, used].T @ (weight[:, None] * z[:, used]) + penalty * np.eye(int(used.sum()))
        beta[used] = np.linalg.solve(inner, z[:, used].T @ (weight * (y - intercept)))
        against = used & (beta < 0) & np.array([name in GROWING for name in names])
        if not against.any():
            break
        used &= ~against
    return GainPredictor(
        center=_named(names, center),
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
        lowest=_named(names, x.min(0)) | {"log10 classes": round(min(classes), 4)},
        highest=_named(names, x.max(0)) | {"log10 classes": round(max(classes), 4)},
        rows=len(rows),
        data=sorted({r.data for r in rows}),
    )


def _alike(rows: Sequence[Observed]) -> npt.NDArray[np.float64]:
    """Return weights of sum one by which each data set counts the same."""
    counts = Counter(r.data for r in rows)
    weight = np.array([1 / counts[r.data] for r in rows])
    return np.asarray(weight / weight.sum())


def _named(names: Sequence[str], values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def _platt(raw: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return slope (not negative) and intercept of Platt scaling: logistic regression of the truth on raw log odds, shrunk to 1 and 0."""
    from scipy.optimize import minimize

    def loss(at: npt.NDArray[np.float64]) -> float:
        odds = at[0] * raw + at[1]
        return float(np.logaddexp(0, np.where(truth, -odds, odds)).sum() + ((at[0] - 1) ** 2 + at[1] ** 2) / 2)

    slant, offset = minimize(loss, (1.0, 0.0), bounds=((0.0, None), (None, None))).x
    return round(float(slant), 4), round(float(offset), 4)
