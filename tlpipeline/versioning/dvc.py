"""The only module that calls DVC: versions of data, and stages recorded after they ran.

DVC's Python API is not guaranteed to be stable, so all calls are in this file. A stage that ran in this process is recorded
at once, but only if its dependencies did not change meanwhile. `dvc commit` would record whatever is there.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tlpipeline.environment import patience
from tlpipeline.errors import Unreachable, WorkspaceError, masked
from tlpipeline.files import file_md5, is_truncated_json, unlink
from tlpipeline.versioning import git, lock

# Settings of remotes that let others in.
_SECRETS = {
    "password", "passphrase", "token", "secret_access_key", "session_token", "sas_token", "account_key", "connection_string", "client_secret",
    "gdrive_client_secret", "oss_key_secret",
}  # fmt: skip


@dataclass(frozen=True)
class Pin:
    """A file or folder as DVC records it.

    Attributes:
        md5: of the content; of a folder that of its list of files, and it ends in .dir.
        size: bytes; files: number of files of a folder, None for a file.
    """

    md5: str
    size: int | None = None
    files: int | None = None


Pins = Mapping[str, Pin]
_UNPINNED: Pins = {}


class IgnoreFileInside(WorkspaceError):
    """A folder that is to be versioned has a .dvcignore."""


def silence() -> None:
    """Turn off DVC's analytics, messages and progress bars, unless the user set them."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    os.environ.setdefault("ITERATIVE_DO_NOT_TRACK", "1")
    logging.getLogger("dvc").setLevel(logging.ERROR)
    for name in ("dvc.progress", "dvc_data.callbacks"):  # at a higher level they would draw bars between ours
        logging.getLogger(name).setLevel(logging.CRITICAL)


# --- creating -------------------------------------------------------------------------------------------------------------------------


def init(root: Path, remote: str) -> None:
    """Make a folder a git and DVC repository with a default remote; existing repositories stay.

    A password in the URL of the remote goes to .dvc/config.local, which git ignores.

    Raises:
        WorkspaceError: DVC does not know this kind of remote.
    """
    silence()
    from dvc.repo import Repo

    if not (root / ".git").exists():
        git.run(root, "init", "--quiet", "--initial-branch", "main")
    for key, value in (("user.name", "tlpipeline"), ("user.email", "tlpipeline@localhost")):
        if not git.run(root, "config", key, check=False):
            git.run(root, "config", key, value)  # commits and tags need a name; the user's own is kept
    if not (root / ".dvc").exists():
        logging.getLogger("dvc").setLevel(logging.ERROR)  # importing DVC sets its own level
        Repo.init(str(root)).close()
    # DVC reads a relative path from the working directory and stores it relative to its own folder. A remote inside the workspace
    # therefore moves with it; one outside is given by its full path.
    inside = "://" not in remote and Path(remote).resolve().is_relative_to(root.resolve())
    try:
        _configure(root, os.path.relpath(remote) if inside else remote)
    except _dvc_error() as error:
        raise WorkspaceError(f"expected a folder or a URL that DVC knows as remote, found {remote!r}: {error}") from error


def check_remote(remote: str) -> None:
    """Check that a remote can be understood, and that the package that DVC needs for it is installed.

    Raises:
        WorkspaceError: it cannot, or is not.
    """
    try:
        urlsplit(remote).port  # noqa: B018
    except ValueError as error:
        raise WorkspaceError(
            "expected a URL as remote, found one in which the part before the host cannot be read. Write / # ? and @ of a password as "
            "%2F %23 %3F and %40."
        ) from error
    silence()
    from dvc.fs import get_fs_cls

    try:
        get_fs_cls({"url": remote})
    except ImportError as error:
        raise _not_installed(error) from error


def _not_installed(error: ImportError) -> WorkspaceError:
    return WorkspaceError(
        f"DVC needs another package for its remote: {error}. Install it (`pip install 'tlpipeline[s3]'` for S3), and run again."
    )


