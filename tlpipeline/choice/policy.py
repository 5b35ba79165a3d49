"""The decision policy: what the figures of a profile say of fine-tuning under the user's settings, before and during a race."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tlpipeline.choice import predictor
from tlpipeline.choice.cases import CASES, DIFFERENT, LARGE, SIMILAR, SMALL, Case
from tlpipeline.choice.decision import Former, InterimResult, Turning
from tlpipeline.choice.predictor import Evidence, GainPredictor, Prediction
from tlpipeline.params import AUTO, ChooseParams
from tlpipeline.profiling.probes import Matrix
from tlpipeline.profiling.profile import Profile, slice_test
from tlpipeline.stats import Bits, design_effect, group_numbers, unpack

TEXTBOOK_IMAGES, TEXTBOOK_SIMILARITY = 1000, 0.5
LOOKS = 3
ALPHA_SPENDING = (1 / 6, 1 / 3, 1 / 2)  # shares of choose.alpha that the interim analyses of a race may spend
LEAST_PER_CLASS = 5
LEAST_JUDGES, WEAK_JUDGES = 2, 20  # of a race that is asked for, and of one because labels are few
FEW_JUDGES = "few_judges"
_LIKELY = 0.975  # P(similar) that two standard errors stand for
NOISE = 2.0  # standard errors by which the evidence must exceed what keeps the former decision
SIGNAL = 0.3  # log odds by which the tangent probe must beat heads that read nothing to count as something read


@dataclass(frozen=True)
class DecisionPolicy:
    """The evidence, the user's settings, the fitted predictor and the former decision: all that decides before a race.

    A former decision is kept unless the evidence for another exceeds it by more than its noise, NOISE standard errors (hysteresis). Without
    that, versions that differ by a few images flip between cases that are equally good.
    """

    evidence: Evidence
    rule: ChooseParams
    model: GainPredictor
    former: Former | None = None

    @cached_property
    def alone(self) -> "DecisionPolicy":
        """The same without the former decision."""
        return dataclasses.replace(self, former=None)

    @property
    def tolerance(self) -> float:
        """What the cheaper way may lose, as a share."""
        return self.rule.tolerance / 100

    @property
    def slices(self) -> bool:
        """Whether an earlier tap is significantly better (family-wise), by `gain` points, and its head not worse on held-out images.

        Never where the labels are too few for the probes: then the choice is between small_similar and large_similar.
        """
        evidence, rule = self.evidence, self.rule
        if weak_labels(evidence):
            return False
        slices = evidence.significance < rule.alpha and evidence.gain >= rule.gain / 100 and evidence.confirmed
        if self.former is None or self.former.freeze == "nothing" or not evidence.cut_ops:
            return slices
        # The noise is that of the paired difference between the two heads.
        noise = NOISE * evidence.cut_error
        return evidence.cut_gain > -noise if self.former.head == "cut" else slices and evidence.cut_gain > noise

    @cached_property
    def head(self) -> str:
        """Which frozen head would be trained: cut where slicing pays, multi where it is expected to gain more than the tolerance, else last."""
        simple, compared = ("cut", "over") if self.slices else ("last", "multi")
        gain, noise = self.model.head_gain(compared, self.evidence), 0.0
        if self.former is not None and self.former.freeze == "kept":
            noise = NOISE * float(getattr(self.evidence, f"{compared}_error")) * (1 if self.former.head == "multi" else -1)
        return "multi" if gain + noise > self.tolerance else simple

    @property
    def frozen(self) -> float:
        """Leave-one-out accuracy of that head."""
        return float(getattr(self.evidence, self.head))

    @cached_property
    def prediction(self) -> Prediction:
        """What fine-tuning would gain over that head."""
        return self.model.predict(self.evidence, self.frozen, self.tolerance)

    @property
    def large(self) -> bool:
        """Whether fine-tuning is worth it: the head is expected to lose more than the tolerance against it."""
        gain = self.prediction.gain
        if self.former is not None:
            gain += self.tuning_noise * (1 if self.former.freeze == "nothing" else -1)
        return gain > self.tolerance and has_signal(self.evidence)

    @cached_property
    def tuning_noise(self) -> float:
        """By how much the predicted gain varies with the sample of the probes: NOISE standard errors of the frozen head's accuracy, as a share."""
        share = min(max(self.frozen, 1 / self.evidence.sampled), 1 - 1 / self.evidence.sampled)
        error = math.sqrt(share * (1 - share) / self.evidence.sampled)
        ends = []
        for sign in (-1, 1):
            moved = {name: min(max(getattr(self.evidence, name) + sign * error, 0.0), 1.0) for name in ("last", "cut", "multi")}
            evidence = dataclasses.replace(self.evidence, **moved)
            ends.append(self.model.predict(evidence, float(getattr(evidence, self.head)), self.tolerance).gain)
        return NOISE * abs(ends[1] - ends[0]) / 2

    @property
    def different(self) -> bool:
        """Whether an earlier tap is better than the last by `gain` points, corrected for taking the best of several."""
        limit = 0.5
        if self.former is not None:
            limit = _LIKELY if self.former.different else 1 - _LIKELY
        return self.evidence.similar < limit and not weak_labels(self.evidence)

    def tap(self, profile: Profile, tap: str | None) -> str | None:
        """Return where to cut: after this tap, or where it was cut before if that one is not worse by more than the noise."""
        before = self.former.slice if self.former is not None and self.former.head == "cut" else None
        probes = {probe.name: probe for probe in profile.taps[:-1]}
        if tap is None or before not in probes or before == tap:
            return tap
        here, there = (unpack(probes[name].correct, profile.sampled).astype(float) for name in (tap, before))
        difference = here - there
        return (
            before
            if difference.mean() <= NOISE * max(difference.std(), 0.5 / math.sqrt(len(difference))) / math.sqrt(len(difference))
            else tap
        )

    def p_within_tolerance(self, tuned: bool) -> float:
        """Return the calibrated probability that this choice, without a race, is at most the tolerance worse than the best arm.

        Without a signal it is at most the probability before calibration.
        """
        own = float(((-self.gains if tuned else self.gains) <= self.tolerance).mean())
        return self.model.p_within_tolerance(own) if has_signal(self.evidence) else min(self.model.p_within_tolerance(own), own)

    @cached_property
    def gains(self) -> Matrix:
        """Equally likely gains of fine-tuning by the prediction."""
        return self.model.gains(self.evidence, self.frozen)

    def posterior(self, part: int, difference: float, error: float) -> Matrix:
        """Return weights for these gains, given a paired difference at an interim analysis of the race."""
        remaining, spread = self.model.remaining_gain[part]  # shares of the frozen head's errors
        errors = 1 - min(self.frozen, 1.0)
        width = math.hypot(error, spread * errors)
        log_likelihood = -0.5 * ((difference - (self.gains - remaining * errors)) / width) ** 2
        # The maximum is subtracted, because a difference far from every prediction would underflow to weights of 0.
        weights = np.exp(log_likelihood - log_likelihood.max())
        return np.asarray(weights / weights.sum())

    def evpi(self, gains: Matrix) -> float:
        """Return the expected value of perfect information about fine-tuning's gain, as a share: the expected loss of the better choice.

        A choice loses what the gain lies on its wrong side of the tolerance, which is the price at which fine-tuning is worth having.
        """
        beyond = gains - self.tolerance
        return float(min(beyond.clip(min=0).mean(), (-beyond).clip(min=0).mean()))

    @property
    def open(self) -> bool:
        """Whether the choice between frozen and fine-tuned is open, or `choose.effort` asks for a race anyway.

        It is open if knowing the gain would be worth more than the tolerance, unless fine-tuning almost surely gains more than that. It is also
        open without a signal, and if the labels are too few for the probes.
        """
        prediction = self.prediction
        between = self.evpi(self.gains) > self.tolerance and 1 - prediction.p_frozen_within < self.rule.race_below
        unlike = bool(prediction.outside) and self.evpi(self.model.gains(self.evidence, self.frozen, size=True)) > self.tolerance
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
        """How many validation images outside the selection half a race needs."""
        # A user who asks for a race gets one. Where the probes are too weak to decide, even a race on few images says more.
        if self.rule.effort == "full":
            return LEAST_JUDGES
        return min(WEAK_JUDGES, self.rule.race_images) if weak_labels(self.evidence) else self.rule.race_images


