"""Images on disk: pixels whatever the mode, quarantine with a reason, sides that never move, and errors that show the way out."""

import hashlib
import io
import os
import random
import shutil
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import paint
from PIL import Image

from tlpipeline import dataset
from tlpipeline.cutting import Transforms
from tlpipeline.dataset import (
    MINIMUM_PER_CLASS,
    TEST,
    TRAIN,
    VAL,
    Manifest,
    Row,
    SplitException,
    decode,
    ingest,
    needed_exceptions,
    read,
    read_exceptions,
    read_manifest,
    side_of,
    write_exceptions,
    write_manifest,
)
from tlpipeline.errors import DataChanged, DataError
from tlpipeline.inputs import prepare

WHITE, RED, BLACK = [255, 255, 255], [255, 0, 0], [0, 0, 0]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content: bytes) -> list[Any]:
    """Decode, check that it is 8-bit RGB, and return the rows of pixels."""
    image = decode(content)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()  # type: ignore[no-any-return]


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def listed(images: Path, exceptions: Mapping[str, str] | None = None) -> Manifest:
    return ingest(images, exceptions or {}, lambda done, total: None)


def reasons(manifest: Manifest) -> dict[str, str]:
    return {r.path: r.reason for r in manifest.rejected}


def sides(manifest: Manifest) -> dict[str, str]:
    return {r.md5: r.split for r in manifest.rows}


def refusal(images: Path) -> str:
    with pytest.raises(DataError) as caught:
        listed(images)
    return str(caught.value)


def put(folder: Path, contents: Mapping[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tiny(number: int) -> bytes:
    """Return a small image that no other number has."""
    return b"P6 2 2 255\n" + number.to_bytes(8, "big") + b"\0\0\0\0"


def tiny_on(side: str, start: int = 0) -> bytes:
    """Return a small image whose content puts it on this side."""
    return next(content for content in map(tiny, range(start, start + 10_000)) if side_of(md5(content)) == side)


def hashes(images: Path) -> dict[str, str]:
    return {p.relative_to(images).as_posix(): md5(p.read_bytes()) for p in sorted(images.rglob("*")) if p.is_file()}


# --- pixels ---------------------------------------------------------------------------------------------------------------------------


def test_grey_becomes_rgb() -> None:
    assert pixels(encoded(Image.fromarray(np.array([[0, 7, 255]], np.uint8)))) == [[BLACK, [7, 7, 7], WHITE]]


def test_black_and_white_becomes_rgb() -> None:
    assert pixels(encoded(Image.new("1", (1, 2), 1))) == [[WHITE], [WHITE]]


def test_rgb_stays_as_it_is() -> None:
    image = paint(1, 1)
    assert pixels(encoded(image)) == np.asarray(image).tolist()


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def test_a_palette_becomes_its_colours() -> None:
    assert pixels(encoded(palette())) == [[RED, [0, 255, 0], [0, 0, 255]]]


def test_a_transparent_palette_entry_becomes_white() -> None:
    assert pixels(encoded(palette(), transparency=1)) == [[RED, WHITE, [0, 0, 255]]]


def test_half_transparent_palette_entries_are_laid_over_white() -> None:
    assert pixels(encoded(palette(), transparency=bytes([255, 0, 51]))) == [[RED, WHITE, [204, 204, 255]]]


def test_transparency_is_laid_over_white() -> None:
    image = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8), "RGBA")
    assert pixels(encoded(image)) == [[RED, WHITE, [204, 204, 204]]]


def test_grey_transparency_is_laid_over_white() -> None:
    image = Image.fromarray(np.array([[[9, 255], [9, 0], [0, 51]]], np.uint8), "LA")
    assert pixels(encoded(image)) == [[[9, 9, 9], WHITE, [204, 204, 204]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9))])
def test_a_colour_that_is_declared_transparent_becomes_white(mode: str, colour: Any) -> None:
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 3 if mode == "L" else (3, 3, 3))
    assert pixels(encoded(image, transparency=colour)) == [[WHITE, [3, 3, 3]]]


def test_cmyk_becomes_rgb() -> None:
    assert pixels(encoded(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF")) == [[[0, 255, 255]]]
    ((found,),) = pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.array(found) - RED).max() <= 4


def test_16_bit_greys_are_scaled_by_their_full_range() -> None:
    image = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert pixels(encoded(image, kind)) == [[BLACK, [1, 1, 1], [128, 128, 128], WHITE]]


def test_a_transparent_16_bit_grey_becomes_white_and_the_others_keep_their_scale() -> None:
    image = Image.fromarray(np.array([[0, 257, 32768]], np.uint16))
    assert pixels(encoded(image, transparency=0)) == [[WHITE, [1, 1, 1], [128, 128, 128]]]


def test_16_bit_colours_become_8_bit() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    line = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 257 * 7, 0)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    assert pixels(png) == [[RED, [0, 7, 0]]]


