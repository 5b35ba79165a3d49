"""Prediction: the transforms are stored with the model, so predictions are prepared as the evaluation was."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from tlpipeline.backbones import classifier
from tlpipeline.data import dataset, decoding
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.decoding import Pixels
from tlpipeline.data.loader import Images, resize_and_crop
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import DataError
from tlpipeline.registry import versions

Picture: TypeAlias = "str | Path | Image.Image | Pixels"


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one image.

    Attributes:
        path: of the file, "" for an image in memory.
        label: the most likely class; probability: of that class.
        probabilities: of each class.
    """

    path: str
    label: str
    probability: float
    probabilities: dict[str, float]

    def __str__(self) -> str:
        return f"{self.path}  {self.label}  {self.probability:.4f}".lstrip()


def find_model(text: str, root: Path, place: Path | None = None) -> Path:
    """Return the folder of a model, given the folder itself or a version in the workspace's registry (name@v1, name#prod).

    Args:
        place: folder to fetch a version to that the workspace does not have; None fetches it into the workspace.
    """
    if Path(text).is_dir():
        return Path(text)
    return versions.model_folder(root, versions.resolve(root, text), place)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Return these files, with each folder replaced by the files below it, sorted and without dot-files.

    Raises:
        DataError: a folder has no files.
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


class Model:
    """A trained classifier, loaded once.

    Args:
        folder: of the model.
        root: the workspace where the network's own code is looked for, besides the installed packages.
        store: gives the cache of a workspace, where features of images are kept that a frozen network computed; by default none.
        trust: networks as module:callable whose code may run, besides those that the workspace names.

    Attributes:
        classes: names of the classes, in the order of the network's outputs.
        indices: number of each class in the class map of its workspace. It never changes, though outputs move when classes come and go.

    Raises:
        RegistryError: there is no model in the folder.
        BackboneError: its network is not trusted.
    """

    def __init__(
        self,
        folder: Path,
        root: Path | None = None,
        store: Callable[[], AbstractContextManager[Store | None]] = nullcontext,
        trust: Collection[str] = (),
    ) -> None:
        def trusts(network: str, code_md5: str) -> bool:
            return network in trust or (root is not None and versions.names_network(root, network, code_md5))

        self._classifier, self._description = classifier.load(folder, root, trusts)
        self._store = store
        self.classes = self._description.classes
        self.indices = self._description.indices or tuple(range(len(self.classes)))

    def __repr__(self) -> str:
        return f"Model({self._description.architecture}, {len(self.classes)} classes)"

    def predict(self, images: "Picture | Sequence[Picture]") -> list[Prediction]:
        """Predict images; each goes through the transforms that the model was trained with.

        Args:
            images: one or several of: a path of an image file, a PIL image, an 8-bit array (H, W, 3) in RGB or (H, W) in gray.

        Raises:
            DataError: a file is missing or no image, or an array has another shape or type.
        """
        several = [images] if isinstance(images, str | Path | Image.Image | np.ndarray) else list(images)
        if not several:
            return []
        rows, memory = [], _Memory(self._description.transforms)
        for image in several:
            rows.append(_row(Path(image).expanduser()) if isinstance(image, str | Path) else memory.add(image))
        pictures = Images(Path(), rows, self._description.transforms, decoded=memory if memory.prepared else None)
        # Features of images in memory are not cached: they do not belong to a file of the workspace.
        with nullcontext() if memory.prepared else self._store() as store:
            probabilities = classifier.probabilities(self._classifier, pictures, torch.device("cpu"), lambda done: None, store).tolist()
        return [
            Prediction(row.path, self.classes[max(range(len(p)), key=p.__getitem__)], max(p), dict(zip(self.classes, p, strict=True)))
            for row, p in zip(rows, probabilities, strict=True)
        ]

    def predict_readable(self, images: Sequence[Path]) -> tuple[list[Prediction], dict[Path, str]]:
        """Predict the files that are readable images; return the reason for each of the other files.

        Args:
            images: files, and folders of them.

        Raises:
            DataError: no file is a readable image, or a folder has no files.
        """
        files = list_images(images)
        try:
            return self.predict(files), {}
        except DataError:
            # Now all files are decoded to find the unreadable ones. Features that were computed before the error are in the cache.
            reasons = {path: why for path in files if (why := _unreadable(path))}
            readable = [path for path in files if path not in reasons]
            if not readable or not reasons:
                raise
            return self.predict(readable), reasons


class _Memory:
    """Images in memory, prepared for the network; image files are read when they are needed."""

    def __init__(self, transforms: Transforms) -> None:
        self.transforms = transforms
        self.prepared: dict[str, Pixels] = {}

    def add(self, image: Image.Image | Pixels) -> Row:
        """Prepare an image; return a row that stands for it.

        Raises:
            DataError: it is no image.
        """
        if isinstance(image, np.ndarray):
            image = _image_of(image)
        if not isinstance(image, Image.Image):
            raise DataError(f"expected a path, a PIL image or an array, found {type(image).__name__}. Convert it first.")
        try:
            pixels = resize_and_crop(decoding.to_rgb(image), self.transforms)
        except decoding.UNREADABLE as error:
            raise DataError(f"expected a PIL image that can be read, but: {decoding.describe_error(error)}. Leave it out.") from error
        digest = hashlib.md5(pixels.tobytes(), usedforsecurity=False).hexdigest()
        self.prepared[digest] = pixels
        return Row("", digest, "", "", image.width, image.height, image.mode, "")

    def pixels(self, row: Row) -> Pixels:
        """Return the image of a row, as `Images` asks for it."""
        if not row.path:
            return self.prepared[row.md5]
        return resize_and_crop(dataset.read_image(Path(), row, 2 * self.transforms.resize), self.transforms)


def _image_of(array: Pixels) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise DataError(
            f"expected an array of uint8 with shape (height, width, 3) in RGB or (height, width) in gray, found {array.dtype} with shape "
            f"{array.shape}. Scale floats by 255 and move the channels last."
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _unreadable(path: Path) -> str:
    """Return in words why a file cannot be used, "" if it can."""
    try:
        inspected = decoding.inspect(decoding.read_regular(path))
    except OSError as error:
        return error.strerror or str(error)
    return inspected if isinstance(inspected, str) else ""


def _row(path: Path) -> Row:
    """Return an image file as a manifest would list it."""
    try:
        content = decoding.read_regular(path)
    except FileNotFoundError as error:
        raise DataError(f"expected an image at {path}, found nothing.") from error
    except OSError as error:
        raise DataError(f"expected an image at {path}, but it cannot be read: {error.strerror or error}. Name an image file.") from error
    return Row(str(path), hashlib.md5(content, usedforsecurity=False).hexdigest(), "", "", 0, 0, "", "")
