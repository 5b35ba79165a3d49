"""Random views of images: crops and mirroring.

They are drawn per image from (seed, epoch, content, turn in the epoch).
A run therefore depends neither on the number of workers nor on where it was interrupted.
"""

import math

import numpy as np
from PIL import Image

from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Augment

_BILINEAR, _MIRROR = Image.Resampling.BILINEAR, Image.Transpose.FLIP_LEFT_RIGHT


def augmentation(crop: float, flip: bool, seed: int, epoch: int) -> Augment:
    """Return a function that makes a random view: a resized crop, maybe mirrored.

    Crops cover a share `crop` to 1 of the area, at an aspect ratio of 3/4 to 4/3. Views are drawn from (seed, epoch, content, turn).
    The crop's shape follows the original proportions of the image, even where the cached picture is squeezed into a square.

    Args:
        crop: smallest share of the area.
        flip: mirror half of the views.
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
        return image

    return apply


def _view_seed(seed: int, epoch: int, row: Row, turn: int) -> list[int]:
    """Return the seed of a view. An image that the balanced sampler repeats in an epoch gets another view each time."""
    numbers = [seed, epoch, int(row.md5[:15], 16)]
    return [*numbers, turn] if turn else numbers


def seed_of(*numbers: int) -> int:
    """Return one seed derived from several numbers."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])
