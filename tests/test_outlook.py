"""The outlook: it recovers what was planted, more images never speak against fine-tuning, and it says when it is asked too much."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import minimize
from test_profiling import planted

from tlpipeline import outlook
from tlpipeline.outlook import GROWING, NEUTRAL, Evidence, Observed, Outlook, evidence, figures, fit, fitted, log_odds
from tlpipeline.probes import paired
from tlpipeline.profiling import Tangent, slice_test

SEEN = Evidence(
    images=1000,
    classes=10,
    validation=100,
    majority=0.1,
    parameters=1_000_000,
    forward_ops=10_000_000,
    cut_ops=8_000_000,
    sampled=512,
    head_similarity=0.3,
    last=0.90,
    cut=0.88,
    multi=0.91,
    cut_gain=-0.02,
    cut_error=0.01,
    multi_gain=0.01,
    multi_error=0.01,
    over_gain=0.0,
    over_error=0.01,
    slope=0.02,
    gain=-0.02,
    significance=0.9,
    similar=0.95,
    confirmed=False,
)
NAMES = tuple(figures(SEEN, 0.9))


def model(intercept: float = 0.0, deviation: float = 0.3, slant: float = 1.0, offset: float = 0.0, **coefficients: float) -> Outlook:
    """An outlook of one's own. Keywords are figures with underscores: their effect on the log odds, from the figures of SEEN at 90 %."""
    by_name = {name.replace(" ", "_"): name for name in NAMES}
    wide = {name: 10.0 for name in NAMES}
    return replace(
        NEUTRAL,
        centre=figures(SEEN, 0.9),
        spread={name: 1.0 for name in NAMES},
        coefficients={name: 0.0 for name in NAMES} | {by_name[key]: value for key, value in coefficients.items()},
        intercept=intercept,
        deviation=deviation,
        slant=slant,
        offset=offset,
        lowest={name: -high for name, high in wide.items()},
        highest=wide,
        rows=100,
        data=("planted",),
    )


def seen_by(rng: np.random.Generator) -> Evidence:
    """Evidence of a random data set."""
    images = int(10 ** rng.uniform(2, 4.5))
    return replace(
        SEEN,
        images=images,
        classes=int(rng.integers(2, 40)),
        parameters=int(10 ** rng.uniform(5.5, 7.5)),
        head_similarity=float(rng.uniform(0, 0.9)),
        slope=float(rng.uniform(-0.02, 0.1)),
        gain=float(rng.uniform(-0.1, 0.2)),
    )


