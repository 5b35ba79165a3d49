"""What the gate's verdicts lead to: versions that are undecided, models that a person accepts, the ledger of verdicts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.processes import run_python
from tests.helpers.workspaces import set_param
from tlpipeline.api import Workspace
from tlpipeline.choice import explain
from tlpipeline.choice.forecast import Forecast, calibration
from tlpipeline.data.dataset import read_manifest
from tlpipeline.data.splits import TEST, TRAIN
from tlpipeline.errors import RegistryError
from tlpipeline.progress import silent
from tlpipeline.registry import ledger, versions
from tlpipeline.versioning import dvc, git
from tlpipeline.workspace import layout, release


def retrained(root: Path) -> Path:
    """Have the workspace hold a model with another hash and the same answers, as a run with another seed would leave it."""
    description = root / "model" / "model.json"
    set_param(root, "train.seed", str(len(git.run(root, "tag").split()) + 1))
    before = description.read_text()
    dvc.run_stage(root, "train", lambda: description.write_text(before.replace("{", "{ ", 1)))
    return root


def judged(root: Path) -> versions.Registration:
    return release.register(root, release.evaluate_gate(root, silent))


def test_an_undecided_model_is_registered_and_neither_promoted_nor_champion_nor_latest(registered: Path) -> None:
    set_param(registered, "gate.promote", "auto")
    done = judged(retrained(registered))
    assert done.verdict is not None
    assert (done.verdict.outcome, done.version, done.new, done.promoted) == ("undecided", "workspace@v0.1.1", True, "")
    assert "`tlpipeline registry promote workspace@v0.1.1`" in done.reason
    assert "accept workspace@v0.1.1 --because" in done.reason
    assert "(undecided)" in git.run(registered, "tag", "--list", "--format=%(contents:subject)", "workspace@v0.1.1")
    assert "undecided: " in Workspace(registered).registry.show("workspace@v0.1.1")
    assert str(versions.champion(registered, "workspace")) == "workspace@v0.1.0"
    assert str(versions.resolve(registered, "workspace@latest")) == "workspace@v0.1.0"
    assert str(versions.resolve(registered, "workspace@v0.1")) == "workspace@v0.1.0"
    assert [(v.name, v.verdict) for v in Workspace(registered).registry.versions()] == [
        ("workspace@v0.1.1", "undecided"),
        ("workspace@v0.1.0", "accepted"),
    ]
    again = judged(registered)
    assert (again.version, again.new, again.verdict) == ("workspace@v0.1.1", False, None)
    assert "The gate left it undecided" in again.reason


def test_an_undecided_version_that_a_person_accepts_is_champion_and_latest(registered: Path) -> None:
    judged(retrained(registered))
    with pytest.raises(RegistryError, match="expected a reason, found none"):
        Workspace(registered).registry.accept("latest", because=" \n")
    accepted = Workspace(registered).accept("latest", because="checked by\nhand")
    assert (accepted.version, accepted.new, accepted.promoted, accepted.because) == ("workspace@v0.1.1", False, "", "checked by hand")
    assert git.run(registered, "log", "-1", "--format=%s") == "Accept workspace@v0.1.1: checked by hand"
    assert git.run(registered, "status", "--porcelain") == ""
    assert str(versions.champion(registered, "workspace")) == "workspace@v0.1.1"
    assert str(versions.resolve(registered, "workspace@latest")) == "workspace@v0.1.1"
    assert Workspace(registered).registry.versions()[0].verdict == "accepted by hand"
    with pytest.raises(RegistryError, match=r"expected an undecided version, found workspace@v0\.1\.1, which is accepted"):
        Workspace(registered).accept("v0.1.1", because="twice")


@pytest.mark.slow
def test_a_model_that_was_not_registered_is_registered_by_a_person(registered: Path) -> None:
    set_param(registered, "gate.undecided", "reject")
    set_param(registered, "gate.promote", "auto")
    done = judged(retrained(registered))
    assert (done.version, done.new) == ("", False)
    assert 'tlpipeline registry accept --because "..."' in done.reason
    said = run_python(registered, "-m", "tlpipeline", "registry", "accept", "--because", "the old one is gone")
    assert said.returncode == 0, said.stderr
    assert said.stdout == "workspace@v0.1.1 is registered and accepted: the old one is gone (workspace#prod#1)\n"
    assert "accepted by hand: the old one is gone" in git.run(
        registered, "tag", "--list", "--format=%(contents:subject)", "workspace@v0.1.1"
    )
    assert "Accepted by hand: the old one is gone" in Workspace(registered).registry.show("#prod")
    assert str(versions.champion(registered, "workspace")) == "workspace@v0.1.1"


def test_only_what_was_judged_can_be_accepted(registered: Path) -> None:
    with pytest.raises(RegistryError, match=r"expected a model in .* that the gate has judged, found none. `tlpipeline run`"):
        Workspace(retrained(registered)).accept(because="why not")


def test_the_gate_leaves_out_what_the_champion_was_trained_on(registered: Path) -> None:
    """Images of the training split that come to be test images are no test for the champion, but they are for the next model."""
    manifest = read_manifest(registered / layout.MANIFEST)
    test = {row.md5 for row in manifest.used(TEST)}
    from tlpipeline.data import dataset

    moved = {row.md5 for row in manifest.used(TRAIN)[:5]}
    rows = tuple(replace(row, split=TEST) if row.md5 in moved else row for row in manifest.rows)
    dataset.write_manifest(replace(manifest, rows=rows), registered / layout.MANIFEST, registered / layout.QUARANTINE)
    from tlpipeline.workspace import stages

    stages.evaluate(retrained(registered), silent)
    verdict = release.evaluate_gate(registered, silent)
    assert verdict is not None
    assert (verdict.champion, verdict.left_out, verdict.images) == ("workspace@v0.1.0", 5, len(test))


@pytest.mark.slow
def test_three_versions_are_rolled_back_one_after_the_other(registered: Path) -> None:
    for number in (1, 2):
        judged(retrained(registered))
        Workspace(registered).accept(f"v0.1.{number}", because="a test")
    for number in (0, 1, 2):
        Workspace(registered).promote(f"v0.1.{number}")
    assert str(Workspace(registered).rollback()).startswith("workspace@v0.1.1 is in prod again, instead of workspace@v0.1.2")
    assert str(Workspace(registered).rollback()).startswith("workspace@v0.1.0 is in prod again, instead of workspace@v0.1.1")
    with pytest.raises(RegistryError, match=r"expected an earlier version in prod before workspace@v0\.1\.0"):
        Workspace(registered).rollback()


# --- the ledger ------------------------------------------------------------------------------------------------------------------------


def test_the_ledger_has_a_line_for_each_model_and_is_committed(registered: Path) -> None:
    judged(retrained(registered))
    lines = [json.loads(line) for line in (registered / "verdicts.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == ["workspace@v0.1.0", "workspace@v0.1.1"]
    assert [line["verdict"]["outcome"] for line in lines] == ["accepted", "undecided"]
    assert git.read_at(registered, "workspace@v0.1.1", "verdicts.jsonl") == (registered / "verdicts.jsonl").read_text().strip()
    assert lines[1]["verdict"]["judged"] == 1, "the first model was judged by the same images"


def test_a_damaged_ledger_is_refused_with_the_way_out(registered: Path) -> None:
    with (registered / "verdicts.jsonl").open("a") as file:
        file.write('{"model": 1}\n')
    with pytest.raises(RegistryError, match=r"line 2 of .*verdicts.jsonl .*git checkout verdicts.jsonl"):
        versions.champion(registered, "workspace")


def test_a_version_without_a_verdict_was_accepted_by_an_earlier_version(registered: Path) -> None:
    (registered / "verdicts.jsonl").unlink()
    git.run(registered, "commit", "--quiet", "--all", "--amend", "-m", "as it was")
    git.run(registered, "tag", "--force", "--annotate", "-m", "as it was", "workspace@v0.1.0", "HEAD")
    assert str(versions.champion(registered, "workspace")) == "workspace@v0.1.0"


def test_images_that_came_since_have_not_judged(registered: Path) -> None:
    (entry,) = ledger.read(registered)
    old, new = ([f"{i:024x}{i * 2654435761 % 2**32:08x}" for i in images] for images in (range(400), range(400, 1200)))
    entries = [replace(entry, test=ledger.sketch(old))] * 52
    assert ledger.times_judged(entries, old) == 52
    assert ledger.times_judged(entries, new) == 0
    assert ledger.times_judged(entries, old + new) == pytest.approx(52 / 3, abs=8)
    assert ledger.times_judged([], old) == 0


@pytest.mark.slow
def test_a_model_that_is_accepted_after_newer_data_were_committed_is_registered_with_its_own(registered: Path) -> None:
    set_param(registered, "gate.undecided", "reject")
    assert not judged(retrained(registered)).new
    ended = git.head(registered)
    (registered / "images" / "class1" / "000.png").unlink()
    Workspace(registered).commit_data("Newer")
    done = Workspace(registered).accept(because="checked by hand")
    assert (done.version, done.new) == ("workspace@v0.1.1", True)
    version = versions.resolve(registered, "workspace@v0.1.1")
    assert git.run(registered, "rev-parse", f"{version.commit}^") == ended
    assert dvc.stage_input(registered, "ingest", "images", version.commit) in str(git.read_at(registered, version.commit, "images.dvc"))
    assert dvc.data_hash(registered, "images") not in str(git.read_at(registered, version.commit, "images.dvc"))
    assert dvc.data_hash(registered, "images") in str(git.read_at(registered, "HEAD", "images.dvc"))
    assert git.run(registered, "status", "--porcelain") == ""


# --- what was expected -----------------------------------------------------------------------------------------------------------------


def test_each_run_says_whether_the_expected_accuracy_was_measured(registered: Path) -> None:
    metrics = layout.read_metrics(registered)
    (first,) = [entry.forecast for entry in ledger.read(registered)]
    assert first is not None
    assert (first.measured, first.measured_low) == (metrics.accuracy, metrics.accuracy_low)
    decision, profile = release.load_decision(registered)
    assert first.expected == next(arm.accuracy for arm in decision.arms if arm.name == explain.chosen(decision, profile))
    registration = judged(retrained(registered))
    summary = release.summary(registered, registration, release.write_report(registered, registration))
    assert summary.forecast[0] == str(first)
    assert summary.forecast[1].startswith("over 2 models, measured minus expected is ")
    assert str(summary.forecast[0]) in str(summary).replace("\n", " ")


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ((0.90, 0.85, 0.94), "91.0% (88.0 to 93.0) was expected, and 90.0% was measured"),
        ((0.60, 0.50, 0.70), "but 60.0% was measured: less than both intervals explain"),
        ((0.99, 0.97, 1.00), "but 99.0% was measured: more than both intervals explain"),
    ],
)
def test_an_expectation_is_met_if_the_intervals_overlap(measured: tuple[float, float, float], words: str) -> None:
    assert words in str(Forecast(0.91, 0.88, 0.93, *measured))


def test_the_expectations_of_several_models_are_summed_up() -> None:
    models = [Forecast(0.90, 0.88, 0.93, share, share - 0.05, share + 0.05) for share in (0.91, 0.93, 0.70)]
    words = "over 3 models, measured minus expected is -5.3 points on average (mean absolute error 8.0); the intervals of 2 overlap"
    assert calibration(models) == words
    assert calibration(models[:1]) == ""
