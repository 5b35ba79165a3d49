"""On a GPU: what can be seen without one, on tensors that only pretend to lie there, and what needs one (marked)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.helpers.training import Crashing, Interrupted, decided, history
from tlpipeline.backbones import catalogue, features, taps
from tlpipeline.backbones import classifier as model
from tlpipeline.backbones.classifier import Classifier
from tlpipeline.backbones.features import FeatureExtractor, forward_passes, numerics_key, pass_size, pooling_at, with_pooling
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.precision import enable_tf32, extracts_in_bfloat16
from tlpipeline.choice.cases import CASES
from tlpipeline.data import dataset
from tlpipeline.data.loader import Images
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.files import write_tensors
from tlpipeline.training.budget import TimeBudget
from tlpipeline.training.checkpoint import Checkpoints, State
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.images import Datasets
from tlpipeline.training.optim import flat, optimizer, unflat
from tlpipeline.training.progress import ProgressWriter
from tlpipeline.training.recipe import Recipe
from tlpipeline.training.train import run
from tlpipeline.training.trainer import Run, Trainer

Make = Callable[..., TrainingConfig]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TUNED = CASES[2]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A context in which tensors may be put on a GPU that is not there: PyTorch follows shapes, types and devices, and computes nothing."""

    def backward(loss: torch.Tensor, *_: Any, **__: Any) -> None:
        """Stand in for gradients, which PyTorch gives only where there is a device."""
        assert loss.device == GPU
        for parameter in pretending:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda pixels: mode.from_tensor(pixels))
    pretending.clear()
    return mode


pretending: list[nn.Parameter] = []


def moved(net: nn.Module) -> nn.Module:
    """Put a network on the pretended GPU, in its own memory layout."""

    def there(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=GPU)

    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(there(parameter), parameter.requires_grad)
                pretending.append(module._parameters[name])
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = there(buffer)
    return net


