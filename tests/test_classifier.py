"""The model folder: what is saved is what is loaded, nothing of the cut-off layers, nothing that can execute, frozen means frozen."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tlpipeline.backbones import catalogue
from tlpipeline.backbones.classifier import DESCRIPTION, WEIGHTS, Classifier, Description, feature_extractor, load, probabilities, save
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.data import dataset, splits
from tlpipeline.data.cache import Store
from tlpipeline.data.loader import Images
from tlpipeline.errors import BackboneError, PassTooLarge, RegistryError
from tlpipeline.files import write_json, write_tensors

CLASSES = ("ant", "bee", 'näh, "quoted"')
# Architecture, input side, readings with the deepest first, and the start of a name behind the cut.
NETWORKS = {
    "demonstration": (32, (TapPooling("conv2", 64, (1, 2, 4)), TapPooling("conv1", 32, (1,))), "conv3"),
    "nets:resnet20": (32, (TapPooling("layer2.2", 32, (1, 2)),), "layer3"),
    "resnet18": (32, (TapPooling("layer2.1", 128, (1, 2)), TapPooling("layer1.1", 64, (1,))), "layer3"),
    "densenet121": (32, (TapPooling("features.denseblock1", 256, (1,)),), "features.transition1"),
    "convnext_tiny": (32, (TapPooling("features.1.1", 96, (1,)),), "features.3"),
    "vit_b_16": (64, (TapPooling("encoder.layers.encoder_layer_1", 1536, (1,)),), "encoder.layers.encoder_layer_2"),
}


def build(name: str, frozen: bool = True, seed: int = 0) -> tuple[Classifier, Description]:
    """A classifier with a random head and with statistics that are not those of a fresh network."""
    size, readings, _ = NETWORKS[name]
    net = catalogue.load(name, "none", size=size, seed=seed)
    model = Classifier(net, readings, len(CLASSES), frozen)
    random = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if key.startswith("head.") or "running" in key:
            tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.1)
    return model, Description(name, readings[0].tap, readings, CLASSES, net.transforms.at(size))


def images(model: Description, count: int = 4) -> Tensor:
    return torch.randn(count, 3, model.transforms.size, model.transforms.size, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(batch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model of the demonstration network."""
    save(*build("demonstration"), tmp_path / "model")
    return tmp_path / "model"


# --- saving and loading ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_model_gives_the_logits_of_the_saved_one_without_the_layers_behind_its_cut(name: str, tmp_path: Path) -> None:
    model, description = build(name)
    save(model, description, tmp_path)
    loaded, read = load(tmp_path, trusts=lambda network, code: True)
    assert read == description
    assert torch.equal(logits(loaded, images(description)), logits(model, images(description)))
    assert not loaded.training
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == model.state_dict().keys()
    behind = NETWORKS[name][2]
    assert any(key.startswith(f"{behind}.") for key in catalogue.load(name, "none").module.state_dict())
    assert not any(key.startswith(f"trunk.{behind}.") for key in tensors)


def test_the_folder_holds_tensors_and_json_and_no_pickle(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, WEIGHTS]
    content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    assert content["classes"] == list(CLASSES)
    assert content["cut"] == "conv2"
    tensors = load_file(folder / WEIGHTS)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert size < (folder / WEIGHTS).stat().st_size < size + 2000
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())


def test_the_same_tensors_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    save(*build("demonstration"), tmp_path / "again")
    save(*load(folder), tmp_path / "copied")
    save(*build("demonstration", seed=1), tmp_path / "other")
    for name in (WEIGHTS, DESCRIPTION):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "copied" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (folder / WEIGHTS).read_bytes()


def test_loading_never_unpickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, fail)
    load(folder)


def test_a_model_that_was_trained_with_all_its_weights_is_loaded_alike(tmp_path: Path) -> None:
    model, description = build("nets:resnet20", frozen=False)
    save(model, description, tmp_path)
    assert torch.equal(
        logits(load(tmp_path, trusts=lambda network, code: network == "nets:resnet20")[0], images(description)),
        logits(model, images(description)),
    )


