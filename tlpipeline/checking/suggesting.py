"""Which unlabeled images to label next: those that the model is unsure of, and that are unlike each other."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tlpipeline.profiling.probes import Matrix


def uncertainty(probabilities: Matrix) -> npt.NDArray[np.float64]:
    """Return one minus the margin between the two most probable classes: 0 sure, 1 undecided; (n,)."""
    ordered = np.sort(probabilities, axis=1)
    return np.asarray(1 - (ordered[:, -1] - ordered[:, -2]))


def choose(probabilities: Matrix, features: Matrix, count: int) -> list[int]:
    """Return the indices of the images to label, the most useful first.

    The first is the one that the model is least sure of. Each further one has the largest product of uncertainty and squared distance to the
    nearest image that was taken before: k-center (Sener and Savarese 2018, arXiv 1708.00489), weighted with the margin. So a burst of like
    images is asked for once. `python -m research.suggest` compares it with other ways.

    Args:
        probabilities: of each class by the model, (n, classes).
        features: of the same images, (n, d).
        count: images to choose.
    """
    weight = uncertainty(probabilities) + 1e-6  # where the model is sure of everything, distance decides
    squares = (features**2).sum(1)
    distance = np.ones(len(features))
    left = np.ones(len(features), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(count, len(features))):
        best = int(np.where(left, weight * distance, -1.0).argmax())
        chosen.append(best)
        left[best] = False
        to_best = (squares + squares[best] - 2 * features @ features[best]).clip(min=0)
        distance = to_best if len(chosen) == 1 else np.minimum(distance, to_best)
    return chosen


def reasons(probabilities: Matrix, classes: Sequence[str]) -> list[str]:
    """Return in words what the model says of each image: its two most probable classes."""
    words = []
    for row in probabilities:
        first, second = np.argsort(-row, kind="stable")[:2]
        words.append(f"{classes[first]} {row[first]:.0%} or {classes[second]} {row[second]:.0%}")
    return words
