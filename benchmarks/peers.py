"""What would others have reached on the same images, and at what cost? Ours against fastai, torchvision's reference recipe, the tutorial.

Every method runs in a process of its own, on the CPU, from the same SqueezeNet 1.0 with ImageNet weights and on the same training,
validation and test images (research/units.py). Seconds are CPU seconds around the work: start and imports stand apart, the pass over the
test images and the unpacking are not in it. Who was right is kept for each test image, so that differences are paired.

    python -m benchmarks.peers methods [--images 500] [--seeds 0] [--fastai PYTHON] [--only NAME ...] [--methods NAME ...]
    python -m benchmarks.peers tutorial [--seeds 0 1 2] [--side 128]
    python -m benchmarks.peers report

`methods`: five data sets at 96 pixels. The others train the whole network for the usual schedule of so many images (22 epochs with 500), ours as its own recipe says.

    ours           the stages profile, choose (with its race, if it wants one) and train of a workspace as `tlpipeline init` makes it, with
                   cluster.workers 0, that is without Ray; reading, writing and DVC's keys are in it
    fastai         vision_learner(...).fine_tune(epochs) with its own defaults (peers_fastai.py), in the environment of --fastai PYTHON, where
                   fastai and safetensors are installed; without it this method is left out
    torchvision/8  the defaults of references/classification/train.py: SGD, momentum .9, weight decay 1e-4, batch 32, random resized crops,
                   flips, the rate divided by 10 every 30 epochs, the last epoch counts. Its rate of .1 is for batch normalization; its
                   README takes .01 for networks without, as SqueezeNet is one, and both are for 8 processes of 32 images: .01 / 8 here
    torchvision    the same with .01 as it stands

`tutorial`: 400 images of the two largest classes of caltech24. Ours is the train stage with case small_similar forced, against PyTorch's
tutorial on transfer learning with a frozen backbone: new head, random resized crops and flips, SGD, rate .001 divided by 10 every 7 epochs,
momentum .9, batch 4, 25 epochs; each is validated, the best one counts. Its head begins as torchvision begins SqueezeNet's, which is kinder
than the tutorial's nn.Conv2d as it comes: with that one (seed 0) it ended right on exactly the images of one class, 49.9 %. --side 128 is
what data.size: auto says for these images; the tutorial's own is 224.

Rows go to benchmarks/results/peers.csv as they come, and what has a row is not run again but with --again: rows do not know which code they are of.
"""

import argparse
import copy
import dataclasses
import importlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cases import change
from research.grid import DATA, NETWORKS, NO_FLIP, USUAL, rewrite, rows_of
from research.units import folders, pool, sizes, split
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.splits import TEST, TRAIN, VAL
from tlpipeline.stats import pack, unpack
from tlpipeline.training.recipe import Recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PEERS = "peers.csv"
COLUMNS = ("part", "data", "n", "seed", "size", "method", "classes", "train", "val", "test", "case", "epochs", "hits", "profile_s",
           "choose_s", "train_s", "cold_s", "cpu_s", "wall_s", "imports_s", "threads", "versions", "bits")  # fmt: skip
