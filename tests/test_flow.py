"""The flow: its order, its names and artifacts in Prefect, what a second run, a forced case and a failed push do, and the report."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.helpers.workspaces import dvc_status, set_param
from tlpipeline.api import Workspace
from tlpipeline.choice import decide, reasons
from tlpipeline.choice.cases import CASES
from tlpipeline.data.dataset import read_manifest
from tlpipeline.errors import DataError, WorkspaceError
from tlpipeline.progress import Event, silent
from tlpipeline.registry import versions
from tlpipeline.report import page as report
from tlpipeline.workspace import layout, release, stages

pytestmark = pytest.mark.usefixtures("prefect_server")

ORDER = ["version", "ingest", "profile", "check", "choose", "train-small_similar", "evaluate", "gate", "register", "report"]
BARS = ("ingest", "profile", "check", "training", "evaluate")


@dataclass(frozen=True)
class Run:
    """A flow run that ended: its workspace, its id in Prefect, the state's type, and what it returned or raised."""

    workspace: Path
    id: UUID
    state: str
    result: Any


def retrain(workspace: Path, **parameters: Any) -> Run:
    """Run the flow in this process."""
    from tlpipeline.flows.retrain import retrain as flow

    state = flow(workspace=workspace, return_state=True, **parameters)
    return Run(workspace, state.state_details.flow_run_id, state.type.value, state.result(raise_on_failure=False))


def task_runs(run: Run) -> list[Any]:
    """Return the flow run's task runs in the order in which they started."""
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    # Task runs reach the server as events; the last ones may still be on their way.
    with get_client(sync_client=True) as client:
        for _ in range(200):
            found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
            if found and all(r.state is not None and r.state.is_final() and r.start_time for r in found):
                break
    return sorted(found, key=lambda r: r.start_time)


def artifacts(run: Run) -> dict[str, Any]:
    """Return the flow run's artifacts by their keys."""
    from prefect import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])))
    return {a.key: a for a in found}


def git(workspace: Path, *arguments: str) -> str:
    """Return what git says in a workspace."""
    return subprocess.run(["git", *arguments], cwd=workspace, capture_output=True, text=True, check=True).stdout.strip()


def dvc(workspace: Path, *arguments: str) -> str:
    """Return what DVC's command line says in a workspace, as a user would call it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "TLPIPELINE_LOCK"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(["dvc", *arguments], cwd=workspace, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def copy(of: Path, to: Path) -> Path:
    """Return a copy of a workspace."""
    shutil.copytree(of, to, symlinks=True)
    return to


@pytest.fixture(scope="module")
def first(_blank_workspace: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Run:
    """The first run in a workspace; read only."""
    return retrain(copy(_blank_workspace, tmp_path_factory.mktemp("first") / "workspace"))


@pytest.fixture(scope="module")
def second(first: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another run in the same workspace, nothing changed; read only."""
    return retrain(copy(first.workspace, tmp_path_factory.mktemp("second") / "workspace"))


