"""The catalogue of pretrained networks: `load` builds a network with its taps, at which `taps.cut` cuts it.

There are three kinds of names: `demonstration` (the textbook network, with weights in the package), the name of a torchvision classifier, and
`my_package.nets:resnet20` for your own network. Two attributes describe your own network:

    class ResNet20(nn.Module):
        taps = ("layer1", "layer2", "layer3")                                  # names of submodules, first to last
        transforms = {"size": 32, "mean": (.485, .456, .406), "std": (.229, .224, .225)}

Without `taps`, the top-level blocks are used in the order in which they run. Without `transforms`, ImageNet's at 224 pixels are used.
"""

import importlib
import inspect
import re
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor, nn

from tlpipeline import records
from tlpipeline.backbones import code
from tlpipeline.backbones.taps import Backbone, cut
from tlpipeline.data.transforms import Transforms
from tlpipeline.environment import patience
from tlpipeline.errors import BackboneError, nearest
from tlpipeline.files import file_md5

NONE, DEFAULT = "none", "DEFAULT"
MAX_TAPS = 16
_PACKAGED = Path(__file__).with_name("weights")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- the textbook network -------------------------------------------------------------------------------------------------------------


class Demonstration(nn.Module):
    """The network of the textbook's four cases: three convolutions (edges, shapes, higher features) and three fully connected layers."""

    taps = ("conv1", "conv2", "conv3", "fc1", "fc2")
    transforms: Mapping[str, Any] = {"size": 32, "mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = self._convolution(3, 32)
        self.conv2 = self._convolution(32, 64)
        self.conv3 = self._convolution(64, 128)
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, 128), nn.ReLU())
        self.fc3 = nn.Linear(128, num_classes)

    @staticmethod
    def _convolution(channels: int, features: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, features, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, classes)."""
        return cast(Tensor, self.fc3(self.fc2(self.fc1(self.conv3(self.conv2(self.conv1(images)))))))


# --- torchvision's families -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Where the blocks of a torchvision family end: classes of blocks, and single modules before and after the blocks."""

    names: str
    blocks: tuple[str, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]
    layout: str = ""


# fmt: off
FAMILIES = (
    #      names                            blocks                                          first            last                             layout
    Family(r"alexnet",                      (),                                             ("features.2", "features.5", "features.7", "features.9", "features.12"), ("classifier.2", "classifier.5")),
    Family(r"(wide_)?resn(e|ex)t\d.*",      ("BasicBlock", "Bottleneck"),                   ("maxpool",),    ()),
    Family(r"regnet.*",                     ("ResBottleneckBlock",),                        ("stem",),       ()),
    Family(r"squeezenet.*",                 ("Fire",),                                      ("features.2",), ()),
    Family(r"googlenet",                    ("Inception",),                                 ("maxpool1", "maxpool2"), ()),
    Family(r"inception.*",                  ("InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"), ("maxpool1", "maxpool2"), ()),
    Family(r"mnasnet.*",                    ("_InvertedResidual",),                         ("layers.2", "layers.7"), ("layers.16",)),
    Family(r"mobilenet_v2.*",               ("InvertedResidual",),                          ("features.0",), ("features.-1",)),
    Family(r"mobilenet_v3.*",               ("InvertedResidual",),                          ("features.0",), ("features.-1", "classifier.1")),
    Family(r"shufflenet.*",                 ("InvertedResidual",),                          ("maxpool",),    ("conv5",)),
    Family(r"efficientnet.*",               ("MBConv", "FusedMBConv"),                      ("features.0",), ("features.-1",)),
    Family(r"convnext.*",                   ("CNBlock",),                                   ("features.0",), ()),
    Family(r"densenet.*",                   ("_DenseBlock", "_Transition"),                 ("features.pool0",), ("features.relu5",)),
    Family(r"vgg.*",                        ("MaxPool2d",),                                 (),              ("classifier.1", "classifier.4")),
    Family(r"vit.*",                        ("EncoderBlock",),                              (),              ("encoder.ln",),                 "tokens"),
    Family(r"swin.*",                       ("SwinTransformerBlock", "SwinTransformerBlockV2"), ("features.0",), ("permute",),                "nhwc"),
    Family(r"maxvit.*",                     ("MaxVitLayer",),                               ("stem",),       ("classifier.4",)),
)
# fmt: on


