"""Images to predict: which files a user means, and what they look like to the network. A bad file does not stop the others."""

import glob
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from tlpipeline.data import decoding, tables
from tlpipeline.data.dataset import Row
from tlpipeline.data.decoding import Pixels
from tlpipeline.data.loader import resize_and_crop
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import DataError

Picture: TypeAlias = "str | Path | Image.Image | Pixels"
TABLES = (".csv", ".tsv", ".parquet")


def list_images(inputs: Iterable[str | Path]) -> list[Path]:
    """Return the image files that these inputs name, in their order.

    A folder gives the files below it, sorted and without dot-files; a link that leads nowhere counts as a file. A table gives the files in its
    column `path`, which start from the table's folder. A pattern such as `photos/**/*.jpg` gives what it matches. Whatever else is a file.

    Raises:
        DataError: a folder has no files, a pattern matches nothing, or a table cannot be read.
    """
    files: list[Path] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files += _below(path)
        elif path.suffix.lower() in TABLES:
            files += [path.parent / name for name in tables.read_paths(path)]
        elif glob.has_magic(str(path)) and not path.exists():
            matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            if not matched:
                raise DataError(f"expected files that match {text}, found none. Check the pattern; ** matches folders at any depth.")
            files += [file for name in matched for file in (_below(name) if name.is_dir() else [name])]
        else:
            files.append(path)
    return files


def _below(folder: Path) -> list[Path]:
    """Return the files below a folder.

    Raises:
        DataError: there are none.
    """
    shown = [path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    files = sorted(path for path in shown if path.is_file() or (path.is_symlink() and not path.exists()))
    if not files:
        raise DataError(f"expected images in {folder}, found an empty folder. Name image files, or a folder that holds some.")
    return files


class Pictures:
    """Prepared images of a batch: those in memory are prepared when they are added, files when they are asked for.

    Attributes:
        rows: one for each image, which `Images` takes.
        problems: why a file cannot be used, by its index. A gray image stands for it.
    """

    def __init__(self, images: Sequence[Picture], transforms: Transforms) -> None:
        self.transforms = transforms
        self.problems: dict[int, str] = {}
        self._prepared: dict[int, Pixels] = {}
        self.rows = [self._row(index, image) for index, image in enumerate(images)]

    def _row(self, index: int, image: Picture) -> Row:
        """Return a row for an image; `md5` holds its index, because files are read only once.

        Raises:
            DataError: an image in memory is none.
        """
        if not isinstance(image, str | Path):
            self._prepared[index] = self._in_memory(image)
        return Row(str(Path(image).expanduser()) if isinstance(image, str | Path) else "", str(index), "", "", 0, 0, "", "")

    def _in_memory(self, image: Image.Image | Pixels) -> Pixels:
        if isinstance(image, np.ndarray):
            image = _image_of(image)
        if not isinstance(image, Image.Image):
            raise DataError(f"expected a path, a PIL image or an array, found {type(image).__name__}. Convert it first.")
        try:
            return resize_and_crop(decoding.to_rgb(image), self.transforms)
        except decoding.UNREADABLE as error:
            raise DataError(f"expected a PIL image that can be read, but: {decoding.describe_error(error)}. Leave it out.") from error

    def pixels(self, row: Row) -> Pixels:
        """Return the image of a row (size, size, 3), as `Images` asks for it."""
        index = int(row.md5)
        if index in self._prepared:
            return self._prepared[index]
        decoded = decode(Path(row.path), 2 * self.transforms.resize)
        if isinstance(decoded, str):
            self.problems[index] = decoded
            return np.full((self.transforms.size, self.transforms.size, 3), 128, dtype=np.uint8)
        return resize_and_crop(decoded, self.transforms)


def decode(path: Path, min_side: int) -> Image.Image | str:
    """Return an image file decoded to RGB (see `decoding.decode`), or a text that says why it cannot be."""
    try:
        content = decoding.read_regular(path)
    except FileNotFoundError:
        return "a link that leads nowhere" if path.is_symlink() else "no such file"
    except OSError as error:
        return error.strerror or str(error)
    if not content:
        return "empty file"
    try:
        image = decoding.decode(content, min_side)
    except decoding.UNREADABLE as error:
        return decoding.describe_error(error, content)
    return "zero size" if 0 in image.size else image


def digest(path: Path) -> str:
    """Return the md5 of a file, "" if it cannot be read."""
    try:
        return hashlib.md5(decoding.read_regular(path), usedforsecurity=False).hexdigest()
    except OSError:
        return ""


def _image_of(array: Pixels) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise DataError(
            f"expected an array of uint8 with shape (height, width, 3) in RGB or (height, width) in gray, found {array.dtype} with shape "
            f"{array.shape}. Scale floats by 255 and move the channels last."
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
