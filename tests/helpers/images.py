"""Small painted images."""

import io
from typing import Any

import numpy as np
from PIL import Image

from tlpipeline.data.transforms import Transforms


def paint(label: int, index: int, size: int = 32) -> Image.Image:
    """Draw a noisy image of a class: stripes whose direction and color say which."""
    rng = np.random.default_rng([label, index])
    ramp = np.arange(size)
    wave = np.sin((ramp[:, None] * (label % 2) + ramp[None, :] * (1 - label % 2)) * (0.6 + 0.4 * (label // 2)) + rng.uniform(0, 6))
    pixels = 128 + 70 * wave[..., None] * np.array([1.0, 0.6, 0.3])[np.roll(np.arange(3), label)] + rng.normal(0, 12, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PLAIN = Transforms(32, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
