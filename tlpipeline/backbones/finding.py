"""Find where a network can be read and cut by watching one forward pass: no table of families, and no traced graph.

A module's output is a place to cut if every path from the image to the network's output goes through it. Such outputs are found on the
autograd graph of one black image. Residual branches, squeeze-and-excitation and attention are inside blocks, so no tap is inside them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MAPS, CHANNELS_LAST, TOKENS = "", "nhwc", "tokens"  # layouts of a tap; TOKENS may be followed by the number of leading tokens


@dataclass
class Call:
    """One call of a module in a forward pass.

    Attributes:
        name: of the module; weighted: whether it has a matrix or kernels of its own.
        output: the tensor that it returned, or the first of several; node: the autograd node of that tensor at that time.
        position: in the order in which modules returned.
    """

    name: str
    weighted: bool
    output: Tensor | None
    node: Any
    position: int


@dataclass
class Observation:
    """One forward pass of one black image.

    Attributes:
        calls: in the order in which modules returned.
        entered: the position at which each module was first entered.
        output: of the whole network; image: its input.
    """

    calls: list[Call] = field(default_factory=list)
    entered: dict[str, int] = field(default_factory=dict)
    output: Any = None
    image: Tensor | None = None


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Let every parameter have a gradient for a moment."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def observe(module: nn.Module, size: int) -> Observation:
    """Pass one black image of `size` pixels through a network in eval mode, and note which module returned what."""
    seen = Observation()
    hooks = []
    for name, child in module.named_modules():
        if not name:
            continue
        weighted = any(p.dim() > 1 for p in child.parameters(recurse=False))

        def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            seen.entered.setdefault(name, len(seen.calls))

        def leave(_module: nn.Module, _inputs: Any, output: Any, name: str = name, weighted: bool = weighted) -> None:
            tensor = first_tensor(output)
            seen.calls.append(Call(name, weighted, tensor, None if tensor is None else tensor.grad_fn, len(seen.calls)))

        hooks += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
    try:
        with _differentiable(module):
            seen.image = torch.zeros(1, 3, size, size, requires_grad=True)
            # An in-place layer may not write into a leaf.
            seen.output = module.eval()(seen.image * 1.0)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor of an output, or the first one of a tuple, a list or a mapping; None if there is none."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((tensor for value in values if (tensor := first_tensor(value)) is not None), None)


# --- cut points -----------------------------------------------------------------------------------------------------------------------


def _ordered(end: Any) -> list[Any]:
    """Return the autograd nodes that lead to `end`, each after all that it is computed from."""
    order: list[Any] = []
    done: set[Any] = set()
    waiting = [(end, False)]
    while waiting:
        node, is_left = waiting.pop()
        if is_left:
            order.append(node)
        elif node not in done:
            done.add(node)
            waiting.append((node, True))
            waiting += [(source, False) for source, _ in node.next_functions if source is not None and source not in done]
    return order


def _on_every_path(image: Tensor, end: Any) -> set[Any]:
    """Return the autograd nodes that every path from the image to `end` goes through: as many paths lead through one as there are."""
    order = _ordered(end)
    into = {node: 0 for node in order}
    for node in order:
        if getattr(node, "variable", None) is image:
            into[node] = 1
        for source, _ in node.next_functions:
            into[node] += into.get(source, 0)
    out = {node: 0 for node in order}
    out[end] = 1
    for node in reversed(order):
        for source, _ in node.next_functions:
            if source is not None:
                out[source] += out[node]
    return {node for node in order if into[node] and into[node] * out[node] == into[end]}


@dataclass(frozen=True)
class Found:
    """A place to read and cut.

    Attributes:
        name: of the module; layout: how its output is laid out; shape: of its output for one image.
    """

    name: str
    layout: str
    shape: tuple[int, ...]

    @property
    def side(self) -> int:
        """Height of the maps, or the root of the number of tokens; 1 for vectors."""
        if len(self.shape) == 2:
            return 1
        return self.shape[1] if self.layout == CHANNELS_LAST else self.shape[2] if len(self.shape) == 4 else math.isqrt(self.shape[1])


def find(module: nn.Module, seen: Observation, prefix_tokens: int | None, is_head: Sequence[str] = ()) -> list[Found]:
    """Return the places to cut, first to last: after each block, and what the head reads.

    Args:
        prefix_tokens: class and register tokens before those of the patches; None infers them from the numbers of tokens.
        is_head: names of the modules of the source head; nothing from the first of them on is a tap.
    """
    end = first_tensor(seen.output)
    assert seen.image is not None
    if end is None or end.grad_fn is None:
        return []
    limit = min((seen.entered[name] for name in is_head if name in seen.entered), default=len(seen.calls))
    passed = _on_every_path(seen.image, end.grad_fn)
    times = Counter(call.name for call in seen.calls)
    kinds = {name: child for name, child in module.named_modules()}
    inside = _inside_blocks(kinds, seen.calls, passed)
    # The calls between two layers with weights give one tap: what the next such layer starts from.
    segments: list[list[_Place]] = [[]]
    at: dict[Any, list[_Place]] = {}  # several modules may return the same tensor, a container last
    for call in seen.calls[:limit]:
        if call.weighted and segments[-1]:
            segments.append([])
        tensor = call.output
        usable = tensor is not None and tensor.dim() in (2, 3, 4) and len(tensor) == 1
        if tensor is not None and usable and call.node in passed and times[call.name] == 1 and call.name not in inside:
            at.setdefault(call.node, segments[-1]).append(_Place(call.name, call.node, tuple(tensor.shape)))
    segments = [segment for segment in segments if segment]
    ends = set(inside.values())  # blocks
    chosen = []
    for segment in segments:
        wide = [place for place in segment if place.is_wide] or segment
        blocks = [place for place in wide if place.name in ends] if segment is not segments[-1] else []
        last = (blocks or wide)[-1]
        same = [place for place in segment if place.node is last.node]
        chosen.append(next((place for place in same if place.name in ends), same[0]))
    shapes = {place.name: place.shape for place in chosen}
    layouts = layouts_of(shapes, prefix_tokens)
    return [Found(name, layouts[name], shape) for name, shape in shapes.items() if name in layouts]


@dataclass(frozen=True)
class _Place:
    name: str
    node: Any
    shape: tuple[int, ...]

    @property
    def is_wide(self) -> bool:
        """Whether there are several positions: maps of more than one pixel, or several tokens."""
        return (len(self.shape) == 4 and self.shape[2] > 1) or (len(self.shape) == 3 and self.shape[1] > 1)


def _inside_blocks(kinds: Mapping[str, nn.Module], calls: Sequence[Call], passed: set[Any]) -> dict[str, str]:
    """Return the modules inside blocks, each with the name of its outermost block.

    A block is a module with a branch inside: a module there is on some paths only. It is no sequence of such blocks. Modules of the same
    class are blocks, too: the first block of a stage often has no shortcut.
    """
    branched = {above for call in calls if call.node is not None and call.node not in passed for above in _above(call.name)}
    lists = {name for name, module in kinds.items() if isinstance(module, nn.Sequential | nn.ModuleList)}
    stages = {above for name in branched if name.rpartition(".")[0] in lists for above in _above(name)}
    # A stage may hold its blocks without a list: all its children are blocks of one class.
    for name in branched:
        children = dict(kinds[name].named_children())
        if len(children) > 1 and len(set(map(type, children.values()))) == 1 and all(f"{name}.{child}" in branched for child in children):
            stages |= {name, *_above(name)}
    of_stages = {type(kinds[name]) for name in stages}
    stages |= {name for name in branched if type(kinds[name]) in of_stages}
    classes = {type(kinds[name]) for name in branched - lists - stages if name}
    blocks = {name for name, module in kinds.items() if name and name not in stages and type(module) in classes}
    return {name: outermost for name in kinds if (outermost := next((a for a in reversed(_above(name)) if a in blocks), ""))}


def _above(name: str) -> list[str]:
    """Return the names of the modules that contain this one, the nearest first, without the network itself."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]


