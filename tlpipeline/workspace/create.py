"""Creating a workspace, checking it before a run, and versioning its images.

A workspace is a git and DVC repository with dvc.yaml, params.yaml and prefect.yaml.
"""

import hashlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tlpipeline.errors import DataError, ParamsError, WorkspaceError, masked
from tlpipeline.files import file_md5, unlink, write_bytes
from tlpipeline.params import AUTO, NONE, Data
from tlpipeline.progress import Event, Progress, silent
from tlpipeline.registry import versions
from tlpipeline.registry.ledger import LEDGER
from tlpipeline.training.override import override
from tlpipeline.training.recipe import Recipe
from tlpipeline.versioning import dvc, git, lock
from tlpipeline.workspace import layout, pinning, settings

if TYPE_CHECKING:
    from tlpipeline.data.facts import FactStore
    from tlpipeline.data.sources import Source
    from tlpipeline.data.splits import SplitException

TEMPLATE = Path(__file__).with_name("template")
STARTED = layout.OWN / "init"  # there while a workspace is made
TRACKED = (
    "dvc.lock", "dvc.yaml", layout.PARAMS, layout.SPLITS, layout.CLASS_MAP, layout.QUARANTINE, layout.PROFILE, layout.QUALITY, layout.ALARMS, layout.FORMER, layout.START, layout.CASE, layout.METRICS, layout.CLASSES,
    versions.CARD, versions.ALARMS, LEDGER, ".gitignore", ".dvcignore", "plots/.gitignore", ".dvc/config", ".dvc/.gitignore", ".dvc/plots",
)  # fmt: skip
PLOTS = ("plane.json", "probe.json")  # templates with which `dvc plots show` draws the decision


