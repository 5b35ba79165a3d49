"""Images on disk: quarantine with a reason, copies once, given layouts, and errors that show the way out."""

import io
import os
import random
import re
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.datasets import hashes, laid_out, listed, md5, on, put, sides, tiny, with_large_class
from tests.helpers.images import encoded, paint
from tlpipeline.data import dataset, decoding
from tlpipeline.data.dataset import Manifest, Row, ingest, read_image, read_manifest, write_manifest
from tlpipeline.data.facts import FactStore
from tlpipeline.data.sources import Source
from tlpipeline.data.splits import TEST, TRAIN, VAL, split_of
from tlpipeline.errors import DataChanged, DataError


def reasons(manifest: Manifest) -> dict[str, str]:
    return {r.path: r.reason for r in manifest.rejected}


def refusal(images: Path) -> str:
    with pytest.raises(DataError) as caught:
        listed(images)
    return str(caught.value)


def tiny_on(side: str, start: int = 0) -> bytes:
    """Return a small image whose content puts it on this side."""
    return next(content for content in map(tiny, range(start, start + 10_000)) if split_of(md5(content)) == side)


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
    assert found["class1/notes.txt"].startswith("not an image: the formats are JPEG, PNG, ")
    assert found["class1/page.png"].startswith("a web page")
    assert found["class1/no-pixels.ppm"].startswith("not an image: ")
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

    plain = Image.open

    def opened(file: Any, *rest: Any, **more: Any) -> Image.Image:
        if isinstance(file, io.BytesIO) and file.getvalue() == unlucky:
            raise error
        return plain(file, *rest, **more)

    monkeypatch.setattr(Image, "open", opened)
    manifest = listed(images)
    assert reasons(manifest) == {"class0/000.png": f"broken: {error}"}
    assert len(manifest.rows) == 23


