"""A simulated year that nobody watches: a real data set grows in 52 weeks, with two bad weeks, a new class and a renamed one.

    python -m research.year [--data FOLDER] [--work FOLDER] [--weeks 52] [--backbone NAME] [--weights NAME] [--every 4]

Each week `Workspace.run` gets the images of that week; accepted models go to production by themselves. What production gets right is measured
on images that no workspace ever gets. Every few weeks the same images are given to a new workspace without a cache, whose model is taken as it
is: this is the cost, and the accuracy, of retraining everything.

The rows go to results/year.csv, and the table is printed.
"""

import argparse
import csv
import io
import os
import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from PIL import Image, ImageEnhance

import tlpipeline as tl
from tlpipeline.registry.predict import Model
from tlpipeline.workspace import settings

HERE = Path(__file__).parent
DATA = Path(os.environ.get("TLPIPELINE_DATA", HERE.parent.parent / "shared" / "data"))
RESULTS = HERE / "results" / "year.csv"
DATA_SET = "eurosat"
FIRST, EACH_WEEK, HELD_OUT = 500, 40, 1500  # images
NEW_CLASS, NEW_FROM = "SeaLake", 15
RENAMED, RENAMED_TO, RENAMED_FROM = "Residential", "Housing", 33
WRONG_FOLDER, WRONG_CLASS, PUT_INTO = 24, "River", "Highway"  # for one week the images of a class are put into another folder
FLOOD, FLOOD_CLASS, SCENES, SHOTS = 40, "Forest", 20, 30  # for one week a camera repeats itself
Files = dict[str, bytes]  # path below the folder of images, and content


@dataclass(frozen=True)
class Week:
    """A row of year.csv.

    Attributes:
        week: from 1.
        event: what happened to the images beside their growth.
        images: files in the folder.
        result: accepted, undecided or rejected; `unchanged`, or `stopped` by an error.
        version: in production afterwards, "" if none is.
        said: alarms and remarks, or the error that stopped the run.
        accuracy: share of the held-out images that the model in production classifies correctly.
        seconds: CPU seconds of this run.
        anew_accuracy, anew_seconds: of a new workspace on the same images; None in weeks without one.
    """

    week: int
    event: str
    images: int
    result: str
    version: str
    said: str
    accuracy: float
    seconds: float
    anew_accuracy: float | None = None
    anew_seconds: float | None = None


def read_data_set(data: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Return the files of each class of the data set, in a fixed random order."""
    classes: dict[str, list[tuple[str, bytes]]] = {}
    with tarfile.open(data / f"{DATA_SET}.tar.gz") as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                _, label, name = member.name.split("/")
                classes.setdefault(label, []).append((name, file.read()))
    for label, images in sorted(classes.items()):
        images.sort()
        random.Random(label).shuffle(images)
    return classes


class World:
    """The images that exist in each week. Growth takes from each class in turn."""

    def __init__(self, data: Path, weeks: int) -> None:
        self._classes = read_data_set(data)
        self._held_out = HELD_OUT // len(self._classes)
        self._weeks = weeks
        self.labels = sorted(self._classes)

    def held_out(self, week: int) -> list[tuple[str, bytes]]:
        """Return the images for measuring production in a week, each with its name of that week."""
        return [
            (_name(label, week), content)
            for label in self.labels
            if label != NEW_CLASS or week >= NEW_FROM
            for _, content in self._classes[label][: self._held_out]
        ]

    def files(self, week: int) -> Files:
        """Return the folder of images in a week."""
        files: Files = {}
        for label in self.labels:
            started = NEW_FROM if label == NEW_CLASS else 1
            if week < started:
                continue
            count = (FIRST + EACH_WEEK * (week - started)) // len(self.labels)
            before = (FIRST + EACH_WEEK * (week - 1 - started)) // len(self.labels) if week > started else 0
            for i, (name, content) in enumerate(self._classes[label][self._held_out : self._held_out + count]):
                wrong = week == WRONG_FOLDER and label == WRONG_CLASS and i >= max(0, before - 4 * (count - before))
                files[f"{PUT_INTO if wrong else _name(label, week)}/{name}"] = content
        if week == FLOOD:
            files |= self._repeated()
        return files

    def _repeated(self) -> Files:
        """Return many near copies of a few scenes: moved by some pixels, lighter or darker, compressed again."""
        rng = random.Random(0)
        files: Files = {}
        for scene, (_, content) in enumerate(self._classes[FLOOD_CLASS][-SCENES:]):
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            for shot in range(SHOTS):
                left, top = rng.randint(0, 3), rng.randint(0, 3)
                view = picture.crop((left, top, picture.width - 3 + left, picture.height - 3 + top))
                buffer = io.BytesIO()
                ImageEnhance.Brightness(view).enhance(rng.uniform(0.94, 1.06)).save(buffer, "JPEG", quality=rng.randint(80, 95))
                files[f"{FLOOD_CLASS}/camera{scene:02d}_{shot:02d}.jpg"] = buffer.getvalue()
        return files


def _name(label: str, week: int) -> str:
    return RENAMED_TO if label == RENAMED and week >= RENAMED_FROM else label


def event_of(week: int) -> str:
    """Return what happens in a week beside growth."""
    return {
        NEW_FROM: f"new class {NEW_CLASS}",
        RENAMED_FROM: f"{RENAMED} is called {RENAMED_TO}",
        WRONG_FOLDER: f"new images of {WRONG_CLASS} lie in {PUT_INTO}",
        WRONG_FOLDER + 1: "mended",
        FLOOD: f"{SCENES * SHOTS} near copies of {SCENES} scenes",
        FLOOD + 1: "removed",
    }.get(week, "")


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Make a folder hold these files and no others."""
    for path in [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in files]:
        path.unlink()
    for name, content in files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for place in [p for p in folder.iterdir() if p.is_dir() and not any(p.iterdir())]:
        place.rmdir()


def accuracy_of(model: Model, held_out: Iterable[tuple[str, bytes]]) -> float:
    """Return the share of images that a model gives their names of this week; an old name of a renamed class counts as right."""
    pairs = list(held_out)
    predicted = [p.label for p in model.predict([Image.open(io.BytesIO(content)) for _, content in pairs])]
    same = {RENAMED: RENAMED_TO}
    hits = [same.get(guess, guess) == same.get(label, label) for guess, (label, _) in zip(predicted, pairs, strict=True)]
    return sum(hits) / len(hits)


def make(folder: Path, images: Path, options: argparse.Namespace) -> tl.Workspace:
    """Return a new workspace whose accepted models go to production."""
    workspace = tl.Workspace.init(folder, images=images, backbone=options.backbone, weights=options.weights)
    settings.change(folder / "params.yaml", {"data.name": "year", "gate.promote": "auto"})
    return workspace


def run_week(workspace: tl.Workspace, images: Path, row: Week) -> Week:
    """Give a workspace the images of a week; return the row with what it did."""
    started = time.process_time()
    try:
        summary = workspace.run(images=images)
    except tl.PipelineError as error:
        return replace(row, result="stopped", said=str(error), seconds=time.process_time() - started)
    result = "unchanged" if summary.version and not summary.new else summary.outcome.partition(":")[0]
    said = "; ".join([*map(str, summary.remarks), summary.outcome])
    return replace(row, result=result, said=said, seconds=time.process_time() - started)


def main() -> None:
    """Run the year, or continue it where it was stopped."""
    parser = argparse.ArgumentParser(description="A simulated year that nobody watches")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=None, help="folder for the workspaces; a temporary one by default")
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--backbone", default="demonstration")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--every", type=int, default=4, help="weeks between two retrainings of everything; 0: never")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        rows = list(year(World(options.data, options.weeks), Path(folder), options))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Week)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(totals(rows))