def observed(
    truth: Callable[[Evidence, float], float], sets: int = 24, each: int = 6, seed: int = 0, noise: float = 0.05
) -> list[Observed]:
    """Rows of several data sets whose shift is this function of the evidence, give or take `noise`."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, _ in product(range(sets), range(each)):
        seen, frozen = seen_by(rng), float(rng.uniform(0.5, 0.97))
        odds = log_odds(frozen, 100_000) + truth(seen, frozen) + rng.normal(0, noise)
        tuned = float(1 / (1 + math.exp(-odds)))
        looks = (frozen - 0.5 * (1 - frozen), frozen, tuned)
        rows.append(
            Observed(
                data=f"set{name}",
                evidence=seen,
                frozen=frozen,
                frozen_test=frozen,
                tuned_test=tuned,
                test=100_000,
                best_test=max(tuned, frozen),
                cut_test=float(0.05 - 0.2 * (seen.head_similarity or 0) + rng.normal(0, 0.01)),
                multi_test=float(0.02 + rng.normal(0, 0.01)),
                looks=looks,
                validated=frozen,
                validation=200,
            )
        )
    return rows


def headroom(seen: Evidence, frozen: float) -> float:
    """What the tests plant: more images and more headroom are good for fine-tuning, familiar classes are not."""
    x = figures(seen, frozen)
    return 0.3 * (x["log10 images"] - 3) - 0.4 * (x["log odds of the frozen head"] - 1.5) - 0.5 * x["head similarity"] + 0.2


# --- the figures ----------------------------------------------------------------------------------------------------------------------


def test_log_odds_are_finite_at_either_end_and_odd_around_a_half() -> None:
    assert log_odds(0.5, 100) == 0
    assert log_odds(1.0, 100) == pytest.approx(-log_odds(0.0, 100))
    assert 0 < log_odds(1.0, 10) < log_odds(1.0, 1000) < math.inf


def test_the_evidence_holds_the_figures_of_the_profile() -> None:
    profile = planted([0.6, 0.92, 0.80], multi=0.95)
    test = slice_test(profile, 0.01, 200)
    seen = evidence(profile, test)
    assert profile.cut is not None
    assert (seen.last, seen.cut, seen.multi) == (profile.last.accuracy, profile.cut.accuracy, profile.multi.accuracy)
    assert (seen.cut_gain, seen.cut_error) == paired(profile.cut.correct, profile.last.correct, profile.sampled)
    # The multi-tap head has to beat the better of the two simple ones.
    assert (seen.over_gain, seen.over_error) == paired(profile.multi.correct, profile.cut.correct, profile.sampled)
    assert (seen.gain, seen.significance, seen.similar, seen.confirmed) == (test.gain, test.significance, test.similar, test.confirmed)
    assert (seen.cut_ops, seen.forward_ops) == (2000, 3000)


def test_one_tap_is_evidence_without_a_cut() -> None:
    profile = planted([0.8])
    seen = evidence(profile, slice_test(profile, 0.01, 100))
    assert (seen.cut, seen.cut_ops, seen.cut_gain) == (seen.last, 0, 0.0)


def test_without_a_source_head_the_similarity_counts_as_zero() -> None:
    assert figures(replace(SEEN, head_similarity=None), 0.9)["head similarity"] == 0


@pytest.mark.parametrize("change", [{"images": 1}, {"images": 3, "classes": 9}, {"sampled": 1}, {"slope": -0.5}, {"parameters": 0}])
def test_the_figures_of_odd_data_are_finite(change: dict[str, float]) -> None:
    for frozen in (0.0, 0.5, 1.0):
        assert all(math.isfinite(v) for v in figures(replace(SEEN, **change), frozen).values())  # type: ignore[arg-type]


# --- predicting -----------------------------------------------------------------------------------------------------------------------


def test_on_the_scale_of_log_odds_little_can_be_won_above_98_percent() -> None:
    same = model(intercept=0.5)
    low, high = same.predict(SEEN, 0.70, 0.005).gain, same.predict(SEEN, 0.98, 0.005).gain
    assert low > 0.07
    assert 0 < high < 0.01


def test_the_interval_holds_the_gain_and_grows_with_the_deviation() -> None:
    sure, unsure = (model(intercept=0.3, deviation=d).predict(SEEN, 0.8, 0.005) for d in (0.1, 0.6))
    for seen in (sure, unsure):
        assert seen.low < seen.gain < seen.high
        assert seen.tuned - seen.frozen == pytest.approx(seen.gain)
    assert unsure.high - unsure.low > 4 * (sure.high - sure.low)


def test_the_regrets_of_the_two_arms_differ_by_the_expected_gain() -> None:
    seen = model(intercept=0.1, deviation=0.4).predict(SEEN, 0.8, 0.005)
    assert seen.frozen_regret - seen.tuned_regret == pytest.approx(seen.gain)
    assert min(seen.frozen_regret, seen.tuned_regret) > 0


def test_a_larger_tolerance_makes_the_frozen_head_safer() -> None:
    chances = [model(intercept=0.2).predict(SEEN, 0.8, tolerance).within for tolerance in (0, 0.005, 0.02, 0.1)]
    assert chances == sorted(chances)
    assert chances[0] < 0.5 < chances[-1]


def test_beyond_the_fitted_range_is_said_in_words() -> None:
    narrow = replace(
        model(), lowest=dict.fromkeys(NAMES, -10.0) | {"log10 images": 2.0}, highest=dict.fromkeys(NAMES, 10.0) | {"log10 images": 4.0}
    )
    assert narrow.outside(SEEN, 0.9) == ()
    # A tenth of the range is forgiven.
    assert narrow.outside(replace(SEEN, images=15_000), 0.9) == ()
    said = narrow.predict(replace(SEEN, images=100_000), 0.9, 0.005).outside
    assert said == ("images 100,000 lies outside the 100 to 10,000 that the choice was fitted on",)
    assert len(narrow.outside(replace(SEEN, images=20), 0.9)) == 1


def test_a_similarity_beyond_the_fitted_range_is_no_power_of_ten() -> None:
    narrow = replace(
        model(),
        lowest=dict.fromkeys(NAMES, -10.0) | {"head similarity": 0.0},
        highest=dict.fromkeys(NAMES, 10.0) | {"head similarity": 0.5},
    )
    assert narrow.outside(replace(SEEN, head_similarity=0.9), 0.9) == (
        "head similarity 0.90 lies outside the 0.00 to 0.50 that the choice was fitted on",
    )


def test_who_knows_nothing_expects_nothing_either_way() -> None:
    seen = NEUTRAL.predict(SEEN, 0.5, 0.0)
    assert seen.gain == pytest.approx(0, abs=1e-6)
    assert seen.low < -0.1 < 0.1 < seen.high
    assert seen.within == pytest.approx(0.5, abs=0.01)


# --- fitting --------------------------------------------------------------------------------------------------------------------------


def test_the_fit_recovers_a_planted_relation() -> None:
    found = fit(observed(headroom), penalty=0.001, tolerance=0.005)
    slopes = {name: found.coefficients[name] / found.spread[name] for name in NAMES}
    planted_slopes = {"log10 images": 0.3, "log odds of the frozen head": -0.4, "head similarity": -0.5}
    for name in NAMES:
        assert slopes[name] == pytest.approx(planted_slopes.get(name, 0.0), abs=0.08), name
    rng = np.random.default_rng(99)
    for _ in range(50):
        seen, frozen = seen_by(rng), float(rng.uniform(0.55, 0.95))
        assert found.shift(seen, frozen) == pytest.approx(headroom(seen, frozen), abs=0.12)


def test_the_deviation_is_what_the_figures_leave_unexplained_on_sets_that_were_not_fitted() -> None:
    quiet, loud = (fit(observed(headroom, noise=noise), penalty=0.01, tolerance=0.005).deviation for noise in (0.1, 0.4))
    assert 0.07 < quiet < 0.16
    assert 0.3 < loud < 0.55


def test_a_heavy_penalty_forgets_the_figures() -> None:
    found = fit(observed(headroom), penalty=1e6, tolerance=0.005)
    assert max(abs(v) for v in found.coefficients.values()) < 0.001


def test_a_data_set_with_many_rows_counts_once() -> None:
    rows = observed(headroom, sets=2, each=8)
    again = rows[:8] * 9 + rows[8:]
    one, other = (fit(r, penalty=0.1, tolerance=0.005) for r in (rows, again))
    # The bounds that outlying shifts are drawn in to are those of the rows, so that a little changes.
    assert other.intercept == pytest.approx(one.intercept, abs=0.01)
    for name in NAMES:
        assert other.coefficients[name] == pytest.approx(one.coefficients[name], abs=0.01)


def test_one_mad_row_does_not_move_the_fit() -> None:
    rows = observed(headroom)
    mad = [replace(rows[0], tuned_test=0.0001), *rows[1:]]
    one, other = (fit(r, penalty=0.01, tolerance=0.005) for r in (rows, mad))
    assert other.intercept == pytest.approx(one.intercept, abs=0.03)
    assert max(abs(other.coefficients[n] - one.coefficients[n]) for n in NAMES) < 0.05


def test_few_data_sets_are_fitted_without_calibration() -> None:
    found = fit(observed(headroom, sets=2), penalty=0.1, tolerance=0.005)
    assert (found.slant, found.offset, found.deviation) == (1.0, 0.0, 0.5)


def against(seen: Evidence, frozen: float) -> float:
    """Rows in which, by bad luck, small sets liked fine-tuning better."""
    return 0.5 - 0.5 * (math.log10(seen.images) - 3)


@pytest.mark.parametrize("truth", [headroom, against], ids=["with", "against"])
def test_no_fit_lets_more_images_speak_against_fine_tuning(truth: Callable[[Evidence, float], float]) -> None:
    found = fit(observed(truth, each=4), penalty=0.1, tolerance=0.005)
    assert all(found.coefficients[name] >= 0 for name in GROWING)
    assert found.slant >= 0
    rising(found)


def test_the_chance_of_large_does_not_fall_with_images_in_the_shipped_model() -> None:
    rising(fitted())


def rising(found: Outlook) -> None:
    """Hold a model to it on a grid: P(large) and the expected gain never fall as images are added and nothing else changes."""
    grid = product((2, 30, 400), (0.4, 0.8, 0.97, 1.0), (None, 0.9), (-0.05, 0.2), (100_000, 50_000_000), (0.0, 0.005, 0.02))
    for classes, frozen, similarity, gain, parameters, tolerance in grid:
        seen = replace(SEEN, classes=classes, head_similarity=similarity, gain=gain, parameters=parameters)
        told = [found.predict(replace(seen, images=n), frozen, tolerance) for n in (20, 60, 300, 1000, 5000, 40_000, 300_000)]
        for fewer, more in pairwise(told):
            assert 1 - more.within >= 1 - fewer.within - 1e-12
            assert more.gain >= fewer.gain - 1e-12


# --- calibration ----------------------------------------------------------------------------------------------------------------------


def brier(found: Outlook, rows: list[Observed], tolerance: float = 0.005) -> float:
    """Mean squared error of P(the frozen head is within the tolerance)."""
    return float(
        np.mean([(found.predict(r.evidence, r.frozen, tolerance).within - (r.tuned_test - r.frozen_test <= tolerance)) ** 2 for r in rows])
    )


def unruly(seed: int) -> list[Observed]:
    """Rows that mostly follow the figures closely, and in three of ten do the opposite: the robust deviation is too sure."""
    rng = np.random.default_rng(seed + 1000)
    return observed(lambda seen, frozen: (-2 if rng.random() < 0.3 else 3) * headroom(seen, frozen), sets=48, seed=seed)


# The log odds of all of the draws: a raw chance lies within.
MOST = log_odds(1.0, outlook.DRAWS)


@pytest.mark.parametrize("too_sure", [1.0, 2.0, 4.0])
def test_calibration_finds_by_how_much_a_model_is_too_sure(too_sure: float) -> None:
    rng = np.random.default_rng(0)
    raw = rng.uniform(-MOST, MOST, 1500)
    truth = rng.random(1500) < 1 / (1 + np.exp(-raw / too_sure - 0.5))
    slant, offset = outlook._platt(raw, truth)
    assert slant == pytest.approx(1 / too_sure, abs=0.15)
    assert offset == pytest.approx(0.5, abs=0.2)

    def error(slant: float, offset: float) -> float:
        return float(((1 / (1 + np.exp(-slant * raw - offset)) - truth) ** 2).mean())

    assert error(slant, offset) < error(1.0, 0.0)


@pytest.mark.parametrize("seed", range(8))
def test_calibration_is_the_best_there_is_however_little_the_raw_chances_say(seed: int) -> None:
    """The least of penalised log loss, found here by a general method; a slant of hundreds would make every chance 0 or 1."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(-MOST, MOST, 60)
    truth = rng.random(60) < 1 / (1 + np.exp(-0.3 * raw - rng.normal()))

    def loss(at: np.ndarray) -> float:
        odds = at[0] * raw + at[1]
        return float((np.logaddexp(0, odds) - truth * odds).sum() + 0.5 * (at[0] - 1) ** 2 + 0.5 * at[1] ** 2)

    slant, offset = minimize(loss, [1.0, 0.0]).x
    assert outlook._platt(raw, truth) == (pytest.approx(slant, abs=0.01), pytest.approx(offset, abs=0.01))


