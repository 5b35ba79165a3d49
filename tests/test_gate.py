"""The gate: exact paired tests against references, errors no more often than promised, only fair images compared."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, norm

from tlpipeline.evaluation.gate import MAJORITY, Verdict, compare_with_champion, compare_with_majority
from tlpipeline.evaluation.metrics import Predictions
from tlpipeline.params import GateParams

BETTER = GateParams(rule="better", test="mcnemar", metric="auto", alpha=0.05, margin=2.0, promote="manual")
NOT_WORSE = replace(BETTER, rule="not_worse")
BOOTSTRAP = replace(BETTER, test="bootstrap")


def answers(correct: np.ndarray, labels: np.ndarray | None = None, classes: tuple[str, ...] = ("a", "b", "c")) -> Predictions:
    """Predictions that are right where this says so; elsewhere the next class is predicted."""
    correct = np.asarray(correct, dtype=bool)
    labels = np.arange(len(correct)) % len(classes) if labels is None else np.asarray(labels)
    guessed = np.where(correct, labels, labels + 1) % len(classes)
    chances = np.full((len(correct), len(classes)), 0.1, dtype=np.float32)
    chances[np.arange(len(correct)), guessed] = 0.9
    return Predictions(tuple(f"{i:032x}" for i in range(len(correct))), classes, labels, chances)


def counted(wins: int, losses: int, both: int, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which images challenger and champion get right."""
    challenger = np.array([True] * wins + [False] * losses + [True] * both + [False] * neither)
    champion = np.array([False] * wins + [True] * losses + [True] * both + [False] * neither)
    return challenger, champion


def judged(challenger: np.ndarray, champion: np.ndarray, rule: GateParams, trained_on: frozenset[str] = frozenset()) -> Verdict:
    return compare_with_champion(answers(challenger), answers(champion), "net@v1", trained_on, rule)


# --- the p-values ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(12, 3), (3, 12), (5, 5), (1, 0), (0, 1), (40, 25)])
def test_better_is_the_exact_mcnemar_test(wins: int, losses: int) -> None:
    verdict = judged(*counted(wins, losses, both=50, neither=7), BETTER)
    assert verdict.p_value == pytest.approx(binomtest(wins, wins + losses, alternative="greater").pvalue)
    assert (verdict.wins, verdict.losses, verdict.images) == (wins, losses, wins + losses + 57)
    assert verdict.accepted is (verdict.p_value < 0.05)


def restricted(wins: int, losses: int, n: int, margin: float) -> float:
    """Tango's score test with the likelihood maximized by search among all pairs of proportions whose difference is -margin."""
    ties = n - wins - losses

    def unlikelihood(lost: float) -> float:
        return -sum(k * math.log(p) for k, p in ((wins, lost - margin), (losses, lost), (ties, 1 - 2 * lost + margin)) if k)

    lost = minimize_scalar(unlikelihood, bounds=(margin, (1 + margin) / 2), method="bounded", options={"xatol": 1e-12}).x
    spread = math.sqrt(n * (2 * lost - margin - margin**2))
    return float(norm.sf((wins - losses + n * margin) / spread))


@pytest.mark.parametrize("margin", [0.5, 2.0, 10.0])
@pytest.mark.parametrize(
    ("wins", "losses", "ties"), [(12, 3, 85), (3, 12, 85), (9, 9, 282), (0, 4, 96), (4, 0, 96), (0, 0, 150), (1, 1, 8)]
)
def test_not_worse_is_the_score_test_at_the_restricted_maximum(wins: int, losses: int, ties: int, margin: float) -> None:
    verdict = judged(*counted(wins, losses, both=ties), replace(NOT_WORSE, margin=margin))
    assert verdict.p_value == pytest.approx(restricted(wins, losses, wins + losses + ties, margin / 100), abs=1e-6)


def test_not_worse_by_nothing_is_better() -> None:
    pair = counted(15, 4, both=60)
    assert judged(*pair, replace(NOT_WORSE, margin=0.0)).p_value == judged(*pair, BETTER).p_value


