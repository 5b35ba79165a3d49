"""Facts about image files by content: what one decode tells of each, kept so that no file is opened twice.

Ingest measures them, and the check of the data reads them. They depend on the bytes of a file and on the code of decoding alone.
The store is one sqlite file, which several processes may use at once. Its name has a hash of that code, so changed rules measure again.
"""

import dataclasses
import errno
import hashlib
import io
import json
import shutil
import sqlite3
import sys
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import ExifTags, Image
from scipy.ndimage import uniform_filter1d

from tlpipeline.data import decoding, file_kinds
from tlpipeline.data.contents import read_recorded
from tlpipeline.data.decoding import UNREADABLE, Pixels, available_cpus

SIDE = 24  # pixels of the small gray picture
COLOR_SIDE = 6  # and of the two small pictures of its color
_MEASURED_SIDE = 256  # brightness and blur are measured at no more than this short side: about what networks see
_BLUR_WINDOW = 9  # pixels that are averaged, as in the paper
_SAME, _FLAT = 2, 0.999  # values by which pixels of one color differ, and their share in a flat picture
_SAMPLED = 10_000  # pixels that give the color of a flat picture
_LINE = 8.0  # standard deviation of the gray values in a line of a border; JPEG leaves this much
_EDGE, _ALONG = 24.0, 0.8  # gray values by which the line behind a border differs, on this share of its pixels
_WIDEST = 0.25  # of the side: a wider border is part of the picture
_BLOCK = 2**16  # pixels that are compared with the color of a flat picture at a time
_AT_ONCE = 500  # rows of one question to sqlite, and of one transaction
_PATIENCE_S = 60.0  # for another process that writes
# The luminance table of the JPEG standard (ITU-T T.81, annex K), which the Independent JPEG Group's quality scales.
_JPEG_LUMINANCE = np.array(
    [
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
        18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """What one decode tells of an image file.

    Attributes:
        reason: why the file cannot be used, "" if it can; then all other facts but `file_size` are empty.
        file_size: in bytes.
        width, height: in pixels, upright; mode: Pillow's name of the kind of pixels in the file; format: such as JPEG.
        pages: pictures in the file.
        jpeg_quality: 1 to 100 as the Independent JPEG Group counts it, 0 if the file is no JPEG.
        exif: whether the file has EXIF data; camera: its maker and model by them, "" without.
        transparent: share of the pixels that are not opaque.
        colorless: whether 99.9 % of the pixels are gray.
        flat: whether 99.9 % of the pixels have about one color.
        brightness: mean of the gray values, 0 to 255.
        blur: 0 (sharp) to 1 (blurred), at a short side of 256 pixels if it has more (see `blur`).
        top, bottom, left, right: width in pixels of a border of one color (see `border`), 0 without one.
        notes: what is to be said of how it is read, see `decoding.DEEP` and others.
        picture: gray values of the picture at 24 x 24 pixels, then Cb and Cr at 6 x 6, one byte each.
    """

    reason: str = ""
    file_size: int = 0
    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    pages: int = 0
    jpeg_quality: int = 0
    exif: bool = False
    camera: str = ""
    transparent: float = 0.0
    colorless: bool = False
    flat: bool = False
    brightness: float = 0.0
    blur: float = 0.0
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    notes: tuple[str, ...] = ()
    picture: bytes = b""

    @property
    def gray(self) -> npt.NDArray[np.uint8]:
        """The small gray picture, (24, 24)."""
        return np.frombuffer(self.picture, np.uint8, SIDE * SIDE).reshape(SIDE, SIDE)


def measure(content: bytes, most_bytes: int = decoding.MAX_BYTES) -> Facts:
    """Return the facts about the content of a file, decoded once; a file that cannot be used has a reason.

    Args:
        most_bytes: as for `decoding.decode`.
    """
    size = len(content)
    if not content:
        return Facts("empty file")
    notes: set[str] = set()
    try:
        image = decoding.decode(content, notes=notes, most_bytes=most_bytes)
        with Image.open(io.BytesIO(content), formats=decoding.FORMATS) as original:
            about = {"mode": original.mode, "format": original.format or "", "pages": _pages(original)}
            about |= {"jpeg_quality": _jpeg_quality(original), "exif": "exif" in original.info, "camera": _camera(original)}
            with decoding.room_for(image):
                about["transparent"] = _transparent(original)  # the last, because it loads the pixels
    except UNREADABLE as error:
        return Facts(decoding.describe_error(error, content), size)
    if 0 in image.size:
        return Facts("zero size", size)
    with decoding.room_for(image):
        seen = _of_pixels(decoding.middle(image))
    return Facts(file_size=size, width=image.width, height=image.height, notes=tuple(sorted(notes)), **about, **seen)


def _pages(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except UNREADABLE:  # the first picture is whole, a later one is not
        return 1


def _jpeg_quality(image: Image.Image) -> int:
    table = getattr(image, "quantization", {}).get(0)
    if image.format != "JPEG" or table is None:
        return 0
    values = np.array(table)
    whole = values < 255  # larger ones are cut off
    scale = 100 * values[whole].sum() / _JPEG_LUMINANCE[whole].sum() if whole.any() else 5000
    return int(np.clip(round((200 - scale) / 2 if scale <= 100 else 5000 / scale), 1, 100))


def _camera(image: Image.Image) -> str:
    tags = image.getexif()
    return " ".join(str(tags.get(tag, "")).strip("\0 ") for tag in (ExifTags.Base.Make, ExifTags.Base.Model)).strip()


def _transparent(image: Image.Image) -> float:
    image.seek(0)
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La"):
        return 0.0
    return float((np.asarray(image.getchannel(image.getbands()[-1])) < 255).mean())


def _of_pixels(image: Image.Image) -> dict[str, Any]:
    scale = min(1.0, _MEASURED_SIDE / min(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image if scale == 1 else image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    gray = np.asarray(small.convert("L"), np.float32)
    picture = small.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("L")
    _, *colors = small.resize((COLOR_SIDE, COLOR_SIDE), Image.Resampling.BILINEAR).convert("YCbCr").split()
    red, green, blue = np.asarray(image).transpose(2, 0, 1)
    return {
        "colorless": bool(((red == green) & (green == blue)).mean() >= _FLAT),
        "flat": _is_flat(np.asarray(image)),
        "brightness": round(float(gray.mean()), 3),
        "blur": round(blur(gray), 4),
        "picture": b"".join(part.tobytes() for part in (picture, *colors)),
        **border(np.asarray(image.convert("L"))),
    }


def blur(gray: npt.NDArray[np.float32]) -> float:
    """Return how blurred a picture is, 0 to 1: the share of the differences between neighbors that averaging leaves as they are.

    Averaging takes most of a sharp picture's differences, and few of a blurred one's. The larger value of both axes counts, so motion blur
    does, too (Crete et al. 2007, "The blur effect").

    Args:
        gray: values from 0 to 255, (height, width).
    """
    shares = []
    for axis in (0, 1):
        before = np.abs(np.diff(gray, axis=axis))
        after = np.abs(np.diff(uniform_filter1d(gray, _BLUR_WINDOW, axis=axis), axis=axis))
        shares.append(float(np.minimum(before, after).sum()) / max(float(before.sum()), 1e-6))
    return max(shares)


def _is_flat(pixels: Pixels) -> bool:
    flat = pixels.reshape(-1, 3)
    some = flat[:: max(1, len(flat) // _SAMPLED)]
    color = np.median(some, axis=0)

    def alike(part: Pixels) -> int:
        return int((np.abs(part - color) <= _SAME).all(axis=1).sum())

    # A look at some pixels tells most pictures from a flat one. All at once would take 48 bytes a pixel.
    return (
        alike(some) / len(some) >= _FLAT
        and sum(alike(flat[start : start + _BLOCK]) for start in range(0, len(flat), _BLOCK)) / len(flat) >= _FLAT
    )


def border(gray: Pixels) -> dict[str, int]:
    """Return the width in pixels of a border of one color at each side, 0 where there is none.

    The lines of a border have one color, which no line further inside has, and the line behind them has another one nearly everywhere. Stripes,
    the white ground of a drawing and the dark ground of a scan are not so: they are part of the picture.

    Args:
        gray: values from 0 to 255, (height, width).
    """
    views = {"top": gray, "bottom": gray[::-1], "left": gray.T, "right": gray.T[::-1]}
    return {side: _strip(lines) for side, lines in views.items()}


def _strip(lines: Pixels) -> int:
    color = float(lines[0].mean())
    for width in range(int(len(lines) * _WIDEST) + 1):
        line = lines[width].astype(np.float32)
        if _is_of(line, color):
            continue
        ends = width and (np.abs(line - color) >= _EDGE).mean() >= _ALONG
        # A line of the same color further inside makes stripes of it.
        return width if ends and not any(_is_of(line.astype(np.float32), color) for line in lines[width : len(lines) // 2]) else 0
    return 0


def _is_of(line: npt.NDArray[np.float32], color: float) -> bool:
    return bool(line.std() <= _LINE and abs(float(line.mean()) - color) <= _LINE)


# --- the store ------------------------------------------------------------------------------------------------------------------------


class FactStore:
    """Facts by md5 of the content.

    Args:
        folder: where the file of the store is; None keeps the facts in memory for the life of this object.
        say: called with a sentence if the store was damaged and is built again.
        most_bytes: memory that decoding an image may take (`decoding.decode`). The facts depend on it, so each limit has a store of its own.
    """

    def __init__(
        self,
        folder: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
        most_bytes: int = decoding.MAX_BYTES,
    ) -> None:
        self._say, self.most_bytes = say, most_bytes
        self._lock = threading.Lock()
        self._memory: dict[str, Facts] = {}
        self.path = None if folder is None else folder / f"facts-{_rules(most_bytes)}.sqlite"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for other in self.path.parent.glob("facts-*.sqlite*"):
                if not other.name.startswith(self.path.name):
                    other.unlink(missing_ok=True)  # measured by other rules

    def known(self, md5s: Iterable[str]) -> Iterator[tuple[str, Facts]]:
        """Yield the md5 and the facts of those contents that were measured, in no order."""
        wanted = list(dict.fromkeys(md5s))
        if self.path is None:
            yield from ((md5, self._memory[md5]) for md5 in wanted if md5 in self._memory)
            return
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            question = f"SELECT md5, facts, picture, crc FROM facts WHERE md5 IN ({','.join('?' * len(part))})"
            rows = self._do(lambda database, question=question, part=part: database.execute(question, part).fetchall()) or []  # type: ignore[misc]
            intact = [(md5, _unpacked(text, picture)) for md5, text, picture, crc in rows if crc == _crc(md5, text, picture)]
            if len(intact) < len(rows):
                self._say(f"{len(rows) - len(intact)} damaged lines of {self.path} are measured again")
            yield from intact

    def add(self, facts: Mapping[str, Facts]) -> None:
        """Keep facts by md5.

        Raises:
            OSError: the disk is full.
        """
        if self.path is None:
            self._memory |= facts
            return
        rows = []
        for md5, fact in facts.items():
            text, picture = _packed(fact)
            rows.append((md5, text, picture, _crc(md5, text, picture)))
        self._do(lambda database: database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows))

    def copy_to(self, folder: Path) -> None:
        """Copy the file of the store to another folder, if there is one."""
        if self.path is not None and self.path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path, folder / self.path.name)

    def compared(self) -> set[str]:
        """Return the md5s of the contents whose near copies among each other are known."""
        if self.path is None:
            return set()
        return {md5 for (md5,) in self._do(lambda database: database.execute("SELECT md5 FROM compared").fetchall()) or ()}

    def near_copies(self) -> list[tuple[str, str, float]]:
        """Return the pairs of near copies among the compared contents, the smaller md5 first, and how alike they are."""
        if self.path is None:
            return []
        return list(self._do(lambda database: database.execute("SELECT one, other, likeness FROM copies").fetchall()) or ())

    def add_compared(self, md5s: Iterable[str], pairs: Iterable[tuple[str, str, float]]) -> None:
        """Keep which contents were compared with all compared ones, and the pairs of near copies among them.

        Raises:
            OSError: the disk is full.
        """
        if self.path is None:
            return
        names, lines = [(md5,) for md5 in md5s], list(pairs)

        def write(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR REPLACE INTO copies VALUES (?, ?, ?)", lines)
            database.executemany("INSERT OR REPLACE INTO compared VALUES (?)", names)

        self._do(write)

    def _do(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run one transaction; a store that is damaged as a whole is removed, and has no facts then."""
        with self._lock:
            try:
                with self._open() as database:
                    return action(database)
            except sqlite3.OperationalError as error:
                full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(self.path)) from error
            except sqlite3.DatabaseError as error:
                assert self.path is not None
                self._say(f"{self.path} is damaged ({error}); its images are read again")
                for path in (self.path, self.path.with_name(f"{self.path.name}-journal")):
                    path.unlink(missing_ok=True)
            with self._open() as database:
                return action(database)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=_PATIENCE_S)
        try:
            with database:
                for table in _TABLES:
                    database.execute(f"CREATE TABLE IF NOT EXISTS {table} WITHOUT ROWID")
                yield database
        finally:
            database.close()


_TABLES = (
    "facts (md5 TEXT PRIMARY KEY, facts TEXT, picture BLOB, crc INTEGER)",
    "compared (md5 TEXT PRIMARY KEY)",
    "copies (one TEXT, other TEXT, likeness REAL, PRIMARY KEY (one, other))",
)
_NAMES = tuple(field.name for field in dataclasses.fields(Facts) if field.name != "picture")


def _packed(facts: Facts) -> tuple[str, bytes]:
    return json.dumps([getattr(facts, name) for name in _NAMES]), facts.picture


def _unpacked(text: str, picture: bytes) -> Facts:
    values: dict[str, Any] = dict(zip(_NAMES, json.loads(text), strict=True))
    values |= {"mode": sys.intern(values["mode"]), "format": sys.intern(values["format"]), "notes": tuple(values["notes"])}
    return Facts(**values, picture=picture)


def _crc(md5: str, text: Any, picture: Any) -> int:
    return zlib.crc32(bytes(picture), zlib.crc32(f"{md5}{text}".encode()))


@cache
def _rules(most_bytes: int) -> str:
    """Return a hash of all that the facts of a content, and the likeness of two, depend on."""
    digest = hashlib.md5(f"{PIL.__version__} {most_bytes}".encode(), usedforsecurity=False)
    for path in (decoding.__file__, file_kinds.__file__, __file__, Path(__file__).with_name("copies.py")):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]


# --- reading --------------------------------------------------------------------------------------------------------------------------


def gather(
    files: Sequence[tuple[Path, str]],
    store: FactStore,
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int | None = None,
    contents: Path | None = None,
) -> Iterator[tuple[int, str, Facts]]:
    """Yield the number, the md5 and the facts of each file: first those whose content is known, then the others, which are read and measured.

    Args:
        files: path, and md5 of the content if somebody knows it, else "". The md5 that is yielded for a file that is read is that of its
            content now: the caller compares.
        progress: called with (files done, number of files).
        threads: reading threads; by default one per available CPU and at least 4, since reading waits for the disk.
        contents: where files are kept by md5 that are gone or altered (see `read_recorded`); None reads them as they are now.

    Raises:
        DataError: a file cannot be read.
    """
    by_content: dict[str, list[int]] = defaultdict(list)
    for number, (_, md5) in enumerate(files):
        by_content[md5].append(number)
    done = 0
    for md5, facts in store.known(md5 for md5 in by_content if md5):
        for number in by_content.pop(md5):
            done += 1
            yield number, md5, facts
    if done:
        progress(done, len(files))
    unread = sorted(number for numbers in by_content.values() for number in numbers)
    fresh: dict[str, Facts] = {}
    try:
        with ThreadPoolExecutor(threads or max(4, available_cpus())) as pool:
            for number, (md5, facts) in zip(
                unread, pool.map(lambda number: _read(*files[number], contents, store.most_bytes), unread), strict=True
            ):
                fresh[md5] = facts
                if len(fresh) >= _AT_ONCE:
                    store.add(fresh)
                    fresh = {}
                done += 1
                progress(done, len(files))
                yield number, md5, facts
    finally:
        store.add(fresh)


def _read(path: Path, md5: str, contents: Path | None, most_bytes: int) -> tuple[str, Facts]:
    try:
        content, now = read_recorded(path, md5, contents)
    except OSError as error:
        raise decoding.unreadable(path, error) from error
    return now, measure(content, most_bytes)
