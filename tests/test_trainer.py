"""Fine-tuning: each recipe value does what it says, divergence is taken back, memory and time that run out lose nothing."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.faulty_network import BACKBONE, FAULTS
from tests.helpers.training import EAGER, Clock, Crashing, Interrupted, Recording, Ticking, decided, finished_state, history, same, trained
from tlpipeline.backbones import catalogue, taps
from tlpipeline.backbones.classifier import Classifier
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice.cases import CASES
from tlpipeline.choice.decision import Decision
from tlpipeline.data import cache, dataset
from tlpipeline.data.augment import augmentation
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images, normalize
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import OutOfMemory, ParamsError, TrainingError
from tlpipeline.stats import pack
from tlpipeline.training.accumulation import GradientAccumulation
from tlpipeline.training.budget import TimeBudget
from tlpipeline.training.checkpoint import Best, Checkpoints, State
from tlpipeline.training.config import Cadence, TrainingConfig
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.images import Datasets, decoded_side
from tlpipeline.training.optim import decays, flat, lr_shares, optimizer, schedule, unflat
from tlpipeline.training.progress import ProgressWriter
from tlpipeline.training.recipe import Recipe, current_names
from tlpipeline.training.trainer import Run, Trainer

Make = Callable[..., TrainingConfig]
TUNED = CASES[2]
PIXELS = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def quiet(**recipe: Any) -> Decision:
    """Fine-tuning of the demonstration network up to its last convolution: without dropout, whose draws differ between parts of a batch."""
    made = decided(TUNED, **recipe)
    return replace(made, slice="conv3", readings=(TapPooling("conv3", 128, (1, 2)),))


def small(**recipe: Any) -> Decision:
    """Fine-tuning of the small network that can be made to fail."""
    made = decided(TUNED, **{"lr_none": 0.02} | recipe)
    return replace(made, slice="conv2", readings=(TapPooling("conv2", 16, (1,)),), init="plain")


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    FAULTS.reset()
    yield
    FAULTS.reset()


def train_images(config: TrainingConfig) -> int:
    return len(dataset.read_manifest(Path(config.manifest)).used("train"))


def without_validation(config: TrainingConfig) -> None:
    manifest = dataset.read_manifest(Path(config.manifest))
    rows = tuple(row for row in manifest.rows if row.split != "val")
    dataset.write_manifest(replace(manifest, rows=rows), Path(config.manifest), Path(config.manifest).with_name("quarantine.csv"))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def a_trainer(
    net: nn.Module, config: TrainingConfig, labels: list[int], place: Path, workers: int = 1, normalization: str = "none", side: int = 8
) -> Trainer:
    """A trainer of this network on images that have these labels; none of them is looked at."""
    rows = [Row(str(i), f"{i:032x}", "", "", 8, 8, "RGB", "") for i in range(len(labels))]
    context, transforms = LocalContext(place), Transforms(side, side, (0.5,) * 3, (0.2,) * 3, "bilinear")
    context.size = workers
    datasets = Datasets(place, rows, rows[:2], np.array(labels), np.array(labels[:2]), transforms)
    run = Run(
        config, context, datasets, State(phase="head"), Checkpoints(context, place, net), Store(), TimeBudget(0, context),
        ProgressWriter(place / "progress", 0), place,
    )  # fmt: skip
    return Trainer(net, run, normalization)


# --- learning rates and weight decay ----------------------------------------------------------------------------------------------------


def test_blocks_nearer_to_the_images_get_smaller_learning_rates() -> None:
    net = catalogue.load("demonstration", "DEFAULT")
    blocks = taps.parameters_by_tap(net, "fc2")
    assert [len(block) for block in blocks] == [2] * 5
    found = lr_shares(blocks, 0.5)
    assert found["conv1.0.weight"] == 0.5**5
    assert found["fc2.1.bias"] == 0.5
    assert lr_shares(blocks, 1.0)["conv1.0.weight"] == 1.0


def test_the_optimizer_decays_neither_norms_nor_biases_and_follows_depth() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    net[2].weight.requires_grad_(False)
    made = optimizer(net, Recipe(), "batch", 0.1, [["0.weight", "0.bias"]], fused=False)
    assert isinstance(made, torch.optim.SGD)
    by_size = {p.numel(): g for g in made.param_groups for p in g["params"]}
    assert by_size[108]["weight_decay"] == 5e-4
    assert (by_size[108]["momentum"], by_size[108]["nesterov"]) == (0.9, True)
    assert all(g["weight_decay"] == (5e-4 if p.dim() > 1 else 0) for g in made.param_groups for p in g["params"])
    assert sum(p.numel() for g in made.param_groups for p in g["params"]) == 108 + 4 + 8 + 4  # what is frozen is left out
    layered = optimizer(net, Recipe(), "layer", 0.1, [["0.weight", "0.bias"]], fused=False)
    assert isinstance(layered, torch.optim.AdamW)
    assert {round(g["lr"], 6) for g in layered.param_groups} == {0.1, 0.075}
    assert {g["weight_decay"] for g in layered.param_groups} == {0.05, 0}
    assert isinstance(optimizer(net, Recipe(optimizer="adamw"), "batch", 0.1, [], fused=False), torch.optim.AdamW)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_continues_from_its_tensors(kind: str) -> None:
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


def test_only_matrices_and_kernels_decay() -> None:
    shapes = {
        "features.1.0.layer_scale": (96, 1, 1), "a.relative_position_bias_table": (169, 4), "encoder.pos_embedding": (1, 50, 192),
        "class_token": (1, 1, 192), "norm.weight": (96,), "attn.logit_scale": (4, 1, 1),
    }  # fmt: skip
    assert not any(decays(name, torch.zeros(shape)) for name, shape in shapes.items())
    assert decays("conv.weight", torch.zeros(8, 1, 3, 3))
    assert decays("head.weight", torch.zeros(10, 64))


@pytest.mark.parametrize("batch", [16, 2048])
def test_one_schedule_runs_through_all_epochs_at_a_rate_that_grows_with_the_batch(
    batch: int, job: Make, tmp_path: Path, steps: list[tuple[float, float]]
) -> None:
    config = job(small(warm_up=0.3), epochs=3, batch_size=batch, **BACKBONE)
    trained(config, tmp_path / "run")
    images = train_images(config)
    each, peak = math.ceil(images / batch), 0.02 * min(batch, images) / 64
    assert [lr for lr, _ in steps] == pytest.approx([peak * schedule(step, 3 * each, 0.3) for step in range(3 * each)])


def test_gradients_are_clipped_at_the_norm_of_the_recipe(job: Make, tmp_path: Path, steps: list[tuple[float, float]]) -> None:
    trained(job(small(clip=0.01), epochs=1, **BACKBONE), tmp_path / "run")
    assert [norm for _, norm in steps] == pytest.approx([0.01] * len(steps), rel=1e-3)


# --- images ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "picture", "side"), [
    (0.5, 1000, 91), (1.0, 1000, 64), (0.5, 70, 91), (0.5, 60, 64), (0.5, 33, 64), (0.5, 20, 32),
])  # fmt: skip
def test_images_are_kept_as_sharp_as_crops_can_show_and_no_larger_than_they_are(crop: float, picture: int, side: int) -> None:
    rows = [Row(str(i), f"{i:032x}", "", "", picture, 3 * picture, "RGB", "") for i in range(4)]
    transforms = Transforms(32, 32, (0.5,) * 3, (0.2,) * 3, "bilinear")
    assert decoded_side(Datasets(Path(), rows, [], np.zeros(4, np.int64), np.zeros(0, np.int64), transforms), crop) == side


def test_the_room_for_decoded_images_changes_no_bit_of_what_is_trained(make_images: Callable[..., Path], job: Make, tmp_path: Path) -> None:
    """The images are larger than the crops' side, so that a crop of the file would be another one. The first has a byte too little."""
    folder = make_images(classes=3, each=14, name="large", size=96)
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    dataset.write_manifest(manifest, tmp_path / "large.parquet", tmp_path / "large.csv")
    room = 3 * (len(manifest.used("train")) * 91**2 + len(manifest.used("val")) * 32**2)
    found, decoded = [], []
    for name, epochs, bytes_ in (("less", 2, room - 1), ("enough", 2, room), ("memory", 2, 0), ("once", 1, room)):
        place = "" if name == "memory" else str(tmp_path / f"cache-{name}")
        made = job(quiet(), images=str(folder), manifest=str(tmp_path / "large.parquet"), epochs=epochs, cache=place, cache_bytes=bytes_)
        found.append(trained(made, tmp_path / name))
        decoded.append(any("decoded" in kept.label or "prepared" in kept.label for kept in cache.info(Path(place))) if place else None)
    assert decoded == [False, True, None, False]
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_an_image_that_comes_again_in_an_epoch_gets_another_crop(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=2, each=10, name="again", size=64)
    rows = list(dataset.ingest(folder, {}, lambda done, total: None).rows)
    images = Images(folder, rows, Transforms(32, 32, (0.5,) * 3, (0.2,) * 3, "bilinear"), augmentation(0.3, True, 0, 1))
    first, again, third = (next(iter(images.batches([[3 + turn * len(rows)]])))[1] for turn in range(3))
    assert not torch.equal(first, again)
    assert not torch.equal(again, third)
    assert torch.equal(again, next(iter(images.batches([[3 + len(rows)]])))[1])


