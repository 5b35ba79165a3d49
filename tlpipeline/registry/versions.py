"""Versions of models as git tags written by GTO: `name@v1.2.0` is a version, `name#prod#3` the third promotion to prod.

`gto deprecate` adds tags, too: `name@v1.2.0!` withdraws a version, `name#prod!#4` its promotion, `name@deprecated` the whole model.

A version is at the commit whose dvc.lock records the model. Its tag comes last: first the files are pushed, then the commit is made.
Promotions are only ever added; a rollback is another promotion.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from tlpipeline import records
from tlpipeline.alarms import Alarm, blocking
from tlpipeline.data.dataset import Manifest, read_manifest
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.errors import BackboneError, RegistryError, WorkspaceError, nearest
from tlpipeline.evaluation.verdict import Verdict
from tlpipeline.export.provenance import Provenance
from tlpipeline.files import write_json
from tlpipeline.params import load, network_of
from tlpipeline.registry import ledger
from tlpipeline.versioning import dvc, git, lock

T = TypeVar("T")
NONE = "none"
PROD = "prod"
CARD, ALARMS = "MODEL_CARD.md", "model_alarms.json"
_PENDING = ".tlpipeline/publishing.json"  # a version that is registered, but not yet published and promoted
# What GTO appends to a model's name; other tags do not belong to models.
_TAG = re.compile(r"(#(?P<stage>[^#@!]+)|@v(?P<major>\d+)\.(?P<minor>\d+)\.(?P<patch>\d+)|@deprecated)(?P<off>!?)(#(?P<count>\d+))?")


@dataclass(frozen=True, order=True)
class Version:
    """A registered model: its number, its commit, and its present stages."""

    number: tuple[int, int, int]
    name: str
    commit: str
    stages: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}@v{'.'.join(map(str, self.number))}"


@dataclass(frozen=True)
class Registration:
    """The result of registration.

    Attributes:
        version: of the model, new or registered earlier; "" if it is not registered.
        new: whether this run registered it.
        promoted: tag of its promotion, "" if there is none.
        verdict: of the gate, None if the model was registered earlier.
        reason: sentences for people.
        alarms: what is wrong with the data, the decision, the training or the test of the run, the gravest first.
    """

    version: str
    new: bool
    promoted: str
    verdict: Verdict | None
    reason: str
    alarms: tuple[Alarm, ...] = ()


@dataclass(frozen=True)
class _Event:
    """A GTO tag for a version, for a stage, or for the whole model if it names neither; `off` if it withdraws one."""

    tag: str
    commit: str
    number: tuple[int, int, int] | None
    stage: str | None
    off: bool
    count: int


def _events(root: Path, name: str) -> list[_Event]:
    """Return a model's tags in order: by GTO's count, or by time where a tag has no count."""
    events = []
    for index, (tag, commit) in enumerate(git.tags(root).items()):
        if tag.startswith(name) and (match := _TAG.fullmatch(tag, len(name))):
            if not commit:
                raise RegistryError(f"expected the tag {tag} on a commit, found it on another object. Delete it: `git tag --delete {tag}`.")
            number = (int(match["major"]), int(match["minor"]), int(match["patch"])) if match["major"] else None
            events.append((index, _Event(tag, commit, number, match["stage"], bool(match["off"]), int(match["count"] or 0))))
    counted = sorted((event.count, index) for index, event in events if event.count)
    # A wrong clock must not move a promotion before those that were counted earlier.
    order = dict(zip((count for count, _ in counted), accumulate((index for _, index in counted), max), strict=True))
    return [event for _, event in sorted(events, key=lambda f: (order.get(f[1].count, f[0]), f[1].count))]


def versions(root: Path, name: str, withdrawn: bool = False) -> list[Version]:
    """Return all versions of a model, oldest first; withdrawn ones only if asked for."""
    events = _events(root, name)
    if not withdrawn and events and not (events[-1].number or events[-1].stage):
        return []  # the whole model is withdrawn, and nothing was registered since
    latest = {event.number: event for event in events if event.number}  # the last word about each
    known = {number: event.commit for number, event in latest.items() if withdrawn or not event.off}
    stages_of: dict[str, list[str]] = {}
    for stage in sorted({event.stage for event in events if event.stage}):
        if history := [commit for commit in _assignments(events, stage) if commit in known.values()]:
            stages_of.setdefault(history[-1], []).append(stage)
    return sorted(Version(number, name, commit, tuple(stages_of.get(commit, ()))) for number, commit in known.items())


def _assignments(events: Iterable[_Event], stage: str) -> list[str]:
    """Return the commits promoted to a stage, in order, without those that were withdrawn since."""
    commits: list[str] = []
    for event in events:
        if event.stage == stage:
            commits = [commit for commit in commits if commit != event.commit] if event.off else [*commits, event.commit]
    return commits


def champion(root: Path, name: str) -> Version | None:
    """Return the version in stage prod, else the newest accepted version, else None.

    An undecided version is no champion: week after week, the next could be a little worse without being shown to be.
    """
    known = versions(root, name)
    return next((v for v in known if PROD in v.stages), None) or next((v for v in reversed(known) if is_accepted(root, v)), None)


def is_accepted(root: Path, version: Version) -> bool:
    """Return whether the gate or a person accepted a version. One without a recorded verdict was: earlier versions registered no other."""
    verdict = verdict_of(root, version)
    return verdict is None or verdict.accepted


def verdict_of(root: Path, version: Version) -> Verdict | None:
    """Return the verdict about a version as the ledger has it now, or as its commit has it; None if neither does.

    Raises:
        RegistryError: a ledger is damaged.
    """
    now = {entry.version: entry.verdict for entry in ledger.read(root)}
    if str(version) in now:
        return now[str(version)]
    # The branch may not have it: another clone registered it.
    then = ledger.parse(git.read_at(root, version.commit, ledger.LEDGER) or "", f"{ledger.LEDGER} of {version}")
    return next((entry.verdict for entry in then if entry.version == str(version)), None)


def _newest(root: Path, known: Sequence[Version]) -> Version:
    """Return the newest accepted version, or the newest if none is accepted."""
    return known[-1] if len(known) == 1 else next((v for v in reversed(known) if is_accepted(root, v)), known[-1])


def standing(root: Path, version: Version) -> str:
    """Return "accepted", "undecided" or "accepted by hand"."""
    verdict = verdict_of(root, version)
    return "accepted" if verdict is None else "accepted by hand" if verdict.because else verdict.outcome


def resolve(root: Path, text: str, accepted_first: bool = True) -> Version:
    """Return the version of a name: `name@v1.2.0`, `name@v1` (the newest 1.x), `name@latest`, or `name#prod`.

    Args:
        accepted_first: the newest is the newest that was accepted, if one was: an undecided version is not used by mistake.

    Raises:
        RegistryError: there is no such version.
    """
    name = re.split("[@#]", text)[0]
    known = versions(root, name)
    if not known:
        if versions(root, name, withdrawn=True):
            raise RegistryError(
                f"expected a registered model, found only withdrawn versions of {name!r}. `tlpipeline run` registers the next one."
            )
        names = sorted({t.partition("@")[0] for t in git.tags(root) if "@" in t})
        refused = 'the gate did not accept the last model; `tlpipeline registry accept --because "..."` registers it.'
        nothing = f"nothing is registered yet: {refused if ledger.read(root) else '`tlpipeline run`.'}"
        raise RegistryError(f"expected a registered model, found no versions of {name!r}; {nearest(name, names) if names else nothing}")
    if "#" in text:
        stage = text.partition("#")[2]
        for version in known:
            if stage in version.stages:
                return version
        raise RegistryError(f"expected a version of {name} in stage {stage!r}, found none. {_how_to_fill(known, stage)}")
    number = text.partition("@")[2]
    if number in ("", "latest"):
        return _newest(root, known) if accepted_first else known[-1]
    parts = tuple(number.removeprefix("v").split("."))
    if meant := [version for version in known if tuple(map(str, version.number))[: len(parts)] == parts]:
        return _newest(root, meant) if accepted_first else meant[-1]
    raise RegistryError(f"expected a version of {name}, found {number!r}; registered: {', '.join(str(v) for v in known)}.")


def _how_to_fill(known: Sequence[Version], stage: str) -> str:
    """Return what helps where no version is in a stage: another name, or the promotion that puts one there."""
    filled = sorted({stage for version in known for stage in version.stages})
    meant = difflib.get_close_matches(stage, {PROD, *filled}, n=1, cutoff=0.5) or [s for s in filled if stage.startswith(s)]
    promotion = f"`tlpipeline registry promote {known[-1]}"
    if stage == PROD:
        return f"Promote one: {promotion}`."
    if meant and meant[0] in filled:
        return f"Did you mean #{meant[0]}?"
    if meant:
        return f"Did you mean #{meant[0]}? No version is in it either; promote one: {promotion}`."
    there = f"Versions are in {', '.join(filled)}. " if filled else ""
    return f"{there}To promote one: {promotion} --stage {stage} --new-stage`."


def find_folder(root: Path, folder: Path) -> Version | None:
    """Return the version whose model is in a folder, as it is byte for byte; None if it is not registered."""
    return find_registered(root, load(root / "params.yaml").data.name, dvc.content_md5(folder))


def provenance_of(root: Path, version: Version) -> Provenance:
    """Return where a version comes from, for files that leave the workspace."""
    images = load(root / "params.yaml").data.images if (root / "params.yaml").is_file() else "images"
    data = dvc.stage_input(root, "ingest", images, version.commit)
    return Provenance(str(version), version.commit, data, case_of(root, version))


def model_folder(root: Path, version: Version, place: Path | None = None) -> Path:
    """Return the model folder of a version, fetched from DVC's cache or remote unless it is here as it was recorded.

    Args:
        place: folder to fetch it to; None is a folder in the workspace.

    Raises:
        WorkspaceError: neither has the model, or what they have is damaged.
    """
    return _output(root, version, "train", "model", place)


def trained_on(root: Path, version: Version) -> frozenset[str]:
    """Return the md5s of the images that a version was trained or validated on."""
    return frozenset(row.md5 for row in manifest_of(root, version).used(TRAIN, VAL))


def manifest_of(root: Path, version: Version) -> Manifest:
    """Return the manifest of the images that a version was made from."""
    return read_manifest(_output(root, version, "ingest", "manifest.parquet"))


def _output(root: Path, version: Version, stage: str, path: str, place: Path | None = None) -> Path:
    """Return an output of a stage as the commit of a version records it. It is kept under its hash: a tag can be moved, and a file altered."""
    recorded = dvc.stage_output(root, stage, path, version.commit)
    if not recorded:
        raise WorkspaceError(
            f"expected {path} of {version} in the dvc.lock of its commit {version.commit[:10]}, found none. Put the tag {version} back "
            "on the commit that registered it."
        )
    own = root / ".tlpipeline"
    kept = own / "models" / recorded
    if dvc.content_md5(kept) == recorded:
        return kept
    from filelock import FileLock

    target = (place or kept.parent) / recorded
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock((place or own) / "models.lock"):  # several may ask for the same version at once: one fetches it
        if dvc.content_md5(target) != recorded:
            dvc.download(root, version.commit, path, target)
    return target


def names_network(root: Path, network: str, code_md5: str = NONE) -> bool:
    """Return whether the workspace's params.yaml names a network and its code, now, in the last commit, or in that of a registered version.

    Args:
        code_md5: of the code that a model folder brings; "none" if it brings none, and the network is imported as it is.
    """

    def is_named(text: str | None) -> bool:
        name, known = network_of(text or "")
        return name == network and (code_md5 in (NONE, known) or code_md5 == _importable_md5(root, network))

    settings = root / "params.yaml"
    if settings.is_file() and is_named(settings.read_text(encoding="utf-8", errors="replace")):
        return True
    if not (root / ".git").exists():
        return False
    commits = {commit for tag, commit in git.tags(root).items() if re.search(r"@v\d+\.\d+\.\d+$", tag)}
    return any(is_named(git.read_at(root, commit, settings.name)) for commit in (*commits, git.head(root)) if commit)


def _importable_md5(root: Path, network: str) -> str:
    """Return the md5 of the code that importing a network would run, "" if it cannot be imported."""
    from tlpipeline.backbones import catalogue

    try:
        return catalogue.code_md5(network, root)
    except BackboneError:
        return ""


def find_registered(root: Path, name: str, model_hash: str) -> Version | None:
    """Return the version that contains this model, withdrawn or not, or None."""
    for version in reversed(versions(root, name, withdrawn=True)):
        if model_hash and dvc.stage_output(root, "train", "model", version.commit) == model_hash:
            return version
    return None


def next_number(root: Path, name: str, classes: Sequence[str], case: str) -> tuple[int, int, int]:
    """Return the number of the next version: a patch for new weights, a minor version if the case or the classes changed.

    Numbers of withdrawn versions are not used again.
    """
    known = versions(root, name, withdrawn=True)
    if not known:
        return (0, 1, 0)
    major, minor, patch = known[-1].number
    if case_of(root, known[-1]) != case or classes_of(root, known[-1]) != sorted(classes):
        return (major, minor + 1, 0)
    return (major, minor, patch + 1)


@dataclass(frozen=True)
class _Case:
    case: str = ""


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a version on its test images, with its interval; None where it has none."""

    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None


