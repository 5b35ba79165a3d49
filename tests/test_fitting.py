"""The fit of the outlook: it recovers what was planted, and it knows how sure it may be."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize

from research import fitting
from research.fitting import Observed, fit
from tests.helpers.evidence import NAMES, SEEN, rising
from tlpipeline.choice import predictor
from tlpipeline.choice.predictor import GROWING, NEUTRAL, Evidence, GainPredictor, figures, load_predictor, log_odds


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
        tangent_error=float(rng.uniform(-0.4, 0.5)),
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
    """What the tests plant: more images and more headroom are good for fine-tuning, gradients that read no better than features are not."""
    x = figures(seen, frozen)
    return 0.3 * (x["log10 images"] - 3) - 0.4 * (x["log odds of the frozen head"] - 1.5) - 0.5 * x["error of the tangent probe"] + 0.1


def test_the_fit_recovers_a_planted_relation() -> None:
    found = fit(observed(headroom), penalty=0.001, tolerance=0.005)
    slopes = {name: found.coefficients[name] / found.spread[name] for name in NAMES}
    planted_slopes = {"log10 images": 0.3, "log odds of the frozen head": -0.4, "error of the tangent probe": -0.5}
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
    assert (found.platt_slope, found.platt_intercept, found.deviation) == (1.0, 0.0, 0.5)


def against(seen: Evidence, frozen: float) -> float:
    """Rows in which, by bad luck, small sets liked fine-tuning better."""
    return 0.5 - 0.5 * (math.log10(seen.images) - 3)


@pytest.mark.slow
@pytest.mark.parametrize("truth", [headroom, against], ids=["with", "against"])
def test_no_fit_lets_more_images_speak_against_fine_tuning(truth: Callable[[Evidence, float], float]) -> None:
    found = fit(observed(truth, each=4), penalty=0.1, tolerance=0.005)
    assert all(found.coefficients[name] >= 0 for name in GROWING)
    assert found.platt_slope >= 0
    rising(found)


def brier(found: GainPredictor, rows: list[Observed], tolerance: float = 0.005) -> float:
    """Mean squared error of P(the frozen head is within the tolerance)."""
    return float(
        np.mean(
            [
                (found.predict(r.evidence, r.frozen, tolerance).p_frozen_within - (r.tuned_test - r.frozen_test <= tolerance)) ** 2
                for r in rows
            ]
        )
    )


def unruly(seed: int) -> list[Observed]:
    """Rows that mostly follow the figures closely, and in three of ten do the opposite: the robust deviation is too sure."""
    rng = np.random.default_rng(seed + 1000)
    return observed(lambda seen, frozen: (-2 if rng.random() < 0.3 else 3) * headroom(seen, frozen), sets=48, seed=seed)


# The log odds of all of the draws: a raw chance lies within.
MOST = log_odds(1.0, predictor.DRAWS)


@pytest.mark.parametrize("too_sure", [1.0, 2.0, 4.0])
def test_calibration_finds_by_how_much_a_model_is_too_sure(too_sure: float) -> None:
    rng = np.random.default_rng(0)
    raw = rng.uniform(-MOST, MOST, 1500)
    truth = rng.random(1500) < 1 / (1 + np.exp(-raw / too_sure - 0.5))
    platt_slope, platt_intercept = fitting.platt_scaling(raw, truth)
    assert platt_slope == pytest.approx(1 / too_sure, abs=0.15)
    assert platt_intercept == pytest.approx(0.5, abs=0.2)

    def error(platt_slope: float, platt_intercept: float) -> float:
        return float(((1 / (1 + np.exp(-platt_slope * raw - platt_intercept)) - truth) ** 2).mean())

    assert error(platt_slope, platt_intercept) < error(1.0, 0.0)


@pytest.mark.parametrize("seed", range(8))
def test_calibration_is_the_best_there_is_however_little_the_raw_chances_say(seed: int) -> None:
    """The least of penalized log loss, found here by a general method; a platt_slope of hundreds would make every chance 0 or 1."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(-MOST, MOST, 60)
    truth = rng.random(60) < 1 / (1 + np.exp(-0.3 * raw - rng.normal()))

    def loss(at: np.ndarray) -> float:
        odds = at[0] * raw + at[1]
        return float((np.logaddexp(0, odds) - truth * odds).sum() + 0.5 * (at[0] - 1) ** 2 + 0.5 * at[1] ** 2)

    platt_slope, platt_intercept = minimize(loss, [1.0, 0.0]).x
    assert fitting.platt_scaling(raw, truth) == (pytest.approx(platt_slope, abs=0.01), pytest.approx(platt_intercept, abs=0.01))


