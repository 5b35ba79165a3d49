"""The choice: planted evidence decides as planted, what the user asks for is done, and weak evidence is said in a sentence.

The fitted model that ships is refitted now and then, so a model of one's own predicts here: headroom and images speak for fine-tuning.
"""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tests.helpers.decisions import DIFFERENT_SMALL, MODEL, RULE, SIMILAR_LARGE, SIMILAR_SMALL, decide
from tests.helpers.evidence import exact, from_bits, model, planted, right
from tlpipeline.choice import decide as choice
from tlpipeline.choice import predictor, reasons
from tlpipeline.choice.cases import CASES, find
from tlpipeline.choice.decide import undecided
from tlpipeline.choice.decision import InterimResult, Race
from tlpipeline.choice.policy import weigh
from tlpipeline.choice.predictor import GainPredictor, load_predictor
from tlpipeline.errors import BackboneError, ParamsError
from tlpipeline.profiling.profile import Profile, slice_test

# Expects nothing of fine-tuning, or much, whatever the data.
FROZEN, TUNED = model(intercept=-0.5), model(intercept=0.5)
DIFFERENT_LARGE = [0.40, 0.70, 0.50]
PLANTED = {
    "small_similar": SIMILAR_SMALL,
    "small_different": DIFFERENT_SMALL,
    "large_similar": SIMILAR_LARGE,
    "large_different": DIFFERENT_LARGE,
}


# --- planted evidence -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLANTED)
def test_planted_evidence_decides_as_planted(case: str) -> None:
    decision = decide(planted(PLANTED[case]))
    assert decision.case == case
    assert choice.case_of(decision.tuning, decision.cutting).name == case
    for axis in (decision.tuning, decision.cutting):
        assert (axis.counted > axis.border) == axis.exceeds


@pytest.mark.parametrize("case", PLANTED)
def test_planted_evidence_decides_the_same_whatever_the_draw(case: str) -> None:
    assert {decide(planted(PLANTED[case], seed=10 * seed)).case for seed in range(6)} == {case}


def test_the_same_profile_gives_the_same_decision() -> None:
    assert decide(planted(DIFFERENT_SMALL)) == decide(planted(DIFFERENT_SMALL))


def test_choose_decides_with_the_model_of_the_package() -> None:
    profile = planted(DIFFERENT_SMALL)
    assert choice.choose(profile, RULE) == decide(profile, RULE, predictor.load_predictor())


def test_only_the_slicing_case_cuts() -> None:
    for case, wanted in {"small_similar": "tap2", "small_different": "tap1", "large_similar": "tap2", "large_different": "tap2"}.items():
        decision = decide(planted(PLANTED[case]))
        assert decision.slice == wanted
        assert (decision.saved_ops > 0) == (case == "small_different")
        assert decision.readings[0].tap == wanted


def test_noise_does_not_cut() -> None:
    cut = 0
    for seed in range(40):
        profile = from_bits(np.random.default_rng(seed).random((256, 16)) < 0.95)
        cut += decide(profile, replace(RULE, draws=200)).slice != "tap15"
    assert cut <= 9  # 4 expected; more than 9 has a probability below 1 %


def test_without_a_significant_slice_nothing_is_cut_and_the_reason_is_given() -> None:
    """Different by a hair: the gain says different, the family-wise test does not fire."""
    rule = replace(RULE, gain=0.0, alpha=0.001)
    decision = decide(planted([0.90, 0.935, 0.92], m=300), rule, FROZEN)
    assert decision.case == "small_similar"
    assert (decision.cutting.why, decision.cutting.counted) == ("not_significant", 0)


def test_a_slice_that_held_out_images_do_not_confirm_is_not_made() -> None:
    decision = decide(planted(DIFFERENT_SMALL, last_held_out=0.99), model=FROZEN)
    assert decision.case == "small_similar"
    assert (decision.cutting.why, decision.cutting.counted) == ("not_confirmed", 0)


def test_a_head_on_several_taps_is_read_where_it_wins_more_than_the_tolerance() -> None:
    several = decide(planted([0.6, 0.8, 0.88], multi=0.95))
    assert (several.case, several.head, len(several.readings)) == ("small_similar", "multi", 1)
    assert several.slice == "tap2"
    assert decide(planted([0.6, 0.8, 0.95], multi=0.95)).head == "last"


