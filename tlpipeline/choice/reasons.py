"""The decision in words: the reason with its numbers, what would change it, and what makes the evidence weak."""

import dataclasses

from tlpipeline.choice.cases import SMALL, Case
from tlpipeline.choice.decision import Race
from tlpipeline.choice.policy import DecisionPolicy, has_signal, turning_point, weak_labels
from tlpipeline.profiling.profile import Profile, SliceTest


def reason(
    profile: Profile, weighed: DecisionPolicy, large: bool, case: Case, test: SliceTest, head: str, sliced: str | None, race: Race | None
) -> str:
    """Return the decision in one sentence with its numbers, without its full stop.

    Args:
        large: what the evidence says; a forced case may be one for data of the other size.
    """
    seen = weighed.prediction
    frozen = profile.head(weighed.head)
    chance = weighed.large_after(race)
    size = (
        f"a head on frozen features reaches {frozen.accuracy:.1%} ({' + '.join(frozen.taps)}), fine-tuning is expected to win "
        f"{seen.gain * 100:+.1f} points ({seen.low * 100:+.1f} to {seen.high * 100:+.1f}), "
        f"{'' if has_signal(weighed.evidence) else 'as it would be for noise, '}so {profile.images} images of {profile.classes} "
        f"classes are {'large' if large else 'small'} for a network of {_count(profile.parameters)} parameters "
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
    raced = "" if race is None else f"; raced over {len(race.looks)} look{'s' * (len(race.looks) != 1)}: {race.ended}"
    several = f" that reads {len(profile.multi.taps)} taps" if head == "multi" else ""
    done = {
        ("end", "kept"): f"everything is frozen and a new head{several} is trained",
        ("slice", "kept"): f"the layers behind {sliced} are cut off, the rest is frozen and a new head is trained",
        ("end", "nothing"): "a new head is trained and then the whole network is fine-tuned",
    }[case.keep, case.freeze]
    return f"{case.name}: {size}; {likeness}{raced}; {done}"


def changes(profile: Profile, weighed: DecisionPolicy, case: Case, test: SliceTest, large: bool, race: Race | None) -> tuple[str, ...]:
    """Say what would change the decision: more images, another tolerance, another answer of the slice test."""
    rule, seen = weighed.rule, weighed.prediction
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
    # The tolerance is what the user trades: it says directly what the other choice costs.
    if race is None and large and seen.gain > 0:
        lost = _price(weighed)
        said.append(
            f"With choose.tolerance above {lost * 100:.1f} points a frozen head would be chosen; it is expected to lose "
            f"{lost * 100:.1f} points."
        )
    elif race is None and not large and seen.gain > 0:
        turn_at = seen.gain * 100
        said.append(f"With choose.tolerance below {turn_at:{'.1f' if turn_at >= 0.1 else '.1g'}} points fine-tuning would be chosen.")
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
    elif case.size != SMALL and not weighed.slices and weighed.evidence.cut > weighed.frozen and not weak_labels(profile):
        # Its probe is the best of several on the same images, and in the table it may reach what fine-tuning is expected to.
        said.append(f"The cut does not count: slicing {test.why_not(rule.alpha, rule.gain / 100)}.")
    return tuple(said)


def _price(weighed: DecisionPolicy) -> float:
    """Return the tolerance (as a share) above which a frozen head would be chosen: a larger one may take a simpler head, which loses more."""
    lost = weighed.prediction.gain
    for _ in range(3):  # there are three heads
        other = dataclasses.replace(weighed, rule=dataclasses.replace(weighed.rule, tolerance=100 * lost + 1e-6))
        if not other.large:
            break
        lost = other.prediction.gain
    return lost


def _round(count: float) -> int:
    """Round to two digits: nothing more is known."""
    scale = 10 ** max(len(str(int(count))) - 2, 0)
    return int(max(round(count / scale), 1) * scale)


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e6:.2f} M"


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


def doubts(weighed: DecisionPolicy) -> tuple[str, ...]:
    """Say that nothing was read, what makes the prediction weak, and that it could not be raced."""
    doubts, seen = [], weighed.evidence
    if not has_signal(seen):
        doubts.append(
            f"no signal: the best head ({max(seen.last, seen.cut, seen.multi):.1%}) is not clearly better than the majority class "
            f"({seen.majority:.1%}), so the cheapest case is taken unless a race shows better; check the labels"
        )
    doubts += [f"out of range: {text}" for text in weighed.prediction.outside]
    if weighed.no_race and weighed.no_race == weighed.too_few_to_race:
        doubts.append(f"no race: {weighed.no_race}")
    return tuple(doubts)
