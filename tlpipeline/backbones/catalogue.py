"""The catalogue of pretrained networks: `load` builds a network with its taps, at which `taps.cut` cuts it.

There are five kinds of names: `demonstration` (the textbook network, with weights in the package), the name of a torchvision classifier,
`timm:NAME`, `hf:NAME`, and `my_package.nets:resnet20` for your own network. Two attributes describe your own network:

    class ResNet20(nn.Module):
        taps = ("layer1", "layer2", "layer3")                                  # names of submodules, first to last
        transforms = {"size": 32, "mean": (.485, .456, .406), "std": (.229, .224, .225)}

Without `taps`, the top-level blocks are used in the order in which they run. Without `transforms`, ImageNet's at 224 pixels are used.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import socket
import sys
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

from tlpipeline.backbones import checkpoints, code, contract, finding, packages
from tlpipeline.backbones.checkpoints import Checkpoint
from tlpipeline.backbones.taps import Backbone, cut
from tlpipeline.data.transforms import Transforms
from tlpipeline.environment import patience
from tlpipeline.errors import BackboneError, nearest
from tlpipeline.files import file_md5

NONE, DEFAULT = "none", "DEFAULT"
MAX_TAPS = 16
_PACKAGED = Path(__file__).with_name("weights")
_OWN_FOLDER = "networks"  # of a workspace


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


def is_own(name: str) -> bool:
    """Return whether a name is that of your own network, whose code is not a package's."""
    return ":" in name and not packages.prefix_of(name)


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
        name: demonstration, a torchvision classifier, timm:NAME, hf:NAME, or package.module:callable.
        weights: DEFAULT, a torchvision weights name, none, or a path (relative to root) to a safetensors or weights-only checkpoint.
        md5: expected md5 of the weights file; "none" if weights is not a path.
        code_md5: expected md5 of the code of your own network, or of the configuration of a Hugging Face network; "none" takes any.
        root: the workspace: base of a relative path, and importable while your own network is loaded; None is the working folder.
        kept: folder with the code of your own network, or with a configuration, which is used instead.
        size: input side in pixels for networks built for one size (vision transformers); None is the size of the weights.
        seed: of the random weights for `none`.

    Raises:
        BackboneError: unknown name or weights, a failed download, other code than expected, or weights that do not fit; the first different
            keys are named.
    """
    if name == "demonstration":
        return _demonstration(weights, md5, root or Path(), seed)
    if packages.prefix_of(name):
        return _of_package(name, weights, md5, code_md5, root or Path(), kept, size, seed)
    if ":" in name:
        with _importable(root):
            source = own_code(name) if kept is None else code.of_folder(kept)
            _require_md5(name, "code", code_md5, source.md5)
            return replace(_custom(name, weights, md5, root or Path(), seed, kept), code=source)
    return _torchvision(name, weights, md5, root or Path(), size, seed)


def _require_md5(name: str, what: str, expected: str, actual: str) -> None:
    if expected not in (NONE, actual):
        raise BackboneError(
            f"expected the {what} of {name} to have the md5 in backbone.code_md5 ({expected}), found {actual}. `tlpipeline run` takes the "
            f"new {what} and trains anew. For `dvc repro`, set backbone.code_md5 to that value."
        )


def check_name(name: str) -> None:
    """Check that the catalogue has this network, without building it.

    Raises:
        BackboneError: the name is unknown; the nearest names are suggested.
    """
    if name == "demonstration" or is_own(name):
        return
    if packages.prefix_of(name):
        packages.check_name(name)
        return
    import torchvision.models as models

    known = models.list_models(module=models)
    if name not in known:
        raise BackboneError(
            f"expected demonstration, a torchvision classifier, timm:NAME, hf:OWNER/NAME or package.module:callable as backbone, found {name!r}; "
            f"{_meant(name) or nearest(name, [*known, 'demonstration'])}"
        )


def _meant(name: str) -> str:
    """Return what a name without its prefix, or with another sign for the colon, may mean; "" if nothing is known."""
    head, sign, rest = name.partition("/")
    if sign and head in ("timm", "hf", "torchvision"):
        return f"did you mean {rest if head == 'torchvision' else f'{head}:{rest}'}?"
    if sign:
        return f"did you mean hf:{name}?"
    module, dot, attribute = name.rpartition(".")
    if dot and attribute.isidentifier():
        with _importable(None):
            try:
                if importlib.util.find_spec(module) is not None:
                    return f"did you mean {module}:{attribute}?"
            except (ModuleNotFoundError, ValueError):
                return ""
    return ""


def _demonstration(weights: str, md5: str, root: Path, seed: int) -> Backbone:
    if weights == DEFAULT:
        path = _PACKAGED / "demonstration.safetensors"
        checkpoint = checkpoints.find(path.name, file_md5(path), path.parent, "demonstration", ())
    else:
        checkpoint = checkpoints.find(weights, md5, root, "demonstration", (DEFAULT, NONE))
    return _assemble("demonstration", weights, _Builder(lambda n: Demonstration(n or 10), seed), checkpoint, fixed=True)


@contextmanager
def _importable(root: Path | None) -> Iterator[None]:
    """Let Python find the modules of a workspace, of its folder networks, and of the working folder.

    They come after all others: a file there replaces no module of Python or of a package.
    """
    places = [] if root is None else [root.resolve(), root.resolve() / _OWN_FOLDER]
    added = [folder for folder in dict.fromkeys([*map(str, places), str(Path.cwd())]) if folder not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def code_md5(name: str, root: Path | None) -> str:
    """Return the md5 of a network's code as it can be imported now, or of the configuration of a Hugging Face network.

    It is "none" for other networks of the catalogue, and for those of installed packages.

    Raises:
        BackboneError: your own network cannot be imported, or the configuration cannot be read.
    """
    if packages.prefix_of(name):
        return packages.config_md5(name, root)
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
        "Install its package, put its module into the workspace or into its folder networks, or put its folder on PYTHONPATH."
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
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise BackboneError(f"expected {attribute!r} in the module {package}; {nearest(attribute, public)}") from error
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
    checkpoint = checkpoints.find(weights, md5, root, name, (NONE,))
    has_classes = "num_classes" in inspect.signature(factory).parameters

    def make(classes: int | None) -> Any:
        try:
            return factory() if classes is None or not has_classes else factory(num_classes=classes)
        except Exception as error:  # whatever the factory raises
            raise BackboneError(f"Cannot build {name}: it raised {type(error).__name__}: {error}. Mend its code.") from error

    build = _Builder(make, seed)
    return _assemble(name, weights, build, checkpoint)


def _of_package(name: str, weights: str, md5: str, code_md5: str, root: Path, kept: Path | None, size: int | None, seed: int) -> Backbone:
    source = packages.source(name, size, root, kept)
    _require_md5(name, "configuration", code_md5, source.code.md5 if source.code else NONE)
    classes: int | None = None
    if weights == DEFAULT:
        with torch.random.fork_rng(devices=[]):
            module, has_head = source.pretrained()
        fingerprint = hashlib.md5(usedforsecurity=False)
        for key, value in sorted(module.state_dict().items()):
            fingerprint.update(key.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        checkpoint = Checkpoint(None, fingerprint.hexdigest())
        build = _Builder(lambda _: module, seed)
        classes = _outputs(module) if has_head else 0
    else:
        checkpoint = checkpoints.find(weights, md5, root, name, (DEFAULT, NONE))
        build = _Builder(source.build, seed)
    backbone = _assemble(name, weights, build, checkpoint, source.transforms, source=source, size=size, classes=classes)
    learned = [n for n, _ in (*backbone.module.named_parameters(), *backbone.module.named_buffers())]
    positional = source.fixed or any(re.search(r"pos_emb|position_emb|relative_position|rel_pos", n) for n in learned)
    return replace(
        backbone, positional=positional, multiple=source.multiple, code=source.code, library=source.library, tried=not source.fixed
    )


def _outputs(module: nn.Module) -> int:
    """Return the number of classes that a network of a package knows."""
    config = getattr(module, "config", None)
    return int(getattr(module, "num_classes", 0) if config is None else getattr(config, "num_labels", 0))


def _torchvision(name: str, weights: str, md5: str, root: Path, size: int | None, seed: int) -> Backbone:
    import torchvision.models as models

    check_name(name)
    entries = models.get_model_weights(name)
    members = {member.name: member for member in entries}
    entry = entries.DEFAULT if weights == DEFAULT else members.get(weights)
    if entry is not None:
        checkpoint = Checkpoint(_download(name, entry), f"{entry} {Path(entry.url).name}")
    else:
        checkpoint = checkpoints.find(weights, md5, root, name, (DEFAULT, *members, NONE))
    state = checkpoint.state
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
    build = _Builder(lambda n: models.get_model(name, weights=None, **options, **({} if n is None else {"num_classes": n})), seed)
    positional = name.startswith(("vit", "swin"))
    # torchvision gives only the size of the weights. The true minimum is two patches a side, or one position in the last stage.
    minimum = (2 * patch if patch else 32) if positional else max(weights_entry.meta.get("min_size", (32, 32)))
    fixed = name.startswith("maxvit")  # its windows are built for one size
    backbone = _assemble(name, weights, build, replace(checkpoint, state=state), transforms, minimum=minimum, fixed=fixed)
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


@dataclass(frozen=True)
class _Builder:
    """Makes a network with random weights by a seed, for a number of classes; None is its own number."""

    factory: Callable[[int | None], Any]
    seed: int

    def __call__(self, classes: int | None = None) -> nn.Module:
        return _seeded(partial(self.factory, classes), self.seed)


def _assemble(
    name: str,
    weights: str,
    build: _Builder,
    checkpoint: Checkpoint,
    transforms: Transforms | None = None,
    minimum: int = 0,
    fixed: bool = False,
    source: packages.Source | None = None,
    size: int | None = None,
    classes: int | None = None,
) -> Backbone:
    module, own = build(), is_own(name)
    if own:
        contract.check_module(name, module)
    state = checkpoint.state
    if state is not None:
        module, state = _with_classes(module, state, build, source)
    transforms = transforms or contract.transforms_of(name, module)
    module.eval()
    if own:
        contract.check_forward(name, module, transforms.size)
    taps, layouts = _taps(name, module, transforms.size if size is None or source is None or not source.fixed else size, source)
    contract.check_tensors(name, module)
    backbone = Backbone(
        name, weights, checkpoint.fingerprint, module, taps, layouts, transforms, transforms.size if fixed else minimum or 1, fixed,
        classes or 0, traced=source is None, tried=own, remarks=checkpoint.remarks,
    )  # fmt: skip
    if state is None:
        return backbone
    has_head, remarks = checkpoints.load(name, module, state, lambda: cut(backbone, taps[-1:]).state_dict().keys())
    backbone = replace(backbone, remarks=(*backbone.remarks, *remarks))
    if not has_head:
        return backbone
    if source is not None:
        return replace(backbone, source_classes=_outputs(module))
    if not own:  # a forward pass takes seconds in a large network
        head = list(module.state_dict().values())[-1]
        return replace(backbone, source_classes=len(head))
    output = contract.check_forward(name, module, transforms.size)
    classes = output.shape[1] if output.dim() == 2 and _has_head(backbone) else 0
    return replace(backbone, source_classes=classes)


def _with_classes(
    module: nn.Module, state: Mapping[str, Tensor], build: _Builder, source: packages.Source | None
) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """Return the network with as many classes as its weights were trained on, and the weights under its names."""

    def named(module: nn.Module) -> Mapping[str, Tensor]:
        renamed = checkpoints.aligned(state, module.state_dict().keys())
        return renamed if source is None else source.convert(renamed, module)

    fitting = named(module)
    for classes in checkpoints.other_classes(fitting, module.state_dict()):
        resized = build(classes)
        again = named(resized)
        if all(again[k].shape == v.shape for k, v in resized.state_dict().items() if k in again):
            return resized, again  # the source had another number of classes
    return module, fitting


def _taps(name: str, module: nn.Module, size: int, source: packages.Source | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the taps of a network, and the layouts of those whose output is neither maps nor vectors."""
    if source is None:
        family = None if is_own(name) else _family_taps(name, module)
        if family is not None:
            return family
        taps = _custom_taps(name, module, size)
        return taps, contract.layouts_of(name, module, taps, size) if is_own(name) else {}
    observed = finding.observe(module, size)
    places = finding.thinned(finding.find(module, observed, source.prefix_tokens(module), source.head(module)), MAX_TAPS)
    if not places:
        raise BackboneError(f"expected blocks in {name} after which it can be cut, found none. Choose another network.")
    return tuple(place.name for place in places), {place.name: place.layout for place in places if place.layout}


def _has_head(backbone: Backbone) -> bool:
    """Return whether there are weights after the last tap: a network that ends with pooled features gives no classes."""
    trunk_parameters = sum(int(p.numel()) for p in cut(backbone, [backbone.tap_names[-1]]).parameters())
    return trunk_parameters < sum(int(p.numel()) for p in backbone.module.parameters())


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
        output = contract.check_forward(name, module, size)
    finally:
        for hook in hooks:
            hook.remove()
    names = [n for n, _ in calls]
    return [
        n
        for n, out in calls
        if names.count(n) == 1
        and isinstance(out, Tensor)
        and out.dim() in (2, 3, 4)
        and out is not output
        and next(candidates[n].parameters(), None) is not None
    ]
