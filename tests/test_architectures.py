"""A small network of each torchvision family, under each of the four cases: cut, frozen or trained, exported, reloaded, the same predictions.

All of torchvision's classifiers, trained by two workers: `python -m benchmarks.architectures run`.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import models

from benchmarks import architectures as benchmark
from tests.helpers.architectures import (
    BATCH,
    CLASSES,
    Trained,
    check,
    decide,
    inputs,
    only_read,
    outline,
    paint_images,
    scaled,
    smallest,
    step,
    undrawn,
)
from tests.helpers.decisions import decision_for
from tests.helpers.training import in_group
from tlpipeline.backbones.catalogue import FAMILIES, load
from tlpipeline.backbones.classifier import load as load_model
from tlpipeline.backbones.classifier import probabilities
from tlpipeline.backbones.features import pooling_at
from tlpipeline.backbones.taps import Backbone, Tap, cut, input_size, measure_taps
from tlpipeline.choice.cases import CASES, Case
from tlpipeline.data import dataset
from tlpipeline.data.loader import Images
from tlpipeline.errors import BackboneError
from tlpipeline.files import write_tensors
from tlpipeline.training import train
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.heads import score

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t",
    "vgg11", "vit_b_16",
)  # fmt: skip


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    paint_images(folder)
    return folder


@dataclass(frozen=True)
class Net:
    """A network at its smallest size, the taps that some case reads, and a copy of its tensors."""

    backbone: Backbone
    taps: tuple[Tap, ...]
    size: int
    start: Mapping[str, Tensor]


@pytest.fixture(scope="module", params=NETWORKS)
def net(request: pytest.FixtureRequest) -> Net:
    size = smallest(outline(request.param))
    backbone = load(request.param, "none", size=size)
    return Net(backbone, measure_taps(only_read(backbone), size), size, copy.deepcopy(backbone.module.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_family_goes_through_each_case(net: Net, case: Case, painted: Path, tmp_path: Path) -> None:
    net.backbone.module.load_state_dict(net.start)
    rows = sorted(dataset.read_manifest(painted / "manifest.parquet").used("train"), key=lambda row: row.path.split("/")[::-1])
    # Two of each class, so that BatchNorm has something to average; a network of one large size averages over its maps.
    rows = rows[: 2 if net.backbone.fixed else 4]
    images, shown = (Images(painted / "images", part, net.backbone.transforms.at(net.size)) for part in (rows, rows[:1]))
    decision = decide(net.backbone.tap_names, net.taps, net.size, case)
    trained = step(net.backbone, net.start, decision, images, [CLASSES.index(row.label) for row in rows], shown, tmp_path / "model")
    check(net.backbone, decision, trained, shown)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "normalization", "optimizer"), [("mobilenet_v3_small", "batch", "SGD"), ("swin_t", "layer", "AdamW")])
def test_a_family_is_fine_tuned_as_a_run_does_it(
    name: str, normalization: str, optimizer: str, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 64 pixels, where BatchNorm keeps its statistics, and in the processor's own number format."""
    backbone = load(name, "none", size=64)
    last = measure_taps(replace(backbone, tap_names=backbone.tap_names[-1:]), 64)[0]
    made = TrainingConfig(
        workspace=str(tmp_path), images=str(painted / "images"), manifest=str(painted / "manifest.parquet"), backbone=name, weights="none",
        weights_md5="none", plan=decision_for(CASES[2], [pooling_at(last)], 64).plan, seed=0, epochs=2, batch_size=8, flip=True,
        precision="auto", history=str(tmp_path / "run.jsonl"),
    )  # fmt: skip
    stepped: list[tuple[str, int, int]] = []
    for kind in (torch.optim.SGD, torch.optim.AdamW):

        def step(self: torch.optim.Optimizer, *given: object, plain: Callable[..., object] = kind.step) -> object:
            stepped.append(
                (type(self).__name__, len({g["share"] for g in self.param_groups}), len({g["weight_decay"] for g in self.param_groups}))
            )
            return plain(self, *given)

        monkeypatch.setattr(kind, "step", step)
    (tmp_path / "scratch").mkdir()
    finished = train.run(made, LocalContext(tmp_path / "kept"), tmp_path / "scratch")
    assert finished is not None
    assert backbone.normalization == normalization
    assert {kind for kind, _, _ in stepped} == {optimizer}
    assert all(decays == 2 and (rates > 5) is (normalization == "layer") for _, rates, decays in stepped)  # by depth
    trained, start = load_file(finished / "model" / "weights.safetensors"), backbone.module.state_dict()
    moved = {key.removeprefix("trunk.") for key, value in trained.items() if key != "head.weight" and key != "head.bias"
             and not torch.equal(value, start[key.removeprefix("trunk.")])}  # fmt: skip
    # Random weights under statistics that nobody measured pass little on: some gradients vanish.
    assert len(moved) > 0.7 * sum(p.requires_grad for p in cut(backbone, backbone.tap_names[-1:]).parameters())
    assert not any("running" in key or "tracked" in key for key in moved)
    assert all(bool(value.isfinite().all()) for value in trained.values() if value.is_floating_point())