def _configure(root: Path, remote: str) -> None:
    from dvc.repo import Repo

    public = masked(remote).replace("://***@", "://", 1)
    with Repo(str(root)) as repo:
        with repo.config.edit("repo") as config:
            config["core"]["analytics"] = False
            config["core"]["autostage"] = False
            config["core"]["remote"] = "storage"
            config["remote"] = {"storage": {"url": public}}
        if public != remote:
            with repo.config.edit("local") as config:
                config["remote"] = {"storage": {"url": remote}}
            (root / ".dvc" / "config.local").chmod(0o600)


def require_no_secrets(root: Path) -> None:
    """Check that .dvc/config, which a run commits, has no new password.

    Raises:
        WorkspaceError: it has one.
    """
    if not git.run(root, "status", "--porcelain", "--", ".dvc/config"):
        return
    with _repo(root) as repo:
        remotes = repo.config.load_one("repo")["remote"]
    for name, settings in remotes.items():
        for key, value in settings.items():
            if key in _SECRETS or masked(str(value)) != str(value):
                public = f"dvc remote modify {name} url URL_WITHOUT_PASSWORD" if key == "url" else f"dvc remote modify --unset {name} {key}"
                raise WorkspaceError(
                    f"expected no password in .dvc/config, which is committed, found {key} of the remote {name}. Give it to this clone alone "
                    f"(`dvc remote modify --local {name} {key} VALUE`), and take it out of the file (`{public}`)."
                )


# --- data -----------------------------------------------------------------------------------------------------------------------------


def is_stage_output(root: Path, path: str) -> bool:
    """Return whether a stage writes this path, as for the embedded sample in the repository; otherwise it was added by hand."""
    with _repo(root) as repo:
        return any(
            out.def_path == path or Path(out.fs_path) == Path(repo.root_dir) / path
            for stage in repo.index.stages
            if stage.cmd
            for out in stage.outs
        )


def add(root: Path, path: str) -> str:
    """Add a folder or file to DVC, or update it, and return its hash.

    Raises:
        IgnoreFileInside: there is a .dvcignore in the folder.
        WorkspaceError: DVC refuses.
    """
    from dvc_data.hashfile.build import IgnoreInCollectedDirError

    with _repo(root) as repo:
        try:
            repo.add([str(Path(repo.root_dir) / path)])
        except IgnoreInCollectedDirError as error:
            raise IgnoreFileInside(f"Cannot version {path} with DVC: {error}. Remove that file.") from error
        except _dvc_error(FileNotFoundError, PermissionError, UnicodeError) as error:
            raise WorkspaceError(
                f"Cannot version {path} with DVC: {error}. Look there for broken links and for files that cannot be read."
            ) from error
    return data_hash(root, path)


def has_own_ignore_rules(root: Path, path: str, usual: str) -> bool:
    """Return whether a .dvcignore of the workspace, or of a folder between it and this one, has other lines than the usual ones."""
    known = {"", *usual.splitlines()}
    places = (place / ".dvcignore" for place in (root / path, *(root / path).parents) if place.is_relative_to(root))
    return any(not known.issuperset(place.read_text(encoding="utf-8").splitlines()) for place in places if place.is_file())


def ignored_files(root: Path, path: str, files: Iterable[Path]) -> list[Path]:
    """Return those of a folder's files that DVC ignores because of a .dvcignore, and any .dvcignore in the folder, which DVC refuses."""
    with _repo(root) as repo:
        folder = Path(repo.root_dir) / path
        visible = {Path(name).relative_to(folder) for name in repo.dvcignore.find(repo.fs, str(folder))}
    return [p for p in files if p.relative_to(root / path) not in visible] + [
        root / path / p for p in sorted(visible) if p.name == ".dvcignore"
    ]


