"""Groups: images that are not independent of each other, such as frames of a track or patches of a patient. They share a split.

The split of a group follows from its name: u = md5(name) / 2^128, as for a single image from its content.
"""

import hashlib
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tlpipeline.errors import DataError

_LEAST_SERIES = 10
_LOOKED_AT, _STRETCH = 20_000, 1000  # images at most, and how many of them are neighbors by name
_LEAST_SHARE = 0.5  # of the images are in a series, where series are suspected
_LARGEST_SHARE = 0.25  # of the images are in one series at most
# Rules that show series in the paths of images, and what they are called. The most particular comes first. Folders do not belong to the name:
# a patient may have images in several classes, and where each class counts anew, larger groups do no harm.
_SIGNS = (
    (r"((?:19|20)\d{2}[-_]?\d{2}[-_]?\d{2}[-_T ]?\d{2}[-_:]?\d{2})[-_:]?\d{2}[^/]*$", "time stamps of the same minute"),
    (r"(?:frame|video|clip|shot|still|seq)[^/\d]*(\d+)\d\d\.[^/.]+$", "a hundred neighboring frames"),
    (r"([^/]*\d[^/]*?)[ _.-]+\d+\.\w+$", "names with the same beginning"),
    (r"([^/]*\d[^/]*?)[ _.-]+[A-Za-z]{1,6}[ _-]?\d+\.\w+$", "names with the same beginning"),
    (r"([^/]*[^/\d _.()-])[ _.()-]*\d+\.\w+$", "names with the same beginning"),
)  # fmt: skip
_SUBFOLDER = r"^(.+)/"


def group_key(group: str) -> str:
    """Return the 32 hexadecimal digits that decide the split of a group."""
    return hashlib.md5(group.encode(), usedforsecurity=False).hexdigest()


class PathGroups:
    """Groups by a regular expression on the path: its first capturing group, or the whole match.

    Args:
        expression: searched in the path below the folder of images, with / between folders.

    Raises:
        DataError: it is no regular expression.
    """

    def __init__(self, expression: str) -> None:
        try:
            self._pattern = re.compile(expression)
        except re.error as error:
            raise DataError(
                f"expected a column of the table of labels or a regular expression in data.group, found {expression!r}: {error}. "
                "Correct it in params.yaml."
            ) from error

    def of(self, path: str) -> str:
        """Return the group of a path, "" if the expression does not match."""
        match = self._pattern.search(path)
        if match is None:
            return ""
        return (match[1] or "") if self._pattern.groups else match[0]


@dataclass(frozen=True)
class Series:
    """Images that look like series though no group is set.

    Attributes:
        images, series: how many images are in how many series, of `looked_at`; example: the name of one, with its `size`.
        setting: value of `data.group` that makes groups of them; sign: what shows them.
    """

    images: int
    series: int
    example: str
    size: int
    setting: str
    sign: str
    looked_at: int

    def __str__(self) -> str:
        return (
            f"{self.images} of {self.looked_at} images look like {self.series} series ({self.sign}), such as {self.size} images of {self.example}. If images of one "
            f"series show the same thing, set data.group: '{self.setting}', so that they share a split; otherwise the accuracy is too high"
        )


def find_series(paths: Sequence[tuple[str, str]], label_folders: int) -> Series | None:
    """Return the series that names, time stamps or folders suggest.

    Args:
        paths: path below the folder of images, and class.
        label_folders: folders of a path that layout and class take.
    """
    if len(paths) > _LOOKED_AT:  # in stretches, since a series stands together
        ordered = sorted(paths)
        starts = range(0, len(paths) - _STRETCH + 1, (len(paths) - _STRETCH) // (_LOOKED_AT // _STRETCH - 1))
        paths = [path for start in starts for path in ordered[start : start + _STRETCH]]
    deep = [(path, label) for path, label in paths if path.count("/") > label_folders]
    if len(deep) >= 0.8 * len(paths):
        keys = [PathGroups(_SUBFOLDER).of(path) for path, _ in deep]
        if series := _series(keys, [label for _, label in deep], len(paths), _SUBFOLDER, "folders below the classes"):
            return series
    for expression, sign in _SIGNS:
        rule = PathGroups(expression)
        keys = [rule.of(path) for path, _ in paths]
        if series := _series(keys, [label for _, label in paths], len(paths), expression, sign):
            return series
    return None


def _series(keys: Iterable[str], labels: Iterable[str], total: int, setting: str, sign: str) -> Series | None:
    classes: dict[str, set[str]] = defaultdict(set)
    sizes: Counter[str] = Counter()
    for key, label in zip(keys, labels, strict=True):
        if key:
            sizes[key] += 1
            classes[key].add(label)
    several = {key: size for key, size in sizes.items() if size > 1}
    covered = sum(several.values())
    # A name that only repeats the class, as in cat.001.jpg, is no series: then there are about as many as classes.
    least = max(_LEAST_SERIES, 2 * len(set().union(*classes.values()) if classes else ()))
    if len(several) < least or covered < _LEAST_SHARE * total or max(several.values()) > _LARGEST_SHARE * total:
        return None
    example = sorted(several, key=lambda key: (abs(several[key] - statistics.median(several.values())), key))[0]
    return Series(covered, len(several), example, several[example], setting, sign, total)
