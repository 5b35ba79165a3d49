"""Which numbers fine-tuning computes in: bfloat16 where a device multiplies in it, around weights of float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def computes_in_bfloat16(device: torch.device) -> bool:
    """Say whether this device multiplies in bfloat16 natively; where it only imitates it, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


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
