"""Images with a planted truth for the demonstration network, and their profiles."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.workspaces import REPOSITORY
from tlpipeline.backbones import catalogue
from tlpipeline.data.dataset import Manifest, ingest
from tlpipeline.data.loader import normalize, resize_and_crop
from tlpipeline.params import load
from tlpipeline.profiling import measure
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import silent

PARAMS = replace(
    load(REPOSITORY / "params.yaml").profile,
    images=512,
    images_max=512,
    seed=0,
    tangent=False,
)


def measured(
    folder: Path,
    manifest: Manifest | None = None,
    images: int = 512,
    undecided: Callable[[Profile], bool] = lambda _: False,
    tangent: bool = False,
    solvers: float = measure.SOLVERS,
) -> Profile:
    """Profile a folder for the demonstration network, which knows the ten classes of CIFAR-10."""
    net = catalogue.load("demonstration", "DEFAULT")
    params = replace(PARAMS, images=images, images_max=4 * images, tangent=tangent)
    manifest = manifest or ingest(folder, {}, lambda done, total: None)
    return measure.measure(net, folder, manifest, 32, params, undecided, silent, torch.device("cpu"), solvers=solvers)


def scene(index: int, seed: int = 7, size: int = 32) -> np.ndarray:
    """Colored clouds: what a photograph is to a network that is not asked for it."""
    rng = np.random.default_rng([seed, 1000, index])
    cells = int(rng.integers(2, 7))
    clouds = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(clouds).astype(float) * rng.uniform(0.5, 1.2) + rng.uniform(-60, 60)


def texture(label: int, size: int = 32) -> np.ndarray:
    """The finest stripes there are, upright or lying, or a chess board: gone after two poolings."""
    y, x = np.mgrid[:size, :size]
    return np.array([(-1.0) ** x, (-1.0) ** y, (-1.0) ** (x + y)][label])[..., None]


def write(folder: Path, pairs: Sequence[tuple[str, np.ndarray]], name: str = "pictures") -> Path:
    """Write labeled pixels as <label>/<number>.png."""
    for index, (label, pixels) in enumerate(pairs):
        (folder / name / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / label / f"{index:04d}.png")
    return folder / name


def own_pairs(each: int = 80, pool: int = 3000) -> list[tuple[str, np.ndarray]]:
    """Images of the network's own classes by construction: the clouds that its head takes most surely for one of four of them, that one their label.

    Most surely, because a frozen head must leave nothing to win: on clouds near the border between two classes fine-tuning may win or lose.
    """
    net = catalogue.load("demonstration", "DEFAULT")
    pixels = [scene(i, seed=11).clip(0, 255).astype(np.uint8) for i in range(pool)]
    inputs = torch.from_numpy(np.stack([resize_and_crop(Image.fromarray(p), net.transforms) for p in pixels]))
    with torch.inference_mode():
        chances, taken = (values.numpy() for values in net.module(normalize(inputs, net.transforms)).softmax(1).max(1))
    pairs: list[tuple[str, np.ndarray]] = []
    for source in np.argsort(-np.bincount(taken, minlength=10))[:4]:
        pairs += [
            (f"own{source}", pixels[i].astype(float)) for i in sorted(np.flatnonzero(taken == source), key=lambda i: -chances[i])[:each]
        ]
    return pairs


# The sets that the shipped model decides, which has to see gradients.
DECIDED = ("own", "rare", "early")


# Forty classes, sixty training images: half of them have two.
SIDES = ("train", "train", "val", "test")


def sets() -> dict[str, list[tuple[str, np.ndarray]]]:
    """Sets of images by what was planted in them."""
    rng = np.random.default_rng(0)
    own = own_pairs()
    names = sorted({label for label, _ in own})
    shuffled = rng.permutation([label for label, _ in own])
    early = [(f"c{i % 3}", scene(i) + 10 * texture(i % 3)) for i in range(360)]
    return {
        "own": own,
        "shuffled": [(str(label), pixels) for label, (_, pixels) in zip(shuffled, own, strict=True)],
        "noisy": [(names[rng.integers(len(names))] if rng.random() < 0.3 else label, pixels) for label, pixels in own],
        "early": early,
        "rare": [pair for pair in own if pair[0] != names[-1]] + [pair for pair in own if pair[0] == names[-1]][8:16],
        "nothing": [(f"c{np.random.default_rng(i).integers(3)}", scene(i)) for i in range(360)],
        "lopsided": [("common" if i % 20 else "odd", scene(i)) for i in range(360)],
        "many": [(f"{side}/c{i:02d}", scene(100 * turn + i)) for turn, side in enumerate(SIDES) for i in range(20 if turn == 1 else 40)],
    }


KNOWN: dict[str, Profile] = {}


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Profile]:
    """Profiles of sets with a known truth, measured on real images; test_choice.py decides on them."""
    if not KNOWN:
        folder = tmp_path_factory.mktemp("known")
        KNOWN.update({name: measured(write(folder, pairs, name), tangent=name in DECIDED) for name, pairs in sets().items()})
    return KNOWN