def test_two_rows_hardly_calibrate() -> None:
    slant, offset = outlook._platt(np.array([1.0, -1.0]), np.array([True, False]))
    assert 0.8 < slant < 1.6
    assert abs(offset) < 0.01


def test_chances_that_point_the_wrong_way_are_worth_nothing_and_not_turned_round() -> None:
    raw = np.linspace(-2, 2, 41)
    assert outlook._platt(raw, raw < 0)[0] == 0


def test_calibration_tames_a_model_that_is_too_sure() -> None:
    found = fit(unruly(10), penalty=0.01, tolerance=0.005)
    fresh = unruly(11) + unruly(12)
    assert found.slant < 0.8
    assert brier(found, fresh) < brier(replace(found, slant=1.0, offset=0.0), fresh) - 0.005


def test_calibration_leaves_a_model_alone_that_knows_how_sure_it_is() -> None:
    found = fit(observed(headroom, noise=0.4), penalty=0.01, tolerance=0.005)
    fresh = observed(headroom, noise=0.4, seed=1)
    assert brier(found, fresh) <= brier(replace(found, slant=1.0, offset=0.0), fresh) + 0.005
    assert brier(found, fresh) < 0.2


def test_the_calibrated_chance_is_the_share_that_comes_true() -> None:
    found = fit(unruly(10), penalty=0.01, tolerance=0.005)
    fresh = unruly(11) + unruly(12)
    within = np.array([found.predict(r.evidence, r.frozen, 0.005).within for r in fresh])
    true = np.array([r.tuned_test - r.frozen_test <= 0.005 for r in fresh])
    for part in (within < 0.5, within >= 0.5):
        assert part.sum() > 30
        assert true[part].mean() == pytest.approx(within[part].mean(), abs=0.12)


