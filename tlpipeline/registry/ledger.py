"""verdicts.jsonl: a line for each model that the gate judged, committed with its run. Git keeps what a line was before.

It says whether a version was accepted, by the gate or by a person, and how often the present test images have judged before.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tlpipeline import records
from tlpipeline.choice.forecast import Forecast
from tlpipeline.errors import RegistryError
from tlpipeline.evaluation.verdict import Verdict
from tlpipeline.files import write_bytes

LEDGER = "verdicts.jsonl"
_SKETCH = 16


@dataclass(frozen=True)
class Entry:
    """A line of the ledger.

    Attributes:
        model: its hash in DVC.
        version: as which it is registered, "" if it is not.
        test: from `sketch`, of the test images that judged it.
        verdict: of the gate; with `because` if a person accepted the model.
        forecast: what the decision expected of the model, and what was measured; None where nothing was expected, or an older version wrote it.
    """

    model: str
    version: str
    test: tuple[str, ...]
    verdict: Verdict
    forecast: Forecast | None = None


def read(root: Path) -> list[Entry]:
    """Return the lines of the workspace's ledger, the oldest first; none if there is no file.

    Raises:
        RegistryError: a line is damaged.
    """
    path = root / LEDGER
    return parse(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.exists() else []


def parse(text: str, name: str) -> list[Entry]:
    """Return the lines of a ledger of this name."""
    way_out = f"Restore it with `git checkout {LEDGER}`, or remove the line: then its verdict is forgotten."
    return [
        records.parse(Entry, line, f"line {number} of {name}", way_out, RegistryError)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def record(root: Path, entry: Entry) -> None:
    """Write the line of a model; it replaces an earlier one."""
    entries = [*(other for other in read(root) if other.model != entry.model), entry]
    write_bytes("".join(f"{json.dumps(asdict(one))}\n" for one in entries).encode(), root / LEDGER)


def find(entries: Sequence[Entry], model: str) -> Entry | None:
    """Return the line of a model by its hash."""
    return next((entry for entry in entries if model and entry.model == model), None)


def sketch(md5s: Iterable[str]) -> tuple[str, ...]:
    """Return a few test images that stand for all: those whose md5 ends lowest, by its last eight digits.

    Of two sets, the sketches tell how many images they share (Broder 1997, On the resemblance and containment of documents).
    """
    return tuple(sorted(md5[-8:] for md5 in md5s)[:_SKETCH])


def times_judged(entries: Iterable[Entry], md5s: Iterable[str]) -> int:
    """Return how many of these verdicts an image of a test split took part in, on average.

    Args:
        md5s: of the test images of today.
    """
    endings = {md5[-8:] for md5 in md5s}
    shares = []
    for entry in entries:
        # What ends no higher than the sketch would be in it, had it been among the test images then.
        comparable = [e for e in endings if len(entry.test) < _SKETCH or e <= entry.test[-1]]
        shares.append(len(endings & set(entry.test)) / len(comparable) if comparable else 0.0)
    return round(sum(shares))
