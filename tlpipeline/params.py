"""params.yaml as frozen values: one dataclass a section, every key in the file, no default in code.

A key that is missing, unknown, of the wrong type or out of range is refused with its path. Only `stages.py` and `cli.py` call `load`.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tlpipeline.errors import ParamsError, nearest

AUTO = "auto"
_MAPPING = typing.get_origin(Mapping[str, Any])
_SEEDS = 2**63 - 1  # what torch takes
_DRAWS = 100_000  # each takes a number for each image of the profile: gigabytes from here on


def _at_least(low: float) -> dict[str, Any]:
    return {"check": lambda value: value >= low, "allowed": f"at least {low}"}


def _between(low: float, high: float) -> dict[str, Any]:
    return {"check": lambda value: low <= value <= high, "allowed": f"{low} to {high}"}


def _one_of(*words: str) -> dict[str, Any]:
    return {"check": lambda value: value in words, "allowed": " or ".join(words)}


def _auto_or_at_least(low: int) -> dict[str, Any]:
    return {"check": lambda value: value == AUTO or (not isinstance(value, str) and value >= low), "allowed": f"{AUTO} or at least {low}"}


def _not_empty() -> dict[str, Any]:
    return {"check": bool, "allowed": "not empty"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images are and how large they enter the network."""

    name: str = field(
        metadata={
            "check": lambda v: re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", v) is not None,
            "allowed": "lower-case letters, digits and dashes, a letter first and no dash last",
        }
    )
    images: str = field(metadata=_not_empty())
    size: int | str = field(metadata=_auto_or_at_least(8))


@dataclass(frozen=True, kw_only=True)
class BackboneParams:
    """Which pretrained network, and which weights."""

    name: str = field(metadata=_not_empty())
    weights: str = field(metadata=_not_empty())
    weights_md5: str = field(
        metadata={
            "check": lambda v: v == "none" or (len(v) == 32 and all(c in "0123456789abcdef" for c in v)),
            "allowed": "none or 32 hexadecimal digits",
        }
    )


@dataclass(frozen=True, kw_only=True)
class ProfileParams:
    """How many images the profile may look at."""

    images: int = field(metadata=_at_least(16))
    images_max: int = field(metadata=_at_least(16))
    tangent: bool
    shift: bool
    affinity: bool
    reference: str = field(metadata=_not_empty())
    seed: int = field(metadata=_between(0, _SEEDS))


@dataclass(frozen=True, kw_only=True)
class ChooseParams:
    """The rule that turns a profile into a case; points are percentage points of accuracy."""

    case: str = field(metadata=_not_empty())
    slice: str = field(metadata=_not_empty())
    rule: str = field(metadata=_one_of("fitted", "textbook"))
    prefer: str = field(metadata=_one_of("accuracy", "balanced", "cost"))
    tolerance: float = field(metadata=_between(0, 100))
    effort: str = field(metadata=_one_of("quick", "auto", "full"))
    race_above: float = field(metadata=_between(0, 1))
    race_below: float = field(metadata=_between(0, 1))
    race_images: int = field(metadata=_at_least(1))
    gain: float = field(metadata=_between(0, 100))
    alpha: float = field(metadata=_between(0.001, 0.5))
    draws: int = field(metadata=_between(100, _DRAWS))
    textbook_images: int = field(metadata=_at_least(1))
    textbook_similarity: float = field(metadata=_between(0, 1))


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """What a user may turn of the training; the method's own values are rows of cases.py."""

    seed: int = field(metadata=_between(0, _SEEDS))
    epochs: int | str = field(metadata=_auto_or_at_least(1))
    batch_size: int | str = field(metadata=_auto_or_at_least(2))
    flip: bool
    precision: str = field(metadata=_one_of("auto", "float32"))
    views: int = field(metadata=_between(0, 64))
    budget_minutes: float = field(metadata=_at_least(0))
    override: Mapping[str, Any] = field(
        metadata={"check": lambda v: all(isinstance(key, str) for key in v), "allowed": "names of recipe values"}
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """How the metrics are reported."""

    confidence: float = field(metadata=_between(0.5, 0.999))


@dataclass(frozen=True, kw_only=True)
class GateParams:
    """When a challenger replaces the champion; margin in percentage points."""

    rule: str = field(metadata=_one_of("better", "not_worse"))
    metric: str = field(metadata=_one_of(AUTO, "accuracy", "balanced_accuracy"))
    test: str = field(metadata=_one_of("mcnemar", "bootstrap"))
    alpha: float = field(metadata=_between(0.0001, 0.5))
    margin: float = field(metadata=_between(0, 100))
    promote: str = field(metadata=_one_of("manual", "auto"))


@dataclass(frozen=True, kw_only=True)
class CacheParams:
    """Features and decoded images by content, in .tlpipeline/cache. Nothing here changes what is trained."""

    max_gb: float = field(metadata=_at_least(0))


@dataclass(frozen=True, kw_only=True)
class ClusterParams:
    """Where training runs. Nothing here changes what is trained except the number of workers."""

    workers: int = field(metadata=_at_least(0))
    gpu: bool | str = field(metadata={"check": lambda v: isinstance(v, bool) or v == AUTO, "allowed": "auto, true or false"})
    max_failures: int = field(metadata=_at_least(0))
    storage: str = field(metadata=_not_empty())


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of params.yaml."""

    data: Data
    backbone: BackboneParams
    profile: ProfileParams
    choose: ChooseParams
    train: TrainParams
    evaluate: EvaluateParams
    gate: GateParams
    cache: CacheParams
    cluster: ClusterParams


def load(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: the file is missing or no YAML, or a key is missing, unknown, mistyped or out of range.
    """
    if not path.is_file():
        raise ParamsError(f"expected the settings in {path}, found no such file. Create a workspace with `tlpipeline init DIR`.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(
            f"expected YAML in {path}, but it cannot be read: {error}. Mend it, or take `git show HEAD:{path.name}`."
        ) from error
    params = typing.cast(Params, _section(Params, content, path.name))
    # As DVC names it: `images/` is `images`.
    return dataclasses.replace(params, data=dataclasses.replace(params.data, images=PurePosixPath(params.data.images).as_posix()))


def _section(cls: type, content: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(content, dict):
        raise ParamsError(f"{where}: expected a section with the keys {', '.join(fields)}, found {content!r}.")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}: " if cls is Params else f"{where}."
    for key in content:
        if key not in fields:
            raise ParamsError(f"{prefix}{key}: expected a known key, found an unknown one; {nearest(str(key), fields)}")
    for name in fields:
        if name not in content:
            raise ParamsError(
                f"{prefix}{name}: expected this key, found none. Every key must be there: compare with `tlpipeline init` in an empty folder."
            )
    values = {}
    for name, value in content.items():
        path = f"{prefix}{name}"
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _section(typing.cast(type, hints[name]), value, path)
        else:
            values[name] = _checked(value, hints[name], fields[name].metadata, path)
    return cls(**values)


def _checked(value: Any, hint: Any, metadata: Mapping[str, Any], path: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in options and type(value) is int:
        value = float(value)
    wanted = tuple(dict if typing.get_origin(o) is _MAPPING else o for o in options)
    # bool is an int in Python, but `epochs: yes` is a mistake.
    if not any(type(value) is w for w in wanted):
        names = " or ".join(getattr(w, "__name__", str(w)) for w in wanted)
        raise ParamsError(f"{path}: expected {names}, found {value!r} ({type(value).__name__}).")
    check = metadata.get("check")
    if check is not None and not check(value):
        raise ParamsError(f"{path}: expected {metadata['allowed']}, found {value!r}.")
    return value
