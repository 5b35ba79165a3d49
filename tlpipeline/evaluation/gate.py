"""The gate: is the new model (challenger) better than the present one (champion)? A paired test on the same test images.

Where classes are so uneven that training gives them equal weight, the gate compares balanced accuracy. Predicting only the largest class
would have a high accuracy there, and must not win against a model that finds the other classes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tlpipeline.evaluation.metrics import Labels, Predictions
from tlpipeline.params import AUTO, GateParams

DRAWS = 10_000
MAJORITY = "the majority class"
ACCURACY, BALANCED = "accuracy", "balanced_accuracy"


@dataclass(frozen=True)
class Stratum:
    """Test images with equal weight: all of them for accuracy, those of one class for balanced accuracy.

    Attributes:
        images: their number.
        wins, losses: images that only the challenger, or only the champion, classifies correctly.
        share: weight of the stratum in the metric; the shares of all strata sum to 1.
    """

    images: int
    wins: int
    losses: int
    share: float

    @property
    def difference(self) -> float:
        """Challenger minus champion in the metric."""
        return self.share * (self.wins - self.losses) / self.images


@dataclass(frozen=True)
class Verdict:
    """The result of the gate.

    Attributes:
        accepted: whether the challenger may be registered.
        champion: version that it was compared with, or `the majority class`.
        images: number of compared test images.
        left_out: test images that the champion was trained on.
        metric: accuracy, or balanced_accuracy (the mean of the classes' recalls).
        challenger_score, champion_score: the metric on the compared images.
        wins, losses: images that only the challenger, or only the champion, classifies correctly.
        p_value: one-sided, under the rule's null hypothesis.
        low, high: 90% interval of the difference in the metric, in percentage points.
        new_classes: classes that the champion does not know; their images are not compared.
        reason: one sentence with the numbers.
    """

    accepted: bool
    champion: str
    images: int
    left_out: int
    metric: str
    challenger_score: float
    champion_score: float
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


def compare_with_majority(challenger: Predictions, majority: str, rule: GateParams, uneven: bool = False) -> Verdict:
    """Compare the first model with always predicting the largest training class; it must be significantly better.

    Args:
        challenger: on the test split.
        majority: the largest training class.
        rule: settings of the gate.
        uneven: training weighted the classes equally; with `metric: auto`, the gate then uses balanced accuracy.
    """
    constant = challenger.labels == challenger.classes.index(majority)
    return _compare(challenger.correct, constant, challenger.labels, MAJORITY, 0, (), rule, "better", uneven)


def compare_with_champion(
    challenger: Predictions, champion: Predictions, name: str, trained_on: frozenset[str], rule: GateParams, uneven: bool = False
) -> Verdict:
    """Compare a challenger with the champion on the same test images.

    Images that the champion was trained on are left out, and so are classes that it does not know.

    Args:
        challenger, champion: on the same images in the same order.
        name: of the champion.
        trained_on: md5s of the champion's training and validation images.
        rule: settings of the gate.
        uneven: as in `compare_with_majority`.

    Raises:
        AssertionError: the images differ.
    """
    assert challenger.md5 == champion.md5, "both must predict the same images"
    unknown = champion.labels < 0
    new_classes = tuple(sorted({challenger.classes[i] for i in challenger.labels[unknown]}))
    was_trained_on = np.array([md5 in trained_on for md5 in challenger.md5], dtype=bool)
    compared = ~was_trained_on & ~unknown
    left_out = int(was_trained_on.sum())
    return _compare(
        challenger.correct[compared],
        champion.correct[compared],
        challenger.labels[compared],
        name,
        left_out,
        new_classes,
        rule,
        rule.rule,
        uneven,
    )


def _compare(
    challenger_correct: Any,
    champion_correct: Any,
    labels: Labels,
    champion: str,
    left_out: int,
    new_classes: tuple[str, ...],
    rule: GateParams,
    claim_kind: str,
    balanced: bool,
) -> Verdict:
    metric = (BALANCED if balanced else ACCURACY) if rule.metric == AUTO else rule.metric
    parts = strata(challenger_correct, champion_correct, labels, metric)
    n, wins, losses = len(challenger_correct), sum(part.wins for part in parts), sum(part.losses for part in parts)
    margin = rule.margin / 100 if claim_kind == "not_worse" else 0.0
    p_value, test = _p_value(parts, margin, rule)
    score, champion_score = (_score(correct, labels, metric) for correct in (challenger_correct, champion_correct))
    accepted = n > 0 and p_value < rule.alpha
    low, high = _interval(parts)
    claim = f"better than {champion}" if claim_kind == "better" else f"not worse than {champion} by {rule.margin:g} points"
    reason = (
        f"{'accepted' if accepted else 'rejected'}: {'balanced accuracy ' if metric == BALANCED else ''}{score:.1%} against {champion_score:.1%} "
        f"of {champion} on the same {n} test images ({wins} won, {losses} lost, difference {low:+.1f} to {high:+.1f} points), "
        f"{'' if accepted else 'not '}significantly {claim} ({_format_p(p_value)}, {test}, alpha {rule.alpha:g})"
    )
    if not n:
        reason = f"rejected: no test image can be compared with {champion}; register it under another name (data.name in params.yaml)"
    if left_out:
        reason += f"; {left_out} images that {champion} was trained on are left out"
    if new_classes:
        reason += f"; not compared: {', '.join(new_classes)}, new since {champion}"
    return Verdict(
        accepted, champion, n, left_out, metric, score, champion_score, wins, losses, p_value, low, high, new_classes, reason + "."
    )


def strata(challenger_correct: Any, champion_correct: Any, labels: Labels, metric: str) -> list[Stratum]:
    """Group the test images by their weight in the metric.

    Args:
        challenger_correct, champion_correct: whether each is right about each image (n,).
        labels: class indices (n,).
        metric: accuracy or balanced_accuracy.
    """
    groups = (
        [labels == label for label in np.unique(labels)]
        if metric == BALANCED
        else [np.ones(len(challenger_correct), dtype=bool)] * (len(challenger_correct) > 0)
    )
    return [
        Stratum(
            int(group.sum()),
            int((challenger_correct & ~champion_correct & group).sum()),
            int((~challenger_correct & champion_correct & group).sum()),
            1 / len(groups),
        )
        for group in groups
    ]


def _score(correct: Any, labels: Labels, metric: str) -> float:
    if not len(correct):
        return 0.0
    return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]) if metric == BALANCED else correct.mean())


def _format_p(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= 1e-12 else "p < 1e-12"


def _p_value(parts: Sequence[Stratum], margin: float, rule: GateParams) -> tuple[float, str]:
    """Return the one-sided p-value of `the challenger is not better than the champion minus margin`, and the name of the test."""
    from scipy.stats import binomtest, norm

    observed = sum(part.difference for part in parts)
    if rule.test == "bootstrap":
        return (_p_of_draws(_bootstrap(parts) <= -margin) if parts else 1.0), "paired bootstrap"
    if margin == 0 and len(parts) <= 1:
        wins, losses = sum(part.wins for part in parts), sum(part.losses for part in parts)
        return (float(binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue) if wins + losses else 1.0), "exact McNemar test"
    if margin == 0:
        # McNemar's null hypothesis: a coin toss decides who wins an image. Here images have different weights.
        rng = np.random.default_rng(0)
        permuted = sum(
            part.share * (2 * rng.binomial(part.wins + part.losses, 0.5, DRAWS) - part.wins - part.losses) / part.images for part in parts
        )
        return _p_of_draws(permuted >= observed - 1e-12), "paired permutation test"
    # Non-inferiority of paired proportions by Tango's score test (1998): the probability of a loss is estimated under the null
    # difference. The scores of several strata are summed.
    null, variance = -margin, 0.0
    for part in parts:
        n, wins, losses = part.images, part.wins, part.losses
        a2, b2, c2 = 2 * n, -wins - losses + (2 * n - wins + losses) * null, -losses * null * (1 - null)
        loss_probability = (math.sqrt(max(b2 * b2 - 4 * a2 * c2, 0.0)) - b2) / (2 * a2)
        variance += (part.share / n) ** 2 * max(n * (2 * loss_probability + null * (1 - null)), 1e-12)
    return (float(norm.sf((observed - null) / math.sqrt(variance))) if parts else 1.0), "paired score test"


def _p_of_draws(at_least_as_extreme: Any) -> float:
    """Return the p-value from draws under the null hypothesis: never 0."""
    return float((1 + at_least_as_extreme.sum()) / (1 + len(at_least_as_extreme)))


def _bootstrap(parts: Sequence[Stratum]) -> Any:
    # Only the numbers of wins, losses and ties matter: one multinomial draw replaces n indices.
    rng, differences = np.random.default_rng(0), np.zeros(DRAWS)
    for part in parts:
        shares = [part.wins / part.images, part.losses / part.images]
        counts = rng.multinomial(part.images, [*shares, max(0.0, 1 - sum(shares))], size=DRAWS)
        differences += part.share * (counts[:, 0] - counts[:, 1]) / part.images
    return differences


def _interval(parts: Sequence[Stratum]) -> tuple[float, float]:
    low, high = np.quantile(_bootstrap(parts), [0.05, 0.95])
    return round(float(low) * 100, 2), round(float(high) * 100, 2)