def test_two_rows_hardly_calibrate() -> None:
    platt_slope, platt_intercept = fitting.platt_scaling(np.array([1.0, -1.0]), np.array([True, False]))
    assert 0.8 < platt_slope < 1.6
    assert abs(platt_intercept) < 0.01


def test_chances_that_point_the_wrong_way_are_worth_nothing_and_not_turned_round() -> None:
    raw = np.linspace(-2, 2, 41)
    assert fitting.platt_scaling(raw, raw < 0)[0] == 0


def test_calibration_tames_a_model_that_is_too_sure() -> None:
    found = fit(unruly(10), penalty=0.01, tolerance=0.005)
    fresh = unruly(11) + unruly(12)
    assert found.platt_slope < 0.8
    assert brier(found, fresh) < brier(replace(found, platt_slope=1.0, platt_intercept=0.0), fresh) - 0.005


def test_calibration_leaves_a_model_alone_that_knows_how_sure_it_is() -> None:
    found = fit(observed(headroom, noise=0.4), penalty=0.01, tolerance=0.005)
    fresh = observed(headroom, noise=0.4, seed=1)
    assert brier(found, fresh) <= brier(replace(found, platt_slope=1.0, platt_intercept=0.0), fresh) + 0.005
    assert brier(found, fresh) < 0.2


def test_the_calibrated_chance_is_the_share_that_comes_true() -> None:
    found = fit(unruly(10), penalty=0.01, tolerance=0.005)
    fresh = unruly(11) + unruly(12)
    within = np.array([found.predict(r.evidence, r.frozen, 0.005).p_frozen_within for r in fresh])
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
    for (behind, spread), wanted in zip(found.remaining_gain, (0.6, 0.1, 0.0), strict=True):
        assert behind == pytest.approx(wanted, abs=0.001)
        assert spread == pytest.approx(0, abs=0.001)
    # The frozen head is solved once more with validation: what a look sees of it is too low by what that brings.
    again = fit([replace(r, validated=r.frozen - 0.05 * (1 - r.frozen)) for r in rows], penalty=0.01, tolerance=0.005)
    assert [behind for behind, _ in again.remaining_gain] == [pytest.approx(wanted, abs=0.001) for wanted in (0.55, 0.05, -0.05)]
    # Validations too small to tell say nothing.
    assert fit([replace(r, validation=59) for r in rows], penalty=0.01, tolerance=0.005).remaining_gain == NEUTRAL.remaining_gain


def test_what_the_heads_win_is_recovered() -> None:
    heads = fit(observed(headroom), penalty=0.01, tolerance=0.005).heads
    assert heads["multi"] == (pytest.approx(0.02, abs=0.01), pytest.approx(0, abs=0.02), pytest.approx(0.01, abs=0.004))
    level, slope, spread = heads["cut"]
    assert (level, slope) == (pytest.approx(0.05, abs=0.02), pytest.approx(-0.2, abs=0.05))
    assert spread < 0.03


def test_what_the_prediction_is_surer_of_is_likelier_to_have_been_right_and_it_is_said_how_likely() -> None:
    """Calibrated on left-out sets: where what decides is not among the figures, being sure is worth less."""
    rng = np.random.default_rng(3)
    honest, blind = (fit(observed(truth, noise=0.2), penalty=0.1, tolerance=0.005) for truth in (headroom, lambda *_: rng.normal(0, 1.5)))
    for found in (honest, blind, load_predictor()):
        told = [found.p_within_tolerance(own) for own in (0.5, 0.7, 0.9, 0.99)]
        assert told == sorted(told)
        assert all(0 < p < 1 for p in told)
    assert honest.p_within_tolerance(0.99) > 0.95
    assert blind.p_within_tolerance(0.99) < honest.p_within_tolerance(0.99)


