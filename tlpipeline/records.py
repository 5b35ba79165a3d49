"""Files that the pipeline writes for itself, read back as typed values: JSON as dataclasses, parquet in batches, CSV as lines, tensors.

Such a file may be cut off, edited, or written by another version. The error names the file, the key, what was expected and what was found.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from tlpipeline.errors import PipelineError, WorkspaceError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Extra = Literal["forbid", "ignore"]
BATCH = 4096  # rows of parquet
ANEW = "`tlpipeline run` writes it anew; for `dvc repro`, delete the file first."  # the way out for what a stage wrote
_SHOWN_CHARACTERS = 80
_ADAPTERS: dict[object, TypeAdapter[Any]] = {}


def read(kind: type[T], path: Path, way_out: str, error: type[PipelineError] = WorkspaceError, extra: Extra = "ignore") -> T:
    """Read a JSON file.

    Args:
        kind: a dataclass, or a dict of some.
        way_out: sentence that says how to get a right file.
        error: class of the error.
        extra: what is done with keys that `kind` does not know.

    Raises:
        PipelineError: the file is missing or cut off, a key is missing or unknown, or a value has another type.
    """
    _require_file(path, way_out, error)
    return parse(kind, path.read_bytes(), str(path), way_out, error, extra)


def parse(
    kind: type[T], content: str | bytes, name: str, way_out: str, error: type[PipelineError] = WorkspaceError, extra: Extra = "ignore"
) -> T:
    """Read the content of a JSON file with this name; otherwise as `read`."""
    try:
        return _adapter(kind).validate_json(content, strict=True, extra=extra)
    except ValidationError as invalid:
        raise unlike(name, _difference(invalid), way_out, error) from None


def read_parquet(
    path: Path,
    columns: Mapping[str, type],
    way_out: str,
    prefix: str | None = None,
    error: type[PipelineError] = WorkspaceError,
    optional: Collection[str] = (),
) -> Iterator[Any]:
    """Yield a parquet file as pyarrow's record batches.

    Args:
        columns: names and types (str, int or float) of the columns that are read.
        prefix: the columns whose names begin with it are read as well, as numbers; there must be one.
        way_out, error: as for `read`.
        optional: those of `columns` that the file may lack; the batches then lack them too.

    Raises:
        PipelineError: the file is missing or cut off, or a column is missing, has another type or has gaps.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    _require_file(path, way_out, error)
    is_type = {str: pa.types.is_string, int: pa.types.is_integer, float: pa.types.is_floating}
    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = {name: kind for name, kind in columns.items() if name in schema.names or name not in optional}
            prefixed = [name for name in schema.names if prefix is not None and name.startswith(prefix)]
            if prefix is not None and not prefixed:
                raise unlike(path, f"no column begins with {prefix}", way_out, error)
            for name, kind in {**columns, **dict.fromkeys(prefixed, float)}.items():
                if schema.names.count(name) != 1:
                    raise unlike(path, f"the column {name} is missing or not alone", way_out, error)
                if not is_type[kind](schema.field(name).type):
                    raise unlike(path, f"the column {name} holds {schema.field(name).type}, not {kind.__name__}", way_out, error)
            for batch in file.iter_batches(BATCH, columns=[*columns, *prefixed]):
                if gaps := [name for name in batch.schema.names if batch.column(name).null_count]:
                    raise unlike(path, f"the column {gaps[0]} has gaps", way_out, error)
                batch.validate(full=True)
                yield batch
    except (pa.ArrowException, OSError, UnicodeDecodeError) as damage:
        if isinstance(damage, PermissionError):
            raise
        raise unlike(path, _damaged(damage), way_out, error) from damage


def read_csv(kind: type[T], path: Path, way_out: str, error: type[PipelineError] = WorkspaceError) -> list[T]:
    """Read a CSV file whose columns are the fields of a dataclass.

    Raises:
        PipelineError: it is missing or no text, it has other columns, or a value cannot be read as its type.
    """
    _require_file(path, way_out, error)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            lines, columns = list(reader), reader.fieldnames
    except (UnicodeDecodeError, csv.Error) as damage:
        raise unlike(path, _damaged(damage), way_out, error) from damage
    wanted = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if columns != wanted:
        raise unlike(path, f"its columns are {', '.join(columns or ()) or 'none'}, not {', '.join(wanted)}", way_out, error)
    try:
        return [_adapter(kind).validate_python(line) for line in lines]
    except ValidationError as invalid:
        raise unlike(path, _difference(invalid), way_out, error) from None


def read_tensors(path: Path, way_out: str, error: type[PipelineError] = WorkspaceError) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        PipelineError: it is missing or cut off.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _require_file(path, way_out, error)
    try:
        return dict(load_file(path))
    except SafetensorError as damage:
        raise error(f"expected tensors in {path}, but {_damaged(damage)}. {way_out}") from damage


def unlike(name: str | Path, difference: str, way_out: str, error: type[PipelineError] = WorkspaceError) -> PipelineError:
    """Return the error about a file that is not as this version writes it."""
    return error(f"expected {name} as this version writes it, but {difference}. {way_out}")


def shown(value: object) -> str:
    """Return a short picture of a value from a file."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a section"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float) else f"{value} ({type(value).__name__})"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    if kind not in _ADAPTERS:  # making one takes longer than reading a file
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _require_file(path: Path, way_out: str, error: type[PipelineError]) -> None:
    if not path.is_file():
        raise error(f"expected the file {path}, found {'a folder' if path.is_dir() else 'no such file'}. {way_out}")


def _difference(invalid: ValidationError) -> str:
    """Return the first mistake in plain words."""
    first = invalid.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "json_invalid":
        return _damaged(first["msg"].removeprefix("Invalid JSON: "))
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "unexpected_keyword_argument":
        return f"it has {key}, which is unknown"
    wanted = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key or 'its content'}: expected {wanted}, found {shown(first['input'])}"


def _damaged(reason: object) -> str:
    return f"it is cut off or damaged ({' '.join(str(reason).split())[:200]})"
