"""Images straight from the archives of the real data."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from tlpipeline.data.decoding import decode


def take(archive: Path, each: int, only: Mapping[str, int] | None = None) -> tuple[list[Image.Image], list[int]]:
    """The first images of each class of the test side, straight from the archive; labels count classes in their order there."""
    found: list[Image.Image] = []
    labels: list[int] = []
    order: dict[str, int] = dict(only or {})
    with tarfile.open(archive, "r|gz") as file:
        for member in file:
            _, side, label, *name = [*member.name.split("/"), "", ""]
            if side == "train":
                break
            if not member.isfile() or not name or (only and label not in only):
                continue
            index = order.setdefault(label, len(order))
            if labels.count(index) < each:
                found.append(decode(file.extractfile(member).read()))  # type: ignore[union-attr]
                labels.append(index)
    return found, labels
