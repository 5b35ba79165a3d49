"""Shortcuts: labels that can be told from facts of the files, whatever is on the pictures.

A network learns the easiest rule that its training images allow (Geirhos et al. 2020, arXiv 2004.07780). If one class was saved as PNG and the
other as JPEG, the test images share the shortcut, and the accuracy says nothing about other images.

Only facts that the picture's content does not change are tried: how a file was made, not what it shows. File size, brightness and the ratio of
the sides depend on what is shown, and are left out: they tell many honest classes apart.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from tlpipeline.alarms import BLOCK, WARN, Alarm
from tlpipeline.checking.quality import Finding, listed
from tlpipeline.data.dataset import Row
from tlpipeline.data.facts import Facts

KIND = "shortcut"
ALL = "all facts"
FOLDS = 10
MOST = 20_000  # images that are looked at: more of them say the same, and many classes take long
RARE = 0.02  # share of the images below which a value of a fact is counted with the other rare ones
RIDGE = 1.0  # images that say nothing
CONFIDENCE = 0.999  # of the lower bound that must lie above chance

Matrix = npt.NDArray[np.float64]

# What a person reads, and the value that is compared. Values are categories: 100 pixels and 104 pixels are two kinds of files.
FACTS: Mapping[str, Callable[[Facts], str]] = {
    "file format": lambda f: f.format,
    "mode": lambda f: f.mode,
    "size": lambda f: f"{f.width} x {f.height} pixels",
    "short side": lambda f: f"{min(f.width, f.height)} pixels",
    "JPEG quality": lambda f: str(f.jpeg_quality),
    "EXIF": lambda f: "present" if f.exif else "absent",
    "camera": lambda f: f.camera or "not given",
    "color": lambda f: "gray" if f.colorless else "colored",
    "transparency": lambda f: "present" if f.transparent else "absent",
    "pages": lambda f: str(f.pages),
    "border at the top": lambda f: f"{f.top} pixels",
    "border at the bottom": lambda f: f"{f.bottom} pixels",
    "border at the left": lambda f: f"{f.left} pixels",
    "border at the right": lambda f: f"{f.right} pixels",
}


@dataclass(frozen=True)
class Score:
    """How well one fact, or all of them, tell a class from the others on images that were left out.

    Attributes:
        fact: its name; ALL for all of them.
        label: the class.
        balanced, low, high: mean of the accuracy on the class and on the others, with its interval; chance is 0.5.
    """

    fact: str
    label: str
    balanced: float
    low: float
    high: float


def find(rows: Sequence[Row], facts: Sequence[Facts], threshold: float) -> tuple[list[Finding], list[Alarm]]:
    """Return an alarm if facts of the files tell a class from the others, and a finding for each fact with an example.

    Args:
        threshold: balanced accuracy that the lower bound must exceed.
    """
    drawn = sorted(range(len(rows)), key=lambda i: rows[i].md5)[:MOST]  # as good as at random
    rows, facts = [rows[i] for i in drawn], [facts[i] for i in drawn]
    revealing = [score for score in scores(rows, facts) if score.low > threshold]
    if not revealing:
        return [], []
    best = max(revealing, key=lambda score: score.low)
    classes = {row.label for row in rows}
    labels = sorted({score.label for score in revealing})
    names = list(
        dict.fromkeys(score.fact for score in sorted(revealing, key=lambda s: -s.low) if score.label == best.label and score.fact != ALL)
    )
    whose = [best.label, *(label for label in labels if label != best.label)]
    text = (
        f"files of {listed(whose)} differ from the others by {listed(names) or 'several facts together'}"
        f"{f' ({best.label})' if len(classes) > 2 and len(labels) > 1 else ''}: without the pictures, {best.label} is told apart at "
        f"{best.balanced:.1%} ({best.low:.1%} to {best.high:.1%}, chance 50.0%); a model may have learned nothing else"
    )
    # Where the files of a few among many classes are special, the accuracy still speaks of the others.
    severity = BLOCK if 2 * len(labels) >= len(classes) else WARN
    findings = [_finding(rows, facts, score) for score in sorted(revealing, key=lambda s: -s.low) if score.fact != ALL]
    return findings, [Alarm(KIND, severity, text)]


def _finding(rows: Sequence[Row], facts: Sequence[Facts], score: Score) -> Finding:
    """Return the value of the fact that is most typical of the class, with the first image that has it."""
    values = _values(score.fact, facts)
    inside = Counter(value for value, row in zip(values, rows, strict=True) if row.label == score.label)
    outside = Counter(value for value, row in zip(values, rows, strict=True) if row.label != score.label)
    total, rest = inside.total(), outside.total()
    typical = max(inside, key=lambda value: (inside[value] / total - outside[value] / rest, value))
    path = min(row.path for value, row in zip(values, rows, strict=True) if row.label == score.label and value == typical)
    shares = f"{inside[typical]} of {total} images of {score.label} and {outside[typical]} of {rest} others"
    return Finding(path, KIND, f"{score.fact} {typical}: {shares}")


def scores(rows: Sequence[Row], facts: Sequence[Facts]) -> list[Score]:
    """Return the score of each class by all facts together, then by each one that varies.

    A ridge classifier on the values of the facts is cross-validated over groups of images, class and others with the same weight. For a single
    fact it is the rule that asks whether the image's value is more frequent in the class or elsewhere. The intervals hold for all classes
    together (Bonferroni).
    """
    names, labels = np.unique([row.label for row in rows], return_inverse=True)
    clusters = np.unique([row.key for row in rows], return_inverse=True)[1]
    fold = _folds(rows)
    columns = {name: _one_hot(_values(name, facts)) for name in FACTS}
    columns = {name: column for name, column in columns.items() if column.shape[1] > 1}
    if not columns:
        return []
    z = float(norm.ppf(1 - (1 - CONFIDENCE) / len(names)))
    out = []
    for fact, x in {ALL: np.concatenate(list(columns.values()), axis=1), **columns}.items():
        guesses = _left_out(x, labels, fold)
        for number, name in enumerate(names):
            own = labels == number
            balanced, error = balanced_accuracy(guesses[:, number] == own, own.astype(np.int64), clusters)
            out.append(Score(fact, str(name), balanced, max(balanced - z * error, 0.0), min(balanced + z * error, 1.0)))
    return out


def _folds(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Return the fold of each image; those of a group are in the same one."""
    return np.array([int(hashlib.md5(row.key.encode(), usedforsecurity=False).hexdigest(), 16) % FOLDS for row in rows])


