"""Networks of timm and of Hugging Face: taps, cuts, all four cases, weights from files, and models that predict what they predicted."""

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.architectures import CLASSES, check, decide, paint_images, step
from tests.helpers.package_networks import FAMILIES, folder_of
from tlpipeline.backbones import catalogue, classifier
from tlpipeline.backbones.catalogue import load
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.taps import cut, input_size, measure_taps
from tlpipeline.choice.cases import CASES
from tlpipeline.data import dataset
from tlpipeline.data.loader import Images
from tlpipeline.errors import BackboneError

TINY = "timm:test_vit"  # timm's own network for tests, 160 pixels


def load_file(name: str, path: Path, **options: Any) -> Any:
    return load(name, path.name, md5=hashlib.md5(path.read_bytes()).hexdigest(), root=path.parent, **options)


# --- names ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_without_the_package_the_way_to_install_it_is_said(prefix: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackboneError, match=rf"the package {package} .*not installed. Run `pip install 'tlpipeline\[{package}\]'`"):
        load(f"{prefix}:anything/at-all", "none")


def test_the_library_imports_neither_package() -> None:
    program = (
        "import sys, tlpipeline, tlpipeline.cli, tlpipeline.backbones.catalogue; assert not {'timm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm/resnet18", r"did you mean timm:resnet18\?"),
        ("facebook/dinov2-small", r"did you mean hf:facebook/dinov2-small\?"),
        ("nets.resnet20", r"did you mean nets:resnet20\?"),
    ],
)
def test_a_name_with_another_sign_for_the_colon_is_answered_with_the_right_one(name: str, says: str) -> None:
    with pytest.raises(BackboneError, match=says):
        load(name, "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:resnet81", "did you mean resnet"),
        ("timm:resnet18.nonsense", "found the tag 'nonsense'"),
        ("hf:vitt", "did you mean vit"),
    ],
)
def test_an_unknown_network_of_a_package_is_answered_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(BackboneError, match=says):
        load(name, "none")


# --- every family, every case ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["timm:test_vit", "timm:test_convnext", "timm:test_efficientnet", "hf:dinov2_with_registers", "hf:swin", "hf:resnet"]
)
def test_a_family_goes_through_each_case(family: str, tmp_path: Path) -> None:
    manifest = paint_images(tmp_path)
    name = folder_of(family, tmp_path / "configurations")
    backbone = load(name, "none")
    size = backbone.transforms.size
    taps = measure_taps(backbone, size)
    assert [t.parameters for t in taps] == sorted(t.parameters for t in taps)
    assert [t.forward_ops for t in taps] == sorted(t.forward_ops for t in taps)
    start = {key: value.clone() for key, value in backbone.module.state_dict().items()}
    rows = sorted(dataset.read_manifest(manifest).used("train"), key=lambda row: row.path.split("/")[::-1])[:4]
    images, shown = (Images(tmp_path / "images", part, backbone.transforms) for part in (rows, rows[:1]))
    for case in CASES:
        backbone.module.load_state_dict(start)
        decision = decide(backbone.tap_names, taps, size, case)
        labels = [CLASSES.index(row.label) for row in rows]
        trained = step(backbone, start, decision, images, labels, shown, tmp_path / case.name)
        check(backbone, decision, trained, shown)


@pytest.mark.slow
def test_a_cut_network_is_what_the_whole_one_computes_and_its_parameters_are_all_trained() -> None:
    """DistributedDataParallel waits for a gradient of every parameter."""
    backbone = load(TINY, "none")
    batch = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}
    hooks = [
        backbone.module.get_submodule(tap).register_forward_hook(lambda _m, _i, out, tap=tap: seen.update({tap: out}))  # type: ignore[misc]
        for tap in backbone.tap_names
    ]
    backbone.module(batch)
    for hook in hooks:
        hook.remove()
    for tap in backbone.tap_names:
        trunk = cut(backbone, [tap])
        (output,) = trunk(batch)
        assert torch.equal(output, torch.cat([seen[tap][:, 0], seen[tap][:, 1:].mean(1)], 1))  # the class token, the mean of the patches
        output.square().mean().backward()
        assert [n for n, p in trunk.named_parameters() if p.grad is None] == []
        backbone.module.zero_grad(set_to_none=True)


@pytest.mark.slow
def test_register_tokens_are_in_no_mean(tmp_path: Path) -> None:
    name = folder_of("hf:dinov2_with_registers", tmp_path)
    backbone = load(name, "none")
    last = backbone.tap_names[-1]
    assert backbone.layouts[last] == "tokens5"  # a class token and four registers
    batch = torch.randn(1, 3, 56, 56)
    (tokens,) = replace_layouts(backbone, {})(batch)
    (features,) = cut(backbone, [last])(batch)
    assert torch.equal(features, torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))


def replace_layouts(backbone: Any, layouts: Mapping[str, str]) -> Any:
    return cut(replace(backbone, layouts=layouts), backbone.tap_names[-1:])


