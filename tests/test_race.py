"""The race: fine-tuning against the best frozen head, ended by the evidence, and what the winner trained is gone on with."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from research import pretrain
from tests.helpers.images import paint
from tests.helpers.scenes import scene
from tlpipeline.backbones import catalogue
from tlpipeline.choice import policy, predictor, race
from tlpipeline.choice.decision import Decision
from tlpipeline.choice.predictor import GainPredictor
from tlpipeline.data import cache, dataset, splits
from tlpipeline.data.dataset import Manifest
from tlpipeline.params import ChooseParams, ClusterParams, ProfileParams, load
from tlpipeline.profiling import measure
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import Event, silent
from tlpipeline.training import checkpoint, ray_train
from tlpipeline.training.config import TrainingConfig

RULE = ChooseParams(
    case="auto", slice="auto", tolerance=0.5, effort="full", race_below=0.75, race_images=20, gain=1.0,
    alpha=0.1, draws=300,
)  # fmt: skip
HERE = ClusterParams(workers=0, gpu=False, max_failures=0, storage="none")
EPOCHS = 4


def sure(shift: float) -> GainPredictor:
    """A prediction that knows beforehand how fine-tuning ends, so that the pictures' own noise decides nothing."""
    return dataclasses.replace(predictor.NEUTRAL, intercept=shift, deviation=0.05, remaining_gain=((0.0, 0.01),) * 3)


OPEN = dataclasses.replace(predictor.NEUTRAL, remaining_gain=((0.0, 0.01),) * 3)


@dataclasses.dataclass
class Setting:
    """Images with a profile, and a maker of jobs."""

    folder: Path
    place: Path
    manifest: Manifest
    profile: Profile

    def job(self, decision: Decision) -> TrainingConfig:
        return TrainingConfig(
            workspace=str(self.place), images=str(self.folder), manifest=str(self.place / "manifest.parquet"), backbone="demonstration",
            weights="DEFAULT", weights_md5="none", plan=decision.plan, seed=0, epochs=EPOCHS, batch_size=16,
            flip=False, precision="float32", history=str(self.place / f"{decision.freeze}.jsonl"),
        )  # fmt: skip

    def run(self, model: GainPredictor, name: str = "a", progress: Any = silent) -> tuple[Decision, Path]:
        kept = self.place / f"kept-{name}"
        kept.mkdir()
        weighed = policy.weigh(self.profile, RULE, model)
        return race.run(self.profile, weighed, self.job, HERE, name, self.place / "runs", kept, progress), kept


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:

    place = tmp_path_factory.mktemp("race")
    folder = place / "pictures"
    for label in range(3):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(110):
            # A fifth is mislabeled, so that no arm can be perfect.
            paint(label if index % 5 else (label + 1) % 3, index + 500 * label).save(folder / f"class{label}" / f"{index:03d}.png")
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    dataset.write_manifest(manifest, place / "manifest.parquet", place / "quarantine.csv")
    look = ProfileParams(images=128, images_max=128, tangent=True, seed=0)
    net = catalogue.load("demonstration", "DEFAULT")
    profile = measure.measure(net, folder, manifest, 32, look, lambda seen: False, silent, torch.device("cpu"))
    return Setting(folder, place, manifest, profile)


