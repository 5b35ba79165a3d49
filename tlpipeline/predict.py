"""Prediction: the transforms travel inside the model, so what is predicted is what was evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tlpipeline import dataset, model, registry
from tlpipeline.errors import DataError
from tlpipeline.features import normalise, prepare

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """One image: its most likely class, that class's probability, and all of them."""

    path: str
    label: str
    probability: float
    probabilities: dict[str, float]


def find(text: str, root: Path) -> Path:
    """Return the model folder that a text means: a folder, or a version of the workspace's registry (name@v1, name#prod)."""
    if Path(text).is_dir():
        return Path(text)
    return registry.folder(root, registry.resolve(root, text))


def predict(folder: Path, images: Sequence[Path]) -> list[Prediction]:
    """Predict image files.

    Raises:
        DataError: a file is missing or no image. RegistryError: there is no model in the folder.
    """
    classifier, description = model.load(folder)
    inputs = []
    for path in images:
        try:
            inputs.append(prepare(dataset.decode(path.read_bytes()), description.transforms))
        except FileNotFoundError as error:
            raise DataError(f"expected an image at {path}, found nothing.") from error
        except dataset.UNREADABLE as error:
            raise DataError(f"expected an image at {path}, but it cannot be read: {error}.") from error
    found = []
    with torch.inference_mode():
        for start in range(0, len(inputs), BATCH):
            pixels = torch.from_numpy(np.stack(inputs[start : start + BATCH]))
            for row in classifier(normalise(pixels, description.transforms)).softmax(1).tolist():
                found.append(row)
    return [
        Prediction(str(path), description.classes[int(np.argmax(row))], max(row), dict(zip(description.classes, row, strict=True)))
        for path, row in zip(images, found, strict=True)
    ]
