"""The grid of the regret benchmark: its networks, sizes and units, and its tables of rows."""

import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = Path(os.environ.get("TLPIPELINE_DATA", ROOT.parent / "shared" / "data"))
RESULTS = HERE / "results"
ARMS, UNITS, RATES, ABOVE = "regret.csv", "regret-units.csv", "regret-rates.csv", "regret-above.csv"
FACTORS = (1 / 3, 3.0)
FIXED, FIXED_AT = (1 / 3, 2 / 3), (500, 2000)
SEED = 11
VALIDATION = 6  # every sixth image of a class in a subset
LEAST_TEST = 500
LEFT_OUT = {"weather"}
DRAWN = {"cifar10": 8000}
NO_FLIP = {"sign_digits", "mnist"}
MORE = ("clipart", "emoji", "mnist")  # of packages.py: nothing is fitted on them


@dataclass(frozen=True)
class Network:
    """A backbone of the grid: name in the catalogue, weights file, its md5, input side, and data sets its weights were trained on."""

    name: str
    weights: str
    md5: str
    size: int
    source: str = ""


NETWORKS = {
    "squeezenet": Network("squeezenet1_0", "squeezenet1_0-imagenet.safetensors", "d4e17381cc01d25121c9e9422290fa2b", 96),
    "resnet20": Network(
        "examples.own_backbone.nets:resnet20", "resnet20-cifar10.safetensors", "96d1bb00d7f262f37d91da468c48e421", 32, "cifar10"
    ),
    "resnet56": Network(
        "examples.own_backbone.nets:resnet56", "resnet56-cifar10.safetensors", "822ac32fba8a8d6ee8b78362d9e9bbd8", 32, "cifar10"
    ),
    "lite0": Network(
        "research.networks:EfficientNetLite0", "efficientnet_lite0-imagenet.safetensors", "3e5ce6d2cf9b8dfbf6f7e09f386fe6af", 96
    ),
}
GRIDS = {
    "core": {"squeezenet": (100, 500, 2000), "resnet20": (100, 500, 2000, 4000)},
    "full": {name: (100, 500, 2000, 4000) for name in ("squeezenet", "resnet20", "resnet56")},
    "lite0": {"lite0": (100, 500, 2000)},  # its weights come from packages.py
}
FROZEN = ("frozen", "cut", "multi")
TRAINED = ("tuned", "lpft", "plain", "scratch")
# The recipe of lpft and plain: the whole schedule, and the head as its last step left it.
USUAL = {"epochs_at_500": 20, "solve_again": False}
SCRATCH_FROM = 2000
SECOND_SEED_UNTIL = 500
SLICES_AT = 500
COLUMNS = ("data", "backbone", "n", "seed", "arm", "classes", "train", "val", "test_a", "test_b", "hits_a", "hits_b", "val_hits", "slice",
           "rate", "epochs", "forward", "backward", "cpu_s", "looks", "bits")  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One point of the grid."""

    data: str
    backbone: str
    n: int
    seed: int

    @property
    def network(self) -> Network:
        return NETWORKS[self.backbone]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.data, self.backbone, self.n, self.seed


def rank(seed: int, text: str) -> str:
    return hashlib.md5(f"{seed}:{text}".encode(), usedforsecurity=False).hexdigest()


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a table of results, [] where there is none yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table of results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(path)


def append(path: Path, columns: Sequence[str], row: Mapping[str, object]) -> None:
    """Add a line to a table of results at once, so that nothing is lost when the run is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
