"""Pretraining: weights of your own to transfer from.

    python -m research.pretrain IMAGES --backbone my_nets:SmallNet --epochs 24

An earlier version of this module made the weights of the demonstration network, with label smoothing 0.05 and the best epoch on validation.
"""

import argparse
import inspect
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tlpipeline.backbones import catalogue
from tlpipeline.backbones.classifier import probabilities
from tlpipeline.backbones.precision import enable_tf32
from tlpipeline.backbones.taps import normalization
from tlpipeline.data import dataset
from tlpipeline.data.cache import Store
from tlpipeline.data.loader import Images
from tlpipeline.data.splits import TEST
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError
from tlpipeline.files import write_json, write_tensors
from tlpipeline.progress import Event, Progress
from tlpipeline.stats import wilson
from tlpipeline.training.budget import TimeBudget
from tlpipeline.training.checkpoint import HEAD, SCRATCH, Checkpoints, State
from tlpipeline.training.config import TrainingConfig, TrainingPlan
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.heads import score
from tlpipeline.training.images import Datasets
from tlpipeline.training.progress import ProgressReader, ProgressWriter
from tlpipeline.training.recipe import Recipe
from tlpipeline.training.trainer import Run, Trainer

RECIPE = Recipe(crop=0.4, layer_decay_norm=1.0)
BATCH_SIZE = 128


@dataclass(frozen=True)
class Pretrained:
    """What was reached: test accuracy with its Wilson 95 % interval, and where the weights are."""

    accuracy: float
    low: float
    high: float
    weights: Path


def pretrain(images: Path, name: str, output: Path, *, epochs: int, rate: float, seed: int, flip: bool, progress: Progress) -> Pretrained:
    """Train a network of the catalogue from random weights and write `<name>.safetensors` and `<name>.json` (its card).

    Args:
        images: folder of `<class>/...` or `{train,test}/<class>/...`; the usual splits apply.
        name: demonstration, a torchvision classifier, or package.module:callable that takes num_classes.
        output: folder to write to.
        epochs, rate: length, and learning rate at a batch of 64 (SGD with Nesterov momentum, cosine).

    Raises:
        DataError, BackboneError: as `ingest` and `load` do.
    """
    manifest = dataset.ingest(images, {}, lambda done, total: progress(Event("ingest", done, total, "images read")))
    torch.manual_seed(seed)
    module, transforms = _network(name, len(manifest.classes), seed)
    datasets = Datasets.of(images, manifest, transforms)
    history = Path(tempfile.mkdtemp(prefix="pretrain-"))
    plan = TrainingPlan("", 0, freeze=False, init="random", recipe=RECIPE, head_taps=(), final_head_taps=())
    config = TrainingConfig(
        str(images), str(images), "", name, catalogue.NONE, catalogue.NONE, plan, seed, epochs, BATCH_SIZE, flip, "float32", ""
    )
    context = LocalContext(history / "kept", enable_tf32(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    module.to(context.device)
    checkpoint = Checkpoints(context, history, module)
    tail = ProgressReader(history / "history.jsonl", "pretrain", progress)
    state = State(phase=HEAD)
    on_progress = _Passed(history / "history.jsonl", tail)
    run = Run(config, context, datasets, state, checkpoint, Store(), TimeBudget(0, context), on_progress, history)
    Trainer(module, run, normalization(module)).fit(SCRATCH, epochs, rate)
    checkpoint.load_best()
    test = manifest.used(TEST)
    labels = np.array([manifest.classes.index(row.label) for row in test])
    chances = probabilities(module, Images(images, test, transforms), context.device, lambda done: None)
    accuracy, _ = score(chances, labels)
    low, high = wilson(round(accuracy * len(test)), len(test))
    file = name.replace(":", ".")
    output.mkdir(parents=True, exist_ok=True)
    write_tensors(module.state_dict(), output / f"{file}.safetensors")
    recipe = {"epochs": epochs, "rate": rate, "flip": flip, "seed": seed}
    counts = {"train": len(datasets.train), "val": len(datasets.val), "test": len(test)}
    measured = {
        "test_accuracy": round(accuracy, 4),
        "test_interval_95": [round(low, 4), round(high, 4)],
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    write_json(_card(name, images.name, manifest.classes, counts, recipe) | measured, output / f"{file}.json")
    shutil.rmtree(history)
    return Pretrained(accuracy, low, high, output / f"{file}.safetensors")


def _card(name: str, folder: str, classes: Sequence[str], counts: dict[str, int], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of how weights were made; the recipe's fixed values are added to those of this run."""
    fixed = {"batch_size": BATCH_SIZE, "crop": RECIPE.crop, "weight_decay": RECIPE.weight_decay}
    how = f"--epochs {recipe['epochs']} --rate {recipe['rate']} --seed {recipe['seed']}{'' if recipe['flip'] else ' --no-flip'}"
    return {
        "architecture": name,
        "data": {"folder": folder, "classes": list(classes), **counts},
        "recipe": recipe | fixed,
        "command": f"python -m research.pretrain {folder} --backbone {name} {how}",
    }


class _Passed(ProgressWriter):
    """Passes on what is told at once: there is one process."""

    def __init__(self, path: Path, tail: ProgressReader) -> None:
        super().__init__(path, 0)
        self.tail = tail

    def __call__(self, done: int, total: int, text: str, important: bool = False) -> None:
        super().__call__(done, total, text, important)
        self.tail()


def _network(name: str, classes: int, seed: int) -> tuple[nn.Module, Transforms]:
    if name == "demonstration":
        factory: Callable[..., Any] = catalogue.Demonstration
    elif catalogue.is_own(name):
        factory = catalogue.custom_factory(name)
        if "num_classes" not in inspect.signature(factory).parameters:
            raise BackboneError(
                f"expected {name} to take num_classes, so that it fits the images; its parameters are {inspect.signature(factory)}."
            )
    else:
        import torchvision.models as models

        def factory(num_classes: int) -> nn.Module:
            # Auxiliary heads would make the network return more than logits while it trains.
            plain = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
            return models.get_model(name, weights=None, num_classes=num_classes, **plain)  # type: ignore[no-any-return]

    like = catalogue.load(name, catalogue.NONE)
    torch.manual_seed(seed)
    return factory(num_classes=classes), like.transforms


def main() -> None:
    """Pretrain as the command line asks."""
    parser = argparse.ArgumentParser(description="Train a network from random weights.")
    parser.add_argument("images", type=Path)
    parser.add_argument("--backbone", default="demonstration")
    parser.add_argument("--output", type=Path, default=Path("weights"))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-flip", dest="flip", action="store_false")
    asked = parser.parse_args()
    made = pretrain(
        asked.images, asked.backbone, asked.output, epochs=asked.epochs, rate=asked.rate, seed=asked.seed, flip=asked.flip,
        progress=lambda event: print(event.text),
    )  # fmt: skip
    print(f"{made.weights}: test accuracy {made.accuracy:.1%} ({made.low:.1%} to {made.high:.1%})")


if __name__ == "__main__":
    main()