@pytest.fixture(scope="module")
def rejected(first: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a forced case after the first one: right as often as the champion, so undecided, and not to be registered; read only."""
    workspace = copy(first.workspace, tmp_path_factory.mktemp("rejected") / "workspace")
    set_param(workspace, "gate.undecided", "reject")
    set_param(workspace, "choose.case", "large_similar")
    set_param(workspace, "train.epochs", "2")
    return retrain(workspace)


# --- the first run --------------------------------------------------------------------------------------------------------------------


def test_the_tasks_run_in_order_and_training_carries_the_name_of_its_case(first: Run) -> None:
    assert first.state == "COMPLETED"
    runs = task_runs(first)
    assert [r.name for r in runs] == ORDER
    assert {r.state.type.value for r in runs} == {"COMPLETED"}
    # One after the other: none starts before the one before it has ended.
    assert all(a.end_time <= b.start_time for a, b in pairwise(runs))


def test_the_run_is_named_after_its_workspace(first: Run) -> None:
    from prefect import get_client

    with get_client(sync_client=True) as client:
        assert client.read_flow_run(first.id).name == "retrain-workspace"


def test_the_first_model_is_registered_on_the_commit_that_holds_it(first: Run) -> None:
    assert (first.result.version, first.result.new) == ("workspace@v0.1.0", True)
    assert git(first.workspace, "tag") == "workspace@v0.1.0"
    assert git(first.workspace, "rev-parse", "workspace@v0.1.0^{commit}") == git(first.workspace, "rev-parse", "HEAD")
    assert git(first.workspace, "show", "HEAD:dvc.lock") == (first.workspace / "dvc.lock").read_text().strip()
    assert git(first.workspace, "show", "HEAD:MODEL_CARD.md").startswith("# workspace@v0.1.0")
    assert git(first.workspace, "status", "--porcelain") == ""


def test_decision_and_evaluation_are_artifacts_and_the_stages_show_their_progress(first: Run) -> None:
    found = artifacts(first)
    assert {key: a.type for key, a in found.items()} == {
        "decision": "markdown",
        "evaluation": "markdown",
        "verdict": "markdown",
        **dict.fromkeys(BARS, "progress"),
    }
    assert reasons.summary(*release.load_decision(first.workspace)) in found["decision"].data
    accuracy = layout.read_metrics(first.workspace).accuracy
    assert f"accuracy {accuracy:.1%}" in found["evaluation"].data
    alarms, _, judged = found["verdict"].data.partition("\n\n")
    assert alarms.splitlines() == [f"- **warning** {alarm}" for alarm in first.result.alarms]
    assert judged.startswith("**accepted")
    assert all(label in found["evaluation"].data for label in ("class0", "class1", "class2"))
    assert [float(found[key].data) for key in BARS] == [100] * len(BARS)
    images = layout.read_metrics(first.workspace).images
    assert (found["ingest"].description, found["evaluate"].description) == ("72 of 72 files listed", f"{images} of {images} test images")


def test_the_verdict_is_an_event_and_an_artifact_with_its_sentences(first: Run, rejected: Run) -> None:
    from prefect import get_client

    for run, outcome in ((first, "accepted"), (rejected, "undecided")):
        assert f"**{outcome}: " in artifacts(run)["verdict"].data
        assert "test images " in artifacts(run)["verdict"].data
        wanted = {"filter": {"event": {"name": [f"tlpipeline.gate.{outcome}"]}, "resource": {"id": ["tlpipeline.model.workspace"]}}}
        with get_client(sync_client=True) as client:
            for _ in range(200):  # the server stores events a moment after it takes them
                if events := client.request("POST", "/events/filter", json=wanted).json()["events"]:
                    break
        payload = events[0]["payload"]
        assert (payload["outcome"], payload["version"]) == (outcome, run.result.version)
        assert payload["reason"].startswith(outcome)


def test_after_a_flow_dvc_has_nothing_to_do(first: Run, tmp_path: Path) -> None:
    assert dvc(first.workspace, "status") == "Data and pipelines are up to date."
    workspace = copy(first.workspace, tmp_path / "workspace")
    lock = (workspace / "dvc.lock").read_text()
    assert dvc(workspace, "repro").splitlines()[-1] == "Data and pipelines are up to date."
    assert (workspace / "dvc.lock").read_text() == lock


def test_what_was_registered_is_in_the_remote(first: Run, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--branch", "workspace@v0.1.0", str(first.workspace), str(clone)], check=True)
    shutil.copytree(first.workspace / ".dvc-remote", clone / ".dvc-remote")
    dvc(clone, "pull")
    assert (clone / "model" / "weights.safetensors").read_bytes() == (first.workspace / "model" / "weights.safetensors").read_bytes()
    assert not dvc_status(clone)


# --- the second run -------------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(first: Run, second: Run) -> None:
    assert second.state == "COMPLETED"
    assert {name: second.result.seconds[name] for name in stages.STAGES} == dict.fromkeys(stages.STAGES)
    assert (second.result.version, second.result.new) == ("workspace@v0.1.0", False)
    assert "already registered" in second.result.outcome
    assert git(second.workspace, "tag") == "workspace@v0.1.0"
    assert git(second.workspace, "rev-parse", "HEAD") == git(first.workspace, "rev-parse", "HEAD")
    assert [r.name for r in task_runs(second)] == ORDER
    for key in BARS:
        progress = artifacts(second)[key]
        assert (float(progress.data), progress.description) == (100, "up to date")


def test_a_second_run_finds_deleted_outputs_again_without_running(first: Run, tmp_path: Path) -> None:
    workspace = copy(first.workspace, tmp_path / "workspace")
    shutil.rmtree(workspace / "model")
    (workspace / "manifest.parquet").unlink()
    again = retrain(workspace)
    assert {name: again.result.seconds[name] for name in stages.STAGES} == dict.fromkeys(stages.STAGES)
    assert (workspace / "model" / "weights.safetensors").exists()


def rows(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file by their header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_dvc_shows_the_two_gains_and_the_probes_with_the_cut(first: Run, tmp_path: Path) -> None:
    workspace = copy(first.workspace, tmp_path / "workspace")
    set_param(workspace, "choose.slice", "conv2")
    assert stages.bring_up_to_date(workspace, "choose", silent)
    case = layout.read_case(workspace)
    assert (case.case, case.slice) == ("small_different", "conv2")

    (point,) = [r for r in rows(workspace / layout.PLANE) if r["what"] == "data set"]
    assert float(point["tuning"]) == pytest.approx(100 * case.tuning.counted, abs=0.2)
    assert [r["name"] for r in rows(workspace / layout.PLANE) if r["what"] == "chosen case"] == ["small_different"]
    uses = {r["layer"]: r["use"] for r in rows(workspace / layout.PROBE)}
    assert uses == {"01 conv1": "read", "02 conv2": "read", "03 conv3": "cut off", "04 fc1": "cut off", "05 fc2": "cut off"}

    page = Path(dvc(workspace, "plots", "show", "--out", str(tmp_path / "plots")).splitlines()[-1].removeprefix("file://"))
    shown = page.read_text(encoding="utf-8")
    assert "<DVC_METRIC" not in shown
    for words in ("this data set", "cut off", *uses, *(c.name for c in CASES), "What fine-tuning and cutting are expected to gain"):
        assert words in shown, words
    dvc(workspace, "plots", "show")
    assert git(workspace, "status", "--porcelain", "--untracked-files=all", "--", "dvc_plots", ".dvc") == ""


# --- another case ---------------------------------------------------------------------------------------------------------------------


def test_a_rejection_is_committed_with_its_verdict_but_makes_no_tag(first: Run, rejected: Run) -> None:
    assert rejected.state == "COMPLETED"
    assert [r.name for r in task_runs(rejected)][5] == "train-large_similar"
    assert (rejected.result.case, rejected.result.version, rejected.result.new) == ("large_similar", "", False)
    assert rejected.result.verdict == "undecided"
    assert rejected.result.outcome.startswith("undecided: ")
    assert "not significantly better than workspace@v0.1.0" in rejected.result.outcome
    assert '`tlpipeline registry accept --because "..."`' in rejected.result.outcome, "the way on"
    assert rejected.result.seconds["ingest"] is None
    assert rejected.result.seconds["profile"] is None
    assert rejected.result.seconds["train"] > 0
    assert git(rejected.workspace, "tag") == "workspace@v0.1.0"
    assert git(rejected.workspace, "rev-parse", "HEAD~1") == git(first.workspace, "rev-parse", "HEAD")
    assert git(rejected.workspace, "log", "-1", "--format=%s").startswith("Undecided: large_similar")
    assert {"dvc.lock", "case.json"} <= set(git(rejected.workspace, "diff", "--name-only", "HEAD~1").splitlines())
    assert json.loads(git(rejected.workspace, "show", "HEAD:case.json"))["forced"] == ["choose.case"]
    assert json.loads(git(rejected.workspace, "show", "HEAD:metrics.json")) == json.loads((rejected.workspace / layout.METRICS).read_text())
    assert git(rejected.workspace, "status", "--porcelain") == ""
    assert not dvc_status(rejected.workspace)


def test_an_accepted_challenger_is_the_next_version_and_promotions_go_forth_and_back(rejected: Run, tmp_path: Path) -> None:
    workspace = copy(rejected.workspace, tmp_path / "workspace")
    set_param(workspace, "gate.rule", "not_worse")
    set_param(workspace, "gate.margin", "60")
    accepted = retrain(workspace)
    assert {name: accepted.result.seconds[name] for name in stages.STAGES} == dict.fromkeys(stages.STAGES), "only the gate's rule changed"
    assert (accepted.result.version, accepted.result.new) == ("workspace@v0.2.0", True), "another case is a minor step"

    old, new = versions.versions(workspace, "workspace")
    assert versions.resolve(workspace, "workspace@v0") == versions.resolve(workspace, "workspace@latest") == new
    assert versions.resolve(workspace, "workspace@v0.1") == old
    assert versions.champion(workspace, "workspace") == new, "none is promoted: the newest"

    assert versions.promote(workspace, old) == "workspace#prod#1"
    assert versions.champion(workspace, "workspace").number == old.number
    assert versions.promote(workspace, new) == "workspace#prod#2"
    assert versions.resolve(workspace, "workspace#prod").number == new.number
    assert tuple(map(str, versions.rollback(workspace, "workspace"))) == ("workspace@v0.2.0", "workspace@v0.1.0")
    assert versions.resolve(workspace, "workspace#prod").number == old.number
    assert git(workspace, "tag", "--list", "*#prod#*").splitlines() == [f"workspace#prod#{n}" for n in (1, 2, 3)], "history only grows"

    registry = Workspace(workspace).registry
    assert [(v.name, v.stages, v.case) for v in registry.versions()] == [
        ("workspace@v0.2.0", (), "large_similar"),
        ("workspace@v0.1.0", ("prod",), "small_similar"),
    ]
    assert registry.show("workspace#prod").startswith("# workspace@v0.1.0")
    assert "large_similar" in registry.show("workspace@v0.2")
    taps = [reading.tap for reading in layout.read_model(workspace).readings]
    assert len(taps) > 1, "the head that is solved last reads several"
    assert f"the head reads {', '.join(taps)} |" in registry.show("workspace@v0.2")
    assert (versions.model_folder(workspace, old) / "weights.safetensors").read_bytes() != (
        workspace / "model" / "weights.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_an_accepted_version_goes_to_prod_at_once_where_the_gate_says_so(registered: Path) -> None:
    set_param(registered, "choose.case", "small_different")
    set_param(registered, "gate.rule", "not_worse")
    set_param(registered, "gate.margin", "60")
    set_param(registered, "gate.promote", "auto")
    run = retrain(registered)
    assert run.result.version == "workspace@v0.2.0"
    assert git(registered, "tag", "--points-at", "HEAD").splitlines() == ["workspace#prod#1", "workspace@v0.2.0"]
    case = layout.read_case(registered)
    assert case.case == "small_different"
    assert case.slice != layout.read_profile(registered).taps[-1].name, "the later layers are gone"


# --- a race ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_race_is_seen_while_it_runs_and_in_the_decision(workspace: Path) -> None:
    from tlpipeline.tasks import pipeline

    set_param(workspace, "choose.effort", "full")
    set_param(workspace, "train.epochs", "2")
    told: list[Event] = []
    token = pipeline.listener.set(told.append)
    try:
        run = retrain(workspace)
    finally:
        pipeline.listener.reset(token)
    assert run.state == "COMPLETED"
    texts = [event.text for event in told if event.stage == "choose"]
    assert texts[0].startswith("race: ")
    assert any("look" in text for text in texts)

    case = layout.read_case(workspace)
    assert case.race is not None
    assert 1 <= len(json.loads((workspace / layout.CASE).read_text())["race"]["looks"]) <= 3
    found = artifacts(run)
    assert (found["race"].type, float(found["race"].data)) == ("progress", 100)
    assert found["race"].description == f"{case.case}: {reasons.summary(*release.load_decision(workspace))}"
    words = found["decision"].data
    assert f"{'Fine-tuning' if case.race.winner == 'tuned' else 'The frozen head'} won: {reasons.ENDED[case.race.ended]}." in words
    for look in case.race.looks:
        assert f"| {look.epoch} of {look.epochs} | {look.frozen:.1%} | {look.tuned:.1%} |" in words


def test_whoever_starts_from_other_weights_is_told_why_there_is_no_race(first: Run, tmp_path: Path) -> None:
    workspace = copy(first.workspace, tmp_path / "workspace")
    set_param(workspace, "choose.effort", "full")
    set_param(workspace, "train.override", "{init: plain}")
    profile = layout.read_profile(workspace)
    assert decide.choose(profile, layout.params_of(workspace).choose).race_wanted
    assert stages.bring_up_to_date(workspace, "choose", silent)
    case = layout.read_case(workspace)
    assert (case.race, case.race_wanted) == (None, False)
    assert "No. train.override.init starts from weights that the prediction does not know." in release.decision_markdown(workspace)


# --- what goes wrong ------------------------------------------------------------------------------------------------------------------


def unreachable(workspace: Path) -> None:
    """Put a file where the remote's folder was: nobody can write there, not even root."""
    shutil.rmtree(workspace / ".dvc-remote")
    (workspace / ".dvc-remote").write_text("no folder")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tasks retry at once."""
    from tlpipeline.tasks import pipeline

    for name in ("version", "register"):
        monkeypatch.setattr(pipeline, name, getattr(pipeline, name).with_options(retry_delay_seconds=0))


@pytest.mark.slow
def test_data_that_cannot_be_pushed_stop_the_run_after_some_tries(workspace: Path, impatient: None) -> None:
    unreachable(workspace)
    run = retrain(workspace)
    assert run.state == "FAILED"
    assert isinstance(run.result, WorkspaceError)
    assert "Cannot push to the DVC remote" in str(run.result)
    (only,) = task_runs(run)
    assert (only.name, only.run_count) == ("version", 3)
    assert git(workspace, "tag") == ""
    # When the remote is back, the next run simply goes on.
    (workspace / ".dvc-remote").unlink()
    assert retrain(workspace).result.version == "workspace@v0.1.0"


@pytest.mark.parametrize(("override", "metric"), [
    ("{}", "accuracy"), ("{imbalance: 1.0}", "balanced_accuracy"), ("{imbalance: 1.0, balance: none}", "accuracy"),
])  # fmt: skip
def test_classes_count_alike_at_the_gate_where_training_weighs_them_alike(override: str, metric: str, registered: Path) -> None:
    trained = Counter(row.label for row in read_manifest(registered / layout.MANIFEST).used("train"))
    assert min(trained.values()) < max(trained.values()) < 10 * min(trained.values())
    git(registered, "tag", "--delete", "workspace@v0.1.0")
    set_param(registered, "train.override", override)
    verdict = release.evaluate_gate(registered, silent)
    assert verdict is not None
    assert verdict.metric == metric


@pytest.mark.slow
def test_a_model_that_cannot_be_pushed_is_not_registered(workspace: Path) -> None:
    for name in stages.STAGES:
        stages.bring_up_to_date(workspace, name, silent)
    verdict = release.evaluate_gate(workspace, silent)
    assert verdict is not None
    assert verdict.accepted
    before = git(workspace, "rev-parse", "HEAD")
    unreachable(workspace)
    with pytest.raises(WorkspaceError, match="Cannot push to the DVC remote"):
        release.register(workspace, verdict)
    assert git(workspace, "tag") == ""
    assert git(workspace, "rev-parse", "HEAD") == before


def test_what_a_second_try_cannot_mend_is_not_tried_again(workspace: Path, tmp_path: Path, impatient: None) -> None:
    broken = tmp_path / "images" / "class0" / "no image.png"
    broken.parent.mkdir(parents=True)
    broken.write_text("nothing that could be trained on")
    run = retrain(workspace, images=tmp_path / "images")
    assert run.state == "FAILED"
    assert isinstance(run.result, DataError)
    (only,) = task_runs(run)
    assert (only.name, only.run_count) == ("version", 1)


@pytest.mark.slow
def test_images_that_are_given_are_checked_before_the_run_and_the_workspace_s_own_need_not_be_there(
    workspace: Path, tmp_path: Path, impatient: None
) -> None:
    shutil.rmtree(workspace / "images")
    run = retrain(workspace, images=tmp_path / "nothing")
    assert run.state == "FAILED"
    assert re.search(r"expected a folder of images at .*nothing, found nothing", str(run.result))
    assert not list(task_runs(run))


@pytest.fixture
def other(workspace: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work in the workspace until its input ends."""
    code = (
        "import sys; from pathlib import Path; from tlpipeline.versioning.lock import hold\n"
        "with hold(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(workspace)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "mine\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_two_runs_never_overlap(workspace: Path, other: subprocess.Popen[str]) -> None:
    run = retrain(workspace)
    assert run.state == "FAILED"
    assert isinstance(run.result, WorkspaceError)
    assert f"process {other.pid}" in str(run.result)
    assert git(workspace, "log", "--format=%s").splitlines() == ["First images", "New workspace"]
    assert not (workspace / "dvc.lock").exists()


# --- the report -----------------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data", "poster")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_is_one_file_with_nothing_outside_it(first: Run, rejected: Run) -> None:
    for run in (first, rejected):
        path = Path(run.result.report)
        assert path == run.workspace / "report.html"
        page = _Page(path)
        assert all(reference.startswith(("data:", "#")) for reference in page.references), page.references
        assert not page.tags & {"link", "script", "iframe", "object", "embed"}
        assert not re.search(r"url\(\s*[\"']?(?!data:|#)|@import", path.read_text(encoding="utf-8"))


def test_the_report_holds_verdict_case_reason_matrix_classes_and_seconds(first: Run, rejected: Run) -> None:
    for run in (first, rejected):
        page = _Page(Path(run.result.report))
        case = layout.read_case(run.workspace)
        for part in (case.case, reasons.summary(*release.load_decision(run.workspace)), run.result.outcome, "Confusion matrix", "Seconds"):
            assert " ".join(unescape(part).replace("`", "").split()) in page.text.replace(" .", "."), part
        assert all(label in page.text for label in ("class0", "class1", "class2"))
        rows = re.search(r"Seconds</h2>(.*?)</details>", Path(run.result.report).read_text(encoding="utf-8"), re.DOTALL)
        assert rows
        assert re.findall(r"<tr><td>(\w+)</td>", rows[1])[: len(stages.STAGES)] == list(stages.STAGES)
    assert "workspace@v0.1.0" in _Page(Path(first.result.report)).text
    assert "up to date" in _Page(Path(rejected.result.report)).text


def test_the_report_says_how_fast_training_was_and_how_long_it_waited_for_data(first: Run, rejected: Run) -> None:
    for run in (first, rejected):
        measured = layout.read_run(run.workspace).training
        assert report.pace(measured) in _Page(Path(run.result.report)).text
    assert re.fullmatch(
        r"Training took [1-9]\d* images a second; its first worker waited for data \d+% of the time\.", report.pace(measured)
    )


def test_the_confusion_matrix_of_the_report_counts_every_test_image_once(first: Run) -> None:
    table = re.search(r'<table class="matrix">(.*?)</table>', Path(first.result.report).read_text(encoding="utf-8"), re.DOTALL)
    assert table
    cells = re.findall(r"<td[^>]*>(\d*)</td>", table[1])
    assert len(cells) == 9
    metrics = layout.read_metrics(first.workspace)
    assert sum(int(cell or 0) for cell in cells) == metrics.images
    assert sum(int(cell or 0) for cell in cells[::4]) == round(metrics.accuracy * metrics.images)
