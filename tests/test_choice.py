"""The choice: planted evidence decides as planted, the race spends what it may, and weak evidence is said in a sentence.

The fitted model that ships is refitted now and then, so a model of one's own predicts here: headroom and images speak for fine-tuning.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_outlook import model
from test_profiling import exact, from_bits, known, planted, right  # noqa: F401  (known is a fixture)

from tlpipeline import choice, outlook
from tlpipeline.cases import CASES, Decision, Look, Race, find
from tlpipeline.choice import SPENT, Weighed, look, look_epochs, turning_point, undecided, verdict, weigh
from tlpipeline.errors import BackboneError, ParamsError
from tlpipeline.outlook import Outlook, fitted
from tlpipeline.params import ChooseParams, load
from tlpipeline.profiling import Profile, slice_test

RULE = replace(
    load(Path(__file__).parent.parent / "params.yaml").choose,
    case="auto",
    slice="auto",
    rule="fitted",
    tolerance=0.5,
    prefer="balanced",
    effort="auto",
    race_above=0.25,
    race_below=0.75,
    race_images=100,
    gain=1.0,
    alpha=0.10,
    draws=500,
    textbook_images=1000,
    textbook_similarity=0.5,
)
MODEL = model(intercept=0.05, deviation=0.15, log10_images=0.3, log_odds_of_the_frozen_head=-0.35)
# Expects nothing of fine-tuning, or much, whatever the data.
FROZEN, TUNED = model(intercept=-0.5), model(intercept=0.5)
# Probe accuracies from the first tap to the last.
SIMILAR_SMALL = [0.60, 0.80, 0.95]
DIFFERENT_SMALL = [0.80, 0.96, 0.85]
SIMILAR_LARGE = [0.30, 0.45, 0.60]
DIFFERENT_LARGE = [0.40, 0.70, 0.50]
PLANTED = {
    "small_similar": SIMILAR_SMALL,
    "small_different": DIFFERENT_SMALL,
    "large_similar": SIMILAR_LARGE,
    "large_different": DIFFERENT_LARGE,
}


def decide(profile: Profile, rule: ChooseParams = RULE, model: Outlook = MODEL) -> Decision:
    weighed = weigh(profile, rule, model)
    return choice.decide(profile, weighed, weighed.large)


# --- planted evidence -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLANTED)
def test_planted_evidence_decides_as_planted(case: str) -> None:
    decision = decide(planted(PLANTED[case]))
    assert decision.case == case
    assert max(decision.probabilities, key=lambda name: decision.probabilities[name]) == case
    assert sum(decision.probabilities.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("case", PLANTED)
def test_planted_evidence_decides_the_same_whatever_the_draw(case: str) -> None:
    assert {decide(planted(PLANTED[case], seed=10 * seed)).case for seed in range(6)} == {case}


def test_the_same_profile_gives_the_same_decision() -> None:
    assert decide(planted(DIFFERENT_SMALL)) == decide(planted(DIFFERENT_SMALL))


def test_choose_decides_with_the_model_of_the_package() -> None:
    profile = planted(DIFFERENT_SMALL)
    assert choice.choose(profile, RULE) == decide(profile, RULE, outlook.fitted())


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


def test_without_a_significant_slice_nothing_is_cut_and_the_reason_says_so() -> None:
    """Different by a hair: the probability says different, the family-wise test does not fire."""
    rule = replace(RULE, gain=0.0, alpha=0.001)
    decision = decide(planted([0.90, 0.935, 0.92], m=300), rule, FROZEN)
    assert decision.case == "small_similar"
    assert "nothing is cut off" in decision.reason


def test_a_slice_that_held_out_images_do_not_confirm_is_not_made() -> None:
    decision = decide(planted(DIFFERENT_SMALL, last_held_out=0.99), model=FROZEN)
    assert decision.case == "small_similar"
    assert "held-out" in decision.reason


def test_a_head_on_several_taps_is_read_where_it_wins_more_than_the_tolerance() -> None:
    several = decide(planted([0.6, 0.8, 0.88], multi=0.95))
    assert (several.case, several.head, len(several.readings)) == ("small_similar", "multi", 1)
    assert several.slice == "tap2"
    assert "head that reads 3 taps" in several.reason
    assert decide(planted([0.6, 0.8, 0.95], multi=0.95)).head == "last"


def test_the_chance_of_large_does_not_fall_as_images_are_added() -> None:
    """The rest of the profile held fixed."""
    for accuracies in PLANTED.values():
        profile = planted(accuracies)
        told = [decide(replace(profile, images=n)) for n in (100, 300, 1000, 3000, 10_000, 100_000)]
        for fewer, more in pairwise(told):
            assert more.large >= fewer.large
            assert (more.case.startswith("large"), True) >= (fewer.case.startswith("large"), True)
        assert told[-1].large > told[0].large


def test_the_reason_holds_the_numbers() -> None:
    decision = decide(planted(DIFFERENT_SMALL))
    best = planted(DIFFERENT_SMALL).best.accuracy
    for text in (f"{best:.1%}", "tap1", "P(similar)", "P(large)", "1000 images of 10 classes", "cut off"):
        assert text in decision.reason
    assert decision.reason.endswith(".")


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


def test_sets_with_a_known_truth_decide_as_planted(known: dict[str, Profile]) -> None:  # noqa: F811
    for name, small, large in (
        ("own", "small_similar", "large_similar"),
        ("noisy", "small_similar", "large_similar"),
        ("rare", "small_similar", "large_similar"),
        ("early", "small_different", None),  # read without an error, so that there is nothing left to win
    ):
        assert decide(known[name], model=FROZEN).case == small, name
        if large:
            assert decide(known[name], model=TUNED).case == large, name
        assert not any("no signal" in w for w in decide(known[name]).warnings), name


def test_what_only_an_early_tap_reads_is_cut_there(known: dict[str, Profile]) -> None:  # noqa: F811
    decision = decide(known["early"])
    assert decision.slice in ("conv1", "conv2")
    assert decision.saved_ops > 0.4


@pytest.mark.parametrize(("name", "case"), [("own", "small_similar"), ("rare", "small_similar"), ("early", "small_different")])
def test_the_shipped_model_decides_known_sets_as_planted(known: dict[str, Profile], name: str, case: str) -> None:  # noqa: F811
    assert choice.choose(known[name], RULE).case == case


@pytest.mark.parametrize("name", ["shuffled", "nothing", "lopsided"])
@pytest.mark.parametrize("model", [FROZEN, TUNED, None], ids=["frozen", "tuned", "shipped"])
def test_where_there_is_no_signal_it_is_said_and_the_cheapest_case_taken(
    known: dict[str, Profile],  # noqa: F811
    name: str,
    model: Outlook | None,
) -> None:
    """Noise has headroom, too: a prediction that reads it as something to win must not decide."""
    decision = decide(known[name], model=model or fitted())
    assert any(w.startswith("no signal") and "check the labels" in w for w in decision.warnings)
    assert (decision.case, decision.slice) == ("small_similar", "fc2")
    judged = replace(known[name], validation=150)
    assert decide(judged, model=model or fitted()).race_wanted


def test_classes_as_many_as_images_are_said_to_be_too_many(known: dict[str, Profile]) -> None:  # noqa: F811
    decision = decide(known["many"])
    assert any(w.startswith("profile too weak: 40 classes in a sample of 60") for w in decision.warnings)
    assert any("training images per class, fewer than 5" in w for w in decision.warnings)
    assert decision.case == "small_similar"
    assert decide(replace(known["many"], validation=20)).race_wanted


# --- what the user asks for -------------------------------------------------------------------------------------------------------------


def test_the_user_can_force_a_case_and_a_slice() -> None:
    forced = decide(planted(SIMILAR_SMALL), replace(RULE, case="small_different", slice="tap0"))
    assert (forced.case, forced.slice, forced.forced) == ("small_different", "tap0", ("choose.case", "choose.slice"))
    assert forced.reason.endswith("(forced by choose.case and choose.slice).")
    assert decide(planted(DIFFERENT_SMALL), replace(RULE, case="large_similar")).case == "large_similar"


@pytest.mark.parametrize("case", [c.name for c in CASES])
def test_every_case_can_be_forced_on_every_evidence(case: str) -> None:
    for accuracies in (*PLANTED.values(), [0.8]):
        decision = decide(planted(accuracies), replace(RULE, case=case))
        assert (decision.case, decision.forced) == (case, ("choose.case",))


def test_a_forced_slice_makes_small_data_a_slicing_case_and_is_said_to_be_unused_elsewhere() -> None:
    assert decide(planted(SIMILAR_SMALL), replace(RULE, slice="tap1")).case == "small_different"
    large = decide(planted(DIFFERENT_LARGE), replace(RULE, slice="tap1"))
    assert (large.case, large.slice) == ("large_different", "tap2")
    assert large.reason.endswith("; choose.slice is not used, because large_different cuts nothing off.")
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
    assert forced.within < 0.2


def expected(gain: float) -> Outlook:
    """A model that expects fine-tuning to win this many points at a frozen accuracy of 80 %."""
    return model(intercept=outlook.log_odds(0.8 + gain / 100, 1e6) - outlook.log_odds(0.8, 1e6), deviation=0.01)


@pytest.mark.parametrize(
    ("prefer", "gain", "size"),
    [
        ("accuracy", -0.3, "small"), ("accuracy", 0.2, "large"), ("balanced", 0.2, "small"),
        ("balanced", 1.0, "large"), ("cost", 1.0, "small"), ("cost", 3.0, "large"),
    ],
)  # fmt: skip
def test_a_preference_moves_the_tolerance(prefer: str, gain: float, size: str) -> None:
    assert decide(planted([0.5, 0.6, 0.8]), replace(RULE, prefer=prefer), expected(gain)).case == f"{size}_similar"


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
    assert any(w.startswith("out of range: images 1,000 lies outside") for w in decision.warnings)


def test_beyond_what_was_fitted_nothing_is_raced_where_nothing_can_be_won() -> None:
    """Two classes are fewer than the rows of the fit had; a head that is never wrong needs no race all the same."""
    wide = model(intercept=-0.1, deviation=0.3)
    narrow = replace(wide, lowest={**wide.lowest, "log10 images": 1.0}, highest={**wide.highest, "log10 images": 1.5})
    decision = decide(from_bits(np.ones((512, 3), dtype=bool)), model=narrow)
    assert any(w.startswith("out of range") for w in decision.warnings)
    assert not decision.race_wanted


# --- the textbook -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [999, 1000])
@pytest.mark.parametrize("similarity", [0.49, 0.5])
def test_the_textbook_rule_asks_two_bounds_and_ignores_the_fitted_model(images: int, similarity: float) -> None:
    profile = replace(planted(DIFFERENT_SMALL), images=images, head_similarity=similarity)
    rule = replace(RULE, rule="textbook", effort="full")
    one, other = (decide(profile, rule, m) for m in (model(intercept=3.0), model(intercept=-3.0)))
    size, likeness = "large" if images >= 1000 else "small", "similar" if similarity >= 0.5 else "different"
    for decision in (one, other):
        assert decision.case == f"{size}_{likeness}"
        assert decision.probabilities[decision.case] == 1
        assert not decision.race_wanted
    assert (one.slice, one.head, one.reason) == (other.slice, other.head, other.reason)
    assert "textbook" in one.reason
    assert "predict" not in one.reason


def test_without_a_source_head_the_textbook_asks_the_probes() -> None:
    rule = replace(RULE, rule="textbook")
    assert decide(replace(planted(DIFFERENT_SMALL), head_similarity=None), rule).similar < 0.1
    assert decide(replace(planted(SIMILAR_SMALL), head_similarity=None), rule).similar > 0.9


@pytest.mark.parametrize(("taps", "kept"), [(1, "tap0"), (3, "tap0"), (4, "tap1"), (5, "tap1"), (9, "tap2"), (16, "tap5")])
def test_the_slice_of_the_textbook_keeps_the_first_third(taps: int, kept: str) -> None:
    profile = planted([0.9] * taps)
    decision = decide(profile, replace(RULE, case="small_different", slice="textbook"))
    assert decision.slice == kept
    assert decision.forced == ("choose.case",)


def test_the_slice_of_the_textbook_waits_for_a_case_that_slices() -> None:
    rule = replace(RULE, slice="textbook")
    assert decide(planted(DIFFERENT_SMALL), rule).slice == "tap0"
    assert (decide(planted(SIMILAR_SMALL), rule).case, decide(planted(SIMILAR_SMALL), rule).slice) == ("small_similar", "tap2")


def test_the_textbook_says_how_many_images_are_missing() -> None:
    rule = replace(RULE, rule="textbook")
    assert decide(replace(planted(SIMILAR_SMALL), images=600), rule).changes == (
        "With 400 more images the textbook rule would call them large.",
    )


# --- what would change it ---------------------------------------------------------------------------------------------------------------


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
    assert any(
        "more of them alone would not make fine-tuning win" in c
        for c in decide(planted([0.5, 0.6, 0.8]), model=model(intercept=-1.0)).changes
    )


@pytest.mark.parametrize("prefer", ["accuracy", "balanced", "cost"])
@pytest.mark.parametrize("gain", [0.3, 1.0, 3.0])
def test_a_promised_change_of_the_tolerance_comes_true(prefer: str, gain: float) -> None:
    profile, rule = planted([0.5, 0.6, 0.8]), replace(RULE, prefer=prefer)
    decision = decide(profile, rule, expected(gain))
    for said in decision.changes:
        if found := re.match(r"With choose\.tolerance (above|below) ([\d.]+) points", said):
            beyond = float(found[2]) + (0.1 if found[1] == "above" else -0.1)
            asked = "balanced" if "choose.prefer: balanced" in said else prefer
            other = decide(profile, replace(rule, tolerance=beyond, prefer=asked), expected(gain))
            assert other.case != decision.case, said


# --- weak evidence ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": 12, "classes": 4}, "profile too weak: 3.0 training images per class, fewer than 5"),
        ({"classes": 400}, "profile too weak: 400 classes in a sample of 512 images"),
        ({"head_similarity": None}, "net comes without a source head, so the head similarity S is unknown and counts as 0"),
    ],
)
def test_weak_evidence_is_said_in_a_sentence(change: dict[str, int | None], sentence: str) -> None:
    strong, weak = (decide(p).warnings for p in (planted(SIMILAR_SMALL), replace(planted(SIMILAR_SMALL), **change)))  # type: ignore[arg-type]
    assert strong == ()
    assert any(w.startswith(sentence) for w in weak)


@pytest.mark.parametrize("validation", [0, 99])
def test_a_race_that_is_wanted_but_cannot_be_judged_is_said_and_one_that_is_not_wanted_is_not(validation: int) -> None:
    few = replace(planted(SIMILAR_SMALL), validation=validation)
    wanted = f"no race: {validation} validation images are left to judge it, and fewer than 100"
    unclear = model(intercept=0.05, deviation=0.4)
    assert any(w.startswith(wanted) for w in decide(few, model=unclear).warnings)
    assert decide(few).warnings == ()
    assert "the prediction is clear" in decide(few).no_race


def test_one_tap_is_said_and_decided() -> None:
    decision = decide(planted([0.95]))
    assert (decision.case, decision.slice) == ("small_similar", "tap0")
    assert any("one tap only, so no slice could be looked for" in w for w in decision.warnings)


def test_no_signal_is_said() -> None:
    assert any(w.startswith("no signal") for w in decide(planted([0.1, 0.1, 0.1])).warnings)
    assert any(w.startswith("no signal") for w in decide(replace(planted([0.9, 0.9, 0.9]), majority=0.9)).warnings)


def test_too_few_validation_images_are_not_raced_unless_it_is_asked_for() -> None:
    unclear = model(intercept=0.05, deviation=0.4)
    for effort, enough in (("auto", 100), ("full", 2)):
        for validation in (enough - 1, enough):
            decision = decide(replace(planted(SIMILAR_SMALL), validation=validation), replace(RULE, effort=effort), unclear)
            assert decision.race_wanted == (validation == enough)
            assert bool(decision.warnings) == (validation < enough)


def test_too_few_labels_are_raced_where_they_can_be() -> None:
    settled = model(intercept=1.0, deviation=0.05)
    profile = replace(planted([0.5, 0.6, 0.8]), classes=300)
    assert not decide(planted([0.5, 0.6, 0.8]), model=settled).race_wanted
    assert decide(profile, model=settled).race_wanted
    assert decide(replace(profile, validation=20), model=settled).race_wanted
    few = decide(replace(profile, validation=19), model=settled)
    assert not few.race_wanted
    assert any(w.startswith("no race: 19 validation images are left to judge it, and it takes 20") for w in few.warnings)


@pytest.mark.parametrize("case", PLANTED)
def test_too_few_labels_leave_the_first_case_against_the_third(case: str) -> None:
    """Probes of three images a class tell neither where to cut nor how much the data differ."""
    profile = replace(planted(PLANTED[case]), classes=300)
    weighed = weigh(profile, RULE, MODEL)
    arms = [choice.decide(profile, weighed, large) for large in (False, True)]
    assert [arm.case for arm in arms] == ["small_similar", "large_similar"]
    assert any("profile too weak: 3.3 training images per class" in words for words in arms[0].warnings)


def test_a_large_network_is_not_judged_by_a_line_through_two_small_ones() -> None:
    """The shipped model has seen 0.3 to 0.7 million parameters: a hundred times as many are unknown, not hopeless, and are raced."""
    profile = replace(planted([0.5, 0.6, 0.8]), validation=200)
    small = fitted().highest["log10 parameters"]
    near, far = (replace(profile, taps=tuple(replace(t, parameters=int(10**p)) for t in profile.taps)) for p in (small, small + 2))
    sure, unsure = (weigh(p, RULE, fitted()) for p in (near, far))
    assert abs(unsure.prediction.gain - sure.prediction.gain) < 0.03
    assert unsure.prediction.high - unsure.prediction.low > 1.5 * (sure.prediction.high - sure.prediction.low)
    assert 0.2 < unsure.chance_of_large < 0.8
    assert decide(far, model=fitted()).race_wanted
    assert any(words.startswith("out of range: parameters") for words in decide(far, model=fitted()).warnings)


@pytest.mark.parametrize("intercept", [-1.0, -0.5, 0.5, 1.0])
def test_what_a_race_sees_overrules_a_prediction_however_sure_it_was(intercept: float) -> None:
    """Thirty points ahead on 400 judging images is no accident."""
    sure = replace(RACED, model=replace(model(intercept=intercept, deviation=0.25), lag=LAG))
    ahead, behind = look(sure, 2, 9, 9, *judged(10, 130)), look(sure, 2, 9, 9, *judged(130, 10))
    assert verdict(sure, 2, ahead)[0] == "tuned"
    assert verdict(sure, 2, behind)[0] == "frozen"


def test_the_cases_of_small_data_share_nothing_once_it_is_settled_whether_they_are_sliced() -> None:
    for case in PLANTED:
        decision = decide(planted(PLANTED[case]))
        assert min(decision.probabilities["small_similar"], decision.probabilities["small_different"]) == 0


def test_before_anything_is_probed_there_is_a_prior() -> None:
    one, other = (decide(planted(SIMILAR_SMALL, m=256), model=replace(MODEL, prior={"intercept": odds})) for odds in (-1.0, 1.0))
    assert one.prior == pytest.approx(0.2689, abs=1e-3)
    assert other.prior == pytest.approx(0.7311, abs=1e-3)
    assert one.large == other.large


def test_a_frozen_head_that_still_learns_goes_on_learning_with_more_images() -> None:
    """More images do not make fine-tuning win where the frozen head gains as much by them."""
    profile = planted([0.5, 0.6, 0.8])
    weighed = weigh(profile, RULE, MODEL)
    steep = replace(weighed, evidence=replace(weighed.evidence, slope=0.05))
    assert choice.grown(steep, weighed.evidence.images)[1] == pytest.approx(weighed.frozen)
    seen, frozen = choice.grown(steep, 2 * weighed.evidence.images)
    error = 1 - weighed.frozen
    assert 1 - frozen == pytest.approx(error**2 / (error + 0.05))  # the next doubling lowers the error by the same share
    assert seen.slope == pytest.approx(error - error**2 / (error + 0.05))
    assert choice.grown(replace(weighed, evidence=replace(weighed.evidence, slope=0.0)), 10**6)[1] == pytest.approx(weighed.frozen)


# --- the race ---------------------------------------------------------------------------------------------------------------------------

LAG = ((0.5, 0.1), (0.2, 0.05), (0.0, 0.02))
RACED = Weighed(weigh(planted([0.5, 0.6, 0.8]), RULE, MODEL).evidence, RULE, replace(model(intercept=0.05, deviation=0.4), lag=LAG))


def judged(frozen_only: int, tuned_only: int, images: int = 400, both: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Judging images of which so many are right with one arm only."""
    place = np.arange(images)
    rest = frozen_only + tuned_only
    common = (place >= rest) & (place < rest + round(both * images))
    return common | (place < frozen_only), common | ((place >= frozen_only) & (place < rest))