def test_the_gain_of_fine_tuning_does_not_fall_as_images_are_added() -> None:
    """The rest of the profile held fixed."""
    for accuracies in PLANTED.values():
        profile = planted(accuracies)
        told = [decide(replace(profile, images=n)) for n in (100, 300, 1000, 3000, 10_000, 100_000)]
        for fewer, more in pairwise(told):
            assert more.tuning.gain >= fewer.tuning.gain
            assert (more.case.startswith("large"), True) >= (fewer.case.startswith("large"), True)
        assert told[-1].tuning.gain > told[0].tuning.gain


def test_the_arms_are_what_was_measured_and_what_was_predicted() -> None:
    profile = planted(DIFFERENT_SMALL, multi=0.94)
    arms = {arm.name: arm for arm in decide(profile).arms}
    assert list(arms) == ["frozen", "cut", "multi", "tuned"]
    assert profile.cut is not None
    for name, head in (("frozen", profile.last), ("cut", profile.cut), ("multi", profile.multi)):
        assert (arms[name].accuracy, arms[name].low, arms[name].high) == (head.accuracy, head.low, head.high)
    assert arms["cut"].cost < arms["frozen"].cost < arms["tuned"].cost / 10
    assert arms["tuned"].low < arms["tuned"].accuracy < arms["tuned"].high


def test_a_larger_sample_is_asked_for_only_while_the_choice_is_open() -> None:
    assert not undecided(planted([0.6, 0.8, 0.99]), RULE)
    assert not undecided(planted([0.3, 0.45, 0.60]), RULE)
    assert undecided(planted([0.6, 0.8, 0.90]), RULE)


def test_several_taps_that_read_what_the_cut_one_reads_are_no_reason_to_keep_the_layers_behind() -> None:
    """The cut head and the multi-tap head are right on the same images: neither wins, so the cheaper one is trained."""
    bits = right([0.80, 0.96, 0.85])
    profile = from_bits(bits, multi=bits[:, 1])
    decision = decide(profile)
    assert profile.cut is not None
    assert profile.cut.correct == profile.multi.correct
    assert (decision.head, decision.case) == ("cut", "small_different")


# --- on images --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sets_with_a_known_truth_decide_as_planted(known: dict[str, Profile]) -> None:
    for name, small, large in (
        ("noisy", "small_similar", "large_similar"),
        ("rare", "small_similar", "large_similar"),
        # Read without an error, so that there is nothing left to win.
        ("own", "small_similar", "small_similar"),
        ("early", "small_different", "small_different"),
    ):
        assert decide(known[name], model=FROZEN).case == small, name
        assert decide(known[name], model=TUNED).case == large, name
        assert "no_signal" not in decide(known[name]).weak, name


@pytest.mark.slow
def test_what_only_an_early_tap_reads_is_cut_there(known: dict[str, Profile]) -> None:
    decision = decide(known["early"])
    assert decision.slice in ("conv1", "conv2")
    assert decision.saved_ops > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), [("own", "small_similar"), ("rare", "small_similar"), ("early", "small_different")])
def test_the_shipped_model_decides_known_sets_as_planted(known: dict[str, Profile], name: str, case: str) -> None:
    assert choice.choose(known[name], RULE).case == case


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shuffled", "nothing", "lopsided"])
@pytest.mark.parametrize("model", [FROZEN, TUNED, None], ids=["frozen", "tuned", "shipped"])
def test_where_there_is_no_signal_it_is_said_and_the_cheapest_case_taken(
    known: dict[str, Profile],
    name: str,
    model: GainPredictor | None,
) -> None:
    """Noise has headroom, too: a prediction that reads it as something to win must not decide."""
    decision = decide(known[name], model=model or load_predictor())
    assert "no_signal" in decision.weak
    assert (decision.tuning.why, decision.tuning.exceeds) == ("no_signal", False)
    assert (decision.case, decision.slice) == ("small_similar", "fc2")
    judged = replace(known[name], validation=150)
    assert decide(judged, model=model or load_predictor()).race_wanted


@pytest.mark.slow
def test_classes_as_many_as_images_are_said_to_be_too_many(known: dict[str, Profile]) -> None:
    decision = decide(known["many"])
    assert decision.weak[:2] == ("many_classes", "few_per_class")
    assert decision.case == "small_similar"
    assert decide(replace(known["many"], validation=20)).race_wanted


