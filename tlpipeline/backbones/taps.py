"""Taps: named places, first to last, at which a network can be read and cut.

Networks are cut on their traced graph. A block without a tap inside stays one opaque call. Where the code cannot be traced, a cut network
runs its own code and stops at the deepest tap. Either way, everything after that tap is removed, including its parameters.
"""

import copy
import hashlib
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from tlpipeline.backbones import finding
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
        code: the files of your own network, or the configuration of a Hugging Face network; None for others.
        traced: whether it is cut on its traced graph, where that works.
        library: package, version and architecture that a network of another package is made of; "" for others.
        tried: whether an input size has to be tried, because nothing says which sizes it takes.
        remarks: sentences on what was ignored in its weights file.
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
    traced: bool = True
    library: str = ""
    tried: bool = False
    remarks: tuple[str, ...] = ()

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


def cut(backbone: Backbone, taps: Sequence[str], *, logits: bool = False) -> nn.Module:
    """Return the network up to the deepest of these taps, without the layers after it.

    The module shares its tensors with the backbone. It maps images (batch, 3, size, size) to a tuple with one tensor per tap in the
    given order. Its shape is (batch, channel, height, width) or (batch, channel). With `logits`, the source head's logits follow.

    torch.fx replaces `nn.Module.__call__` for some milliseconds. Only one thread cuts at a time, and no other thread may call a network.

    Raises:
        BackboneError: a tap does not exist or never runs.
    """
    for tap in taps:
        if tap not in backbone.tap_names:
            raise BackboneError(f"expected a tap of {backbone.name}, found {tap!r}; its taps are {', '.join(backbone.tap_names)}.")
    backbone.module.eval()
    graph = _traced(backbone) if backbone.traced else None
    return _stopped(backbone, taps, logits) if graph is None else _cut_graph(backbone, graph, taps, logits)


def _traced(backbone: Backbone) -> fx.Graph | None:
    """Return the graph of the network between its taps, None if its code cannot be traced."""
    try:
        with _TRACING:
            return _BlockTracer(backbone.tap_names).trace(backbone.module)
    except Exception:  # whatever the code does with a stand-in for a tensor: it branches on data, or checks types
        return None


def _cut_graph(backbone: Backbone, graph: fx.Graph, taps: Sequence[str], logits: bool) -> fx.GraphModule:
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
                node = graph.call_function(*_canonical(layout, node))
        outputs.append(node)
    end.args = (tuple([*outputs, *head]),)
    module = fx.GraphModule(backbone.module, graph)
    module.delete_all_unused_submodules()
    return module.eval()


class _Reached(BaseException):
    """The deepest tap has its output. No network's code catches it by `except Exception`."""


_OUTPUTS: ContextVar[dict[str, Tensor]] = ContextVar("outputs")


@dataclass
class _Note:
    """A forward hook that keeps a tap's output, and ends the forward pass if nothing after it is needed."""

    tap: str
    ends: bool

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = finding.first_tensor(output)
        assert tensor is not None
        # The next layer may write into its input (an in-place ReLU); the tap is the value before that.
        _OUTPUTS.get()[self.tap] = tensor if self.ends else tensor.clone()
        if self.ends:
            raise _Reached


