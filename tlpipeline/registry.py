"""Versions of models as git tags by GTO: `name@v1.2.0` for a version, `name#prod#3` for the third promotion to prod.

A version stands on the commit whose dvc.lock holds the model. It becomes visible last: files are pushed, then the commit is made, then the
tag. The history of promotions is append-only; a rollback is one more promotion.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlpipeline import versioning
from tlpipeline.dataset import TRAIN, VAL, read_manifest
from tlpipeline.errors import RegistryError, WorkspaceError, nearest

PROD = "prod"
CARD = "MODEL_CARD.md"
_VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, order=True)
class Version:
    """A registered model: its number, the commit it stands on, and the stages that it is in now."""

    number: tuple[int, int, int]
    name: str
    commit: str
    stages: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}@v{'.'.join(map(str, self.number))}"


def versions(root: Path, name: str) -> list[Version]:
    """Return all versions of a model, oldest first."""
    tags = versioning.tags(root)
    now: dict[str, list[str]] = {}
    for stage in sorted({tag.split("#")[1] for tag in tags if tag.startswith(f"{name}#")}):
        history = _assignments(tags, name, stage)
        if history:
            now.setdefault(history[-1], []).append(stage)
    found = []
    for tag, commit in tags.items():
        if tag.startswith(f"{name}@") and (match := _VERSION.fullmatch(tag.partition("@")[2])):
            major, minor, patch = (int(part) for part in match.groups())
            found.append(Version((major, minor, patch), name, commit, tuple(now.get(commit, ()))))
    return sorted(found)


def _assignments(tags: dict[str, str], name: str, stage: str) -> list[str]:
    """Return the commits that were promoted to a stage, in order."""
    prefix = f"{name}#{stage}#"
    return [tags[tag] for tag in sorted((t for t in tags if t.startswith(prefix)), key=lambda t: int(t[len(prefix) :]))]


def champion(root: Path, name: str) -> Version | None:
    """Return the version in stage prod, else the newest registered one, else None."""
    known = versions(root, name)
    return next((v for v in known if PROD in v.stages), known[-1] if known else None)


def resolve(root: Path, text: str) -> Version:
    """Return the version that a text means: `name@v1.2.0`, `name@v1` (the newest of them), `name@latest`, or `name#prod`.

    Raises:
        RegistryError: there is none.
    """
    name = re.split("[@#]", text)[0]
    known = versions(root, name)
    if not known:
        names = sorted({t.partition("@")[0] for t in versioning.tags(root) if "@" in t})
        raise RegistryError(
            f"expected a registered model, found no versions of {name!r}; {nearest(name, names) if names else 'nothing is registered yet: `tlpipeline run`.'}"
        )
    if "#" in text:
        stage = text.partition("#")[2]
        for version in known:
            if stage in version.stages:
                return version
        raise RegistryError(
            f"expected a version of {name} in stage {stage!r}, found none. Promote one: `tlpipeline registry promote {known[-1]}`."
        )
    wanted = text.partition("@")[2]
    if wanted in ("", "latest"):
        return known[-1]
    parts = tuple(wanted.removeprefix("v").split("."))
    for version in reversed(known):
        if tuple(map(str, version.number))[: len(parts)] == parts:
            return version
    raise RegistryError(f"expected a version of {name}, found {wanted!r}; registered: {', '.join(str(v) for v in known)}.")


def folder(root: Path, version: Version, place: Path | None = None) -> Path:
    """Return the model folder of a version, fetched from DVC's cache or remote where it is not here yet.

    Args:
        place: folder to fetch it to; None keeps it in the workspace.
    """
    target = root / ".tlpipeline" / "models" / str(version)
    if not target.is_dir():
        target = (place or target.parent) / target.name
        draft = target.with_name(f".{target.name}.draft")
        versioning.unlink(draft)
        draft.parent.mkdir(parents=True, exist_ok=True)
        versioning.get(root, version.commit, "model", draft)
        draft.rename(target)
    return target


def trained_on(root: Path, version: Version) -> frozenset[str]:
    """Return the md5 of the images that a version was trained or validated on."""
    path = root / ".tlpipeline" / "models" / f"{version}.manifest.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        versioning.get(root, version.commit, "manifest.parquet", path)
    return frozenset(row.md5 for row in read_manifest(path).used(TRAIN, VAL))


def registered_as(root: Path, name: str, model_hash: str) -> Version | None:
    """Return the version that already holds this very model, if any."""
    for version in reversed(versions(root, name)):
        if model_hash and versioning.stage_output(root, "train", "model", version.commit) == model_hash:
            return version
    return None


def next_number(root: Path, name: str, classes: Sequence[str], case: str) -> tuple[int, int, int]:
    """Return the number of the next version: a patch for new weights, a minor step where the case or the classes changed."""
    known = versions(root, name)
    if not known:
        return (0, 1, 0)
    major, minor, patch = known[-1].number
    before = json.loads(versioning.show(root, known[-1].commit, "case.json") or "{}").get("case")
    tested = json.loads(versioning.show(root, known[-1].commit, "classes.json") or "{}")
    if before != case or sorted(tested) != sorted(classes):
        return (major, minor + 1, 0)
    return (major, minor, patch + 1)


def publish(root: Path, name: str, number: tuple[int, int, int], message: str, paths: Sequence[str]) -> Version:
    """Register the model of the present dvc.lock: push the files, commit, tag, push the commit and the tag; in that order.

    Raises:
        WorkspaceError: the files could not be pushed; nothing is registered then.
        RegistryError: somebody else registered this number first; the local tag is taken back.
    """
    versioning.fetch_tags(root)
    versioning.push(root)
    text = f"v{'.'.join(map(str, number))}"
    commit = versioning.commit(root, message, paths)
    try:
        versioning.gto(root, "register", name, "HEAD", "--version", text, "--message", message)
    except WorkspaceError as error:
        raise RegistryError(f"expected to register {name}@{text}, but: {error}. Run again: the next number is taken then.") from error
    try:
        versioning.push_git(root)
    except WorkspaceError as error:
        versioning.delete_tag(root, f"{name}@{text}")
        raise RegistryError(f"expected to publish {name}@{text}, but: {error}. The tag is taken back; pull, and run again.") from error
    return Version(number, name, commit)


def promote(root: Path, version: Version, stage: str = PROD) -> str:
    """Put a version into a stage, and return the tag that says so.

    Raises:
        RegistryError: GTO refuses, or the tag cannot be pushed. WorkspaceError: the workspace cannot be written.
    """
    versioning.require_writable(root)
    number = f"v{'.'.join(map(str, version.number))}"
    versioning.fetch_tags(root)  # somebody else may have promoted another one meanwhile
    try:
        versioning.gto(root, "assign", version.name, "--version", number, "--stage", stage, "--force")
    except WorkspaceError as error:
        raise RegistryError(f"expected to promote {version} to {stage}, but: {error}") from error
    tag = max((t for t in versioning.tags(root) if t.startswith(f"{version.name}#{stage}#")), key=lambda t: int(t.rsplit("#", 1)[1]))
    try:
        versioning.push_git(root)
    except WorkspaceError as error:
        versioning.delete_tag(root, tag)
        raise RegistryError(f"expected to publish the promotion {tag}, but: {error}. It is taken back; pull, and promote again.") from error
    return tag


def rollback(root: Path, name: str, stage: str = PROD) -> tuple[Version, Version]:
    """Put the version back into a stage that was in it before the present one came in; return (present, restored).

    Raises:
        RegistryError: there is no earlier one.
    """
    by_commit = {v.commit: v for v in versions(root, name)}
    history = [by_commit[c] for c in _assignments(versioning.tags(root), name, stage) if c in by_commit]
    if not history:
        raise RegistryError(f"expected a version of {name} in stage {stage}, found none, so there is nothing to roll back.")
    before = history[: history.index(history[-1])]
    if not before:
        raise RegistryError(
            f"expected a version that was in {stage} before {history[-1]}, found none. Promote another: `tlpipeline registry promote NAME@VERSION`."
        )
    promote(root, before[-1], stage)
    return history[-1], before[-1]
