"""The training loop: the head is the optimum, frozen is frozen, nothing depends on the number of workers, an interrupted run loses nothing."""

import ast
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.decisions import decision_for
from tests.helpers.group import attempt
from tests.helpers.images import paint
from tests.helpers.training import (
    EAGER,
    READ_LAST,
    Clock,
    Crashing,
    Interrupted,
    Recording,
    Ticking,
    decided,
    finished_state,
    history,
    in_group,
    trained,
)
from tests.helpers.workspaces import set_param
from tlpipeline.backbones import catalogue, classifier, features, taps
from tlpipeline.backbones.classifier import Classifier, Description, probabilities
from tlpipeline.backbones.features import extract, scaling
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice.cases import CASES, Case
from tlpipeline.choice.decision import Decision
from tlpipeline.data import cache, dataset, splits
from tlpipeline.data.augment import augmentation
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images
from tlpipeline.errors import ClusterError
from tlpipeline.evaluation.metrics import read_predictions
from tlpipeline.progress import silent
from tlpipeline.report.page import pace
from tlpipeline.stats import unpack
from tlpipeline.training.config import Cadence, TrainingConfig
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.heads import inverse_temperature, judged_penalty, score, solve_head, validated
from tlpipeline.training.optim import schedule
from tlpipeline.training.recipe import Recipe
from tlpipeline.training.train import run
from tlpipeline.training.trainer import batch_size
from tlpipeline.workspace import layout, stages

SEVERAL = (TapPooling("fc2", 128, (1,)), TapPooling("conv3", 128, (1, 2)))


def load(folder: Path) -> tuple[Classifier, Description]:
    return classifier.load(folder, trusts=lambda network, code: True)


def pretrained(decision: Decision) -> dict[str, torch.Tensor]:
    net = catalogue.load("demonstration", "DEFAULT")
    return {f"trunk.{k}": v for k, v in taps.cut(net, [r.tap for r in decision.readings]).state_dict().items()}


# --- the head -------------------------------------------------------------------------------------------------------------------------


def test_the_head_is_the_optimum_of_the_penalized_logistic_loss() -> None:
    """Also where it was found in the span of the images (d > n) and its standardization was folded in."""
    rng = np.random.default_rng(0)
    for n, blocks in ((60, [30, 50]), (200, [20, 10])):
        labels = rng.integers(0, 3, n)
        x = torch.from_numpy(rng.normal(size=(n, sum(blocks))) * 3 + 1 + labels[:, None]).float()
        weight, bias, penalty = solve_head(x, labels, blocks, 3, imbalance=10, seed=0)
        scale = scaling(x, blocks)
        w = (weight.double() / scale.scale).clone().requires_grad_(True)
        b = (bias.double() + weight.double() @ scale.mean).clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(scale(x) @ w.T + b, torch.from_numpy(labels)) + penalty / 2 * w.square().sum()
        loss.backward()
        assert float(w.grad.abs().max()) < 2e-3
        assert float(b.grad.abs().max()) < 2e-3


def test_the_head_separates_what_is_separable_and_stays_at_chance_on_noise() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 300)
    x = torch.from_numpy(rng.normal(size=(300, 40)) + 4 * np.eye(4)[labels] @ rng.normal(size=(4, 40))).float()
    weight, bias, _ = solve_head(x, labels, [40], 4, imbalance=10, seed=0)
    assert score((x @ weight.T + bias).softmax(1), labels)[0] > 0.98
    noise = torch.from_numpy(rng.normal(size=(300, 400))).float()
    weight, bias, penalty = solve_head(noise, labels, [400], 4, imbalance=10, seed=0)
    assert penalty >= 1e-2  # cross-validation sees that there is nothing to learn
    fresh = torch.from_numpy(rng.normal(size=(300, 400))).float()
    assert score((fresh @ weight.T + bias).softmax(1), labels)[0] < 0.35


def test_two_classes_and_a_class_without_images() -> None:
    rng = np.random.default_rng(2)
    labels = np.array([0, 2] * 30)
    x = torch.from_numpy(rng.normal(size=(60, 10)) + labels[:, None]).float()
    weight, bias, _ = solve_head(x, labels, [10], 3, imbalance=10, seed=0)
    chances = (x @ weight.T + bias).softmax(1)
    assert float(chances[:, 1].max()) < 1e-6
    assert score(chances, labels)[0] > 0.8


def test_rare_classes_are_weighted_where_the_imbalance_is_large() -> None:
    rng = np.random.default_rng(3)
    labels = np.array([0] * 300 + [1] * 12)
    x = torch.from_numpy(rng.normal(size=(312, 5)) + 1.2 * labels[:, None]).float()

    def recall(imbalance: float) -> float:
        weight, bias, _ = solve_head(x, labels, [5], 2, imbalance=imbalance, seed=0)
        return float(((x @ weight.T + bias).argmax(1).numpy()[labels == 1] == 1).mean())

    assert recall(imbalance=10) > recall(imbalance=100) + 0.2


# --- the four cases -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_is_frozen_is_bit_identical_and_what_is_not_is_trained(case: Case, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    decision = decided(case)
    tensors = trained(job(decision), tmp_path / "out")
    before = pretrained(decision)
    assert {k for k in tensors if k.startswith("trunk.")} == before.keys()
    unchanged = {k for k, v in before.items() if torch.equal(tensors[k], v)}
    if case.freeze == "kept":
        assert unchanged == before.keys()
    else:
        # The best epoch may be the frozen head itself; on these images fine-tuning does not lose.
        best = json.loads((tmp_path / "out" / "scratch" / "finished" / "history.json").read_text())
        assert best["phase"] == "head" or not unchanged
    assert {line["phase"] for line in history(tmp_path / "out")} >= ({"head"} if case.freeze == "kept" else {"head", "fine-tune"})


