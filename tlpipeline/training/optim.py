"""The optimizer: learning rates and weight decay by parameter, the schedule, and the optimizer's state as tensors."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tlpipeline.training.recipe import ADAMW, Recipe

WARM_UP_STEPS = 500


def optimizer(
    model: nn.Module, recipe: Recipe, normalization: str, lr: float, blocks: Sequence[Sequence[str]], fused: bool
) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW, over the weights that are trained; learning rates by depth, no weight decay on norms and biases.

    Each group keeps its share of the learning rate as `share`; the schedule multiplies it.

    Args:
        lr: learning rate of the head.
        blocks: names of the backbone's parameters, block by block, first to last.
        fused: use one kernel for the whole step; on GPUs.
    """
    depth = lr_shares(blocks, recipe.layer_decay(normalization))
    kind = recipe.optimizer_for(normalization)
    decay = recipe.weight_decay_adam if kind == ADAMW else recipe.weight_decay
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = depth.get(name, 1.0), decay if decays(name, parameter) else 0.0
            groups.setdefault(key, []).append(parameter)
    listed = [{"params": p, "weight_decay": d, "lr": lr * s, "share": s} for (s, d), p in groups.items()]
    if kind == ADAMW:
        return torch.optim.AdamW(listed, lr=lr, fused=fused)
    return torch.optim.SGD(listed, lr=lr, momentum=0.9, nesterov=True, fused=fused)


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a matrix or a kernel: no weight decay on norms, biases, scales of channels, tokens and tables of positions."""
    return parameter.squeeze().dim() > 1 and not any(word in name for word in ("bias", "pos_embedding", "class_token"))


def lr_shares(blocks: Sequence[Sequence[str]], decay: float) -> dict[str, float]:
    """Return each parameter's share of the learning rate: decay to the power of its block's distance from the head (Clark et al. 2020, ELECTRA)."""
    return {name: decay ** (len(blocks) - i) for i, block in enumerate(blocks) for name in block}


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Return the share of the learning rate at a step: linear warm-up (at most 500 steps), then half a cosine to zero."""
    warm = min(max(round(steps * warm_up), 1), WARM_UP_STEPS)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors by name."""
    return {
        f"{parameter}.{name}": value.detach().to("cpu", copy=True)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def unflat(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that `flat` returned, in the memory layout of its parameters, which fused steps on GPUs require."""
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