def data_hash(root: Path, path: str) -> str:
    """Return the recorded hash of a DVC-tracked path, "" if it is not tracked or not recorded."""
    with _repo(root) as repo:
        try:
            outs = repo.find_outs_by_path(str(Path(repo.root_dir) / path))
        except _dvc_error():
            return ""
        return str(outs[0].hash_info.value or "") if outs else ""


def pin_of(root: Path, path: str) -> Pin:
    """Return a DVC-tracked path as it is recorded."""
    with _repo(root) as repo:
        out = repo.find_outs_by_path(str(Path(repo.root_dir) / path))[0]
        return Pin(str(out.hash_info.value), out.meta.size, out.meta.nfiles)


def listed_files(root: Path, pin: Pin) -> dict[str, str]:
    """Return the md5 of each file of a folder that was pinned, as DVC's cache lists them."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    with _repo(root) as repo:
        return {"/".join(key): info.value for key, _, info in Tree.load(repo.cache.local, HashInfo("md5", pin.md5))}


def tracked_files(root: Path, path: str) -> dict[str, str]:
    """Return the recorded md5 of each file below a DVC-tracked folder."""
    with _repo(root) as repo:
        obj = repo.find_outs_by_path(str(Path(repo.root_dir) / path))[0].get_obj()
        return {"/".join(key): info.value for key, _, info in obj} if obj else {}


def file_hashes(root: Path, path: str) -> dict[str, str]:
    """Return the md5 of each file below a DVC-tracked folder as it is now, {} if the folder is not tracked.

    DVC knows the md5 of a file whose size, time and inode are as before; it reads only the others.
    """
    from dvc_data.hashfile.build import build

    with _repo(root) as repo:
        try:
            out = repo.find_outs_by_path(str(Path(repo.root_dir) / path))[0]
            tree: Any = build(out.cache, out.fs_path, out.fs, "md5", ignore=out.dvcignore, dry_run=True)[2]
        except _dvc_error(FileNotFoundError, PermissionError, UnicodeError):
            return {}  # not tracked, or there is something that only the reader of the files can name
        return {"/".join(key): info.value for key, _, info in tree} if tree.hash_info.isdir else {}


def files_at(root: Path, path: str, revision: str) -> dict[str, str]:
    """Return the md5 of each file below a folder that was added to DVC, as of a git revision.

    The list of files is read from the cache, or else fetched from the remote.

    Raises:
        WorkspaceError: there is no such revision, DVC does not track the folder there, or its list is nowhere.
    """
    import yaml
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    if not git.run(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", check=False):
        raise WorkspaceError(
            f"expected a git revision, such as HEAD~1 or a tag, found {revision!r}. `git log` lists commits, `git tag` tags."
        )
    outs = (yaml.safe_load(git.read_at(root, revision, f"{path}.dvc") or "") or {}).get("outs") or [{}]
    recorded = str(outs[0].get("md5", ""))
    if not recorded:
        raise WorkspaceError(f"expected {path}.dvc at {revision}, found none: no images were versioned there. Name a later revision.")
    info = HashInfo("md5", recorded)
    with _repo(root) as repo:
        stored = Path(repo.cache.local.oid_to_path(recorded))
        _remove_damaged(repo, [recorded])
        if not stored.exists() and repo.config["core"].get("remote"):
            _require_answer(repo, [recorded])
            with suppress(*_dvc_error(OSError)):  # what is missing is told below
                repo.cloud.pull([info])
        if not stored.exists():
            raise WorkspaceError(
                f"Cannot find the list of {path} at {revision} in the DVC cache or its remote. Try `dvc fetch --all-tags`."
            )
        return {"/".join(key): entry.value for key, _, entry in Tree.load(repo.cache.local, info)}


def content_of(root: Path, md5: str) -> bytes | None:
    """Return the content of a versioned file, None if the cache does not have it."""
    with _repo(root) as repo:
        stored = Path(repo.cache.local.oid_to_path(md5))
        return stored.read_bytes() if stored.is_file() else None


def earlier_files(root: Path, path: str) -> set[str]:
    """Return the md5s of the files in all versions of a DVC-tracked folder that git has and whose lists are in the cache."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    if not git.head(root):
        return set()
    texts = git.contents_since(root, "refs/tlpipeline/none", f"{path}.dvc")
    with _repo(root) as repo:
        cache = repo.cache.local
        lists = {md5 for md5 in _recorded(texts) if md5.endswith(".dir") and os.path.exists(cache.oid_to_path(md5))}
        return {str(info.value) for md5 in lists for _, _, info in Tree.load(cache, HashInfo("md5", md5))}


