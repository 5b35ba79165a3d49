"""The decision in sentences, made from its numbers and those of the profile: why this case, what would change it, and which evidence is weak."""

from tlpipeline.alarms import BLOCK, WARN, Alarm
from tlpipeline.choice.decision import CutGain, Decision, OutOfRange, TuningGain
from tlpipeline.profiling.profile import Profile
from tlpipeline.training.recipe import BUDGET

ENDED = {
    "ahead": "fine-tuning is clearly ahead",
    "futile": "fine-tuning will hardly gain more than the tolerance",
    "expected": "the comparison stayed open to the end, so the expected gain decided",
    "budget": f"{BUDGET} ended it before it was decided, so the cheaper way is taken",
}
NO_RACE = {
    "forced": "The case is set by choose.case.",
    "quick": "choose.effort is quick.",
    "clear": "The prediction is clear enough: knowing the gain beforehand would be worth {evpi:.1f} points, with a tolerance of {tolerance:g}.",
    "few_judges": "{validation} validation images are left to compare on, and it takes {judges_needed}.",
    "other_weights": "train.override.init starts from weights that the prediction does not know.",
}
RANDOM = "random"  # fingerprint of weights that were not loaded
UNKNOWING = "The network has random weights: it knows no images that these could be similar to, so the name of the case says only how it is trained."
WEAK = {
    "many_classes": "The profile is weak: {classes} classes in a sample of {sampled} images.",
    "few_per_class": "The profile is weak: {per_class:.1f} training images for each class, fewer than 5. Label more images.",
    "unprobed_classes": "The sample of {sampled} images holds {probed} of {classes} classes, which makes the probes look better. Set "
    "profile.images_max higher.",
    "no_held_out": "No validation images are left to confirm a cut, so nothing is cut off.",
    "one_tap": "{backbone} has one tap, so no cut could be tested. Name more in its class: taps = (...).",
    "no_source_head": "{backbone} comes without its source head, so the head similarity S is unknown and counts as 0.",
    "no_signal": "No signal: the best head ({best:.1%}) is not clearly better than the largest class alone ({majority:.1%}). The cheapest case is "
    "taken unless training both ways shows better. Check the labels.",
    "few_judges": "The choice is open, but fine-tuning was not tried: {validation} validation images are left to compare on, and it takes "
    "{judges_needed}.",
    "slice_unused": "choose.slice is not used, because {case} cuts nothing off.",
}


def summary(decision: Decision, profile: Profile) -> str:
    """Return why this case: what fine-tuning and what cutting are expected to gain, and what follows from it."""
    tuning, so_tuned = tuning_sentence(decision, profile)
    cutting, so_cut = cutting_sentence(decision, profile)
    unknowing = f" {UNKNOWING}" if profile.weights == RANDOM else ""
    if decision.forced:
        return f"{decision.case} is set by {' and '.join(decision.forced)}. {tuning}. {cutting}.{unknowing}"
    return f"{tuning}, so {so_tuned}. {cutting}, so {so_cut}.{unknowing}"


def former_sentence(decision: Decision, profile: Profile) -> str:
    """Return whether the case changed since the model in production, with the numbers; "" if there is no such model."""
    before = decision.former
    if before is None:
        return ""
    tuning, cutting = (f"{100 * gain:+.1f}" for gain in (decision.tuning.counted, decision.cutting.counted))
    figures = (
        f"fine-tuning counts {tuning} points (before {100 * before.tuning:+.1f}, border {100 * decision.tuning.border:g}), cutting {cutting} "
        f"(before {100 * before.cutting:+.1f}, border {100 * decision.cutting.border:g}), on {profile.images:,} training images (before {before.images:,})"
    )
    if before.case != decision.case:
        return f"The case changed since {before.version}, from {before.case} to {decision.case}: {figures}."
    if before.slice != decision.slice:
        return f"The cut moved since {before.version}, from {before.slice} to {decision.slice}: {figures}."
    if decision.instead is not None:
        other, tap = decision.instead
        where = f" cut after {tap}" if tap != profile.taps[-1].name else ""
        return f"The case of {before.version} is kept. These images alone would give {other}{where}, but not by more than their noise: {figures}."
    return f"The case is that of {before.version}: {figures}."


