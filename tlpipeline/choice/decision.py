"""What was decided, as values: the content of case.json. Loads no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.training.config import TrainingPlan
from tlpipeline.training.override import override
from tlpipeline.training.recipe import INITS, Recipe, current_names

Finite = Annotated[float, Field(allow_inf_nan=False)]


def _codes(*names: str) -> Any:
    """Return the constraint that an edited file holds one of these codes."""
    return Field(pattern=f"^({'|'.join(names)})$")


Weak = Annotated[
    str,
    _codes(
        "many_classes", "few_per_class", "unprobed_classes", "no_held_out", "one_tap", "no_source_head", "no_signal", "few_judges", "slice_unused"
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A way to train that was considered.

    Attributes:
        name: frozen (the head reads the last tap), cut (the layers after the slice point are gone), multi (several taps, nothing cut off)
            or tuned (fine-tuning).
        accuracy, low, high: expected on new images (0 to 1): measured by probes for the first three, predicted for tuned (80 % interval).
        cost: of one training run, in forward passes of one image through the whole network; a backward pass counts two.
    """

    name: Annotated[str, _codes("frozen", "cut", "multi", "tuned")]
    accuracy: Finite
    low: Finite
    high: Finite
    cost: Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
    frozen: Finite
    tuned: Finite
    error: Finite
    p_tuned_better: Finite
    p_tuned_within: Finite
    frozen_regret: Finite
    tuned_regret: Finite


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
    winner: Annotated[str, _codes("frozen", "tuned")]
    ended: Annotated[str, _codes("ahead", "futile", "expected", "budget")]
    cost: Finite


@dataclass(frozen=True)
class TuningGain:
    """What fine-tuning is expected to gain over the frozen head: the axis of size. All as shares of accuracy (0 to 1).

    Attributes:
        gain, low, high: predicted, with the central 80 % interval.
        counted: what is compared with the border: the prediction, or what a race left of it; 0 without signal.
        border: the tolerance.
        exceeds: whether fine-tuning is worth it.
        why: prediction, no_signal, race, or former (the former decision is kept: the prediction is within its noise of the border).
    """

    gain: Finite
    low: Finite
    high: Finite
    counted: Finite
    border: Finite
    exceeds: bool
    why: Annotated[str, _codes("prediction", "no_signal", "race", "former")]


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
        why: former (the former decision is kept: the evidence is within its noise of the border), confirmed, corrected, one_tap, weak_labels, not_significant, below_border, not_confirmed, or several_taps (a head that reads several
            taps and cuts nothing off gains more than the tolerance over the cut).
    """

    tap: str | None
    earlier: str | None
    gain: Finite
    corrected: Finite
    significance: Finite
    counted: Finite
    border: Finite
    exceeds: bool
    why: Annotated[
        str,
        _codes(
            "confirmed", "corrected", "one_tap", "weak_labels", "not_significant", "below_border", "not_confirmed", "several_taps", "former"
        ),
    ]


@dataclass(frozen=True)
class OutOfRange:
    """A figure that lies outside of what the gain predictor was fitted on; `value` is None where it could not be measured."""

    name: str
    value: Finite | None
    low: Finite
    high: Finite


@dataclass(frozen=True)
class Turning:
    """What would change the decision.

    Attributes:
        images: training images at which the prediction changes sides, None if nowhere; fitted: the most that the predictor was fitted on.
        tolerance: choose.tolerance (as a share) at which it changes sides, None where no tolerance does.
    """

    images: int | None
    fitted: int
    tolerance: Finite | None


@dataclass(frozen=True)
class Former:
    """The decision of the model in production, from which a new one departs only if its evidence exceeds its noise: the content of former.json.

    Attributes:
        version: that was trained so.
        network, rule: what the decision also depends on, as text: sections of params.yaml. A former decision with others does not count.
        case, slice, head, freeze: as in Decision.
        different: whether the data counted as unlike the source.
        images: training images then.
        tuning, cutting: gains that counted then, as shares.
    """

    version: str
    network: str
    rule: str
    case: str
    slice: str
    head: Annotated[str, _codes("last", "cut", "multi")]
    freeze: Annotated[str, _codes("kept", "nothing")]
    different: bool
    images: int
    tuning: Finite
    cutting: Finite


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
        former: the decision before, None if there is none; instead: the case and the slice that the evidence alone would give, where the former
            decision is kept against it, else None.
    """

    case: Annotated[str, Field(pattern="^[a-z_]+$")]
    slice: str
    head: Annotated[str, _codes("last", "cut", "multi")]
    readings: tuple[TapPooling, ...]
    size: int
    freeze: Annotated[str, _codes("kept", "nothing")]
    init: Annotated[str, _codes(*INITS)]
    recipe: Annotated[Recipe, BeforeValidator(current_names)]
    tuning: TuningGain
    cutting: CutGain
    arms: tuple[Arm, ...]
    regret: Finite
    p_within_tolerance: Finite
    race: Race | None
    race_wanted: bool
    no_race: Annotated[str, _codes("", "forced", "quick", "clear", "few_judges", "other_weights")]
    judges_needed: int
    evpi: Finite
    turning: Turning | None
    saved_parameters: Finite
    saved_ops: Finite
    outside: tuple[OutOfRange, ...]
    weak: tuple[Weak, ...]
    forced: tuple[str, ...]
    former: Former | None = None
    instead: tuple[str, str] | None = None

    @property
    def read(self) -> tuple[TapPooling, ...]:
        """What the head reads in the end: what it was solved on."""
        return self.readings if self.freeze == "kept" or self.recipe.refit_head else self.under

    @property
    def under(self) -> tuple[TapPooling, ...]:
        """The taps of the first head: the last tap if it is trained with all layers, else those that it is solved on."""
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

    def contradiction(self) -> str:
        """Return in words where the values of an edited file contradict each other, "" if they do not."""
        if "tuned" not in [arm.name for arm in self.arms]:
            return "arms lacks tuned"
        if not (self.race or self.race_wanted or self.no_race):
            return "no_race does not say why there was no race"
        return "" if self.readings else "readings is empty"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for case.json."""
        return asdict(self)
