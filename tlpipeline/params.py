"""The settings of a workspace: params.yaml as frozen, typed values. Each setting has its default here, so a file holds only what differs.

A setting that is unknown, of the wrong type or out of range is refused with its path. Loads no torch.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, ScalarEvent

from tlpipeline.errors import ParamsError, nearest
from tlpipeline.records import shown

AUTO, NONE = "auto", "none"
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
# Settings of earlier versions, which an old file may still hold: those with another name now, and those without effect.
RENAMED: dict[str, str] = {
    "train.precision": "backbone.precision",
    "train.override.optimiser": "train.override.optimizer",
}
RETIRED: dict[str, str] = {  # name: why, or what to do instead
    "profile.shift": "it decided nothing.",
    "profile.affinity": "it decided nothing.",
    "profile.reference": "it decided nothing.",
    "choose.rule": "the measurements decide.",
    "choose.prefer": "set choose.tolerance to 0 for what `accuracy` was, to five times its value for what `cost` was.",
    "choose.race_above": "it never changed a choice.",
    "choose.textbook_images": "it belonged to choose.rule.",
    "choose.textbook_similarity": "it belonged to choose.rule.",
    "train.views": "random views made most frozen heads worse.",
    "gate.test": "the exact paired test is always used; the bootstrap accepted worse models on few images.",
}

Auto = Literal["auto"]
Name = Annotated[StrictStr, Field(min_length=1)]
Seed = Annotated[StrictInt, Field(ge=0, le=2**63 - 1)]  # what torch takes
Share = Annotated[StrictFloat, Field(ge=0, le=1)]
Points = Annotated[StrictFloat, Field(ge=0, le=100)]


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """The description of a setting.

    Attributes:
        text: what it does, with its unit.
        shown: whether the params.yaml of a new workspace lists it.
        allowed: which values it takes, where its type alone does not say it in plain words.
    """

    text: str
    shown: bool = False
    allowed: str = ""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Data:
    """Where the images are and how large they enter the network."""

    name: Annotated[
        StrictStr,
        Field(pattern="^[a-z]([a-z0-9-]*[a-z0-9])?$"),
        Setting(
            "name of the model in the registry, as in NAME@v0.1.0",
            shown=True,
            allowed="lower-case letters, digits and dashes, a letter first and no dash last",
        ),
    ] = "digits"
    images: Annotated[Name, Setting("folder of CLASS/IMAGE or of {train,val,test}/CLASS/IMAGE; DVC versions it", shown=True)] = "images"
    size: Annotated[
        Auto | Annotated[StrictInt, Field(ge=8)],
        Setting(
            "side in pixels at which images enter the network; auto: the size of the weights, or the median image if that is smaller",
            shown=True,
        ),
    ] = "auto"
    labels: Annotated[
        Name,
        Setting(
            "table of labels with the columns path and label, and perhaps split and group: a .csv, .tsv or .parquet file; paths start from "
            "`data.images`; none: folders say the class"
        ),
    ] = NONE
    group: Annotated[
        Name,
        Setting(
            "images of one group share a split: a column of `data.labels`, or a regular expression on the path, whose first capturing group "
            "names the group; auto: the column group, if there is one; none: no groups"
        ),
    ] = "auto"
    class_folder: Annotated[
        Auto | Annotated[StrictInt, Field(ge=1, le=9)],
        Setting("which folder of a path is the class, from 1; auto: by the layout of the folders"),
    ] = "auto"
    rename: Annotated[
        Mapping[StrictStr, StrictStr],
        Setting(
            "other names of classes, {old: new}: images of old count as new, and so do predictions of earlier models",
            allowed="names of classes, each with its present name",
        ),
    ] = field(default_factory=dict)
    megapixels: Annotated[
        StrictInt,
        Field(ge=1, le=10_000),
        Setting(
            "largest image that is used, in millions of pixels; larger ones are left out. Decoding takes 16 bytes a pixel, and twice as many for "
            "transparency, palettes and floats"
        ),
    ] = 134
    drop: Annotated[
        tuple[StrictStr, ...], Setting("classes that are gone on purpose: nothing is said of them", allowed="a list of names of classes")
    ] = ()


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class BackboneParams:
    """Which pretrained network, and which weights."""

    name: Annotated[
        Name,
        Setting(
            "demonstration, a torchvision classifier such as resnet18, timm:NAME, hf:OWNER/NAME, or your own: my_package.nets:resnet20",
            shown=True,
        ),
    ] = "demonstration"
    weights: Annotated[
        Name, Setting("DEFAULT, a torchvision weights name, a path to a .safetensors or weights-only file, or none (random)", shown=True)
    ] = "DEFAULT"
    precision: Annotated[
        Literal["auto", "float32"], Setting("auto: bfloat16 where the processor computes in it; float32: always single precision")
    ] = "auto"
    weights_md5: Annotated[
        StrictStr,
        Field(pattern="^(none|[0-9a-f]{32})$"),
        Setting(
            "MD5 of the weights file where `weights` is a path; a file with another MD5 is refused", allowed="none or 32 hexadecimal digits"
        ),
    ] = "none"
    code_md5: Annotated[
        StrictStr,
        Field(pattern="^(none|[0-9a-f]{32})$"),
        Setting(
            "MD5 of the code of your own network, or of the configuration of one of Hugging Face; each run writes it, and trains anew if it changed",
            allowed="none or 32 hexadecimal digits",
        ),
    ] = "none"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ProfileParams:
    """How the data are measured before a case is chosen."""

    images: Annotated[StrictInt, Field(ge=16), Setting("training images that the profile measures, each class in proportion")] = 512
    images_max: Annotated[
        StrictInt, Field(ge=16), Setting("most training images that the profile measures; the sample doubles while the choice is open")
    ] = 2048
    tangent: Annotated[
        StrictBool, Setting("also measure the tangent probe on at most 512 images; it costs a backward pass for each image")
    ] = True
    seed: Annotated[Seed, Setting("seed of the sample")] = 0


# The kinds of alarms: of ingest, of the stage check, and of the evaluation.
Kind = Literal[
    "leak",
    "copies",
    "vanished",
    "series",
    "left out",
    "empty",
    "hidden",
    "layout",
    "not evaluated",
    "not validated",
    "shift",
    "random weights",
    "near copies",
    "shortcut",
    "no signal",
    "wrong label",
    "flat",
    "dark",
    "bright",
    "blurred",
    "tiny",
    "deep",
    "fourth channel",
    "concealed",
    "on black",
    "transparent",
    "pages",
]
_KINDS = f"a list of: {', '.join(typing.get_args(Kind))}"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class CheckParams:
    """What counts as wrong with the data, and how much it weighs."""

    stop: Annotated[tuple[Kind, ...], Setting("kinds of alarms that end a run before it trains", allowed=_KINDS)] = ()
    warn: Annotated[
        tuple[Kind, ...], Setting("kinds of alarms that are only told, though they would block a promotion", allowed=_KINDS)
    ] = ()
    near_copies: Annotated[
        Share, Setting("share of the test images with a near copy in training from which the alarm blocks a promotion")
    ] = 0.02
    shortcut: Annotated[
        StrictFloat,
        Field(ge=0.5, le=1),
        Setting("balanced accuracy (chance 0.5) at which facts of the files tell a class from the others; the lower bound must exceed it"),
    ] = 0.75
    wrong_label: Annotated[
        Share, Setting("a label counts as probably wrong only if the other images give another class at least this probability")
    ] = 0.9
    images: Annotated[
        StrictInt,
        Field(ge=0),
        Setting("most training and validation images whose labels are checked; one that the profile did not measure costs a pass; 0: none"),
    ] = 2048


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ChooseParams:
    """How a case follows from the measurements; points are percentage points of accuracy."""

    case: Annotated[Name, Setting("auto, or force one: small_similar, small_different, large_similar, large_different", shown=True)] = (
        "auto"
    )
    slice: Annotated[
        Name,
        Setting("where a slicing case cuts: auto, or a tap such as conv2 or layer3", shown=True),
    ] = "auto"
    tolerance: Annotated[Points, Setting("percentage points of accuracy that the cheaper case may lose", shown=True)] = 0.5
    effort: Annotated[
        Literal["quick", "auto", "full"],
        Setting(
            "quick: choose without training; auto: train both ways and compare them if the choice is open; full: always compare",
            shown=True,
        ),
    ] = "auto"
    race_below: Annotated[Share, Setting("the choice is open only if P(fine-tuning gains more than the tolerance) is below this")] = 0.75
    race_images: Annotated[StrictInt, Field(ge=1), Setting("validation images that a race needs; with fewer, the prediction decides")] = 100
    gain: Annotated[Points, Setting("an earlier tap must beat the last one by this many percentage points before the network is cut")] = 1.0
    alpha: Annotated[
        StrictFloat,
        Field(ge=0.001, le=0.5),
        Setting("error probability of the test for a cut (over all taps), and of the race (over all its interim analyses)"),
    ] = 0.10
    draws: Annotated[
        StrictInt,
        Field(ge=100, le=100_000),  # each takes a number for each image of the profile: gigabytes from here on
        Setting("bootstrap draws of the test for a cut"),
    ] = 1000


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class TrainParams:
    """What a user may change in training; the method's own values are in `training/recipe.py`."""

    seed: Annotated[Seed, Setting("seed of the image order, the augmentation and random weights", shown=True)] = 0
    epochs: Annotated[
        Auto | Annotated[StrictInt, Field(ge=1)],
        Setting("epochs of fine-tuning; auto: by the number of images", shown=True),
    ] = "auto"
    batch_size: Annotated[
        Auto | Annotated[StrictInt, Field(ge=2)],
        Setting("images a step, over all workers; auto: 32 below 5,000 training images, else 64", shown=True),
    ] = "auto"
    flip: Annotated[StrictBool, Setting("mirror images at random in fine-tuning; false for text, digits and signs", shown=True)] = True
    budget_minutes: Annotated[
        StrictFloat,
        Field(ge=0),
        Setting("minutes for the train stage, and for a race; the best model so far is kept; 0: no limit", shown=True),
    ] = 0.0
    start: Annotated[
        Literal["cold", "warm", "both"],
        Setting(
            "weights that fine-tuning starts from; cold: the source's; warm: those of the model in production, if it was fine-tuned as the same "
            "network; both: each is trained, and validation chooses"
        ),
    ] = "warm"
    override: Annotated[
        Mapping[StrictStr, StrictBool | StrictInt | StrictFloat | StrictStr],
        Setting(
            "changes values of the case's recipe, such as {clip: 0.5}", shown=True, allowed="names of recipe values, each with one value"
        ),
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class EvaluateParams:
    """How the metrics are reported."""

    confidence: Annotated[StrictFloat, Field(ge=0.5, le=0.999), Setting("confidence level of every interval that is reported")] = 0.95


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class GateParams:
    """When a new model replaces the champion."""

    rule: Annotated[
        Literal["better", "not_worse"],
        Setting("better: significantly better than the champion; not_worse: not worse by `margin` or more"),
    ] = "better"
    metric: Annotated[
        Literal["auto", "accuracy", "balanced_accuracy"],
        Setting("what is compared; auto: balanced_accuracy if classes are so uneven that training weights them, else accuracy"),
    ] = "auto"
    alpha: Annotated[StrictFloat, Field(ge=0.0001, le=0.5), Setting("one-sided error probability of the gate's test")] = 0.05
    margin: Annotated[
        Points,
        Setting("percentage points that a new model may be worse under not_worse; and on the old classes where new ones came"),
    ] = 1.0
    min_gain: Annotated[Points, Setting("percentage points that a new model must gain at least, under the rule `better`")] = 0.0
    class_floor: Annotated[
        Literal["none"] | Points,
        Setting("percentage points that the recall of each class may fall; a larger fall is not accepted, and rejected if significant"),
    ] = "none"
    undecided: Annotated[
        Literal["register", "reject"],
        Setting(
            "what the test images show to be neither better nor worse; register: as a version that is not promoted; reject: not at all"
        ),
    ] = "register"
    promote: Annotated[
        Literal["manual", "auto"],
        Setting("manual: `tlpipeline registry promote`; auto: an accepted version goes to stage prod at once", shown=True),
    ] = "manual"
    on_alarm: Annotated[
        Literal["block", "warn"],
        Setting(
            "block: a version with a grave alarm, such as a leak, is promoted only for a reason that somebody gives; warn: it is only told"
        ),
    ] = "block"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class CacheParams:
    """Features and decoded images, kept by content in .tlpipeline/cache. Nothing here changes what is trained."""

    max_gb: Annotated[
        StrictFloat, Field(ge=0), Setting("size limit in GB; the least recently used entries are deleted first; 0 keeps nothing")
    ] = 10.0


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ClusterParams:
    """Where training runs. Nothing here changes what is trained except the number of workers."""

    workers: Annotated[
        StrictInt,
        Field(ge=0),
        Setting(
            "Ray Train workers; 0 trains in this process. More pay off with several GPUs or long training; they take about 10 s to start",
            shown=True,
        ),
    ] = 0
    gpu: Annotated[StrictBool | Auto, Setting("a GPU for each worker: auto, true or false", shown=True)] = "auto"
    max_failures: Annotated[StrictInt, Field(ge=0), Setting("times that dead workers are replaced before a run gives up")] = 2
    storage: Annotated[
        Name, Setting("shared folder or URL for checkpoints if the workers are on several machines; none: inside the workspace")
    ] = "none"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Params:
    """The whole of params.yaml."""

    data: Data = field(default_factory=Data)
    backbone: BackboneParams = field(default_factory=BackboneParams)
    profile: ProfileParams = field(default_factory=ProfileParams)
    check: CheckParams = field(default_factory=CheckParams)
    choose: ChooseParams = field(default_factory=ChooseParams)
    train: TrainParams = field(default_factory=TrainParams)
    evaluate: EvaluateParams = field(default_factory=EvaluateParams)
    gate: GateParams = field(default_factory=GateParams)
    cache: CacheParams = field(default_factory=CacheParams)
    cluster: ClusterParams = field(default_factory=ClusterParams)


# --- reading --------------------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Params:
    """Read and check params.yaml. A setting or a section that the file does not hold has its default.

    Raises:
        ParamsError: the file is missing, empty or not YAML, or a setting is unknown, mistyped or out of range.
    """
    content, _ = _current(path)
    try:
        params = _PARAMS.validate_python(content)
    except ValidationError as error:
        raise ParamsError(f"{path.name}: {_explained(error)}") from None
    # As DVC names it: `images/` is `images`.
    images, labels = (PurePosixPath(name).as_posix() for name in (params.data.images, params.data.labels))
    if circle := _circle(params.data.rename):
        raise ParamsError(f"{path.name}: data.rename: expected names that lead to a last one, found a circle at {circle}.")
    return dataclasses.replace(params, data=dataclasses.replace(params.data, images=images, labels=labels))


_PARAMS = TypeAdapter(Params)


def _circle(renames: Mapping[str, str]) -> str:
    """Return a name from which renames lead round in a circle, "" if there is none; a name may lead to itself."""
    for name in renames:
        step = name
        for _ in renames:
            following = renames.get(step, step)
            if following == step:
                break
            step = following
        else:
            if renames.get(step, step) != step:
                return name
    return ""


def network_of(text: str) -> tuple[str, str]:
    """Return `backbone.name` and `backbone.code_md5` in the text of a params.yaml of any version, "" and "none" where it has none."""
    values = []
    for path, missing in (("backbone.name", ""), ("backbone.code_md5", "none")):
        try:
            section, key = _place(YAML(typ="safe").load(text), path)
        except (YAMLError, ValueError, RecursionError):
            return "", "none"
        values.append(str(section.get(key, missing)))
    return values[0], values[1]


def remarks(path: Path) -> list[str]:
    """Return what to say of the settings of earlier versions in params.yaml: a line for those with another name now, one for the retired.

    Raises:
        ParamsError: the file is missing, empty or not YAML.
    """
    _, old = _current(path)
    lines = [f"{path.name}: {name} is now {RENAMED[name]}; its value is used" for name in old if name in RENAMED]
    if retired := [name for name in old if name in RETIRED]:
        ending = (
            f": {RETIRED[retired[0]]}" if len(retired) == 1 else ". Remove them, or see `Settings of earlier versions` in docs/params.md."
        )
        lines.append(f"{path.name}: without effect in this version: {', '.join(retired)}{ending}")
    return lines


def _current(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Return the sections of the file under today's names, without the retired settings; and the old names that it holds."""
    if not path.is_file():
        raise ParamsError(f"expected the settings in {path}, found no such file. Create a workspace with `tlpipeline init DIR`.")
    content = _read(path)
    if not isinstance(content, dict):
        raise ParamsError(
            f"{path.name}: expected sections such as {', '.join(list(sections())[:4])}, found {shown(content)}. "
            f"`git show HEAD:{path.name}` prints the last version that was committed."
        )
    # A section whose lines are all commented out is YAML's null.
    content = {key: {} if value is None and key in sections() else value for key, value in content.items()}
    old = []
    for name in (*RENAMED, *RETIRED):
        section, key = _place(content, name)
        if key in section:
            old.append(name)
            value = section.pop(key)
            if name in RENAMED:
                content.setdefault(RENAMED[name].partition(".")[0], {})
                section, key = _place(content, RENAMED[name])
                section.setdefault(key, value)
    return content, old


def _place(content: Any, name: str) -> tuple[dict[Any, Any], str]:
    """Return the section that holds a setting, empty where there is none, and the setting's key in it."""
    *places, key = name.split(".")
    section: Any = content
    for place in places:
        section = section.get(place) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}, key


def _read(path: Path) -> Any:
    """Read YAML 1.2 by the same library, in the same way, as DVC."""
    try:
        text = path.read_text(encoding="utf-8")
        scalars: set[str] = set()
        for event in YAML(typ="safe").parse(text):
            if isinstance(event, ScalarEvent) and event.anchor:
                scalars.add(event.anchor)
            elif isinstance(event, AliasEvent) and event.anchor not in scalars:
                # A few aliases of aliases can stand for gigabytes.
                raise ParamsError(
                    f"{path.name}: line {event.start_mark.line + 1}: expected a value, found *{event.anchor}, an alias of a section or list. "
                    "Write the values out."
                )
        return YAML(typ="safe").load(text)
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ParamsError(
            f"expected YAML in {path}, but it cannot be read: {_where(error)}. Correct it; `git show HEAD:{path.name}` prints the last version "
            "that was committed."
        ) from error


def _where(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _explained(error: ValidationError) -> str:
    """Return the first mistake in plain words: the path, what was expected, what was found."""
    first = error.errors(include_url=False, include_context=False)[0]
    value, section, *keys = first["input"], *map(str, first["loc"])
    if section not in sections():
        return f"{section}: there is no such section; {nearest(section, sections())}"
    known = settings(sections()[section])
    if not keys:
        return f"{section}: expected a section with settings such as {', '.join(list(known)[:4])}, found {shown(value)}."
    if keys[0] not in known:
        return f"{section}.{keys[0]}: there is no such setting; {nearest(keys[0], known)}"
    path, allowed = f"{section}.{keys[0]}", known[keys[0]].allowed
    if allowed == "true or false" and value in ("yes", "no", "on", "off"):
        return f"{path}: expected {allowed}, found the word {value}, which is text in YAML 1.2."
    if keys[0] == "override" and keys[1:] and isinstance(first["loc"][2], str) and first["loc"][3:4] != ("[key]",):
        return f"{path}.{keys[1]}: expected a number, a word, true or false, found {shown(value)}."
    return f"{path}: expected {allowed}, found {shown(value)}."


# --- descriptions ---------------------------------------------------------------------------------------------------------------------


def sections() -> dict[str, type]:
    """Return the sections of params.yaml by name, each with its class."""
    return {f.name: typing.cast(type, f.type) for f in dataclasses.fields(Params)}


def settings(section: type) -> dict[str, Setting]:
    """Return the settings of a section of `Params` by name, each with what it allows in plain words."""
    described = {}
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        inner, *metadata = typing.get_args(hint)
        setting = next(m for m in metadata if isinstance(m, Setting))
        described[name] = dataclasses.replace(setting, allowed=setting.allowed or _allowed(inner, metadata))
    return described


def _allowed(hint: Any, metadata: list[Any]) -> str:
    """Say in plain words which values a type takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _allowed(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(_allowed(a, []) for a in arguments).replace("true or false or auto", "auto, true or false")
    if hint is bool:
        return "true or false"
    bounds: dict[str, int | float] = {}
    for constraint in (c for m in metadata for c in getattr(m, "metadata", [m])):
        bounds |= {side: getattr(constraint, side) for side in ("ge", "le", "min_length") if hasattr(constraint, side)}
    if hint is str:
        return "text" + " that is not empty" * ("min_length" in bounds)
    kind = "a whole number" if hint is int else "a number"
    if "le" in bounds:
        return f"{kind} from {bounds['ge']} to {bounds['le']}"
    return f"{kind} of at least {bounds['ge']}"
