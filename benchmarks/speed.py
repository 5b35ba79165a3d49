"""What does training cost, beside the least that it could cost? Every figure stands next to its reference, measured in turns in one run.

    python -m benchmarks.speed cache    a frozen case with a cold and a warm cache, and with 1 % new images, beside one bare pass
    python -m benchmarks.speed memory   peak memory of a frozen case at 1,000, 10,000 and 100,000 images, beside the bare pass, and what grows
    python -m benchmarks.speed loop     images/s of fine-tuning, checkpoints and validation in it, beside a bare torch loop over the same loader
    python -m benchmarks.speed workers  two workers with a thread each beside one with two threads
    python -m benchmarks.speed ray      where each second of a two-worker Ray fit goes that is not compute
    python -m benchmarks.speed busy     such a fit beside as many busy processes as there are CPUs, beside one whose workers have Ray's own priority
    python -m benchmarks.speed solvers  what the profile's solvers cost beside its passes through the network
    python -m benchmarks.speed precision  training steps in float32, in bfloat16 as torch has it, and as it is used here; frozen passes
    python -m benchmarks.speed half     what half precision, in the cache or in the passes, would change in a head's answers

Real images and weights come from --data (see research/README.md); SqueezeNet at 96 pixels, the smallest network that is of any use, so
that everything beside the network weighs most. Printed are medians over --times runs, reference and product in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from research.arms import cpu_seconds, whole_network
from research.grid import DATA, NETWORKS, ROOT
from research.units import folders, pool, split
from tests.helpers.processes import start_member
from tlpipeline import params
from tlpipeline.backbones import catalogue, precision, taps
from tlpipeline.backbones.classifier import Classifier, feature_extractor
from tlpipeline.backbones.features import PASS_SIZE
from tlpipeline.choice import cases
from tlpipeline.data import dataset
from tlpipeline.data.augment import augmentation
from tlpipeline.data.cache import SHARD_ROWS, Store
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.loader import Images, batch_ranges, normalize, resize_and_crop
from tlpipeline.data.splits import TEST, TRAIN, VAL
from tlpipeline.profiling import measure
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import silent
from tlpipeline.training import train, trainer
from tlpipeline.training.config import TrainingConfig, TrainingPlan
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.heads import IN_MEMORY_BYTES, solve_head
from tlpipeline.training.recipe import Recipe

CPU = torch.device("cpu")
NET = NETWORKS["squeezenet"]


def load(options: argparse.Namespace) -> taps.Backbone:
    net = NETWORKS[options.network]
    return catalogue.load(net.name, str(options.weights / net.weights), md5=net.md5, size=net.size)


def listed(options: argparse.Namespace, name: str, n: int) -> tuple[Path, Manifest]:
    """Return a data set's folder and a manifest with n images for training and validation."""
    folder = folders(options.data, options.work)[name]
    rows = pool(name, folder, options.work)
    return folder, split(rows, n, n, 0)


def plan_of(backbone: taps.Backbone, case: str, size: int) -> TrainingPlan:
    return whole_network(cases.find(case), taps.measure_taps(backbone, size)[-1], size)


def job(
    options: argparse.Namespace, place: Path, folder: Path, manifest: Manifest, plan: TrainingPlan, **changes: object
) -> TrainingConfig:
    dataset.write_manifest(manifest, place / "manifest.parquet", place / "quarantine.csv")
    values: dict[str, object] = {
        "workspace": str(place), "images": str(folder), "manifest": str(place / "manifest.parquet"), "backbone": NET.name,
        "weights": str(options.weights / NET.weights), "weights_md5": NET.md5, "plan": plan, "seed": 0, "epochs": "auto",
        "batch_size": "auto", "flip": True, "precision": "auto", "history": str(place / "history.jsonl"), "cache": str(place / "cache"),
        "cache_bytes": 1e10,
    }  # fmt: skip
    return TrainingConfig(**{**values, **changes})  # type: ignore[arg-type]


def bare_pass(network: Callable[[torch.Tensor], object], images: Images) -> None:
    """Decode, resize, forward: what nobody can do without. The decoding is one line of Pillow, in as many threads as the product has."""
    from concurrent.futures import ThreadPoolExecutor

    transforms = images.transforms

    def one(row: Row) -> np.ndarray:
        return resize_and_crop(Image.open(images.root / row.path).convert("RGB"), transforms)

    with torch.inference_mode(), ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        parts = batch_ranges(len(images), PASS_SIZE["cpu"])
        coming = pool.map(one, images.rows)
        for part in parts:
            network(normalize(torch.from_numpy(np.stack([next(coming) for _ in part])), transforms))


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Return CPU and wall seconds."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    work()
    return cpu_seconds() - cpu, time.perf_counter() - wall


