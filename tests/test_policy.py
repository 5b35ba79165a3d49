"""The weighing of the evidence: the race spends what it may, what it sees moves the prediction, and learning curves say where the choice turns."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.decisions import MODEL, RULE, SIMILAR_LARGE, SIMILAR_SMALL, decide
from tests.helpers.evidence import model, planted
from tlpipeline.choice import policy, reasons
from tlpipeline.choice.decision import InterimResult
from tlpipeline.choice.policy import ALPHA_SPENDING, DecisionPolicy, interim_analysis, interim_epochs, stopping_rule, turning_point, weigh


@pytest.mark.parametrize("accuracies", [SIMILAR_SMALL, SIMILAR_LARGE])
def test_at_the_turning_point_the_choice_turns(accuracies: list[float]) -> None:
    weighed = weigh(planted(accuracies), RULE, model(intercept=0.05, log10_images=1.0, log_odds_of_the_frozen_head=-0.35))
    turn = turning_point(weighed)
    assert turn is not None
    assert (turn < 1000) == weighed.large
    there = replace(weighed, evidence=replace(weighed.evidence, images=turn))
    before = replace(weighed, evidence=replace(weighed.evidence, images=round(turn * (1.06 if weighed.large else 0.94))))
    assert (there.large, before.large) == (not weighed.large, weighed.large)


def test_where_images_do_not_count_no_number_of_them_turns_the_choice() -> None:
    for intercept in (-1.0, 1.0):
        assert turning_point(weigh(planted([0.5, 0.6, 0.8]), RULE, model(intercept=intercept))) is None
    profile = planted([0.5, 0.6, 0.8])
    assert any(
        "More images alone would not make fine-tuning pay" in words
        for words in reasons.changes(decide(profile, model=model(intercept=-1.0)), profile)
    )


@pytest.mark.parametrize("intercept", [-1.0, -0.5, 0.5, 1.0])
def test_what_a_race_sees_overrules_a_prediction_however_sure_it_was(intercept: float) -> None:
    """Thirty points ahead on 400 judging images is no accident."""
    sure = replace(RACED, model=replace(model(intercept=intercept, deviation=0.25), remaining_gain=LAG))
    ahead, behind = interim_analysis(sure, 2, 9, 9, *judged(10, 130)), interim_analysis(sure, 2, 9, 9, *judged(130, 10))
    assert stopping_rule(sure, 2, ahead)[0] == "tuned"
    assert stopping_rule(sure, 2, behind)[0] == "frozen"


def test_a_frozen_head_that_still_learns_goes_on_learning_with_more_images() -> None:
    """More images do not make fine-tuning win where the frozen head gains as much by them."""
    profile = planted([0.5, 0.6, 0.8])
    weighed = weigh(profile, RULE, MODEL)
    steep = replace(weighed, evidence=replace(weighed.evidence, slope=0.05))
    assert policy.extrapolate(steep, weighed.evidence.images)[1] == pytest.approx(weighed.frozen)
    seen, frozen = policy.extrapolate(steep, 2 * weighed.evidence.images)
    error = 1 - weighed.frozen
    assert 1 - frozen == pytest.approx(error**2 / (error + 0.05))  # the next doubling lowers the error by the same share
    assert seen.slope == pytest.approx(error - error**2 / (error + 0.05))
    assert policy.extrapolate(replace(weighed, evidence=replace(weighed.evidence, slope=0.0)), 10**6)[1] == pytest.approx(weighed.frozen)


LAG = ((0.5, 0.1), (0.2, 0.05), (0.0, 0.02))


RACED = DecisionPolicy(
    weigh(planted([0.5, 0.6, 0.8]), RULE, MODEL).evidence, RULE, replace(model(intercept=0.05, deviation=0.4), remaining_gain=LAG)
)


def judged(frozen_only: int, tuned_only: int, images: int = 400, both: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Judging images of which so many are right with one arm only."""
    place = np.arange(images)
    rest = frozen_only + tuned_only
    common = (place >= rest) & (place < rest + round(both * images))
    return common | (place < frozen_only), common | ((place >= frozen_only) & (place < rest))


@pytest.mark.parametrize(("epochs", "at"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [2, 3, 5]), (20, [7, 13, 20])])
def test_looks_are_planned_at_thirds_of_the_schedule(epochs: int, at: Sequence[int]) -> None:
    assert interim_epochs(epochs) == at


def test_every_schedule_is_looked_at_in_its_last_epoch_and_at_most_three_times() -> None:
    for epochs in range(1, 60):
        at = interim_epochs(epochs)
        assert at[-1] == epochs
        assert len(at) <= 3
        assert at[0] >= 1


