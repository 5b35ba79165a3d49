"""Models as files: the graph prepares images as the library does, and says the same of them as the model."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tlpipeline as tl
from tests.helpers.package_networks import folder_of
from tests.helpers.processes import run_python
from tlpipeline.backbones import catalogue, classifier
from tlpipeline.backbones.classifier import Classifier, Description
from tlpipeline.backbones.features import pooling_at
from tlpipeline.backbones.taps import measure_taps
from tlpipeline.data.decoding import Pixels
from tlpipeline.data.loader import resize_and_crop
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError, DataError
from tlpipeline.export import files
from tlpipeline.export.graph import Preparation
from tlpipeline.export.provenance import Provenance


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Noise is the hardest picture to resize: each rounding shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def differing(array: Pixels, transforms: Transforms) -> int:
    """Return the largest difference between the graph's pixels and the library's, in levels of 255."""
    ours = Preparation(transforms).pixels(torch.from_numpy(array)[None])[0].numpy()
    return int(np.abs(ours - resize_and_crop(Image.fromarray(array), transforms)).max())


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 160), width=st.integers(1, 160), size=st.integers(1, 48), margin=st.integers(0, 9),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)  # fmt: skip
def test_the_graph_prepares_an_image_as_pillow_does_to_the_last_bit(
    height: int, width: int, size: int, margin: int, interpolation: str
) -> None:
    if height > 2 * width:  # Pillow 13 resizes the columns of these first
        height, width = width, height
    transforms = Transforms(size, size + margin, (0.5,) * 3, (0.25,) * 3, interpolation)
    assert differing(noise(height, width, seed=size), transforms) == 0


def test_a_line_of_pixels_and_a_high_image_are_prepared_nearly_alike() -> None:
    transforms = Transforms(16, 18, (0.5,) * 3, (0.25,) * 3, "bilinear")
    assert differing(noise(2, 600), transforms) == 0  # its ends are cut off first
    assert differing(noise(200, 40), transforms) <= 1


def test_a_crop_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(BackboneError, match="expected transforms that resize to at least the crop of 32 pixels, found 16"):
        Preparation(Transforms(32, 16, (0.5,) * 3, (0.25,) * 3, "bilinear"))


# --- files ------------------------------------------------------------------------------------------------------------------------------


def saved(name: str, place: Path, tap: int, frozen: bool, size: int | None = None, root: Path | None = None) -> Path:
    """Save a model with random weights, cut at a tap of a network, and return its folder."""
    torch.manual_seed(0)
    backbone = catalogue.load(name, catalogue.NONE, root=root, size=size)
    transforms = backbone.transforms if size is None else backbone.transforms.at(size)
    reading = pooling_at(measure_taps(backbone, transforms.size)[tap])
    model = Classifier(backbone, [reading], 3, frozen)
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
    folder = place / "model"
    classifier.save(model, Description(name, reading.tap, (reading,), ("a", "b", "ç"), transforms, frozen), folder, backbone.code)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tap", "frozen", "size"),
    [
        ("demonstration", -1, True, None),
        ("demonstration", 1, True, None),
        ("resnet18", -1, False, 64),
        ("resnet18", 3, True, 64),
        ("vit_b_32", 2, False, None),
        ("nets:resnet20", -1, False, None),
        ("timm:test_efficientnet", -1, True, None),
        ("timm:test_vit", 2, True, None),
        ("hf:vit", -1, False, None),
        ("hf:swin", 2, True, None),
    ],
)
def test_files_say_what_the_model_says_of_images_of_any_size_in_batches_of_any_length(
    name: str, tap: int, frozen: bool, size: int | None, tmp_path: Path
) -> None:
    name, pictures = folder_of(name, tmp_path / "configurations"), tmp_path / "pictures"
    pictures.mkdir()
    for index, sides in enumerate([(40, 40), (64, 31), (90, 200), (300, 260)]):
        Image.fromarray(noise(*sides, seed=index)).save(pictures / f"{index}.png")
    model = tl.load_model(saved(name, tmp_path, tap, frozen, size), workspace=tmp_path, trust=name, device="cpu")
    made = model.export(onnx=tmp_path / "model.onnx", torch=tmp_path / "model.pt2", images=pictures)
    assert [(f.compared, f.agreeing) for f in made.files] == [(4, 4), (4, 4)]
    assert all(f.difference <= 1e-4 for f in made.files), str(made)

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", "height", "width", 3])]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["a", "b", "ç"]
    assert facts["architecture"] == name
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for length, sides in ((1, (50, 70)), (3, (33, 47))):
        batch = np.stack([noise(*sides, seed=i) for i in range(length)])
        expected = [[p.probabilities[c] for c in model.classes] for p in model.predict(list(batch))]
        (onnx,) = session.run(["probabilities"], {"images": batch})
        assert onnx == pytest.approx(np.array(expected), abs=1e-4)
        with torch.inference_mode():
            outputs = loaded(torch.from_numpy(batch))
        assert outputs.numpy() == pytest.approx(np.array(expected), abs=1e-4)


@pytest.mark.slow
def test_a_file_has_the_layers_below_the_cut_and_no_others(tmp_path: Path) -> None:
    early = tl.load_model(saved("demonstration", tmp_path / "early", 0, True), workspace=tmp_path)
    late = tl.load_model(saved("demonstration", tmp_path / "late", -1, True), workspace=tmp_path)
    small, large = (m.export(onnx=tmp_path / f"{m.classes[0]}.onnx") for m in (early, late))
    assert small.files[0].megabytes < large.files[0].megabytes / 2
    assert small.saving.megabytes < small.saving.whole_megabytes / 2
    assert small.files[0].kind == "generated images, as no test image is here"


@pytest.mark.slow
def test_an_export_is_compared_on_the_test_images_and_names_the_version(registered: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    for model in ("workspace@v0", registered / "model"):  # the folder is recognized
        done = run_python(tmp_path, "-m", "tlpipeline", "export", str(model), "--onnx", str(target), "-w", str(registered))
        assert done.returncode == 0, done.stderr
        assert "test images: probabilities differ by at most" in done.stdout
        assert "whole source network: " in done.stdout
        facts = onnxruntime.InferenceSession(target).get_modelmeta().custom_metadata_map
        assert facts["model"] == "workspace@v0.1.0"
        assert facts["case"] in [case.name for case in tl.CASES]
        assert len(facts["commit"]) == 40
        assert facts["data"].endswith(".dir")


def test_an_export_without_readable_images_is_refused(registered: Path) -> None:
    with pytest.raises(DataError, match="of which none can be read"):
        tl.load_model(registered / "model", workspace=registered).export(torch="none.pt2", images=registered / "params.yaml")


@pytest.mark.slow
def test_nothing_is_written_where_the_file_computes_something_else(tmp_path: Path) -> None:
    loaded, description = classifier.load(saved("demonstration", tmp_path, -1, True))
    other = files.Sample("images", [noise(40, 40)], np.array([[0.0, 0.0, 0.0]], dtype=np.float32))
    with pytest.raises(BackboneError, match="nothing was written"):
        files.write_torch(loaded, description, Provenance("none"), tmp_path / "model.pt2", other)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
