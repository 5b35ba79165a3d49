"""How the outlook is fitted: by ridge regression on what data sets were seen to reach, each counting alike.

`python -m research.regret fit` does it on its rows and writes outlook.json; the pipeline itself fits nothing.
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


def fit(rows: Sequence[Observed], penalty: float, tolerance: float) -> GainPredictor:
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
        unseen = replace(held[row.data], deviation=model.deviation)
        seen, gains = unseen.predict(row.evidence, row.frozen, tolerance), unseen.gains(row.evidence, row.frozen)
        raw.append(log_odds(seen.p_frozen_within, DRAWS))
        truth.append(row.tuned_test - row.frozen_test <= tolerance)
        tuned = seen.gain > tolerance
        settled.append(log_odds(float(((-gains if tuned else gains) <= tolerance).mean()), DRAWS))
        good.append((row.tuned_test if tuned else row.frozen_test) >= row.best_test - tolerance)
    platt_slope, platt_intercept = platt_scaling(np.array(raw), np.array(truth))
    choice_platt_slope, choice_platt_intercept = platt_scaling(np.array(settled), np.array(good))
    return replace(
        model,
        platt_slope=platt_slope,
        platt_intercept=platt_intercept,
        choice_platt_slope=choice_platt_slope,
        choice_platt_intercept=choice_platt_intercept,
        heads=fit_heads(rows),
        remaining_gain=_remaining_gain(rows),
    )


def fit_heads(rows: Sequence[Observed]) -> dict[str, tuple[float, float, float]]:
    """Return what frozen heads win against each other (see `GainPredictor.head_gain`): (level, slope by S, spread), data sets counting alike."""
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


def _remaining_gain(rows: Sequence[Observed]) -> Sequence[Sequence[float]]:
    """Return how far what a look sees is behind the gain in the end, as a share of the frozen head's errors, and the spread of that.

    The middle is that of the gain on the test side minus the difference on validation: it holds what fine-tuning still learns, its last
    head, and that both heads are solved once more with validation. The spread is that of fine-tuning's own way from the look to its end. Only validations
    that are large enough to tell are used.
    """
    told = [r for r in rows if r.validation >= 60]
    if len(told) < 5:
        return NEUTRAL.remaining_gain
    missing = np.array([max(1 - r.frozen, 0.02) for r in told])
    gain = np.array([r.tuned_test - r.frozen_test for r in told])
    out = []
    for part in range(len(told[0].looks)):
        seen = np.array([r.looks[part] - r.validated for r in told])
        way = np.array([r.looks[-1] - r.looks[part] for r in told]) / missing
        middle, spread = float(np.median((gain - seen) / missing)), 1.4826 * float(np.median(np.abs(way - np.median(way))))
        out.append((round(middle, 4), round(spread, 4)))
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
    # More images never speak against fine-tuning: a figure of the size whose coefficient comes out negative is left out.
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
        platt_slope=1.0,
        platt_intercept=0.0,
        choice_platt_slope=1.0,
        choice_platt_intercept=0.0,
        heads=NEUTRAL.heads,
        remaining_gain=NEUTRAL.remaining_gain,
        lowest=_named(names, x.min(0)) | {"log10 classes": round(min(classes), 4)},
        highest=_named(names, x.max(0)) | {"log10 classes": round(max(classes), 4)},
        rows=len(rows),
        data=sorted({r.data for r in rows}),
    )


def _alike(rows: Sequence[Observed]) -> npt.NDArray[np.float64]:
    """Return weights of sum one by which every data set counts alike."""
    counts = Counter(r.data for r in rows)
    weight = np.array([1 / counts[r.data] for r in rows])
    return np.asarray(weight / weight.sum())


def _named(names: Sequence[str], values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def platt_scaling(raw: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return platt_slope (not negative) and platt_intercept by logistic regression of the truth on raw log odds, drawn towards 1 and 0: believing them."""
    from scipy.optimize import minimize

    def loss(at: npt.NDArray[np.float64]) -> float:
        odds = at[0] * raw + at[1]
        return float(np.logaddexp(0, np.where(truth, -odds, odds)).sum() + ((at[0] - 1) ** 2 + at[1] ** 2) / 2)

    platt_slope, platt_intercept = minimize(loss, (1.0, 0.0), bounds=((0.0, None), (None, None))).x
    return round(float(platt_slope), 4), round(float(platt_intercept), 4)
