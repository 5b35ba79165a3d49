"""Versions of models as git tags by GTO: `name@v1.2.0` for a version, `name#prod#3` for the third promotion to prod.

What `gto deprecate` withdraws is a tag, too: `name@v1.2.0!` a version, `name#prod!#4` its promotion, `name@deprecated` the whole model.

A version stands on the commit whose dvc.lock holds the model. It becomes visible last: files are pushed, then the commit is made, then the
tag. The history of promotions is append-only; a rollback is one more promotion.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tlpipeline.data.dataset import read_manifest
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.errors import RegistryError, WorkspaceError, nearest
from tlpipeline.files import unlink, write_json
from tlpipeline.versioning import dvc, git, lock

PROD = "prod"
CARD = "MODEL_CARD.md"
_BEGUN = ".tlpipeline/publishing.json"  # what is registered, but not yet published and promoted as it was to be
# What GTO writes behind the name of a model; other tags are none of ours.
_TAG = re.compile(r"(#(?P<stage>[^#@!]+)|@v(?P<major>\d+)\.(?P<minor>\d+)\.(?P<patch>\d+)|@deprecated)(?P<off>!?)(#(?P<count>\d+))?")


@dataclass(frozen=True, order=True)
class Version:
    """A registered model: its number, the commit it stands on, and the stages that it is in now."""

    number: tuple[int, int, int]
    name: str
    commit: str
    stages: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}@v{'.'.join(map(str, self.number))}"


@dataclass(frozen=True)
class _Event:
    """A tag of GTO: a version or a stage of a commit, or neither for the whole model; `off` where that was withdrawn."""

    tag: str
    commit: str
    number: tuple[int, int, int] | None
    stage: str | None
    off: bool
    count: int


def _events(root: Path, name: str) -> list[_Event]:
    """Return what became of a model, in the order in which it did: as GTO counted, by time where it gave no number."""
    found = []
    for at, (tag, commit) in enumerate(git.tags(root).items()):
        if tag.startswith(name) and (match := _TAG.fullmatch(tag, len(name))):
            number = (int(match["major"]), int(match["minor"]), int(match["patch"])) if match["major"] else None
            found.append((at, _Event(tag, commit, number, match["stage"], bool(match["off"]), int(match["count"] or 0))))
    counted = sorted((event.count, at) for at, event in found if event.count)
    # A clock that is behind does not put a promotion before those that it was counted after.
    late = dict(zip((count for count, _ in counted), accumulate((at for _, at in counted), max), strict=True))
    return [event for _, event in sorted(found, key=lambda f: (late.get(f[1].count, f[0]), f[1].count))]


def versions(root: Path, name: str, withdrawn: bool = False) -> list[Version]:
    """Return all versions of a model, oldest first; those that were withdrawn only if asked for."""
    events = _events(root, name)
    if not withdrawn and events and not (events[-1].number or events[-1].stage):
        return []  # the whole model, and nothing became of it since
    last = {event.number: event for event in events if event.number}  # the last word about each
    known = {number: event.commit for number, event in last.items() if withdrawn or not event.off}
    now: dict[str, list[str]] = {}
    for stage in sorted({event.stage for event in events if event.stage}):
        if history := [commit for commit in _assignments(events, stage) if commit in known.values()]:
            now.setdefault(history[-1], []).append(stage)
    return sorted(Version(number, name, commit, tuple(now.get(commit, ()))) for number, commit in known.items())


def _assignments(events: Iterable[_Event], stage: str) -> list[str]:
    """Return the commits that were promoted to a stage, in order, without those that were taken out of it since."""
    held: list[str] = []
    for event in events:
        if event.stage == stage:
            held = [commit for commit in held if commit != event.commit] if event.off else [*held, event.commit]
    return held


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
        if versions(root, name, withdrawn=True):
            raise RegistryError(
                f"expected a registered model, found only withdrawn versions of {name!r}. `tlpipeline run` registers the next one."
            )
        names = sorted({t.partition("@")[0] for t in git.tags(root) if "@" in t})
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


def model_folder(root: Path, version: Version, place: Path | None = None) -> Path:
    """Return the model folder of a version, fetched from DVC's cache or remote where it is not here yet.

    Args:
        place: folder to fetch it to; None keeps it in the workspace.
    """
    target = root / ".tlpipeline" / "models" / str(version)
    if not target.is_dir():
        target = (place or target.parent) / target.name
        draft = target.with_name(f".{target.name}.draft")
        unlink(draft)
        draft.parent.mkdir(parents=True, exist_ok=True)
        dvc.download(root, version.commit, "model", draft)
        draft.rename(target)
    return target


def trained_on(root: Path, version: Version) -> frozenset[str]:
    """Return the md5 of the images that a version was trained or validated on."""
    path = root / ".tlpipeline" / "models" / f"{version}.manifest.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        dvc.download(root, version.commit, "manifest.parquet", path)
    return frozenset(row.md5 for row in read_manifest(path).used(TRAIN, VAL))


def find_registered(root: Path, name: str, model_hash: str) -> Version | None:
    """Return the version that already holds this very model, if any, withdrawn or not."""
    for version in reversed(versions(root, name, withdrawn=True)):
        if model_hash and dvc.stage_output(root, "train", "model", version.commit) == model_hash:
            return version
    return None


def next_number(root: Path, name: str, classes: Sequence[str], case: str) -> tuple[int, int, int]:
    """Return the number of the next version: a patch for new weights, a minor step where the case or the classes changed.

    The number of a version that was withdrawn is not given again.
    """
    known = versions(root, name, withdrawn=True)
    if not known:
        return (0, 1, 0)
    major, minor, patch = known[-1].number
    before = json.loads(git.read_at(root, known[-1].commit, "case.json") or "{}").get("case")
    tested = json.loads(git.read_at(root, known[-1].commit, "classes.json") or "{}")
    if before != case or sorted(tested) != sorted(classes):
        return (major, minor + 1, 0)
    return (major, minor, patch + 1)


def publish(
    root: Path, name: str, number: tuple[int, int, int], message: str, paths: Sequence[str], stage: str = ""
) -> tuple[Version, str]:
    """Register the model of the present dvc.lock: push the files, commit, tag, push the commit and the tag, promote; in that order.

    Args:
        stage: to put the version into at once.

    Returns:
        The version, and the tag of its promotion.

    Raises:
        WorkspaceError: the files could not be pushed; nothing is registered then.
        RegistryError: somebody else registered this number first; the local tag is taken back.
    """
    git.fetch_tags(root)
    dvc.push(root)
    text = f"v{'.'.join(map(str, number))}"
    version = Version(number, name, git.commit(root, message, paths))
    write_json({"name": name, "version": str(version), "stage": stage, "before": _latest(root, name, stage)}, root / _BEGUN)
    try:
        git.gto(root, "register", name, "HEAD", "--version", text, "--message", message)
    except WorkspaceError as error:
        (root / _BEGUN).unlink()
        raise RegistryError(f"expected to register {version}, but: {error}. Run again: the next number is taken then.") from error
    _, promoted = _go_on(root, version, stage)
    return version, promoted


def resume_publication(root: Path, promoting: bool) -> tuple[Version, str] | None:
    """Publish what an earlier run registered and was killed before it had published, and promote it if that run was to and none was since.

    Args:
        promoting: promote it, if it was to be.

    Returns:
        The version, and the tag of its promotion; None where there is nothing to go on with.

    Raises:
        RegistryError: as `publish`.
    """
    if not (root / _BEGUN).exists():
        return None
    begun = json.loads((root / _BEGUN).read_text(encoding="utf-8"))
    version = next((v for v in versions(root, begun["name"]) if str(v) == begun["version"]), None)
    if version is None:  # the kill came before the tag, or it was withdrawn
        (root / _BEGUN).unlink()
        return None
    return _go_on(root, version, begun["stage"] if promoting else "")


def _go_on(root: Path, version: Version, stage: str) -> tuple[Version, str]:
    begun = json.loads((root / _BEGUN).read_text(encoding="utf-8"))
    try:
        git.push(root)
    except WorkspaceError as error:
        if begun.get("pushed"):
            raise RegistryError(f"expected to publish what became of {version}, but: {error}. Mend that, and run again.") from error
        git.delete_tag(root, str(version))
        (root / _BEGUN).unlink()
        raise RegistryError(f"expected to publish {version}, but: {error}. The tag is taken back; pull, and run again.") from error
    write_json(begun | {"pushed": True}, root / _BEGUN)
    promoted = promote(root, version, stage, begun["before"]) if stage else ""
    (root / _BEGUN).unlink()
    return version, promoted


def _latest(root: Path, name: str, stage: str) -> str:
    """Return the tag of the last promotion to a stage, or of the end of one; "" where there was none."""
    return next((event.tag for event in reversed(_events(root, name)) if event.stage == stage), "")


def promote(root: Path, version: Version, stage: str = PROD, unless_since: str | None = None) -> str:
    """Put a version into a stage, and return the tag that says so.

    Args:
        unless_since: the tag of the last promotion to this stage that is known of; if there was another since, nothing is done.

    Raises:
        RegistryError: GTO refuses, or the tag cannot be pushed. WorkspaceError: the workspace cannot be written.
    """
    lock.require_writable(root)
    number = f"v{'.'.join(map(str, version.number))}"
    git.fetch_tags(root)  # somebody else may have promoted another one meanwhile
    if unless_since is not None and _latest(root, version.name, stage) != unless_since:
        return ""
    try:
        git.gto(root, "assign", version.name, "--version", number, "--stage", stage, "--force")
    except WorkspaceError as error:
        raise RegistryError(f"expected to promote {version} to {stage}, but: {error}") from error
    tag = max((event for event in _events(root, version.name) if event.stage == stage and not event.off), key=lambda e: e.count).tag
    try:
        git.push(root)
    except WorkspaceError as error:
        git.delete_tag(root, tag)
        raise RegistryError(f"expected to publish the promotion {tag}, but: {error}. It is taken back; pull, and promote again.") from error
    return tag


def rollback(root: Path, name: str, stage: str = PROD) -> tuple[Version, Version]:
    """Put the version back into a stage that was in it before the present one came in; return (present, restored).

    Raises:
        RegistryError: there is no earlier one.
    """
    by_commit = {v.commit: v for v in versions(root, name)}
    history = [by_commit[c] for c in _assignments(_events(root, name), stage) if c in by_commit]
    if not history:
        raise RegistryError(f"expected a version of {name} in stage {stage}, found none, so there is nothing to roll back.")
    before = history[: history.index(history[-1])]
    if not before:
        raise RegistryError(
            f"expected a version that was in {stage} before {history[-1]}, found none. Promote another: `tlpipeline registry promote NAME@VERSION`."
        )
    promote(root, before[-1], stage)
    return history[-1], before[-1]
