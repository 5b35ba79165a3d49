"""Random views of images: crops, mirroring, RandAugment, mixup and cutmix.

Crops and mirroring are drawn for each image from (seed, epoch, content, turn in the epoch), whoever trains on it, so that a run does not
depend on how many workers share it, or on where it was interrupted. What mixes images of a batch follows from (seed, epoch, step, worker).
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tlpipeline.dataset import Row
from tlpipeline.features import Augment

_BILINEAR, _MIRROR = Image.Resampling.BILINEAR, Image.Transpose.FLIP_LEFT_RIGHT


def augmentation(crop: float, flip: bool, seed: int, epoch: int) -> Augment:
    """Return random resized crops (area share crop to 1, aspect 3/4 to 4/3) and mirroring, drawn from (seed, epoch, content of the image, turn).

    The crop's shape is drawn in the image's own proportions, whatever those of the picture that is cropped: it may be kept squeezed.
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
        return image.transpose(_MIRROR) if flip and rng.random() < 0.5 else image

    return apply


def rand_augment(pixels: Tensor, rows: list[Row], turns: list[int], operations: int, magnitude: int, seed: int, epoch: int) -> Tensor:
    """Apply RandAugment (Cubuk et al. 2019, arXiv 1909.13719) to 8-bit images (batch, size, size, 3), drawn from (seed, epoch, content, turn)."""
    from torchvision.transforms import v2

    transform = v2.RandAugment(num_ops=operations, magnitude=magnitude)
    out = torch.empty_like(pixels)
    with torch.random.fork_rng(devices=[]):
        for i, (row, turn) in enumerate(zip(rows, turns, strict=True)):
            torch.manual_seed(seed_of(*_drawn_from(seed, epoch, row, turn)))
            out[i] = transform(pixels[i].permute(2, 0, 1)).permute(1, 2, 0)
    return out


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
