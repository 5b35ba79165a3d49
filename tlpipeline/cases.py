"""The four cases of transfer learning as rows of one table, and the choice among them.

A row says where the backbone is cut, what is frozen, how its weights start, and the recipe. Nothing else in this code base asks which case
it is: a fifth case is one row here and one line in the tests.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tlpipeline.errors import BackboneError, ParamsError, nearest
from tlpipeline.features import Reading
from tlpipeline.params import AUTO, ChooseParams
from tlpipeline.profiling import Profile, chance_of_large, slice_test

SMALL, LARGE = "small", "large"
SIMILAR, DIFFERENT = "similar", "different"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the kept network is trained once its new head is solved; unused where everything is frozen.

    Attributes:
        rates: learning rate by kind of normalisation (batch, layer, none) at a batch of 64; layer normalisation uses AdamW, the others
            SGD with Nesterov momentum .9. Batch normalisation below 64 pixels has a rate of its own (our measurements: .05 to .15).
        epochs_at_500: epochs for 500 training images; for n images times sqrt(500 / n), between least and most.
        scratch_times: random weights get this many times the epochs and this many times the rate (up to .1).
        patience: epochs without a better validation before training stops.
        crop: smallest share of the area that random crops keep.
    """

    rate_batch: float = 0.01
    rate_batch_small: float = 0.05
    rate_layer: float = 5e-5
    rate_none: float = 0.002
    epochs_at_500: int = 20
    least_epochs: int = 5
    most_epochs: int = 40
    scratch_times: float = 3.0
    patience: int = 6
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop: float = 0.5
    warm_up: float = 0.05
    clip: float = 1.0
    imbalance: float = 10.0

    def epochs(self, images: int) -> int:
        """Return the epochs for this many training images."""
        wanted = self.epochs_at_500 * math.sqrt(500 / max(images, 1))
        return int(min(max(round(wanted), self.least_epochs), self.most_epochs))

    def rate(self, normalisation: str, size: int) -> float:
        """Return the learning rate for a network with this normalisation at this input size, at a batch of 64."""
        if normalisation == "batch":
            return self.rate_batch_small if size < 64 else self.rate_batch
        return self.rate_layer if normalisation == "layer" else self.rate_none