def test_the_lag_is_measured_as_a_share_of_the_frozen_errors() -> None:
    rows = [
        replace(r, looks=(r.tuned_test - 0.6 * (1 - r.frozen), r.tuned_test - 0.1 * (1 - r.frozen), r.tuned_test))
        for r in observed(headroom)
    ]
    found = fit(rows, penalty=0.01, tolerance=0.005)
    for (behind, spread), wanted in zip(found.lag, (0.6, 0.1, 0.0), strict=True):
        assert behind == pytest.approx(wanted, abs=0.001)
        assert spread == pytest.approx(0, abs=0.001)
    # The frozen head is solved once more with validation: what a look sees of it is too low by what that brings.
    again = fit([replace(r, validated=r.frozen - 0.05 * (1 - r.frozen)) for r in rows], penalty=0.01, tolerance=0.005)
    assert [behind for behind, _ in again.lag] == [pytest.approx(wanted, abs=0.001) for wanted in (0.55, 0.05, -0.05)]
    # Validations too small to tell say nothing.
    assert fit([replace(r, validation=59) for r in rows], penalty=0.01, tolerance=0.005).lag == NEUTRAL.lag


# --- the heads ------------------------------------------------------------------------------------------------------------------------


def test_what_the_heads_win_is_recovered() -> None:
    heads = fit(observed(headroom), penalty=0.01, tolerance=0.005).heads
    assert heads["multi"] == (pytest.approx(0.02, abs=0.01), pytest.approx(0, abs=0.02), pytest.approx(0.01, abs=0.004))
    level, slope, spread = heads["cut"]
    assert (level, slope) == (pytest.approx(0.05, abs=0.02), pytest.approx(-0.2, abs=0.05))
    assert spread < 0.03