@pytest.mark.parametrize(("epochs", "at"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [2, 3, 5]), (20, [7, 13, 20])])
def test_looks_are_planned_at_thirds_of_the_schedule(epochs: int, at: Sequence[int]) -> None:
    assert look_epochs(epochs) == at


def test_every_schedule_is_looked_at_in_its_last_epoch_and_at_most_three_times() -> None:
    for epochs in range(1, 60):
        at = look_epochs(epochs)
        assert at[-1] == epochs
        assert len(at) <= 3
        assert at[0] >= 1


def test_a_look_says_what_was_seen() -> None:
    seen = look(RACED, 2, 20, 20, *judged(8, 20))
    assert (seen.epoch, seen.epochs, seen.images) == (20, 20, 400)
    assert seen.tuned - seen.frozen == pytest.approx(0.03)
    assert seen.error == pytest.approx((28 / 400 - 0.03**2) ** 0.5 / 20, abs=1e-4)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_clear_winner_ends_the_race_early_either_way(part: int) -> None:
    ahead, behind = (verdict(RACED, part, look(RACED, part, 1, 3, *judged(*counts))) for counts in ((0, 60), (110, 0)))
    assert ahead[0] == "tuned"
    assert "ahead for good" in ahead[1]
    assert behind[0] == "frozen"
    assert "will not win more than 0.5 points" in behind[1]