def _family_taps(name: str, module: nn.Module) -> tuple[tuple[str, ...], dict[str, str]] | None:
    family = next((f for f in FAMILIES if re.fullmatch(f.names, name)), None)
    if family is None:
        return None
    if "densenet" in family.names:
        # The source head reads relu(features). As a module, the ReLU can be a tap; applying it twice changes nothing.
        cast(nn.Sequential, module.features).add_module("relu5", nn.ReLU())
    known = dict(module.named_modules())
    blocks = [n for n, m in known.items() if type(m).__name__ in family.blocks]
    last = [n.replace("-1", str(len(cast(nn.Sequential, module.features)) - 1)) if "-1" in n else n for n in family.last]
    taps = [n for n in (*family.first, *blocks, *last) if n in known]
    layouts = {tap: family.layout for tap in taps if family.layout and tap != "permute"}
    return _thinned(taps), layouts


def _thinned(taps: Sequence[str]) -> tuple[str, ...]:
    """Return at most 16 evenly spaced taps, always including the last one."""
    if len(taps) <= MAX_TAPS:
        return tuple(taps)
    indices = {round(i * (len(taps) - 1) / (MAX_TAPS - 1)) for i in range(MAX_TAPS)}
    return tuple(tap for i, tap in enumerate(taps) if i in indices)


# --- loading --------------------------------------------------------------------------------------------------------------------------