@pytest.mark.parametrize("write", [lambda path: write_json({"new": 1}, path), lambda path: write_tensors({"new": torch.ones(1)}, path)])
def test_a_crash_while_writing_leaves_the_old_file(write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def crash(*_: Any) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="power cut"):
            write(path)
    assert path.read_bytes() == b"old"
    write(path)
    assert path.read_bytes() != b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- what is no model -----------------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_named_with_the_way_to_one(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    for place in (tmp_path / "nowhere", tmp_path, folder):
        with pytest.raises(RegistryError, match=rf"{WEIGHTS} and {DESCRIPTION} at {place}.*tlpipeline run"):
            load(place)


@pytest.mark.parametrize("found", [2, "1", None])
def test_a_model_of_another_format_is_refused(found: Any, folder: Path) -> None:
    content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    write_json({**content, "format": found}, folder / DESCRIPTION)
    with pytest.raises(RegistryError, match=rf"format 1 in .*, found {found!r}"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", '{"format": 1}', "[]", '{"format": 1, "transforms": 3}'])
def test_a_damaged_description_is_refused(content: str, folder: Path) -> None:
    (folder / DESCRIPTION).write_text(content)
    with pytest.raises(RegistryError, match=DESCRIPTION):
        load(folder)


@pytest.mark.parametrize("network", ["callable_of_a_stranger:act", "http.server:test", "nets:resnet20"])
def test_a_folder_that_names_a_callable_calls_and_imports_nothing_unless_it_is_trusted(
    network: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "callable_of_a_stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef act(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    write_json({**content, "architecture": network}, folder / DESCRIPTION)
    with pytest.raises(BackboneError, match=f"found '{network}'.*--workspace.*--trust {network}"):
        load(folder, tmp_path, trusts=lambda network, code: network == "another:network")
    assert not (tmp_path / "ran").exists()


def test_tensors_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    save(*build("nets:resnet20"), tmp_path / "other")
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(BackboneError, match=r"do not fit demonstration.*conv1.0.weight"):
        load(folder)


def test_a_head_of_another_size_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "head.bias": torch.zeros(7)}, folder / WEIGHTS)
    with pytest.raises(BackboneError, match=r"head.bias"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 5, 1000])
