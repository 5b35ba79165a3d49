"""The grids: their networks, sizes and units; and the tables of rows."""

import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = Path(os.environ.get("TLPIPELINE_DATA", ROOT.parent / "shared" / "data"))
RESULTS = HERE / "results"
ARMS, UNITS = "regret.csv", "regret-units.csv"
SEED = 11
VALIDATION = 6  # every sixth image of a class in a subset
LEAST_TEST = 500  # test images of a unit
LEFT_OUT = {"weather"}  # too few images for a test
DRAWN = {"cifar10": 8000}  # images that are sampled from a large data set
NO_FLIP = {"sign_digits", "mnist"}
MORE = ("clipart", "emoji", "mnist")  # from packages.py; nothing is fitted on them


@dataclass(frozen=True)
class Network:
    """A backbone of a grid.

    Attributes:
        name: in the catalogue of backbones.
        weights: name of the weights file.
        md5: of that file.
        size: input side in pixels.
        source: the data set of a grid that the weights were trained on, if any; it is left out.
    """

    name: str
    weights: str
    md5: str
    size: int
    source: str = ""


_LITE2 = ("research.networks:EfficientNetLite2", "efficientnet_lite2-imagenet.safetensors", "507802b8d971d9ecd817f98e69e17ac2")
NETWORKS = {
    "squeezenet": Network("squeezenet1_0", "squeezenet1_0-imagenet.safetensors", "d4e17381cc01d25121c9e9422290fa2b", 96),
    "resnet20": Network(
        "examples.own_backbone.nets:resnet20", "resnet20-cifar10.safetensors", "96d1bb00d7f262f37d91da468c48e421", 32, "cifar10"
    ),
    "resnet56": Network(
        "examples.own_backbone.nets:resnet56", "resnet56-cifar10.safetensors", "822ac32fba8a8d6ee8b78362d9e9bbd8", 32, "cifar10"
    ),
    "lite0": Network(
        "research.networks:EfficientNetLite0", "efficientnet_lite0-imagenet.safetensors", "00759cae73428b71a4093cb021819d53", 96
    ),
    "lite2": Network(*_LITE2, 160),
    "lite2_64": Network(*_LITE2, 64),
    "xception": Network("research.networks:Xception", "xception-imagenet.safetensors", "2768500d895e3b3b6426bc99c7333245", 160),
    "vit_s14": Network("research.networks:VitSmall14", "vit_small_14.safetensors", "bd755efc06dcb5f48d2f14993726c7e9", 168),
}
GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "core": {"squeezenet": (100, 500, 2000), "resnet20": (100, 500, 2000, 4000)},
    "full": {name: (100, 500, 2000, 4000) for name in ("squeezenet", "resnet20", "resnet56")},
    "lite0": {"lite0": (100, 500, 2000)},  # its weights come from weights.py
}
FROZEN = ("frozen", "cut", "multi")
TRAINED = ("tuned", "lpft", "plain", "scratch")
# The recipe of lpft and plain: the whole schedule, and the head of the last step.
USUAL: dict[str, Any] = {"epochs_at_500": 20, "refit_head": False}
SCRATCH_FROM = 2000  # images
SECOND_SEED_UNTIL = 500  # images
SLICES_AT = 500  # images of the units whose heads at all earlier taps are trained
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

    @property
    def row_key(self) -> tuple[str, ...]:
        """The key as the tables have it."""
        return tuple(map(str, self.key))


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return the key of a row's unit."""
    return row["data"], row["backbone"], row["n"], row["seed"]


def percent(row: Mapping[str, Any]) -> float:
    """Return the test accuracy of a row in percent."""
    return 100 * (int(row["hits_a"]) + int(row["hits_b"])) / (int(row["test_a"]) + int(row["test_b"]))


def rank(seed: int, text: str) -> str:
    """Return a hash by which texts are put into a random order."""
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


def append(path: Path, columns: Sequence[str], *rows: Mapping[str, object]) -> None:
    """Add rows to a table in one write: after a kill all of them are in the file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def repair(path: Path) -> None:
    """Drop a last line without an end: the machine stopped while it was written."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        draft = path.with_suffix(".draft")
        draft.write_bytes(content[: content.rfind(b"\n") + 1])
        draft.replace(path)