@pytest.mark.parametrize("name", outlook.HEADS)
def test_a_head_is_expected_between_what_is_usual_and_what_was_measured(name: str) -> None:
    """With few images it is what is usual, with many what was measured."""
    known = replace(model(), heads=dict.fromkeys(outlook.HEADS, (0.03, -0.1, 0.05)))
    # Usual at S = 0.3 is nothing; measured are ten points.
    told = [known.head_gain(name, replace(SEEN, **{f"{name}_gain": 0.1, f"{name}_error": error})) for error in (1.0, 0.05, 0.001)]
    assert told == [pytest.approx(0, abs=0.001), pytest.approx(0.05), pytest.approx(0.1, abs=0.001)]


# --- the file -------------------------------------------------------------------------------------------------------------------------


def test_an_outlook_survives_json() -> None:
    found = fit(observed(headroom), penalty=0.1, tolerance=0.005)
    again = Outlook.from_json(json.loads(json.dumps(found.to_json())))
    assert again.predict(SEEN, 0.9, 0.005) == found.predict(SEEN, 0.9, 0.005)
    assert json.dumps(again.to_json()) == json.dumps(found.to_json())
    assert NEUTRAL.to_json()["format"] == outlook.FORMAT


def test_the_shipped_model_knows_the_figures_and_nothing_else() -> None:
    found = fitted()
    for part in (found.centre, found.spread, found.coefficients, found.lowest, found.highest):
        assert [name for name in part if name != "log10 classes"] == list(NAMES)
        assert all(math.isfinite(v) for v in part.values())
    assert all(v > 0 for v in found.spread.values())
    assert all(found.lowest[name] <= found.highest[name] for name in NAMES)
    assert found.deviation > 0
    assert found.slant >= 0
    assert all(math.isfinite(v) for v in (found.intercept, found.deviation, found.slant, found.offset))
    assert len(found.lag) == 3
    assert all(spread >= 0 for _, spread in found.lag)
    assert found.rows >= len(found.data) > 0
    assert all(found.coefficients[name] >= 0 for name in GROWING)


