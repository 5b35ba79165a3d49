"""What a training job is given, as plain values. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.data.contents import ImageFolder, PinnedFolder
from tlpipeline.training.callbacks import Callback
from tlpipeline.training.recipe import Recipe


@dataclass(frozen=True)
class Epoch:
    """A line of plots/history.csv: an epoch of fine-tuning, or a head that was solved (`arm`), with its validation."""

    epoch: int
    arm: str
    loss: float
    accuracy: float
    log_loss: float


@dataclass(frozen=True)
class TrainingPlan:
    """How the network is cut and trained.

    Attributes:
        slice: the tap behind which the network is cut.
        size: side of the input in pixels.
        freeze: whether the backbone stays as it is, and only a head is trained.
        init: how weights start: pretrained, plain, random or auto (see `cases.Case`).
        recipe: the values of the training run, with `train.override` applied.
        head_taps: what the head reads while it is trained; final_head_taps: what the finished head reads.
    """

    slice: str
    size: int
    freeze: bool
    init: str
    recipe: Recipe
    head_taps: tuple[TapPooling, ...]
    final_head_taps: tuple[TapPooling, ...]


@dataclass(frozen=True)
class Cadence:
    """How often a run does what costs time. It changes how much an interruption costs, not what is trained.

    Attributes:
        checkpoint_images: a longer epoch is kept in parts of so many images.
        checkpoint_share: of the time that checkpoints may take.
        check_steps: steps between two checks of the gradients and of the time budget; 0 for the device's (see `trainer.CHECK_STEPS`).
        read_images: images that a worker reads between two checks of the time budget.
    """

    checkpoint_images: int = 100_000
    checkpoint_share: float = 0.1
    check_steps: int = 0
    read_images: int = 256


@dataclass(frozen=True)
class TrainingConfig:
    """All that a worker needs, as plain values; paths are absolute.

    Attributes:
        workspace, images, manifest: where the workspace, its images and their manifest are.
        backbone, weights, weights_md5, code_md5: as in params.yaml.
        plan: how the network is cut and trained.
        seed, epochs, batch_size, flip, precision, budget_minutes: as in params.yaml.
        contents: as for `PinnedFolder`, "" to read the images as they are.
        history: file to which the first worker appends its progress, one JSON line for each message.
        cache: folder of features and decoded images, "" to keep them in memory; cache_bytes: how much of it decoded images may take.
        champion: folder of the model whose backbone training starts from, "" for the source's weights; champion_md5: its hash as DVC records it.
        start: folder of another run's checkpoint to continue from if this run has none of its own, "" for none.
        gradient_accumulation_steps: least number of parts that a batch is taken in, because a GPU's memory ran out.
        callbacks: called after each epoch.
        cadence: how often a run looks up from its work.
        checkpoint_only: end with the checkpoint after fine-tuning, without a finished model; for a run that another one continues.
    """

    workspace: str
    images: str
    manifest: str
    backbone: str
    weights: str
    weights_md5: str
    plan: TrainingPlan
    seed: int
    epochs: int | str
    batch_size: int | str
    flip: bool
    precision: str
    history: str
    contents: str = ""
    code_md5: str = "none"
    budget_minutes: float = 0.0
    cache: str = ""
    cache_bytes: float = 0.0
    champion: str = ""
    champion_md5: str = ""
    start: str = ""
    gradient_accumulation_steps: int = 1
    callbacks: tuple[Callback, ...] = ()
    checkpoint_only: bool = False
    cadence: Cadence = Cadence()

    @property
    def image_folder(self) -> ImageFolder:
        """The folder of images, pinned if the run keeps a version of it."""
        return PinnedFolder(Path(self.images), Path(self.contents)) if self.contents else Path(self.images)