def test_a_close_race_goes_on_until_the_last_look() -> None:
    for part in (0, 1):
        assert verdict(RACED, part, Look(1, 3, 100, 0.8, 0.8, 0.02, 0.5, 0.5, 0.0, 0.0)) == ("", "")
    assert verdict(RACED, 2, Look(3, 3, 100, 0.8, 0.8, 0.02, 0.5, 0.5, 0.0, 0.0))[0] == "frozen"


def test_undecided_at_the_end_the_cheaper_arm_wins_unless_the_expected_gain_exceeds_the_tolerance() -> None:
    for difference, winner in ((-0.02, "frozen"), (0.0, "frozen"), (0.03, "tuned")):
        won, why = verdict(RACED, 2, Look(3, 3, 100, 0.8, 0.8 + difference, 0.02, 0.5, 0.5, 0.0, 0.0))
        assert won == winner
        assert why.startswith("undecided at the end")
    # A tolerance of five points makes the same difference too small.
    lenient = replace(RACED, rule=replace(RULE, tolerance=5.0))
    assert verdict(lenient, 2, Look(3, 3, 100, 0.8, 0.83, 0.02, 0.5, 0.5, 0.0, 0.0))[0] == "frozen"


def test_the_looks_spend_alpha_and_no_more() -> None:
    assert sum(SPENT) == pytest.approx(1)
    spent = 0.0
    for part in range(3):
        # The largest error at which a look still calls fine-tuning the winner for good, found by trying.
        errors = [
            e
            for e in np.arange(0.0005, 0.2, 0.0005)
            if "for good" in verdict(RACED, part, Look(1, 3, 100, 0.8, 0.8, 0.02, 1 - e, 1, 0.0, 0.0))[1]
        ]
        spent += max(errors)
    assert 0.09 < spent <= RULE.alpha + 1e-9


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_look_moves_towards_what_was_measured_and_tightens_with_the_error(part: int) -> None:
    behind = RACED.model.lag[part][0] * (1 - RACED.frozen)
    sharp = replace(RACED, model=replace(RACED.model, lag=((RACED.model.lag[part][0], 0.01),) * 3))

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
            seen = look(RACED, 2, 3, 3, np.full(images, bool(frozen)), np.full(images, bool(tuned)))
            if frozen == tuned:
                assert seen.chance == pytest.approx(prior, abs=0.1)
            assert verdict(RACED, 0, seen)[0] == "" or images == 4