def test_the_shipped_model_is_of_the_format_that_is_read() -> None:
    assert json.loads(outlook.FITTED.read_text(encoding="utf-8"))["format"] == outlook.FORMAT


# --- before and beyond what was seen ----------------------------------------------------------------------------------------------------


def test_the_prior_is_fitted_to_who_won_and_rises_with_images() -> None:
    found = fit(observed(headroom), penalty=0.1, tolerance=0.005)
    rows = observed(headroom, seed=5)
    won = np.array([r.tuned_test - r.frozen_test > 0.005 for r in rows])
    said = np.array([found.prior_chance(r.evidence) for r in rows])
    assert ((said - won) ** 2).mean() < ((won.mean() - won) ** 2).mean()
    told = [found.prior_chance(replace(SEEN, images=n)) for n in (30, 100, 1000, 10_000, 100_000)]
    assert told == sorted(told)
    assert told[-1] > told[0] + 0.1


def test_no_prior_lets_more_images_speak_against_fine_tuning() -> None:
    found = fit(observed(against, each=4), penalty=0.1, tolerance=0.005)
    assert all(found.prior[name] >= 0 for name in GROWING)


def test_beyond_the_points_of_the_fit_the_line_ends_and_less_is_known() -> None:
    found = fit(observed(lambda seen, frozen: -0.5 * (math.log10(seen.parameters) - 6)), penalty=0.01, tolerance=0.005)
    edge = 10 ** (found.highest["log10 parameters"] + 0.1 * (found.highest["log10 parameters"] - found.lowest["log10 parameters"]))
    inside, at, beyond, far = (replace(SEEN, parameters=round(n)) for n in (edge / 10, edge, edge * 100, edge * 10_000))
    assert found.shift(at, 0.8) < found.shift(inside, 0.8) - 0.3
    assert found.shift(beyond, 0.8) == pytest.approx(found.shift(at, 0.8), abs=1e-6)
    assert found.unexplained(inside, 0.8) == found.unexplained(at, 0.8) == found.deviation
    assert found.deviation < found.unexplained(beyond, 0.8) <= found.unexplained(far, 0.8)
    assert any(words.startswith("parameters") for words in found.outside(beyond, 0.8))
    assert not found.outside(inside, 0.8)
    # Doubt takes no side: the same gain is expected as at the edge, in a wider interval.
    edge_of, further = found.predict(at, 0.8, 0.005), found.predict(far, 0.8, 0.005)
    assert further.gain == pytest.approx(edge_of.gain, abs=1e-6)
    assert further.tuned == pytest.approx(edge_of.tuned, abs=1e-6)
    assert further.high - further.low > 1.5 * (edge_of.high - edge_of.low)


def test_classes_beyond_those_of_the_fit_are_said() -> None:
    found = fitted()
    many = replace(SEEN, classes=400, images=40_000, parameters=500_000)
    assert any(words.startswith("classes 400 lies outside") for words in found.outside(many, 0.8))


def test_an_unknown_head_similarity_is_outside_of_what_was_fitted() -> None:
    assert any("without a source head" in words for words in fitted().outside(replace(SEEN, head_similarity=None), 0.8))