def test_what_is_sliced_off_is_not_stored(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    tensors = trained(job(decided(CASES[1])), tmp_path / "out")
    assert {k.split(".")[1] for k in tensors if k.startswith("trunk.")} == {"conv1", "conv2"}


def test_fine_tuning_changes_every_trainable_tensor(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    decision = decided(CASES[2])
    tensors = trained(job(decision), tmp_path / "out")
    assert not [k for k, v in pretrained(decision).items() if torch.equal(tensors[k], v)]


def test_random_init_trains_from_scratch_for_longer(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    decision = replace(decided(CASES[3]), init="random")
    trained(job(decision, epochs=2), tmp_path / "out")
    lines = history(tmp_path / "out")
    assert {line["phase"] for line in lines} == {"scratch"}
    assert len(lines) == 2 * Recipe().scratch_times


@pytest.mark.parametrize("init", ["random", "auto"])
def test_training_from_scratch_begins_with_random_weights(init: str, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    """Not with those that were given, nor with those that fine-tuning left."""
    recording = Recording(tmp_path / "out")
    decision = replace(decided(CASES[3], lr_none=1e-12, scratch_from=0, scratch_times=1.0), init=init)
    trained(job(decision, epochs=1, seed=3), tmp_path / "out", recording)
    assert {line["phase"] for line in history(tmp_path / "out")} == ({"scratch"} if init == "random" else {"head", "fine-tune", "scratch"})
    fresh = catalogue.load("demonstration", catalogue.NONE, size=32, seed=3).module.state_dict()
    weights = {key: value for key, value in recording.phases["scratch"].items() if "weight" in key}
    assert all(torch.allclose(value, fresh[key.removeprefix("trunk.")], atol=1e-6) for key, value in weights.items() if "trunk" in key)
    assert float(weights["head.weight"].abs().max()) < 1e-6


@pytest.mark.parametrize(("lr", "peak"), [(0.01, 0.03), (0.05, 0.1)])
def test_random_weights_get_a_larger_rate_but_no_more_than_a_tenth(
    lr: float, peak: float, job: Callable[..., TrainingConfig], tmp_path: Path, steps: list[tuple[float, float]]
) -> None:
    trained(job(replace(decided(CASES[3], lr_none=lr), init="random"), epochs=1), tmp_path / "out")
    assert max(rate for rate, _ in steps) == pytest.approx(peak * 16 / 64)  # a batch of 16


def test_time_that_is_up_after_fine_tuning_leaves_none_for_random_weights(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    clock = Clock()
    made = job(decided(CASES[3], lr_none=1e-12, scratch_from=0), epochs=1, budget_minutes=0.5, callbacks=(Ticking(clock),))
    trained(made, tmp_path / "out", clock=clock)
    assert [line["phase"] for line in history(tmp_path / "out")] == ["head", "fine-tune"]


def test_auto_falls_back_to_scratch_only_where_fine_tuning_does_not_beat_the_frozen_probe(
    job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    hopeless = decided(CASES[3], scratch_from=0, lr_none=1e-12)
    trained(job(hopeless, epochs=1), tmp_path / "a")
    assert "scratch" in {line["phase"] for line in history(tmp_path / "a")}
    few = replace(hopeless, recipe=replace(hopeless.recipe, scratch_from=1000))
    trained(job(few, epochs=1), tmp_path / "few")
    assert "scratch" not in {line["phase"] for line in history(tmp_path / "few")}


def test_the_last_epoch_is_kept_whatever_validation_says_of_the_others(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    kept = trained(job(decided(CASES[2]), epochs=3), tmp_path / "out")
    last = load_file(tmp_path / "out" / "kept" / "model" / "weights.safetensors")
    assert history_equal(kept, last)
    summary = json.loads((tmp_path / "out" / "scratch" / "finished" / "history.json").read_text())
    assert summary["phase"] == "fine-tune"
    assert summary["validation"]["epoch"] == 3


def test_the_case_without_auto_never_trains_from_scratch(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    trained(job(decided(CASES[2], lr_none=1e-12), epochs=1), tmp_path / "out")
    assert "scratch" not in {line["phase"] for line in history(tmp_path / "out")}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_model(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained(job(decided(CASES[2]), seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / name / "scratch/finished/model/weights.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert history(tmp_path / "a") != history(tmp_path / "c")
    assert c


def test_a_frozen_head_is_judged_without_validation_and_then_solved_with_it_and_a_fine_tuned_one_starts_without_it(
    job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    def head_of(decision: Decision, name: str) -> torch.Tensor:
        return trained(job(decision, epochs=1), tmp_path / name)["head.weight"]

    frozen, tuned = decided(CASES[0]), decided(CASES[2], lr_none=1e-12)
    both, train_only = head_of(frozen, "a"), head_of(tuned, "b")
    assert history(tmp_path / "a")[0] == history(tmp_path / "b")[0]  # the same head was judged
    assert not torch.allclose(both, train_only, atol=1e-4)
    net = catalogue.load("demonstration", "DEFAULT")
    manifest = dataset.read_manifest(tmp_path / "manifest.parquet")
    rows = [*manifest.used("train"), *manifest.used("val")]
    images = Images(tmp_path / "pictures", rows, net.transforms)
    (features,) = extract(taps.cut(net, ["fc2"]), [(1,)], images, torch.device("cpu"), lambda done: None)
    labels = np.array([manifest.classes.index(r.label) for r in rows])
    penalty = json.loads((tmp_path / "a" / "scratch" / "finished" / "history.json").read_text())["validation"]["head_penalty"]
    imbalance, count = Recipe().imbalance, len(manifest.used("train"))
    first = solve_head(features[:count], labels[:count], [128], 3, imbalance, 0, tolerance=1e-4)
    second = solve_head(features, labels, [128], 3, imbalance, 0, penalty, first[:2])
    assert first[2] == penalty
    apart = (first[0] - second[0]).abs().max()
    assert apart > 1e-2
    assert torch.allclose(train_only, first[0], atol=float(apart) / 20)
    # With the validation images the head is as sure as the one without them was right.
    chances = (features[count:] @ first[0].T + first[1]).softmax(1)
    assert torch.allclose(both, second[0] * inverse_temperature(chances, labels[count:]), atol=float(apart) / 20)


def test_what_a_network_reads_that_was_trained_is_not_kept_in_the_cache(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    """Nobody else will ask for it, and it would push out what others do."""
    decision = replace(decided(CASES[2], refit_head=True), readings=SEVERAL)
    trained(job(decision, epochs=1, cache=str(tmp_path / "cache")), tmp_path / "out")
    assert history(tmp_path / "out")[-1]["phase"] == "last head"
    assert [kept.label for kept in cache.info(tmp_path / "cache")] == ["demonstration fc2 at 32 pixels"]


def test_once_everything_is_trained_the_head_is_solved_on_what_the_network_reads_by_then(
    job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    """On all readings, with the validation images, at the penalty that they like best; below it stands what was trained, and so it does in the history."""
    several = (TapPooling("fc2", 128, (1,)), TapPooling("conv3", 128, (1, 2)), TapPooling("conv2", 64, (1,)))
    before = trained(job(replace(decided(CASES[2], lr_none=0.05), readings=several), epochs=2), tmp_path / "before")
    after = trained(job(replace(decided(CASES[2], lr_none=0.05, refit_head=True), readings=several), epochs=2), tmp_path / "after")
    assert history(tmp_path / "before") == history(tmp_path / "after")[:-1]
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head."))
    assert before["head.weight"].shape == (3, 128)  # while everything is trained it reads the deepest
    finished = tmp_path / "after" / "scratch" / "finished"
    model, description = load(finished / "model")
    assert description.readings == several
    manifest = dataset.read_manifest(tmp_path / "manifest.parquet")
    rows = [*manifest.used("train"), *manifest.used("val")]
    images = Images(tmp_path / "pictures", rows, description.transforms)
    features = torch.cat(extract(model.trunk, model.grids, images, torch.device("cpu"), lambda done: None), 1)
    labels = np.array([manifest.classes.index(r.label) for r in rows])
    count, kind = len(manifest.used("train")), ([128, 128, 512, 64], 3, Recipe().imbalance, 0)
    penalty, near = judged_penalty(features[:count], labels[:count], features[count:], labels[count:], *kind)
    judged = solve_head(features[:count], labels[:count], *kind, penalty, near, tolerance=1e-4)
    accuracy, loss, correct = validated((features[count:] @ judged[0].T + judged[1]).softmax(1), labels[count:])
    last = {
        "phase": "last head",
        "epoch": 2,
        "loss": 0.0,
        "accuracy": accuracy,
        "log_loss": pytest.approx(loss, rel=0.01),
        "correct": correct,
    }
    assert history(tmp_path / "after")[-1] == last
    weight, bias, _ = solve_head(features, labels, *kind, penalty, judged[:2], tolerance=1e-4)
    assert torch.allclose(after["head.weight"], weight, atol=float(weight.abs().max()) / 100)
    assert torch.allclose(after["head.bias"], bias, atol=float(bias.abs().max()) / 100)
    assert json.loads((finished / "history.json").read_text())["validation"]["head_penalty"] == penalty
    assert not list((tmp_path / "after" / "scratch").glob("features-*"))
    # A finished run that is asked for once more is handed over as it is.
    (tmp_path / "after" / "scratch" / "finished" / "model" / "weights.safetensors").unlink()
    assert history_equal(
        trained(job(replace(decided(CASES[2], lr_none=0.05, refit_head=True), readings=several), epochs=2), tmp_path / "after"), after
    )


class Running(Clock):
    """A clock that goes on by a second whenever it is read, once it was started."""

    def __call__(self) -> float:
        self.now += self.now > 0
        return self.now


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 4, 6, 1000])
def test_time_that_is_up_leaves_the_head_that_was_trained(seconds: int, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    """Before the features, between them, or while the head is solved: what is short of its optimum takes no trained head's place."""
    trained_only = trained(job(replace(decided(CASES[2]), readings=SEVERAL), epochs=1), tmp_path / "trained")
    clock = Running()
    cadence = Cadence(check_steps=1000, read_images=16)
    decision = replace(decided(CASES[2], refit_head=True), readings=SEVERAL)
    made = job(decision, epochs=1, budget_minutes=seconds / 60, callbacks=(Ticking(clock, 1.0),), cadence=cadence)
    found = trained(made, tmp_path / "late", clock=clock)
    assert history_equal(found, trained_only) == (seconds < 1000)
    late = ["train.budget_minutes left no time to solve the head on what was trained"]
    assert finished_state(tmp_path / "late")["remarks"] == (late if seconds < 1000 else [])


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pretrained", "plain", "random"])
@pytest.mark.parametrize("validation", [True, False])
def test_a_head_is_solved_last_whatever_came_before(
    init: str, validation: bool, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    """Without validation images nothing says how good it is, and its penalty comes from folds."""
    decision = replace(decided(CASES[2], lr_none=0.01, scratch_times=1.0, refit_head=True), readings=SEVERAL, init=init)
    made = job(decision, epochs=2)
    if not validation:
        manifest = dataset.read_manifest(tmp_path / "manifest.parquet")
        left = replace(manifest, rows=tuple(r for r in manifest.rows if r.split != "val"))
        dataset.write_manifest(left, tmp_path / "manifest.parquet", tmp_path / "quarantine.csv")
    weights = trained(made, tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in weights.values())
    model, description = load(tmp_path / "out" / "scratch" / "finished" / "model")
    assert description.readings == SEVERAL
    assert model.head.in_features == 128 + 5 * 128
    assert (history(tmp_path / "out")[-1]["phase"] == "last head") == validation
    told = json.loads((tmp_path / "out" / "scratch" / "finished" / "history.json").read_text())
    if validation:  # what is said of the model is said of this head
        assert told["validation"]["accuracy"] == history(tmp_path / "out")[-1]["accuracy"]


# --- interruption ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=lambda c: c.name)
def test_a_run_interrupted_after_any_checkpoint_ends_as_the_uninterrupted_one(
    case: Case, again: bool, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    # A rate that gains nothing makes the auto case go through all arms: head, fine-tune, scratch.
    decision = decided(case, **({"lr_none": 1e-12, "scratch_from": 0, "scratch_times": 1.0} if case.init == "auto" else {}))
    decision = replace(decision, readings=SEVERAL, recipe=replace(decision.recipe, refit_head=again))
    wanted = trained(job(decision, epochs=2), tmp_path / "whole")
    lines = history(tmp_path / "whole")
    assert ("last head" in {line["phase"] for line in lines}) == again
    for after in range(1, len(lines) + 1 - again):
        folder = tmp_path / f"after{after}"
        scratch = folder / "scratch"
        scratch.mkdir(parents=True)
        with pytest.raises(Interrupted):
            run(job(decision, epochs=2), Crashing(folder, after), scratch)
        assert history_equal(trained(job(decision, epochs=2), folder), wanted)
        assert history(folder) == lines


def history_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_is_never_half_there(tmp_path: Path) -> None:
    """Killed while the new checkpoint was copied, the old one is used; killed between the renames, too."""
    world = LocalContext(tmp_path / "world")
    for number in (1, 2):
        source = tmp_path / f"source{number}"
        source.mkdir()
        (source / "value").write_text(str(number))
        world.report({}, source)
    (tmp_path / "world" / "new").mkdir()  # a copy that did not finish
    with world.restore() as folders:
        assert [(folder / "value").read_text() for folder in folders] == ["2", "1"]
    (tmp_path / "world" / "old").rename(tmp_path / "world" / "older")
    (tmp_path / "world" / "kept").rename(tmp_path / "world" / "old")
    with world.restore() as folders:
        assert [(folder / "value").read_text() for folder in folders] == ["2", "1"]


def written(folder: Path, value: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model").mkdir(exist_ok=True)
    for name in ("value", "model/value"):
        (folder / name).write_text(value)
    return folder


def kept(world: LocalContext) -> str:
    with world.restore() as (folder, *_):
        assert (folder / "value").read_text() == (folder / "model" / "value").read_text()
        return (folder / "value").read_text()


def test_what_a_kill_between_the_renames_left_is_kept_until_the_next_checkpoint_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = LocalContext(tmp_path / "world")
    world.report({}, written(tmp_path / "source", "1"))
    (tmp_path / "world" / "kept").rename(tmp_path / "world" / "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    newer = written(tmp_path / "source", "2")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises((OSError, shutil.Error), match="No space"):
            world.report({}, newer)
    assert kept(world) == "1"
    world.report({}, newer)
    assert kept(world) == "2"
    assert sorted(path.name for path in (tmp_path / "world").iterdir()) == ["kept", "old"]


def test_the_only_checkpoint_there_is_goes_after_the_next_one_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = LocalContext(tmp_path / "world")
    world.report({}, written(tmp_path / "source", "1"))
    (tmp_path / "world" / "kept").rename(tmp_path / "world" / "old")

    def killed(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Interrupted):
            world.report({}, written(tmp_path / "source", "2"))
    assert kept(world) == "1"


def test_a_copy_that_did_not_finish_is_no_checkpoint_nor_part_of_one(tmp_path: Path) -> None:
    world = LocalContext(tmp_path / "world")
    (tmp_path / "world").mkdir()
    written(tmp_path / "world" / "new", "half")
    (tmp_path / "world" / "new" / "left").touch()
    with world.restore() as folders:
        assert folders == []
    world.report({}, written(tmp_path / "source", "1"))
    assert kept(world) == "1"
    assert not (tmp_path / "world" / "kept" / "left").exists()


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(file: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{file}")).name.split(".")[1])
        fsync(file)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"{self.name} is {target.name}")
        return rename(self, target)

    world = LocalContext(tmp_path / "world")
    world.report({}, written(tmp_path / "source", "1"))
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    world.report({}, written(tmp_path / "source", "2"))
    assert done == ["value", "value", "kept is old", "new is kept"]


def test_no_worker_goes_on_before_all_have_looked_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one might write its own, and a slower one take it for a run to go on with, and wait where nobody comes."""
    world, waits = LocalContext(tmp_path), []
    world.size = 2
    monkeypatch.setattr(torch.distributed, "barrier", lambda: waits.append("all"))
    with world.restore() as folders:
        assert folders == []
        waits.append("read")
    assert waits == ["read", "all"]


@pytest.mark.parametrize("first", [True, False])
def test_no_worker_goes_on_before_a_checkpoint_is_safe(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, waits = LocalContext(tmp_path / "world"), []
    world.size = 2
    monkeypatch.setattr(torch.distributed, "barrier", lambda: waits.append((tmp_path / "world" / "kept" / "value").exists()))
    world.report({}, written(tmp_path / "source", "1") if first else None)
    assert waits == [first]


# --- workers --------------------------------------------------------------------------------------------------------------------------

# Neither 2 nor 3 divides the images of any side. Of a batch of 9 the first of two workers gets five; the last batch has seven.
COUNTS = {"train": (21, 20, 20), "val": (5, 4, 4), "test": (5, 4, 4)}
NORMED = (TapPooling("layer1.2", 16, (1, 2)),)
ALONE, TOGETHER, RESUMED = "1", ("2", "3"), ("1 resumed", "2 resumed", "3 resumed")
BROKEN_OFF = ("1 broken off", "2 broken off", "3 broken off")


def residual(case: Case) -> Decision:
    """A decision for this row on a network with BatchNorm, without a head that is solved last."""
    cut = (TapPooling("layer2.2", 32, (1, 2)), TapPooling("layer1.2", 16, (1, 2)))
    made = decision_for(case, cut if case.keep == "slice" else (TapPooling("layer3.2", 64, (1, 2)),), 32)
    return replace(made, recipe=replace(case.recipe, refit_head=False))


def without_dropout(**recipe: Any) -> Decision:
    """A decision to fine-tune all of a network, whatever its head alone is worth; without dropout, whose draws differ between workers."""
    return replace(decided(CASES[2], lr_none=0.05, **recipe), slice="conv3", readings=(TapPooling("conv3", 128, (1, 2)),), init="plain")


@dataclass(frozen=True)
class Worlds:
    """What became of the same jobs on 1, 2 and 3 workers: a folder for each, named after job and workers."""

    place: Path
    images: Path

    def job(self, decision: Decision, name: str, **changes: Any) -> TrainingConfig:
        plain = {
            "workspace": str(self.place), "images": str(self.images), "manifest": str(self.place / "manifest.parquet"), "backbone": "demonstration",
            "weights": "DEFAULT", "weights_md5": "none", "plan": decision.plan, "seed": 0, "epochs": 2,
            "batch_size": 9, "flip": False, "precision": "float32", "history": str(self.place / f"{name}.jsonl"),
        }  # fmt: skip
        return TrainingConfig(**{**plain, **changes})

    def finished(self, run: str) -> Path:
        return self.place / run / "scratch0" / "finished"

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.finished(run) / "model" / "weights.safetensors")

    def lines(self, run: str) -> list[dict[str, Any]]:
        return json.loads((self.finished(run) / "history.json").read_text())["history"]

    def side(self, name: str) -> list[Row]:
        return dataset.read_manifest(self.place / "manifest.parquet").used(name)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """One group of two and one of three for all tests: starting a process costs more than what is trained in it."""

    place = tmp_path_factory.mktemp("worlds")
    made = Worlds(place, place / "pictures")
    for side, counts in COUNTS.items():
        for label, count in enumerate(counts):
            folder = made.images / side / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                # A fifth is mislabeled, so that some of the images are got wrong.
                paint(label if index % 5 else (label + 1) % 3, index + 1000 * len(side)).save(folder / f"{index}.png")
    manifest = dataset.ingest(made.images, {}, lambda done, total: None)
    dataset.write_manifest(manifest, place / "manifest.parquet", place / "quarantine.csv")
    net = {"backbone": "nets:resnet20", "weights": "none"}
    plain = replace(residual(CASES[2]), slice="layer1.2", readings=NORMED, init="plain")
    still = replace(plain, recipe=replace(plain.recipe, statistics="fixed"))
    other = replace(residual(CASES[3]), slice="layer1.2", readings=NORMED)
    other = replace(other, recipe=replace(other.recipe, statistics="fixed"))
    again = replace(plain, readings=(NORMED[0], TapPooling("layer1.0", 16, (1,))), recipe=replace(still.recipe, refit_head=True))
    jobs = {
        "frozen": made.job(residual(CASES[0]), "frozen", **net),
        "cut": made.job(residual(CASES[1]), "cut", **net),
        "tuned": made.job(without_dropout(), "tuned"),
        "parts": made.job(without_dropout(gradient_accumulation_steps=3), "parts"),
        "normed": made.job(plain, "normed", **net),
        "still": made.job(still, "still", **net),
        "other": made.job(other, "other", **net),
        "again": made.job(again, "again", **net),
        "few": made.job(without_dropout(batch=2), "few", batch_size="auto", epochs=1),
    }
    part = {"checkpoint_images": 32}  # three of seven batches

    def item(name: str, size: int, more: str = "", cache: str = "", checkpoint_images: int = 100_000, **how: int) -> dict[str, Any]:
        config = replace(jobs[name], cadence=replace(EAGER, checkpoint_images=checkpoint_images))
        on_disk = replace(config, cache=str(place / cache), cache_bytes=1e9) if cache else config
        return {"job": asdict(on_disk), "folder": str(place / f"{name} {size}{more}"), **how}

    items: dict[int, list[dict[str, Any]]] = {
        1: [item(name, 1) for name in ("frozen", "cut", "tuned", "again", "normed")],
        2: [item(name, 2, **part) for name in ("frozen", "cut", "tuned", "parts", "normed", "again")]
        # After the head; in the middle of the second epoch.
        + [item(name, 2, " resumed", **how) for name in ("frozen", "cut") for how in ({"crash": 1}, {})]
        + [item("normed", 2, " resumed", **how) for how in (part | {"crash": 5}, part)]
        + [item(name, 2, " on disk", cache="shared") for name in ("cut", "tuned")],
        3: [item(name, 3) for name in ("frozen", "cut", "tuned", "few")] + [item("cut", 3, " on disk", cache="shared")],
    }
    for size in (2, 3):
        items[size].append(item("normed", size, " synchronized", synchronized=True))
    for size, runs in items.items():
        # Between the two steps that each worker passes its share of the training images in: the first one's features are kept.
        runs += [
            item(name, size, " broken off", f"broken off {size}", **how) for name in ("frozen", "cut") for how in ({"break_off": 16}, {})
        ]
        runs += [item(name, size, **part) for name in ("still", "other")]
        runs += [item(name, size, " resumed", **how) for name in ("still", "other") for how in (part | {"crash": 5}, part)]
    for each in items.pop(1):
        attempt(each)
    for size, runs in items.items():
        in_group(size, runs, place / f"spec{size}.json")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("run", [ALONE, *TOGETHER, "2 resumed", *BROKEN_OFF])
@pytest.mark.parametrize(("name", "case"), [("frozen", CASES[0]), ("cut", CASES[1])])
def test_frozen_means_the_same_bits_with_batchnorm_on_any_number_of_workers(name: str, case: Case, run: str, worlds: Worlds) -> None:
    net = catalogue.load("nets:resnet20", "none")
    before = taps.cut(net, [r.tap for r in residual(case).readings]).state_dict()
    after = worlds.weights(f"{name} {run}")
    assert {"layer1.0.bn1.running_mean", "layer1.0.bn1.num_batches_tracked"} <= before.keys()
    assert {k for k in after if k.startswith("trunk.")} == {f"trunk.{k}" for k in before}
    assert all(torch.equal(after[f"trunk.{k}"], v) for k, v in before.items())
    assert float(after["head.weight"].abs().sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_head_of_every_case_is_solved_without_a_bit_of_the_network_changing(case: Case, worlds: Worlds, tmp_path: Path) -> None:
    """BatchNorm's statistics would move in training mode; where everything is trained afterwards, they may not yet."""
    (tmp_path / "scratch").mkdir()
    job = worlds.job(residual(case), case.name, backbone="nets:resnet20", weights="none")
    with pytest.raises(Interrupted):
        run(job, Crashing(tmp_path, 1), tmp_path / "scratch")
    current = load_file(tmp_path / "kept" / "current.safetensors")
    net = catalogue.load("nets:resnet20", "none")
    before = taps.cut(net, [r.tap for r in residual(case).readings]).state_dict()
    assert all(torch.equal(current[f"trunk.{k}"], v) for k, v in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("run", TOGETHER)
@pytest.mark.parametrize("name", ["frozen", "cut", "tuned"])
def test_every_image_of_validation_is_counted_once_and_answered_alike_on_any_number_of_workers(name: str, run: str, worlds: Worlds) -> None:
    count = len(worlds.side("val"))
    assert count % 2
    assert count % 3
    alone, together = worlds.lines(f"{name} 1"), worlds.lines(f"{name} {run}")
    assert [(h["phase"], h["epoch"], h["accuracy"], h["correct"]) for h in together] == [
        (h["phase"], h["epoch"], h["accuracy"], h["correct"]) for h in alone
    ]
    for line in together:
        assert line["accuracy"] == unpack(line["correct"], count).mean()
    assert any(line["accuracy"] < 1 for line in together)  # else nothing could differ
    assert [h["log_loss"] for h in together] == pytest.approx([h["log_loss"] for h in alone], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", TOGETHER)
@pytest.mark.parametrize("name", ["tuned", "still"])
def test_the_loss_runs_along_the_same_curve_with_uneven_shares_and_a_short_last_batch(name: str, run: str, worlds: Worlds) -> None:
    """With batch normalization, too, where it keeps the source's statistics."""
    assert len(worlds.side("train")) % 9 == 7
    alone, together = worlds.lines(f"{name} 1"), worlds.lines(f"{name} {run}")
    losses = [h["loss"] for h in alone if h["phase"] == "fine-tune"]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    # Sums in another order differ in the last bits: 3e-8 here. A mean of means, which weighs uneven shares alike, is off by 1e-4.
    assert [h["loss"] for h in together] == pytest.approx([h["loss"] for h in alone], abs=1e-5)
    single = worlds.weights(f"{name} 1")
    for key, value in worlds.weights(f"{name} {run}").items():
        assert torch.allclose(value, single[key], atol=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("run", [ALONE, *TOGETHER, *RESUMED])
@pytest.mark.parametrize(("name", "arms"), [("still", {"fine-tune"}), ("other", {"head", "fine-tune"})])
def test_batch_normalization_keeps_the_statistics_of_the_source_where_the_recipe_says_so(
    name: str, arms: set[str], run: str, worlds: Worlds
) -> None:
    """In both large cases, on any number of workers, and where the run was interrupted in the middle of an epoch."""
    before = catalogue.load("nets:resnet20", "none").module.state_dict()
    kept, moved = worlds.weights(f"{name} {run}"), worlds.weights("normed 2")
    statistics = [k for k in kept if "running_" in k or "num_batches" in k]
    assert len(statistics) == 3 * 7  # the stem, and two in each of three blocks
    assert all(torch.equal(kept[k], before[k.removeprefix("trunk.")]) for k in statistics)
    assert not any(torch.equal(moved[k], before[k.removeprefix("trunk.")]) for k in statistics)
    scale = "trunk.layer1.0.bn1.weight"
    assert not torch.equal(kept[scale], before[scale.removeprefix("trunk.")])  # it is trained like any other
    assert {line["phase"] for line in worlds.lines(f"{name} {run}")} == arms


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_batch_normalization_that_is_one_over_all_workers_is_that_of_one_worker(size: int, worlds: Worlds) -> None:
    """The same losses, weights and statistics, with uneven shares and a short last batch; each worker's own statistics give others."""
    alone, together, apart = (worlds.weights(run) for run in ("normed 1", f"normed {size} synchronized", "normed 2"))
    assert together.keys() == alone.keys()
    statistics = [k for k in alone if "running_" in k]
    assert len(statistics) == 2 * 7
    assert all(torch.allclose(together[k], value, atol=1e-4) for k, value in alone.items())
    assert not any(torch.allclose(apart[k], alone[k], atol=1e-4) for k in statistics)
    losses = [[line["loss"] for line in worlds.lines(run)] for run in ("normed 1", f"normed {size} synchronized")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_parts_of_a_batch_make_the_step_of_the_whole_in_a_group(worlds: Worlds) -> None:
    """The last part of a batch must be summed over the workers; three parts of the shares 5 and 4 are uneven, too."""
    whole, parts = worlds.weights("tuned 2"), worlds.weights("parts 2")
    assert all(torch.allclose(value, whole[key], atol=1e-5) for key, value in parts.items())
    assert [h["loss"] for h in worlds.lines("parts 2")] == pytest.approx([h["loss"] for h in worlds.lines("tuned 2")], abs=1e-5)


@pytest.mark.slow
def test_a_group_solves_the_last_head_as_one_worker_does(worlds: Worlds) -> None:
    """On features that each worker computed its share of, from folders that they do not share."""
    one, two = worlds.weights("again 1"), worlds.weights("again 2")
    assert one["head.weight"].shape == (3, 16 * 5 + 16)
    images = Images(worlds.images, worlds.side("val"), load(worlds.finished("again 1") / "model")[1].transforms)
    cpu = torch.device("cpu")
    chances = [probabilities(load(worlds.finished(f"again {n}") / "model")[0], images, cpu, lambda done: None) for n in (1, 2)]
    assert torch.allclose(*chances, atol=0.02)
    still = worlds.weights("still 2")
    assert all(torch.equal(two[name], still[name]) for name in still if name.startswith("trunk."))


@pytest.mark.slow
def test_what_a_group_validated_is_what_the_exported_model_says(worlds: Worlds) -> None:
    """Each worker takes BatchNorm's statistics from its own images, but one model is judged, kept and exported."""
    exported, description = load(worlds.finished("normed 2") / "model")
    rows = worlds.side("val")
    chances = probabilities(exported, Images(worlds.images, rows, description.transforms), torch.device("cpu"), lambda done: None)
    labels = np.array([description.classes.index(row.label) for row in rows])
    last = worlds.lines("normed 2")[-1]
    assert (last["phase"], last["epoch"]) == ("fine-tune", 2)
    accuracy, loss, correct = validated(chances, labels)
    assert (last["accuracy"], last["correct"]) == (accuracy, correct)
    assert last["log_loss"] == pytest.approx(loss, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "cut", "tuned", "still"])
def test_the_metric_is_the_same_on_any_number_of_workers_and_counts_each_test_image_once(name: str, worlds: Worlds, tmp_path: Path) -> None:
    """By the stage itself, of the models that 1, 2 and 3 workers exported."""
    rows = worlds.side("test")
    assert len(rows) % 2
    assert len(rows) % 3
    found, said = [], []
    for workers in (ALONE, *TOGETHER):
        root = tmp_path / workers
        root.mkdir()
        (root / "images").symlink_to(worlds.images)
        shutil.copy(Path(__file__).parent.parent / layout.PARAMS, root)
        shutil.copy(worlds.place / layout.MANIFEST, root)
        set_param(root, "backbone.name", "nets:resnet20")
        shutil.copytree(worlds.finished(f"{name} {workers}") / "model", root / layout.MODEL)
        stages.evaluate(root, silent)
        found.append(asdict(layout.read_metrics(root)))
        said.append(read_predictions(root / layout.PREDICTIONS))
    assert found[0]["images"] == len(rows)
    assert 0 < found[0]["accuracy"] < 1  # else nothing could differ
    for metrics, predictions in zip(found, said, strict=True):
        assert sorted(predictions.md5) == sorted({row.md5 for row in rows})
        assert np.array_equal(predictions.predicted, said[0].predicted)
        assert metrics["log_loss"] == pytest.approx(found[0]["log_loss"], abs=2e-5)
        assert metrics["calibration_error"] == pytest.approx(found[0]["calibration_error"], abs=2e-5)
        near = dict.fromkeys(("log_loss", "calibration_error"))
        assert metrics | near == found[0] | near


@pytest.mark.slow
@pytest.mark.parametrize("run", ["normed 2", *(f"{name} {workers}" for name in ("still", "other") for workers in (1, 2, 3))])
def test_a_group_that_was_interrupted_ends_as_the_uninterrupted_one(run: str, worlds: Worlds) -> None:
    """In the middle of an epoch, with BatchNorm and its own or the source's statistics."""
    assert history_equal(worlds.weights(f"{run} resumed"), worlds.weights(run))
    assert worlds.lines(f"{run} resumed") == worlds.lines(run)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("still", 3), ("other", 3)])
def test_what_was_trained_before_an_interruption_is_not_trained_again(name: str, sizes: int, worlds: Worlds) -> None:
    told = [json.loads(line)["text"] for line in (worlds.place / f"{name}.jsonl").read_text().splitlines()]
    for epoch in ("1/2", "2/2"):  # once by the run that nothing disturbed, and once by the other one
        assert sum(f"epoch {epoch}" in text and "validation" in text for text in told) == 2 * sizes


# --- workers and what is kept on disk -------------------------------------------------------------------------------------------------


def shards(folder: Path) -> dict[str, list[list[str]]]:
    """Return whose rows a cache holds: for each column, by what it holds, the images' md5 in each of its files."""
    return {
        json.loads(label.read_text())["label"]: [
            [bytes(name).hex() for name in load_file(path)["md5"].numpy()] for path in sorted(label.parent.glob("*.safetensors"))
        ]
        for label in folder.glob("*/column.json")
    }


@pytest.mark.slow
def test_workers_that_share_a_cache_compute_what_is_kept_there_once_in_all(worlds: Worlds) -> None:
    """Features and decoded images; and those that come later, of whatever number, compute nothing."""
    train, val = ([row.md5 for row in worlds.side(side)] for side in ("train", "val"))
    wanted = {f"nets:resnet20 {tap} at 32 pixels": train + val for tap in ("layer1.2", "layer2.2")}
    wanted |= {"decoded images at 32 pixels": train, "prepared images at 32 pixels": val}
    found = shards(worlds.place / "shared")
    assert {label: sorted(name for part in parts for name in part) for label, parts in found.items()} == {
        label: sorted(names) for label, names in wanted.items()
    }
    assert {label: sorted(map(len, parts)) for label, parts in found.items() if "decoded" in label} == {
        label: [30, 31] for label in wanted if "decoded" in label
    }  # each worker its share
    speed = {n: json.loads((worlds.finished(f"cut {n} on disk") / "history.json").read_text())["speed"] for n in (2, 3)}
    assert speed[2]["images_per_second"] > 0
    assert speed[3]["images_per_second"] == 0


@pytest.mark.slow
def test_a_group_with_a_cache_trains_what_one_worker_trains_without_one(worlds: Worlds) -> None:
    assert history_equal(worlds.weights("cut 3 on disk"), worlds.weights("cut 2 on disk"))
    assert worlds.lines("cut 3 on disk") == worlds.lines("cut 2 on disk")
    alone, together = worlds.weights("cut 1"), worlds.weights("cut 2 on disk")
    assert alone.keys() == together.keys()
    assert all(torch.allclose(together[key], value, atol=float(value.abs().max()) * 1e-4) for key, value in alone.items())
    (one,), (two,) = worlds.lines("cut 1"), worlds.lines("cut 2 on disk")
    assert two | {"log_loss": 0} == one | {"log_loss": 0}
    assert two["log_loss"] == pytest.approx(one["log_loss"], abs=1e-5)
    assert history_equal(worlds.weights("tuned 2 on disk"), worlds.weights("tuned 2"))
    assert worlds.lines("tuned 2 on disk") == worlds.lines("tuned 2")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_that_is_broken_off_in_the_middle_of_its_features_goes_on_with_those_that_are_kept(size: int, worlds: Worlds) -> None:
    for name in ("frozen", "cut"):
        whole, resumed = worlds.weights(f"{name} {size}"), worlds.weights(f"{name} {size} broken off")
        assert history_equal(whole, resumed)
        assert worlds.lines(f"{name} {size} broken off") == worlds.lines(f"{name} {size}")
    both = sorted(row.md5 for side in ("train", "val") for row in worlds.side(side))
    for label, parts in shards(worlds.place / f"broken off {size}").items():
        assert sorted(name for part in parts for name in part) == both, label  # by both attempts and all workers: each once
        assert sum(len(part) == 16 for part in parts) == size, label  # of the first attempt


@pytest.mark.parametrize(("asked", "workers", "found"), [("auto", 1, 32), ("auto", 16, 32), ("auto", 17, 34), (7, 3, 7), (6, 3, 6)])
def test_a_batch_holds_two_images_for_each_worker(
    asked: int | str, workers: int, found: int, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    world = LocalContext(tmp_path)
    world.size = workers
    assert batch_size(job(decided(CASES[2]), batch_size=asked), Recipe(), 100, world) == found


def test_a_batch_that_the_user_asked_for_and_that_is_too_small_is_refused_before_anything_is_computed(
    job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    world = LocalContext(tmp_path)
    world.size = 3
    with pytest.raises(
        ClusterError, match=r"expected train\.batch_size to hold two images for each of 3 workers, found 5\. Set it to 6 or more"
    ):
        run(job(decided(CASES[2]), batch_size=5), world, tmp_path)
    assert not (tmp_path / "run.jsonl").exists()


@pytest.mark.slow
def test_a_batch_grows_until_each_worker_has_two_images_of_it(worlds: Worlds) -> None:
    assert "batches of 6 images: two for each of 3 workers" in (worlds.place / "few.jsonl").read_text()
    assert worlds.lines("few 3")[-1]["phase"] == "fine-tune"


# --- what is passed through the network -----------------------------------------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are passed through a network while it is not trained, in order."""
    seen: list[str] = []
    plain = features.forward_passes

    def passes(network: Any, images: Images, indices: Any, *rest: Any, **named: Any) -> Iterator[Any]:
        for batch, outputs in plain(network, images, indices, *rest, **named):
            seen.extend(images.rows[i].md5 for i in batch)
            yield batch, outputs

    monkeypatch.setattr("tlpipeline.backbones.features.forward_passes", passes)
    monkeypatch.setattr("tlpipeline.backbones.classifier.forward_passes", passes)
    return seen


def test_one_new_image_in_a_hundred_costs_one_pass_in_a_hundred(
    make_images: Callable[..., Path], job: Callable[..., TrainingConfig], passed: list[str], tmp_path: Path
) -> None:

    folder = make_images(classes=2, each=100, name="many")
    listed = tmp_path / "many.parquet"

    def train_again(name: str) -> list[Row]:
        manifest = dataset.ingest(folder, {}, lambda done, total: None)
        dataset.write_manifest(manifest, listed, tmp_path / "many.csv")
        trained(job(decided(CASES[1]), images=str(folder), manifest=str(listed), cache=str(tmp_path / "cache")), tmp_path / name)
        return manifest.used("train", "val")

    first = train_again("first")
    assert sorted(passed) == [row.md5 for row in first]
    passed.clear()
    for label in range(2):
        index = 100
        while True:  # an image of the test side is not read here
            paint(label, index).save(folder / f"class{label}" / "new.png")
            if splits.split_of(hashlib.md5((folder / f"class{label}" / "new.png").read_bytes()).hexdigest()) != "test":
                break
            index += 1
    second = train_again("second")
    assert len(second) == len(first) + 2
    assert sorted(passed) == sorted({row.md5 for row in second} - {row.md5 for row in first})
    passed.clear()
    train_again("third")
    assert not passed
    finished = json.loads((tmp_path / "third" / "scratch" / "finished" / "history.json").read_text())
    assert finished["speed"] == {"images_per_second": 0.0, "waited_for_data": 0.0}


def test_no_stage_passes_an_image_that_another_one_has_passed(workspace: Path, passed: list[str]) -> None:

    set_param(workspace, "choose.case", "small_similar")
    stages.ingest(workspace, silent)
    manifest = dataset.read_manifest(workspace / layout.MANIFEST)
    train, val, test = ({row.md5 for row in manifest.used(side)} for side in splits.SPLIT_NAMES)
    profiled = train | {row.md5 for row in manifest.used("val") if splits.in_selection_half(row.md5)}
    wanted = {"profile": profiled, "choose": set(), "train": val - profiled, "evaluate": test}
    for name, images in wanted.items():
        stages.STAGES[name](workspace, silent)
        assert sorted(passed) == sorted(images), name
        passed.clear()
    set_param(workspace, "train.seed", "1")
    shutil.rmtree(workspace / layout.RUNS)
    for name in wanted:
        stages.STAGES[name](workspace, silent)
    assert not passed


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_model_says_whether_its_backbone_is_as_it_came(case: Case, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    trained(job(decided(case), epochs=1), tmp_path / "out")
    assert load(tmp_path / "out" / "scratch" / "finished" / "model")[1].frozen is (case.freeze == "kept")


def test_where_fine_tuning_is_undone_the_backbone_is_as_it_came_and_no_image_is_passed_again(
    job: Callable[..., TrainingConfig], passed: list[str], tmp_path: Path
) -> None:
    """The head that is solved last then reads what the cache holds."""
    cache = str(tmp_path / "cache")
    frozen = trained(job(replace(decided(CASES[0]), readings=SEVERAL), cache=cache), tmp_path / "frozen")
    decision = replace(decided(CASES[2], refit_head=True, lr_none=100.0), readings=SEVERAL)  # which destroys the network
    passed.clear()
    undone = trained(job(decision, epochs=1, cache=cache), tmp_path / "undone")
    val = {row.md5 for row in dataset.read_manifest(tmp_path / "manifest.parquet").used("val")}
    assert sorted(passed) == sorted(val)  # the epoch that was undone was validated
    assert load(tmp_path / "undone" / "scratch" / "finished" / "model")[1].frozen
    trunk = {key for key in frozen if key.startswith("trunk.")}
    assert trunk <= undone.keys()
    assert all(torch.equal(frozen[key], undone[key]) for key in trunk)


# --- what is told ---------------------------------------------------------------------------------------------------------------------


def test_the_progress_of_features_says_how_long_it_waited_for_data(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    trained(job(decided(CASES[0])), tmp_path / "out")
    told = [json.loads(line)["text"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    lines = [text for text in told if text.startswith("features")]
    assert lines
    assert all(re.fullmatch(r"features, \d+ images/s, waited \d+% for data, \d+:\d\d left", text) for text in lines)


def test_the_report_says_nothing_of_a_speed_that_was_not_measured() -> None:
    assert pace({}) == ""
    assert pace({"images_per_second": 0.0, "waited_for_data": 0.0}).startswith("No image was passed")
    told = pace({"images_per_second": 123.4, "waited_for_data": 0.051})
    assert told == "Training took 123 images a second; its first worker waited for data 5% of the time."


def test_the_speed_counts_every_image_that_is_passed(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    manifest = dataset.read_manifest(tmp_path / "manifest.parquet")

    def speed(name: str, **changes: Any) -> float:
        trained(job(decided(CASES[0]), cache=str(tmp_path / "cache"), **changes), tmp_path / name)
        told = json.loads((tmp_path / name / "scratch" / "finished" / "history.json").read_text())["speed"]
        return float(told["images_per_second"])

    made = job(decided(CASES[0]))  # the manifest is written
    without = replace(manifest, rows=tuple(row for row in manifest.rows if row.split != "val"))
    dataset.write_manifest(without, Path(made.manifest), tmp_path / "quarantine.csv")
    assert speed("training side") > 0
    assert speed("nothing new") == 0
    dataset.write_manifest(manifest, Path(made.manifest), tmp_path / "quarantine.csv")
    assert speed("validation side") > 0


# --- small things ---------------------------------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [schedule(step, 200, 0.05) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:

    image = paint(0, 0)
    five, six = row_of("5", *image.size), row_of("6", *image.size)

    def view(seed: int, epoch: int, row: Row) -> bytes:
        return augmentation(0.5, True, seed, epoch)(image, row, 32).tobytes()

    assert view(3, 2, five) == view(3, 2, replace(five, path="renamed", label="other"))
    assert len({view(3, 2, five), view(3, 2, six), view(3, 1, five), view(4, 2, five)}) == 4


def row_of(text: str, width: int, height: int) -> Row:
    return Row(text, hashlib.md5(text.encode()).hexdigest(), "", "", width, height, "RGB", "")


def test_a_crop_of_a_squeezed_image_is_the_crop_of_the_image() -> None:
    """Decoded images are kept as squares; what is drawn from them must have the proportions of the picture."""
    import torchvision.transforms.v2.functional as f
    from PIL import Image

    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0)), (300, 600), mode="bicubic")
    image: Image.Image = f.to_pil_image(smooth[0].clamp(0, 1))
    squeezed = image.resize((200, 200), Image.Resampling.BILINEAR)
    for name in "abcdefgh":
        row = row_of(name, 600, 300)
        one, other = (np.asarray(augmentation(0.3, True, 0, 0)(kept, row, 64), dtype=int) for kept in (image, squeezed))
        assert np.abs(one - other).mean() < 2
        assert np.abs(one - np.asarray(image.resize((64, 64)), dtype=int)).mean() > 4


def test_without_flip_nothing_is_mirrored() -> None:
    from PIL import Image

    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3)))
    for index in range(40):
        row = np.asarray(augmentation(0.5, False, 0, 0)(ramp, row_of(str(index), 32, 32), 32))[16, :, 0].astype(int)
        assert row[-1] > row[0]


def test_crops_are_of_all_sizes_shapes_and_places_that_were_asked_for_and_half_are_mirrored() -> None:
    """Red says how far to the right a pixel was, and green how far down."""
    from PIL import Image

    ramp = np.arange(256, dtype=np.uint8)
    image = Image.fromarray(np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(0)), 2))
    boxes = []
    for index in range(400):
        pixels = np.asarray(augmentation(0.3, True, 0, 0)(image, row_of(str(index), 256, 256), 32), dtype=float)
        (left, right), (top, bottom) = pixels[16, [0, -1], 0], pixels[[0, -1], 16, 1]
        width, height = (right - left) * 32 / 31 / 256, (bottom - top) * 32 / 31 / 256  # between the middles of the outermost pixels
        boxes.append((abs(width), height, width < 0, min(left, right) / 255 - abs(width) / 64, top / 255 - height / 64))
    widths, heights, mirrored, lefts, tops = np.array(boxes).T
    area, aspect = widths * heights, widths / heights
    whole = area < 0.5  # larger ones may lose what does not fit
    assert 0.28 < area.min() < 0.33
    assert 0.9 < area.max() < 1.02
    assert 0.55 < area.mean() < 0.67
    assert 0.73 < aspect[whole].min() < 0.8
    assert 1.25 < aspect[whole].max() < 1.37
    assert abs(np.log(aspect).mean()) < 0.03
    assert 0.4 < mirrored.mean() < 0.6
    for start, length in ((lefts, widths), (tops, heights)):
        place = (start / (1 - length))[length < 0.8]  # 0 is the first place that it may have, 1 the last
        assert place.min() < 0.1
        assert place.max() > 0.9
        assert 0.45 < place.mean() < 0.55


def test_an_interrupted_run_is_resumed_by_the_same_code_only() -> None:
    """Every package that training or a race reaches is part of a run's name, but for those that change no result."""
    library = Path(stages.__file__).parent.parent
    reached: set[str] = set()
    waiting = ["choice", "training"]
    while waiting:
        package = waiting.pop()
        reached.add(package)
        for path in (library / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tlpipeline."):
                    name = node.module.split(".")[1]
                    if name not in reached and (library / name).is_dir():
                        waiting.append(name)
    assert set(stages.TRAINING_CODE) == reached


def test_the_frozen_model_ignores_train_mode() -> None:
    model = Classifier(catalogue.load("demonstration", "DEFAULT"), READ_LAST, 3, frozen=True).train()
    assert model.training
    assert not any(m.training for m in model.trunk.modules())


def test_learning_rates_follow_normalization_and_size() -> None:
    recipe = Recipe()
    assert recipe.lr("batch", 32) == 0.2
    assert recipe.lr("batch", 224) == 0.05
    assert recipe.lr("none", 224) == 0.004
    assert recipe.lr("layer", 224) == 5e-5


def test_the_warm_up_is_a_share_of_the_steps_and_at_most_500() -> None:
    assert schedule(498, 1_000_000, 0.05) == pytest.approx(499 / 500)
    assert schedule(499, 1_000_000, 0.05) == 1.0
    assert schedule(500, 1_000_000, 0.05) == pytest.approx(1.0)
    assert schedule(105, 200, 0.05) == pytest.approx(0.5)  # halfway down the cosine