def test_weights_and_images_have_their_channels_last() -> None:
    net = catalogue.load("demonstration", "DEFAULT")
    classifier = Classifier(net, [TapPooling("conv3", 128, (1,))], 3, frozen=False)
    kernels = [p for p in classifier.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)
    assert normalize(PIXELS, net.transforms).is_contiguous(memory_format=torch.channels_last)


# --- the recipe -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [{"optimizer": "adamw", "lr_none": 1e-3}, {"layer_decay_other": 0.7}, {"balance": "sampler", "imbalance": 1.0}],
    ids=lambda recipe: next(iter(recipe)),
)
def test_each_recipe_value_trains_and_gives_another_model(recipe: dict[str, Any], job: Make, tmp_path: Path) -> None:
    plain = trained(job(decided(TUNED), epochs=2), tmp_path / "plain")
    other = trained(job(decided(TUNED, **recipe), epochs=2), tmp_path / "other")
    assert all(v.isfinite().all() for v in other.values())
    assert not same(plain, other)
    assert history(tmp_path / "other")[-1]["accuracy"] > 0.5


@pytest.mark.parametrize(("recipe", "weights"), [
    ({"imbalance": 2.0}, [8 / (3 * 5), 8 / (3 * 2), 8 / 3]), ({"imbalance": 100.0}, None), ({"imbalance": 2.0, "balance": "none"}, None),
])  # fmt: skip
def test_uneven_classes_weigh_alike(recipe: dict[str, Any], weights: list[float] | None, job: Make, tmp_path: Path) -> None:
    found = a_trainer(linear(), job(decided(TUNED, **recipe)), [0, 0, 0, 0, 0, 1, 1, 2], tmp_path).class_weights
    assert (None if found is None else found.tolist()) == (None if weights is None else pytest.approx(weights))