# Auxiliary heads that are left out, and at 75 pixels statistics that are kept; windows, stochastic depth and AdamW.
GROUPED = ("googlenet", "inception_v3", "swin_t")


@pytest.fixture(scope="module")
def grouped(painted: Path) -> Path:
    """The folder in which two workers trained some networks, for two steps: one that left out a weight fails in the second."""
    items = []
    for name in GROUPED:
        place, size = painted / name, smallest(outline(name))
        backbone = load(name, "none", size=size)
        rows = dataset.read_manifest(painted / "manifest.parquet").used("train")
        shown = inputs(Images(painted / "images", rows, backbone.transforms.at(size)))
        # Without statistics of their own, hardly anything of an image arrives at the last layer of a random network.
        write_tensors(scaled(name, shown, size), place / "start.safetensors")
        last = measure_taps(replace(backbone, tap_names=backbone.tap_names[-1:]), size)[0]
        decision = decision_for(CASES[2], [pooling_at(last)], size)
        # No head is solved, neither first nor last: what is exported is what was trained.
        decision = replace(decision, init="plain", recipe=replace(decision.recipe, refit_head=False))
        made = TrainingConfig(
            workspace=str(place), images=str(painted / "images"), manifest=str(painted / "manifest.parquet"), backbone=name,
            weights="start.safetensors", weights_md5=hashlib.md5((place / "start.safetensors").read_bytes(), usedforsecurity=False).hexdigest(),
            plan=decision.plan, seed=0, epochs=2, batch_size=BATCH, flip=True, precision="float32", history=str(place / "run.jsonl"),
        )  # fmt: skip
        items.append({"job": asdict(made), "folder": str(place)})
    in_group(2, items, painted / "spec.json")
    return painted


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPED)
def test_a_family_is_trained_by_two_workers_and_exported_as_it_was_validated(name: str, grouped: Path) -> None:
    finished = grouped / name / "scratch0" / "finished"
    start = load_file(grouped / name / "start.safetensors")
    with undrawn():
        model, description = load_model(finished / "model")
    size = description.transforms.size
    assert size == {"inception_v3": 75}.get(name, 32)
    backbone = load(name, "none", size=size)
    backbone.module.load_state_dict(start)
    decision = replace(decision_for(CASES[2], description.readings, size), init="plain")
    test, val = (
        Images(grouped / "images", dataset.read_manifest(grouped / "manifest.parquet").used(side), description.transforms)
        for side in ("test", "val")
    )
    stepped = load_file(finished / "model" / "weights.safetensors")
    check(backbone, decision, Trained(start, stepped, finished / "model", None), test)
    lines = json.loads((finished / "history.json").read_text())["history"]
    assert [(line["phase"], line["epoch"]) for line in lines] == [("fine-tune", 1), ("fine-tune", 2)]
    chances = probabilities(model, val, torch.device("cpu"), lambda done: None)
    loss = score(chances, np.array([CLASSES.index(row.label) for row in val.rows]))[1]
    assert loss == pytest.approx(lines[-1]["log_loss"], abs=1e-5)
    moved = any(
        not torch.equal(stepped[f"trunk.{key}"], value) for key, value in start.items() if "running" in key and f"trunk.{key}" in stepped
    )
    assert moved is (name == "googlenet")  # from 64 pixels on they are the source's; a swin transformer has none


# --- what the families have in common -------------------------------------------------------------------------------------------------


