"""Networks of other packages: `timm:NAME` and `hf:NAME`. Both packages are optional.

Their weights come from their hub, from a file, or are random. Only tensors are loaded: `trust_remote_code` is never true.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tlpipeline.backbones.code import Code, of_files
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError, nearest

TIMM, HF = "timm", "hf"
_PACKAGE = {TIMM: "timm", HF: "transformers"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Source:
    """A network of a package, before its weights are loaded.

    Attributes:
        build: makes it with random weights, for a number of classes; None is its own number.
        pretrained: makes it with the weights of the hub; returns it and whether its head has weights.
        convert: brings the names in a weights file to those of the network.
        transforms: of its weights.
        head: names the modules of its source head.
        prefix_tokens: class and register tokens, None where that follows from the number of tokens.
        fixed: whether it is made for one size, which its settings name.
        multiple: input sides are multiples of this number of pixels.
        library: package, version and architecture.
        code: its configuration, where that is a file.
    """

    build: Callable[[int | None], nn.Module]
    pretrained: Callable[[], tuple[nn.Module, bool]]
    convert: Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]]
    transforms: Transforms
    head: Callable[[nn.Module], tuple[str, ...]]
    prefix_tokens: Callable[[nn.Module], int | None]
    fixed: bool
    multiple: int
    library: str
    code: Code | None = None


def prefix_of(name: str) -> str:
    """Return timm or hf if a name is that of a network of a package, else ""."""
    prefix, colon, rest = name.partition(":")
    return prefix if colon and rest and prefix in _PACKAGE else ""


def package_of(name: str) -> str:
    """Return the package that makes a network of this name, "" for others."""
    return _PACKAGE.get(prefix_of(name), "")


def require(prefix: str) -> ModuleType:
    """Return the package of a prefix, imported.

    Raises:
        BackboneError: it is not installed.
    """
    package = _PACKAGE[prefix]
    try:
        with _quiet():
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise BackboneError(
            f"expected the package {package} for networks named {prefix}:NAME, found that it is not installed. Run `pip install 'tlpipeline[{package}]'`."
        ) from error


def source(name: str, size: int | None, root: Path, kept: Path | None) -> Source:
    """Return a network of a package.

    Args:
        size: input side in pixels for networks that are made for one size; None is their own.
        root: folder that a relative path of a configuration starts from.
        kept: folder with the configuration that is kept with a model.

    Raises:
        BackboneError: the package is not installed, or has no such network.
    """
    prefix, _, rest = name.partition(":")
    return _timm(rest, size) if prefix == TIMM else _hf(rest, size, root, kept)


def check_name(name: str) -> None:
    """Check that a network exists, as far as that is known without a hub.

    Raises:
        BackboneError: the package is not installed, or it has no network of this name.
    """
    prefix, _, rest = name.partition(":")
    require(prefix)
    if prefix == TIMM:
        _timm_config(rest)


def config_md5(name: str, root: Path | None) -> str:
    """Return the md5 of the configuration of a Hugging Face network; "none" for networks whose package has it."""
    prefix, _, rest = name.partition(":")
    if prefix != HF:
        return "none"
    return _hf_files(rest, root or Path(), None)[2].md5


def _unreachable(what: str, name: str, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return BackboneError(
        f"Cannot fetch the {what} of {name} from its hub: {reason}. "
        + (
            "Set backbone.weights to a weights file that you have, or to none."
            if what == "weights"
            else "Name a folder that has its config.json: hf:FOLDER."
        )
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of the packages from the terminal."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_TELEMETRY")}
    os.environ.update({"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- timm -----------------------------------------------------------------------------------------------------------------------------


def _timm_config(rest: str) -> Any:
    timm = require(TIMM)
    architecture, _, tag = rest.partition(".")
    if not timm.is_model(architecture):
        raise BackboneError(f"expected a network of timm {timm.__version__}, found {rest!r}; {nearest(architecture, timm.list_models())}")
    tags = sorted(name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*"))
    if tag and tag not in tags:
        raise BackboneError(f"expected weights of timm's {architecture}, found the tag {tag!r}; {nearest(tag, tags)}")
    return timm.get_pretrained_cfg(rest)


def _timm(rest: str, size: int | None) -> Source:
    timm = require(TIMM)
    config = _timm_config(rest)
    own = int(config.input_size[-1])
    fixed = bool(config.fixed_input_size)
    transforms = Transforms(
        own, int(own / (config.crop_pct or 1)), tuple(config.mean), tuple(config.std), str(config.interpolation).lower()
    )
    options: dict[str, Any] = {"img_size": size} if fixed and size not in (None, own) else {}

    def make(pretrained: bool, **more: Any) -> nn.Module:
        try:
            made: nn.Module = timm.create_model(rest, pretrained=pretrained, **options, **more)
        except (TypeError, AssertionError, ValueError) as error:
            if not options:
                raise
            raise BackboneError(
                f"expected data.size {own} for timm:{rest}, found {size}: {' '.join(str(error).split()) or type(error).__name__}. "
                "Set data.size to auto."
            ) from error
        return made

    def build(classes: int | None) -> nn.Module:
        return make(False, **({} if classes is None else {"num_classes": classes}))

    def pretrained() -> tuple[nn.Module, bool]:
        if not (config.has_weights if hasattr(config, "has_weights") else config.hf_hub_id or config.url):
            tags = sorted(timm.list_pretrained(f"{rest.partition('.')[0]}.*"))
            raise BackboneError(
                f"expected weights of timm:{rest} on its hub, found none. Set backbone.weights to a weights file or to none"
                + (f", or name one of {', '.join(tags[:6])}." if tags else ".")
            )
        try:
            with _quiet():
                made = make(True)
        except BackboneError:
            raise
        except Exception as error:  # whatever the hub's client raises
            raise _unreachable("weights", f"timm:{rest}", error) from error
        return made, int(getattr(made, "num_classes", 0)) > 0

    def convert(state: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
        expected = module.state_dict()
        if all(key in state and state[key].shape == value.shape for key, value in expected.items()):
            return state
        filtered = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        if filtered is None:
            return state
        try:
            converted: Mapping[str, Tensor] = filtered(dict(state), module)
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError, AssertionError, IndexError):
            return state  # of another network: loading says which tensors differ
        return converted

    def head(module: nn.Module) -> tuple[str, ...]:
        named = module.pretrained_cfg.get("classifier") if isinstance(module.pretrained_cfg, dict) else None  # type: ignore[operator]
        return (named,) if isinstance(named, str) else tuple(named or ())

    def tokens(module: nn.Module) -> int | None:
        count = getattr(module, "num_prefix_tokens", None)
        return count if isinstance(count, int) else None

    return Source(build, pretrained, convert, transforms, head, tokens, fixed, 1, f"timm {timm.__version__} {rest.partition('.')[0]}")


# --- Hugging Face ---------------------------------------------------------------------------------------------------------------------


def _hf_files(rest: str, root: Path, kept: Path | None) -> tuple[dict[str, Any], dict[str, Any], Code]:
    """Return the configuration of a network, that of its images, and the files that they come from."""
    require(HF)
    from transformers import CONFIG_MAPPING

    folder = kept or next((place for place in (root / rest, Path(rest)) if (place / CONFIG).is_file()), None)
    if folder is None and rest in CONFIG_MAPPING:
        return {"model_type": rest}, {}, Code({}, "none")
    if folder is None and (root / rest).is_dir():
        raise BackboneError(f"expected {CONFIG} in the folder {root / rest}, found none. Save the network with save_pretrained().")
    if folder is None and "/" not in rest:
        raise BackboneError(
            f"expected hf:OWNER/NAME, hf:FOLDER or hf:TYPE, found {rest!r}; {nearest(rest, [str(kind) for kind in CONFIG_MAPPING])}"
        )
    files = {CONFIG: folder / CONFIG, PROCESSOR: folder / PROCESSOR} if folder is not None else _hf_fetched(rest)
    files = {file: path for file, path in files.items() if path.is_file()}
    return _json(files[CONFIG]), _json(files[PROCESSOR]) if PROCESSOR in files else {}, of_files(files)


def _hf_fetched(rest: str) -> dict[str, Path]:
    from transformers.utils.hub import cached_file

    files = {}
    try:
        with _quiet():
            for name, required in ((CONFIG, True), (PROCESSOR, False)):
                path = cached_file(rest, name, _raise_exceptions_for_missing_entries=required)
                if path is not None:
                    files[name] = Path(path)
    except Exception as error:  # whatever the hub's client raises
        raise _unreachable("configuration", f"hf:{rest}", error) from error
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BackboneError(f"expected JSON in {path}, but: {error}. Fetch the file again.") from error
    if not isinstance(content, dict):
        raise BackboneError(f"expected a JSON object in {path}, found {type(content).__name__}. Fetch the file again.")
    return content


def _hf(rest: str, size: int | None, root: Path, kept: Path | None) -> Source:
    transformers = require(HF)
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForImageClassification

    content, processor, files = _hf_files(rest, root, kept)
    kind = str(content.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise BackboneError(
            f"expected a network that transformers {transformers.__version__} has itself, found the type {kind!r} in hf:{rest}. Code from the hub "
            "is not run: install a version of transformers that knows it, or write your own network (docs/backbones.md)."
        )
    config = CONFIG_MAPPING[kind].from_dict(content)
    classifies = type(config) in AutoModelForImageClassification._model_mapping
    auto = AutoModelForImageClassification if classifies else AutoModel

    def build(classes: int | None) -> nn.Module:
        made = CONFIG_MAPPING[kind].from_dict(content)
        if classes is not None:
            made.num_labels = classes
        try:
            with _quiet():
                module: nn.Module = auto.from_config(made)  # type: ignore[no-untyped-call]
        except (ValueError, KeyError) as error:
            raise BackboneError(
                f"expected a network for images, found hf:{rest} of the type {kind!r}: {' '.join(str(error).split())[:200]}. Name another one."
            ) from error
        return module

    def pretrained() -> tuple[nn.Module, bool]:
        folder = kept or next((place for place in (root / rest, Path(rest)) if (place / CONFIG).is_file()), None)
        try:
            with _quiet():
                module, loading = auto.from_pretrained(
                    str(folder) if folder else rest, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False
                )
        except Exception as error:  # whatever the hub's client raises
            raise _unreachable("weights", f"hf:{rest}", error) from error
        missing = [key for key in loading["missing_keys"] if not set(key.split(".")) & set(_head(module))]
        if missing:
            raise BackboneError(
                f"expected weights of hf:{rest}, found a file without {len(missing)} tensors, first {', '.join(missing[:3])}. "
                "Set backbone.weights to a weights file."
            )
        return module, classifies and not loading["missing_keys"]

    def _head(module: nn.Module) -> tuple[str, ...]:
        base = getattr(module, "base_model_prefix", "")
        children = [name for name, _ in module.named_children()]
        return (
            tuple(name for name in children if name != base) if base in children else tuple(n for n in children if n in ("pooler", "head"))
        )

    def tokens(module: nn.Module) -> int | None:
        names = [name.rpartition(".")[2] for name, _ in module.named_parameters()]
        special = sum(any(name == token for name in names) for token in ("cls_token", "class_embedding", "distillation_token"))
        return special + int(getattr(config, "num_register_tokens", 0) or 0)

    return Source(
        build, pretrained, lambda state, module: state, _hf_transforms(processor, config), _head, tokens, False, 1,
        f"transformers {transformers.__version__} {kind}", files,
    )  # fmt: skip


def _hf_transforms(processor: Mapping[str, Any], config: Any) -> Transforms:
    """Return the transforms of a preprocessor_config.json; what it does not say has the values of ImageNet and the configuration's size."""
    own = getattr(config, "image_size", None)
    own = own[0] if isinstance(own, list | tuple) else own

    def side(value: Any) -> int | None:
        if isinstance(value, Mapping):
            value = value.get("shortest_edge") or value.get("height")
        return int(value) if isinstance(value, int | float) else None

    resize, crop = side(processor.get("size")), side(processor.get("crop_size")) if processor.get("do_center_crop", True) else None
    size = crop or resize or own or 224
    if own and size != own and any("position" in key for key in vars(config)) and crop is None and resize is None:
        size = own
    percent = processor.get("crop_pct")
    if resize and crop is None and isinstance(percent, float) and resize < 384:
        resize = int(resize / percent)
    resampling = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    mean, std = (tuple(processor.get(key) or default) for key, default in (("image_mean", _MEAN), ("image_std", _STD)))
    return Transforms(int(size), max(int(resize or size), int(size)), mean, std, resampling.get(processor.get("resample", 3), "bicubic"))