# --- creating -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """Images that are given to a workspace.

    Attributes:
        images: a folder, or a zip file of one.
        labels: a table of labels, None for folders.
        group, class_folder: as in params.yaml; None is what it says.
    """

    images: Path
    labels: Path | None = None
    group: str | None = None
    class_folder: int | None = None

    def options(self) -> list[str]:
        """Return what was given, as text."""
        return [str(self.images.resolve()), str(self.labels and self.labels.resolve()), str(self.group), str(self.class_folder)]


def init(
    root: Path,
    images: Path | None,
    backbone: str,
    weights: str,
    remote: str | None,
    progress: Progress = silent,
    labels: Path | None = None,
    group: str | None = None,
    class_folder: int | None = None,
) -> None:
    """Create a workspace: a git and DVC repository with dvc.yaml, params.yaml, prefect.yaml and versioned images.

    Args:
        root: a new or empty folder.
        images: folder to copy, or a zip file of one; None is the embedded sample.
        backbone, weights: as in params.yaml; a weights file is copied, versioned, and pinned by its md5.
        remote: DVC remote; None is the folder .dvc-remote in the workspace.
        labels: table of labels to copy, None for folders; group, class_folder: as in params.yaml, None for what a new one says.

    Raises:
        WorkspaceError: the folder is not empty or cannot be created, or its remote cannot be reached.
        DataError: there are no usable images.
        BackboneError: the network or its weights cannot be loaded.
    """
    from tlpipeline.backbones import catalogue
    from tlpipeline.data import archives
    from tlpipeline.data.facts import FactStore

    if images is None and labels is not None:
        raise DataError(f"expected the images that {labels} has the labels of, found no --images. Name their folder.")
    given = None if images is None else Given(images, labels, group, class_folder)
    # What would be made. A killed `init` leaves this, and the same command then continues.
    options = [*(given.options() if given else ["None"]), backbone, weights, str(remote)]
    order = hashlib.md5("\0".join(options).encode(), usedforsecurity=False).hexdigest()
    started = root / STARTED
    interrupted = started.is_file() and not _is_committed(root)
    if interrupted and started.read_text(encoding="utf-8") != order:
        raise WorkspaceError(
            f"expected a new or empty folder at {root}, found what an interrupted `tlpipeline init` with other options left. Repeat that "
            "command, which continues, or choose another folder."
        )
    if root.exists() and not interrupted and (root.is_file() or any(root.iterdir())):
        raise WorkspaceError(
            f"expected a new or empty folder at {root}, found {'a file' if root.is_file() else 'files in it'}. Choose another one."
        )
    if images is not None and not images.is_dir() and not archives.is_archive(images):
        raise DataError(
            f"expected a folder of images at {images}, found {'a file' if images.exists() else 'nothing'}. "
            "Give --images a folder with one folder of images per class, or a zip file of one."
        )
    if images is not None and root.resolve().is_relative_to(images.resolve()):
        raise WorkspaceError(f"expected a workspace outside the folder of images, found {root} inside {images}. Choose another one.")
    _require_place(root)
    source = Path(weights)
    md5 = file_md5(source) if source.is_file() else catalogue.NONE
    # All inputs are checked before anything is written.
    if remote is not None:
        dvc.check_remote(remote)
    for remark in catalogue.load(backbone, weights, md5=md5).remarks:
        progress(Event("init", 1, 1, remark))
    with archives.unpacked(images) as folder, TemporaryDirectory() as temporary:
        store = FactStore(Path(temporary))
        if given is not None and folder is not None:
            given = _checked(replace(given, images=folder), None, store, progress)
        _make(root, given, backbone, source if source.is_file() else weights, md5, remote, order, interrupted, store)
    if remote is not None and masked(remote) != remote:
        kept = "the remote's password is in .dvc/config.local, which git ignores: each clone needs its own (`dvc remote modify --local`)"
        progress(Event("init", 1, 1, kept))


def _require_place(root: Path) -> None:
    """Check that a folder can be made, before weights are loaded and images are read.

    Raises:
        WorkspaceError: its parent is a file, or may not be written.
    """
    place = next(path for path in (root.resolve(), *root.resolve().parents) if path.exists())
    reason = "Not a directory" if not place.is_dir() else "" if os.access(place, os.W_OK | os.X_OK) else "Permission denied"
    if reason:
        raise WorkspaceError(f"Cannot create the folder {root}: {reason}. Choose another one.")


def _prepared(given: Given, root: Path | None, progress: Progress) -> "tuple[Given, Source]":
    """Return images without the folders that only wrap them, and where their classes come from.

    Args:
        root: the workspace that gets them; None is a new one.

    Raises:
        DataError: they are no usable data set.
    """
    from tlpipeline.data import dataset, layouts, sources

    data = layout.params_of(root).data if root is not None else Data()
    dataset.require_folder(given.images)
    labels = given.labels
    if labels is None and root is not None and data.labels != NONE:
        inside = _inside(data)
        labels = root / data.labels if inside is None else given.images / inside
    if labels is None and given.class_folder is None and data.class_folder == AUTO:
        inner = layouts.unwrapped(given.images)
        if inner != given.images:
            progress(Event("init" if root is None else "version", 1, 1, f"the images are taken from {inner}"))
            given = replace(given, images=inner)
    settings_given = {name: value for name in ("group", "class_folder") if (value := getattr(given, name)) is not None}
    return given, sources.Source(given.images, layout.rules(replace(data, **settings_given), labels))


def _checked(given: Given, root: Path | None, store: "FactStore", progress: Progress) -> Given:
    """Check images before they are copied; return them without the folders that only wrap them. Each file is read once.

    Args:
        root: as for `_prepared`.
        store: gets the facts about the images.

    Raises:
        DataError: they are no usable data set.
    """
    from tlpipeline.data import dataset

    given, source = _prepared(given, root, progress)

    def on_progress(done: int, total: int) -> None:
        if root is None:
            progress(Event("init", done, total, "images checked"))

    names = dataset.list_files(given.images, source, [])
    hashes, planned = planned_splits(given.images, names, source, store, on_progress)
    dataset.ingest(given.images, planned, lambda done, total: None, hashes=hashes, store=store, source=source, names=names)
    return given


def _inside(data: Data) -> str | None:
    """Return the path of the table of labels below the folder of images, None if it lies elsewhere."""
    return data.labels.removeprefix(f"{data.images}/") if data.labels.startswith(f"{data.images}/") else None


def _make(
    root: Path,
    given: Given | None,
    backbone: str,
    weights: Path | str,
    md5: str,
    remote: str | None,
    order: str,
    interrupted: bool,
    store: "FactStore",
) -> None:
    """Make the folder of a workspace and fill it; what was made is removed after an error."""
    started = root / STARTED
    missing = [path for path in (*reversed(root.resolve().parents), root.resolve()) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_bytes(order.encode(), started)
    except OSError as error:
        raise WorkspaceError(f"Cannot create the folder {root}: {error.strerror}. Choose another one.") from error
    try:
        _fill(root, given, backbone, weights, md5, remote, store)
        started.unlink()
    except BaseException:
        # Remove what was created; an existing folder stays, and what an interrupted command made may hold other files by now.
        for path in [] if interrupted else missing[:1] or list(root.iterdir()):
            unlink(path)
        raise


def _is_committed(root: Path) -> bool:
    """Return whether `_fill` has made its two commits. From then on the folder is a workspace, and its history is not made anew."""
    return (root / ".git").exists() and int(git.run(root, "rev-list", "--count", "HEAD", check=False) or 0) >= 2


def _fill(root: Path, given: Given | None, backbone: str, weights: Path | str, md5: str, remote: str | None, store: "FactStore") -> None:
    from tlpipeline.backbones import catalogue
    from tlpipeline.data import classes, digits, splits
    from tlpipeline.data.decoding import available_cpus

    for name in (".git", ".dvc", layout.SPLITS, layout.CLASS_MAP):
        unlink(root / name)  # of an interrupted command
    for name in ("dvc.yaml", "params.yaml", "prefect.yaml"):
        shutil.copy(TEMPLATE / name, root / name)
    shutil.copy(TEMPLATE / "gitignore", root / ".gitignore")
    shutil.copy(TEMPLATE / "dvcignore", root / ".dvcignore")
    changes: dict[str, Any] = {"backbone.name": backbone, "backbone.weights": weights}
    if (code_md5 := catalogue.code_md5(backbone, None)) != catalogue.NONE:
        changes["backbone.code_md5"] = code_md5
    if given is None:
        digits.write(root / "images")
        # The demonstration shows two workers; its digits must not be mirrored.
        changes |= {"train.flip": False, "cluster.workers": min(2, available_cpus())}
    else:
        copy_images(given, root / "images")
        changes["data.name"] = _name_from(root)
        changes |= {f"data.{name}": value for name in ("group", "class_folder") if (value := getattr(given, name)) is not None}
        if given.labels is not None:
            changes["data.labels"] = f"labels{given.labels.suffix.lower()}"
            shutil.copyfile(given.labels, root / changes["data.labels"])
        deployments = root / "prefect.yaml"
        deployments.write_text(deployments.read_text(encoding="utf-8").replace("digits", _name_from(root)), encoding="utf-8")
    if isinstance(weights, Path):
        (root / "weights").mkdir(exist_ok=True)
        shutil.copy(weights, root / "weights" / weights.name)
        changes |= {"backbone.weights": f"weights/{weights.name}", "backbone.weights_md5": md5}
    settings.change(root / layout.PARAMS, changes)
    dvc.init(root, remote or str(root / ".dvc-remote"))
    (root / ".dvc" / "plots").mkdir(exist_ok=True)
    for name in PLOTS:
        shutil.copy(TEMPLATE / name, root / ".dvc" / "plots" / name)
    tracked = [*TRACKED, "prefect.yaml"]
    if isinstance(weights, Path):
        dvc.add(root, f"weights/{weights.name}")
        tracked += [f"weights/{weights.name}.dvc", "weights/.gitignore"]
    splits.write_exceptions(root / layout.SPLITS, [])
    for name in (layout.FORMER, layout.START):
        write_bytes(b"null\n", root / name)
    classes.write_map(root / layout.CLASS_MAP, classes.ClassMap())
    if settings.add_inputs(root / layout.PARAMS, root / "dvc.yaml"):
        tracked.append(str(changes.get("data.labels", layout.PARAMS)))
    git.commit(root, "New workspace", tracked)
    store.copy_to(root / layout.CACHE)  # the images were read when they were checked
    commit_data(root, "First images")


def _name_from(root: Path) -> str:
    """Return a model name from the folder's name: lower-case letters, digits and dashes."""
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in root.resolve().name.lower()).strip("-")
    return name if name and name[0].isalpha() else f"images-{name}".strip("-")


