"""What is wrong with the data: images with a finding in quality.csv, and alarms in alarms.json."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tlpipeline import records
from tlpipeline.alarms import WARN, Alarm
from tlpipeline.data.dataset import Manifest, facts_of
from tlpipeline.data.facts import FactStore
from tlpipeline.data.splits import SPLIT_NAMES


@dataclass(frozen=True)
class Finding:
    """A line of quality.csv: an image, what is wrong with it, and the details, such as the path of its copy."""

    path: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Quality:
    """The result of the stage check."""

    findings: tuple[Finding, ...]
    alarms: tuple[Alarm, ...]


def check(images: Path, manifest: Manifest, store: FactStore, progress: Callable[[int, int], None]) -> Quality:
    """Look for what is wrong with the data.

    Args:
        images: folder of the images.
        store: facts about contents; images that it lacks are read.
        progress: called with (images done, number of images).
    """
    rows = manifest.used(*SPLIT_NAMES)
    findings = [Finding(row.path, "flat", "one color") for row, facts in facts_of(images, rows, store, progress) if facts.flat]
    alarms = []
    if findings:
        alarms.append(Alarm("flat", WARN, f"{len(findings)} images are one flat color (quality.csv)"))
    return Quality(tuple(sorted(findings, key=lambda finding: finding.path)), tuple(alarms))


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