def test_the_deviation_is_not_that_of_the_rows_that_were_fitted() -> None:
    """Eight rows and eight figures: in the rows of the fit nothing is left unexplained."""
    found = fit(observed(lambda seen, frozen: 0.0, sets=4, each=2, noise=0.4), penalty=1e-4, tolerance=0.005)
    assert found.deviation > 0.3


def test_calibration_asks_models_that_have_not_seen_the_data_set() -> None:
    """Of their own rows figures as many as rows know everything, of other data sets nothing."""
    rows = observed(lambda seen, frozen: 0.0, sets=6, each=2, noise=1.0)
    assert fit(rows, penalty=1e-4, tolerance=0.005).platt_slope < 0.9


def test_what_is_settled_goes_by_the_tolerance() -> None:
    rows = observed(lambda seen, frozen: 1.0)
    near = [replace(r, best_test=r.tuned_test + 0.003) for r in rows]
    assert fit(near, penalty=0.1, tolerance=0.005).p_within_tolerance(0.9) > 0.9


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
    assert [spread for _, spread in fit(rows, penalty=0.01, tolerance=0.005).remaining_gain] == pytest.approx([0, 0, 0], abs=1e-3)


def test_beyond_the_points_of_the_fit_the_line_ends_and_less_is_known() -> None:
    found = fit(observed(lambda seen, frozen: 0.4), penalty=0.01, tolerance=0.005)
    found = replace(found, coefficients={**found.coefficients, "head similarity": -found.spread["head similarity"]})
    edge = found.highest["head similarity"] + 0.1 * (found.highest["head similarity"] - found.lowest["head similarity"])
    inside, at, beyond, far = (replace(SEEN, head_similarity=s) for s in (edge / 3, edge - 1e-9, edge + 0.9, edge + 9))
    assert found.shift(at, 0.8) < found.shift(inside, 0.8) - 0.3
    assert found.shift(beyond, 0.8) == pytest.approx(found.shift(at, 0.8), abs=1e-6)
    assert found.unexplained(inside, 0.8) == found.unexplained(at, 0.8) == found.deviation
    assert found.deviation < found.unexplained(beyond, 0.8) <= found.unexplained(far, 0.8)
    assert "head similarity" in [figure.name for figure in found.outside(beyond, 0.8)]
    assert not found.outside(inside, 0.8)
    # Doubt takes no side: the same gain is expected as at the edge, in a wider interval.
    edge_of, further = found.predict(at, 0.8, 0.005), found.predict(far, 0.8, 0.005)
    assert further.gain == pytest.approx(edge_of.gain, abs=1e-6)
    assert further.tuned == pytest.approx(edge_of.tuned, abs=1e-6)
    assert further.high - further.low > 1.5 * (edge_of.high - edge_of.low)


def test_the_size_of_the_network_has_a_range_and_no_part_in_the_prediction() -> None:
    found = fit(observed(lambda seen, frozen: 0.5 * (math.log10(seen.parameters) - 6)), penalty=0.01, tolerance=0.005)
    small, large, huge = (replace(SEEN, parameters=n) for n in (400_000, 20_000_000, 2_000_000_000))
    assert found.shift(small, 0.8) == found.shift(large, 0.8)
    assert "parameters" in [figure.name for figure in found.outside(huge, 0.8)]
    assert found.unexplained(huge, 0.8) > found.unexplained(large, 0.8) == found.deviation


def test_an_outlook_survives_json() -> None:
    found = fit(observed(headroom), penalty=0.1, tolerance=0.005)
    again = GainPredictor.from_json(json.loads(json.dumps(found.to_json())))
    assert again.predict(SEEN, 0.9, 0.005) == found.predict(SEEN, 0.9, 0.005)
    assert json.dumps(again.to_json()) == json.dumps(found.to_json())
    assert NEUTRAL.to_json()["format"] == predictor.FORMAT
