"""What an own network declares and how it is built is checked when it is loaded; each error is a sentence with the way out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import odd_networks
from tlpipeline.backbones.catalogue import load
from tlpipeline.backbones.taps import cut, input_size, measure_taps
from tlpipeline.errors import BackboneError

NETS = "tests.helpers.odd_networks"


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"size": 16, "interpolation": "cubic"}, r"'interpolation'\] as one of bilinear, bicubic, .*found 'cubic'"),
        ({"size": 16, "mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, r"mean and std of values from 0 to 1.*Divide .* by 255"),
        ({"size": 16, "std": (0.0, 0.5, 0.5)}, r"values from 0 to 1"),
        ({"size": 16, "mean": 0.5}, r"'mean'\] as three numbers.*found 0.5.*Write \(0.5, 0.5, 0.5\)"),
        ({"size": (32, 32)}, r"'size'\] as pixels of a side, such as 32, found \(32, 32\)"),
        ({"size": 32, "resize": 16}, r"'resize'\] of at least its size, 32, found 16"),
        (nn.Identity(), r"transforms as a dictionary, found Identity. Write transforms = "),
    ],
    ids=["interpolation", "8-bit statistics", "no deviation", "one number", "pair", "small resize", "an object"],
)
def test_transforms_that_mean_nothing_are_refused(declared: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(odd_networks.Headless, "transforms", declared)
    with pytest.raises(BackboneError, match=says) as error:
        load(f"{NETS}:Headless", "none")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Lazy", r"layers of known sizes .*found head.weight without one"),
        ("Raising", r"Cannot build .*Raising: it raised ValueError: no such thing. Mend its code"),
        ("Gray", r"images of three channels, found that it takes 1"),
        ("Tied", r"found that first.weight and second.weight are tied"),
        ("Holding", r"blocks of .*Holding that do not hold each other, found first again inside first.other.other"),
    ],
)
def test_a_network_that_cannot_become_a_model_is_refused_at_once(name: str, says: str) -> None:
    with pytest.raises(BackboneError, match=says) as error:
        load(f"{NETS}:{name}", "none")
    assert "\n" not in str(error.value)


def test_an_assertion_of_types_between_taps_is_no_hindrance() -> None:
    net = load(f"{NETS}:Asserting", "none")
    assert [tap.name for tap in measure_taps(net, 16)] == ["first", "second"]


def test_a_network_that_fails_at_the_size_of_the_images_gets_its_own() -> None:
    fixed, free = load(f"{NETS}:Patches", "none"), load(f"{NETS}:Headless", "none")
    assert input_size(fixed, "auto", 8) == 64
    assert input_size(free, "auto", 8) == 16
    with pytest.raises(BackboneError, match=r"data.size 64 for .*Patches, found 32: .*Set data.size to auto"):
        input_size(fixed, 32, 8)


@pytest.mark.parametrize(("prefix", "layout"), [(None, "tokens1"), (1, "tokens1")])
def test_tokens_of_an_own_network_are_a_tap(prefix: int | None, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(odd_networks.Patches, "prefix_tokens", prefix, raising=False)
    net = load(f"{NETS}:Patches", "none")
    assert net.layouts == {"blocks.0": layout, "blocks.1": layout}
    batch = torch.randn(2, 3, 64, 64)
    tokens: list[Tensor] = []
    hook = net.module.get_submodule("blocks.0").register_forward_hook(lambda _m, _i, out: tokens.append(out))
    net.module(batch)
    hook.remove()
    (features,) = cut(net, ["blocks.0"])(batch)
    assert torch.equal(features, torch.cat([tokens[0][:, 0], tokens[0][:, 1:].mean(1)], 1))


def test_an_attribute_of_a_module_is_suggested_by_the_networks_in_it() -> None:
    with pytest.raises(BackboneError) as error:
        load("nets:nothing_alike_xyz", "none")
    assert "__builtins__" not in str(error.value)
    assert "resnet20" in str(error.value)
