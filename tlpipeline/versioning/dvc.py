"""The only driver of DVC: versions of data, and stages recorded as they ran.

The Python API of DVC is not promised to be stable, so it is kept in this one file. A stage that ran in this process is recorded right after
it ran, from dependencies that were hashed before it ran and are unchanged since; never by a blanket `dvc commit`.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from tlpipeline.errors import Unreachable, WorkspaceError
from tlpipeline.files import is_truncated_json
from tlpipeline.versioning import git, lock


def silence() -> None:
    """Turn off DVC's analytics, messages and bars; a user's own settings win."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    os.environ.setdefault("ITERATIVE_DO_NOT_TRACK", "1")
    logging.getLogger("dvc").setLevel(logging.ERROR)
    for name in ("dvc.progress", "dvc_data.callbacks"):  # whose levels say whether bars are drawn, in the midst of ours
        logging.getLogger(name).setLevel(logging.CRITICAL)


# --- creating -------------------------------------------------------------------------------------------------------------------------


def init(root: Path, remote: str) -> None:
    """Make a git and a DVC repository of a folder, with a default remote; what is there already stays.

    Raises:
        WorkspaceError: the remote is of a kind that DVC does not know.
    """
    silence()
    from dvc.repo import Repo

    if not (root / ".git").exists():
        git.run(root, "init", "--quiet", "--initial-branch", "main")
    for key, value in (("user.name", "tlpipeline"), ("user.email", "tlpipeline@localhost")):
        if not git.run(root, "config", key, check=False):
            git.run(root, "config", key, value)  # commits and tags need a name; only where the user has set none
    if not (root / ".dvc").exists():
        logging.getLogger("dvc").setLevel(logging.ERROR)  # importing DVC sets its own level
        Repo.init(str(root)).close()
    # DVC reads a relative path from the working directory and keeps it relative to its own folder: a remote inside the workspace
    # moves with it, one given by its full path stays where it is.
    inside = "://" not in remote and Path(remote).resolve().is_relative_to(root.resolve())
    try:
        _configure(root, os.path.relpath(remote) if inside else remote)
    except _dvc_error() as error:
        raise WorkspaceError(f"expected a folder or a URL that DVC knows as remote, found {remote!r}: {error}") from error


def check_remote(remote: str) -> None:
    """Check that what DVC needs to reach a remote of this kind is installed.

    Raises:
        WorkspaceError: it is not.
    """
    silence()
    from dvc.fs import get_fs_cls

    try:
        get_fs_cls({"url": remote})
    except ImportError as error:
        raise _not_installed(error) from error


def _not_installed(error: ImportError) -> WorkspaceError:
    return WorkspaceError(
        f"expected what DVC needs for its remote, but: {error}. Install it (`pip install 'tlpipeline[s3]'` brings dvc-s3), and run again."
    )


def _configure(root: Path, remote: str) -> None:
    from dvc.repo import Repo

    with Repo(str(root)) as repo, repo.config.edit("repo") as config:
        config["core"]["analytics"] = False
        config["core"]["autostage"] = False
        config["core"]["remote"] = "storage"
        config["remote"] = {"storage": {"url": remote}}


# --- data -----------------------------------------------------------------------------------------------------------------------------


def is_stage_output(root: Path, path: str) -> bool:
    """Say whether a path is written by a stage (as the embedded sample is at the repository's root), not added by hand."""
    with _repo(root) as repo:
        return any(
            out.def_path == path or Path(out.fs_path) == Path(repo.root_dir) / path
            for stage in repo.index.stages
            if stage.cmd
            for out in stage.outs
        )


def add(root: Path, path: str) -> str:
    """Put a folder or file under DVC (or update it) and return its hash.

    Raises:
        WorkspaceError: DVC refuses.
    """
    with _repo(root) as repo:
        try:
            repo.add([str(Path(repo.root_dir) / path)])
        except _dvc_error(FileNotFoundError, PermissionError, UnicodeError) as error:
            raise WorkspaceError(
                f"expected to version {path} with DVC, but: {error}. Look there for links to nothing and for files that cannot be read."
            ) from error
    return data_hash(root, path)


def ignored_files(root: Path, path: str, found: Iterable[Path]) -> list[Path]:
    """Return which of the files found below a folder DVC does not see, because of a .dvcignore; and those in the folder, which it refuses."""
    with _repo(root) as repo:
        folder = Path(repo.root_dir) / path
        seen = {Path(name).relative_to(folder) for name in repo.dvcignore.find(repo.fs, str(folder))}
    return [p for p in found if p.relative_to(root / path) not in seen] + [root / path / p for p in sorted(seen) if p.name == ".dvcignore"]


def data_hash(root: Path, path: str) -> str:
    """Return the recorded hash of a DVC-tracked path, "" where it is not tracked or not recorded."""
    with _repo(root) as repo:
        try:
            outs = repo.find_outs_by_path(str(Path(repo.root_dir) / path))
        except _dvc_error():
            return ""
        return str(outs[0].hash_info.value or "") if outs else ""


