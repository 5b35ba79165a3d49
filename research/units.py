"""The units of the grid: which images of a data set are for training, for validation and for the test.

The images of all splits of a data set are pooled and split anew. The subset of n images is stratified, and subsets are nested: 100 in 500 in 2,000.
A sixth of a subset is for validation. All images outside the largest subset are the test images.
"""

import argparse
import dataclasses
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from research.grid import DATA, DRAWN, GRIDS, LEAST_TEST, NETWORKS, SECOND_SEED_UNTIL, SEED, VALIDATION, Unit, rank
from tlpipeline.data import dataset
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.splits import TEST, TRAIN, VAL


def command_line(description: str | None, sets: Sequence[str]) -> argparse.Namespace:
    """Return the options of a table over real data sets: their folder, a folder for what is unpacked and computed, and names of sets."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, required=True, help="folder for unpacked sets, features and facts")
    parser.add_argument("--only", nargs="*", default=sets)
    return parser.parse_args()


def folders(data: Path, work: Path) -> dict[str, Path]:
    """Return the data sets of a folder by name; archives are unpacked under `work` first, once."""
    sets = {p.name: p for p in sorted(data.iterdir()) if p.is_dir()}
    for archive in sorted(data.glob("*.tar.gz")):
        name = archive.name.removesuffix(".tar.gz")
        target = work / name
        if not target.exists():
            draft = work / f".{name}"
            with tarfile.open(archive) as tar:
                tar.extractall(draft, filter="data")
            (folder,) = [p for p in draft.iterdir() if p.is_dir()]
            folder.rename(target)
            draft.rmdir()
        sets[name] = target
    return sets


def pool(name: str, folder: Path, work: Path) -> list[Row]:
    """Return all distinct images of a data set, whatever their split; a large one is sampled by hash (see DRAWN)."""
    manifest_file = work / f"{name}.parquet"
    if not manifest_file.exists():
        manifest = dataset.ingest(folder, {}, lambda done, total: None)
        dataset.write_manifest(manifest, manifest_file, manifest_file.with_suffix(".csv"))
    rows = [r for r in dataset.read_manifest(manifest_file).rows if not r.duplicate_of]
    rows.sort(key=lambda r: rank(SEED, r.md5))
    return rows[: DRAWN.get(name, len(rows))]


def sizes(total: int, wanted: Sequence[int]) -> list[int]:
    """Return the sizes that leave enough test images.

    A size that is too large is cut down to the largest possible one, if that adds at least a quarter to the size before it.
    """
    most = total - LEAST_TEST
    possible = [n for n in wanted if n <= most]
    too_large = [n for n in wanted if n > most]
    if too_large and most > 1.25 * (possible[-1] if possible else 50):
        possible.append(most)
    return possible


def split(rows: Sequence[Row], n: int, largest: int, seed: int) -> Manifest:
    """Return a manifest of n images for training and validation; all images outside the largest subset are for the test."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: rank(seed, r.md5)):
        groups.setdefault(row.label, []).append(row)
    # The i-th image of a class comes at (i + 1/2) / (its images). So each prefix of this order is stratified, and prefixes are nested.
    order = sorted(((i + 0.5) / len(group), rank(seed, row.md5), i, row) for group in groups.values() for i, row in enumerate(group))
    out = [dataclasses.replace(row, split=VAL if i % VALIDATION == 2 else TRAIN) for _, _, i, row in order[:n]]
    out += [dataclasses.replace(row, split=TEST) for _, _, _, row in order[largest:]]
    labels = {r.label for r in out if r.split == TRAIN}
    return Manifest(tuple(r for r in out if r.label in labels), (), ())


def units_of(grid: str, sets: dict[str, Path], work: Path, only: Sequence[str]) -> Iterator[tuple[Unit, list[Row], int]]:
    """Yield (unit, images of its data set, largest subset), small subsets first, so that an interrupted run has all data sets."""
    units = []
    for name, folder in sets.items():
        rows = pool(name, folder, work)
        for backbone, wanted in GRIDS[grid].items():
            if NETWORKS[backbone].source == name:
                continue
            possible = sizes(len(rows), wanted)
            for n in possible:
                for seed in (0, 1) if n <= SECOND_SEED_UNTIL else (0,):
                    units.append((Unit(name, backbone, n, seed), rows, max(possible)))
    units.sort(key=lambda u: (u[0].n, u[0].seed, u[0].backbone, u[0].data))
    for unit, rows, largest in units:
        if not only or any(part in "/".join(map(str, unit.key)) for part in only):
            yield unit, rows, largest
