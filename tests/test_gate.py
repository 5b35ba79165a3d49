"""The gate: exact paired tests against references, errors no more often than promised, only fair images compared."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, multinomial, norm

from tlpipeline.evaluation.gate import compare_with_champion, compare_with_majority, with_new_images
from tlpipeline.evaluation.metrics import Predictions
from tlpipeline.evaluation.power import approximate_power, critical_region, exact_power, images_needed
from tlpipeline.evaluation.significance import exact_p_value
from tlpipeline.evaluation.verdict import MAJORITY, Verdict, with_wear
from tlpipeline.params import GateParams

BETTER = GateParams(rule="better", metric="auto", alpha=0.05, margin=2.0, promote="manual")
NOT_WORSE = replace(BETTER, rule="not_worse")
GAINING = replace(BETTER, min_gain=3.0)


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


def statistic(wins: int, losses: int, n: int, null: float) -> float:
    """Tango's score statistic with the likelihood maximized by search among all pairs of proportions with this difference."""
    ties = n - wins - losses

    def unlikelihood(lost: float) -> float:
        parts = ((wins, lost + null), (losses, lost), (ties, 1 - 2 * lost - null))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in parts if k)

    low, high = max(0.0, -null), (1 - null) / 2
    lost = minimize_scalar(unlikelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return float((wins - losses - n * null) / math.sqrt(max(n * (2 * lost + null - null**2), 1e-12)))


@pytest.mark.parametrize("null", [0.0, 0.05, -0.1])
@pytest.mark.parametrize(("wins", "losses", "n"), [(5, 0, 5), (3, 1, 12), (4, 4, 12), (0, 0, 12), (7, 2, 15)])
def test_the_p_value_is_the_largest_probability_of_so_extreme_a_result_by_brute_force(wins: int, losses: int, n: int, null: float) -> None:
    """Over all results of n images, and a fine grid of the share of losses."""
    seen = statistic(wins, losses, n, null)
    outcomes = [(w, v) for w in range(n + 1) for v in range(n + 1 - w) if statistic(w, v, n, null) >= seen - 1e-6]
    low, high = max(0.0, -null), (1 - null) / 2
    largest = 0.0
    for lost in np.linspace(low, high, 100):
        chances = (max(lost + null, 0.0), lost, max(1 - 2 * lost - null, 0.0))
        largest = max(largest, sum(multinomial.pmf((w, v, n - w - v), n, chances) for w, v in outcomes))
    assert exact_p_value(wins, losses, n, null) == pytest.approx(largest, abs=2e-3)


@pytest.mark.parametrize(("n", "null"), [(20, 0.0), (50, 0.0), (300, 0.0), (40, 0.05), (100, -0.01), (300, -0.02)])
def test_the_exact_test_errs_no_more_often_than_alpha_whatever_is_discordant(n: int, null: float) -> None:
    region = critical_region(n, 0.05, null)
    for discordance in np.linspace(abs(null) + 0.004, 1 - 1e-6, 97):
        win, loss = (discordance + null) / 2, (discordance - null) / 2
        losses = np.arange(n + 1)
        error = binom.pmf(losses, n, loss) @ binom.sf(region - 1, n - losses, win / (1 - loss))
        assert error <= 0.0502, discordance


@pytest.mark.parametrize(("wins", "losses"), [(12, 3), (4, 0), (9, 5), (40, 25)])
def test_the_exact_test_finds_more_than_the_conditional_one(wins: int, losses: int) -> None:
    verdict = judged(*counted(wins, losses, both=50, neither=7), BETTER)
    assert verdict.p_value < binomtest(wins, wins + losses, alternative="greater").pvalue
    assert (verdict.wins, verdict.losses, verdict.images) == (wins, losses, wins + losses + 57)
    assert verdict.accepted is (verdict.p_value < 0.05)


def test_not_worse_by_nothing_is_better() -> None:
    pair = counted(15, 4, both=60)
    assert judged(*pair, replace(NOT_WORSE, margin=0.0)).p_value == judged(*pair, BETTER).p_value


def test_ties_on_few_images_show_nothing() -> None:
    """Five ties: a bootstrap would draw five ties again and again, and be sure."""
    verdict = judged(*counted(0, 0, both=5), NOT_WORSE)
    assert verdict.outcome == "undecided"
    assert verdict.p_value > 0.5
    assert (verdict.low, verdict.high) == pytest.approx((-35.1, 35.1), abs=0.1)


def test_the_interval_holds_the_difference_in_points() -> None:
    verdict = judged(*counted(30, 10, both=160), BETTER)
    assert verdict.low < 10.0 < verdict.high
    # A normal approximation of the difference of paired proportions.
    spread = 100 * math.sqrt((0.15 + 0.05 - 0.1**2) / 200)
    assert (verdict.low, verdict.high) == pytest.approx((10 - 1.645 * spread, 10 + 1.645 * spread), abs=0.6)


def test_the_interval_is_that_of_the_score_test_which_inverts_it() -> None:
    for wins, losses, n in ((30, 10, 200), (3, 0, 40), (0, 0, 25)):
        verdict = judged(*counted(wins, losses, both=n - wins - losses), BETTER)
        for bound, sign in ((verdict.low, 1), (verdict.high, -1)):
            assert statistic(wins, losses, n, bound / 100) == pytest.approx(sign * norm.isf(0.05), abs=0.01)


# --- the decisions --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [BETTER, NOT_WORSE, GAINING])
def test_what_is_clearly_better_is_accepted_and_what_is_clearly_worse_is_rejected(rule: GateParams) -> None:
    good, bad = counted(40, 10, both=150)
    assert judged(good, bad, rule).outcome == "accepted"
    assert judged(bad, good, rule).outcome == "rejected"


def test_a_tie_is_undecided_or_not_worse() -> None:
    tie = counted(5, 5, both=900, neither=90)
    assert judged(*tie, BETTER).outcome == "undecided"
    assert judged(*tie, NOT_WORSE).outcome == "accepted"
    assert judged(*counted(5, 60, both=900), NOT_WORSE).outcome == "rejected"


def test_a_tie_on_few_images_proves_nothing() -> None:
    assert judged(*counted(2, 2, both=40), NOT_WORSE).outcome == "undecided"


def test_identical_models_are_a_tie() -> None:
    right = np.arange(400) % 5 > 0
    assert judged(right, right, BETTER).p_value == 1
    assert judged(right, right, BETTER).outcome == "undecided"
    assert judged(right, right, NOT_WORSE).accepted


def test_better_by_luck_is_undecided() -> None:
    """Six points more accurate on fifty images."""
    assert judged(*counted(5, 2, both=43), BETTER).outcome == "undecided"


def test_a_gain_below_the_least_one_is_undecided_and_rejected_where_it_is_shown_to_be_below() -> None:
    assert judged(*counted(20, 5, both=175), BETTER).accepted
    assert judged(*counted(20, 5, both=175), replace(BETTER, min_gain=5.0)).outcome == "undecided"
    verdict = judged(*counted(200, 100, both=9700), replace(BETTER, min_gain=5.0))
    assert verdict.outcome == "rejected"
    assert "but significantly short of 5 points" in verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "behind"), [(BETTER, 0.0), (NOT_WORSE, 0.02), (GAINING, -0.03)])
