"""Shift: zero at the source whatever the sample's size, planted shifts measured as planted, and nothing in the network is touched."""

import hashlib
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.helpers.images import paint
from tlpipeline.backbones import catalogue, taps
from tlpipeline.backbones.features import extract
from tlpipeline.backbones.taps import Backbone
from tlpipeline.data import dataset, splits
from tlpipeline.data.dataset import Row
from tlpipeline.data.decoding import decode
from tlpipeline.data.loader import Images, normalize, resize_and_crop
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError, DataError
from tlpipeline.profiling import shift
from tlpipeline.profiling.shift import BatchNormShift, Reference, TapStatistics, Watcher, tap_shift

CPU = torch.device("cpu")
CHANNELS = 32


def watched(net: nn.Module, batches: Sequence[Tensor], seed: int = 0) -> tuple[BatchNormShift, ...]:
    """The raw curve of one pass."""
    return Watcher(net).curve(rows(net, batches), seed=seed)


def rows(net: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """What a watcher takes of each image."""
    taken = []
    with Watcher(net) as watcher, torch.inference_mode():
        for batch in batches:
            net(batch)
            taken.append(watcher.taken())
    return torch.cat(taken)


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Hold a network to its tensors, flags and hooks."""

    def state() -> tuple[list[object], list[object]]:
        tensors = [(name, id(t), t.detach().contiguous().numpy().tobytes()) for name, t in net.state_dict(keep_vars=True).items()]
        return list(tensors), [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()]

    before = state()
    yield
    assert state() == before


# --- the distance -------------------------------------------------------------------------------------------------------------------------


def source_layer() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(CHANNELS)
    draw = torch.Generator().manual_seed(1)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(torch.randn(CHANNELS, generator=draw))
    layer.running_var.copy_(torch.rand(CHANNELS, generator=draw) + 0.2)
    return layer.eval()


def drawn(layer: nn.BatchNorm2d, count: int, seed: int, move: float = 0.0, scale: float = 1.0) -> Sequence[Tensor]:
    """Maps as the running statistics say, nine tenths of the variance between images; the mean moves by `move` deviations."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    draw = torch.Generator().manual_seed(seed)
    z = 0.9**0.5 * torch.randn(count, CHANNELS, 1, 1, generator=draw) + 0.1**0.5 * torch.randn(count, CHANNELS, 6, 6, generator=draw)
    maps = layer.running_mean[:, None, None] + layer.running_var.sqrt()[:, None, None] * (z * scale + move)
    return maps.split(50)


@pytest.mark.parametrize("count", [32, 128, 512])
def test_images_from_the_source_have_no_distance(count: int) -> None:
    layer = source_layer()
    found = [watched(layer, drawn(layer, count, seed))[0] for seed in range(20)]
    assert sum(d.low <= 0 <= d.high for d in found) >= 18
    # Uncorrected, the means would add 0.9 / count and the deviations 0.4 / count.
    assert abs(np.mean([d.raw for d in found])) < 0.2 / count


@pytest.mark.parametrize(("move", "scale", "distance"), [(0.2, 1.0, 0.04), (0.0, 1.5, 0.25), (0.2, 1.5, 0.29)])
def test_a_planted_shift_is_measured_as_planted(move: float, scale: float, distance: float) -> None:
    layer = source_layer()
    found = [watched(layer, drawn(layer, 128, seed, move, scale))[0] for seed in range(20)]
    assert np.mean([d.raw for d in found]) == pytest.approx(distance, rel=0.1)
    assert sum(d.low <= distance <= d.high for d in found) >= 16
    assert all(d.low > 0 for d in found)


def test_dead_channels_do_not_explode() -> None:
    layer = source_layer()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_var[:8] = 0
    alive = torch.cat(list(drawn(layer, 64, 0)))
    (equal,) = watched(layer, [alive])
    assert abs(equal.raw) < 0.02
    alive[:, :8] += 100 * torch.randn(64, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    (capped,) = watched(layer, [alive])
    assert capped.raw == pytest.approx(25 * 8 / CHANNELS, abs=0.05)
    alive[:, :8] = layer.running_mean[:8, None, None]
    alive[0, :8] += 1000
    (single,) = watched(layer, [alive])
    assert -25 < single.low <= single.raw <= single.high < 25
    with torch.no_grad():
        layer.weight[:8] = 0
    assert abs(watched(layer, [alive])[0].raw) < 0.02


def test_small_variance_far_from_zero_is_kept() -> None:
    layer = source_layer()
    assert layer.running_mean is not None
    layer.running_mean += 1000
    assert abs(watched(layer, drawn(layer, 256, 3))[0].raw) < 0.01


def test_without_factors_channels_count_alike() -> None:
    plain = nn.BatchNorm2d(2, affine=False).eval()
    maps = torch.randn(200, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0])[:, None, None]
    assert watched(plain, [maps])[0].raw == pytest.approx(0.5, abs=0.02)
    zero = nn.BatchNorm2d(2).eval()
    nn.init.zeros_(zero.weight)
    assert watched(zero, [maps])[0].raw == pytest.approx(0.5, abs=0.02)


def test_vectors_and_sequences_are_read_too() -> None:
    draw = torch.Generator().manual_seed(0)
    assert abs(watched(nn.BatchNorm1d(64).eval(), [torch.randn(300, 64, generator=draw)])[0].raw) < 0.01
    assert abs(watched(nn.BatchNorm1d(64).eval(), [torch.randn(300, 64, 9, generator=draw)])[0].raw) < 0.01


def test_the_order_of_the_images_does_not_matter_and_the_seed_decides() -> None:
    layer = source_layer()
    maps = torch.cat(list(drawn(layer, 100, 5, 0.1)))
    one, again = watched(layer, maps.split(30)), watched(layer, maps.split(30))
    assert one == again
    shuffled = maps[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    other = watched(layer, shuffled.split(64))[0]
    assert (other.raw, other.low, other.high) == pytest.approx((one[0].raw, one[0].low, one[0].high), rel=1e-5)
    assert watched(layer, maps.split(30), seed=1) != one


# --- networks -----------------------------------------------------------------------------------------------------------------------------


class Smoothing(nn.Module):
    """Two layers with BatchNorm, the second one on averages over 5 x 5 pixels: it tells smooth images from noise of the same variance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 5, groups=8), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        nn.init.orthogonal_(self.conv1.weight, generator=torch.Generator().manual_seed(0))
        nn.init.constant_(self.conv2.weight, 1 / 25)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.bn2(self.conv2(self.bn1(self.conv1(images))))).mean((2, 3))


def painted(count: int, change: Callable[[Image.Image], Image.Image] = lambda image: image, start: int = 0) -> list[Tensor]:
    """Inputs of the painted images, after a change, in batches of 32."""
    plain = Transforms(32, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear")
    pixels = [resize_and_crop(change(paint(i % 3, start + i)), plain) for i in range(count)]
    return list(normalize(torch.from_numpy(np.stack(pixels)), plain).split(32))


def dimmed(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) * 0.4 + 20).astype(np.uint8))


def scrambled(image: Image.Image) -> Image.Image:
    """The same pixels in any order: noise with the image's own mean and variance."""
    pixels = np.asarray(image).reshape(-1, 3)
    return Image.fromarray(np.random.default_rng(int(pixels[0].sum())).permutation(pixels).reshape(32, 32, 3))


@pytest.fixture
def smoothing() -> nn.Module:
    net = Smoothing()
    for layer in (net.bn1, net.bn2):
        layer.momentum = None
    net.train()
    with torch.no_grad():
        for batch in painted(192):
            net(batch)
    for layer in (net.bn1, net.bn2):
        layer.momentum = 0.1
    return net.eval()


def both(net: nn.Module, batches: Sequence[Tensor]) -> list[tuple[float, float]]:
    curve = Watcher(net).curve(rows(net, batches), shift.sequential(net, batches))
    assert all(layer.sequential is not None for layer in curve)
    return [(layer.raw, layer.sequential or 0.0) for layer in curve]


def test_the_sequential_curve_tells_a_shift_of_the_input_from_other_content(smoothing: nn.Module) -> None:
    same = both(smoothing, painted(128, start=500))
    assert all(abs(raw) < 0.02 and abs(adapted) < 0.02 for raw, adapted in same)
    (first, first_adapted), (last, adapted) = both(smoothing, painted(128, dimmed, start=500))
    assert first > 0.4
    assert first_adapted == pytest.approx(first)  # no layer before it
    assert last > 0.4
    assert abs(adapted) < 0.03
    (first, _), (last, adapted) = both(smoothing, painted(128, scrambled, start=500))
    assert first < 0.05
    assert last > 0.3
    assert adapted > 0.3


@pytest.mark.parametrize("training", [False, True])
def test_nothing_in_the_network_is_touched(smoothing: nn.Module, training: bool) -> None:
    smoothing.train(training)
    smoothing.get_submodule("bn1").train(not training)
    with untouched(smoothing):
        shift.sequential(smoothing, painted(64, dimmed))
    smoothing.eval()
    with untouched(smoothing):
        watched(smoothing, painted(64, dimmed))


def test_an_error_in_the_pass_leaves_the_network_as_it_was(smoothing: nn.Module) -> None:
    smoothing.train()
    with untouched(smoothing):
        with pytest.raises(RuntimeError):
            shift.sequential(smoothing, [torch.zeros(4, 5, 32, 32)])
        with pytest.raises(RuntimeError), Watcher(smoothing):
            smoothing(torch.zeros(4, 5, 32, 32))


def test_the_sequential_pass_takes_128_images_in_parts_that_have_statistics(smoothing: nn.Module) -> None:
    sizes: list[int] = []
    smoothing.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    many = painted(160)
    first = shift.sequential(smoothing, many)
    assert sizes == [64, 64]
    assert shift.sequential(smoothing, iter(many[:4])) == first
    sizes.clear()
    shift.sequential(smoothing, torch.cat(many)[:65].split(64))
    assert sizes == [33, 32]
    assert shift.sequential(smoothing, [many[0][:1]]) == {}


class Odd(nn.Module):
    """A shared layer, one that never runs, one without statistics, one on patches folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.never, self.patches = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.without = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.without(self.shared(self.shared(images) + 2))
        return self.patches(maps.reshape(-1, 3, 16, 16)).reshape(len(images), -1)


def test_layers_that_run_twice_never_or_on_patches() -> None:
    net = Odd().eval()
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (layer,) = watched(net, images.split(32))
    assert layer.name == "shared"
    # Means 0 and 2, each with variance 1: together mean 1 and variance 2.
    assert layer.raw == pytest.approx(1 + (2**0.5 - 1) ** 2, rel=0.02)
    assert list(shift.sequential(net, [images])) == ["shared"]
    assert watched(net, [images[:1]]) == ()


def test_a_watcher_can_be_entered_again_and_watches_only_then(smoothing: nn.Module) -> None:
    batches = painted(96)
    watcher = Watcher(smoothing)
    taken = []
    with torch.inference_mode():
        for batch in batches:
            with watcher:
                smoothing(batch)
            smoothing(batch + 100)
            taken.append(watcher.taken())
    assert watcher.curve(torch.cat(taken)) == watched(smoothing, batches)


def test_networks_without_batchnorm_have_no_curve() -> None:
    for net in (catalogue.load("demonstration", "DEFAULT"), catalogue.load("squeezenet1_0", "none")):
        assert net.normalization == "none"
        batch = torch.zeros(2, 3, 32, 32)
        assert watched(net.module, [batch]) == ()
        assert shift.sequential(net.module, [batch]) == {}


def test_a_residual_network_cut_at_its_taps_is_watched_in_order() -> None:
    net = catalogue.load("nets:resnet20", "none")
    trunk = taps.cut(net, net.tap_names)
    with untouched(net.module), torch.inference_mode():
        curve = watched(trunk, painted(64))
        shift.sequential(trunk, painted(64))
    assert len(curve) == 19
    assert [layer.name for layer in curve[:3]] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert json.loads(json.dumps([asdict(layer) for layer in curve])) == [asdict(layer) for layer in curve]


@pytest.mark.parametrize("name", ["nets:resnet20", "demonstration"])
def test_a_random_network_is_scaled_to_the_images(name: str) -> None:
    net = catalogue.load(name, "none", seed=3)
    with untouched(net.module):
        one, again, other = (shift.random_reference(net, painted(128), seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.module.state_dict().values(), again.module.state_dict().values(), strict=True))
    assert not torch.equal(next(one.module.parameters()), next(other.module.parameters()))
    assert not any(m.training for m in one.module.modules())
    assert all(m.momentum == 0.1 for m in one.module.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(abs(layer.raw) < 0.02 for layer in watched(one.module, painted(128, start=500)))
    with pytest.raises(DataError, match="expected at least 2 images"):
        shift.random_reference(net, [], 0)


# --- references ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> tuple[Path, list[Row]]:
    """Dark images: the painted ones are nearly their own negatives."""
    folder = tmp_path / "pictures"
    for label in range(3):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(100):
            dimmed(paint(label, index)).save(folder / f"class{label}" / f"{index}.png")
    return folder, dataset.ingest(folder, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)


def reference_of(net: Backbone, root: Path, rows: Sequence[Row]) -> Reference:
    return shift.measure_reference(net, root, rows, 32, CPU, lambda done: None)


def pooled(net: Backbone, root: Path, rows: Sequence[Row], invert: bool = False) -> dict[str, Tensor]:
    turned = (lambda image, *_: Image.fromarray(255 - np.asarray(image))) if invert else None
    trunk = taps.cut(net, net.tap_names)
    out = extract(trunk, [(1, 2)] * len(net.tap_names), Images(root, rows, net.transforms, turned), CPU, lambda done: None)
    return dict(zip(net.tap_names, out, strict=True))


@pytest.mark.parametrize("name", ["demonstration", "nets:resnet20"])
def test_other_images_of_the_source_lie_near_the_reference_and_inverted_ones_far(name: str, listed: tuple[Path, list[Row]]) -> None:
    root, rows = listed
    net = catalogue.load(name, "none")
    pixels = np.stack([resize_and_crop(dataset.read_image(root, row), net.transforms) for row in rows[:128]])
    net = shift.random_reference(net, [normalize(torch.from_numpy(pixels), net.transforms)], 0)
    told: list[int] = []
    net.module.train()
    with untouched(net.module):
        reference = shift.measure_reference(net, root, rows[:150], 32, CPU, told.append)
    assert told[-1] == reference.images == 150
    assert [t.name for t in reference.taps] == list(net.tap_names)
    own = shift.tap_shift(pooled(net, root, rows[:150]), reference)
    other = shift.tap_shift(pooled(net, root, rows[150:]), reference)
    inverted = shift.tap_shift(pooled(net, root, rows[150:], invert=True), reference)
    assert [t.name for t in own] == list(net.tap_names)
    for mine, near, far in zip(own, other, inverted, strict=True):
        assert abs(mine.distance) < 6 / 150
        assert near.low <= 0.01
        assert near.high >= -0.01
        assert far.low > near.high
    assert other == shift.tap_shift(pooled(net, root, rows[150:]), reference)
    backwards = shift.tap_shift(pooled(net, root, rows[:149:-1]), reference)
    assert [t.distance for t in backwards] == pytest.approx([t.distance for t in other], rel=1e-3, abs=1e-6)
    assert len(reference.layers) == (0 if name == "demonstration" else 19)
    assert all(abs(layer.raw) < 0.1 and layer.sequential is not None for layer in reference.layers)
    if reference.layers:
        trunk = taps.cut(net, net.tap_names)
        with Watcher(trunk) as watcher:
            images = Images(root, rows[:150], net.transforms)
            *_, seen = extract(trunk, [(1,)] * len(net.tap_names), images, CPU, lambda done: None, watcher.taken)
        assert [layer.floor for layer in watcher.curve(seen, reference=reference)] == [layer.raw for layer in reference.layers]


def test_a_reference_is_read_as_it_was_written(listed: tuple[Path, list[Row]], tmp_path: Path) -> None:
    root, rows = listed
    net = catalogue.load("nets:resnet20", "none")
    reference = reference_of(net, root, rows[:40])
    path = shift.write_reference(reference, tmp_path / "new")
    assert path.name == f"nets-resnet20-{hashlib.md5(path.read_bytes()).hexdigest()[:8]}.refstats.json"
    assert shift.read_reference(path, net) == reference
    assert shift.write_reference(reference, tmp_path / "new") == path
    assert list(path.parent.iterdir()) == [path]


def test_a_reference_that_does_not_fit_is_refused_with_a_way_out(listed: tuple[Path, list[Row]], tmp_path: Path) -> None:
    root, rows = listed
    net = catalogue.load("nets:resnet20", "none")
    path = shift.write_reference(reference_of(net, root, rows[:40]), tmp_path)

    def refused(text: str, at: Path = path, by: Backbone = net) -> None:
        with pytest.raises(BackboneError, match=rf"expected .*{text}.* Measure it again"):
            shift.read_reference(at, by)

    def named(content: bytes) -> Path:
        found = tmp_path / f"nets-resnet20-{hashlib.md5(content).hexdigest()[:8]}.refstats.json"
        found.write_bytes(content)
        return found

    refused("nets:resnet56 in .*, found those of nets:resnet20", by=replace(net, name="nets:resnet56"))
    refused("the weights abc in .*, found those of random", by=replace(net, fingerprint="abc"))
    refused("found no file", tmp_path / "absent.refstats.json")
    content = path.read_bytes()
    refused("format 1 in .*, found 2", named(content.replace(b'"format": 1', b'"format": 2')))
    refused("as JSON .*KeyError", named(content.replace(b'"taps"', b'"tapes"')))
    refused("as JSON", named(b"\x80\x04not json"))
    refused("as JSON", named(b"[1, 2]"))
    path.write_bytes(content.replace(b'"size": 32', b'"size": 64'))
    refused("md5 stands in the name.*was changed")
    path.unlink()
    with pytest.raises(DataError, match="found 1"):
        reference_of(net, root, rows[:1])


# --- real weights -------------------------------------------------------------------------------------------------------------------------


def archived(archive: Path, each: int, net: Backbone) -> Iterator[Tensor]:
    """Inputs of the first images of each class, at most 300 in all, straight from the archive, in batches of 64."""
    taken: dict[str, int] = {}
    pixels = []
    with tarfile.open(archive, "r|gz") as file:
        for member in file:
            label = member.name.rpartition("/")[0]
            if "/train" in label:
                break
            if member.isfile() and taken.setdefault(label, 0) < each:
                taken[label] += 1
                pixels.append(resize_and_crop(decode(file.extractfile(member).read()), net.transforms))  # type: ignore[union-attr]
    yield from normalize(torch.from_numpy(np.stack(pixels)), net.transforms).split(64)


def above_floor(floor: Sequence[BatchNormShift], seen: Sequence[BatchNormShift]) -> list[tuple[float, float]]:
    """What is left of each layer's D after its floor, and half its interval: of both samples, 99.9 % for all layers together."""
    together = NormalDist().inv_cdf(1 - 0.0005 / len(seen)) / NormalDist().inv_cdf(0.975)
    return [
        (layer.raw - below.raw, together * math.hypot(layer.high - layer.low, below.high - below.low) / 2)
        for below, layer in zip(floor, seen, strict=True)
    ]


@pytest.mark.parametrize("name", ["nets:resnet20", "resnet18"])
def test_after_its_floor_the_shift_of_the_source_is_zero_within_its_interval(name: str) -> None:
    net = shift.random_reference(catalogue.load(name, "none", size=32), painted(128), 0)
    floor, seen = (watched(net.module, painted(192, start=start)) for start in (1000, 5000))
    assert all(abs(left) <= half for left, half in above_floor(floor, seen))
    dark = above_floor(floor, watched(net.module, painted(192, dimmed, start=5000)))
    assert all(left > half for left, half in dark)


@pytest.mark.data
def test_after_its_floor_the_shift_of_cifar_is_zero_within_its_interval_and_that_of_steel_is_not(real_data: Path) -> None:
    path = real_data / "resnet20-cifar10.safetensors"
    net = catalogue.load("nets:resnet20", path.name, md5=hashlib.md5(path.read_bytes()).hexdigest(), root=real_data)
    images = torch.cat(list(archived(real_data / "cifar10.tar.gz", 60, net)))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    floor, own = (watched(net.module, images[half].split(64)) for half in order.chunk(2))
    assert all(abs(left) <= half for left, half in above_floor(floor, own))
    # Training crops and mirrors, so the floor itself is not zero: without it even the source would look shifted.
    assert sum(layer.low > 0 for layer in own) > len(own) / 2
    steel = above_floor(floor, watched(net.module, list(archived(real_data / "neu_steel.tar.gz", 40, net))))
    assert sum(left > half for left, half in steel) > 0.9 * len(steel)


@pytest.mark.data
def test_steel_is_farther_from_cifar_weights_than_cifar(real_data: Path) -> None:
    path = real_data / "resnet20-cifar10.safetensors"
    net = catalogue.load("nets:resnet20", path.name, md5=hashlib.md5(path.read_bytes()).hexdigest(), root=real_data)
    own = both(net.module, list(archived(real_data / "cifar10.tar.gz", 25, net)))
    steel = both(net.module, list(archived(real_data / "neu_steel.tar.gz", 40, net)))
    assert np.mean([raw for raw, _ in own]) < 0.1
    assert np.mean([raw for raw, _ in steel]) > 5 * np.mean([raw for raw, _ in own])
    assert np.mean([adapted for _, adapted in steel]) > np.mean([adapted for _, adapted in own])


def test_what_a_small_reference_does_not_know_is_not_taken_for_a_distance() -> None:
    """Mean and variance of 20 images are off by a twentieth of the variance: other images of the source lie no farther away."""
    found = []
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        source = torch.randn(20, 64, generator=draw)
        reference = Reference(
            "net", "w", 32, 20, (TapStatistics("tap", tuple(source.mean(0).tolist()), tuple(source.var(0).tolist())),), ()
        )
        found.append(tap_shift({"tap": torch.randn(400, 64, generator=draw)}, reference)[0].distance)
    assert abs(np.mean(found)) < 0.025


def test_a_channel_that_hardly_moves_does_not_make_a_tap_far() -> None:
    reference = Reference("net", "w", 32, 500, (TapStatistics("tap", (0.0, 0.0), (1.0, 0.0)),), ())
    features = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3])
    assert abs(tap_shift({"tap": features}, reference)[0].distance) < 0.1
