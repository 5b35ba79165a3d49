"""Near copies: the same picture in other bytes, such as one that was encoded again, resized, cropped, mirrored, or shot a moment later.

Two pictures are compared by their gray values at 24 x 24 pixels (`Facts.picture`), in two steps. Both depend on the pair alone, so how alike a
pair is stays true whatever else is in the folder. How alike near copies are at least depends on the others: see `beyond_chance`.

1. Pairs whose coarse shape is alike: the cosine of their 6 x 6 lowest coefficients of the discrete cosine transform.
2. Of these, pairs that agree in 16 x 16 coefficients after one of them was cropped or both were shifted a little: the best of 45 ways,
   mirrored or not. Coefficients count by their frequency, against the 1/f spectrum of natural pictures, and strong ones are clipped.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
from scipy.fft import dct

from tlpipeline.data.facts import COLOR_SIDE, SIDE, Facts, FactStore

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Pair = tuple[str, str, float]
Window = tuple[float, float]  # part of a side, as fractions

COARSE, FINE = 6, 16  # coefficients a side of both steps
COARSE_LEAST, ALIKE_LEAST = 0.80, 0.75  # cosines of both steps from which on a pair goes on, or is kept
COPY_LEAST = 0.87  # from which on a pair may be one of near copies
_SURE = 0.97  # from which on it is one whatever the other pairs are
_BANDS, _BAND = (0.75, 0.80, 0.85), 0.05  # of likeness in which chance is counted, and their width
_DECAY_MOST = 0.5  # from one band to the next; on real sets chance falls to 0.2 to 0.4
_CHANCE_MOST = 0.5  # share of the pairs above the border that chance may explain
COLOR_MOST = 24.0  # mean difference of Cb and Cr, of 255, up to which two pictures may be one
_SMALLEST = 16  # pixels of the short side from which on a picture shows enough to compare
_CONTRAST_LEAST = 2.0  # standard deviation of the gray values below which a picture shows nothing to compare
_STRONGEST = 30.0  # up to here a coefficient counts by its size: else few strong ones, such as those of stripes, would outvote all details
_WORTH = 0.4  # cosine of a pair as it is, below which no crop or shift is tried
_CELLS, _PAIRS, _LAID = 2**24, 4096, 512  # pairs of coarse shapes, of whole pictures, and of laid pictures, compared at a time

_WHOLE: Window = (0.0, 1.0)
_CROPS = {0.95: (0.0, 0.025, 0.05), 0.9: (0.0, 0.05, 0.1)}  # part of a side that is left, and where it begins
_SHIFT = 0.04  # of a side


def comparable(facts: Facts) -> bool:
    """Return whether an image is large enough to be compared with others."""
    return min(facts.width, facts.height) >= _SMALLEST


def find_copies(
    pictures: Mapping[str, bytes], store: FactStore, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Pair]:
    """Return the pairs of near copies among these images: md5 of both, the smaller one first, and how alike they are; sorted.

    Only contents that the store has not compared before are compared, with all others that it knows.

    Args:
        pictures: `Facts.picture` of comparable images by md5.
        progress: as for `near_copies`.
    """
    compared = store.compared()
    every = dict(pictures)
    if new := sorted(pictures.keys() - compared):
        # Images that are gone may come back: the new ones are compared with them, too.
        every |= {md5: facts.picture for md5, facts in store.known(compared - pictures.keys())}
    names = sorted(every)
    fresh: list[Pair] = []
    if new:
        table = np.frombuffer(b"".join(every[md5] for md5 in names), np.uint8).reshape(len(names), -1)
        pairs, likeness = near_copies(table, np.isin(names, new), progress)
        fresh = [(names[i], names[j], round(float(alike), 4)) for (i, j), alike in zip(pairs.tolist(), likeness, strict=True)]
        store.add_compared(new, fresh)
    known = [] if len(new) == len(names) else store.near_copies()
    return beyond_chance(sorted({pair for pair in (*known, *fresh) if pair[0] in pictures and pair[1] in pictures}))


def beyond_chance(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that are too alike for different pictures of one kind, such as handwritten digits or scans.

    The number of such pairs falls about exponentially with their likeness. It is extrapolated from the pairs between 0.75 and 0.85. The border is
    the lowest from 0.87 on above which chance explains at most half of the pairs.
    """
    likeness = np.array([alike for *_, alike in pairs])
    lower, upper = (int(((likeness >= start) & (likeness < end)).sum()) for start, end in pairwise(_BANDS))
    decay = min(upper / max(lower, 1), _DECAY_MOST)
    above = upper * decay / (1 - decay)  # expected by chance above the upper band
    border = next(
        (
            border
            for border in np.arange(COPY_LEAST, _SURE, 0.005)
            if above * decay ** ((border - _BANDS[-1]) / _BAND) <= _CHANCE_MOST * (likeness >= border).sum()
        ),
        _SURE,
    )
    return [pair for pair in pairs if pair[2] >= border]


