"""Features: pooled over grids, the same bits whatever else is asked about, blocks that count alike."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.images import PLAIN
from tlpipeline.backbones import catalogue, features
from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.features import MAX_WIDTH, FeatureExtractor, extract, pool, pooling_at, scaling
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.taps import Tap
from tlpipeline.data import dataset
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images
from tlpipeline.errors import BackboneError, ClusterError

CPU = torch.device("cpu")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


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
    read = pooling_at(Tap("tap", channels, side, side, 0, 0))
    assert read.grids == grids
    assert sum(read.blocks) == pool(torch.zeros(2, channels, side, side), grids).shape[1]
    assert sum(read.blocks) <= max(MAX_WIDTH, channels)


def test_maps_that_are_not_square_are_read_by_their_short_side() -> None:
    assert pooling_at(Tap("tap", 8, 2, 9, 0, 0)).grids == (1, 2)


def test_pooling_averages_over_each_field_of_each_grid() -> None:
    maps = randn(3, 5, 8, 8)
    pooled = pool(maps, (1, 2, 4))
    fields = [maps.reshape(3, 5, grid, 8 // grid, grid, 8 // grid).mean((3, 5)).flatten(1) for grid in (1, 2, 4)]
    assert torch.allclose(pooled, torch.cat(fields, 1), atol=1e-6)


def test_pooling_leaves_vectors_alone() -> None:
    vectors = randn(3, 5)
    assert pool(vectors, (1,)) is vectors


def test_what_is_read_is_float32_at_least() -> None:
    trunk, maps = torch.nn.Identity(), randn(2, 3, 4, 4)
    for half in (False, True):
        read = features.with_pooling(lambda inputs: [trunk(inputs), inputs.flatten(1)], [(1, 2)], half)  # type: ignore[arg-type]
        assert {out.dtype for out in read(maps.bfloat16())} == {torch.float32}
        assert {out.dtype for out in read(maps.double())} == {torch.float64}


# --- extraction -----------------------------------------------------------------------------------------------------------------------


def extracted(listed: tuple[Path, list[Row]]) -> list[torch.Tensor]:
    net = catalogue.load("nets:resnet20", "none")
    trunk = cutting.cut(net, ["layer1.2", "layer3.2"], logits=True)
    return extract(trunk, [(1, 2), (1,)], Images(*listed, net.transforms), CPU, lambda _: None)


def test_memory_that_runs_out_in_a_pass_is_a_clear_error(make_images: Callable[..., Path]) -> None:
    """On the way to the GPU, too."""
    folder = make_images(classes=2, each=3)
    images = Images(folder, list(dataset.ingest(folder, {}, lambda done, total: None).rows), PLAIN)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ClusterError, match=r"A forward pass of 16 images of 32 pixels does not fit into the GPU's memory"):
        list(features.forward_passes(full, images, range(3), CPU))

    class OnTheWay(Images):
        def batches(self, batches: Any, **_: Any) -> Any:
            return ((batch, SimpleNamespace(to=full)) for batch in batches)

    images = OnTheWay(folder, images.rows, PLAIN)
    with pytest.raises(ClusterError, match=r"Set data\.size lower"):
        list(features.forward_passes(lambda inputs: [inputs], images, range(3), CPU))


def test_features_of_an_image_are_the_same_bits_whatever_else_is_asked_about(listed: tuple[Path, list[Row]]) -> None:
    """What is kept and what is computed anew must be the same: a cache that changed results would be worse than none."""
    folder, rows = listed
    all_at_once = extracted(listed)
    assert [part.shape for part in all_at_once] == [(21, 80), (21, 64), (21, 10)]
    for some in ([20], list(range(3, 12)), list(range(20, -1, -1))):
        for whole, part in zip(all_at_once, extracted((folder, [rows[i] for i in some])), strict=True):
            assert torch.equal(whole[some], part)


def test_a_frozen_network_reads_the_same_whatever_mode_it_was_left_in(listed: tuple[Path, list[Row]]) -> None:
    """BatchNorm would read by the statistics of a batch, and move its own."""
    net = catalogue.load("nets:resnet20", "none")
    images, tap = Images(*listed, net.transforms), next(t for t in cutting.measure_taps(net, 32) if t.name == "layer1.2")
    trunk = cutting.cut(net, ["layer1.2"])
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    (wanted,) = extract(trunk.eval(), [(1, 2)], images, CPU, lambda _: None)
    (found,) = extract(trunk.train(), [(1, 2)], images, CPU, lambda _: None)
    asked = FeatureExtractor(Store(), net, trunk, [TapPooling(tap.name, tap.channels, (1, 2))], net.transforms, CPU)
    trunk.train()
    (kept,) = asked.extract(images, lambda _: None)
    assert torch.equal(found, wanted)
    assert torch.equal(kept.all(), wanted)
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())


def test_progress_counts_every_image(listed: tuple[Path, list[Row]]) -> None:
    told: list[int] = []
    trunk = cutting.cut(catalogue.load("demonstration", "none"), ["conv1"])
    extract(trunk, [(1,)], Images(*listed, PLAIN), CPU, told.append)
    assert told == [16, 21]


def test_no_images_give_features_of_the_usual_width(listed: tuple[Path, list[Row]]) -> None:
    assert [part.shape for part in extracted((listed[0], []))] == [(0, 80), (0, 64), (0, 10)]


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


def test_features_that_do_not_change_have_no_say_be_they_zero_or_not() -> None:
    """Divided by a deviation that is rounding they would drown the others."""
    good = randn(50, 6)
    for level in (0.0, 0.7, 100.0):
        constant = torch.full((50, 6), level) * (1 + 1e-7 * randn(50, 6))
        scaled = scaling(torch.cat([good, constant], 1), (6, 6))(torch.cat([good, constant], 1))
        assert float(scaled[:, :6].square().sum(1).mean()) == pytest.approx(1)
        assert float(scaled[:, 6:].abs().max()) < 0.05, level


def test_what_is_no_number_is_told_with_the_image_and_the_tap_and_not_kept(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=2, each=6)
    rows = dataset.ingest(folder, {}, lambda done, total: None).rows
    backbone = catalogue.load("demonstration", "DEFAULT")
    tap = next(t for t in cutting.measure_taps(backbone, 32) if t.name == "conv2")
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            next(backbone.module.parameters()).view(-1)[0] = value
        trunk = cutting.cut(backbone, ["conv2"])
        reader = FeatureExtractor(Store(), backbone, trunk, [pooling_at(tap)], backbone.transforms, CPU)
        with pytest.raises(
            BackboneError, match=r"expected numbers at tap conv2, found infinities or NaN in .*\.png\. Are the network's weights"
        ):
            reader.extract(Images(folder, rows, backbone.transforms), lambda done: None)
        assert reader.missing(rows).all()


@pytest.mark.parametrize("tap", [0, 1])
def test_of_all_taps_and_images_the_one_that_gives_no_number_is_named(tap: int, listed: tuple[Path, list[Row]]) -> None:
    folder, rows = listed
    net = catalogue.load("demonstration", "DEFAULT")
    taps = [next(t for t in cutting.measure_taps(net, 32) if t.name == name) for name in ("conv1", "conv2")]
    reader = FeatureExtractor(Store(), net, cutting.cut(net, ["conv1", "conv2"]), [pooling_at(t) for t in taps], net.transforms, CPU)
    plain = reader.network

    def spoilt(inputs: torch.Tensor) -> Any:
        outputs = plain(inputs)
        outputs[tap][3, 5] = float("nan")
        return outputs

    reader.network = spoilt
    with pytest.raises(BackboneError, match=rf"at tap {taps[tap].name}, found infinities or NaN in {rows[3].path}\."):
        reader.extract(Images(folder, rows, net.transforms), lambda done: None)
