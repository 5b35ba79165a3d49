"""The embedded sample: 1,797 handwritten digits, for a first run without a download (source: sample/README.md)."""

from pathlib import Path

import numpy as np
from PIL import Image

SHEET = Path(__file__).with_name("sample") / "digits.png"
SIDE = 8  # pixels of a digit on the sheet
LEVEL = 15  # gray levels between two of the 17 values of a pixel, 0 to 16


def write(folder: Path) -> int:
    """Write the digits as 32 x 32 gray PNG files, one folder per class.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (its test part).

    Returns:
        The number of images written.
    """
    with Image.open(SHEET, formats=["PNG"]) as sheet:
        labels = sheet.info["labels"]
        values = np.asarray(sheet) // LEVEL
    columns = values.shape[1] // SIDE
    for index, label in enumerate(labels):
        top, left = (SIDE * at for at in divmod(index, columns))
        path = folder / label / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray((values[top : top + SIDE, left : left + SIDE] * (255 / 16)).round().astype(np.uint8), "L")
        gray.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return len(labels)
