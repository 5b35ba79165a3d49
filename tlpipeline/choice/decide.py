"""The choice: which case applies and where the network is cut, by the evidence of a profile.

Two comparisons decide. Fine-tuning has to gain more than `choose.tolerance` over the best frozen head (size). Cutting layers off has to gain more
than `choose.gain` over the last tap (similarity). Probes measure the frozen heads, and predictor.py predicts the gain of fine-tuning. Where the
prediction leaves the choice open, race.py trains both ways and compares them.
"""

from dataclasses import replace

import numpy as np

from tlpipeline.choice.cases import CASES, DIFFERENT, LARGE, SIMILAR, SMALL, Case, find
from tlpipeline.choice.decision import Arm, CutGain, Decision, Former, Race, TuningGain
from tlpipeline.choice.policy import DecisionPolicy, has_signal, turning, weak_labels, weigh
from tlpipeline.errors import BackboneError
from tlpipeline.params import AUTO, ChooseParams
from tlpipeline.profiling.profile import Probe, Profile, SliceTest, slice_test


def undecided(profile: Profile, rule: ChooseParams) -> bool:
    """Return whether a larger sample could still change the choice: the slice test is close, or the best head is near the turning point."""
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    close = rule.alpha / 4 < test.significance < 3 * rule.alpha and test.gain >= rule.gain / 200
    best = max(profile.heads, key=lambda head: head.accuracy)
    return close or (best.low < 0.95 and best.high > 0.80)


def choose(profile: Profile, rule: ChooseParams, former: Former | None = None) -> Decision:
    """Decide without a race.

    Args:
        former: the decision of the model in production, which is kept unless the evidence for another one exceeds its noise.

    Raises:
        ParamsError: choose.case names no case. BackboneError: choose.slice names no tap.
    """
    weighed = weigh(profile, rule, former=former)
    return decide(profile, weighed, weighed.large)


def decide(profile: Profile, weighed: DecisionPolicy, large: bool, race: Race | None = None) -> Decision:
    """Return the decision for a data set that is large (fine-tuning pays) or not; after a race, with its result."""
    rule = weighed.rule
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    wanted = forced_tap(profile, rule.slice) if rule.slice != AUTO else None
    tap = weighed.tap(profile, test.tap)
    tuning, cutting = tuning_gain(weighed, large, race), cut_gain(weighed, replace(test, tap=tap), large)
    case = case_of(tuning, cutting) if rule.case == AUTO else find(rule.case)
    if wanted and rule.case == AUTO:
        # A forced slice needs a case that slices, if there is one for this size of data.
        case = next((c for c in CASES if c.size == case.size and c.keep == "slice"), case)
    asked = ("case", "slice") if case.keep == "slice" else ("case",)
    head = "cut" if case.keep == "slice" else "multi" if case.freeze == "kept" and weighed.head == "multi" else "last"
    # If the user forces a slice that the evidence does not support: the best earlier tap, or the one before the last.
    last = profile.taps[-1].name
    at = (wanted or tap or profile.taps[max(0, len(profile.taps) - 2)].name) if head == "cut" else last
    kept = next(t for t in profile.taps if t.name == at)
    regret, p_within = _regret_of(profile, weighed, race, head if case.freeze == "kept" else "", kept)
    return Decision(
        case=case.name,
        slice=at,
        head=head,
        readings=profile.last_head if head == "last" and case.freeze == "kept" else profile.head_at(at),
        size=profile.size,
        freeze=case.freeze,
        init=case.init,
        recipe=case.recipe,
        tuning=tuning,
        cutting=cutting,
        arms=arms_of(profile, weighed),
        regret=regret,
        p_within_tolerance=p_within,
        race=race,
        race_wanted=race is None and not weighed.no_race,
        no_race="" if race else weighed.no_race,
        judges_needed=weighed.judges_needed,
        evpi=round(weighed.evpi(weighed.gains), 4),
        turning=None if race else turning(weighed, large),
        saved_parameters=round(1 - kept.parameters / max(profile.parameters, 1), 4),
        saved_ops=round(1 - kept.forward_ops / max(profile.forward_ops, 1), 4),
        outside=weighed.prediction.outside,
        weak=(*weak_evidence(profile, weighed), *(("slice_unused",) if wanted and case.keep != "slice" else ())),
        forced=tuple(f"choose.{key}" for key in asked if getattr(rule, key) != AUTO),
        former=weighed.former,
        instead=_instead(profile, weighed, large, race, (case.name, at)),
    )


def _instead(profile: Profile, weighed: DecisionPolicy, large: bool, race: Race | None, chosen: tuple[str, str]) -> tuple[str, str] | None:
    """Return the case and the slice without the former decision, where they differ from what was chosen."""
    if weighed.former is None:
        return None
    alone = weighed.alone
    # A race, or an arm of one, decides about fine-tuning by itself.
    other = decide(profile, alone, large if race is not None or large != weighed.large else alone.large, race)
    return None if (other.case, other.slice) == chosen else (other.case, other.slice)


def case_of(tuning: TuningGain, cutting: CutGain) -> Case:
    """Return the row for these two answers."""
    kind = (LARGE if tuning.exceeds else SMALL, DIFFERENT if cutting.exceeds else SIMILAR)
    return next(case for case in CASES if (case.size, case.likeness) == kind)


