"""Weights files as people have them: wrapped, prefixed, averaged, without the old head or with another one. Nothing is loaded that can execute."""

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlpipeline import records
from tlpipeline.errors import BackboneError, nearest
from tlpipeline.files import file_md5

NONE = "none"
# Averages over the last training steps are what their training reports and publishes, so they are preferred (docs/decisions/0028).
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict_ema", "ema_model", "ema", "teacher")
_PLAIN = ("state_dict", "model", "net", "model_state_dict", "model_state", "network", "weights", "params", "student")
_DEPTH = 4  # components of a prefix, as in module._orig_mod.backbone.encoder.
# What some versions of a network store beside its weights, and compute anew.
_BOOKKEEPING = ("n_averaged", "num_batches_tracked", "position_ids", "relative_position_index", "relative_coords_table", "attn_mask")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a weights file.

    Attributes:
        state: by name, as the file has them; None for random weights.
        fingerprint: md5 of the file, or "random".
        remarks: sentences on what else is in the file.
    """

    state: Mapping[str, Tensor] | None
    fingerprint: str
    remarks: tuple[str, ...] = ()


def find(weights: str, md5: str, root: Path, name: str, names: Sequence[str]) -> Checkpoint:
    """Return the checkpoint that `backbone.weights` names: none, or a path relative to `root`.

    Args:
        md5: that the file must have; names: the other values that are possible for this network.

    Raises:
        BackboneError: there is no such file, it has another md5, or it is no checkpoint.
    """
    if weights == NONE:
        return Checkpoint(None, "random")
    path = root / weights
    if not path.is_file():
        if "/" in weights or re.search(r"\.(safetensors|pth?|bin|ckpt|pkl|tar|npz|h5)$", weights, re.IGNORECASE):
            raise BackboneError(
                f"expected {', '.join(names)} or a file as weights of {name}, found no file {path}. Mend the path in backbone.weights, or "
                "fetch the file (`dvc pull`)."
            )
        raise BackboneError(f"expected {', '.join(names)} or a file as weights of {name}, found {weights!r}; {nearest(weights, names)}")
    try:
        actual = file_md5(path)
    except PermissionError as error:
        raise BackboneError(
            f"expected a weights file that may be read at {path}, found {error.strerror}. Change its mode or owner."
        ) from error
    if md5 != actual:
        raise BackboneError(
            f"expected the weights file {weights} to have the md5 in backbone.weights_md5 ({md5}), found {actual}. "
            "If this is the right file, set backbone.weights_md5 to that value, so that results can be traced to it."
        )
    state, remarks = read(path)
    return Checkpoint(state, actual, remarks)


def read(path: Path) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a file by their names, and remarks on what was left out.

    The content decides how it is read, not the ending: safetensors, or a checkpoint that `torch.load(weights_only=True)` reads.

    Raises:
        BackboneError: it cannot be read without executing code, or holds no state dict.
    """
    if path.suffix.lower() == ".safetensors" or _is_safetensors(path):
        return records.read_tensors(path, "Save the state dict with safetensors.torch.save_file.", BackboneError), ()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        # PyTorch's message continues with advice on how to execute the code.
        reason = (
            (str(error) or "empty").split("WeightsUnpickler error:")[-1].strip().split("\n")[0].split(" Please use")[0].rstrip(".")[:200]
        )
        raise BackboneError(
            f"expected tensors in {path}, but it cannot be read without executing code or is damaged: {reason}. "
            "Save the state dict with safetensors.torch.save_file."
        ) from error
    return _unwrapped(content, path)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: the length of a JSON header, then that header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _unwrapped(content: Any, path: Path) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    remarks: list[str] = []
    while isinstance(content, dict) and (inner := _nested(content)):
        key = next((key for key in (*_AVERAGED, *_PLAIN) if key in inner), inner[0] if len(inner) == 1 else "")
        if not key:
            raise BackboneError(
                f"expected one state dict in {path}, found {len(inner)}: {', '.join(inner[:6])}. Save the one that you mean by itself."
            )
        if others := [other for other in inner if other != key]:
            kind = ", averaged weights," if key in _AVERAGED else ""
            remarks.append(f"{path.name}: took {key}{kind} and left out {', '.join(others)}")
        content = content[key]
    if not isinstance(content, dict):
        raise BackboneError(
            f"expected a state dict (names to tensors) in {path}, found {type(content).__name__}. Save `model.state_dict()`."
        )
    for key, value in content.items():
        # A meta tensor has a shape and no numbers.
        usable = isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not usable:
            what = f"a tensor on {value.device} of layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise BackboneError(
                f"expected a state dict (names to dense tensors on the CPU) in {path}, found {what} under {key!r}. Save `model.state_dict()`."
            )
    return content, tuple(remarks)