def layouts_of(shapes: Mapping[str, tuple[int, ...]], prefix_tokens: int | None) -> dict[str, str]:
    """Return the layout of each output by its shape for one square image; what is neither maps nor tokens nor vectors is left out."""
    layouts: dict[str, str] = {}
    unclear = []
    for name, shape in shapes.items():
        if len(shape) == 2:
            layouts[name] = MAPS
        elif len(shape) == 3:
            layouts[name] = f"{TOKENS}{_leading(shape[1], prefix_tokens)}"
        elif shape[1] == shape[2] == shape[3]:
            unclear.append(name)
        else:
            layouts[name] = CHANNELS_LAST if shape[1] == shape[2] else MAPS
    others = Counter(layouts[name] for name, shape in shapes.items() if name in layouts and len(shape) == 4)
    layouts.update(dict.fromkeys(unclear, others.most_common(1)[0][0] if others else MAPS))
    return {name: layouts[name] for name in shapes if name in layouts}


def _leading(tokens: int, prefix: int | None) -> int:
    """Return how many of these tokens stand before those of the patches, which form a square."""
    if prefix is not None and tokens > prefix and math.isqrt(tokens - prefix) ** 2 == tokens - prefix:
        return prefix
    return tokens - math.isqrt(tokens) ** 2


def thinned(found: Sequence[Found], most: int) -> list[Found]:
    """Return at most so many taps: the last of each stage, the last of all, and between them others at even distances."""
    if len(found) <= most:
        return list(found)
    ends = [i for i in range(len(found)) if i == len(found) - 1 or found[i + 1].side < found[i].side][-most:]
    others = [i for i in range(len(found)) if i not in ends]
    more = most - len(ends)
    picked = {others[round((k + 0.5) * len(others) / more - 0.5)] for k in range(more)} if more else set()
    return [place for i, place in enumerate(found) if i in picked or i in ends]


# --- what a cut needs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """What a network needs up to a tap: the modules that it has entered, and the parameters that its output depends on."""

    entered: frozenset[str]
    used: frozenset[str]


def reaches(module: nn.Module, seen: Observation, taps: Sequence[str]) -> dict[str, Reach]:
    """Return what the network needs up to each of these modules; those that never return a tensor are left out."""
    names = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
    found = {}
    for call in seen.calls:
        if call.name in taps and call.node is not None:
            variables = [getattr(node, "variable", None) for node in _ordered(call.node)]
            used = frozenset(names[id(variable)] for variable in variables if id(variable) in names)
            entered = frozenset(name for name, position in seen.entered.items() if position <= call.position)
            found[call.name] = Reach(entered, used)
    return found
