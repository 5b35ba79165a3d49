"""Whether the champion's weights are a better start than the source's when a data set grows from 50 to 100 %.

    python -m research.warm FOLDER_FOR_WORK [SEED ...]

A champion is fine-tuned on half of the images. Then all images come, and the network is fine-tuned as usual from the source's weights
(cold), from the champion's (warm), and from the champion's with half of the epochs (warm/2). The head is solved anew each time. The test
images are the same. `both` is cold or warm, whichever is better on validation, which no backbone was trained on. `forgotten` is the largest
fall of a class's recall against the champion. TLPIPELINE_DATA names the folder of the data. What has a line in rows.jsonl of the folder
for work is not trained again.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
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
ARMS = {"champion": 1, "cold": 1, "warm": 1, "warm/2": 2}  # each with the divisor of its epochs


def fine_tune(
    name: str, manifest: Manifest, images: Path, weights: Path, seed: int, shorter: int, work: Path
) -> tuple[Path, npt.NDArray[np.bool_], float]:
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


def measured(name: str, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """Train the arms of a data set and yield a line for each, the champion first."""
    source, images = DATA / NETWORKS[NETWORK].weights, folders(DATA, work)[name]
    listed = pool(name, images, work)
    largest = sizes(len(listed), (IMAGES,))[-1]
    half, whole = (split(listed, n, largest, seed) for n in (largest // 2, largest))
    labels = np.array([row.label for row in whole.used(TEST)])
    here = work / f"{name}-{seed}"
    shutil.rmtree(here, ignore_errors=True)  # an interrupted one starts again
    start = here / "champion.safetensors"
    recalls: dict[str, npt.NDArray[np.float64]] = {}
    for arm, shorter in ARMS.items():
        weights = source if arm in ("champion", "cold") else start
        finished, right, spent = fine_tune(
            name, half if arm == "champion" else whole, images, weights, seed, shorter, here / arm.replace("/", "")
        )
        if arm == "champion":
            as_source(finished, source, start)
        recalls[arm] = np.array([right[labels == label].mean() for label in np.unique(labels)])
        validation = json.loads((finished / "history.json").read_text())["validation"]
        yield {
            "data": name, "seed": seed, "arm": arm, "images": largest, "test": len(labels), "accuracy": 100 * float(right.mean()),
            "validation": 100 * validation["accuracy"], "log_loss": validation["log_loss"],
            "forgotten": 100 * float((recalls["champion"] - recalls[arm]).max()), "cpu_s": spent,
        }  # fmt: skip


def main() -> None:
    """Print a row for each data set and seed, and the means."""
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    seeds = [int(text) for text in sys.argv[2:]] or SEEDS
    kept = work / "rows.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    by_unit: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for line in lines:
        by_unit.setdefault((line["data"], line["seed"]), {})[line["arm"]] = line
    for seed in seeds:
        for name in SETS:
            if (name, seed) in by_unit:
                continue
            new = list(measured(name, seed, work))
            with kept.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in new))
            by_unit[name, seed] = {line["arm"]: line for line in new}
    for arms in by_unit.values():
        arms["both"] = max((arms["cold"], arms["warm"]), key=lambda line: (line["validation"], -line["log_loss"]))
    print("| data set | seed | test | champion | cold | warm | warm/2 | both |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    for (name, seed), arms in by_unit.items():
        figures = (f"{arms[arm]['accuracy']:.1f}" for arm in ("champion", "cold", "warm", "warm/2", "both"))
        print(f"| {name} | {seed} | {arms['cold']['test']} | {' | '.join(figures)} |")
    for arm in ("champion", "cold", "warm", "warm/2", "both"):
        print(arm, *(f"{key} {np.mean([arms[arm][key] for arms in by_unit.values()]):.1f}" for key in ("accuracy", "forgotten", "cpu_s")))


if __name__ == "__main__":
    main()