def _nested(content: Mapping[Any, Any]) -> list[str]:
    """Return the keys under which a checkpoint has state dicts; none if it is one itself."""
    if any(isinstance(value, Tensor) and value.dim() for value in content.values()):
        return []

    def holds_tensors(value: Any) -> bool:
        if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
            return False
        return any(isinstance(inner, Tensor) for inner in value.values()) or bool(_nested(value))

    known = [key for key in (*_AVERAGED, *_PLAIN) if isinstance(content.get(key), dict)]
    return known or [key for key, value in content.items() if isinstance(key, str) and holds_tensors(value)]


# --- fitting a file to a network ------------------------------------------------------------------------------------------------------


def aligned(state: Mapping[str, Tensor], expected: Collection[str]) -> Mapping[str, Tensor]:
    """Return the tensors under the names that a network has: without the prefix, or with the one, by which most names agree."""
    names = set(expected)
    agree = Counter({("", ""): sum(key in names for key in state)})
    added = {f"{name.split('.')[0]}." for name in names if "." in name}
    for key in state:
        parts = key.split(".")
        for depth in range(1, min(_DEPTH, len(parts) - 1) + 1):
            agree[".".join(parts[:depth]) + ".", ""] += ".".join(parts[depth:]) in names
        for prefix in added:
            agree["", prefix] += prefix + key in names
    best, count = max(agree.items(), key=lambda item: (item[1], -len(item[0][0]) - len(item[0][1])))
    if count <= agree["", ""]:
        return state
    strip, add = best
    if add:
        renamed = {add + key if add + key in names else key: value for key, value in state.items()}
    else:
        renamed = {key.removeprefix(strip): value for key, value in state.items() if key.startswith(strip)}
        renamed |= {key: value for key, value in state.items() if not key.startswith(strip) and key not in renamed}
    ordered = OrderedDict(renamed)
    if (metadata := getattr(state, "_metadata", None)) is not None and not strip and not add:
        ordered._metadata = metadata  # type: ignore[attr-defined]
    return ordered


def other_classes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of classes that these weights may have been trained on, if not those that are expected.

    Only the first dimension of a head's tensors depends on it, wherever the head is registered.
    """
    sizes = Counter(
        len(state[key])
        for key, value in expected.items()
        if key in state
        and state[key].dim() == value.dim() > 0
        and state[key].shape[1:] == value.shape[1:]
        and len(state[key]) != len(value)
    )
    return [size for size, _ in sizes.most_common() if size]


def unfit_types(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return in words which tensors have a type that PyTorch would convert without a word although it means other numbers."""
    return [
        f"{k} is {str(state[k].dtype).removeprefix('torch.')}, expected {str(v.dtype).removeprefix('torch.')}"
        for k, v in expected.items()
        if k in state and ((v.is_floating_point() and not state[k].is_floating_point()) or state[k].is_complex() != v.is_complex())
    ]