def test_the_middle_half_of_the_draws_is_that_of_a_normal_distribution_and_the_tails_are_heavier() -> None:
    from scipy.stats import norm, t

    place = (np.arange(outlook.DRAWS) + 0.5) / outlook.DRAWS
    assert np.quantile(outlook.QUANTILES, (0.25, 0.75)) == pytest.approx(norm.ppf((0.25, 0.75)), abs=0.01)
    assert pytest.approx(t.ppf(place, 4) * norm.ppf(0.75) / t.ppf(0.75, 4), abs=1e-4) == outlook.QUANTILES
    assert outlook.QUANTILES[-1] > 1.5 * norm.ppf(place[-1])


def test_with_more_images_the_choice_is_likelier_to_have_been_right() -> None:
    """With few images the best arm is that of the draw; what is chosen on left-out sets says how often."""
    rng = np.random.default_rng(3)

    def drawn(rows: list[Observed]) -> list[Observed]:
        lucky = [rng.normal(0, 0.5 / math.sqrt(r.evidence.images)) for r in rows]
        return [replace(r, best_test=max(r.best_test, r.frozen_test + abs(luck))) for r, luck in zip(rows, lucky, strict=True)]

    found = fit(drawn(observed(headroom)), penalty=0.1, tolerance=0.005)
    told = [found.settled(replace(SEEN, images=n)) for n in (50, 500, 5000, 50_000)]
    assert told == sorted(told)
    assert told[-1] > told[0] + 0.1
    assert fitted().settled(replace(SEEN, images=4000)) >= fitted().settled(replace(SEEN, images=100))


def test_the_evidence_holds_what_the_tangent_probe_says_on_its_own_images() -> None:
    profile = replace(planted([0.6, 0.92, 0.80]), tangent=Tangent(50, 1.0, 0.2, 0.8, 0.4))
    seen = evidence(profile, slice_test(profile, 0.01, 100))
    assert seen.tangent_gain == pytest.approx(log_odds(1.0, 50) - log_odds(0.8, 50))
    assert seen.tangent_error == pytest.approx(math.log(0.5))


def test_the_deviation_is_not_that_of_the_rows_that_were_fitted() -> None:
    """Eight rows and eight figures: in the rows of the fit nothing is left unexplained."""
    found = fit(observed(lambda seen, frozen: 0.0, sets=4, each=2, noise=0.4), penalty=1e-4, tolerance=0.005)
    assert found.deviation > 0.3


def test_calibration_asks_models_that_have_not_seen_the_data_set() -> None:
    """Of their own rows figures as many as rows know everything, of other data sets nothing."""
    rows = observed(lambda seen, frozen: 0.0, sets=6, each=2, noise=1.0)
    assert fit(rows, penalty=1e-4, tolerance=0.005).slant < 0.9


def test_what_is_settled_and_who_wins_are_told_by_the_tolerance() -> None:
    rows = observed(lambda seen, frozen: 1.0)
    near = [replace(r, best_test=r.tuned_test + 0.003) for r in rows]
    assert fit(near, penalty=0.1, tolerance=0.005).settled(SEEN) > 0.9
    barely = [replace(r, tuned_test=r.frozen_test + 0.003, best_test=r.frozen_test + 0.003) for r in rows]
    assert fit(barely, penalty=0.1, tolerance=0.005).prior_chance(SEEN) < 0.1
    assert fit(barely, penalty=0.1, tolerance=0.001).prior_chance(SEEN) > 0.9


def test_the_spread_of_the_lag_is_fine_tuning_s_own_and_not_that_of_the_judges() -> None:
    rng = np.random.default_rng(0)
    rows = [
        replace(
            r,
            looks=(r.tuned_test - 0.6 * (1 - r.frozen), r.tuned_test - 0.1 * (1 - r.frozen), r.tuned_test),
            validated=r.frozen + rng.normal(0, 0.05),
        )
        for r in observed(headroom)
    ]
    assert [spread for _, spread in fit(rows, penalty=0.01, tolerance=0.005).lag] == pytest.approx([0, 0, 0], abs=1e-3)