def connected(pairs: Iterable[Pair]) -> list[list[str]]:
    """Return the sets of md5s that pairs lead to, step by step; each sorted, and sorted by their first ones."""
    parent: dict[str, str] = {}

    def first(md5: str) -> str:
        while parent.setdefault(md5, md5) != md5:
            parent[md5] = parent[parent[md5]]
            md5 = parent[md5]
        return md5

    for one, other, _ in pairs:
        smaller, larger = sorted((first(one), first(other)))
        parent[larger] = smaller
    members: dict[str, list[str]] = defaultdict(list)
    for md5 in sorted(parent):
        members[first(md5)].append(md5)
    return [members[md5] for md5 in sorted(members)]


def near_copies(
    pictures: npt.NDArray[np.uint8],
    new: npt.NDArray[np.bool_] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Integers, Floats]:
    """Find the pairs of pictures that are alike.

    Args:
        pictures: `Facts.picture` of each image, (n, bytes).
        new: the images that are compared with all others, (n,); None is all of them.
        progress: called with (images done, number of new images).

    Returns:
        The pairs (m, 2), the smaller index first, sorted; and how alike they are, 0.75 to 1 (m,).
    """
    gray = pictures[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)
    color = pictures[:, SIDE * SIDE :].astype(np.int16)
    number = np.flatnonzero(np.ones(len(gray), bool) if new is None else new)
    pairs, likeness = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    for candidates in _blocks(_coarse_pairs(gray, number, progress), _PAIRS):
        i, j = candidates.T
        near = np.abs(color[i] - color[j]).reshape(len(i), -1)
        mirrored = np.abs(color[i] - _mirrored_color(color[j])).reshape(len(i), -1)
        candidates = _worth_laying(gray, candidates[np.minimum(near.mean(1), mirrored.mean(1)) <= COLOR_MOST])
        for part in _blocks(iter([candidates]), _LAID):
            alike = _likeness(gray, part)
            pairs.append(part[alike >= ALIKE_LEAST])
            likeness.append(alike[alike >= ALIKE_LEAST])
    every, alike = np.concatenate(pairs), np.concatenate(likeness)
    order = np.lexsort((every[:, 1], every[:, 0]))
    return every[order], alike[order]