def run_job(made: TrainingConfig, place: Path) -> Path:
    scratch = place / "scratch"
    scratch.mkdir()
    finished = train.run(made, LocalContext(place / "kept"), scratch)
    assert finished is not None
    return finished


def cache(options: argparse.Namespace) -> None:
    folder, manifest = listed(options, "caltech24", options.images)
    rows = manifest.used(TRAIN, VAL)
    backbone = load(options)
    plan = plan_of(backbone, "small_similar", options.size)
    network = taps.cut(backbone, [plan.slice]).to(memory_format=torch.channels_last)
    images = Images(folder, rows, backbone.transforms.at(options.size))
    few = {row.md5 for row in rows[:: max(len(rows) // (len(rows) // 100), 1)]}
    before = replace(manifest, rows=tuple(r for r in manifest.rows if r.md5 not in few))
    seen: dict[str, list[float]] = {}
    bare_pass(network, images)
    for _ in range(options.times):
        for name in ("bare pass", "cold", "warm", "1 % new"):
            with tempfile.TemporaryDirectory(prefix="speed-") as made:
                place = Path(made)
                if name == "bare pass":
                    used = spent(lambda: bare_pass(network, images))
                else:
                    if name != "cold":
                        (place / "first").mkdir()
                        first = job(options, place, folder, manifest if name == "warm" else before, plan)
                        run_job(first, place / "first")
                    ours = job(options, place, folder, manifest, plan)
                    used = spent(lambda: run_job(ours, place))  # noqa: B023
            seen.setdefault(name, []).append(used[0])
    reference = statistics.median(seen["bare pass"])
    print(
        f"{len(rows)} images of caltech24, {len(few)} of them new in the last line; CPU s of the train stage's compute, median of {options.times}"
    )
    for name, values in seen.items():
        print(
            f"{name:10} {statistics.median(values):7.2f} s  {statistics.median(values) / reference:6.3f} x  ({min(values):.2f} to {max(values):.2f})"
        )


def own_memory() -> float:
    """Return what is resident without what is mapped from files, in MB."""
    import psutil

    now = psutil.Process().memory_info()
    return float(now.rss - now.shared) / 1e6


def peak(work: Callable[[], object]) -> float:
    """Return the largest own memory in MB while something runs."""
    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most[0]


def one_peak(options: argparse.Namespace) -> None:
    """Measure in a process of its own: memory that was once taken is seldom given back."""
    folder, n, least, kind = Path(options.only[0]), options.only[1], options.only[2], options.only[3]
    backbone = catalogue.load("demonstration", "DEFAULT")
    plan = plan_of(backbone, "small_similar", 32)
    dataset.read_manifest(folder.parent / f"{least}.parquet")  # what reading needs once is no part of a manifest
    before = own_memory()
    manifest = dataset.read_manifest(folder.parent / f"{n}.parquet")
    manifest_size = own_memory() - before
    with tempfile.TemporaryDirectory(prefix="speed-") as made:
        place = Path(made)
        if kind == "bare":
            network = taps.cut(backbone, [plan.slice]).to(memory_format=torch.channels_last)
            rows = manifest.used(TRAIN, VAL)
            # A shard's worth at a time: all at once it would decode all images ahead of the network, and keep them.
            parts = [Images(folder, [rows[i] for i in part], backbone.transforms) for part in batch_ranges(len(rows), SHARD_ROWS)]
            found = peak(lambda: [bare_pass(network, images) for images in parts])
        else:
            few = dataset.read_manifest(folder.parent / f"{least}.parquet")  # what writing many rows needs is no part of training
            ours = job(options, place, folder, few, plan, backbone="demonstration", weights="DEFAULT", weights_md5="none")
            ours = replace(ours, manifest=str(folder.parent / f"{n}.parquet"))
            del manifest  # the job reads its own
            found = peak(lambda: run_job(ours, place))
    print(json.dumps([found, manifest_size]))


def memory(options: argparse.Namespace) -> None:
    place = options.work / "many"
    rng = np.random.default_rng(0)
    largest, least = max(options.sizes), min(options.sizes)
    if not (place / f"{largest}.parquet").exists():
        for label in range(10):
            (place / "images" / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(largest):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32)).save(
                place / "images" / f"class{i % 10}" / f"{i}.png"
            )
        whole = dataset.ingest(place / "images", {}, lambda done, total: None)
        for n in options.sizes:
            part = replace(whole, rows=tuple(r for r in whole.rows if int(Path(r.path).stem) < n))
            dataset.write_manifest(part, place / f"{n}.parquet", place / "left.csv")
    width = sum(plan_of(catalogue.load("demonstration", "DEFAULT"), "small_similar", 32).head_taps[0].blocks)
    print(
        f"MB of own memory at its peak, what is mapped from files not counted; the manifest as far as it is larger than that of {least} images; "
        f"median of {options.times}"
    )
    print("images  bare pass  frozen case         manifest  both without it         features that the head holds")
    for n in options.sizes:
        found: dict[str, list[list[float]]] = {"bare": [], "ours": []}
        for _ in range(options.times):
            for kind, told in found.items():
                said = subprocess.run(
                    [sys.executable, __file__, "peak", "--only", str(place / "images"), str(n), str(least), kind, "--weights", str(options.weights)],
                    check=True, capture_output=True, text=True,
                ).stdout  # fmt: skip
                told.append(json.loads(said))
        bare, ours = (statistics.median(peaks[0] for peaks in found[kind]) for kind in ("bare", "ours"))
        manifest = statistics.median(size for kind in found.values() for _, size in kind)
        rows = len(dataset.read_manifest(place / f"{n}.parquet").used(TRAIN, VAL))
        held = min(4 * rows * width, IN_MEMORY_BYTES) / 1e6
        print(
            f"{n:6}  {bare:9.0f}  {ours:11.0f}  {ours / bare:.2f} x  {manifest:8.0f}  {bare - manifest:6.0f} {ours - manifest:6.0f}  "
            f"{(ours - manifest) / (bare - manifest):.2f} x  {held:8.0f}",
            flush=True,
        )


def solvers(options: argparse.Namespace) -> None:
    """The profile with an empty and with a full store: what is left of it without passes are its solvers. The sample grows as far as it may."""
    asked = params.load(ROOT / "params.yaml").profile
    backbone, looked = load(options), [0.0]

    look = measure.sequential

    def timed(*given: Any) -> Any:
        before = cpu_seconds()
        answer = look(*given)
        looked[0] += cpu_seconds() - before
        return answer

    measure.sequential = timed  # BatchNorm's second look is a pass that is never kept
    print(f"CPU s at {options.size} pixels, the sample doubled as long as the product would at most; median of {options.times}")
    print("data          sample  passes  solvers  share")
    for name in options.only or ("caltech24", "eurosat", "pacs_sketch", "flowers", "neu_steel"):
        folder, manifest = listed(options, name, options.images)
        found: list[tuple[float, float]] = []
        for _ in range(options.times):
            with tempfile.TemporaryDirectory(prefix="speed-") as made:
                seen: list[Profile] = []

                def profile(place: Path = Path(made), seen: list[Profile] = seen) -> None:
                    given = (backbone, folder, manifest, options.size, asked, lambda _: True, silent, CPU)  # noqa: B023
                    seen.append(measure.measure(*given, store=Store(place)))

                cold, _ = spent(profile)
                looked[0] = 0.0
                warm, _ = spent(profile)
            found.append((cold - warm + looked[0], warm - looked[0]))
        passes, left = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:12}  {seen[-1].sampled:6}  {passes:6.2f}  {left:7.2f}  {left / passes:5.2f}", flush=True)


LOOP_EPOCHS = 4


def bare_loop(
    model: Classifier, images: Images, labels: np.ndarray, val: Images, val_labels: np.ndarray, recipe: Recipe, half: bool
) -> float:
    """A plain torch loop over the same loader: no checkpoints, no progress, no schedule, no workers. Return the accuracy of its last epoch."""
    moving = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    size, right = recipe.batch_size(len(images)), 0
    for epoch in range(LOOP_EPOCHS):
        model.train()
        order = np.random.default_rng([0, epoch]).permutation(len(images))
        images.augment = augmentation(recipe.crop, True, 0, epoch)
        for indices, pixels in images.batches([[int(i) for i in order[s : s + size]] for s in range(0, len(order), size)]):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                logits = model(normalize(pixels, images.transforms))
            loss = torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(labels[list(indices)]))
            moving.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            moving.step()
        model.eval()
        right = 0
        with torch.inference_mode():
            for indices, pixels in val.batches([list(part) for part in batch_ranges(len(val), PASS_SIZE["cpu"])]):
                guessed = model(normalize(pixels, val.transforms)).argmax(1).numpy()
                right += int((guessed == val_labels[list(indices)]).sum())
    return right / len(val)


