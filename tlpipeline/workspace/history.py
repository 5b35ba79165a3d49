"""What changed between two states of a workspace: its images, and the decision about them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tlpipeline import records
from tlpipeline.choice.decision import Decision, Former
from tlpipeline.data import drift
from tlpipeline.data.changes import Changes, File, compare
from tlpipeline.data.drift import Drift
from tlpipeline.errors import BackboneError, ParamsError, WorkspaceError
from tlpipeline.files import write_bytes
from tlpipeline.params import NONE
from tlpipeline.registry import versions
from tlpipeline.versioning import dvc, git
from tlpipeline.workspace import layout, stages
from tlpipeline.workspace.pinning import PinnedData, pins_of

if TYPE_CHECKING:
    from tlpipeline.backbones.pooling import TapPooling
    from tlpipeline.data.cache import Column
    from tlpipeline.data.dataset import Manifest


def diff(root: Path, since: str, until: str | None = None) -> Changes:
    """Compare the images of two git revisions.

    Args:
        until: the later one; None is the folder of images as it is now.

    Raises:
        WorkspaceError: no images are versioned at a revision, or their list cannot be fetched.
        DataError: the present folder or a table of labels cannot be read.
    """
    return compare(*_versions(root, since, until), since)


def diff_with_drift(root: Path, since: str, until: str | None = None) -> Changes:
    """Compare the images of two git revisions as `diff` does, and the cached features of the images of each class."""
    from tlpipeline.data import dataset

    before, now = _versions(root, since, until)
    changes = compare(before, now, since)
    listed = [dataset.read_manifest(root / layout.MANIFEST)] if (root / layout.MANIFEST).is_file() else []
    return replace(changes, drift=_drift(root, before, now, changes.renamed, listed))


def _versions(root: Path, since: str, until: str | None) -> tuple[dict[str, File], dict[str, File]]:
    images = layout.params_of(root).data.images
    hashes = dvc.file_hashes(root, images) if until is None else dvc.files_at(root, images, until)
    return _labeled(root, dvc.files_at(root, images, since), since), _labeled(root, hashes, until)


def diff_of_run(root: Path, champion: str) -> Changes | None:
    """Compare the images of the last run, and their cached features, with those of the version that its model was compared with.

    Returns:
        None if there is no such version.
    """
    from tlpipeline.data import dataset

    version = next((v for v in versions.versions(root, layout.params_of(root).data.name) if str(v) == champion), None)
    if version is None:
        return None
    manifests = versions.manifest_of(root, version), dataset.read_manifest(root / layout.MANIFEST)
    before, now = map(_listed, manifests)
    changes = compare(before, now, champion)
    return replace(changes, drift=_drift(root, before, now, changes.renamed, manifests))


def _drift(
    root: Path, before: Mapping[str, File], now: Mapping[str, File], renamed: Mapping[str, str], manifests: "Sequence[Manifest]"
) -> Drift | None:
    """Return the drift of each class by the features in the cache, None where no class can be compared or no run has measured any images.

    Args:
        renamed: classes of the earlier version under their present names.
        manifests: those that say which images are in one group.
    """
    compared = drift.sides({f.md5: f.label for f in before.values()}, {f.md5: f.label for f in now.values()}, renamed)
    if not compared or not manifests or not (root / layout.PROFILE).is_file():
        return None
    groups = {row.md5: row.group for manifest in manifests for row in manifest.rows if row.group}
    if not any(each.comparable for each in compared):  # the network need not be loaded to say so
        return drift.drift(compared, (), groups)
    try:
        columns = stages.cached_features(root)
    except (BackboneError, WorkspaceError) as error:
        return Drift((), (), 0, 0, problem=str(error))
    return drift.drift(compared, [_view(*each) for each in columns], groups)


def _view(reading: "TapPooling", column: "Column") -> drift.View:
    """Return a column as features to compare: the means of the whole maps, which are the first ones of a pyramid."""
    return drift.View(reading.tap, column.has, lambda md5s: column.rows(md5s).all()[:, : reading.channels].double().numpy())


def _listed(manifest: "Manifest") -> dict[str, File]:
    return {row.path: File(row.md5, row.label) for row in manifest.rows}


def _labeled(root: Path, hashes: Mapping[str, str], revision: str | None) -> dict[str, File]:
    """Return the files with their classes. Where the present layout has no class for a path, it is the name of its folder."""
    table = None if revision is None else _table_at(root, hashes, revision)
    with TemporaryDirectory() as folder:
        labels = None
        if table is not None:
            labels = Path(folder) / Path(layout.params_of(root).data.labels).name
            labels.write_bytes(table)
        source = layout.source_of(root, labels=labels)
    labeled = {}
    for path, md5 in hashes.items():
        place = source.place(path)
        if source.table is None or not isinstance(place, str):
            labeled[path] = File(md5, (path.split("/")[-2] if "/" in path else "") if isinstance(place, str) else place.label)
    return labeled


def _table_at(root: Path, hashes: Mapping[str, str], revision: str) -> bytes | None:
    """Return the table of labels as of a revision, where git has it or DVC has it among the images; None if there is none."""
    data = layout.params_of(root).data
    inside = hashes.get(data.labels.removeprefix(f"{data.images}/"))
    if inside is not None:
        return dvc.content_of(root, inside)
    return None if data.labels == NONE else git.bytes_at(root, revision, data.labels)


def record_former(root: Path, pinned: PinnedData | None = None) -> None:
    """Write the decision of the model in production to former.json, if the stage choose is to run anyway: a fresh decision stays as it is."""
    if not (root / layout.FORMER).is_file() or not dvc.has_stage(root, "choose") or dvc.is_fresh(root, "choose", pins_of(pinned)):
        return
    former = _former(root)
    text = json.dumps(asdict(former) if former else None, indent=2) + "\n"
    if (root / layout.FORMER).read_text(encoding="utf-8") != text:
        write_bytes(text.encode(), root / layout.FORMER)


def _former(root: Path) -> Former | None:
    """Return the decision of the champion; None if there is none, or another version of tlpipeline wrote it."""
    version = versions.champion(root, layout.params_of(root).data.name)
    if version is None:
        return None
    case, profile = (git.read_at(root, version.commit, name) or "" for name in (layout.CASE, layout.PROFILE))
    try:
        decision = records.parse(Decision, case, f"{layout.CASE} of {version}", "", WorkspaceError)
        images = records.parse(_Images, profile, f"{layout.PROFILE} of {version}", "", WorkspaceError).images
        network, rule = layout.decided_by(layout.params_at(root, version.commit))
    except (WorkspaceError, ParamsError):
        return None
    return Former(
        str(version), network, rule, decision.case, decision.slice, decision.head, decision.freeze, decision.cutting.exceeds, images,
        decision.tuning.counted, decision.cutting.counted,
    )  # fmt: skip


@dataclass(frozen=True)
class _Images:
    images: int