def tuning_sentence(decision: Decision, profile: Profile) -> tuple[str, str]:
    """Return how fine-tuning's expected gain compares with the tolerance, and what follows, both without a full stop."""
    tuning, border = decision.tuning, f"the tolerance of {100 * decision.tuning.border:g}"
    follows = "the whole network is trained" if tuning.exceeds else "the network stays frozen"
    predicted = f"{points(tuning.gain)} ({span(tuning.low, tuning.high)})"
    if tuning.why == "race" and decision.race is not None:
        race, looks = decision.race, decision.race.looks
        measured = f": {100 * (looks[-1].tuned - looks[-1].frozen):+.1f} points on {looks[-1].images} validation images" if looks else ""
        return f"Fine-tuning and the frozen head were both trained{measured}; {ENDED[race.ended]}", follows
    if tuning.why == "no_signal":
        return "No head recognizes the labels better than chance, so a predicted gain of fine-tuning does not count", follows
    if tuning.why == "former":
        return f"Fine-tuning is expected to gain {predicted}, so close to {border} that the decision stays as it was", follows
    if tuning.gain <= 0 and not tuning.exceeds:
        return f"Fine-tuning is expected to gain nothing ({span(tuning.low, tuning.high)} points)", follows
    return f"Fine-tuning is expected to gain {predicted}, {_beside(tuning)} {border}", follows


def cutting_sentence(decision: Decision, profile: Profile) -> tuple[str, str]:
    """Return what cutting is expected to gain, and what follows, both without a full stop."""
    cutting, last = decision.cutting, profile.taps[-1].name
    if cutting.exceeds:
        unlike = "early layers do better" if profile.weights == RANDOM else "the data are unlike the source"
        follows = (
            f"{unlike} and the recipe is the stronger one" if decision.tuning.exceeds else f"the layers after {cutting.tap} are cut off"
        )
    elif decision.tuning.exceeds:
        alike = "no cut is needed" if profile.weights == RANDOM else "the data are like the source"
        follows = f"{alike} and the recipe is the gentle one"
    else:
        follows = "all layers stay"
    if cutting.why == "one_tap":
        return "The network has one tap, where nothing can be cut off", follows
    if cutting.why == "weak_labels":
        return "There are too few labels to say what a cut would gain", follows
    beats = f"The best earlier layer, {cutting.earlier}, predicts the labels {points(abs(cutting.gain))} {'worse' if cutting.gain < 0 else 'better'}"
    beats += f" than the last, {last}"
    border = f"the {100 * cutting.border:g} point{'s' * (cutting.border != 0.01)} required"
    why = {
        "confirmed": f"Cutting after {cutting.tap} gains {points(cutting.gain)} against the last layer, {last}, {_beside(cutting)} {border}",
        "corrected": f"{beats} ({100 * cutting.corrected:.1f} corrected for taking the best of {len(profile.taps) - 1}), {_beside(cutting)} {border}",
        "not_significant": beats + ("" if cutting.gain <= 0 else f", which may be chance (p = {cutting.significance:.2f})"),
        "below_border": f"{beats}, {_beside(cutting)} {border}",
        "not_confirmed": f"{beats}, but other images do not confirm it",
        "former": f"{beats}, so close to what decides that the decision stays as it was",
        "several_taps": f"{beats}, but a head on {' + '.join(profile.multi.taps)} makes up for it without a cut",
    }
    return why[cutting.why], follows


def _beside(axis: TuningGain | CutGain) -> str:
    """Say on which side of its border a gain lies; where both look the same in print, without a contradiction."""
    same = f"{100 * axis.counted:.1f}" == f"{100 * axis.border:.1f}"
    return ("just above" if same else "more than") if axis.exceeds else ("not above" if same else "less than")