def loop(options: argparse.Namespace) -> None:
    """Time all epochs of fine-tuning, each validated, with checkpoints as the product takes them; decoded images are kept for both."""
    folder, manifest = listed(options, "caltech24", options.images)
    rows, others = manifest.used(TRAIN), manifest.used(VAL)
    labels, val_labels = (np.array([manifest.classes.index(r.label) for r in side]) for side in (rows, others))
    plan = plan_of(load(options), "large_similar", NET.size)
    plan = replace(plan, recipe=replace(plan.recipe, refit_head=False))
    half = precision.computes_in_bfloat16(CPU)
    seconds: dict[str, list[tuple[float, float]]] = {"bare loop": [], "product": []}
    loaders: list[tuple[Images, Images]] = []
    plain_fit, plain_images = trainer.Trainer.fit, trainer.Trainer._images

    def fit(self: trainer.Trainer, *args: object) -> None:
        loaders.append(plain_images(self, LOOP_EPOCHS))  # what is not decoded yet is decoded here, for both
        seconds["product"].append(spent(lambda: plain_fit(self, *args)))  # type: ignore[arg-type]

    trainer.Trainer.fit = fit  # type: ignore[method-assign, assignment]
    trainer.Trainer._images = lambda self, epochs: loaders[-1]  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="speed-") as kept:

        def product() -> None:
            with tempfile.TemporaryDirectory(prefix="speed-") as made:
                ours = job(options, Path(made), folder, replace(manifest), plan, epochs=LOOP_EPOCHS, cache=str(Path(kept) / "cache"))
                run_job(ours, Path(made))

        def bare() -> None:
            model = Classifier(load(options), plan.head_taps, len(manifest.classes), frozen=False)
            seconds["bare loop"].append(
                spent(lambda: bare_loop(model, loaders[-1][0], labels, loaders[-1][1], val_labels, plan.recipe, half))
            )

        for turn in range(options.times):
            # Whoever comes second finds the machine as the first left it.
            for work in (product, bare) if turn % 2 == 0 else (bare, product):
                work()
            print({name: [round(LOOP_EPOCHS * len(rows) / s, 1) for s in values[turn]] for name, values in seconds.items()}, flush=True)
    print(
        f"training images/s of {LOOP_EPOCHS} epochs of {len(rows)} images, each validated on {len(others)}; medians of {options.times} turns"
    )
    print("             by CPU seconds                      by the clock")
    for name, values in seconds.items():
        told = name.ljust(12)
        for k in (0, 1):
            rates = [LOOP_EPOCHS * len(rows) / s[k] for s in values]
            # Each turn against its own reference: between turns the machine changes more than between the two of a turn.
            shares = [bare[k] / s[k] for bare, s in zip(seconds["bare loop"], values, strict=True)]
            told += f"{statistics.median(rates):7.1f}  {statistics.median(shares):5.3f} x ({min(shares):.2f} to {max(shares):.2f})    "
        print(told)