@dataclass(frozen=True, slots=True)
class Case:
    """A row: which data it is for, and what is done with the pretrained network.

    Attributes:
        keep: end (only the old head goes) or slice (the layers behind the slice point go too).
        freeze: kept (all that is kept) or nothing.
        init: pretrained, random, or auto (pretrained; random where fine-tuning does not beat the frozen probe on validation).
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
    Case("large_different", LARGE, DIFFERENT, "end",   "nothing", "auto",       Recipe(label_smoothing=0.1)),  # the same; from scratch where that is better
)
# fmt: on


@dataclass(frozen=True)
class Decision:
    """What `choose` decided: the content of case.json.

    Attributes:
        case: name of the row.
        slice: the tap behind which the network is cut (the last tap where nothing is sliced off).
        readings: what the head reads, deepest tap first.
        size: input side in pixels.
        freeze, init, recipe: of the row.
        probabilities: of each case; similar and large: of the two axes.
        reason: one English sentence with the numbers.
        warnings: what makes the choice weak, if anything.
        forced: keys of params.yaml that overrode the evidence.
    """

    case: str
    slice: str
    readings: tuple[Reading, ...]
    size: int
    freeze: str
    init: str
    recipe: Recipe
    probabilities: dict[str, float]
    similar: float
    large: float
    reason: str
    warnings: tuple[str, ...]
    forced: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for case.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Decision":
        """Read what `to_json` gave."""
        readings = tuple(Reading(r["tap"], r["channels"], tuple(r["grids"])) for r in content["readings"])
        plain = {**content, "readings": readings, "recipe": Recipe(**content["recipe"])}
        return cls(**plain | {"warnings": tuple(content["warnings"]), "forced": tuple(content["forced"])})


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


def choose(profile: Profile, rule: ChooseParams) -> Decision:
    """Decide which case applies and where the network is cut, by the evidence of the profile.

    Large = P(best probe < large_below); similar = P(no earlier tap beats the last by `gain` points) by the max-T bootstrap. A slice is made
    only where an earlier tap is significantly better (family-wise), by `gain` points or more, and where its head is not worse than the
    uncut one on held-out images.

    Raises:
        ParamsError: choose.case names no case. BackboneError: choose.slice names no tap.
    """
    test = slice_test(profile, gain=rule.gain / 100, draws=rule.draws)
    large = chance_of_large(profile, below=rule.large_below, draws=rule.draws)
    chances = {LARGE: large, SMALL: 1 - large, SIMILAR: test.similar, DIFFERENT: 1 - test.similar}
    # An unfitted rule must not be sure: the probabilities are drawn towards even odds, .85 at most.
    probabilities = {c.name: round(0.8 * chances[c.size] * chances[c.likeness] + 0.05, 4) for c in CASES}
    forced = tuple(f"choose.{key}" for key in ("case", "slice") if getattr(rule, key) != AUTO)
    case = max(CASES, key=lambda c: probabilities[c.name]) if rule.case == AUTO else find(rule.case)

    wanted = _forced_tap(profile, rule.slice) if rule.slice != AUTO else None
    if wanted and rule.case == AUTO:
        # Who forces a slice wants a case that slices, where there is one for this size of data.
        case = next((c for c in CASES if c.size == case.size and c.keep == "slice"), case)
    sliced = test.tap if test.significance < rule.alpha and test.gain >= rule.gain / 100 and test.confirmed else None
    remark = ""
    if case.keep == "slice":
        if wanted:
            sliced = wanted
        elif sliced is None and rule.case == AUTO:
            case = find("small_similar")
            remark = f"; slicing {test.why_not(rule.alpha, rule.gain / 100)}, so nothing is cut off"
        elif sliced is None:
            # The user wants a slice that the evidence does not ask for: the best earlier tap there is.
            sliced = test.tap or profile.taps[max(0, len(profile.taps) - 2)].name
    else:
        sliced = None
        remark = f"; choose.slice is not used, because {case.name} cuts nothing off" if wanted else ""
    head = profile.head_at(sliced) if sliced else profile.last_head
    return Decision(
        case=case.name,
        slice=sliced or profile.taps[-1].name,
        readings=head,
        size=profile.size,
        freeze=case.freeze,
        init=case.init,
        recipe=case.recipe,
        probabilities=probabilities,
        similar=round(test.similar, 4),
        large=round(large, 4),
        reason=_reason(profile, rule, case, test, large, sliced)
        + remark
        + ("." if not forced else f" (forced by {' and '.join(forced)})."),
        warnings=_weaknesses(profile),
        forced=forced,
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
        if name == "init":
            if value not in ("pretrained", "random", "auto"):
                raise ParamsError(f"params.yaml: train.override.init: expected pretrained, random or auto, found {value!r}.")
            init = value
        elif name not in known:
            raise ParamsError(f"params.yaml: train.override: unknown recipe value {name!r}; {nearest(name, [*known, 'init'])}")
        elif isinstance(value, bool) or not isinstance(value, int if known[name] is int else (int, float)):
            raise ParamsError(
                f"params.yaml: train.override.{name}: expected {getattr(known[name], '__name__', known[name])}, found {value!r}."
            )
        else:
            recipe[name] = value
    return dataclasses.replace(case, init=init, recipe=dataclasses.replace(case.recipe, **recipe))


def _forced_tap(profile: Profile, wanted: str) -> str:
    inside = [t.name for t in profile.taps if t.name == wanted or t.name.startswith(f"{wanted}.")]
    if not inside:
        taps = ", ".join(t.name for t in profile.taps)
        raise BackboneError(f"expected a tap of {profile.backbone} in choose.slice, found {wanted!r}; its taps are {taps}.")
    return inside[-1]


def _reason(profile: Profile, rule: ChooseParams, case: Case, test: Any, large: float, sliced: str | None) -> str:
    last, best = profile.taps[-1], profile.best
    size = (
        f"the best probe reaches {best.accuracy:.1%} (tap {best.name}), {'below' if large >= 0.5 else 'not below'} the {rule.large_below:.0%} "
        f"under which fine-tuning pays, so {profile.images} images of {profile.classes} classes are "
        f"{'large' if large >= 0.5 else 'small'} for this network (P(large) {large:.2f})"
    )
    earlier = test.best_earlier
    likeness = (
        "it has one tap only"
        if earlier is None
        else (
            f"the best earlier tap {earlier} {'gains' if test.gain >= 0 else 'loses'} {abs(test.gain) * 100:.1f} points against the last, "
            f"{last.name}, so the data are {'similar to' if test.similar >= 0.5 else 'different from'} what the network knows "
            f"(P(similar) {test.similar:.2f})"
        )
    )
    done = {
        ("end", "kept"): "everything is frozen and a new head is trained",
        ("slice", "kept"): f"the layers behind {sliced} are cut off, the rest is frozen and a new head is trained",
        ("end", "nothing"): "a new head is trained and then the whole network is fine-tuned",
    }[case.keep, case.freeze]
    return f"{case.name}: {size}; {likeness}; {done}"


def _weaknesses(profile: Profile) -> tuple[str, ...]:
    weak = []
    if profile.classes > profile.sampled / 2:
        weak.append(f"profile too weak: {profile.classes} classes in a sample of {profile.sampled} images")
    if profile.images / profile.classes < 5:
        weak.append(f"profile too weak: {profile.images / profile.classes:.1f} training images per class, fewer than 5")
    if np.isclose(profile.best.accuracy, profile.majority, atol=0.02):
        weak.append(
            f"no signal: the best probe ({profile.best.accuracy:.1%}) is not better than the majority class ({profile.majority:.1%})"
        )
    return tuple(weak)
