"""Images on disk: reading them whatever their mode, listing them in a manifest, and splits that never move.

An image's side follows from its content: `u = md5(file bytes) / 2^128`; below .70 it is train, below .85 val, else test. Class, path and
seed play no part, so an image keeps its side whatever is added or removed. The few exceptions that small classes need are lines of
`splits.csv`; a given `{train,val,test}/<class>` layout wins over both.
"""

import csv
import hashlib
import io
import math
import os
import struct
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tlpipeline.errors import DataChanged, DataError

TRAIN, VAL, TEST = "train", "val", "test"
SIDES = (TRAIN, VAL, TEST)
GIVEN_SIDES = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
TRAIN_BELOW, VAL_BELOW = 0.70, 0.85
MINIMUM_PER_CLASS = 3
_LOOK_INTO_BELOW = 50  # images of a class below which a broken one could be the only one of its side

# What decoders raise on damaged files (found by feeding them some).
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError,
    AssertionError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]

# Damaged EXIF blocks and TIFF tags only warn; the pixels are checked by loading them. Said once for the process, because
# `warnings.catch_warnings` in the threads that decode would leave the filters of the whole process changed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class Row:
    """One readable image file: a line of the manifest.

    `duplicate_of` is the path of the copy that is used instead ("" if this one is used): exact copies count once.
    """

    path: str
    md5: str
    label: str
    split: str
    width: int
    height: int
    mode: str
    duplicate_of: str


@dataclass(frozen=True)
class Rejected:
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What ingest found: readable images, rejected files, and remarks for people (leaks, classes without test images)."""

    rows: tuple[Row, ...]
    rejected: tuple[Rejected, ...]
    remarks: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their indices: sorted."""
        return tuple(sorted({row.label for row in self.rows}))

    def used(self, *sides: str) -> list[Row]:
        """Return the distinct images of these sides, in the order of their md5, so that file names do not matter."""
        return sorted((r for r in self.rows if r.split in sides and not r.duplicate_of), key=lambda r: r.md5)


# --- pixels ---------------------------------------------------------------------------------------------------------------------------


def decode(content: bytes, at_least: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied; of an animation the first frame is taken; transparency is laid over white; 16-bit greys are scaled by their
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
        grey = values.astype(np.float64) / 65535.0
        grey[values == image.info.get("transparency", -1)] = 1.0
        return Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8), "L").convert("RGB")
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
        grey = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low if high > low else 1.0)
        return Image.fromarray((grey * 255).round().astype(np.uint8), "L").convert("RGB")
    return image.convert("RGB")


