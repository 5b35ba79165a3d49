"""Prediction: the transforms travel inside the model, so what is predicted is what was evaluated."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tlpipeline.backbones import classifier as model
from tlpipeline.data import decoding
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images
from tlpipeline.errors import DataError
from tlpipeline.registry import versions


@dataclass(frozen=True)
class Prediction:
    """One image: its most likely class, that class's probability, and all of them."""

    path: str
    label: str
    probability: float
    probabilities: dict[str, float]


def find_model(text: str, root: Path, place: Path | None = None) -> Path:
    """Return the model folder that a text means: a folder, or a version of the workspace's registry (name@v1, name#prod).

    Args:
        place: folder to fetch a version to that is not here yet; None keeps it in the workspace.
    """
    if Path(text).is_dir():
        return Path(text)
    return versions.model_folder(root, versions.resolve(root, text), place)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Return these files, each folder replaced by all files below it, sorted, but the system's own (dot-files).

    Raises:
        DataError: a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        below = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not below:
            raise DataError(f"expected images in {path}, found an empty folder. Name image files, or a folder that holds some.")
        found += below
    return found


def predict(folder: Path, images: Sequence[Path], store: Store | None = None) -> list[Prediction]:
    """Predict image files.

    Args:
        store: where the features of images that were seen before are, and those of the others go.

    Raises:
        DataError: a file is missing or no image. RegistryError: there is no model in the folder.
    """
    classifier, description = model.load(folder)
    pictures = Images(Path(), [_row(path) for path in images], description.transforms)
    chances = model.probabilities(classifier, pictures, torch.device("cpu"), lambda done: None, store).tolist()
    return [
        Prediction(
            str(path),
            description.classes[max(range(len(row)), key=row.__getitem__)],
            max(row),
            dict(zip(description.classes, row, strict=True)),
        )
        for path, row in zip(images, chances, strict=True)
    ]


def predict_readable(folder: Path, images: Sequence[Path], store: Store | None = None) -> tuple[list[Prediction], dict[Path, str]]:
    """Predict the files that are images, and say of each other one in words why it is none; the arguments are those of `predict`.

    Raises:
        DataError: none of them can be read. RegistryError: there is no model in the folder.
    """
    try:
        return predict(folder, images, store), {}
    except DataError:
        # Only now is it worth decoding all of them once more; what was computed until then is in the store.
        left = {path: why for path in images if (why := _unreadable(path))}
        images = [path for path in images if path not in left]
        if not images or not left:
            raise
        return predict(folder, images, store), left


def _unreadable(path: Path) -> str:
    """Return in words why a file cannot be used, "" if it can."""
    try:
        found = decoding.inspect(path.read_bytes())
    except OSError as error:
        return error.strerror or str(error)
    return found if isinstance(found, str) else ""


def _row(path: Path) -> Row:
    """Return an image file as a manifest would list it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"expected an image at {path}, found nothing.") from error
    except OSError as error:
        raise DataError(f"expected an image at {path}, but it cannot be read: {error}.") from error
    return Row(str(path), hashlib.md5(content, usedforsecurity=False).hexdigest(), "", "", 0, 0, "", "")
