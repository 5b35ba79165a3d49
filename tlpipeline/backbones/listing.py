"""Which networks can be had: torchvision's, those of timm and Hugging Face where the packages are installed, and your own."""

import ast
import fnmatch
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from tlpipeline.backbones import catalogue, packages
from tlpipeline.errors import BackboneError, nearest

PASSES = 5  # timed, after one that is not


@dataclass(frozen=True)
class Available:
    """A network that `backbone.name` may name.

    Attributes:
        name: as in params.yaml.
        parameters: number of them, None where it is not known without building the network.
        size: input side of its weights in pixels, None where that is not known.
        weights: names of its weights, of which the first is DEFAULT; () where there are none to download.
        license: of those weights, "" where the package does not say it.
        milliseconds: for a forward pass of one image in this process, None if it was not measured.
    """

    name: str
    parameters: int | None
    size: int | None
    weights: tuple[str, ...]
    license: str = ""
    milliseconds: float | None = None


def available(pattern: str, root: Path | None) -> list[Available]:
    """Return the networks whose names match a pattern: text that the name contains, or with * and ?.

    Args:
        root: the workspace whose own networks are listed, and those of the working folder.

    Raises:
        BackboneError: none matches; the nearest names are suggested.
    """
    everything = [*_torchvision(), *_timm(), *_hf(), *_own(root)]
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    matching = [network for network in everything if fnmatch.fnmatchcase(network.name.lower(), wanted.lower())]
    if not matching:
        raise BackboneError(
            f"expected a network that matches {pattern!r}, found none; {nearest(pattern, [network.name for network in everything])}"
        )
    return matching


def measured(network: Available, root: Path | None, size: int | None) -> Available:
    """Return a network with its parameters, and the time of a forward pass of one image on this machine, built with random weights.

    Args:
        size: input side in pixels; None is that of its weights.

    Raises:
        BackboneError: it cannot be built, or does not take this size.
    """
    backbone = catalogue.load(network.name, catalogue.NONE, root=root, size=size)
    side = size or backbone.transforms.size
    image = torch.zeros(1, 3, side, side).to(memory_format=torch.channels_last)
    times = []
    try:
        with torch.inference_mode():
            for _ in range(PASSES + 1):
                started = time.perf_counter()
                backbone.module.eval()(image)
                times.append(time.perf_counter() - started)
    except Exception as error:  # whatever its code says of this size
        raise BackboneError(
            f"expected {network.name} to take images of {side} pixels, but it failed: {' '.join(str(error).split())[:200]}. Give another --size."
        ) from error
    parameters = sum(p.numel() for p in backbone.module.parameters())
    return replace(network, parameters=parameters, size=side, milliseconds=1000 * median(times[1:]))


def _torchvision() -> list[Available]:
    import torchvision.models as models

    found = [
        Available("demonstration", sum(p.numel() for p in catalogue.Demonstration().parameters()), 32, (catalogue.DEFAULT,), "Apache-2.0")
    ]
    for name in models.list_models(module=models):
        entries = list(models.get_model_weights(name))
        meta = entries[0].meta
        default = models.get_model_weights(name).DEFAULT.name
        names = (default, *(entry.name for entry in entries if entry.name != default))
        found.append(Available(name, int(meta["num_params"]), int(entries[0].transforms().crop_size[0]), names))
    return found


def _timm() -> list[Available]:
    with suppress(BackboneError):  # not installed: then it has no networks
        timm = packages.require(packages.TIMM)
        found = []
        for name in timm.list_models():
            config = timm.get_pretrained_cfg(name)
            tags = tuple(sorted(known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")))
            default = config.tag or ""
            ordered = (default, *(tag for tag in tags if tag != default)) if default in tags else tags
            found.append(Available(f"timm:{name}", None, int(config.input_size[-1]), ordered, config.license or ""))
        return found
    return []


def _hf() -> list[Available]:
    with suppress(BackboneError):
        packages.require(packages.HF)
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

        # The hub has many of each type; without it, a type stands for its usual configuration.
        return [Available(f"hf:{kind}", None, None, ()) for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    return []


def _own(root: Path | None) -> list[Available]:
    """Return the callables that need no arguments and look like networks, in the Python files of the workspace and the working folder.

    The files are read, not run.
    """
    folders = [] if root is None else [root, root / "networks"]
    found: dict[str, Available] = {}
    for folder in dict.fromkeys(place.resolve() for place in (*folders, Path.cwd())):
        for path in sorted(folder.glob("*.py")) if folder.is_dir() else ():
            with suppress(SyntaxError, ValueError, OSError):  # a file that is no Python has no networks
                found |= {f"{path.stem}:{name}": Available(f"{path.stem}:{name}", None, None, ()) for name in _networks(path)}
    return list(found.values())


def _networks(path: Path) -> Sequence[str]:
    """Return the classes of a file that derive from nn.Module, directly or by another class in it."""
    derived: dict[str, set[str]] = {}
    for node in ast.parse(path.read_bytes(), str(path)).body:
        if isinstance(node, ast.ClassDef):
            derived[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    networks: set[str] = {"Module"}
    while more := {name for name, bases in derived.items() if bases & networks} - networks:
        networks |= more
    return sorted((networks - {"Module"}) & set(derived))
