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

# What decoders raise on damaged files (found by testing with damaged files).
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError,
    AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]

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
        UnidentifiedImageError: the content is not an image.
        Exception: it is damaged; see `UNREADABLE` for the types that Pillow's decoders raise.
    """
    with Image.open(io.BytesIO(content)) as opened:
        opened.seek(0)
        if min_side is not None and opened.format == "JPEG" and min_side < min(opened.size):
            scale = min_side / min(opened.size)
            opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))
        opened.load()
        return to_rgb(opened)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image turned upright, as 8-bit RGB on white; the rules are those of `decode`."""
    image = ImageOps.exif_transpose(image)
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
        finite = np.isfinite(values)
        if not finite.any():
            raise ValueError("no finite pixel")
        low, high = values[finite].min(), values[finite].max()
        gray = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low if high > low else 1.0)
        return Image.fromarray((gray * 255).round().astype(np.uint8), "L").convert("RGB")
    return image.convert("RGB")


def inspect(content: bytes) -> tuple[int, int, str] | str:
    """Return the width, height and mode of an image file, or a text saying why it cannot be used."""
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
    """Return a short text for an error of the decoder."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else f"broken: {str(error) or type(error).__name__}"


def read_content(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the image {path}: {error.strerror}. Make it readable or remove it, then run again.") from error


def available_cpus() -> int:
    """Return the number of CPUs that this process may use; on a shared machine it has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
