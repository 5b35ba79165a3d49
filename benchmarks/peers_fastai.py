"""One job of peers.py by fastai with its own defaults; runs in an environment that has fastai and safetensors, and needs nothing of ours.

    PYTHON benchmarks/peers_fastai.py JOB.json ANSWER.json

Defaults of fastai: the body cut before SqueezeNet's classifier and its own head behind it (concatenated pooling, two linear layers with
batch normalization and dropout), Adam, base_lr 2e-3 with discriminative rates, one frozen epoch and then the job's epochs, batch 64,
Resize (random crops of the short side) for each image, aug_transforms for each batch, ImageNet's mean and standard deviation.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import fastai
import numpy as np
import torch
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Resize, aug_transforms, set_seed, vision_learner
from fastai.vision.learner import model_meta
from safetensors.torch import load_file
from torchvision.models import squeezenet1_0


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune, and return who is right among the test images and the seconds."""
    imported, started = cpu_seconds(), time.monotonic()
    set_seed(job["seed"])
    folder, classes = Path(job["images"]), job["classes"]

    def pretrained(weights: str) -> torch.nn.Module:
        """Stand for torchvision's function: the weights come from the job's file instead of a download."""
        model = squeezenet1_0()
        model.load_state_dict(load_file(job["weights"]))
        return model

    model_meta[pretrained] = model_meta[squeezenet1_0]
    used = [*job["train"], *job["val"]]
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=classes)),
        get_x=lambda row: folder / row[0],
        get_y=lambda row: classes[row[2]],
        splitter=IndexSplitter(range(len(job["train"]), len(used))),
        item_tfms=Resize(job["size"]),
        batch_tfms=aug_transforms(do_flip=job["flip"]),
    )
    # In this process: workers cost start-up time and no less CPU.
    loaders = block.dataloaders(used, num_workers=0, device=torch.device("cpu"))
    learner = vision_learner(loaders, pretrained)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(job["epochs"])
        spent, wall = cpu_seconds() - imported, time.monotonic() - started
        chances, _ = learner.get_preds(dl=loaders.test_dl(job["test"], num_workers=0))
    said = [classes.index(loaders.vocab[i]) for i in chances.argmax(1).tolist()]
    right = np.array([guess == label for guess, (_, _, label) in zip(said, job["test"], strict=True)])
    versions = f"fastai {fastai.__version__} torch {torch.__version__}"
    return {
        "case": "", "epochs": job["epochs"], "train_s": spent, "wall_s": wall, "imports_s": imported, "versions": versions,
        "bits": np.packbits(right).tobytes().hex(),
    }  # fmt: skip


def main() -> None:
    job, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(run(json.loads(job.read_text()))))


if __name__ == "__main__":
    main()