def test_the_better_the_measured_the_likelier_the_win_however_far_from_the_prediction() -> None:
    """Fine-tuning that fell apart must lose, most of all where nobody expected it."""
    confident = replace(RACED, model=replace(model(intercept=0.3, deviation=0.2), lag=LAG))
    looks = [look(confident, 2, 3, 3, *judged(max(-d, 0), max(d, 0), both=0.1)) for d in (-320, -240, -160, -80, -20, 0, 20, 60, 160, 320)]
    assert [seen.chance for seen in looks] == sorted(seen.chance for seen in looks)
    assert verdict(confident, 2, looks[0])[0] == "frozen"
    assert verdict(confident, 2, looks[-1])[0] == "tuned"


def test_fine_tuning_is_given_its_lag_at_an_early_look() -> None:
    """At a third of its schedule fine-tuning still has to come; the same difference at the end is final."""
    early, late = (look(RACED, part, 1, 3, *judged(16, 8)).chance for part in (0, 2))
    assert early > late


def simulated(gain: float, runs: int = 400, images: int = 300, seed: int = 0) -> list[tuple[int, str]]:
    """Races in which fine-tuning ends so much better, lagging behind as the model says: (look, winner) where they ended."""
    fair = replace(RACED, model=replace(model(deviation=0.25), lag=LAG))
    rng = np.random.default_rng(seed)
    ended = []
    for _ in range(runs):
        u = rng.random(images)
        for part in range(3):
            behind, spread = fair.model.lag[part]
            ahead = gain - (behind + spread * rng.normal()) * (1 - fair.frozen)
            tuned_only, frozen_only = 0.03 + max(ahead, 0), 0.03 + max(-ahead, 0)
            frozen = u < fair.frozen
            tuned = frozen & (rng.random(images) > frozen_only / fair.frozen) | ~frozen & (
                rng.random(images) < tuned_only / (1 - fair.frozen)
            )
            winner, _ = verdict(fair, part, look(fair, part, part + 1, 3, frozen, tuned))
            if winner:
                ended.append((part, winner))
                break
    assert len(ended) == runs
    return ended


