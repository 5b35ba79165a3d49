"""Whether the champion's weights are a better start than the source's when a data set grows from 50 to 100 %.

    python -m research.warm FOLDER_FOR_WORK

A champion is fine-tuned on half of the images. Then all images come, and the network is fine-tuned as usual from the source's weights
(cold), from the champion's (warm), and from the champion's with half of the epochs (warm/2). The head is solved anew each time. The test
images are the same. `forgotten` is the largest fall of a class's recall against the champion. TLPIPELINE_DATA names the folder of the data.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from research.arms import case_of, cpu_seconds, whole_network
from research.grid import DATA, NETWORKS, NO_FLIP
from research.units import folders, pool, sizes, split
from tlpipeline.backbones import catalogue
from tlpipeline.backbones import classifier as models
from tlpipeline.backbones import taps as cutting
from tlpipeline.data import dataset
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.loader import Images
from tlpipeline.data.splits import TEST
from tlpipeline.files import file_md5
from tlpipeline.training import train
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.distributed import LocalContext

SETS = ("flowers", "eurosat", "sign_digits", "caltech24")
NETWORK, IMAGES, SEEDS = "resnet20", 1000, (0, 1)


def fine_tune(
    name: str, manifest: Manifest, images: Path, weights: Path, seed: int, shorter: int, work: Path
) -> tuple[Path, np.ndarray, float]:  # type: ignore[type-arg]
    """Return the model's folder, whether each test image is right, and the CPU seconds.

    Args:
        name: of the data set.
        manifest, images: what is trained on.
        weights: file to start from.
        shorter: divisor of the usual epochs.
        work: an empty folder.
    """
    net = NETWORKS[NETWORK]
    work.mkdir(parents=True)
    dataset.write_manifest(manifest, work / "manifest.parquet", work / "quarantine.csv")
    backbone = catalogue.load(net.name, str(weights), md5=file_md5(weights), size=net.size, seed=seed)
    plan = whole_network(case_of("tuned", 1.0), cutting.measure_taps(backbone, net.size)[-1], net.size)
    recipe = dataclasses.replace(plan.recipe, epochs_at_500=plan.recipe.epochs_at_500 // shorter, least_epochs=1)
    job = TrainingConfig(
        workspace=str(work), images=str(images), manifest=str(work / "manifest.parquet"), backbone=net.name, weights=str(weights),
        weights_md5=file_md5(weights), plan=dataclasses.replace(plan, recipe=recipe), seed=seed, epochs="auto", batch_size="auto",
        flip=name not in NO_FLIP, precision="auto", history=str(work / "history.jsonl"),
    )  # fmt: skip
    started = cpu_seconds()
    (work / "scratch").mkdir()
    finished = train.run(job, LocalContext(work / "kept"), work / "scratch")
    spent = cpu_seconds() - started
    assert finished is not None
    model, description = models.load(finished / "model", trusts=lambda network, code_md5: True)
    test = manifest.used(TEST)
    probabilities = models.probabilities(model, Images(images, test, description.transforms), torch.device("cpu"), lambda _: None).numpy()
    return finished, probabilities.argmax(1) == np.array([description.classes.index(row.label) for row in test]), spent


def as_source(finished: Path, source: Path, target: Path) -> Path:
    """Write the weights of the source with those of a fine-tuned backbone in their place; its old head stays."""
    state, tuned = load_file(source), load_file(finished / "model" / "weights.safetensors")
    replaced = {name: tuned[f"trunk.{name}"] for name in state if f"trunk.{name}" in tuned}
    assert len(replaced) > len(state) / 2, "the names of the backbone's weights differ"
    save_file({name: replaced.get(name, value).float().contiguous() for name, value in state.items()}, target)
    return target


def main() -> None:
    """Print a row for each data set and seed, and the means."""
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    source = DATA / NETWORKS[NETWORK].weights
    rows = []
    for seed in SEEDS:
        for name in SETS:
            images = folders(DATA, work)[name]
            listed = pool(name, images, work)
            largest = sizes(len(listed), (IMAGES,))[-1]
            half, whole = (split(listed, n, largest, seed) for n in (largest // 2, largest))
            labels = np.array([row.label for row in whole.used(TEST)])
            here = work / f"{name}-{seed}"
            champion, champion_right, _ = fine_tune(name, half, images, source, seed, 1, here / "champion")
            start = as_source(champion, source, here / "champion.safetensors")
            for arm, weights, shorter in (("cold", source, 1), ("warm", start, 1), ("warm/2", start, 2)):
                _, right, spent = fine_tune(name, whole, images, weights, seed, shorter, here / arm.replace("/", ""))
                falls = [champion_right[labels == label].mean() - right[labels == label].mean() for label in np.unique(labels)]
                row = {
                    "data": name, "seed": seed, "arm": arm, "images": largest, "test": len(labels), "champion": 100 * champion_right.mean(),
                    "accuracy": 100 * right.mean(), "forgotten": 100 * max(falls), "cpu_s": spent,
                }  # fmt: skip
                rows.append(row)
                print(json.dumps({k: round(float(v), 1) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    for arm in ("cold", "warm", "warm/2"):
        mine = [row for row in rows if row["arm"] == arm]
        print(arm, *(f"{key} {np.mean([row[key] for row in mine]):.1f}" for key in ("champion", "accuracy", "forgotten", "cpu_s")))


if __name__ == "__main__":
    main()