def test_a_machine_out_of_memory_costs_no_image(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> Image.Image:
        raise MemoryError

    images = make_images(classes=2, each=3)
    monkeypatch.setattr(Image, "open", full)
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


# --- a given layout -------------------------------------------------------------------------------------------------------------------


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
        assert row.split == (TEST if given == "test" else split_of(row.md5, carve_val=True))
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
    assert [r for r in manifest.remarks if r.startswith("copies")] == [
        "copies: 2 distinct test images are also in train, byte for byte; they are used in test only"
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
    assert manifest.remarks == ("copies: 1 distinct val images are also in train, byte for byte; they are used in val only",)
    assert md5(path.read_bytes()) not in {r.md5 for r in manifest.used(TRAIN)}


def test_a_copy_within_one_given_side_is_no_leak(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "images", {"train": 5, "val": 4, "test": 3})
    shutil.copy(sorted((images / "train" / "cat").iterdir())[0], images / "train" / "cat" / "again.ppm")
    assert not listed(images).remarks


def test_a_file_beside_the_classes_of_a_given_layout_is_left_out(tmp_path: Path) -> None:
    images = put(laid_out(tmp_path / "images", {"train": 5, "val": 4, "test": 3}), {"train/stray.ppm": tiny(9999), "readme": b"x"})
    assert reasons(listed(images)) == dict.fromkeys(["train/stray.ppm", "readme"], "outside any class folder")


@pytest.mark.parametrize("layout", [{"val": 5, "test": 5}, {"train": 5, "test": 5, "unlabeled": 5}])
def test_half_a_layout_of_sides_is_refused_instead_of_taken_for_classes(tmp_path: Path, layout: dict[str, int]) -> None:
    text = refusal(laid_out(tmp_path / "images", layout))
    assert "expected the folders train, test and optionally val" in text
    assert f"found {', '.join(sorted(layout))}" in text
    assert "sort the images by class" in text


def test_a_class_without_training_images_in_a_given_layout_is_refused_with_the_way_out(tmp_path: Path) -> None:
    images = put(laid_out(tmp_path / "images", {"train": 5, "val": 4, "test": 3}), {f"test/owl/{i}.ppm": tiny(5000 + i) for i in range(3)})
    text = refusal(images)
    assert "none for owl" in text
    assert "into the folder train" in text


def test_a_turned_image_is_listed_with_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {f"{label}/{i}.png": encoded(paint(label, i).crop((0, 0, 32, 20)), exif=exif) for label in (0, 1) for i in range(20)}
    assert {(r.width, r.height) for r in listed(put(tmp_path / "images", contents)).rows} == {(20, 32)}


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
    assert np.array_equal(np.asarray(read_image(images, row)), np.asarray(paint(0, 0)))


def test_an_image_that_changed_after_it_was_listed_is_refused_with_the_way_back(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    row = listed(images).rows[0]
    paint(1, 99).save(images / row.path)
    with pytest.raises(DataChanged, match=rf"expected the image {row.path} as it was listed .* found other content .*dvc checkout"):
        read_image(images, row)


def test_an_image_that_is_gone_after_it_was_listed_is_refused_with_the_way_back(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    row = listed(images).rows[0]
    (images / row.path).unlink()
    with pytest.raises(DataChanged, match=rf"expected the image {row.path}, .*no such file.*dvc checkout"):
        read_image(images, row)


def test_a_listed_image_that_cannot_be_read_is_refused_with_the_way_out(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    row = listed(images).rows[0]
    (images / row.path).unlink()
    (images / row.path).mkdir()
    with pytest.raises(
        DataError, match=rf"Cannot read the image {images / row.path}: it is a folder, a pipe or a device, .*Make it readable"
    ):
        read_image(images, row)


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
        match=r"Cannot decode the image .*picture\.jpg: (broken: .+|not an image: .+)\. Replace or remove it",
    ):
        read_image(tmp_path, row, at_least)


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
    assert "found 2 files and no folder. Sort the images as images/<class>/<image>, or name a table" in text


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
    assert "each in only one class folder" in text


def test_a_small_class_without_training_images_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    text = refusal(with_large_class(tmp_path / "images", small=on(TEST, 3)))
    assert "expected training images for each class" in text
    assert "found none for small. Run `tlpipeline data commit`" in text


def test_a_link_to_nothing_is_refused_rather_than_silently_left_out(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    (images / "class0" / "link.png").symlink_to("nowhere")
    text = refusal(images)
    assert "found 1 broken links or devices, such as" in text
    assert "link.png. Remove them, or restore" in text


def test_links_that_lead_round_in_circles_are_refused_at_once(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=12)
    for name in ("a", "b"):
        (images / name).symlink_to(".")
    text = refusal(images)
    assert re.search(rf"expected each folder in {images} once, found {images}/[ab], which leads to {images} again. Remove the link", text)


def test_a_class_that_links_to_another_is_refused_and_one_that_links_elsewhere_is_listed(make_images: Callable[..., Path]) -> None:
    images, elsewhere = make_images(classes=2, each=12), make_images(classes=3, each=12, name="elsewhere")
    (images / "linked").symlink_to(elsewhere / "class2")
    assert len(listed(images).rows) == 36
    (images / "again").symlink_to(elsewhere / "class2")
    assert "linked" in refusal(images)
    assert "again" in refusal(images)


def test_a_pipe_a_device_and_what_is_too_large_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(decoding.MAX_BYTES + 1)
    for path, why in ((tmp_path / "pipe", "pipe or a device"), (Path("/dev/zero"), "pipe or a device"), (tmp_path / "sparse", "2.1 GB")):
        with pytest.raises(DataError, match=f"Cannot read the image {path}: it .*{why}"):
            decoding.read_content(path)


def test_a_file_name_that_is_no_utf_8_is_refused(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    images = make_images(classes=2, each=12)
    plain = os.scandir

    def scandir(folder: Any) -> Any:
        """List another file, whose name not every file system takes."""
        with plain(folder) as entries:
            listed = list(entries)
        if Path(folder).name == "class0":
            name = os.fsdecode(b"caf\xe9.png")
            path = str(images / "class0" / name)
            listed.append(SimpleNamespace(name=name, path=path, is_dir=lambda: False, is_file=lambda: True, is_symlink=lambda: False))  # type: ignore[arg-type]
        return nullcontext(listed)

    monkeypatch.setattr(os, "scandir", scandir)
    text = refusal(images)
    assert "expected file names in UTF-8" in text
    assert "caf\\xe9.png'. Rename them." in text


def test_an_image_that_may_not_be_read_is_refused_before_a_folder_is_taken_over(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    from tlpipeline.workspace import create

    folder, honest = make_images(2, 3), Path.read_bytes

    def forbidden(path: Path) -> bytes:
        if path.name == "001.png":
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=r"Cannot read the image .*001\.png: Permission denied\. Make it readable"):
        create.planned_splits(folder, dataset.list_files(folder), Source(folder), FactStore(), lambda done, total: None)


def test_an_image_that_may_not_be_read_is_refused(make_images: Callable[..., Path], monkeypatch: Any) -> None:
    images = make_images(classes=2, each=12)
    honest = Path.read_bytes

    def forbidden(path: Path) -> bytes:
        if path.name == "003.png":
            raise PermissionError(13, "Permission denied")
        return honest(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    text = refusal(images)
    assert "003.png: Permission denied. Make it readable or remove it" in text


# --- the embedded sample --------------------------------------------------------------------------------------------------------------


def test_the_embedded_sample_has_ten_classes_and_a_side_of_each_kind(digits: Path) -> None:
    manifest = listed(digits)
    assert len(manifest.rows) == 1797
    assert manifest.classes == tuple("0123456789")
    assert not manifest.rejected
    assert not manifest.remarks
