"""Facts about image files: what they say, that they are measured once, and that a damaged store costs only time."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.helpers.datasets import md5, put
from tests.helpers.images import encoded, paint
from tlpipeline.data import facts
from tlpipeline.data.facts import Facts, FactStore


def measured(image: Image.Image, kind: str = "PNG", **options: object) -> Facts:
    return facts.measure(encoded(image, kind, **options))


def files(folder: Path, count: int = 6) -> list[tuple[Path, str]]:
    put(folder, {f"{i}.png": encoded(paint(0, i)) for i in range(count)})
    return [(path, md5(path.read_bytes())) for path in sorted(folder.iterdir())]


def test_the_facts_say_what_the_file_is() -> None:
    image = paint(0, 0, 60).resize((60, 40))
    content = encoded(image, "JPEG", quality=80)
    about = facts.measure(content)
    assert (about.width, about.height, about.mode, about.format, about.file_size) == (60, 40, "RGB", "JPEG", len(content))
    assert (about.jpeg_quality, about.exif, about.pages, about.flat, about.reason) == (80, False, 1, False, "")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = measured(image, "JPEG", exif=exif)
    assert turned.exif
    assert (turned.width, turned.height) == (40, 60)
    assert measured(image, "TIFF", save_all=True, append_images=[image, image]).pages == 3


@pytest.mark.parametrize("quality", [10, 35, 50, 75, 95])
def test_the_quality_of_a_jpeg_is_the_one_that_it_was_saved_with(quality: int) -> None:
    assert abs(measured(paint(0, 0), "JPEG", quality=quality).jpeg_quality - quality) <= 1
    assert measured(paint(0, 0)).jpeg_quality == 0


def test_the_facts_tell_dark_flat_blurred_and_framed_images() -> None:
    image = paint(0, 0, 64)
    about, dark = measured(image), measured(image.point(lambda value: value // 8))
    assert dark.brightness < about.brightness / 6
    tiles = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).resize((128, 128), Image.Resampling.NEAREST)
    assert measured(tiles.filter(ImageFilter.GaussianBlur(4))).blur > 0.6 > 0.3 > measured(tiles).blur
    assert measured(tiles.filter(ImageFilter.BoxBlur((12, 0)))).blur > 0.6, "motion along one axis"
    flat = measured(Image.new("RGB", (30, 30), (9, 9, 9)))
    assert (flat.flat, flat.brightness, flat.blur) == (True, 9.0, 0.0)
    framed = image.copy()
    framed.paste((0, 0, 0), (0, 0, 64, 1))
    framed.paste((0, 0, 0), (0, 61, 64, 64))
    framed_facts = measured(framed)
    assert (framed_facts.top, framed_facts.bottom, framed_facts.left, framed_facts.right) == (1, 3, 0, 0)
    assert (about.top, about.bottom, about.left, about.right) == (0, 0, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 4000), (4000, 1)])
def test_odd_sizes_have_facts(size: tuple[int, int]) -> None:
    about = measured(Image.new("L", size, 7))
    assert (about.width, about.height, about.flat) == (*size, True)
    assert about.gray.shape == (facts.SIDE, facts.SIDE)


@pytest.mark.parametrize("content", [b"", b"text", encoded(paint(0, 0))[:200]])
def test_a_file_that_cannot_be_used_has_a_reason(content: bytes) -> None:
    about = facts.measure(content)
    assert about.reason
    assert about.file_size == len(content)


def test_a_known_content_is_not_read_again_in_another_process(tmp_path: Path) -> None:
    known = files(tmp_path / "images")
    first = {number: about for number, _, about in facts.gather(known, FactStore(tmp_path / "cache"))}
    for path, _ in known:
        path.unlink()
    again = {number: about for number, _, about in facts.gather(known, FactStore(tmp_path / "cache"))}
    assert again == first
    assert all(np.array_equal(again[i].gray, first[i].gray) for i in first)


def test_what_is_read_has_the_md5_of_its_content(tmp_path: Path) -> None:
    (path, before), *_ = files(tmp_path / "images")
    path.write_bytes(encoded(paint(1, 1)))
    ((_, now, about),) = facts.gather([(path, before)], FactStore(tmp_path / "cache"))
    assert now == md5(path.read_bytes()) != before
    assert dict(FactStore(tmp_path / "cache").known([before, now])) == {now: about}


@pytest.mark.parametrize("damage", ["nothing left", "not a database", "a flipped byte of a fact", "other rules"])
def test_a_damaged_store_is_said_and_built_again(tmp_path: Path, damage: str) -> None:
    known, said = files(tmp_path / "images"), list[str]()
    expected = sorted(facts.gather(known, FactStore(tmp_path / "cache")))
    path = FactStore(tmp_path / "cache").path
    assert path is not None
    if damage == "nothing left":
        path.write_bytes(b"")
    elif damage == "not a database":
        path.write_bytes(b"x" * 5000)
    elif damage == "other rules":
        path.rename(path.with_name("facts-0123456789ab.sqlite"))
    else:
        with sqlite3.connect(path) as database:
            database.execute("UPDATE facts SET facts = replace(facts, '32', '33') WHERE md5 = ?", (known[0][1],))
        database.close()
    store = FactStore(tmp_path / "cache", said.append)
    assert sorted(facts.gather(known, store)) == expected
    assert len(said) == (damage in ("not a database", "a flipped byte of a fact"))
    assert len(dict(store.known(md5 for _, md5 in known))) == len(known)
    assert [other.name for other in (tmp_path / "cache").iterdir()] == [path.name]


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tlpipeline.data.facts import Facts, FactStore\n"
        "store = FactStore(Path(sys.argv[1]))\n"
        "for i in range(40): store.add({f'{sys.argv[2]}-{i}': Facts(file_size=i)})"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(k)]) for k in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    names = [f"{k}-{i}" for k in range(3) for i in range(40)]
    assert len(dict(FactStore(tmp_path).known(names))) == len(names)