def case_of(root: Path, version: Version) -> str:
    """Return the case that a version was trained as, "" if it has none.

    Raises:
        RegistryError: the case.json of its commit is damaged.
    """
    return _committed(root, version, "case.json", _Case).case


def accuracy_of(root: Path, version: Version) -> Accuracy:
    """Return the accuracy of a version.

    Raises:
        RegistryError: the metrics.json of its commit is damaged.
    """
    return _committed(root, version, "metrics.json", Accuracy)


def classes_of(root: Path, version: Version) -> list[str]:
    """Return the classes of a version, sorted.

    Raises:
        RegistryError: the classes.json of its commit is damaged.
    """
    return sorted(_committed(root, version, "classes.json", dict[str, object]))


def alarms_of(root: Path, version: Version) -> tuple[Alarm, ...]:
    """Return the alarms with which a version was registered.

    Raises:
        RegistryError: the model_alarms.json of its commit is damaged.
    """
    return _committed(root, version, ALARMS, tuple[Alarm, ...], "[]")


def _committed(root: Path, version: Version, name: str, kind: type[T], missing: str = "{}") -> T:
    way_out = f"Look at it with `git show {version}:{name}`; `gto deprecate` withdraws the version."
    return records.parse(kind, git.read_at(root, version.commit, name) or missing, f"{name} of {version}", way_out, RegistryError)