def test_what_is_no_better_is_accepted_no_more_often_than_alpha(rule: GateParams, behind: float) -> None:
    """400 pairs of models at the very border of the rule, on 300 images each, half of the mistakes shared."""
    accepted = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        easy = rng.random(300) < 0.7
        challenger = easy | (rng.random(300) < 0.5 - behind / 0.3)
        champion = easy | (rng.random(300) < 0.5)
        accepted += judged(challenger, champion, rule).accepted
    assert 0 < accepted / 400 <= rule.alpha + 0.01


# --- classes that may not fall ---------------------------------------------------------------------------------------------------------

FLOOR = replace(BETTER, class_floor=5.0)


def test_a_class_that_falls_is_rejected_if_it_is_no_chance_and_left_undecided_else() -> None:
    """Better by 20 points over all; class 1 of 40 images loses."""
    labels = np.array([0] * 160 + [1] * 40)
    for lost, outcome in ((1, "accepted"), (3, "undecided"), (12, "rejected")):
        pair = over((40 + lost, 0), (0, lost), labels)
        assert judged_over(pair, BETTER, labels=labels).outcome == "accepted"
        verdict = judged_over(pair, FLOOR, labels=labels)
        assert verdict.outcome == outcome
        assert (
            f"the recall of b fell by {100 * lost / 40:.1f} points (0 won, {lost} lost of 40 images; gate.class_floor 5" in verdict.reason
        ) is (lost > 2)


