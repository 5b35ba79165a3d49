"""What an own network must keep to: what it declares, what it takes and returns, and how its parts hang together. Each error is a sentence."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlpipeline.backbones import finding
from tlpipeline.data.transforms import INTERPOLATIONS, Transforms
from tlpipeline.errors import BackboneError

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KEYS = ("size", "resize", "mean", "std", "interpolation")
_EXAMPLE = 'transforms = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}'


def check_module(name: str, module: nn.Module) -> None:
    """Check that a network is a tree of modules with tensors of known sizes.

    Raises:
        BackboneError: a block holds itself, or a layer has no size yet.
    """

    def visit(child: nn.Module, path: tuple[tuple[str, nn.Module], ...]) -> None:
        for step, (_, above) in enumerate(path):
            if above is child:
                cycle = ".".join(part for part, _ in path[1:])
                where = ".".join(part for part, _ in path[1 : step + 1]) or "the network itself"
                raise BackboneError(
                    f"expected blocks of {name} that do not hold each other, found {where} again inside {cycle}. Keep the reference in a tuple: "
                    "self.other = (block,)."
                )

    def walk(module: nn.Module, path: tuple[tuple[str, nn.Module], ...]) -> None:
        for part, child in module.named_children():
            below = (*path, (part, child))
            visit(child, (*path, (part, nn.Module())))
            walk(child, below)

    walk(module, (("", module),))
    lazy = [
        n
        for n, t in (*module.named_parameters(), *module.named_buffers())
        if isinstance(t, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer)
    ]
    if lazy:
        raise BackboneError(
            f"expected layers of known sizes in {name}, found {lazy[0]} without one. Give its sizes instead of using a lazy layer."
        )


def check_tensors(name: str, module: nn.Module) -> None:
    """Check that no two tensors of a network share memory: a model file keeps each tensor once, under one name.

    Raises:
        BackboneError: two do.
    """
    owners: dict[tuple[int, torch.Size], str] = {}
    for key, value in module.state_dict().items():
        if value.is_meta or not value.numel():
            continue
        place = (value.untyped_storage().data_ptr(), value.shape)
        if place in owners:
            raise BackboneError(
                f"expected a tensor of its own under each name in {name}, found that {owners[place]} and {key} are tied. Untie them, or call one "
                "module twice."
            )
        owners[place] = key


def transforms_of(name: str, module: nn.Module) -> Transforms:
    """Return the transforms that a network declares; without any, ImageNet's at 224 pixels.

    Raises:
        BackboneError: what it declares is none; the way out is said.
    """
    given = getattr(module, "transforms", {})
    if not isinstance(given, Mapping):
        raise BackboneError(f"expected {name}.transforms as a dictionary, found {type(given).__name__}. Write {_EXAMPLE}.")
    if unknown := set(given) - set(_KEYS):
        raise BackboneError(f"{name}.transforms: unknown key {min(map(str, unknown))!r}; expected {', '.join(_KEYS)}.")
    sizes: dict[str, int] = {}
    for key in ("size", "resize"):
        value = given.get(key, sizes.get("size", 224))
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10_000:
            raise BackboneError(f"expected {name}.transforms[{key!r}] as pixels of a side, such as 32, found {value!r}. Images are square.")
        sizes[key] = value
    if sizes["resize"] < sizes["size"]:
        raise BackboneError(
            f"expected {name}.transforms['resize'] of at least its size, {sizes['size']}, found {sizes['resize']}. Leave it out."
        )
    mean, std = (_channels(name, key, given.get(key, default)) for key, default in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)))
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise BackboneError(
            f"expected {name}.transforms with mean and std of values from 0 to 1, found mean {mean} and std {std}. Divide those of 8-bit values by 255."
        )
    interpolation = given.get("interpolation", "bilinear")
    if interpolation not in INTERPOLATIONS:
        raise BackboneError(f"expected {name}.transforms['interpolation'] as one of {', '.join(INTERPOLATIONS)}, found {interpolation!r}.")
    return Transforms(sizes["size"], sizes["resize"], mean, std, interpolation)


def _channels(name: str, key: str, value: Any) -> tuple[float, ...]:
    is_triple = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
    if not is_triple or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        raise BackboneError(
            f"expected {name}.transforms[{key!r}] as three numbers, one for each of red, green and blue, found {value!r}. "
            "Write (0.5, 0.5, 0.5) for one number."
        )
    return tuple(float(v) for v in value)


def check_forward(name: str, module: nn.Module, size: int) -> Tensor:
    """Return the output for two black images.

    Raises:
        BackboneError: the network does not take them, or returns no tensor.
    """
    try:
        with torch.inference_mode():
            output = module.eval()(torch.zeros(2, 3, size, size))
    except Exception as error:  # whatever its code raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        channels = re.search(r"to have (\d+) channels, but got 3 channels", reason)
        if channels:
            raise BackboneError(
                f"expected {name} to take images of three channels, found that it takes {channels[1]}. Images enter in RGB: repeat or average "
                "them in its forward()."
            ) from error
        raise BackboneError(
            f"expected {name} to take images (batch, 3, {size}, {size}), but it failed: {reason}. "
            "Set the size of its images in the class: transforms = {'size': ...}."
        ) from error
    if not isinstance(output, Tensor):
        raise BackboneError(
            f"expected {name} to return logits (batch, classes), found {type(output).__name__}. Return only logits from its forward()."
        )
    return output


def layouts_of(name: str, module: nn.Module, taps: Sequence[str], size: int) -> dict[str, str]:
    """Return the layouts of taps that give tokens (batch, tokens, channel); those of maps and vectors are left out.

    The class and register tokens are the `prefix_tokens` that the class declares. Without it, they are what exceeds a square number.
    """
    prefix = getattr(module, "prefix_tokens", None)
    if prefix is not None and (not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 0):
        raise BackboneError(
            f"expected {name}.prefix_tokens as a number of tokens, found {prefix!r}. Write prefix_tokens = 1 for a class token."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.get_submodule(tap).register_forward_hook(
            lambda _m, _i, out, tap=tap: shapes.update({tap: tuple(out.shape)} if isinstance(out, Tensor) and out.dim() == 3 else {})  # type: ignore[misc]
        )
        for tap in taps
    ]
    try:
        with torch.inference_mode():
            module.eval()(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return finding.layouts_of({tap: shape for tap, shape in shapes.items() if shape[0] == 1}, prefix)