@dataclass(frozen=True)
class _Pending:
    """The content of publishing.json.

    Attributes:
        version: of the model `name`; stage: to which it is promoted, "" if to none.
        before: last promotion to that stage, before this one.
        pushed: whether its tag is published.
    """

    name: str
    version: str
    stage: str
    before: str
    pushed: bool = False


def _pending(root: Path) -> _Pending:
    way_out = "Delete it: then nothing is published by itself. `git push --tags` publishes what `tlpipeline registry list` shows."
    return records.read(_Pending, root / _PENDING, way_out, RegistryError)


def publish(
    root: Path, name: str, number: tuple[int, int, int], message: str, paths: Sequence[str], stage: str = "", onto: str = ""
) -> tuple[Version, str]:
    """Register the model in dvc.lock: push the files, commit, tag, push the commit and the tag, promote; in that order.

    Args:
        message: of the commit and the tag.
        paths: files to commit.
        stage: promote the version to this stage.
        onto: as for `git.commit`.

    Returns:
        The version, and the tag of its promotion.

    Raises:
        WorkspaceError: the files could not be pushed; then nothing is registered.
        RegistryError: another run registered this number first; then the local tag is removed.
    """
    git.fetch_tags(root)
    dvc.push(root)
    text = f"v{'.'.join(map(str, number))}"
    version = Version(number, name, git.commit(root, message, paths, onto))
    write_json(asdict(_Pending(name, str(version), stage, _latest(root, name, stage))), root / _PENDING)
    try:
        git.gto(root, "register", name, version.commit, "--version", text, "--message", message)
    except WorkspaceError as error:
        (root / _PENDING).unlink()
        raise RegistryError(f"Cannot register {version}: {error}. Run again, to take the next number.") from error
    _, promoted = _finish_publication(root, version, stage)
    return version, promoted


