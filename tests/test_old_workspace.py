"""A workspace of an earlier version keeps working: its settings, its pipeline, and what it decided."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.processes import run_python
from tests.helpers.workspaces import dvc_status, set_param
from tlpipeline.choice.decision import Decision
from tlpipeline.params import RENAMED, RETIRED, load, remarks
from tlpipeline.progress import silent
from tlpipeline.workspace import layout, stages

OLD = Path(__file__).parent / "data" / "old_workspace"


@pytest.fixture
def old(workspace: Path) -> Path:
    """A workspace with the params.yaml, dvc.yaml and prefect.yaml of the version before the defaults were in the code."""
    for name in ("params.yaml", "dvc.yaml", "prefect.yaml"):
        shutil.copy(OLD / name, workspace)
    for key, value in {"cluster.workers": "0", "cluster.gpu": "false", "profile.images": "64", "profile.images_max": "64"}.items():
        set_param(workspace, key, value)
    return workspace


def test_each_setting_of_an_old_file_is_known_renamed_or_retired() -> None:
    params = load(OLD / "params.yaml")
    assert params.data.name == "digits"
    assert params.backbone.precision == "auto"
    lines = " ".join(remarks(OLD / "params.yaml"))
    assert [name for name in (*RETIRED, *RENAMED) if (name in lines) != (not name.startswith("train.override"))] == []


def test_commands_say_in_a_line_what_has_no_effect(old: Path) -> None:
    listed = run_python(old, "-m", "tlpipeline", "registry", "list")
    assert listed.returncode == 0, listed.stderr
    ingested = run_python(old, "-m", "tlpipeline", "stage", "ingest")
    assert ingested.returncode == 0, ingested.stderr
    assert ingested.stderr.count("without effect in this version") == 1


@pytest.mark.slow
def test_an_old_workspace_runs_and_runs_again_where_an_earlier_version_decided(old: Path) -> None:
    for name in stages.STAGES:
        assert stages.bring_up_to_date(old, name, silent), name
    assert dvc_status(old) == []
    explained = run_python(old, "-m", "tlpipeline", "explain", "--json")
    assert json.loads(explained.stdout), explained.stderr
    for name in ("profile.json", "case.json"):
        shutil.copy(OLD / name, old)
    refused = run_python(old, "-m", "tlpipeline", "explain")
    assert "as this version writes it" in refused.stderr
    again = [name for name in stages.STAGES if stages.bring_up_to_date(old, name, silent)]
    assert again == ["profile", "check", "choose"], "its dvc.yaml does not list the stage check, which then runs each time"
    assert isinstance(layout.read_case(old), Decision)
    assert dvc_status(old) == []