def test_the_head_weighs_classes_as_the_recipe_says() -> None:
    assert (Recipe().head_imbalance, Recipe(balance="none").head_imbalance) == (10.0, math.inf)


def test_the_balanced_sampler_draws_classes_alike(job: Make, tmp_path: Path) -> None:
    labels = [0] * 90 + [1] * 10
    sampler = a_trainer(linear(), job(decided(TUNED, balance="sampler", imbalance=2.0)), labels, tmp_path)
    drawn = np.concatenate([np.array(labels)[sampler.order(epoch) % 100] for epoch in range(20)])
    assert 0.45 < drawn.mean() < 0.55
    order = sampler.order(0)
    assert len(set(order.tolist())) == 100  # an image that comes again has another turn
    assert order.max() >= 300
    assert sorted(a_trainer(linear(), job(decided(TUNED)), labels, tmp_path).order(3)) == list(range(100))


@pytest.mark.parametrize("recipe", [{}, {"balance": "sampler", "imbalance": 1.0}])
def test_each_epoch_and_each_seed_has_an_order_of_its_own(recipe: dict[str, Any], job: Make, tmp_path: Path) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(a_trainer(linear(), job(decided(TUNED, **recipe), seed=seed), [0, 0, 1] * 16, tmp_path).order(epoch).tolist())

    assert order(0, 1) == order(0, 1)
    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


@pytest.mark.parametrize(("images", "batch", "workers", "taken"), [
    (20, 16, 1, [16, 4]), (19, 16, 1, [16]), (3, 16, 1, [3]), (12, 8, 2, [8, 4]), (11, 8, 2, [8]), (7, 6, 3, [6]),
])  # fmt: skip
def test_a_last_batch_of_few_images_is_left_for_another_epoch_unless_it_is_the_only_one(
    images: int, batch: int, workers: int, taken: list[int], job: Make, tmp_path: Path
) -> None:
    """A quarter of a batch is enough, if each worker has two images of it."""
    trainer = a_trainer(linear(), job(decided(TUNED), batch_size=batch), [i % 3 for i in range(images)], tmp_path, workers=workers)
    assert [len(b) for b in trainer.batches(0)] == taken


@pytest.mark.parametrize(("asked", "side", "phase", "kept"), [
    ("auto", 64, "fine-tune", True), ("auto", 63, "fine-tune", False), ("auto", 64, "scratch", False),
    ("fixed", 32, "fine-tune", True), ("fixed", 64, "scratch", False), ("batch", 64, "fine-tune", False),
])  # fmt: skip
def test_the_recipe_says_which_phase_freezes_the_statistics_of_batch_normalization(
    asked: str, side: int, phase: str, kept: bool, job: Make, tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 2))
    trainer = a_trainer(net, job(decided(TUNED, statistics=asked)), [0, 1] * 8, tmp_path, side=side)
    trainer.fit(phase, 0, 0.1)
    trainer.train_mode()
    assert net[1].training != kept
    assert net[4].training


def test_workers_share_the_statistics_of_batch_normalization_if_each_sees_few_images(job: Make, tmp_path: Path) -> None:
    made = job(decided(TUNED), batch_size=64)
    normed = a_trainer(linear(), made, [0, 1] * 32, tmp_path, workers=2, normalization="batch")
    assert normed.recipe.sync_below == 16
    assert [normed.shares_statistics(parts) for parts in (0, 1, 2, 3, 4)] == [False, False, False, True, True]
    assert not a_trainer(linear(), made, [0, 1] * 32, tmp_path, workers=2, normalization="layer").shares_statistics(4)


