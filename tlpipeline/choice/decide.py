"""The choice: which case applies and where the network is cut, by the evidence of a profile.

The rungs of evidence, cheapest first: frozen heads are measured (probes), fine-tuning is predicted (outlook.py), and where that leaves it
open the two are raced (race.py). The cheapest way is taken whose expected loss against the best is within `choose.tolerance`.
"""

import numpy as np

from tlpipeline.choice.cases import CASES, DIFFERENT, LARGE, SIMILAR, SMALL, Case, find
from tlpipeline.choice.decision import Arm, Decision, Race
from tlpipeline.choice.policy import DecisionPolicy, weak_labels, weigh
from tlpipeline.choice.reasons import changes, doubts, reason, weaknesses
from tlpipeline.errors import BackboneError
from tlpipeline.params import AUTO, ChooseParams
from tlpipeline.profiling.profile import Probe, Profile, SliceTest, slice_test


def undecided(profile: Profile, rule: ChooseParams) -> bool:
    """Say whether a larger sample could still change the choice: the slice test is close, or the best head is near where the choice turns."""
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    close = rule.alpha / 4 < test.significance < 3 * rule.alpha and test.gain >= rule.gain / 200
    best = max(profile.heads, key=lambda head: head.accuracy)
    return close or (best.low < 0.95 and best.high > 0.80)


def choose(profile: Profile, rule: ChooseParams) -> Decision:
    """Decide without a race.

    Raises:
        ParamsError: choose.case names no case. BackboneError: choose.slice names no tap.
    """
    weighed = weigh(profile, rule)
    return decide(profile, weighed, weighed.large)


def decide(profile: Profile, weighed: DecisionPolicy, large: bool, race: Race | None = None) -> Decision:
    """Return the decision for a data set that is large (fine-tuning pays) or not; after a race, with what it found."""
    rule = weighed.rule
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    chance = weighed.large_after(race)
    axes = {LARGE: chance, SMALL: 1 - chance, SIMILAR: weighed.similar, DIFFERENT: 1 - weighed.similar}
    wanted = forced_tap(profile, rule.slice) if rule.slice != AUTO else None
    case = _row(weighed, large) if rule.case == AUTO else find(rule.case)
    if wanted and rule.case == AUTO:
        # Who forces a slice wants a case that slices, where there is one for this size of data.
        case = next((c for c in CASES if c.size == case.size and c.keep == "slice"), case)
    asked = ("case", "slice") if case.keep == "slice" else ("case",)
    forced = tuple(f"choose.{key}" for key in asked if getattr(rule, key) != AUTO)
    head, sliced, remark = _head(profile, weighed, case, test, wanted)
    several = head == "multi" or case.freeze == "nothing"
    readings = profile.head_at(sliced or profile.taps[-1].name) if sliced or several else profile.last_head
    kept = next(t for t in profile.taps if t.name == (sliced or profile.taps[-1].name))
    arms = arms_of(profile, weighed)
    regret, within = _standing(profile, weighed, race, head if case.freeze == "kept" else "", kept)
    return Decision(
        case=case.name,
        slice=kept.name,
        head=head,
        readings=readings,
        size=profile.size,
        freeze=case.freeze,
        init=case.init,
        recipe=case.recipe,
        probabilities=_probabilities(weighed, axes),
        similar=round(weighed.similar, 4),
        large=round(chance, 4),
        arms=arms,
        regret=regret,
        within=within,
        race=race,
        race_wanted=race is None and not weighed.no_race,
        no_race="" if race else weighed.no_race,
        saved_parameters=round(1 - kept.parameters / max(profile.parameters, 1), 4),
        saved_ops=round(1 - kept.forward_ops / max(profile.forward_ops, 1), 4),
        reason=reason(profile, weighed, large, case, test, head, sliced, race)
        + remark
        + ("." if not forced else f" (forced by {' and '.join(forced)})."),
        changes=changes(profile, weighed, case, test, large, race),
        warnings=(*weaknesses(profile), *doubts(weighed)),
        forced=forced,
    )