# --- what the images can show ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "gain", "null"), [(60, 0.1, 0.0), (10, 0.3, 0.0), (300, 0.02, 0.0), (300, 0.0, -0.01)])
def test_the_power_is_the_share_of_simulated_verdicts(n: int, gain: float, null: float) -> None:
    rng, region = np.random.default_rng(0), critical_region(n, 0.05, null)
    discordance = max(0.06, 1.5 * gain)
    wins, losses, _ = rng.multinomial(n, [(discordance + gain) / 2, (discordance - gain) / 2, 1 - discordance], size=20_000).T
    power = exact_power(n, gain, discordance, 0.05, null)
    assert power == pytest.approx((wins >= region[losses]).mean(), abs=0.012)
    if n >= 60:
        assert power == pytest.approx(approximate_power(n, gain, discordance, 0.05, null), abs=0.05)


def test_with_the_images_needed_the_power_is_four_in_five() -> None:
    needed = images_needed(0.02, 0.06, 0.05)
    assert 900 <= needed <= 960
    assert exact_power(needed, 0.02, 0.06, 0.05) == pytest.approx(0.8, abs=0.02)
    assert images_needed(0.02, 0.06, 0.05, effect=4.0) == pytest.approx(4 * needed, rel=0.05)


def test_a_verdict_says_what_its_images_could_show() -> None:
    few = judged(*counted(2, 0, both=3), BETTER)
    assert few.outcome == "undecided"
    assert few.notes[0].startswith("5 test images cannot decide: ")
    some = judged(*counted(9, 7, both=284), BETTER)
    assert some.notes[0].startswith(f"300 test images show a gain of 2 points {some.power:.0%} of the time; for four times in five, about ")
    assert some.power == pytest.approx(0.4, abs=0.05)
    assert some.images_needed == pytest.approx(900, abs=60)
    assert "that a model as good as the champion is not worse" in judged(*counted(9, 7, both=284), NOT_WORSE).notes[0]


def test_that_test_images_are_worn_is_said() -> None:
    verdict = judged(*counted(9, 7, both=284), BETTER)
    assert with_wear(verdict, 0) == verdict
    assert with_wear(verdict, 3).notes[-1] == "These test images have judged 3 models before."
    assert with_wear(verdict, 52).judged == 52
    assert "They are worn" in with_wear(verdict, 52).notes[-1]


# --- groups ----------------------------------------------------------------------------------------------------------------------------


def test_images_of_a_group_are_one_witness() -> None:
    """Each of ten patients has forty frames; one patient's frames are won."""
    challenger, champion = np.ones(400, dtype=bool), np.ones(400, dtype=bool)
    champion[:40] = False
    groups = [f"patient{i // 40}" for i in range(400)]
    alone = compare_with_champion(answers(challenger), answers(champion), "net@v1", frozenset(), BETTER)
    grouped = compare_with_champion(answers(challenger), answers(champion), "net@v1", frozenset(), BETTER, groups=groups)
    assert (alone.outcome, alone.groups) == ("accepted", 400)
    assert (grouped.outcome, grouped.groups, grouped.images) == ("undecided", 10, 400)
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    assert "400 test images in 10 groups" in grouped.notes[0]


