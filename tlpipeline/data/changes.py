"""What changed between two versions of the images: by path, content and class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tlpipeline.data.drift import Drift
from tlpipeline.display import Displayed, table

if TYPE_CHECKING:
    from rich.console import RenderableType

_EXAMPLES = 3


class File(NamedTuple):
    """An image file of a version: md5 of its content, and its class."""

    md5: str
    label: str


@dataclass(frozen=True)
class Move:
    """A content that has another path or class now."""

    path: str
    now: str
    label: str
    label_now: str


@dataclass(frozen=True)
class Changes(Displayed):
    """The difference between two versions of the images. Each file is in one of the lists at most.

    Attributes:
        since: the earlier version.
        added, removed: paths whose content was not there before, or is not there now.
        replaced: paths with another content.
        moved: the same content under another path, in the same class.
        relabeled: the same content in another class.
        renamed: class that is gone, and the new class that has all its images that are left.
        sizes: images of each class before and now, for classes whose size changed.
        drift: whether the images of each class look different now, None where it was not measured.
    """

    since: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    moved: tuple[Move, ...]
    relabeled: tuple[Move, ...]
    renamed: Mapping[str, str]
    sizes: Mapping[str, tuple[int, int]]
    drift: Drift | None = None

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.counts)

    @property
    def counts(self) -> dict[str, int]:
        """How many files each kind of change has; kinds without any are left out."""
        renamed = sum(move.label in self.renamed for move in self.relabeled)
        kinds = {
            "added": len(self.added),
            "removed": len(self.removed),
            "replaced": len(self.replaced),
            "moved": len(self.moved),
            "relabeled": len(self.relabeled) - renamed,
            "in a renamed class": renamed,
        }
        return {kind: number for kind, number in kinds.items() if number}

    @property
    def summary(self) -> str:
        """What changed, in a sentence without a full stop."""
        return ", ".join(f"{number:,} {kind}" for kind, number in self.counts.items()) or "nothing changed"

    def to_json(self) -> dict[str, Any]:
        """Return plain values with all paths."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return a line for each kind of change, with some of its files, and one for each class whose size changed or that drifted."""
        relabeled = [move for move in self.relabeled if move.label not in self.renamed]
        kinds = [
            ("added", len(self.added), self.added),
            ("removed", len(self.removed), self.removed),
            ("replaced", len(self.replaced), self.replaced),
            ("moved", len(self.moved), [f"{move.path} to {move.now}" for move in self.moved[:_EXAMPLES]]),
            ("relabeled", len(relabeled), [f"{move.path} from {move.label} to {move.label_now}" for move in relabeled[:_EXAMPLES]]),
        ]
        lines = [
            (kind, f"{number:,}: {', '.join(files[:_EXAMPLES])}{', ...' * (number > _EXAMPLES)}") for kind, number, files in kinds if number
        ]
        lines += [("class", f"{old} is {new} now, with all its images") for old, new in self.renamed.items()]
        # A renamed class is no class that shrank and another that grew.
        sizes = {k: v for k, v in self.sizes.items() if k not in self.renamed and k not in self.renamed.values()}
        lines += [("class", f"{label}: {_size(*size)}") for label, size in sizes.items()]
        return lines + [("drift", text) for text in (self.drift.lines() if self.drift else ())]

    def __rich__(self) -> RenderableType:
        return table((), [("since", self.since), ("changes", self.summary), *self.lines()])


def _size(before: int, now: int) -> str:
    if not before:
        return f"new, {now:,} images"
    return f"{before:,} to {now:,} images" if now else f"gone, it had {before:,} images"


def compare(before: Mapping[str, File], now: Mapping[str, File], since: str = "") -> Changes:
    """Compare two versions.

    Args:
        before, now: the files of each version by their paths.
        since: name of the earlier version.
    """
    replaced: list[str] = []
    relabeled: list[Move] = []
    for path in sorted(before.keys() & now.keys()):
        old, new = before[path], now[path]
        if old.md5 != new.md5:
            replaced.append(path)
        elif old.label != new.label:
            relabeled.append(Move(path, path, old.label, new.label))
    fresh: dict[str, list[str]] = defaultdict(list)
    for path in sorted(now.keys() - before.keys(), reverse=True):
        fresh[now[path].md5].append(path)
    removed: list[str] = []
    moved: list[Move] = []
    for path in sorted(before.keys() - now.keys()):
        old = before[path]
        places = fresh.get(old.md5, [])
        if not places:
            removed.append(path)
            continue
        place = next((p for p in reversed(places) if now[p].label == old.label), places[-1])
        places.remove(place)
        move = Move(path, place, old.label, now[place].label)
        (moved if move.label == move.label_now else relabeled).append(move)
    added = sorted(path for places in fresh.values() for path in places)
    sizes = _sizes(before, now)
    return Changes(
        since,
        tuple(added),
        tuple(removed),
        tuple(replaced),
        tuple(moved),
        tuple(relabeled),
        _renamed(relabeled, removed, before, sizes),
        sizes,
    )


def _sizes(before: Mapping[str, File], now: Mapping[str, File]) -> dict[str, tuple[int, int]]:
    old, new = (Counter(file.label for file in files.values()) for files in (before, now))
    return {label: (old[label], new[label]) for label in sorted(old | new) if old[label] != new[label]}


def _renamed(relabeled: list[Move], removed: list[str], before: Mapping[str, File], sizes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Return the classes that are gone and whose images, those that are left, are all in one new class."""
    targets: dict[str, Counter[str]] = defaultdict(Counter)
    for move in relabeled:
        targets[move.label][move.label_now] += 1
    lost = Counter(before[path].label for path in removed)
    renamed = {}
    for label, into in targets.items():
        (target, number), *others = into.most_common(2)
        gone, new = not sizes.get(label, (1, 1))[1], not sizes.get(target, (1, 1))[0]
        if gone and new and not others and number > lost[label]:
            renamed[label] = target
    return renamed