METHODS, TUTORIAL = "methods", "tutorial"
OURS, FASTAI = "ours", "fastai"
SETS = ("caltech24", "eurosat", "pacs_sketch", "flowers", "neu_steel")
NESTED = (100, 500, 2000)  # the subsets of research/units.py, so that the test images are some of its test images
SIDE = 96
MOST_TEST = 2000
TUTORIAL_IMAGES, TUTORIAL_EPOCHS = 400, 25
RATES = {"torchvision/8": 0.01 / 8, "torchvision": 0.01}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Side = list[tuple[str, str, int]]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a method is given, as plain values; paths are absolute.

    Attributes:
        epochs: of training the whole network.
        size: input side in pixels.
        case: choose.case of our workspace.
        images: folder of the data set; train, val, test: (path in it, md5, class index) of each image.
    """

    method: str
    seed: int
    epochs: int
    size: int
    flip: bool
    case: str
    weights: str
    images: str
    classes: list[str]
    train: Side
    val: Side
    test: Side


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


# --- ours -----------------------------------------------------------------------------------------------------------------------------


def ours(job: Job) -> Answer:
    """Run the stages in a workspace that has these images on these sides."""
    # The stages import these when they first need them.
    for name in ("dvc.repo", "scipy.linalg", "sklearn.linear_model", "torchvision.models"):
        importlib.import_module(name)
    from tlpipeline.data import cache, dataset, splits
    from tlpipeline.evaluation import metrics
    from tlpipeline.progress import silent
    from tlpipeline.workspace import create, layout, stages

    imported = cpu_seconds()
    sides = {TRAIN: job.train, VAL: job.val, TEST: job.test}
    wanted = {md5: side for side, rows in sides.items() for _, md5, _ in rows}
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        images, root = Path(place) / "images", Path(place) / "workspace"
        for path, md5, label in (row for rows in sides.values() for row in rows):
            # Named by content: a data set with a train and a test folder may have a name in both.
            copied = images / job.classes[label] / f"{md5}{Path(path).suffix}"
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(job.images) / path, copied)
        create.init(root, images, "squeezenet1_0", job.weights, None, silent)
        settings = {"size": job.size, "seed": job.seed, "flip": str(job.flip).lower(), "case": job.case, "workers": 0, "gpu": "false"}
        for key, value in settings.items():
            change(root, key, str(value))
        (root / layout.SPLITS).unlink()
        lines = [splits.SplitException(md5, side, job.classes[label]) for side, rows in sides.items() for _, md5, label in rows]
        splits.write_exceptions(root / layout.SPLITS, lines)
        stages.ingest(root, silent)
        found = {row.md5: row.split for row in dataset.read_manifest(root / layout.MANIFEST).rows}
        if found != wanted:
            sys.exit(f"expected the images on the sides that splits.csv says, {Counter(wanted.values())}, found {Counter(found.values())}.")
        spent, started = {}, time.monotonic()
        for name in ("profile", "choose", "train"):
            before = cpu_seconds()
            stages.STAGES[name](root, silent)
            spent[f"{name}_s"] = cpu_seconds() - before
        wall = time.monotonic() - started
        stages.evaluate(root, silent)
        said = metrics.read_predictions(root / layout.PREDICTIONS)
        right = dict(zip(said.md5, said.predicted == said.labels, strict=True))
        decision = layout.read_case(root)
        if decision.freeze == "kept":
            # Once more, as it would be without the features that the profile has left.
            cache.clear(root / layout.CACHE)
            shutil.rmtree(root / layout.RUNS)
            before = cpu_seconds()
            stages.train(root, silent)
            spent["cold_s"] = cpu_seconds() - before
    raced = " (raced)" if decision.race is not None else ""
    trained = 0 if decision.freeze == "kept" else decision.recipe.epochs(len(job.train))
    hits = np.array([right[md5] for _, md5, _ in job.test])
    return {"case": decision.case + raced, "epochs": trained, "wall_s": wall, "imports_s": imported, **spent, "bits": pack(hits)}


# --- plain torch ----------------------------------------------------------------------------------------------------------------------


class Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images of a side, each read anew as torchvision's ImageFolder does."""

    def __init__(self, job: Job, side: Side, transform: Callable[[Image.Image], Tensor]) -> None:
        self.folder, self.side, self.transform = Path(job.images), side, transform

    def __len__(self) -> int:
        return len(self.side)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, _, label = self.side[index]
        with Image.open(self.folder / path) as image:
            return self.transform(image.convert("RGB")), label


