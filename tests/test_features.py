"""Features: inputs as the weights were trained on, each image once and in order, blocks that count alike."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ConvNeXt_Tiny_Weights, EfficientNet_B0_Weights, SqueezeNet1_0_Weights, Swin_T_Weights

from tlpipeline import backbones, cutting, dataset, features
from tlpipeline.cache import Store
from tlpipeline.cutting import Tap, Transforms
from tlpipeline.dataset import Row
from tlpipeline.errors import ClusterError, DataChanged
from tlpipeline.features import (
    MAX_WIDTH,
    Images,
    extract,
    in_batches,
    normalise,
    pool,
    prepare,
    prepared,
    reading,
    scaling,
    shard,
    squeezed,
)

PLAIN = Transforms(32, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
CPU = torch.device("cpu")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def listed(make_images: Callable[..., Path]) -> tuple[Path, list[Row]]:
    folder = make_images(classes=3, each=7)
    return folder, dataset.ingest(folder, {}, lambda done, total: None).used(*dataset.SIDES)


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
        pixels = prepare(image, mine)
        assert pixels.shape == (mine.size, mine.size, 3)
        assert pixels.dtype == np.uint8
        assert torch.allclose(normalise(torch.from_numpy(np.stack([pixels])), mine)[0], preset(image), atol=1e-6), size


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = noise(32, 32)
    assert (prepare(image, PLAIN) == np.asarray(image)).all()


def test_normalising_is_per_channel() -> None:
    white = normalise(torch.full((1, 4, 4, 3), 255, dtype=torch.uint8), PLAIN)
    assert white[0, :, 0, 0].tolist() == pytest.approx([0.5 / 0.2, 0.6 / 0.3, 0.7 / 0.4])
    assert white.shape == (1, 3, 4, 4)


# --- pooling --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "side", "grids"),
    [
        (64, 8, (1, 2, 4)),
        (64, 4, (1, 2, 4)),
        (64, 3, (1, 2)),
        (64, 1, (1,)),
        (146, 8, (1, 2, 4)),
        (147, 8, (1, 2)),  # 147 * (1 + 4 + 16) > 3072
        (614, 8, (1, 2)),
        (615, 8, (1,)),
        (4096, 1, (1,)),
    ],
)
def test_a_head_reads_no_finer_than_the_maps_and_no_wider_than_the_limit(channels: int, side: int, grids: tuple[int, ...]) -> None:
    read = reading(Tap("tap", channels, side, side, 0, 0))
    assert read.grids == grids
    assert sum(read.blocks) == pool(torch.zeros(2, channels, side, side), grids).shape[1]
    assert sum(read.blocks) <= max(MAX_WIDTH, channels)


def test_maps_that_are_not_square_are_read_by_their_short_side() -> None:
    assert reading(Tap("tap", 8, 2, 9, 0, 0)).grids == (1, 2)


def test_pooling_averages_over_each_field_of_each_grid() -> None:
    maps = randn(3, 5, 8, 8)
    pooled = pool(maps, (1, 2, 4))
    fields = [maps.reshape(3, 5, grid, 8 // grid, grid, 8 // grid).mean((3, 5)).flatten(1) for grid in (1, 2, 4)]
    assert torch.allclose(pooled, torch.cat(fields, 1), atol=1e-6)


def test_pooling_leaves_vectors_alone() -> None:
    vectors = randn(3, 5)
    assert pool(vectors, (1,)) is vectors


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
            assert (found.numpy() == prepare(dataset.read(folder, rows[index]), PLAIN)).all()


def test_consecutive_batches_hold_each_index_once() -> None:
    assert [list(batch) for batch in in_batches(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert in_batches(0, 3) == []


def test_training_changes_each_image_by_its_index_and_keeps_what_it_decoded(listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    seen: list[int] = []

    def turned(image: Image.Image, row: Row, side: int, turn: int) -> Image.Image:
        seen.append(rows.index(row))
        assert turn == 0
        return image.resize((side, side)).transpose(Image.Transpose.ROTATE_90)

    decoded = squeezed(Store(), folder, 32)
    decoded.fill(rows, lambda done: None)
    decoded.open(rows)
    images = Images(folder, rows, PLAIN, turned, decoded)
    (_, first), *_ = images.batches([range(len(rows))])
    assert sorted(seen) == list(range(len(rows)))
    assert (first[3].numpy() == np.rot90(prepare(dataset.read(folder, rows[3]), PLAIN))).all()
    for row in rows:
        (folder / row.path).unlink()
    (_, again), *_ = images.batches([range(len(rows))])  # the second epoch reads no file
    assert torch.equal(first, again)


def test_an_image_that_is_not_kept_is_made_to_the_same_pixels(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=2, each=4, size=100)
    rows = dataset.ingest(folder, {}, lambda done, total: None).used(*dataset.SIDES)
    for make in (lambda store: squeezed(store, folder, 46), lambda store: prepared(store, folder, PLAIN)):
        kept, made = make(Store()), make(Store())
        kept.fill(rows[:5], lambda done: None)
        kept.open(rows[:5])
        assert all((kept.pixels(row) == made.pixels(row)).all() for row in rows)
        assert not made.column.has([row.md5 for row in rows]).any()


@pytest.mark.parametrize(("may_use", "threads"), [({0, 2, 5}, 3), ({4}, 2)])
def test_as_many_threads_decode_as_this_process_may_use_cpus_and_two_at_least(
    may_use: set[int], threads: int, listed: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            started.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: may_use, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(features, "ThreadPoolExecutor", Pool)
    folder, rows = listed
    list(Images(folder, rows, PLAIN).batches([[0, 1]]))
    squeezed(Store(), folder, 32).fill(rows[:2], lambda done: None)
    assert started == [1, threads, threads]  # one puts batches together


def test_an_image_that_changed_since_it_was_listed_stops_the_batches(listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    (folder / rows[5].path).write_bytes((folder / rows[6].path).read_bytes())
    batches = Images(folder, rows, PLAIN).batches(in_batches(len(rows), 2))
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataChanged, match=rows[5].path):
        next(batches)


# --- extraction -----------------------------------------------------------------------------------------------------------------------


def extracted(listed: tuple[Path, list[Row]]) -> list[torch.Tensor]:
    net = backbones.load("nets:resnet20", "none")
    trunk = cutting.cut(net, ["layer1.2", "layer3.2"], logits=True)
    return extract(trunk, [(1, 2), (1,)], Images(*listed, net.transforms), CPU, lambda _: None)


def test_files_are_decoded_no_larger_than_they_are_needed(make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_images(classes=2, each=3, size=512)
    row = dataset.ingest(folder, {}, lambda done, total: None).rows[0]
    asked: list[int | None] = []
    plain = dataset.decode

    def noted(content: bytes, at_least: int | None = None) -> Image.Image:
        asked.append(at_least)
        return plain(content, at_least)

    monkeypatch.setattr(dataset, "decode", noted)
    next(iter(Images(folder, [row], PLAIN).batches([[0]])))
    next(iter(Images(folder, [row], PLAIN, lambda image, *_: image.resize((32, 32))).batches([[0]])))
    prepared(Store(), folder, PLAIN).pixels(row)
    squeezed(Store(), folder, 96).pixels(row)
    assert asked == [64, 128, 64, 192]


def test_the_seconds_that_a_batch_is_waited_for_are_counted(make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second at each look: two looks a batch."""
    now = itertools.count()
    monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    folder = make_images(classes=2, each=6)
    images = Images(folder, list(dataset.ingest(folder, {}, lambda done, total: None).rows), PLAIN)
    assert len(list(images.batches(in_batches(12, 3)))) == 4
    assert images.waited == 4.0


