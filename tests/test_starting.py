"""Fine-tuning may start from the model in production: the two starts, which one is kept, and what makes a start unfair."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.images import paint
from tests.helpers.processes import run_python
from tests.helpers.training import Crashing, Interrupted, Recording, decided, same, trained
from tests.helpers.workspaces import dvc_status, set_param
from tests.test_gate import answers
from tlpipeline.api import Workspace
from tlpipeline.backbones.classifier import Description, Start, describe
from tlpipeline.choice import cases
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError
from tlpipeline.evaluation.gate import compare_with_champion, with_forgotten
from tlpipeline.files import write_json
from tlpipeline.params import GateParams, Params, TrainParams
from tlpipeline.progress import Event, silent
from tlpipeline.training.config import TrainingConfig
from tlpipeline.versioning import dvc
from tlpipeline.workspace import layout, release, stages, starting

LARGE = cases.find("large_similar")
Tensors = dict[str, torch.Tensor]


# --- a training run -------------------------------------------------------------------------------------------------------------------


def trunk(weights: Tensors) -> Tensors:
    """Return the tensors of the backbone."""
    return {name: tensor for name, tensor in weights.items() if name.startswith("trunk.")}


@pytest.fixture
def champion(job: Callable[..., TrainingConfig], tmp_path: Path) -> Path:
    """The folder of a model that was fine-tuned for an epoch."""
    trained(job(decided(LARGE), epochs=1), tmp_path / "champion")
    return tmp_path / "champion" / "scratch" / "finished" / "model"


def test_a_warm_run_starts_where_the_champion_ended_and_continues_bit_by_bit(
    job: Callable[..., TrainingConfig], tmp_path: Path, champion: Path
) -> None:
    made = decided(LARGE, refit_head=True)
    warm = job(made, "warm", champion=str(champion), champion_md5="abc", epochs=2)
    recorded = Recording(tmp_path / "kept")
    whole = trained(warm, tmp_path / "whole", recorded)
    assert same(trunk(recorded.phases["head"]), trunk(load_file(champion / "weights.safetensors")))
    assert {state["champion"] for state in recorded.states} == {"abc"}
    with pytest.raises(Interrupted):
        trained(warm, tmp_path / "cut", Crashing(tmp_path / "cut" / "kept", after=2))
    assert same(trained(warm, tmp_path / "cut", Crashing(tmp_path / "cut" / "kept")), whole)
    description = describe(tmp_path / "whole" / "scratch" / "finished" / "model")
    assert not description.frozen, "its backbone is not the source's, and must not be cached as that"


def test_a_checkpoint_of_another_start_is_not_used(job: Callable[..., TrainingConfig], tmp_path: Path, champion: Path) -> None:
    cold = trained(job(decided(LARGE), "cold", epochs=1), tmp_path / "cold")
    with pytest.raises(Interrupted):
        trained(
            job(decided(LARGE), "warm", epochs=1, champion=str(champion), champion_md5="abc"),
            tmp_path / "mixed",
            Crashing(tmp_path / "mixed" / "kept", after=1),
        )
    resumed = trained(job(decided(LARGE), "mixed", epochs=1), tmp_path / "mixed", Crashing(tmp_path / "mixed" / "kept"))
    assert same(resumed, cold)
    assert "of a run that started from other weights" in (tmp_path / "mixed.jsonl").read_text()


def test_weights_of_another_network_are_refused(job: Callable[..., TrainingConfig], tmp_path: Path, champion: Path) -> None:
    tensors = load_file(champion / "weights.safetensors")
    save_file(
        {name: tensor[:1].clone() if name.startswith("trunk.conv1") else tensor for name, tensor in tensors.items()},
        champion / "weights.safetensors",
    )
    with pytest.raises(BackboneError, match=r"expected the weights of demonstration .* Set train\.start to cold"):
        trained(job(decided(LARGE), champion=str(champion), champion_md5="abc"), tmp_path / "refused")


# --- which start ----------------------------------------------------------------------------------------------------------------------


def manifest(val: int = 4) -> Manifest:
    """Images of a class: ten of training, some of validation, four of test; their md5s are train0, val0, test0 and so on."""
    sides = [("train", i) for i in range(10)] + [("val", i) for i in range(val)] + [("test", i) for i in range(4)]
    rows = [
        Row(path=f"a/{side}{i}.png", md5=f"{side}{i}", label="a", split=side, width=32, height=32, mode="RGB", duplicate_of="")
        for side, i in sides
    ]
    return Manifest(tuple(rows), (), ())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder whose dvc.yaml names start.json, and whose champion was trained on images that are gone."""
    (tmp_path / "dvc.yaml").write_text("deps:\n  - start.json\n")
    write_json({"name": "shop", "number": [0, 1, 0], "commit": "c", "model": "m.dir", "earlier": ["gone"]}, tmp_path / layout.START)
    return tmp_path


