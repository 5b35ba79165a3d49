"""The classifier: a cut backbone, pooled features at its taps, one linear head; saved to a folder without pickles."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlpipeline import records
from tlpipeline.backbones import catalogue, checkpoints, taps
from tlpipeline.backbones.code import FOLDER, NONE, Code, of_folder
from tlpipeline.backbones.features import FeatureExtractor, forward_passes, pass_size, with_pooling
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.taps import Backbone
from tlpipeline.data.cache import Store
from tlpipeline.data.loader import Images, batch_ranges
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError, PassTooLarge, RegistryError
from tlpipeline.files import write_json, write_tensors

WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"
FORMAT = 1
_AGAIN = "Fetch the model again, or train it again with `tlpipeline run`."


@dataclass(frozen=True)
class Start:
    """Where training started, if it could start from the model in production.

    Attributes:
        version: of the model in production; warm: whether the model started from its backbone, rather than from the source's weights.
        cold_accuracy, warm_accuracy: of both starts on the validation images (0 to 1), None for one that was not trained; images: how many.
    """

    version: str
    warm: bool
    cold_accuracy: float | None
    warm_accuracy: float | None
    images: int

    @property
    def text(self) -> str:
        """A sentence about the start and what it was compared with."""
        reached = {"this start": self.warm_accuracy, "the source's weights": self.cold_accuracy}
        figures = [f"{accuracy:.1%} with {name}" for name, accuracy in reached.items() if accuracy is not None]
        what = (
            f"warm: from the weights of {self.version}"
            if self.warm
            else f"cold: from the source's weights, not from those of {self.version}"
        )
        figures = figures if self.warm else [text.replace("this start", "that start") for text in reversed(figures)]
        return f"{what} ({', '.join(figures)}, on {self.images:,} validation images)"


@dataclass(frozen=True)
class Description:
    """The content of model.json: everything needed to rebuild the network around its tensors and to prepare its inputs.

    Attributes:
        architecture: name of the backbone in the catalogue.
        cut: the deepest tap that is kept.
        readings: features that the head reads, deepest tap first.
        classes: names in the order of the outputs.
        transforms: from an image to an input.
        frozen: the backbone has its source weights. Other models share it, so its features are worth caching.
        in_bfloat16: the frozen backbone runs in bfloat16, as it did when the head was solved on a GPU.
        indices: numbers of the classes in the workspace's class map, which never change; () where there is none.
        code_md5: of the files of your own network in network/, "none" if there are none.
        remarks: what limited its training (time, memory), so that a second run may give another model.
        library: package, version and architecture of a network that another package makes, "" for others.
        weights: md5 of its source weights, where a package makes it.
        answers: its logits for `_test_image`, by which another version of that package is recognized that computes something else.
        start: where training started, None if there was no model in production to start from.
    """

    architecture: str
    cut: str
    readings: tuple[TapPooling, ...]
    classes: tuple[str, ...]
    transforms: Transforms
    frozen: bool = False
    remarks: tuple[str, ...] = ()
    in_bfloat16: bool = False
    indices: tuple[int, ...] = ()
    code_md5: str = NONE
    library: str = ""
    weights: str = ""
    answers: tuple[float, ...] = ()
    start: Start | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; without `start` where there is none, as earlier versions wrote them."""
        values = asdict(self)
        return {"format": FORMAT, **{name: value for name, value in values.items() if name != "start" or value is not None}}


@dataclass(frozen=True)
class _Format:
    format: object = None


