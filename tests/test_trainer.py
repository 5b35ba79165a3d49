"""Fine-tuning: every recipe value does what it says, a bad step is taken back, memory and time that run out lose nothing."""

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from tests.helpers.training import decided, history, trained
from tlpipeline.backbones import catalogue, taps
from tlpipeline.backbones.classifier import Classifier
from tlpipeline.backbones.features import FeatureExtractor
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice.cases import CASES
from tlpipeline.choice.decision import Decision
from tlpipeline.data import cache, dataset
from tlpipeline.data.augment import ENHANCED, OPERATIONS, SHIFTS, augmentation, mix, rand_augment
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import DecodedCache, Images
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import OutOfMemory, ParamsError, TrainingError
from tlpipeline.stats import pack
from tlpipeline.training import checkpoint, train, trainer
from tlpipeline.training.checkpoint import Checkpoints, State
from tlpipeline.training.config import ProgressWriter, TrainingConfig
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.optim import Average, decays, flat, optimizer, schedule, shares, unflat
from tlpipeline.training.recipe import Recipe
from tlpipeline.training.trainer import Datasets, TimeBudget, Trainer, summed_loss

Make = Callable[..., TrainingConfig]
TUNED = CASES[2]


def finished(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scratch" / "finished" / "state.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol, rtol=0) for k in a)


# --- rates and decay ------------------------------------------------------------------------------------------------------------------


def test_blocks_nearer_to_the_images_get_smaller_rates() -> None:
    net = catalogue.load("demonstration", "DEFAULT")
    blocks = taps.parameters_by_tap(net, "fc2")
    assert [len(block) for block in blocks] == [2] * 5
    found = shares(blocks, 0.5)
    assert found["conv1.0.weight"] == 0.5**5
    assert found["fc2.1.bias"] == 0.5
    assert shares(blocks, 1.0)["conv1.0.weight"] == 1.0


def test_the_optimizer_decays_neither_norms_nor_biases_and_follows_depth() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    net[2].weight.requires_grad_(False)
    made = optimizer(net, Recipe(), "batch", 0.1, [["0.weight", "0.bias"]], fused=False)
    assert isinstance(made, torch.optim.SGD)
    by_size = {p.numel(): g for g in made.param_groups for p in g["params"]}
    assert by_size[108]["weight_decay"] == 5e-4
    assert (by_size[108]["momentum"], by_size[108]["nesterov"]) == (0.9, True)
    assert all(g["weight_decay"] == (5e-4 if p.dim() > 1 else 0) for g in made.param_groups for p in g["params"])
    assert sum(p.numel() for g in made.param_groups for p in g["params"]) == 108 + 4 + 8 + 4  # what is frozen is not there
    layered = optimizer(net, Recipe(), "layer", 0.1, [["0.weight", "0.bias"]], fused=False)
    assert isinstance(layered, torch.optim.AdamW)
    assert {round(g["lr"], 6) for g in layered.param_groups} == {0.1, 0.075}
    assert {g["weight_decay"] for g in layered.param_groups} == {0.05, 0}
    forced = optimizer(net, Recipe(optimizer="adamw"), "batch", 0.1, [], fused=False)
    assert isinstance(forced, torch.optim.AdamW)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_goes_on_from_its_tensors(kind: str) -> None:
    def step(net: nn.Module, made: torch.optim.Optimizer) -> None:
        made.zero_grad()
        net(torch.ones(2, 3)).square().sum().backward()
        made.step()

    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    made = [optimizer(net, Recipe(optimizer=kind), "batch", 0.01, [], fused=False) for net in nets]
    step(nets[0], made[0])
    nets[1].load_state_dict(nets[0].state_dict())
    unflat(flat(made[0]), made[1])
    for net, each in zip(nets, made, strict=True):
        step(net, each)
    assert same(nets[0].state_dict(), nets[1].state_dict())


def test_the_moving_average_follows_the_weights_and_can_be_exchanged_with_them() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.0)
        average = Average(net, 0.9)
        net.weight.fill_(1.0)
    seen = []
    for _ in range(200):
        average.update()
        seen.append(float(average.weights["weight"]))
    assert seen == sorted(seen)
    assert seen[0] == pytest.approx(1 - 2 / 11)  # early on it must not remember the start
    assert seen[-1] == pytest.approx(1.0, abs=1e-4)
    before = float(average.weights["weight"])
    average.swap()
    assert net.weight.item() == before
    average.swap()
    assert net.weight.item() == 1.0


def test_the_moving_average_takes_in_what_a_step_left(job: Make, tmp_path: Path) -> None:
    net = linear()
    fit = a_fit(net, job(decided(TUNED, average=0.9)), [0, 1, 2] * 16, tmp_path)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    moving, average = fit._start(0.1, State(arm="fine-tune"))
    fit._epoch(net, ListedImages(fit, [(list(range(8)), PIXELS)]), moving, average, 0.1, State(arm="fine-tune"), 1)
    assert not same(net.state_dict(), start, atol=1e-3)
    assert same(average.weights, {key: start[key].lerp(value, 9 / 11) for key, value in net.state_dict().items()}, atol=1e-6)


def test_the_weights_move_as_they_would_without_their_average(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[dict[str, torch.Tensor]] = []
    remember = Checkpoints.keep

    def keep(self: Checkpoints, *given: Any) -> None:
        remember(self, *given)
        moved.append(self.current)

    monkeypatch.setattr(Checkpoints, "keep", keep)
    kept = [trained(job(decided(TUNED, average=decay), epochs=3), tmp_path / str(decay)) for decay in (0.0, 0.9)]
    assert all(same(plain, averaged) for plain, averaged in zip(moved[:3], moved[3:], strict=True))
    assert not same(*kept)


# --- images ---------------------------------------------------------------------------------------------------------------------------


def test_mixup_and_cutmix_mix_images_and_labels_alike() -> None:
    torch.manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    for kinds in ((0.4, 0.0), (0.0, 1.0), (0.4, 1.0)):
        inputs, labels = mix(images, torch.arange(4), 4, *kinds)
        assert torch.allclose(labels.sum(1), torch.ones(4))
        # Pixels are class numbers here: the mean pixel is the mean label.
        assert torch.allclose(inputs.mean((1, 2, 3)), labels @ torch.arange(4.0), atol=0.02)


def test_where_mixup_and_cutmix_are_both_asked_for_batches_get_one_or_the_other() -> None:
    torch.manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    batches = [mix(images, torch.arange(4), 4, 0.4, 1.0)[0] for _ in range(20)]
    cut = [bool((inputs.amax((1, 2, 3)) > inputs.amin((1, 2, 3))).any()) for inputs in batches]
    assert 4 < sum(cut) < 16  # images that are mixed by mixup stay of one color


def test_randaugment_follows_seed_epoch_content_and_turn_and_leaves_the_random_state_alone() -> None:
    image = noise(32)
    row, other = (Row("", f"{k}".ljust(32, "0"), "", "", 32, 32, "RGB", "") for k in (1, 2))

    def view(row: Row, seed: int = 0, epoch: int = 1, turn: int = 0, magnitude: int = 9) -> bytes:
        return augmentation(1.0, False, seed, epoch, 2, magnitude)(image, row, 32, turn).tobytes()

    torch.manual_seed(5)
    first = view(row)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert view(row) == first
    assert first not in (view(other), view(row, seed=1), view(row, epoch=2), view(row, turn=1), view(row, magnitude=20))
    assert augmentation(1.0, False, 0, 1)(image, row, 32, 0).tobytes() != first


class Drawn:
    """Draws this operation, this way."""

    def __init__(self, name: str, positive: bool) -> None:
        self.name, self.positive = name, positive

    def integers(self, most: int) -> int:
        return OPERATIONS.index(self.name)

    def random(self) -> float:
        return 0.0 if self.positive else 0.9


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_of_randaugment_grows_with_its_magnitude(name: str) -> None:
    image = noise(8).resize((32, 32), Image.Resampling.BICUBIC).point(lambda value: 20 + value * 4 // 5)
    far = {}
    for magnitude, positive in itertools.product((0, 9, 30), (True, False)):
        out = rand_augment(image, Drawn(name, positive), 1, magnitude)  # type: ignore[arg-type]
        far[magnitude, positive] = float(np.abs(np.asarray(out).astype(float) - np.asarray(image)).mean())
    if name in (*SHIFTS, *ENHANCED):
        assert far[0, True] == far[0, False] == 0
        assert 0 < far[9, True] < far[30, True]
        assert 0 < far[9, False] < far[30, False]
    elif name in ("posterize", "solarize"):
        assert far[0, True] <= far[9, True] < far[30, True]
    else:
        assert len(set(far.values())) == 1
        assert (far[9, True] > 0) == (name != "identity")


def test_randaugment_moves_as_far_as_in_the_paper() -> None:
    image = noise(331)
    moved = rand_augment(image, Drawn("translate_x", True), 1, 30)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(moved)[:, 150:], np.asarray(image)[:, :-150])
    for positive, degrees in ((True, 30), (False, -30)):
        turned = rand_augment(image, Drawn("rotate", positive), 1, 30)  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(turned), np.asarray(image.rotate(degrees)))