def tuning_gain(weighed: DecisionPolicy, large: bool, race: Race | None) -> TuningGain:
    """Return the comparison of fine-tuning's gain with the tolerance: the predicted gain, or the expected gain after a race."""
    prediction = weighed.prediction
    counted, why = prediction.gain, "prediction"
    if race is not None:
        why = "race"
        if race.looks:
            counted = race.looks[-1].frozen_regret - race.looks[-1].tuned_regret
    elif not has_signal(weighed.evidence):
        counted, why = min(prediction.gain, 0.0), "no_signal"
    elif large == weighed.large != weighed.alone.large:
        counted, why = weighed.tolerance, "former"
    gain, low, high, counted = (round(float(value), 6) for value in (prediction.gain, prediction.low, prediction.high, counted))
    return TuningGain(gain, low, high, counted, weighed.tolerance, large, why)


def cut_gain(weighed: DecisionPolicy, test: SliceTest, large: bool) -> CutGain:
    """Return the comparison of the gain of cutting with choose.gain.

    A frozen network is cut only where the gain is significant, confirmed, and no head on several taps makes up for it. Where everything is
    trained nothing is cut; the gain, corrected for taking the best of several taps, then says only whether the data are different.
    """
    rule, border = weighed.rule, weighed.rule.gain / 100
    exceeds = weighed.different if large else weighed.head == "cut"
    if test.tap is None:
        why = "one_tap"
    elif weak_labels(weighed.evidence):
        why = "weak_labels"
    elif exceeds != (weighed.alone.different if large else weighed.alone.head == "cut"):
        why = "former"
    elif large:
        why = "corrected"
    elif test.significance >= rule.alpha:
        why = "not_significant"
    elif test.gain < border:
        why = "below_border"
    elif not test.confirmed:
        why = "not_confirmed"
    else:
        why = "confirmed" if weighed.head == "cut" else "several_taps"
    counted = {"confirmed": test.gain, "below_border": test.gain, "corrected": test.corrected, "former": border}.get(
        why, min(test.gain, 0.0)
    )
    gain, corrected, counted = (round(value, 6) for value in (test.gain, test.corrected, counted))
    return CutGain(test.tap, test.best_earlier, gain, corrected, round(test.significance, 4), counted, border, exceeds, why)


def weak_evidence(profile: Profile, weighed: DecisionPolicy) -> tuple[str, ...]:
    """Return codes of what makes the evidence weak (see explain.WEAK)."""
    weak = {
        "unprobed_classes": profile.probed < profile.classes,
        "no_held_out": profile.cut is not None and not profile.held_out,
        "one_tap": len(profile.taps) == 1,
        "no_source_head": profile.head_similarity is None,
        "no_signal": not has_signal(weighed.evidence),
        "few_judges": weighed.no_race == "few_judges",
    }
    return (*weak_labels(profile), *(code for code, true in weak.items() if true))


def forced_tap(profile: Profile, wanted: str) -> str:
    """Return the tap that `choose.slice` names: a tap, or the last tap of a stage of blocks.

    Raises:
        BackboneError: there is no such tap.
    """
    inside = [t.name for t in profile.taps if t.name == wanted or t.name.startswith(f"{wanted}.")]
    if not inside:
        taps = ", ".join(t.name for t in profile.taps)
        raise BackboneError(f"expected a tap of {profile.backbone} in choose.slice, found {wanted!r}; its taps are {taps}.")
    return inside[-1]


def arms_of(profile: Profile, weighed: DecisionPolicy) -> tuple[Arm, ...]:
    """Return the ways to train, with their expected accuracy and cost."""
    prediction = weighed.prediction
    every = profile.images + 2 * profile.validation
    ops = {t.name: t.forward_ops / max(profile.forward_ops, 1) for t in profile.taps}
    frozen = [
        Arm("frozen" if name == "last" else name, head.accuracy, head.low, head.high, round(every * ops[head.taps[0]], 1))
        for name, head in (("last", profile.last), ("cut", profile.cut), ("multi", profile.multi))
        if head is not None
    ]
    start = weighed.frozen
    recipe = find("large_similar").recipe
    cost = (1 + recipe.refit_head) * every + recipe.epochs(profile.images) * (3 * profile.images + 2 * profile.validation)
    accuracy, low, high = (round(float(np.clip(start + gain, 0, 1)), 4) for gain in (prediction.gain, prediction.low, prediction.high))
    return (*frozen, Arm("tuned", accuracy, low, high, float(cost)))


def _regret_of(profile: Profile, weighed: DecisionPolicy, race: Race | None, head: str, kept: Probe) -> tuple[float, float]:
    """Return the expected regret of the choice, and the probability that it is at most the tolerance worse than the best.

    Args:
        head: last, cut or multi; "" for fine-tuning.
        kept: the last tap that is kept.
    """
    last = race.looks[-1] if race is not None and race.looks else None
    gains, tolerance = weighed.gains, weighed.tolerance
    own = profile.head(head).accuracy if head else weighed.frozen
    if head == "cut" and profile.cut is not None and profile.cut.taps[0] != kept.name:
        own = kept.accuracy  # the user chose this tap; only its own probe was measured
    if head and own != weighed.frozen:  # forced: what the user chose against what would have been chosen
        lost = np.maximum(gains, 0.0) + weighed.frozen - own
        return round(float(lost.clip(min=0).mean()), 4), round(float((lost <= tolerance).mean()), 4)
    regrets = weighed.prediction if last is None else last
    if last is None:
        p_within = weighed.p_within_tolerance(tuned=not head)
    else:
        p_within = weighed.model.p_within_tolerance(1 - last.p_tuned_better if head else last.p_tuned_within)
    return round(regrets.frozen_regret if head else regrets.tuned_regret, 4), round(p_within, 4)
