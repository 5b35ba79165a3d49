"""The only module that calls git, and GTO, which writes git tags: commits, tags, files at a revision, the remote `origin`."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tlpipeline.environment import patience
from tlpipeline.errors import Unreachable, WorkspaceError


def run(root: Path, *arguments: str, check: bool = True, variables: Mapping[str, str] | None = None) -> str:
    """Run git in the workspace and return what it printed.

    Args:
        check: raise an error if it fails.
        variables: of the environment, besides those of this process.

    Raises:
        WorkspaceError: git failed (with `check`) or is not installed.
    """
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(variables or {})},
        )
    except FileNotFoundError as error:
        if not root.is_dir():
            raise WorkspaceError(f"expected a workspace at {root}, found no such folder. Name another with --workspace.") from error
        raise WorkspaceError(
            "expected git on this machine, found none. Install it: versions of data and models are git commits and tags."
        ) from error
    if check and done.returncode:
        raise WorkspaceError(f"git {' '.join(arguments[:2])} failed in {root}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def commit(root: Path, message: str, paths: Sequence[str], onto: str = "") -> str:
    """Commit those of these paths that exist or are tracked; return the commit, or the present one if nothing changed.

    Args:
        onto: an earlier commit of the branch, which these paths follow. It is then merged: the branch has the paths, and all that it had.
    """
    present = [p for p in paths if (root / p).exists() or run(root, "ls-files", "--", p)]
    if onto and onto != head(root):
        return _commit_onto(root, message, present, onto)
    run(root, "add", "--all", "--", *present)
    if run(root, "diff", "--cached", "--name-only", "--", *present):
        run(root, "commit", "--quiet", "-m", message, "--", *present)
    return head(root)


def _commit_onto(root: Path, message: str, paths: Sequence[str], onto: str) -> str:
    """Commit paths as they are now on top of an earlier commit, and merge it into the branch; return the commit, not the merge."""
    present = head(root)
    with TemporaryDirectory() as folder:

        def tree(start: str) -> str:
            index = {"GIT_INDEX_FILE": str(Path(folder) / start)}
            run(root, "read-tree", start, variables=index)
            run(root, "add", "--all", "--", *paths, variables=index)
            return run(root, "write-tree", variables=index)

        made = run(root, "commit-tree", tree(onto), "-p", onto, "-m", message)
        merge = run(root, "commit-tree", tree(present), "-p", present, "-p", made, "-m", f"Merge the run on earlier data: {message}")
    run(root, "update-ref", "-m", message, "HEAD", merge, present)
    run(root, "add", "--all", "--", *paths)
    return made


def contents_since(root: Path, mark: str, pattern: str) -> list[str]:
    """Return the text of each file of a pattern in each commit that changed it: since the commit of a ref, or ever if there is no such ref."""
    known = run(root, "rev-parse", "--verify", "--quiet", mark, check=False)
    limit = [f"^{known}"] if known else []
    lines = run(
        root, "-c", "core.quotePath=false", "log", "--format=:%H", "--name-only", "--diff-filter=d", "HEAD", *limit, "--", pattern
    ).splitlines()
    texts, commit = [], ""
    for line in filter(None, lines):
        if line.startswith(":"):
            commit = line[1:]
        else:
            texts.append(read_at(root, commit, line) or "")
    return texts


def head(root: Path) -> str:
    """Return the present commit, "" before the first one."""
    return run(root, "rev-parse", "--verify", "--quiet", "HEAD", check=False)


def has_origin(root: Path) -> bool:
    """Return whether there is a remote `origin`."""
    return "origin" in run(root, "remote").split()


def require_identity(root: Path) -> None:
    """Check that git knows whose commits these are: it would say so only after everything else is done.

    Raises:
        WorkspaceError: it does not.
    """
    if not all(run(root, "var", name, check=False) for name in ("GIT_AUTHOR_IDENT", "GIT_COMMITTER_IDENT")):
        raise WorkspaceError(
            f"expected a name and an e-mail address for git commits in {root}, found none. Set them: "
            "`git config --global user.name NAME` and `git config --global user.email ADDRESS`."
        )


def require_branch(root: Path) -> None:
    """Check that the present branch can be pushed, if there is a remote `origin`.

    Raises:
        WorkspaceError: HEAD is detached, or origin is a working folder on the same branch.
    """
    if not has_origin(root):
        return
    branch = run(root, "symbolic-ref", "--quiet", "HEAD", check=False)
    if not branch:
        raise WorkspaceError(
            f"expected a branch to push to origin, found a detached HEAD at {head(root)[:10]} in {root}. "
            "Switch to a branch (`git switch main`), or create one here (`git switch -c NAME`)."
        )
    # The origin of a cloned workspace is that workspace, and git would refuse the push only after training.
    origin = root / run(root, "remote", "get-url", "--push", "origin").removeprefix("file://")
    if origin.is_dir() and _refuses_push(origin, branch):
        name = branch.removeprefix("refs/heads/")
        raise WorkspaceError(
            f"git cannot push to {origin}, because the branch {name} is checked out there. "
            "Work on another branch here (`git switch -c NAME`), or remove the remote (`git remote remove origin`). "
            f"Or push to a bare repository (`git clone --bare {origin} FOLDER`, `git remote set-url origin FOLDER`)."
        )


def _refuses_push(origin: Path, branch: str) -> bool:
    """Return whether a folder refuses a push to a branch because that branch is checked out there."""
    worked_in = run(origin, "rev-parse", "--is-bare-repository", check=False) == "false"
    forbidden = run(origin, "config", "receive.denyCurrentBranch", check=False) in ("", "true", "refuse")
    return worked_in and forbidden and run(origin, "symbolic-ref", "--quiet", "HEAD", check=False) == branch


def _require_answer(root: Path) -> None:
    """Check that `origin` answers: git would wait for a silent one for ever. What it answers is left to the command that follows.

    Raises:
        Unreachable: it is silent.
    """
    seconds, nowhere = patience(), subprocess.DEVNULL
    asking = subprocess.Popen(["git", "ls-remote", "origin", "HEAD"], cwd=root, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        asking.wait(seconds)
    except BaseException as error:
        for process in [*psutil.Process(asking.pid).children(recursive=True), asking]:  # git leaves its ssh behind
            with suppress(psutil.NoSuchProcess):
                process.kill()
        asking.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise silent_remote("git", "origin", run(root, "remote", "get-url", "--push", "origin"), "git remote -v") from error


def silent_remote(kind: str, name: str, url: str, command: str) -> Unreachable:
    """Return the error for a remote that does not answer; the user and password of its URL are left out."""
    place = re.sub(r"//[^/@]*@", "//", url)
    return Unreachable(
        f"expected an answer from the {kind} remote {name} ({place}) within {patience():g} seconds, found none. Check the network and the "
        f"address (`{command}`), and run again. TLPIPELINE_TIMEOUT=300 waits for 300 seconds."
    )


def push(root: Path) -> bool:
    """Push the branch and its tags to the remote `origin`; return whether there is one.

    Raises:
        WorkspaceError: HEAD is detached, or origin refuses or is silent.
    """
    if not has_origin(root):
        return False
    require_branch(root)
    _require_answer(root)
    run(root, "push", "--quiet", "--set-upstream", "origin", "HEAD")
    run(root, "push", "--quiet", "--tags", "origin")
    return True


def require_push(root: Path) -> None:
    """Check that `origin` would take a push of the present branch, without pushing.

    Raises:
        WorkspaceError: it is silent, or refuses.
    """
    _require_answer(root)
    if head(root):
        run(root, "push", "--quiet", "--dry-run", "origin", "HEAD")


def fetch_tags(root: Path) -> None:
    """Fetch the tags of the remote `origin`, if there is one.

    Raises:
        WorkspaceError: it refuses, or is silent.
    """
    if has_origin(root):
        _require_answer(root)
        run(root, "fetch", "--tags", "origin")


def tags(root: Path) -> dict[str, str]:
    """Return each tag with its commit, "" where it is on something else, the oldest first."""
    form = "%(objecttype) %(objectname) %(*objecttype) %(*objectname)%09%(refname:short)"  # the second pair is empty for a plain tag
    lines = run(root, "for-each-ref", "refs/tags", "--sort=creatordate", f"--format={form}").splitlines()
    objects = {name: pairs.split()[-2:] for pairs, _, name in (line.partition("\t") for line in lines)}
    return {name: commit if kind == "commit" else "" for name, (kind, commit) in objects.items()}


def delete_tag(root: Path, tag: str) -> None:
    """Delete a local tag."""
    run(root, "tag", "--delete", tag)


def read_at(root: Path, revision: str, path: str) -> str | None:
    """Return the text of a file at a revision, None if it is not in git there."""
    if run(root, "cat-file", "-t", f"{revision}:./{path}", check=False) != "blob":
        return None
    return run(root, "show", f"{revision}:./{path}")


def bytes_at(root: Path, revision: str, path: str) -> bytes | None:
    """Return the content of a file at a revision, None if it is not in git there."""
    done = subprocess.run(["git", "show", f"{revision}:./{path}"], cwd=root, capture_output=True, stdin=subprocess.DEVNULL)
    return None if done.returncode else done.stdout


def gto(root: Path, *arguments: str) -> None:
    """Run GTO, which writes the tags of versions and stages, in a separate process.

    Importing GTO reconfigures the logging of the whole process, which can end in a deadlock with Prefect's logging.

    Raises:
        WorkspaceError: GTO failed.
    """
    command = [sys.executable, "-P", "-c", "from gto.cli import app; app()", *arguments]
    silent = {"ITERATIVE_DO_NOT_TRACK": "1", **os.environ}  # a user's setting wins
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, env=silent)
    if done.returncode:
        raise WorkspaceError(f"gto {arguments[0]}: {(done.stderr or done.stdout).strip()}")