def test_the_bootstrap_is_that_of_resampled_images() -> None:
    """Its p-value against the exact probability that 30 images drawn with replacement show no advantage."""
    wins, losses, n = 8, 3, 30
    decided = (wins + losses) / n
    exact = sum(binom.pmf(k, n, decided) * binom.cdf(k // 2, k, wins / (wins + losses)) for k in range(n + 1))
    assert judged(*counted(wins, losses, both=19), BOOTSTRAP).p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_the_bootstrap_draws_the_same_every_time() -> None:
    assert judged(*counted(8, 3, both=19), BOOTSTRAP) == judged(*counted(8, 3, both=19), BOOTSTRAP)


def test_the_interval_holds_the_difference_in_points() -> None:
    verdict = judged(*counted(30, 10, both=160), BETTER)
    assert verdict.low < 10.0 < verdict.high
    # A normal approximation of the difference of paired proportions.
    spread = 100 * math.sqrt((0.15 + 0.05 - 0.1**2) / 200)
    assert (verdict.low, verdict.high) == pytest.approx((10 - 1.645 * spread, 10 + 1.645 * spread), abs=0.6)


# --- the decisions --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["mcnemar", "bootstrap"])
@pytest.mark.parametrize("rule", ["better", "not_worse"])
def test_what_is_clearly_better_is_accepted_and_what_is_clearly_worse_is_not(rule: str, test: str) -> None:
    params = replace(BETTER, rule=rule, test=test)
    good, bad = counted(40, 10, both=150)
    assert judged(good, bad, params).accepted
    assert not judged(bad, good, params).accepted


@pytest.mark.parametrize("test", ["mcnemar", "bootstrap"])
def test_a_tie_is_not_better_but_not_worse(test: str) -> None:
    tie = counted(5, 5, both=900, neither=90)
    assert not judged(*tie, replace(BETTER, test=test)).accepted
    assert judged(*tie, replace(NOT_WORSE, test=test)).accepted
    assert not judged(*counted(5, 60, both=900), replace(NOT_WORSE, test=test)).accepted


def test_a_tie_on_few_images_proves_nothing() -> None:
    assert not judged(*counted(2, 2, both=40), NOT_WORSE).accepted


def test_identical_models_are_a_tie() -> None:
    right = np.arange(400) % 5 > 0
    assert judged(right, right, BETTER).p_value == 1
    assert not judged(right, right, BETTER).accepted
    assert judged(right, right, NOT_WORSE).accepted


def test_better_by_luck_is_not_accepted() -> None:
    """Six points more accurate on fifty images."""
    assert not judged(*counted(5, 2, both=43), BETTER).accepted


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "behind"), [(BETTER, 0.0), (NOT_WORSE, 0.02), (BOOTSTRAP, 0.0)])
def test_what_is_no_better_is_accepted_no_more_often_than_alpha(rule: GateParams, behind: float) -> None:
    """400 pairs of models at the very border of the rule, on 300 images each, half of the mistakes shared."""
    accepted = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        easy = rng.random(300) < 0.7
        challenger = easy | (rng.random(300) < 0.5 - behind / 0.3)
        champion = easy | (rng.random(300) < 0.5)
        accepted += judged(challenger, champion, rule).accepted
    assert 0 < accepted / 400 <= rule.alpha


# --- which images are compared --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [BETTER, NOT_WORSE, BOOTSTRAP])
def test_images_that_the_champion_was_trained_on_are_left_out(rule: GateParams) -> None:
    challenger, champion = counted(20, 5, both=75, neither=10)
    fair = judged(challenger, champion, rule)
    # Fifty more that the champion knows by heart.
    seen = frozenset(f"{i:032x}" for i in range(110, 160))
    verdict = judged(np.append(challenger, [False] * 50), np.append(champion, [True] * 50), rule, seen)
    assert (verdict.left_out, verdict.images) == (50, 110)
    assert replace(verdict, left_out=0, reason="") == replace(fair, reason="")
    assert "50 images that net@v1 was trained on are left out" in verdict.reason


def test_where_nothing_can_be_compared_the_way_out_is_named() -> None:
    challenger = answers(np.ones(6, dtype=bool))
    champion = replace(challenger, labels=np.full(6, -1))
    verdict = compare_with_champion(challenger, champion, "net@v1", frozenset(), BETTER)
    assert not verdict.accepted
    assert verdict.reason.startswith("rejected: no test image can be compared with net@v1; register it under another name (data.name")
    assert "new since net@v1" in verdict.reason


def test_classes_that_the_champion_does_not_know_are_named_and_not_compared() -> None:
    labels = np.array([0, 1] * 50 + [2] * 30)
    challenger = answers(np.array([True] * 130), labels)
    champion = answers(np.array([True] * 80 + [False] * 50), np.where(labels == 2, -1, labels))
    verdict = compare_with_champion(challenger, champion, "net@v1", frozenset(), BETTER)
    assert (verdict.images, verdict.wins, verdict.losses) == (100, 20, 0)
    assert verdict.new_classes == ("c",)
    assert "not compared: c, new since net@v1" in verdict.reason
    assert judged(np.array([True] * 9), np.array([True] * 9), BETTER).new_classes == ()


