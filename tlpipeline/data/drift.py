"""Whether the images that a class gained or lost look like the others of that class: a permutation test on features.

The distance is the energy distance (Székely and Rizzo 2013): it is zero only between equal distributions, needs no bandwidth, and sees a
shift as well as another spread. It is divided by the mean distance between both sides, so that 0 is alike and 1 is the most. It is taken on
the whitened principal components of both sides together, which finds more than the raw features do (docs/log.md). p-values are corrected
over all classes and taps by the largest standardized distance of each permutation (Westfall and Young 1993). Unlike Bonferroni's
correction, this needs no more permutations for more classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

Features = npt.NDArray[np.float64]

LEAST = 5  # independent images on either side of a comparison
MOST = 100  # independent images of a side that are compared
COMPONENTS, IMAGES_EACH = 8, 5  # principal components; fewer if there are not so many images for each
PERMUTATIONS = 999
ALPHA = 0.05
ADDED, REMOVED = "added", "removed"


@dataclass(frozen=True)
class ClassDrift:
    """A class whose images changed.

    Attributes:
        label: the class now.
        tap: where the features were read.
        change: added (new images against those before) or removed (those that are gone against those that stayed).
        changed, others: independent images on either side of the comparison: one for each group.
        distance: energy distance of both sides, from 0 (alike) to 1.
        by_chance: distance that 95 % of random divisions of the same images stay below.
        p_value: probability of such a distance by chance in any of the classes.
    """

    label: str
    tap: str
    change: str
    changed: int
    others: int
    distance: float
    by_chance: float
    p_value: float

    @property
    def shown(self) -> bool:
        """Whether chance does not explain the distance."""
        return self.p_value <= ALPHA

    @property
    def text(self) -> str:
        """A sentence without a full stop."""
        what = {ADDED: "added images differ from the {} before", REMOVED: "removed images differ from the {} that stayed"}[self.change]
        return (
            f"{self.label}: the {self.changed:,} {what.format(f'{self.others:,}')}: distance {self.distance:.2f} at {self.tap}, by chance up "
            f"to {self.by_chance:.2f} (p = {self.p_value:.3f})"
        )


@dataclass(frozen=True)
class Drift:
    """The drift of each class between two versions.

    Attributes:
        classes: those that were compared, at each tap, in the order of their p-values.
        too_few: changed classes with less than five images with features on a side.
        missing, images: images of changed classes whose features are not in the cache at any tap, of so many.
        problem: why no features could be read, "" if they could.
    """

    classes: tuple[ClassDrift, ...]
    too_few: tuple[str, ...]
    missing: int
    images: int
    problem: str = ""

    @property
    def shown(self) -> tuple[ClassDrift, ...]:
        """The classes that drifted, each at the tap where that is clearest."""
        clearest: dict[tuple[str, str], ClassDrift] = {}
        for drift in self.classes:
            if drift.shown:
                clearest.setdefault((drift.label, drift.change), drift)
        return tuple(clearest.values())

    def lines(self) -> list[str]:
        """Return a sentence for each class that drifted, or one that none did, and one about what was not compared."""
        if self.problem:
            return [f"not compared: {self.problem}"]
        lines = [drift.text for drift in self.shown]
        if self.classes and not lines:
            lines = [
                f"none shown: the images of {_counted(len({c.label for c in self.classes}), 'changed class', 'changed classes')} look as before"
            ]
        if self.too_few:
            named = ", ".join(self.too_few[:3]) + ", ..." * (len(self.too_few) > 3)
            lines.append(f"not compared, with fewer than {LEAST} images with features before or now: {named}")
        if self.missing:
            lines.append(
                f"{self.missing:,} of {self.images:,} images of changed classes have no features in the cache and were left out. A run "
                "computes those of its training and validation images"
            )
        return lines


@dataclass(frozen=True)
class Sides:
    """Images of a class that are compared: md5s of those that changed, and of the others."""

    label: str
    change: str
    changed: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        """Whether either side has enough images."""
        return min(len(self.changed), len(self.others)) >= LEAST


def sides(before: Mapping[str, str], now: Mapping[str, str], renamed: Mapping[str, str] | None = None) -> list[Sides]:
    """Return what is to be compared in each class that gained or lost images.

    Args:
        before, now: class by md5 of the images of each version.
        renamed: classes of the earlier version under their present names.
    """
    old, new = _by_class(before, renamed or {}), _by_class(now, {})
    compared = []
    for label in sorted(old.keys() & new.keys()):
        added, removed, stayed = new[label] - old[label], old[label] - new[label], old[label] & new[label]
        if added:
            compared.append(Sides(label, ADDED, tuple(sorted(added)), tuple(sorted(old[label]))))
        if removed and stayed:
            compared.append(Sides(label, REMOVED, tuple(sorted(removed)), tuple(sorted(stayed))))
    return compared


def _by_class(labels: Mapping[str, str], renamed: Mapping[str, str]) -> dict[str, set[str]]:
    classes: dict[str, set[str]] = {}
    for md5, label in labels.items():
        classes.setdefault(renamed.get(label, label), set()).add(md5)
    return classes


@dataclass(frozen=True)
class View:
    """Features of images at a tap.

    Attributes:
        tap: where they were read.
        cached: returns for each md5 whether its features are known.
        read: returns the features (n, d) of md5s that are.
    """

    tap: str
    cached: Callable[[Sequence[str]], npt.NDArray[np.bool_]]
    read: Callable[[Sequence[str]], Features]


def drift(compared: Sequence[Sides], views: Sequence[View], groups: Mapping[str, str]) -> Drift:
    """Test each class for drift.

    Args:
        compared: what is compared in each class.
        views: the features to compare them by.
        groups: group by md5, for images that are not independent of others. One image of each group is taken.
    """
    tested, statistics, rng = [], [], np.random.default_rng(0)
    known: set[str] = set()
    for each in compared:
        for view in views:
            sides_known = [[m for m, there in zip(md5s, view.cached(md5s), strict=True) if there] for md5s in (each.changed, each.others)]
            known.update(*sides_known)
            changed, others = (_independent(md5s, groups) for md5s in sides_known)
            if min(len(changed), len(others)) >= LEAST:
                tested.append((each, view.tap, len(changed), len(others)))
                statistics.append(permuted_distances(view.read(changed), view.read(others), PERMUTATIONS, rng))
    classes = [
        ClassDrift(
            each.label, tap, each.change, changed, others, float(max(values[0], 0)), float(max(np.quantile(values[1:], 0.95), 0)), p_value
        )
        for (each, tap, changed, others), values, p_value in zip(tested, statistics, family_wise(statistics), strict=True)
    ]
    done = {each.label for each, *_ in tested}
    wanted = {md5 for each in compared for md5 in (*each.changed, *each.others)}
    return Drift(
        tuple(sorted(classes, key=lambda c: (c.p_value, -c.distance, c.label, c.tap))),
        tuple(dict.fromkeys(each.label for each in compared if each.label not in done)),
        len(wanted - known),
        len(wanted),
    )


def _independent(md5s: Sequence[str], groups: Mapping[str, str]) -> list[str]:
    """Return an image of each group, at most MOST; an image without a group is one of its own. md5s are sorted, so the first ones are random."""
    first: dict[str, str] = {}
    for md5 in md5s:
        first.setdefault(groups.get(md5) or md5, md5)
    return list(first.values())[:MOST]


def permuted_distances(changed: Features, others: Features, permutations: int, rng: np.random.Generator) -> Features:
    """Return the relative energy distance of two samples, followed by those of random divisions of the same images.

    Args:
        changed, others: (m, d) and (k, d).

    Returns:
        (1 + permutations,).
    """
    both = _whitened(np.concatenate([changed, others]))
    distances = cdist(both, both)
    m, n = len(changed), len(both)
    member = np.zeros((1 + permutations, n))
    member[0, :m] = 1
    member[1:] = rng.permuted(np.tile(member[0], (permutations, 1)), axis=1)
    inside, rows = ((member @ distances) * member).sum(1), member @ distances.sum(1)
    between = 2 * (rows - inside) / (m * (n - m))
    # Means over pairs of different images: the expectation is zero where nothing drifted, whatever the numbers of images.
    within = inside / (m * (m - 1)) + (distances.sum() - 2 * rows + inside) / ((n - m) * (n - m - 1))
    relative: Features = np.divide(between - within, between, out=np.zeros(len(between)), where=between > 0)
    return relative


def _whitened(features: Features) -> Features:
    """Return the first principal components of features (n, d), each with a variance of one: (n, components)."""
    deviation = features.std(0)
    # A channel that hardly varies is left out: its deviations may be rounding errors.
    standardized = (features - features.mean(0)) / np.where(deviation > 1e-3 * deviation.max(), deviation, np.inf)
    left, size, _ = np.linalg.svd(standardized, full_matrices=False)
    kept = min(COMPONENTS, len(features) // IMAGES_EACH, int((size > 1e-6 * max(size[0], 1e-12)).sum()))
    components: Features = left[:, :kept] * math.sqrt(len(features))
    return components


def family_wise(statistics: Sequence[Features]) -> list[float]:
    """Return a p-value for each test, corrected over all of them.

    Args:
        statistics: of each test the observed one, followed by equally many permuted ones.
    """
    if not statistics:
        return []
    table = np.stack(statistics)
    deviation = table.std(1, keepdims=True)
    scores = (table - table.mean(1, keepdims=True)) / np.where(deviation > 0, deviation, 1)
    largest = scores.max(0)
    return [float(np.mean(largest >= score - 1e-9)) for score in scores[:, 0]]


def _counted(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"
