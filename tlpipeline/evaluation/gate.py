"""The gate: is the challenger really better than the champion? A paired test on the same test images, not a comparison of two numbers.

Where classes are so uneven that training weighs them alike, they count alike here, too: by balanced accuracy. Always saying the largest class is
right on most images then, and a model that finds the others must not lose against it.
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
    """Test images that count alike: all of them for accuracy, those of one class for balanced accuracy.

    Attributes:
        images: how many; wins, losses: of these only the challenger, or only the champion, classifies correctly.
        share: of the stratum in the metric; the shares of all strata add up to 1.
    """

    images: int
    wins: int
    losses: int
    share: float

    @property
    def difference(self) -> float:
        """Challenger minus champion, in the metric."""
        return self.share * (self.wins - self.losses) / self.images


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        accepted: whether the challenger may be registered.
        champion: name of the version that it was compared with, or `the majority class`.
        images: that both were tested on; left_out: test images that the champion was trained on.
        metric: accuracy, or balanced_accuracy (the mean of the classes' recalls).
        challenger_score, champion_score: the metric on these images.
        wins, losses: images that only the challenger, or only the champion, classifies correctly.
        p_value: one-sided, of the rule's null hypothesis.
        low, high: 90 % interval of the difference in the metric, in percentage points.
        new_classes: classes that the champion does not know; their images are not compared.
        reason: one English sentence with the numbers.
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
    """Judge the first model: it must be significantly better than always saying the largest training class.

    Args:
        uneven: training weighed classes alike; by `metric: auto` they count alike here as well.
    """
    constant = challenger.labels == challenger.classes.index(majority)
    return _judge(challenger.correct, constant, challenger.labels, MAJORITY, 0, (), rule, "better", uneven)


def compare_with_champion(
    challenger: Predictions, champion: Predictions, name: str, trained_on: frozenset[str], rule: GateParams, uneven: bool = False
) -> Verdict:
    """Judge a challenger against the champion on the same test images.

    Images that the champion was trained on are left out, and so are classes that it does not know (they are named).

    Args:
        uneven: as in `against_majority`.

    Raises:
        AssertionError: the two were not given the same images in the same order.
    """
    assert challenger.md5 == champion.md5, "both must predict the same images"
    unknown = champion.labels < 0
    new = tuple(sorted({challenger.classes[i] for i in challenger.labels[unknown]}))
    seen = np.array([md5 in trained_on for md5 in challenger.md5], dtype=bool)
    kept = ~seen & ~unknown
    left_out = int(seen.sum())
    return _judge(challenger.correct[kept], champion.correct[kept], challenger.labels[kept], name, left_out, new, rule, rule.rule, uneven)


def _judge(
    a: Any, b: Any, labels: Labels, champion: str, left_out: int, new: tuple[str, ...], rule: GateParams, kind: str, uneven: bool
) -> Verdict:
    metric = (BALANCED if uneven else ACCURACY) if rule.metric == AUTO else rule.metric
    parts = strata(a, b, labels, metric)
    n, wins, losses = len(a), sum(part.wins for part in parts), sum(part.losses for part in parts)
    margin = rule.margin / 100 if kind == "not_worse" else 0.0
    p_value, test = _p_value(parts, margin, rule)
    score, other = (_score(right, labels, metric) for right in (a, b))
    accepted = n > 0 and p_value < rule.alpha
    low, high = _interval(parts)
    claim = f"better than {champion}" if kind == "better" else f"not worse than {champion} by {rule.margin:g} points"
    reason = (
        f"{'accepted' if accepted else 'rejected'}: {'balanced accuracy ' if metric == BALANCED else ''}{score:.1%} against {other:.1%} "
        f"of {champion} on the same {n} test images ({wins} won, {losses} lost, difference {low:+.1f} to {high:+.1f} points), "
        f"{'' if accepted else 'not '}significantly {claim} ({_shown(p_value)}, {test}, alpha {rule.alpha:g})"
    )
    if not n:
        reason = f"rejected: no test image can be compared with {champion}; register it as a model of its own (data.name in params.yaml)"
    if left_out:
        reason += f"; {left_out} images that {champion} was trained on are left out"
    if new:
        reason += f"; not compared: {', '.join(new)}, new since {champion}"
    return Verdict(accepted, champion, n, left_out, metric, score, other, wins, losses, p_value, low, high, new, reason + ".")


def strata(a: Any, b: Any, labels: Labels, metric: str) -> list[Stratum]:
    """Return the test images by what they count in the metric.

    Args:
        a, b: whether challenger and champion are right, of each image (n,).
        labels: classes (n,).
    """
    groups = [labels == label for label in np.unique(labels)] if metric == BALANCED else [np.ones(len(a), dtype=bool)] * (len(a) > 0)
    return [Stratum(int(g.sum()), int((a & ~b & g).sum()), int((~a & b & g).sum()), 1 / len(groups)) for g in groups]


def _score(right: Any, labels: Labels, metric: str) -> float:
    if not len(right):
        return 0.0
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]) if metric == BALANCED else right.mean())


def _shown(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= 1e-12 else "p < 1e-12"


def _p_value(parts: Sequence[Stratum], margin: float, rule: GateParams) -> tuple[float, str]:
    """One-sided p-value of `the challenger is not better than the champion minus margin`, and the name of the test."""
    from scipy.stats import binomtest, norm

    seen = sum(part.difference for part in parts)
    if rule.test == "bootstrap":
        return (_p_of_draws(_bootstrap(parts) <= -margin) if parts else 1.0), "paired bootstrap"
    if margin == 0 and len(parts) <= 1:
        wins, losses = sum(part.wins for part in parts), sum(part.losses for part in parts)
        return (float(binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue) if wins + losses else 1.0), "exact McNemar test"
    if margin == 0:
        # McNemar's null, that who wins an image is a coin's throw, for images that do not count alike.
        rng = np.random.default_rng(0)
        thrown = sum(
            part.share * (2 * rng.binomial(part.wins + part.losses, 0.5, DRAWS) - part.wins - part.losses) / part.images for part in parts
        )
        return _p_of_draws(thrown >= seen - 1e-12), "paired permutation test"
    # Non-inferiority of paired proportions: Tango's score test (1998), the probability of a loss estimated under the null difference. The scores of
    # several strata add up.
    null, spread = -margin, 0.0
    for part in parts:
        n, wins, losses = part.images, part.wins, part.losses
        a2, b2, c2 = 2 * n, -wins - losses + (2 * n - wins + losses) * null, -losses * null * (1 - null)
        lost = (math.sqrt(max(b2 * b2 - 4 * a2 * c2, 0.0)) - b2) / (2 * a2)
        spread += (part.share / n) ** 2 * max(n * (2 * lost + null * (1 - null)), 1e-12)
    return (float(norm.sf((seen - null) / math.sqrt(spread))) if parts else 1.0), "paired score test"


def _p_of_draws(drawn: Any) -> float:
    """The p-value that draws under the null leave possible: never 0."""
    return float((1 + drawn.sum()) / (1 + len(drawn)))


def _bootstrap(parts: Sequence[Stratum]) -> Any:
    # Only the number of wins, losses and ties matters: a multinomial draw instead of n indices.
    rng, drawn = np.random.default_rng(0), np.zeros(DRAWS)
    for part in parts:
        shares = [part.wins / part.images, part.losses / part.images]
        counts = rng.multinomial(part.images, [*shares, max(0.0, 1 - sum(shares))], size=DRAWS)
        drawn += part.share * (counts[:, 0] - counts[:, 1]) / part.images
    return drawn


def _interval(parts: Sequence[Stratum]) -> tuple[float, float]:
    low, high = np.quantile(_bootstrap(parts), [0.05, 0.95])
    return round(float(low) * 100, 2), round(float(high) * 100, 2)
