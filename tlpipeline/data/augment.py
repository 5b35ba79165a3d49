"""Random views of images: crops, mirroring, RandAugment, mixup and cutmix.

Crops, mirroring and RandAugment are drawn per image from (seed, epoch, content, turn in the epoch).
A run therefore depends neither on the number of workers nor on where it was interrupted.
Mixup and cutmix are drawn per batch from (seed, epoch, step, worker).
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Augment

# The strongest effect of each operation: degrees clockwise; shift in x and y as shares of the side; tangents of the shear.
SHIFTS = {
    "rotate": (-30.0, 0.0, 0.0, 0.0, 0.0),
    "translate_x": (0.0, 150 / 331, 0.0, 0.0, 0.0),
    "translate_y": (0.0, 0.0, 150 / 331, 0.0, 0.0),
    "shear_x": (0.0, 0.0, 0.0, 0.3, 0.0),
    "shear_y": (0.0, 0.0, 0.0, 0.0, 0.3),
}
ENHANCED = ("brightness", "saturation", "contrast", "sharpness")
OPERATIONS = ("identity", *SHIFTS, *ENHANCED, "posterize", "solarize", "autocontrast", "equalize")
MAGNITUDES = 31
_BILINEAR, _MIRROR = Image.Resampling.BILINEAR, Image.Transpose.FLIP_LEFT_RIGHT


def augmentation(crop: float, flip: bool, seed: int, epoch: int, operations: int = 0, magnitude: int = 0) -> Augment:
    """Return a function that makes a random view: a resized crop, mirroring and RandAugment.

    Crops cover a share `crop` to 1 of the area, at an aspect ratio of 3/4 to 4/3. Views are drawn from (seed, epoch, content, turn).
    The crop's shape follows the original proportions of the image, even where the cached picture is squeezed into a square.

    Args:
        crop: smallest share of the area.
        flip: mirror half of the views.
        operations: number of RandAugment operations per view.
        magnitude: of these operations, 0 to 30.
    """

    def apply(image: Image.Image, row: Row, side: int, turn: int = 0) -> Image.Image:
        rng = np.random.default_rng(_view_seed(seed, epoch, row, turn))
        area = row.width * row.height * rng.uniform(crop, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width = min(math.sqrt(area * aspect), row.width) * image.width / row.width
        height = min(math.sqrt(area / aspect), row.height) * image.height / row.height
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        image = image.resize((side, side), _BILINEAR, box=box)
        if flip and rng.random() < 0.5:
            image = image.transpose(_MIRROR)
        return rand_augment(image, rng, operations, magnitude) if operations else image

    return apply


def rand_augment(image: Image.Image, rng: np.random.Generator, operations: int, magnitude: int) -> Image.Image:
    """Apply random operations of RandAugment (Cubuk et al. 2019, arXiv 1909.13719), one after the other.

    Operations and strengths are torchvision's. Its own transform draws from the global random state, which decoding threads must not touch.

    Args:
        operations: how many.
        magnitude: 0 to 30, relative to each operation's strongest effect. The sign is random where an operation has one.
    """
    from torchvision.transforms.v2 import functional

    strength, side = magnitude / (MAGNITUDES - 1), image.width
    for _ in range(operations):
        kind, sign = rng.integers(len(OPERATIONS)), 1 if rng.random() < 0.5 else -1
        name = OPERATIONS[kind]
        if name in SHIFTS:
            angle, along, across, shear_x, shear_y = (strength * sign * strongest for strongest in SHIFTS[name])
            shear = [math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))]
            corner = [0, 0] if name.startswith("shear") else None
            image = functional.affine(image, angle, [int(along * side), int(across * side)], 1.0, shear, center=corner)
        elif name in ENHANCED:
            image = getattr(functional, f"adjust_{name}")(image, 1 + 0.9 * strength * sign)
        elif name == "posterize":
            image = functional.posterize(image, 8 - round(4 * strength))
        elif name == "solarize":
            image = functional.solarize(image, 255 * (1 - strength))
        elif name != "identity":
            image = getattr(functional, name)(image)
    return image


def mix(inputs: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix the images of a batch by mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019); at random if both are set.

    Args:
        inputs: (batch, 3, size, size); labels: (batch,) class indices.
        mixup, cutmix: alpha of the Beta distribution, 0 for none.

    Returns:
        The inputs, and labels as probabilities (batch, classes).
    """
    from torchvision.transforms import v2

    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    mixed: tuple[Tensor, Tensor] = kinds[int(torch.randint(len(kinds), ()))](inputs, labels)
    return mixed


def _view_seed(seed: int, epoch: int, row: Row, turn: int) -> list[int]:
    """Return the seed of a view. An image that the balanced sampler repeats in an epoch gets another view each time."""
    numbers = [seed, epoch, int(row.md5[:15], 16)]
    return [*numbers, turn] if turn else numbers


def seed_of(*numbers: int) -> int:
    """Return one seed derived from several numbers."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])