def test_memory_that_runs_out_in_a_pass_is_a_clear_error(make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way to the GPU, too."""
    folder = make_images(classes=2, each=3)
    images = Images(folder, list(dataset.ingest(folder, {}, lambda done, total: None).rows), PLAIN)

    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ClusterError, match=r"expected room in the GPU's memory for a forward pass of 16 images of 32 pixels"):
        list(features.passes(full, images, range(3), CPU))
    monkeypatch.setattr(features, "normalise", full)
    with pytest.raises(ClusterError, match=r"Set data\.size lower"):
        list(features.passes(lambda inputs: [inputs], images, range(3), CPU))


def test_workers_of_one_machine_share_its_cpus_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "cpus", lambda: 16)
    assert features._threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert features._threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert features._threads() == 2


def test_features_of_an_image_are_the_same_bits_whatever_else_is_asked_about(listed: tuple[Path, list[Row]]) -> None:
    """What is kept and what is computed anew must be the same: a cache that changed results would be worse than none."""
    folder, rows = listed
    all_at_once = extracted(listed)
    assert [part.shape for part in all_at_once] == [(21, 80), (21, 64), (21, 10)]
    for some in ([20], list(range(3, 12)), list(range(20, -1, -1))):
        for whole, part in zip(all_at_once, extracted((folder, [rows[i] for i in some])), strict=True):
            assert torch.equal(whole[some], part)


def test_progress_counts_every_image(listed: tuple[Path, list[Row]]) -> None:
    told: list[int] = []
    trunk = cutting.cut(backbones.load("demonstration", "none"), ["conv1"])
    extract(trunk, [(1,)], Images(*listed, PLAIN), CPU, told.append)
    assert told == [16, 21]


def test_no_images_give_features_of_the_usual_width(listed: tuple[Path, list[Row]]) -> None:
    assert [part.shape for part in extracted((listed[0], []))] == [(0, 80), (0, 64), (0, 10)]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 17])
def test_the_shares_of_all_workers_hold_each_index_once(workers: int, count: int) -> None:
    shares = [shard(count, rank, workers) for rank in range(workers)]
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- scaling --------------------------------------------------------------------------------------------------------------------------


def test_each_block_has_a_total_variance_of_one() -> None:
    features = randn(200, 60) * torch.logspace(-3, 3, 60) + 5
    scaled = scaling(features[:, :10], [10])(features[:, :10])
    assert scaled.mean(0).abs().max() < 1e-9
    blocks = [4, 20, 36]
    live = randn(200, 60) * torch.tensor([100.0] * 4 + [1.0] * 20 + [0.01] * 36)
    for part in torch.split(scaling(live, blocks)(live), blocks, dim=1):
        assert part.var(0, unbiased=False).sum() == pytest.approx(1, abs=1e-9)


def test_dead_channels_stay_dead_and_nearly_dead_ones_do_not_explode() -> None:
    features = randn(100, 8)
    features[:, 2] = 3.0
    features[:, 5] = 1.0 + 1e-6 * randn(100)
    scaled = scaling(features, [8])(features)
    assert scaled.isfinite().all()
    assert scaled[:, 2].abs().max() < 1e-6
    assert scaled[:, 5].std() < 0.01 * scaled[:, 0].std()
    assert scaled.var(0, unbiased=False).sum() == pytest.approx(6 / 8, abs=1e-4)


@pytest.mark.parametrize("features", [torch.zeros(10, 4), torch.full((10, 4), 7.0), randn(1, 4)])
def test_blocks_without_any_variance_are_survived(features: torch.Tensor) -> None:
    assert scaling(features, [1, 3])(features).abs().max() == 0


def test_scaling_is_that_of_the_images_it_was_measured_on() -> None:
    features = randn(50, 6)
    scale = scaling(features, [2, 4])
    assert torch.allclose(scale(features[:1]), scale(features)[:1])
