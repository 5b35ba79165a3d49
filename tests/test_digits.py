"""The embedded sample: the digits that scikit-learn carries, too."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("sklearn.datasets")


def test_the_sample_is_the_digits_that_scikit_learn_carries(digits: Path) -> None:
    known = datasets.load_digits()
    assert len(list(digits.rglob("*.png"))) == len(known.target) == 1797
    for index, (values, label) in enumerate(zip(known.images, known.target, strict=True)):
        gray = Image.fromarray((values * (255 / 16)).round().astype(np.uint8))
        with Image.open(digits / str(label) / f"{index:04d}.png") as image:
            assert image.mode == "L"
            assert image.tobytes() == gray.resize((32, 32), Image.Resampling.BICUBIC).tobytes()