def _recorded(texts: Iterable[str]) -> set[str]:
    """Return the hashes that .dvc files with these contents record."""
    import yaml

    outs = [out for text in texts for out in (yaml.safe_load(text) or {}).get("outs", ())]
    return {str(out["md5"]) for out in outs if out.get("hash") == "md5" and out.get("md5")}


def has_changed(root: Path, path: str) -> bool:
    """Return whether a DVC-tracked path differs from its recorded version, or has none."""
    with _repo(root) as repo:
        try:
            outs = repo.find_outs_by_path(str(Path(repo.root_dir) / path))
        except _dvc_error():
            return True
        return bool(outs[0].changed_checksum() if outs[0].exists else True)


def reproduce_upstream(root: Path, path: str) -> None:
    """Run the stage that writes a path, if the path is missing or stale."""
    with _repo(root) as repo:
        out = repo.find_outs_by_path(str(Path(repo.root_dir) / path))[0]
        stage = out.stage
        with repo.lock:
            fresh = not stage.changed()
        address = stage.addressing
    if not fresh:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "dvc", "repro", address], cwd=root, capture_output=True, text=True, env=_with_python()
        )
        if done.returncode:
            raise WorkspaceError(f"`dvc repro {address}`, which writes {path}, failed: {done.stderr.strip() or done.stdout.strip()}")


def _with_python() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _require_answer(repo: Any, objects: Iterable[str] | None = None) -> None:
    """Check that the default remote answers: DVC would ask a silent one for minutes. A transfer may take as long as it likes.

    Args:
        objects: hashes of what is to be read; if the cache has all of it, no remote is asked.

    Raises:
        Unreachable: it is silent.
    """
    cached = objects is not None and all(os.path.exists(repo.cache.local.oid_to_path(oid)) for oid in objects)
    if cached or not repo.config["core"].get("remote"):
        return
    remote = repo.cloud.get_remote()
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # an error is an answer, too; the transfer reports it if it matters
            remote.fs.exists(remote.path)
        answered.set()

    # The thread cannot be ended. It is left behind, and does not keep the process.
    threading.Thread(target=ask, daemon=True).start()
    if not answered.wait(patience()):
        raise git.silent_remote("DVC", remote.name, str(repo.config["remote"][remote.name]["url"]), "dvc remote list")


def require_writable_remote(root: Path) -> str:
    """Check that the default remote answers and can be written: a small file is written there and deleted. Return its address.

    Raises:
        WorkspaceError: there is no remote, it is silent (`Unreachable`), or it refuses.
    """
    with _repo(root) as repo:
        name = repo.config["core"].get("remote")
        if not name:
            raise WorkspaceError("expected a default DVC remote, found none. Add one: `dvc remote add --default storage URL`.")
        _require_answer(repo)
        remote = repo.cloud.get_remote()
        address = masked(str(repo.config["remote"][name]["url"]))
        probe = remote.fs.join(remote.path, f"tlpipeline-check-{os.getpid()}")
        try:
            remote.fs.makedirs(remote.path, exist_ok=True)
            remote.fs.pipe_file(probe, b"")
            remote.fs.rm_file(probe)
        except Exception as error:  # each kind of remote raises errors of its own
            raise Unreachable(
                f"expected to write to the DVC remote {name} ({address}), but: {error}. Check its address and your rights (`dvc remote list`)."
            ) from error
    return remote.path if "://" not in address else address


