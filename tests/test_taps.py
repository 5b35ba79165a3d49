"""Taps stand where blocks end, and cuts are real: what lies behind them is neither kept nor run."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tlpipeline.backbones import catalogue
from tlpipeline.backbones.catalogue import load
from tlpipeline.backbones.taps import Backbone, cut, input_size, measure_taps, resolve_tap
from tlpipeline.errors import BackboneError

# A representative of each family: input side, kind of normalization, taps.
# fmt: off
FAMILIES = {
    "demonstration": (32, "none", "conv1 conv2 conv3 fc1 fc2"),
    "squeezenet1_0": (32, "none", " ".join(f"features.{i}" for i in (2, 3, 4, 5, 7, 8, 9, 10, 12))),
    "resnet18": (32, "batch", "maxpool layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1 layer4.0 layer4.1"),
    "mobilenet_v3_small": (32, "batch", " ".join(f"features.{i}" for i in range(13)) + " classifier.1"),
    "efficientnet_b0": (32, "batch", "features.0 features.1.0 features.2.0 features.2.1 features.3.1 features.4.0 features.4.1 features.4.2 "
                                     "features.5.0 features.5.1 features.5.2 features.6.0 features.6.2 features.6.3 features.7.0 features.8"),
    "convnext_tiny": (32, "layer", "features.0 features.1.0 features.1.1 features.3.0 features.3.1 features.3.2 features.5.0 features.5.1 "
                                   "features.5.3 features.5.4 features.5.5 features.5.6 features.5.7 features.7.0 features.7.1 features.7.2"),
    "densenet121": (32, "batch", "features.pool0 features.denseblock1 features.transition1 features.denseblock2 features.transition2 "
                                 "features.denseblock3 features.transition3 features.denseblock4 features.relu5"),
    "vgg11": (32, "none", "features.2 features.5 features.10 features.15 features.20 classifier.1 classifier.4"),
    "vit_b_16": (64, "layer", " ".join(f"encoder.layers.encoder_layer_{i}" for i in range(12)) + " encoder.ln"),
    "swin_t": (64, "layer", "features.0 features.1.0 features.1.1 features.3.0 features.3.1 features.5.0 features.5.1 features.5.2 "
                            "features.5.3 features.5.4 features.5.5 features.7.0 features.7.1 permute"),
    "mnasnet0_5": (32, "batch", "layers.2 layers.7 layers.8.0 layers.8.2 layers.9.0 layers.9.1 layers.9.2 layers.10.0 layers.10.2 layers.11.0 "
                                "layers.11.1 layers.12.0 layers.12.1 layers.12.3 layers.13.0 layers.16"),
    "mobilenet_v2": (32, "batch", " ".join(f"features.{i}" for i in (0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18))),
    "shufflenet_v2_x0_5": (32, "batch", "maxpool stage2.0 stage2.1 stage2.2 " + " ".join(f"stage3.{i}" for i in range(8)) +
                                        " stage4.1 stage4.2 stage4.3 conv5"),
    "regnet_y_400mf": (32, "batch", "stem " + " ".join(f"trunk_output.block{stage}.block{stage}-{i}" for stage, i in (
                                    (1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 4), (3, 5), *((4, i) for i in range(6))))),
    "alexnet": (63, "none", "features.2 features.5 features.7 features.9 features.12 classifier.2 classifier.5"),
    "googlenet": (32, "batch", "maxpool1 maxpool2 " + " ".join(f"inception{i}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"))),
    "inception_v3": (75, "batch", "maxpool1 maxpool2 Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c"),
}
# fmt: on


@pytest.fixture(scope="module", params=FAMILIES)
def net(request: pytest.FixtureRequest) -> Backbone:
    return load(request.param, "none", size=FAMILIES[request.param][0])


def images(net: Backbone, count: int = 2) -> Tensor:
    size = FAMILIES[net.name][0] if net.name in FAMILIES else net.transforms.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def outputs(net: Backbone, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What hooks on the uncut network see at its taps, in the order in which they run, and its logits."""
    seen: dict[str, Tensor] = {}
    modules = dict(net.module.named_modules())
    hooks = [
        modules[tap].register_forward_hook(lambda _module, _inputs, out, tap=tap: seen.update({tap: out.clone()})) for tap in net.tap_names
    ]
    with torch.inference_mode():
        logits = net.module(batch)
    for hook in hooks:
        hook.remove()
    return seen, logits


