"""Alarms belong to the verdict: they stand at the top of what a run says, end it, or keep a model from being promoted."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.helpers.images import paint
from tests.helpers.workspaces import set_param
from tlpipeline.alarms import Alarm, by_severity
from tlpipeline.api import Workspace
from tlpipeline.checking import quality
from tlpipeline.errors import DataError, RegistryError
from tlpipeline.progress import silent
from tlpipeline.registry import versions
from tlpipeline.versioning import git
from tlpipeline.workspace import alarming, create, layout, release, stages

SIDES = {"train": 16, "val": 6, "test": 10}
CLASSES = ("class0", "class1", "<b>x & y")  # one of them would be markup


@pytest.fixture(scope="module")
def _shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shifted")
    for side, each in SIDES.items():
        for label in range(3):
            place = folder / "pictures" / side / CLASSES[label]
            place.mkdir(parents=True)
            for index in range(each):
                wrong = side == "test" and index % 5 == 0  # two of ten test images show another class
                paint((label + wrong) % 3, 1000 * len(side) + index).save(place / f"{index:03d}.png")
    workspace = folder / "workspace"
    create.init(workspace, folder / "pictures", "demonstration", "DEFAULT", None)
    set_param(workspace, "cluster.gpu", "false")
    set_param(workspace, "gate.promote", "auto")
    for name in stages.STAGES:
        stages.bring_up_to_date(workspace, name, silent)
    return workspace


@pytest.fixture
def shifted(_shifted: Path, tmp_path: Path) -> Path:
    """A trained model that is right about every validation image, and wrong about a fifth of the test images; not registered yet."""
    shutil.copytree(_shifted, tmp_path / "workspace", symlinks=True)
    return tmp_path / "workspace"


def register(workspace: Path) -> versions.Registration:
    """Let the gate judge and register the model."""
    return release.register(workspace, release.evaluate_gate(workspace, silent))


def test_a_model_that_is_much_worse_on_test_than_on_validation_is_registered_but_promoted_only_for_a_reason(shifted: Path) -> None:
    registration = register(shifted)
    assert (registration.new, registration.promoted) == (True, "")
    assert "Alarms keep it from being promoted: shift." in registration.reason
    workspace = Workspace(shifted)
    with pytest.raises(
        RegistryError, match=r"(?s)found 1 of workspace@v0\.1\.0: shift: 100\.0% on validation but 80\.0% on test.*--because"
    ):
        workspace.promote("latest")
    with pytest.raises(RegistryError, match="blocking alarms"):
        workspace.promote("latest", because=" ")
    assert workspace.promote("latest", because="the test images are last year's").tag == "workspace#prod#1"
    message = git.run(shifted, "tag", "--list", "--format=%(contents:subject)", "workspace#prod#1")
    assert message == "workspace@v0.1.0 to prod, because: the test images are last year's"


def test_a_clone_knows_what_blocks_a_version_whatever_its_own_settings_say(shifted: Path, tmp_path: Path) -> None:
    register(shifted)
    git.run(tmp_path, "clone", "--quiet", str(shifted), str(tmp_path / "clone"))
    set_param(tmp_path / "clone", "gate.on_alarm", "warn")
    with pytest.raises(RegistryError, match="shift: "):
        Workspace(tmp_path / "clone").promote("latest", stage="live", new_stage=True)


def test_where_alarms_only_warn_the_version_is_promoted_at_once(shifted: Path) -> None:
    set_param(shifted, "gate.on_alarm", "warn")
    registration = register(shifted)
    assert registration.promoted == "workspace#prod#1"
    told = release.summary(shifted, registration, shifted / release.REPORT)
    assert "shift" in [alarm.kind for alarm in told.alarms]
    assert not told.blocked


def test_alarms_stand_at_the_top_of_summary_report_and_card(shifted: Path) -> None:
    verdict = release.evaluate_gate(shifted, silent)
    registration = release.register(shifted, verdict)
    told = release.summary(shifted, registration, release.write_report(shifted, registration))
    text = "80.0% on test: the test images differ from the training images in kind"
    assert str(told).splitlines()[0].startswith("blocks    shift: 100.0% on validation but 80.0% on test")
    first, *_ = told.to_json()["alarms"]
    assert (first["kind"], first["severity"]) == ("shift", "block")
    page = (shifted / release.REPORT).read_text(encoding="utf-8")
    assert page.index(text) < page.index("Registered as workspace@v0.1.0, not promoted") < page.index("<svg")
    card = (shifted / versions.CARD).read_text(encoding="utf-8")
    assert card.index("Blocks promotion: shift") < card.index("| case |")
    assert release.verdict_markdown(shifted, verdict).startswith("- **blocks** shift: 100.0%")


def test_what_ingest_remarks_is_an_alarm_of_the_run(workspace: Path) -> None:
    for side, first in (("train", 0), ("val", 100), ("test", 3)):  # an image of train is also in test
        for label in range(3):
            folder = workspace / "images" / side / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(4):
                paint(label, first + index).save(folder / f"{index}.png")
    for label in range(3):
        shutil.rmtree(workspace / "images" / f"class{label}")
    create.commit_data(workspace)
    stages.bring_up_to_date(workspace, "ingest", silent)
    assert ("copies", "warn") in [(alarm.kind, alarm.severity) for alarm in alarming.of_data(workspace)]


def test_names_are_text_in_the_report_and_not_markup(shifted: Path) -> None:
    page = release.write_report(shifted, register(shifted)).read_text(encoding="utf-8")
    assert "&lt;b&gt;x &amp; y" in page
    assert "<b>x" not in page


def test_frozen_layers_with_random_weights_block_a_promotion(shifted: Path) -> None:
    assert layout.read_case(shifted).plan.freeze
    assert "random weights" not in [alarm.kind for alarm in alarming.of_run(shifted)]
    set_param(shifted, "backbone.weights", "none")
    (alarm,) = (alarm for alarm in alarming.of_run(shifted) if alarm.kind == "random weights")
    assert (alarm.severity, alarm.text.partition(" ")[0]) == ("block", "demonstration")


def test_the_decision_s_own_warnings_are_alarms_of_the_run(shifted: Path) -> None:
    case = json.loads((shifted / layout.CASE).read_text())
    (shifted / layout.CASE).write_text(json.dumps(case | {"weak": ["no_signal", "few_per_class"]}))
    alarms = [(alarm.kind, alarm.severity) for alarm in alarming.of_run(shifted)]
    assert alarms[:2] == [("no signal", "block"), ("shift", "block")]
    texts = [alarm.text for alarm in alarming.of_run(shifted) if alarm.kind == "decision"]
    assert texts[0].startswith("The profile is weak")
    assert any(text.startswith("Out of range: classes 3") for text in texts), "this decision is outside of what the prediction knows"


def test_an_alarm_that_stops_ends_the_run_before_anything_is_trained(workspace: Path) -> None:
    for name in ("ingest", "profile", "check"):
        stages.bring_up_to_date(workspace, name, silent)
    alarm = Alarm("shortcut", "stop", "the width of an image tells its class (99 % against 33 % by chance)")
    (workspace / layout.ALARMS).write_text(json.dumps([asdict(alarm)]))
    for start in (stages.bring_up_to_date, stages.run):
        with pytest.raises(DataError, match=r"found 1 alarm that stops the run: shortcut: the width .* and run again"):
            start(workspace, "choose", silent)
    assert not (workspace / layout.CASE).exists()
    (workspace / layout.ALARMS).write_text("[]")
    stages.run(workspace, "choose", silent)


def test_the_gravest_alarm_is_first_and_equals_keep_their_order() -> None:
    warned, blocks, stops, again = Alarm("a", "warn", ""), Alarm("b", "block", ""), Alarm("c", "stop", ""), Alarm("d", "warn", "")
    assert by_severity([warned, blocks, stops, again]) == (stops, blocks, warned, again)


def test_settings_say_of_any_kind_that_it_only_warns(shifted: Path) -> None:
    set_param(shifted, "check.warn", "[shift]")
    registration = register(shifted)
    assert registration.promoted
    assert [alarm.severity for alarm in alarming.of_run(shifted) if alarm.kind == "shift"] == ["warn"]


def test_a_missing_signal_is_said_once(shifted: Path) -> None:
    said = Alarm("no signal", "block", "the labels cannot be told from the pictures")
    (shifted / layout.ALARMS).write_text(json.dumps([asdict(said)]))
    assert [alarm for alarm in alarming.of_run(shifted) if alarm.kind == "no signal"] == [said]


def test_the_report_shows_the_worst_findings_of_each_kind(shifted: Path) -> None:
    paths = sorted(path.relative_to(shifted / "images").as_posix() for path in (shifted / "images").rglob("*.png"))
    findings = [quality.Finding(path, "blurred", f"sharpness <{i}>") for i, path in enumerate(paths[:9])]
    quality.write_quality(quality.Quality((*findings, quality.Finding(paths[20], "dark", "brightness 2%")), ()), *(shifted / name for name in (layout.QUALITY, layout.ALARMS)))  # fmt: skip
    page = release.write_report(shifted, register(shifted)).read_text(encoding="utf-8")
    section = page.partition("Findings in the data")[2].partition("</section>")[0]
    assert "blurred: 9" in section
    assert "dark: 1" in section
    assert section.count('<img src="data:image/jpeg') == 7
    assert "sharpness &lt;5&gt;" in section
    assert "sharpness &lt;6&gt;" not in section