def usable(root: Path, start: str = "both", decision: Any = None, images: Manifest | None = None) -> tuple[bool, str]:
    """Return whether the champion may be a start, and why not."""
    params = Params(train=TrainParams(start=start))  # type: ignore[arg-type]
    found, why = starting.usable(root, params, decision or decided(LARGE), images or manifest())
    return found is not None, why


def test_the_champion_is_a_start_where_everything_is_trained_and_the_setting_allows_it(root: Path) -> None:
    assert usable(root) == usable(root, "warm") == (True, "")
    assert usable(root, "cold") == (False, "")
    assert usable(root, decision=decided(cases.find("small_similar"))) == (False, "")
    assert "asks for another start" in usable(root, decision=replace(decided(LARGE), init="random"))[1]
    assert usable(root, images=manifest(val=0)) == (
        False,
        "train.start: no start from shop@v0.1.0: no validation images can choose between the starts",
    )
    assert usable(root, "warm", images=manifest(val=0))[0]


@pytest.mark.parametrize("side", ["val", "test"])
def test_no_start_was_trained_on_an_image_that_judges_it(root: Path, side: str) -> None:
    content = json.loads((root / layout.START).read_text())
    write_json(content | {"earlier": ["gone", f"{side}0", f"{side}1"]}, root / layout.START)
    assert usable(root) == (
        False,
        "train.start: no start from shop@v0.1.0: it was trained on 2 images that are validation or test images now",
    )


def test_without_a_champion_or_with_the_pipeline_of_an_older_workspace_training_starts_cold(root: Path) -> None:
    (root / "dvc.yaml").write_text("deps:\n  - race\n")
    assert usable(root) == (False, "")
    (root / "dvc.yaml").write_text("deps:\n  - start.json\n")
    write_json(None, root / layout.START)
    assert usable(root) == (False, "")
    assert "no model in production was fine-tuned as this network" in usable(root, "warm")[1]


def finished(folder: Path, accuracy: float, log_loss: float) -> Path:
    """Write what a run leaves behind about its validation."""
    folder.mkdir()
    write_json({"validation": {"accuracy": accuracy, "log_loss": log_loss}}, folder / "history.json")
    return folder


@pytest.mark.parametrize(("cold", "warm", "kept"), [
    ((0.8, 0.5), (0.9, 0.6), "warm"), ((0.9, 0.6), (0.8, 0.5), "cold"), ((0.8, 0.6), (0.8, 0.5), "warm"), ((0.8, 0.5), (0.8, 0.5), "cold"),
])  # fmt: skip
def test_validation_chooses(root: Path, cold: tuple[float, float], warm: tuple[float, float], kept: str) -> None:
    champion = starting.read(root)
    assert champion is not None
    chosen, start = starting.choose({"cold": finished(root / "c", *cold), "warm": finished(root / "w", *warm)}, champion, 40)
    assert chosen == kept
    assert start == Start("shop@v0.1.0", kept == "warm", cold[0], warm[0], 40)
    assert start.text.startswith(f"{kept}: from the ")
    assert f"{cold[0]:.1%} with the source's weights" in start.text
    assert "on 40 validation images" in start.text