def resume_publication(root: Path, promoting: bool) -> tuple[Version, str] | None:
    """Publish and promote a version that a killed run had registered but not published.

    It is not promoted if another version was promoted since.

    Args:
        promoting: promote it, if the killed run would have.

    Returns:
        The version, and the tag of its promotion; None if no publication is pending.

    Raises:
        RegistryError: as in `publish`.
    """
    if not (root / _PENDING).exists():
        return None
    pending = _pending(root)
    version = next((v for v in versions(root, pending.name) if str(v) == pending.version), None)
    if version is None:  # the run was killed before it wrote the tag, or the version was withdrawn
        (root / _PENDING).unlink()
        return None
    return _finish_publication(root, version, pending.stage if promoting else "")


def _finish_publication(root: Path, version: Version, stage: str) -> tuple[Version, str]:
    pending = _pending(root)
    try:
        git.push(root)
    except WorkspaceError as error:
        if pending.pushed:
            raise RegistryError(f"Cannot publish the promotion of {version}: {error}. Fix this, and run again.") from error
        git.delete_tag(root, str(version))
        (root / _PENDING).unlink()
        raise RegistryError(f"Cannot publish {version}: {error}. Its tag was removed; run `git pull`, and run again.") from error
    write_json(asdict(replace(pending, pushed=True)), root / _PENDING)
    promoted = _assign(root, version, stage, unless_since=pending.before) if stage else ""
    (root / _PENDING).unlink()
    return version, promoted