def lines_of(setting: Setting, freeze: str) -> list[str]:
    return [json.loads(line)["text"] for line in (setting.place / f"{freeze}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_race_that_is_decided_ends_at_its_first_look(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    decision, kept = setting.run(sure(-4.0), "early")
    assert decision.race is not None
    assert (decision.race.winner, len(decision.race.looks), decision.freeze) == ("frozen", 1, "kept")
    assert decision.race.looks[0].epoch == policy.interim_epochs(EPOCHS)[0]
    assert (kept / "model" / "weights.safetensors").exists()
    assert not decision.race_wanted
    assert decision.tuning.why == "race"


def test_an_undecided_race_runs_the_whole_schedule_and_goes_to_the_cheaper_arm(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both arms learn all that can be learnt from these pictures: nothing can be told apart, so fine-tuning is not worth it."""
    told: list[Event] = []
    decision, _ = setting.run(OPEN, "open", told.append)
    assert decision.race is not None
    assert decision.race.winner == "frozen"
    assert decision.race.looks[-1].epoch <= EPOCHS
    assert {event.stage for event in told} == {"choose"}
    assert any("look" in event.text for event in told)


@pytest.mark.slow
@pytest.mark.parametrize(("minutes", "epochs"), [(1e-9, 0), (1000.0, EPOCHS)])
def test_a_time_budget_ends_a_race_for_the_frozen_head(
    minutes: float, epochs: int, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    spent: list[float] = []
    plain = ray_train.run

    def noted(job: TrainingConfig, *rest: Any) -> Path:
        asked.append(job.budget_minutes)
        folder = plain(job, *rest)
        spent.append(json.loads((folder / checkpoint.STATE).read_text())["seconds"])
        return folder

    monkeypatch.setattr(ray_train, "run", noted)
    bounded = dataclasses.replace(setting)
    monkeypatch.setattr(bounded, "job", lambda decision: dataclasses.replace(setting.job(decision), budget_minutes=minutes))
    decision, kept = bounded.run(OPEN, f"bounded-{epochs}")
    assert decision.race is not None
    assert decision.race.winner == "frozen"
    assert (decision.race.ended == "budget") is (epochs == 0)
    assert bool(decision.race.looks) is (epochs > 0)
    assert (kept / "model" / "weights.safetensors").exists()
    assert asked[1] == pytest.approx(max(minutes - spent[0] / 60, race.NO_TIME), abs=1e-12)  # both arms share it
    assert spent[0] > 0


def test_the_judges_selected_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    decision, _ = setting.run(OPEN, "judges")
    assert decision.race is not None
    judges = [row for row in setting.manifest.used(splits.VAL) if not splits.in_selection_half(row.md5)]
    assert {look.images for look in decision.race.looks} == {len(judges)}
    assert setting.profile.held_out == len(setting.manifest.used(splits.VAL)) - len(judges)


@pytest.mark.slow
def test_what_the_winner_trained_is_gone_on_with_and_ends_as_if_there_had_been_no_race(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decision, kept = setting.run(sure(4.0), "tuned")
    assert decision.race is not None
    assert (decision.race.winner, decision.freeze) == ("tuned", "nothing")
    state = json.loads((kept / checkpoint.STATE).read_text())
    assert state["epoch"] == decision.race.looks[-1].epoch < EPOCHS

    def finish(start: str, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        job = dataclasses.replace(setting.job(decision), start=start, history=str(tmp_path / f"{name}.jsonl"))
        done = ray_train.run(job, HERE, name, tmp_path / "runs", silent)
        return load_file(done / "model" / "weights.safetensors"), json.loads((done / "history.json").read_text())["history"]

    continued, history = finish(str(kept), "continued")
    whole, whole_history = finish("", "whole")
    assert history == whole_history
    assert all(torch.equal(continued[name], whole[name]) for name in whole)
    epochs = [json.loads(line)["text"] for line in (tmp_path / "continued.jsonl").read_text().splitlines()]
    assert not any(
        f"epoch {epoch}/{EPOCHS}, loss" in text and "validation" in text for text in epochs for epoch in range(1, state["epoch"] + 1)
    )


def test_the_frozen_winner_is_not_trained_again(setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decision, kept = setting.run(sure(-4.0), "again")
    job = dataclasses.replace(setting.job(decision), start=str(kept), history=str(tmp_path / "again.jsonl"))
    done = ray_train.run(job, HERE, "again", tmp_path / "runs", silent)
    assert not (tmp_path / "again.jsonl").exists()
    raced, finished = (load_file(f / "model" / "weights.safetensors") for f in (kept, done))
    assert all(torch.equal(raced[name], finished[name]) for name in raced)


@pytest.mark.slow
def test_an_interrupted_race_goes_on_where_it_stood(setting: Setting) -> None:
    class Stop(Exception):
        pass

    told: list[Event] = []
    whole, _ = setting.run(OPEN, "whole", told.append)
    assert any("epoch 1/" in event.text for event in told)

    def interrupted(event: Event) -> None:
        if f"epoch 3/{EPOCHS}" in event.text:
            raise Stop

    with pytest.raises(Stop):
        setting.run(OPEN, "cut", interrupted)
    (setting.place / "kept-cut").rmdir()
    told.clear()
    again, _ = setting.run(OPEN, "cut", told.append)
    assert not any("epoch 1/" in event.text for event in told)
    assert again == whole


def test_the_cost_of_a_race_counts_what_was_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    decision, _ = setting.run(sure(-4.0), "cost")
    assert decision.race is not None
    frozen, tuned = (next(arm.cost for arm in decision.arms if arm.name == name) for name in ("frozen", "tuned"))
    train_images, others = setting.profile.images, 2 * setting.profile.validation
    epoch = decision.race.looks[-1].epoch
    assert decision.race.cost == pytest.approx(
        train_images
        + others
        + (frozen if decision.head == "last" else race.cost_of(decision, train_images, others))
        + epoch * (3 * train_images + others)
    )
    assert tuned > 0
    assert race.cost_of(dataclasses.replace(decision, saved_ops=0.75), 100, 20) == 30  # behind the cut nothing is passed


def glyphs(folder: Path, numbers: range, contrast: tuple[float, float] = (40, 80), classes: int = 8) -> None:
    """Write signs of 4 x 4 cells, of any size and contrast, anywhere on clouds: shapes that no frozen layer knows and many images teach."""
    signs = np.random.default_rng(3).integers(0, 2, (classes, 4, 4))
    for i in numbers:
        rng, label = np.random.default_rng([i, 6]), i % classes
        pixels = scene(i, seed=41) * 0.6 + 50
        sign = np.kron(signs[label], np.ones(2 * (int(rng.integers(2, 5)),)))[..., None] * 2 - 1
        y, x = rng.integers(0, 33 - len(sign), 2)
        pixels[y : y + len(sign), x : x + len(sign)] += sign * rng.choice([-1, 1]) * rng.uniform(*contrast)
        place = folder / f"sign{label}" / f"{i:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place)


def raced(place: Path, folder: Path, network: dict[str, str], effort: str) -> tuple[Profile, policy.DecisionPolicy, Decision, float]:
    """Profile, weigh and race by the shipped model and the shipped settings, but for the effort; go on with the winner to its end.

    What the winner of the race wins in the end on validation against the frozen head comes last.
    """
    shipped = load(Path(__file__).parent.parent / "params.yaml")
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    dataset.write_manifest(manifest, place / "manifest.parquet", place / "quarantine.csv")
    net = catalogue.load(network["backbone"], network["weights"], md5=network.get("weights_md5", "none"))
    look = dataclasses.replace(shipped.profile, images=512, images_max=512)
    profile = measure.measure(net, folder, manifest, 32, look, lambda seen: False, silent, torch.device("cpu"))
    weighed = policy.weigh(profile, dataclasses.replace(shipped.choose, effort=effort))
    assert weighed.no_race == ""
    kept, made = place / "kept", Setting(folder, place, manifest, profile)
    kept.mkdir()

    def job(decision: Decision) -> TrainingConfig:
        return dataclasses.replace(made.job(decision), epochs="auto", batch_size="auto", **network)

    decision = race.run(profile, weighed, job, HERE, "planted", place / "runs", kept, silent)
    whole = ray_train.run(dataclasses.replace(job(decision), start=str(kept)), HERE, "whole", place / "runs", silent)
    lines = json.loads((whole / "history.json").read_text())["history"]
    return profile, weighed, decision, lines[-1]["accuracy"] - lines[0]["accuracy"]


@pytest.mark.slow
def test_many_images_of_what_no_layer_knows_are_raced_and_found_to_be_large_and_different(tmp_path: Path) -> None:
    """Planted is that fine-tuning wins (99 % against 95 %), and that the last tap reads least."""
    glyphs(tmp_path / "pictures", range(5000))
    _, weighed, decision, won = raced(tmp_path, tmp_path / "pictures", {"backbone": "demonstration", "weights": "DEFAULT"}, "auto")
    assert weighed.evidence.similar < 0.05
    assert decision.case == "large_different"
    assert decision.race is not None
    assert won > 0.01


@pytest.mark.slow
def test_many_images_of_the_source_s_own_classes_are_large_and_similar(tmp_path: Path) -> None:
    """Planted by a source of the same signs in high contrast: its last layers read faint ones best, and many images teach it what it lacks."""
    glyphs(tmp_path / "source", range(2200), contrast=(80, 120))
    source = pretrain.pretrain(tmp_path / "source", "nets:resnet20", tmp_path, epochs=5, rate=0.1, seed=0, flip=False, progress=silent)
    glyphs(tmp_path / "pictures", range(2200, 5800), contrast=(25, 45))
    network = {
        "backbone": "nets:resnet20",
        "weights": str(source.weights),
        "weights_md5": hashlib.md5(source.weights.read_bytes()).hexdigest(),
    }
    profile, weighed, decision, won = raced(tmp_path, tmp_path / "pictures", network, "full")
    assert profile.head_similarity is not None
    assert profile.head_similarity > 0.1  # faint signs leave the source's own head in doubt
    assert weighed.evidence.similar > 0.9
    assert weighed.large  # so that without the race, which is there for the truth, the choice would be the same
    assert decision.case == "large_similar"
    assert decision.race is not None
    assert won > 0.01


@pytest.mark.slow
@pytest.mark.ray
def test_two_ray_workers_come_to_the_same_decision(setting: Setting, tmp_path: Path) -> None:
    weighed = policy.weigh(setting.profile, RULE)
    found: list[Decision] = []
    for workers in (0, 2):
        kept = tmp_path / f"kept{workers}"
        kept.mkdir()
        cluster = dataclasses.replace(HERE, workers=workers)
        found.append(race.run(setting.profile, weighed, setting.job, cluster, f"w{workers}", tmp_path / f"runs{workers}", kept, silent))
    ray_train.shutdown()
    one, two = found
    assert (one.case, one.race.winner, len(one.race.looks)) == (two.case, two.race.winner, len(two.race.looks))  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_stage_races_with_the_overridden_recipe_and_training_goes_on_from_it(tmp_path: Path) -> None:
    """Through the stages and DVC's lock: choose writes race/, train starts from it, a second look finds nothing to do."""
    from tests.conftest import paint, set_param
    from tlpipeline.workspace import create, layout, stages

    pictures = tmp_path / "pictures"
    for label in range(3):
        (pictures / f"class{label}").mkdir(parents=True)
        for index in range(80):
            paint(label if index % 5 else (label + 1) % 3, index + 500 * label).save(pictures / f"class{label}" / f"{index:03d}.png")
    root = tmp_path / "workspace"
    create.init(root, pictures, "demonstration", "DEFAULT", None)
    for key, value in {
        "cache.max_gb": "0.00005", "cluster.workers": "0", "choose.effort": "full", "choose.race_images": "5", "train.epochs": "2", "train.override": "{lr_none: 0.0001}",
    }.items():  # fmt: skip
        set_param(root, key, value)
    told: list[Event] = []
    for name in stages.STAGES:
        assert stages.bring_up_to_date(root, name, told.append)
        assert sum(kept.bytes for kept in cache.info(root / layout.CACHE)) <= 50_000, name
    case = layout.read_case(root)
    assert case.race is not None
    assert case.race.winner in ("frozen", "tuned")
    assert (root / layout.RACE / checkpoint.STATE).exists()
    assert any("look" in event.text for event in told if event.stage == "choose")
    state = json.loads((root / layout.RACE / checkpoint.STATE).read_text())
    model = load_file(root / "model" / "weights.safetensors")
    if case.race.winner == "frozen":
        raced = load_file(root / layout.RACE / "model" / "weights.safetensors")
        assert all(torch.equal(model[name], raced[name]) for name in raced)
    else:
        assert state["epoch"] >= 1
    assert not any(stages.bring_up_to_date(root, name, silent) for name in stages.STAGES)
