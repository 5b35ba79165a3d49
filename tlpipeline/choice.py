"""The choice: which case applies and where the network is cut, by the evidence of a profile.

The rungs of evidence, cheapest first: frozen heads are measured (probes), fine-tuning is predicted (outlook.py), and where that leaves it
open the two are raced (race.py). The cheapest way is taken whose expected loss against the best is within `choose.tolerance`.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tlpipeline import outlook
from tlpipeline.cases import CASES, DIFFERENT, LARGE, SIMILAR, SMALL, Arm, Case, Decision, Look, Race, find
from tlpipeline.errors import BackboneError
from tlpipeline.outlook import Evidence, Outlook, Prediction
from tlpipeline.params import AUTO, ChooseParams
from tlpipeline.probes import Bits, Matrix
from tlpipeline.profiling import Head, Probe, Profile, SliceTest, slice_test

# What `choose.prefer` makes of the tolerance.
LENIENCE = {"accuracy": 0.0, "balanced": 1.0, "cost": 4.0}
TEXTBOOK = "textbook"
LOOKS = 3
SPENT = (1 / 6, 1 / 3, 1 / 2)  # shares of choose.alpha that the looks of a race may spend
LEAST_PER_CLASS = 5
LEAST_JUDGES, FEW_JUDGES = 2, 20  # of a race that is asked for, and of one because labels are few
SIGNAL = 0.3  # log odds by which the tangent probe must beat heads that read nothing to count as something read


@dataclass(frozen=True)
class Weighed:
    """The evidence as the rule sees it, before it is known whether fine-tuning is worth it."""

    evidence: Evidence
    rule: ChooseParams
    model: Outlook

    @property
    def tolerance(self) -> float:
        """What the cheaper way may lose, as a share."""
        return self.rule.tolerance / 100 * LENIENCE[self.rule.prefer]

    @property
    def slices(self) -> bool:
        """Whether an earlier tap is significantly better (family-wise), by `gain` points, and its head not worse on held-out images.

        Never where the labels are too few for the probes: then the textbook's first case stands against its third.
        """
        seen = self.evidence
        return not weak_labels(seen) and seen.significance < self.rule.alpha and seen.gain >= self.rule.gain / 100 and seen.confirmed

    @cached_property
    def head(self) -> str:
        """Which frozen head would be trained: cut where slicing pays, multi where it is expected to win more than the tolerance, else last."""
        seen = self.evidence
        simple = "cut" if self.slices else "last"
        gain = self.model.head_gain("over" if self.slices else "multi", seen)
        return "multi" if gain > self.tolerance else simple

    @property
    def frozen(self) -> float:
        """Leave-one-out accuracy of that head."""
        return float(getattr(self.evidence, self.head))

    @cached_property
    def prediction(self) -> Prediction:
        """What fine-tuning would win against that head."""
        return self.model.predict(self.evidence, self.frozen, self.tolerance)

    @property
    def large(self) -> bool:
        """Whether fine-tuning is worth it: the head is expected to lose more than the tolerance against it."""
        if self.rule.rule == TEXTBOOK:
            return self.evidence.images >= self.rule.textbook_images
        return self.prediction.gain > self.tolerance and has_signal(self.evidence)

    @property
    def prior(self) -> float:
        """P(large) from size, classes, capacity and head similarity alone, before anything was probed."""
        return float(self.large) if self.rule.rule == TEXTBOOK else self.model.prior_chance(self.evidence)

    @property
    def chance_of_large(self) -> float:
        """P(large): fine-tuning wins more than the tolerance. The textbook's boundary knows no doubt."""
        return float(self.large) if self.rule.rule == TEXTBOOK else 1 - self.prediction.within

    @property
    def similar(self) -> float:
        """P(similar): no earlier tap is better by `gain` points; by the textbook, the source classes explain enough of the labels."""
        if self.rule.rule == TEXTBOOK and self.evidence.head_similarity is not None:
            return float(self.evidence.head_similarity >= self.rule.textbook_similarity)
        return self.evidence.similar

    def settled(self, tuned: bool) -> float:
        """Return P(this choice, without a race, is not worse than the best of all arms by more than the tolerance).

        By the number of images, as measured; where nothing was read, at most what the prediction gives it. (What the prediction says adds
        nothing elsewhere, not even where the data are unlike the rows: docs/log.md.)
        """
        by_size = self.model.settled(self.evidence)
        if has_signal(self.evidence):
            return by_size
        return min(by_size, self.prediction.safe if tuned else self.prediction.within)

    @cached_property
    def gains(self) -> Matrix:
        """Equally likely gains of fine-tuning by the prediction."""
        return self.model.gains(self.evidence, self.frozen)

    def posterior(self, part: int, difference: float, error: float) -> Matrix:
        """Return weights for these gains, given a paired difference at a look of the race."""
        behind, spread = self.model.lag[part]
        # At a look fine-tuning stands `behind` its end, as a share of the frozen head's errors.
        missing = 1 - min(self.frozen, 1.0)
        width = math.hypot(error, spread * missing)
        odds = -0.5 * ((difference - (self.gains - behind * missing)) / width) ** 2
        # Relative to the best: a difference far from every prediction must still pull all the way.
        weights = np.exp(odds - odds.max())
        return np.asarray(weights / weights.sum())

    def stake(self, gains: Matrix) -> float:
        """Return what knowing fine-tuning's gain beforehand would be worth, as a share: the expected loss of the better of the two choices.

        A choice loses what the gain lies on its wrong side of the tolerance, which is the price at which fine-tuning is worth having.
        """
        beyond = gains - self.tolerance
        return float(min(beyond.clip(min=0).mean(), (-beyond).clip(min=0).mean()))

    @property
    def unclear(self) -> bool:
        """Whether the prediction leaves the choice between frozen and fine-tuned open, or `choose.effort` wants to see it anyway.

        Open: not knowing costs more than the tolerance, and P(fine-tuning wins more than that) lies between the bounds, or the data are unlike
        those of the fit; or nothing was read, or the labels are too few to read anything.
        """
        seen = self.prediction
        between = self.stake(self.gains) > self.tolerance and self.rule.race_above < 1 - seen.within < self.rule.race_below
        unlike = bool(seen.outside) and self.stake(self.model.gains(self.evidence, self.frozen, size=True)) > self.tolerance
        weak = bool(weak_labels(self.evidence)) or not has_signal(self.evidence)
        return self.rule.effort == "full" or between or unlike or weak

    @property
    def no_race(self) -> str:
        """Why there is no race, "" where there is to be one."""
        if self.rule.rule == TEXTBOOK:
            return "the textbook rule does not race"
        if self.rule.case != AUTO:
            return "the case is forced"
        if self.rule.effort == "quick":
            return "choose.effort is quick"
        if not self.unclear:
            return (
                f"the prediction is clear enough: knowing the better way beforehand would be worth {100 * self.stake(self.gains):.1f} points, at a "
                f"tolerance of {100 * self.tolerance:g}, where P(fine-tuning wins more than that) is {1 - self.prediction.within:.2f}"
            )
        return self.too_few_to_race

    @property
    def too_few_to_race(self) -> str:
        """That there are too few images to judge a race, "" if there are enough."""
        # Who asks for a race gets one, and where the probes are too weak to decide fewer judges than else tell more.
        asked, weak = self.rule.effort == "full", bool(weak_labels(self.evidence))
        least = LEAST_JUDGES if asked else min(FEW_JUDGES, self.rule.race_images) if weak else self.rule.race_images
        if self.evidence.validation >= least:
            return ""
        if asked or weak:
            return f"{self.evidence.validation} validation images are left to judge it, and it takes {least}"
        return (
            f"{self.evidence.validation} validation images are left to judge it, and fewer than {self.rule.race_images} "
            "(choose.race_images) tell less than the prediction, which decides"
        )