def _latest(root: Path, name: str, stage: str) -> str:
    """Return the last tag that promoted to a stage, or withdrew from it; "" if there is none."""
    return next((event.tag for event in reversed(_events(root, name)) if event.stage == stage), "")


def promote(root: Path, version: Version, stage: str = PROD, because: str = "", new_stage: bool = False) -> str:
    """Promote a version to a stage; return the tag.

    Args:
        because: the reason, which the message of the tag records. A version that alarms block needs one.
        new_stage: whether no version was in the stage before. Else the name must be known: a misspelt one would make a stage that nobody asks for.

    Raises:
        RegistryError: the stage is not known, alarms block the version, GTO refuses, or the tag cannot be pushed.
        WorkspaceError: the workspace is not writable.
    """
    stages = sorted({PROD, *(event.stage for event in _events(root, version.name) if event.stage)})
    if stage not in stages and not new_stage:
        raise RegistryError(
            f"expected a stage of {version.name}, found {stage!r}; {nearest(stage, stages)} To make a new one, add --new-stage."
        )
    reason = because.strip()
    if not reason and (blocked := blocking(alarms_of(root, version))):
        raise RegistryError(
            f"expected a version without blocking alarms to promote, found {len(blocked)} of {version}: {'; '.join(str(alarm).rstrip('.') for alarm in blocked)}. "
            f'Mend the cause and run again; or promote it for a reason, which is recorded: `tlpipeline registry promote {version} --because "..."`.'
        )
    return _assign(root, version, stage, reason)


def _assign(root: Path, version: Version, stage: str, because: str = "", unless_since: str | None = None) -> str:
    """Tag a promotion.

    Args:
        unless_since: the last known promotion tag of this stage; if there is a newer one, nothing is done.

    Raises:
        RegistryError: GTO refuses, or the tag cannot be pushed.
        WorkspaceError: the workspace is not writable.
    """
    lock.require_writable(root)
    number = f"v{'.'.join(map(str, version.number))}"
    git.fetch_tags(root)  # another clone may have promoted a version
    if unless_since is not None and _latest(root, version.name, stage) != unless_since:
        return ""
    message = ["--message", f"{version} to {stage}, because: {because}"] if because else []
    try:
        git.gto(root, "assign", version.name, "--version", number, "--stage", stage, "--force", *message)
    except WorkspaceError as error:
        raise RegistryError(f"Cannot promote {version} to {stage}: {error}") from error
    tag = max((event for event in _events(root, version.name) if event.stage == stage and not event.off), key=lambda e: e.count).tag
    try:
        git.push(root)
    except WorkspaceError as error:
        git.delete_tag(root, tag)
        raise RegistryError(
            f"Cannot publish the promotion {tag}: {error}. The tag was removed; run `git pull`, and promote again."
        ) from error
    return tag


def rollback(root: Path, name: str, stage: str = PROD) -> tuple[Version, Version]:
    """Promote the version that was in a stage before the present one; return (present, restored).

    Raises:
        RegistryError: there is none.
    """
    by_commit = {v.commit: v for v in versions(root, name)}
    history = [by_commit[c] for c in _assignments(_events(root, name), stage) if c in by_commit]
    if not history:
        raise RegistryError(f"expected a version of {name} in stage {stage}, found none, so there is nothing to roll back.")
    earlier = history[: history.index(history[-1])]
    if not earlier:
        raise RegistryError(
            f"expected an earlier version in {stage} before {history[-1]}, found none. Promote another: `tlpipeline registry promote NAME@VERSION`."
        )
    _assign(root, earlier[-1], stage, f"rollback from {history[-1]}")
    return history[-1], earlier[-1]
