"""Number formats: bfloat16 where a device multiplies it natively, with weights in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tlpipeline.params import AUTO


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether this device multiplies bfloat16 natively. Emulated bfloat16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def extracts_in_bfloat16(device: torch.device, precision: str) -> bool:
    """Return whether frozen networks run in bfloat16 on this device: only on GPUs, where it is several times as fast.

    On CPUs it is between half and 3.3 times as fast, and changes the last digits of the features that the choice was fitted on.

    Args:
        precision: backbone.precision of params.yaml.
    """
    return precision == AUTO and device.type == "cuda" and computes_in_bfloat16(device)


def enable_tf32(device: torch.device) -> torch.device:
    """Let a GPU multiply float32 matrices in TF32 on its tensor cores, as its convolutions do anyway; return the device."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


class DepthwiseInFloat32(TorchFunctionMode):
    """Let convolutions of single channels compute in float32 inside autocast.

    On CPUs their gradient is several times as slow in bfloat16: MobileNets and EfficientNets would train at half the speed of float32
    (`benchmarks/speed.py precision`). Their other layers are faster in bfloat16.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.conv2d and len(args) > 1 and args[1].shape[1] == 1 and args[0].shape[1] > 1:
            with torch.autocast(args[0].device.type, enabled=False):
                return func(args[0].float(), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast(device: torch.device, half: bool) -> Iterator[None]:
    """Compute in bfloat16, where `half` is true, whatever is fast in it on this device."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        if half and device.type == "cpu":
            with DepthwiseInFloat32():
                yield
        else:
            yield
