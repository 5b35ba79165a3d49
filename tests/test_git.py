"""git as it really is: what it refuses, what a commit takes, where tags stand."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.datasets import put
from tlpipeline.errors import PipelineError, Unreachable, WorkspaceError
from tlpipeline.versioning import git


def test_git_outside_a_repository_is_refused_with_what_git_says(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(WorkspaceError, match=r"git log failed in .*not a git repository"):
        git.run(tmp_path, "log")


def test_a_machine_without_git_is_told_to_install_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkspaceError, match=r"expected git on this machine, found none. Install it"):
        git.run(tmp_path, "status")


def test_a_workspace_that_is_not_there_is_not_a_machine_without_git(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"expected a workspace at .*nowhere, found no such folder"):
        git.run(tmp_path / "nowhere", "status")


def test_a_commit_of_nothing_new_is_the_present_one(workspace: Path) -> None:
    before = git.head(workspace)
    assert git.commit(workspace, "again", ["dvc.yaml", "not-there.txt"]) == before


def test_a_commit_takes_the_named_paths_only(workspace: Path) -> None:
    put(workspace, {"card.md": b"a", "other.md": b"b"})
    git.commit(workspace, "a card", ["card.md"])
    assert git.run(workspace, "show", "--name-only", "--format=%s") == "a card\n\ncard.md"
    assert git.read_at(workspace, "HEAD", "card.md") == "a"
    assert git.read_at(workspace, "HEAD", "other.md") is None


def test_tags_are_given_with_the_commit_they_stand_on(workspace: Path) -> None:
    git.run(workspace, "tag", "plain")
    git.run(workspace, "tag", "--annotate", "-m", "why", "annotated")
    assert git.tags(workspace) == dict.fromkeys(["plain", "annotated"], git.head(workspace))
    git.delete_tag(workspace, "plain")
    assert list(git.tags(workspace)) == ["annotated"]


def test_without_a_remote_called_origin_nothing_is_pushed(workspace: Path) -> None:
    assert not git.push(workspace)


@pytest.mark.parametrize("scheme", ["http://me:secret@", "git://"])
@pytest.mark.parametrize("ask", [git.push, git.fetch_tags])
def test_a_silent_remote_is_named_and_nothing_is_left_running(workspace: Path, silent_server: str, scheme: str, ask: Any) -> None:
    git.run(workspace, "remote", "add", "origin", f"{scheme}{silent_server}/x.git")
    with pytest.raises(
        Unreachable, match=rf"git remote origin \({scheme.replace('me:secret@', '')}{silent_server}/x.git\) within 0.5 seconds, found none"
    ) as caught:
        ask(workspace)
    assert "git remote -v" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not [process for process in psutil.Process().children(recursive=True) if "git" in process.name()]


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_wrong_time_to_wait_is_refused(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    git.run(workspace, "remote", "add", "origin", str(tmp_path))
    monkeypatch.setenv("TLPIPELINE_TIMEOUT", text)
    with pytest.raises(PipelineError, match=f"TLPIPELINE_TIMEOUT, found '{text}'. Set it to 30"):
        git.fetch_tags(workspace)
