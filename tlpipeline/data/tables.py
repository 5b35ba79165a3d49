"""A table of labels: `path,label[,split][,group]`, as CSV or parquet."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tlpipeline.data.layouts import split_named
from tlpipeline.errors import DataError

ONE_CLASS = (
    "tlpipeline gives each image exactly one class: several labels for an image (multi-label) and numbers to predict (regression) are not "
    "supported."
)
_NUMBERS, _IMAGES_PER_NUMBER = 100, 10  # more numbers than this, with fewer images each, are measurements and not classes


@dataclass(frozen=True, slots=True)
class Line:
    """What a table says of a file; `problem` is the reason why it cannot be used, "" if it can."""

    label: str
    split: str
    group: str
    problem: str = ""


@dataclass(frozen=True)
class LabelTable:
    """The lines of a table by their paths, which start from the folder of images.

    Attributes:
        name: of the file.
        columns: its columns.
        grouped: the column that has the groups, "" for none.
    """

    name: str
    lines: dict[str, Line]
    columns: tuple[str, ...]
    grouped: str = ""
    given: frozenset[str] = field(default=frozenset())


def read_table(path: Path, group: str = "") -> LabelTable:
    """Read a table of labels.

    Args:
        path: a file that ends with .csv, .tsv or .parquet.
        group: name of the column that has the groups; "" for `group`, if there is one.

    Raises:
        DataError: the file is missing, damaged or empty, a column is missing, or the labels are no classes.
    """
    columns, rows = _rows(path)
    lower = {name.strip().casefold(): name for name in reversed(columns)}
    if missing := [name for name in ("path", "label") if name not in lower]:
        others = [name for name in columns if name.strip().casefold() != "path"]
        hint = ""
        if "label" in missing and len(others) > 1 and all(str(row[columns.index(o)]).strip() in ("0", "1", "0.0", "1.0") for row in rows for o in others):  # fmt: skip
            hint = f" {ONE_CLASS}"
        raise DataError(
            f"expected the columns path and label, and perhaps split and group, in {path}, found {', '.join(columns) or 'none'}. Rename the "
            f"columns.{hint}"
        )
    if not rows:
        raise DataError(f"expected lines of path,label in {path}, found none. Add a line for each image.")
    where = {name: columns.index(lower[name]) for name in ("path", "label", "split") if name in lower}
    grouped = group if group in columns else lower.get("group", "") if not group else ""
    lines: dict[str, Line] = {}
    numbers: dict[str, int] = {}
    labels: Counter[str] = Counter()
    given: set[str] = set()
    blanks = False
    for number, row in enumerate(rows, 2):
        name = _relative(row[where["path"]])
        label = row[where["label"]].strip()
        stated = row[where["split"]].strip() if "split" in where else ""
        split = split_named(stated)
        problem = "" if label else f"no label in {path.name} (line {number})"
        if stated and not split:
            problem = problem or f"the split {stated!r} in {path.name} (line {number}) is none of train, val and test"
        line = Line(label, split, row[columns.index(grouped)].strip() if grouped else "", problem)
        earlier = lines.get(name)
        if earlier is not None and earlier != line:
            what = "labels" if earlier.label != line.label else "splits or groups"
            values = f": {earlier.label} and {label}" if what == "labels" else ""
            line = Line(label, split, "", f"two {what} in {path.name} (lines {numbers[name]} and {number}){values}")
        else:
            numbers[name] = number
        lines[name] = line
        if label:
            labels[label] += 1
        given |= {split} - {""}
        blanks = blanks or not split
    _require_classes(path, labels)
    return LabelTable(path.name, lines, tuple(columns), grouped, frozenset(given | {"train"} if given and blanks else given))


def read_paths(path: Path) -> list[str]:
    """Return the column `path` of a table, in its order.

    Args:
        path: a file that ends with .csv, .tsv or .parquet.

    Raises:
        DataError: the file is missing, damaged or empty, or has no such column.
    """
    columns, rows = _rows(path)
    index = next((i for i, name in enumerate(columns) if name.strip().casefold() == "path"), None)
    if index is None:
        raise DataError(f"expected the column path in {path}, found {', '.join(columns) or 'none'}. Rename the column.")
    if not rows:
        raise DataError(f"expected a line for each image in {path}, found none. Add the paths, which start from the table's folder.")
    return [row[index] for row in rows]


def _relative(text: str) -> str:
    """Return a path as it is written below the folder of images."""
    return PurePosixPath(text.strip().replace("\\", "/")).as_posix()


def _require_classes(path: Path, labels: Counter[str]) -> None:
    """Check that the labels are one class for each image.

    Raises:
        DataError: they name several classes, or are measurements.
    """
    for separator in ";|,":
        several = {label: [part.strip() for part in label.split(separator) if part.strip()] for label in labels if separator in label}
        parts = Counter(part for each in several.values() if len(each) > 1 for part in each)
        if parts and any(number > 1 or part in labels for part, number in parts.items()):
            example = next(label for label, each in several.items() if len(each) > 1)
            raise DataError(f"expected one class in the column label of {path}, found {example!r}. {ONE_CLASS}")
    values = [_number(label) for label in labels]
    if values and all(value is not None for value in values):
        fractions = any(value is not None and not value.is_integer() for value in values)
        if fractions or (len(labels) > _NUMBERS and labels.total() < _IMAGES_PER_NUMBER * len(labels)):
            raise DataError(
                f"expected classes in the column label of {path}, found {len(labels)} numbers, such as {next(iter(labels))}. {ONE_CLASS} Name "
                "ranges of numbers as classes."
            )


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) else None


def unmatched(table: LabelTable, files: Iterable[str], folder: Path) -> str:
    """Return what to change in a table of which no line names a file of the folder."""
    first, listed = next(iter(table.lines)), list(files)
    names = {PurePosixPath(name).name: name for name in listed}
    stems = {PurePosixPath(name).stem: name for name in listed}
    own = PurePosixPath(first)
    advice = "Write each path as it is below that folder"
    if own.name in names:
        advice = f"Write {names[own.name]!r} for {first!r}: paths start from the folder of images"
    elif own.name in stems:
        advice = f"Write {stems[own.name]!r} for {first!r}: paths have their ending"
    return (
        f"expected paths of files in {folder} in {table.name}, found none that is there, such as {first!r}; a file there is "
        f"{listed[0] if listed else 'missing'!r}. {advice}."
    )


def _rows(path: Path) -> tuple[list[str], Sequence[list[str]]]:
    """Return the columns of a table and its lines as texts.

    Raises:
        DataError: it is missing or damaged.
    """
    if not path.is_file():
        raise DataError(f"expected the table {path}, found {'a folder' if path.exists() else 'no such file'}. Name a CSV or parquet file.")
    try:
        return _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    except (UnicodeDecodeError, csv.Error, OSError, ValueError) as error:
        raise DataError(
            f"expected a table of labels in {path}, which cannot be read: {error}. Save it as CSV in UTF-8, or as parquet."
        ) from error


def _csv(path: Path) -> tuple[list[str], Sequence[list[str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        file.seek(0)
        delimiter = max("\t;,", key=lambda character: (head.count(character), character == ","))
        lines = [line for line in csv.reader(file, delimiter=delimiter, strict=True) if line]
    columns = [name.strip() for name in lines[0]] if lines else []
    if odd := next((number for number, line in enumerate(lines[1:], 2) if len(line) != len(columns)), None):
        raise ValueError(f"line {odd} has {len(lines[odd - 1])} values for {len(columns)} columns")
    return columns, lines[1:]


def _parquet(path: Path) -> tuple[list[str], Sequence[list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    texts = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), [list(row) for row in zip(*texts, strict=True)]