def test_groups_of_one_image_change_nothing() -> None:
    pair = [answers(right) for right in counted(20, 5, both=75)]
    plain, single = (
        compare_with_champion(pair[0], pair[1], "net@v1", frozenset(), BETTER, groups=groups)
        for groups in ((), [f"{i}" for i in range(100)])
    )
    assert plain == single


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "behind"), [(BETTER, 0.0), (NOT_WORSE, 0.02), (replace(BETTER, metric="balanced_accuracy"), 0.0)])
def test_groups_of_frames_do_not_make_the_gate_err_more_often(rule: GateParams, behind: float) -> None:
    """Forty patients with 1 to 20 frames that are mostly right or wrong together; without groups, two in five would be accepted."""
    accepted, ignored = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 21, 40)
        patient = np.repeat(np.arange(40), sizes)
        labels = np.repeat(rng.integers(0, 2, 40), sizes)
        lucky = rng.random(40) < 0.3
        favored = np.where(rng.random(40) < 0.5 - behind / 0.6, 1, -1)
        tossed = rng.random(len(patient)) < 0.9
        challenger = ~(lucky & (favored < 0))[patient] | ~tossed
        champion = ~(lucky & (favored > 0))[patient] | ~tossed
        pair = answers(challenger, labels), answers(champion, labels)
        grouped = compare_with_champion(*pair, "net@v1", frozenset(), rule, groups=[str(p) for p in patient])
        accepted += grouped.accepted
        if seed < 50:
            ignored += compare_with_champion(*pair, "net@v1", frozenset(), rule).accepted
    assert accepted / 200 <= rule.alpha + 0.03
    assert ignored / 50 > 0.2


# --- which images are compared --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [BETTER, NOT_WORSE, GAINING])
def test_images_that_the_champion_was_trained_on_are_left_out(rule: GateParams) -> None:
    challenger, champion = counted(20, 5, both=75, neither=10)
    fair = judged(challenger, champion, rule)
    # Fifty more that the champion knows by heart.
    seen = frozenset(f"{i:032x}" for i in range(110, 160))
    verdict = judged(np.append(challenger, [False] * 50), np.append(champion, [True] * 50), rule, seen)
    assert (verdict.left_out, verdict.images) == (50, 110)
    assert replace(verdict, left_out=0, notes=()) == replace(fair, notes=())
    assert verdict.notes[-1] == "50 images that net@v1 was trained on are left out."


def test_where_no_fair_image_is_left_nothing_is_decided() -> None:
    everything = frozenset(f"{i:032x}" for i in range(20))
    for rule in (BETTER, NOT_WORSE, GAINING):
        verdict = judged(*counted(20, 0, both=0), rule, everything)
        assert (verdict.outcome, verdict.images, verdict.left_out, verdict.p_value) == ("undecided", 0, 20, 1.0)
        assert verdict.reason == "undecided: no test image can be compared with net@v1."


def test_other_images_cannot_be_compared() -> None:
    with pytest.raises(AssertionError, match="same images"):
        compare_with_champion(answers(np.ones(5)), answers(np.ones(6)), "net@v1", frozenset(), BETTER)


# --- classes that come and go ----------------------------------------------------------------------------------------------------------

OLD = ("a", "b")


def named(labels: np.ndarray, right: np.ndarray, classes: tuple[str, ...]) -> Predictions:
    """Predictions of a model that knows only some of the classes; where it is not right, it says the first class, or the second for that."""
    names = np.array(("a", "b", "c"))[labels]
    known = np.array([classes.index(name) if name in classes else -1 for name in names])
    wrong = np.where(known == 0, 1, 0)
    predicted = np.where(right & (known >= 0), known, wrong)
    chances = np.full((len(labels), len(classes)), 0.1, dtype=np.float32)
    chances[np.arange(len(labels)), predicted] = 0.9
    return Predictions(tuple(f"{i:032x}" for i in range(len(labels))), classes, known, chances)