def push(root: Path) -> int:
    """Copy into the default remote all files that the workspace refers to, and those that were added in each commit since the last push.

    A version whose push failed, or that another one replaced at once, would else be in this cache alone.

    Returns:
        The number of files.

    Raises:
        WorkspaceError: there is no default remote, or it cannot be reached.
    """
    from dvc.exceptions import UploadError

    root = root.resolve()
    with _repo(root) as repo:
        if not (name := repo.config["core"].get("remote")):
            raise WorkspaceError(
                "expected a DVC remote to publish to, found none. Add one: `dvc remote add --default storage FOLDER_OR_URL`."
            )
        mark, present = _mark(repo, name), git.head(root)
        # Not `repo.push(revs=...)`: at a revision DVC takes a relative remote for one at the root of the file system.
        texts = git.contents_since(root, mark, "*.dvc") if present else []
        try:
            _require_answer(repo)
            earlier = repo.cloud.push(_cached(repo, texts))
            if earlier.failed:
                raise UploadError(len(earlier.failed))
            pushed = len(earlier.transferred) + int(repo.push())
        except _dvc_error(OSError) as error:
            raise Unreachable(f"Cannot push to the DVC remote: {error}. Nothing was registered. Check the remote and run again.") from error
    if present:
        git.run(root, "update-ref", mark, present)
    return pushed


def _mark(repo: Any, remote: str) -> str:
    """Return the ref of the commit whose data were pushed last. It is local, and git does not push it: each clone and remote has its own."""
    place = hashlib.md5(str(repo.config["remote"][remote].get("url")).encode(), usedforsecurity=False).hexdigest()
    return f"refs/tlpipeline/pushed/{place}"


def is_pushed(root: Path) -> bool:
    """Return whether what the .dvc files of the present commit name was pushed to the default remote. The remote itself is not asked."""
    with _repo(root) as repo:
        name = repo.config["core"].get("remote")
        pushed = git.run(root, "rev-parse", "--verify", "--quiet", _mark(repo, name), check=False) if name else ""
    return bool(pushed) and not git.run(root, "diff", "--name-only", pushed, "HEAD", "--", "*.dvc")


def _cached(repo: Any, texts: Iterable[str]) -> list[Any]:
    """Return the hashes of what .dvc files with these contents record, as far as it is in the cache: a clone lacks earlier versions."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    cache = repo.cache.local
    recorded = {HashInfo("md5", md5) for md5 in _recorded(texts)}
    whole = {info for info in recorded if content_md5(Path(cache.oid_to_path(info.value))) == str(info.value).removesuffix(".dir")}
    hashes = whole | {info for listed in whole if listed.isdir for _, _, info in Tree.load(cache, listed)}
    return [info for info in hashes if os.path.exists(cache.oid_to_path(info.value))]


def cache_folder(root: Path) -> Path:
    """Return the folder of DVC's cache."""
    with _repo(root) as repo:
        return Path(repo.cache.local.path)


def pull_hint(root: Path) -> str:
    """Return a sentence part on how to restore versioned files: `dvc pull`, after setting the remote if a clone does not have it."""
    with _repo(root) as repo:
        name = repo.config["core"].get("remote")
        place = str(repo.config["remote"].get(name, {}).get("url", ""))
        if not place or "://" in place or Path(place).is_dir():
            return "`dvc pull` restores versioned files"
        return (
            f"the DVC remote {place} is missing too, as in a clone of a workspace that contains its remote. Set the original one "
            f"(`dvc remote modify --local {name} url FOLDER/{Path(place).name}`), then `dvc pull` restores versioned files"
        )


