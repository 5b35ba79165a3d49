"""Which images of a folder to label next: `tlpipeline data suggest`."""

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipeline.display import Displayed, table
from tlpipeline.errors import DataError, WorkspaceError
from tlpipeline.files import write_bytes
from tlpipeline.progress import Event, Progress
from tlpipeline.registry import versions
from tlpipeline.workspace import layout, stages

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Suggestion:
    """An image that is worth a label.

    Attributes:
        path: of the file.
        predicted, probability: what the model takes it for.
        uncertainty: 0 if the model is sure, 1 if its two most probable classes are equal.
        reason: its two most probable classes, in words.
    """

    path: str
    predicted: str
    probability: float
    uncertainty: float
    reason: str


@dataclass(frozen=True)
class Suggestions(Displayed):
    """The images of a folder that are worth a label, the most useful first.

    Attributes:
        images: distinct readable images in the folder; known: those that are in the data set already; unreadable: files that are no images.
    """

    chosen: tuple[Suggestion, ...]
    images: int
    known: int
    unreadable: int

    def __rich__(self) -> "RenderableType":
        return table(("image", "the model says"), [(s.path, s.reason) for s in self.chosen])

    def write_csv(self, path: Path) -> None:
        """Write a line for each image, with an empty column for its label."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "predicted", "probability", "uncertainty", "reason"])
        writer.writerows([s.path, "", s.predicted, f"{s.probability:.4f}", f"{s.uncertainty:.4f}", s.reason] for s in self.chosen)
        write_bytes(text.getvalue().encode(), path)


def suggest(root: Path, folder: Path, count: int, progress: Progress) -> Suggestions:
    """Return the images of a folder that are worth a label, by the model that the workspace trained last.

    Args:
        folder: unlabeled images, in any layout; those of the data set and copies are left out.
        count: how many.

    Raises:
        WorkspaceError: nothing was trained yet.
        DataError: the folder is missing, or has no readable image that is not in the data set.
    """

    from tlpipeline.backbones import classifier as models
    from tlpipeline.backbones.features import scaling
    from tlpipeline.checking import suggesting
    from tlpipeline.data import dataset
    from tlpipeline.data.loader import Images

    if not (root / layout.MODEL).is_dir():
        raise WorkspaceError(f"expected a trained model in {root / layout.MODEL}, found none. `tlpipeline run` trains one.")
    if not folder.is_dir():
        raise DataError(f"expected a folder of images at {folder}, found {'a file' if folder.exists() else 'nothing'}. Name a folder.")
    rows, unreadable = dataset.readable(
        folder,
        layout.open_facts(root, "suggest", progress),
        lambda done, total: progress(Event("suggest", done, total, f"{done} of {total} files read")),
    )
    manifest = dataset.read_manifest(root / layout.MANIFEST)
    there = {row.md5 for row in manifest.rows}
    new = [row for row in rows if row.md5 not in there]
    if not new:
        raise DataError(
            f"expected unlabeled images in {folder}, found {len(rows)} images, which are all in the data set already, and {unreadable} files "
            "that are no images. Name a folder of other images."
        )
    params, profile = layout.params_of(root), layout.read_profile(root)

    def reporter(what: str) -> Callable[[int], None]:
        return lambda done: progress(Event("suggest", done, len(new), f"{what} of {done} of {len(new)} images"))

    device = stages.device_of(params)
    model, description = models.load(root / layout.MODEL, root, partial(versions.names_network, root))
    with layout.open_cache(root) as store:
        pictures = Images(folder, new, description.transforms)
        answers = models.probabilities(model.to(device), pictures, device, reporter("predictions"), store)
        read = stages.tap_reader(root, params, manifest, profile, store)(folder, new, reporter("features"))
    probabilities = answers.double().numpy()
    order = suggesting.choose(probabilities, scaling(read, profile.best.reading.blocks)(read).numpy(), count)
    unsure, words = suggesting.uncertainty(probabilities), suggesting.reasons(probabilities, description.classes)
    chosen = []
    for i in order:
        best = int(probabilities[i].argmax())
        path = os.path.join(folder, new[i].path)
        chosen.append(Suggestion(path, description.classes[best], float(probabilities[i, best]), float(unsure[i]), words[i]))
    return Suggestions(tuple(chosen), len(rows), len(rows) - len(new), unreadable)