# --- what the user asks for -------------------------------------------------------------------------------------------------------------


def test_the_user_can_force_a_case_and_a_slice() -> None:
    forced = decide(planted(SIMILAR_SMALL), replace(RULE, case="small_different", slice="tap0"))
    assert (forced.case, forced.slice, forced.forced) == ("small_different", "tap0", ("choose.case", "choose.slice"))
    assert decide(planted(DIFFERENT_SMALL), replace(RULE, case="large_similar")).case == "large_similar"


@pytest.mark.parametrize("case", [c.name for c in CASES])
def test_every_case_can_be_forced_on_every_evidence(case: str) -> None:
    for accuracies in (*PLANTED.values(), [0.8]):
        decision = decide(planted(accuracies), replace(RULE, case=case))
        assert (decision.case, decision.forced) == (case, ("choose.case",))


@pytest.mark.parametrize("case", [c.name for c in CASES])
@pytest.mark.parametrize("evidence", PLANTED)
def test_the_two_gains_of_a_forced_case_are_those_of_the_evidence(evidence: str, case: str) -> None:
    forced = decide(planted(PLANTED[evidence]), replace(RULE, case=case))
    assert choice.case_of(forced.tuning, forced.cutting).name == evidence


def test_a_forced_slice_makes_small_data_a_slicing_case_and_is_said_to_be_unused_elsewhere() -> None:
    assert decide(planted(SIMILAR_SMALL), replace(RULE, slice="tap1")).case == "small_different"
    large = decide(planted(DIFFERENT_LARGE), replace(RULE, slice="tap1"))
    assert (large.case, large.slice) == ("large_different", "tap2")
    assert "slice_unused" in large.weak
    assert large.forced == ()


def test_a_stage_name_means_its_last_block() -> None:
    profile = planted(DIFFERENT_SMALL)
    names = dict(zip((t.name for t in profile.taps), ("layer1.0", "layer1.1", "layer2.0"), strict=True))
    heads = {k: replace(h, taps=tuple(names[t] for t in h.taps)) for k, h in (("last", profile.last), ("multi", profile.multi))}
    assert profile.cut is not None
    cut = replace(profile.cut, taps=tuple(names[t] for t in profile.cut.taps))
    taps = tuple(replace(t, name=names[t.name], head=(names[t.name],)) for t in profile.taps)
    profile = replace(profile, taps=taps, cut=cut, **heads)
    assert decide(profile, replace(RULE, case="small_different", slice="layer1")).slice == "layer1.1"


def test_a_forced_slice_that_does_not_exist_lists_the_taps() -> None:
    with pytest.raises(BackboneError, match="tap0, tap1, tap2"):
        decide(planted(DIFFERENT_SMALL), replace(RULE, slice="layer9"))


def test_an_unknown_case_suggests_the_nearest() -> None:
    with pytest.raises(ParamsError, match=r"choose\.case.*small_similar"):
        decide(planted(SIMILAR_SMALL), replace(RULE, case="smal_similar"))


def test_who_forces_the_worse_head_is_told_what_it_costs() -> None:
    """The cut head reads 96 % and the last tap 85 %: whoever keeps the whole network loses eleven points against the best arm."""
    free = decide(planted(DIFFERENT_SMALL))
    assert free.regret < 0.02
    forced = decide(planted(DIFFERENT_SMALL), replace(RULE, case="small_similar"))
    assert forced.head == "last"
    assert forced.regret > 0.08
    assert forced.p_within_tolerance < 0.2


def expected(gain: float) -> GainPredictor:
    """A model that expects fine-tuning to win this many points at a frozen accuracy of 80 %."""
    return model(intercept=predictor.log_odds(0.8 + gain / 100, 1e6) - predictor.log_odds(0.8, 1e6), deviation=0.01)


@pytest.mark.parametrize(("tolerance", "size"), [(0.0, "large"), (1.3, "large"), (1.8, "small"), (100.0, "small")])
def test_the_tolerance_is_in_points(tolerance: float, size: str) -> None:
    assert decide(planted([0.5, 0.6, 0.8]), replace(RULE, tolerance=tolerance), expected(1.5)).case == f"{size}_similar"


