"""The four cases of transfer learning as rows of one table, and what a decision for one of them says.

A row says where the backbone is cut, what is frozen, how its weights start, and the recipe. Nothing else in this code base asks which case
it is: a fifth case is one row here and one line in the tests. How one is chosen stands in choice.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tlpipeline.errors import ParamsError, nearest
from tlpipeline.features import Reading
from tlpipeline.heads import IMBALANCE

SMALL, LARGE = "small", "large"
SIMILAR, DIFFERENT = "similar", "different"
INITS = ("pretrained", "plain", "random", "auto")
AUTO, SGD, ADAMW = "auto", "sgd", "adamw"
OPTIMISERS = (AUTO, SGD, ADAMW)
LOSS, SAMPLER, NONE = "loss", "sampler", "none"
BALANCES = (LOSS, SAMPLER, NONE)
FIXED, BATCH = "fixed", "batch"
STATISTICS = (AUTO, FIXED, BATCH)
BUDGET = "train.budget_minutes"  # begins whatever is said of what time has ended
SMALL_PIXELS = 64  # below, networks with batch normalisation have a rate and statistics of their own (docs/log.md)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the kept network is trained once its new head is solved; unused where everything is frozen.

    Attributes:
        rates: learning rate by kind of normalisation (batch, layer, none) at a batch of 64; layer normalisation uses AdamW, the others
            SGD with Nesterov momentum .9. Batch normalisation below 64 pixels has a rate of its own (docs/log.md). Without normalisation
            data that differ from the source want a much higher one (Li et al. 2020 find the same).
        batch, batch_large: images per step below and from `large` training images on: with few images more steps were worth up to 3 points.
        epochs_at_500: epochs for 500 training images; for n images times sqrt(500 / n), between least and most.
        scratch_epochs_at_500, scratch_times: random weights get this schedule and this many times its epochs and the rate (up to .1); scratch_from:
            training images from which they are tried at all.
        statistics: what batch normalisation subtracts and divides by while everything is trained: fixed (those of the source, as in the head's
            features: what is trained starts where the probe stands), batch (each step's own), or auto: fixed from 64 pixels on, batch below.
            Random weights have none to keep: batch.
        patience: epochs without a better validation before training stops and goes back to the best one; 0 runs the schedule to its end and
            keeps its last epoch, which was better in our measurements: at the end of a cosine there is less noise than in a small validation.
        optimiser: auto (AdamW for networks with layer normalisation, else SGD), sgd or adamw; weight_decay of SGD, weight_decay_adam.
        layer_decay_norm: with layer normalisation each block nearer to the images gets this share of the rate of the next one (METHOD: .75
            for ViT and ConvNeXt); layer_decay_other: the same for the other networks.
        crop: smallest share of the area that random crops keep.
        randaugment: operations of RandAugment an image, 0 for none; randaugment_magnitude: 0 to 30.
        mixup, cutmix: alpha of their Beta distributions, 0 for none.
        average: decay of the moving average of weights, which is then what is validated and kept; 0 for none.
        warm_up: share of the steps; clip: largest norm of the gradient.
        accumulate: parts into which a worker's share of a batch is cut, one after the other, to save memory; more are made where a GPU's
            memory does not do.
        balance: what is done where the largest class has more than `imbalance` times the images of the smallest: loss (classes weigh alike),
            sampler (classes are drawn alike), or none.
        sync_below: images of a worker's share of a batch below which BatchNorm takes its statistics from all workers; on GPUs.
        solve_again: solve a head on several taps when everything is trained, with the validation images as well (Kang et al. 2020, arXiv
            1910.09217, train classifiers again for another reason; docs/decisions/0016). It is what lets half of the usual schedule do.
        compile: let torch.compile make a faster network of it; needs a C++ compiler, and does not pay for few images.
    """

    rate_batch: float = 0.05
    rate_batch_small: float = 0.2
    rate_layer: float = 5e-5
    rate_none: float = 0.004
    batch: int = 32
    batch_large: int = 64
    large: int = 5000
    epochs_at_500: int = 10
    least_epochs: int = 5
    most_epochs: int = 40
    scratch_epochs_at_500: int = 20
    scratch_times: float = 3.0
    scratch_from: int = 50_000
    statistics: str = AUTO
    patience: int = 0
    optimiser: str = AUTO
    weight_decay: float = 5e-4
    weight_decay_adam: float = 0.05
    layer_decay_norm: float = 0.75
    layer_decay_other: float = 1.0
    label_smoothing: float = 0.0
    crop: float = 0.5
    randaugment: int = 0
    randaugment_magnitude: int = 9
    mixup: float = 0.0
    cutmix: float = 0.0
    average: float = 0.0
    warm_up: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    imbalance: float = IMBALANCE
    balance: str = LOSS
    sync_below: int = 16
    solve_again: bool = True
    compile: bool = False

    @property
    def head_imbalance(self) -> float:
        """How uneven classes may be before a head that is solved weighs them alike; infinite where nothing is balanced."""
        return math.inf if self.balance == NONE else self.imbalance

    def optimiser_for(self, normalisation: str) -> str:
        """Return sgd or adamw."""
        if self.optimiser != AUTO:
            return self.optimiser
        return ADAMW if normalisation == "layer" else SGD

    def layer_decay(self, normalisation: str) -> float:
        """Return the share of the rate that each block has of the next one nearer to the head."""
        return self.layer_decay_norm if normalisation == "layer" else self.layer_decay_other

    def batch_size(self, images: int) -> int:
        """Return the images per step for this many training images."""
        return self.batch if images < self.large else self.batch_large

    def epochs(self, images: int) -> int:
        """Return the epochs for this many training images."""
        return self._epochs(self.epochs_at_500, images)

    def scratch_epochs(self, images: int) -> int:
        """Return the epochs that random weights get for this many training images."""
        return round(self.scratch_times * self._epochs(self.scratch_epochs_at_500, images))

    def _epochs(self, at_500: int, images: int) -> int:
        wanted = at_500 * math.sqrt(500 / max(images, 1))
        return int(min(max(round(wanted), self.least_epochs), self.most_epochs))

    def rate(self, normalisation: str, size: int) -> float:
        """Return the learning rate for a network with this normalisation at this input size, at a batch of 64."""
        if normalisation == "batch":
            return self.rate_batch_small if size < SMALL_PIXELS else self.rate_batch
        return self.rate_layer if normalisation == "layer" else self.rate_none

    def keeps_statistics(self, size: int) -> bool:
        """Say whether batch normalisation keeps the source's statistics at this input size."""
        return self.statistics == FIXED or (self.statistics == AUTO and size >= SMALL_PIXELS)