# --- weights and sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_from_a_file_are_loaded_with_their_classes_and_at_another_size(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file(state, tmp_path / "seven.safetensors")
    net = load_file(TINY, tmp_path / "seven.safetensors")
    assert net.source_classes == 7
    assert all(torch.equal(net.module.state_dict()[key], value) for key, value in state.items())
    smaller = load_file(TINY, tmp_path / "seven.safetensors", size=64)
    assert smaller.module.pos_embed.shape != net.module.pos_embed.shape
    assert torch.equal(smaller.module.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


@pytest.mark.slow
def test_a_hugging_face_file_without_a_head_or_without_the_name_of_its_base_is_loaded_with_a_remark(tmp_path: Path) -> None:
    name = folder_of("hf:vit", tmp_path / "configurations")
    state = {key.removeprefix("vit."): value for key, value in load(name, "none", seed=3).module.state_dict().items() if "vit." in key}
    save_file(state, tmp_path / "base.safetensors")
    net = load_file(name, tmp_path / "base.safetensors")
    assert all(torch.equal(net.module.state_dict()[f"vit.{key}"], value) for key, value in state.items())
    assert net.source_classes == 0
    assert any("no head" in remark for remark in net.remarks)


@pytest.mark.slow
def test_a_folder_that_was_saved_by_the_package_is_loaded_with_its_weights(tmp_path: Path) -> None:
    name = folder_of("hf:vit", tmp_path)
    saved = load(name, "none", seed=5).module
    saved.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    net = load(f"hf:{tmp_path / 'saved'}", "DEFAULT")
    assert all(torch.equal(net.module.state_dict()[key], value) for key, value in saved.state_dict().items())
    assert net.source_classes == 10
    assert len(net.fingerprint) == 32


@pytest.mark.slow
def test_a_network_of_one_size_keeps_it_and_another_one_follows_the_images(tmp_path: Path) -> None:
    assert input_size(load(TINY, "none"), "auto", 32) == 160
    assert input_size(load("timm:test_resnet", "none"), "auto", 32) == 32
    vit = load(folder_of("hf:vit", tmp_path), "none")
    assert input_size(vit, "auto", 500) == 32
    with pytest.raises(BackboneError, match=r"data.size 32 for hf:.*found 64.*Set data.size to auto"):
        input_size(vit, 64, 500)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:test_vit", "hf:somebody/network"])
def test_without_its_hub_the_error_says_what_else_to_do(name: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    program = f"from tlpipeline.backbones.catalogue import load\nload({name!r}, 'DEFAULT')\n"
    environment = {"PATH": "", "HF_ENDPOINT": f"http://{address}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "BackboneError: Cannot fetch the" in done.stderr
    assert ("weights file that you have" in done.stderr) or ("hf:FOLDER" in done.stderr)


# --- models ---------------------------------------------------------------------------------------------------------------------------


def saved(name: str, folder: Path) -> classifier.Description:
    """Save a classifier with this network as training does."""
    net = load(name, "none")
    tap = measure_taps(net, net.transforms.size)[-1]
    reading = TapPooling(tap.name, tap.channels, (1,))
    model = classifier.Classifier(net, [reading], 3, frozen=True)
    model.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    made = classifier.Description(name, tap.name, (reading,), ("a", "b", "c"), net.transforms, frozen=True)
    classifier.save(model, made, folder, net.code)
    return classifier.describe(folder)


@pytest.mark.slow
def test_a_model_of_another_version_of_its_package_is_refused_only_if_it_answers_otherwise(tmp_path: Path) -> None:
    description = saved(TINY, tmp_path / "model")
    assert description.library.startswith("timm ")
    assert len(description.answers) == 3
    content = json.loads((tmp_path / "model" / classifier.DESCRIPTION).read_text())

    def written(**changes: Any) -> None:
        (tmp_path / "model" / classifier.DESCRIPTION).write_text(json.dumps({**content, **changes}))

    written(library="timm 0.0.1 test_vit")
    classifier.load(tmp_path / "model")
    written(library="timm 0.0.1 test_vit", answers=[answer + 1 for answer in description.answers])
    with pytest.raises(BackboneError, match=r"answer as it did with timm 0\.0\.1.*pip install timm==0\.0\.1"):
        classifier.load(tmp_path / "model")


@pytest.mark.slow
def test_a_model_keeps_the_configuration_of_its_network_and_needs_no_hub(tmp_path: Path) -> None:
    name = folder_of("hf:vit", tmp_path / "configurations")
    assert catalogue.code_md5(name, None) == saved(name, tmp_path / "model").code_md5 != "none"
    for path in (tmp_path / "configurations").rglob("*.json"):
        path.unlink()
    model, _ = classifier.load(tmp_path / "model")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    kept = tmp_path / "model" / "network" / "config.json"
    kept.write_text(kept.read_text() + " ")
    with pytest.raises(BackboneError, match="Fetch the model again"):
        classifier.load(tmp_path / "model")


@pytest.mark.slow
def test_code_from_a_hub_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config"}}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(BackboneError, match=r"found the type 'theirs'.*Code from the hub is not run"):
        load(f"hf:{tmp_path}", "none")
    assert not (tmp_path / "executed").exists()


def test_the_families_of_the_benchmark_are_those_that_are_promised() -> None:
    named = {family for _, family, _ in FAMILIES}
    assert {"resnet", "convnext", "efficientnet", "regnet", "mobilenetv3", "vit", "deit", "swin", "dinov2 with registers"} <= named
    assert {"dinov2", "vit", "convnextv2", "swin", "resnet"} <= {family for name, family, _ in FAMILIES if name.startswith("hf:")}


@pytest.mark.slow
def test_the_page_is_what_the_rows_say() -> None:
    from benchmarks import packages as benchmark

    assert [row for row in benchmark.rows_of(benchmark.ROWS) if row["ok"] != "yes"] == []
    assert {row["network"] for row in benchmark.rows_of(benchmark.ROWS)} == {name for name, _, _ in FAMILIES}
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page()
