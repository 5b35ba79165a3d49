"""What was decided, as values: the content of case.json. Loads no torch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.errors import ParamsError, nearest
from tlpipeline.training.recipe import ADAMW, AUTO, BALANCES, INITS, OPTIMISERS, SMALL_PIXELS, STATISTICS, Recipe


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
        prior: P(large) from size, classes, capacity and head similarity, before anything was probed.
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
    prior: float
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


def override(case: Decision, changes: Mapping[str, Any]) -> Decision:
    """Return the decision with some recipe values (or `init`) changed by train.override.

    Raises:
        ParamsError: a name that the recipe does not have, or a value of another type.
    """
    known = {f.name: f.type for f in dataclasses.fields(Recipe)}
    recipe: dict[str, Any] = {}
    init = case.init
    for name, value in changes.items():
        where = f"params.yaml: train.override.{name}"
        if name == "init":
            if value not in INITS:
                raise ParamsError(f"{where}: expected {' or '.join(INITS)}, found {value!r}.")
            if case.freeze == "kept" and value != "pretrained":
                raise ParamsError(
                    f"{where}: expected pretrained for {case.case}, whose backbone is frozen, found {value!r}. "
                    "Set choose.case to a case that trains everything, or remove init."
                )
            init = value
        elif name not in known:
            raise ParamsError(f"params.yaml: train.override: unknown recipe value {name!r}; {nearest(name, [*known, 'init'])}")
        elif name in _CHOICES:
            if value not in _CHOICES[name]:
                raise ParamsError(f"{where}: expected {' or '.join(_CHOICES[name])}, found {value!r}.")
            recipe[name] = value
        elif isinstance(value, bool) != (known[name] is bool) or not isinstance(value, int if known[name] in (int, bool) else (int, float)):
            raise ParamsError(f"{where}: expected {getattr(known[name], '__name__', known[name])}, found {value!r}.")
        elif not isinstance(value, bool) and not _RANGES.get(name, (0.0, math.inf))[0] <= value <= _RANGES.get(name, (0.0, math.inf))[1]:
            low, high = _RANGES.get(name, (0.0, math.inf))
            raise ParamsError(f"{where}: expected {f'at least {low:g}' if high == math.inf else f'{low:g} to {high:g}'}, found {value!r}.")
        else:
            recipe[name] = value
    return dataclasses.replace(case, init=init, recipe=dataclasses.replace(case.recipe, **recipe))


def idle(case: Decision, changes: Mapping[str, Any], normalization: str, views: int = 0) -> tuple[str, ...]:
    """Return the names in train.override that change nothing in this case.

    Args:
        case: with the changes made.
        normalization: of the network: batch, layer or none.
        views: random views of a frozen head.
    """
    if case.freeze == "kept":  # its head is solved, without epochs
        return tuple(name for name in changes if name not in _OF_A_HEAD and not (name == "crop" and views))
    recipe = case.recipe
    small, adamw = case.size < SMALL_PIXELS, recipe.optimizer_for(normalization) == ADAMW
    used = {
        "rate_batch": normalization == "batch" and not small,
        "rate_batch_small": normalization == "batch" and small,
        "rate_layer": normalization == "layer",
        "rate_none": normalization == "none",
        "layer_decay_norm": normalization == "layer",
        "layer_decay_other": normalization != "layer",
        "weight_decay": not adamw,
        "weight_decay_adam": adamw,
        "statistics": normalization == "batch",
        "sync_below": normalization == "batch",
        "randaugment_magnitude": recipe.randaugment > 0,
        "scratch_from": case.init == AUTO,
        "scratch_times": case.init in (AUTO, "random"),
        "scratch_epochs_at_500": case.init in (AUTO, "random"),
    }
    return tuple(name for name in changes if not used.get(name, True))


_OF_A_HEAD = ("init", "balance", "imbalance")


_CHOICES: dict[str, tuple[str, ...]] = {"optimizer": OPTIMISERS, "balance": BALANCES, "statistics": STATISTICS}


_RANGES = {
    "batch": (2, math.inf), "batch_large": (2, math.inf), "least_epochs": (1, math.inf), "most_epochs": (1, math.inf),
    "epochs_at_500": (1, math.inf), "accumulate": (1, math.inf), "crop": (0.01, 1), "label_smoothing": (0, 0.99), "average": (0, 0.99999),
    "warm_up": (0, 1), "layer_decay_norm": (0.01, 1), "layer_decay_other": (0.01, 1), "randaugment_magnitude": (0, 30), "clip": (1e-6, math.inf),
    "scratch_epochs_at_500": (1, math.inf), "scratch_times": (0.01, math.inf), "imbalance": (1, math.inf),
}  # fmt: skip
