"""The package for Python users: what the command line does, as methods that take and give plain typed values."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import tlpipeline as tl
from tests.helpers.images import paint
from tests.helpers.processes import run_python
from tlpipeline.errors import BackboneError, DataError, RegistryError, WorkspaceError
from tlpipeline.versioning import lock
from tlpipeline.workspace import settings

CODE = """
import asyncio, doctest, sys
import tlpipeline.api

async def main():  # a notebook runs its cells in such a loop
    return doctest.testmod(tlpipeline.api, optionflags=doctest.IGNORE_EXCEPTION_DETAIL | doctest.NORMALIZE_WHITESPACE)

result = asyncio.run(main())
sys.exit(0 if result.attempted > 10 and not result.failed else 1)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_of_the_module_runs_as_in_a_notebook(tmp_path: Path) -> None:
    for label in range(3):
        (tmp_path / "pictures" / f"class{label}").mkdir(parents=True)
        for index in range(24):
            paint(label, index).save(tmp_path / "pictures" / f"class{label}" / f"{index:03d}.png")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | {"HOME": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


NETWORK = """
from torch import nn

class Small(nn.Module):
    transforms = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def __init__(self, num_classes=4):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.late(self.early(images)))
"""


@pytest.mark.slow
def test_a_network_whose_file_lies_in_the_workspace_is_trained_evaluated_and_loaded(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    pictures = make_images(3, 24)
    workspace = tl.Workspace.init(tmp_path / "ws", images=pictures)
    (tmp_path / "ws" / "network_beside_the_data.py").write_text(NETWORK)
    settings.change(
        tmp_path / "ws" / "params.yaml",
        {"backbone.name": "network_beside_the_data:Small", "backbone.weights": "none", "choose.case": "small_similar"},
    )
    for stage in ("ingest", "profile", "check", "choose", "train", "evaluate"):
        workspace.stage(stage)
    path = sorted(pictures.rglob("*.png"))[0]
    model = tmp_path / "ws" / "model"
    (prediction,) = tl.load_model(model, workspace=tmp_path / "ws").predict(path)
    assert prediction.label.startswith("class")
    assert str(tmp_path / "ws") not in sys.path
    # Without the workspace it is a folder from elsewhere.
    with pytest.raises(BackboneError, match="--trust network_beside_the_data:Small"):
        tl.load_model(model, workspace=tmp_path)
    trusted = tl.load_model(model, workspace=tmp_path, trust="network_beside_the_data:Small")  # it is imported by now
    assert trusted.predict(path) == [prediction]


def test_paths_are_texts_or_paths_and_begin_with_a_tilde_or_not(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(3, 4)
    monkeypatch.setenv("HOME", str(tmp_path))
    ws = tl.Workspace.init("~/catalogue", images="~/pictures")
    assert ws.root == tmp_path / "catalogue"
    assert ws.name == ws.params.data.name == "catalogue"
    assert tl.Workspace("~/catalogue").root == tl.Workspace(tmp_path / "catalogue").root == ws.root
    with pytest.raises(WorkspaceError, match="found no such folder"):
        tl.Workspace("~/nowhere")


def test_a_stage_runs_by_itself_and_an_unknown_one_is_refused(workspace: Path) -> None:
    ws = tl.Workspace(workspace)
    ws.stage("ingest")
    assert (workspace / "manifest.parquet").exists()
    with pytest.raises(tl.PipelineError, match="did you mean ingest"):
        ws.stage("ingets")
    with pytest.raises(WorkspaceError, match="expected a decision"):
        ws.explain()


def test_the_explanation_is_one_value_that_prints_and_displays(registered: Path) -> None:
    explanation = tl.Workspace(registered).explain()
    case = explanation.decision.case
    assert case in [c.name for c in tl.CASES]
    assert case in str(explanation)
    assert case in explanation.markdown()
    assert explanation._repr_html_().startswith("<pre")
    assert case in explanation._repr_html_()
    assert explanation.to_json()["decision"]["case"] == case
    console = Console(width=100, force_terminal=True, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(explanation)
    assert case in console.export_text()
    assert max(map(len, explanation.text(60).splitlines())) <= 60


def test_versions_are_typed_and_are_promoted_shown_and_rolled_back(registered: Path) -> None:
    ws = tl.Workspace(registered)
    (version,) = ws.registry.versions()
    assert (version.name, version.stages) == ("workspace@v0.1.0", ())
    assert version.low is not None
    assert version.high is not None
    assert version.accuracy is not None
    assert 0 <= version.low <= version.accuracy <= version.high <= 1
    assert "workspace@v0.1.0" in str(ws.registry.versions())
    assert "workspace@v0.1.0" in ws.registry.versions()._repr_html_()
    for text in ("latest", "v0", "workspace@v0.1.0", "workspace@latest"):
        assert ws.registry.show(text).startswith("# workspace@v0.1.0")
    promotion = ws.promote("latest")
    assert (promotion.version, promotion.stage, promotion.tag) == ("workspace@v0.1.0", "prod", "workspace#prod#1")
    assert ws.registry.versions()[0].stages == ("prod",)
    assert ws.registry.show("#prod").startswith("# workspace@v0.1.0")
    with pytest.raises(RegistryError, match="Promote another"):
        ws.rollback()
    with pytest.raises(RegistryError, match="nothing to roll back"):
        ws.rollback(stage="staging")


def test_nothing_registered_is_an_empty_value_that_says_so(workspace: Path) -> None:
    versions = tl.Workspace(workspace).registry.versions()
    assert not versions
    assert str(versions) == "No model is registered yet."


def test_a_model_says_of_a_file_a_pil_image_and_an_array_what_the_command_line_says(registered: Path) -> None:
    path = registered / "images" / "class1" / "003.png"
    done = run_python(registered, "-m", "tlpipeline", "predict", "--json", "model", str(path))
    assert done.returncode == 0, done.stderr
    (expected,) = json.loads(done.stdout)
    model = tl.load_model("workspace@latest", workspace=registered)
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"))
        predictions = model.predict([path, str(path), image, array])
        alone = model.predict(array)
    assert [p.label for p in predictions] == ["class1"] * 4
    assert [p.path for p in predictions] == [str(path), str(path), "", ""]
    for prediction in [*predictions, *alone, *model.predict(path)]:
        assert prediction.probabilities == expected["probabilities"]
        assert prediction.probability == max(prediction.probabilities.values())
    assert tuple(expected["probabilities"]) == model.classes
    (of_folder,), (of_version,) = (
        tl.load_model(registered / "model").predict([path]),
        tl.Workspace(registered).load_model("latest").predict([path]),
    )
    assert of_folder.probabilities == of_version.probabilities
    assert (of_folder.model, of_version.model) == (str(registered / "model"), "workspace@v0.1.0")
    assert model.predict([]) == []


def test_a_gray_image_is_a_color_image_of_gray(registered: Path) -> None:
    model = tl.load_model(registered / "model")
    gray = np.asarray(paint(1, 3).convert("L"))
    pictures = [gray, gray[..., None], np.stack([gray] * 3, axis=2), Image.fromarray(gray)]
    first, *others = [p.probabilities for p in model.predict(pictures)]
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((8, 8, 3)), r"expected an array of uint8 .* found float64 with shape \(8, 8, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"found uint8 with shape \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), "found uint8 with shape"),
        (np.zeros(8, np.uint8), "found uint8 with shape"),
        (7, "expected a path, a PIL image or an array, found int"),
        ("gone.png", "expected an image at gone.png, but: no such file"),
    ],
)
def test_what_is_no_image_is_refused(registered: Path, image: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        tl.load_model(registered / "model").predict([image])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("model", "says"), [("images", "expected a model folder"), ("workspace@v7", "found 'v7'"), ("workspace#prod", "promote")]
)
def test_a_model_that_does_not_exist_is_refused(registered: Path, monkeypatch: pytest.MonkeyPatch, model: str, says: str) -> None:
    monkeypatch.chdir(registered)
    with pytest.raises(RegistryError, match=says):
        tl.load_model(model)