def download(root: Path, revision: str, path: str, target: Path) -> None:
    """Copy a DVC-tracked file or folder as of a revision to `target`, from the cache or else from the remote: as recorded, or not at all.

    DVC compares no hashes when it copies. A cache object that is not what its name says is removed, and the remote's is taken.

    Raises:
        WorkspaceError: neither has it, or what they have is damaged.
    """
    draft = target.with_name(f".{target.name}.draft")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        objects, problem = _copy(root, revision, path, draft)
        if problem:
            with _repo(root) as repo:
                damaged = _remove_damaged(repo, objects)
            if damaged:
                _, again = _copy(root, revision, path, draft)
                problem = again and f"{damaged[0]} was damaged and is removed, and without it: {again}"
        if problem:
            raise WorkspaceError(
                f"Cannot find {path} of {revision} in the DVC cache or its remote: {problem}. Try `dvc fetch --all-tags`; {pull_hint(root)}. "
                "Damaged files of a remote can be replaced by those of the same names in the .dvc/cache of another clone."
            )
        unlink(target)
        draft.rename(target)
    finally:
        unlink(draft)


def _copy(root: Path, revision: str, path: str, target: Path) -> tuple[list[str], str]:
    """Copy a DVC-tracked file or folder; return the hashes of its objects as far as they are known, and what is wrong, "" if nothing is."""
    from dvc.api import DVCFileSystem
    from dvc_data.index import DataIndexDirError

    silence()
    unlink(target)
    objects: list[str] = []
    try:
        with lock.disk_errors(root):
            fs = DVCFileSystem(str(root), rev=revision)
            objects.append(str(fs.info(path)["md5"]))
            _remove_damaged(fs.repo, objects)  # a list of files that was read once is remembered
            _require_answer(fs.repo, objects)
            objects += [str(file["md5"]) for file in fs.find(path, detail=True).values()]
            _require_answer(fs.repo, objects)
            fs.get(path, str(target), recursive=True)
    except ImportError as error:
        raise _not_installed(error) from error
    except _dvc_error(DataIndexDirError, OSError) as error:
        return objects, str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # DVC reads whatever a damaged list of files says
        return objects, f"its list of files is damaged ({error!r})"
    content = content_md5(target)
    return objects, "" if content == objects[0] else f"expected the md5 {objects[0]}, found {content}"


def _remove_damaged(repo: Any, objects: Iterable[str]) -> list[str]:
    """Remove those objects of the cache whose content is not what their names say; return the paths of those that could be removed."""
    paths = {oid: Path(repo.cache.local.oid_to_path(oid)) for oid in objects}
    damaged = [path for oid, path in paths.items() if content_md5(path) not in ("", oid.removesuffix(".dir"))]
    removable = [path for path in damaged if os.access(path.parent, os.W_OK)]
    for path in removable:
        path.unlink()
    return [str(path) for path in removable]


def remove_damaged(root: Path, objects: Collection[str]) -> list[str]:
    """Remove those objects of the cache whose content is not what their names say; return their paths.

    Args:
        objects: md5s of files. Those that the cache does not have are left out.
    """
    if not objects:
        return []
    with _repo(root) as repo:
        return _remove_damaged(repo, objects)


def content_md5(path: Path) -> str:
    """Return the md5 of a file or folder as DVC records it, computed from the content; "" if there is none."""
    if path.is_dir():
        entries = {file.relative_to(path).as_posix(): content_md5(file) for file in path.rglob("*") if file.is_file()}
        listing = json.dumps([{"md5": md5, "relpath": name} for name, md5 in sorted(entries.items())])
        return f"{hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest()}.dir"
    return file_md5(path) if path.is_file() else ""


# --- stages ---------------------------------------------------------------------------------------------------------------------------


def _state(repo: Any, name: str, pins: Pins = _UNPINNED) -> str:
    """Return fresh, missing (only outputs are missing or edited) or stale (dependencies, parameters or command changed)."""
    stage = _stage(repo, name, pins)
    with repo.lock:
        if stage.changed_deps() or stage.changed_stage():
            return "stale"
        return "missing" if stage.changed_outs() else "fresh"


def _address(repo: Any, name: str) -> str:
    """Return an address of a stage that does not depend on the working directory."""
    return f"{Path(repo.root_dir) / 'dvc.yaml'}:{name}"