@pytest.mark.parametrize(
    "recipe",
    [
        {"mixup": 0.2}, {"cutmix": 1.0}, {"randaugment": 2}, {"average": 0.9}, {"label_smoothing": 0.1}, {"optimizer": "adamw", "rate_none": 1e-3},
        {"layer_decay_other": 0.7}, {"balance": "sampler", "imbalance": 1.0}, {"patience": 1},
    ],
    ids=lambda r: next(iter(r)),
)  # fmt: skip
def test_each_recipe_value_trains_and_gives_another_model(recipe: dict[str, Any], job: Make, tmp_path: Path) -> None:
    plain = trained(job(decided(TUNED), epochs=2), tmp_path / "plain")
    with_it = trained(job(decided(TUNED, **recipe), epochs=2), tmp_path / "with")
    assert all(v.isfinite().all() for v in with_it.values())
    assert recipe == {"patience": 1} or not same(plain, with_it)
    assert history(tmp_path / "with")[-1]["accuracy"] > 0.5


def test_parts_of_a_batch_make_the_step_of_the_whole(job: Make, tmp_path: Path) -> None:
    quiet = decided(TUNED)
    quiet = replace(
        quiet, slice="conv3", readings=(*quiet.readings[:0], replace(quiet.readings[0], tap="conv3", channels=128, grids=(1, 2)))
    )
    whole = trained(job(quiet, epochs=1), tmp_path / "whole")
    parts = trained(job(replace(quiet, recipe=replace(quiet.recipe, accumulate=3)), epochs=1), tmp_path / "parts")
    assert same(whole, parts, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_before_a_batch_is_taken_in_parts(kind: str, job: Make, tmp_path: Path) -> None:
    quiet = decided(TUNED, **{kind: 0.5})
    quiet = replace(quiet, slice="conv3", readings=(replace(quiet.readings[0], tap="conv3", channels=128, grids=(1, 2)),))
    whole = trained(job(quiet, epochs=1), tmp_path / "whole")
    parts = trained(job(replace(quiet, recipe=replace(quiet.recipe, accumulate=16)), epochs=1), tmp_path / "parts")
    assert same(whole, parts, atol=1e-5)
    plain = trained(job(replace(quiet, recipe=replace(quiet.recipe, **{kind: 0.0})), epochs=1), tmp_path / "plain")
    assert not same(whole, plain, atol=1e-4)


def test_batch_normalization_is_shared_where_a_pass_sees_few_images(job: Make, tmp_path: Path) -> None:
    fit = a_fit(linear(), job(decided(TUNED), batch_size=64), [0, 1] * 32, tmp_path, workers=2)
    fit.world.device, fit.normalization = torch.device("cuda"), "batch"
    assert fit.recipe.sync_below == 16
    assert [fit._few_images_a_worker(parts) for parts in (0, 1, 2, 3, 4)] == [False, False, False, True, True]
    fit.normalization = "layer"
    assert not fit._few_images_a_worker(4)


@pytest.mark.parametrize(("asked", "side", "arm", "kept"), [
    ("auto", 64, "fine-tune", True), ("auto", 63, "fine-tune", False), ("auto", 64, "scratch", False),
    ("fixed", 32, "fine-tune", True), ("fixed", 64, "scratch", False), ("batch", 64, "fine-tune", False),
])  # fmt: skip
def test_who_keeps_the_statistics_of_the_source(asked: str, side: int, arm: str, kept: bool, job: Make, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 2))
    fit = a_fit(net, job(decided(TUNED, statistics=asked)), [0, 1] * 8, tmp_path)
    fit.sides = replace(fit.sides, transforms=replace(fit.sides.transforms, size=side))
    fit.arm(arm, 0, 0.1, State(arm="head"))
    fit._train_mode()
    assert net[1].training != kept
    assert net[4].training