def test_images_are_committed_and_the_result_says_what_was_done(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for path in sorted((workspace / "images" / "class0").iterdir())[:4]:
        path.unlink()
    commit = tl.Workspace(workspace).commit_data("Fewer")
    assert (commit.images, commit.announced) == (68, False)
    first, removed, size, event, *_ = str(commit).splitlines()
    assert (first, event) == (f"data {commit.digest}: 68 files, 4 removed", "no event emitted: PREFECT_API_URL is not set")
    assert removed.startswith("removed   4: class0/")
    assert size == "class     class0: 24 to 20 images"


def test_the_cache_says_what_it_holds_and_is_emptied(registered: Path) -> None:
    cache = tl.Workspace(registered).cache
    held = cache.info()
    assert held.bytes == sum(entry.bytes for entry in held.entries) > 0
    assert "(cache.max_gb)" in str(held)
    assert cache.clear() == held.bytes
    assert cache.info().entries == ()
    shutil.rmtree(registered / ".dvc")
    with pytest.raises(WorkspaceError, match="expected a DVC repository"):
        tl.Workspace(registered)


def test_a_run_is_refused_before_a_server_starts(workspace: Path) -> None:
    with pytest.raises(DataError, match="expected a folder of images"):
        tl.Workspace(workspace).run(images=workspace / "nothing")
    assert not (workspace / ".tlpipeline" / "prefect").exists()
    lock.require_unlocked(workspace)


# --- what to label next ---------------------------------------------------------------------------------------------------------------


def test_images_of_the_data_set_copies_and_other_files_are_not_suggested(registered: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unlabeled"
    (folder / "camera 2").mkdir(parents=True)
    for i in range(5):
        paint(i % 3, 500 + i).save(folder / "camera 2" / f"{i}.png")
    shutil.copy(folder / "camera 2" / "0.png", folder / "copy.png")
    shutil.copy(sorted((registered / "images").rglob("*.png"))[0], folder / "known.png")
    (folder / "notes.txt").write_text("no image")
    suggestions = tl.Workspace(registered).suggest(folder, 4)
    assert (suggestions.images, suggestions.known, suggestions.unreadable, len(suggestions.chosen)) == (6, 1, 1, 4)
    assert len({Path(s.path).read_bytes() for s in suggestions.chosen}) == 4
    assert "known.png" not in str(suggestions)
    suggestions.write_csv(tmp_path / "next.csv")
    with (tmp_path / "next.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["path"], line["label"]) for line in lines] == [(s.path, "") for s in suggestions.chosen]


def test_nothing_to_suggest_is_said(registered: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all in the data set already"):
        tl.Workspace(registered).suggest(registered / "images")
    with pytest.raises(DataError, match="found nothing"):
        tl.Workspace(registered).suggest(tmp_path / "nowhere")
    shutil.rmtree(registered / "model")
    with pytest.raises(WorkspaceError, match="expected a trained model"):
        tl.Workspace(registered).suggest(registered / "images")