def _mirrored_color(color: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    return color.reshape(-1, 2, COLOR_SIDE, COLOR_SIDE)[..., ::-1].reshape(len(color), -1)


def _coarse_pairs(gray: npt.NDArray[np.uint8], new: Integers, progress: Callable[[int, int], None]) -> Iterator[Integers]:
    """Yield pairs of alike coarse shape, (m, 2), the smaller index first; one of each is new."""
    transform = dct(np.eye(SIDE, dtype=np.float32), axis=0, norm="ortho")[:COARSE]
    weight = _weight(COARSE, 0.5)
    shapes = np.concatenate([_unit((transform @ part.astype(np.float32) @ transform.T) * weight) for part in _blocks_of(gray)] or [_none()])
    # A picture without contrast is like any other: its noise is compared.
    shapes[np.concatenate([part.std(axis=(1, 2)) for part in _blocks_of(gray)] or [np.zeros(0)]) < _CONTRAST_LEAST] = 0
    # The new ones first: what is behind an image are the others that it is yet to be compared with, so each pair is looked at once.
    order = np.concatenate([new, np.setdiff1d(np.arange(len(gray)), new)])
    shapes = shapes[order]
    mirrored = shapes * _mirror(COARSE)
    start = 0
    while start < len(new):
        end = min(len(new), start + max(1, _CELLS // (len(order) - start)))
        others = shapes[start:].T
        row, column = np.nonzero(np.maximum(shapes[start:end] @ others, mirrored[start:end] @ others) >= COARSE_LEAST)
        later = column > row
        yield np.sort(np.stack([order[start + row[later]], order[start + column[later]]], 1), axis=1)
        progress(end, len(new))
        start = end


def _none() -> Floats:
    return np.zeros((0, COARSE * COARSE), np.float32)


def _blocks_of(gray: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    return (gray[start : start + _PAIRS] for start in range(0, len(gray), _PAIRS))


def _blocks(parts: Iterator[Integers], size: int) -> Iterator[Integers]:
    """Yield these pairs at most `size` at a time."""
    for part in parts:
        yield from (part[start : start + size] for start in range(0, len(part), size))


def _worth_laying(gray: npt.NDArray[np.uint8], pairs: Integers) -> Integers:
    """Return those pairs that are somewhat alike as they are."""
    images, place = np.unique(pairs, return_inverse=True)
    i, j = place.reshape(-1, 2).T
    transform = dct(np.eye(SIDE, dtype=np.float32), axis=0, norm="ortho")[:FINE]
    whole = _unit((transform @ gray[images].astype(np.float32) @ transform.T) * _weight(FINE, 1.0))
    alike = np.maximum(np.einsum("md,md->m", whole[i], whole[j]), np.einsum("md,md->m", whole[i], whole[j] * _mirror(FINE)))
    return np.asarray(pairs[alike >= _WORTH], np.int64)


def _mirror(side: int) -> Floats:
    """Return the sign that each coefficient gets when a picture is mirrored."""
    return np.tile(np.where(np.arange(side) % 2, -1, 1), side).astype(np.float32)


def _likeness(gray: npt.NDArray[np.uint8], pairs: Integers) -> Floats:
    """Return the cosine of each pair in the best of all ways to lay one on the other, mirrored or not (m,)."""
    images, place = np.unique(pairs, return_inverse=True)
    i, j = place.reshape(-1, 2).T
    views = _views(gray[images])
    mirrored = views * _mirror(FINE)
    best = np.full(len(pairs), -1, np.float32)
    lines = _lines()
    for one, other in _ways():
        a, b = (lines.index(one[0]), lines.index(one[1])), (lines.index(other[0]), lines.index(other[1]))
        best = np.maximum(best, np.einsum("md,md->m", views[i, a[0], a[1]], views[j, b[0], b[1]]))
        # A mirrored window begins where the other one ends.
        from_right = (1 - other[1][1], 1 - other[1][0])
        b = (b[0], lines.index(_rounded(from_right)))
        best = np.maximum(best, np.einsum("md,md->m", views[i, a[0], a[1]], mirrored[j, b[0], b[1]]))
    return best


def _views(gray: npt.NDArray[np.uint8]) -> Floats:
    """Return the coefficients of each picture in each window: (n, windows of height, windows of width, 256), of unit length."""
    count = len(_lines())
    operator = _operator()
    products = operator @ gray.astype(np.float32) @ operator.T
    views = products.reshape(len(gray), count, FINE, count, FINE).transpose(0, 1, 3, 2, 4)
    views = views.clip(-_STRONGEST, _STRONGEST) * _weight(FINE, 0.5)
    return _unit(views.reshape(-1, FINE, FINE)).reshape(len(gray), count, count, -1)


def _unit(coefficients: Floats) -> Floats:
    flat = coefficients.reshape(len(coefficients), coefficients.shape[1] * coefficients.shape[2])
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3), np.float32)


def _weight(side: int, power: float) -> Floats:
    """Return the weight of each coefficient by its frequency, 0 for the mean (side, side)."""
    k = np.arange(side)
    return np.asarray(np.hypot(k[:, None], k[None, :]) ** power, np.float32)


def _rounded(window: Window) -> Window:
    return round(window[0], 4), round(window[1], 4)


@cache
def _ways() -> tuple[tuple[tuple[Window, Window], tuple[Window, Window]], ...]:
    """Return the windows (of height, of width) of both pictures that are laid on each other."""
    whole = (_WHOLE, _WHOLE)
    ways = [(whole, whole)]
    for left, starts in _CROPS.items():
        for y, x in product(starts, starts):
            window = (_rounded((y, y + left)), _rounded((x, x + left)))
            ways += [(window, whole), (whole, window)]
    for dy, dx in product((-_SHIFT, 0.0, _SHIFT), repeat=2):
        if dy or dx:
            ways.append(((_shifted(dy), _shifted(dx)), (_shifted(-dy), _shifted(-dx))))
    return tuple(ways)


def _shifted(by: float) -> Window:
    return _rounded((max(0.0, by), min(1.0, 1 + by)))


@cache
def _lines() -> list[Window]:
    """Return the windows along one side."""
    return sorted({line for way in _ways() for window in way for line in window})


@cache
def _operator() -> Floats:
    """Return the matrix that samples a line of pixels in each window and transforms it: (windows x 16, 24)."""
    transform = dct(np.eye(SIDE), axis=0, norm="ortho")[:FINE]
    parts = []
    for start, end in _lines():
        at = ((start + (np.arange(SIDE) + 0.5) / SIDE * (end - start)) * SIDE - 0.5).clip(0, SIDE - 1)
        low = np.floor(at).astype(int).clip(0, SIDE - 2)
        sample = np.zeros((SIDE, SIDE))
        sample[np.arange(SIDE), low] = 1 - (at - low)
        sample[np.arange(SIDE), low + 1] += at - low
        parts.append(transform @ sample)
    return np.concatenate(parts).astype(np.float32)