@pytest.mark.parametrize("recipe", [{}, {"gradient_accumulation_steps": 4}, {"imbalance": 1.0}, {"optimizer": "adamw"}], ids=str)
def test_all_that_a_step_of_fine_tuning_touches_lies_on_the_gpu(
    recipe: dict[str, Any], job: Make, tmp_path: Path, pretended: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(decided(TUNED, **recipe), precision="auto")
    net = catalogue.load("demonstration", "DEFAULT")
    classifier = Classifier(net, [TapPooling("conv2", 64, (1, 2))], 3, frozen=False)
    datasets = Datasets.of(Path(config.images), dataset.read_manifest(Path(config.manifest)), net.transforms)
    context = LocalContext(tmp_path, GPU)
    losses: list[torch.device] = []

    def stepped(made: torch.optim.Optimizer, *_: Any) -> None:
        assert all(group["fused"] for group in made.param_groups)
        losses.append(GPU)
        raise Stepped  # PyTorch cannot pretend a fused step of SGD

    with pretended:
        moved(classifier)
        checkpoints, progress = Checkpoints(context, tmp_path, classifier), ProgressWriter(tmp_path / "progress", 1)
        run_ = Run(config, context, datasets, State("head"), checkpoints, features.Store(), TimeBudget(0, context), progress, tmp_path)
        hook = register_optimizer_step_pre_hook(stepped)
        try:
            with pytest.raises(Stepped):
                Trainer(classifier, run_, "batch").fit("scratch", 1, 0.1)
        finally:
            hook.remove()
    assert losses == [GPU]


class Stepped(Exception):
    """The first step of the optimizer was reached."""


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_a_frozen_pass_lies_on_the_gpu_and_its_last_step_is_filled_up(job: Make, pretended: FakeTensorMode) -> None:
    made = job(decided(CASES[0]))
    net = catalogue.load("demonstration", "DEFAULT")
    images = Images(Path(made.images), dataset.read_manifest(Path(made.manifest)).used(TRAIN)[:5], net.transforms)
    classifier = Classifier(net, [TapPooling("conv2", 64, (1, 2))], 3, frozen=True, in_bfloat16=True)
    seen: list[torch.Size] = []
    classifier.trunk.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    with pretended:
        moved(classifier)
        ((batch, (out,)),) = forward_passes(with_pooling(classifier.trunk, classifier.grids, half=True), images, range(5), GPU)
    assert (batch, out.shape, out.device, out.dtype) == ([0, 1, 2, 3, 4], (5, 320), GPU, torch.float32)
    assert seen == [(128, 3, 32, 32)]


def test_a_gpu_takes_fewer_images_at_a_time_as_they_get_larger() -> None:
    assert [pass_size(GPU, side) for side in (32, 224, 225, 299, 384, 600)] == [128, 128, 64, 64, 32, 16]
    assert {pass_size(CPU, side) for side in (32, 224, 600)} == {16}


def test_what_gpus_compute_is_kept_apart_by_their_model_and_number_format(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["T4", "T4", "A100", "A100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.pop())
    assert len({numerics_key(GPU, 224, half) for half in (True, False, True, False)}) == 4
    assert numerics_key(CPU, 224, False) == "cpu"


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_resumed_optimizer_has_the_memory_layout_of_its_weights(kind: str, tmp_path: Path) -> None:
    """Files know no layout; fused steps on a GPU refuse state that does not lie as its weights do."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    made = [optimizer(net, Recipe(optimizer=kind), "batch", 0.01, [], fused=False) for _ in range(2)]
    net(torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    made[0].step()
    write_tensors(flat(made[0]), tmp_path / "state.safetensors")
    unflat(load_file(tmp_path / "state.safetensors"), made[1])
    compared = 0
    for weights, values in made[1].state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == weights.shape:
                assert value.stride() == weights.stride(), name
                assert torch.equal(value, made[0].state[weights][name])
                compared += 1
    assert compared == (4 if kind == "sgd" else 8)


# --- bfloat16 -------------------------------------------------------------------------------------------------------------------------


def test_frozen_networks_read_in_bfloat16_on_gpus_that_have_it_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert extracts_in_bfloat16(GPU, "auto")
    assert not extracts_in_bfloat16(GPU, "float32")
    assert not extracts_in_bfloat16(CPU, "auto")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not extracts_in_bfloat16(GPU, "auto")


def test_only_a_gpu_changes_how_float32_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    assert (enable_tf32(CPU), asked) == (CPU, [])
    assert (enable_tf32(GPU), asked) == (GPU, ["high"])


def test_a_model_that_reads_in_bfloat16_says_so_and_is_read_again_as_such(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but on a CPU: trained, evaluated and predicted with, through the cache and without, the answers are the same bits."""
    made = job(decided(CASES[0]), cache=str(tmp_path / "cache"), cache_bytes=1e9, precision="auto")
    plain = trained_on(CPU, made, tmp_path / "plain")
    for module in ("train", "frozen"):
        monkeypatch.setattr(f"tlpipeline.training.{module}.extracts_in_bfloat16", lambda device, precision: precision == "auto")
    folder = trained_on(CPU, made, tmp_path / "half")
    classifier, description = model.load(folder / "model")
    assert (classifier.in_bfloat16, description.in_bfloat16) == (True, True)
    manifest = dataset.read_manifest(Path(made.manifest))
    images = Images(Path(made.images), manifest.used(VAL), description.transforms)
    without, kept = (model.probabilities(classifier, images, CPU, lambda done: None, s) for s in (None, features.Store(tmp_path / "cache")))
    assert torch.equal(without, kept)
    # The head on validation, as training itself told it: solved once more since, so only nearly the same images are right.
    right = float((without.argmax(1).numpy() == np.array([manifest.classes.index(r.label) for r in images.rows])).mean())
    assert right >= history(tmp_path / "half")[0]["accuracy"] - 0.1
    classifier.in_bfloat16 = False
    otherwise = model.probabilities(classifier, images, CPU, lambda done: None, features.Store(tmp_path / "cache"))
    assert not torch.equal(otherwise, without)
    assert torch.allclose(otherwise, without, atol=0.05)
    assert not model.load(plain / "model")[1].in_bfloat16


def test_features_of_an_image_in_bfloat16_are_the_same_bits_whatever_else_is_asked_about(job: Make) -> None:
    made = job(decided(CASES[0]))
    net = catalogue.load("demonstration", "DEFAULT")
    rows = dataset.read_manifest(Path(made.manifest)).used(TRAIN)[:20]
    trunk = taps.cut(net, ["conv3"])
    tap = next(t for t in taps.measure_taps(net, 32) if t.name == "conv3")

    def read(some: list[Any], threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            asked = FeatureExtractor(features.Store(), net, trunk, [pooling_at(tap)], net.transforms, CPU, half=True)
            return asked.extract(Images(Path(made.images), some, net.transforms), lambda done: None)[0].all()
        finally:
            torch.set_num_threads(before)

    whole = read(rows, 1)
    assert torch.equal(read(rows[7:8], 1)[0], whole[7])
    assert torch.equal(read(rows, 2), whole)


def trained_on(device: torch.device, made: TrainingConfig, place: Path) -> Path:
    scratch = place / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    finished = run(made, LocalContext(place, device), scratch)
    assert finished is not None
    return finished


# --- real ones ------------------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_trained_on_a_gpu_predicts_what_was_evaluated(case: Any, job: Make, tmp_path: Path) -> None:
    made = job(decided(case), cache=str(tmp_path / "cache"), cache_bytes=1e9, precision="auto")
    classifier, description = model.load(trained_on(GPU, made, tmp_path / "run") / "model")
    images = Images(Path(made.images), dataset.read_manifest(Path(made.manifest)).used(VAL), description.transforms)
    there, again = (model.probabilities(classifier.to(GPU), images, GPU, lambda done: None, s) for s in (None, features.Store()))
    assert torch.equal(there, again)
    assert torch.allclose(model.probabilities(classifier.to(CPU), images, CPU, lambda done: None), there, atol=0.05)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_run_goes_on_on_a_gpu(kind: str, job: Make, tmp_path: Path) -> None:
    made = job(decided(TUNED, optimizer=kind), precision="auto")
    whole = load_file(trained_on(GPU, made, tmp_path / "whole") / "model" / "weights.safetensors")
    (tmp_path / "torn" / "scratch").mkdir(parents=True)
    crashing = Crashing(tmp_path / "torn", 3)  # after the head, the first epoch, the second one
    crashing.device = GPU
    with pytest.raises(Interrupted):
        run(made, crashing, tmp_path / "torn" / "scratch")
    again = load_file(trained_on(GPU, made, tmp_path / "torn") / "model" / "weights.safetensors")
    assert all(torch.allclose(again[name], value, atol=1e-2) for name, value in whole.items())


@needs_gpu
@pytest.mark.gpu
def test_memory_that_really_runs_out_halves_the_parts(job: Make, tmp_path: Path) -> None:
    made = job(replace(decided(TUNED), init="plain"), epochs=1, precision="float32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    held = torch.zeros(64 << 20, dtype=torch.uint8, device=GPU)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + (24 << 20)) / total, GPU)
    try:
        trained_on(GPU, made, tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
        del held
    state = (tmp_path / "run" / "scratch" / "finished" / "state.json").read_text()
    assert "memory ran out" in state
