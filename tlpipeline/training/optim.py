"""How weights move: which of them with which rate and decay, the schedule, averages of weights, and an optimizer's state as tensors."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tlpipeline.training.recipe import ADAMW, Recipe

WARM_UP_STEPS = 500


def optimizer(
    model: nn.Module, recipe: Recipe, normalization: str, rate: float, blocks: Sequence[Sequence[str]], fused: bool
) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW, over the weights that are trained; rates by depth, no decay on norms and biases.

    Each group keeps its share of the rate as `share`: the schedule multiplies it.

    Args:
        rate: of the head.
        blocks: names of the backbone's parameters, block by block, first to last.
        fused: one kernel for the whole step; on GPUs.
    """
    depth = shares(blocks, recipe.layer_decay(normalization))
    kind = recipe.optimizer_for(normalization)
    decay = recipe.weight_decay_adam if kind == ADAMW else recipe.weight_decay
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = depth.get(name, 1.0), decay if decays(name, parameter) else 0.0
            groups.setdefault(key, []).append(parameter)
    listed = [{"params": p, "weight_decay": d, "lr": rate * s, "share": s} for (s, d), p in groups.items()]
    if kind == ADAMW:
        return torch.optim.AdamW(listed, lr=rate, fused=fused)
    return torch.optim.SGD(listed, lr=rate, momentum=0.9, nesterov=True, fused=fused)


def decays(name: str, parameter: Tensor) -> bool:
    """Say whether a parameter is a matrix or a kernel: no decay on norms, biases, scales of channels, tokens and tables of positions."""
    return parameter.squeeze().dim() > 1 and not any(word in name for word in ("bias", "pos_embedding", "class_token"))


def shares(blocks: Sequence[Sequence[str]], decay: float) -> dict[str, float]:
    """Return each parameter's share of the rate: decay to the power of its block's distance from the head (Clark et al. 2020, ELECTRA)."""
    return {name: decay ** (len(blocks) - i) for i, block in enumerate(blocks) for name in block}


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Return the share of the learning rate at a step: linear warm-up (at most 500 steps), then half a cosine to zero."""
    warm = min(max(round(steps * warm_up), 1), WARM_UP_STEPS)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


class Average:
    """An exponential moving average of a model's weights, buffers included (Polyak and Juditsky 1992); with decay 0 the weights themselves.

    Early on the average would remember the start: the decay rises to its value as (1 + steps) / (10 + steps).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if not self.decay:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in self.model.state_dict().items():
            if value.dtype.is_floating_point:
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)

    def buffers(self) -> list[Tensor]:
        """Return the averages of the model's buffers."""
        return [self.weights[name] for name, _ in self.model.named_buffers() if name in self.weights]

    def swap(self) -> None:
        """Exchange the model's weights and the average; a second call takes it back."""
        if self.decay:
            own = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.model.load_state_dict(self.weights)
            self.weights = own


def flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors by name."""
    return {
        f"{parameter}.{name}": value.detach().to("cpu", copy=True)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def unflat(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that `flat` returned, in the memory layout of its parameters: on GPUs fused steps refuse any other."""
    content = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    optimizer.load_state_dict({**content, "state": state})
    for weights, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == weights.shape:
                values[name] = torch.empty_like(weights, dtype=value.dtype).copy_(value)