def _probabilities(weighed: DecisionPolicy, axes: dict[str, float]) -> dict[str, float]:
    """Return the probability of each case. Whether small data are sliced is settled by then: the row for which it is has all of small's."""
    out = {c.name: axes[c.size] * axes[c.likeness] for c in CASES}
    out |= {c.name: 0.0 for c in CASES if c.size == SMALL} | {_row(weighed, large=False).name: axes[SMALL]}
    return {name: round(chance, 4) for name, chance in out.items()}


def _row(weighed: DecisionPolicy, large: bool) -> Case:
    """Return the row for this size and likeness; a slice that is not made leaves its data to the row that cuts nothing."""
    likeness = SIMILAR if weighed.similar >= 0.5 or weak_labels(weighed.evidence) else DIFFERENT
    case = next(c for c in CASES if (c.size, c.likeness) == (LARGE if large else SMALL, likeness))
    if case.keep == "slice" and weighed.head != "cut":
        return next(c for c in CASES if c.size == case.size and c.keep == "end")
    if case.size == SMALL and weighed.head == "cut":
        return next(c for c in CASES if c.size == case.size and c.keep == "slice")
    return case


def _head(profile: Profile, weighed: DecisionPolicy, case: Case, test: SliceTest, wanted: str | None) -> tuple[str, str | None, str]:
    """Return which taps the head reads, the slice point if anything is cut off, and a remark."""
    taps = profile.taps
    if case.keep == "slice":
        # Where the evidence asks for no slice but the user does: the best earlier tap there is.
        tap = wanted or test.tap or taps[max(0, len(taps) - 2)].name
        return "cut", tap, ""
    remark = f"; choose.slice is not used, because {case.name} cuts nothing off" if wanted else ""
    if case.freeze == "nothing":
        return "last", None, remark
    if test.similar < 0.5 and weighed.rule.case == AUTO and weighed.head == "last":
        remark += f"; slicing {test.why_not(weighed.rule.alpha, weighed.rule.gain / 100)}, so nothing is cut off"
    return "multi" if weighed.head == "multi" else "last", None, remark


def forced_tap(profile: Profile, wanted: str) -> str:
    """Return the tap that `choose.slice` means: a tap, or the last one of a stage.

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
    seen = weighed.prediction
    every = profile.images + 2 * profile.validation
    ops = {t.name: t.forward_ops / max(profile.forward_ops, 1) for t in profile.taps}
    frozen = [
        Arm("frozen" if name == "last" else name, head.accuracy, head.low, head.high, round(every * ops[head.taps[0]], 1))
        for name, head in (("last", profile.last), ("cut", profile.cut), ("multi", profile.multi))
        if head is not None
    ]
    start = weighed.frozen
    recipe = find("large_similar").recipe
    cost = (1 + recipe.solve_again) * every + recipe.epochs(profile.images) * (3 * profile.images + 2 * profile.validation)
    accuracy, low, high = (round(float(np.clip(start + gain, 0, 1)), 4) for gain in (seen.gain, seen.low, seen.high))
    return (*frozen, Arm("tuned", accuracy, low, high, float(cost)))


def _standing(profile: Profile, weighed: DecisionPolicy, race: Race | None, head: str, kept: Probe) -> tuple[float, float]:
    """Return the expected regret of what was decided, and P(it is not worse than the best by more than the tolerance).

    Args:
        head: last, cut or multi; "" for fine-tuning.
        kept: the last tap that is kept.
    """
    last = race.looks[-1] if race is not None and race.looks else None
    seen, gains, tolerance = weighed.prediction, weighed.gains, weighed.tolerance
    own = profile.head(head).accuracy if head else weighed.frozen
    if head == "cut" and profile.cut is not None and profile.cut.taps[0] != kept.name:
        own = kept.accuracy  # a tap that the user chose: its own probe is what was measured of it
    if head and own != weighed.frozen:  # forced: what the user chose against what would have been chosen
        lost = np.maximum(gains, 0.0) + weighed.frozen - own
        return round(float(lost.clip(min=0).mean()), 4), round(float((lost <= tolerance).mean()), 4)
    told = seen if last is None else last
    within = weighed.settled(tuned=not head) if last is None else weighed.model.settled(1 - last.chance if head else last.safe)
    return round(told.frozen_regret if head else told.tuned_regret, 4), round(within, 4)
