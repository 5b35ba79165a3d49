"""Ordered taps at which a network can be read and cut.

Cutting is done on the traced graph: every block without a tap inside stays one opaque call with its own code, and whatever only later
outputs need is gone, parameters included.
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

from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError

LOGITS = "logits"
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Tap:
    """A place where a network can be read and cut.

    Attributes:
        name: of the submodule whose output is read.
        channels, height, width: of that output at the given input size; 1 x 1 for vectors.
        parameters: that remain when everything after this tap is cut off.
        forward_ops: floating-point operations of one image up to this tap.
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
        module: the whole network, source head included.
        tap_names: first to last; the last one is what the source head reads.
        layouts: how a tap's output is laid out where it is not (batch, channel, height, width) or (batch, channel).
        transforms: the weights' own.
        minimum: smallest input side in pixels; `fixed` where no other size is possible.
        source_classes: outputs of the source head, 0 where there is none worth reading (random weights).
        positional: it learnt where things are at the weights' own size, so that `auto` keeps it; another is taken where a number asks for it.
        multiple: sides must be multiples of this: the patches of a vision transformer.
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

    @property
    def normalization(self) -> str:
        """Return batch, layer or none: which kind of normalization layers the network has."""
        return normalization(self.module)


def normalization(module: nn.Module) -> str:
    """Return batch, layer or none: which kind of normalization layers a network has."""
    modules = list(module.modules())
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        return "batch"
    return "layer" if any(isinstance(m, nn.LayerNorm) or type(m).__name__ == "LayerNorm2d" for m in modules) else "none"


# --- cutting --------------------------------------------------------------------------------------------------------------------------


class _BlockTracer(fx.Tracer):
    """Trace only the skeleton that holds the taps; every other module is one opaque call."""

    def __init__(self, taps: Sequence[str]) -> None:
        super().__init__()
        self._inside = {".".join(tap.split(".")[:depth]) for tap in taps for depth in range(1, tap.count(".") + 1)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._inside


def cut(backbone: Backbone, taps: Sequence[str], *, logits: bool = False) -> fx.GraphModule:
    """Return the network up to the deepest of these taps; what only later layers need is gone.

    The module shares its tensors with the backbone. It maps images (batch, 3, size, size) to a tuple with one tensor a tap, in the order
    given, as (batch, channel, height, width) or (batch, channel), followed by the source head's logits where `logits` is true.

    For milliseconds torch.fx replaces what all of the process's networks are called by: one thread cuts at a time, and no other may call a
    network meanwhile.

    Raises:
        BackboneError: a tap does not exist, or the network's code between the taps cannot be traced.
    """
    for tap in taps:
        if tap not in backbone.tap_names:
            raise BackboneError(f"expected a tap of {backbone.name}, found {tap!r}; its taps are {', '.join(backbone.tap_names)}.")
    backbone.module.eval()
    try:
        with _ALONE:
            graph = _BlockTracer(backbone.tap_names).trace(backbone.module)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise BackboneError(
            f"expected to cut {backbone.name} between its taps, but its forward() branches on data there: {error}. "
            "Name taps that are all top-level submodules, or move the branch into a block."
        ) from error
    nodes = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
    end = next(n for n in graph.nodes if n.op == "output")
    for tap in taps:
        if tap not in nodes:
            raise BackboneError(f"the tap {tap!r} of {backbone.name} never runs; remove it from `taps`.")
    head = [end.args[0]] if logits else []
    end.args = (tuple([*(nodes[tap] for tap in taps), *head]),)
    # Not eliminate_dead_code: it keeps what may have side effects, such as checks of shapes behind the cut and the layers they look at.
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    outputs = []
    for tap in taps:
        node = nodes[tap]
        if set(node.users) != {end}:
            # What comes next may write into its input (a ReLU in place); the tap is what stood there before.
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


_OTHERS = ("torch.", "torchvision.", "builtins")  # whose code goes by their version
_EVERY_MODULE = frozenset(vars(nn.Module()))


def _code(kind: type) -> str:
    """Return the whole file that a class stands in: its methods may call what else is there."""
    for place in (inspect.getmodule(kind), kind):
        with suppress(OSError, TypeError):  # typed into a prompt or compiled: there is no source to compare
            return inspect.getsource(place)  # type: ignore[arg-type]
    return f"{kind.__module__}.{kind.__qualname__}"


def _said(value: Any, digest: Callable[[Tensor], str]) -> str:
    """Return a plain attribute of a module as text that is the same in every process: numbers of heads, windows, slopes, kept tensors."""
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_said(k, digest)}: {_said(v, digest)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_said(v, digest) for v in value)}]"
    if isinstance(value, partial):
        return _said([value.func, value.args, value.keywords], digest)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def tap_fingerprints(backbone: Backbone, taps: Sequence[str], *, logits: bool = False) -> dict[str, str]:
    """Return what tells the computation of each tap from every other: a hash of its tensors, its graph, its modules' settings and own code.

    Two networks that are the same up to a tap have the same identity there, whatever comes behind it: a sliced and exported model is known
    again. PyTorch's version is part of it, because kernels differ in their last digits.

    Args:
        logits: also return that of the whole network, as LOGITS.
    """
    digests: dict[int, str] = {}

    def digest(tensor: Tensor) -> str:
        if id(tensor) not in digests:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[id(tensor)] = hashlib.md5(content.data, usedforsecurity=False).hexdigest() + str((tensor.dtype, tuple(tensor.shape)))
        return digests[id(tensor)]

    def identity(trunk: fx.GraphModule) -> str:
        tensors = [*trunk.named_parameters(), *trunk.named_buffers()]
        parts = [f"{name}={digest(tensor)}" for name, tensor in tensors if not name.endswith("num_batches_tracked")]
        blocks = [(name, module) for name, module in trunk.named_modules() if name]
        set_up = [f"{n}.{k}={_said(v, digest)}" for n, m in blocks for k, v in vars(m).items() if k not in _EVERY_MODULE]
        kinds = {kind for _, module in blocks for kind in type(module).__mro__}
        code = {_code(kind) for kind in kinds if not kind.__module__.startswith(_OTHERS)}
        text = "\n".join([torch.__version__, trunk.code, repr(trunk), *sorted(parts), *sorted(set_up), *sorted(code)])
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()

    found = {tap: identity(cut(backbone, [tap])) for tap in taps}
    return found | ({LOGITS: identity(cut(backbone, [], logits=True))} if logits else {})


