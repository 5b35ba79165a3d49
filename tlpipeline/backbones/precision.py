"""Which numbers are computed in: bfloat16 where a device multiplies in it, around weights of float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tlpipeline.params import AUTO


def computes_in_bfloat16(device: torch.device) -> bool:
    """Say whether this device multiplies in bfloat16 natively; where it only imitates it, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def extracts_in_bfloat16(device: torch.device, precision: str) -> bool:
    """Say whether frozen networks read images in bfloat16 on this device: on GPUs, where it is several times as fast.

    On CPUs it would be 1.1 to 3.3 times as fast, or half as fast (vision transformers), for other last digits of what the choice was fitted on.

    Args:
        precision: train.precision of params.yaml.
    """
    return precision == AUTO and device.type == "cuda" and computes_in_bfloat16(device)


def enable_tf32(device: torch.device) -> torch.device:
    """Return the device, a GPU set to multiply float32 matrices as it convolves them anyway: in TF32, on tensor cores."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


class DepthwiseInFloat32(TorchFunctionMode):
    """Has convolutions of single channels compute in float32 inside autocast.

    On CPUs the gradient of one takes several times as long in bfloat16: MobileNets, EfficientNets and their like would train at half the
    speed of float32 (`benchmarks/speed.py precision`). The rest of them is faster in bfloat16.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.conv2d and len(args) > 1 and args[1].shape[1] == 1 and args[0].shape[1] > 1:
            with torch.autocast(args[0].device.type, enabled=False):
                return func(args[0].float(), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast(device: torch.device, half: bool) -> Iterator[None]:
    """Have what is fast in bfloat16 on this device compute in it, where `half` is true."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        if half and device.type == "cpu":
            with DepthwiseInFloat32():
                yield
        else:
            yield
