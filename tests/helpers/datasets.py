"""Folders of images, their manifests and their splits."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tlpipeline.data.dataset import Manifest, ingest
from tlpipeline.data.splits import split_of


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def listed(images: Path, exceptions: Mapping[str, str] | None = None) -> Manifest:
    return ingest(images, exceptions or {}, lambda done, total: None)


def sides(manifest: Manifest) -> dict[str, str]:
    return {r.md5: r.split for r in manifest.rows}


def put(folder: Path, contents: Mapping[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tiny(number: int) -> bytes:
    """Return a small image that no other number has."""
    return b"P6 2 2 255\n" + number.to_bytes(8, "big") + b"\0\0\0\0"


def hashes(images: Path) -> dict[str, str]:
    return {p.relative_to(images).as_posix(): md5(p.read_bytes()) for p in sorted(images.rglob("*")) if p.is_file()}


def with_large_class(folder: Path, **small: list[bytes]) -> Path:
    """Write small classes beside a class that needs no exception."""
    put(folder, {f"large/{i}.ppm": tiny(i) for i in range(60)})
    for label, contents in small.items():
        put(folder, {f"{label}/{i}.ppm": content for i, content in enumerate(contents)})
    return folder


def on(side: str, count: int, start: int = 100_000) -> list[bytes]:
    """Return small images whose content puts them on this side."""
    found = [content for content in map(tiny, range(start, start + 40 * count + 400)) if split_of(md5(content)) == side]
    assert len(found) >= count
    return found[:count]


def laid_out(folder: Path, layout: Mapping[str, int]) -> Path:
    """Write `side: images in each of two classes`; no image twice."""
    number = 0
    for side, each in layout.items():
        for label in ("cat", "dog"):
            put(folder, {f"{side}/{label}/{number + i}.ppm": tiny(number + i) for i in range(each)})
            number += each
    return folder
