"""Near copies: images that show the same picture in other bytes, within and across splits, and with two labels."""

from collections.abc import Sequence

from tlpipeline.alarms import BLOCK, WARN, Alarm
from tlpipeline.checking.quality import Finding
from tlpipeline.data.copies import Pair
from tlpipeline.data.dataset import Row
from tlpipeline.data.splits import TEST

KIND = "near copies"


def find(rows: Sequence[Row], pairs: Sequence[Pair], share: float) -> tuple[list[Finding], list[Alarm]]:
    """Return a finding for each pair, and an alarm with the counts.

    Args:
        rows: the distinct images of all splits.
        pairs: md5s of near copies, and how alike they are.
        share: of the test images, with near copies in training, from which the alarm blocks a promotion.
    """
    row_of = {row.md5: row for row in rows}
    lines: list[tuple[bool, bool, float, Row, Row]] = []
    for one, other, alike in pairs:
        if one in row_of and other in row_of:
            # The test image comes first; of the same split, the one whose path does.
            a, b = sorted((row_of[one], row_of[other]), key=lambda row: (row.split != TEST, row.path))
            lines.append((a.split != b.split, a.label != b.label, alike, a, b))
    lines.sort(key=lambda line: (not line[0], not line[1], -line[2], line[3].path, line[4].path))
    findings = [
        Finding(a.path, "near copy", f"{b.path}{f' in {b.split}' if across else ''}{f', labeled {b.label}' if conflict else ''}")
        for across, conflict, _, a, b in lines
    ]
    if not lines:
        return [], []
    images = {row.md5 for *_, a, b in lines for row in (a, b)}
    text = f"{_counted(len(images), 'image is', 'images are')} the same picture as another one in other bytes"
    if conflicts := sum(conflict for _, conflict, *_ in lines):
        text += f"; {_counted(conflicts, 'pair has', 'pairs have')} two labels"
    tests = sum(row.split == TEST for row in rows)
    leaked = {a.md5 for across, _, _, a, _ in lines if across and a.split == TEST}
    if leaked:
        text += f"; {len(leaked)} of {tests} test images have a near copy in training, which makes the accuracy too high"
    return findings, [Alarm(KIND, BLOCK if leaked and len(leaked) >= share * tests else WARN, f"{text} (quality.csv)")]


def _counted(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"
