"""Sides never move: whatever is added, removed, replaced, renamed or relabeled, with groups and without."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.datasets import md5, tiny
from tlpipeline.data.classes import ClassMap, Renames
from tlpipeline.data.dataset import Manifest, ingest
from tlpipeline.data.groups import group_key
from tlpipeline.data.sources import Rules, Source
from tlpipeline.data.splits import TEST, TRAIN, VAL, in_selection_half, needed_exceptions

LABELS = ("ash", "birch", "cedar")
OUTSIDE_TEST = (TRAIN, VAL)


@dataclass
class Folder:
    """A folder of images in three classes, `<class>/<group>_<n>.ppm`, as somebody changes it from week to week."""

    root: Path
    grouped: bool
    number: int = 0
    known: dict[str, str] = field(default_factory=dict)  # splits.csv
    before: dict[str, str] = field(default_factory=dict)  # md5 to split, as the last run listed it
    class_map: ClassMap = field(default_factory=ClassMap)

    def add(self, label: str, group: int, count: int) -> None:
        folder = self.root / label
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            (folder / f"g{group}_{self.number}.ppm").write_bytes(tiny(self.number))
            self.number += 1

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*.ppm"))

    def commit(self) -> Manifest:
        """Do what `data commit` and ingest do."""
        source = Source(self.root, Rules(group=r"(g\d+)_[^/]*$" if self.grouped else "none"))
        hashes = {path.relative_to(self.root).as_posix(): md5(path.read_bytes()) for path in self.files()}
        new, _ = needed_exceptions(self.root, hashes, self.known, frozenset, source, self.before)
        self.known |= {line.md5: line.split for line in new}
        present: dict[str, set[str]] = defaultdict(set)
        for path, content in hashes.items():
            present[path.split("/")[0]].add(content)
        self.class_map = self.class_map.updated(present, {}, Renames())
        manifest = ingest(self.root, self.known, lambda done, total: None, source=source, class_map=self.class_map)
        self.before |= {row.md5: row.split for row in manifest.rows}
        return manifest


_LABEL, _GROUP, _PICK = st.sampled_from(LABELS), st.integers(0, 30), st.integers(0, 10**6)
_CHANGES = st.one_of(
    st.tuples(st.just("add"), _LABEL, _GROUP, st.integers(1, 4)),
    st.tuples(st.just("remove"), _PICK),
    st.tuples(st.just("replace"), _PICK),
    st.tuples(st.just("rename"), _PICK),
    st.tuples(st.just("relabel"), _PICK, _LABEL),
    st.tuples(st.just("rename group"), _GROUP, st.integers(31, 60)),
)


def change(folder: Folder, step: tuple) -> None:  # type: ignore[type-arg]
    kind, *values = step
    files = folder.files()
    if kind == "add":
        folder.add(*values)
    elif kind == "rename group":
        old, new = values
        if not any(path.name.startswith(f"g{new}_") for path in files):
            for path in files:
                if path.name.startswith(f"g{old}_"):
                    path.rename(path.with_name(path.name.replace(f"g{old}_", f"g{new}_", 1)))
    else:
        path = files[values[0] % len(files)]
        if kind == "remove" and sum(other.parent == path.parent for other in files) > 6:
            path.unlink()
        elif kind == "replace":
            path.write_bytes(tiny(folder.number))
            folder.number += 1
        elif kind == "rename":
            path.rename(path.with_name(f"{path.stem}x.ppm"))
        elif kind == "relabel" and sum(other.parent == path.parent for other in files) > 6:
            path.rename(folder.root / values[1] / path.name)


@pytest.mark.parametrize("grouped", [False, True])
@given(weeks=st.lists(st.lists(_CHANGES, min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=10, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_image_and_no_group_changes_its_side_and_no_class_its_index(
    tmp_path_factory: pytest.TempPathFactory,
    grouped: bool,
    weeks: list[list[tuple]],  # type: ignore[type-arg]
) -> None:
    folder = Folder(tmp_path_factory.mktemp("history"), grouped)
    for place, label in enumerate(LABELS):
        for group in range(10):
            folder.add(label, 10 * place + group, 2)
    sides: dict[str, str] = {}
    halves: dict[str, bool] = {}
    indices: dict[str, int] = {}
    for week in [[], *weeks]:
        for step in week:
            change(folder, step)
        manifest = folder.commit()
        by_group: dict[str, set[str]] = defaultdict(set)
        for row in manifest.rows:
            assert sides.setdefault(row.md5, row.split) == row.split
            by_group[row.group or row.md5].add(row.split)
            if not grouped:
                assert halves.setdefault(row.md5, in_selection_half(row.key)) == in_selection_half(row.key)
            assert row.key == (group_key(row.group) if row.group else row.md5)
        assert all(len(splits) == 1 for splits in by_group.values())
        for label, index in zip(manifest.classes, manifest.indices, strict=True):
            assert indices.setdefault(label, index) == index
        assert {row.md5 for row in manifest.used(TEST)}.isdisjoint(row.md5 for row in manifest.used(*OUTSIDE_TEST))
