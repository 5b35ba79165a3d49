"""Image files to pixels, whatever their format and mode."""

import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tlpipeline.errors import DataError

# What decoders raise on damaged files (found by feeding them some).
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError,
    AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]

# Damaged EXIF blocks and TIFF tags only warn; the pixels are checked by loading them. Said once for the process, because
# `warnings.catch_warnings` in the threads that decode would leave the filters of the whole process changed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def decode(content: bytes, at_least: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied; of an animation the first frame is taken; transparency is laid over white; 16-bit grays are scaled by their
    full range (65535 to 255), floating-point images by their own range.

    Args:
        at_least: short side in pixels that is enough: a JPEG is then decoded at a half, a quarter or an eighth of its size where that still
            leaves so many, which is several times faster.

    Raises:
        UnidentifiedImageError: the content is no image. Exception: it is damaged; Pillow's decoders raise what they like.
    """
    with Image.open(io.BytesIO(content)) as opened:
        opened.seek(0)
        if at_least is not None and opened.format == "JPEG" and at_least < min(opened.size):
            scale = at_least / min(opened.size)
            opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        gray = values.astype(np.float64) / 65535.0
        gray[values == image.info.get("transparency", -1)] = 1.0
        return Image.fromarray((gray.clip(0, 1) * 255).round().astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        there = np.isfinite(values)
        if not there.any():
            raise ValueError("no finite pixel")
        low, high = values[there].min(), values[there].max()
        gray = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low if high > low else 1.0)
        return Image.fromarray((gray * 255).round().astype(np.uint8), "L").convert("RGB")
    return image.convert("RGB")


def inspect(content: bytes) -> tuple[int, int, str] | str:
    """Return the width, the height and the mode of an image file that can be decoded, or else in words why it cannot be used."""
    if not content:
        return "empty file"
    try:
        image = decode(content)
        with Image.open(io.BytesIO(content)) as original:
            mode = original.mode
    except UNREADABLE as error:
        return describe_error(error)
    return "zero size" if 0 in image.size else (image.width, image.height, mode)


def describe_error(error: Exception) -> str:
    """Return in words why a file could not be decoded."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else f"broken: {str(error) or type(error).__name__}"


def read_content(path: Path) -> bytes:
    """Return the bytes of a file of the data set.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"expected to read the image {path}, but: {error.strerror}. Make it readable or remove it, then run again."
        ) from error


def available_cpus() -> int:
    """Return how many CPUs this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
