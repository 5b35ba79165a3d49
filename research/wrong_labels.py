"""How well labels that are probably wrong are found: 5 % of the labels of real sets are flipped, and none.

    python -m research.wrong_labels [--data FOLDER] --work FOLDER [--only NAME ...]

`check.wrong_label` was chosen by this table. Each set is checked as the stage check does it: at most 2,048 images, the profile's best tap of
SqueezeNet. Flips are drawn evenly over images and other classes, five times. Precision and recall are means of the five draws; the listed images
of the unflipped set are not all false alarms, because some labels of these sets are wrong.
"""

import statistics
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from research.grid import NETWORKS
from research.units import command_line, folders
from tlpipeline.backbones import catalogue, features
from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.checking import labels
from tlpipeline.data import dataset
from tlpipeline.data.cache import Store
from tlpipeline.data.splits import TRAIN
from tlpipeline.params import CheckParams, ProfileParams
from tlpipeline.profiling import measure
from tlpipeline.progress import silent

SETS = ("neu_steel", "sign_digits", "pacs_sketch", "flowers", "caltech24", "eurosat", "brain_mri", "weather")
SHARE, DRAWS = 0.05, 5
THRESHOLDS = (0.7, 0.9, 0.95)
_NETWORK = NETWORKS["squeezenet"]


def features_of(folder: Path, data: Path, work: Path, images: int) -> tuple[torch.Tensor, TapPooling, npt.NDArray[np.int64]]:
    """Return the features of the images whose labels are checked, what was read, and their class numbers."""
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    backbone = catalogue.load(_NETWORK.name, str(data / _NETWORK.weights), md5=_NETWORK.md5)
    size = cutting.input_size(backbone, "auto", statistics.median(min(row.width, row.height) for row in manifest.used(TRAIN)))
    cpu, store, few = torch.device("cpu"), Store(work / "cache"), ProfileParams(tangent=False, images_max=512)
    profile = measure.measure(backbone, folder, manifest, size, few, lambda _: False, silent, cpu, store)
    rows = labels.drawn(manifest, images, few.seed)
    read = features.at_tap(backbone, profile.best.reading, size, folder, rows, store, cpu, False, lambda done: None)
    return read, profile.best.reading, labels.numbered(rows)


def flipped(truth: npt.NDArray[np.int64], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return labels with a share of them flipped to another class, and which."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(truth))[: round(SHARE * len(truth))]
    classes = int(truth.max()) + 1
    given = truth.copy()
    given[chosen] = (truth[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return given, np.isin(np.arange(len(truth)), chosen)


def main() -> None:
    """Print the table."""
    arguments = command_line(__doc__, SETS)
    sets = folders(arguments.data, arguments.work)
    columns = " | ".join(f"{t:g}: flips found | precision | listed unflipped" for t in THRESHOLDS)
    print(f"| data set | images | classes | probe | {columns} | right among the first 20 |")
    print(f"|---|{'---:|' * (4 + 3 * len(THRESHOLDS))}")
    for name in arguments.only:
        read, reading, truth = features_of(sets[name], arguments.data, arguments.work, CheckParams().images)
        clean = labels.left_out_probabilities(read, reading, truth)
        found: dict[float, list[tuple[float, float]]] = {threshold: [] for threshold in THRESHOLDS}
        first = []
        for seed in range(DRAWS):
            given, wrong = flipped(truth, seed)
            probabilities = labels.left_out_probabilities(read, reading, given)
            for threshold in THRESHOLDS:
                listed = [suspect.index for suspect in labels.suspects(probabilities, given, threshold)]
                hits = wrong[listed].sum() if listed else 0
                found[threshold].append((hits / wrong.sum(), hits / max(len(listed), 1)))
            first.append(wrong[[suspect.index for suspect in labels.suspects(probabilities, given, 0.0)][:20]].mean())
        cells = []
        for threshold in THRESHOLDS:
            recall, precision = np.mean(found[threshold], axis=0)
            cells.append(f"{recall:.0%} | {precision:.0%} | {len(labels.suspects(clean, truth, threshold)) / len(truth):.1%}")
        accuracy = (clean.argmax(1) == truth).mean()
        print(f"| {name} | {len(truth)} | {truth.max() + 1} | {accuracy:.1%} | {' | '.join(cells)} | {np.mean(first):.0%} |", flush=True)


if __name__ == "__main__":
    main()