def _stage(repo: Any, name: str, pins: Pins = _UNPINNED) -> Any:
    stage = repo.stage.load_one(path=str(Path(repo.root_dir) / "dvc.yaml"), name=name)
    stage.deps = [_pinned(dep, pins[dep.def_path]) if dep.def_path in pins else dep for dep in stage.deps]
    return stage


def _pinned(dependency: Any, pin: Pin) -> Any:
    """Return a dependency of a stage that is what was pinned, whatever there is now: no file of it is looked at."""
    from dvc.dependency.base import Dependency
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.meta import Meta

    class Pinned(Dependency):  # type: ignore[misc]
        exists = True

        def _get_hash_meta(self) -> tuple[Any, Any]:
            return Meta(isdir=pin.md5.endswith(".dir"), size=pin.size, nfiles=pin.files), HashInfo("md5", pin.md5)

        def save(self) -> None:
            self.meta, self.hash_info = self._get_hash_meta()

    pinned = Pinned(dependency.stage, dependency.def_path)
    pinned.meta, pinned.hash_info = dependency.meta, dependency.hash_info  # as dvc.lock records them
    return pinned


def is_fresh(root: Path, name: str, pins: Pins = _UNPINNED) -> bool:
    """Return whether a stage need not run: its dependencies, parameters and command are as recorded."""
    with lock.recording(root), _repo(root) as repo:
        return _state(repo, name, pins) != "stale"


def has_stage(root: Path, name: str) -> bool:
    """Return whether dvc.yaml lists a stage."""
    with _repo(root) as repo:
        return any(stage.addressing == name for stage in repo.index.stages)


def run_stage(root: Path, name: str, function: Callable[[], None], pins: Pins = _UNPINNED) -> bool:
    """Bring a stage up to date in this process and record it in dvc.lock; return whether it had to run.

    A stage whose dependencies, parameters and command are unchanged does not run; missing or damaged outputs are restored from the cache.

    Args:
        pins: dependencies that count as they were pinned, by path. What is there now may differ.

    Raises:
        WorkspaceError: a dependency is missing, or a dependency, a parameter or the command changed while the stage ran; then nothing
            is recorded.
    """
    with lock.recording(root), _repo(root) as repo:
        state = _state(repo, name, pins)
        if state == "fresh" and not _damaged(repo, name):
            return False
        if state != "stale" and _restore(repo, name, pins):
            return False
        _require_inputs(repo, name, pins)
        before = _dependencies(repo, name, pins)
    function()
    with lock.recording(root), _repo(root) as repo:
        after = _dependencies(repo, name, pins)
        if after != before:
            changed = ", ".join(path for path in sorted(before | after) if after.get(path) != before.get(path))
            raise WorkspaceError(f"{changed} changed while the stage {name} ran. Nothing was recorded; run again.")
        _record(repo, name, pins)
    return True


def _record(repo: Any, name: str, pins: Pins) -> None:
    """Record a stage in dvc.lock, as `dvc commit --force` does."""
    stage = _stage(repo, name, pins)
    with repo.lock:
        stage.save()
        stage.commit()
        stage.dump(update_pipeline=False)


def require_inputs(root: Path, name: str) -> None:
    """Check that all inputs of a stage exist.

    Raises:
        WorkspaceError: one is missing.
    """
    with _repo(root) as repo:
        _require_inputs(repo, name)


def _require_inputs(repo: Any, name: str, pins: Pins = _UNPINNED) -> None:
    if missing := [d.def_path for d in _stage(repo, name, pins).deps if not d.exists]:
        raise WorkspaceError(
            f"The stage {name} needs {', '.join(missing)}, found no such file. "
            "Run the stages before it (`dvc repro`); in a clone, fetch missing files (`dvc pull`)."
        )


