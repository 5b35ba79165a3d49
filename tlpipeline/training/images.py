"""The images of a run: training and validation, decoded once where they come back and there is room."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from tlpipeline.data.cache import Store
from tlpipeline.data.contents import ImageFolder
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.loader import DecodedCache, Images, rank_slice, resized_cache, square_cache
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.data.transforms import Transforms
from tlpipeline.training.budget import TimeBudget
from tlpipeline.training.distributed import DistributedContext
from tlpipeline.training.progress import OnProgress

IN_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Datasets:
    """Training and validation images with their class indices."""

    root: ImageFolder
    train: Sequence[Row]
    val: Sequence[Row]
    train_labels: npt.NDArray[np.int64]
    val_labels: npt.NDArray[np.int64]
    transforms: Transforms

    @classmethod
    def of(cls, root: ImageFolder, manifest: Manifest, transforms: Transforms) -> "Datasets":
        """Return the training and validation images of a manifest."""
        index = {label: i for i, label in enumerate(manifest.classes)}
        train, val = manifest.used(TRAIN), manifest.used(VAL)
        labels, val_labels = (np.array([index[row.label] for row in rows], dtype=np.int64) for rows in (train, val))
        return cls(root, train, val, labels, val_labels, transforms)

    @property
    def classes(self) -> int:
        """Number of classes that have images."""
        return int(max(self.train_labels.max(), self.val_labels.max(initial=0))) + 1


def decoded_side(datasets: Datasets, crop: float) -> int:
    """Return the side in pixels at which training images are kept decoded.

    It is twice as large as crops of the training size need, so that training images are as sharp as validation images (docs/log.md). It is no
    larger than the images are.

    Args:
        crop: smallest share of the area that a random crop keeps.
    """
    size, short = datasets.transforms.resize, statistics.median(min(row.width, row.height) for row in datasets.train)
    return max(size, min(math.ceil(2 * size / math.sqrt(crop)), 32 * math.ceil(short / 32)))


def training_images(
    datasets: Datasets,
    crop: float,
    epochs: int,
    store: Store,
    room: float,
    context: DistributedContext,
    budget: TimeBudget,
    on_progress: OnProgress,
    read_images: int,
) -> tuple[Images, Images]:
    """Return the training images and this worker's validation images.

    They are decoded once if there are several epochs and the room for them; else each time, to the same pixels.

    Args:
        room: bytes that decoded images may take.
        read_images: images that are decoded between two checks of the time budget.
    """
    mine = [datasets.val[i] for i in rank_slice(len(datasets.val), context.rank, context.size)]
    side = decoded_side(datasets, crop)
    train, val = square_cache(store, datasets.root, side), resized_cache(store, datasets.root, datasets.transforms)
    if epochs > 1 and 3 * (len(datasets.train) * side**2 + len(datasets.val) * datasets.transforms.size**2) <= room:
        for decoded, rows, needed in ((train, list(datasets.train), list(datasets.train)), (val, list(datasets.val), mine)):
            if not _fill(decoded, rows, context, budget, on_progress, read_images):
                break  # the time is up: no epoch will want them
            if context.size > 1:
                torch.distributed.barrier()
                decoded.fill(needed, lambda done: None)  # the other workers' part, if their disk is not shared
            decoded.open(needed)
    return Images(datasets.root, datasets.train, datasets.transforms, None, train), Images(
        datasets.root, mine, datasets.transforms, None, val
    )


def _fill(
    decoded: DecodedCache, rows: Sequence[Row], context: DistributedContext, budget: TimeBudget, on_progress: OnProgress, read_images: int
) -> bool:
    """Decode this worker's share of these images; return whether it was done before the time was up."""
    mine = [rows[i] for i in rank_slice(len(rows), context.rank, context.size)]

    def report(before: int, part: int) -> None:
        on_progress(before + part, len(mine), f"{before + part} of {len(mine)} images decoded")

    for start in range(0, math.ceil(len(rows) / context.size), read_images):
        decoded.fill(mine[start : start + read_images], partial(report, start))
        if budget.expired():
            return False
    return True