def test_without_a_difference_fine_tuning_is_not_declared_the_winner_early() -> None:
    runs = 400
    early = sum(part < 2 and winner == "tuned" for part, winner in simulated(0.0, runs))
    allowed = RULE.alpha * (SPENT[0] + SPENT[1])
    assert early / runs <= allowed + 3 * (allowed * (1 - allowed) / runs) ** 0.5


def test_a_real_difference_is_found_and_a_loss_is_not_bought() -> None:
    won, lost = (np.mean([winner == "tuned" for _, winner in simulated(gain, 200)]) for gain in (0.08, -0.08))
    assert won > 0.9
    assert lost < 0.1


def test_where_nothing_is_at_stake_there_is_no_race_however_even_the_odds() -> None:
    """At 99 % fine-tuning may well win half a point more or not; neither choice can lose much."""
    models = [model(intercept=0.02 * i, deviation=0.15) for i in range(60)]
    even = min(models, key=lambda m: abs(weigh(planted([0.6, 0.8, 0.99]), RULE, m).chance_of_large - 0.45))
    assert RULE.race_above < weigh(planted([0.6, 0.8, 0.99]), RULE, even).chance_of_large < 0.5
    decision = decide(planted([0.6, 0.8, 0.99]), model=even)
    assert not decision.race_wanted
    assert "the prediction is clear" in decision.no_race
    assert decide(planted([0.6, 0.8, 0.99]), replace(RULE, effort="full"), even).race_wanted


