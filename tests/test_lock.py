"""A workspace belongs to one run at a time, whichever entrance it came through; what is none is refused."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_python

from tlpipeline import lock
from tlpipeline.errors import WorkspaceError

TAKE_THE_LOCK = """
import sys
from pathlib import Path
from tlpipeline.errors import RegistryError, WorkspaceError
from tlpipeline.lock import hold
try:
    with hold(Path(sys.argv[1])):
        print("in")
except WorkspaceError as error:
    print(error)
"""


def test_what_is_no_workspace_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(WorkspaceError) as caught:
            lock.require_workspace(tmp_path / "w")
        assert "Create one with `tlpipeline init DIR`, or name one with --workspace." in str(caught.value)
        return str(caught.value)

    assert "found no such folder" in refusal()
    (tmp_path / "w").mkdir()
    assert "expected a git repository" in refusal()
    (tmp_path / "w" / ".git").mkdir()
    assert "expected a DVC repository" in refusal()
    (tmp_path / "w" / ".dvc").mkdir()
    assert "expected the pipeline in" in refusal()
    (tmp_path / "w" / "dvc.yaml").write_text("stages: {}\n")
    lock.require_workspace(tmp_path / "w")


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), lock.room(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_second_process_is_refused_and_told_who_is_in_the_workspace(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        said = run_python(tmp_path, "-c", TAKE_THE_LOCK, str(tmp_path)).stdout
        assert f"expected to have the workspace {tmp_path} alone, but process {os.getpid()} (" in said
        assert "Wait for it to end, or stop it; then run again." in said
    assert run_python(tmp_path, "-c", TAKE_THE_LOCK, str(tmp_path)).stdout == "in\n"


def test_a_process_that_the_holder_started_is_let_in(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        done = subprocess.run([sys.executable, "-c", TAKE_THE_LOCK, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "in\n"


def test_the_holder_itself_may_enter_twice_and_frees_the_lock_at_the_outer_end(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        with lock.hold(tmp_path):
            pass
        assert "TLPIPELINE_LOCK_HOLDER" in os.environ
    assert "TLPIPELINE_LOCK_HOLDER" not in os.environ
    lock.free(tmp_path)


def test_the_lock_of_one_workspace_does_not_open_another(tmp_path: Path) -> None:
    code = "import os, sys; os.environ['TLPIPELINE_LOCK_HOLDER'] = '/elsewhere'\n" + TAKE_THE_LOCK
    with lock.hold(tmp_path):
        assert "expected to have the workspace" in run_python(tmp_path, "-c", code, str(tmp_path)).stdout


def test_a_run_that_failed_frees_the_workspace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path):
        raise ZeroDivisionError
    lock.free(tmp_path)
    assert not (tmp_path / ".tlpipeline" / "lock.holder").exists()


def test_a_process_that_died_frees_the_workspace(tmp_path: Path) -> None:
    code = "import os, sys\nfrom pathlib import Path\nfrom tlpipeline.lock import hold\n"
    code += "with hold(Path(sys.argv[1])):\n    os._exit(9)\n"
    assert run_python(tmp_path, "-c", code, str(tmp_path)).returncode == 9
    lock.free(tmp_path)


def test_a_dvc_repro_elsewhere_fails_with_a_clear_message_while_a_run_is_on(workspace: Path) -> None:
    with lock.hold(workspace):
        done = run_python(workspace, "-m", "dvc", "repro")
    assert done.returncode != 0
    assert f"alone, but process {os.getpid()} (" in done.stderr
    assert "is running in it. Wait for it to end" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace / "dvc.lock").exists()
