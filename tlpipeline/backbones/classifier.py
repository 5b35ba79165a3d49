"""The classifier: a cut backbone, pooled readings at its taps, one linear head. And the folder that it is kept in, without pickles."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlpipeline.backbones import catalogue, taps
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


@dataclass(frozen=True)
class Description:
    """The content of model.json: all that is needed to rebuild the network around its tensors and to feed it.

    Attributes:
        architecture: name of the backbone in the catalogue.
        cut: the deepest tap that is kept; readings: what the head reads, deepest first.
        classes: names in the order of the outputs.
        transforms: from an image to an input.
        frozen: the backbone is as it came: others read images with the same one, so what it reads is worth keeping.
        in_bfloat16: the frozen backbone reads in bfloat16, as it did when the head was solved on a GPU.
        remarks: what bounded its training (time, memory), so that no second run need be equal.
    """

    architecture: str
    cut: str
    readings: tuple[TapPooling, ...]
    classes: tuple[str, ...]
    transforms: Transforms
    frozen: bool = False
    remarks: tuple[str, ...] = ()
    in_bfloat16: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Description":
        """Read what `to_json` gave."""
        t = content["transforms"]
        return cls(
            content["architecture"],
            content["cut"],
            tuple(TapPooling(r["tap"], r["channels"], tuple(r["grids"])) for r in content["readings"]),
            tuple(content["classes"]),
            Transforms(t["size"], t["resize"], tuple(t["mean"]), tuple(t["std"]), t["interpolation"]),
            bool(content.get("frozen", False)),
            tuple(content.get("remarks", ())),
            bool(content.get("in_bfloat16", False)),
        )


class Classifier(nn.Module):
    """A network cut at its deepest reading, with a linear head on the pooled readings.

    Maps normalized images (batch, 3, size, size) to logits (batch, classes). Where it is frozen, the backbone stays in eval mode whatever
    `train()` is called with: requires_grad alone does not stop BatchNorm statistics, Dropout and StochasticDepth.

    Args:
        in_bfloat16: a frozen backbone reads in bfloat16, on whatever device.
    """

    def __init__(self, backbone: Backbone, readings: Sequence[TapPooling], classes: int, frozen: bool, in_bfloat16: bool = False) -> None:
        super().__init__()
        self.readings, self.backbone = tuple(readings), [backbone]  # in a list: what was cut off is no part of this module
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
        """Return the pooled readings (batch, features)."""
        return torch.cat(with_pooling(self.trunk, self.grids, self.in_bfloat16)(images), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Switch to training mode, but for a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self


# --- the folder -----------------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, description: Description, folder: Path) -> None:
    """Write weights.safetensors and model.json; the same tensors give the same bytes, and a crash leaves no half-written file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(model.state_dict(), folder / WEIGHTS)
    write_json(description.to_json(), folder / DESCRIPTION)


def load(folder: Path) -> tuple[Classifier, Description]:
    """Read a model folder.

    Raises:
        RegistryError: no model is there, or its description cannot be read. BackboneError: its tensors do not fit its description.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / DESCRIPTION).is_file() or not (folder / WEIGHTS).is_file():
        raise RegistryError(
            f"expected a model folder with {WEIGHTS} and {DESCRIPTION} at {folder}, found none. Train one with `tlpipeline run`."
        )
    description = _description(folder)
    backbone = catalogue.load(description.architecture, catalogue.NONE, size=description.transforms.size)
    model = Classifier(backbone, description.readings, len(description.classes), description.frozen, description.in_bfloat16)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise BackboneError(
            f"expected the tensors of {description.architecture} in {folder / WEIGHTS}, but they do not fit or are damaged: "
            f"{' '.join(str(error).split())[:300]}. Fetch the model again, or train it again with `tlpipeline run`."
        ) from error
    return model.eval(), description


def _description(folder: Path) -> Description:
    try:
        content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        found = content.get("format") if isinstance(content, dict) else content
        if found == FORMAT:
            return Description.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"expected a model's description in {folder / DESCRIPTION}, but it is damaged: {error}. Fetch it again."
        ) from error
    raise RegistryError(f"expected a model of format {FORMAT} in {folder}, found {found!r}. Use the tlpipeline that wrote it.")


# --- predicting -----------------------------------------------------------------------------------------------------------------------


def probabilities(
    model: nn.Module, images: Images, device: torch.device, progress: Callable[[int], None], store: Store | None = None
) -> Tensor:
    """Return each image's class probabilities (n, classes), float32 on the CPU, in the order of the images.

    With a store, what a frozen backbone reads in an image is computed once and kept; the answer is the same to the bit. What one reads that
    was trained is not: no other model will ask for it, and it would push out what others do.
    """
    model.eval()
    if store is not None and isinstance(model, Classifier) and model.frozen:
        reader = feature_extractor(model, store, images.transforms, device, model.in_bfloat16)
        known = len(images) - int(reader.missing(images.rows).sum())
        progress(known)
        features = reader.extract(images, lambda done: progress(known + done))
        parts = []
        size = pass_size(device, images.transforms.size)
        for part in batch_ranges(len(images), size):
            x = torch.cat([rows.take(slice(part.start, part.stop)) for rows in features], dim=1).to(device)
            with torch.inference_mode():
                parts.append(model.head(_filled(x, size))[: len(x)].float().softmax(1).cpu())
        if parts:
            return torch.cat(parts)
    size = pass_size(device, images.transforms.size)
    while True:
        try:
            return _passed(model, images, device, progress, size)
        except PassTooLarge:
            # What a trained network says is kept nowhere: its last digits may depend on how many images are asked about together.
            if size == 1 or (isinstance(model, Classifier) and model.frozen):
                raise
            size //= 2


def _passed(model: nn.Module, images: Images, device: torch.device, progress: Callable[[int], None], size: int) -> Tensor:
    """Return what `probabilities` does, by passes of so many images."""
    done, parts = 0, []
    for batch, (logits,) in forward_passes(lambda inputs: [model(inputs)], images, range(len(images)), device, size=size):
        parts.append(logits.float().softmax(1).cpu())
        done += len(batch)
        progress(done)
    if not parts:
        # The width of an empty answer (a worker without a share) is that of any answer.
        side = images.transforms.size
        with torch.inference_mode():
            parts = [model(torch.zeros(1, 3, side, side, device=device)).float().cpu()[:0]]
    return torch.cat(parts)


def feature_extractor(
    model: Classifier, store: Store, transforms: Transforms, device: torch.device, half: bool = False, smaller_passes: bool = False
) -> FeatureExtractor:
    """Return what reads images with the classifier's backbone as it is now; `half`: in bfloat16; `alone`: nobody else will with these weights."""
    return FeatureExtractor(
        store, model.backbone[0], model.trunk, model.readings, transforms, device, half=half, smaller_passes=smaller_passes
    )


def _filled(x: Tensor, size: int) -> Tensor:
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x), x.shape[1])])