def test_the_less_a_look_foretells_the_end_the_less_it_moves_the_prediction() -> None:
    prior = float(RACED.gains.mean())
    moved = []
    for spread in (0.01, 1.0):
        vague = replace(RACED, model=replace(RACED.model, lag=((0.0, spread),) * 3))
        moved.append(abs(float(vague.posterior(0, 0.12, 0.005) @ vague.gains) - prior))
    assert moved[1] < moved[0] / 2


def test_a_larger_sample_is_asked_for_while_the_slice_test_is_close() -> None:
    """The best head leaves nothing open; whether the earlier tap is better by luck does."""
    close, far = exact([0, 503, 500]), exact([0, 500, 503])
    assert RULE.alpha / 4 < slice_test(close, RULE.gain / 100, RULE.draws).significance < 3 * RULE.alpha
    assert undecided(close, RULE)
    assert not undecided(far, RULE)


def test_what_is_read_must_beat_the_largest_class_by_more_than_chance_or_by_the_gradients() -> None:
    seen = replace(weigh(planted(SIMILAR_SMALL), RULE, MODEL).evidence, majority=0.1)
    lucky, read = (replace(seen, last=a, cut=a, multi=a) for a in (0.12, 0.14))
    assert (choice.has_signal(lucky), choice.has_signal(read)) == (False, True)
    assert not choice.has_signal(replace(lucky, tangent_gain=choice.SIGNAL))
    assert choice.has_signal(replace(lucky, tangent_gain=choice.SIGNAL + 0.01))