def test_where_no_fair_image_is_left_nothing_is_accepted() -> None:
    everything = frozenset(f"{i:032x}" for i in range(20))
    for rule in (BETTER, NOT_WORSE, BOOTSTRAP):
        verdict = judged(*counted(20, 0, both=0), rule, everything)
        assert (verdict.accepted, verdict.images, verdict.left_out, verdict.p_value) == (False, 0, 20, 1.0)


def test_other_images_cannot_be_compared() -> None:
    with pytest.raises(AssertionError, match="same images"):
        compare_with_champion(answers(np.ones(5)), answers(np.ones(6)), "net@v1", frozenset(), BETTER)


# --- classes that count alike ---------------------------------------------------------------------------------------------------------

ALIKE = replace(BETTER, metric="balanced_accuracy")
RARE = np.array([0] * 190 + [1] * 10)


def over(wins: tuple[int, int], losses: tuple[int, int], labels: np.ndarray = RARE) -> tuple[np.ndarray, np.ndarray]:
    """Which images challenger and champion get right, by how many each class has that only one of them does; the rest both do."""
    challenger, champion = (np.ones(len(labels), dtype=bool) for _ in range(2))
    for label in (0, 1):
        here = np.flatnonzero(labels == label)
        champion[here[: wins[label]]] = False
        challenger[here[wins[label] : wins[label] + losses[label]]] = False
    return challenger, champion


def judged_over(pair: tuple[np.ndarray, np.ndarray], rule: GateParams, uneven: bool = False, labels: np.ndarray = RARE) -> Verdict:
    return compare_with_champion(answers(pair[0], labels), answers(pair[1], labels), "net@v1", frozenset(), rule, uneven)


def test_a_model_that_finds_the_rare_class_is_better_than_one_that_never_does() -> None:
    """It finds eight of ten, and takes six of 190 others for them: no better by accuracy, and 38 points better where classes count alike."""
    found = answers(np.r_[np.ones(184), np.zeros(6), np.ones(8), np.zeros(2)] > 0, RARE)
    by_accuracy, alike = (compare_with_majority(found, "a", BETTER, uneven) for uneven in (False, True))
    assert (by_accuracy.accepted, by_accuracy.metric, by_accuracy.champion_score) == (False, "accuracy", 0.95)
    assert (alike.accepted, alike.metric, alike.champion_score) == (True, "balanced_accuracy", 0.5)
    assert alike.challenger_score == pytest.approx((184 / 190 + 8 / 10) / 2)
    assert alike.reason.startswith(
        "accepted: balanced accuracy 88.4% against 50.0% of the majority class on the same 200 test images (8 won, 6 "
    )
    assert "paired permutation test" in alike.reason
    assert not compare_with_majority(found, "a", replace(BETTER, metric="accuracy"), uneven=True).accepted
    assert compare_with_majority(found, "a", ALIKE, uneven=False).accepted


@pytest.mark.parametrize(("wins", "losses"), [((3, 2), (1, 0)), ((0, 5), (6, 1)), ((2, 0), (0, 1)), ((0, 0), (0, 0))])
def test_the_permutation_test_is_that_of_all_ways_to_swap_the_two(wins: tuple[int, int], losses: tuple[int, int]) -> None:
    """Each image that only one gets right might as well have been the other's."""
    weight = [1 / (2 * 190), 1 / (2 * 10)]
    values = [weight[label] for label in (0, 1) for _ in range(wins[label] + losses[label])]
    seen = sum(weight[label] * (wins[label] - losses[label]) for label in (0, 1))
    sums = np.array([np.dot(signs, values) for signs in itertools.product((-1, 1), repeat=len(values))])
    exact = float((sums >= seen - 1e-9).mean())
    assert judged_over(over(wins, losses), ALIKE).p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4)


@pytest.mark.parametrize("rule", [BETTER, NOT_WORSE, BOOTSTRAP])
def test_where_all_images_are_of_one_class_counting_alike_changes_nothing(rule: GateParams) -> None:
    pair, labels = counted(14, 6, both=80), np.zeros(100, dtype=int)
    plain, alike = (judged_over(pair, replace(rule, metric=metric), labels=labels) for metric in ("accuracy", "balanced_accuracy"))
    assert replace(alike, metric="", reason="") == replace(plain, metric="", reason="")


