"""Image files to pixels, whatever their format and mode."""

import errno
import io
import math
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tlpipeline.errors import DataError

# What decoders raise on damaged files (found by testing with damaged files).
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError,
    AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]

# Pillow has decoders for many more. Some of them start other programs: Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "DDS", "JPEG2000")

# Decoding takes a multiple of the pixels that come out of it: what Pillow loads, its copy, the image that is returned. Counted for each mode,
# rounded up; a few kilobytes of a file may stand for gigabytes.
MAX_BYTES = 2**31
_BYTES_A_PIXEL = {"1": 8, "L": 8, "I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "RGB": 16, "YCbCr": 16, "CMYK": 16}
_BYTES_A_PIXEL_OF_OTHERS = 32  # transparency is laid over white, palettes may be transparent, floats are copied
_BLOCK = 2**20  # pixels of 16-bit and floating-point images that are converted at a time


class ImageTooLarge(ValueError):
    """An image needs more memory to be decoded than `MAX_BYTES`."""


class _Memory:
    """Bytes that the decoding threads of this process share: one that needs more than is free waits for others to finish."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


_memory = _Memory(MAX_BYTES)

# Damaged EXIF blocks and TIFF tags only cause warnings; loading checks the pixels. The filter is set once for the process,
# because `warnings.catch_warnings` in decoding threads would change the filters of the whole process.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def decode(content: bytes, min_side: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied. An animation gives its first frame. Transparent pixels become white.
    16-bit grays are scaled from their full range (0 to 65535), floating-point images from their own range.

    Args:
        min_side: short side in pixels that suffices. A JPEG is then decoded at a half, a quarter or an eighth of its size,
            where enough pixels remain. This is several times faster.

    Raises:
        UnidentifiedImageError: the content is not an image in one of the formats.
        ImageTooLarge: decoding needs more memory than `MAX_BYTES`; nothing was decoded.
        Exception: it is damaged; see `UNREADABLE` for the types that Pillow's decoders raise.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        opened.seek(0)
        if min_side is not None and opened.format == "JPEG" and min_side < min(opened.size):
            scale = min_side / min(opened.size)
            opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))
        with _memory.hold(_bytes_to_decode(opened)):
            opened.load()
            return to_rgb(opened)


def _bytes_to_decode(image: Image.Image) -> int:
    """Return the memory that decoding an opened image takes.

    Raises:
        ImageTooLarge: it is more than `MAX_BYTES`.
    """
    needed: int = image.width * image.height * _BYTES_A_PIXEL.get(image.mode, _BYTES_A_PIXEL_OF_OTHERS)
    if needed > MAX_BYTES:
        raise ImageTooLarge(
            f"{image.width} x {image.height} pixels of mode {image.mode} take {needed / 1e9:.1f} GB to decode, "
            f"and the limit is {MAX_BYTES / 1e9:.1f} GB"
        )
    return needed


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image turned upright, as 8-bit RGB on white; the rules are those of `decode`."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_gray(np.asarray(image), lambda values: _scale_16_bit(values, image.info.get("transparency", -1)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "F":
        pixels = np.asarray(image)
        ranges = [(float(part.min()), float(part.max())) for rows in _row_blocks(pixels) if (part := rows[np.isfinite(rows)]).size]
        if not ranges:
            raise ValueError("no finite pixel")
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        return _from_gray(pixels, lambda values: _scale_to_range(values, low, high))
    return image.convert("RGB")


def _row_blocks(pixels: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _BLOCK // max(1, pixels.shape[1]))
    return (pixels[start : start + step] for start in range(0, len(pixels), step))


def _from_gray(pixels: npt.NDArray[Any], scale: Callable[[npt.NDArray[Any]], npt.NDArray[np.float64]]) -> Image.Image:
    """Convert grays to RGB, some rows at a time: in 64-bit floats the whole image would be eight times as large."""
    gray = np.empty(pixels.shape, np.uint8)
    done = 0
    for rows in _row_blocks(pixels):
        gray[done : done + len(rows)] = (scale(rows) * 255).round().astype(np.uint8)
        done += len(rows)
    return Image.fromarray(gray, "L").convert("RGB")


def _scale_16_bit(values: npt.NDArray[Any], transparent: int) -> npt.NDArray[np.float64]:
    gray = values.astype(np.float64) / 65535.0
    gray[values == transparent] = 1.0
    return gray.clip(0, 1)


def _scale_to_range(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.float64]:
    finite: npt.NDArray[np.float64] = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return (finite - low) / (high - low if high > low else 1.0)


def inspect(content: bytes) -> tuple[int, int, str] | str:
    """Return the width, height and mode of an image file, or a text saying why it cannot be used."""
    if not content:
        return "empty file"
    try:
        image = decode(content)
        with Image.open(io.BytesIO(content), formats=FORMATS) as original:
            mode = original.mode
    except UNREADABLE as error:
        return describe_error(error)
    return "zero size" if 0 in image.size else (image.width, image.height, mode)


def describe_error(error: Exception) -> str:
    """Return a short text for an error of the decoder."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image: the formats are {', '.join(FORMATS)}"
    if isinstance(error, ImageTooLarge | Image.DecompressionBombError):
        return f"too large: {error}"
    return f"broken: {str(error) or type(error).__name__}"


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file: a pipe may never end, and a device may fill the memory.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than any image that can be decoded.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a regular file")
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it takes {status.st_size / 1e9:.1f} GB, and the limit is {MAX_BYTES / 1e9:.1f} GB")
    return path.read_bytes()


def read_content(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return read_regular(path)
    except OSError as error:
        raise DataError(f"Cannot read the image {path}: {error.strerror}. Make it readable or remove it, then run again.") from error


def available_cpus() -> int:
    """Return the number of CPUs that this process may use; on a shared machine it has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
