"""Decisions of the choice under a fixed rule and a planted gain predictor."""

from collections.abc import Sequence
from dataclasses import replace

from tests.helpers.evidence import model, planted
from tests.helpers.workspaces import REPOSITORY
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice import decide as choice
from tlpipeline.choice.cases import Case
from tlpipeline.choice.decide import choose
from tlpipeline.choice.decision import Decision
from tlpipeline.choice.policy import weigh
from tlpipeline.choice.predictor import GainPredictor
from tlpipeline.params import ChooseParams, load
from tlpipeline.profiling.profile import Profile


def decision_for(case: Case, readings: Sequence[TapPooling], size: int) -> Decision:
    """A decision for this row, whatever the evidence; its head reads here, deepest first."""
    made = choose(planted([0.6, 0.8, 0.9]), RULE)
    return replace(
        made,
        case=case.name,
        slice=readings[0].tap,
        readings=tuple(readings),
        size=size,
        freeze=case.freeze,
        init=case.init,
        recipe=case.recipe,
    )


RULE = replace(
    load(REPOSITORY / "params.yaml").choose,
    case="auto",
    slice="auto",
    tolerance=0.5,
    effort="auto",
    race_below=0.75,
    race_images=100,
    gain=1.0,
    alpha=0.10,
    draws=500,
)


MODEL = model(intercept=0.05, deviation=0.15, log10_images=0.3, log_odds_of_the_frozen_head=-0.35)


# Probe accuracies from the first tap to the last.
SIMILAR_SMALL = [0.60, 0.80, 0.95]


DIFFERENT_SMALL = [0.80, 0.96, 0.85]


SIMILAR_LARGE = [0.30, 0.45, 0.60]


def decide(profile: Profile, rule: ChooseParams = RULE, model: GainPredictor = MODEL) -> Decision:
    weighed = weigh(profile, rule, model)
    return choice.decide(profile, weighed, weighed.large)
