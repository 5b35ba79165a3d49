"""Whether the champion's weights are a better start than the source's when a data set grows from 50 to 100 %.

    python -m research.warm FOLDER_FOR_WORK [SEED ...]

A champion is fine-tuned on half of the images. Then all images come, and the network is fine-tuned as usual from the source's weights
(cold), from the champion's (warm), from the champion's with half of the epochs (warm/2), and from the source's with twice the epochs
(cold x 2). `chain` starts on a quarter of the images, and each further quarter is trained from the weights before. The head is solved anew
each time. The test images are the same. `both` is cold or warm, whichever is better on validation, which no backbone was trained on.
`forgotten` is the largest fall of a class's recall against the champion. TLPIPELINE_DATA names the folder of the data. What has a line in
rows.jsonl of the folder for work is not trained again.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
# Each arm with where it starts, its share of the images, and its multiple of the usual epochs.
ARMS = {
    "champion": ("source", 0.5, 1.0), "cold": ("source", 1.0, 1.0), "warm": ("champion", 1.0, 1.0), "warm/2": ("champion", 1.0, 0.5),
    "cold x 2": ("source", 1.0, 2.0), "quarter": ("source", 0.25, 1.0), "two quarters": ("quarter", 0.5, 1.0),
    "three quarters": ("two quarters", 0.75, 1.0), "chain": ("three quarters", 1.0, 1.0),
}  # fmt: skip
SHOWN = ("champion", "cold", "warm", "warm/2", "cold x 2", "chain", "both")


def fine_tune(
    name: str, manifest: Manifest, images: Path, weights: Path, seed: int, times: float, work: Path
) -> tuple[Path, npt.NDArray[np.bool_], float]:
    """Return the model's folder, whether each test image is right, and the CPU seconds.

    Args:
        name: of the data set.
        manifest, images: what is trained on.
        weights: file to start from.
        times: multiple of the usual epochs.
        work: an empty folder.
    """
    net = NETWORKS[NETWORK]
    work.mkdir(parents=True)
    dataset.write_manifest(manifest, work / "manifest.parquet", work / "quarantine.csv")
    backbone = catalogue.load(net.name, str(weights), md5=file_md5(weights), size=net.size, seed=seed)
    plan = whole_network(case_of("tuned", 1.0), cutting.measure_taps(backbone, net.size)[-1], net.size)
    recipe = dataclasses.replace(plan.recipe, epochs_at_500=round(plan.recipe.epochs_at_500 * times), least_epochs=1)
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


def trained(name: str, seed: int, arm: str, work: Path) -> dict[str, Any]:
    """Train an arm and return its line. Its weights are kept as a source for the arms that start from it."""
    source, images = DATA / NETWORKS[NETWORK].weights, folders(DATA, work)[name]
    listed = pool(name, images, work)
    largest = sizes(len(listed), (IMAGES,))[-1]
    origin, share, times = ARMS[arm]
    here = work / f"{name}-{seed}"
    place = here / arm.replace("/", " ")
    shutil.rmtree(place, ignore_errors=True)  # an interrupted one starts again
    manifest = split(listed, round(largest * share), largest, seed)
    weights = source if origin == "source" else here / f"{origin}.safetensors"
    finished, right, spent = fine_tune(name, manifest, images, weights, seed, times, place)
    if arm in {origin for origin, _, _ in ARMS.values()}:
        as_source(finished, source, here / f"{arm}.safetensors")
    labels = np.array([row.label for row in manifest.used(TEST)])
    validation = json.loads((finished / "history.json").read_text())["validation"]
    shutil.rmtree(place)
    return {
        "data": name, "seed": seed, "arm": arm, "images": largest, "test": len(labels), "accuracy": 100 * float(right.mean()),
        "validation": 100 * validation["accuracy"], "log_loss": validation["log_loss"], "cpu_s": spent,
        "recall": {str(label): 100 * float(right[labels == label].mean()) for label in np.unique(labels)},
    }  # fmt: skip


def forgotten(arm: dict[str, Any], champion: dict[str, Any]) -> float:
    """Return the largest fall of a class's recall against the champion."""
    return max(float(champion["recall"][label] - recall) for label, recall in arm["recall"].items() if label in champion["recall"])


def main() -> None:
    """Train what has no line yet, and print the table."""
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "rows.jsonl"
    by_unit: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for line in map(json.loads, kept.read_text().splitlines() if kept.exists() else ()):
        by_unit.setdefault((line["seed"], line["data"]), {})[line["arm"]] = line
    for seed in [int(text) for text in sys.argv[2:]] or SEEDS:
        for name in SETS:
            arms = by_unit.setdefault((seed, name), {})
            for arm in ARMS:
                if arm not in arms:
                    arms[arm] = trained(name, seed, arm, work)
                    with kept.open("a") as file:
                        file.write(json.dumps(arms[arm]) + "\n")
    print_table({unit: arms for unit, arms in by_unit.items() if len(arms) == len(ARMS)})


def print_table(by_unit: dict[tuple[int, str], dict[str, dict[str, Any]]]) -> None:
    """Print a row for each seed and data set, and the means."""
    for arms in by_unit.values():
        arms["both"] = max((arms["cold"], arms["warm"]), key=lambda line: (line["validation"], -line["log_loss"]))
    print(f"| data set | seed | test | {' | '.join(SHOWN)} |\n|---|---:|---:|{'---:|' * len(SHOWN)}")
    for (seed, name), arms in sorted(by_unit.items()):
        figures = " | ".join(f"{arms[arm]['accuracy']:.1f}" for arm in SHOWN)
        print(f"| {name} | {seed} | {arms['cold']['test']} | {figures} |")
    for what, figure in (
        ("mean", lambda arms, arm: arms[arm]["accuracy"]),
        ("forgotten", lambda arms, arm: forgotten(arms[arm], arms["champion"])),
        ("CPU seconds", lambda arms, arm: arms[arm]["cpu_s"]),
    ):
        print(f"| {what} | | | {' | '.join(f'{np.mean([figure(arms, arm) for arms in by_unit.values()]):.1f}' for arm in SHOWN)} |")


if __name__ == "__main__":
    main()
