"""The catalogue: networks of three sources, weights that fit or are refused with a way out."""

import email.message
import hashlib
import http.client
import io
import json
import math
import os
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models import SqueezeNet1_0_Weights, WeightsEnum

from tests.helpers import odd_networks
from tests.helpers.archives import take
from tests.helpers.processes import run_python
from tlpipeline.backbones import catalogue
from tlpipeline.backbones.catalogue import Demonstration, check_name, load
from tlpipeline.backbones.taps import Backbone, cut, measure_taps
from tlpipeline.data.loader import normalize, resize_and_crop
from tlpipeline.errors import BackboneError, WorkspaceError
from tlpipeline.versioning import git


def images(net: Backbone) -> Tensor:
    return torch.randn(2, 3, net.transforms.size, net.transforms.size, generator=torch.Generator().manual_seed(0))


# --- networks of one's own ------------------------------------------------------------------------------------------------------------


def test_an_own_network_is_named_by_module_and_callable() -> None:
    net = load("nets:resnet20", "none")
    names = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))
    assert (net.tap_names, net.transforms.size, net.source_classes) == (names, 32, 0)
    assert [(t.channels, t.height) for t in measure_taps(net, 32)] == [(c, h) for c, h in ((16, 32), (32, 16), (64, 8)) for _ in range(3)]


def test_an_own_network_takes_weights_of_another_number_of_classes_where_it_can(tmp_path: Path) -> None:
    made = {classes: nets.resnet20(classes).state_dict() for classes in (7, 10)}
    for classes, state in made.items():
        assert of_weights(state, tmp_path / f"{classes}.safetensors").source_classes == classes
    with pytest.raises(BackboneError, match=r"linear.weight is \(7, 9\), expected \(10, 64\)"):
        of_weights(made[7] | {"linear.weight": torch.zeros(7, 9)}, tmp_path / "other.safetensors")


def of_weights(state: Mapping[str, Tensor], path: Path) -> Backbone:
    save_file(dict(state), path)
    return load("nets:resnet20", str(path), md5=hashlib.md5(path.read_bytes()).hexdigest())


def test_an_own_network_with_many_taps_is_cut_at_any_of_them() -> None:
    net = load("research.networks:EfficientNetLite0", "none")
    assert sum(p.numel() for p in net.module.parameters()) == 4_652_008  # as published
    taps = measure_taps(net, 64)
    assert [t.channels for t in taps] == [16, *[24] * 2, *[40] * 2, *[80] * 3, *[112] * 3, *[192] * 4, 320, 1280]
    assert [t.height for t in taps] == [32, *[16] * 2, *[8] * 2, *[4] * 6, *[2] * 6]
    assert [t.parameters for t in taps] == sorted(t.parameters for t in taps)
    inputs = images(net)
    whole = cut(net, net.tap_names)(inputs)
    for name, values in zip(net.tap_names, whole, strict=True):
        assert torch.equal(cut(net, [name])(inputs)[0], values)


def test_where_no_taps_are_said_the_blocks_are_found_in_the_order_in_which_they_run() -> None:
    net = load("tests.helpers.odd_networks:Undeclared", "none")
    assert net.tap_names == ("stem.0", "body.0", "body.1")  # not the ReLU, not what never runs or runs twice, not the head
    assert net.transforms.size == 224
    together = cut(net, net.tap_names)(images(net))
    for tap, values in zip(net.tap_names, together, strict=True):
        assert torch.equal(values, cut(net, [tap])(images(net))[0]), "a ReLU in place must not reach back into a tap"


def test_a_network_that_branches_on_data_between_its_taps_is_cut_all_the_same() -> None:
    net = load("tests.helpers.odd_networks:Branching", "none")
    batch = images(net)
    trunk = cut(net, ["first"])
    assert torch.equal(trunk(batch)[0], net.module.first(batch))  # type: ignore[operator]
    assert set(trunk.state_dict()) == {"first.weight", "first.bias"}
    assert torch.equal(cut(net, ["first"], logits=True)(batch)[1], net.module(batch))


def test_blocks_that_give_no_tensor_are_no_taps() -> None:
    with pytest.raises(BackboneError, match=r"found no top-level block that returns a tensor.*taps ="):
        load("tests.helpers.odd_networks:Paired", "none")
    with pytest.raises(BackboneError, match=r"tap pair of tests.helpers.odd_networks:Tapped.*found tuple"):
        measure_taps(load("tests.helpers.odd_networks:Tapped", "none"), 16)