def parameters_by_tap(backbone: Backbone, last: str) -> list[list[str]]:
    """Return the names of the parameters that each tap adds to the one before, up to the tap `last`: the blocks that a network is made of."""
    found: list[list[str]] = []
    seen: set[str] = set()
    for tap in backbone.tap_names[: backbone.tap_names.index(last) + 1]:
        new = [name for name, _ in cut(backbone, [tap]).named_parameters() if name not in seen]
        seen.update(new)
        found.append(new)
    return found


def _channels_first(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


def _class_and_mean_token(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)


_CANONICAL = {"nhwc": _channels_first, "tokens": _class_and_mean_token}


def measure_taps(backbone: Backbone, size: int) -> tuple[Tap, ...]:
    """Return every tap with the shape of its output at this input size, and what a cut there keeps."""
    from torch.utils.flop_counter import FlopCounterMode

    found = []
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
        kept = sum(p.numel() for p in trunk.parameters())
        found.append(Tap(name, output.shape[1], height, width, kept, counter.get_total_flops()))
    return tuple(found)


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Keep PyTorch from fusing an attention layer into one call that its counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def resolve_tap(backbone: Backbone, name: str) -> str:
    """Return the tap that a user means: its name, or the last tap inside the stage of that name (`layer2` is `layer2.1`).

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
    """Return the side in pixels at which images enter the network.

    `auto` is the smaller of the weights' own size and the images' median short side rounded up to a multiple of 32, at least the network's
    minimum; for a network that learnt positions it is the weights' own size.

    Raises:
        BackboneError: a number that the network cannot take: below its minimum, not a multiple of its patches, or another than its one size.
    """
    own = backbone.transforms.size
    if isinstance(wanted, int):
        if wanted < backbone.minimum or wanted % backbone.multiple or (backbone.fixed and wanted != own):
            allowed = f"{own}" if backbone.fixed else f"at least {backbone.minimum}"
            patches = f" and a multiple of {backbone.multiple}" if backbone.multiple > 1 else ""
            raise BackboneError(f"expected data.size {allowed}{patches} for {backbone.name}, found {wanted}. Set data.size to auto.")
        return wanted
    if backbone.positional:
        return own
    return max(min(own, 32 * max(1, -(-round(median_short_side) // 32))), backbone.minimum)