def year(world: World, folder: Path, options: argparse.Namespace) -> Iterable[Week]:
    """Yield the rows of the year, and print each."""
    images = folder / "images"
    images.mkdir()
    workspace: tl.Workspace | None = None
    for week in range(1, options.weeks + 1):
        files = world.files(week)
        write(files, images)
        workspace = workspace or make(folder / "year", images, options)
        row = run_week(workspace, images, Week(week, event_of(week), len(files), "", "", "", 0.0, 0.0))
        production = next((v for v in workspace.registry.versions() if "prod" in v.stages), None)
        held_out = world.held_out(week)
        if production is not None:
            row = replace(row, version=production.name, accuracy=accuracy_of(workspace.load_model(production.name), held_out))
        if options.every and week % options.every == 1:
            other = folder / f"anew{week}"
            started = time.process_time()
            anew = make(other, images, options)
            for stage in ("ingest", "profile", "check", "choose", "train", "evaluate"):
                anew.stage(stage)
            seconds = time.process_time() - started
            row = replace(row, anew_seconds=seconds, anew_accuracy=accuracy_of(anew.load_model(other / "model"), held_out))
            shutil.rmtree(other)
        print(
            f"{row.week:2} {row.images:5} {row.result:11} {row.version:14} {row.accuracy:6.1%} {row.seconds:5.1f} s  "
            f"{'' if row.anew_accuracy is None else f'anew {row.anew_accuracy:.1%} {row.anew_seconds:.1f} s  '}{row.event}  {row.said[:160]}",
            flush=True,
        )
        yield row


def totals(rows: Iterable[Week]) -> str:
    """Return what the year came to, as lines of text."""
    rows = list(rows)
    compared = [row for row in rows if row.anew_seconds is not None and row.anew_accuracy is not None]
    results = {result: sum(row.result == result for row in rows) for result in sorted({row.result for row in rows})}
    lines = [", ".join(f"{result} {count}" for result, count in results.items())]
    lines.append(f"production is right about {sum(row.accuracy for row in rows) / len(rows):.1%} of the held-out images on average")
    if compared:
        ours, theirs = (sum(values) / len(compared) for values in ([r.seconds for r in compared], [r.anew_seconds or 0 for r in compared]))
        right, anew = (sum(values) / len(compared) for values in ([r.accuracy for r in compared], [r.anew_accuracy or 0 for r in compared]))
        lines.append(f"in {len(compared)} weeks: {ours:.1f} CPU seconds a week against {theirs:.1f} for retraining everything")
        lines.append(f"in the same weeks: {right:.1%} right against {anew:.1%} if every retrained model goes to production")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
