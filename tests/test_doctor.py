"""`tlpipeline doctor`: each check says that all is well, or what to do."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import run_python
from tests.helpers.workspaces import set_param
from tlpipeline.versioning import git
from tlpipeline.workspace import doctor


def found(workspace: Path) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks(workspace)}


def test_a_new_workspace_can_run_and_is_told_what_only_one_disk_has(workspace: Path) -> None:
    checks = found(workspace)
    assert {check.status for check in checks.values()} == {"ok", "warning"}
    assert [name for name, check in checks.items() if check.status == "warning"] == ["git origin", "DVC remote"]
    assert "git remote add origin URL" in checks["git origin"].text
    assert not list((workspace / ".dvc-remote").glob("tlpipeline-check*")), "what was written to the remote is deleted"


def test_remotes_that_take_what_is_pushed_are_fine(workspace: Path, tmp_path: Path) -> None:
    git.run(tmp_path, "init", "--quiet", "--bare", "origin.git")
    git.run(workspace, "remote", "add", "origin", str(tmp_path / "origin.git"))
    subprocess.run(["dvc", "remote", "modify", "storage", "url", str(tmp_path / "store")], cwd=workspace, check=True, capture_output=True)
    checks = found(workspace)
    assert [check.status for check in checks.values()] == ["ok"] * len(checks)
    assert git.run(tmp_path / "origin.git", "branch") == "", "nothing was pushed"


@pytest.mark.parametrize(
    ("check", "words"),
    [("git origin", "git ls-remote|does not appear to be a git repository|failed"), ("DVC remote", "expected to write to the DVC remote")],
)
def test_a_remote_that_refuses_is_a_problem(workspace: Path, tmp_path: Path, check: str, words: str) -> None:
    (tmp_path / "file").write_text("no folder")
    git.run(workspace, "remote", "add", "origin", str(tmp_path / "missing.git"))
    subprocess.run(["dvc", "remote", "modify", "storage", "url", str(tmp_path / "file")], cwd=workspace, check=True, capture_output=True)
    result = found(workspace)[check]
    assert result.status == "problem"
    assert any(word in result.text for word in words.split("|")), result.text


def test_settings_that_cannot_be_met_are_a_problem_and_the_exit_code_says_so(workspace: Path) -> None:
    set_param(workspace, "cluster.workers", "4000")
    checks = found(workspace)
    assert (checks["devices"].status, checks["settings"].status) == ("problem", "ok")
    assert "expected a CPU for each of 4000 workers" in checks["devices"].text
    done = run_python(workspace, "-m", "tlpipeline", "doctor")
    assert done.returncode == 1
    assert "problem  devices" in done.stdout


def test_a_run_that_fails_for_sure_is_not_deployed(workspace: Path) -> None:
    set_param(workspace, "cluster.workers", "4000")
    done = run_python(workspace, "-m", "tlpipeline", "deploy")
    assert done.returncode == 2
    assert "expected a workspace that can run, found: devices: expected a CPU" in done.stderr