def read(root: Path, row: Row, at_least: int | None = None) -> Image.Image:
    """Read the image of a manifest row, checking that it is still the one that was listed; `at_least` as for `decode`.

    Raises:
        DataChanged: the file is gone, or its content has another md5 than the manifest says.
        DataError: it cannot be read, or not be decoded here.
    """
    path = root / row.path
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataChanged(f"expected the image {row.path}, which the manifest lists, but it is gone. {_WAY_BACK}") from error
    except OSError as error:
        raise DataError(
            f"expected an image at {path}, but it cannot be read: {error.strerror or error}. Make it readable, then run again."
        ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != row.md5:
        raise DataChanged(f"expected the image {row.path} as it was listed (md5 {row.md5}), found other content (md5 {found}). {_WAY_BACK}")
    try:
        return decode(content, at_least)
    except UNREADABLE as error:
        # It was decoded when it was listed, by another Pillow perhaps, or with more memory.
        raise DataError(
            f"expected an image at {path}, but it cannot be read: {_why(error)}. Replace it or leave it out, and run again."
        ) from error


def cpus() -> int:
    """Return how many CPUs this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_WAY_BACK = "The data folder changed while a run was on: start the run again, or restore the images with `dvc checkout`."


# --- listing --------------------------------------------------------------------------------------------------------------------------


def ingest(images: Path, exceptions: Mapping[str, str], progress: Callable[[int, int], None], threads: int | None = None) -> Manifest:
    """Read every file below `images` once and list it, with the side it belongs to.

    Args:
        images: folder of `<class>/...` or of `{train,val,test}/<class>/...`.
        exceptions: md5 to side, from splits.csv; they win over the rule by content, not over a given layout.
        progress: called with (files done, files in all).
        threads: readers; by default one for each CPU that may be used, at least 4 (reading waits for the disk).

    Returns:
        The manifest, its rows sorted by path.

    Raises:
        DataError: the folder is missing or empty, has no class folders, half a layout of sides or files that cannot be opened; it has one
            class only, a class has fewer than 3 distinct images, or no file is an image.
    """
    paths = files(images)
    given = _given_sides(images)
    done = 0
    rows: list[Row] = []
    rejected: list[Rejected] = []
    with ThreadPoolExecutor(threads or max(4, cpus())) as pool:
        for result in pool.map(lambda path: _inspect(images, path, given), paths):
            done += 1
            progress(done, len(paths))
            if isinstance(result, Row):
                rows.append(result)
            else:
                rejected.append(result)
    rows, conflicting = _without_conflicts(rows)
    rejected += conflicting
    if not rows:
        reasons = Counter(r.reason.split(":")[0] for r in rejected)
        raise DataError(
            f"expected images in {images}, but none of its {len(paths)} files can be used ({_counted(reasons)}). "
            f"The first: {rejected[0].path}: {rejected[0].reason}. Put readable images there, each in one class folder only."
        )
    rows, remarks = _without_copies(rows, given)
    if given:
        exceptions = {}  # a given layout wins over splits.csv too
    rows = [replace(r, split=r.split or exceptions.get(r.md5) or side_of(r.md5, carve_val=given == "no val")) for r in rows]
    _check_classes(images, rows, rejected, given)
    remarks += _empty_sides(rows)
    return Manifest(tuple(sorted(rows, key=lambda r: r.path)), tuple(sorted(rejected, key=lambda r: r.path)), tuple(remarks))


def side_of(md5: str, carve_val: bool = False) -> str:
    """Return the side that an image's content gives it.

    Args:
        md5: 32 hexadecimal digits.
        carve_val: the test side is given already: keep the share of train to val (70 to 15) among the rest.
    """
    u = int(md5, 16) / 2**128
    if carve_val:
        return TRAIN if u < TRAIN_BELOW / VAL_BELOW else VAL
    return TRAIN if u < TRAIN_BELOW else VAL if u < VAL_BELOW else TEST


def readable(images: Path) -> list[Row]:
    """Return the distinct readable images below a folder, whatever its layout, without labels and sides: for statistics only."""
    found: dict[str, Row] = {}
    for path in sorted(p for p in images.rglob("*") if p.is_file() and not p.name.startswith(".")):
        row = _inspect(images.parent, path, "")
        if isinstance(row, Row):
            found.setdefault(row.md5, replace(row, path=path.relative_to(images).as_posix(), label="", split=""))
    return sorted(found.values(), key=lambda row: row.md5)


def selects(row: Row) -> bool:
    """Say whether a validation image belongs to the half that may select (a slice point, an epoch); the other half only judges.

    By content, so that it never changes halves. The last digit of the md5 is used, because the first ones give the side.
    """
    return row.md5[-1] in "02468ace"


def files(images: Path) -> list[Path]:
    """Return all files below a folder but the system's own, sorted.

    Raises:
        DataError: it is missing, empty, or has no class folders.
    """
    if not images.is_dir():
        raise DataError(
            f"expected a folder of images at {images}, found {'a file' if images.exists() else 'nothing'}. "
            "Put one folder per class there, or set data.images in params.yaml."
        )
    # A dot-file (.gitignore, .DS_Store) is the system's, not the user's.
    found = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(images, onerror=_unreadable, followlinks=True)
        for name in names
        if not name.startswith(".") and not any(part.startswith(".") for part in Path(folder).relative_to(images).parts)
    )
    if not found:
        raise DataError(f"expected images in {images}, found an empty folder. Put one folder of images per class there.")
    # Neither can be versioned or listed.
    if unnamed := [path for path in found if not _is_text(path)]:
        raise DataError(
            f"expected file names in UTF-8 in {images}, found {len(unnamed)} others, such as {bytes(unnamed[0])!r}. Rename them."
        )
    if gone := [path for path in found if not path.is_file()]:
        raise DataError(
            f"expected files in {images}, found {len(gone)} links to nothing or devices, such as {gone[0]}. "
            "Remove them, or restore what they point to (`dvc checkout`)."
        )
    if not any(len(path.relative_to(images).parts) > 1 for path in found):
        raise DataError(
            f"expected class folders in {images}, found {len(found)} files and no folder. Sort the images as {images.name}/<class>/<image>."
        )
    return found


def content_of(path: Path) -> bytes:
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


def linked_folders(images: Path) -> list[Path]:
    """Return the links to folders below a folder."""
    return sorted(Path(folder) / name for folder, folders, _ in os.walk(images) for name in folders if (Path(folder) / name).is_symlink())


def _unreadable(error: OSError) -> None:
    raise DataError(f"expected to read the folder {error.filename}, but: {error.strerror}. Make it readable or remove it, then run again.")


def _is_text(path: Path) -> bool:
    return str(path).encode("utf-8", "replace") == bytes(path)


def _given_sides(images: Path) -> str:
    """Say which layout this is: "" (by content), "all" (train, val and test are given) or "no val".

    Raises:
        DataError: two folders or more are named as sides, but train or test is not there or other folders stand beside them; by content,
            "train" and "val" would silently become two classes.
    """
    names = {p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith(".")}
    sides = {n for n in names if n.casefold() in GIVEN_SIDES}
    if len(sides) < 2:
        return ""
    given = {GIVEN_SIDES[n.casefold()] for n in sides}
    if names != sides or not {TRAIN, TEST} <= given:
        raise DataError(
            f"expected the folders train, test and perhaps val in {images}, or else one folder per class, found {', '.join(sorted(names))}. "
            "Give it train and test and nothing else, or sort the images by class alone: then the sides follow from their content."
        )
    return "all" if VAL in given else "no val"


def _inspect(images: Path, path: Path, given: str) -> Row | Rejected:
    where = path.relative_to(images)
    parts = where.parts
    if len(parts) < (3 if given else 2):
        return Rejected(where.as_posix(), "outside any class folder")
    side = GIVEN_SIDES[parts[0].casefold()] if given else ""
    if given == "no val" and side == TRAIN:
        side = ""  # decided by content: val is carved out of train
    label = parts[1] if given else parts[0]
    content = content_of(path)
    if not content:
        return Rejected(where.as_posix(), "empty file")
    try:
        image = decode(content)
        with Image.open(io.BytesIO(content)) as original:
            mode = original.mode
    except UNREADABLE as error:
        return Rejected(where.as_posix(), _why(error))
    if 0 in image.size:
        return Rejected(where.as_posix(), "zero size")
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Row(where.as_posix(), md5, label, side, image.width, image.height, mode, "")


def _why(error: Exception) -> str:
    """Return in words why a file could not be decoded."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else f"broken: {str(error) or type(error).__name__}"


def _without_conflicts(rows: Sequence[Row]) -> tuple[list[Row], list[Rejected]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[row.md5].add(row.label)
    kept = [r for r in rows if len(labels[r.md5]) == 1]
    out = [
        Rejected(r.path, f"the same image in several classes: {', '.join(sorted(labels[r.md5]))}") for r in rows if len(labels[r.md5]) > 1
    ]
    return kept, out


def _without_copies(rows: Sequence[Row], given: str) -> tuple[list[Row], list[str]]:
    """Mark all but one of each set of exact copies; in a given layout the copy in test stays, so that the test side is as it was given."""
    rank = {TEST: 0, VAL: 1, TRAIN: 2, "": 2}
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.md5].append(row)
    kept: list[Row] = []
    leaked: Counter[str] = Counter()
    for copies in groups.values():
        copies.sort(key=lambda r: (rank[r.split], r.path))
        first = copies[0]
        kept.append(first)
        for copy in copies[1:]:
            kept.append(replace(copy, duplicate_of=first.path))
        for side in {copy.split or TRAIN for copy in copies[1:]} - {first.split or TRAIN}:
            leaked[f"{first.split} images stand in {side} too"] += 1
    if not given:
        return kept, []
    remarks = [
        f"leak: {n} distinct {what}, byte for byte; they are used in {what.split()[0]} only" for what, n in sorted(leaked.items()) if n
    ]
    return kept, remarks


def _check_classes(images: Path, rows: Sequence[Row], rejected: Sequence[Rejected], given: str) -> None:
    counts = Counter(r.label for r in rows if not r.duplicate_of)
    if len(counts) < 2:
        raise DataError(
            f"expected at least two classes in {images}, found one with usable images: {next(iter(counts))}. "
            "Add a folder of images for each further class."
        )
    at = 1 if given else 0
    for parts in (r.path.split("/") for r in rejected):
        if len(parts) > at + 1:
            counts.setdefault(parts[at], 0)  # a class of which nothing can be used is not silently forgotten
    small = {label: n for label, n in counts.items() if n < MINIMUM_PER_CLASS}
    if small:
        raise DataError(
            f"expected at least {MINIMUM_PER_CLASS} distinct usable images in each class, found {_counted(small)} in {images} "
            f"({len(rejected)} files were rejected). Add images to these classes or remove their folders."
        )
    missing = sorted(set(counts) - {r.label for r in rows if r.split == TRAIN and not r.duplicate_of})
    if missing:
        way_out = "Run `tlpipeline data commit`: it gives small classes a side of each kind in splits.csv."
        if given:
            way_out = "Put more images of these classes into its folder train."
        raise DataError(f"expected training images for each class in {images}, found none for {', '.join(missing)}. {way_out}")


def _empty_sides(rows: Sequence[Row]) -> list[str]:
    remarks = []
    labels = sorted({r.label for r in rows})
    for side, consequence in ((VAL, "not validated"), (TEST, "not evaluated")):
        there = {r.label for r in rows if r.split == side and not r.duplicate_of}
        if missing := [label for label in labels if label not in there]:
            remarks.append(f"{consequence}: no {side} image of {', '.join(missing)}")
    return remarks


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {n}" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- splits.csv -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitException:
    """A line of splits.csv: this content is on this side, whatever the rule says."""

    md5: str
    split: str
    label: str


def read_exceptions(path: Path) -> dict[str, str]:
    """Read splits.csv as md5 to side; a missing file has no exceptions.

    Raises:
        DataError: it is empty or no text, or a line is not `md5,split,label` with a known side.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header, lines = reader.fieldnames, list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_exceptions(path, str(error)) from error
    if header != ["md5", "split", "label"]:
        raise _no_exceptions(path, ",".join(header) if header else "an empty file")
    if others := [line["split"] for line in lines if line["split"] not in SIDES]:
        raise _no_exceptions(path, f"the side {others[0]}")
    return {line["md5"]: line["split"] for line in lines}


def _no_exceptions(path: Path, found: str) -> DataError:
    return DataError(
        f"expected the columns md5,split,label and the sides {', '.join(SIDES)} in {path}, found {found}. "
        f"`git checkout {path.name}` brings back what was recorded."
    )


def write_exceptions(path: Path, new: Iterable[SplitException]) -> None:
    """Append lines to splits.csv (created with its header where it is missing)."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    header = not before
    with path.open("a", newline="", encoding="utf-8") as file:
        if before and not before.endswith("\n"):
            file.write("\n")  # an editor left the last line open
        writer = csv.writer(file, lineterminator="\n")
        if header:
            writer.writerow(["md5", "split", "label"])
        writer.writerows((line.md5, line.split, line.label) for line in new)


def needed_exceptions(
    images: Path, hashes: Mapping[str, str], known: Mapping[str, str], trained_on: Callable[[], frozenset[str]]
) -> tuple[list[SplitException], list[str]]:
    """Find the classes that would have an empty side and give each such side one image.

    The image with the highest u goes to test, the next to val, the lowest to train. Images that a registered version was trained on never
    go to test: the class is then named as not evaluated.

    Args:
        hashes: path below images to md5, of all files.
        known: lines that splits.csv has already.
        trained_on: gives the md5 of all images that a registered version was trained on; asked only where a side is empty.

    Returns:
        The new lines for splits.csv, and remarks.
    """
    if not images.is_dir() or _given_sides(images):
        return [], []
    by_label: dict[str, dict[str, str]] = defaultdict(dict)
    labels: dict[str, set[str]] = defaultdict(set)
    for path, md5 in sorted(hashes.items()):
        label, _, rest = path.partition("/")
        if rest and not any(part.startswith(".") for part in path.split("/")):
            by_label[label].setdefault(md5, path)
            labels[md5].add(label)
    new: list[SplitException] = []
    remarks: list[str] = []
    for label, paths in sorted(by_label.items()):
        usable = {md5: path for md5, path in paths.items() if len(labels[md5]) == 1}
        if len(usable) < _LOOK_INTO_BELOW:
            usable = {md5: path for md5, path in usable.items() if isinstance(_inspect(images, images / path, ""), Row)}
        sides = {md5: known.get(md5) or side_of(md5) for md5 in usable}
        if len(sides) >= MINIMUM_PER_CLASS and set(sides.values()) != set(SIDES):
            lines, remark = _filled(label, sides, trained_on(), frozenset(known))
            new += lines
            remarks += remark
    return new, remarks


def _filled(label: str, sides: dict[str, str], trained_on: frozenset[str], fixed: frozenset[str]) -> tuple[list[SplitException], list[str]]:
    sides = dict(sides)
    lines: list[SplitException] = []
    remarks: list[str] = []
    for side in (TEST, VAL, TRAIN):
        if side in sides.values():
            continue
        # Take from a side that keeps at least one image, and never move what splits.csv already fixed.
        counts = Counter(sides.values())
        free = sorted((md5 for md5, s in sides.items() if counts[s] > 1 and md5 not in fixed and not (side == TEST and md5 in trained_on)))
        if not free:
            remarks.append(f"not {'evaluated' if side == TEST else 'validated'}: {label} has no image that could go to {side}")
            continue
        chosen = free[0] if side == TRAIN else free[-1]
        sides[chosen] = side
        lines.append(SplitException(chosen, side, label))
    return lines, remarks


# --- files ----------------------------------------------------------------------------------------------------------------------------


def write_manifest(manifest: Manifest, path: Path, quarantine: Path) -> None:
    """Write the rows as parquet and the rejected files and remarks as csv; the same manifest gives the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f.name: [getattr(row, f.name) for row in manifest.rows] for f in fields(Row)}
    pq.write_table(pa.table(columns), path, compression="zstd")
    with quarantine.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "reason"])
        writer.writerows((r.path, r.reason) for r in manifest.rejected)
        writer.writerows(("", remark) for remark in manifest.remarks)


def read_manifest(path: Path, quarantine: Path | None = None) -> Manifest:
    """Read what `write_manifest` wrote."""
    import pyarrow.parquet as pq

    # A few thousand at a time, and one string for all rows that say the same: of 100,000 images half of the memory.
    columns = [f.name for f in fields(Row)]
    known: dict[str, str] = {}
    rows: list[Row] = []
    for part in pq.ParquetFile(path).iter_batches(4096, columns=columns):
        values = part.to_pydict()
        for name in ("label", "split", "mode", "duplicate_of"):
            values[name] = [known.setdefault(text, text) for text in values[name]]
        rows += [Row(*line) for line in zip(*(values[name] for name in columns), strict=True)]
    if quarantine is None:
        return Manifest(tuple(rows), (), ())
    with quarantine.open(newline="", encoding="utf-8") as file:
        lines = [(line["path"], line["reason"]) for line in csv.DictReader(file)]
    return Manifest(tuple(rows), tuple(Rejected(p, r) for p, r in lines if p), tuple(r for p, r in lines if not p))


def write_digits(folder: Path) -> int:
    """Write the embedded sample: the 1,797 real handwritten digits that scikit-learn carries, as 32 x 32 grey PNG files in class folders.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (its test part).

    Returns:
        The number of images written.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8), "L")
        grey.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return len(digits.images)