@pytest.mark.parametrize(("precision", "kind"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_steps_are_taken_in_bfloat16_if_the_processor_has_it(precision: str, kind: torch.dtype, job: Make, tmp_path: Path) -> None:
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), []
    config = job(decided(TUNED), precision=precision)
    manifest = dataset.read_manifest(Path(config.manifest))
    context = LocalContext(tmp_path / "kept")
    datasets = Datasets.of(Path(config.images), manifest, Transforms(32, 32, (0.5,) * 3, (0.2,) * 3, "bilinear"))
    progress, checkpoints = ProgressWriter(tmp_path / "progress", 0), Checkpoints(context, tmp_path / "scratch", net)
    trainer = Trainer(
        net, Run(config, context, datasets, State("head"), checkpoints, Store(), TimeBudget(0, context), progress, tmp_path), "none"
    )
    trainer.bfloat16 = precision == "auto"  # as on a processor that has it
    net.register_forward_hook(lambda module, given, out: seen.append(out.dtype) if module.training else None)
    trainer.fit("fine-tune", 1, 0.01)
    assert set(seen) == {kind}
    assert net[1].weight.dtype == torch.float32


# --- progress -------------------------------------------------------------------------------------------------------------------------


def test_the_progress_and_the_history_say_how_fast_fine_tuning_is(job: Make, tmp_path: Path) -> None:
    trained(job(decided(TUNED), epochs=2), tmp_path / "run")
    texts = [json.loads(line)["text"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    lines = [text for text in texts if re.match(r"fine-tune epoch \d/2, ", text)]
    assert len(lines) >= 2
    assert all(re.search(r", \d+ images/s, waited \d+% for data, \d+:\d\d left$", text) for text in lines)
    speed = json.loads((tmp_path / "run" / "scratch" / "finished" / "history.json").read_text())["speed"]
    assert speed["images_per_second"] > 0
    assert 0 < speed["waited_for_data"] < 1  # the first batch of an epoch is waited for


# --- divergence -----------------------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_returns_to_the_last_epoch_with_half_the_rate(
    job: Make, tmp_path: Path, steps: list[tuple[float, float]]
) -> None:
    """Weights and momentum are those of the last epoch: so are the gradients of the steps that are taken again, until the rate has an effect."""
    config = job(small(warm_up=0.0), epochs=3, **BACKBONE)
    each = math.ceil(train_images(config) / 16)
    trained(config, tmp_path / "calm")
    calm = steps.copy()
    steps.clear()
    FAULTS.reset(not_finite=frozenset({each + 3}))  # the third step of the second epoch
    weights = trained(config, tmp_path / "run")
    assert finished_state(tmp_path / "run")["lr_halvings"] == 1
    assert all(v.isfinite().all() for v in weights.values())
    assert [h["epoch"] for h in history(tmp_path / "run")] == [1, 2, 3]
    assert "diverged: back to epoch 1 with half the learning rate" in (tmp_path / "run.jsonl").read_text()
    assert [lr for lr, _ in steps] == pytest.approx([lr for lr, _ in calm[: each + 2]] + [lr / 2 for lr, _ in calm[each:]])
    assert steps[: each + 2] == calm[: each + 2]
    assert steps[each + 2][1] == calm[each][1]


@pytest.mark.parametrize(("every", "images", "taken", "again"), [
    (2, 10**6, 1, 0),  # checked before the step is taken
    (1000, 10**6, None, 0),  # at the end of the epoch, all of which is thrown away
    (1000, 16, 2, 1),  # before a part of the epoch is kept
])  # fmt: skip
def test_a_gradient_that_is_not_finite_between_two_checks_is_not_overlooked(
    every: int, images: int, taken: int | None, again: int, job: Make, tmp_path: Path, steps: list[tuple[float, float]]
) -> None:
    cadence = replace(EAGER, check_steps=every, checkpoint_images=images)
    config = job(small(), epochs=2, cadence=cadence, **BACKBONE)
    each = math.ceil(train_images(config) / 16)
    FAULTS.reset(not_finite=frozenset({each + 2}))
    trained(config, tmp_path / "run")
    wanted = [0.02 * 16 / 64 * schedule(step, 2 * each, TUNED.recipe.warm_up) for step in range(2 * each)]
    rates = [*wanted[: each + (each if taken is None else taken)], *(rate / 2 for rate in wanted[each + again :])]
    assert [lr for lr, _ in steps] == pytest.approx(rates)


@pytest.mark.parametrize(("at", "given_up"), [({6, 9}, False), ({6, 9, 12}, True), (set(range(1000)), True)])
def test_the_rate_is_halved_twice_and_no_more(at: set[int], given_up: bool, job: Make, tmp_path: Path) -> None:
    FAULTS.reset(not_finite=frozenset(at))
    config = job(small(), **BACKBONE)
    if given_up:
        with pytest.raises(
            TrainingError, match=r"expected fine-tune to converge.* in epoch \d, even at a quarter of the .*train\.override"
        ):
            trained(config, tmp_path / "run")
    else:
        weights = trained(config, tmp_path / "run")
        assert finished_state(tmp_path / "run")["lr_halvings"] == 2
        assert [h["epoch"] for h in history(tmp_path / "run")] == [1, 2, 3]
        assert all(v.isfinite().all() for v in weights.values())


# --- memory ---------------------------------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_make_the_step_of_the_whole(job: Make, tmp_path: Path) -> None:
    whole = trained(job(quiet(), epochs=1), tmp_path / "whole")
    assert same(whole, trained(job(quiet(gradient_accumulation_steps=3), epochs=1), tmp_path / "parts"), atol=1e-5)
    again = trained(job(quiet(), epochs=1, gradient_accumulation_steps=4), tmp_path / "again")
    state = finished_state(tmp_path / "again")
    assert state["remarks"] == ["the GPU's memory ran out: each batch was taken in 4 parts"]
    assert state["gradient_accumulation_steps"] == 4
    assert same(whole, again, atol=1e-5)


def test_memory_that_runs_out_doubles_the_parts_and_keeps_the_batch(job: Make, tmp_path: Path) -> None:
    config = job(small(), epochs=1, **BACKBONE)
    roomy = trained(config, tmp_path / "roomy")
    FAULTS.reset(memory=5)
    tight = trained(config, tmp_path / "tight")
    state = finished_state(tmp_path / "tight")
    assert state["gradient_accumulation_steps"] == 4
    assert state["remarks"] == [f"the GPU's memory ran out: each batch was taken in {parts} parts" for parts in (2, 4)]
    assert max(FAULTS.passes) == 4
    assert same(roomy, tight, atol=1e-5)


def test_memory_for_not_even_one_image_is_a_clear_error(job: Make, tmp_path: Path) -> None:
    FAULTS.reset(memory=0)
    with pytest.raises(TrainingError, match=r"expected room in the GPU's memory for 1 images.*data\.size"):
        trained(job(small(), **BACKBONE), tmp_path / "run")


class Share:
    """A worker's share of a batch, for which there is memory in parts of so many images; notes the parts that were tried."""

    def __init__(self, images: int, memory: int = 10**9) -> None:
        self.images, self.memory, self.tried = images, memory, list[int]()

    def take(self, parts: int) -> torch.Tensor:
        self.tried.append(parts)
        if math.ceil(self.images / parts) > self.memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(())


def accumulation(place: Path, workers: int = 1, least: int = 1, part_images: int = 1, net: nn.Module | None = None) -> GradientAccumulation:
    context = LocalContext(place)
    context.size = workers
    return GradientAccumulation(net or linear(), context, State("fine-tune"), least, part_images, moving_buffers=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_uneven_shares_of_a_batch_are_taken_in_equally_many_parts(steps: int, tmp_path: Path) -> None:
    """If BatchNorm is synchronized in every part, a worker with one part more would wait for ever."""
    for images in (3, 2):
        share = Share(images)
        accumulation(tmp_path, workers=2, least=steps).run(share.take, images, 5)
        assert share.tried == [min(steps, 2)]


@pytest.mark.parametrize("images", [4, 5, 6])
def test_a_part_that_batch_normalization_takes_its_statistics_from_has_two_images(images: int, tmp_path: Path) -> None:
    share = Share(images, memory=1)
    with pytest.raises(TrainingError, match=r"memory for [23] images at a time.*data\.size"):
        accumulation(tmp_path, part_images=2).run(share.take, images, images)
    assert max(share.tried) == images // 2


def test_workers_whose_memory_runs_out_all_start_again_in_more_parts(tmp_path: Path) -> None:
    """One cannot continue alone: the others wait for its gradient."""
    made = accumulation(tmp_path, workers=2)
    for known, asked in ((0, 2), (2, 4)):
        made.state.gradient_accumulation_steps = known
        with pytest.raises(OutOfMemory, match=r"memory for [24] images at a time.*gradient_accumulation_steps") as error:
            made.run(Share(4, memory=1).take, 4, 8)
        assert error.value.parts == asked
    made.state.gradient_accumulation_steps = 4
    made.run(Share(4, memory=1).take, 4, 8)


def test_a_batch_that_is_taken_again_moves_buffers_and_gradients_once(tmp_path: Path) -> None:
    """The first part went well, memory ran out in the second: what the first one did to the statistics and gradients does not count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3))
    start = {key: value.clone() for key, value in net.state_dict().items()}
    pixels = PIXELS.permute(0, 3, 1, 2).float()

    def passes(parts: int, fails: bool) -> torch.Tensor:
        for number, piece in enumerate(pixels.tensor_split(parts)):
            if fails and parts == 2 and number == 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            net(piece).square().sum().backward()
        return torch.zeros(())

    found = []
    for least, fails in ((2, True), (4, False)):
        net.load_state_dict(start)
        accumulation(tmp_path, least=least, net=net).run(lambda parts, fails=fails: passes(parts, fails), 8, 8)  # type: ignore[misc]
        gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        found.append({k: v.clone() for k, v in net.state_dict().items()} | {f"{k}.grad": v for k, v in gradients.items()})
    assert same(*found)
    assert int(found[0]["0.num_batches_tracked"]) == 4


# --- time -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_a_time_budget_gives_back_the_best_epoch_so_far(inside: bool, job: Make, tmp_path: Path) -> None:
    """The clock moves a minute with each epoch; inside of an epoch it jumps at a step."""
    clock, recording = Clock(), Recording(tmp_path / "run")
    config = job(small(refit_head=True), epochs=9, budget_minutes=2.5, callbacks=(Ticking(clock),), **BACKBONE)
    each = math.ceil(train_images(config) / 16)
    if inside:
        FAULTS.reset(before=lambda number: setattr(clock, "now", 1000.0) if number == 2 * each + 2 else None)
    weights = trained(config, tmp_path / "run", recording, clock)
    state = finished_state(tmp_path / "run")
    assert state["remarks"] == [
        f"train.budget_minutes ended fine-tune {'in' if inside else 'after'} epoch 3 of 9",
        "train.budget_minutes left no time to solve the head on what was trained",
    ]
    epochs = [line for line in state["history"] if line["phase"] == "fine-tune"]
    best = max(epochs, key=lambda line: (line["accuracy"], -line["log_loss"]))
    assert (state["best"]["epoch"], state["best"]["accuracy"]) == (best["epoch"], best["accuracy"])
    assert same(weights, recording.weights[best["epoch"]])


@pytest.mark.parametrize(("minutes", "epochs", "remarks"), [
    (4.5, 9, ["train.budget_minutes ended fine-tune after epoch 5 of 9"]), (4.5, 5, []),  # a run at its end was not ended by the time
])  # fmt: skip
def test_the_clock_is_read_after_each_epoch_but_the_last(
    minutes: float, epochs: int, remarks: list[str], job: Make, tmp_path: Path
) -> None:
    clock = Clock()
    cadence = Cadence(check_steps=1000)  # on a GPU it is read seldom
    config = job(small(), epochs=epochs, budget_minutes=minutes, cadence=cadence, callbacks=(Ticking(clock),), **BACKBONE)
    trained(config, tmp_path / "run", clock=clock)
    assert finished_state(tmp_path / "run")["remarks"] == remarks
    assert len(history(tmp_path / "run")) == 5


def test_time_before_an_interruption_counts_and_each_checkpoint_says_how_much_that_was(job: Make, tmp_path: Path) -> None:
    assert not TimeBudget(1, LocalContext(tmp_path), 50.0).expired_here()
    assert TimeBudget(1, LocalContext(tmp_path), 60.1).expired()
    assert not TimeBudget(0, LocalContext(tmp_path), 1e9).expired()
    clock = Clock()
    config = job(small(), epochs=4, budget_minutes=10, callbacks=(Ticking(clock),), **BACKBONE)
    with pytest.raises(Interrupted):
        trained(config, tmp_path / "run", Crashing(tmp_path / "run", 3), clock)
    later = Recording(tmp_path / "run")
    clock.now = 0.0  # another process
    trained(config, tmp_path / "run", later, clock)
    assert [state["seconds"] for state in later.states] == [180.0, 240.0, 240.0]
    free = Recording(tmp_path / "free")
    trained(replace(config, budget_minutes=0), tmp_path / "free", free, clock)
    assert {state["seconds"] for state in free.states} == {0.0}  # without a budget two runs write the same bytes


def test_a_time_budget_that_is_not_reached_changes_nothing(job: Make, tmp_path: Path) -> None:
    bounded = trained(job(decided(TUNED), epochs=3, budget_minutes=1000), tmp_path / "bounded")
    assert same(trained(job(decided(TUNED), epochs=3), tmp_path / "free"), bounded)


def test_a_time_budget_that_ends_before_fine_tuning_leaves_the_head(job: Make, tmp_path: Path) -> None:
    trained(job(decided(TUNED), epochs=3, budget_minutes=1e-9), tmp_path / "run")
    state = finished_state(tmp_path / "run")
    assert [h["phase"] for h in state["history"]] == ["head"]
    assert any("before fine-tuning began" in remark for remark in state["remarks"])


def test_a_time_budget_ends_the_features_of_a_frozen_case(job: Make, tmp_path: Path) -> None:
    trained(job(decided(CASES[0]), budget_minutes=1e-9, cadence=Cadence(read_images=8)), tmp_path / "run")
    first, second, third = finished_state(tmp_path / "run")["remarks"]
    assert re.fullmatch(r"train\.budget_minutes ended the features after 8 of \d+ validation images", first)
    assert re.fullmatch(r"train\.budget_minutes ended the features after 8 of \d+ training images", second)
    assert third.endswith("it may not have reached its optimum, and it was not solved once more with the validation images")


# --- no validation ----------------------------------------------------------------------------------------------------------------


def test_without_validation_images_the_last_epoch_is_kept(job: Make, tmp_path: Path) -> None:
    made = job(replace(decided(TUNED, scratch_from=1), init="auto"), epochs=3)
    without_validation(made)
    trained(made, tmp_path / "run")
    state = finished_state(tmp_path / "run")
    assert [h["phase"] for h in state["history"]] == ["head", *["fine-tune"] * 3]  # nothing says that random weights would be better
    assert (state["best"]["phase"], state["best"]["epoch"]) == ("fine-tune", 3)
    progress = Path(made.history).read_text()
    assert "head solved, no validation images" in progress
    assert "validation accuracy" not in progress  # 0.0% would look like a result


def test_without_validation_images_a_time_budget_keeps_what_was_trained(job: Make, tmp_path: Path) -> None:
    clock, recording = Clock(), Recording(tmp_path / "run")
    config = job(small(), epochs=9, budget_minutes=0.5, callbacks=(Ticking(clock),), **BACKBONE)
    without_validation(config)
    weights = trained(config, tmp_path / "run", recording, clock)
    state = finished_state(tmp_path / "run")
    assert state["remarks"] == ["train.budget_minutes ended fine-tune after epoch 1 of 9"]
    assert (state["best"]["phase"], state["best"]["epoch"]) == ("fine-tune", 1)
    assert same(weights, recording.weights[1])
    assert not same(weights, recording.weights[0])


# --- the state ------------------------------------------------------------------------------------------------------------------------


def line(phase: str, epoch: int, accuracy: float, images: int = 100) -> dict[str, Any]:
    correct = pack(np.arange(images) < round(accuracy * images))
    return {"phase": phase, "epoch": epoch, "loss": 0.0, "accuracy": accuracy, "log_loss": 1.0, "correct": correct}


def test_of_validations_of_equal_accuracy_the_one_of_less_loss_is_better() -> None:
    state = State("fine-tune")
    assert state.update_best(Best("fine-tune", 1, 0.9, 0.5))
    assert state.update_best(Best("fine-tune", 2, 0.9, 0.4))
    assert not state.update_best(Best("fine-tune", 3, 0.9, 0.4))
    assert not state.update_best(Best("fine-tune", 4, 0.8, 0.1))
    assert state.best.epoch == 2


@pytest.mark.parametrize(("phase", "accuracy", "images", "replaces"), [
    ("fine-tune", 0.95, 100, True), ("fine-tune", 0.88, 100, True),  # worse, but not clearly
    ("fine-tune", 0.5, 100, False), ("fine-tune", 0.0, 0, True), ("scratch", 0.88, 100, False), ("scratch", 0.95, 100, True),
])  # fmt: skip
def test_the_last_epoch_replaces_the_head_unless_it_is_clearly_worse(phase: str, accuracy: float, images: int, replaces: bool) -> None:
    state = State(phase, epoch=3, best=Best("head", 0, 0.9, 1.0), history=[line("head", 0, 0.9)])
    assert state.end_phase(state.validation(accuracy, 1.0), str(line(phase, 3, accuracy)["correct"]), images) is replaces
    assert state.best.phase == (phase if replaces else "head")


@pytest.mark.parametrize(
    ("interim", "replaces"), [(Best("fine-tune", 2, 0.95, 1.0), True), (Best("fine-tune", 2, 0.8, 1.0), False), (Best(), False)]
)
def test_a_phase_that_time_ends_counts_with_its_best_epoch_if_that_is_better(interim: Best, replaces: bool) -> None:
    state = State("fine-tune", epoch=3, best=Best("head", 0, 0.9, 1.0), interim=interim)
    assert state.cut_short() is replaces
    assert state.best == (interim if replaces else Best("head", 0, 0.9, 1.0))


def test_fine_tuning_gained_if_the_epoch_that_is_kept_did() -> None:
    head, best, last = line("head", 0, 0.9), line("fine-tune", 1, 0.95), line("fine-tune", 2, 0.89)
    assert State("fine-tune", best=Best("fine-tune", 1, 0.95), history=[head, best, last]).gained
    assert not State("fine-tune", best=Best("fine-tune", 2, 0.89), history=[head, last]).gained
    assert not State("fine-tune", best=Best("head", 0, 0.9), history=[head, last]).gained


# --- interruption -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 6])
def test_a_long_epoch_is_kept_in_parts_and_continued(number: int, job: Make, tmp_path: Path) -> None:
    """Schedule, sampler, dropout, the optimizer and the summed loss stand where they stood."""
    decision = decided(TUNED, balance="sampler", imbalance=1.0, optimizer="adamw", lr_none=1e-3)
    config = job(decision, epochs=2, cadence=replace(EAGER, checkpoint_images=32))
    wanted = trained(config, tmp_path / "calm")
    with pytest.raises(Interrupted):
        trained(config, tmp_path / "run", Crashing(tmp_path / "run", number))
    assert same(trained(config, tmp_path / "run"), wanted)
    assert history(tmp_path / "run") == history(tmp_path / "calm")


def test_checkpoints_wait_until_they_take_a_small_share_of_the_time(tmp_path: Path) -> None:
    """A write takes 2 s by this clock, an epoch 5 s: one tenth is 18 s between two writes."""
    clock = Clock()

    class Slow(LocalContext):
        def report(self, *given: Any) -> None:
            clock.now += 2

    for share, wanted in ((0.1, [0, 4, 8]), (1.0, list(range(9)))):
        kept, written = Checkpoints(Slow(tmp_path), tmp_path / "scratch", linear(), share, clock), []
        for epoch in range(9):
            if epoch == 0 or kept.due():
                kept.write(State("fine-tune", epoch=epoch))
                written.append(epoch)
            clock.now += 5
        assert written == wanted


@pytest.mark.parametrize("diverges", [False, True])
def test_a_run_between_two_checkpoints_is_lost_and_repeated_to_the_same_end(diverges: bool, job: Make, tmp_path: Path) -> None:
    """A step that diverges returns to the last epoch, written or not: how often is written changes no weights."""
    seldom = job(small(), epochs=4, cadence=Cadence(checkpoint_share=1e-9), **BACKBONE)  # at the start, and no more
    each = math.ceil(train_images(seldom) / 16)
    at = frozenset({2 * each + 2} if diverges else ())  # in the third epoch
    found = {}
    for name, config in (("often", replace(seldom, cadence=EAGER)), ("seldom", seldom)):
        FAULTS.reset(not_finite=at)
        found[name] = trained(config, tmp_path / name)
    FAULTS.reset(not_finite=at)
    with pytest.raises(Interrupted):
        trained(replace(seldom, callbacks=(Ticking(Clock(), crash=3),)), tmp_path / "cut")
    with LocalContext(tmp_path / "cut").restore() as (folder, *_):
        assert json.loads((folder / "state.json").read_text())["epoch"] == 0
    FAULTS.reset(not_finite=at)
    found["continued"] = trained(seldom, tmp_path / "cut")
    assert same(found["seldom"], found["often"])
    assert same(found["continued"], found["often"])
    assert finished_state(tmp_path / "cut")["lr_halvings"] == diverges
    assert history(tmp_path / "cut") == history(tmp_path / "often")


def test_a_checkpoint_is_a_copy_and_gives_back_all_that_was_kept(tmp_path: Path) -> None:
    net = linear()
    made = optimizer(net, Recipe(), "none", 0.1, [], fused=False)
    kept = Checkpoints(LocalContext(tmp_path / "context"), tmp_path, net)
    for keep in (kept.keep_best, kept.keep_interim, lambda: kept.keep(made)):
        made.zero_grad()
        net(torch.ones(2, 3, 8, 8)).square().sum().backward()
        made.step()
        keep()
    before = {name: {k: v.clone() for k, v in getattr(kept, name).items()} for name in ("current", "best", "interim", "optimizer")}
    assert all(before.values())
    made.step()
    assert not same(before["current"], net.state_dict())
    state = State("fine-tune", epoch=3, step=2, interim=Best("fine-tune", 1, 0.5, 1.0), lr_halvings=1, seconds=7.5, remarks=["one"])
    kept.write(state)
    read = Checkpoints(LocalContext(tmp_path / "context"), tmp_path, net)
    assert read.restore(None) == state
    assert all(same(getattr(read, name), tensors) for name, tensors in before.items())
    assert same(net.state_dict(), before["current"])


def test_a_run_continues_its_own_checkpoint_before_that_of_the_run_it_starts_from(tmp_path: Path) -> None:
    """A train stage that continues where a race ended, and is interrupted, does not start at the race's end once more."""
    net = linear()
    race, own = (Checkpoints(LocalContext(tmp_path / name), tmp_path / name, net) for name in ("race", "own"))
    race.write(State("fine-tune", epoch=1, stopped=True))
    assert own.restore(race.written) == State("fine-tune", epoch=1)  # what stopped the race does not stop this run
    own.write(State("fine-tune", epoch=2))
    assert own.restore(race.written) == State("fine-tune", epoch=2)


def test_a_checkpoint_of_another_run_that_an_earlier_version_wrote_is_not_used(tmp_path: Path) -> None:
    kept = Checkpoints(LocalContext(tmp_path / "own"), tmp_path, linear())
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "state.json").write_text(json.dumps({"arm": "fine-tune", "epoch": 3}))
    assert kept.restore(tmp_path / "race") is None


def damage(folder: Path, rng: random.Random) -> None:
    """Damage a file of a checkpoint as a disk or a kill may: it ends early, is empty, is missing, or has another bit."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    kind = rng.choice(["truncated", "flipped", "flipped", "emptied", "removed"])
    if kind == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del content[rng.randrange(len(content)) :]
    path.write_bytes(b"" if kind == "emptied" else content)
    if kind == "removed":
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("last", ["middle", "finished"])
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(last: str, job: Make, tmp_path: Path) -> None:
    config = job(small(), epochs=3, **BACKBONE)
    wanted = trained(config, tmp_path / "calm")
    if last == "middle":
        with pytest.raises(Interrupted):
            trained(config, tmp_path / "cut", Crashing(tmp_path / "cut", 3))
    else:
        trained(config, tmp_path / "cut")
    for seed in range(36):
        run, rng, told = tmp_path / "run", random.Random(seed), tmp_path / "told.jsonl"
        shutil.rmtree(run, ignore_errors=True)
        told.unlink(missing_ok=True)
        shutil.copytree(tmp_path / "cut", run)
        both = seed % 4 == 0
        for name in ("kept", "old") if both else ("kept",):
            damage(run / name, rng)
        assert same(trained(replace(config, history=str(told)), run), wanted), seed
        assert history(run) == history(tmp_path / "calm")
        assert "kept is damaged (" in told.read_text()
        assert ("; training starts anew" if both else "; continues from an earlier one") in told.read_text()


def test_a_damaged_checkpoint_of_another_run_is_not_used(tmp_path: Path) -> None:
    race, own = (Checkpoints(LocalContext(tmp_path / name), tmp_path / name, linear()) for name in ("race", "own"))
    race.write(State("fine-tune", epoch=1))
    assert own.restore(race.written) is not None
    (race.written / "current.safetensors").write_bytes(b"")
    assert own.restore(race.written) is None
    assert "current.safetensors changed since it was written" in own.damaged[0]


def test_a_phase_begins_with_nothing_of_the_one_before_it(tmp_path: Path) -> None:
    """Neither momentum, nor a halved rate, nor an interim epoch; and a step that diverges returns to where this phase began."""
    net = linear()
    state = State("fine-tune", epoch=3, step=1, lr_halvings=1, stopped=True, interim=Best("fine-tune", 2, 0.9, 0.1))
    kept = Checkpoints(LocalContext(tmp_path), tmp_path, net)
    kept.optimizer, kept.interim = {"0.momentum_buffer": torch.ones(1)}, {"weight": torch.ones(1)}
    state.begin("scratch")
    kept.begin()
    assert state == State("scratch")
    assert (kept.optimizer, kept.interim) == ({}, {})
    assert same(kept.current, net.state_dict())


# --- compiled networks ----------------------------------------------------------------------------------------------------------------


def compiled(job: Make, place: Path) -> list[dict[str, torch.Tensor]]:
    """The weights of a network without and with torch.compile."""
    made = [replace(quiet(compile=on), slice="conv1", readings=(TapPooling("conv1", 32, (1, 2)),)) for on in (False, True)]
    return [trained(job(each, epochs=1, batch_size=100), place / str(each.recipe.compile)) for each in made]


def test_a_compiled_network_takes_the_same_steps_and_is_kept_as_the_plain_one(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the compiler's last part, which needs a minute of g++: what is traced is what is trained."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: plain(network, backend="aot_eager"))
    assert same(*compiled(job, tmp_path), atol=1e-5)


@pytest.mark.slow
def test_a_network_that_the_compiler_has_translated_trains(job: Make, tmp_path: Path) -> None:
    assert same(*compiled(job, tmp_path), atol=1e-4)


def test_without_a_compiler_the_way_out_is_said(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- overrides ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "expected auto or sgd or adamw, found 'lion'"),
        ({"compile": 1}, "expected bool, found 1"),
        ({"clip": True}, "expected float, found True"),
        ({"crop": 0}, "expected 0.01 to 1, found 0"),
        ({"accumulate": 0}, "override.accumulate: expected at least 1, found 0"),
        ({"mixup": 0.2}, "mixup was removed. Delete it from train.override"),
        ({"croq": 0.2}, "did you mean crop"),
    ],
)
def test_a_recipe_value_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        decided(TUNED).overridden(changes)


def test_recipe_values_are_known_by_their_earlier_names_too() -> None:
    changed = decided(TUNED).overridden({"rate_none": 0.5, "solve_again": True, "accumulate": 2}).recipe
    assert (changed.lr_none, changed.refit_head, changed.gradient_accumulation_steps) == (0.5, True, 2)
    assert Recipe(**current_names({"rate_none": 0.5, "patience": 3})) == Recipe(lr_none=0.5)


def test_a_frozen_case_cannot_start_from_random_weights() -> None:
    frozen = decided(CASES[0])
    with pytest.raises(ParamsError, match="because the backbone is frozen"):
        frozen.overridden({"init": "random"})
    assert frozen.overridden({"init": "pretrained"}) == frozen