def channels_first(value: Tensor, layout: str) -> Tensor:
    if layout == "tokens":
        return torch.cat([value[:, 0], value[:, 1:].mean(1)], 1)
    return value.permute(0, 3, 1, 2) if layout == "nhwc" else value


# --- taps and cuts, for each family ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_taps_stand_where_blocks_end_in_the_order_in_which_they_run(net: Backbone) -> None:
    assert net.tap_names == tuple(FAMILIES[net.name][2].split())
    assert tuple(outputs(net, images(net))[0]) == net.tap_names
    assert len(net.tap_names) <= catalogue.MAX_TAPS


def test_what_is_read_at_the_taps_is_what_the_uncut_network_computes(net: Backbone) -> None:
    seen, logits = outputs(net, images(net))
    with torch.inference_mode():
        *read, head = cut(net, net.tap_names, logits=True)(images(net))
    assert torch.equal(head, logits)
    for tap, values in zip(net.tap_names, read, strict=True):
        assert torch.equal(values, channels_first(seen[tap], net.layouts.get(tap, ""))), tap
        assert values.dim() in (2, 4)


def test_a_cut_network_with_the_source_head_is_the_whole_network(net: Backbone) -> None:
    with torch.inference_mode():
        assert torch.equal(cut(net, [net.tap_names[-1]], logits=True)(images(net))[1], net.module(images(net)))


def test_what_lies_behind_the_cut_is_neither_kept_nor_run(net: Backbone) -> None:
    middle = net.tap_names[len(net.tap_names) // 2]
    started: list[str] = []
    before: set[str] = set()
    modules = {name: module for name, module in net.module.named_modules() if name}
    hooks = [m.register_forward_pre_hook(lambda _m, _i, name=name: started.append(name)) for name, m in modules.items()]
    hooks.append(modules[middle].register_forward_hook(lambda _m, _i, _o: before.update(started)))
    with torch.inference_mode():
        net.module(images(net))
        behind = set(started) - before
        trunk = cut(net, [middle])
        started.clear()
        trunk(images(net))
    for hook in hooks:
        hook.remove()
    tensors = set(trunk.state_dict())
    gone = {key for key in net.module.state_dict() if any(key.startswith(f"{name}.") for name in behind)}
    assert gone
    assert not gone & tensors
    assert tensors <= set(net.module.state_dict())
    assert not behind & set(started)
    assert middle in started


@pytest.mark.slow
def test_a_deeper_tap_costs_more_and_keeps_more(net: Backbone) -> None:
    taps = measure_taps(net, images(net).shape[2])
    assert tuple(t.name for t in taps) == net.tap_names
    for shallow, deep in itertools.pairwise(taps):
        assert shallow.forward_ops <= deep.forward_ops
        assert shallow.parameters <= deep.parameters
    whole = sum(p.numel() for p in net.module.parameters())
    assert taps[0].parameters < taps[-1].parameters < whole
    assert taps[0].forward_ops < taps[-1].forward_ops


def test_the_kind_of_normalization_is_known(net: Backbone) -> None:
    assert net.normalization == FAMILIES[net.name][1]


# --- taps and cuts, in particular -----------------------------------------------------------------------------------------------------


def test_a_tap_has_the_shape_and_the_cost_that_hand_calculation_gives() -> None:
    taps = measure_taps(load("demonstration", "none"), 32)
    assert [(t.channels, t.height, t.width) for t in taps] == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 1, 1), (128, 1, 1)]
    assert taps[0].parameters == 3 * 32 * 9 + 32
    assert taps[1].forward_ops - taps[0].forward_ops == 2 * 32 * 64 * 9 * 16 * 16
    assert taps[3].forward_ops - taps[2].forward_ops == 2 * 128 * 4 * 4 * 256