def weigh(profile: Profile, rule: ChooseParams, model: Outlook | None = None) -> Weighed:
    """Return the evidence of a profile as the rule sees it, with the fitted model that comes with the package or another."""
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    return Weighed(outlook.evidence(profile, test), rule, model or outlook.fitted())


def heads_of(profile: Profile) -> dict[str, Head]:
    """Return the frozen heads by name; without an earlier tap the cut one is the last one."""
    return {"last": profile.last, "cut": profile.cut or profile.last, "multi": profile.multi}


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


def decide(profile: Profile, weighed: Weighed, large: bool, race: Race | None = None) -> Decision:
    """Return the decision for a data set that is large (fine-tuning pays) or not; after a race, with what it found."""
    rule = weighed.rule
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    chance = _after(race, weighed)
    axes = {LARGE: chance, SMALL: 1 - chance, SIMILAR: weighed.similar, DIFFERENT: 1 - weighed.similar}
    wanted = forced_tap(profile, rule.slice) if rule.slice != AUTO else None
    case = _row(weighed, large) if rule.case == AUTO else find(rule.case)
    if wanted and rule.case == AUTO and rule.slice != TEXTBOOK:
        # Who forces a slice wants a case that slices, where there is one for this size of data.
        case = next((c for c in CASES if c.size == case.size and c.keep == "slice"), case)
    asked = ("case", "slice") if case.keep == "slice" else ("case",)
    forced = tuple(f"choose.{key}" for key in asked if getattr(rule, key) not in (AUTO, TEXTBOOK))
    head, sliced, remark = _head(profile, weighed, case, test, wanted)
    readings = profile.head_at(sliced) if sliced else profile.head_at(profile.taps[-1].name) if head == "multi" else profile.last_head
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
        prior=round(weighed.prior, 4),
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
        reason=_reason(profile, weighed, case, test, head, sliced, race)
        + remark
        + ("." if not forced else f" (forced by {' and '.join(forced)})."),
        changes=_changes(profile, weighed, case, test, large, race),
        warnings=(*weaknesses(profile), *_doubts(weighed)),
        forced=forced,
    )


