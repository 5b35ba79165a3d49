"""The only driver of git, and of GTO, which writes git tags: commits, tags, what stood in a file at a revision, the remote `origin`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tlpipeline.errors import WorkspaceError


def run(root: Path, *arguments: str, check: bool = True) -> str:
    """Run git in the workspace and return what it printed.

    Raises:
        WorkspaceError: it failed (with `check`), or git is not installed.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        if not root.is_dir():
            raise WorkspaceError(f"expected a workspace at {root}, found no such folder. Name another with --workspace.") from error
        raise WorkspaceError(
            "expected git on this machine, found none. Install it: versions of data and models are git commits and tags."
        ) from error
    if check and done.returncode:
        raise WorkspaceError(f"git {' '.join(arguments[:2])} failed in {root}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def commit(root: Path, message: str, paths: Sequence[str]) -> str:
    """Commit those of these paths that exist or are known to git; return the commit (the present one where nothing changed)."""
    there = [p for p in paths if (root / p).exists() or run(root, "ls-files", "--", p)]
    run(root, "add", "--all", "--", *there)
    if run(root, "diff", "--cached", "--name-only", "--", *there):
        run(root, "commit", "--quiet", "-m", message, "--", *there)
    return head(root)


def head(root: Path) -> str:
    """Return the present commit, or "" before the first."""
    return run(root, "rev-parse", "--verify", "--quiet", "HEAD", check=False)


def has_origin(root: Path) -> bool:
    """Say whether there is a remote `origin`."""
    return "origin" in run(root, "remote").split()


def require_branch(root: Path) -> None:
    """Check that there is a branch to push, and that it can be, where there is a remote `origin`.

    Raises:
        WorkspaceError: the HEAD is detached, or origin is a folder in which somebody works on this branch.
    """
    if not has_origin(root):
        return
    branch = run(root, "symbolic-ref", "--quiet", "HEAD", check=False)
    if not branch:
        raise WorkspaceError(
            f"expected a branch to push to origin, but the HEAD of {root} is detached, at {head(root)[:10]}. "
            "Switch to one (`git switch main`), or make one of what is there (`git switch -c NAME`)."
        )
    # A clone of a workspace has that workspace as origin, and git would refuse only when all is trained.
    origin = root / run(root, "remote", "get-url", "--push", "origin").removeprefix("file://")
    if origin.is_dir() and _refuses(origin, branch):
        name = branch.removeprefix("refs/heads/")
        raise WorkspaceError(
            f"expected an origin that takes what is pushed, but in {origin} somebody works on the same branch, {name}, and git refuses that. "
            f"Work on another branch here (`git switch -c NAME`), name a bare repository (`git clone --bare {origin} FOLDER`, "
            "`git remote set-url origin FOLDER`), or keep to this machine (`git remote remove origin`)."
        )


def _refuses(origin: Path, branch: str) -> bool:
    """Say whether a folder refuses a push to a branch because it is checked out there."""
    worked_in = run(origin, "rev-parse", "--is-bare-repository", check=False) == "false"
    forbidden = run(origin, "config", "receive.denyCurrentBranch", check=False) in ("", "true", "refuse")
    return worked_in and forbidden and run(origin, "symbolic-ref", "--quiet", "HEAD", check=False) == branch


def push(root: Path) -> bool:
    """Push the branch and its tags to the remote `origin`, if there is one; say whether there is.

    Raises:
        WorkspaceError: the HEAD is detached, or origin refuses.
    """
    if not has_origin(root):
        return False
    require_branch(root)
    run(root, "push", "--quiet", "--set-upstream", "origin", "HEAD")
    run(root, "push", "--quiet", "--tags", "origin")
    return True


def fetch_tags(root: Path) -> None:
    """Fetch the tags of the remote `origin`, if there is one."""
    if has_origin(root):
        run(root, "fetch", "--tags", "origin")


def tags(root: Path) -> dict[str, str]:
    """Return each tag with the commit that it stands on, the oldest first."""
    lines = run(
        root, "for-each-ref", "refs/tags", "--sort=creatordate", "--format=%(refname:short) %(objectname) %(*objectname)"
    ).splitlines()
    return {parts[0]: parts[-1] for parts in (line.split() for line in lines)}


def delete_tag(root: Path, tag: str) -> None:
    """Delete a local tag."""
    run(root, "tag", "--delete", tag)


def read_at(root: Path, revision: str, path: str) -> str | None:
    """Return the text of a git file at a revision, or None where it is not there."""
    if run(root, "cat-file", "-t", f"{revision}:./{path}", check=False) != "blob":
        return None
    return run(root, "show", f"{revision}:./{path}")


def gto(root: Path, *arguments: str) -> None:
    """Run GTO, which writes the tags of versions and stages, in a process of its own.

    Importing GTO reconfigures the logging of the whole process; while Prefect sends its logs that ends in a deadlock.

    Raises:
        WorkspaceError: GTO refused.
    """
    command = [sys.executable, "-c", "from gto.cli import app; app()", *arguments]
    silent = {"ITERATIVE_DO_NOT_TRACK": "1", **os.environ}  # a user's own setting wins
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=silent)
    if done.returncode:
        raise WorkspaceError(f"gto {arguments[0]}: {(done.stderr or done.stdout).strip()}")