def test_attention_counts_as_work() -> None:
    net = load("vit_b_16", "none", size=64)
    first, second = measure_taps(replace(net, tap_names=net.tap_names[:2]), 64)
    tokens, width = 4 * 4 + 1, 768
    block = 2 * tokens * width * (3 * width + width + 2 * 4 * width) + 2 * 2 * tokens * tokens * width
    assert second.forward_ops - first.forward_ops == block


def test_a_cut_shares_its_tensors_with_the_backbone() -> None:
    net = load("demonstration", "none")
    assert cut(net, ["conv2"]).get_parameter("conv1.0.weight") is net.module.get_parameter("conv1.0.weight")


def test_threads_that_cut_at_once_leave_networks_as_they_were() -> None:
    net = catalogue.load("demonstration", "DEFAULT")
    before = nn.Module.__call__, nn.Module.__getattr__
    with ThreadPoolExecutor(4) as pool:
        trunks = list(pool.map(lambda _: cut(net, ["conv1", "fc2"]), range(40)))
    assert (nn.Module.__call__, nn.Module.__getattr__) == before
    images = torch.rand(2, 3, 32, 32)
    assert all(torch.equal(trunk(images)[1], trunks[0](images)[1]) for trunk in trunks)


def test_an_unknown_tap_is_answered_with_the_list_of_taps() -> None:
    net = load("demonstration", "none")
    for ask in (lambda: cut(net, ["conv4"]), lambda: resolve_tap(net, "conv4")):
        with pytest.raises(BackboneError, match=r"'conv4'.*conv1, conv2, conv3, fc1, fc2"):
            ask()


def test_the_name_of_a_stage_means_its_last_block() -> None:
    net = load("resnet18", "none")
    assert resolve_tap(net, "layer2") == "layer2.1"
    assert resolve_tap(net, "layer2.0") == "layer2.0"
    with pytest.raises(BackboneError):
        resolve_tap(net, "layer")


def test_a_name_that_only_begins_alike_is_another_tap() -> None:
    net = replace(load("demonstration", "none"), tap_names=("features.1", "features.12"))
    assert resolve_tap(net, "features.1") == "features.1"


@pytest.mark.parametrize(
    ("wanted", "median", "size"),
    [("auto", 20, 32), ("auto", 64, 64), ("auto", 65, 96), ("auto", 5000, 224), (21, 500, 21), (300, 32, 300)],
)
def test_the_input_size_follows_the_images_up_to_the_weights_own(wanted: int | str, median: float, size: int) -> None:
    assert input_size(load("squeezenet1_0", "none"), wanted, median) == size


def test_no_input_is_smaller_than_the_network_can_take() -> None:
    net = load("squeezenet1_0", "none")
    assert input_size(replace(net, minimum=75), "auto", 32) == 75
    with pytest.raises(BackboneError, match="at least 21 for squeezenet1_0, found 20"):
        input_size(net, 20, 500)


@pytest.mark.parametrize("median", [8, 32, 500])
def test_a_network_of_one_size_takes_no_other(median: int) -> None:
    net = load("demonstration", "none")
    assert input_size(net, "auto", median) == input_size(net, 32, median) == 32
    with pytest.raises(BackboneError, match=r"data.size 32 for demonstration, found 64"):
        input_size(net, 64, median)


def test_transforms_at_another_size_keep_the_margin_of_the_crop() -> None:
    transforms = load("squeezenet1_0", "none").transforms
    assert (transforms.size, transforms.resize) == (224, 256)
    assert (transforms.at(112).size, transforms.at(112).resize) == (112, 128)
