"""Random views of images: crops, mirroring, RandAugment, mixup and cutmix.

Crops, mirroring and RandAugment are drawn for each image from (seed, epoch, content, turn in the epoch), whoever trains on it, so that a run
does not depend on how many workers share it, or on where it was interrupted. What mixes images of a batch follows from (seed, epoch, step,
worker).
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Augment

# Degrees clockwise, shares of the side along and across, tangents of the shear along and across: each operation at its strongest.
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
    """Return random resized crops (area share crop to 1, aspect 3/4 to 4/3), mirroring and RandAugment with so many operations of this magnitude.

    They are drawn from (seed, epoch, content of the image, turn). The crop's shape is drawn in the image's own proportions, whatever those of
    the picture that is cropped: it may be kept squeezed.
    """

    def apply(image: Image.Image, row: Row, side: int, turn: int = 0) -> Image.Image:
        rng = np.random.default_rng(_drawn_from(seed, epoch, row, turn))
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
    """Apply so many random operations of RandAugment (Cubuk et al. 2019, arXiv 1909.13719), one after the other.

    torchvision's transform of this name draws from the process's one random state, which decoding threads must leave alone. The operations
    are torchvision's, and so is how strong they get.

    Args:
        magnitude: 0 to 30, a share of each operation's strongest; half of the signed ones go the other way.
    """
    from torchvision.transforms.v2 import functional

    strength, side = magnitude / (MAGNITUDES - 1), image.width
    for _ in range(operations):
        kind, sign = rng.integers(len(OPERATIONS)), 1 if rng.random() < 0.5 else -1
        name = OPERATIONS[kind]
        if name in SHIFTS:
            turn, along, across, lean, tilt = (strength * sign * most for most in SHIFTS[name])
            shear = [math.degrees(math.atan(lean)), math.degrees(math.atan(tilt))]
            corner = [0, 0] if name.startswith("shear") else None
            image = functional.affine(image, turn, [int(along * side), int(across * side)], 1.0, shear, center=corner)
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
    """Mix the images of a batch by mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019), one of both at random where both are asked for.

    Args:
        inputs: (batch, 3, size, size); labels: (batch,) class indices.
        mixup, cutmix: alpha of their Beta distributions, 0 for none.

    Returns:
        The inputs, and labels as probabilities (batch, classes).
    """
    from torchvision.transforms import v2

    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    mixed: tuple[Tensor, Tensor] = kinds[int(torch.randint(len(kinds), ()))](inputs, labels)
    return mixed


def _drawn_from(seed: int, epoch: int, row: Row, turn: int) -> list[int]:
    """Return the numbers that a view follows from. An image that comes back in an epoch, as the balanced sampler has it, is another view of it."""
    numbers = [seed, epoch, int(row.md5[:15], 16)]
    return [*numbers, turn] if turn else numbers


def seed_of(*numbers: int) -> int:
    """Mix numbers into a seed."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])
