"""Predictions as text for a terminal, JSON, CSV and parquet, written while they are computed."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tlpipeline.display import printable
from tlpipeline.errors import PipelineError, nearest
from tlpipeline.files import atomic_write
from tlpipeline.registry.predict import Prediction

TERMINAL, JSON, CSV, PARQUET = "terminal", "json", "csv", "parquet"
FORMATS = (TERMINAL, JSON, CSV, PARQUET)

Write = Callable[[Sequence[Prediction]], None]


def chosen_format(named: str, out: Path | None) -> str:
    """Return the format: the one that is named, else the ending of the file, else the terminal's.

    Raises:
        PipelineError: there is no such format, or parquet has no file to go to.
    """
    form = named or (TERMINAL if out is None else {".txt": TERMINAL}.get(out.suffix.lower(), out.suffix.lower().removeprefix(".")))
    if form not in FORMATS:
        where = "--format" if named else f"the ending of --out {out}"
        raise PipelineError(f"expected one of {', '.join(FORMATS)} in {where}, found {form!r}; {nearest(form, FORMATS)}")
    if form == PARQUET and out is None:
        raise PipelineError("expected a file for parquet, found no --out. Name one: --out predictions.parquet")
    return form


@contextmanager
def open_writer(form: str, out: Path | None, classes: Sequence[str], to_terminal: Callable[[str], None]) -> Iterator[Write]:
    """Yield a function that writes predictions; the file takes its name when the body has succeeded.

    Args:
        form: one of `FORMATS`; out: the file, None for standard output.
        classes: names in the order of the columns.
        to_terminal: prints text, whatever characters it has.
    """
    if form == PARQUET:
        assert out is not None
        with atomic_write(out) as draft, _parquet(draft, classes) as write:
            yield write
    elif out is None:
        with _text(form, classes, to_terminal) as write:
            yield write
    else:
        # Names of files that are no UTF-8 keep their bytes.
        with (
            atomic_write(out) as draft,
            draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
            _text(form, classes, file.write) as write,
        ):
            yield write


@contextmanager
def _text(form: str, classes: Sequence[str], put: Callable[[str], Any]) -> Iterator[Write]:
    count = 0

    def write(predictions: Sequence[Prediction]) -> None:
        nonlocal count
        for prediction in predictions:
            if form == JSON:
                put(f"{',' if count else '['}\n{json.dumps(prediction.to_json(), indent=2)}")
            elif form == CSV:
                put(_line(_cells(prediction, classes)))
            else:
                put(f"{printable(str(prediction), lines=False)}\n")
            count += 1

    if form == CSV:
        put(_line([*_COLUMNS, *(f"p:{label}" for label in classes)]))
    yield write
    if form == JSON:
        put("\n]\n" if count else "[]\n")


_COLUMNS = {"path": str, "label": str, "probability": float, "distance": float, "known": bool, "error": str, "model": str}


def _cells(prediction: Prediction, classes: Sequence[str]) -> list[Any]:
    values = prediction.to_json()
    return [*(values[name] for name in _COLUMNS), *(prediction.probabilities.get(label) for label in classes)]


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


@contextmanager
def _parquet(path: Path, classes: Sequence[str]) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {str: pa.string(), float: pa.float32(), bool: pa.bool_()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in _COLUMNS.items()] + [(f"p:{label}", pa.float32()) for label in classes])
    with pq.ParquetWriter(path, schema, compression="zstd") as file:

        def write(predictions: Sequence[Prediction]) -> None:
            rows = [_cells(prediction, classes) for prediction in predictions]
            # A file name that is no UTF-8 cannot stand in a parquet file: its bytes are escaped.
            columns = [[printable(cell) if isinstance(cell, str) else cell for cell in column] for column in zip(*rows, strict=True)]
            if columns:
                file.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema))

        yield write
