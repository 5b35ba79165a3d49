"""The table of cases, and the choice: planted evidence decides as planted."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from test_profiling import planted

from tlpipeline.cases import CASES, Decision, Recipe, choose, override
from tlpipeline.errors import BackboneError, ParamsError
from tlpipeline.params import ChooseParams, load
from tlpipeline.profiling import Profile

RULE = ChooseParams(case="auto", slice="auto", large_below=0.88, gain=1.0, alpha=0.10, draws=500)
# Probe accuracies from the first tap to the last.
SIMILAR_SMALL = [0.60, 0.80, 0.95]
DIFFERENT_SMALL = [0.80, 0.96, 0.85]
SIMILAR_LARGE = [0.30, 0.45, 0.60]
DIFFERENT_LARGE = [0.40, 0.70, 0.50]


def test_each_kind_of_data_has_exactly_one_row() -> None:
    assert sorted((c.size, c.likeness) for c in CASES) == sorted(product(("small", "large"), ("similar", "different")))


def test_the_rows_are_the_four_cases_of_the_textbook() -> None:
    assert [(c.name, c.keep, c.freeze, c.init) for c in CASES] == [
        ("small_similar", "end", "kept", "pretrained"),
        ("small_different", "slice", "kept", "pretrained"),
        ("large_similar", "end", "nothing", "pretrained"),
        ("large_different", "end", "nothing", "auto"),
    ]


@pytest.mark.parametrize(
    ("accuracies", "case"),
    [
        (SIMILAR_SMALL, "small_similar"),
        (DIFFERENT_SMALL, "small_different"),
        (SIMILAR_LARGE, "large_similar"),
        (DIFFERENT_LARGE, "large_different"),
    ],
)
def test_planted_evidence_decides_as_planted(accuracies: list[float], case: str) -> None:
    decision = choose(planted(accuracies), RULE)
    assert decision.case == case
    assert max(decision.probabilities, key=lambda name: decision.probabilities[name]) == case


def test_an_unfitted_rule_is_never_sure() -> None:
    for accuracies in (SIMILAR_SMALL, DIFFERENT_SMALL, SIMILAR_LARGE, DIFFERENT_LARGE):
        chances = choose(planted(accuracies), RULE).probabilities.values()
        assert max(chances) <= 0.85
        assert sum(chances) == pytest.approx(1, abs=1e-3)


def test_only_the_slicing_case_cuts() -> None:
    assert choose(planted(SIMILAR_SMALL), RULE).slice == "tap2"
    assert choose(planted(DIFFERENT_SMALL), RULE).slice == "tap1"
    assert choose(planted(DIFFERENT_LARGE), RULE).slice == "tap2"


def test_the_reason_holds_the_numbers() -> None:
    decision = choose(planted(DIFFERENT_SMALL), RULE)
    best = planted(DIFFERENT_SMALL).best.accuracy
    for text in (f"{best:.1%}", "tap1", "P(similar)", "P(large)", "1000 images", "cut off"):
        assert text in decision.reason
    assert decision.reason.endswith(".")


def test_without_a_significant_slice_nothing_is_cut_and_the_reason_says_so() -> None:
    """Different by a hair: the probability says different, the family-wise test does not fire."""
    rule = replace(RULE, gain=0.0, alpha=0.001)
    decision = choose(planted([0.90, 0.935, 0.92], m=300), rule)
    assert decision.case == "small_similar"
    assert "nothing is cut off" in decision.reason


def test_a_slice_that_held_out_images_do_not_confirm_is_not_made() -> None:
    decision = choose(planted(DIFFERENT_SMALL, last_held_out=0.99), RULE)
    assert decision.case == "small_similar"
    assert "held-out" in decision.reason


def test_the_user_can_force_a_case_and_a_slice() -> None:
    forced = choose(planted(SIMILAR_SMALL), replace(RULE, case="small_different", slice="tap0"))
    assert (forced.case, forced.slice, forced.forced) == ("small_different", "tap0", ("choose.case", "choose.slice"))
    assert choose(planted(DIFFERENT_SMALL), replace(RULE, case="large_similar")).case == "large_similar"


def test_a_forced_slice_makes_small_data_a_slicing_case_and_is_said_to_be_unused_elsewhere() -> None:
    assert choose(planted(SIMILAR_SMALL), replace(RULE, slice="tap1")).case == "small_different"
    large = choose(planted(DIFFERENT_LARGE), replace(RULE, slice="tap1"))
    assert (large.case, large.slice) == ("large_different", "tap2")
    assert "choose.slice is not used" in large.reason


def test_a_stage_name_means_its_last_block() -> None:
    profile = planted(DIFFERENT_SMALL)
    names = ("layer1.0", "layer1.1", "layer2.0")
    profile = replace(profile, taps=tuple(replace(t, name=n, head=(n,)) for t, n in zip(profile.taps, names, strict=True)))
    assert choose(profile, replace(RULE, case="small_different", slice="layer1")).slice == "layer1.1"


def test_a_forced_slice_that_does_not_exist_lists_the_taps() -> None:
    with pytest.raises(BackboneError, match="tap0, tap1, tap2"):
        choose(planted(DIFFERENT_SMALL), replace(RULE, slice="layer9"))


def test_an_unknown_case_suggests_the_nearest() -> None:
    with pytest.raises(ParamsError, match=r"choose\.case.*small_similar"):
        choose(planted(SIMILAR_SMALL), replace(RULE, case="smal_similar"))


def test_the_large_bound_of_the_params_is_used() -> None:
    assert choose(planted(SIMILAR_LARGE), replace(RULE, large_below=0.3)).case == "small_similar"


@pytest.mark.parametrize(("change", "word"), [({"images": 12, "classes": 4}, "per class"), ({"classes": 400}, "classes in a sample")])
def test_weak_evidence_is_said(change: dict[str, int], word: str) -> None:
    assert any(word in w for w in choose(replace(planted(SIMILAR_SMALL), **change), RULE).warnings)


def test_no_signal_is_said() -> None:
    profile: Profile = replace(planted([0.1, 0.1, 0.1]), majority=0.1)
    assert any("no signal" in w for w in choose(profile, RULE).warnings)


def test_a_decision_survives_json() -> None:
    decision = choose(planted(DIFFERENT_SMALL), RULE)
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


def test_override_changes_one_recipe_value_and_refuses_unknown_ones() -> None:
    decision = choose(planted(SIMILAR_LARGE), RULE)
    assert override(decision, {"patience": 3}).recipe == replace(decision.recipe, patience=3)
    assert override(decision, {"init": "random"}).init == "random"
    with pytest.raises(ParamsError, match="patience"):
        override(decision, {"patence": 3})
    with pytest.raises(ParamsError, match="expected int"):
        override(decision, {"patience": "many"})
    with pytest.raises(ParamsError, match=r"train\.override\.init"):
        override(decision, {"init": "imagenet"})


def test_epochs_fall_with_the_number_of_images_within_bounds() -> None:
    recipe = Recipe()
    assert [recipe.epochs(n) for n in (10, 100, 500, 2000, 100_000)] == [40, 40, 20, 10, 5]


def test_no_recipe_value_is_also_a_param() -> None:
    """params.yaml holds what a user may turn, cases.py what the method is; no value in both."""
    params = load(Path(__file__).parent.parent / "params.yaml")
    assert not {f for f in Recipe.__dataclass_fields__} & set(vars(params.train))