def plain(job: Job, batch: int, rate: float, decay: float, step: int, frozen: bool, best: bool) -> Answer:
    """Train with SGD as torchvision's reference and PyTorch's tutorial both do: crops, flips, a rate in steps, a validation an epoch.

    Args:
        step: epochs after which the rate is divided by 10.
        frozen: train the new head only.
        best: keep the epoch that is best on validation, as the tutorial does; else the last.
    """
    from safetensors.torch import load_file
    from torchvision import models, transforms

    imported, started = cpu_seconds(), time.monotonic()
    torch.manual_seed(job.seed)
    last = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
    flips = [transforms.RandomHorizontalFlip()] if job.flip else []
    training = transforms.Compose([transforms.RandomResizedCrop(job.size), *flips, *last])
    steady = transforms.Compose([transforms.Resize(round(job.size * 256 / 224)), transforms.CenterCrop(job.size), *last])
    loaded = partial(torch.utils.data.DataLoader, batch_size=batch)
    train, val = loaded(Files(job, job.train, training), shuffle=True), loaded(Files(job, job.val, steady))
    model = models.squeezenet1_0()
    model.load_state_dict(load_file(job.weights))
    model.requires_grad_(not frozen)
    head = nn.Conv2d(512, len(job.classes), 1)
    # As torchvision's SqueezeNet begins its own last convolution.
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    model.classifier[1] = head
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=step, gamma=0.1)
    most, kept = -1, model.state_dict()
    for _ in range(job.epochs):
        model.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        hits = int(correct(model, val).sum())
        if best and hits > most:
            most, kept = hits, copy.deepcopy(model.state_dict())
    if best:
        model.load_state_dict(kept)
    spent, wall = cpu_seconds() - imported, time.monotonic() - started
    right = correct(model, loaded(Files(job, job.test, steady)))
    return {"case": "", "epochs": job.epochs, "train_s": spent, "wall_s": wall, "imports_s": imported, "bits": pack(right)}


def correct(model: nn.Module, images: torch.utils.data.DataLoader[tuple[Tensor, int]]) -> npt.NDArray[np.bool_]:
    """Return who is right, in the order of the images."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(inputs).argmax(1) == labels for inputs, labels in images]).numpy()


def reference(job: Job) -> Answer:
    """Train as torchvision's reference script does."""
    return plain(job, batch=32, rate=RATES[job.method], decay=1e-4, step=30, frozen=False, best=False)


def tutorial(job: Job) -> Answer:
    """Train as PyTorch's tutorial on transfer learning does, with everything but the head frozen."""
    return plain(job, batch=4, rate=0.001, decay=0.0, step=7, frozen=True, best=True)


HERE_RUN: dict[str, Callable[[Job], Answer]] = {OURS: ours, TUTORIAL: tutorial} | dict.fromkeys(RATES, reference)