def test_the_arms_cost_what_they_pass() -> None:
    """A frozen head passes all images up to its deepest tap; fine-tuning that and then each epoch's, with two passes back."""
    profile = planted(DIFFERENT_SMALL, multi=0.94)
    cost = {arm.name: arm.cost for arm in decide(profile).arms}
    once = profile.images + 2 * profile.validation
    epochs = find("large_similar").recipe.epochs(profile.images)
    assert (cost["frozen"], cost["multi"]) == (once, once)
    assert cost["cut"] == pytest.approx(once * 2 / 3, abs=0.1)
    assert cost["tuned"] == once + epochs * (3 * profile.images + 2 * profile.validation)


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
    race = Race((Look(20, 20, 400, 0.6, 0.9, 0.02, 0.99, 1.0, 0.3, 0.0123),), "tuned", "ahead", 1e4)
    decision = choice.decide(profile, weighed, True, race)
    assert (decision.regret, decision.large) == (0.0123, 0.99)


def test_the_regrets_of_a_look_are_those_of_the_arm_that_they_are_named_after() -> None:
    ahead, behind = look(RACED, 2, 20, 20, *judged(8, 60)), look(RACED, 2, 20, 20, *judged(60, 8))
    assert ahead.frozen_regret > 0.05 > 0.001 >= ahead.tuned_regret
    assert behind.tuned_regret > 0.05 > 0.001 >= behind.frozen_regret
    assert ahead.safe > 0.99
    assert behind.safe < 0.01