class Stopped(nn.Module):
    """A network that runs its own code up to the deepest of its taps.

    Its parts have the names that they have in the network. Modules after the deepest tap are replaced by empty ones, so that lists of
    modules keep their lengths. Parameters that no tap depends on are buffers here: they are not trained.

    Args:
        network: a copy of the structure, sharing its tensors.
        taps: whose outputs are returned; layouts: of those.
        logits: whether the source head's logits follow.
    """

    def __init__(self, network: nn.Module, taps: Sequence[str], layouts: Mapping[str, str], logits: bool) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.network = (network,)  # in a tuple, so that it is no submodule: its parts are
        self.taps, self.layouts, self.logits = tuple(taps), dict(layouts), logits
        self.training = network.training

    @property
    def code(self) -> str:
        """What it does besides what its modules do."""
        return f"{type(self.network[0]).__qualname__} {self.taps} {self.layouts} {self.logits}"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (batch, 3, size, size) to a tensor for each tap, and the logits."""
        outputs: dict[str, Tensor] = {}
        token = _OUTPUTS.set(outputs)
        head: list[Tensor] = []
        try:
            output = finding.first_tensor(self.network[0](images))
            head = [output] if output is not None else []
        except _Reached:
            pass
        finally:
            _OUTPUTS.reset(token)
        read = []
        for tap in self.taps:
            value = outputs[tap]
            if layout := self.layouts.get(tap):
                function, arguments = _canonical(layout, value)
                value = function(*arguments)
            read.append(value)
        return (*read, *head)

    def train(self, mode: bool = True) -> "Stopped":
        """Switch modes, also of the network whose parts are here."""
        super().train(mode)
        self.network[0].training = mode
        return self


_REACHES: "WeakKeyDictionary[nn.Module, dict[str, finding.Reach]]" = WeakKeyDictionary()


def _stopped(backbone: Backbone, taps: Sequence[str], logits: bool) -> Stopped:
    reaches = _REACHES.setdefault(backbone.module, {})
    if missing := [tap for tap in backbone.tap_names if tap not in reaches]:
        reaches.update(finding.reaches(backbone.module, finding.observe(backbone.module, backbone.transforms.size), missing))
    for tap in taps:
        if tap not in reaches:
            raise BackboneError(f"the tap {tap!r} of {backbone.name} never runs or gives no tensor; remove it from `taps`.")
    shared: dict[int, Any] = {id(t): t for t in (*backbone.module.parameters(), *backbone.module.buffers())}
    network = copy.deepcopy(backbone.module, shared)
    if not logits:
        _prune(network, [reaches[tap] for tap in taps])
    deepest = None if logits else max(taps, key=backbone.tap_names.index)
    for tap in set(taps):
        network.get_submodule(tap).register_forward_hook(_Note(tap, tap == deepest))
    return Stopped(network, taps, backbone.layouts, logits).eval()


def _prune(network: nn.Module, reaches: Sequence[finding.Reach]) -> None:
    """Remove what no tap needs: modules that are not entered and whose parameters are not used."""
    used = frozenset[str]().union(*(reach.used for reach in reaches))
    entered = frozenset[str]().union(*(reach.entered for reach in reaches))

    def visit(module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and prefix + name not in used:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            parameters = [f"{prefix}{name}.{n}" for n, _ in child.named_parameters()]
            needed = any(n in used for n in parameters) or any(n == f"{prefix}{name}" or n.startswith(f"{prefix}{name}.") for n in entered)
            if parameters and not needed:
                module._modules[name] = nn.Identity()
            else:
                visit(child, f"{prefix}{name}.")

    visit(network, "")


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

    def fingerprint(trunk: nn.Module) -> str:
        tensors = [*trunk.named_parameters(), *trunk.named_buffers()]
        parts = [f"{name}={digest(tensor)}" for name, tensor in tensors if not name.endswith("num_batches_tracked")]
        blocks = [(name, module) for name, module in trunk.named_modules() if name]
        settings = [f"{n}.{k}={_canonical_text(v, digest)}" for n, m in blocks for k, v in vars(m).items() if k not in _COMMON_ATTRIBUTES]
        kinds = {kind for _, module in blocks for kind in type(module).__mro__}
        code = {_source_code(kind) for kind in kinds if not kind.__module__.startswith(_VERSIONED_PACKAGES)}
        library = [backbone.library] if backbone.library else []
        text = "\n".join([torch.__version__, str(trunk.code), repr(trunk), *library, *sorted(parts), *sorted(settings), *sorted(code)])
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


def _class_and_mean_token(tokens: Tensor, leading: int = 1) -> Tensor:
    """Return the class token beside the mean of the patches' tokens (batch, 2 * channel); register tokens are left out."""
    return torch.cat([tokens[:, 0], tokens[:, leading:].mean(1)], dim=1)


def _token_maps(tokens: Tensor) -> Tensor:
    """Lay out the tokens of patches as maps (batch, channel, side, side)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], side, side)  # len() would fix the batch of an exported graph


def _canonical(layout: str, value: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Return the function that brings a layout into (batch, channel, height, width) or (batch, channel), and its arguments.

    A layout is nhwc, or tokens, which may be followed by the number of class and register tokens before those of the patches.
    """
    if layout == finding.CHANNELS_LAST:
        return _channels_first, (value,)
    leading = layout.removeprefix(finding.TOKENS)
    if leading == "0":
        return _token_maps, (value,)
    return _class_and_mean_token, (value, int(leading)) if leading else (value,)


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
    It is at least the network's minimum. A network that learned positions, or that fails at that size, gets the size of its weights.

    Raises:
        BackboneError: the network cannot take this number: below its minimum, not a multiple of its patches, or not its only size.
    """
    source_size = backbone.transforms.size
    if isinstance(wanted, int):
        if backbone.tried and wanted != source_size and (reason := _refusal(backbone, wanted)):
            raise BackboneError(f"expected data.size {source_size} for {backbone.name}, found {wanted}: {reason}. Set data.size to auto.")
        if wanted < backbone.minimum or wanted % backbone.multiple or (backbone.fixed and wanted != source_size):
            allowed = f"{source_size}" if backbone.fixed else f"at least {backbone.minimum}"
            patches = f" and a multiple of {backbone.multiple}" if backbone.multiple > 1 else ""
            raise BackboneError(f"expected data.size {allowed}{patches} for {backbone.name}, found {wanted}. Set data.size to auto.")
        return wanted
    if backbone.positional:
        return source_size
    size = max(min(source_size, 32 * max(1, -(-round(median_short_side) // 32))), backbone.minimum)
    return source_size if backbone.tried and size != source_size and _refusal(backbone, size) else size


def _refusal(backbone: Backbone, size: int) -> str:
    """Return why the network cannot take images of this size, "" if it can."""
    try:
        with torch.inference_mode():
            backbone.module.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever its code says of a size that it does not take
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""
