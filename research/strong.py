"""Two more grids, of strong networks and of many images. They take days on a CPU, in one process that can be killed at any moment.

    python -m research.strong run --data DIR --weights DIR --results DIR --work DIR
    python -m research.strong status (the same options)

`run` does what has no row yet, in the order of PLAN. `status` shows what is done, what remains, and how long that takes.
Rows have the columns of regret.csv and regret-units.csv; times.csv holds what each piece took.

strong  three networks at 160 pixels or more, twelve data sets, 100, 500 and 2,000 images
many    CIFAR-10 and EuroSAT, two networks, 5,000 to 48,000 images

Units and subsets are those of `research.regret`. But of the test images only the first are used, which are stratified, because a pass through
these networks costs a tenth of a second. And CIFAR-10 is whole.
"""

import argparse
import dataclasses
import fcntl
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from research import grid
from research.arms import frozen_arms, train_arm
from research.grid import ARMS, COLUMNS, UNITS, Unit, append, key_of, percent, repair, rows_of
from research.regret import similarity
from research.units import folders, pool, sizes, split
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.splits import TEST
from tlpipeline.training.recipe import Recipe

# Data sets near to ImageNet and far from it by turns, so that what is done first is a fair sample.
DATA = {
    "strong": (
        "caltech24", "eurosat", "pacs_sketch", "clipart", "flowers", "textile", "sign_digits", "openmoji", "neu_steel", "stamps", "emoji",
        "emoji_twitter",
    ),
    "many": ("cifar10", "eurosat"),
}  # fmt: skip
SIZES = {"strong": (100, 500, 2000), "many": (5000, 12_000, 24_000, 48_000)}
MOST_TEST = {"strong": 1500, "many": 4000}
PROFILE = "profile"  # the profile, and the arms frozen, cut and multi
OURS, USUAL = (PROFILE, "tuned"), ("lpft",)
FEATURE_BYTES = 12 * 2**30  # kept for other subsets of the same data
TIMES, TIME_COLUMNS = "times.csv", ("data", "backbone", "n", "seed", "piece", "passes", "cpu_s", "wall_s")
# Ranges of sizes, because a size may be cut down to leave enough test images.
AT_100, AT_500, AT_2000, AT_5000, AT_12000, BEYOND = (51, 100), (101, 999), (1000, 2000), (5000, 5000), (5001, 12_000), (12_001, 48_000)


@dataclass(frozen=True)
class Stage:
    """A part of the plan: these pieces of the units of a grid, data set by data set."""

    grid: str
    networks: tuple[str, ...]
    sizes: tuple[int, int]
    pieces: tuple[str, ...]
    seed: int = 0

    def __str__(self) -> str:
        low, high = self.sizes
        return f"{self.grid:6} {'+'.join(self.networks):17} n {low}-{high} seed {self.seed} {'+'.join(self.pieces)}"


BIG, MANY = ("vit_s14", "xception"), ("squeezenet", "lite2_64")
# Breadth first, and cheap before dear. Many images cost little at 64 to 96 pixels, so they need not wait for days.
PLAN = (
    Stage("strong", ("lite2",), AT_100, OURS),
    Stage("many", ("squeezenet",), AT_5000, (*OURS, *USUAL)),
    Stage("strong", BIG, AT_100, OURS),
    Stage("strong", ("lite2",), AT_500, OURS),
    Stage("many", MANY, AT_5000, (*OURS, *USUAL)),
    Stage("strong", ("lite2",), AT_100, USUAL),
    Stage("many", MANY, AT_12000, OURS),
    Stage("strong", BIG, AT_500, OURS),
    Stage("strong", ("lite2",), AT_500, USUAL),
    Stage("strong", BIG, AT_100, USUAL),
    Stage("many", MANY, BEYOND, OURS),
    Stage("many", MANY, (5000, 48_000), USUAL),
    Stage("strong", ("lite2",), AT_2000, (*OURS, *USUAL)),
    Stage("many", ("squeezenet",), (5000, 48_000), ("scratch", "plain")),
    Stage("strong", BIG, AT_500, USUAL),
    Stage("strong", BIG, AT_2000, OURS),
    Stage("many", ("lite2_64",), (5000, 48_000), ("scratch",)),
    Stage("strong", ("lite2", *BIG), AT_100, (*OURS, *USUAL), seed=1),
    Stage("strong", ("lite2",), AT_500, (*OURS, *USUAL), seed=1),
    Stage("strong", BIG, AT_2000, USUAL),
)


@dataclass(frozen=True)
class Piece:
    """A unit, and what is done with it: PROFILE or an arm that is trained."""

    unit: Unit
    what: str
    grid: str
    largest: int

    @property
    def key(self) -> tuple[str, ...]:
        return *self.unit.row_key, self.what

    @cached_property
    def passes(self) -> int:
        """Forward passes of one image that the piece costs, approximately; a backward pass counts two."""
        train, test, recipe = round(self.unit.n * 5 / 6), MOST_TEST[self.grid], Recipe()
        if self.what == PROFILE:
            return self.unit.n + min(train, 2048) + 3 * min(train, 512) + test
        if self.what == "scratch":
            epochs = recipe.scratch_epochs(train)
        else:
            epochs = dataclasses.replace(recipe, **(grid.USUAL if self.what != "tuned" else {})).epochs(train)
        return 3 * epochs * train + (2 if self.what == "tuned" else 1) * self.unit.n + test