def workers(options: argparse.Namespace) -> None:
    folder, manifest = listed(options, "caltech24", options.images)
    plan = plan_of(load(options), "large_similar", NET.size)
    walls: dict[str, list[float]] = {}
    for turn in range(options.times):
        for size in (1, 2):
            with tempfile.TemporaryDirectory(prefix="speed-") as made:
                place = Path(made)
                ours = job(options, place, folder, manifest, plan, epochs=1)
                spec = place / "spec.json"
                spec.write_text(json.dumps([{"job": asdict(ours), "folder": str(place / "run")}]))
                group = [start_member(rank, size, 29511 + turn, spec, {"GROUP_THREADS": str(2 // size)}) for rank in range(size)]
                if any(member.wait() for member in group):
                    sys.exit("a worker failed: see above")
                lines = [json.loads(line)["text"] for line in (place / "history.jsonl").read_text().splitlines()]
            (told,) = (line for line in lines if "validation accuracy" in line and "epoch 1/1" in line)
            walls.setdefault(f"{size} worker{'s' if size > 1 else ''} x {2 // size}", []).append(
                float(told.split(" images/s")[0].split()[-1])
            )
    reference = statistics.median(walls["1 worker x 2"])
    for name, values in walls.items():
        print(f"{name:12} {statistics.median(values):6.1f} images/s  {statistics.median(values) / reference:5.3f} x  {values}")


# What has ended at each stamp of a fit, in order: (stamp, who is at work, what it does). Of several workers the last one counts.
STAGES = (
    ("built", "driver", "resources checked, trainer built"),
    ("controller made", "Ray", "starts the controller's process"),
    ("controller ready", "controller", "imports Ray Train and torch"),
    ("worker made", "Ray", "placement group, starts the workers' processes"),
    ("workers answer", "workers", "import Ray Train, with pandas and pyarrow"),
    ("worker ready", "workers", "read the settings: import torch"),
    ("BackendSetupCallback", "workers", "process group"),
    ("PlacementGroupCleanerCallback", "Ray", "waits for the placement group's cleaner, a process that imports Ray Train"),
    ("loop", "workers", "read the loop: import tlpipeline"),
    ("rest", "workers", "import torchvision and what else the loop imports later"),
    ("head", "compute", "backbone, features, head"),
    ("first step", "compute", "first step of fine-tuning"),
    ("trained", "compute", "all other steps, validation, what is kept written"),
    ("reported", "checkpoints", "handed to Ray, copied to the storage, waited for by all workers"),
    ("noticed", "controller", "sees that the loop has ended"),
    ("group down", "workers", "process group and workers stopped"),
    ("cleaner down", "Ray", "placement group's cleaner stopped"),
    ("fitted", "controller", "result handed over, stopped"),
    ("copied", "driver", "newest checkpoint copied into the run's folder"),
)


def born() -> float:
    """Return when this process was made, to a hundredth of a second (psutil rounds the start of the machine to a second)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def stamp(log: str, what: str, at: float | None = None) -> None:
    with open(log, "a") as file:
        file.write(json.dumps([what, os.getpid(), at or time.time()]) + "\n")


def stamped(loop: Callable[[dict[str, object]], object], log: str) -> Callable[[dict[str, object]], None]:
    """Return a training loop that also stamps; it goes to the workers by value, so what it needs of the library it imports itself."""

    def with_stamps(config: dict[str, object]) -> None:
        import importlib

        stamp(log, "loop")
        from tlpipeline.training import distributed, ray_train, trainer

        # What the loop itself would import a little later.
        for name in ("pyarrow.parquet", "safetensors.torch", "torchvision.models", "torch._dynamo"):
            importlib.import_module(name)
        stamp(log, "rest")
        seen: set[str] = set()

        def first(what: str) -> None:
            if what not in seen:
                seen.add(what)
                stamp(log, what)

        def reporting(plain):  # type: ignore[no-untyped-def]
            def report(self, metrics, folder):  # type: ignore[no-untyped-def]
                first("head")
                stamp(log, "report")
                plain(self, metrics, folder)
                stamp(log, "reported")

            return report

        def stepping(plain):  # type: ignore[no-untyped-def]
            def step(self, *args):  # type: ignore[no-untyped-def]
                answer = plain(self, *args)
                first("first step")
                return answer

            return step

        places = (
            (ray_train._RayContext, "report", reporting),
            (distributed.LocalContext, "report", reporting),
            (trainer.Trainer, "_step", stepping),
        )
        before = [getattr(kind, name) for kind, name, _ in places]
        for (kind, name, wrap), plain in zip(places, before, strict=True):
            setattr(kind, name, wrap(plain))
        try:
            loop(config)
        finally:
            for (kind, name, _), plain in zip(places, before, strict=True):
                setattr(kind, name, plain)
        stamp(log, "trained")

    return with_stamps


def stamped_trainer(log: str) -> type:
    """Return Ray's trainer with stamps between its own callbacks; whatever else it does is as it was."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution import callback as kinds

    class After(kinds.WorkerGroupCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def after_worker_group_start(self, worker_group: object) -> None:
            stamp(log, self.name)

    class Ends(kinds.ControllerCallback, kinds.WorkerGroupCallback, kinds.WorkerCallback):
        def after_controller_start(self, train_run_context: object) -> None:
            stamp(log, "controller made", born())
            stamp(log, "controller ready")

        def before_init_train_context(self, workers: object) -> dict[str, list[object]]:
            stamp(log, "workers answer")
            return {}

        def after_init_train_context(self) -> None:
            stamp(log, "worker made", born())
            stamp(log, "worker ready")

        def after_controller_state_update(self, previous_state: object, current_state: object) -> None:
            if type(current_state).__name__ == "ShuttingDownState":
                stamp(log, "noticed")

        def after_worker_group_shutdown(self, worker_group_context: object) -> None:
            stamp(log, "group down")

        async def before_controller_shutdown(self) -> None:
            stamp(log, "cleaner down")

    class Trainer(TorchTrainer):
        def __init__(self, loop: Callable[[dict[str, object]], None], **others: object) -> None:
            super().__init__(stamped(loop, log), **others)

        def _create_default_callbacks(self) -> list[object]:
            return [c for own in super()._create_default_callbacks() for c in (own, After(type(own).__name__))] + [Ends()]

        def fit(self) -> object:
            stamp(log, "built")
            answer = super().fit()
            stamp(log, "fitted")
            return answer

    return Trainer


def seconds_of(log: str, begun: float, done: float) -> dict[str, float]:
    """Return the seconds of each stage between the stamps of a fit."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    at: dict[str, list[float]] = {}
    for what, process, when in lines:
        at.setdefault(f"{what} {process}" if what.startswith("report") else what, []).append(when)
    last = {what: max(times) for what, times in at.items()} | {"copied": done}
    # A report begins and ends with the last worker.
    reports = [
        [max(turn) for turn in zip(*(v for k, v in at.items() if k.split()[0] == what), strict=True)] for what in ("report", "reported")
    ]
    out: dict[str, float] = {"reported": 0.0}
    for what, _, _ in STAGES:
        if what == "reported" or what not in last:
            continue
        end = max(last[what], begun)
        within = sum(e - b for b, e in zip(*reports, strict=True) if begun <= b < end)
        out["reported"] += within
        out[what] = end - begun - within
        begun = end
    return out


def fits(options: argparse.Namespace) -> None:
    """Start Ray, train twice with it and twice without in turns (or once as --only says), stop Ray; print the seconds of each stage."""
    from tlpipeline.params import ClusterParams
    from tlpipeline.progress import silent
    from tlpipeline.training import ray_train

    folder, manifest = listed(options, "caltech24", 100)
    plan = plan_of(load(options), "large_similar", NET.size)
    started = time.perf_counter()
    import ray.train.torch

    imported = time.perf_counter()
    ray_train.runtime(2)
    told: dict[str, object] = {"import": imported - started, "runtime": time.perf_counter() - imported}
    plain = ray.train.torch.TorchTrainer
    clusters = {kind: ClusterParams(workers=n, gpu=False, max_failures=0, storage="none") for kind, n in (("alone", 0), ("Ray", 2))}
    for turn in ("first",) if options.only else ("first", "later"):
        for kind in options.only or clusters:
            with tempfile.TemporaryDirectory(prefix="speed-") as made:
                place, log = Path(made), f"{made}/stamps"
                ours = job(options, place, folder, manifest, plan, epochs=3)
                begun = time.time()
                if kind == "Ray":
                    ray.train.torch.TorchTrainer = stamped_trainer(log)
                    ray_train.run(ours, clusters[kind], turn, place / "runs", silent)
                    ray.train.torch.TorchTrainer = plain
                else:
                    stamped(lambda _: ray_train.run(ours, clusters[kind], turn, place / "runs", silent), log)({})  # noqa: B023
                told[f"{kind}, {turn}"] = seconds_of(log, begun, time.time())
    stopping = time.perf_counter()
    ray_train.shutdown()
    told["shutdown"] = time.perf_counter() - stopping
    print(json.dumps(told))


def ray(options: argparse.Namespace) -> None:
    """Each turn is a process of its own, so that the first fit is really the first."""
    # As in `make`: bytecode is kept. Else each of a fit's five processes compiles Ray and torch again, and its share is three times as long.
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    places = ["--data", options.data, "--weights", options.weights, "--work", options.work]
    turns, load = [], os.getloadavg()
    for turn in range(options.times + 1):
        found = subprocess.run(
            [sys.executable, __file__, "fits", *map(str, places)], env=kept, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        if turn:  # the one before the first writes bytecode
            turns.append(json.loads(found.splitlines()[-1]))
    columns = ("Ray, first", "Ray, later", "alone, first", "alone, later")
    middle = {c: {what: statistics.median(turn[c].get(what, 0.0) for turn in turns) for what, _, _ in STAGES} for c in columns}
    once = {what: statistics.median(turn[what] for turn in turns) for what in ("import", "runtime", "shutdown")}
    print(
        f"seconds of a two-worker fit on 100 images, a head and 3 epochs, and of the same job in one process; median of {options.times} turns"
    )
    print(f"{'':11} {' '.join(f'{c:>12}' for c in columns)}")
    for what, who, does in STAGES:
        print(f"{who:11} {' '.join(f'{middle[c][what]:12.2f}' for c in columns)}   {does}")
    print(f"{'all':11} {' '.join(f'{statistics.median(sum(turn[c].values()) for turn in turns):12.2f}' for c in columns)}")
    computed = [what for what, who, _ in STAGES if who == "compute"]
    for column in columns[:2]:
        beyond = [sum(turn[column].values()) - sum(turn[column][what] for what in computed) for turn in turns]
        print(f"{column}: {statistics.median(beyond):.1f} s beyond its compute ({min(beyond):.1f} to {max(beyond):.1f})")
    print(
        f"once a process: import of Ray beside torch {once['import']:.1f}, its runtime {once['runtime']:.1f}, stopping it {once['shutdown']:.1f}"
    )
    print(f"load of this machine's {len(os.sched_getaffinity(0))} CPUs before and after: {load[0]:.1f}, {os.getloadavg()[0]:.1f}")
    print("STACK.md 1.3, two contended cores: runtime 5 to 15; a two-worker fit that does nothing 25 to 63")


def busy(options: argparse.Namespace) -> None:
    """Fits with Ray's priority for its workers and with ours, in turns, while as many other processes as there are CPUs never rest.

    What takes longer than --limit is ended there, and counts as that long.
    """
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    places = ["--data", options.data, "--weights", options.weights, "--work", options.work]
    command = [sys.executable, __file__, "fits", "--only", "Ray", *map(str, places)]
    took: dict[str, list[float]] = {"0": [], "15": []}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        for niceness in ["0", *list(took) * options.times]:  # the one before the first writes bytecode
            fit = subprocess.Popen(
                command, env=kept | {"RAY_worker_niceness": niceness}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )  # fmt: skip
            try:
                said, wrong = fit.communicate(timeout=options.limit)
                if fit.returncode:
                    raise SystemExit(f"the fit with niceness {niceness} failed: {wrong}")
                took[niceness].append(sum(json.loads(said.splitlines()[-1])["Ray, first"].values()))
            except subprocess.TimeoutExpired:
                fit.terminate()
                fit.communicate()  # what it says of its end is of no interest
                took[niceness].append(float(options.limit))
            print(f"niceness {niceness:>2}: {_at_most(took[niceness][-1], options.limit)}", flush=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    took["0"].pop(0)
    ours, theirs = (statistics.median(seconds) for seconds in took.values())
    print(f"seconds of a two-worker fit on 100 images beside {len(others)} busy processes, median of {options.times}")
    for niceness, seconds in took.items():
        print(f"niceness {niceness:>2}: {_at_most(statistics.median(seconds), options.limit)}")
    if ours < options.limit:
        bound = ", or less" if theirs >= options.limit else ""
        print(f"ours takes {ours / theirs:.2f} of the time that it takes with Ray's own, 15{bound}")


def _at_most(seconds: float, limit: float) -> str:
    return f"{seconds:.1f}" if seconds < limit else f"ended after {limit:.0f}"


TESTED: dict[str, Store] = {}


def accuracy(model_folder: Path, folder: Path, manifest: Manifest, options: argparse.Namespace) -> float:
    """Return test accuracy; the frozen features of the test side are kept from one call to the next."""
    from tlpipeline.backbones import classifier as models

    model, description = models.load(model_folder, trusts=lambda network: True)
    test = manifest.used(TEST)
    store = TESTED.setdefault(str(folder), Store())
    chances = models.probabilities(model, Images(folder, test, description.transforms), CPU, lambda done: None, store)
    return float((chances.argmax(1).numpy() == np.array([description.classes.index(r.label) for r in test])).mean())


def half(options: argparse.Namespace) -> None:
    print(
        "a head solved on features kept in float32, float16 and bfloat16, computed in bfloat16, and these for training alone: test accuracy,"
    )
    print("and answers that differ from float32's")
    for name in options.only or ("caltech24", "eurosat", "pacs_sketch", "neu_steel"):
        folder, manifest = listed(options, name, 500)
        manifest = replace(manifest, rows=tuple(r for r in manifest.rows if r.split != TEST or int(r.md5[:4], 16) % 3 == 0))
        backbone = load(options)
        plan = plan_of(backbone, "small_similar", NETWORKS[options.network].size)
        model = Classifier(backbone, plan.head_taps, len(manifest.classes), frozen=True)
        sides = {side: manifest.used(side) for side in (TRAIN, TEST)}
        transforms = backbone.transforms.at(NETWORKS[options.network].size)

        def read(in_bfloat16: bool) -> dict[str, torch.Tensor]:
            reader = feature_extractor(model, Store(), transforms, CPU, in_bfloat16)  # noqa: B023
            return {side: reader.extract(Images(folder, rows, transforms), lambda done: None)[0].all() for side, rows in sides.items()}  # noqa: B023

        features, computed = read(False), read(True)
        labels = {side: np.array([manifest.classes.index(r.label) for r in rows]) for side, rows in sides.items()}
        guesses = []
        kept = [{side: f.to(kind).float() for side, f in features.items()} for kind in (torch.float32, torch.float16, torch.bfloat16)]
        for x in (*kept, computed, {TRAIN: computed[TRAIN], TEST: features[TEST]}):
            weight, bias, _ = solve_head(x[TRAIN], labels[TRAIN], model.blocks, len(manifest.classes), 10, 0, 1e-4)
            guesses.append((x[TEST] @ weight.T + bias).argmax(1).numpy())
        told = [f"{(g == labels[TEST]).mean():.4f} ({int((g != guesses[0]).sum())} differ)" for g in guesses]
        print(f"{name:12} {len(labels[TEST])} test images   {'   '.join(told)}", flush=True)


def precisions(options: argparse.Namespace) -> None:
    """Time steps of fine-tuning, and passes of a frozen network; networks have random weights, because how fast they are does not depend on them."""
    names = options.only or ("resnet18", "squeezenet1_0", "mobilenet_v2", "mobilenet_v3_small", "mnasnet1_0", "shufflenet_v2_x1_0", "efficientnet_b0",
                             "regnet_y_400mf", "convnext_tiny")  # fmt: skip
    ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "float32": nullcontext,
        "bfloat16 everywhere": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "product": lambda: precision.autocast(CPU, half=True),
    }
    print(f"training images per CPU second, batches of 16 images of {options.size} pixels, median of {options.times}")
    for name in names:
        net = catalogue.load(name, catalogue.NONE, size=options.size).module.to(memory_format=torch.channels_last).train()
        inputs = torch.randn(16, 3, options.size, options.size).to(memory_format=torch.channels_last)

        def step(around: AbstractContextManager[object]) -> None:
            with around:
                logits = net(inputs)  # noqa: B023
            logits.float().logsumexp(1).mean().backward()  # type: ignore[no-untyped-call]

        def forward(around: AbstractContextManager[object]) -> None:
            with torch.inference_mode(), around:
                net(inputs)  # noqa: B023

        def timed(work: Callable[[AbstractContextManager[object]], None], named: Sequence[str]) -> dict[str, float]:
            found: dict[str, list[float]] = {way: [] for way in named}
            for turn in range(options.times + 1):
                for way in named:
                    cpu, _ = spent(lambda: work(ways[way]()))  # noqa: B023
                    if turn:  # the first one warms up
                        found[way].append(16 / cpu)
            return {way: statistics.median(values) for way, values in found.items()}

        middle = timed(step, tuple(ways))
        net.eval()
        passes = timed(forward, ("float32", "product"))
        fastest = max(middle["float32"], middle["bfloat16 everywhere"])
        print(f"{name:20}", *(f"{way} {value:6.1f}" for way, value in middle.items()), f"product {middle['product'] / fastest:.2f} of the faster one", f"frozen passes: float32 {passes['float32']:6.1f}, bfloat16 {passes['product'] / passes['float32']:.2f} of it", sep="  ", flush=True)  # fmt: skip


VERBS = {
    "solvers": solvers,
    "cache": cache,
    "memory": memory,
    "peak": one_peak,
    "loop": loop,
    "workers": workers,
    "ray": ray,
    "fits": fits,
    "busy": busy,
    "precision": precisions,
    "half": half,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--weights", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tlpipeline-regret")
    parser.add_argument("--images", type=int, default=2000, help="training and validation images")
    parser.add_argument("--sizes", type=int, nargs="+", default=(1000, 10_000, 100_000), help="of `memory`")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--size", type=int, default=NET.size, help="of `cache`: input side in pixels; data.size: auto is 128 here")
    parser.add_argument("--network", choices=NETWORKS, default="squeezenet", help="of `solvers`; give --size as well")
    parser.add_argument("--limit", type=float, default=300, help="of `busy`: seconds after which a fit is ended")
    parser.add_argument("--only", nargs="*", default=())
    options = parser.parse_args()
    options.data, options.weights = options.data.resolve(), options.weights.resolve()  # jobs take paths from a workspace of their own
    options.work.mkdir(parents=True, exist_ok=True)
    if options.verb not in ("peak", "fits"):
        print(f"{torch.get_num_threads()} threads")
    VERBS[options.verb](options)


if __name__ == "__main__":
    main()
