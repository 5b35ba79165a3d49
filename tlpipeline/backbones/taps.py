"""Taps: named places, first to last, at which a network can be read and cut.

Networks are cut on their traced graph. A block without a tap inside stays one opaque call. Everything after the deepest tap is
removed, including its parameters.
"""

import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tlpipeline.backbones.code import Code
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError

LOGITS = "logits"
_TRACING = threading.Lock()


@dataclass(frozen=True)
class Tap:
    """A place where a network can be read and cut.

    Attributes:
        name: of the submodule whose output is read.
        channels, height, width: of that output at the given input size; height and width are 1 for vectors.
        parameters: number that remains when everything after this tap is cut off.
        forward_ops: floating-point operations per image up to this tap.
    """

    name: str
    channels: int
    height: int
    width: int
    parameters: int
    forward_ops: int


@dataclass(frozen=True)
class Backbone:
    """A network with its weights, uncut.

    Attributes:
        name, weights: as in params.yaml.
        fingerprint: identifies the weights' content.
        module: the whole network including the source head.
        tap_names: first to last; the source head reads the last one.
        layouts: of taps whose output is neither (batch, channel, height, width) nor (batch, channel).
        transforms: of the weights.
        minimum: smallest input side in pixels.
        fixed: whether `minimum` is the only possible size.
        source_classes: outputs of the source head, 0 where it is useless (random weights).
        positional: it learned positions at the size of its weights, so `auto` keeps that size; a number may set another.
        multiple: input sides must be multiples of this number of pixels: the patch size of a vision transformer.
        code: the files of your own network, None for others.
    """

    name: str
    weights: str
    fingerprint: str
    module: nn.Module
    tap_names: tuple[str, ...]
    layouts: Mapping[str, str]
    transforms: Transforms
    minimum: int
    fixed: bool
    source_classes: int
    positional: bool = False
    multiple: int = 1
    code: Code | None = None

    @property
    def normalization(self) -> str:
        """Kind of the network's normalization layers: batch, layer or none."""
        return normalization(self.module)


def normalization(module: nn.Module) -> str:
    """Return the kind of a network's normalization layers: batch, layer or none."""
    modules = list(module.modules())
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        return "batch"
    return "layer" if any(isinstance(m, nn.LayerNorm) or type(m).__name__ == "LayerNorm2d" for m in modules) else "none"


# --- cutting --------------------------------------------------------------------------------------------------------------------------


class _BlockTracer(fx.Tracer):
    """Trace only the modules that contain taps; every other module is one opaque call."""

    def __init__(self, taps: Sequence[str]) -> None:
        super().__init__()
        self._inside = {".".join(tap.split(".")[:depth]) for tap in taps for depth in range(1, tap.count(".") + 1)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._inside


def cut(backbone: Backbone, taps: Sequence[str], *, logits: bool = False) -> fx.GraphModule:
    """Return the network up to the deepest of these taps, without the layers after it.

    The module shares its tensors with the backbone. It maps images (batch, 3, size, size) to a tuple with one tensor per tap in the
    given order. Its shape is (batch, channel, height, width) or (batch, channel). With `logits`, the source head's logits follow.

    torch.fx replaces `nn.Module.__call__` for some milliseconds. Only one thread cuts at a time, and no other thread may call a network.

    Raises:
        BackboneError: a tap does not exist, or the network's code between the taps cannot be traced.
    """
    for tap in taps:
        if tap not in backbone.tap_names:
            raise BackboneError(f"expected a tap of {backbone.name}, found {tap!r}; its taps are {', '.join(backbone.tap_names)}.")
    backbone.module.eval()
    try:
        with _TRACING:
            graph = _BlockTracer(backbone.tap_names).trace(backbone.module)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise BackboneError(
            f"Cannot cut {backbone.name} between its taps, because its forward() branches on data there: {error}. "
            "Name taps that are all top-level submodules, or move the branch into a block."
        ) from error
    nodes = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
    end = next(n for n in graph.nodes if n.op == "output")
    for tap in taps:
        if tap not in nodes:
            raise BackboneError(f"the tap {tap!r} of {backbone.name} never runs; remove it from `taps`.")
    head = [end.args[0]] if logits else []
    end.args = (tuple([*(nodes[tap] for tap in taps), *head]),)
    # eliminate_dead_code would keep what may have side effects, such as shape checks after the cut and the layers they read.
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    outputs = []
    for tap in taps:
        node = nodes[tap]
        if set(node.users) != {end}:
            # The next layer may write into its input (an in-place ReLU); the tap is the value before that.
            with graph.inserting_after(node):
                node = graph.call_method("clone", (node,))
        if layout := backbone.layouts.get(tap):
            with graph.inserting_after(node):
                node = graph.call_function(_CANONICAL[layout], (node,))
        outputs.append(node)
    end.args = (tuple([*outputs, *head]),)
    module = fx.GraphModule(backbone.module, graph)
    module.delete_all_unused_submodules()
    return module.eval()


_VERSIONED_PACKAGES = ("torch.", "torchvision.", "builtins")  # whose code is identified by their version
_COMMON_ATTRIBUTES = frozenset(vars(nn.Module()))


def _source_code(kind: type) -> str:
    """Return the source file of a class: its methods may call other code in that file."""
    for place in (inspect.getmodule(kind), kind):
        with suppress(OSError, TypeError):  # typed at a prompt or compiled: there is no source code
            return inspect.getsource(place)  # type: ignore[arg-type]
    return f"{kind.__module__}.{kind.__qualname__}"


def _canonical_text(value: Any, digest: Callable[[Tensor], str]) -> str:
    """Return a module's plain attribute as text that is the same in every process: numbers of heads, windows, slopes, tensors."""
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_canonical_text(k, digest)}: {_canonical_text(v, digest)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_canonical_text(v, digest) for v in value)}]"
    if isinstance(value, partial):
        return _canonical_text([value.func, value.args, value.keywords], digest)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def tap_fingerprints(backbone: Backbone, taps: Sequence[str], *, logits: bool = False) -> dict[str, str]:
    """Return a fingerprint of each tap's computation: a hash of tensors, graph, module settings and source code.

    Networks that are identical up to a tap have the same fingerprint there, so a cut and exported model is recognized. PyTorch's version
    is included, because the last digits may differ between versions.

    Args:
        logits: also return the fingerprint of the whole network, as LOGITS.
    """
    digests: dict[int, str] = {}

    def digest(tensor: Tensor) -> str:
        if id(tensor) not in digests:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[id(tensor)] = hashlib.md5(content.data, usedforsecurity=False).hexdigest() + str((tensor.dtype, tuple(tensor.shape)))
        return digests[id(tensor)]

    def fingerprint(trunk: fx.GraphModule) -> str:
        tensors = [*trunk.named_parameters(), *trunk.named_buffers()]
        parts = [f"{name}={digest(tensor)}" for name, tensor in tensors if not name.endswith("num_batches_tracked")]
        blocks = [(name, module) for name, module in trunk.named_modules() if name]
        settings = [f"{n}.{k}={_canonical_text(v, digest)}" for n, m in blocks for k, v in vars(m).items() if k not in _COMMON_ATTRIBUTES]
        kinds = {kind for _, module in blocks for kind in type(module).__mro__}
        code = {_source_code(kind) for kind in kinds if not kind.__module__.startswith(_VERSIONED_PACKAGES)}
        text = "\n".join([torch.__version__, trunk.code, repr(trunk), *sorted(parts), *sorted(settings), *sorted(code)])
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()

    fingerprints = {tap: fingerprint(cut(backbone, [tap])) for tap in taps}
    return fingerprints | ({LOGITS: fingerprint(cut(backbone, [], logits=True))} if logits else {})