class Pools:
    """The images of each data set, listed once."""

    def __init__(self, data: Path, work: Path) -> None:
        self.work, self.folders = work, folders(data, work)
        self._rows: dict[str, list[Row]] = {}

    def rows(self, name: str) -> list[Row]:
        """Return all distinct images of a data set."""
        if name not in self._rows:
            self._rows[name] = pool(name, self.folders[name], self.work)
        return self._rows[name]


def plan(pools: Pools) -> Iterator[tuple[Stage, list[Piece]]]:
    """Yield each stage with its pieces, without those of the stages before."""
    planned: set[tuple[str, ...]] = set()
    for stage in PLAN:
        pieces = []
        for name in DATA[stage.grid]:
            possible = sizes(len(pools.rows(name)), SIZES[stage.grid])
            for n in (n for n in possible if stage.sizes[0] <= n <= stage.sizes[1]):
                for network in stage.networks:
                    pieces += [Piece(Unit(name, network, n, stage.seed), what, stage.grid, max(possible)) for what in stage.pieces]
        pieces = [piece for piece in pieces if piece.key not in planned]
        planned |= {piece.key for piece in pieces}
        yield stage, pieces


def manifest_of(piece: Piece, rows: Sequence[Row]) -> Manifest:
    """Return the manifest of a unit with its first test images only; they are stratified."""
    manifest = split(rows, piece.unit.n, piece.largest, piece.unit.seed)
    tested = {r.path for r in manifest.used(TEST)[: MOST_TEST[piece.grid]]}
    return dataclasses.replace(manifest, rows=tuple(r for r in manifest.rows if r.split != TEST or r.path in tested))


def done(results: Path) -> set[tuple[str, ...]]:
    """Return the keys of the pieces that have rows."""
    trained = {(*key_of(row), row["arm"]) for row in rows_of(results / ARMS)}
    return trained | {(*key_of(row), PROFILE) for row in rows_of(results / UNITS)}


def do(piece: Piece, pools: Pools, options: argparse.Namespace) -> str:
    """Do a piece, append its rows, and return the accuracies as text."""
    unit, folder = piece.unit, pools.folders[piece.unit.data]
    manifest = manifest_of(piece, pools.rows(unit.data))
    if piece.what == PROFILE:
        heads = (*unit.row_key, "multi") not in done(options.results)
        store = Store(options.work / "features", FEATURE_BYTES) if piece.grid == "strong" else None
        evidence, arms = frozen_arms(unit, manifest, folder, options.weights, heads, store)
        append(options.results / ARMS, COLUMNS, *arms)
        append(options.results / UNITS, list(evidence), evidence)
    else:
        arms = [train_arm(unit, piece.what, similarity(options.results, unit), manifest, folder, options.weights)]
        append(options.results / ARMS, COLUMNS, *arms)
    return ", ".join(f"{row['arm']} {percent(row):.1f} %" for row in arms if row["arm"] != "at")


def run(options: argparse.Namespace) -> None:
    """Do all pieces that have no row yet."""
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"another process writes to {options.results}: wait for its end.")
        for name in (ARMS, UNITS, TIMES):
            repair(options.results / name)
        pools = Pools(options.data, options.work)
        for piece in (piece for _, pieces in plan(pools) for piece in pieces):
            if piece.key in done(options.results):
                continue
            started, cpu = time.monotonic(), cpu_seconds()
            accuracies = do(piece, pools, options)
            row = dict(zip(TIME_COLUMNS, piece.unit.key, strict=False)) | {
                "piece": piece.what, "passes": piece.passes, "cpu_s": round(cpu_seconds() - cpu, 1), "wall_s": round(time.monotonic() - started, 1),
            }  # fmt: skip
            append(options.results / TIMES, TIME_COLUMNS, row)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            date = time.strftime("%m-%d %H:%M")
            print(
                f"{date} {' '.join(piece.key)}: {accuracies}; {row['cpu_s']} CPU s in {row['wall_s']} s, peak {memory:.1f} GiB", flush=True
            )


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in usage)


def status(options: argparse.Namespace) -> None:
    """Print by stage what is done and what remains, in CPU hours where the network was measured."""
    finished = done(options.results)
    cost: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows_of(options.results / TIMES):
        cost[row["backbone"]][0] += float(row["cpu_s"])
        cost[row["backbone"]][1] += float(row["passes"])
    seconds = {network: cpu / passes for network, (cpu, passes) in cost.items()}
    print("CPU seconds of a forward pass:", {k: round(v, 4) for k, v in sorted(seconds.items())})
    for stage, pieces in plan(Pools(options.data, options.work)):
        hours = sum(p.passes * seconds.get(p.unit.backbone, float("nan")) for p in pieces if p.key not in finished) / 3600
        print(f"{stage}: {sum(p.key in finished for p in pieces)} of {len(pieces)} pieces, {hours:.1f} h remain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "status"))
    parser.add_argument("--data", type=Path, required=True, help="folder of <name>/ or <name>.tar.gz data sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights files")
    parser.add_argument("--results", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--work", type=Path, required=True, help="where archives are unpacked and features are kept")
    options = parser.parse_args()
    for name in ("data", "weights", "results", "work"):
        setattr(options, name, getattr(options, name).resolve())  # jobs take paths from a workspace of their own
    options.work.mkdir(parents=True, exist_ok=True)
    grid.DRAWN.clear()  # CIFAR-10 is whole
    {"run": run, "status": status}[options.verb](options)


if __name__ == "__main__":
    main()
