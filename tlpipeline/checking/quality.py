"""What is wrong with the data: images with a finding in quality.csv, and alarms in alarms.json."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tlpipeline import records
from tlpipeline.alarms import WARN, Alarm
from tlpipeline.data.dataset import Manifest, read_image
from tlpipeline.data.splits import SPLIT_NAMES

_SIDE = 32  # pixels of the short side that suffice to see that an image is flat


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


def check(images: Path, manifest: Manifest, progress: Callable[[int, int], None]) -> Quality:
    """Look for what is wrong with the data.

    Args:
        images: folder of the images.
        progress: called with (images done, number of images).
    """
    rows = manifest.used(*SPLIT_NAMES)
    findings = []
    for done, row in enumerate(rows, 1):
        if np.ptp(np.asarray(read_image(images, row, _SIDE))) == 0:
            findings.append(Finding(row.path, "flat", "one color"))
        progress(done, len(rows))
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
