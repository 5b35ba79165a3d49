"""What was decided, as values: the content of case.json. Loads no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.training.config import TrainingPlan
from tlpipeline.training.recipe import Recipe, override


@dataclass(frozen=True)
class Arm:
    """A way to train that was weighed.

    Attributes:
        name: frozen (the head reads the last tap), cut (the layers behind the slice point are gone), multi (several taps, nothing cut off)
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
class Look:
    """A planned look of the race.

    Attributes:
        epoch: of fine-tuning, of so many; images: of the judging half of validation.
        frozen, tuned: accuracy there; error: paired standard error of their difference.
        chance: probability that fine-tuning ends better by more than the tolerance, the prediction included; safe: that it does not end
            worse by more than the tolerance.
        frozen_regret, tuned_regret: expected loss of choosing either.
    """

    epoch: int
    epochs: int
    images: int
    frozen: float
    tuned: float
    error: float
    chance: float
    safe: float
    frozen_regret: float
    tuned_regret: float


@dataclass(frozen=True)
class Race:
    """What was raced: the looks, who won, why it ended, and its cost in forward passes of one image."""

    looks: tuple[Look, ...]
    winner: str
    ended: str
    cost: float


@dataclass(frozen=True)
class Decision:
    """What `choose` decided: the content of case.json.

    Attributes:
        case: name of the row.
        slice: the tap behind which the network is cut (the last tap where nothing is sliced off).
        head: last, cut or multi: which of the heads is trained; last where everything is.
        readings: what a head could read, deepest tap first (see `read`).
        size: input side in pixels.
        freeze, init, recipe: of the row.
        probabilities: of each case; similar and large: of the two axes.
        arms: what was weighed; regret: points expected to be lost against the best of them (0 to 1).
        within: probability that the chosen arm is not worse than the best by more than the tolerance (0 to 1).
        race: what was raced, if anything; race_wanted: the evidence leaves it open, and a race could tell; no_race: why there was none.
        saved_parameters, saved_ops: shares of the network that the cut takes away.
        reason: one English sentence with the numbers.
        changes: what would change the decision, a sentence each.
        warnings: what makes the choice weak, if anything.
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
    probabilities: dict[str, float]
    similar: float
    large: float
    arms: tuple[Arm, ...]
    regret: float
    within: float
    race: Race | None
    race_wanted: bool
    no_race: str
    saved_parameters: float
    saved_ops: float
    reason: str
    changes: tuple[str, ...]
    warnings: tuple[str, ...]
    forced: tuple[str, ...]

    @property
    def read(self) -> tuple[TapPooling, ...]:
        """What the head reads in the end: what it was solved on."""
        return self.readings if self.freeze == "kept" or self.recipe.solve_again else self.under

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
        race = content["race"]
        structured = {
            "readings": tuple(TapPooling(r["tap"], r["channels"], tuple(r["grids"])) for r in content["readings"]),
            "recipe": Recipe(**content["recipe"]),
            "arms": tuple(Arm(**arm) for arm in content["arms"]),
            "race": None if race is None else Race(**race | {"looks": tuple(Look(**look) for look in race["looks"])}),
        }
        plain = {key: tuple(content[key]) for key in ("changes", "warnings", "forced")}
        return cls(**{**content, **structured, **plain})