def race_sentence(decision: Decision, profile: Profile) -> str:
    """Return who won when both ways were trained, or why they were not."""
    race = decision.race
    if race is None:
        if decision.race_wanted:
            return "Not yet: the choice is open, and `tlpipeline run` or `dvc repro choose` trains both ways."
        figures = {"evpi": 100 * decision.evpi, "tolerance": 100 * decision.tuning.border}
        words = NO_RACE[decision.no_race].format(**figures, validation=profile.validation, judges_needed=decision.judges_needed)
        return f"No. {words}"
    whole = next(arm.cost for arm in decision.arms if arm.name == "tuned")
    winner = "Fine-tuning" if race.winner == "tuned" else "The frozen head"
    return (
        f"Yes. {winner} won: {ENDED[race.ended]}. It cost {race.cost:,.0f} forward passes of one image, {race.cost / whole:.0%} of a fine-tuning "
        "run. Training continues from the winner's checkpoint."
    )


def changes(decision: Decision, profile: Profile) -> tuple[str, ...]:
    """Return what would change the decision: more images, another tolerance, or no cut."""
    said, turning, large = [], decision.turning, decision.tuning.exceeds
    if turning is not None and not decision.forced:
        more = turning.images
        if more is not None and large:
            said.append(f"With fewer than about {_rounded(more):,} training images a frozen head would do.")
        elif more is not None:
            said.append(
                f"With about {_rounded(more - profile.images):,} more images fine-tuning would pay, if the learning curve continues as it is."
            )
        elif not large and profile.images < turning.fitted:
            said.append(
                f"More images alone would not make fine-tuning pay, up to the {turning.fitted:,} that the prediction was fitted on."
            )
        if turning.tolerance is not None and large:
            lost = 100 * turning.tolerance
            said.append(f"With choose.tolerance above {lost:.1f} a frozen head would be chosen; it is expected to lose {lost:.1f} points.")
        elif turning.tolerance is not None and decision.tuning.why == "prediction":
            at = 100 * turning.tolerance
            said.append(f"With choose.tolerance below {at:{'.1f' if at >= 0.1 else '.1g'}} the whole network would be fine-tuned.")
    if decision.head == "cut" and profile.cut is not None and profile.cut.taps[0] == decision.slice:
        said.append(
            f"Without the cut a frozen head is expected to reach {profile.last.accuracy:.1%} instead of {profile.cut.accuracy:.1%}."
        )
    return tuple(said)


def warnings(decision: Decision, profile: Profile) -> tuple[str, ...]:
    """Return what makes the evidence weak, a sentence each."""
    figures = {
        "backbone": profile.backbone, "classes": profile.classes, "sampled": profile.sampled, "per_class": profile.images / profile.classes,
        "probed": profile.probed, "best": max(head.accuracy for head in profile.heads), "majority": profile.majority,
        "validation": profile.validation, "judges_needed": decision.judges_needed, "case": decision.case,
    }  # fmt: skip
    return (*(WEAK[code].format(**figures) for code in decision.weak), *(_out_of_range(figure) for figure in decision.outside))


def alarms(decision: Decision, profile: Profile) -> tuple[Alarm, ...]:
    """Return the warnings as alarms. That no head recognizes the labels blocks a promotion, unless fine-tuning did in a race."""
    recognized = decision.race is not None and decision.race.ended == "ahead"
    raised = []
    for words in warnings(decision, profile):
        kind, colon, text = words.partition(": ")
        if colon and kind == "No signal":
            raised.append(Alarm("no signal", WARN if recognized else BLOCK, text))
        else:
            raised.append(Alarm("decision", WARN, words))
    return tuple(raised)


def _out_of_range(figure: OutOfRange) -> str:
    if figure.value is None:
        return "Out of range: the prediction was fitted on networks with a source head, and this one has none."
    digits = ".2f" if figure.name == "head similarity" else ",.0f"
    here, low, high = (f"{value:{digits}}" for value in (figure.value, figure.low, figure.high))
    return f"Out of range: {figure.name} {here}; the prediction was fitted on {low} to {high}."


def points(share: float) -> str:
    """Return a share as percentage points."""
    return f"{100 * share:.1f} points"


def span(low: float, high: float) -> str:
    """Return an interval of shares in points."""
    sign = "+" if low < 0 else ""
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _rounded(count: float) -> int:
    """Round to two digits: nothing more is known."""
    scale = 10 ** max(len(str(int(count))) - 2, 0)
    return int(max(round(count / scale), 1) * scale)
