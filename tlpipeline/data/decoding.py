"""Image files to pixels, whatever their format and mode."""

import errno
import io
import math
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile

from tlpipeline.data.file_kinds import kind_of
from tlpipeline.errors import DataError

# What decoders raise on damaged files (found by testing with damaged files).
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError,
    AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]

# Pillow has decoders for many more. Some of them start other programs: Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "DDS", "JPEG2000") + ("AVIF",) * bool(features.check("avif"))

# Decoding takes a multiple of the pixels that come out of it: what Pillow loads, its copy, the image that is returned. Counted for each mode,
# rounded up; a few kilobytes of a file may stand for gigabytes.
RGB_BYTES = 16  # a pixel of an RGB image, while it is decoded
MAX_BYTES = 134_000_000 * RGB_BYTES
MOST_SIDE = 2**17  # pixels; formats of photographs end at half of it
ELONGATED = 128  # aspect ratio above which only the middle of an image is used
_BYTES_A_PIXEL = {"1": 8, "L": 8, "I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "RGB": 16, "YCbCr": 16, "CMYK": 16}
MOST_BYTES_A_PIXEL = 32  # transparency is laid over white, palettes may be transparent, floats are copied
# What is noted of images that are not read as they are.
DEEP = "own range"  # whole numbers that do not use 16 bits
DEEP_COLORS = "deep colors"  # 16 bits of each color, of which the upper 8 are read
CHANNEL = "fourth channel"  # no transparency, and not used
CONCEALED = "concealed"  # fully transparent, and read without the transparency
ON_BLACK = "on black"  # would vanish on white
PAGES = "pages"  # several, of which the largest that is not blank is read
MOST_PAGES = 1000
_ORIENTATION = 0x0112
_BLANK = 0.995  # of the pixels of a blank page have the same color
_VISIBLE = 16  # levels between the darkest and the brightest pixel, from which on a picture is visible
_SAMPLES, _EXTRA_SAMPLES, _BITS, _NO_DATA = 277, 338, 258, 42113  # tags of TIFF

_BLOCK = 2**20  # pixels of 16-bit and floating-point images that are converted at a time


_SMALLER = "Make it smaller, cut it into parts that share a group (data.group), or raise data.megapixels: networks read a few hundred pixels a side"


class ImageTooLarge(ValueError):
    """An image needs more memory to be decoded than is allowed, or has a longer side."""


class _Memory:
    """Bytes that the decoding threads of this process share: one that needs more than is free waits for others to finish."""

    def __init__(self, size: int) -> None:
        self._free = self._size = size
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        size = min(size, self._size)  # an image that may take more has all of it, and is decoded alone
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


def bytes_of(megapixels: int) -> int:
    """Return the memory that may be taken to decode an image, for the largest RGB image in millions of pixels (`data.megapixels`)."""
    return megapixels * 10**6 * RGB_BYTES


@contextmanager
def room_for(image: Image.Image) -> Iterator[None]:
    """Wait until the decoding threads of this process leave the memory to work on an image."""
    with _memory.hold(image.width * image.height * RGB_BYTES):
        yield


def middle(image: Image.Image) -> Image.Image:
    """Return an image without its ends if it is longer than networks read: a line of pixels at full length would need gigabytes."""
    short = min(image.size)
    if max(image.size) <= ELONGATED * short:
        return image
    width, height = (min(side, ELONGATED * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def decode(content: bytes, min_side: int | None = None, notes: set[str] | None = None, most_bytes: int = MAX_BYTES) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied. An animation gives its first frame, a TIFF with several pages the largest one that is not blank. Transparent
    pixels become white; an image that would vanish on white is laid over black, and of one that is fully transparent the colors are shown. A
    fourth channel of a TIFF that does not say that it is transparency is left out.

    Whole numbers deeper than 8 bits are scaled from the full range of 16 bits if their largest value has the sixteenth bit: then their writer
    used the whole range. Others (12 bits of a sensor, signed values of CT, sums) are scaled from their own range, as are floats.

    Args:
        min_side: short side in pixels that suffices. A JPEG is then decoded at a half, a quarter or an eighth of its size,
            where enough pixels remain. This is several times faster.
        notes: gets what is to be said of the image (`DEEP` and others).
        most_bytes: memory that decoding may take.

    Raises:
        UnidentifiedImageError: the content is not an image in one of the formats.
        ImageTooLarge: decoding needs more memory, or a side is longer than `MOST_SIDE`; nothing was decoded.
        Exception: it is damaged; see `UNREADABLE` for the types that Pillow's decoders raise.
    """
    notes = set() if notes is None else notes
    _lift_limit(most_bytes)
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        bytes_to_decode(opened, most_bytes)  # before anything of it is decoded to find the page
        opened.seek(_page(opened, notes, most_bytes))
        if min_side is not None and opened.format == "JPEG" and min_side < min(opened.size):
            scale = min_side / min(opened.size)
            opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))
        with _memory.hold(bytes_to_decode(opened, most_bytes)):
            opened.load()
            if _has_deep_colors(opened, content):
                notes.add(DEEP_COLORS)
            return to_rgb(_without_other_channel(opened, notes), notes)


def _lift_limit(most_bytes: int) -> None:
    """Let Pillow open larger images than it does by itself, if more is allowed than by default: for the whole process, as Pillow has it."""
    pixels = most_bytes // min(_BYTES_A_PIXEL.values())
    if most_bytes > MAX_BYTES and Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixels


def _page(image: ImageFile, notes: set[str], most_bytes: int) -> int:
    """Return the number of the page to read, 0 for all formats but TIFF: their other pictures are frames of an animation."""
    if image.format != "TIFF":
        return 0
    sizes: list[int] = []
    with suppress(*UNREADABLE):  # a damaged page ends the list, and does not cost those before it
        for number in range(MOST_PAGES):
            image.seek(number)
            sizes.append(image.width * image.height)
    if len(sizes) < 2:
        return 0
    notes.add(PAGES)
    largest = [number for number, size in enumerate(sizes) if size == max(sizes)]
    for number in largest[: len(largest) if len(largest) > 1 else 0]:
        with suppress(*UNREADABLE):
            image.seek(number)
            with _memory.hold(bytes_to_decode(image, most_bytes)):
                pixels = np.asarray(image)
                pixels = pixels.reshape(image.width * image.height, -1)
                if (pixels == np.median(pixels, axis=0)).all(axis=1).mean() < _BLANK:
                    return number
    return largest[0]


def _has_deep_colors(image: ImageFile, content: bytes) -> bool:
    if image.format == "PNG":
        return content[24] == 16 and content[25] in (2, 6)  # bits of a sample, and the color type: RGB with or without alpha
    bits = _tag(image, _BITS)
    return isinstance(bits, tuple) and len(bits) >= 3 and max(bits) > 8


def _without_other_channel(image: ImageFile, notes: set[str]) -> Image.Image:
    """Return an image without a last channel that is no transparency: a TIFF says of its extra samples whether they are (1, 2) or not."""
    if image.format == "TIFF" and image.mode == "RGB" and (_tag(image, _SAMPLES) or 3) > 3:
        notes.add(CHANNEL)  # Pillow has left it out
    if image.format != "TIFF" or image.mode not in ("RGBA", "RGBX", "LA"):
        return image
    extra = _tag(image, _EXTRA_SAMPLES)
    if image.mode != "RGBX" and extra is not None and {1, 2} & set(extra if isinstance(extra, tuple) else (extra,)):
        return image
    notes.add(CHANNEL)
    colors = image.split()[:-1]
    kept = Image.merge("RGB", colors) if len(colors) == 3 else colors[0]
    kept.info.update(image.info)
    kept.getexif().update({number: value for number, value in image.getexif().items() if number == _ORIENTATION})
    return kept


def _tag(image: Image.Image, number: int) -> Any:
    """Return the value of a tag of a TIFF, None if there is none."""
    return getattr(image, "tag_v2", {}).get(number)


def bytes_to_decode(image: Image.Image, most_bytes: int = MAX_BYTES) -> int:
    """Return the memory that decoding an opened image takes.

    Raises:
        ImageTooLarge: it is more than is allowed, or a side is longer than `MOST_SIDE`.
    """
    if max(image.size) > MOST_SIDE:
        raise ImageTooLarge(f"{image.width} x {image.height} pixels, and a side may have {MOST_SIDE:,}")
    needed: int = image.width * image.height * _BYTES_A_PIXEL.get(image.mode, MOST_BYTES_A_PIXEL)
    if needed > most_bytes:
        raise ImageTooLarge(
            f"{image.width} x {image.height} pixels of mode {image.mode} take {needed / 1e9:.1f} GB to decode, "
            f"and the limit is {most_bytes / 1e9:.1f} GB"
        )
    return needed


def to_rgb(image: Image.Image, notes: set[str] | None = None) -> Image.Image:
    """Return an image turned upright, as 8-bit RGB; the rules are those of `decode`.

    Args:
        notes: gets what is to be said of the image.
    """
    notes = set() if notes is None else notes
    no_data = _number(_tag(image, _NO_DATA))
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image), image.info.get("transparency", None), no_data, notes)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _without_transparency(image.convert("RGBA"), notes)
    if image.mode == "F":
        pixels = np.asarray(image)
        ranges = _ranges(pixels, lambda part: np.isfinite(part) & (part != no_data))
        if not ranges:
            raise ValueError("no finite pixel")
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        return _from_gray(pixels, lambda values: _scale_to_range(values, low, high))
    return image.convert("RGB")


def _number(value: object) -> float | None:
    """Return the value that stands for no data, as the tag of a TIFF has it in a text; None if there is none."""
    try:
        return float(str(value).strip("\0 "))
    except ValueError:
        return None


def _ranges(pixels: npt.NDArray[Any], wanted: Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]]) -> list[tuple[float, float]]:
    """Return the smallest and the largest wanted value of each block of rows that has any."""
    parts = (rows[wanted(rows)] for rows in _row_blocks(pixels))
    return [(float(part.min()), float(part.max())) for part in parts if part.size]


def _from_integers(pixels: npt.NDArray[Any], transparent: object, no_data: float | None, notes: set[str]) -> Image.Image:
    left_out = [value for value in (transparent, no_data) if isinstance(value, int | float)]
    ranges = _ranges(pixels, lambda part: ~np.isin(part, left_out)) or [(0.0, 65535.0)]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    if low >= 0 and 2**15 <= high < 2**16:
        low, high = 0.0, 65535.0
    else:
        notes.add(DEEP)

    def scale(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        gray = _scale_to_range(values, low, high)
        if isinstance(transparent, int):
            gray[values == transparent] = 1.0
        return gray

    return _from_gray(pixels, scale)


def _without_transparency(image: Image.Image, notes: set[str]) -> Image.Image:
    """Return an RGBA image as RGB: over white, or over black where white would hide it; without its transparency where that hides all."""
    low, high = image.getchannel("A").getextrema()
    if high == 0:
        notes.add(CONCEALED)
        return image.convert("RGB")
    on_white = _laid_over(image, 255)
    if low < 255 and _contrast(on_white) < _VISIBLE <= _contrast(on_black := _laid_over(image, 0)):
        notes.add(ON_BLACK)
        return on_black
    return on_white


def _laid_over(image: Image.Image, level: int) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, (level, level, level, 255)), image).convert("RGB")


def _contrast(image: Image.Image) -> int:
    """Return the largest difference between two pixels in one of the colors."""
    levels = np.asarray(image)
    return int((levels.max(axis=(0, 1)).astype(int) - levels.min(axis=(0, 1))).max())


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


def _scale_to_range(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.float64]:
    finite: npt.NDArray[np.float64] = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((finite - low) / (high - low if high > low else 1.0)).clip(0, 1)


class Inspected(NamedTuple):
    """What an image file holds: width and height upright, its mode in the file, and what is to be said of it (`DEEP` and others)."""

    width: int
    height: int
    mode: str
    notes: frozenset[str] = frozenset()


def inspect(content: bytes, most_bytes: int = MAX_BYTES) -> Inspected | str:
    """Return what an image file holds, or a text saying why it cannot be used; `most_bytes` as for `decode`."""
    if not content:
        return "empty file"
    notes: set[str] = set()
    try:
        image = decode(content, notes=notes, most_bytes=most_bytes)
        with Image.open(io.BytesIO(content), formats=FORMATS) as original:
            mode = original.mode
    except UNREADABLE as error:
        return describe_error(error, content)
    return "zero size" if 0 in image.size else Inspected(image.width, image.height, mode, frozenset(notes))


def describe_error(error: Exception, content: bytes = b"") -> str:
    """Return a short text for an error of the decoder.

    Args:
        content: of the file: what is no image in one of the formats is called by its kind.
    """
    if isinstance(error, UnidentifiedImageError):
        return kind_of(content) or f"not an image: the formats are {', '.join(FORMATS)}"
    if isinstance(error, ImageTooLarge):
        return f"too large: {error}. {_SMALLER}"
    if isinstance(error, Image.DecompressionBombError):
        pixels, *_ = (*map(int, re.findall(r"\d+", str(error))), 0)
        return f"too large: {pixels / 1e6:.0f} megapixels, and the limit is {MAX_BYTES / RGB_BYTES / 1e6:.0f}. {_SMALLER}"
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
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for an image file that cannot be read."""
    return DataError(f"Cannot read the image {path}: {error.strerror}. Make it readable or remove it, then run again.")


def available_cpus() -> int:
    """Return the number of CPUs that this process may use; on a shared machine it has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