def test_a_champion_is_wrong_on_a_class_that_it_cannot_name() -> None:
    """As good on the old classes, and right on the new one: production would call it something else."""
    labels = np.array([0, 1] * 50 + [2] * 12)
    right = np.arange(112) % 10 > 0
    verdict = compare_with_champion(named(labels, right, ("a", "b", "c")), named(labels, right, OLD), "net@v1", frozenset(), BETTER)
    assert (verdict.outcome, verdict.images, verdict.losses, verdict.new_classes) == ("accepted", 112, 0, ("c",))
    assert verdict.wins == right[100:].sum()
    assert verdict.notes[1] == (
        f"New since net@v1: c; it cannot name them and is wrong there, this model is right on {verdict.wins} of 12 test images. On the classes "
        "that both know: 90.0% against 90.0% on 100 images."
    )


def test_a_new_class_that_is_not_recognized_gains_nothing() -> None:
    labels = np.array([0, 1] * 50 + [2] * 12)
    verdict = compare_with_champion(
        named(labels, labels < 2, ("a", "b", "c")), named(labels, labels < 2, OLD), "net@v1", frozenset(), BETTER
    )
    assert (verdict.outcome, verdict.wins) == ("undecided", 0)


def test_a_new_class_is_no_excuse_for_the_old_ones() -> None:
    """Right on all of the new class, and ten points worse on the old ones."""
    labels = np.array([0, 1] * 150 + [2] * 60)
    worse = (np.arange(360) % 10 > 0) | (labels == 2)
    pair = named(labels, worse, ("a", "b", "c")), named(labels, np.ones(360, dtype=bool), OLD)
    verdict = compare_with_champion(*pair, "net@v1", frozenset(), BETTER)
    assert verdict.p_value < 0.05
    assert verdict.outcome == "rejected"
    assert (
        "significantly worse by more than 2 points (gate.margin) on the classes that net@v1 knows: 90.0% against 100.0%" in verdict.reason
    )


def test_a_class_that_production_would_lose_is_left_to_a_person() -> None:
    """The images of a class vanished, and a smaller task is easier."""
    labels = np.array([0, 1] * 100)
    pair = named(labels, np.ones(200, dtype=bool), OLD), named(labels, np.arange(200) % 5 > 0, ("a", "b", "c"))
    verdict = compare_with_champion(*pair, "net@v1", frozenset(), BETTER)
    assert (verdict.outcome, verdict.lost_classes, verdict.accepted) == ("undecided", ("c",), False)
    assert "production would lose c, which net@v1 knows and this model does not" in verdict.reason
    assert replace(verdict, because="c is out of the catalog").accepted
    expected = compare_with_champion(*pair, "net@v1", frozenset(), BETTER, gone=["c"])
    assert (expected.outcome, expected.lost_classes) == ("accepted", ())


def test_a_renamed_class_is_the_same_class() -> None:
    labels = np.array([0, 1] * 50)
    challenger, champion = (named(labels, np.arange(100) % 4 > offset, OLD) for offset in (0, 1))
    alike = compare_with_champion(challenger, champion, "net@v1", frozenset(), BETTER)
    before = replace(champion, classes=("a", "former"), labels=np.where(labels == 1, -1, 0))
    renamed = compare_with_champion(challenger, before, "net@v1", frozenset(), BETTER, rename={"former": "b"})
    assert renamed == alike
    assert (renamed.new_classes, renamed.lost_classes) == ((), ())
    fresh = with_new_images(alike, challenger, before, frozenset(challenger.md5), {"former": "b"})
    assert fresh.notes[-1].startswith(f"On the 100 test images that are new since net@v1, it is right about {alike.champion_score:.1%}")
    unnamed = compare_with_champion(challenger, before, "net@v1", frozenset(), BETTER)
    assert (unnamed.new_classes, unnamed.lost_classes) == (("b",), ("former",))


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
    assert (by_accuracy.accepted, by_accuracy.metric, by_accuracy.champion_score) == (False, "accuracy", pytest.approx(0.95))
    assert (alike.accepted, alike.metric, alike.champion_score) == (True, "balanced_accuracy", pytest.approx(0.5))
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