def test_a_model_without_a_champion_is_described_as_before() -> None:
    plain = Description("net", "fc2", (), ("a",), Transforms(32, 32, (0.0,) * 3, (1.0,) * 3, "bilinear"))
    assert "start" not in plain.to_json()
    assert replace(plain, start=Start("shop@v0.1.0", True, None, 0.9, 40)).to_json()["start"]["version"] == "shop@v0.1.0"


def test_what_was_forgotten_is_told_class_by_class() -> None:
    # Ten images of each of three classes: of a, three are lost and one is won; of b, one is lost; of c, nothing changes.
    labels = np.repeat([0, 1, 2], 10)
    before, now = np.ones(30, dtype=bool), np.ones(30, dtype=bool)
    before[0], now[[1, 2, 3]], now[10] = False, False, False
    theirs, ours = answers(before, labels), answers(now, labels)
    verdict = compare_with_champion(ours, theirs, "net@v1", frozenset(), GateParams())
    told = with_forgotten(verdict, ours, theirs, frozenset())
    assert [(each.label, each.images, round(each.before, 2), round(each.now, 2)) for each in told.forgotten] == [
        ("a", 10, 0.9, 0.7),
        ("b", 10, 1.0, 0.9),
    ]
    assert told.notes[-1].endswith("the recall of 2 of 3 classes fell: a by 20.0 points (10 images), b by 10.0 points (10 images).")
    known = frozenset(ours.md5[i] for i in (1, 2, 3, 10))  # an image that the champion was trained on says nothing
    assert with_forgotten(verdict, ours, theirs, known).notes[-1].endswith("Against net@v1, the recall of no class fell.")


# --- a workspace ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_workspace_starts_from_its_champion_and_repro_does_the_same(registered: Path) -> None:
    for key, value in {"choose.case": "large_similar", "train.epochs": "2", "train.start": "both"}.items():
        set_param(registered, key, value)
    ran: list[Event] = []

    def run(accept: bool = True) -> release.Summary:
        Workspace(registered).commit_data()
        for name in stages.STAGES:
            if name == "train":
                starting.record(registered)
            stages.bring_up_to_date(registered, name, ran.append)
        verdict = release.evaluate_gate(registered, silent)
        registration = release.register(registered, verdict)
        if accept and verdict is not None and not verdict.accepted:
            release.accept(registered, None, "a test")
        return release.summary(registered, registration, release.write_report(registered, registration))

    assert run().start == "", "the champion was frozen: there is nothing to start from"
    assert json.loads((registered / layout.START).read_text()) is None
    for index in range(300, 312):
        paint(0, index).save(registered / "images" / "class0" / f"{index}.png")
    told = run()
    recorded = starting.read(registered)
    assert recorded is not None
    assert "workspace@" in told.start
    assert "with the source's weights" in told.start
    assert dvc_status(registered) == []
    starting.record(registered)
    assert starting.read(registered) == recorded, "a fresh model stays as it is"

    first = dvc.content_md5(registered / layout.MODEL)
    done = run_python(registered, "-m", "dvc", "repro", "--force", "--single-item", "train")
    assert done.returncode == 0, done.stderr
    assert dvc.content_md5(registered / layout.MODEL) == first

    # Only from the champion's weights, on two Ray workers; what it was trained on and is gone now is remembered.
    gone = sorted((registered / "images" / "class1").glob("*.png"))[:8]
    for path in gone:
        path.unlink()
    for key, value in {"train.start": "warm", "cluster.workers": "2"}.items():
        set_param(registered, key, value)
    told = run()
    assert told.start.startswith("warm: from the weights of workspace@")
    assert "source" not in told.start
    recorded = starting.read(registered)
    assert recorded is not None
    assert 0 < len(recorded.earlier) <= len(gone)
    verdicts = (registered / "verdicts.jsonl").read_text().splitlines()
    assert "Training started from the model in production." in verdicts[-1]
    assert "warm: from the weights" in (registered / "MODEL_CARD.md").read_text() or told.version == ""