def test_a_look_says_what_was_seen() -> None:
    seen = interim_analysis(RACED, 2, 20, 20, *judged(8, 20))
    assert (seen.epoch, seen.epochs, seen.images) == (20, 20, 400)
    assert seen.tuned - seen.frozen == pytest.approx(0.03)
    assert seen.error == pytest.approx((28 / 400 - 0.03**2) ** 0.5 / 20, abs=1e-4)


def test_frames_of_a_series_are_one_witness() -> None:
    frozen, tuned = judged(8, 20)
    groups = [f"series{i // 10}" for i in range(400)]
    alone, grouped = (interim_analysis(RACED, 2, 20, 20, frozen, tuned, groups=g) for g in ((), groups))
    assert grouped.error > 2 * alone.error
    assert interim_analysis(RACED, 2, 20, 20, frozen, tuned, groups=[""] * 400) == alone


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_clear_winner_ends_the_race_early_either_way(part: int) -> None:
    ahead, behind = (stopping_rule(RACED, part, interim_analysis(RACED, part, 1, 3, *judged(*counts))) for counts in ((0, 60), (110, 0)))
    assert ahead[0] == "tuned"
    assert ahead[1] == "ahead"
    assert behind[0] == "frozen"
    assert behind[1] == "futile"


def test_a_close_race_goes_on_until_the_last_look() -> None:
    for part in (0, 1):
        assert stopping_rule(RACED, part, InterimResult(1, 3, 100, 0.8, 0.8, 0.02, 0.5, 0.5, 0.0, 0.0)) == ("", "")
    assert stopping_rule(RACED, 2, InterimResult(3, 3, 100, 0.8, 0.8, 0.02, 0.5, 0.5, 0.0, 0.0))[0] == "frozen"


def test_undecided_at_the_end_the_cheaper_arm_wins_unless_the_expected_gain_exceeds_the_tolerance() -> None:
    for difference, winner in ((-0.02, "frozen"), (0.0, "frozen"), (0.03, "tuned")):
        won, why = stopping_rule(RACED, 2, InterimResult(3, 3, 100, 0.8, 0.8 + difference, 0.02, 0.5, 0.5, 0.0, 0.0))
        assert won == winner
        assert why == "expected"
    # A tolerance of five points makes the same difference too small.
    lenient = replace(RACED, rule=replace(RULE, tolerance=5.0))
    assert stopping_rule(lenient, 2, InterimResult(3, 3, 100, 0.8, 0.83, 0.02, 0.5, 0.5, 0.0, 0.0))[0] == "frozen"


def test_the_looks_spend_alpha_and_no_more() -> None:
    assert sum(ALPHA_SPENDING) == pytest.approx(1)
    spent = 0.0
    for part in range(3):
        # The largest error at which a look still calls fine-tuning the winner for good, found by trying.
        errors = [
            e
            for e in np.arange(0.0005, 0.2, 0.0005)
            if "ahead" in stopping_rule(RACED, part, InterimResult(1, 3, 100, 0.8, 0.8, 0.02, 1 - e, 1, 0.0, 0.0))[1]
        ]
        spent += max(errors)
    assert 0.09 < spent <= RULE.alpha + 1e-9


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_look_moves_towards_what_was_measured_and_tightens_with_the_error(part: int) -> None:
    behind = RACED.model.remaining_gain[part][0] * (1 - RACED.frozen)
    sharp = replace(RACED, model=replace(RACED.model, remaining_gain=((RACED.model.remaining_gain[part][0], 0.01),) * 3))

    def told(difference: float, error: float) -> tuple[float, float]:
        weights = sharp.posterior(part, difference, error)
        assert weights.sum() == pytest.approx(1)
        mean = float(weights @ sharp.gains)
        return mean, float(weights @ (sharp.gains - mean) ** 2) ** 0.5

    prior = float(sharp.gains.mean())
    means = [told(0.05 - behind, error)[0] for error in (1.0, 0.1, 0.03, 0.005)]
    assert means[0] == pytest.approx(prior, abs=0.003)
    assert means == sorted(means)
    assert means[-1] == pytest.approx(0.05, abs=0.005)
    widths = [told(0.05 - behind, error)[1] for error in (1.0, 0.1, 0.03, 0.005)]
    assert widths == sorted(widths, reverse=True)
    assert told(-0.05 - behind, 0.03)[0] < prior < means[2]


@pytest.mark.parametrize("images", [1, 2, 4])
def test_a_few_images_leave_the_chance_where_the_prediction_had_it(images: int) -> None:
    prior = float((RACED.gains > RACED.tolerance).mean())
    for frozen in (0, 1):
        for tuned in (0, 1):
            seen = interim_analysis(RACED, 2, 3, 3, np.full(images, bool(frozen)), np.full(images, bool(tuned)))
            if frozen == tuned:
                assert seen.p_tuned_better == pytest.approx(prior, abs=0.1)
            assert stopping_rule(RACED, 0, seen)[0] == "" or images == 4


