"""The version of the data that a run keeps from its first step to its last, whatever is done to the images meanwhile.

The version step pins the data: the commit that has them, and copies of the small files that ingest reads. The images themselves are in DVC's
cache. So files may be added to the folder, removed, and committed while the run trains. A stage by hand (`dvc repro`) pins nothing.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipeline.data.contents import PinnedFolder
from tlpipeline.data.layouts import Layout
from tlpipeline.errors import WorkspaceBusy
from tlpipeline.files import unlink, write_bytes, write_json
from tlpipeline.params import NONE
from tlpipeline.records import read as read_record
from tlpipeline.versioning import dvc, git, lock
from tlpipeline.workspace import layout

if TYPE_CHECKING:
    from tlpipeline.data.contents import ImageFolder
    from tlpipeline.data.sources import Source

FOLDER = layout.OWN / "pinned"
_FILE = FOLDER / "pinned.json"


@dataclass(frozen=True)
class PinnedData:
    """The data of a run.

    Attributes:
        commit: of git, which has this version.
        images: folder of the workspace that was pinned; labels: table of labels, "none" for folders.
        contents: DVC's cache of the files by md5.
        label_at, split_at, given: how paths are read, as in `Layout`.
        recorded: what DVC records of the folder and of the files that ingest reads, by path.
    """

    commit: str
    images: str
    labels: str
    contents: str
    label_at: int
    split_at: int | None
    given: list[str]
    recorded: dict[str, dvc.Pin]

    @property
    def inputs(self) -> list[str]:
        """The files in git that are pinned: the record of the images, and the files beside them that ingest reads."""
        return [f"{self.images}.dvc", *(name for name in self.recorded if name != self.images)]

    def is_current(self, root: Path) -> bool:
        """Return whether the workspace still has this version of the data."""
        return all(_content(root / name) == _content(root / FOLDER / name) for name in self.inputs)

    def source(self, root: Path) -> "Source":
        """Return where the classes, given splits and groups of the images come from."""
        data = layout.params_of(root).data
        copy = None if data.labels == NONE or self.labels != data.labels else root / FOLDER / data.labels
        return layout.source_of(root, known=Layout(self.label_at, self.split_at, frozenset(self.given)), labels_copy=copy)


def pin(root: Path) -> PinnedData | None:
    """Pin the data as they were just committed, and return them. Images that a stage writes are not pinned: None.

    The caller holds `lock.recording`.
    """
    drop(root)
    data = layout.params_of(root).data
    if dvc.is_stage_output(root, data.images):
        return None
    folder = dvc.pin_of(root, data.images)
    contents = dvc.cache_folder(root)
    recorded = {data.images: folder}
    copied = [f"{data.images}.dvc", layout.SPLITS, layout.CLASS_MAP]
    inside = data.labels.removeprefix(f"{data.images}/")
    if inside != data.labels:  # the table lies among the images, and DVC has it as it was committed
        md5 = dvc.listed_files(root, folder).get(inside, "")
        write_bytes(dvc.content_of(root, md5) or b"", root / FOLDER / data.labels)
    elif data.labels != NONE:
        copied.append(data.labels)
    for name in copied:
        content = _content(root / name)
        write_bytes(content, root / FOLDER / name)
        if name != f"{data.images}.dvc":
            recorded[name] = dvc.Pin(hashlib.md5(content, usedforsecurity=False).hexdigest(), len(content))
    read = layout.source_of(root, labels_copy=root / FOLDER / data.labels if inside != data.labels else None).layout
    pinned = PinnedData(git.head(root), data.images, data.labels, str(contents), read.label_at, read.split_at, sorted(read.given), recorded)
    write_json(asdict(pinned), root / _FILE)
    return pinned


def pinned_data(root: Path) -> PinnedData | None:
    """Return what the present run pinned, None if no run did."""
    return read_record(PinnedData, root / _FILE, "Delete it; the next run writes it anew.") if (root / _FILE).is_file() else None


def drop(root: Path) -> None:
    """End the pinning of the data: at the end of a run, and before the next one pins its own."""
    (root / _FILE).unlink(missing_ok=True)
    unlink(root / FOLDER)


def folder_of(root: Path, pinned: PinnedData | None) -> "ImageFolder":
    """Return the workspace's folder of images, pinned if a run keeps a version of it."""
    folder = root / layout.params_of(root).data.images
    return PinnedFolder(folder, Path(pinned.contents)) if pinned else folder


def pins_of(pinned: PinnedData | None) -> Mapping[str, dvc.Pin]:
    """Return the dependencies of stages that are pinned, by path."""
    return pinned.recorded if pinned else {}


@contextmanager
def beside_a_run(root: Path) -> Iterator[None]:
    """Hold the lock for what DVC and git record, and keep runs out; a run that pinned its data may go on.

    Raises:
        WorkspaceBusy: a run is in the workspace that has not pinned its data, such as `dvc repro`.
    """
    lock.require_writable(root)
    with lock.recording(root), ExitStack() as stack:
        try:
            stack.enter_context(lock.hold(root))
        except WorkspaceBusy:
            if pinned_data(root) is None:
                raise
        yield


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