def test_quick_never_wants_a_race_and_full_does() -> None:
    open_, settled = model(deviation=0.3), model(intercept=1.0, deviation=0.05)
    profile = planted([0.5, 0.6, 0.8])
    wanted = {
        effort: [decide(profile, replace(RULE, effort=effort), m).race_wanted for m in (open_, settled)]
        for effort in ("quick", "auto", "full")
    }
    assert wanted == {"quick": [False, False], "auto": [True, False], "full": [True, True]}
    # Nothing is raced for a choice that was made already.
    assert not decide(profile, replace(RULE, effort="full", case="large_similar"), open_).race_wanted


def test_beyond_what_was_fitted_a_race_is_wanted_and_the_figure_is_named() -> None:
    sure = model(intercept=0.2, deviation=0.05)
    narrow = replace(sure, lowest={**sure.lowest, "log10 images": 1.0}, highest={**sure.highest, "log10 images": 1.5})
    profile = planted([0.5, 0.6, 0.8])
    assert not decide(profile, model=sure).race_wanted
    decision = decide(profile, model=narrow)
    assert decision.race_wanted
    assert [(figure.name, figure.value) for figure in decision.outside] == [("images", 1000)]


def test_beyond_what_was_fitted_nothing_is_raced_where_nothing_can_be_won() -> None:
    """Two classes are fewer than the rows of the fit had; a head that is never wrong needs no race all the same."""
    wide = model(intercept=-0.1, deviation=0.3)
    narrow = replace(wide, lowest={**wide.lowest, "log10 images": 1.0}, highest={**wide.highest, "log10 images": 1.5})
    decision = decide(from_bits(np.ones((512, 3), dtype=bool)), model=narrow)
    assert decision.outside
    assert not decision.race_wanted


# --- what would change it ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("gain", [0.3, 1.0, 3.0])
def test_a_promised_change_of_the_tolerance_comes_true(tolerance: float, gain: float) -> None:
    profile, rule = planted([0.5, 0.6, 0.8]), replace(RULE, tolerance=tolerance)
    decision = decide(profile, rule, expected(gain))
    assert decision.turning is not None
    assert decision.turning.tolerance is not None
    for step in (-0.05, 0.05):
        other = decide(profile, replace(rule, tolerance=max(100 * decision.turning.tolerance + step, 0.0)), expected(gain))
        assert other.tuning.exceeds is (step < 0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("gain", [0.0, 1.0, 4.0])
def test_the_corrected_gain_lies_beyond_its_border_exactly_where_the_data_are_different(seed: int, gain: float) -> None:
    profile = planted([0.55, 0.80 + 0.005 * seed, 0.82], m=200, seed=seed)
    test = slice_test(profile, gain / 100, 500)
    assert (test.corrected > gain / 100) == (test.similar < 0.5)
    assert test.corrected <= test.gain + 0.02
    cutting = decide(profile, replace(RULE, gain=gain), TUNED).cutting
    assert (cutting.counted > cutting.border) == cutting.exceeds or cutting.counted == cutting.border  # a tie in six digits


def test_a_tolerance_that_is_named_is_one_that_can_be_set() -> None:
    profile = planted([0.5, 0.6, 0.8])
    (words,) = (words for words in reasons.changes(decide(profile, RULE, expected(0.04)), profile) if "choose.tolerance below" in words)
    assert re.search(r"below 0\.0[1-9] ", words)


# --- weak evidence ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [({"images": 12, "classes": 4}, "few_per_class"), ({"classes": 400}, "many_classes"), ({"head_similarity": None}, "no_source_head")],
)
def test_weak_evidence_has_a_code(change: dict[str, int | None], code: str) -> None:
    strong, weak = (decide(p).weak for p in (planted(SIMILAR_SMALL), replace(planted(SIMILAR_SMALL), **change)))  # type: ignore[arg-type]
    assert strong == ()
    assert code in weak


@pytest.mark.parametrize("validation", [0, 99])
def test_a_race_that_is_wanted_but_cannot_be_judged_is_said_and_one_that_is_not_wanted_is_not(validation: int) -> None:
    few = replace(planted(SIMILAR_SMALL), validation=validation)
    unclear = model(intercept=0.05, deviation=0.4)
    assert (decide(few, model=unclear).weak, decide(few, model=unclear).no_race) == (("few_judges",), "few_judges")
    assert (decide(few).weak, decide(few).no_race) == ((), "clear")


