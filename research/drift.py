"""How often drift by class is shown where images grow at random, and where it is planted.

    python -m research.drift --work FOLDER [--only NAME ...]

Of each class, 100 images are there before, and 40 are added. Drift is planted in one class: half of its added images are brightened by 30 %,
blurred by a fiftieth of their short side, or replaced by images of another class. The table counts the draws in which any class is shown
without drift (false alarms), and those in which the class with drift is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageFilter

from research.grid import DATA, NETWORKS, rank
from research.units import command_line, folders, pool
from tlpipeline.backbones import catalogue, features
from tlpipeline.backbones import taps as cutting
from tlpipeline.data import dataset, drift
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.files import file_md5

SETS = ("neu_steel", "sign_digits", "pacs_sketch", "flowers")
NETWORK, BEFORE, ADDED, TIMES = "squeezenet", 100, 40, 50


PLANTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(min(image.size) / 50)),
}
OTHER = "another class"


class Reader:
    """Features of a set's images by md5, as they are and changed, at the first and the last tap.

    Args:
        name: of the set; folder: of its images; work: for features and changed images.
    """

    def __init__(self, name: str, folder: Path, work: Path) -> None:
        network = NETWORKS[NETWORK]
        self.folder, self.place, self.store = folder, work / "changed" / name, Store(work / "features")
        self.backbone = catalogue.load(network.name, str(DATA / network.weights), md5=network.md5, size=network.size)
        measured = cutting.measure_taps(self.backbone, network.size)
        self.readings, self.size = [features.pooling_at(tap) for tap in (measured[0], measured[-1])], network.size
        self.known: dict[str, dict[str, npt.NDArray[np.float64]]] = {reading.tap: {} for reading in self.readings}

    def read(self, rows: Sequence[Row], root: Path | None = None) -> None:
        """Read the features of images, which lie in a folder of their own if one is named."""
        for reading in self.readings:
            read = features.at_tap(
                self.backbone, reading, self.size, root or self.folder, rows, self.store, torch.device("cpu"), False, lambda done: None
            )
            means = read[:, : reading.channels].double().numpy()
            self.known[reading.tap] |= {row.md5: x for row, x in zip(rows, means, strict=True)}

    def read_changed(self, rows: Sequence[Row], kind: str) -> dict[str, str]:
        """Write changed images and read their features; return their md5s by those of the originals."""
        folder = self.place / kind
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for row in rows:
            path = folder / f"{row.md5}.png"
            if not path.exists():
                PLANTS[kind](dataset.read_image(self.folder, row)).save(path)
            made.append(dataclasses.replace(row, path=path.name, md5=file_md5(path)))
        self.read(made, folder)
        return {row.md5: new.md5 for row, new in zip(rows, made, strict=True)}

    @property
    def views(self) -> list[drift.View]:
        """The features as the test reads them."""
        return [self._view(tap, known) for tap, known in self.known.items()]

    def _view(self, tap: str, known: dict[str, npt.NDArray[np.float64]]) -> drift.View:
        return drift.View(tap, lambda md5s: np.ones(len(md5s), dtype=bool), lambda md5s: np.stack([known[md5] for md5 in md5s]))


def main() -> None:
    """Print the table."""
    arguments = command_line(__doc__, SETS)
    sets = folders(arguments.data, arguments.work)
    print("| data set | classes | false alarms | " + " | ".join([*PLANTS, OTHER]) + " |\n|---|---:|---:|" + "---:|" * (len(PLANTS) + 1))
    for name in arguments.only:
        reader = Reader(name, sets[name], arguments.work)
        by_class: dict[str, list[Row]] = {}
        for row in sorted(pool(name, sets[name], arguments.work), key=lambda row: rank(1, row.md5)):
            by_class.setdefault(row.label, []).append(row)
        by_class = {label: members[: 2 * (BEFORE + ADDED)] for label, members in sorted(by_class.items()) if len(members) > BEFORE + ADDED}
        *_, other, chosen = by_class
        reader.read([row for members in by_class.values() for row in members])
        altered = {kind: reader.read_changed(by_class[chosen], kind) for kind in PLANTS}
        shown = dict.fromkeys(["", *PLANTS, OTHER], 0)
        for time in range(TIMES):
            rng = np.random.default_rng(time)
            drawn = {
                label: [members[i].md5 for i in rng.permutation(len(members))[: BEFORE + ADDED]] for label, members in by_class.items()
            }
            others = [row.md5 for row in by_class[other]]
            for kind in shown:
                compared = []
                for label, md5s in drawn.items():
                    added = md5s[BEFORE:]
                    half = len(added) // 2
                    if label == chosen and kind == OTHER:
                        added = [*others[:half], *added[half:]]
                    elif label == chosen and kind:
                        added = [*(altered[kind][md5] for md5 in added[:half]), *added[half:]]
                    compared.append(drift.Sides(label, drift.ADDED, tuple(sorted(added)), tuple(sorted(md5s[:BEFORE]))))
                result = drift.drift(compared, reader.views, {})
                shown[kind] += any(not kind or each.label == chosen for each in result.shown)
        print(f"| {name} | {len(by_class)} | " + " | ".join(f"{count} of {TIMES}" for count in shown.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