@pytest.mark.parametrize("rule", [BETTER, NOT_WORSE, GAINING])
def test_where_all_images_are_of_one_class_counting_alike_changes_nothing(rule: GateParams) -> None:
    pair, labels = counted(14, 6, both=80), np.zeros(100, dtype=int)
    plain, alike = (judged_over(pair, replace(rule, metric=metric), labels=labels) for metric in ("accuracy", "balanced_accuracy"))
    assert replace(alike, metric="", reason="") == replace(plain, metric="", reason="")


def test_an_image_of_a_rare_class_counts_for_as_many_as_the_other_class_has_more() -> None:
    rule = ALIKE
    assert judged_over(over((0, 6), (20, 0)), rule).accepted  # 30 points of one class for 5 of the other
    assert not judged_over(over((20, 0), (0, 6)), rule).accepted
    assert judged_over(over((20, 0), (0, 6)), replace(rule, metric="accuracy")).accepted
    slack = replace(rule, rule="not_worse", margin=10.0)
    assert not judged_over(over((20, 0), (0, 2)), slack).accepted  # 4.7 points behind, give or take nine


def test_a_tie_on_few_images_of_a_class_proves_nothing() -> None:
    tie = over((0, 0), (0, 0))
    assert judged_over(tie, replace(NOT_WORSE, metric="accuracy")).accepted
    assert not judged_over(tie, replace(NOT_WORSE, metric="balanced_accuracy")).accepted


def test_the_interval_is_that_of_classes_apart() -> None:
    verdict = judged_over(over((10, 4), (0, 1)), ALIKE)
    spread = 50 * math.sqrt((10 / 190 - (10 / 190) ** 2) / 190 + (0.5 - 0.3**2) / 10)
    center = 50 * (10 / 190 + 0.3)
    assert (verdict.low, verdict.high) == pytest.approx((center - 1.645 * spread, center + 1.645 * spread), abs=2)


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
        f"(p = {verdict.p_value:.2g}, exact paired test, alpha 0.05)."
    )


@pytest.mark.parametrize(
    ("rule", "words"), [(BETTER, "better than net@v1,"), (NOT_WORSE, "by 2 points,"), (GAINING, "by more than 3 points,")]
)
def test_a_rejection_says_what_was_not_shown_and_what_was(rule: GateParams, words: str) -> None:
    reason = judged(*counted(10, 30, both=160), rule).reason
    assert reason.startswith("rejected: 85.0% against 95.0%")
    assert f"not significantly {'not worse' if rule is NOT_WORSE else 'better'} than net@v1" in reason
    assert f"{words} but significantly " in reason


def test_a_verdict_is_json() -> None:
    verdict = judged(*counted(30, 10, both=160), BETTER)
    assert json.loads(json.dumps(verdict.to_json(), allow_nan=False))["outcome"] == "accepted"


# --- the simulation in research/gate.py ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rule"), [("better", BETTER), ("not_worse", replace(NOT_WORSE, margin=1.0))])
def test_the_simulation_promotes_what_the_gate_accepts(name: str, rule: GateParams) -> None:
    from research.gate import RULES

    rng = np.random.default_rng(0)
    wins, losses, ties = rng.multinomial(60, [0.12, 0.05, 0.83], 25).T
    promoted = RULES[name](wins, losses, 60)
    accepted = [judged(*counted(w, v, both=t), rule).accepted for w, v, t in zip(wins, losses, ties, strict=True)]
    assert list(promoted) == accepted
    assert name == "not_worse" or 0 < sum(accepted) < 25
