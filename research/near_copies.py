"""How well are near copies recognized? Recall on planted changes, and false alarms, on real sets.

    python -m research.near_copies --data FOLDER

For each set, some images are drawn. Each is changed in each way, and compared with all the others. Recall is the share of the changed
images that are recognized as copies of their originals. "Pairs" counts the pairs among the originals: some of them are real near copies,
so they are written to pairs.csv to be looked at. Pairs of images of different sets are false alarms for certain.
"""

import argparse
import csv
import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from research.grid import DATA
from research.units import folders
from tlpipeline.data import decoding, facts
from tlpipeline.data.copies import find_copies
from tlpipeline.data.facts import FactStore

SETS = ("caltech24", "flowers", "eurosat", "neu_steel", "pacs_sketch", "sign_digits", "brain_mri", "weather")
Change = Callable[[Image.Image, random.Random], Image.Image]


def _encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _cropped(share: float) -> Change:
    def change(image: Image.Image, draw: random.Random) -> Image.Image:
        width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
        x, y = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
        return _encoded(image.crop((x, y, x + width, y + height)), 90)

    return change


CHANGES: dict[str, Change] = {
    "JPEG 50": lambda image, draw: _encoded(image, 50),
    "JPEG 20": lambda image, draw: _encoded(image, 20),
    "half size": lambda image, draw: image.resize((max(8, image.width // 2), max(8, image.height // 2))),
    "mirrored": lambda image, draw: _encoded(ImageOps.mirror(image), 90),
    "light ± 30 %": lambda image, draw: _encoded(ImageEnhance.Brightness(image).enhance(draw.choice([0.7, 1.3])), 90),
    "contrast ± 30 %": lambda image, draw: _encoded(ImageEnhance.Contrast(image).enhance(draw.choice([0.7, 1.3])), 90),
    "crop 3 %": _cropped(0.03),
    "crop 5 %": _cropped(0.05),
    "crop 10 %": _cropped(0.10),
}


def _name(number: int, changed: bool) -> str:
    return f"{'f' if changed else '0'}{number:031x}"


def main() -> None:
    """Print a row for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets, see research/README.md")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "near_copies", help="folder for unpacked sets")
    parser.add_argument("--images", type=int, default=500, help="images drawn from each set")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    sets = folders(options.data, options.work)
    print(f"| set | images | {' | '.join(CHANGES)} | pairs among the originals |")
    print(f"|---|---:|{'---:|' * len(CHANGES)}---:|")
    everything: dict[str, bytes] = {}
    set_of: dict[str, str] = {}
    listed = []
    for name in SETS:
        draw = random.Random(0)
        contents = {path.read_bytes(): path for path in sorted(sets[name].rglob("*")) if path.is_file()}  # no exact copies
        images, paths = [], []
        for content, path in draw.sample(sorted(contents.items(), key=lambda item: item[1]), min(options.images, len(contents))):
            if not facts.measure(content).reason:
                images.append(decoding.decode(content))
                paths.append(path)
        originals = {_name(i, False): _picture(image) for i, image in enumerate(images)}
        numbered = {f"{len(everything) + i:032x}": picture for i, picture in enumerate(originals.values())}
        everything |= numbered
        set_of |= dict.fromkeys(numbered, name)
        among = find_copies(originals, FactStore())
        listed += [(name, paths[int(a, 16)], paths[int(b, 16)], alike) for a, b, alike in among]
        shares = []
        for change in CHANGES.values():
            changed = {_name(i, True): _picture(change(image, draw)) for i, image in enumerate(images)}
            recognized = {(a, b) for a, b, _ in find_copies(originals | changed, FactStore())}
            shares.append(float(np.mean([(_name(i, False), _name(i, True)) in recognized for i in range(len(images))])))
        print(f"| {name} | {len(images)} | {' | '.join(f'{share:.1%}' for share in shares)} | {len(among)} |", flush=True)
    with (options.work / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(listed)
    started = time.process_time()
    pairs = find_copies(everything, FactStore())
    print(
        f"\n{sum(set_of[a] != set_of[b] for a, b, _ in pairs)} of {len(everything) * (len(everything) - 1) // 2} pairs are near copies from different sets, "
        f"found in {time.process_time() - started:.1f} CPU seconds"
    )


def _picture(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return facts.measure(buffer.getvalue()).picture


if __name__ == "__main__":
    main()
