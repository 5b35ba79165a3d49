"""A workspace belongs to one run at a time, whichever entrance it came through; what is none is refused."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers.processes import run_python
from tlpipeline.errors import WorkspaceError
from tlpipeline.versioning import lock

TAKE_THE_LOCK = """
import sys
from pathlib import Path
from tlpipeline.errors import RegistryError, WorkspaceError
from tlpipeline.versioning.lock import hold
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


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space"), OSError(errno.EDQUOT, "Quota"), shutil.Error([("a", "b", "[Errno 28] No space left on device")])],
    ids=["disk", "quota", "in a copy"],
)
def test_a_full_disk_is_told_with_the_way_out(error: OSError, tmp_path: Path) -> None:
    with (
        pytest.raises(
            WorkspaceError, match=r"expected room on the disk of .*, found none .*Earlier records are unchanged\. Free some space"
        ),
        lock.disk_errors(tmp_path),
    ):
        raise error


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), lock.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_second_process_is_refused_and_told_who_is_in_the_workspace(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        said = run_python(tmp_path, "-c", TAKE_THE_LOCK, str(tmp_path)).stdout
        assert f"Another run is using the workspace {tmp_path}: process {os.getpid()} (" in said
        assert "Wait for it to end, or stop it; then run again." in said
    assert run_python(tmp_path, "-c", TAKE_THE_LOCK, str(tmp_path)).stdout == "in\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/usr/bin/tlpipeline", "run", "/home/me/w", "more"], "tlpipeline run w"),
        (["/lib/prefect/engine.py"], "prefect.engine"),
        (["/lib/tlpipeline/__main__.py", "stage", "train"], "tlpipeline stage train"),
    ],
)
def test_who_is_in_the_workspace_is_named_as_one_would_start_it(words: list[str], told: str) -> None:
    assert lock._command(words) == told


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
    lock.require_unlocked(tmp_path)


def test_the_lock_of_one_workspace_does_not_open_another(tmp_path: Path) -> None:
    code = "import os, sys; os.environ['TLPIPELINE_LOCK_HOLDER'] = '/elsewhere'\n" + TAKE_THE_LOCK
    with lock.hold(tmp_path):
        assert "Another run is using the workspace" in run_python(tmp_path, "-c", code, str(tmp_path)).stdout


def test_a_workspace_is_the_same_by_whatever_path_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with lock.hold(Path()), lock.hold(tmp_path), lock.hold(tmp_path / "link"):
        assert os.environ["TLPIPELINE_LOCK_HOLDER"] == str(tmp_path.resolve() / lock.LOCK)


def test_who_waits_gets_the_workspace_once_it_is_free(tmp_path: Path) -> None:
    (tmp_path / lock.LOCK).parent.mkdir()
    other = FileLock(tmp_path / lock.LOCK, thread_local=False)
    other.acquire()
    with pytest.raises(WorkspaceError, match=r"using the workspace .*: another process"):  # it has not said yet who it is
        lock.require_unlocked(tmp_path)
    threading.Timer(0.3, other.release).start()
    with lock.hold(tmp_path, wait=60):
        assert not other.is_locked


def test_the_name_of_who_was_in_a_workspace_is_gone_before_another_may_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be the other's name that is removed."""
    there: list[bool] = []
    plain = FileLock.release

    def release(self: FileLock, force: bool = False) -> None:
        there.append((tmp_path / ".tlpipeline" / "lock.holder").exists())
        plain(self, force)

    monkeypatch.setattr(FileLock, "release", release)
    with lock.hold(tmp_path):
        assert (tmp_path / ".tlpipeline" / "lock.holder").read_text().startswith(f"process {os.getpid()} (")
    assert there[0] is False


@pytest.mark.parametrize("place", [".", ".tlpipeline", lock.LOCK, ".tlpipeline/cache", ".tlpipeline/models", ".dvc", ".git"], ids=str)
def test_what_may_only_be_read_is_named_before_a_run_begins(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / place and real(path, mode))
    with pytest.raises(
        WorkspaceError, match=f"found {re.escape(str(tmp_path / place))}, which you may only read. Change its permissions or owner"
    ):
        lock.require_unlocked(tmp_path)


def test_a_run_that_failed_frees_the_workspace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path):
        raise ZeroDivisionError
    lock.require_unlocked(tmp_path)
    assert not (tmp_path / ".tlpipeline" / "lock.holder").exists()


def test_a_process_that_died_frees_the_workspace(tmp_path: Path) -> None:
    code = "import os, sys\nfrom pathlib import Path\nfrom tlpipeline.versioning.lock import hold\n"
    code += "with hold(Path(sys.argv[1])):\n    os._exit(9)\n"
    assert run_python(tmp_path, "-c", code, str(tmp_path)).returncode == 9
    lock.require_unlocked(tmp_path)


@pytest.mark.slow
def test_a_dvc_repro_elsewhere_fails_with_a_clear_message_while_a_run_is_on(workspace: Path) -> None:
    with lock.hold(workspace):
        done = run_python(workspace, "-m", "dvc", "repro")
    assert done.returncode != 0
    assert f"Another run is using the workspace {workspace}: process {os.getpid()} (" in done.stderr
    assert "Wait for it to end" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace / "dvc.lock").exists()


def test_a_disk_without_room_for_the_first_records_is_refused_before_a_run(tmp_path: Path) -> None:
    lock.require_room(tmp_path)
    with pytest.raises(WorkspaceError, match=r"expected room on the disk of .*, found .* MB\. Free some space"):
        lock.require_room(tmp_path, least=2**62)
