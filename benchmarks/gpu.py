"""How close to the hardware is training on a GPU? Images/s of the product beside two bounds that nobody can pass, in turns in one run.

    python -m benchmarks.gpu                    fine-tuning and feature extraction of ResNet-50, ConvNeXt-Tiny and ViT-B/16 at 224 pixels
    python -m benchmarks.gpu --ray              the same, and each job once more as a Ray Train job with one worker
    python -m benchmarks.gpu --device cpu --networks resnet18 --images 64 --size 64 --times 1      does it run at all?

The bounds: `network`, the same network, batch, number format and optimizer on tensors that are on the device already, and `input`, the same
batches of images, decoded and augmented, without a network. The product should reach 0.9 of the lower one. Its own figure is the one that a
run reports: of fine-tuning the last epoch, of feature extraction the pass over the training images, which ends with a step that is filled up
and with files that are safe on the disk, so a few images look slow. Networks have random weights and the JPEGs are made up, so nothing is
fetched. One GPU; several have not been run.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from research.arms import whole_network
from tlpipeline.backbones import catalogue, taps
from tlpipeline.backbones.classifier import Classifier
from tlpipeline.backbones.features import pass_size, with_pooling
from tlpipeline.backbones.precision import computes_in_bfloat16, enable_tf32, extracts_in_bfloat16
from tlpipeline.choice import cases
from tlpipeline.data import dataset, decoding
from tlpipeline.data.augment import augmentation
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.loader import Images, batch_ranges, normalize
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.data.transforms import Transforms
from tlpipeline.params import AUTO
from tlpipeline.training import train
from tlpipeline.training.budget import TimeBudget
from tlpipeline.training.config import TrainingConfig, TrainingPlan
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.images import Datasets, training_images
from tlpipeline.training.optim import optimizer
from tlpipeline.training.progress import ProgressWriter

TARGET = 0.9
CLASSES, SIDE = 10, 256
EPOCHS = 3  # the last one is reported: the first ones warm up
WARM_UP = 5
ON_DEVICE = 8  # batches that a bare loop goes round


@dataclass
class Bench:
    """What is measured: one network on one folder of images.

    Attributes:
        case: large_similar (fine-tuning) or small_similar (feature extraction).
        batch: images per step of fine-tuning.
    """

    device: torch.device
    name: str
    case: str
    size: int
    batch: int
    images: Path
    manifest: Manifest
    work: Path

    @property
    def frozen(self) -> bool:
        return cases.find(self.case).freeze == "kept"

    @property
    def half(self) -> bool:
        return extracts_in_bfloat16(self.device, AUTO) if self.frozen else computes_in_bfloat16(self.device)

    @cached_property
    def plan(self) -> TrainingPlan:
        """Nothing is cut; fine-tuning starts from a head of zeros and keeps it, so that no pass for a solved one is among its own."""
        plan = whole_network(cases.find(self.case), taps.measure_taps(self.backbone, self.size)[-1], self.size)
        return plan if self.frozen else replace(plan, init="plain", recipe=replace(plan.recipe, refit_head=False))

    @cached_property
    def backbone(self) -> taps.Backbone:
        return catalogue.load(self.name, catalogue.NONE, size=self.size)

    @cached_property
    def transforms(self) -> Transforms:
        return self.backbone.transforms.at(self.size)

    def model(self) -> Classifier:
        # It shares its tensors with its backbone: each model has its own.
        return Classifier(catalogue.load(self.name, catalogue.NONE, size=self.size), self.plan.head_taps, CLASSES, self.frozen).to(
            self.device
        )

    def job(self, place: Path) -> TrainingConfig:
        # Decoded images stay from one turn to the next, as from one epoch to the next; features are computed each time.
        dataset.write_manifest(self.manifest, place / "manifest.parquet", place / "quarantine.csv")
        return TrainingConfig(
            workspace=str(place), images=str(self.images), manifest=str(place / "manifest.parquet"), backbone=self.name,
            weights=catalogue.NONE, weights_md5=catalogue.NONE, plan=self.plan, seed=0, epochs=EPOCHS,
            batch_size=self.batch, flip=True, precision="auto", history=str(place / "history.jsonl"),
            cache=str((place if self.frozen else self.work) / "cache"), cache_bytes=1e11,
        )  # fmt: skip


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(device: torch.device, images: int, steps: Callable[[], None]) -> float:
    settle(device)
    started = time.perf_counter()
    steps()
    settle(device)
    return images / (time.perf_counter() - started)


# --- the bounds -----------------------------------------------------------------------------------------------------------------------


def on_device(bench: Bench, batch: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (batch, bench.size, bench.size, 3), dtype=torch.uint8, generator=rng) for _ in range(ON_DEVICE)]
    return [normalize(p.to(bench.device), bench.transforms) for p in pixels]


def bare_training(bench: Bench) -> float:
    """Forward, backward and the optimizer's step; nothing waits for the device before the end."""
    model, recipe, kind = bench.model(), bench.plan.recipe, bench.backbone.normalization
    blocks = [[f"trunk.{name}" for name in block] for block in taps.parameters_by_tap(bench.backbone, bench.plan.slice)]
    moving = optimizer(model, recipe, kind, 1e-4, blocks if recipe.layer_decay(kind) != 1 else (), fused=bench.device.type == "cuda")
    inputs = on_device(bench, bench.batch)
    labels = torch.arange(bench.batch, device=bench.device) % CLASSES
    model.train()
    for module in model.modules():
        if recipe.keeps_statistics(bench.size) and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()

    def steps(count: int) -> None:
        for i in range(count):
            with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=bench.half):
                logits = model(inputs[i % ON_DEVICE])
            moving.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            moving.step()

    steps(WARM_UP)
    count = max(len(bench.manifest.used(TRAIN)) // bench.batch, 1)
    return rate(bench.device, count * bench.batch, lambda: steps(count))


def bare_forward(bench: Bench) -> float:
    """Pass images through the layers that a head reads, and pool; in the product's step and number format."""
    model, size = bench.model().eval(), pass_size(bench.device, bench.size)
    read, inputs = with_pooling(model.trunk, model.grids, bench.half), on_device(bench, size)

    def steps(count: int) -> None:
        with torch.inference_mode():
            for i in range(count):
                read(inputs[i % ON_DEVICE])

    steps(WARM_UP)
    count = max(len(bench.manifest.used(TRAIN)) // size, 1)
    return rate(bench.device, count * size, lambda: steps(count))


def input_alone(bench: Bench, kept: bool) -> float:
    """The training images of one epoch, or of one pass, with nothing done to them; `kept`: as an epoch after the first has them."""
    rows, transforms = bench.manifest.used(TRAIN), bench.transforms
    images = Images(bench.images, rows, transforms)
    batches: Sequence[Sequence[int]] = batch_ranges(len(rows), pass_size(bench.device, bench.size))
    if not bench.frozen:
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        batches = [order[start : start + bench.batch] for start in range(0, len(order), bench.batch)]
        if kept:
            images = kept_images(bench)
        images.augment = augmentation(bench.plan.recipe.crop, True, 0, 0)

    def steps() -> None:
        for _ in images.batches(batches):
            pass

    return rate(bench.device, len(rows), steps)


def kept_images(bench: Bench) -> Images:
    """The images as fine-tuning itself keeps them, decoded here if no turn has done it yet."""
    datasets = Datasets.of(bench.images, bench.manifest, bench.transforms)
    with tempfile.TemporaryDirectory(prefix="gpu-") as made:
        job, context = bench.job(Path(made)), LocalContext(Path(made))
        return training_images(
            datasets, bench.plan.recipe.crop, EPOCHS, Store(Path(job.cache)), job.cache_bytes, context, TimeBudget(0, context),
            ProgressWriter(Path(job.history), 0), job.cadence.read_images,
        )[0]  # fmt: skip


# --- the product ----------------------------------------------------------------------------------------------------------------------


def product(bench: Bench, on_ray: bool) -> tuple[float, float, float]:
    """Return images/s and the share of the time that waited for data, as a whole run reports them, and the run's seconds in all."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as made:
        place = Path(made)
        job, started = bench.job(place), time.perf_counter()
        if on_ray:
            from tlpipeline.params import ClusterParams
            from tlpipeline.progress import silent
            from tlpipeline.training import ray_train

            cluster = ClusterParams(workers=1, gpu=bench.device.type == "cuda", max_failures=0, storage="none")
            finished = ray_train.run(job, cluster, "gpu", place / "runs", silent)
        else:
            (place / "scratch").mkdir()
            alone = train.run(job, LocalContext(place / "kept", bench.device), place / "scratch")
            assert alone is not None
            finished = alone
        told = json.loads((finished / "history.json").read_text())["speed"]
        return float(told["images_per_second"]), float(told["waited_for_data"]), time.perf_counter() - started


# --- the report -----------------------------------------------------------------------------------------------------------------------


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """Print a line for the network: medians over turns, bounds and product one after the other in each."""
    kinds: dict[str, Callable[[], float]] = {}
    waited: list[float] = []
    whole: dict[bool, list[float]] = {False: [], True: []}

    def told(on_ray: bool) -> float:
        found, idle, seconds = product(bench, on_ray)
        waited.append(idle)
        whole[on_ray].append(seconds)
        return found

    if bench.frozen:
        kinds["network"] = lambda: bare_forward(bench)
        kinds["input"] = lambda: input_alone(bench, kept=False)
    else:
        kinds["network"] = lambda: bare_training(bench)
        kinds["input"] = lambda: input_alone(bench, kept=True)
        kinds["input from files"] = lambda: input_alone(bench, kept=False)
    kinds["product"] = lambda: told(False)
    if options.ray:
        kinds["product on Ray"] = lambda: told(True)
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(options.times):
        for kind, run in kinds.items():
            rates[kind].append(run())
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"  turn {turn + 1}: " + ", ".join(f"{kind} {found[-1]:.1f}" for kind, found in rates.items()), flush=True)
    middle = {kind: statistics.median(found) for kind, found in rates.items()}
    lower = min(("network", "input"), key=lambda kind: middle[kind])
    what = f"{'features' if bench.frozen else f'fine-tuning, batch {bench.batch}'}, {'bfloat16' if bench.half else 'float32'}"
    print(f"{bench.name}, {bench.size} pixels, {what}: images/s, median of {options.times}")
    for kind, found in rates.items():
        share = middle[kind] / middle[lower]
        verdict = "" if not kind.startswith("product") else f"  {'reaches' if share >= TARGET else 'MISSES'} {TARGET} of {lower}"
        print(f"  {kind:20} {middle[kind]:9.1f}  {share:6.3f}  ({min(found):.1f} to {max(found):.1f}){verdict}")
    print(f"  the product waited for data {statistics.median(waited):.0%} of its time")
    images = len(bench.manifest.used(TRAIN)) * (1 if bench.frozen else EPOCHS)
    for on_ray, seconds in whole.items():
        if seconds:
            middle_one = statistics.median(seconds)
            beside = "decoding, validation, the head and checkpoints included" + (", and the start of Ray" if on_ray else "")
            print(f"  the whole job took {middle_one:.1f} s, {beside}: {images / middle_one:.1f} images/s", flush=True)


def made_up(place: Path, images: int) -> Manifest:
    """Write JPEGs of 256 x 256, smooth with a little noise, as photographs are; every sixth is for validation."""
    for label in range(CLASSES):
        (place / f"class{label}").mkdir(parents=True, exist_ok=True)

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(-12, 13, (SIDE, SIDE, 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(place / f"class{i % CLASSES}" / f"{i}.jpg", quality=90)

    with ThreadPoolExecutor(decoding.available_cpus()) as pool:
        list(pool.map(write, range(images)))
    whole = dataset.ingest(place, {}, lambda done, total: None)
    return replace(whole, rows=tuple(replace(row, split=VAL if i % 6 == 5 else TRAIN) for i, row in enumerate(whole.rows)))


def what_it_runs_on(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB), CUDA {torch.version.cuda}"
    else:
        name = f"NO GPU: the CPU with {torch.get_num_threads()} threads, which says nothing about a GPU"
    return f"{name}; {decoding.available_cpus()} CPUs, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--networks", nargs="+", default=("resnet50", "convnext_tiny", "vit_b_16"), help="torchvision's names")
    parser.add_argument("--images", type=int, default=6000, help="60 or more; a sixth is for validation")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=64, help="images per step of fine-tuning")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", choices=("fine-tuning", "features"), help="one of both")
    parser.add_argument("--ray", action="store_true", help="the Ray path, too: one worker")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "expected an NVIDIA GPU, found none. To see whether this file runs: --device cpu --networks resnet18 --images 64 --size 64"
        )
    device = enable_tf32(torch.device(options.device))
    print(what_it_runs_on(device), flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-images-") as made:
        place = Path(made)
        manifest = made_up(place / "images", options.images)
        batch = min(options.batch, len(manifest.used(TRAIN)))
        for name in options.networks:
            for what, case in (("fine-tuning", "large_similar"), ("features", "small_similar")):
                if options.only in (None, what):
                    measure(Bench(device, name, case, options.size, batch, place / "images", manifest, place), options)
    if options.ray:
        from tlpipeline.training import ray_train

        ray_train.shutdown()


if __name__ == "__main__":
    main()
