"""The gate: is the challenger really better than the champion? A paired test on the same test images, not a comparison of two numbers."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tlpipeline.evaluate import Predictions
from tlpipeline.params import GateParams

DRAWS = 10_000
MAJORITY = "the majority class"


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        accepted: whether the challenger may be registered.
        champion: name of the version that it was compared with, or `the majority class`.
        images: that both were tested on; left_out: test images that the champion was trained on.
        challenger_accuracy, champion_accuracy: on these images.
        wins, losses: images that only the challenger, or only the champion, classifies correctly.
        p_value: one-sided, of the rule's null hypothesis.
        low, high: 90 % interval of the difference in accuracy, in percentage points.
        new_classes: classes that the champion does not know; their images are not compared.
        reason: one English sentence with the numbers.
    """

    accepted: bool
    champion: str
    images: int
    left_out: int
    challenger_accuracy: float
    champion_accuracy: float
    wins: int
    losses: int
    p_value: float
    low: float
    high: float
    new_classes: tuple[str, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def against_majority(challenger: Predictions, majority: str, rule: GateParams) -> Verdict:
    """Judge the first model: it must be significantly better than always saying the largest training class."""
    constant = challenger.labels == challenger.classes.index(majority)
    return _judge(challenger.correct, constant, MAJORITY, 0, (), rule, "better")


def against_champion(challenger: Predictions, champion: Predictions, name: str, trained_on: frozenset[str], rule: GateParams) -> Verdict:
    """Judge a challenger against the champion on the same test images.

    Images that the champion was trained on are left out, and so are classes that it does not know (they are named).

    Raises:
        AssertionError: the two were not given the same images in the same order.
    """
    assert challenger.md5 == champion.md5, "both must predict the same images"
    unknown = champion.labels < 0
    new = tuple(sorted({challenger.classes[i] for i in challenger.labels[unknown]}))
    seen = np.array([md5 in trained_on for md5 in challenger.md5], dtype=bool)
    kept = ~seen & ~unknown
    return _judge(challenger.correct[kept], champion.correct[kept], name, int(seen.sum()), new, rule, rule.rule)


def _judge(a: Any, b: Any, champion: str, left_out: int, new: tuple[str, ...], rule: GateParams, kind: str) -> Verdict:
    n = len(a)
    wins, losses = int((a & ~b).sum()), int((~a & b).sum())
    margin = rule.margin / 100 if kind == "not_worse" else 0.0
    p_value = _p_value(a, b, margin, rule)
    accuracy, other = (float(a.mean()), float(b.mean())) if n else (0.0, 0.0)
    accepted = n > 0 and p_value < rule.alpha
    low, high = _interval(a, b)
    claim = f"better than {champion}" if kind == "better" else f"not worse than {champion} by {rule.margin:g} points"
    test = (
        "exact McNemar test"
        if rule.test == "mcnemar" and margin == 0
        else "paired bootstrap"
        if rule.test == "bootstrap"
        else "paired score test"
    )
    reason = (
        f"{'accepted' if accepted else 'rejected'}: {accuracy:.1%} against {other:.1%} of {champion} on the same {n} test images "
        f"({wins} won, {losses} lost, difference {low:+.1f} to {high:+.1f} points), "
        f"{'' if accepted else 'not '}significantly {claim} ({_shown(p_value)}, {test}, alpha {rule.alpha:g})"
    )
    if not n:
        reason = f"rejected: no test image can be compared with {champion}; register it as a model of its own (data.name in params.yaml)"
    if left_out:
        reason += f"; {left_out} images that {champion} was trained on are left out"
    if new:
        reason += f"; not compared: {', '.join(new)}, new since {champion}"
    return Verdict(accepted, champion, n, left_out, accuracy, other, wins, losses, p_value, low, high, new, reason + ".")


def _shown(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= 1e-12 else "p < 1e-12"


def _p_value(a: Any, b: Any, margin: float, rule: GateParams) -> float:
    """One-sided p-value of `the challenger's accuracy is not more than the champion's minus margin`."""
    from scipy.stats import binomtest, norm

    n = len(a)
    if n == 0:
        return 1.0
    difference = a.astype(float) - b.astype(float)
    if rule.test == "bootstrap":
        drawn = _bootstrap(difference)
        return float((1 + (drawn <= -margin).sum()) / (1 + len(drawn)))
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    if margin == 0:
        return float(binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue) if wins + losses else 1.0
    # Non-inferiority of paired proportions: Tango's score test (1998), the probability of a loss estimated under the null difference.
    null = -margin
    a2, b2, c2 = 2 * n, -wins - losses + (2 * n - wins + losses) * null, -losses * null * (1 - null)
    lost = (math.sqrt(max(b2 * b2 - 4 * a2 * c2, 0.0)) - b2) / (2 * a2)
    variance = n * (2 * lost + null * (1 - null))
    return float(norm.sf((wins - losses - n * null) / math.sqrt(max(variance, 1e-12))))


def _bootstrap(difference: Any) -> Any:
    n = len(difference)
    # Only the number of wins, losses and ties matters: a multinomial draw instead of n indices.
    shares = [(difference > 0).mean(), (difference < 0).mean()]
    drawn = np.random.default_rng(0).multinomial(n, [*shares, max(0.0, 1 - sum(shares))], size=DRAWS)
    return (drawn[:, 0] - drawn[:, 1]) / n


def _interval(a: Any, b: Any) -> tuple[float, float]:
    if not len(a):
        return 0.0, 0.0
    drawn = _bootstrap(a.astype(float) - b.astype(float))
    low, high = np.quantile(drawn, [0.05, 0.95])
    return round(float(low) * 100, 2), round(float(high) * 100, 2)