def test_one_tap_is_said_and_decided() -> None:
    decision = decide(planted([0.95]))
    assert (decision.case, decision.slice) == ("small_similar", "tap0")
    assert "one_tap" in decision.weak
    assert decision.cutting.why == "one_tap"


def test_no_signal_is_said() -> None:
    assert "no_signal" in decide(planted([0.1, 0.1, 0.1])).weak
    assert "no_signal" in decide(replace(planted([0.9, 0.9, 0.9]), majority=0.9)).weak


def test_too_few_validation_images_are_not_raced_unless_it_is_asked_for() -> None:
    unclear = model(intercept=0.05, deviation=0.4)
    for effort, enough in (("auto", 100), ("full", 2)):
        for validation in (enough - 1, enough):
            decision = decide(replace(planted(SIMILAR_SMALL), validation=validation), replace(RULE, effort=effort), unclear)
            assert decision.race_wanted == (validation == enough)
            assert bool(decision.weak) == (validation < enough)


def test_too_few_labels_are_raced_where_they_can_be() -> None:
    settled = model(intercept=1.0, deviation=0.05)
    profile = replace(planted([0.5, 0.6, 0.8]), classes=300)
    assert not decide(planted([0.5, 0.6, 0.8]), model=settled).race_wanted
    assert decide(profile, model=settled).race_wanted
    assert decide(replace(profile, validation=20), model=settled).race_wanted
    few = decide(replace(profile, validation=19), model=settled)
    assert not few.race_wanted
    assert ("few_judges" in few.weak, few.judges_needed) == (True, 20)


@pytest.mark.parametrize("case", PLANTED)
def test_too_few_labels_leave_the_first_case_against_the_third(case: str) -> None:
    """Probes of three images a class tell neither where to cut nor how much the data differ."""
    profile = replace(planted(PLANTED[case]), classes=300)
    weighed = weigh(profile, RULE, MODEL)
    arms = [choice.decide(profile, weighed, large) for large in (False, True)]
    assert [arm.case for arm in arms] == ["small_similar", "large_similar"]
    assert {"many_classes", "few_per_class"} <= set(arms[0].weak)
    assert {arm.cutting.why for arm in arms} == {"weak_labels"}


def test_a_large_network_is_not_judged_by_a_line_through_two_small_ones() -> None:
    """The shipped model has seen 0.3 to 0.7 million parameters: a hundred times as many are unknown, not hopeless, and are raced."""
    profile = replace(planted([0.5, 0.6, 0.8]), validation=200)
    small = load_predictor().highest["log10 parameters"]
    near, far = (replace(profile, taps=tuple(replace(t, parameters=int(10**p)) for t in profile.taps)) for p in (small, small + 2))
    sure, unsure = (weigh(p, RULE, load_predictor()) for p in (near, far))
    assert abs(unsure.prediction.gain - sure.prediction.gain) < 0.03
    assert unsure.prediction.high - unsure.prediction.low > 1.5 * (sure.prediction.high - sure.prediction.low)
    assert 0.2 < unsure.prediction.p_frozen_within < 0.8
    assert decide(far, model=load_predictor()).race_wanted
    assert "parameters" in [figure.name for figure in decide(far, model=load_predictor()).outside]


# --- what it costs -------------------------------------------------------------------------------------------------------------------


def test_where_nothing_is_at_stake_there_is_no_race_however_even_the_odds() -> None:
    """At 99 % fine-tuning may well win half a point more or not; neither choice can lose much."""
    models = [model(intercept=0.02 * i, deviation=0.15) for i in range(60)]
    even = min(models, key=lambda m: abs(weigh(planted([0.6, 0.8, 0.99]), RULE, m).prediction.p_frozen_within - 0.55))
    assert 0.5 < weigh(planted([0.6, 0.8, 0.99]), RULE, even).prediction.p_frozen_within < 0.75
    decision = decide(planted([0.6, 0.8, 0.99]), model=even)
    assert not decision.race_wanted
    assert decision.no_race == "clear"
    assert decide(planted([0.6, 0.8, 0.99]), replace(RULE, effort="full"), even).race_wanted


def test_a_larger_sample_is_asked_for_while_the_slice_test_is_close() -> None:
    """The best head leaves nothing open; whether the earlier tap is better by luck does."""
    close, far = exact([0, 503, 500]), exact([0, 500, 503])
    assert RULE.alpha / 4 < slice_test(close, RULE.gain / 100, RULE.draws).significance < 3 * RULE.alpha
    assert undecided(close, RULE)
    assert not undecided(far, RULE)


