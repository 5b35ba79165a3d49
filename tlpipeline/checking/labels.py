"""Labels that are probably wrong: images that the others would put into another class.

A ridge probe on the features of the profile's best tap predicts every image from all the others, exactly (see `profiling.probes`). The scores
become probabilities by one temperature (Guo et al. 2017, arXiv 1706.04599). As in confident learning (Northcutt et al. 2021, arXiv 1911.00068),
another class counts only if it is as probable as it usually is for its own images, so that classes which are hard to tell do not fill the list.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits
from torch import Tensor

from tlpipeline.alarms import WARN, Alarm
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.checking.quality import Finding
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.profiling.gram import gram_matrices
from tlpipeline.profiling.measure import sample
from tlpipeline.profiling.probes import Matrix, one_hot, with_class_means

KIND = "wrong label"
LEAST = 5  # images of a class on average


@dataclass(frozen=True)
class Suspect:
    """An image whose label is probably wrong: its index, the class that the others say, and the probabilities of both."""

    index: int
    other: int
    given: float
    likely: float


def drawn(manifest: Manifest, images: int, seed: int) -> list[Row]:
    """Return the training and validation images whose labels are checked: at most so many, those of the profile among them.

    None where a class would have fewer than LEAST images on average: then the probe knows too little.
    """
    rows = sample(manifest.used(TRAIN, VAL), images, seed) if images else []
    counts = Counter(row.label for row in rows)
    rows = [row for row in rows if counts[row.label] > 1]
    classes = len({row.label for row in rows})
    return rows if classes > 1 and len(rows) >= LEAST * classes else []


def numbered(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    """Return the number of each image's class among those that occur, (n,)."""
    return np.unique([row.label for row in rows], return_inverse=True)[1]


def find(rows: Sequence[Row], probabilities: Matrix, threshold: float) -> tuple[list[Finding], list[Alarm]]:
    """Return a finding for each label that is probably wrong, and an alarm with the count.

    Args:
        rows: the images that were checked; probabilities: as from `left_out_probabilities`.
        threshold: as for `suspects`.
    """
    names = sorted({row.label for row in rows})
    findings = [
        Finding(
            rows[s.index].path,
            KIND,
            f"labeled {rows[s.index].label} ({s.given:.0%}); the other images say {names[s.other]} ({s.likely:.0%})",
        )
        for s in suspects(probabilities, numbered(rows), threshold)
    ]
    if not findings:
        return [], []
    number = "1 label is" if len(findings) == 1 else f"{len(findings)} labels are"
    text = f"{number} probably wrong, of {len(rows)} that were checked (quality.csv); the first: {findings[0].path}, {findings[0].detail}"
    return findings, [Alarm(KIND, WARN, text)]


def left_out_probabilities(read: Tensor, reading: TapPooling, labels: npt.NDArray[np.int64], groups: Sequence[str] | None = None) -> Matrix:
    """Return the probability of each class for each image, by all the other images: (n, classes).

    Args:
        read: features at a tap, (n, features); labels: class indices 0 to K - 1, each of which occurs, (n,).
        groups: names of groups that are left out whole, "" for an image of its own; None if there are none.
    """
    with threadpool_limits(1):  # as the profile does: factorizations of this size take longer with two
        fit, _ = gram_matrices([reading], [read], labels, {}, groups).fit([0])
    targets = one_hot(labels)
    scores = with_class_means(fit.scores, targets, groups)

    def loss(log_sharpness: float) -> float:
        return -float(log_softmax(np.exp(log_sharpness) * scores, axis=1)[np.arange(len(labels)), labels].mean())

    best = minimize_scalar(loss, bounds=(-3.0, 5.0), method="bounded")
    return np.asarray(np.exp(log_softmax(np.exp(best.x) * scores, axis=1)))


def suspects(probabilities: Matrix, labels: npt.NDArray[np.int64], threshold: float) -> list[Suspect]:
    """Return images whose label is probably wrong, the most probable first.

    Args:
        probabilities: as from `left_out_probabilities`.
        threshold: probability that another class must reach.
    """
    everyone = np.arange(len(labels))
    given = probabilities[everyone, labels]
    usual = np.array([given[labels == k].mean() for k in range(probabilities.shape[1])])
    others = probabilities.copy()
    others[everyone, labels] = 0.0
    other = others.argmax(1)
    likely = others[everyone, other]
    which = np.flatnonzero((likely >= np.maximum(threshold, usual[other])) & (likely > given))
    order = which[np.argsort(given[which] - likely[which], kind="stable")]
    return [Suspect(int(i), int(other[i]), float(given[i]), float(likely[i])) for i in order]