@dataclass(frozen=True, slots=True)
class Case:
    """A row: which data it is for, and what is done with the pretrained network.

    Attributes:
        keep: end (only the old head goes) or slice (the layers behind the slice point go too).
        freeze: kept (all that is kept) or nothing.
        init: pretrained (the head is solved on frozen features first, then everything is trained: LP-FT), plain (the same from a head of
            zeros), random, or auto (pretrained; random where fine-tuning does not beat the frozen probe on validation).
    """

    name: str
    size: str
    likeness: str
    keep: str
    freeze: str
    init: str
    recipe: Recipe


# fmt: off
CASES = (
    #    name               size   likeness   keep     freeze     init          recipe
    Case("small_similar",   SMALL, SIMILAR,   "end",   "kept",    "pretrained", Recipe()),                     # good features, little data: only a new head
    Case("small_different", SMALL, DIFFERENT, "slice", "kept",    "pretrained", Recipe()),                     # only the early, general features carry over
    Case("large_similar",   LARGE, SIMILAR,   "end",   "nothing", "pretrained", Recipe()),                     # enough data to adapt all of it, gently
    Case("large_different", LARGE, DIFFERENT, "end",   "nothing", "auto",       Recipe(rate_none=0.03)),       # the same, less gently; from scratch where that is better
)
# fmt: on


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
    readings: tuple[Reading, ...]
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
    def read(self) -> tuple[Reading, ...]:
        """What the head reads in the end: what it was solved on."""
        return self.readings if self.freeze == "kept" or self.recipe.solve_again else self.under

    @property
    def under(self) -> tuple[Reading, ...]:
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
            "readings": tuple(Reading(r["tap"], r["channels"], tuple(r["grids"])) for r in content["readings"]),
            "recipe": Recipe(**content["recipe"]),
            "arms": tuple(Arm(**arm) for arm in content["arms"]),
            "race": None if race is None else Race(**race | {"looks": tuple(Look(**look) for look in race["looks"])}),
        }
        plain = {key: tuple(content[key]) for key in ("changes", "warnings", "forced")}
        return cls(**{**content, **structured, **plain})


def find(name: str) -> Case:
    """Return the row of this name.

    Raises:
        ParamsError: there is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ParamsError(
        f"params.yaml: choose.case: expected auto or the name of a case, found {name!r}; {nearest(name, [c.name for c in CASES])}"
    )


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


def idle(case: Decision, changes: Mapping[str, Any], normalisation: str, views: int = 0) -> tuple[str, ...]:
    """Return the names in train.override that change nothing in this case.

    Args:
        case: with the changes made.
        normalisation: of the network: batch, layer or none.
        views: random views of a frozen head.
    """
    if case.freeze == "kept":  # its head is solved, without epochs
        return tuple(name for name in changes if name not in _OF_A_HEAD and not (name == "crop" and views))
    recipe = case.recipe
    small, adamw = case.size < SMALL_PIXELS, recipe.optimiser_for(normalisation) == ADAMW
    used = {
        "rate_batch": normalisation == "batch" and not small,
        "rate_batch_small": normalisation == "batch" and small,
        "rate_layer": normalisation == "layer",
        "rate_none": normalisation == "none",
        "layer_decay_norm": normalisation == "layer",
        "layer_decay_other": normalisation != "layer",
        "weight_decay": not adamw,
        "weight_decay_adam": adamw,
        "statistics": normalisation == "batch",
        "sync_below": normalisation == "batch",
        "randaugment_magnitude": recipe.randaugment > 0,
        "scratch_from": case.init == AUTO,
        "scratch_times": case.init in (AUTO, "random"),
        "scratch_epochs_at_500": case.init in (AUTO, "random"),
    }
    return tuple(name for name in changes if not used.get(name, True))


_OF_A_HEAD = ("init", "balance", "imbalance")
_CHOICES: dict[str, tuple[str, ...]] = {"optimiser": OPTIMISERS, "balance": BALANCES, "statistics": STATISTICS}
_RANGES = {
    "batch": (2, math.inf), "batch_large": (2, math.inf), "least_epochs": (1, math.inf), "most_epochs": (1, math.inf),
    "epochs_at_500": (1, math.inf), "accumulate": (1, math.inf), "crop": (0.01, 1), "label_smoothing": (0, 0.99), "average": (0, 0.99999),
    "warm_up": (0, 1), "layer_decay_norm": (0.01, 1), "layer_decay_other": (0.01, 1), "randaugment_magnitude": (0, 30), "clip": (1e-6, math.inf),
    "scratch_epochs_at_500": (1, math.inf), "scratch_times": (0.01, math.inf), "imbalance": (1, math.inf),
}  # fmt: skip
