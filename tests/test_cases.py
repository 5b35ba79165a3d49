"""The table of cases: exactly one row for each kind of data, and a decision that says, and keeps, what it was made of."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from tests.helpers.decisions import DIFFERENT_SMALL, RULE, SIMILAR_LARGE, SIMILAR_SMALL, decide
from tests.helpers.evidence import planted
from tlpipeline import records
from tlpipeline.choice.cases import CASES, find
from tlpipeline.choice.decision import Decision, InterimResult, Race
from tlpipeline.errors import ParamsError
from tlpipeline.params import load
from tlpipeline.training.override import unused_overrides
from tlpipeline.training.recipe import Recipe


def test_each_kind_of_data_has_exactly_one_row() -> None:
    assert sorted((c.size, c.likeness) for c in CASES) == sorted(product(("small", "large"), ("similar", "different")))


def test_the_rows_are_the_four_cases_of_the_textbook() -> None:
    assert [(c.name, c.keep, c.freeze, c.init) for c in CASES] == [
        ("small_similar", "end", "kept", "pretrained"),
        ("small_different", "slice", "kept", "pretrained"),
        ("large_similar", "end", "nothing", "pretrained"),
        ("large_different", "end", "nothing", "auto"),
    ]


def test_a_row_is_found_by_its_name_and_an_unknown_one_suggests_the_nearest() -> None:
    assert [find(case.name) for case in CASES] == list(CASES)
    with pytest.raises(ParamsError, match=r"choose\.case.*'large_similr'.*large_similar"):
        find("large_similr")


def test_a_decision_survives_json() -> None:
    decision = decide(planted(DIFFERENT_SMALL))
    assert records.parse(Decision, json.dumps(decision.to_json()), "case.json", "") == decision
    race = Race(
        (InterimResult(2, 5, 100, 0.8, 0.82, 0.02, 0.6, 0.9, 0.01, 0.0), InterimResult(5, 5, 100, 0.8, 0.9, 0.02, 0.99, 1.0, 0.1, 0.0)),
        "tuned",
        "ahead",
        1e4,
    )
    raced = replace(decision, race=race)
    assert records.parse(Decision, json.dumps(raced.to_json()), "case.json", "") == raced


def test_override_changes_one_recipe_value_and_refuses_unknown_ones() -> None:
    decision = decide(planted(SIMILAR_LARGE))
    assert decision.overridden({"large": 3}).recipe == replace(decision.recipe, large=3)
    assert decision.overridden({"init": "random"}).init == "random"
    assert decision.overridden({}) == decision
    with pytest.raises(ParamsError, match="did you mean large"):
        decision.overridden({"larg": 3})
    with pytest.raises(ParamsError, match="expected int"):
        decision.overridden({"large": "many"})
    with pytest.raises(ParamsError, match=r"train\.override\.init"):
        decision.overridden({"init": "imagenet"})


def test_a_decision_has_the_recipe_of_its_row() -> None:
    for accuracies in (SIMILAR_SMALL, DIFFERENT_SMALL, SIMILAR_LARGE):
        decision = decide(planted(accuracies))
        row = find(decision.case)
        assert (decision.freeze, decision.init, decision.recipe) == (row.freeze, row.init, row.recipe)


def test_epochs_fall_with_the_number_of_images_within_bounds() -> None:
    recipe = Recipe()
    assert [recipe.epochs(n) for n in (10, 100, 500, 2000, 100_000)] == [40, 22, 10, 5, 5]
    assert [recipe.scratch_epochs(n) for n in (10, 100, 500, 2000, 100_000)] == [120, 120, 60, 30, 15]


def test_few_images_are_trained_in_smaller_batches() -> None:
    assert [Recipe().batch_size(n) for n in (10, 4999, 5000, 100_000)] == [32, 32, 64, 64]


def test_the_rate_goes_by_the_normalization_and_by_the_size_of_batch_normalized_images() -> None:
    recipe = Recipe()
    assert recipe.lr("batch", 32) == recipe.lr_batch_small > recipe.lr("batch", 64) == recipe.lr_batch
    assert recipe.lr("layer", 32) == recipe.lr("layer", 224) == recipe.lr_layer
    assert recipe.lr("none", 32) == recipe.lr_none


def test_no_recipe_value_is_also_a_param() -> None:
    """params.yaml holds what a user may turn, cases.py what the method is; no value in both."""
    params = load(Path(__file__).parent.parent / "params.yaml")
    assert not {f for f in Recipe.__dataclass_fields__} & set(vars(params.train))


def test_the_rule_of_the_tests_is_the_one_that_is_documented() -> None:
    """Only the draws of the bootstrap are fewer, for speed."""
    assert replace(RULE, draws=1000) == load(Path(__file__).parent.parent / "params.yaml").choose


def test_what_an_override_cannot_change_in_a_frozen_case_is_told() -> None:
    changes = {"large": 3, "balance": "none", "crop": 0.5, "lr_none": 0.9}
    frozen, tuned = decide(planted(SIMILAR_SMALL)), decide(planted(SIMILAR_LARGE))
    assert unused_overrides(frozen.plan, changes, "none") == ("large", "crop", "lr_none")
    assert unused_overrides(tuned.plan, changes, "none") == ()


@pytest.mark.parametrize(
    ("normalization", "size", "works", "idles"),
    [
        ("batch", 224, {"lr_batch", "weight_decay", "statistics", "sync_below"}, {"lr_batch_small", "lr_none", "weight_decay_adam"}),
        ("batch", 32, {"lr_batch_small", "layer_decay_other"}, {"lr_batch", "lr_layer", "layer_decay_norm"}),
        ("layer", 224, {"lr_layer", "weight_decay_adam", "layer_decay_norm"}, {"lr_batch", "weight_decay", "statistics"}),
        ("none", 224, {"lr_none", "weight_decay"}, {"lr_layer", "sync_below", "scratch_from"}),
    ],
)
def test_what_an_override_cannot_change_in_a_network_is_told(normalization: str, size: int, works: set[str], idles: set[str]) -> None:
    case = replace(decide(planted(SIMILAR_LARGE)), size=size)
    changes = {name: getattr(case.recipe, name) for name in sorted(works | idles)}
    assert set(unused_overrides(case.plan, changes, normalization)) == idles
    assert unused_overrides(replace(case, init="auto").plan, {"scratch_from": 10, "scratch_times": 2}, normalization) == ()
    assert unused_overrides(case.overridden({"optimizer": "adamw"}).plan, {"weight_decay": 0.1}, normalization) == ("weight_decay",)


@pytest.mark.parametrize("changes", [{"large": True}, {"lr_none": True}, {"compile": 1}])
def test_yes_is_no_number_and_a_number_is_not_yes(changes: dict[str, object]) -> None:
    with pytest.raises(ParamsError, match=next(iter(changes))):
        decide(planted(SIMILAR_LARGE)).overridden(changes)