def test_floating_point_pixels_are_scaled_by_their_own_range() -> None:
    assert pixels(encoded(Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32)), "TIFF")) == [[BLACK, [128, 128, 128], WHITE]]


def test_floating_point_pixels_that_are_no_numbers_do_not_spoil_the_others() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 0.0, 2.0, 1.0]], np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF")) == [[BLACK, WHITE, BLACK, BLACK, WHITE, [128, 128, 128]]]


def test_floating_point_pixels_of_one_value_are_black() -> None:
    assert pixels(encoded(Image.new("F", (1, 1), 5.0), "TIFF")) == [[BLACK]]


def test_an_image_without_a_single_number_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite pixel"):
        decode(encoded(Image.new("F", (1, 1), float("nan")), "TIFF"))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    first, second = Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (2, 2), (0, 0, 255))
    content = encoded(first, "GIF", save_all=True, append_images=[second], duration=10)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 2
    assert pixels(content) == [[RED, RED], [RED, RED]]


@pytest.mark.parametrize(
    ("orientation", "turned"), [(1, [[1, 2, 3]]), (2, [[3, 2, 1]]), (3, [[3, 2, 1]]), (6, [[1], [2], [3]]), (8, [[3], [2], [1]])]
)
def test_the_orientation_that_the_camera_noted_is_applied(orientation: int, turned: list[list[int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.array([[1, 2, 3]], np.uint8)), exif=exif)
    assert [[red for red, _, _ in line] for line in pixels(content)] == turned


def test_a_turned_image_is_listed_with_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {f"{label}/{i}.png": encoded(paint(label, i).crop((0, 0, 32, 20)), exif=exif) for label in (0, 1) for i in range(20)}
    assert {(r.width, r.height) for r in listed(put(tmp_path / "images", contents)).rows} == {(20, 32)}


def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    image = paint(0, 0)
    content = encoded(image, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pytest puts filters of its own before the library's
        assert pixels(content) == np.asarray(image).tolist()


def test_decoding_leaves_the_filters_for_warnings_as_other_threads_see_them(monkeypatch: Any) -> None:
    before, seen = list(warnings.filters), []

    def look(image: Image.Image) -> Image.Image:
        seen.append(list(warnings.filters))
        return image

    monkeypatch.setattr(dataset.ImageOps, "exif_transpose", look)
    decode(encoded(paint(0, 0)))
    assert seen == [before]


# --- quarantine -----------------------------------------------------------------------------------------------------------------------


def test_each_bad_file_is_left_out_with_a_reason_and_the_good_ones_are_kept(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    good = set(hashes(images))
    whole = encoded(paint(0, 99))
    bad = {
        "class0/broken.png": whole[:60] + bytes(40) + whole[100:],
        "class0/truncated.png": whole[: len(whole) // 2],
        "class0/truncated.jpg": encoded(paint(0, 98), "JPEG")[:-200],
        "class1/empty.png": b"",
        "class1/notes.txt": b"not an image at all",
        "class1/page.png": b"<html>404</html>",
        "class1/no-pixels.ppm": b"P6 0 0 255\n",
        "class1/no-number.tif": encoded(Image.new("F", (2, 2), float("nan")), "TIFF"),
        "outside.png": encoded(paint(1, 97)),
    }
    manifest = listed(put(images, bad))
    assert {r.path for r in manifest.rows} == good
    found = reasons(manifest)
    assert set(found) == set(bad)
    assert found["class0/broken.png"].startswith("broken: ")
    assert found["class0/truncated.png"].startswith("broken: ")
    assert "truncated" in found["class0/truncated.jpg"]
    assert found["class1/empty.png"] == "empty file"
    assert found["class1/notes.txt"] == "not an image"
    assert found["class1/page.png"] == "not an image"
    assert found["class1/no-pixels.ppm"] == "not an image"
    assert found["class1/no-number.tif"] == "broken: no finite pixel"
    assert found["outside.png"] == "outside any class folder"


def test_no_damage_to_a_file_stops_the_listing(tmp_path: Path) -> None:
    rng = random.Random(7)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    sources = [encoded(paint(0, 0), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {})) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "DDS", "ICO", "TGA")]  # fmt: skip
    contents = {f"{label}/{i}.png": encoded(paint(label, i)) for label in (0, 1) for i in range(20)}
    for number in range(600):
        content = bytearray(rng.choice(sources))
        for _ in range(rng.choice([1, 2, 4])):
            content[rng.randrange(min(len(content), 160))] = rng.randrange(256)
        contents[f"0/damaged-{number}"] = bytes(content)
    images = put(tmp_path / "images", contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        manifest = listed(images)
    assert {f"{label}/{i}.png" for label in (0, 1) for i in range(20)} <= {r.path for r in manifest.rows}
    assert manifest.rejected
    assert len(manifest.rows) + len(manifest.rejected) == len(contents)


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), TypeError("str"), NotImplementedError("DXT9"), RuntimeError("AVIF"), KeyError(3)]
)
def test_whatever_a_decoder_raises_costs_one_file_only(make_images: Callable[..., Path], monkeypatch: Any, error: Exception) -> None:
    images = make_images(classes=2, each=12)
    unlucky = (images / "class0/000.png").read_bytes()

    def raising(content: bytes) -> Image.Image:
        if content == unlucky:
            raise error
        return decode(content)

    monkeypatch.setattr(dataset, "decode", raising)
    manifest = listed(images)
    assert reasons(manifest) == {"class0/000.png": f"broken: {error}"}
    assert len(manifest.rows) == 23