# --- running them ---------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, part: str, data: str, job: Job, keys: dict[str, object]) -> None:
    """Run a method in a new process, unless it has a row and is not asked for --again, and add its row in place of that one."""
    path = options.results / PEERS
    key = {"part": part, "data": data, **keys, "size": job.size, "test": len(job.test), "method": job.method}

    def others(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [row for row in rows if any(row[name] != str(value) for name, value in key.items())]

    there = rows_of(path)
    if len(others(there)) < len(there) and not options.again:
        return
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        asked, told = Path(place) / "job.json", Path(place) / "answer.json"
        asked.write_text(json.dumps(dataclasses.asdict(job)))
        program = [options.fastai, HERE / "peers_fastai.py"] if job.method == FASTAI else [sys.executable, "-m", "benchmarks.peers", "one"]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run([*map(str, program), str(asked), str(told)], capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"expected {job.method} to train on {data}, but it failed:\n{done.stderr[-3000:]}")
        answer = json.loads(told.read_text())
    hits = int(unpack(answer["bits"], len(job.test)).sum())
    spent = {name: round(answer[name], 2) for name in ("profile_s", "choose_s", "train_s", "cold_s") if name in answer}
    row = key | answer | spent | {
        "classes": len(job.classes), "train": len(job.train), "val": len(job.val), "hits": hits,
        "cpu_s": round(sum(spent.values()) - spent.get("cold_s", 0.0), 2),
        "wall_s": round(answer["wall_s"], 2), "imports_s": round(answer["imports_s"], 2), "threads": options.threads,
    }  # fmt: skip
    rewrite(path, COLUMNS, [*others(rows_of(path)), row])  # read again: another run may have added its own meanwhile
    print(
        f"{data} n={keys['n']} seed={keys['seed']} {job.method} {row['case']}: {hits / len(job.test):.4f}, {row['cpu_s']} CPU s", flush=True
    )


def job_of(options: argparse.Namespace, method: str, manifest: Manifest, images: Path, name: str, seed: int, size: int) -> Job:
    """Return the job of a method."""
    index = {label: i for i, label in enumerate(manifest.classes)}
    sides = {side: [(r.path, r.md5, index[r.label]) for r in manifest.used(side)] for side in (TRAIN, VAL, TEST)}
    weights = str(options.weights / NETWORKS["squeezenet"].weights)
    tutorial = options.verb == TUTORIAL
    epochs = TUTORIAL_EPOCHS if tutorial else Recipe(epochs_at_500=USUAL["epochs_at_500"]).epochs(len(sides[TRAIN]))
    case = "small_similar" if tutorial else "auto"
    return Job(method, seed, epochs, size, name not in NO_FLIP, case, weights, str(images.resolve()), list(manifest.classes),
               sides[TRAIN], sides[VAL], sides[TEST])  # fmt: skip


def capped(manifest: Manifest, most: int) -> Manifest:
    """Return the manifest with at most so many test images: the first, which are stratified as all of them are."""
    kept = [r for r in manifest.rows if r.split != TEST]
    return dataclasses.replace(manifest, rows=(*kept, *[r for r in manifest.rows if r.split == TEST][:most]))


def methods(options: argparse.Namespace) -> None:
    """Run every method on every data set."""
    names = [name for name in options.methods if name != FASTAI or options.fastai]
    found = folders(options.data, options.work)
    for name in options.only or SETS:
        if name not in found:
            sys.exit(f"expected the data set {name} in {options.data}, found {', '.join(found) or 'none'}. Set --data or TLPIPELINE_DATA.")
        rows = pool(name, found[name], options.work)
        there = sizes(len(rows), sorted({*NESTED, options.images}))
        if options.images not in there:
            sys.exit(
                f"expected {options.images} images of {name} beside a test side, found {len(rows)} in all. Set --images to {there[-1]} or less."
            )
        for seed in options.seeds or [0]:
            manifest = capped(split(rows, options.images, max(there), seed), options.test)
            for method in names:
                job = job_of(options, method, manifest, found[name], name, seed, SIDE)
                measure(options, METHODS, name, job, {"n": options.images, "seed": seed})


def tutorials(options: argparse.Namespace) -> None:
    """Run the train stage and the tutorial's recipe on the two largest classes of caltech24."""
    found = folders(options.data, options.work)
    if "caltech24" not in found:
        sys.exit(f"expected the data set caltech24 in {options.data}, found {', '.join(found) or 'none'}. Set --data or TLPIPELINE_DATA.")
    rows = pool("caltech24", found["caltech24"], options.work)
    largest = [label for label, _ in Counter(r.label for r in rows).most_common(2)]
    rows = [r for r in rows if r.label in largest]
    n = min(TUTORIAL_IMAGES, round(len(rows) * 0.8))
    if n < TUTORIAL_IMAGES:
        print(f"{' and '.join(largest)} have {len(rows)} images: {n} are trained on, a fifth is left for the test")
    for seed in options.seeds or [0, 1, 2]:
        manifest = capped(split(rows, n, n, seed), options.test)
        for method in (OURS, TUTORIAL):
            job = job_of(options, method, manifest, found["caltech24"], "caltech24", seed, options.side)
            measure(options, TUTORIAL, "+".join(largest), job, {"n": n, "seed": seed})


def one(job: Path, answer: Path) -> None:
    """Run one method in this process."""
    asked = Job(**json.loads(job.read_text()))
    said = HERE_RUN[asked.method](asked)
    answer.write_text(json.dumps(said | {"versions": f"torch {torch.__version__}"}))


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def exact(won: int, lost: int) -> float:
    """Return McNemar's exact p-value, two-sided."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def against(mine: dict[str, str], other: dict[str, str]) -> tuple[int, int, float, float]:
    """Return won and lost test images of ours, the difference in points, and p."""
    a, b = (unpack(row["bits"], int(row["test"])) for row in (mine, other))
    won, lost = int((a & ~b).sum()), int((b & ~a).sum())
    return won, lost, 100 * (won - lost) / len(a), exact(won, lost)


def accuracy(row: dict[str, str]) -> float:
    return 100 * int(row["hits"]) / int(row["test"])


def units(rows: Sequence[dict[str, str]], part: str) -> list[dict[str, dict[str, str]]]:
    """Return the rows of a part by method, a unit each; units without ours are left out."""
    groups: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["part"] == part:
            groups.setdefault(tuple(row[k] for k in ("data", "n", "seed", "size", "test")), {})[row["method"]] = row
    return [group for _, group in sorted(groups.items()) if OURS in group]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def times(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(mean([math.log(v) for v in values]))


def report(options: argparse.Namespace) -> None:
    """Print the tables of all rows."""
    rows = rows_of(options.results / PEERS)
    if not rows:
        sys.exit(f"expected rows in {options.results / PEERS}, found none. Run `python -m benchmarks.peers methods` first.")
    every = units(rows, METHODS)
    if every:
        report_methods(every)
    every = [unit for unit in units(rows, TUTORIAL) if TUTORIAL in unit]
    if every:
        report_tutorial(every)


def report_methods(every: Sequence[dict[str, dict[str, str]]]) -> None:
    print("| data | images | seed | method | case | accuracy | ours better by (won, lost) | p | CPU s | times ours | imports |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for unit in every:
        mine = unit[OURS]
        for method, row in unit.items():
            won, lost, points, p = against(mine, row)
            compared = f"{points:+.2f} ({won}, {lost}) | {p:.2g}" if method != OURS else " | "
            print(
                f"| {row['data']} | {row['n']} | {row['seed']} | {method} | {row['case']} | {accuracy(row):.2f} % of {row['test']} | {compared} | "
                f"{float(row['cpu_s']):.1f} | {float(row['cpu_s']) / float(mine['cpu_s']):.2f} | {float(row['imports_s']):.1f} |"
            )
    print("\n| method | units | ours better by, mean (least, most) | significantly better, worse | CPU s against ours, geometric mean |")
    print("|---|---|---|---|---|")
    for method in (FASTAI, *RATES):
        pairs = [(unit[OURS], unit[method]) for unit in every if method in unit]
        if not pairs:
            continue
        told = [against(*pair) for pair in pairs]
        points = [t[2] for t in told]
        better, worse = (sum(p < 0.05 and sign * d > 0 for _, _, d, p in told) for sign in (1, -1))
        ratio = times([float(other["cpu_s"]) / float(mine["cpu_s"]) for mine, other in pairs])
        print(
            f"| {method} | {len(pairs)} | {mean(points):+.2f} ({min(points):+.2f}, {max(points):+.2f}) | {better}, {worse} | {ratio:.2f} times |"
        )
    print()


def report_tutorial(every: Sequence[dict[str, dict[str, str]]]) -> None:
    every = [unit for unit in every if TUTORIAL in unit]
    print(
        "| images | side | seed | train stage, CPU s | tutorial, CPU s | times | cold | profile | imports | accuracy | tutorial | won, lost | p |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for unit in every:
        mine, other = unit[OURS], unit[TUTORIAL]
        won, lost, _, p = against(mine, other)
        print(
            f"| {mine['n']} | {mine['size']} | {mine['seed']} | {float(mine['train_s']):.2f} | {float(other['train_s']):.1f} | "
            f"{float(other['train_s']) / float(mine['train_s']):.1f} | {float(mine['cold_s']):.2f} | {float(mine['profile_s']):.1f} | "
            f"{float(mine['imports_s']):.1f}, {float(other['imports_s']):.1f} | {accuracy(mine):.2f} % | {accuracy(other):.2f} % | "
            f"{won}, {lost} | {p:.2g} |"
        )
    for size in sorted({int(unit[OURS]["size"]) for unit in every}):
        same = [unit for unit in every if int(unit[OURS]["size"]) == size]
        ratios = [float(unit[TUTORIAL]["train_s"]) / float(unit[OURS]["train_s"]) for unit in same]
        colds = [float(unit[TUTORIAL]["train_s"]) / float(unit[OURS]["cold_s"]) for unit in same]
        wholes = [float(unit[TUTORIAL]["train_s"]) / float(unit[OURS]["cpu_s"]) for unit in same]
        print(
            f"{size} pixels, {len(same)} seeds: the tutorial takes {times(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f}) the CPU "
            f"seconds of the train stage, {times(colds):.1f} times those of one without the profile's features, {times(wholes):.1f} times "
            f"those of profile, choose and train; accuracy "
            f"{mean([accuracy(unit[OURS]) for unit in same]):.2f} % against {mean([accuracy(unit[TUTORIAL]) for unit in same]):.2f} %"
        )


def main() -> None:
    if sys.argv[1:2] == ["one"]:  # a method in its own process
        one(*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=(METHODS, TUTORIAL, "report"))
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <name>/ or <name>.tar.gz data sets")
    parser.add_argument("--weights", type=Path, default=DATA, help="folder of the weights file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tlpipeline-regret", help="where archives are unpacked")
    parser.add_argument("--images", type=int, default=500, help="training and validation images")
    parser.add_argument("--test", type=int, default=MOST_TEST, help="test images at most")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 for methods, 0 1 2 for the tutorial")
    parser.add_argument("--side", type=int, default=128, help="input side of the tutorial")
    parser.add_argument("--only", nargs="*", default=(), help="only these data sets")
    parser.add_argument("--methods", nargs="+", choices=(OURS, FASTAI, *RATES), default=(OURS, FASTAI, *RATES))
    parser.add_argument("--fastai", metavar="PYTHON", help="the Python of an environment that has fastai and safetensors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="run what has a row, too")
    options = parser.parse_args()
    options.data, options.weights = options.data.resolve(), options.weights.resolve()  # jobs take paths from a workspace of their own
    options.work.mkdir(parents=True, exist_ok=True)
    if options.verb == METHODS:
        if FASTAI in options.methods:
            check_fastai(options.fastai)
        methods(options)
    elif options.verb == TUTORIAL:
        tutorials(options)
    report(options)


def check_fastai(python: str | None) -> None:
    """Say that fastai is left out, or stop where it was asked for and cannot be imported."""
    if python is None:
        print("fastai is left out: give --fastai PYTHON, the Python of an environment that has fastai and safetensors")
        return
    if not shutil.which(python):
        sys.exit(f"expected --fastai to be a Python, found no program {python}. Leave --fastai out to compare without fastai.")
    done = subprocess.run([python, "-c", "import fastai.vision.all, safetensors"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"expected fastai and safetensors in the environment of {python}, found {done.stderr.strip().splitlines()[-1]}. Install them "
            "there with pip, or leave --fastai out."
        )


if __name__ == "__main__":
    main()
