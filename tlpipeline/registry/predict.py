"""Prediction with a model folder, whose transforms are those of its training and evaluation."""

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
    """One image: its most likely class, the probability of that class, and the probabilities of all classes."""

    path: str
    label: str
    probability: float
    probabilities: dict[str, float]


def find_model(text: str, root: Path, place: Path | None = None) -> Path:
    """Return the model folder of a text: a folder itself, or a version in the workspace's registry (name@v1, name#prod).

    Args:
        text: path or name of a version.
        root: workspace.
        place: folder to fetch a missing version to; None is a folder in the workspace.

    Raises:
        RegistryError: there is no such version.
    """
    if Path(text).is_dir():
        return Path(text)
    return versions.model_folder(root, versions.resolve(root, text), place)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Return these files, with each folder replaced by the files below it, sorted and without dot-files.

    Raises:
        DataError: a folder contains no files.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        below = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not below:
            raise DataError(f"expected images in {path}, found an empty folder. Name image files, or a folder that holds some.")
        files += below
    return files


def predict(folder: Path, images: Sequence[Path], store: Store | None = None) -> list[Prediction]:
    """Predict image files.

    Args:
        folder: of the model.
        images: paths of the files.
        store: cache of features of images seen before.

    Returns:
        One prediction per file, in order.

    Raises:
        DataError: a file is missing or not an image.
        RegistryError: there is no model in the folder.
    """
    classifier, description = model.load(folder)
    inputs = Images(Path(), [_row(path) for path in images], description.transforms)
    probabilities = model.probabilities(classifier, inputs, torch.device("cpu"), lambda done: None, store).tolist()
    return [
        Prediction(
            str(path),
            description.classes[max(range(len(row_probabilities)), key=row_probabilities.__getitem__)],
            max(row_probabilities),
            dict(zip(description.classes, row_probabilities, strict=True)),
        )
        for path, row_probabilities in zip(images, probabilities, strict=True)
    ]


def predict_readable(folder: Path, images: Sequence[Path], store: Store | None = None) -> tuple[list[Prediction], dict[Path, str]]:
    """Predict the readable images, and return for each other file why it is unreadable; the arguments are those of `predict`.

    Raises:
        DataError: no file is readable.
        RegistryError: there is no model in the folder.
    """
    try:
        return predict(folder, images, store), {}
    except DataError:
        # Only after an error is it worth decoding all files twice; finished features are in the store.
        unreadable = {path: reason for path in images if (reason := _read_problem(path))}
        images = [path for path in images if path not in unreadable]
        if not images or not unreadable:
            raise
        return predict(folder, images, store), unreadable


def _read_problem(path: Path) -> str:
    """Return why a file cannot be used, "" if it can."""
    try:
        inspected = decoding.inspect(path.read_bytes())
    except OSError as error:
        return error.strerror or str(error)
    return inspected if isinstance(inspected, str) else ""


def _row(path: Path) -> Row:
    """Return a manifest row for an image file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"expected an image at {path}, found nothing.") from error
    except OSError as error:
        raise DataError(f"Cannot read the image {path}: {error}.") from error
    return Row(str(path), hashlib.md5(content, usedforsecurity=False).hexdigest(), "", "", 0, 0, "", "")