def tracked_files(root: Path, path: str) -> dict[str, str]:
    """Return the recorded md5 of each file below a DVC-tracked folder."""
    with _repo(root) as repo:
        obj = repo.find_outs_by_path(str(Path(repo.root_dir) / path))[0].get_obj()
        return {"/".join(key): info.value for key, _, info in obj} if obj else {}


def has_changed(root: Path, path: str) -> bool:
    """Say whether a path added to DVC differs from what is recorded (or is not recorded yet)."""
    with _repo(root) as repo:
        try:
            outs = repo.find_outs_by_path(str(Path(repo.root_dir) / path))
        except _dvc_error():
            return True
        return bool(outs[0].changed_checksum() if outs[0].exists else True)


def reproduce_upstream(root: Path, path: str) -> None:
    """Run the stage that writes a path, where it is missing or stale."""
    with _repo(root) as repo:
        out = repo.find_outs_by_path(str(Path(repo.root_dir) / path))[0]
        stage = out.stage
        with repo.lock:
            fresh = not stage.changed()
        address = stage.addressing
    if not fresh:
        done = subprocess.run([sys.executable, "-m", "dvc", "repro", address], cwd=root, capture_output=True, text=True, env=_with_python())
        if done.returncode:
            raise WorkspaceError(f"expected `dvc repro {address}` to write {path}, but: {done.stderr.strip() or done.stdout.strip()}")


def _with_python() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def push(root: Path) -> int:
    """Copy everything that the workspace refers to into the default remote; return the number of files.

    Raises:
        WorkspaceError: no default remote, or it cannot be reached.
    """
    with _repo(root) as repo:
        if not repo.config["core"].get("remote"):
            raise WorkspaceError(
                "expected a DVC remote to publish to, found none. Add one: `dvc remote add --default storage FOLDER_OR_URL`."
            )
        try:
            return int(repo.push())
        except _dvc_error(OSError) as error:
            raise Unreachable(
                f"expected to push to the DVC remote, but: {error}. Nothing was registered; check the remote and run again."
            ) from error


def pull_hint(root: Path) -> str:
    """Say how what is versioned comes back: by `dvc pull`, which a clone of a workspace that keeps its remote inside must be told where from."""
    with _repo(root) as repo:
        name = repo.config["core"].get("remote")
        place = str(repo.config["remote"].get(name, {}).get("url", ""))
        if not place or "://" in place or Path(place).is_dir():
            return "`dvc pull` brings the versioned ones back"
        return (
            f"the DVC remote, {place}, is not there either, as in a clone of a workspace whose remote lies inside it: name that one "
            f"(`dvc remote modify --local {name} url FOLDER/{Path(place).name}`), and `dvc pull` brings the versioned ones back"
        )


def download(root: Path, revision: str, path: str, target: Path) -> None:
    """Copy a DVC-tracked file or folder as it was at a revision; from the cache, else from the remote.

    Raises:
        WorkspaceError: it is in neither.
    """
    from dvc.api import DVCFileSystem
    from dvc_data.index import DataIndexDirError

    silence()
    try:
        fs = DVCFileSystem(str(root), rev=revision)
        fs.get(path, str(target), recursive=True)
    except ImportError as error:
        raise _not_installed(error) from error
    except _dvc_error(DataIndexDirError, OSError) as error:
        raise WorkspaceError(
            f"expected {path} of {revision} in the DVC cache or its remote, but: {error}. Try `dvc fetch --all-tags`; {pull_hint(root)}."
        ) from error


# --- stages ---------------------------------------------------------------------------------------------------------------------------


def stage_state(root: Path, name: str) -> str:
    """Return fresh, missing (only its outputs are gone or edited) or stale (dependencies, parameters or command changed)."""
    with _repo(root) as repo:
        return _state(repo, name)


def _state(repo: Any, name: str) -> str:
    stage = _stage(repo, name)
    with repo.lock:
        if stage.changed_deps() or stage.changed_stage():
            return "stale"
        return "missing" if stage.changed_outs() else "fresh"


def _address(repo: Any, name: str) -> str:
    """Return a stage's address that does not depend on the working directory."""
    return f"{Path(repo.root_dir) / 'dvc.yaml'}:{name}"


def _stage(repo: Any, name: str) -> Any:
    return repo.stage.load_one(path=str(Path(repo.root_dir) / "dvc.yaml"), name=name)


def run_stage(root: Path, name: str, function: Callable[[], None]) -> bool:
    """Bring one stage up to date in this process and record it in dvc.lock; return whether it had to run.

    A stage whose dependencies, parameters and command are as recorded does not run: its outputs are restored from the cache where needed.

    Raises:
        WorkspaceError: a dependency is missing; or one, a parameter or the command changed while the stage ran: nothing is recorded then.
    """
    with _repo(root) as repo:
        state = _state(repo, name)
        if state == "fresh":
            return False
        if state == "missing" and _restored(repo, name):
            return False
        _require_inputs(repo, name)
        before = _dependencies(repo, name)
    function()
    with _repo(root) as repo:
        after = _dependencies(repo, name)
        if after != before:
            moved = ", ".join(path for path in sorted(before | after) if after.get(path) != before.get(path))
            raise WorkspaceError(
                f"expected {moved} to stay as it was while the stage {name} ran, but it changed. Nothing was recorded; run again."
            )
        repo.commit(target=_address(repo, name), force=True)
    return True


