"""What is wrong with the data: images with a finding in quality.csv, and alarms in alarms.json."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tlpipeline import records
from tlpipeline.alarms import Alarm


@dataclass(frozen=True)
class Finding:
    """A line of quality.csv: an image, what is wrong with it, and the details, such as the path of its copy."""

    path: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Quality:
    """The result of the stage check. The findings of a kind are together, the worst first."""

    findings: tuple[Finding, ...]
    alarms: tuple[Alarm, ...]


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names as words: "a, b and c", "a, b, c, d and 5 others"."""
    shown = list(names[:most]) + ([f"{len(names) - most} others"] if len(names) > most else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def write_quality(quality: Quality, findings: Path, alarms: Path) -> None:
    """Write the findings as CSV and the alarms as JSON."""
    with findings.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "kind", "detail"])
        writer.writerows((finding.path, finding.kind, finding.detail) for finding in quality.findings)
    alarms.write_text(json.dumps([asdict(alarm) for alarm in quality.alarms], indent=1) + "\n", encoding="utf-8")


def read_quality(findings: Path, alarms: Path) -> Quality:
    """Read the files of `write_quality`.

    Raises:
        WorkspaceError: one of them is missing or damaged.
    """
    return Quality(tuple(records.read_csv(Finding, findings, records.ANEW)), tuple(records.read(list[Alarm], alarms, records.ANEW)))