def parameters_by_tap(backbone: Backbone, last: str) -> list[list[str]]:
    """Return the blocks of a network up to the tap `last`: the names of the parameters that each tap adds to the one before."""
    by_tap: list[list[str]] = []
    earlier: set[str] = set()
    for tap in backbone.tap_names[: backbone.tap_names.index(last) + 1]:
        new = [name for name, _ in cut(backbone, [tap]).named_parameters() if name not in earlier]
        earlier.update(new)
        by_tap.append(new)
    return by_tap


def _channels_first(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


def _class_and_mean_token(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)


_CANONICAL = {"nhwc": _channels_first, "tokens": _class_and_mean_token}


def measure_taps(backbone: Backbone, size: int) -> tuple[Tap, ...]:
    """Return every tap with its output shape at this input size, and the parameters and operations up to it."""
    from torch.utils.flop_counter import FlopCounterMode

    measured = []
    for name in backbone.tap_names:
        trunk = cut(backbone, [name])
        with torch.inference_mode(), _countable_attention(), FlopCounterMode(display=False) as counter:
            (output,) = trunk(torch.zeros(1, 3, size, size))
        if not isinstance(output, Tensor) or output.dim() not in (2, 4):
            shape = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise BackboneError(
                f"expected the tap {name} of {backbone.name} to give (batch, channel, height, width) or (batch, channel), found {shape}. "
                "Name another submodule in `taps`."
            )
        height, width = (output.shape[2], output.shape[3]) if output.dim() == 4 else (1, 1)
        parameters = sum(p.numel() for p in trunk.parameters())
        measured.append(Tap(name, output.shape[1], height, width, parameters, counter.get_total_flops()))
    return tuple(measured)


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Keep PyTorch from fusing an attention layer into one call that FlopCounterMode does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def resolve_tap(backbone: Backbone, name: str) -> str:
    """Return a tap by its name, or the last tap inside the stage of that name (`layer2` gives `layer2.1`).

    Raises:
        BackboneError: there is none; the taps are listed.
    """
    inside = [tap for tap in backbone.tap_names if tap == name or tap.startswith(f"{name}.")]
    if not inside:
        raise BackboneError(
            f"expected a tap of {backbone.name} in choose.slice, found {name!r}; its taps are {', '.join(backbone.tap_names)}."
        )
    return inside[-1]


def input_size(backbone: Backbone, wanted: int | str, median_short_side: float) -> int:
    """Return the input side of the network in pixels.

    `auto` is the size of the weights, or the median short side of the images rounded up to a multiple of 32 if that is smaller.
    It is at least the network's minimum. For a network that learned positions it is always the size of the weights.

    Raises:
        BackboneError: the network cannot take this number: below its minimum, not a multiple of its patches, or not its only size.
    """
    source_size = backbone.transforms.size
    if isinstance(wanted, int):
        if wanted < backbone.minimum or wanted % backbone.multiple or (backbone.fixed and wanted != source_size):
            allowed = f"{source_size}" if backbone.fixed else f"at least {backbone.minimum}"
            patches = f" and a multiple of {backbone.multiple}" if backbone.multiple > 1 else ""
            raise BackboneError(f"expected data.size {allowed}{patches} for {backbone.name}, found {wanted}. Set data.size to auto.")
        return wanted
    if backbone.positional:
        return source_size
    return max(min(source_size, 32 * max(1, -(-round(median_short_side) // 32))), backbone.minimum)
