"""The evidence on the scales: what the figures of a profile say of fine-tuning under the user's rule, before and during a race."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tlpipeline.choice import predictor
from tlpipeline.choice.cases import CASES, DIFFERENT, LARGE, SIMILAR, SMALL, Case
from tlpipeline.choice.decision import Look, Turning
from tlpipeline.choice.predictor import Evidence, GainPredictor, Prediction
from tlpipeline.params import AUTO, ChooseParams
from tlpipeline.profiling.probes import Matrix
from tlpipeline.profiling.profile import Profile, slice_test
from tlpipeline.stats import Bits

TEXTBOOK_IMAGES, TEXTBOOK_SIMILARITY = 1000, 0.5
LOOKS = 3
ALPHA_SPENDING = (1 / 6, 1 / 3, 1 / 2)  # shares of choose.alpha that the interim analyses of a race may spend
LEAST_PER_CLASS = 5
LEAST_JUDGES, WEAK_JUDGES = 2, 20  # of a race that is asked for, and of one because labels are few
FEW_JUDGES = "few_judges"
SIGNAL = 0.3  # log odds by which the tangent probe must beat heads that read nothing to count as something read


@dataclass(frozen=True)
class DecisionPolicy:
    """The evidence as the rule sees it, before it is known whether fine-tuning is worth it."""

    evidence: Evidence
    rule: ChooseParams
    model: GainPredictor

    @property
    def tolerance(self) -> float:
        """What the cheaper way may lose, as a share."""
        return self.rule.tolerance / 100

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
        return self.prediction.gain > self.tolerance and has_signal(self.evidence)

    @property
    def different(self) -> bool:
        """Whether an earlier tap is better than the last by `gain` points, corrected for taking the best of several."""
        return self.evidence.similar < 0.5 and not weak_labels(self.evidence)

    def settled(self, tuned: bool) -> float:
        """Return P(this choice, without a race, is not worse than the best of all arms by more than the tolerance): the prediction's, calibrated.

        Where nothing was read, at most what the prediction gives it.
        """
        own = float(((-self.gains if tuned else self.gains) <= self.tolerance).mean())
        return self.model.settled(own) if has_signal(self.evidence) else min(self.model.settled(own), own)

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

    def evpi(self, gains: Matrix) -> float:
        """Return the expected value of perfect information about fine-tuning's gain, as a share: the expected loss of the better choice.

        A choice loses what the gain lies on its wrong side of the tolerance, which is the price at which fine-tuning is worth having.
        """
        beyond = gains - self.tolerance
        return float(min(beyond.clip(min=0).mean(), (-beyond).clip(min=0).mean()))

    @property
    def open(self) -> bool:
        """Whether the prediction leaves the choice between frozen and fine-tuned open, or `choose.effort` wants to see it anyway.

        Open: not knowing costs more than the tolerance, and fine-tuning does not gain more than that almost surely, or the data are unlike
        those of the fit; or nothing was read, or the labels are too few to read anything.
        """
        seen = self.prediction
        between = self.evpi(self.gains) > self.tolerance and 1 - seen.within < self.rule.race_below
        unlike = bool(seen.outside) and self.evpi(self.model.gains(self.evidence, self.frozen, size=True)) > self.tolerance
        weak = bool(weak_labels(self.evidence)) or not has_signal(self.evidence)
        return self.rule.effort == "full" or between or unlike or weak

    @property
    def no_race(self) -> str:
        """Why the two are not trained and compared: forced, quick, clear or few_judges; "" where they are to be."""
        if self.rule.case != AUTO:
            return "forced"
        if self.rule.effort == "quick":
            return "quick"
        if not self.open:
            return "clear"
        return FEW_JUDGES if self.evidence.validation < self.judges_needed else ""

    @property
    def judges_needed(self) -> int:
        """How many validation images that select nothing it takes to judge a race."""
        # Who asks for a race gets one, and where the probes are too weak to decide fewer judges than else tell more.
        if self.rule.effort == "full":
            return LEAST_JUDGES
        return min(WEAK_JUDGES, self.rule.race_images) if weak_labels(self.evidence) else self.rule.race_images


def weigh(profile: Profile, rule: ChooseParams, model: GainPredictor | None = None) -> DecisionPolicy:
    """Return the evidence of a profile as the rule sees it, with the fitted model that comes with the package or another."""
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    return DecisionPolicy(predictor.evidence(profile, test), rule, model or predictor.load_predictor())


def has_signal(seen: Evidence) -> bool:
    """Say whether anything read the labels better than the largest class does.

    Where nothing does the headroom is no promise: noise has as much of it. The cheapest case is taken then, unless a race shows better.
    """
    best = max(seen.last, seen.cut, seen.multi)
    error = math.sqrt(max(best * (1 - best), 1 / seen.sampled) / seen.sampled)
    return best - 2 * error > seen.majority or seen.tangent_gain > SIGNAL


def weak_labels(seen: Evidence | Profile) -> tuple[str, ...]:
    """Return why the labels are too few for the probes, if they are: many_classes, few_per_class."""
    weak = {"many_classes": seen.classes > seen.sampled / 2, "few_per_class": seen.images / seen.classes < LEAST_PER_CLASS}
    return tuple(code for code, true in weak.items() if true)


def textbook(seen: Evidence | Profile) -> Case:
    """Return the case by the textbook's two fixed bounds: a baseline for research, which nothing in the pipeline asks.

    Large: at least 1,000 training images. Similar: the source's classes explain at least half of the labels' entropy.
    """
    size = LARGE if seen.images >= TEXTBOOK_IMAGES else SMALL
    likeness = SIMILAR if (seen.head_similarity or 0.0) >= TEXTBOOK_SIMILARITY else DIFFERENT
    return next(case for case in CASES if (case.size, case.likeness) == (size, likeness))


# --- with more images ----------------------------------------------------------------------------------------------------------------------


def extrapolate(weighed: DecisionPolicy, images: int) -> tuple[Evidence, float]:
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


def turning_point(weighed: DecisionPolicy) -> int | None:
    """Return the number of images at which the prediction changes sides, the frozen head going on along its learning curve; None if nowhere."""
    model, large = weighed.model, weighed.large
    most = 10 ** (model.highest.get("log10 images", 5.0) + 0.3)
    images = float(weighed.evidence.images)
    while 20 <= images <= max(most, weighed.evidence.images):
        images = images / 1.05 if large else images * 1.05
        seen, frozen = extrapolate(weighed, round(images))
        if (model.predict(seen, frozen, weighed.tolerance).gain > weighed.tolerance) != large:
            return round(images)
    return None


def turning(weighed: DecisionPolicy, large: bool) -> Turning:
    """Return the number of images and the tolerance at which the decision changes sides.

    Without a race alone: after one, the prediction does not say what more images would do.
    """
    gain = weighed.prediction.gain
    tolerance = None if gain <= 0 else frozen_from(weighed) if large else gain
    return Turning(turning_point(weighed), round(10 ** weighed.model.highest.get("log10 images", 5.0)), tolerance)


def frozen_from(weighed: DecisionPolicy) -> float:
    """Return the tolerance (as a share) above which a frozen head would be chosen: a larger one may take a simpler head, which loses more."""
    lost = weighed.prediction.gain
    for _ in range(3):  # there are three heads
        other = dataclasses.replace(weighed, rule=dataclasses.replace(weighed.rule, tolerance=min(100 * lost + 1e-6, 100.0)))
        if not other.large:
            break
        lost = other.prediction.gain
    return lost


# --- the race's arithmetic --------------------------------------------------------------------------------------------------------------


def interim_analysis(weighed: DecisionPolicy, part: int, epoch: int, epochs: int, frozen: Bits, tuned: Bits) -> Look:
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


def interim_epochs(epochs: int) -> list[int]:
    """Return the epochs of the planned looks: a third, two thirds, the end of the schedule; fewer where it is shorter than three epochs."""
    return sorted({max(round(epochs * part / LOOKS), 1) for part in range(1, LOOKS + 1)})


def stopping_rule(weighed: DecisionPolicy, part: int, last: Look) -> tuple[str, str]:
    """Return (winner, why) after an interim analysis, ("", "") while the race goes on (see `decision.Race`).

    At the end an undecided race goes to the cheaper arm, unless the expected gain of fine-tuning exceeds the tolerance.
    """
    spent = weighed.rule.alpha * ALPHA_SPENDING[part]
    if last.chance >= 1 - spent:
        return "tuned", "ahead"
    if last.chance <= spent:
        return "frozen", "futile"
    if part < LOOKS - 1:
        return "", ""
    expected = float(weighed.posterior(part, last.tuned - last.frozen, last.error) @ weighed.gains)
    return "tuned" if expected > weighed.tolerance else "frozen", "expected"
