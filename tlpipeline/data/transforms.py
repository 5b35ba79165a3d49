"""How an image becomes the input of a network."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

_PIXELS = 10_000  # a larger side in a file is a mistake
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")  # Pillow's


@dataclass(frozen=True)
class Transforms:
    """How an image becomes an input: resize the short side, crop the center, scale to [0, 1], normalize.

    Attributes:
        size: side of the center crop, pixels.
        resize: short side before the crop, pixels.
        mean, std: per RGB channel, of values in [0, 1].
        interpolation: one of INTERPOLATIONS.
    """

    size: Annotated[int, Field(ge=1, le=_PIXELS)]
    resize: Annotated[int, Field(ge=1, le=_PIXELS)]
    mean: Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]
    std: Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]
    interpolation: str

    def at(self, size: int) -> "Transforms":
        """Return these transforms for another input size, with the margin of the crop in proportion."""
        return Transforms(size, round(self.resize * size / self.size), self.mean, self.std, self.interpolation)
