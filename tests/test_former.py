"""The former decision is kept unless the evidence for another one exceeds its noise, and a run says whether the case changed."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.decisions import DIFFERENT_SMALL, MODEL, RULE, SIMILAR_LARGE, SIMILAR_SMALL
from tests.helpers.evidence import model, planted
from tests.helpers.images import paint
from tests.helpers.workspaces import dvc_status, set_param
from tlpipeline.api import Workspace
from tlpipeline.choice import decide as choice
from tlpipeline.choice import reasons
from tlpipeline.choice.decision import Decision, Former
from tlpipeline.choice.policy import weigh
from tlpipeline.choice.predictor import GainPredictor
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import silent
from tlpipeline.workspace import history, layout, release, stages


def former_of(decision: Decision) -> Former:
    """Return a decision as that of a version."""
    return Former(
        "shop@v1", "", "", decision.case, decision.slice, decision.head, decision.freeze, decision.cutting.exceeds, 900,
        decision.tuning.counted, decision.cutting.counted,
    )  # fmt: skip


def decide(profile: Profile, former: Decision | None = None, predictor: GainPredictor = MODEL) -> Decision:
    """Decide after a former decision."""
    weighed = weigh(profile, RULE, predictor, former_of(former) if former else None)
    return choice.decide(profile, weighed, weighed.large)


@pytest.mark.parametrize("before", [SIMILAR_SMALL, DIFFERENT_SMALL, SIMILAR_LARGE, [0.40, 0.70, 0.50]])
@pytest.mark.parametrize("now", [SIMILAR_SMALL, DIFFERENT_SMALL, SIMILAR_LARGE, [0.40, 0.70, 0.50]])
def test_clear_evidence_decides_whatever_was_decided_before(before: list[float], now: list[float]) -> None:
    alone = decide(planted(now))
    after = decide(planted(now), decide(planted(before)))
    assert (after.case, after.slice, after.instead) == (alone.case, alone.slice, None)


def flips(kept: bool, predictor: GainPredictor, accuracies: list[float]) -> int:
    """Return how often the case or the slice changes over 16 samples of the same data."""
    made: list[Decision] = []
    for seed in range(16):
        made.append(decide(planted(accuracies, seed=seed), made[-1] if kept and made else None, predictor))
    return sum((a.case, a.slice) != (b.case, b.slice) for a, b in pairwise(made))


@pytest.mark.parametrize(("predictor", "accuracies"), [
    (model(intercept=0.36, deviation=0.15, log_odds_of_the_frozen_head=-0.35), SIMILAR_SMALL),  # the gain is at the tolerance
    (MODEL, [0.931, 0.933, 0.932, 0.90]),  # three slice points that are equally good
    (MODEL, [0.60, 0.945, 0.93]),  # a cut that is hardly worth it
])  # fmt: skip
def test_samples_of_the_same_data_do_not_flip_the_decision(predictor: GainPredictor, accuracies: list[float]) -> None:
    assert flips(False, predictor, accuracies) >= 3
    assert flips(True, predictor, accuracies) <= 1


def test_what_is_kept_costs_no_more_than_the_noise() -> None:
    before = decide(planted([0.96, 0.85, 0.80]))
    assert before.slice == "tap0"
    assert decide(planted([0.93, 0.96, 0.80]), before).slice == "tap1", "another cut is better by far"


def test_a_kept_decision_says_so_with_numbers_and_a_changed_one_too() -> None:
    predictor = model(intercept=0.36, deviation=0.15, log_odds_of_the_frozen_head=-0.35)
    made = [(profile, decide(profile, predictor=predictor)) for profile in (planted(SIMILAR_SMALL, seed=seed) for seed in range(16))]
    small = next(d for _, d in made if d.case == "small_similar")
    profile, alone = next((p, d) for p, d in made if d.case == "large_similar")
    kept = decide(profile, small, predictor)
    assert (kept.case, kept.instead) == ("small_similar", ("large_similar", "tap2"))
    assert kept.tuning.why == "former"
    assert kept.contradiction() == ""
    said = reasons.former_sentence(kept, profile)
    assert said.startswith(
        "The case of shop@v1 is kept. These images alone would give large_similar, but not by more than their noise: fine-tuning"
    )
    assert "on 1,000 training images (before 900)" in said
    assert "so close to the tolerance of 0.5 that the decision stays as it was" in reasons.summary(kept, profile)
    assert "so close" not in reasons.summary(alone, profile)
    changed = decide(planted(DIFFERENT_SMALL), decide(planted(SIMILAR_LARGE)))
    assert reasons.former_sentence(changed, planted(DIFFERENT_SMALL)).startswith(
        "The case changed since shop@v1, from large_similar to small_different: fine-tuning counts"
    )
    assert reasons.former_sentence(alone, profile) == ""


def test_a_former_decision_about_another_network_does_not_count() -> None:
    profile = planted(SIMILAR_SMALL)
    other = replace(former_of(decide(profile)), slice="features.7")
    assert weigh(profile, RULE, MODEL, other).former is None


def test_a_run_compares_with_the_version_in_production_and_only_where_it_decides_anew(registered: Path) -> None:
    history.record_former(registered)
    assert json.loads((registered / layout.FORMER).read_text()) is None, "nothing is to be decided"
    assert not dvc_status(registered)
    for index in range(300, 312):
        paint(0, index).save(registered / "images" / "class0" / f"{index}.png")
    Workspace(registered).commit_data()
    for name in ("ingest", "profile", "check"):
        stages.bring_up_to_date(registered, name, silent)
    history.record_former(registered)
    for name in ("choose", "train", "evaluate"):
        stages.bring_up_to_date(registered, name, silent)
    case, profile = release.load_decision(registered)
    assert case.former is not None
    assert (case.former.version, case.former.images) == ("workspace@v0.1.0", 54)
    registration = release.register(registered, release.evaluate_gate(registered, silent))
    told = release.summary(registered, registration, release.write_report(registered, registration))
    assert told.former == reasons.former_sentence(case, profile)
    assert "The case is that of workspace@v0.1.0: fine-tuning counts" in (registered / release.REPORT).read_text(encoding="utf-8")
    assert "The case is that of workspace@v0.1.0" in str(Workspace(registered).explain())
    history.record_former(registered)
    assert not dvc_status(registered), "the next run has nothing to do, and decides nothing anew"
    set_param(registered, "choose.tolerance", "0.4")
    history.record_former(registered)
    assert layout.read_former(registered) is None, "it was decided by another rule"