def weigh(profile: Profile, rule: ChooseParams, model: GainPredictor | None = None, former: Former | None = None) -> DecisionPolicy:
    """Return the policy for a profile, with the fitted model that comes with the package or another.

    Args:
        former: the decision before; one that names a tap that the network has not, does not count.
    """
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    if former is not None and former.slice not in [tap.name for tap in profile.taps]:
        former = None
    return DecisionPolicy(predictor.evidence(profile, test), rule, model or predictor.load_predictor(), former)


def has_signal(evidence: Evidence) -> bool:
    """Return whether any head or the tangent probe is better than always predicting the largest class.

    Without a signal the headroom means nothing: noise has it, too. The cheapest case is taken then, unless a race shows better.
    """
    best = max(evidence.last, evidence.cut, evidence.multi)
    error = math.sqrt(max(best * (1 - best), 1 / evidence.sampled) / evidence.sampled)
    return best - 2 * error > evidence.majority or evidence.tangent_gain > SIGNAL


def weak_labels(evidence: Evidence | Profile) -> tuple[str, ...]:
    """Return why the labels are too few for the probes, if they are: many_classes, few_per_class."""
    weak = {"many_classes": evidence.classes > evidence.sampled / 2, "few_per_class": evidence.images / evidence.classes < LEAST_PER_CLASS}
    return tuple(code for code, true in weak.items() if true)


