"""The values of a training run that the method sets. Loads no torch."""

import math
from dataclasses import dataclass

INITS = ("pretrained", "plain", "random", "auto")
AUTO, SGD, ADAMW = "auto", "sgd", "adamw"
OPTIMIZERS = (AUTO, SGD, ADAMW)
LOSS, SAMPLER, NONE = "loss", "sampler", "none"
BALANCES = (LOSS, SAMPLER, NONE)
FIXED, BATCH = "fixed", "batch"
STATISTICS = (AUTO, FIXED, BATCH)
BUDGET = "train.budget_minutes"  # begins whatever is said of what time has ended
SMALL_PIXELS = 64  # below, networks with batch normalization have a rate and statistics of their own (docs/log.md)
# Earlier names of recipe values, which train.override still takes.
ALIASES = {
    "rate_batch": "lr_batch", "rate_batch_small": "lr_batch_small", "rate_layer": "lr_layer", "rate_none": "lr_none",
    "accumulate": "gradient_accumulation_steps", "solve_again": "refit_head",
}  # fmt: skip
# Recipe values that earlier versions had. None of them helped in our measurements, and all were off by default.
REMOVED = ("patience", "label_smoothing", "randaugment", "randaugment_magnitude", "mixup", "cutmix", "average")
IMBALANCE = 10.0  # times the images of the smallest class that the largest may have before classes are weighted alike


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the network is trained once its new head is solved; a frozen backbone uses only `balance` and `imbalance`.

    Attributes:
        lr_batch, lr_batch_small, lr_layer, lr_none: learning rate at a batch of 64 by kind of normalization (batch, layer, none). Layer
            normalization uses AdamW, the others SGD with Nesterov momentum 0.9. Batch normalization below 64 pixels has a learning rate of
            its own (docs/log.md). Without normalization data that differ from the source want a much higher one (Li et al. 2020 agree).
        batch, batch_large: images per step below and from `large` training images on. With few images more steps gained up to 3 points.
        epochs_at_500: epochs for 500 training images; for n images times sqrt(500 / n), between `least_epochs` and `most_epochs`.
        scratch_epochs_at_500, scratch_times: random weights get this schedule, and this many times its epochs and the learning rate (up
            to 0.1); scratch_from: training images from which they are tried at all.
        statistics: what batch normalization subtracts and divides by while everything is trained: fixed (the source's, as in the head's
            features, so training starts where the probe stands), batch (each step's own), or auto: fixed from 64 pixels on, batch below.
            Random weights have none to keep: batch.
        optimizer: auto (AdamW for networks with layer normalization, else SGD), sgd or adamw.
        weight_decay, weight_decay_adam: of SGD and of AdamW.
        layer_decay_norm: with layer normalization each block nearer to the images gets this share of the learning rate of the next one (0.75
            for ViT and ConvNeXt); layer_decay_other: the same for the other networks.
        crop: smallest share of the area that random crops keep.
        warm_up: share of the steps; clip: largest norm of the gradient.
        gradient_accumulation_steps: parts that a worker's share of a batch is taken in, to save memory; more if a GPU's memory is too small.
        balance: what is done if the largest class has more than `imbalance` times the images of the smallest: loss (classes weigh alike),
            sampler (classes are drawn alike), or none.
        sync_below: images of a worker's share of a batch below which BatchNorm takes its statistics from all workers; on GPUs.
        refit_head: solve a head on several taps after everything is trained, with the validation images as well. Kang et al. 2020 (arXiv
            1910.09217) train classifiers again for another reason; see docs/decisions/0016. It makes half of the usual schedule enough.
        compile: use torch.compile; needs a C++ compiler, and does not pay for few images.
    """

    lr_batch: float = 0.05
    lr_batch_small: float = 0.2
    lr_layer: float = 5e-5
    lr_none: float = 0.004
    batch: int = 32
    batch_large: int = 64
    large: int = 5000
    epochs_at_500: int = 10
    least_epochs: int = 5
    most_epochs: int = 40
    scratch_epochs_at_500: int = 20
    scratch_times: float = 3.0
    scratch_from: int = 50_000
    statistics: str = AUTO
    optimizer: str = AUTO
    weight_decay: float = 5e-4
    weight_decay_adam: float = 0.05
    layer_decay_norm: float = 0.75
    layer_decay_other: float = 1.0
    crop: float = 0.5
    warm_up: float = 0.05
    clip: float = 1.0
    gradient_accumulation_steps: int = 1
    imbalance: float = IMBALANCE
    balance: str = LOSS
    sync_below: int = 16
    refit_head: bool = True
    compile: bool = False

    @property
    def head_imbalance(self) -> float:
        """How uneven classes may be before a head that is solved weighs them alike; infinite where nothing is balanced."""
        return math.inf if self.balance == NONE else self.imbalance

    def optimizer_for(self, normalization: str) -> str:
        """Return sgd or adamw."""
        if self.optimizer != AUTO:
            return self.optimizer
        return ADAMW if normalization == "layer" else SGD

    def layer_decay(self, normalization: str) -> float:
        """Return the share of the learning rate that each block has of the next one nearer to the head."""
        return self.layer_decay_norm if normalization == "layer" else self.layer_decay_other

    def batch_size(self, images: int) -> int:
        """Return the images per step for this many training images."""
        return self.batch if images < self.large else self.batch_large

    def epochs(self, images: int) -> int:
        """Return the epochs for this many training images."""
        return self._epochs(self.epochs_at_500, images)

    def scratch_epochs(self, images: int) -> int:
        """Return the epochs that random weights get for this many training images."""
        return round(self.scratch_times * self._epochs(self.scratch_epochs_at_500, images))

    def _epochs(self, at_500: int, images: int) -> int:
        wanted = at_500 * math.sqrt(500 / max(images, 1))
        return int(min(max(round(wanted), self.least_epochs), self.most_epochs))

    def lr(self, normalization: str, size: int) -> float:
        """Return the learning rate for a network with this normalization at this input size, at a batch of 64."""
        if normalization == "batch":
            return self.lr_batch_small if size < SMALL_PIXELS else self.lr_batch
        return self.lr_layer if normalization == "layer" else self.lr_none

    def freezes_statistics(self, size: int) -> bool:
        """Return whether batch normalization keeps the source's statistics at this input size."""
        return self.statistics == FIXED or (self.statistics == AUTO and size >= SMALL_PIXELS)


def current_names(content: object) -> object:
    """Return the values of a recipe in a file under today's names, without those that were removed."""
    if not isinstance(content, dict):
        return content
    return {ALIASES.get(name, name): value for name, value in content.items() if name not in REMOVED}