def test_every_classifier_of_torchvision_has_one_row_in_the_table_of_families() -> None:
    for name in models.list_models(module=models):
        assert sum(bool(re.fullmatch(f.names, name)) for f in FAMILIES) == 1, name


@pytest.mark.parametrize("name", NETWORKS)
def test_behind_the_last_tap_stands_the_old_head_alone(name: str) -> None:
    backbone = outline(name)
    with torch.device("meta"):
        whole = cut(backbone, backbone.tap_names[-1:], logits=True)
        behind = set(whole.state_dict()) - set(cut(backbone, backbone.tap_names[-1:]).state_dict())
    layers = {key.rpartition(".")[0] for key in behind}
    normalized = {"classifier.0"} if name.startswith("convnext") else set()  # a norm of what was averaged
    assert len(layers - normalized) == 1
    (head,) = layers - normalized
    layer = backbone.module.get_submodule(head)
    assert getattr(layer, "out_features", None) == 1000 or getattr(layer, "out_channels", None) == 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "googlenet", "mnasnet0_5", "resnet18", "squeezenet1_1"])
def test_a_minimum_below_32_pixels_is_a_size_that_the_network_takes(name: str) -> None:
    minimum = outline(name).minimum
    backbone = outline(name, minimum)
    with torch.device("meta"), torch.inference_mode():
        outputs = cut(backbone, backbone.tap_names, logits=True)(torch.zeros(1, 3, minimum, minimum))
    assert all(output.numel() for output in outputs)


# --- auxiliary heads ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxiliary", [True, False], ids=["with", "without"])
def test_a_weights_file_fits_with_and_without_auxiliary_heads(auxiliary: bool, tmp_path: Path) -> None:
    """torchvision's own files have them; a network that it loaded from one and that was trained further has not."""
    state = models.googlenet(weights=None, init_weights=False, aux_logits=auxiliary, num_classes=7).state_dict()
    assert any(key.startswith("aux") for key in state) == auxiliary
    save_file(state, tmp_path / "own.safetensors")
    md5 = hashlib.md5((tmp_path / "own.safetensors").read_bytes(), usedforsecurity=False).hexdigest()
    backbone = load("googlenet", "own.safetensors", md5=md5, root=tmp_path)
    assert backbone.source_classes == 7
    assert torch.equal(backbone.module.get_parameter("inception5b.branch1.conv.weight"), state["inception5b.branch1.conv.weight"])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_auxiliary_head_is_built(name: str) -> None:
    assert not [key for key in outline(name).module.state_dict() if key.lower().startswith("aux")]


# --- sizes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own", "minimum", "taken", "refused"),
    [
        ("vit_b_16", 224, 32, 160, 100),
        ("vit_b_32", 224, 64, 96, 32),
        ("vit_h_14", 518, 28, 224, 512),
        ("swin_t", 224, 32, 64, 31),
        ("swin_v2_t", 256, 32, 96, 16),
        ("maxvit_t", 224, 224, 224, 448),
        ("inception_v3", 299, 75, 75, 74),
    ],
)
def test_another_size_than_the_weights_own_is_taken_where_the_network_can(
    name: str, own: int, minimum: int, taken: int, refused: int
) -> None:
    backbone = outline(name)
    assert (backbone.transforms.size, backbone.minimum) == (own, minimum)
    assert input_size(backbone, taken, 500) == taken
    with pytest.raises(BackboneError, match=rf"data.size .*for {name}, found {refused}"):
        input_size(backbone, refused, 500)


@pytest.mark.parametrize(
    ("name", "median", "size"),
    [("vit_h_14", 64, 518), ("swin_t", 64, 224), ("maxvit_t", 64, 224), ("inception_v3", 64, 75), ("vgg11", 64, 64)],
)
def test_by_itself_a_network_that_learnt_positions_keeps_its_size(name: str, median: float, size: int) -> None:
    assert input_size(outline(name), "auto", median) == size


# --- the page -------------------------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_rows_say() -> None:
    assert {row["network"] for row in benchmark.rows_of(benchmark.RESULTS / benchmark.TAPS)} == set(models.list_models(module=models))
    assert not [row for row in benchmark.rows_of(benchmark.RESULTS / benchmark.ROWS) if row["step_ok"] == "no"]
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(benchmark.RESULTS)
