"""Weights files as people have them: what is loaded, what is ignored with a remark, and what is refused."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import odd_networks
from tlpipeline.backbones.catalogue import load
from tlpipeline.backbones.taps import Backbone
from tlpipeline.errors import BackboneError

GOOD = {key: torch.randn(value.shape).abs() if value.is_floating_point() else value for key, value in nets.resnet20().state_dict().items()}
RAW = {key: value * 0.5 if value.is_floating_point() else value for key, value in GOOD.items()}
HEADLESS = {key: value for key, value in GOOD.items() if not key.startswith("linear.")}


def prefixed(prefix: str, state: Mapping[str, Tensor] = GOOD) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def load_content(content: Any, folder: Path, name: str = "nets:resnet20") -> Backbone:
    path = folder / "weights.pth"
    torch.save(content, path)
    return load(name, path.name, md5=hashlib.md5(path.read_bytes()).hexdigest(), root=folder)


def holds(net: Backbone, state: Mapping[str, Tensor]) -> bool:
    found = net.module.state_dict()
    return all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": prefixed("model."), "epoch": 3},
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("module.") | {"n_averaged": torch.tensor(9)},
        {"epoch": 3, "model_state_dict": GOOD, "loss": 0.1},
        {"whatever": {"inside": GOOD}, "optimizer": {"state": {0: {"step": 1}}, "param_groups": []}},
    ],
    ids=["lightning", "compiled", "compiled in parallel", "averaged", "tutorial", "other names"],
)
def test_a_wrapped_or_prefixed_file_is_loaded_whole(content: Any, tmp_path: Path) -> None:
    net = load_content(content, tmp_path)
    assert holds(net, GOOD)
    assert (net.source_classes, net.remarks) == (10, ())


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "arch": "resnet20", "state_dict": RAW, "state_dict_ema": GOOD},
        {"model": RAW, "model_ema": prefixed("module.") | {"n_averaged": torch.tensor(9)}, "epoch": 3},
    ],
    ids=["timm", "torchvision"],
)
def test_averaged_weights_are_preferred_with_a_remark(content: Any, tmp_path: Path) -> None:
    net = load_content(content, tmp_path)
    assert holds(net, GOOD)
    assert "averaged weights" in net.remarks[0]
    assert "left out" in net.remarks[0]


@pytest.mark.parametrize(
    ("content", "classes", "says"),
    [
        (HEADLESS, 0, "no head that fits"),
        ({"state_dict": prefixed("backbone.", HEADLESS)}, 0, "no head that fits"),
        (
            {key.replace("linear.", "linear.1."): value for key, value in GOOD.items()},
            0,
            "2 tensors that nets:resnet20 has not.*linear.1.weight",
        ),
        (GOOD | {"projector.weight": torch.zeros(4, 4)}, 10, "1 tensors.*projector.weight"),
    ],
    ids=["headless", "openmmlab", "own head", "projector"],
)
def test_a_missing_or_other_head_is_no_hindrance_and_what_is_ignored_is_said(content: Any, classes: int, says: str, tmp_path: Path) -> None:
    net = load_content(content, tmp_path)
    assert holds(net, HEADLESS)
    assert net.source_classes == classes
    assert re.search(says, " ".join(net.remarks)), net.remarks


def test_the_content_of_a_file_decides_how_it_is_read_and_not_its_ending(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "weights.bin")
    md5 = hashlib.md5((tmp_path / "weights.bin").read_bytes()).hexdigest()
    assert holds(load("nets:resnet20", "weights.bin", md5=md5, root=tmp_path), GOOD)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({key: value for key, value in GOOD.items() if not key.startswith("layer3.2.")}, "missing, first layer3.2.conv1.weight"),
        (GOOD | {"layer3.3.conv1.weight": torch.zeros(1)}, "unknown, first layer3.3.conv1.weight"),
        (GOOD | {"layer4.0.conv1.weight": torch.zeros(1)}, "unknown, first layer4.0.conv1.weight"),
        (GOOD | {"layer1.0.attention.weight": torch.zeros(1)}, "unknown, first layer1.0.attention.weight"),
        ({"generator": GOOD, "discriminator": RAW}, "expected one state dict .*found 2: generator, discriminator"),
    ],
    ids=["a block is missing", "a block more", "a stage more", "another kind of block", "two networks"],
)
def test_what_belongs_to_another_network_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=says):
        load_content(content, tmp_path)


@pytest.mark.parametrize("name", ["HeadFirst", "NormalizedHead"])
def test_a_head_may_be_registered_first_or_followed_by_a_norm(name: str, tmp_path: Path) -> None:
    state = getattr(odd_networks, name)(num_classes=7).state_dict()
    net = load_content(state, tmp_path, f"tests.helpers.odd_networks:{name}")
    assert net.source_classes == 7
    assert holds(net, state)


def test_a_weights_file_that_is_not_there_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"found no file .*absent\.safetensors\. Mend the path"):
        load("demonstration", "weights/absent.safetensors", root=tmp_path)