def load(
    name: str,
    weights: str,
    *,
    md5: str = NONE,
    code_md5: str = NONE,
    root: Path | None = None,
    kept: Path | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Build a network and load its weights.

    Args:
        name: demonstration, a torchvision classifier, or package.module:callable.
        weights: DEFAULT, a torchvision weights name, none, or a path (relative to root) to a safetensors or weights-only checkpoint.
        md5: expected md5 of the weights file; "none" if weights is not a path.
        code_md5: expected md5 of the code of your own network; "none" takes any.
        root: the workspace: base of a relative path, and importable while your own network is loaded; None is the working folder, which
            is not importable.
        kept: folder with the code of your own network, which is imported from there instead.
        size: input side in pixels for networks built for one size (vision transformers); None is the size of the weights.
        seed: of the random weights for `none`.

    Raises:
        BackboneError: unknown name or weights, a failed download, other code than expected, or weights that do not fit; the first different
            keys are named.
    """
    if name == "demonstration":
        return _demonstration(weights, md5, root or Path(), seed)
    if ":" in name:
        with _importable(root):
            source = own_code(name) if kept is None else code.of_folder(kept)
            if code_md5 not in (NONE, source.md5):
                raise BackboneError(
                    f"expected the code of {name} to have the md5 in backbone.code_md5 ({code_md5}), found {source.md5}. `tlpipeline run` takes the "
                    "new code and trains anew. For `dvc repro`, set backbone.code_md5 to that value."
                )
            return replace(_custom(name, weights, md5, root or Path(), seed, kept), code=source)
    return _torchvision(name, weights, md5, root or Path(), size, seed)


def check_name(name: str) -> None:
    """Check that the catalogue has this network, without building it.

    Raises:
        BackboneError: the name is unknown; the nearest names are suggested.
    """
    if name == "demonstration" or ":" in name:
        return
    import torchvision.models as models

    known = models.list_models(module=models)
    if name not in known:
        raise BackboneError(
            f"expected demonstration, a torchvision classifier or package.module:callable as backbone, found {name!r}; "
            f"{nearest(name, [*known, 'demonstration'])}"
        )


def _demonstration(weights: str, md5: str, root: Path, seed: int) -> Backbone:
    state: Mapping[str, Tensor] | None
    if weights == DEFAULT:
        state = _read_weights(_PACKAGED / "demonstration.safetensors")
        fingerprint = file_md5(_PACKAGED / "demonstration.safetensors")
    else:
        state, fingerprint = _weights(weights, md5, root, "demonstration", (DEFAULT, NONE))
    classes = _rows(state or {}, "fc3.bias") or 10
    return _assemble("demonstration", weights, fingerprint, _seeded(partial(Demonstration, classes), seed), state, fixed=True)


@contextmanager
def _importable(root: Path | None) -> Iterator[None]:
    """Let Python find the modules of a workspace, after all others: a file in it replaces no module of Python or of a package."""
    folder = "" if root is None else str(root.resolve())
    if not folder or folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def code_md5(name: str, root: Path | None) -> str:
    """Return the md5 of a network's code as it can be imported now; "none" for networks of the catalogue and of installed packages.

    Raises:
        BackboneError: your own network cannot be imported.
    """
    if ":" not in name:
        return NONE
    with _importable(root):
        return own_code(name).md5


def own_code(name: str) -> code.Code:
    """Return the code of package.module:callable."""
    package = name.partition(":")[0]
    try:
        return code.of_module(package)
    except ModuleNotFoundError as error:
        raise _not_importable(name, error) from error


def _not_importable(name: str, error: ModuleNotFoundError) -> BackboneError:
    return BackboneError(
        f"expected the network {name} to be importable, found no module {error.name!r}. "
        "Install its package, put its module into the workspace folder, or put its folder on PYTHONPATH."
    )


_AS_IMPORTED: dict[str, str] = {}  # md5 of the code of each module when it was imported


def _import(package: str, kept: Path | None) -> Any:
    """Import the module of your own network: from kept files, or if its code changed since it was imported, anew."""
    if kept is not None:
        return code.load(code.of_folder(kept), package, kept)
    now, base = code.of_module(package), code.base_of(package)
    if base is not None and _AS_IMPORTED.setdefault(package, now.md5) != now.md5:
        return code.load(now, package, base)
    return importlib.import_module(package)


def custom_factory(name: str, kept: Path | None = None) -> Callable[..., Any]:
    """Return the callable that builds your own network, named package.module:callable.

    Args:
        kept: folder with its code, which is imported from there.

    Raises:
        BackboneError: it does not exist, or needs arguments.
    """
    package, _, attribute = name.partition(":")
    try:
        module = _import(package, kept)
        factory: Callable[..., Any] = getattr(module, attribute)
    except ModuleNotFoundError as error:
        raise _not_importable(name, error) from error
    except AttributeError as error:
        raise BackboneError(f"expected {attribute!r} in the module {package}; {nearest(attribute, dir(module))}") from error
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise BackboneError(f"Cannot call {name} without arguments: {error}. Give its arguments defaults.") from error
    return factory


def _custom(name: str, weights: str, md5: str, root: Path, seed: int, kept: Path | None = None) -> Backbone:
    factory = custom_factory(name, kept)
    if weights == DEFAULT:
        raise BackboneError(
            f"expected a weights file for your own network {name}, found DEFAULT. Set backbone.weights to its path, or to none."
        )
    state, fingerprint = _weights(weights, md5, root, name, (NONE,))
    module = _seeded(factory, seed)
    classes = _source_classes(module, state or {})
    if state and classes and "num_classes" in inspect.signature(factory).parameters:
        resized = _seeded(partial(factory, num_classes=classes), seed)
        if all(state[k].shape == v.shape for k, v in resized.state_dict().items() if k in state):
            module = resized  # the source had another number of classes
    return _assemble(name, weights, fingerprint, module, state)


def _rows(state: Mapping[str, Tensor], name: str) -> int:
    """Return the length of a tensor, 0 where it is missing or a scalar."""
    return len(state[name]) if name in state and state[name].dim() else 0


def _source_classes(module: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Return the rows of the module's last tensor in these weights, 0 if they equal the module's own or are missing."""
    name, tensor = next(reversed(module.state_dict().items()), ("", torch.zeros(())))
    loaded = state.get(name, tensor)
    return len(loaded) if tensor.dim() and loaded.dim() and len(loaded) != len(tensor) else 0


def _torchvision(name: str, weights: str, md5: str, root: Path, size: int | None, seed: int) -> Backbone:
    import torchvision.models as models

    check_name(name)
    entries = models.get_model_weights(name)
    members = {member.name: member for member in entries}
    entry = entries.DEFAULT if weights == DEFAULT else members.get(weights)
    state: Mapping[str, Tensor] | None
    if entry is not None:
        state, fingerprint = _download(name, entry), f"{entry} {Path(entry.url).name}"
    else:
        state, fingerprint = _weights(weights, md5, root, name, (DEFAULT, *members, NONE))
    weights_entry = entry or next(iter(entries))
    preset = weights_entry.transforms()
    transforms = Transforms(
        preset.crop_size[0], preset.resize_size[0], tuple(preset.mean), tuple(preset.std), preset.interpolation.value.lower()
    )
    options: dict[str, Any] = {}
    patch = int(name.rsplit("_", 1)[1]) if name.startswith("vit") else 0
    if patch:
        size = size or transforms.size
        if size % patch:
            raise BackboneError(f"expected data.size a multiple of {patch} for {name}, found {size}. Set data.size to auto.")
        options["image_size"] = size
        if state and "encoder.pos_embedding" in state:
            state = dict(models.vision_transformer.interpolate_embeddings(size, patch, dict(state)))
    if state and name.startswith("densenet"):
        # torchvision's weights files name the layers norm.1, its modules norm1.
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): value for key, value in state.items()}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads helped training from scratch. No cut uses them, and a file may contain them or not.
        options |= {"init_weights": False, "transform_input": True, "aux_logits": False}
        state = state and {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    module = _seeded(lambda: models.get_model(name, weights=None, **options), seed)
    head = list(module.state_dict())[-1]
    if (rows := _rows(state or {}, head)) not in (0, len(module.state_dict()[head])):
        options["num_classes"] = rows  # trained on other classes than ImageNet's
        module = _seeded(lambda: models.get_model(name, weights=None, **options), seed)
    positional = name.startswith(("vit", "swin"))
    # torchvision gives only the size of the weights. The true minimum is two patches a side, or one position in the last stage.
    minimum = (2 * patch if patch else 32) if positional else max(weights_entry.meta.get("min_size", (32, 32)))
    fixed = name.startswith("maxvit")  # its windows are built for one size
    # The number of classes follows from the last layer: a forward pass takes seconds in a large network.
    classes = len(module.state_dict()[head]) if state is not None else 0
    backbone = _assemble(name, weights, fingerprint, module, state, transforms, minimum=minimum, fixed=fixed, classes=classes)
    return replace(backbone, positional=positional, multiple=patch or 1)


def _download(name: str, entry: Any) -> Mapping[str, Tensor]:
    seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds or patience())  # torch gives none, and would wait for a silent server for ever
    try:
        return cast(Mapping[str, Tensor], entry.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError, EOFError, LookupError, HTTPException, UnpicklingError) as error:  # unreachable, broken off, damaged
        raise BackboneError(
            f"Cannot download the weights {entry} of {name}: {error}. Set backbone.weights to a weights file that you have, or to none."
        ) from error
    finally:
        socket.setdefaulttimeout(seconds)