def copy_images(given: Given, target: Path) -> None:
    """Copy a folder of images; a table of labels in it is not copied with them."""
    from tlpipeline.data import layouts

    table = given.labels and given.labels.resolve()

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name == layouts.SYSTEM or (table is not None and name == table.name and Path(folder, name).resolve() == table)
        ]

    shutil.copytree(given.images, target, dirs_exist_ok=True, ignore=left_out)


# --- images ---------------------------------------------------------------------------------------------------------------------------


def commit_data(root: Path, message: str | None = None, push_again: bool = True) -> tuple[str, list[str]]:
    """Version the images: `dvc add`, exceptions for small classes, the class map, a git commit, `dvc push`.

    Images that a stage writes are brought up to date, and not added; that stage records them.

    Args:
        message: of the commit.
        push_again: look whether the remote has all files even if they were pushed before: it costs as much as the whole rest.

    Returns:
        The hash of the data set, and remarks for people.

    Raises:
        DataError: there are links to folders or to files elsewhere, or files that DVC ignores.
        WorkspaceError: DVC or git refuses.
    """
    from tlpipeline.data import classes, dataset, splits

    git.require_identity(root)
    params = layout.params_of(root)
    images = params.data.images
    settings.add_inputs(root / layout.PARAMS, root / "dvc.yaml")
    written = dvc.is_stage_output(root, images)
    recorded: dict[str, str] = {}
    if written:  # by a stage, so there is nothing to add
        dvc.reproduce_upstream(root, images)
        source = layout.source_of(root)
        dataset.list_files(root / images, source)
        digest, hashes = dvc.data_hash(root, images), dvc.file_hashes(root, images)
        is_new = dvc.stage_input(root, "ingest", images) != digest
    else:
        source = layout.source_of(root)
        names = dataset.list_files(root / images, source, [dvc.cache_folder(root)])
        recorded = dvc.tracked_files(root, images) if (root / f"{images}.dvc").is_file() else {}
        digest = _versioned(root, images, names)
        hashes = dvc.tracked_files(root, images)
        is_new = digest not in (git.read_at(root, "HEAD", f"{images}.dvc") or "")
    labels_before, splits_before = _before(root, recorded, source)
    # Where the cache shares files with the folder, who may write everywhere may alter both at once: the remote has the earlier content.
    damaged = dvc.remove_damaged(root, [md5 for path, md5 in recorded.items() if hashes.get(path, md5) != md5])
    known = splits.read_exceptions(root / layout.SPLITS)

    def before() -> dict[str, str]:
        return {md5: splits.split_of(md5) for md5 in dvc.earlier_files(root, images)} | splits_before

    new: list[SplitException] = []
    remarks: list[str] = []
    store = layout.open_facts(root, "version")
    if is_new:
        new, remarks = _joined(root / images, hashes, known, before, source, store)
    fixed = dict(known) | {line.md5: line.split for line in new}
    needed, others = splits.needed_exceptions(
        root / images, hashes, fixed, lambda: _trained_on(root, params.data.name), source, splits_before, store.most_bytes
    )
    splits.write_exceptions(root / layout.SPLITS, [*new, *needed])
    remarks = remarks + others
    if damaged:
        remarks.append(
            f"altered in place: {len(damaged)} images, and DVC's cache with them, because cache.type has it share their files; earlier versions of "
            "them are in the DVC remote only. Replace files by new ones (`cp --remove-destination`)"
        )
    class_map, present = classes.read_map(root / layout.CLASS_MAP), _by_class(hashes, source)
    updated = (class_map if class_map.lines else classes.first_map(labels_before)).updated(present, labels_before, source.renames)
    classes.write_map(root / layout.CLASS_MAP, updated)
    remarks = [
        *remarks,
        *classes.changes(class_map, updated, present, source.renames),
        *classes.vanished(updated, present, source.renames, params.data.drop),
    ]
    tables = [] if params.data.labels == NONE or _inside(params.data) is not None else [params.data.labels, "dvc.yaml"]
    record = [] if written else _recorded(images)
    git.commit(root, message or f"Data {digest[:8]}", [*record, layout.SPLITS, layout.CLASS_MAP, *tables])
    if not written and (push_again or not dvc.is_pushed(root)):
        dvc.push(root)
    return digest, remarks


