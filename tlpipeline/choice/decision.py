"""What was decided, as values: the content of case.json. Loads no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.training.config import TrainingPlan
from tlpipeline.training.override import override
from tlpipeline.training.recipe import Recipe


@dataclass(frozen=True)
class Arm:
    """A way to train that was considered.

    Attributes:
        name: frozen (the head reads the last tap), cut (the layers after the slice point are gone), multi (several taps, nothing cut off)
            or tuned (fine-tuning).
        accuracy, low, high: expected on new images (0 to 1): measured by probes for the first three, predicted for tuned (80 % interval).
        cost: of one training run, in forward passes of one image through the whole network; a backward pass counts two.
    """

    name: str
    accuracy: float
    low: float
    high: float
    cost: float


@dataclass(frozen=True)
class InterimResult:
    """The result of an interim analysis of the race.

    Attributes:
        epoch: of fine-tuning, of so many; images: of the judging half of validation.
        frozen, tuned: accuracy there; error: paired standard error of their difference.
        p_tuned_better: probability, given the prediction and this analysis, that fine-tuning ends better by more than the tolerance.
        p_tuned_within: probability that it does not end worse by more than the tolerance.
        frozen_regret, tuned_regret: expected loss of choosing either; their difference is the expected gain of fine-tuning.
    """

    epoch: int
    epochs: int
    images: int
    frozen: float
    tuned: float
    error: float
    p_tuned_better: float
    p_tuned_within: float
    frozen_regret: float
    tuned_regret: float


@dataclass(frozen=True)
class Race:
    """Fine-tuning and the frozen head, both trained and compared.

    Attributes:
        looks: the interim analyses.
        winner: frozen or tuned.
        ended: why the comparison ended: ahead, futile (fine-tuning will not gain more than the tolerance), expected (undecided at the end:
            by the expected gain) or budget.
        cost: forward passes of one image.
    """

    looks: tuple[InterimResult, ...]
    winner: str
    ended: str
    cost: float


@dataclass(frozen=True)
class TuningGain:
    """What fine-tuning is expected to gain over the frozen head: the axis of size. All as shares of accuracy (0 to 1).

    Attributes:
        gain, low, high: predicted, with the central 80 % interval.
        counted: what is compared with the border: the prediction, or what a race left of it; 0 without signal.
        border: the tolerance.
        exceeds: whether fine-tuning is worth it.
        why: prediction, no_signal or race.
    """

    gain: float
    low: float
    high: float
    counted: float
    border: float
    exceeds: bool
    why: str


@dataclass(frozen=True)
class CutGain:
    """What cutting layers off is expected to gain over the last tap: the axis of similarity. All as shares of accuracy (0 to 1).

    Attributes:
        tap: the slice point; earlier: the earlier tap with the best probe; None where there is one tap only.
        gain: accuracy of that probe minus the last tap's; corrected: the same, corrected for taking the best of several taps.
        significance: family-wise p-value of `no earlier tap is better`.
        counted: what is compared with the border: `gain` where the network would be frozen, 0 where the test did not confirm it; `corrected`
            where everything is trained, where it says which recipe fits.
        border: choose.gain.
        exceeds: whether the data are different, and a frozen network is cut.
        why: confirmed, corrected, one_tap, weak_labels, not_significant, below_border, not_confirmed, or several_taps (a head that reads several
            taps and cuts nothing off gains more than the tolerance over the cut).
    """

    tap: str | None
    earlier: str | None
    gain: float
    corrected: float
    significance: float
    counted: float
    border: float
    exceeds: bool
    why: str


@dataclass(frozen=True)
class OutOfRange:
    """A figure that lies outside of what the gain predictor was fitted on; `value` is None where it could not be measured."""

    name: str
    value: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Turning:
    """What would change the decision.

    Attributes:
        images: training images at which the prediction changes sides, None if nowhere; fitted: the most that the predictor was fitted on.
        tolerance: choose.tolerance (as a share) at which it changes sides, None where no tolerance does.
    """

    images: int | None
    fitted: int
    tolerance: float | None


@dataclass(frozen=True)
class Decision:
    """What `choose` decided, as numbers and codes: the content of case.json. explain.py makes sentences of it.

    Attributes:
        case: name of the row.
        slice: the tap after which the network is cut (the last tap where nothing is cut off).
        head: last, cut or multi: which of the heads is trained; last where everything is.
        readings: what a head could read, deepest tap first (see `read`).
        size: input side in pixels.
        freeze, init, recipe: of the row.
        tuning, cutting: the two comparisons from which the case follows, unless it is forced.
        arms: the ways to train that were compared; regret: expected loss against the best of them (0 to 1).
        p_within_tolerance: probability that the chosen arm is not worse than the best by more than the tolerance.
        race: both ways trained and compared, if they were; race_wanted: whether they should be.
        no_race: why not: forced, quick, clear, few_judges or other_weights; judges_needed: validation images that it takes.
        evpi: what knowing the gain of fine-tuning beforehand would be worth, as a share of accuracy.
        turning: what would change the decision; None after a race.
        saved_parameters, saved_ops: shares of the network that the cut takes away.
        outside: figures outside of the predictor's range; weak: codes of weak evidence (see explain.WEAK).
        forced: keys of params.yaml that overrode the evidence.
    """

    case: str
    slice: str
    head: str
    readings: tuple[TapPooling, ...]
    size: int
    freeze: str
    init: str
    recipe: Recipe
    tuning: TuningGain
    cutting: CutGain
    arms: tuple[Arm, ...]
    regret: float
    p_within_tolerance: float
    race: Race | None
    race_wanted: bool
    no_race: str
    judges_needed: int
    evpi: float
    turning: Turning | None
    saved_parameters: float
    saved_ops: float
    outside: tuple[OutOfRange, ...]
    weak: tuple[str, ...]
    forced: tuple[str, ...]

    @property
    def read(self) -> tuple[TapPooling, ...]:
        """What the head reads in the end: what it was solved on."""
        return self.readings if self.freeze == "kept" or self.recipe.refit_head else self.under

    @property
    def under(self) -> tuple[TapPooling, ...]:
        """What the head reads that is trained with everything else: the last tap, so that all layers are under it; or that is solved on frozen features."""
        return self.readings if self.freeze == "kept" else self.readings[:1]

    @property
    def plan(self) -> TrainingPlan:
        """What training needs of this decision."""
        return TrainingPlan(self.slice, self.size, self.freeze == "kept", self.init, self.recipe, self.under, self.read)

    def overridden(self, changes: Mapping[str, Any]) -> "Decision":
        """Return the decision with the values that `train.override` changes.

        Raises:
            ParamsError: as `recipe.override` does.
        """
        recipe, init = override(self.recipe, self.init, changes, freeze=self.freeze == "kept")
        return replace(self, recipe=recipe, init=init)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for case.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Decision":
        """Read what `to_json` gave."""
        race, turning = content["race"], content["turning"]
        structured = {
            "readings": tuple(TapPooling(r["tap"], r["channels"], tuple(r["grids"])) for r in content["readings"]),
            "recipe": Recipe.from_json(content["recipe"]),
            "tuning": TuningGain(**content["tuning"]),
            "cutting": CutGain(**content["cutting"]),
            "arms": tuple(Arm(**arm) for arm in content["arms"]),
            "race": None if race is None else Race(**race | {"looks": tuple(InterimResult(**look) for look in race["looks"])}),
            "turning": None if turning is None else Turning(**turning),
            "outside": tuple(OutOfRange(**figure) for figure in content["outside"]),
        }
        return cls(**{**content, **structured, "weak": tuple(content["weak"]), "forced": tuple(content["forced"])})