def _probabilities(weighed: Weighed, axes: dict[str, float]) -> dict[str, float]:
    """Return the probability of each case. Whether small data are sliced is settled by then: the row for which it is has all of small's."""
    out = {c.name: axes[c.size] * axes[c.likeness] for c in CASES}
    if weighed.rule.rule != TEXTBOOK:
        out |= {c.name: 0.0 for c in CASES if c.size == SMALL} | {_row(weighed, large=False).name: axes[SMALL]}
    return {name: round(chance, 4) for name, chance in out.items()}


def _row(weighed: Weighed, large: bool) -> Case:
    """Return the row for this size and likeness; a slice that is not made leaves its data to the row that cuts nothing."""
    likeness = SIMILAR if weighed.similar >= 0.5 or weak_labels(weighed.evidence) else DIFFERENT
    case = next(c for c in CASES if (c.size, c.likeness) == (LARGE if large else SMALL, likeness))
    if case.keep == "slice" and weighed.rule.rule != TEXTBOOK and weighed.head != "cut":
        return next(c for c in CASES if c.size == case.size and c.keep == "end")
    if case.size == SMALL and weighed.rule.rule != TEXTBOOK and weighed.head == "cut":
        return next(c for c in CASES if c.size == case.size and c.keep == "slice")
    return case


def _head(profile: Profile, weighed: Weighed, case: Case, test: SliceTest, wanted: str | None) -> tuple[str, str | None, str]:
    """Return which taps the head reads, the slice point if anything is cut off, and a remark."""
    taps = profile.taps
    if case.keep == "slice":
        # Where the evidence asks for no slice but the user does: the best earlier tap there is.
        tap = wanted or test.tap or taps[max(0, len(taps) - 2)].name
        return "cut", tap, ""
    remark = f"; choose.slice is not used, because {case.name} cuts nothing off" if wanted else ""
    if case.freeze == "nothing":
        return "last", None, remark
    if weighed.rule.rule != TEXTBOOK and test.similar < 0.5 and weighed.rule.case == AUTO and weighed.head == "last":
        remark += f"; slicing {test.why_not(weighed.rule.alpha, weighed.rule.gain / 100)}, so nothing is cut off"
    return "multi" if weighed.head == "multi" and weighed.rule.rule != TEXTBOOK else "last", None, remark


def forced_tap(profile: Profile, wanted: str) -> str:
    """Return the tap that `choose.slice` means: a tap, the last one of a stage, or by the textbook the end of the first third of the blocks.

    Raises:
        BackboneError: there is no such tap.
    """
    if wanted == TEXTBOOK:
        return profile.taps[max(math.ceil(len(profile.taps) / 3) - 1, 0)].name
    inside = [t.name for t in profile.taps if t.name == wanted or t.name.startswith(f"{wanted}.")]
    if not inside:
        taps = ", ".join(t.name for t in profile.taps)
        raise BackboneError(f"expected a tap of {profile.backbone} in choose.slice, found {wanted!r}; its taps are {taps}.")
    return inside[-1]


def arms_of(profile: Profile, weighed: Weighed) -> tuple[Arm, ...]:
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
    cost = every + recipe.epochs(profile.images) * (3 * profile.images + 2 * profile.validation)
    accuracy, low, high = (round(float(np.clip(start + gain, 0, 1)), 4) for gain in (seen.gain, seen.low, seen.high))
    return (*frozen, Arm("tuned", accuracy, low, high, float(cost)))