class Classifier(nn.Module):
    """A network cut at its deepest tap, with a linear head on pooled features.

    Maps normalized images (batch, 3, size, size) to logits (batch, classes). A frozen backbone stays in eval mode even if `train()` is
    called: requires_grad alone does not stop BatchNorm statistics, Dropout and StochasticDepth.

    Args:
        readings: features that the head reads, deepest tap first.
        frozen: whether the backbone keeps its weights.
        in_bfloat16: run a frozen backbone in bfloat16, on any device.
    """

    def __init__(self, backbone: Backbone, readings: Sequence[TapPooling], classes: int, frozen: bool, in_bfloat16: bool = False) -> None:
        super().__init__()
        self.readings, self.backbone = tuple(readings), [backbone]  # in a list, so that the uncut network is not a submodule
        self.trunk = taps.cut(backbone, [r.tap for r in readings])
        self.grids = [r.grids for r in readings]
        self.blocks = [block for r in readings for block in r.blocks]
        self.head = nn.Linear(sum(self.blocks), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.frozen, self.in_bfloat16 = frozen, frozen and in_bfloat16
        self.trunk.requires_grad_(not frozen)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features (batch, features)."""
        return torch.cat(with_pooling(self.trunk, self.grids, self.in_bfloat16)(images), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Switch to training mode, except for a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self


# --- the folder -----------------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, description: Description, folder: Path, code: Code | None = None) -> None:
    """Write weights.safetensors, model.json, and the code of your own network. The same tensors give the same bytes, and a crash leaves no half-written file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(model.state_dict(), folder / WEIGHTS)
    if code is not None:
        code.keep(folder / FOLDER)
        description = replace(description, code_md5=code.md5)
    if isinstance(model, Classifier) and (library := model.backbone[0].library):
        weights = description.weights or model.backbone[0].fingerprint
        description = replace(description, library=library, weights=weights, answers=_answers(model, description.transforms.size))
    write_json(description.to_json(), folder / DESCRIPTION)


def _answers(model: Classifier, size: int) -> tuple[float, ...]:
    """Return the logits for one image that is always the same, with four digits."""
    was_training, parameter = model.training, next(model.parameters())
    ramp = torch.linspace(-1, 1, 3 * size * size, device=parameter.device).reshape(1, 3, size, size)
    with torch.inference_mode():
        logits = model.eval()(ramp)[0].float().cpu().tolist()
    model.train(was_training)
    return tuple(float(f"{logit:.4g}") for logit in logits)


def _require_same_answers(model: Classifier, description: Description, folder: Path) -> None:
    """Check that a network of another version of its package computes what it computed.

    Raises:
        BackboneError: it computes something else.
    """
    library = model.backbone[0].library
    if library == description.library or not description.answers:
        return
    now, largest = _answers(model.eval(), description.transforms.size), max(map(abs, description.answers))
    furthest = max(abs(a - b) for a, b in zip(now, description.answers, strict=True))
    if furthest > 0.01 * max(largest, 1.0):
        package, number = description.library.split(" ")[:2]
        raise BackboneError(
            f"expected the network in {folder} to answer as it did with {package} {number}, found that {library} answers otherwise, by up to "
            f"{furthest:.2g}. Install the version that it was made with: pip install {package}=={number}"
        )


def load(
    folder: Path, root: Path | None = None, trusts: Callable[[str, str], bool] = lambda network, code_md5: False
) -> tuple[Classifier, Description]:
    """Read a model folder.

    Args:
        root: the workspace where your own network is looked for, besides the installed packages (see `catalogue.load`).
        trusts: whether the code of a network that the folder names as module:callable may run, given that name and the md5 of the code
            that is kept in the folder ("none" without any). By default none may: a folder can bring any code, and name any function of any
            installed module.

    Raises:
        RegistryError: there is no model, or its description cannot be read.
        BackboneError: its network is not trusted, its code is not what it was, its tensors do not fit its description, or the installed
            version of its package computes something else.
    """
    description = describe(folder)
    name, kept = description.architecture, None
    if description.code_md5 != NONE:
        kept = folder / FOLDER
        if (md5 := of_folder(kept).md5) != description.code_md5:
            raise BackboneError(f"expected the code of {name} in {kept} to have the md5 {description.code_md5}, found {md5}. {_AGAIN}")
    if catalogue.is_own(name) and not trusts(name, description.code_md5):
        raise BackboneError(
            f"expected a network of the catalogue or of this workspace in {folder / DESCRIPTION}, found {name!r}. Loading it would call that "
            f"code. Name the workspace that trained it with --workspace; or if you trust the folder: --trust {shlex.quote(name)}, in Python "
            f"trust={name!r}."
        )
    backbone = catalogue.load(name, catalogue.NONE, root=root, kept=kept, size=description.transforms.size)
    tensors = records.read_tensors(folder / WEIGHTS, _AGAIN, BackboneError)
    model = Classifier(backbone, description.readings, len(description.classes), description.frozen, description.in_bfloat16)
    try:
        if types := checkpoints.unfit_types(tensors, model.state_dict()):
            raise ValueError("; ".join(types))
        model.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise BackboneError(
            f"The tensors in {folder / WEIGHTS} do not fit {name}: {' '.join(str(error).split())[:300]}. {_AGAIN}"
        ) from error
    _require_same_answers(model.eval(), description, folder)
    return model, description


def redescribe(folder: Path, description: Description) -> None:
    """Write another description into a model folder."""
    write_json(description.to_json(), folder / DESCRIPTION)


def load_trunk(backbone: Backbone, folder: Path) -> None:
    """Give a network the weights of a model's backbone. Its old head, and what the model has cut off, stay as they are.

    Raises:
        BackboneError: the tensors cannot be read, or are not those of this network.
    """
    tensors = records.read_tensors(folder / WEIGHTS, _AGAIN, BackboneError)
    trunk = {name.removeprefix("trunk."): tensor for name, tensor in tensors.items() if name.startswith("trunk.")}
    state = backbone.module.state_dict()
    unknown = sorted(name for name, tensor in trunk.items() if name not in state or state[name].shape != tensor.shape)
    if unknown or not trunk:
        raise BackboneError(
            f"expected the weights of {backbone.name} in {folder / WEIGHTS}, found {unknown[0] if unknown else 'none'}, which it does not have "
            "like that. Set train.start to cold."
        )
    backbone.module.load_state_dict({**state, **trunk})


def describe(folder: Path) -> Description:
    """Read the description in a model folder.

    Raises:
        RegistryError: there is none, it is damaged, or another version wrote it.
    """
    path = folder / DESCRIPTION
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise RegistryError(
            f"expected a model folder with {WEIGHTS} and {DESCRIPTION} at {folder}, found none. Train one with `tlpipeline run`."
        )
    number = records.read(_Format, path, _AGAIN, RegistryError).format
    if number != FORMAT:
        raise RegistryError(
            f"expected a model of format {FORMAT} in {path}, found {number!r}. Use the version of tlpipeline that wrote it."
        )
    return records.read(Description, path, _AGAIN, RegistryError)


# --- predicting -----------------------------------------------------------------------------------------------------------------------


def probabilities(
    model: nn.Module, images: Images, device: torch.device, progress: Callable[[int], None], store: Store | None = None
) -> Tensor:
    """Return the class probabilities of each image: (n, classes), float32 on the CPU, in the order of the images.

    With a store, the features of a frozen backbone are computed once and cached, with identical results. Features of a trained backbone
    are not cached: no other model can use them, and they would displace those that others need.
    """
    model.eval()
    if store is not None and isinstance(model, Classifier) and model.frozen:
        extractor = feature_extractor(model, store, images.transforms, device, model.in_bfloat16)
        cached = len(images) - int(extractor.missing(images.rows).sum())
        progress(cached)
        features = extractor.extract(images, lambda done: progress(cached + done))
        parts = []
        size = pass_size(device, images.transforms.size)
        for part in batch_ranges(len(images), size):
            x = torch.cat([rows.take(slice(part.start, part.stop)) for rows in features], dim=1).to(device)
            with torch.inference_mode():
                parts.append(model.head(_padded(x, size))[: len(x)].float().softmax(1).cpu())
        if parts:
            return torch.cat(parts)
    size = pass_size(device, images.transforms.size)
    while True:
        try:
            return _forward(model, images, device, progress, size)
        except PassTooLarge:
            # Answers of a trained network are not cached, so their last digits may depend on the number of images per pass.
            if size == 1 or (isinstance(model, Classifier) and model.frozen):
                raise
            size //= 2


def _forward(model: nn.Module, images: Images, device: torch.device, progress: Callable[[int], None], size: int) -> Tensor:
    """Return the probabilities from forward passes of `size` images."""
    done, parts = 0, []
    for batch, (logits,) in forward_passes(lambda inputs: [model(inputs)], images, range(len(images)), device, size=size):
        parts.append(logits.float().softmax(1).cpu())
        done += len(batch)
        progress(done)
    if not parts:
        # An empty answer (a worker without a share) needs the width of any other.
        side = images.transforms.size
        with torch.inference_mode():
            parts = [model(torch.zeros(1, 3, side, side, device=device)).float().cpu()[:0]]
    return torch.cat(parts)


def feature_extractor(
    model: Classifier, store: Store, transforms: Transforms, device: torch.device, half: bool = False, smaller_passes: bool = False
) -> FeatureExtractor:
    """Return an extractor of features with the classifier's present backbone.

    Args:
        half: run in bfloat16.
        smaller_passes: see `FeatureExtractor`.
    """
    return FeatureExtractor(
        store, model.backbone[0], model.trunk, model.readings, transforms, device, half=half, smaller_passes=smaller_passes
    )


def _padded(x: Tensor, size: int) -> Tensor:
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x), x.shape[1])])