def test_a_machine_out_of_memory_costs_no_image(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    def full(content: bytes) -> Image.Image:
        raise MemoryError

    images = make_images(classes=2, each=3)
    monkeypatch.setattr(dataset, "decode", full)
    with pytest.raises(MemoryError):
        listed(images)


def test_the_same_image_in_two_classes_is_left_out_of_both(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=3, each=20)
    shutil.copy(images / "class0/000.png", images / "class1/copy.png")
    manifest = listed(images)
    assert reasons(manifest) == dict.fromkeys(["class0/000.png", "class1/copy.png"], "the same image in several classes: class0, class1")
    assert len(manifest.used(TRAIN, VAL, TEST)) == 59


def test_files_that_the_system_hides_are_not_even_looked_at(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    put(images, {".DS_Store": b"x", "class0/.thumb.png": encoded(paint(0, 50)), ".trash/a.png": encoded(paint(0, 51))})
    manifest = listed(images)
    assert not manifest.rejected
    assert len(manifest.rows) == 40


def test_folders_below_a_class_belong_to_it(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    put(images, {"class0/2024/may/a.png": encoded(paint(0, 50))})
    assert {r.path: r.label for r in listed(images).rows}["class0/2024/may/a.png"] == "class0"


def test_progress_tells_every_file_once(make_images: Callable[..., Path]) -> None:
    told: list[tuple[int, int]] = []
    ingest(make_images(classes=2, each=12), {}, lambda done, total: told.append((done, total)))
    assert told == [(n, 24) for n in range(1, 25)]


@pytest.mark.parametrize("threads", [1, 7])
def test_the_number_of_readers_changes_nothing(make_images: Callable[..., Path], threads: int) -> None:
    images = make_images(classes=2, each=15)
    assert ingest(images, {}, lambda done, total: None, threads) == listed(images)


# --- copies ---------------------------------------------------------------------------------------------------------------------------


def test_a_copy_in_the_same_class_counts_once(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    shutil.copy(images / "class0/003.png", images / "class0/zzz.png")
    manifest = listed(images)
    assert {r.path: r.duplicate_of for r in manifest.rows if r.duplicate_of} == {"class0/zzz.png": "class0/003.png"}
    assert len(manifest.rows) == 41
    assert len(manifest.used(TRAIN, VAL, TEST)) == 40
    assert not manifest.rejected


def test_exact_copies_stay_on_one_side(tmp_path: Path) -> None:
    contents = {f"{label}/{copy}-{i}.ppm": tiny(1000 * label + i) for label in (0, 1) for i in range(100) for copy in range(3)}
    manifest = listed(put(tmp_path / "images", contents))
    by_content: dict[str, set[str]] = {}
    for row in manifest.rows:
        by_content.setdefault(row.md5, set()).add(row.split)
    assert len(by_content) == 200
    assert all(len(found) == 1 for found in by_content.values())
    assert Counter(bool(r.duplicate_of) for r in manifest.rows) == {False: 200, True: 400}


def test_used_images_come_in_an_order_that_file_names_do_not_change(tmp_path: Path) -> None:
    contents = [tiny(i) for i in range(60)]
    here = put(tmp_path / "here", {f"{i % 2}/{i:03d}.ppm": c for i, c in enumerate(contents)})
    there = put(tmp_path / "there", {f"{i % 2}/{999 - i:03d}.ppm": c for i, c in enumerate(contents)})
    assert [r.md5 for r in listed(here).used(TRAIN)] == [r.md5 for r in listed(there).used(TRAIN)]


# --- sides that never move ------------------------------------------------------------------------------------------------------------


def test_no_image_changes_side_whatever_is_added_removed_or_renamed(tmp_path: Path) -> None:
    rng = random.Random(11)
    images = tmp_path / "images"
    known: dict[str, str] = {}
    number = 0
    for _ in range(15):
        for label in ("left", "right"):
            put(images, {f"{label}/{number + i}.ppm": tiny(number + i) for i in range(15)})
            number += 15
        files = sorted(p for p in images.rglob("*") if p.is_file())
        for path in rng.sample(files, 6):
            path.unlink()
        for path in rng.sample([p for p in files if p.exists()], 6):
            path.rename(path.with_name(f"renamed-{rng.random()}.ppm"))
        now = sides(listed(images))
        assert all(known.get(content, side) == side for content, side in now.items())
        known |= now
    assert len(known) > 300
    assert set(known.values()) == {TRAIN, VAL, TEST}


def test_an_image_keeps_its_side_when_it_changes_class(tmp_path: Path) -> None:
    contents = {f"{i % 2}/{i}.ppm": tiny(i) for i in range(60)}
    images = put(tmp_path / "images", contents)
    before = sides(listed(images))
    (images / "0/0.ppm").rename(images / "1/0.ppm")
    assert sides(listed(images)) == before


def test_the_shares_are_near_70_15_15() -> None:
    counts = Counter(side_of(md5(tiny(i))) for i in range(20_000))
    assert {side: round(n / 20_000, 2) for side, n in counts.items()} == {
        TRAIN: pytest.approx(0.70, abs=0.011),
        VAL: pytest.approx(0.15, abs=0.011),
        TEST: pytest.approx(0.15, abs=0.011),
    }


def test_the_side_follows_from_the_hash_at_exactly_these_bounds() -> None:
    at = lambda u: f"{round(u * 2**128):032x}"  # noqa: E731
    assert [side_of(at(u)) for u in (0, 0.6999, 0.7001, 0.8499, 0.8501, 0.9999)] == [TRAIN, TRAIN, VAL, VAL, TEST, TEST]


def test_where_test_is_given_val_keeps_its_share_of_the_rest() -> None:
    counts = Counter(side_of(md5(tiny(i)), carve_val=True) for i in range(20_000))
    assert set(counts) == {TRAIN, VAL}
    assert counts[VAL] / 20_000 == pytest.approx(0.15 / 0.85, abs=0.01)


def test_a_line_of_splits_csv_wins_over_the_rule_by_content(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    chosen = listed(images).used(TRAIN)[0].md5
    assert sides(listed(images, {chosen: TEST}))[chosen] == TEST


# --- a given layout -------------------------------------------------------------------------------------------------------------------


def laid_out(folder: Path, layout: Mapping[str, int]) -> Path:
    """Write `side: images in each of two classes`; no image twice."""
    number = 0
    for side, each in layout.items():
        for label in ("cat", "dog"):
            put(folder, {f"{side}/{label}/{number + i}.ppm": tiny(number + i) for i in range(each)})
            number += each
    return folder


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_given_layout_of_three_sides_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    manifest = listed(laid_out(tmp_path / "images", {"train": 5, name: 4, "test": 3}))
    assert Counter((r.split, r.label) for r in manifest.rows) == {
        (TRAIN, "cat"): 5, (TRAIN, "dog"): 5, (VAL, "cat"): 4, (VAL, "dog"): 4, (TEST, "cat"): 3, (TEST, "dog"): 3,
    }  # fmt: skip
    assert manifest.classes == ("cat", "dog")
    assert not manifest.remarks


def test_a_given_layout_may_be_written_with_capitals(tmp_path: Path) -> None:
    """Else Train and Test would silently become two classes."""
    for side in ("Train", "TEST"):
        for label in range(2):
            for i in range(6):
                path = tmp_path / side / f"class{label}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                paint(label, i + (100 if side == "TEST" else 0)).save(path)
    found = dataset.ingest(tmp_path, {}, lambda done, total: None)
    assert found.classes == ("class0", "class1")
    assert {row.split for row in found.rows if row.path.startswith("TEST/")} == {TEST}
    assert TEST not in {row.split for row in found.rows if row.path.startswith("Train/")}


def test_where_train_and_test_are_given_val_is_carved_out_of_train_by_content(tmp_path: Path) -> None:
    manifest = listed(laid_out(tmp_path / "images", {"train": 40, "test": 6}))
    for row in manifest.rows:
        given = row.path.split("/")[0]
        assert row.split == (TEST if given == "test" else side_of(row.md5, carve_val=True))
    assert {r.split for r in manifest.rows} == {TRAIN, VAL, TEST}


def test_an_image_carved_into_val_stays_there_while_train_grows(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "images", {"train": 40, "test": 6})
    before = sides(listed(images))
    put(images, {f"train/cat/new-{i}.ppm": tiny(10_000 + i) for i in range(50)})
    assert sides(listed(images)).items() >= before.items()


def test_a_given_layout_wins_over_splits_csv(tmp_path: Path) -> None:
    for name, layout in (("three", {"train": 5, "val": 4, "test": 3}), ("two", {"train": 40, "test": 6})):
        images = laid_out(tmp_path / name, layout)
        plain = listed(images)
        moved = {content: TEST if side == TRAIN else TRAIN for content, side in sides(plain).items()}
        assert sides(listed(images, moved)) == sides(plain)


@pytest.mark.parametrize("layout", [{"train": 30, "val": 4, "test": 5}, {"train": 30, "test": 5}])
def test_an_exact_leak_is_reported_and_used_in_test_only(tmp_path: Path, layout: dict[str, int]) -> None:
    images = laid_out(tmp_path / "images", layout)
    leaked = sorted((images / "test" / "cat").iterdir())[:2]
    for path in leaked:
        shutil.copy(path, images / "train" / "cat" / f"leak-{path.name}")
    manifest = listed(images)
    assert [r for r in manifest.remarks if r.startswith("leak")] == [
        "leak: 2 distinct test images stand in train too, byte for byte; they are used in test only"
    ]
    stolen = {md5(path.read_bytes()) for path in leaked}
    assert stolen <= {r.md5 for r in manifest.used(TEST)}
    assert not stolen & {r.md5 for r in manifest.used(TRAIN, VAL)}
    assert len(manifest.used(TEST)) == 10


def test_a_leak_from_val_to_train_is_reported_and_used_in_val_only(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "images", {"train": 5, "val": 4, "test": 3})
    path = sorted((images / "val" / "dog").iterdir())[0]
    shutil.copy(path, images / "train" / "dog")
    manifest = listed(images)
    assert manifest.remarks == ("leak: 1 distinct val images stand in train too, byte for byte; they are used in val only",)
    assert md5(path.read_bytes()) not in {r.md5 for r in manifest.used(TRAIN)}


def test_a_copy_within_one_given_side_is_no_leak(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "images", {"train": 5, "val": 4, "test": 3})
    shutil.copy(sorted((images / "train" / "cat").iterdir())[0], images / "train" / "cat" / "again.ppm")
    assert not listed(images).remarks


def test_a_file_beside_the_classes_of_a_given_layout_is_left_out(tmp_path: Path) -> None:
    images = put(laid_out(tmp_path / "images", {"train": 5, "val": 4, "test": 3}), {"train/stray.ppm": tiny(9999), "readme": b"x"})
    assert reasons(listed(images)) == dict.fromkeys(["train/stray.ppm", "readme"], "outside any class folder")


@pytest.mark.parametrize("layout", [{"train": 5, "val": 5}, {"val": 5, "test": 5}, {"train": 5, "test": 5, "unlabelled": 5}])
def test_half_a_layout_of_sides_is_refused_instead_of_taken_for_classes(tmp_path: Path, layout: dict[str, int]) -> None:
    text = refusal(laid_out(tmp_path / "images", layout))
    assert "expected the folders train, test and perhaps val" in text
    assert f"found {', '.join(sorted(layout))}" in text
    assert "sort the images by class" in text


def test_a_class_without_training_images_in_a_given_layout_is_refused_with_the_way_out(tmp_path: Path) -> None:
    images = put(laid_out(tmp_path / "images", {"train": 5, "val": 4, "test": 3}), {f"test/owl/{i}.ppm": tiny(5000 + i) for i in range(3)})
    text = refusal(images)
    assert "none for owl" in text
    assert "into its folder train" in text


# --- small classes: splits.csv --------------------------------------------------------------------------------------------------------


def asked_never() -> frozenset[str]:
    raise AssertionError("asked for the images of registered versions without need")


def exceptions_of(images: Path, known: Mapping[str, str] | None = None, trained_on: frozenset[str] = frozenset()) -> Any:
    return needed_exceptions(images, hashes(images), known or {}, lambda: trained_on)


def with_large_class(folder: Path, **small: list[bytes]) -> Path:
    """Write small classes beside a class that needs no exception."""
    put(folder, {f"large/{i}.ppm": tiny(i) for i in range(60)})
    for label, contents in small.items():
        put(folder, {f"{label}/{i}.ppm": content for i, content in enumerate(contents)})
    return folder


def on(side: str, count: int, start: int = 100_000) -> list[bytes]:
    """Return small images whose content puts them on this side."""
    found = [content for content in map(tiny, range(start, start + 40 * count + 400)) if side_of(md5(content)) == side]
    assert len(found) >= count
    return found[:count]


def test_classes_with_all_sides_need_no_line_and_no_look_at_the_registry(tmp_path: Path) -> None:
    images = with_large_class(tmp_path / "images")
    assert needed_exceptions(images, hashes(images), {}, asked_never) == ([], [])


def test_empty_sides_are_filled_highest_to_test_next_to_val(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    lines, remarks = exceptions_of(with_large_class(tmp_path / "images", small=contents))
    assert lines == [SplitException(md5(contents[4]), TEST, "small"), SplitException(md5(contents[3]), VAL, "small")]
    assert remarks == []


def test_the_lowest_goes_to_train(tmp_path: Path) -> None:
    contents = sorted(on(TEST, 4), key=md5)
    lines, _ = exceptions_of(with_large_class(tmp_path / "images", small=contents))
    assert lines == [SplitException(md5(contents[3]), VAL, "small"), SplitException(md5(contents[0]), TRAIN, "small")]


def test_three_images_get_a_side_each(tmp_path: Path) -> None:
    for case, contents in enumerate((on(TRAIN, 3), on(VAL, 3), on(TEST, 3), on(TRAIN, 2) + on(VAL, 1), on(TEST, 2) + on(VAL, 1))):
        images = with_large_class(tmp_path / str(case), small=contents)
        lines, remarks = exceptions_of(images)
        assert not remarks
        found = listed(images, {line.md5: line.split for line in lines})
        assert sorted(r.split for r in found.rows if r.label == "small") == [TEST, TRAIN, VAL]


def test_any_content_of_small_classes_can_be_trained_validated_and_tested(tmp_path: Path) -> None:
    rng = random.Random(3)
    for trial in range(25):
        start = rng.randrange(10**9)
        classes = {f"class{c}": [tiny(start + 1000 * c + i) for i in range(rng.randint(3, 12))] for c in range(4)}
        images = put(
            tmp_path / str(trial), {f"{c}/{i}.ppm": content for c, contents in classes.items() for i, content in enumerate(contents)}
        )
        lines, _ = exceptions_of(images)
        manifest = listed(images, {line.md5: line.split for line in lines})
        assert not manifest.remarks
        assert {(r.label, r.split) for r in manifest.rows} == {(c, side) for c in classes for side in (TRAIN, VAL, TEST)}


def test_an_image_that_a_registered_version_trained_on_never_goes_to_test(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    lines, remarks = exceptions_of(images, trained_on=frozenset(map(md5, contents[2:])))
    assert lines[0] == SplitException(md5(contents[1]), TEST, "small")
    assert remarks == []


def test_a_class_that_was_trained_on_whole_is_named_as_not_evaluated(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    lines, remarks = exceptions_of(images, trained_on=frozenset(map(md5, contents)))
    assert [line.split for line in lines] == [VAL]
    assert remarks == ["not evaluated: small has no image that could go to test"]
    assert listed(images, {line.md5: line.split for line in lines}).remarks == ("not evaluated: no test image of small",)


def test_what_splits_csv_fixed_is_never_moved_again(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 4), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    lines, _ = exceptions_of(images, known={md5(contents[3]): TRAIN, md5(contents[2]): TRAIN})
    assert lines == [SplitException(md5(contents[1]), TEST, "small"), SplitException(md5(contents[0]), VAL, "small")]


def test_lines_that_are_known_are_not_given_again_while_the_class_grows(tmp_path: Path) -> None:
    contents = on(TRAIN, 12)
    images = with_large_class(tmp_path / "images", small=contents[:4])
    lines, _ = exceptions_of(images)
    known = {line.md5: line.split for line in lines}
    assert len(known) == 2
    before = sides(listed(images, known))
    put(images, {f"small/more-{i}.ppm": content for i, content in enumerate(contents[4:])})
    assert needed_exceptions(images, hashes(images), known, asked_never) == ([], [])
    assert sides(listed(images, known)).items() >= before.items()


def test_a_broken_file_or_a_conflicting_copy_never_takes_a_side(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    put(images, {"small/broken.ppm": b"P6 9 9 255\n", "large/copy.ppm": contents[4]})
    lines, _ = exceptions_of(images)
    assert lines[0] == SplitException(md5(contents[3]), TEST, "small")


def test_hidden_copies_make_no_class(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    expected = exceptions_of(images)
    put(images, {f".thumbnails/{i}.ppm": content for i, content in enumerate(contents)})
    put(images, {f"large/.cache/{i}.ppm": content for i, content in enumerate(contents)})
    assert exceptions_of(images) == expected


def test_a_class_below_the_minimum_gets_no_lines(tmp_path: Path) -> None:
    assert exceptions_of(with_large_class(tmp_path / "images", small=on(TRAIN, MINIMUM_PER_CLASS - 1))) == ([], [])


def test_a_given_layout_needs_no_lines(tmp_path: Path) -> None:
    assert exceptions_of(laid_out(tmp_path / "images", {"train": 3, "test": 3})) == ([], [])


def test_lines_are_only_ever_appended(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    write_exceptions(path, [])
    assert path.read_text() == "md5,split,label\n"
    write_exceptions(path, [SplitException("a", TEST, "cat, black")])
    before = path.read_bytes()
    write_exceptions(path, [])
    assert path.read_bytes() == before
    write_exceptions(path, [SplitException("b", VAL, "dog")])
    assert path.read_bytes() == before + b"b,val,dog\n"
    assert read_exceptions(path) == {"a": TEST, "b": VAL}


def test_a_last_line_that_an_editor_left_open_is_closed_first(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    path.write_text("md5,split,label\na,test,cat")
    write_exceptions(path, [SplitException("b", VAL, "dog")])
    assert read_exceptions(path) == {"a": TEST, "b": VAL}


def test_no_splits_csv_is_no_exception(tmp_path: Path) -> None:
    assert read_exceptions(tmp_path / "splits.csv") == {}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"md5,side,label\n", "md5,side,label"),
        (b"md5,split,label\na,testing,cat\n", "the side testing"),
        (b"md5,split,label\na\n", "the side None"),
        (b"a,test,cat\n", "a,test,cat"),
        (b"", "an empty file"),
        ("md5,split,label\n".encode("utf-16"), "'utf-8' codec can't decode"),
        (b"md5,split,label\n" + b"a" * 200_000, "field larger than"),
    ],
    ids=str,
)
def test_a_splits_csv_that_cannot_be_read_is_refused_with_the_way_back(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "splits.csv").write_bytes(content)
    with pytest.raises(
        DataError, match=r"expected the columns md5,split,label and the sides train, val, test .*`git checkout splits\.csv`"
    ) as caught:
        read_exceptions(tmp_path / "splits.csv")
    assert f", found {found}" in str(caught.value)


# --- manifest -------------------------------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back_as_it_was_written(make_images: Callable[..., Path], tmp_path: Path) -> None:
    images = make_images(classes=2, each=12)
    put(images, {"class0/a, b.txt": b"no", "stray.png": b"", "class1/ä\n.png": b"no"})
    shutil.copy(images / "class0/003.png", images / "class0/copy.png")
    manifest = listed(images, dict.fromkeys([r.md5 for r in listed(images).used(TEST)], TRAIN))
    assert manifest.remarks
    write_manifest(manifest, tmp_path / "m.parquet", tmp_path / "q.csv")
    assert read_manifest(tmp_path / "m.parquet", tmp_path / "q.csv") == manifest
    assert read_manifest(tmp_path / "m.parquet") == Manifest(manifest.rows, (), ())


def test_the_same_images_give_the_same_bytes(make_images: Callable[..., Path], tmp_path: Path) -> None:
    images = make_images(classes=2, each=12)
    put(images, {"class0/a.txt": b"no"})
    shutil.copytree(images, tmp_path / "again")
    for name, folder in (("one", images), ("two", tmp_path / "again")):
        write_manifest(listed(folder), tmp_path / f"{name}.parquet", tmp_path / f"{name}.csv")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_an_image_is_read_as_it_was_listed(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    row = listed(images).rows[0]
    assert np.array_equal(np.asarray(read(images, row)), np.asarray(paint(0, 0)))


def test_an_image_that_changed_after_it_was_listed_is_refused_with_the_way_back(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    row = listed(images).rows[0]
    paint(1, 99).save(images / row.path)
    with pytest.raises(DataChanged, match=rf"expected the image {row.path} as it was listed .* found other content .*dvc checkout"):
        read(images, row)


def test_an_image_that_is_gone_after_it_was_listed_is_refused_with_the_way_back(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    row = listed(images).rows[0]
    (images / row.path).unlink()
    with pytest.raises(DataChanged, match=rf"expected the image {row.path}, .* gone.*dvc checkout"):
        read(images, row)


def test_a_listed_image_that_cannot_be_read_is_refused_with_the_way_out(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    row = listed(images).rows[0]
    (images / row.path).unlink()
    (images / row.path).mkdir()
    with pytest.raises(
        DataError, match=rf"expected an image at {images / row.path}, but it cannot be read: Is a directory\. Make it readable"
    ):
        read(images, row)


@pytest.mark.parametrize("at_least", [None, 8])
@pytest.mark.parametrize(
    "content", [encoded(paint(0, 0, 64), "JPEG")[:-300], encoded(paint(0, 0))[:100], b"nothing like an image"], ids=("jpeg", "png", "text")
)
def test_a_listed_image_that_this_decoder_refuses_is_named_with_the_way_out(content: bytes, at_least: int | None, tmp_path: Path) -> None:
    """Another version of Pillow may have listed it."""
    (tmp_path / "picture.jpg").write_bytes(content)
    row = Row("picture.jpg", md5(content), "", "", 64, 64, "RGB", "")
    with pytest.raises(
        DataError,
        match=r"expected an image at .*picture\.jpg, but it cannot be read: (broken: .+|not an image)\. Replace it or leave it out",
    ):
        read(tmp_path, row, at_least)


# --- large JPEG files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("side", "share"), [(48, 1 / 64), (100, 1 / 16), (200, 1 / 4), (400, 1)])
def test_a_jpeg_is_decoded_no_larger_than_it_is_needed_and_to_the_same_picture(side: int, share: float, orientation: int) -> None:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(coarse.resize((1200, 800), Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)
    full, scaled = decode(content), decode(content, 2 * side)
    assert min(scaled.size) >= 2 * side
    assert scaled.width * scaled.height == pytest.approx(full.width * full.height * share, rel=0.02)
    transforms = Transforms(side, side, (0.5,) * 3, (0.5,) * 3, "bilinear")
    one, other = (prepare(image, transforms).astype(int) for image in (full, scaled))
    assert np.abs(one - other).mean() < 1.5
    assert np.abs(one - other).max() < 24


# --- folders that cannot be used ------------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "images")
    assert f"expected a folder of images at {tmp_path / 'images'}, found nothing" in text
    assert "Put one folder per class there, or set data.images" in text


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").write_bytes(b"x")
    assert "found a file" in refusal(tmp_path / "images")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    text = refusal(tmp_path / "images")
    assert "expected images in" in text
    assert "found an empty folder. Put one folder of images per class there." in text


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    text = refusal(put(tmp_path / "images", {"a.ppm": tiny(1), "b.ppm": tiny(2)}))
    assert "expected class folders in" in text
    assert "found 2 files and no folder. Sort the images as images/<class>/<image>." in text


def test_a_single_class_is_refused(make_images: Callable[..., Path]) -> None:
    text = refusal(make_images(classes=1))
    assert "expected at least two classes in" in text
    assert "found one with usable images: class0. Add a folder" in text


def test_a_class_of_two_images_is_refused(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    put(images, {"few/a.ppm": tiny(1), "few/b.ppm": tiny(2), "few/copy.ppm": tiny(2), "few/broken.ppm": b"x"})
    text = refusal(images)
    assert "expected at least 3 distinct usable images in each class, found few: 2 in" in text
    assert "(1 files were rejected). Add images to these classes or remove their folders." in text


def test_a_class_of_which_nothing_can_be_used_is_refused_not_forgotten(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    put(images, {"third/a.png": b"x", "third/b.png": b""})
    assert "expected at least 3 distinct usable images in each class, found third: 0 in" in refusal(images)


def test_a_folder_of_broken_files_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    text = refusal(put(tmp_path / "images", {"a/1.png": b"", "a/2.png": b"x", "b/1.png": b"y"}))
    assert "expected images in" in text
    assert "none of its 3 files can be used (not an image: 2, empty file: 1)" in text
    assert "The first: a/1.png: empty file. Put readable images there" in text


def test_a_folder_whose_classes_are_copies_of_each_other_is_refused(tmp_path: Path) -> None:
    text = refusal(put(tmp_path / "images", {f"{label}/{i}.ppm": tiny(i) for label in "ab" for i in range(4)}))
    assert "none of its 8 files can be used (the same image in several classes: 8)" in text
    assert "each in one class folder only" in text


def test_a_small_class_without_training_images_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    text = refusal(with_large_class(tmp_path / "images", small=on(TEST, 3)))
    assert "expected training images for each class" in text
    assert "found none for small. Run `tlpipeline data commit`" in text


def test_a_link_to_nothing_is_refused_rather_than_silently_left_out(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    (images / "class0" / "link.png").symlink_to("nowhere")
    text = refusal(images)
    assert "found 1 links to nothing or devices, such as" in text
    assert "link.png. Remove them, or restore" in text


def test_a_file_name_that_is_no_utf_8_is_refused(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    images = make_images(classes=2, each=12)
    # Not every file system takes such a name.
    monkeypatch.setattr(os, "walk", lambda *_, **__: [(str(images / "class0"), [], [os.fsdecode(b"caf\xe9.png")])])
    text = refusal(images)
    assert "expected file names in UTF-8" in text
    assert "caf\\xe9.png'. Rename them." in text


def test_an_image_that_may_not_be_read_is_refused_before_a_folder_is_taken_over(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    from tlpipeline import workspaces

    folder, honest = make_images(2, 3), Path.read_bytes

    def forbidden(path: Path) -> bytes:
        if path.name == "001.png":
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=r"expected to read the image .*001\.png, but: Permission denied\. Make it readable"):
        workspaces._preview(folder)


def test_an_image_that_may_not_be_read_is_refused(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    images = make_images(classes=2, each=12)
    honest = Path.read_bytes

    def forbidden(path: Path) -> bytes:
        if path.name == "003.png":
            raise PermissionError(13, "Permission denied")
        return honest(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    text = refusal(images)
    assert "003.png, but: Permission denied. Make it readable or remove it" in text


# --- the embedded sample --------------------------------------------------------------------------------------------------------------


def test_the_embedded_sample_has_ten_classes_and_a_side_of_each_kind(digits: Path) -> None:
    manifest = listed(digits)
    assert len(manifest.rows) == 1797
    assert manifest.classes == tuple("0123456789")
    assert not manifest.rejected
    assert not manifest.remarks
