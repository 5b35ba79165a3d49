"""How often the stage check raises alarms about the files of real sets: shortcuts, and pictures that show little.

    python -m research.data_quality [--data FOLDER] --work FOLDER [--only NAME ...]

For each set: the class that facts of the files tell best, the same for labels that were shuffled ten times, what file size, brightness and the
ratio of the sides would tell, which are no shortcuts, and how many images are listed as flat, dark, bright, blurred or tiny. Then 5 % of the
images, at most a hundred, are blurred, darkened or brightened, and it is counted how many are listed.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from research.units import command_line, folders
from tlpipeline.checking import pictures, shortcuts
from tlpipeline.data import dataset, facts
from tlpipeline.data.dataset import Row
from tlpipeline.data.facts import Facts, FactStore
from tlpipeline.data.splits import SPLIT_NAMES
from tlpipeline.params import CheckParams

SETS = ("neu_steel", "sign_digits", "pacs_sketch", "flowers", "caltech24", "eurosat", "brain_mri", "weather")
SHUFFLES, PLANTED = 10, 0.05  # PLANTED: share of the images
CONTENT: dict[str, Callable[[Facts], float]] = {
    "file size": lambda f: f.file_size,
    "brightness": lambda f: f.brightness,
    "ratio of the sides": lambda f: f.width / f.height,
}
PLANTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(min(image.size) / 32)),
    "dark": lambda image: image.point(lambda value: value // 32),
    "bright": lambda image: image.point(lambda value: 255 - (255 - value) // 32),
}


def best(rows: Sequence[Row], known: Sequence[Facts]) -> shortcuts.Score | None:
    """Return the class that facts of the files tell best, by the lower bound; None if no fact varies."""
    return max(shortcuts.scores(rows, known), key=lambda score: score.low, default=None)


def by_content(rows: Sequence[Row], known: Sequence[Facts], fact: Callable[[Facts], float]) -> float:
    """Return the lower bound of the class that a fact of the content tells best, in eight bins."""
    values = np.array([fact(f) for f in known])
    bins = np.searchsorted(np.quantile(values, np.arange(1, 8) / 8), values)
    # The bin stands for the number of pages, which does not vary in these sets.
    plain = [Facts(pages=int(b)) for b in bins]
    score = best(rows, plain)
    return 0.5 if score is None else score.low


def listed(folder: Path, rows: Sequence[Row], known: Sequence[Facts], kind: str) -> float:
    """Return the share of planted images that are listed as of their kind."""
    drawn = np.random.default_rng(0).permutation(len(rows))[: min(100, round(PLANTED * len(rows)))]
    changed = list(known)
    for i in drawn:
        buffer = io.BytesIO()
        PLANTS[kind](dataset.read_image(folder, rows[i])).save(buffer, "PNG")
        changed[i] = facts.measure(buffer.getvalue())
    paths = {finding.path for finding in pictures.find(rows, changed)[0] if finding.kind == kind}
    return float(np.mean([rows[i].path in paths for i in drawn]))


def main() -> None:
    """Print the table."""
    arguments = command_line(__doc__, SETS)
    sets, threshold = folders(arguments.data, arguments.work), CheckParams().shortcut
    header = [
        "data set",
        "told best, lower bound",
        "alarm",
        "shuffled labels: alarms",
        *CONTENT,
        "listed images",
        *(f"{kind} ones found" for kind in PLANTS),
    ]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name in arguments.only:
        rows = dataset.ingest(sets[name], {}, lambda done, total: None, store=FactStore(arguments.work / "facts")).used(*SPLIT_NAMES)
        by_path = {row.path: f for row, f in dataset.facts_of(sets[name], rows, FactStore(arguments.work / "facts"))}
        known = [by_path[row.path] for row in rows]
        score = best(rows, known)
        told = "no fact varies" if score is None else f"{score.label} by {score.fact}, {score.low:.0%}"
        rng, false = np.random.default_rng(0), 0
        for _ in range(SHUFFLES):
            shuffled = [
                dataclasses.replace(row, label=str(label))
                for row, label in zip(rows, rng.permutation([row.label for row in rows]), strict=True)
            ]
            false += bool(shortcuts.find(shuffled, known, threshold)[1])
        counts = Counter(finding.kind for finding in pictures.find(rows, known)[0])
        cells = [
            f"{name} ({len(rows)})", told, "yes" if shortcuts.find(rows, known, threshold)[1] else "no", f"{false} of {SHUFFLES}",
            *(f"{by_content(rows, known, fact):.0%}" for fact in CONTENT.values()),
            ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none",
            *(f"{listed(sets[name], rows, known, kind):.0%}" for kind in PLANTS),
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