def textbook(evidence: Evidence | Profile) -> Case:
    """Return the case by the textbook's two fixed bounds: a baseline for research, which nothing in the pipeline asks.

    Large: at least 1,000 training images. Similar: the source's classes explain at least half of the labels' entropy.
    """
    size = LARGE if evidence.images >= TEXTBOOK_IMAGES else SMALL
    likeness = SIMILAR if (evidence.head_similarity or 0.0) >= TEXTBOOK_SIMILARITY else DIFFERENT
    return next(case for case in CASES if (case.size, case.likeness) == (size, likeness))


# --- with more images ----------------------------------------------------------------------------------------------------------------------


def extrapolate(weighed: DecisionPolicy, images: int) -> tuple[Evidence, float]:
    """Return the evidence with another number of images, and what the frozen head would reach with them by its learning curve.

    Errors of learning curves fall as a power of the images (Hestness et al. 2017, arXiv 1712.00409); the power is that of the last doubling
    of the sample.
    """
    evidence = weighed.evidence
    error, before = max(1 - weighed.frozen, 0.5 / evidence.sampled), max(1 - weighed.frozen + evidence.slope, 0.5 / evidence.sampled)
    power = max(math.log2(before / error), 0.0)
    there = min(error * (images / evidence.images) ** -power, 1 - 1 / evidence.classes)
    slope = min(there * 2**power, 1.0) - there
    return dataclasses.replace(evidence, images=images, slope=slope), 1 - there


def turning_point(weighed: DecisionPolicy) -> int | None:
    """Return the number of images at which the prediction changes sides, the frozen head going on along its learning curve; None if nowhere."""
    model, large = weighed.model, weighed.large
    most = 10 ** (model.highest.get("log10 images", 5.0) + 0.3)
    images = float(weighed.evidence.images)
    while 20 <= images <= max(most, weighed.evidence.images):
        images = images / 1.05 if large else images * 1.05
        evidence, frozen = extrapolate(weighed, round(images))
        if (model.predict(evidence, frozen, weighed.tolerance).gain > weighed.tolerance) != large:
            return round(images)
    return None


def turning(weighed: DecisionPolicy, large: bool) -> Turning:
    """Return the number of images and the tolerance at which the decision changes sides.

    Only without a race: after one, the prediction does not say what more images would do.
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


def interim_analysis(
    weighed: DecisionPolicy, part: int, epoch: int, epochs: int, frozen: Bits, tuned: Bits, *, groups: Sequence[str] = ()
) -> InterimResult:
    """Return the result of an interim analysis: the prediction, updated by the validation images that selected nothing (Bayes' rule).

    Fine-tuning still gains from here to the end of its schedule. How much was measured together with the prediction.

    Args:
        part: which analysis, 0 to 2.
        frozen, tuned: whether each of these images is classified correctly, in the same order.
        groups: of each image, "" where it has none; images of one group are not independent. Empty: none has.
    """
    difference = tuned.astype(float) - frozen.astype(float)
    images = len(difference)
    # At least half a discordant image: equal answers on all images are no certainty.
    effect = design_effect(difference, group_numbers(groups)) if groups else 1.0
    error = math.sqrt(max(float(difference.var()), 0.5 / images) / images * effect)
    weights = weighed.posterior(part, float(difference.mean()), error)
    p_tuned_better = float(weights @ (weighed.gains > weighed.tolerance))
    p_tuned_within = float(weights @ (-weighed.gains <= weighed.tolerance))
    lost = [round(float(weights @ (sign * weighed.gains).clip(min=0)), 4) for sign in (1, -1)]
    return InterimResult(
        epoch,
        epochs,
        images,
        float(frozen.mean()),
        float(tuned.mean()),
        round(error, 4),
        round(p_tuned_better, 4),
        round(p_tuned_within, 4),
        lost[0],
        lost[1],
    )


def interim_epochs(epochs: int) -> list[int]:
    """Return the epochs of the planned interim analyses: a third, two thirds, the end of the schedule; fewer where it is shorter than three epochs."""
    return sorted({max(round(epochs * part / LOOKS), 1) for part in range(1, LOOKS + 1)})


def stopping_rule(weighed: DecisionPolicy, part: int, last: InterimResult) -> tuple[str, str]:
    """Return (winner, why) after an interim analysis, ("", "") while the race goes on (see `decision.Race`).

    At the end an undecided race goes to the cheaper arm, unless the expected gain of fine-tuning exceeds the tolerance.
    """
    spent = weighed.rule.alpha * ALPHA_SPENDING[part]
    if last.p_tuned_better >= 1 - spent:
        return "tuned", "ahead"
    if last.p_tuned_better <= spent:
        return "frozen", "futile"
    if part < LOOKS - 1:
        return "", ""
    expected = float(weighed.posterior(part, last.tuned - last.frozen, last.error) @ weighed.gains)
    return "tuned" if expected > weighed.tolerance else "frozen", "expected"
