"""The gate: is the new model (challenger) better than the present one (champion)? A paired test on the same test images.

There are three outcomes. *Accepted*: the rule's claim is shown. *Rejected*: the challenger is shown to be worse. *Undecided*: the test images
show neither. A champion is wrong on images of a class that it cannot name, as it would be in production.

Where classes are so uneven that training gives them equal weight, the gate compares balanced accuracy. Predicting only the largest class
would have a high accuracy there, and must not win against a model that finds the other classes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipeline.evaluation import power, significance
from tlpipeline.evaluation.metrics import Predictions
from tlpipeline.evaluation.significance import Sample
from tlpipeline.evaluation.verdict import ACCEPTED, ACCURACY, BALANCED, MAJORITY, REJECTED, UNDECIDED, Forgotten, Verdict
from tlpipeline.params import AUTO, NONE, GateParams
from tlpipeline.stats import group_numbers

_LISTED = 5  # classes that a note names
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Pair:
    """Which images the two models classify correctly: everything that the gate compares.

    Attributes:
        challenger, champion: whether each is right (n,); labels: names of the true classes (n,); groups: numbers of the groups (n,).
        balanced: each class has equal weight.
        name: of the champion.
    """

    challenger: Bools
    champion: Bools
    labels: npt.NDArray[Any]
    groups: npt.NDArray[np.int64]
    balanced: bool
    name: str

    @property
    def sample(self) -> Sample:
        strata = np.unique(self.labels, return_inverse=True)[1] if self.balanced else np.zeros(len(self.labels), dtype=np.int64)
        return Sample(self.challenger.astype(float) - self.champion, strata, np.unique(self.groups, return_inverse=True)[1])

    def of(self, chosen: Bools) -> "_Pair":
        return replace(
            self,
            challenger=self.challenger[chosen],
            champion=self.champion[chosen],
            labels=self.labels[chosen],
            groups=self.groups[chosen],
        )

    def scores(self) -> tuple[float, float]:
        weights = self.sample.weights
        return (float(weights @ self.challenger), float(weights @ self.champion)) if len(weights) else (0.0, 0.0)

    def counts(self) -> tuple[int, int]:
        return int((self.challenger & ~self.champion).sum()), int((~self.challenger & self.champion).sum())


def compare_with_majority(
    challenger: Predictions, majority: str, rule: GateParams, uneven: bool = False, groups: Sequence[str] = ()
) -> Verdict:
    """Compare the first model with always predicting the largest training class; it must be significantly better.

    Args:
        challenger: on the test split.
        majority: the largest training class.
        rule: settings of the gate.
        uneven: training weighted the classes equally; with `metric: auto`, the gate then uses balanced accuracy.
        groups: of each image, "" where it has none; images of one group are not independent. Empty: none has.
    """
    labels = np.array(challenger.classes)[challenger.labels]
    pair = _Pair(
        challenger.correct, labels == majority, labels, group_numbers(groups or [""] * len(labels)), _is_balanced(rule, uneven), MAJORITY
    )
    return _judge(pair, rule, null=0.0, claim=f"better than {MAJORITY}")


def compare_with_champion(
    challenger: Predictions,
    champion: Predictions,
    name: str,
    trained_on: frozenset[str],
    rule: GateParams,
    uneven: bool = False,
    groups: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    gone: Collection[str] = (),
) -> Verdict:
    """Compare a challenger with the champion on the same test images.

    Images that the champion was trained on are left out. On images of a class that it cannot name, it is wrong.

    Args:
        challenger, champion: on the same images in the same order.
        name: of the champion.
        trained_on: md5s of the champion's training and validation images.
        rule: settings of the gate.
        uneven, groups: as in `compare_with_majority`.
        rename: names of the champion's classes to today's names.
        gone: classes that production may lose, because somebody said so.

    Raises:
        AssertionError: the images differ.
    """
    assert challenger.md5 == champion.md5, "both must predict the same images"
    renamed = [(rename or {}).get(label, label) for label in champion.classes]
    labels = np.array(challenger.classes)[challenger.labels]
    everything = _Pair(
        challenger.correct, _is_right(champion, labels, rename), labels, group_numbers(groups or [""] * len(labels)),
        _is_balanced(rule, uneven), name,
    )  # fmt: skip
    was_trained_on = np.array([md5 in trained_on for md5 in challenger.md5], dtype=bool)
    null, claim = rule.min_gain / 100, f"better than {name}" + f" by more than {rule.min_gain:g} points" * (rule.min_gain > 0)
    if rule.rule == "not_worse":
        null, claim = -rule.margin / 100, f"not worse than {name} by {rule.margin:g} points"
    new, lost = set(challenger.classes) - set(renamed), set(renamed) - set(challenger.classes) - set(gone)
    return _judge(
        everything.of(~was_trained_on), rule, null, claim, tuple(sorted(new)), tuple(sorted(lost)), left_out=int(was_trained_on.sum())
    )


def with_new_images(
    verdict: Verdict, challenger: Predictions, champion: Predictions, new: frozenset[str], rename: Mapping[str, str] | None = None
) -> Verdict:
    """Return the verdict with a note on how both do on test images that were not there when the champion was made.

    Args:
        challenger, champion: on the same images in the same order.
        new: md5s of those images.
        rename: as in `compare_with_champion`.
    """
    fresh = np.array([md5 in new for md5 in challenger.md5], dtype=bool)
    if not (count := int(fresh.sum())):
        return verdict
    right = _is_right(champion, np.array(challenger.classes)[challenger.labels], rename)
    theirs, ours = float(right[fresh].mean()), float(challenger.correct[fresh].mean())
    note = f"On the {count:,} test images that are new since {verdict.champion}, it is right about {theirs:.1%}, the new model about {ours:.1%}."
    if not fresh.all():
        note += f" On the others, it is right about {float(right[~fresh].mean()):.1%}."
    return replace(verdict, notes=(*verdict.notes, note))


def with_forgotten(
    verdict: Verdict, challenger: Predictions, champion: Predictions, trained_on: frozenset[str], rename: Mapping[str, str] | None = None
) -> Verdict:
    """Return the verdict with the classes that a challenger recognizes less often than the champion does, and a note about them.

    Args:
        challenger, champion: on the same images in the same order.
        trained_on, rename: as in `compare_with_champion`.
    """
    labels = np.array(challenger.classes)[challenger.labels]
    before, compared = _is_right(champion, labels, rename), np.array([md5 not in trained_on for md5 in challenger.md5], dtype=bool)
    recalls = []
    for label in np.unique(labels[compared]):
        mine = compared & (labels == label)
        recalls.append(Forgotten(str(label), int(mine.sum()), float(before[mine].mean()), float(challenger.correct[mine].mean())))
    fallen = sorted((each for each in recalls if each.now < each.before), key=lambda each: (each.now - each.before, each.label))
    listed = [f"{each.label} by {100 * (each.before - each.now):.1f} points ({each.images} images)" for each in fallen[:_LISTED]]
    if len(fallen) > _LISTED:
        listed.append(f"{len(fallen) - _LISTED} more")
    what = f"the recall of {len(fallen)} of {len(recalls)} classes fell: {', '.join(listed)}" if fallen else "the recall of no class fell"
    note = f"Training started from the model in production. Against {verdict.champion}, {what}."
    return replace(verdict, forgotten=tuple(fallen), notes=(*verdict.notes, note))


def _is_right(champion: Predictions, labels: npt.NDArray[Any], rename: Mapping[str, str] | None) -> Bools:
    """Return whether a champion names each image as it is called today (n,)."""
    today = np.array([(rename or {}).get(label, label) for label in champion.classes])
    return np.asarray(today[champion.predicted] == labels)


def _is_balanced(rule: GateParams, uneven: bool) -> bool:
    return uneven if rule.metric == AUTO else rule.metric == BALANCED


def _judge(
    pair: _Pair, rule: GateParams, null: float, claim: str, new: tuple[str, ...] = (), lost: tuple[str, ...] = (), left_out: int = 0
) -> Verdict:
    """Return the verdict about the claim that the challenger gains more than `null`."""
    sample, (wins, losses), (score, champion_score) = pair.sample, pair.counts(), pair.scores()
    p_claim, test = significance.p_value(sample, null)
    # What gains significantly less than `min_gain` is as decided as what is worse.
    p_worse, _ = significance.p_value(sample.reversed(), -max(null, 0.0))
    doubts, objections = _doubts(pair, rule, new, lost)
    shown = p_claim < rule.alpha
    worse = not shown and p_worse < rule.alpha
    outcome = REJECTED if worse or objections else ACCEPTED if shown and not doubts else UNDECIDED
    low, high = (round(100 * bound, 2) for bound in significance.interval(sample))
    result = f"significantly {claim}" if shown else f"not significantly {claim}"
    if not shown:
        short = f"worse than {pair.name}" if null <= 0 else f"short of {100 * null:g} points"
        result += f", but significantly {short}" if worse else " and not significantly worse"
    reason = (
        f"{outcome}: {'balanced accuracy ' if pair.balanced else ''}{score:.1%} against {champion_score:.1%} of {pair.name} on the same "
        f"{sample.images} test images ({wins} won, {losses} lost, difference {low:+.1f} to {high:+.1f} points), {result} "
        f"({_format_p(p_worse if worse else p_claim)}, {test}, alpha {rule.alpha:g})"
    )
    if not sample.images:
        reason = f"{outcome}: no test image can be compared with {pair.name}"
    reason = f"{'; '.join([reason, *objections, *doubts])}."
    # How the next model will differ from the first one is not known from how that differs from a constant answer.
    discordance = power.assumed_discordance([] if pair.name == MAJORITY else [sample])
    sensitivity, chance, needed = power.sensitivity(sample, ~pair.champion, rule.alpha, null, discordance)
    notes = [sensitivity, *_notes(pair, new, left_out)]
    return Verdict(
        outcome, pair.name, sample.images, len(np.unique(sample.groups)), left_out, BALANCED if pair.balanced else ACCURACY, score,
        champion_score, wins, losses, p_claim, low, high, new, lost, chance, needed, reason, tuple(filter(None, notes)),
    )  # fmt: skip


def _doubts(pair: _Pair, rule: GateParams, new: tuple[str, ...], lost: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return what leaves the verdict undecided, and what rejects the challenger, whatever the metric says."""
    doubts, objections = [], []
    if lost:
        doubts.append(
            f"production would lose {', '.join(lost)}, which {pair.name} knows and this model does not (data.drop in params.yaml allows it, data.rename if it is another class now)"
        )
    old = pair.of(~np.isin(pair.labels, new))
    if new and (p_worse := significance.p_value(old.sample.reversed(), rule.margin / 100)[0]) < rule.alpha:
        score, champion_score = old.scores()
        objections.append(
            f"significantly worse by more than {rule.margin:g} points (gate.margin) on the classes that {pair.name} knows: "
            f"{score:.1%} against {champion_score:.1%} ({_format_p(p_worse)})"
        )
    if rule.class_floor != NONE:
        labels = np.unique(old.labels)
        for label in labels:
            part = old.of(old.labels == label)
            fall = -100 * part.sample.difference
            if fall > float(rule.class_floor):
                (wins, losses), (p_fall, _) = part.counts(), significance.p_value(part.sample.reversed())
                text = f"the recall of {label} fell by {fall:.1f} points ({wins} won, {losses} lost of {len(part.labels)} images; gate.class_floor {rule.class_floor:g}"
                # Bonferroni: each class is a further chance to reject a model that is no worse.
                (objections if p_fall < rule.alpha / len(labels) else doubts).append(f"{text}, {_format_p(p_fall)})")
    return doubts, objections


def _notes(pair: _Pair, new: tuple[str, ...], left_out: int) -> list[str]:
    """Return sentences about the images that were compared."""
    notes = []
    if new:
        old = ~np.isin(pair.labels, new)
        (wins, _), (score, champion_score) = pair.of(~old).counts(), pair.of(old).scores()
        notes.append(
            f"New since {pair.name}: {', '.join(new)}; it cannot name them and is wrong there, this model is right on {wins} of {int((~old).sum())} "
            f"test images. On the classes that both know: {score:.1%} against {champion_score:.1%} on {int(old.sum())} images."
        )
    if left_out:
        notes.append(f"{left_out} images that {pair.name} was trained on are left out.")
    return notes


def _format_p(p_value: float) -> str:
    return f"p = {p_value:.2g}" if p_value >= 1e-12 else "p < 1e-12"