def test_the_better_the_measured_the_likelier_the_win_however_far_from_the_prediction() -> None:
    """Fine-tuning that fell apart must lose, most of all where nobody expected it."""
    confident = replace(RACED, model=replace(model(intercept=0.3, deviation=0.2), remaining_gain=LAG))
    looks = [
        interim_analysis(confident, 2, 3, 3, *judged(max(-d, 0), max(d, 0), both=0.1))
        for d in (-320, -240, -160, -80, -20, 0, 20, 60, 160, 320)
    ]
    assert [seen.p_tuned_better for seen in looks] == sorted(seen.p_tuned_better for seen in looks)
    assert stopping_rule(confident, 2, looks[0])[0] == "frozen"
    assert stopping_rule(confident, 2, looks[-1])[0] == "tuned"


def test_fine_tuning_is_given_its_lag_at_an_early_look() -> None:
    """At a third of its schedule fine-tuning still has to come; the same difference at the end is final."""
    early, late = (interim_analysis(RACED, part, 1, 3, *judged(16, 8)).p_tuned_better for part in (0, 2))
    assert early > late


def simulated(gain: float, runs: int = 400, images: int = 300, seed: int = 0) -> list[tuple[int, str]]:
    """Races in which fine-tuning ends so much better, lagging behind as the model says: (look, winner) where they ended."""
    fair = replace(RACED, model=replace(model(deviation=0.25), remaining_gain=LAG))
    rng = np.random.default_rng(seed)
    ended = []
    for _ in range(runs):
        u = rng.random(images)
        for part in range(3):
            behind, spread = fair.model.remaining_gain[part]
            ahead = gain - (behind + spread * rng.normal()) * (1 - fair.frozen)
            tuned_only, frozen_only = 0.03 + max(ahead, 0), 0.03 + max(-ahead, 0)
            frozen = u < fair.frozen
            tuned = frozen & (rng.random(images) > frozen_only / fair.frozen) | ~frozen & (
                rng.random(images) < tuned_only / (1 - fair.frozen)
            )
            winner, _ = stopping_rule(fair, part, interim_analysis(fair, part, part + 1, 3, frozen, tuned))
            if winner:
                ended.append((part, winner))
                break
    assert len(ended) == runs
    return ended


def test_without_a_difference_fine_tuning_is_not_declared_the_winner_early() -> None:
    runs = 400
    early = sum(part < 2 and winner == "tuned" for part, winner in simulated(0.0, runs))
    allowed = RULE.alpha * (ALPHA_SPENDING[0] + ALPHA_SPENDING[1])
    assert early / runs <= allowed + 3 * (allowed * (1 - allowed) / runs) ** 0.5


def test_a_real_difference_is_found_and_a_loss_is_not_bought() -> None:
    won, lost = (np.mean([winner == "tuned" for _, winner in simulated(gain, 200)]) for gain in (0.08, -0.08))
    assert won > 0.9
    assert lost < 0.1


def test_the_less_a_look_foretells_the_end_the_less_it_moves_the_prediction() -> None:
    prior = float(RACED.gains.mean())
    moved = []
    for spread in (0.01, 1.0):
        vague = replace(RACED, model=replace(RACED.model, remaining_gain=((0.0, spread),) * 3))
        moved.append(abs(float(vague.posterior(0, 0.12, 0.005) @ vague.gains) - prior))
    assert moved[1] < moved[0] / 2


def test_what_is_read_must_beat_the_largest_class_by_more_than_chance_or_by_the_gradients() -> None:
    seen = replace(weigh(planted(SIMILAR_SMALL), RULE, MODEL).evidence, majority=0.1)
    lucky, read = (replace(seen, last=a, cut=a, multi=a) for a in (0.12, 0.14))
    assert (policy.has_signal(lucky), policy.has_signal(read)) == (False, True)
    assert not policy.has_signal(replace(lucky, tangent_gain=policy.SIGNAL))
    assert policy.has_signal(replace(lucky, tangent_gain=policy.SIGNAL + 0.01))


def test_the_regrets_of_a_look_are_those_of_the_arm_that_they_are_named_after() -> None:
    ahead, behind = interim_analysis(RACED, 2, 20, 20, *judged(8, 60)), interim_analysis(RACED, 2, 20, 20, *judged(60, 8))
    assert ahead.frozen_regret > 0.05 > 0.001 >= ahead.tuned_regret
    assert behind.tuned_regret > 0.05 > 0.001 >= behind.frozen_regret
    assert ahead.p_tuned_within > 0.99
    assert behind.p_tuned_within < 0.01