@pytest.mark.parametrize("multi", [None, 0.82, 0.84, 0.90])
@pytest.mark.parametrize("prefer", ["accuracy", "balanced", "cost"])
def test_the_tolerance_that_is_named_is_the_one_at_which_a_frozen_head_is_chosen(multi: float | None, prefer: str) -> None:
    """With a larger tolerance a simpler head is frozen, which loses more: what is told counts with that."""
    profile = planted([0.6, 0.7, 0.8], multi=multi)
    tuned = model(intercept=0.35, deviation=0.1)
    rule = replace(RULE, prefer=prefer, race_images=10**6)
    decision = decide(profile, rule, tuned)
    assert decision.case == "large_similar"
    (said,) = (words for words in decision.changes if "choose.tolerance above" in words)
    named, lost = (float(number) for number in re.findall(r"(\d+\.\d) points", said))
    cheap = replace(rule, prefer="balanced") if prefer == "accuracy" else rule
    assert decide(profile, replace(cheap, tolerance=named - 0.1), tuned).case == "large_similar"
    after = decide(profile, replace(cheap, tolerance=named + 0.1), tuned)
    assert after.case.startswith("small")
    assert weigh(profile, replace(cheap, tolerance=named + 0.1), tuned).prediction.gain * 100 == pytest.approx(lost, abs=0.06)