def _versioned(root: Path, images: str, names: Sequence[str]) -> str:
    """Add the images to DVC; return their hash.

    Args:
        names: of the files that are to be versioned, below the folder.

    Raises:
        DataError: DVC ignores some of them.
    """

    def refuse_ignored() -> None:
        if ignored := dvc.ignored_files(root, images, [root / images / name for name in names]):
            raise DataError(
                f"A .dvcignore excludes {len(ignored)} files of {root / images} from versioning, such as {ignored[0]}. They would still be used "
                "for training. Remove that line from the .dvcignore, or move the files out of the folder."
            )

    if dvc.has_own_ignore_rules(root, images, (TEMPLATE / "dvcignore").read_text(encoding="utf-8")):
        refuse_ignored()
    try:
        return dvc.add(root, images)
    except dvc.IgnoreFileInside:
        refuse_ignored()
        raise


def _joined(
    images: Path,
    hashes: Mapping[str, str],
    known: Mapping[str, str],
    before: Callable[[], Mapping[str, str]],
    source: "Source",
    store: "FactStore",
) -> tuple[list["SplitException"], list[str]]:
    """Return lines for splits.csv that give near copies one split, and remarks; images with a group have the split of their group."""
    from tlpipeline.data import copies, facts, splits

    places = {path: place for path in sorted(hashes) if not isinstance(place := source.place(path), str)}
    if source.given:
        return [], []
    free = [path for path, place in places.items() if not place.group]
    known_as = {number: path for number, path in enumerate(free)}
    label_of: dict[str, str] = {}
    pictures: dict[str, bytes] = {}
    for number, md5, about in facts.gather([(images / path, hashes[path]) for path in free], store):
        if not about.reason and copies.comparable(about):
            pictures[md5] = about.picture
        if not about.reason:
            label_of[md5] = min(label_of.get(md5, places[known_as[number]].label), places[known_as[number]].label)
    return splits.joined_exceptions(copies.connected(copies.find_copies(pictures, store)), label_of, known, before)