def load(name: str, module: nn.Module, state: Mapping[str, Tensor], kept: Callable[[], Collection[str]]) -> tuple[bool, tuple[str, ...]]:
    """Load weights into a network. Everything up to its last tap must be in the file; the old head is replaced anyway and may be missing.

    Args:
        kept: returns the names of the tensors up to the last tap.

    Returns:
        Whether the source head was loaded, and remarks on what was ignored.

    Raises:
        BackboneError: the weights are of another architecture; the first different names are said.
    """
    expected = module.state_dict()
    if types := unfit_types(state, expected):
        raise BackboneError(
            f"expected weights of {name} as floating-point numbers, found {len(types)} tensors of another type: {'; '.join(types[:3])}. "
            "Quantized weights cannot be trained: save the model's state dict before it is quantized."
        )
    unfit = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    fitting = OrderedDict((k, v) for k, v in state.items() if k not in unfit)
    # Modules convert the names of their older versions; a file without versions is taken as the present version.
    versions = {"": expected._metadata[""]} if hasattr(expected, "_metadata") else {}
    fitting._metadata = getattr(state, "_metadata", versions)  # type: ignore[attr-defined]
    loaded = module.load_state_dict(fitting, strict=False)
    # Checkpoints from before PyTorch 0.4.1 lack BatchNorm's counters; nothing reads them at a fixed momentum.
    missing = [k for k in loaded.missing_keys if k not in state and not k.endswith(_BOOKKEEPING)]
    extra = [k for k in state if k in set(loaded.unexpected_keys) and not k.endswith(_BOOKKEEPING)]
    if not (missing or extra or unfit):
        return True, ()
    trunk = frozenset(kept())
    head = [key for key in expected if key not in trunk and not key.endswith(_BOOKKEEPING)]
    rows = {len(state[key]) for key in other_head(state, expected, head)}
    wrong_shapes = [key for key in unfit if key in trunk or len(rows) != 1]
    wrong_missing = [key for key in missing if key in trunk]
    wrong_extra = [key for key in extra if not _is_beside(key, module, trunk)]
    if wrong_missing or wrong_extra or wrong_shapes:
        shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}" for k in wrong_shapes]
        parts = [
            f"{len(wrong_missing)} missing, first {', '.join(wrong_missing[:3])}" if wrong_missing else "",
            f"{len(extra)} unknown, first {', '.join((wrong_extra or extra)[:3])}" if extra else "",
            f"{len(shapes)} of another shape: {'; '.join(shapes[:3])}" if shapes else "",
        ]
        raise BackboneError(
            f"expected weights of {name}, found another architecture's: {'; '.join(p for p in parts if p)}. "
            "Set backbone.name to the architecture that these weights belong to."
        )
    remarks = []
    if missing or unfit:
        remarks.append(f"the weights file has no head that fits {name}: what the source network knew of its classes is not measured")
    if extra:
        remarks.append(f"the weights file has {len(extra)} tensors that {name} has not, and they are ignored: {', '.join(extra[:3])}")
    return not (missing or unfit), tuple(remarks)


def other_head(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: Sequence[str]) -> list[str]:
    """Return the tensors of a head if all of them have another number of rows and are the same otherwise; else none."""
    there = [key for key in head if key in state]
    differ = [key for key in there if state[key].dim() == expected[key].dim() > 0 and state[key].shape[1:] == expected[key].shape[1:]]
    return differ if len(differ) == len(there) and all(len(state[key]) != len(expected[key]) for key in differ) else []


def _is_beside(key: str, module: nn.Module, trunk: Collection[str]) -> bool:
    """Return whether an unknown tensor belongs to a head or a projector beside the network, and not to blocks that the network has not.

    It leaves the network's tree of modules at its root, at the root of the only module that holds all that is kept, or in the old head.
    """
    modules = dict(module.named_modules())
    parts = key.split(".")
    depth = max(depth for depth in range(len(parts)) if ".".join(parts[:depth]) in modules)
    parent, leaves = ".".join(parts[:depth]), parts[depth]
    if parent and not any(name.startswith(f"{parent}.") for name in trunk):
        return True  # inside the old head
    roots = {name.split(".")[0] for name in trunk}
    if parent and roots != {parent}:
        return False
    stem = leaves.rstrip("0123456789")
    siblings = {name for name, _ in modules[parent].named_children()}
    # layer5 beside layer1 to layer4 is one more block.
    return stem != "" and not any(name != leaves and name.rstrip("0123456789") == stem and name[-1:].isdigit() for name in siblings)