def _restore(repo: Any, name: str, pins: Pins) -> bool:
    """Restore the outputs of a stage from the cache; return whether they are as recorded. What is damaged there is removed."""
    for out in _damaged(repo, name):
        unlink(Path(out.fs_path))  # DVC takes it for unchanged, and would leave it
    try:
        repo.checkout(targets=[_address(repo, name)], force=True)
    except _dvc_error():
        return False
    if _state(repo, name, pins) != "fresh":
        return False
    damaged = _damaged(repo, name)
    for out in damaged:
        listed = out.get_obj() if out.hash_info.isdir else None
        _remove_damaged(repo, [out.hash_info.value, *(info.value for _, _, info in listed or ())])
    return not damaged


def _damaged(repo: Any, name: str) -> list[Any]:
    """Return the outputs of a stage whose content is not what dvc.lock records. DVC itself trusts the time and size of a file."""
    return [
        out
        for out in _stage(repo, name).outs
        if out.exists and out.hash_info.name == "md5" and content_md5(Path(out.fs_path)) != out.hash_info.value
    ]


def _dependencies(repo: Any, name: str, pins: Pins) -> dict[str, str]:
    """Return everything that a stage depends on now: the hash of each file, its parameters, and its command."""
    stage = _stage(repo, name, pins)
    dependencies = {"dvc.yaml": str(stage.cmd)}
    for dependency in stage.deps:
        if dependency.def_path == "params.yaml":
            dependencies["params.yaml"] = json.dumps(dependency.read_params(flatten=True), sort_keys=True, default=str)
        else:
            dependencies[dependency.def_path] = str(dependency.get_hash().value)
    return dependencies


def stage_key(root: Path, name: str, pins: Pins = _UNPINNED) -> str:
    """Return a hash of everything that a stage depends on now: dependencies, parameters, command."""
    with _repo(root) as repo:
        return hashlib.md5(json.dumps(_dependencies(repo, name, pins), sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def stage_output(root: Path, name: str, path: str, revision: str | None = None) -> str:
    """Return the hash of a stage's output in dvc.lock, now or at a revision; "" if there is none."""
    return _locked(root, name, "outs", path, revision)


def stage_input(root: Path, name: str, path: str, revision: str | None = None) -> str:
    """Return the hash of a stage's dependency in dvc.lock, now or at a revision; "" if there is none."""
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


# --- DVC ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _repo(root: Path) -> Iterator[Any]:
    silence()
    from dvc.repo import Repo

    # DVC reads some paths (of its run cache or a remote) from the working directory, not from the repository's.
    root = root.resolve()
    try:
        with lock.disk_errors(root), chdir(root), Repo(str(root)) as repo:
            _repair(repo)
            yield repo
    except ImportError as error:  # packages of a remote are imported at first use
        raise _not_installed(error) from error
    except _dvc_error() as error:  # no repository, an unreadable dvc.yaml, another running DVC command
        raise WorkspaceError(f"DVC failed in {root}: {error}. Fix this (`dvc status` shows it too), and run again.") from error


def _repair(repo: Any) -> None:
    """Remove DVC's list of readers and writers if a kill truncated it: DVC writes it in place and cannot work with a broken one."""
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    path = Path(repo.tmp_dir) / RWLOCK_FILE
    if is_truncated_json(path):
        # Checked again under DVC's own lock, since another DVC command may just be writing it.
        with make_lock(
            str(path.with_name(RWLOCK_LOCK)), tmp_dir=repo.tmp_dir, hardlink_lock=repo.config["core"].get("hardlink_lock", False)
        ):
            if is_truncated_json(path):
                path.unlink()


def _dvc_error(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the DVC errors that users can fix, and these others; errors of DVC's own parts have no common base class."""
    from dvc.exceptions import DvcException
    from dvc.fs import AuthError, ConfigError, RemoteMissingDepsError
    from dvc_data.hashfile.build import IgnoreInCollectedDirError

    return (DvcException, AuthError, ConfigError, RemoteMissingDepsError, IgnoreInCollectedDirError, *others)