def test_the_arms_cost_what_they_pass() -> None:
    """A frozen head passes all images up to its deepest tap; fine-tuning that, then each epoch's, with two passes back, and all once more for its last head."""
    profile = planted(DIFFERENT_SMALL, multi=0.94)
    cost = {arm.name: arm.cost for arm in decide(profile).arms}
    once = profile.images + 2 * profile.validation
    epochs = find("large_similar").recipe.epochs(profile.images)
    assert (cost["frozen"], cost["multi"]) == (once, once)
    assert cost["cut"] == pytest.approx(once * 2 / 3, abs=0.1)
    assert cost["tuned"] == 2 * once + epochs * (3 * profile.images + 2 * profile.validation)


def test_a_cut_saves_what_lies_behind_it() -> None:
    decision = decide(planted(DIFFERENT_SMALL))
    assert (decision.saved_parameters, decision.saved_ops) == (pytest.approx(1 / 3, abs=1e-4), pytest.approx(1 / 3, abs=1e-4))
    assert decide(planted(SIMILAR_SMALL)).saved_parameters == 0


def test_who_asks_for_fewer_judges_gets_them_where_labels_are_few() -> None:
    profile = replace(planted([0.5, 0.6, 0.8]), classes=300, validation=10)
    assert decide(profile, replace(RULE, race_images=10)).race_wanted
    assert not decide(profile, RULE).race_wanted


def test_a_forced_tap_is_held_to_its_own_probe() -> None:
    free = decide(planted(DIFFERENT_SMALL), model=FROZEN)
    worse = decide(planted(DIFFERENT_SMALL), replace(RULE, case="small_different", slice="tap0"), FROZEN)
    assert worse.regret > free.regret + 0.1


def test_after_a_race_the_regret_is_what_its_last_look_says() -> None:
    profile = planted(SIMILAR_LARGE)
    weighed = weigh(profile, RULE, MODEL)
    race = Race((InterimResult(20, 20, 400, 0.6, 0.9, 0.02, 0.99, 1.0, 0.3, 0.0123),), "tuned", "ahead", 1e4)
    decision = choice.decide(profile, weighed, True, race)
    assert decision.regret == 0.0123
    assert (decision.tuning.why, decision.tuning.counted, decision.tuning.exceeds) == ("race", pytest.approx(0.3 - 0.0123), True)


@pytest.mark.parametrize("multi", [None, 0.82, 0.84, 0.90])
@pytest.mark.parametrize("tolerance", [0.0, 0.5, 2.5])
def test_the_tolerance_that_is_named_is_the_one_at_which_a_frozen_head_is_chosen(multi: float | None, tolerance: float) -> None:
    """With a larger tolerance a simpler head is frozen, which loses more: what is told counts with that."""
    profile = planted([0.6, 0.7, 0.8], multi=multi)
    tuned = model(intercept=0.35, deviation=0.1)
    rule = replace(RULE, tolerance=tolerance, race_images=10**6)
    decision = decide(profile, rule, tuned)
    assert decision.case == "large_similar"
    assert decision.turning is not None
    assert decision.turning.tolerance is not None
    named = 100 * decision.turning.tolerance
    assert decide(profile, replace(rule, tolerance=named - 0.1), tuned).case == "large_similar"
    after = decide(profile, replace(rule, tolerance=named + 0.1), tuned)
    assert after.case.startswith("small")
    assert weigh(profile, replace(rule, tolerance=named + 0.1), tuned).prediction.gain * 100 == pytest.approx(named, abs=0.01)


@pytest.mark.parametrize(("accuracies", "tuned"), [(SIMILAR_SMALL, False), (SIMILAR_LARGE, True)])
def test_where_everything_is_trained_the_head_reads_several_taps_in_the_end(accuracies: list[float], tuned: bool) -> None:
    profile = planted(accuracies)
    profile = replace(profile, taps=(*profile.taps[:-1], replace(profile.taps[-1], head=("tap2", "tap0"))))
    decision = decide(profile, model=model(intercept=1.0 if tuned else -1.0))
    assert (decision.freeze == "nothing") is tuned
    assert [r.tap for r in decision.readings] == (["tap2", "tap0"] if tuned else ["tap2"])