# --- the race's arithmetic --------------------------------------------------------------------------------------------------------------


def look(weighed: Weighed, part: int, epoch: int, epochs: int, frozen: Bits, tuned: Bits) -> Look:
    """Return what a look of the race says: the prediction, corrected by what the judging images say (Bayes).

    A short trial lies: what fine-tuning still gains from this look to the end of its schedule was measured together with the prediction.

    Args:
        part: which look, 0 to 2.
        frozen, tuned: who was right among the judging images, one after the other the same images.
    """
    difference = tuned.astype(float) - frozen.astype(float)
    images = len(difference)
    # Half a discordant image more: a record without a difference is no certainty.
    error = math.sqrt(max(float(difference.var()), 0.5 / images) / images)
    weights = weighed.posterior(part, float(difference.mean()), error)
    chance = float(weights @ (weighed.gains > weighed.tolerance))
    safe = float(weights @ (-weighed.gains <= weighed.tolerance))
    lost = [round(float(weights @ (sign * weighed.gains).clip(min=0)), 4) for sign in (1, -1)]
    return Look(
        epoch,
        epochs,
        images,
        float(frozen.mean()),
        float(tuned.mean()),
        round(error, 4),
        round(chance, 4),
        round(safe, 4),
        lost[0],
        lost[1],
    )


def look_epochs(epochs: int) -> list[int]:
    """Return the epochs of the planned looks: a third, two thirds, the end of the schedule; fewer where it is shorter than three epochs."""
    return sorted({max(round(epochs * part / LOOKS), 1) for part in range(1, LOOKS + 1)})


def verdict(weighed: Weighed, part: int, last: Look) -> tuple[str, str]:
    """Return (winner, why) after a look, ("", "") while the race goes on; at the end an undecided race goes to the cheaper arm."""
    spent = weighed.rule.alpha * SPENT[part]
    if last.chance >= 1 - spent:
        return "tuned", f"fine-tuning is ahead for good (P {last.chance:.2f})"
    if last.chance <= spent:
        return "frozen", f"fine-tuning will not win more than {weighed.tolerance * 100:g} points (P {last.chance:.2f})"
    if part < LOOKS - 1:
        return "", ""
    difference = last.tuned - last.frozen
    expected = float(weighed.posterior(part, difference, last.error) @ weighed.gains)
    if expected > weighed.tolerance:
        return "tuned", f"undecided at the end, fine-tuning expected to win {expected * 100:.1f} points"
    return "frozen", f"undecided at the end (fine-tuning expected to win {expected * 100:.1f} points), so the cheaper one"


# --- in words ---------------------------------------------------------------------------------------------------------------------------


def _after(race: Race | None, weighed: Weighed) -> float:
    """Return P(large), after the race where there was one."""
    return race.looks[-1].chance if race is not None and race.looks else weighed.chance_of_large


def _standing(profile: Profile, weighed: Weighed, race: Race | None, head: str, kept: Probe) -> tuple[float, float]:
    """Return the expected regret of what was decided, and P(it is not worse than the best by more than the tolerance).

    Args:
        head: last, cut or multi; "" for fine-tuning.
        kept: the last tap that is kept.
    """
    last = race.looks[-1] if race is not None and race.looks else None
    seen, gains, tolerance = weighed.prediction, weighed.gains, weighed.tolerance
    own = heads_of(profile)[head].accuracy if head else weighed.frozen
    if head == "cut" and profile.cut is not None and profile.cut.taps[0] != kept.name:
        own = kept.accuracy  # a tap that the user chose: its own probe is what was measured of it
    if head and own != weighed.frozen:  # forced: what the user chose against what would have been chosen
        lost = np.maximum(gains, 0.0) + weighed.frozen - own
        return round(float(lost.clip(min=0).mean()), 4), round(float((lost <= tolerance).mean()), 4)
    told = seen if last is None else last
    within = weighed.settled(tuned=not head) if last is None else weighed.model.settled(weighed.evidence)
    return round(told.frozen_regret if head else told.tuned_regret, 4), round(within, 4)