def test_a_damaged_weights_file_is_refused(kept: int, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(BackboneError, match=WEIGHTS):
        load(folder)


def test_a_tap_that_the_network_does_not_have_is_refused(folder: Path) -> None:
    text = (folder / DESCRIPTION).read_text(encoding="utf-8")
    (folder / DESCRIPTION).write_text(text.replace("conv2", "conv9"), encoding="utf-8")
    with pytest.raises(BackboneError, match="conv9"):
        load(folder)


# --- frozen ---------------------------------------------------------------------------------------------------------------------------

LAST = {
    "demonstration": (TapPooling("fc2", 128, (1,)),),  # Dropout
    "resnet18": (TapPooling("layer4.1", 512, (1,)), TapPooling("layer2.1", 128, (1, 2))),  # BatchNorm
    "convnext_tiny": (TapPooling("features.7.2", 768, (1,)),),  # StochasticDepth
}


@pytest.mark.parametrize("name", LAST)
def test_a_frozen_backbone_is_bit_identical_after_training(name: str) -> None:
    model = Classifier(catalogue.load(name, "none"), LAST[name], 3, frozen=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for step in range(2):
        batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(batch), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", LAST)
def test_only_a_frozen_backbone_computes_the_same_under_train_as_under_eval(name: str) -> None:
    batch = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for frozen in (True, False):
        model = Classifier(catalogue.load(name, "none"), LAST[name], 3, frozen)
        model.train()
        assert model.training
        assert model.head.training
        assert all(module.training is not frozen for module in model.trunk.modules())
        with torch.no_grad():
            assert torch.equal(model.features(batch), model.eval().features(batch)) is frozen


def test_a_frozen_backbone_gets_no_gradients_and_another_does() -> None:
    for frozen in (True, False):
        model, description = build("nets:resnet20", frozen)
        model.train()
        model(images(description)).sum().backward()
        assert all((p.grad is None) is frozen for p in model.trunk.parameters())
        assert model.head.weight.grad is not None


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_trained_is_computed_as_its_trainer_says_and_only_what_is_frozen_in_bfloat16(frozen: bool) -> None:
    model = Classifier(catalogue.load("demonstration", "DEFAULT"), [TapPooling("conv2", 64, (1, 2))], 3, frozen, in_bfloat16=True)
    assert model.in_bfloat16 is frozen
    inputs, seen = torch.zeros(2, 3, 32, 32), list[torch.dtype]()
    next(iter(m for m in model.trunk.modules() if isinstance(m, torch.nn.Conv2d))).register_forward_hook(
        lambda _, given, out: seen.append(out.dtype)
    )
    assert model(inputs).dtype == torch.float32
    assert seen == [torch.bfloat16 if frozen else torch.float32]


def test_a_loaded_model_is_ready_to_predict(folder: Path) -> None:
    """Whoever calls it by itself must not meet dropout."""
    assert not any(module.training for module in load(folder)[0].modules())


def test_a_new_head_knows_nothing() -> None:
    model = Classifier(catalogue.load("demonstration", "DEFAULT"), LAST["demonstration"], 3, frozen=True)
    assert logits(model, torch.rand(2, 3, 32, 32)).abs().max() == 0


# --- predicting -----------------------------------------------------------------------------------------------------------------------


def test_probabilities_stand_in_the_order_of_the_images(make_images: Callable[..., Path]) -> None:
    pictures = make_images(classes=3, each=5)
    rows = dataset.ingest(pictures, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)
    model, description = build("nets:resnet20")
    told: list[int] = []

    def chances(rows: list[dataset.Row]) -> Tensor:
        return probabilities(model, Images(pictures, rows, description.transforms), torch.device("cpu"), told.append)

    whole = chances(rows)
    assert told == [15]
    assert whole.shape == (15, 3)
    assert torch.allclose(whole.sum(1), torch.ones(15))
    assert torch.equal(chances(rows[::-1]).flip(0), whole)
    assert chances([]).shape == (0, 3)


def test_images_whose_features_are_kept_count_as_done(make_images: Callable[..., Path], tmp_path: Path) -> None:
    pictures = make_images(classes=3, each=5)
    rows = dataset.ingest(pictures, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)
    model, description = build("nets:resnet20")
    told: list[int] = []
    for some in (rows[:10], rows, rows):
        probabilities(model, Images(pictures, some, description.transforms), torch.device("cpu"), told.append, Store(tmp_path))
    assert told == [0, 10, 10, 15, 15]


def full_above(model: Classifier, most: int) -> list[int]:
    """Have a network's passes run out of memory above so many images; return how many each was asked for."""
    asked: list[int] = []

    def full(_: Any, given: Any) -> None:
        asked.append(len(given[0]))
        if len(given[0]) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(full)
    return asked


def test_a_reader_that_is_alone_takes_fewer_images_at_a_time_where_memory_runs_out_and_one_that_is_not_does_not(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    """What others would take over must not depend on the memory that is free; a head that is solved at the end of training must not be lost."""
    pictures = make_images(classes=2, each=10)
    rows = dataset.ingest(pictures, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)
    model, description = build("nets:resnet20", frozen=False)
    images, cpu = Images(pictures, rows, description.transforms), torch.device("cpu")
    (plain,) = feature_extractor(model, Store(tmp_path / "plain"), description.transforms, cpu).extract(images, lambda done: None)
    asked = full_above(model.trunk, 5)
    (found,) = feature_extractor(model, Store(tmp_path / "alone"), description.transforms, cpu, smaller_passes=True).extract(
        images, lambda done: None
    )
    assert torch.allclose(found.all(), plain.all(), atol=1e-5)
    assert asked == [16, 8, 4, 4, 4, 4, 4]
    with pytest.raises(PassTooLarge, match="A forward pass of 16 images"):
        feature_extractor(model, Store(tmp_path / "shared"), description.transforms, cpu).extract(images, lambda done: None)
    full_above(model.trunk, 0)
    with pytest.raises(PassTooLarge, match="A forward pass of 1 images"):
        feature_extractor(model, Store(tmp_path / "none"), description.transforms, cpu, smaller_passes=True).extract(
            images, lambda done: None
        )


def test_what_was_kept_before_memory_ran_out_is_not_passed_again(make_images: Callable[..., Path]) -> None:
    pictures = make_images(classes=2, each=20)
    rows = dataset.ingest(pictures, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)
    model, description = build("nets:resnet20", frozen=False)
    asked: list[int] = []

    def full(_: Any, given: Any) -> None:
        asked.append(len(given[0]))
        if len(asked) > 2 and len(given[0]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model.trunk.register_forward_pre_hook(full)
    store = Store(shard_rows=1)  # a step is a shard
    reader = feature_extractor(model, store, description.transforms, torch.device("cpu"), smaller_passes=True)
    (found,) = reader.extract(Images(pictures, rows, description.transforms), lambda done: None)
    assert len(found) == 40
    assert asked == [16, 16, 16, 8, *[4] * 6]  # 24 were missing


def test_a_trained_network_answers_for_fewer_images_at_a_time_where_memory_runs_out(make_images: Callable[..., Path]) -> None:
    """So that a fine-tuning whose batches fitted in parts is not lost in its validation."""
    pictures = make_images(classes=2, each=5)
    rows = dataset.ingest(pictures, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)
    model, description = build("nets:resnet20", frozen=False)
    images, cpu = Images(pictures, rows, description.transforms), torch.device("cpu")
    plain = probabilities(model, images, cpu, lambda done: None)
    asked = full_above(model, 5)
    told: list[int] = []
    assert torch.allclose(probabilities(model, images, cpu, told.append), plain, atol=1e-5)
    assert asked == [16, 8, 4, 4, 4]  # the last one filled up
    assert told == [4, 8, 10]
    full_above(model, 0)
    with pytest.raises(PassTooLarge, match="A forward pass of 1 images"):
        probabilities(model, images, cpu, lambda done: None)


def test_a_frozen_network_never_answers_for_fewer(make_images: Callable[..., Path]) -> None:
    """What is kept of it would depend on how much memory was free."""
    pictures = make_images(classes=2, each=5)
    rows = dataset.ingest(pictures, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)
    model, description = build("nets:resnet20", frozen=True)
    asked = full_above(model, 5)
    with pytest.raises(PassTooLarge, match="A forward pass of 16 images"):
        probabilities(model, Images(pictures, rows, description.transforms), torch.device("cpu"), lambda done: None)
    assert asked == [16]