def _values(fact: str, facts: Sequence[Facts]) -> list[str]:
    """Return the value of a fact for each image; rare values are one."""
    values = [FACTS[fact](f) for f in facts]
    counts = Counter(values)
    return [value if counts[value] >= max(2, RARE * len(values)) else "of a rare kind" for value in values]


def _one_hot(values: Sequence[str]) -> Matrix:
    """Return a column for each value: (n, values)."""
    place = np.unique(values, return_inverse=True)[1]
    return np.eye(int(place.max()) + 1)[place]


def _left_out(x: Matrix, labels: npt.NDArray[np.int64], fold: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return for each image and class whether the other folds take it for that class: (n, classes)."""
    classes = int(labels.max()) + 1
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    guesses = np.zeros((len(labels), classes), dtype=bool)
    for k in range(FOLDS):
        inside, outside = fold != k, fold == k
        if not outside.any() or not inside.any():
            continue
        members = np.flatnonzero(inside)
        members = members[np.argsort(labels[members], kind="stable")]
        bounds = np.searchsorted(labels[members], np.arange(classes + 1))
        gram, sums = x[members].T @ x[members], x[members].sum(0)
        for number in range(classes):
            own = x[members[bounds[number] : bounds[number + 1]]]
            rest = len(members) - len(own)
            if not len(own) or not rest:
                continue
            # Each side has half of the weight: the Gram matrix of the others is that of all without the class.
            a, b = 0.5 / len(own), 0.5 / rest
            products = own.T @ own
            left = a * products + b * (gram - products) + RIDGE / len(x) * np.eye(x.shape[1])
            right = a * own.sum(0) - b * (sums - own.sum(0))
            guesses[outside, number] = x[outside] @ np.linalg.solve(left, right) > 0
    return guesses


def balanced_accuracy(right: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64], clusters: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean of the classes' accuracies, and its standard error over groups.

    Errors of a group add up (cluster-robust variance, Liang and Zeger 1986). Two hits and two misses for each class keep the error of a perfect
    score above zero (Agresti and Coull 1998).

    Args:
        right: whether each image is classified correctly; labels, clusters: its class and its group; (n,) each.
    """
    y = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(y)
    recall = np.bincount(y, right) / counts
    influence = (right - recall[y]) / counts[y] / len(counts)
    smoothed = (recall * counts + 2) / (counts + 4)
    floor = (smoothed * (1 - smoothed) / (counts + 4)).sum() / len(counts) ** 2
    return float(recall.mean()), float(np.sqrt(max((np.bincount(clusters, influence) ** 2).sum(), floor)))