@pytest.mark.parametrize("test", ["mcnemar", "bootstrap"])
def test_an_image_of_a_rare_class_counts_for_as_many_as_the_other_class_has_more(test: str) -> None:
    rule = replace(ALIKE, test=test)
    assert judged_over(over((0, 6), (20, 0)), rule).accepted  # 30 points of one class for 5 of the other
    assert not judged_over(over((20, 0), (0, 6)), rule).accepted
    assert judged_over(over((20, 0), (0, 6)), replace(rule, metric="accuracy")).accepted
    slack = replace(rule, rule="not_worse", margin=10.0)
    assert not judged_over(over((20, 0), (0, 2)), slack).accepted  # 4.7 points behind, give or take nine


def test_a_tie_on_few_images_of_a_class_proves_nothing() -> None:
    tie = over((0, 0), (0, 0))
    assert judged_over(tie, replace(NOT_WORSE, metric="accuracy")).accepted
    assert not judged_over(tie, replace(NOT_WORSE, metric="balanced_accuracy")).accepted


def test_the_interval_is_that_of_resampling_within_classes() -> None:
    verdict = judged_over(over((10, 4), (0, 1)), ALIKE)
    spread = 50 * math.sqrt((10 / 190 - (10 / 190) ** 2) / 190 + (0.5 - 0.3**2) / 10)
    center = 50 * (10 / 190 + 0.3)
    assert (verdict.low, verdict.high) == pytest.approx((center - 1.645 * spread, center + 1.645 * spread), abs=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "behind"), [(ALIKE, 0.0), (replace(ALIKE, rule="not_worse"), 0.02), (ALIKE, -0.1)])
def test_what_is_no_better_where_classes_count_alike_is_accepted_no_more_often_than_alpha(rule: GateParams, behind: float) -> None:
    """At the border of the rule: alike in both classes, behind by the margin in both, or better in the one by what it is worse in the other."""
    labels, accepted = np.array([0] * 380 + [1] * 60), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        easy = rng.random(440) < 0.6
        less = np.where(labels == 0, behind, behind if behind >= 0 else -behind)
        challenger = easy | (rng.random(440) < 0.5 - less / 0.4)
        champion = easy | (rng.random(440) < 0.5)
        accepted += judged_over((challenger, champion), rule, labels=labels).accepted
    assert 0 < accepted / 400 <= rule.alpha + 0.01


# --- the first model ------------------------------------------------------------------------------------------------------------------


def test_the_first_model_must_be_better_than_its_largest_class() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 200, p=[0.6, 0.2, 0.2])
    good = compare_with_majority(answers(rng.random(200) < 0.9, labels), "a", BETTER)
    assert good.accepted
    assert good.champion == MAJORITY
    assert good.champion_score == pytest.approx((labels == 0).mean())
    assert not compare_with_majority(answers(labels == 0, labels), "a", BETTER).accepted
    assert not compare_with_majority(answers(rng.random(200) < 0.6, labels), "a", BETTER).accepted


def test_the_first_model_is_held_to_better_whatever_the_rule() -> None:
    labels = np.array([0] * 300 + [1] * 300)
    constant = answers(labels == 0, labels)
    assert not compare_with_majority(constant, "a", NOT_WORSE).accepted


# --- what it says ---------------------------------------------------------------------------------------------------------------------


def test_the_reason_holds_the_numbers() -> None:
    verdict = judged(*counted(30, 10, both=160), BETTER)
    assert verdict.reason == (
        "accepted: 95.0% against 85.0% of net@v1 on the same 200 test images "
        f"(30 won, 10 lost, difference {verdict.low:+.1f} to {verdict.high:+.1f} points), significantly better than net@v1 "
        "(p = 0.0011, exact McNemar test, alpha 0.05)."
    )


@pytest.mark.parametrize(("rule", "words"), [(BETTER, "exact McNemar test"), (NOT_WORSE, "by 2 points"), (BOOTSTRAP, "paired bootstrap")])
def test_a_rejection_says_by_which_test(rule: GateParams, words: str) -> None:
    reason = judged(*counted(10, 30, both=160), rule).reason
    assert reason.startswith("rejected: 85.0% against 95.0%")
    assert words in reason
    assert "not significantly" in reason


def test_a_verdict_is_json() -> None:
    verdict = judged(*counted(30, 10, both=160), BETTER)
    assert json.loads(json.dumps(verdict.to_json(), allow_nan=False))["accepted"] is True