def test_pooled_features_are_no_logits(tmp_path: Path) -> None:
    """A softmax over features would give a head similarity that means nothing."""
    weights = tmp_path / "w.safetensors"
    save_file(odd_networks.Headless().state_dict(), weights)
    md5 = hashlib.md5(weights.read_bytes(), usedforsecurity=False).hexdigest()
    assert load("tests.helpers.odd_networks:Headless", str(weights), md5=md5).source_classes == 0
    save_file(odd_networks.Undeclared().state_dict(), weights)
    md5 = hashlib.md5(weights.read_bytes(), usedforsecurity=False).hexdigest()
    assert load("tests.helpers.odd_networks:Undeclared", str(weights), md5=md5).source_classes == 10


def test_a_network_that_says_it_has_no_taps_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"expected at least one tap in tests.helpers.odd_networks:Tapless.taps, found none"):
        load("tests.helpers.odd_networks:Tapless", "none")


def test_a_network_that_returns_no_logits_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"expected tests.helpers.odd_networks:Answering to return logits .*found dict"):
        load("tests.helpers.odd_networks:Answering", "none")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nets:resnet21", "did you mean resnet20"),
        ("nowhere.nets:resnet20", "PYTHONPATH"),
        ("math:sqrt", "without arguments"),
        ("tests.helpers.odd_networks:Wrong", "Module"),
        ("resnet81", "did you mean resnet18"),
        ("demonstratoin", "did you mean demonstration"),
    ],
)
def test_an_unknown_network_is_answered_with_the_nearest(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.odd_networks.Wrong", list, raising=False)
    with pytest.raises(BackboneError, match=says):
        load(name, "none")


def test_taps_and_transforms_that_do_not_exist_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nets.CifarResNet.taps", ("layer1", "layer4"))
    with pytest.raises(BackboneError, match=r"'layer4'.*did you mean layer"):
        load("nets:resnet20", "none")
    monkeypatch.setattr("nets.CifarResNet.transforms", {"sise": 32})
    with pytest.raises(BackboneError, match=r"'sise'.*size, resize, mean"):
        load("nets:resnet20", "none")


def test_a_name_is_checked_without_building_the_network() -> None:
    for name in ("demonstration", "squeezenet1_0", "vit_h_14", "my.nets:anything"):
        check_name(name)
    with pytest.raises(BackboneError, match="did you mean squeezenet1_"):
        check_name("squeezenet")


# --- weights --------------------------------------------------------------------------------------------------------------------------


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def load_file(name: str, path: Path, **options: Any) -> Backbone:
    return load(name, path.name, md5=md5(path), root=path.parent, **options)


def same(net: Backbone, state: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in net.module.state_dict().items())


def test_random_weights_follow_from_the_seed_and_leave_other_draws_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, same_again, other = (load("nets:resnet20", "none", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert same(one, same_again.module.state_dict())
    assert not same(one, other.module.state_dict())
    assert one.source_classes == 0  # random weights know no classes


def test_a_server_that_is_silent_is_not_waited_for(silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", f"http://{silent_server}")
    with pytest.raises(BackboneError, match=r"Cannot download the weights .* of resnet18: .*timed out"):
        catalogue.load("resnet18", "DEFAULT")


def test_weights_of_another_architecture_are_refused_by_the_first_keys_that_differ(tmp_path: Path) -> None:
    save_file(Demonstration().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match=r"of nets:resnet20.*missing, first conv1.weight, bn1.weight.*first conv1.0.*backbone.name"):
        load_file("nets:resnet20", tmp_path / "other.safetensors")


def test_weights_of_another_shape_are_refused_by_the_shapes(tmp_path: Path) -> None:
    save_file(load("nets:resnet20", "none").module.state_dict() | {"linear.bias": torch.zeros(7)}, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match=r"1 of another shape: linear.bias is \(7,\), expected \(10,\)"):
        load_file("nets:resnet20", tmp_path / "other.safetensors")


def test_a_deeper_network_of_the_same_kind_does_not_pass(tmp_path: Path) -> None:
    save_file(load("nets:resnet56", "none").module.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match=r"unknown, first layer1.3"):
        load_file("nets:resnet20", tmp_path / "other.safetensors")


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), TimeoutError("timed out"), http.client.IncompleteRead(b"")])
def test_without_a_network_the_error_says_what_else_to_do(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", fail)
    with pytest.raises(BackboneError, match=r"download the weights SqueezeNet1_0_Weights.IMAGENET1K_V1.*weights file that you have"):
        load("squeezenet1_0", "DEFAULT")


def test_a_damaged_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reply(io.BytesIO):
        def info(self) -> email.message.Message:
            return email.message.Message()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Reply(b"half a file"))
    with pytest.raises(BackboneError, match="hash"):
        load("squeezenet1_0", "IMAGENET1K_V1")
    assert not list(tmp_path.rglob("*.pth"))


def test_what_was_downloaded_once_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = SqueezeNet1_0_Weights.IMAGENET1K_V1
    state = models.squeezenet1_0(weights=None).state_dict()
    cached = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = load("squeezenet1_0", "DEFAULT")
    assert same(net, state)
    assert net.source_classes == 1000
    assert cached.name in net.fingerprint
    cached.write_bytes(b"half a file")
    with pytest.raises(BackboneError, match="download"):
        load("squeezenet1_0", "DEFAULT")


def test_files_from_before_layers_were_renamed_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own files for DenseNet and ViT carry such names."""
    state = models.densenet121(weights=None).state_dict()
    old = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in state.items() if "num_batches" not in k}
    assert old.keys() != state.keys()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: old)
    net = load("densenet121", "DEFAULT")
    assert all(torch.equal(net.module.state_dict()[key], value) for key, value in state.items())


def test_a_vision_transformer_takes_another_size_by_interpolating_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    state = models.vit_b_16(weights=None).state_dict()
    ramp = torch.arange(14.0).expand(14, 14)  # position (row, column) -> column
    state["encoder.pos_embedding"] = torch.cat([torch.full((1, 1, 768), -1.0), ramp.reshape(1, 196, 1).expand(1, 196, 768)], 1)
    old = {key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value for key, value in state.items()}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: old)
    net = load("vit_b_16", "DEFAULT", size=64)
    positions = net.module.state_dict()["encoder.pos_embedding"]
    assert positions[0, 0, 0] == -1  # the class token stands nowhere
    assert positions[0, 1:, 0].reshape(4, 4)[2].tolist() == pytest.approx([0, 13 / 3, 26 / 3, 13], abs=0.5)
    assert net.source_classes == 1000
    assert net.module(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    assert torch.equal(
        net.module.get_parameter("encoder.layers.encoder_layer_3.mlp.0.weight"), state["encoder.layers.encoder_layer_3.mlp.0.weight"]
    )
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: Demonstration().state_dict())
    with pytest.raises(BackboneError, match="another architecture's"):
        load("vit_b_16", "DEFAULT", size=64)


def test_a_vision_transformer_takes_whole_patches() -> None:
    with pytest.raises(BackboneError, match="a multiple of 16 for vit_b_16, found 230"):
        load("vit_b_16", "none", size=230)


def test_a_network_that_reads_the_version_of_its_files_loads_one_without(tmp_path: Path) -> None:
    state = models.mnasnet0_5(weights=None).state_dict()
    save_file(state, tmp_path / "mnasnet.safetensors")
    assert same(load_file("mnasnet0_5", tmp_path / "mnasnet.safetensors"), state)


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("squeezenet1_0", "IMAGENET1K_V9", "did you mean IMAGENET1K_V1"),
        ("squeezenet1_0", "DEFAUTL", "did you mean DEFAULT"),
        ("squeezenet1_0", "weights/none.safetensors", "DEFAULT, IMAGENET1K_V1, none or a file"),
        ("demonstration", "IMAGENET1K_V1", "DEFAULT, none or a file"),
        ("nets:resnet20", "DEFAULT", "to its path, or to none"),
    ],
)
def test_unknown_weights_are_answered_with_those_there_are(name: str, weights: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=says):
        load(name, weights, root=tmp_path)


@pytest.mark.parametrize("said", ["none", "0" * 32])
def test_a_weights_file_is_only_loaded_by_its_md5(said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(load("nets:resnet20", "none").module.state_dict(), path)
    with pytest.raises(BackboneError, match=rf"\({said}\), found {md5(path)}.*weights_md5"):
        load("nets:resnet20", path.name, md5=said, root=tmp_path)
    assert load_file("nets:resnet20", path).fingerprint == md5(path)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"net": {key: value for key, value in state.items() if "num_batches_tracked" not in key}},
    ],
    ids=["plain", "nested", "from data-parallel training", "without counters"],
)
def test_a_checkpoint_of_tensors_is_loaded(wrapped: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    state = load("nets:resnet20", "none", seed=5).module.state_dict()
    torch.save(wrapped(state), tmp_path / "checkpoint.pth")
    assert same(load_file("nets:resnet20", tmp_path / "checkpoint.pth"), state)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_that_would_execute_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"state_dict": load("nets:resnet20", "none").module.state_dict(), "extra": Trap(marker)}, tmp_path / "trap.pth")
    with pytest.raises(BackboneError, match=r"cannot be read without executing code.*safetensors"):
        load_file("nets:resnet20", tmp_path / "trap.pth")
    assert not marker.exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert marker.exists(), "the trap is a real one"


def test_weights_that_belong_to_another_user_are_named_with_the_way_out() -> None:
    with tempfile.TemporaryDirectory() as folder:  # the folders of tmp_path are closed to others themselves
        Path(folder).chmod(0o755)
        weights = Path(folder) / "weights.safetensors"
        weights.write_bytes(b"tensors")
        weights.chmod(0 if os.geteuid() else 0o600)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(
                BackboneError, match=r"may be read at .*weights\.safetensors, found Permission denied\. Change its mode or owner"
            ):
                load("nets:resnet20", str(weights), md5="0" * 32)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("name", ["damaged.safetensors", "damaged.pth"])
@pytest.mark.parametrize("content", [b"", b"no tensors", b"text", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError):
        load_file("nets:resnet20", tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bias: bias.sum(), r"LAST is \(\), expected"),
        (lambda bias: bias.to("meta"), "a tensor on meta.*under 'LAST'"),
        (lambda bias: bias.to_sparse(), "sparse.*under 'LAST'"),
        (lambda bias: bias.to(torch.int8), "LAST is int8, expected float32"),
        (lambda bias: bias.to(torch.complex64), "LAST is complex64, expected float32"),
        (lambda bias: 3, "found int under 'LAST'"),
    ],
    ids=["scalar", "meta", "sparse", "int8", "complex", "number"],
)
@pytest.mark.parametrize("name", ["demonstration", "resnet18", "nets:resnet20"])
def test_tensors_that_are_no_weights_are_refused(name: str, change: Callable[[Tensor], Any], words: str, tmp_path: Path) -> None:
    """PyTorch itself copies int8 and complex numbers into floats without a word."""
    state = dict(load(name, "none").module.state_dict())
    last = list(state)[-1]
    torch.save({**state, last: change(state[last])}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=words.replace("LAST", last)):
        load_file(name, tmp_path / "w.pth")


def test_weights_without_names_are_refused(tmp_path: Path) -> None:
    torch.save(dict(enumerate(load("nets:resnet20", "none").module.state_dict().values())), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"found a tensor.* under 0"):
        load_file("nets:resnet20", tmp_path / "w.pth")


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(BackboneError, match=r"a state dict.*found list.*model.state_dict\(\)"):
        load_file("nets:resnet20", tmp_path / "list.pth")


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0"])
def test_a_network_trained_on_other_classes_has_as_many_outputs(name: str, tmp_path: Path) -> None:
    save_file(models.get_model(name, weights=None, num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    assert load_file(name, tmp_path / "seven.safetensors").source_classes == 7


def test_a_demonstration_network_of_one_s_own_may_know_other_classes(tmp_path: Path) -> None:
    save_file(Demonstration(4).state_dict(), tmp_path / "four.safetensors")
    assert load_file("demonstration", tmp_path / "four.safetensors").source_classes == 4


# --- the demonstration network, and real weights on real images -----------------------------------------------------------------------


def test_the_demonstration_weights_are_small_and_good() -> None:
    folder = Path(catalogue.__file__).with_name("weights")
    card = json.loads((folder / "demonstration.json").read_text())
    assert card["test_accuracy"] >= 0.75
    assert card["test_interval_95"][0] < card["test_accuracy"] < card["test_interval_95"][1]
    assert (folder / "demonstration.safetensors").stat().st_size <= 3_000_000
    net = load("demonstration", "DEFAULT")
    assert net.source_classes == len(card["data"]["classes"])
    assert sum(p.numel() for p in net.module.parameters()) == card["parameters"]


def accuracy(net: Backbone, found: list[Image.Image], labels: list[int]) -> float:
    inputs = torch.from_numpy(np.stack([resize_and_crop(image, net.transforms) for image in found]))
    with torch.inference_mode():
        return float((net.module(normalize(inputs, net.transforms)).argmax(1) == torch.tensor(labels)).float().mean())


@pytest.mark.data
def test_real_weights_classify_the_images_that_they_were_trained_for(real_data: Path) -> None:
    found, labels = take(real_data / "cifar10.tar.gz", 40)
    assert len(found) == 400
    small = load_file("nets:resnet20", real_data / "resnet20-cifar10.safetensors")
    large = load_file("nets:resnet56", real_data / "resnet56-cifar10.safetensors")
    assert small.source_classes == large.source_classes == 10
    assert accuracy(small, found, labels) > 0.75
    assert accuracy(large, found[::4], labels[::4]) > 0.75
    assert accuracy(load("demonstration", "DEFAULT"), found, labels) > 0.72


@pytest.mark.data
def test_imagenet_weights_know_things_among_a_thousand(real_data: Path) -> None:
    categories = SqueezeNet1_0_Weights.IMAGENET1K_V1.meta["categories"]
    only = {name: categories.index(name) for name in ("revolver", "scorpion", "starfish", "trilobite")}
    found, labels = take(real_data / "caltech24.tar.gz", 8, only)
    net = load_file("squeezenet1_0", real_data / "squeezenet1_0-imagenet.safetensors")
    assert net.source_classes == 1000
    assert accuracy(net, found, labels) > 0.4
    with pytest.raises(BackboneError, match="another architecture's"):
        load_file("resnet18", real_data / "squeezenet1_0-imagenet.safetensors")


def test_the_weights_of_the_published_networks_have_the_published_sizes() -> None:
    """He et al. 2015, table 6: 0.27 and 0.85 million parameters."""
    for name, millions in (("nets:resnet20", 0.27), ("nets:resnet56", 0.85)):
        count = sum(p.numel() for p in load(name, "none").module.parameters())
        assert math.isclose(count / 1e6, millions, abs_tol=0.005)
        assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in load(name, "none").module.modules()) == int(name[-2:])


# --- your own network in the workspace ------------------------------------------------------------------------------------------------


def test_a_network_in_the_workspace_is_found_while_it_is_loaded_and_replaces_no_other_module(tmp_path: Path) -> None:
    (tmp_path / "nets_of_the_workspace.py").write_text("from nets import resnet20\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('executed')\n")
    path = list(sys.path)
    assert load("nets_of_the_workspace:resnet20", "none", root=tmp_path).tap_names
    assert sys.path == path
    with pytest.raises(BackboneError, match="expected 'net' in the module colorsys"):
        load("colorsys:net", "none", root=tmp_path)
    with pytest.raises(BackboneError, match="put its module into the workspace or into its folder networks"):
        load("other_nets_of_the_workspace:resnet20", "none")


def test_the_commands_run_no_module_of_the_working_folder(tmp_path: Path) -> None:
    """`python -m tlpipeline`, which dvc.yaml calls, follows the same rule as the command `tlpipeline`."""
    for name in ("random", "typer", "shlex", "difflib"):
        (tmp_path / f"{name}.py").write_text("print('executed')\nraise SystemExit(7)\n")
    done = run_python(tmp_path, "-m", "tlpipeline", "--help")
    assert (done.returncode, "executed" in done.stdout) == (0, False)


def test_registering_runs_no_module_of_the_workspace(tmp_path: Path) -> None:
    git.run(tmp_path, "init", "--quiet")
    (tmp_path / "random.py").write_text("raise SystemExit('executed')\n")
    with pytest.raises(WorkspaceError) as failed:
        git.gto(tmp_path, "register", "model", "HEAD")
    assert "executed" not in str(failed.value)