def require_inputs(root: Path, name: str) -> None:
    """Check that all is there that a stage reads.

    Raises:
        WorkspaceError: something is not.
    """
    with _repo(root) as repo:
        _require_inputs(repo, name)


def _require_inputs(repo: Any, name: str) -> None:
    if missing := [d.def_path for d in _stage(repo, name).deps if not d.exists]:
        raise WorkspaceError(
            f"expected {', '.join(missing)} before the stage {name}, found nothing there. "
            "Run the stages before it (`dvc repro`); fetch what a clone has not got yet (`dvc pull`)."
        )


def _restored(repo: Any, name: str) -> bool:
    try:
        repo.checkout(targets=[_address(repo, name)], force=True)
    except _dvc_error():
        return False
    return _state(repo, name) == "fresh"


def _dependencies(repo: Any, name: str) -> dict[str, str]:
    """Return all that a stage depends on as it stands: the hash of each file, the parameters that it names, its command."""
    stage = _stage(repo, name)
    found = {"dvc.yaml": str(stage.cmd)}
    for dependency in stage.deps:
        if dependency.def_path == "params.yaml":
            found["params.yaml"] = json.dumps(dependency.read_params(flatten=True), sort_keys=True, default=str)
        else:
            found[dependency.def_path] = str(dependency.get_hash().value)
    return found


def stage_key(root: Path, name: str) -> str:
    """Return a key of everything that a stage depends on as it stands: dependencies, parameters, command."""
    import hashlib

    with _repo(root) as repo:
        return hashlib.md5(json.dumps(_dependencies(repo, name), sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def stage_output(root: Path, name: str, path: str, revision: str | None = None) -> str:
    """Return the hash of a stage's output as dvc.lock records it, now or at a revision; "" where it does not."""
    return _locked(root, name, "outs", path, revision)


def stage_input(root: Path, name: str, path: str, revision: str | None = None) -> str:
    """Return the hash of a stage's dependency as dvc.lock records it, now or at a revision; "" where it does not."""
    return _locked(root, name, "deps", path, revision)


def _locked(root: Path, name: str, kind: str, path: str, revision: str | None) -> str:
    import yaml

    text = (root / "dvc.lock").read_text(encoding="utf-8") if revision is None and (root / "dvc.lock").exists() else None
    if revision is not None:
        text = git.read_at(root, revision, "dvc.lock")
    if not text:
        return ""
    entries = ((yaml.safe_load(text).get("stages") or {}).get(name) or {}).get(kind) or []
    return next((str(e.get("md5", "")) for e in entries if e.get("path") == path), "")


def clean(root: Path) -> bool:
    """Say whether `dvc status` has nothing to report."""
    with _repo(root) as repo:
        return not repo.status()


# --- DVC ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _repo(root: Path) -> Iterator[Any]:
    silence()
    from dvc.repo import Repo

    # DVC reads some paths (its run cache's, a remote's) from the working directory, whatever repository it was opened on.
    root = root.resolve()
    try:
        with lock.disk_errors(root), chdir(root), Repo(str(root)) as repo:
            _repair(repo)
            yield repo
    except ImportError as error:  # what a remote needs is loaded when it is first spoken to
        raise _not_installed(error) from error
    except _dvc_error() as error:  # no repository, a dvc.yaml that cannot be read, another DVC command at work
        raise WorkspaceError(
            f"expected DVC to work in {root}, but: {error}. Mend that (`dvc status` shows it too), and run again."
        ) from error


def _repair(repo: Any) -> None:
    """Remove DVC's list of who reads and writes what if a kill tore it: DVC writes it in place, and does nothing more with half of it."""
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    path = Path(repo.tmp_dir) / RWLOCK_FILE
    if is_truncated_json(path):
        # Under DVC's own guard, and asked again there: another DVC command may just be writing it.
        with make_lock(
            str(path.with_name(RWLOCK_LOCK)), tmp_dir=repo.tmp_dir, hardlink_lock=repo.config["core"].get("hardlink_lock", False)
        ):
            if is_truncated_json(path):
                path.unlink()


def _dvc_error(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what DVC raises for people to mend, and these others; what comes from the parts that DVC is made of has no common base."""
    from dvc.exceptions import DvcException
    from dvc.fs import AuthError, ConfigError, RemoteMissingDepsError
    from dvc_data.hashfile.build import IgnoreInCollectedDirError

    return (DvcException, AuthError, ConfigError, RemoteMissingDepsError, IgnoreInCollectedDirError, *others)
