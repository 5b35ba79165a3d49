"""The outlook: more images never speak against fine-tuning, and it says when it is asked too much."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.evidence import NAMES, SEEN, model, planted, rising
from tlpipeline.choice import predictor
from tlpipeline.choice.decision import OutOfRange
from tlpipeline.choice.predictor import GROWING, NEUTRAL, evidence, figures, load_predictor, log_odds
from tlpipeline.profiling.profile import Tangent, slice_test
from tlpipeline.stats import paired

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
    chances = [model(intercept=0.2).predict(SEEN, 0.8, tolerance).p_frozen_within for tolerance in (0, 0.005, 0.02, 0.1)]
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
    assert said == (OutOfRange("images", 100_000, 100, 10_000),)
    assert len(narrow.outside(replace(SEEN, images=20), 0.9)) == 1


def test_a_similarity_beyond_the_fitted_range_is_no_power_of_ten() -> None:
    narrow = replace(
        model(),
        lowest=dict.fromkeys(NAMES, -10.0) | {"head similarity": 0.0},
        highest=dict.fromkeys(NAMES, 10.0) | {"head similarity": 0.5},
    )
    assert narrow.outside(replace(SEEN, head_similarity=0.9), 0.9) == (OutOfRange("head similarity", 0.9, 0.0, 0.5),)


def test_who_knows_nothing_expects_nothing_either_way() -> None:
    seen = NEUTRAL.predict(SEEN, 0.5, 0.0)
    assert seen.gain == pytest.approx(0, abs=1e-6)
    assert seen.low < -0.1 < 0.1 < seen.high
    assert seen.p_frozen_within == pytest.approx(0.5, abs=0.01)


# --- with more images ----------------------------------------------------------------------------------------------------------------


def test_the_chance_of_large_does_not_fall_with_images_in_the_shipped_model() -> None:
    rising(load_predictor())


# --- the heads ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", predictor.HEADS)
def test_a_head_is_expected_between_what_is_usual_and_what_was_measured(name: str) -> None:
    """With few images it is what is usual, with many what was measured."""
    known = replace(model(), heads=dict.fromkeys(predictor.HEADS, (0.03, -0.1, 0.05)))
    # Usual at S = 0.3 is nothing; measured are ten points.
    told = [known.head_gain(name, replace(SEEN, **{f"{name}_gain": 0.1, f"{name}_error": error})) for error in (1.0, 0.05, 0.001)]
    assert told == [pytest.approx(0, abs=0.001), pytest.approx(0.05), pytest.approx(0.1, abs=0.001)]


# --- the file -------------------------------------------------------------------------------------------------------------------------


def test_the_shipped_model_knows_the_figures_and_nothing_else() -> None:
    found = load_predictor()
    for part in (found.center, found.spread, found.coefficients, found.lowest, found.highest):
        assert [name for name in part if name != "log10 classes"] == list(NAMES)
        assert all(math.isfinite(v) for v in part.values())
    assert all(v > 0 for v in found.spread.values())
    assert all(found.lowest[name] <= found.highest[name] for name in NAMES)
    assert found.deviation > 0
    assert found.platt_slope >= 0
    assert all(math.isfinite(v) for v in (found.intercept, found.deviation, found.platt_slope, found.platt_intercept))
    assert len(found.remaining_gain) == 3
    assert all(spread >= 0 for _, spread in found.remaining_gain)
    assert found.rows >= len(found.data) > 0
    assert all(found.coefficients[name] >= 0 for name in GROWING)


def test_the_shipped_model_is_of_the_format_that_is_read() -> None:
    assert json.loads(predictor.FITTED.read_text(encoding="utf-8"))["format"] == predictor.FORMAT


# --- before and beyond what was seen ----------------------------------------------------------------------------------------------------


def test_classes_beyond_those_of_the_fit_are_said() -> None:
    found = load_predictor()
    many = replace(SEEN, classes=400, images=40_000, parameters=500_000)
    assert ("classes", 400) in [(figure.name, figure.value) for figure in found.outside(many, 0.8)]


def test_an_unknown_head_similarity_is_outside_of_what_was_fitted() -> None:
    assert ("head similarity", None) in [(f.name, f.value) for f in load_predictor().outside(replace(SEEN, head_similarity=None), 0.8)]


def test_the_middle_half_of_the_draws_is_that_of_a_normal_distribution_and_the_tails_are_heavier() -> None:
    from scipy.stats import norm, t

    place = (np.arange(predictor.DRAWS) + 0.5) / predictor.DRAWS
    assert np.quantile(predictor.QUANTILES, (0.25, 0.75)) == pytest.approx(norm.ppf((0.25, 0.75)), abs=0.01)
    assert pytest.approx(t.ppf(place, 4) * norm.ppf(0.75) / t.ppf(0.75, 4), abs=1e-4) == predictor.QUANTILES
    assert predictor.QUANTILES[-1] > 1.5 * norm.ppf(place[-1])


def test_the_evidence_holds_what_the_tangent_probe_says_on_its_own_images() -> None:
    profile = replace(planted([0.6, 0.92, 0.80]), tangent=Tangent(50, 1.0, 0.2, 0.8, 0.4))
    seen = evidence(profile, slice_test(profile, 0.01, 100))
    assert seen.tangent_gain == pytest.approx(log_odds(1.0, 50) - log_odds(0.8, 50))
    assert seen.tangent_error == pytest.approx(math.log(0.5))
