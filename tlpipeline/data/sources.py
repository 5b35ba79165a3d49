"""Where the class, the given split and the group of an image file come from: its folders, or a table of labels."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tlpipeline.data.classes import Renames
from tlpipeline.data.groups import PathGroups
from tlpipeline.data.layouts import Layout, hidden, layout_of, split_named
from tlpipeline.data.splits import TEST, TRAIN, VAL, split_of
from tlpipeline.data.tables import LabelTable, read_table, unmatched
from tlpipeline.errors import DataError

AUTO, NONE = "auto", "none"
OUTSIDE = "outside any class folder"


@dataclass(frozen=True)
class Rules:
    """What the settings say about the images.

    Attributes:
        labels: table of labels, None for folders.
        group: a column of the table, a regular expression on the path, "auto" (the column `group`, if there is one) or "none".
        class_folder: which folder of a path is the class, from 1; None finds it out.
        rename: old class name to new one.
        copy: of the table, which is read instead of it; None reads the table itself.
    """

    labels: Path | None = None
    group: str = AUTO
    class_folder: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    copy: Path | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """What is known of a file by its path: class, given split ("" if none) and group ("" if none)."""

    label: str
    split: str
    group: str


class Source:
    """Classes, given splits and groups of the files of a folder.

    Args:
        images: the folder.
        rules: the settings.
        layout: of the folders; None looks at them.

    Attributes:
        layout: of the folders; without effect where there is a table.
        table: the table of labels, None for folders.
        given: the splits that are given; empty if splits follow from content.
        renames: other names of the classes.

    Raises:
        DataError: the layout can be read in two ways, or the table cannot be used.
    """

    def __init__(self, images: Path, rules: Rules | None = None, layout: Layout | None = None) -> None:
        rules = rules or Rules()
        self.images, self.renames = images, Renames(rules.rename)
        column = "" if rules.group in (AUTO, NONE) else rules.group
        self.table: LabelTable | None = None if rules.labels is None else read_table(rules.copy or rules.labels, column)
        self._table_path = None if rules.labels is None else rules.labels.resolve()
        self.layout = layout or (layout_of(images, rules.class_folder) if self.table is None else Layout())
        self.given: frozenset[str] = self.layout.given if self.table is None else self.table.given
        if self.given <= {TRAIN}:
            self.given = frozenset()
        self.by_column = self.table is not None and bool(self.table.grouped) and rules.group != NONE
        self._groups = PathGroups(column) if column and not self.by_column else None
        self.group_setting = rules.group

    @property
    def grouped(self) -> bool:
        """Whether images may have groups."""
        return self.by_column or self._groups is not None

    @property
    def folders(self) -> int:
        """Folders of a path that the layout takes."""
        return 0 if self.table is not None else self.layout.depth

    def place(self, path: str) -> Place | str:
        """Return what is known of a file, or the reason why it cannot be used.

        Args:
            path: below the folder of images.
        """
        parts = path.split("/")
        if any(map(hidden, parts)):
            return "hidden"
        if self.table is not None:
            line = self.table.lines.get(path)
            if line is None:
                return f"not in {self.table.name}"
            if line.problem:
                return line.problem
            split = line.split or (TRAIN if self.given else "")
            return Place(self.renames(line.label), split if self.given else "", line.group if self.by_column else self._group_of(path))
        if len(parts) <= self.layout.depth:
            return OUTSIDE
        split = ""
        if self.layout.split_at is not None:
            split = split_named(parts[self.layout.split_at])
            if not split:
                return f"in {parts[self.layout.split_at]}, which is no split"
        return Place(self.renames(parts[self.layout.label_at]), split, self._group_of(path))

    def _group_of(self, path: str) -> str:
        return "" if self._groups is None else self._groups.of(path)

    def split(self, given: str, key: str) -> str:
        """Return the split of an image or group: the given one, divided where val or test is missing, or the one that follows from its key.

        Args:
            given: split of its folder or of the table, "" if there is none.
            key: 32 hexadecimal digits, as for `split_of`.
        """
        if not given:
            return split_of(key)
        if given == TRAIN and VAL not in self.given:
            return split_of(key, carve_val=True)
        if given == VAL and TEST not in self.given:
            # Both halves stay apart from train: test images that resemble training images would be recognized too easily.
            return VAL if int(key, 16) < 2**127 else TEST
        return given

    def is_table(self, folder: Path, name: str) -> bool:
        """Return whether a file below a folder is the table of labels itself, which may lie in the folder of images."""
        return self._table_path is not None and name.endswith(self._table_path.name) and (folder / name).resolve() == self._table_path

    def without_file(self, paths: Iterable[str]) -> list[tuple[str, str]]:
        """Return path and reason of each line of the table that names no file.

        Raises:
            DataError: no line names one.
        """
        if self.table is None:
            return []
        listed = sorted(paths)
        missing = sorted(set(self.table.lines) - set(listed))
        if len(missing) == len(self.table.lines):
            raise DataError(unmatched(self.table, listed, self.images))
        return [(name, f"in {self.table.name}, but there is no such file") for name in missing]

    def require_groups(self, groups: Collection[str]) -> None:
        """Check that `data.group` makes groups.

        Args:
            groups: of the images.

        Raises:
            DataError: it makes none or a single one.
        """
        if self._groups is None or len(set(groups) - {""}) >= 2:
            return
        columns = f" {self.table.name} has the columns {', '.join(self.table.columns)}." if self.table is not None else ""
        only = f"only {next(iter(set(groups) - {''}))!r}" if set(groups) - {""} else "none"
        raise DataError(
            f"expected groups by data.group: {self.group_setting!r}, a regular expression on paths below the folder of images, found {only}.{columns} "
            "Correct it in params.yaml; a capturing group marks the part of the path that names the group."
        )