def _reason(profile: Profile, weighed: Weighed, case: Case, test: SliceTest, head: str, sliced: str | None, race: Race | None) -> str:
    rule, seen = weighed.rule, weighed.prediction
    frozen = heads_of(profile)[weighed.head]
    if rule.rule == TEXTBOOK:
        size = f"by the textbook rule {profile.images} images are {'large' if weighed.large else 'small'} (from {rule.textbook_images} on)"
    else:
        chance = _after(race, weighed)
        size = (
            f"a head on frozen features reaches {frozen.accuracy:.1%} ({' + '.join(frozen.taps)}), fine-tuning is expected to win "
            f"{seen.gain * 100:+.1f} points ({seen.low * 100:+.1f} to {seen.high * 100:+.1f}), "
            f"{'' if has_signal(weighed.evidence) else 'as it would be for noise, '}so {profile.images} images of {profile.classes} "
            f"classes are {'large' if case.size == LARGE else 'small'} for a network of {_count(profile.parameters)} parameters "
            f"(P(large) {chance:.2f})"
        )
    earlier = test.best_earlier
    likeness = (
        "it has one tap only"
        if earlier is None
        else (
            f"the best earlier tap {earlier} {'gains' if test.gain >= 0 else 'loses'} {abs(test.gain) * 100:.1f} points against the last, "
            f"{profile.taps[-1].name}, so the data are {'similar to' if weighed.similar >= 0.5 else 'different from'} what the network knows "
            f"(P(similar) {weighed.similar:.2f})"
        )
    )
    raced = "" if race is None else f"; raced over {len(race.looks)} look{'s' * (len(race.looks) > 1)}: {race.ended}"
    several = f" that reads {len(profile.multi.taps)} taps" if head == "multi" else ""
    done = {
        ("end", "kept"): f"everything is frozen and a new head{several} is trained",
        ("slice", "kept"): f"the layers behind {sliced} are cut off, the rest is frozen and a new head is trained",
        ("end", "nothing"): "a new head is trained and then the whole network is fine-tuned",
    }[case.keep, case.freeze]
    return f"{case.name}: {size}; {likeness}{raced}; {done}"


def _changes(profile: Profile, weighed: Weighed, case: Case, test: SliceTest, large: bool, race: Race | None) -> tuple[str, ...]:
    """Say what would change the decision: more images, another tolerance, another answer of the slice test."""
    rule, seen = weighed.rule, weighed.prediction
    if rule.rule == TEXTBOOK:
        other = rule.textbook_images - profile.images
        return (
            f"With {abs(other):,} {'more' if other > 0 else 'fewer'} images the textbook rule would call them {'large' if other > 0 else 'small'}.",
        )
    said = []
    if race is None:
        turn = turning_point(weighed)
        most = 10 ** weighed.model.highest.get("log10 images", 5.0)
        if not large and turn is not None:
            said.append(
                f"With about {_round(turn - profile.images):,} more images fine-tuning would win, if the learning curve goes on as it did."
            )
        elif not large and profile.images < most:
            said.append(f"Up to the {most:,.0f} images that the choice was fitted on, more of them alone would not make fine-tuning win.")
        elif large and turn is not None:
            said.append(f"With fewer than about {_round(turn):,} images a frozen head would do.")
    # The tolerance is what the user trades: it says directly what the other choice costs. `prefer: accuracy` makes nothing of it.
    lenience = LENIENCE[rule.prefer]
    how = "" if lenience else " and choose.prefer: balanced"
    if race is None and large and seen.gain > 0:
        lost = _price(weighed)
        said.append(
            f"With choose.tolerance above {lost * 100 / (lenience or 1):.1f} points{how} a frozen head would be chosen; it is expected to lose "
            f"{lost * 100:.1f} points."
        )
    elif race is None and not large and seen.gain > 0:
        said.append(f"With choose.tolerance below {seen.gain * 100 / (lenience or 1):.1f} points fine-tuning would be chosen.")
    if case.size == SMALL and weighed.head == "cut":
        said.append(
            f"Without the slice at {test.tap} the head would be expected at {profile.last.accuracy:.1%} instead of {weighed.evidence.cut:.1%}."
        )
    elif case.size == SMALL and test.tap is not None:
        said.append(
            f"Slicing {test.why_not(rule.alpha, rule.gain / 100)}."
            if not weighed.slices
            else f"Slicing at {test.tap} is beaten by the head on several taps."
        )
    return tuple(said)


def _price(weighed: Weighed) -> float:
    """Return the tolerance (as a share) above which a frozen head would be chosen: a larger one may take a simpler head, which loses more."""
    lost = weighed.prediction.gain
    for _ in range(3):  # there are three heads
        other = dataclasses.replace(weighed, rule=dataclasses.replace(weighed.rule, prefer="balanced", tolerance=100 * lost + 1e-6))
        if not other.large:
            break
        lost = other.prediction.gain
    return lost


