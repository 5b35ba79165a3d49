"""How `train.override` changes the values of a training run. Loads no torch."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from tlpipeline.errors import ParamsError, nearest
from tlpipeline.training.config import TrainingPlan
from tlpipeline.training.recipe import (
    ADAMW,
    ALIASES,
    AUTO,
    BALANCES,
    INITS,
    OPTIMIZERS,
    REMOVED,
    SMALL_PIXELS,
    STATISTICS,
    Recipe,
)

_OF_A_HEAD = ("init", "balance", "imbalance")
_CHOICES: dict[str, tuple[str, ...]] = {"optimizer": OPTIMIZERS, "balance": BALANCES, "statistics": STATISTICS}
_RANGES = {
    "batch": (2, math.inf), "batch_large": (2, math.inf), "least_epochs": (1, math.inf), "most_epochs": (1, math.inf),
    "epochs_at_500": (1, math.inf), "gradient_accumulation_steps": (1, math.inf), "crop": (0.01, 1), "warm_up": (0, 1),
    "layer_decay_norm": (0.01, 1), "layer_decay_other": (0.01, 1), "clip": (1e-6, math.inf), "scratch_epochs_at_500": (1, math.inf),
    "scratch_times": (0.01, math.inf), "imbalance": (1, math.inf),
}  # fmt: skip


def override(recipe: Recipe, init: str, changes: Mapping[str, Any], *, freeze: bool) -> tuple[Recipe, str]:
    """Return the recipe and `init` with the values that `train.override` changes.

    Args:
        freeze: whether the backbone is frozen, so that only pretrained weights make sense.

    Raises:
        ParamsError: the recipe has no value of this name, or the value has another type or lies outside of its range.
    """
    values: dict[str, Any] = {}
    for name, value in changes.items():
        if name == "init":
            init = _checked_init(value, freeze)
        else:
            values[ALIASES.get(name, name)] = _checked(name, value)
    return replace(recipe, **values), init


def _checked_init(value: Any, freeze: bool) -> str:
    where = "params.yaml: train.override.init"
    if value not in INITS:
        raise ParamsError(f"{where}: expected {' or '.join(INITS)}, found {value!r}.")
    if freeze and value != "pretrained":
        raise ParamsError(
            f"{where}: expected pretrained, because the backbone is frozen in this case, found {value!r}. "
            "Set choose.case to a case that trains everything, or remove init."
        )
    return str(value)


def _checked(name: str, value: Any) -> Any:
    where, known = f"params.yaml: train.override.{name}", {f.name: f.type for f in fields(Recipe)}
    if name in REMOVED:
        raise ParamsError(f"{where}: expected a value that the recipe has, but {name} was removed. Delete it from train.override.")
    name = ALIASES.get(name, name)
    if name not in known:
        raise ParamsError(f"params.yaml: train.override: unknown recipe value {name!r}; {nearest(name, [*known, 'init'])}")
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ParamsError(f"{where}: expected {' or '.join(_CHOICES[name])}, found {value!r}.")
        return value
    kind, (low, high) = known[name], _RANGES.get(name, (0.0, math.inf))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, int if kind in (int, bool) else (int, float)):
        raise ParamsError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r}.")
    if not isinstance(value, bool) and not low <= value <= high:
        raise ParamsError(f"{where}: expected {f'at least {low:g}' if high == math.inf else f'{low:g} to {high:g}'}, found {value!r}.")
    return value


def unused_overrides(plan: TrainingPlan, changes: Mapping[str, Any], normalization: str) -> tuple[str, ...]:
    """Return the names in `train.override` that change nothing in this plan, which has the changes.

    Args:
        normalization: of the network: batch, layer or none.
    """
    if plan.freeze:  # its head is solved, without epochs
        return tuple(name for name in changes if name not in _OF_A_HEAD)
    recipe = plan.recipe
    small, adamw = plan.size < SMALL_PIXELS, recipe.optimizer_for(normalization) == ADAMW
    used = {
        "lr_batch": normalization == "batch" and not small,
        "lr_batch_small": normalization == "batch" and small,
        "lr_layer": normalization == "layer",
        "lr_none": normalization == "none",
        "layer_decay_norm": normalization == "layer",
        "layer_decay_other": normalization != "layer",
        "weight_decay": not adamw,
        "weight_decay_adam": adamw,
        "statistics": normalization == "batch",
        "sync_below": normalization == "batch",
        "scratch_from": plan.init == AUTO,
        "scratch_times": plan.init in (AUTO, "random"),
        "scratch_epochs_at_500": plan.init in (AUTO, "random"),
    }
    return tuple(name for name in changes if not used.get(ALIASES.get(name, name), True))
