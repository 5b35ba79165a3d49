"""Inputs are what the weights were trained on, each image once and in order."""

import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ConvNeXt_Tiny_Weights, EfficientNet_B0_Weights, SqueezeNet1_0_Weights, Swin_T_Weights

from tests.helpers.images import PLAIN
from tlpipeline.data import dataset, decoding, loader, splits
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import DecodedCache, Images, batch_ranges, normalize, rank_slice, resize_and_crop, resized_cache, square_cache
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import DataChanged

CPU = torch.device("cpu")


# --- inputs ---------------------------------------------------------------------------------------------------------------------------


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("side", [None, 64, 111])
@pytest.mark.parametrize("weights", [SqueezeNet1_0_Weights, ConvNeXt_Tiny_Weights, EfficientNet_B0_Weights, Swin_T_Weights])
def test_an_input_is_what_the_weights_own_transforms_give(weights: Any, side: int | None) -> None:
    preset = weights.DEFAULT.transforms()
    mine = Transforms(preset.crop_size[0], preset.resize_size[0], tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    if side is not None:
        mine = mine.at(side)
        preset = weights.DEFAULT.transforms(crop_size=side, resize_size=mine.resize)
    for size in ((300, 200), (200, 300), (256, 256), (mine.size, mine.size), (99, 31), (31, 100), (257, 256), (7, 300)):
        image = noise(*size)
        pixels = resize_and_crop(image, mine)
        assert pixels.shape == (mine.size, mine.size, 3)
        assert pixels.dtype == np.uint8
        assert torch.allclose(normalize(torch.from_numpy(np.stack([pixels])), mine)[0], preset(image), atol=1e-6), size


@pytest.mark.parametrize("size", [(20_000, 4), (4, 20_000)])
def test_a_line_of_pixels_is_not_enlarged_as_a_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is its middle, which is all that is looked at."""
    image, sides = noise(*size), []
    plain = Image.Image.resize

    def resize(self: Image.Image, to: tuple[int, int], *rest: Any) -> Image.Image:
        sides.append(max(to))
        return plain(self, to, *rest)

    monkeypatch.setattr(Image.Image, "resize", resize)
    found = resize_and_crop(image, PLAIN)
    assert max(sides) == 128 * 32
    whole = plain(image, tuple(side // 4 * 32 for side in size), Image.Resampling.BILINEAR)
    left, top = ((side - 32) // 2 for side in whole.size)
    assert (found == np.asarray(whole.crop((left, top, left + 32, top + 32)))).all()


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = noise(32, 32)
    assert (resize_and_crop(image, PLAIN) == np.asarray(image)).all()


def test_normalizing_is_per_channel() -> None:
    white = normalize(torch.full((1, 4, 4, 3), 255, dtype=torch.uint8), PLAIN)
    assert white[0, :, 0, 0].tolist() == pytest.approx([0.5 / 0.2, 0.6 / 0.3, 0.7 / 0.4])
    assert white.shape == (1, 3, 4, 4)


# --- images ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_batches_come_in_order_with_each_image_as_it_is(listed: tuple[Path, list[Row]], ahead: int) -> None:
    folder, rows = listed
    order = np.random.default_rng(0).permutation(len(rows))
    batches = [[int(i) for i in order[start : start + 4]] for start in range(0, len(rows), 4)]
    given = list(Images(folder, rows, PLAIN).batches(batches, ahead))
    assert [list(indices) for indices, _ in given] == batches
    for indices, pixels in given:
        for index, found in zip(indices, pixels, strict=True):
            assert (found.numpy() == resize_and_crop(dataset.read_image(folder, rows[index]), PLAIN)).all()


def test_consecutive_batches_hold_each_index_once() -> None:
    assert [list(batch) for batch in batch_ranges(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batch_ranges(0, 3) == []


def test_training_changes_each_image_by_its_index_and_keeps_what_it_decoded(listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    seen: list[int] = []

    def turned(image: Image.Image, row: Row, side: int, turn: int) -> Image.Image:
        seen.append(rows.index(row))
        assert turn == 0
        return image.resize((side, side)).transpose(Image.Transpose.ROTATE_90)

    decoded = square_cache(Store(), folder, 32)
    decoded.fill(rows, lambda done: None)
    decoded.open(rows)
    images = Images(folder, rows, PLAIN, turned, decoded)
    (_, first), *_ = images.batches([range(len(rows))])
    assert sorted(seen) == list(range(len(rows)))
    assert (first[3].numpy() == np.rot90(resize_and_crop(dataset.read_image(folder, rows[3]), PLAIN))).all()
    for row in rows:
        (folder / row.path).unlink()
    (_, again), *_ = images.batches([range(len(rows))])  # the second epoch reads no file
    assert torch.equal(first, again)


def test_who_stops_early_does_not_wait_for_what_was_to_be_decoded_ahead(
    listed: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = listed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # so that two threads decode
    seen: list[str] = []
    stopped = threading.Event()

    def slow(image: Image.Image, row: Row, side: int, turn: int) -> Image.Image:
        seen.append(row.path)
        if row != rows[0]:
            stopped.wait(60)
        return image

    batches = Images(folder, rows, PLAIN, slow).batches(batch_ranges(len(rows), 1), ahead=100)
    next(batches)
    threading.Timer(0.2, stopped.set).start()
    batches.close()
    assert len(seen) <= 3  # the one that was asked for, and what two threads were at


def test_an_image_that_comes_back_is_asked_for_by_its_turn(listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    seen: set[tuple[str, int]] = set()

    def noted(image: Image.Image, row: Row, side: int, turn: int) -> Image.Image:
        seen.add((row.path, turn))
        return image

    count = len(rows)
    list(Images(folder, rows, PLAIN, noted).batches([[0, count], [2 * count + 1]]))
    assert seen == {(rows[0].path, 0), (rows[0].path, 1), (rows[1].path, 2)}


def test_a_squeezed_image_is_averaged_and_not_sampled(listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    wanted = dataset.read_image(folder, rows[0]).resize((10, 10), Image.Resampling.BILINEAR)
    assert (square_cache(Store(), folder, 10).pixels(rows[0]) == np.asarray(wanted)).all()


def test_what_another_run_decoded_meanwhile_is_not_decoded_again(listed: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = listed
    mine, other = (square_cache(Store(tmp_path / "cache", shard_rows=8), folder, 32) for _ in range(2))
    assert not mine.column.has([row.md5 for row in rows]).any()
    other.fill(rows[:9], lambda done: None)
    told: list[int] = []
    mine.fill(rows, told.append)
    assert told == [8, 12]  # of the twelve that are left
    mine.open(rows)


def test_an_image_that_is_not_kept_is_made_to_the_same_pixels(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=2, each=4, size=100)
    rows = dataset.ingest(folder, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)
    for make in (lambda store: square_cache(store, folder, 46), lambda store: resized_cache(store, folder, PLAIN)):
        kept, made = make(Store()), make(Store())
        kept.fill(rows[:5], lambda done: None)
        kept.open(rows[:5])
        assert all((kept.pixels(row) == made.pixels(row)).all() for row in rows)
        assert not made.column.has([row.md5 for row in rows]).any()


@pytest.mark.parametrize(("may_use", "threads"), [({0, 2, 5}, 3), ({4}, 2)])
def test_as_many_threads_decode_as_this_process_may_use_cpus_and_two_at_least(
    may_use: set[int], threads: int, listed: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = listed
    all_at_work, decoding_in = threading.Barrier(threads, timeout=60), []

    def augmented(image: Image.Image, *_: Any) -> Image.Image:
        decoding_in.append(threading.get_ident())
        all_at_work.wait()
        return image

    def made(row: Row) -> np.ndarray:
        return np.asarray(augmented(dataset.read_image(folder, row)))

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: may_use, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    count = 4 * threads
    list(Images(folder, rows[:count], PLAIN, augmented).batches([range(count)]))
    assert len(set(decoding_in)) == threads
    decoding_in.clear()
    DecodedCache(Store(), 32, made, "key", "label").fill(rows[:count], lambda done: None)
    assert len(set(decoding_in)) == threads


def test_an_image_that_changed_since_it_was_listed_stops_the_batches(listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    (folder / rows[5].path).write_bytes((folder / rows[6].path).read_bytes())
    batches = Images(folder, rows, PLAIN).batches(batch_ranges(len(rows), 2))
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataChanged, match=rows[5].path):
        next(batches)


def test_images_that_are_kept_decoded_are_known_by_all_that_makes_their_pixels(listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    store = Store()
    made = [square_cache(store, folder, side) for side in (32, 33)]
    made += [
        resized_cache(store, folder, replace(PLAIN, **change))
        for change in ({}, {"resize": 40}, {"size": 24}, {"interpolation": "bicubic"})
    ]
    for decoded in made:
        assert not decoded.column.has([rows[0].md5])[0]
        decoded.fill(rows[:1], lambda done: None)
        decoded.open(rows[:1])
        assert decoded.pixels(rows[0]).shape == (decoded.side, decoded.side, 3)
    again = resized_cache(store, folder, replace(PLAIN, mean=(0.0, 0.0, 0.0)))  # what comes after the pixels plays no part
    assert again.column.has([rows[0].md5])[0]


def test_files_are_decoded_no_larger_than_they_are_needed(make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_images(classes=2, each=3, size=512)
    row = dataset.ingest(folder, {}, lambda done, total: None).rows[0]
    asked: list[int | None] = []
    plain = decoding.decode

    def noted(content: bytes, at_least: int | None = None, **others: Any) -> Image.Image:
        asked.append(at_least)
        return plain(content, at_least, **others)

    monkeypatch.setattr(dataset, "decode", noted)
    next(iter(Images(folder, [row], PLAIN).batches([[0]])))
    next(iter(Images(folder, [row], PLAIN, lambda image, *_: image.resize((32, 32))).batches([[0]])))
    resized_cache(Store(), folder, PLAIN).pixels(row)
    square_cache(Store(), folder, 96).pixels(row)
    assert asked == [64, 128, 64, 192]


def test_the_seconds_that_a_batch_is_waited_for_are_counted(make_images: Callable[..., Path]) -> None:
    """By a clock that goes on by a second at each look: two looks a batch."""
    now = itertools.count()
    folder = make_images(classes=2, each=6)
    rows = list(dataset.ingest(folder, {}, lambda done, total: None).rows)
    images = Images(folder, rows, PLAIN, clock=lambda: float(next(now)))
    assert len(list(images.batches(batch_ranges(12, 3)))) == 4
    assert images.waited == 4.0


def test_workers_of_one_machine_share_its_cpus_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert loader.decoding_threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader.decoding_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert loader.decoding_threads() == 2


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 17])
def test_the_shares_of_all_workers_hold_each_index_once(workers: int, count: int) -> None:
    shares = [rank_slice(count, rank, workers) for rank in range(workers)]
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