def _seeded(factory: Callable[[], Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory()
    if not isinstance(module, nn.Module):
        raise BackboneError(f"expected a torch.nn.Module from the backbone's callable, found {type(module).__name__}.")
    return module


def _weights(weights: str, md5: str, root: Path, name: str, names: Sequence[str]) -> tuple[Mapping[str, Tensor] | None, str]:
    if weights == NONE:
        return None, "random"
    path = root / weights
    if not path.is_file():
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
    return _read_weights(path), actual


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return records.read_tensors(path, "Save the state dict with safetensors.torch.save_file.", BackboneError)
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
    for key in ("state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
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
    return {key.removeprefix("module."): value for key, value in content.items()}


def _assemble(
    name: str,
    weights: str,
    fingerprint: str,
    module: nn.Module,
    state: Mapping[str, Tensor] | None,
    transforms: Transforms | None = None,
    minimum: int = 0,
    fixed: bool = False,
    classes: int | None = None,
) -> Backbone:
    if state is not None:
        _load_weights(name, module, state)
    transforms = transforms or _custom_transforms(name, module)
    family = _family_taps(name, module) if ":" not in name else None
    taps, layouts = family or (_custom_taps(name, module, transforms.size), {})
    module.eval()
    if classes is None:
        output = _test_forward(name, module, transforms.size) if state is not None else None
        classes = output.shape[1] if output is not None and output.dim() == 2 else 0
    if fixed:
        minimum = transforms.size
    backbone = Backbone(name, weights, fingerprint, module, taps, layouts, transforms, minimum or 1, fixed, classes)
    if ":" in name and classes and not _has_head(backbone):
        return replace(backbone, source_classes=0)
    return backbone


def _has_head(backbone: Backbone) -> bool:
    """Return whether there are weights after the last tap: a network that ends with pooled features gives no classes."""
    trunk_parameters = sum(int(p.numel()) for p in cut(backbone, [backbone.tap_names[-1]]).parameters())
    return trunk_parameters < sum(int(p.numel()) for p in backbone.module.parameters())


def unfit_types(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return in words which tensors have a type that PyTorch would convert without a word although it means other numbers."""
    return [
        f"{k} is {str(state[k].dtype).removeprefix('torch.')}, expected {str(v.dtype).removeprefix('torch.')}"
        for k, v in expected.items()
        if k in state and ((v.is_floating_point() and not state[k].is_floating_point()) or state[k].is_complex() != v.is_complex())
    ]


def _load_weights(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = module.state_dict()
    if types := unfit_types(state, expected):
        raise BackboneError(
            f"expected weights of {name} as floating-point numbers, found {len(types)} tensors of another type: {'; '.join(types[:3])}. "
            "Quantized weights cannot be trained: save the model's state dict before it is quantized."
        )
    shapes = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    fitting = OrderedDict((k, v) for k, v in state.items() if k not in expected or v.shape == expected[k].shape)
    # Modules convert the names of their older versions; a file without versions is taken as the present version.
    versions = {"": expected._metadata[""]} if hasattr(expected, "_metadata") else {}
    fitting._metadata = getattr(state, "_metadata", versions)  # type: ignore[attr-defined]
    loaded = module.load_state_dict(fitting, strict=False)
    # Checkpoints from before PyTorch 0.4.1 lack BatchNorm's counters; nothing reads them at a fixed momentum.
    missing = [k for k in loaded.missing_keys if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k in set(loaded.unexpected_keys)]
    if missing or extra or shapes:
        parts = [
            f"{len(missing)} missing, first {', '.join(missing[:3])}" if missing else "",
            f"{len(extra)} unknown, first {', '.join(extra[:3])}" if extra else "",
            f"{len(shapes)} of another shape: {'; '.join(shapes[:3])}" if shapes else "",
        ]
        raise BackboneError(
            f"expected weights of {name}, found another architecture's: {'; '.join(p for p in parts if p)}. "
            "Set backbone.name to the architecture that these weights belong to."
        )


def _test_forward(name: str, module: nn.Module, size: int) -> Tensor:
    """Return the output for two black images."""
    try:
        with torch.inference_mode():
            output = module.eval()(torch.zeros(2, 3, size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise BackboneError(
            f"expected {name} to take images (batch, 3, {size}, {size}), but it failed: {error}. "
            "Set the size of its images in the class: transforms = {'size': ...}."
        ) from error
    if not isinstance(output, Tensor):
        raise BackboneError(
            f"expected {name} to return logits (batch, classes), found {type(output).__name__}. Return only logits from its forward()."
        )
    return output


def _custom_transforms(name: str, module: nn.Module) -> Transforms:
    given = dict(getattr(module, "transforms", {}))
    unknown = set(given) - {"size", "resize", "mean", "std", "interpolation"}
    if unknown:
        raise BackboneError(f"{name}.transforms: unknown key {sorted(unknown)[0]!r}; expected size, resize, mean, std, interpolation.")
    size = int(given.get("size", 224))
    resize = int(given.get("resize", size))
    mean, std = tuple(given.get("mean", _IMAGENET_MEAN)), tuple(given.get("std", _IMAGENET_STD))
    return Transforms(size, resize, mean, std, str(given.get("interpolation", "bilinear")))


def _custom_taps(name: str, module: nn.Module, size: int) -> tuple[str, ...]:
    given = getattr(module, "taps", None)
    if given is not None:
        modules = dict(module.named_modules())
        if not given:
            raise BackboneError(f'expected at least one tap in {name}.taps, found none. Name its blocks: taps = ("layer1", "layer2").')
        for tap in given:
            if tap not in modules:
                raise BackboneError(f"{name}.taps names {tap!r}, but there is no such submodule; {nearest(tap, modules)}")
        return tuple(given)
    order = _blocks_in_order(name, module, size)
    if not order:
        raise BackboneError(
            f'expected taps in {name}, found no top-level block that returns a tensor. Name them in the class: taps = ("layer1", "layer2").'
        )
    return _thinned(order)


def _blocks_in_order(name: str, module: nn.Module, size: int) -> list[str]:
    """Find the top-level blocks (or the parts of a Sequential or list) that run once and return a tensor, without the head."""
    candidates: dict[str, nn.Module] = {}
    for block, child in module.named_children():
        inner = dict(child.named_children()) if isinstance(child, nn.Sequential | nn.ModuleList) else {}
        candidates |= {f"{block}.{n}": m for n, m in inner.items()} or {block: child}
    calls: list[tuple[str, Any]] = []
    hooks = [
        m.register_forward_hook(lambda _m, _i, out, name=n: calls.append((name, out)))  # type: ignore[misc]
        for n, m in candidates.items()
    ]
    try:
        output = _test_forward(name, module, size)
    finally:
        for hook in hooks:
            hook.remove()
    names = [n for n, _ in calls]
    return [
        n
        for n, out in calls
        if names.count(n) == 1
        and isinstance(out, Tensor)
        and out.dim() in (2, 4)
        and out is not output
        and next(candidates[n].parameters(), None) is not None
    ]