def _by_class(hashes: Mapping[str, str], source: "Source") -> dict[str, set[str]]:
    """Return the md5s of each class."""
    members: dict[str, set[str]] = defaultdict(set)
    for path, md5 in hashes.items():
        if not isinstance(place := source.place(path), str):
            members[place.label].add(md5)
    return dict(members)


def _before(root: Path, recorded: Mapping[str, str], source: "Source") -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return the md5s of each class, and the split of each md5, as the last run listed them; before the first run those that were versioned.

    Args:
        recorded: path to md5 of the last version.
    """
    from tlpipeline.data import dataset

    if not (root / layout.MANIFEST).is_file():
        return _by_class(recorded, source), {}
    try:
        rows = dataset.read_manifest(root / layout.MANIFEST).rows
    except DataError:  # another version wrote it, or it is damaged: the next run writes it anew
        return {}, {}
    members: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        members[source.renames(row.label)].add(row.md5)
    return dict(members), {row.md5: row.split for row in rows}


def _recorded(images: str) -> list[str]:
    """Return the files in which DVC records an added folder."""
    return [f"{images}.dvc", str(Path(images).parent / ".gitignore")]


def _trained_on(root: Path, name: str) -> frozenset[str]:
    return frozenset().union(*(versions.trained_on(root, v) for v in versions.versions(root, name)))


def record_code(root: Path) -> str:
    """Write the md5 of the code of your own network to params.yaml, where it makes the stages run that the code changes.

    Returns:
        A remark for people if it changed, else "".

    Raises:
        BackboneError: the network cannot be imported.
    """
    from tlpipeline.backbones import catalogue

    backbone = layout.params_of(root).backbone
    now = catalogue.code_md5(backbone.name, root)
    if now == backbone.code_md5:
        return ""
    settings.change(root / layout.PARAMS, {"backbone.code_md5": now})
    return "" if catalogue.NONE in (now, backbone.code_md5) else f"the code of {backbone.name} changed: it is measured and trained anew"


def replace_images(root: Path, images: Path, labels: Path | None = None, progress: Progress = silent) -> None:
    """Replace the workspace's images, and its table of labels, by a copy of others, after what is there is in the DVC remote.

    Args:
        images: a folder, or a zip file of one.
        labels: a table of labels; None keeps the present one, if there is one.

    Raises:
        DataError: they are no usable data set, or files of the old folder cannot be versioned; then nothing is replaced.
        WorkspaceError: the old images cannot be pushed; then nothing is replaced either.
    """
    from tlpipeline.data import archives

    data = layout.params_of(root).data
    name = data.images
    target = root / name
    if images.resolve() == target.resolve():
        return
    with archives.unpacked(images) as folder:
        assert folder is not None
        given = _checked(Given(folder, labels), root, layout.open_facts(root, "version", progress), progress)
        if target.is_dir() and not dvc.is_stage_output(root, name):
            if ignored := dvc.ignored_files(root, name, sorted(path for path in target.rglob("*") if path.is_file())):
                raise DataError(
                    f"A .dvcignore excludes {len(ignored)} files of {target} from versioning, such as {ignored[0]}. They would be lost when "
                    "the images are replaced. Move them out of the folder, then run again."
                )
            if dvc.has_changed(root, name):
                # Images added since the last commit exist nowhere else.
                dvc.add(root, name)
                git.commit(root, "Images before their replacement", _recorded(name))
            dvc.push(root)
        draft = target.with_name(f".{target.name}.draft")
        unlink(draft)
        try:
            copy_images(given, draft)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    unlink(target)
    draft.rename(target)
    if given.labels is not None:
        table = data.labels if data.labels != NONE else f"labels{given.labels.suffix.lower()}"
        write_bytes(given.labels.read_bytes(), root / table)
        if data.labels == NONE:
            settings.change(root / layout.PARAMS, {"data.labels": table})


def planned_splits(
    images: Path, names: Sequence[str], source: "Source", store: "FactStore", progress: Callable[[int, int], None]
) -> tuple[dict[str, str], dict[str, str]]:
    """Read a folder of images before it is copied; return the md5s of its files, and the splits of keys that splits.csv would get.

    Args:
        names: paths of the files, below the folder.
        store: gets the facts about the images.
        progress: called with (files done, number of files).
    """
    from tlpipeline.data import facts, splits

    hashes = {names[number]: md5 for number, md5, _ in facts.gather([(images / name, "") for name in names], store, progress)}
    new, _ = _joined(images, hashes, {}, dict, source, store)
    fixed = {line.md5: line.split for line in new}
    needed, _ = splits.needed_exceptions(images, hashes, fixed, frozenset, source, most_bytes=store.most_bytes)
    return hashes, fixed | {line.md5: line.split for line in needed}


def count_images(root: Path) -> int:
    """Return the number of versioned files in the data set."""
    return len(dvc.tracked_files(root, layout.params_of(root).data.images))


# --- checks and the lock --------------------------------------------------------------------------------------------------------------


def check(root: Path, images: Path | None = None, labels: Path | None = None) -> None:
    """Check before a run: the repository, params.yaml, the workers, and the folder of images.

    Args:
        root: the workspace.
        images: folder, or a zip file of one, that will replace the workspace's images; None keeps them.
        labels: table of labels that comes with them.

    Raises:
        WorkspaceError, ParamsError, BackboneError, ClusterError, DataError: a check failed.
    """
    from tlpipeline.backbones import catalogue, taps
    from tlpipeline.choice import cases
    from tlpipeline.data import archives, dataset
    from tlpipeline.training import ray_train

    lock.require_workspace(root)
    git.require_branch(root)
    git.require_identity(root)
    dvc.require_no_secrets(root)
    params = layout.params_of(root)
    if masked(params.cluster.storage) != params.cluster.storage:
        raise ParamsError(
            "expected cluster.storage in params.yaml, which is committed, without a password, found one. Give it by the environment, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if params.choose.case != AUTO:
        cases.find(params.choose.case)
    override(Recipe(), "pretrained", params.train.override, freeze=False)
    catalogue.check_name(params.backbone.name)
    if params.choose.slice != AUTO:
        b = params.backbone
        taps.resolve_tap(catalogue.load(b.name, b.weights, md5=b.weights_md5, root=root), params.choose.slice)
    ray_train.preflight(params.cluster)
    folder = root / params.data.images
    if images is not None and archives.is_archive(images):
        archives.check(images)
    elif images is not None:
        given, source = _prepared(Given(images, labels), root, silent)
        dataset.list_files(given.images, source, [])
    elif not folder.is_dir() and not dvc.is_stage_output(root, params.data.images):
        raise DataError(f"expected the images in {folder}, found no such folder; {dvc.pull_hint(root)}. Or give other images by --images.")


@contextmanager
def exclusive(root: Path, wait_minutes: float, images: Path | None = None, labels: Path | None = None) -> Iterator[None]:
    """Check a workspace and hold its lock during a run; stop the Ray runtime at the end.

    Args:
        wait_minutes: how long to wait for another run to end.
        images: folder, or a zip file of one, that will replace the workspace's images; None keeps them.
        labels: table of labels that comes with them.

    Raises:
        WorkspaceError: this is not a workspace, or another run is using it.
    """
    from tlpipeline.training import ray_train

    check(root, images, labels)
    with lock.hold(root, wait_minutes * 60):
        pinning.drop(root)  # of a run that was killed
        try:
            yield
        finally:
            pinning.drop(root)
            ray_train.shutdown()


def model_name(root: Path) -> str:
    """Return the name of the workspace's models in the registry."""
    return layout.params_of(root).data.name


def missing_trigger(root: Path) -> str:
    """Return a warning if no deployment in prefect.yaml waits for the event of these data, else ""."""
    name, path = model_name(root), root / "prefect.yaml"
    if not path.is_file() or re.search(rf"tlpipeline\.data\.({re.escape(name)}(?![\w-])|\*)", path.read_text(encoding="utf-8")):
        return ""
    return (
        f"no deployment in {path} waits for tlpipeline.data.{name}: data.name was changed since it was written. Put the new name there, then "
        "run `tlpipeline deploy` or `tlpipeline serve`"
    )