@pytest.mark.parametrize("batch", [32, 2048])
def test_the_rate_goes_with_the_images_that_a_step_has(batch: int, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plain = trainer.optimizer

    def noted(model: nn.Module, recipe: Recipe, normalization: str, rate: float, *rest: Any) -> torch.optim.Optimizer:
        rates.append(rate)
        return plain(model, recipe, normalization, rate, *rest)

    monkeypatch.setattr(trainer, "optimizer", noted)
    trained(job(decided(TUNED), epochs=1, batch_size=batch), tmp_path / "run")
    images = len(dataset.read_manifest(tmp_path / "manifest.parquet").used("train"))
    assert 32 < images < 2048
    assert rates == [pytest.approx(TUNED.recipe.rate("none", 32) * min(batch, images) / 64)]


def test_only_matrices_and_kernels_decay() -> None:
    shapes = {
        "features.1.0.layer_scale": (96, 1, 1), "a.relative_position_bias_table": (169, 4), "encoder.pos_embedding": (1, 50, 192),
        "class_token": (1, 1, 192), "norm.weight": (96,), "attn.logit_scale": (4, 1, 1),
    }  # fmt: skip
    assert not any(decays(name, torch.zeros(shape)) for name, shape in shapes.items())
    assert decays("conv.weight", torch.zeros(8, 1, 3, 3))
    assert decays("head.weight", torch.zeros(10, 64))


def a_fit(net: nn.Module, made: TrainingConfig, labels: list[int], place: Path, workers: int = 1, rank: int = 0) -> Trainer:
    """A fit of this network on images that have these labels; none of them is looked at."""
    rows = [Row(str(i), f"{i:032x}", "", "", 8, 8, "RGB", "") for i in range(len(labels))]
    world, transforms = LocalContext(place), Transforms(8, 8, (0.5,) * 3, (0.2,) * 3, "bilinear")
    world.size, world.rank = workers, rank
    sides = Datasets(place, rows, rows[:2], np.array(labels), np.array(labels[:2]), transforms)
    recipe = made.plan.recipe
    tell = ProgressWriter(place / "told", 0)
    return Trainer(net, sides, recipe, made, world, Checkpoints(world, place, net), tell, "none", Store(), TimeBudget(0, world, 0))


class ListedImages(Images):
    """Batches that are there already."""

    def __init__(self, fit: Trainer, batches: Any) -> None:
        super().__init__(fit.sides.root, fit.sides.train, fit.sides.transforms)
        self.listed = batches

    def batches(self, *_: Any, **__: Any) -> Any:
        return iter(self.listed)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


PIXELS = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", [{"imbalance": 2.0}, {"imbalance": 100.0}, {"imbalance": 2.0, "balance": "none"}])
def test_where_classes_are_uneven_they_weigh_alike_in_the_gradient(recipe: dict[str, Any], job: Make, tmp_path: Path) -> None:
    labels = [0, 0, 0, 0, 0, 1, 1, 2]
    net = linear()
    fit = a_fit(net, job(decided(TUNED, **recipe)), labels, tmp_path)
    images = Images(tmp_path, fit.sides.train, fit.sides.transforms)
    fit._parts(net, *fit._inputs(list(range(8)), PIXELS, images), images, 8, 1)
    found = net[1].weight.grad
    weights = torch.tensor([8 / (3 * 5), 8 / (3 * 2), 8 / 3]) if recipe == {"imbalance": 2.0} else torch.ones(3)
    net.zero_grad()
    logits = net(trainer.normalize(PIXELS, fit.sides.transforms))
    (nn.functional.cross_entropy(logits, torch.tensor(labels), weight=weights, reduction="sum") / 8).backward()
    assert torch.allclose(found, net[1].weight.grad, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_smoothed_labels_weigh_what_the_class_of_the_image_weighs(mixed: bool) -> None:
    """PyTorch's own weighs what smoothing gives the other classes by theirs: a rare one would be the answer for every image."""
    weights, generator = torch.tensor([0.1, 1.0, 10.0]), torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=generator), torch.tensor([0, 0, 0, 1, 2, 0])
    each = functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none") @ weights[labels]
    if mixed:
        other = torch.tensor([2, 1, 0, 0, 1, 2])
        soft = 0.7 * functional.one_hot(labels, 3) + 0.3 * functional.one_hot(other, 3)
        each = 0.7 * each + 0.3 * functional.cross_entropy(logits, other, label_smoothing=0.2, reduction="none") @ weights[other]
    assert torch.isclose(summed_loss(logits, soft if mixed else labels, weights, 0.2), each)


def test_the_answer_for_an_image_of_a_large_class_is_that_class_with_smoothed_labels_too() -> None:
    weights, logits = trainer.image_weights(np.array([0] * 90 + [1] * 10 + [2]), 2.0), torch.zeros(1, 3, requires_grad=True)
    summed_loss(logits, torch.tensor([0]), torch.from_numpy(weights[[0, 90, 100]]).float(), 0.1).backward()
    assert logits.grad is not None
    assert logits.grad.argmin() == 0


@pytest.mark.parametrize("accumulate", [1, 2, 3, 9])
def test_uneven_shares_of_a_batch_are_taken_in_equally_many_parts(accumulate: int, job: Make, tmp_path: Path) -> None:
    """Where BatchNorm is synchronized in every part, a worker with one part more would wait for ever."""
    seen = []
    for rank, share in ((0, 3), (1, 2)):
        net = linear()
        fit = a_fit(net, job(decided(TUNED, accumulate=accumulate)), [0, 1, 2, 0, 1], tmp_path, workers=2, rank=rank)
        images = Images(tmp_path, fit.sides.train, fit.sides.transforms)
        steps: list[int] = []
        net.register_forward_hook(lambda _, given, out, steps=steps: steps.append(len(out)))
        fit._step(net, list(range(share)), PIXELS[:share], images, 5, State(arm="fine-tune"))
        assert sum(steps) == share
        seen.append(len(steps))
    assert seen == [min(accumulate, 2)] * 2


@pytest.mark.parametrize(("still", "wanted"), [(False, [3, 2]), (True, [1] * 5)])
def test_a_part_that_batch_normalization_takes_its_statistics_from_has_two_images(
    still: bool, wanted: list[int], job: Make, tmp_path: Path
) -> None:
    """Of one image whose maps have shrunk to a pixel there are none, and PyTorch refuses."""
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    fit = a_fit(net, job(decided(TUNED, accumulate=8)), [0, 1, 2, 0, 1], tmp_path)
    fit.normalization, fit.still = "batch", still
    fit._train_mode()
    images, seen = Images(tmp_path, fit.sides.train, fit.sides.transforms), []
    net.register_forward_hook(lambda _, given, out: seen.append(len(out)))
    fit._step(net, list(range(5)), PIXELS[:5], images, 5, State(arm="scratch"))
    assert seen == wanted


@pytest.mark.parametrize("images", [4, 5, 6])
def test_memory_for_not_even_the_two_images_that_batch_normalization_wants_is_a_clear_error(images: int, job: Make, tmp_path: Path) -> None:
    net = linear()
    fit = a_fit(net, job(decided(TUNED)), [0, 1, 2, 0, 1, 2], tmp_path)
    fit.normalization, seen = "batch", []

    def full(_: Any, given: Any) -> None:
        seen.append(len(given[0]))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    net.register_forward_pre_hook(full)
    shown = Images(tmp_path, fit.sides.train, fit.sides.transforms)
    with pytest.raises(TrainingError, match=r"memory for [23] images at a time.*data\.size"):
        fit._step(net, list(range(images)), PIXELS[:images], shown, images, State(arm="scratch"))
    assert min(seen) >= 2


def test_the_room_for_decoded_images_changes_no_bit_of_what_is_trained(make_images: Callable[..., Path], job: Make, tmp_path: Path) -> None:
    """The images are larger than the crops' side, so that a crop of the file would be another one."""
    folder = make_images(classes=3, each=14, name="large", size=96)
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    dataset.write_manifest(manifest, tmp_path / "large.parquet", tmp_path / "large.csv")
    found, decoded = [], []
    for name, room in {"none": 0.0, "some": 1e9, "memory": 0.0}.items():
        place = "" if name == "memory" else str(tmp_path / f"cache-{name}")
        made = job(decided(TUNED), images=str(folder), manifest=str(tmp_path / "large.parquet"), epochs=2, cache=place, cache_bytes=room)
        found.append(trained(made, tmp_path / name))
        decoded.append(any("decoded" in kept.label or "prepared" in kept.label for kept in cache.info(Path(place))) if place else None)
        assert history(tmp_path / name) == history(tmp_path / "none")
    assert decoded == [False, True, None]
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_the_balanced_sampler_draws_classes_alike(job: Make) -> None:
    labels = np.array([0] * 90 + [1] * 10)
    fit = Trainer.__new__(Trainer)
    fit.job, fit.drawn = job(decided(TUNED)), True
    fit.sides = type("Sides", (), {"train": labels})()
    fit.shares = trainer.image_weights(labels, imbalance=2)
    drawn = np.concatenate([labels[fit._order(epoch) % 100] for epoch in range(20)])
    assert 0.45 < drawn.mean() < 0.55
    order = fit._order(0)
    assert len(set(order.tolist())) == 100  # who comes back comes as another view
    assert order.max() >= 300
    fit.drawn = False
    assert sorted(fit._order(3)) == list(range(100))


@pytest.mark.parametrize("recipe", [{}, {"balance": "sampler", "imbalance": 1.0}])
def test_each_epoch_and_each_seed_has_an_order_of_its_own(recipe: dict[str, Any], job: Make, tmp_path: Path) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(a_fit(linear(), job(decided(TUNED, **recipe), seed=seed), [0, 0, 1] * 16, tmp_path)._order(epoch).tolist())

    assert order(0, 1) == order(0, 1)
    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


@pytest.mark.parametrize(("images", "batch", "workers", "taken"), [
    (20, 16, 1, [16, 4]), (19, 16, 1, [16]), (3, 16, 1, [3]), (12, 8, 2, [4, 2]), (11, 8, 2, [4]), (7, 6, 3, [2]),
])  # fmt: skip
def test_a_last_batch_of_few_images_is_left_for_another_epoch_unless_it_is_the_only_one(
    images: int, batch: int, workers: int, taken: list[int], job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a batch is enough, if each worker has two images of it."""
    monkeypatch.setattr(trainer, "all_reduce", lambda values, *_: values)
    fit = a_fit(linear(), job(decided(TUNED), batch_size=batch), [i % 3 for i in range(images)], tmp_path, workers=workers)
    asked: list[int] = []

    class Asked(ListedImages):
        def batches(self, batches: Any, **_: Any) -> Any:
            asked.extend(map(len, batches))
            return iter([])

    moving, average = fit._start(0.1, State(arm="fine-tune"))
    fit._epoch(fit.model, Asked(fit, []), moving, average, 0.1, State(arm="fine-tune"), 1)
    assert asked == taken


def test_dropout_and_mixing_are_drawn_anew_for_each_epoch_step_and_worker(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "all_reduce", lambda values, *_: values)
    drawn: list[int] = []
    monkeypatch.setattr(Trainer, "_step", lambda *_: drawn.append(torch.initial_seed()) or torch.zeros(()))  # type: ignore[func-returns-value]

    def epochs(rank: int, seed: int) -> None:
        fit = a_fit(linear(), job(decided(TUNED), seed=seed), [0, 1, 2] * 16, tmp_path, workers=2, rank=rank)
        moving, average = fit._start(0.1, State(arm="fine-tune"))
        for epoch in (0, 1):
            images = ListedImages(fit, [([0, 1], PIXELS[:2])] * 3)
            fit._epoch(fit.model, images, moving, average, 0.1, State(arm="fine-tune", epoch=epoch), 2)

    for rank, seed in itertools.product((0, 1), (0, 1)):
        epochs(rank, seed)
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 2 * 3
    epochs(0, 0)
    assert drawn[-6:] == drawn[:6]


@pytest.mark.parametrize(("crop", "picture", "side"), [
    (0.5, 1000, 91), (1.0, 1000, 64), (0.5, 70, 91), (0.5, 60, 64), (0.5, 33, 64), (0.5, 20, 32),
])  # fmt: skip
def test_pictures_are_kept_as_sharp_as_crops_can_show_and_no_larger_than_they_are(
    crop: float, picture: int, side: int, job: Make, tmp_path: Path
) -> None:
    fit = a_fit(linear(), job(decided(TUNED, crop=crop)), [0, 1, 2] * 4, tmp_path)
    rows = [replace(row, width=picture, height=3 * picture) for row in fit.sides.train]
    fit.sides = replace(fit.sides, train=rows, transforms=replace(fit.sides.transforms, size=32, resize=32))
    images, val = fit._images(1)
    assert images.decoded is not None
    assert images.decoded.side == side
    assert val.decoded is not None
    assert val.decoded.side == 32


@pytest.mark.parametrize(("short", "epochs", "kept"), [(0, 2, True), (1, 2, False), (0, 1, False)])
@pytest.mark.parametrize("on_disk", [True, False])
def test_decoded_images_are_kept_where_they_come_back_and_all_three_colors_have_room(
    on_disk: bool, short: int, epochs: int, kept: bool, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 3 * (12 * 23**2 + 2 * 8**2) - short
    monkeypatch.setattr(trainer, "IN_MEMORY_BYTES", 0 if on_disk else room)
    fit = a_fit(linear(), job(decided(TUNED), cache_bytes=room if on_disk else 0), [0, 1, 2] * 4, tmp_path)
    fit.store = Store(tmp_path / "cache" if on_disk else None)
    filled: list[int] = []
    monkeypatch.setattr(DecodedCache, "fill", lambda self, rows, _: filled.append(len(rows)))
    monkeypatch.setattr(DecodedCache, "open", lambda *_: None)
    fit._images(epochs)
    assert filled == ([12, 2] if kept else [])


def test_an_image_that_comes_back_in_an_epoch_is_seen_from_elsewhere(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=2, each=10, name="again", size=64)
    rows = list(dataset.ingest(folder, {}, lambda done, total: None).rows)
    images = Images(folder, rows, Transforms(32, 32, (0.5,) * 3, (0.2,) * 3, "bilinear"), augmentation(0.3, True, 0, 1))
    first, again, third = (next(iter(images.batches([[3 + turn * len(rows)]])))[1] for turn in range(3))
    assert not torch.equal(first, again)
    assert not torch.equal(again, third)
    assert torch.equal(again, next(iter(images.batches([[3 + len(rows)]])))[1])


# --- what a recipe says reaches the steps ---------------------------------------------------------------------------------------------


def rates_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the rate of each step that is taken, as it comes."""
    rates: list[float] = []
    plain = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *given: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    return rates


def test_one_schedule_runs_through_all_epochs(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = rates_of(monkeypatch)
    trained(job(decided(TUNED, warm_up=0.3), epochs=3), tmp_path / "run")
    images = len(dataset.read_manifest(tmp_path / "manifest.parquet").used("train"))
    each = math.ceil(images / 16)
    assert len(rates) == 3 * each
    peak = TUNED.recipe.rate("none", 32) * 16 / 64
    assert rates == pytest.approx([peak * schedule(step, 3 * each, 0.3) for step in range(3 * each)])
    assert rates.index(max(rates)) == round(0.3 * 3 * each) - 1
    assert rates[-1] < 0.05 * peak


def test_gradients_are_clipped_at_the_norm_of_the_recipe(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    plain = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *given: Any) -> Any:
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for g in self.param_groups for p in g["params"])))
        return plain(self, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    trained(job(decided(TUNED, clip=0.01), epochs=1), tmp_path / "run")
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_are_smoothed_as_much_as_the_recipe_says(smoothing: float, job: Make, tmp_path: Path) -> None:
    net, labels = linear(), [0, 1, 2, 0, 1, 2, 0, 1]
    fit = a_fit(net, job(decided(TUNED, label_smoothing=smoothing)), labels, tmp_path)
    images = Images(tmp_path, fit.sides.train, fit.sides.transforms)
    fit._parts(net, *fit._inputs(list(range(8)), PIXELS, images), images, 8, 1)
    found = net[1].weight.grad
    net.zero_grad()
    wanted = torch.eye(3)[torch.tensor(labels)] * (1 - smoothing) + smoothing / 3
    (-(wanted * net(trainer.normalize(PIXELS, fit.sides.transforms)).log_softmax(1)).sum(1).mean()).backward()
    assert torch.allclose(found, net[1].weight.grad, atol=1e-6)


def test_randaugment_is_as_strong_as_the_recipe_says(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(trainer, "augmentation", lambda *given: asked.append(given))
    recipe = {"crop": 0.7, "randaugment": 3, "randaugment_magnitude": 17}
    a_fit(linear(), job(decided(TUNED, **recipe), flip=True, seed=5), [0, 1] * 8, tmp_path)._views(4)
    assert asked == [(0.7, True, 5, 4, 3, 17)]


@pytest.mark.parametrize(("precision", "native", "kind"), [
    ("auto", True, torch.bfloat16), ("auto", False, torch.float32), ("float32", True, torch.float32),
])  # fmt: skip
def test_steps_are_taken_in_bfloat16_where_the_processor_has_it(
    precision: str, native: bool, kind: torch.dtype, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "computes_in_bfloat16", lambda device: native)
    net, seen, labels = linear(), [], [0, 1, 2, 0, 1, 2, 0, 1]
    net.register_forward_hook(lambda _, given, out: seen.append(out.detach()))
    fit = a_fit(net, job(decided(TUNED), precision=precision), labels, tmp_path)
    images = Images(tmp_path, fit.sides.train, fit.sides.transforms)
    loss = fit._step(net, list(range(8)), PIXELS, images, 8, State(arm="fine-tune"))
    assert [logits.dtype for logits in seen] == [kind]
    # From there on it is float32: a sum in bfloat16 has three digits.
    wanted = nn.functional.cross_entropy(seen[0].float(), torch.tensor(labels), reduction="sum")
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert net[1].weight.grad.dtype == torch.float32


def test_weights_and_images_have_their_channels_last() -> None:
    net = catalogue.load("demonstration", "DEFAULT")
    classifier = Classifier(net, [TapPooling("conv3", 128, (1,))], 3, frozen=False)
    kernels = [p for p in classifier.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)
    assert trainer.normalize(PIXELS, net.transforms).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("batch", "shared"), [(64, False), (24, True)])
def test_where_few_images_are_passed_batch_normalization_is_made_one_over_all_workers(
    batch: int, shared: bool, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    fit = a_fit(net, job(decided(TUNED), batch_size=batch), [0, 1] * 64, tmp_path, workers=2)
    fit.world.device, fit.normalization = torch.device("cuda"), "batch"
    monkeypatch.setattr(Trainer, "_parallel", lambda self: self.model)
    before = set(net.state_dict())
    fit.arm("scratch", 0, 0.1, State(arm="head"))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in fit.model.modules()) is shared
    assert set(fit.model.state_dict()) == before  # what is exported is the plain network


def test_the_progress_and_the_record_of_fine_tuning_say_how_fast_it_is(job: Make, tmp_path: Path) -> None:
    trained(job(decided(TUNED), epochs=2), tmp_path / "run")
    told = [json.loads(line)["text"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    lines = [text for text in told if re.match(r"fine-tune epoch \d/2, ", text)]
    assert len(lines) >= 2
    assert all(re.search(r", \d+ images/s, waited \d+% for data, \d+:\d\d left$", text) for text in lines)
    speed = json.loads((tmp_path / "run" / "scratch" / "finished" / "history.json").read_text())["speed"]
    assert speed["images_per_second"] > 0
    assert 0 < speed["waited_for_data"] < 1  # the first batch of an epoch is waited for


# --- what goes wrong ------------------------------------------------------------------------------------------------------------------


def exploding(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> list[int]:
    """Let the gradient be no number at these steps (counted over the whole run)."""
    steps = [0]
    plain = trainer.nn.utils.clip_grad_norm_

    def clip(parameters: Any, most: float) -> torch.Tensor:
        steps[0] += 1
        return torch.tensor(math.nan) if steps[0] in at else plain(parameters, most)

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", clip)
    return steps


def test_a_run_that_diverges_goes_back_with_half_the_rate(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exploding(monkeypatch, {6})
    weights = trained(job(decided(TUNED)), tmp_path / "run")
    assert finished(tmp_path / "run")["slower"] == 1
    assert all(v.isfinite().all() for v in weights.values())
    assert [h["epoch"] for h in history(tmp_path / "run") if h["arm"] == "fine-tune"] == [1, 2, 3]
    assert "diverged: back to epoch 1 with half the rate" in (tmp_path / "run.jsonl").read_text()


def test_going_back_restores_weights_and_optimizer_and_halves_the_rate_from_there_on(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = len(dataset.read_manifest(Path(job(decided(TUNED)).manifest)).used("train"))
    each = math.ceil(images / 16)
    exploding(monkeypatch, {each + 3})  # the third step of the second epoch
    rates, moved, plain = rates_of(monkeypatch), [], Trainer._go_back

    def go_back(self: Trainer, *given: Any) -> Any:
        moved.append(not same(self.model.state_dict(), self.checkpoint.current))
        moving, average = plain(self, *given)
        assert same(self.model.state_dict(), self.checkpoint.current)
        assert same(flat(moving), self.checkpoint.optimizer)
        assert same(average.weights, self.checkpoint.average)
        assert flat(moving)
        return moving, average

    monkeypatch.setattr(Trainer, "_go_back", go_back)
    trained(job(decided(TUNED, average=0.9), epochs=3), tmp_path / "run")
    assert moved == [True]
    peak = TUNED.recipe.rate("none", 32) * 16 / 64
    wanted = [peak * schedule(step, 3 * each, TUNED.recipe.warm_up) for step in range(3 * each)]
    assert rates == pytest.approx([*wanted[: each + 2], *(rate / 2 for rate in wanted[each:])])


@pytest.mark.parametrize(("look", "images", "taken", "again"), [
    (2, 10**6, 1, 0),  # looked at before the step is taken
    (1000, 10**6, None, 0),  # at the end of the epoch, all of which is thrown away
    (1000, 16, 2, 1),  # before a part of the epoch is kept
])  # fmt: skip
def test_a_gradient_that_is_no_number_between_two_looks_is_not_overlooked(
    look: int, images: int, taken: int | None, again: int, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "LOOK_STEPS", {"cpu": look})
    monkeypatch.setattr(trainer, "CHECKPOINT_IMAGES", images)
    each = math.ceil(len(dataset.read_manifest(Path(job(decided(TUNED)).manifest)).used("train")) / 16)
    exploding(monkeypatch, {each + 2})  # the second step of the second epoch
    rates = rates_of(monkeypatch)
    trained(job(decided(TUNED), epochs=2), tmp_path / "run")
    peak = TUNED.recipe.rate("none", 32) * 16 / 64
    wanted = [peak * schedule(step, 2 * each, TUNED.recipe.warm_up) for step in range(2 * each)]
    assert rates == pytest.approx([*wanted[: each + (each if taken is None else taken)], *(rate / 2 for rate in wanted[each + again :])])


@pytest.mark.parametrize(("at", "given_up"), [({6, 9}, False), ({6, 9, 12}, True)])
def test_the_rate_is_halved_twice_and_no_more(
    at: set[int], given_up: bool, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exploding(monkeypatch, at)
    if given_up:
        with pytest.raises(TrainingError, match=r"in epoch 2, at a quarter of the rate"):
            trained(job(decided(TUNED)), tmp_path / "run")
    else:
        weights = trained(job(decided(TUNED)), tmp_path / "run")
        assert finished(tmp_path / "run")["slower"] == 2
        assert [h["epoch"] for h in history(tmp_path / "run") if h["arm"] == "fine-tune"] == [1, 2, 3]
        assert all(v.isfinite().all() for v in weights.values())


def test_early_stopping_goes_back_to_the_weights_of_the_best_epoch(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.5, 0.9, 0.6, 0.9, 0.7])
    seen: dict[int, dict[str, torch.Tensor]] = {}
    validated, remember = trainer.validated, Checkpoints.keep

    def scripted(*given: Any) -> tuple[float, float, str]:
        return next(accuracies), 1.0, validated(*given)[2]

    def keep(self: Checkpoints, state: State, *rest: Any) -> None:
        remember(self, state, *rest)
        seen[state.epoch] = self.current

    monkeypatch.setattr(trainer, "validated", scripted)
    monkeypatch.setattr(Checkpoints, "keep", keep)
    weights = trained(job(replace(decided(TUNED, patience=2), init="plain"), epochs=9), tmp_path / "run")
    assert max(seen) == 4  # as good again is not better
    assert same(weights, seen[2])
    assert not any(same(weights, seen[epoch]) for epoch in (1, 3, 4))
    assert finished(tmp_path / "run")["best_epoch"] == 2


def test_a_run_that_goes_on_diverging_is_given_up_with_the_way_out(
    job: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exploding(monkeypatch, set(range(1000)))
    with pytest.raises(TrainingError, match=r"expected fine-tune to converge.*train\.override"):
        trained(job(decided(TUNED)), tmp_path / "run")


def test_memory_that_runs_out_halves_the_parts_and_keeps_the_batch(
    job: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    plain = trainer.normalize

    def small(pixels: torch.Tensor, transforms: Any) -> torch.Tensor:
        if len(pixels) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        seen.append(len(pixels))
        return plain(pixels, transforms)

    monkeypatch.setattr(trainer, "normalize", small)
    quiet = replace(decided(TUNED), slice="conv3")
    quiet = replace(quiet, readings=(replace(quiet.readings[0], tap="conv3", channels=128, grids=(1, 2)),))
    tight = trained(job(quiet, epochs=1), tmp_path / "tight")
    state = finished(tmp_path / "tight")
    assert state["accumulate"] == 4
    assert state["remarks"] == [
        "the GPU's memory ran out: each batch was taken in 2 parts",
        "the GPU's memory ran out: each batch was taken in 4 parts",
    ]
    assert max(seen) == 4
    monkeypatch.setattr(trainer, "normalize", plain)
    assert same(trained(job(quiet, epochs=1), tmp_path / "roomy"), tight, atol=1e-5)


def test_memory_for_not_even_one_image_is_a_clear_error(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "normalize", none)
    with pytest.raises(TrainingError, match=r"expected room in the GPU's memory for 1 images.*data\.size"):
        trained(job(decided(TUNED)), tmp_path / "run")


def test_workers_whose_memory_runs_out_all_begin_again_in_more_parts(job: Make, tmp_path: Path) -> None:
    """One cannot go on alone: the others wait for its gradient."""
    net = linear()
    fit = a_fit(net, job(decided(TUNED)), [0, 1, 2, 0, 1, 2, 0, 1], tmp_path, workers=2, rank=0)
    images = Images(tmp_path, fit.sides.train, fit.sides.transforms)

    def full(_: Any, given: Any) -> None:
        if len(given[0]) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    net.register_forward_pre_hook(full)
    for known, asked in ((0, 2), (2, 4)):
        with pytest.raises(OutOfMemory, match=r"memory for [24] images at a time") as error:
            fit._step(net, [0, 1, 2, 3], PIXELS[:4], images, 8, State(arm="fine-tune", accumulate=known))
        assert error.value.parts == asked
    fit._step(net, [0, 1, 2, 3], PIXELS[:4], images, 8, State(arm="fine-tune", accumulate=4))


def test_a_batch_that_is_taken_again_moves_batch_normalization_and_gradients_once(job: Make, tmp_path: Path) -> None:
    """The first part went well, memory ran out in the second: what the first one did to the statistics and gradients does not count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3))
    fit = a_fit(net, job(decided(TUNED)), [0, 1, 2, 0, 1, 2, 0, 1], tmp_path)
    images = Images(tmp_path, fit.sides.train, fit.sides.transforms)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    passes: list[int] = []

    def full(_: Any, given: Any) -> None:
        passes.append(len(given[0]))
        if len(passes) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = net.register_forward_pre_hook(full)
    fit._step(net, list(range(8)), PIXELS, images, 8, State(arm="fine-tune", accumulate=2))
    assert passes == [4, 4, 2, 2, 2, 2]
    hook.remove()

    def gradients() -> dict[str, torch.Tensor]:
        return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}

    tight, pulled = {key: value.clone() for key, value in net.state_dict().items()}, gradients()
    net.load_state_dict(start)
    fit._step(net, list(range(8)), PIXELS, images, 8, State(arm="fine-tune", accumulate=4))
    assert same(tight, net.state_dict(), atol=0)
    assert pulled
    assert same(pulled, gradients(), atol=0)
    assert int(tight["0.num_batches_tracked"]) == 4


def test_a_run_that_begins_again_in_parts_takes_them_and_says_so(job: Make, tmp_path: Path) -> None:
    quiet = replace(decided(TUNED), slice="conv3")
    quiet = replace(quiet, readings=(replace(quiet.readings[0], tap="conv3", channels=128, grids=(1, 2)),))
    whole = trained(job(quiet, epochs=1), tmp_path / "whole")
    parts = trained(replace(job(quiet, epochs=1), parts=4), tmp_path / "parts")
    state = finished(tmp_path / "parts")
    assert (state["accumulate"], state["remarks"]) == (4, ["the GPU's memory ran out: each batch was taken in 4 parts"])
    assert same(parts, whole, atol=1e-5)


def test_a_time_budget_ends_a_run_with_the_best_model_so_far(job: Make, tmp_path: Path) -> None:
    weights = trained(job(decided(TUNED, solve_again=True), epochs=500, budget_minutes=0.03), tmp_path / "run")
    state = finished(tmp_path / "run")
    assert state["remarks"][1:] == ["train.budget_minutes left no time to solve the head on what was trained"]
    assert re.fullmatch(r"train\.budget_minutes ended fine-tune (in|after) epoch \d+ of 500", state["remarks"][0])
    tuned = [h["accuracy"] for h in state["history"] if h["arm"] == "fine-tune"]
    assert len(tuned) < 500
    assert state["best_accuracy"] >= max(state["history"][0]["accuracy"], tuned[-1])
    assert all(v.isfinite().all() for v in weights.values())


@pytest.mark.parametrize("broken_off", [False, True])
def test_a_time_budget_gives_back_the_best_finished_epoch(
    broken_off: bool, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, seen = [0.95, 0.97, 0.6, 0.99], {}
    validated, remember, left = trainer.validated, Checkpoints.keep, list(told)

    def scripted(*given: Any) -> tuple[float, float, str]:
        return left.pop(0), 1.0, validated(*given)[2]

    def keep(self: Checkpoints, state: State, *rest: Any) -> None:
        remember(self, state, *rest)
        seen[state.epoch] = self.current

    monkeypatch.setattr(trainer, "validated", scripted)
    monkeypatch.setattr(Checkpoints, "keep", keep)
    asked: list[int] = []

    def passed(_: TimeBudget) -> bool:
        asked.append(len(left))
        # After the third epoch, or after the first step of it.
        return len(left) == 1 or (broken_off and asked.count(2) == 2)

    monkeypatch.setattr(TimeBudget, "passed", passed)
    weights = trained(job(replace(decided(TUNED), init="plain"), epochs=9, budget_minutes=1000), tmp_path / "run")
    state = finished(tmp_path / "run")
    assert [h["accuracy"] for h in state["history"]] == told[:3]
    assert (state["best_epoch"], state["best_accuracy"]) == (2, 0.97)
    assert state["remarks"] == [f"train.budget_minutes ended fine-tune {'in' if broken_off else 'after'} epoch 3 of 9"]
    assert same(weights, seen[2])


@pytest.mark.parametrize(("epochs", "looks", "remarks"), [
    (9, 5, ["train.budget_minutes ended fine-tune after epoch 5 of 9"]),
    (5, 4, []),  # what has come to its end was not ended by the time
])  # fmt: skip
def test_a_gpu_that_looks_at_the_clock_seldom_looks_at_it_after_each_epoch_but_the_last(
    epochs: int, looks: int, remarks: list[str], job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(TimeBudget, "passed", lambda _: bool(looked.append(0)) or len(looked) > 4)
    monkeypatch.setattr(trainer, "LOOK_STEPS", {"cpu": 1000})
    fit = a_fit(linear(), job(decided(TUNED), budget_minutes=1000, epochs=9), [0, 1, 2] * 16, tmp_path)
    batches = [([0, 1, 2, 3], PIXELS[:4])] * 3
    monkeypatch.setattr(Trainer, "_images", lambda self, epochs: (ListedImages(self, batches), ListedImages(self, [])))
    monkeypatch.setattr(trainer, "probabilities", lambda *_: torch.full((2, 3), 1 / 3))
    state = State(arm="head")
    fit.arm("fine-tune", epochs, 0.1, state)
    assert (state.epoch, len(looked)) == (5, looks)
    assert state.remarks == remarks


@pytest.mark.parametrize(("told", "kept"), [
    ([0.9, 0.95, 0.8], 3),  # the schedule's end counts, whatever was better on the way
    ([0.99, 0.2, 0.1], 0),  # clearly worse than the head at the end: the head
])  # fmt: skip
@pytest.mark.parametrize("budget", [0.0, 1000.0])
def test_a_time_budget_that_is_not_reached_keeps_what_a_free_run_keeps(
    budget: float, told: list[float], kept: int, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, seen = list(told), {}

    def scripted(chances: torch.Tensor, labels: Any) -> tuple[float, float, str]:
        accuracy = left.pop(0)
        right = np.arange(len(labels)) < round(accuracy * len(labels))
        return accuracy, 1.0, pack(right)

    remember = Checkpoints.keep

    def keep(self: Checkpoints, state: State, *rest: Any) -> None:
        remember(self, state, *rest)
        seen[state.epoch] = self.current

    monkeypatch.setattr(trainer, "validated", scripted)
    monkeypatch.setattr(train, "validated", lambda chances, labels: (0.9, 1.0, pack(np.arange(len(labels)) < round(0.9 * len(labels)))))
    monkeypatch.setattr(Checkpoints, "keep", keep)
    weights = trained(job(decided(TUNED), epochs=3, budget_minutes=budget), tmp_path / "run")
    state = finished(tmp_path / "run")
    assert (state["best_arm"], state["best_epoch"]) == (("fine-tune", 3) if kept else ("head", 0))
    assert state["remarks"] == []
    if kept:
        assert same(weights, seen[kept])
    else:
        assert not any(same(weights, each) for each in seen.values())


def test_time_that_was_spent_before_an_interruption_counts(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not TimeBudget(1, LocalContext(tmp_path), 50.0).late()
    assert TimeBudget(1, LocalContext(tmp_path), 60.0).passed()
    begun: list[float] = []

    class Noted(TimeBudget):
        def __init__(self, minutes: float, world: Any, before: float) -> None:
            super().__init__(minutes, world, before)
            begun.append(before)

    plain, written = LocalContext.report, [0]

    def stop(self: LocalContext, metrics: Any, folder: Path | None) -> None:
        plain(self, metrics, folder)
        written[0] += 1
        if written[0] == 2:
            raise Stopped

    monkeypatch.setattr(train, "TimeBudget", Noted)
    with monkeypatch.context() as patched:
        patched.setattr(LocalContext, "report", stop)
        with pytest.raises(Stopped):
            trained(job(decided(TUNED), budget_minutes=1000), tmp_path / "run")
    trained(job(decided(TUNED), budget_minutes=1000), tmp_path / "run")
    assert begun[0] == 0.0
    assert begun[1] > 0.0


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_of_several_workers_the_first_one_s_clock_counts(first: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends alone, or writes alone, leaves the others waiting for ever."""

    def broadcast(tensors: Any, world: LocalContext) -> None:
        for tensor in tensors:
            tensor.fill_(first)

    monkeypatch.setattr(trainer, "broadcast", broadcast)
    monkeypatch.setattr(checkpoint, "broadcast", broadcast)
    world = LocalContext(tmp_path)
    world.size, world.rank = 2, 1
    for spent in (0.0, 1e9):
        assert TimeBudget(1, world, spent).passed() is bool(first)
        kept = Checkpoints(world, tmp_path, linear())
        kept._took, kept._ended = 1.0, -spent
        assert kept.due() is bool(first)
    assert not TimeBudget(0, world, 1e9).passed()


def test_each_checkpoint_says_how_long_the_run_has_taken(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the head, each epoch and each part of one: what an interruption repeats is all that is not counted."""
    monkeypatch.setattr(trainer, "CHECKPOINT_IMAGES", 32)
    seconds: list[float] = []
    plain = Checkpoints.write

    def write(self: Checkpoints, state: State) -> None:
        plain(self, state)
        seconds.append(json.loads((self.written / "state.json").read_text())["seconds"])

    monkeypatch.setattr(Checkpoints, "write", write)
    trained(job(decided(TUNED), epochs=2, budget_minutes=1000), tmp_path / "run")
    assert len(seconds) > 3
    assert seconds == sorted(set(seconds))
    seconds.clear()
    trained(job(decided(TUNED), epochs=2), tmp_path / "free")
    assert set(seconds) == {0.0}  # where they are not bounded they are not kept: two runs are the same bytes


def test_a_time_budget_that_is_not_needed_changes_nothing(job: Make, tmp_path: Path) -> None:
    bounded = trained(job(decided(TUNED), epochs=3, budget_minutes=1000), tmp_path / "bounded")
    assert same(trained(job(decided(TUNED), epochs=3), tmp_path / "free"), bounded)


def test_a_time_budget_that_ends_before_fine_tuning_leaves_the_head(job: Make, tmp_path: Path) -> None:
    trained(job(decided(TUNED), epochs=3, budget_minutes=1e-9), tmp_path / "run")
    state = finished(tmp_path / "run")
    assert [h["arm"] for h in state["history"]] == ["head"]
    assert any("before fine-tuning began" in remark for remark in state["remarks"])


def test_a_time_budget_ends_the_random_views_of_a_frozen_case(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    compute = train.frozen_features

    def counted(reader: Any, images: Any, world: Any, tell: Any, deadline: Any = None) -> Any:
        asked.append("view" if images.augment else "image")
        there = compute(reader, images, world, tell)
        return there[:-1] if asked.count("view") == 3 and deadline is not None else there  # the third is cut short

    monkeypatch.setattr(train, "frozen_features", counted)
    trained(job(decided(CASES[0]), views=5, budget_minutes=1000), tmp_path / "run")
    assert finished(tmp_path / "run")["remarks"] == ["train.budget_minutes ended the features after 2 of 5 random views"]
    assert asked == ["image", "image", "view", "view", "view"]


def test_where_the_time_is_up_no_random_view_is_begun(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    compute = FeatureExtractor.compute
    monkeypatch.setattr(
        FeatureExtractor,
        "compute",
        lambda self, images, indices, told: (passed.append(len(indices)), compute(self, images, indices, told))[1],
    )
    trained(job(decided(CASES[0]), views=6, budget_minutes=1e-9), tmp_path / "run")
    assert sum(passed) == len(dataset.read_manifest(tmp_path / "manifest.parquet").used("train", "val"))
    assert finished(tmp_path / "run")["remarks"][0] == "train.budget_minutes ended the features after 0 of 6 random views"


# --- no validation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [{}, {"patience": 1}])
def test_without_validation_images_what_was_trained_is_what_is_kept(recipe: dict[str, Any], job: Make, tmp_path: Path) -> None:
    made = job(replace(decided(TUNED, scratch_from=1, **recipe), init="auto"), epochs=3)
    manifest = dataset.read_manifest(tmp_path / "manifest.parquet")
    none = replace(manifest, rows=tuple(r for r in manifest.rows if r.split != "val"))
    dataset.write_manifest(none, tmp_path / "manifest.parquet", tmp_path / "quarantine.csv")
    trained(made, tmp_path / "run")
    state = finished(tmp_path / "run")
    assert [h["arm"] for h in state["history"]] == ["head", *["fine-tune"] * 3]  # nothing says that scratch would be better
    assert (state["best_arm"], state["best_epoch"]) == ("fine-tune", 3)
    told = Path(made.history).read_text()
    assert "head solved, no validation images" in told
    assert "validation accuracy" not in told  # 0.0% would look like a result


def test_without_validation_images_a_time_budget_keeps_what_was_trained(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(decided(TUNED), epochs=9, budget_minutes=1000)
    manifest = dataset.read_manifest(tmp_path / "manifest.parquet")
    none = replace(manifest, rows=tuple(r for r in manifest.rows if r.split != "val"))
    dataset.write_manifest(none, tmp_path / "manifest.parquet", tmp_path / "quarantine.csv")
    monkeypatch.setattr(trainer, "LOOK_STEPS", {"cpu": 1000})
    plain = Trainer._epoch
    monkeypatch.setattr(Trainer, "_epoch", lambda self, *given: (setattr(self.deadline, "before", 1e9), plain(self, *given))[1])
    weights = trained(made, tmp_path / "run")
    state = finished(tmp_path / "run")
    assert state["remarks"] == ["train.budget_minutes ended fine-tune after epoch 1 of 9"]
    assert (state["best_arm"], state["best_epoch"]) == ("fine-tune", 1)
    assert not torch.equal(
        weights["trunk.conv1.0.weight"], catalogue.load("demonstration", "DEFAULT").module.state_dict()["conv1.0.weight"]
    )


def test_fine_tuning_gained_if_the_epoch_that_is_kept_did() -> None:
    line = {"loss": 0.0, "log_loss": 1.0, "correct": ""}
    head, best, last = (
        {"arm": arm, "epoch": e, "accuracy": a} | line for arm, e, a in (("head", 0, 0.9), ("fine-tune", 1, 0.95), ("fine-tune", 2, 0.89))
    )
    assert State("fine-tune", best_arm="fine-tune", best_epoch=1, best_accuracy=0.95, history=[head, best, last]).gained
    assert not State("fine-tune", best_arm="fine-tune", best_epoch=2, best_accuracy=0.89, history=[head, last]).gained
    assert not State("fine-tune", best_arm="head", best_accuracy=0.9, history=[head, last]).gained


@pytest.mark.parametrize(("balance", "imbalance"), [("loss", 10.0), ("none", math.inf)])
def test_the_head_weighs_classes_as_the_recipe_says(
    balance: str, imbalance: float, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    solve = train.solve_head

    def noted(x: Any, y: Any, blocks: Any, classes: int, asked: float, *rest: Any, **named: Any) -> Any:
        seen.append(asked)
        return solve(x, y, blocks, classes, asked, *rest, **named)

    monkeypatch.setattr(train, "solve_head", noted)
    trained(job(decided(CASES[0], balance=balance)), tmp_path / "run")
    assert set(seen) == {imbalance}


def test_a_time_budget_ends_the_features_of_a_frozen_case(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlpipeline.training.train.AT_ONCE", 8)
    trained(job(decided(CASES[0]), budget_minutes=1e-9), tmp_path / "run")
    first, second, third = finished(tmp_path / "run")["remarks"]
    assert re.fullmatch(r"train\.budget_minutes ended the features after 8 of \d+ validation images", first)
    assert re.fullmatch(r"train\.budget_minutes ended the features after 8 of \d+ training images", second)
    assert third.endswith("it may lie short of its optimum, and it was not solved once more with the validation images")


def test_a_time_budget_ends_the_decoding(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "AT_ONCE", 16)
    fit = a_fit(linear(), job(decided(TUNED), budget_minutes=1000), [0, 1, 2] * 16, tmp_path)
    made: list[int] = []
    monkeypatch.setattr(DecodedCache, "fill", lambda _, rows, told: made.append(len(rows)))
    monkeypatch.setattr(DecodedCache, "open", lambda *_: made.append(0))
    monkeypatch.setattr(TimeBudget, "passed", lambda _: len(made) == 2)
    fit._images(epochs=2)
    assert made == [16, 16]


# --- interruption -----------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("number", range(2, 7))
def test_a_long_epoch_is_kept_in_parts_and_gone_on_with(
    number: int,
    job: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Averages, schedule, sampler, dropout and the summed loss stand where they stood."""
    monkeypatch.setattr(trainer, "CHECKPOINT_IMAGES", 32)
    decision = decided(TUNED, average=0.8, mixup=0.2, balance="sampler", imbalance=1.0, optimizer="adamw", rate_none=1e-3)
    wanted = trained(job(decision, epochs=2), tmp_path / "calm")
    world = LocalContext(tmp_path / "run")
    written, plain = [0], LocalContext.report

    def stop(self: LocalContext, metrics: Any, folder: Path | None) -> None:
        plain(self, metrics, folder)
        written[0] += 1
        if written[0] == number:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(LocalContext, "report", stop)
        with pytest.raises(Stopped):
            trained(job(decision, epochs=2), tmp_path / "run")
    with world.restore() as folder:
        assert (folder / "state.json").exists()
    assert same(trained(job(decision, epochs=2), tmp_path / "run"), wanted)
    assert history(tmp_path / "run") == history(tmp_path / "calm")


def written_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the epochs at which checkpoints are written."""
    epochs: list[int] = []
    plain = Checkpoints.write

    def write(self: Checkpoints, state: State) -> None:
        plain(self, state)
        epochs.append(state.epoch)

    monkeypatch.setattr(Checkpoints, "write", write)
    return epochs


def test_checkpoints_between_epochs_wait_until_they_take_a_small_share_of_the_time(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write takes 2 s by this clock, an epoch 5 s: one tenth is 18 s between two writes."""
    now = [0.0]
    plain, report = trainer.probabilities, LocalContext.report

    def validated(*given: Any) -> torch.Tensor:
        now[0] += 5
        return plain(*given)

    def slow(self: LocalContext, *given: Any) -> None:
        now[0] += 2
        report(self, *given)

    monkeypatch.setattr(trainer, "probabilities", validated)
    monkeypatch.setattr(LocalContext, "report", slow)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(checkpoint, "SHARE", 0.1)
    written = written_at(monkeypatch)
    seldom = trained(job(decided(TUNED), epochs=9), tmp_path / "run")
    assert written == [0, 4, 8]
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)
    assert same(seldom, trained(job(decided(TUNED), epochs=9), tmp_path / "often"))
    assert written[3:] == list(range(10))


@pytest.mark.parametrize("diverges", [False, True])
def test_a_run_between_two_checkpoints_is_lost_and_repeated_to_the_same_end(
    diverges: bool, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step goes back to is the last epoch, written or not: how often is written changes no weights."""
    decision = decided(TUNED, average=0.8)
    with monkeypatch.context() as patched:
        steps = exploding(patched, set())
        trained(job(decision, epochs=1), tmp_path / "one")
    each = steps[0]

    def run(name: str, stop: int = 0) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patched:
            # In the second step of the third epoch, counted from where the run starts.
            exploding(patched, {(1 if name == "gone on" else 2) * each + 2} if diverges else set())
            if stop:
                plain = Checkpoints.keep

                def keep(self: Checkpoints, state: State, *rest: Any) -> None:
                    plain(self, state, *rest)
                    if state.epoch == stop:
                        raise Stopped

                patched.setattr(Checkpoints, "keep", keep)
            return trained(job(decision, epochs=4), tmp_path / ("cut" if name == "gone on" else name))

    often = run("often")
    written = written_at(monkeypatch)
    monkeypatch.setattr(Checkpoints, "due", lambda self: written[-1] == 0)  # the frozen head, the first epoch, and no more
    assert same(run("seldom"), often)
    assert written == [0, 1]
    with pytest.raises(Stopped):
        run("cut", stop=3)
    with LocalContext(tmp_path / "cut").restore() as folder:
        assert json.loads((folder / "state.json").read_text())["epoch"] == 1
    assert same(run("gone on"), often)
    assert finished(tmp_path / "cut")["slower"] == diverges
    assert history(tmp_path / "cut") == history(tmp_path / "often")


def test_what_is_remembered_for_a_checkpoint_stays_what_it_was_while_training_goes_on(job: Make, tmp_path: Path) -> None:
    net = linear()
    fit = a_fit(net, job(decided(TUNED, average=0.9)), [0, 1, 2] * 16, tmp_path)
    moving, average = fit._start(0.1, State(arm="fine-tune"))

    def epoch() -> None:
        fit._epoch(net, ListedImages(fit, [(list(range(8)), PIXELS)]), moving, average, 0.1, State(arm="fine-tune"), 1)

    def remembered() -> list[dict[str, torch.Tensor]]:
        kept = fit.checkpoint
        return [{k: v.clone() for k, v in part.items()} for part in (kept.current, kept.best, kept.spare, kept.optimizer, kept.average)]

    epoch()
    fit.checkpoint.keep(State(arm="fine-tune"), moving, average)
    fit.checkpoint.keep_best()
    fit.checkpoint.keep_spare()
    before = remembered()
    assert all(before)
    epoch()
    assert not same(before[0], net.state_dict())
    assert all(same(old, new) for old, new in zip(before, remembered(), strict=True))


def test_a_checkpoint_gives_back_all_that_was_remembered(job: Make, tmp_path: Path) -> None:
    net = linear()
    written = Checkpoints(LocalContext(tmp_path / "world"), tmp_path, net)
    names = ("current", "best", "spare", "optimizer", "average")
    for number, name in enumerate(names):
        setattr(written, name, {key: torch.full_like(value, number) for key, value in net.state_dict().items()})
    state = State("fine-tune", epoch=3, step=2, spare_epoch=1, averaged=5, slower=1, seconds=7.5, remarks=["one"])
    written.write(state)
    read = Checkpoints(LocalContext(tmp_path / "world"), tmp_path, net)
    assert read.restore(None) == state
    assert all(same(getattr(read, name), getattr(written, name)) for name in names)
    assert same(net.state_dict(), written.current)


def test_what_a_run_has_kept_itself_comes_before_what_it_was_started_from(tmp_path: Path) -> None:
    """A train stage that goes on where a race ended, and is interrupted, does not begin at the race's end once more."""
    net = linear()
    race, own = (Checkpoints(LocalContext(tmp_path / name), tmp_path / name, net) for name in ("race", "own"))
    race.write(State("fine-tune", epoch=1))
    assert own.restore(race.written) == State("fine-tune", epoch=1)
    own.write(State("fine-tune", epoch=2))
    assert own.restore(race.written) == State("fine-tune", epoch=2)


def test_an_arm_begins_with_nothing_of_the_one_before_it(job: Make, tmp_path: Path) -> None:
    """Neither momentum, nor average, nor a halved rate, nor an epoch in reserve; and a step that fails goes back to where this one began."""
    net = linear()
    fit = a_fit(net, job(decided(TUNED, average=0.9)), [0, 1, 2] * 16, tmp_path)
    state = State("fine-tune", slower=1, spare_epoch=2, spare_accuracy=0.9, spare_loss=0.1)
    moving, average = fit._start(0.1, state)
    fit._epoch(net, ListedImages(fit, [(list(range(8)), PIXELS)]), moving, average, 0.1, state, 1)
    fit.checkpoint.keep(state, moving, average)
    fit.checkpoint.keep_spare()
    net.load_state_dict(linear().state_dict())
    fit.arm("scratch", 0, 0.1, state)
    assert (state.arm, state.epoch, state.slower) == ("scratch", 0, 0)
    assert not state.cut_short()
    assert not fit.checkpoint.spare
    moving, average = fit._start(0.1, state)
    assert not flat(moving)
    assert average.steps == 0
    assert same(average.weights, net.state_dict())
    assert same(fit.checkpoint.current, net.state_dict())


# --- compiled networks ----------------------------------------------------------------------------------------------------------------


def test_a_compiled_network_takes_the_same_steps_and_is_kept_as_the_plain_one(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the compiler's last part, which needs a minute of g++: what is traced is what is trained."""
    compiled: list[nn.Module] = []
    plain = torch.compile

    def traced(network: nn.Module) -> Any:
        compiled.append(network)
        return plain(network, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    quiet = replace(decided(TUNED), slice="conv1", readings=(TapPooling("conv1", 32, (1, 2)),))
    weights = [
        trained(job(replace(quiet, recipe=replace(quiet.recipe, compile=on)), epochs=1, batch_size=100), tmp_path / str(on))
        for on in (False, True)
    ]
    assert len(compiled) == 1
    assert same(*weights, atol=1e-5)


def test_without_a_compiler_the_way_out_is_told(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            from torch._inductor.exc import InductorError

            raise InductorError(RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for more"), None)

        return call

    monkeypatch.setattr(torch, "compile", refused)
    with pytest.raises(
        TrainingError, match=r"but: RuntimeError: No working C\+\+ compiler found\. Install .* compile out of train\.override"
    ):
        trained(job(decided(TUNED, compile=True), epochs=1), tmp_path / "run")


@pytest.mark.skipif("TLPIPELINE_SLOW" not in os.environ, reason="a minute of g++: set TLPIPELINE_SLOW=1")
def test_a_network_that_the_compiler_has_translated_trains(job: Make, tmp_path: Path) -> None:
    quiet = replace(decided(TUNED), slice="conv1", readings=(TapPooling("conv1", 32, (1, 2)),))
    weights = [
        trained(job(replace(quiet, recipe=replace(quiet.recipe, compile=on)), epochs=1, batch_size=100), tmp_path / str(on))
        for on in (False, True)
    ]
    assert same(*weights, atol=1e-4)


# --- overrides ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "expected auto or sgd or adamw, found 'lion'"),
        ({"compile": 1}, "expected bool, found 1"),
        ({"mixup": True}, "expected float, found True"),
        ({"crop": 0}, "expected 0.01 to 1, found 0"),
        ({"accumulate": 0}, "expected at least 1, found 0"),
        ({"average": 1.5}, "expected 0 to 0.99999, found 1.5"),
        ({"mixap": 0.2}, "did you mean mixup"),
    ],
)
def test_a_recipe_value_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        decided(TUNED).overridden(changes)


def test_a_frozen_case_cannot_start_from_random_weights() -> None:
    frozen: Decision = decided(CASES[0])
    with pytest.raises(ParamsError, match="whose backbone is frozen"):
        frozen.overridden({"init": "random"})
    assert frozen.overridden({"init": "pretrained"}) == frozen


def test_a_state_from_before_a_field_was_added_can_be_read() -> None:
    assert State(arm="head").remarks == []


def test_of_validations_of_equal_accuracy_the_one_of_less_loss_is_better() -> None:
    state = State(arm="fine-tune", epoch=1)
    assert state.better(0.9, 0.5)
    state.epoch = 2
    assert state.better(0.9, 0.4)
    assert not state.better(0.9, 0.4)
    assert not state.better(0.8, 0.1)
    assert (state.best_epoch, state.best_loss) == (2, 0.4)


def test_the_best_epoch_of_an_arm_is_its_own_and_of_equals_the_one_of_less_loss() -> None:
    state = State(arm="scratch")
    state.history = [
        {"arm": arm, "epoch": epoch, "accuracy": accuracy, "log_loss": loss}
        for arm, epoch, accuracy, loss in (
            ("fine-tune", 1, 0.99, 0.1),
            ("scratch", 1, 0.8, 0.7),
            ("scratch", 2, 0.8, 0.5),
            ("scratch", 3, 0.8, 0.6),
        )
    ]
    assert (state.best_epoch_of("scratch"), state.best_epoch_of("fine-tune"), state.best_epoch_of("head")) == (2, 1, 0)


def test_the_average_counts_batches_as_the_model_does() -> None:
    net = nn.BatchNorm1d(2)
    average = Average(net, 0.9)
    net.train()(torch.randn(4, 2))
    net(torch.randn(4, 2))
    average.update()
    assert average.weights["num_batches_tracked"] == 2
    assert average.weights["running_mean"].abs().sum() > 0