def grown(weighed: Weighed, images: int) -> tuple[Evidence, float]:
    """Return the evidence with another number of images, and what the frozen head would reach with them by its learning curve.

    Errors of learning curves fall as a power of the images (Hestness et al. 2017, arXiv 1712.00409); the power is that of the last doubling
    of the sample.
    """
    seen = weighed.evidence
    error, before = max(1 - weighed.frozen, 0.5 / seen.sampled), max(1 - weighed.frozen + seen.slope, 0.5 / seen.sampled)
    power = max(math.log2(before / error), 0.0)
    there = min(error * (images / seen.images) ** -power, 1 - 1 / seen.classes)
    slope = min(there * 2**power, 1.0) - there
    return dataclasses.replace(seen, images=images, slope=slope), 1 - there


def turning_point(weighed: Weighed) -> int | None:
    """Return the number of images at which the prediction changes sides, the frozen head going on along its learning curve; None if nowhere."""
    model, large = weighed.model, weighed.large
    most = 10 ** (model.highest.get("log10 images", 5.0) + 0.3)
    images = float(weighed.evidence.images)
    while 20 <= images <= max(most, weighed.evidence.images):
        images = images / 1.05 if large else images * 1.05
        seen, frozen = grown(weighed, round(images))
        if (model.predict(seen, frozen, weighed.tolerance).gain > weighed.tolerance) != large:
            return round(images)
    return None


def _round(count: float) -> int:
    """Round to two digits: nothing more is known."""
    scale = 10 ** max(len(str(int(count))) - 2, 0)
    return int(max(round(count / scale), 1) * scale)


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e6:.2f} M"


def has_signal(seen: Evidence) -> bool:
    """Say whether anything read the labels better than the largest class does.

    Where nothing does the headroom is no promise: noise has as much of it. The cheapest case is taken then, unless a race shows better.
    """
    best = max(seen.last, seen.cut, seen.multi)
    error = math.sqrt(max(best * (1 - best), 1 / seen.sampled) / seen.sampled)
    return best - 2 * error > seen.majority or seen.tangent_gain > SIGNAL


def weak_labels(seen: Evidence | Profile) -> tuple[str, ...]:
    """Say why the labels are too few for the probes, if they are."""
    weak = []
    if seen.classes > seen.sampled / 2:
        weak.append(f"profile too weak: {seen.classes} classes in a sample of {seen.sampled} images")
    if seen.images / seen.classes < LEAST_PER_CLASS:
        weak.append(
            f"profile too weak: {seen.images / seen.classes:.1f} training images per class, fewer than {LEAST_PER_CLASS}; "
            "label more; where validation images are left to judge, small_similar and large_similar are raced"
        )
    return tuple(weak)


def weaknesses(profile: Profile) -> tuple[str, ...]:
    """Say what makes the profile weak evidence."""
    weak = list(weak_labels(profile))
    if profile.probed < profile.classes:
        weak.append(
            f"{profile.probed} of {profile.classes} classes are in the sample of {profile.sampled} images, so the probes read easier than all "
            "classes together; set profile.images_max higher"
        )
    if profile.cut is not None and not profile.held_out:
        weak.append("no validation images are left to confirm a slice, so nothing is cut off")
    if len(profile.taps) == 1:
        weak.append(f"{profile.backbone} has one tap only, so no slice could be looked for; say more in its class: taps = (...)")
    if profile.head_similarity is None:
        weak.append(f"{profile.backbone} comes without a source head, so the head similarity S is unknown and counts as 0")
    return tuple(weak)


def _doubts(weighed: Weighed) -> tuple[str, ...]:
    """Say that nothing was read, what makes the prediction weak, and that it could not be raced."""
    doubts, seen = [], weighed.evidence
    if not has_signal(seen):
        doubts.append(
            f"no signal: the best head ({max(seen.last, seen.cut, seen.multi):.1%}) is not clearly better than the majority class "
            f"({seen.majority:.1%}), so the cheapest case is taken unless a race shows better; check the labels"
        )
    if weighed.rule.rule == TEXTBOOK:
        return tuple(doubts)
    doubts += [f"out of range: {text}" for text in weighed.prediction.outside]
    if weighed.no_race and weighed.no_race == weighed.too_few_to_race:
        doubts.append(f"no race: {weighed.no_race}")
    return tuple(doubts)
