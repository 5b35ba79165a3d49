"""Metrics on the held-out test split: each image counts once, and accuracy has an interval."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipeline import records
from tlpipeline.data.dataset import Row
from tlpipeline.stats import design_effect, group_numbers, wilson

ECE_BINS = 15
_PROBABILITY = "p:"  # begins the names of the columns of predictions.parquet that hold one for each class

Probabilities = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for some images: the content of predictions.parquet.

    Attributes:
        md5: of each image.
        classes: names in the order of the columns of `probabilities`.
        labels: true class index (n,); -1 where the model does not know the class.
        probabilities: (n, classes).
    """

    md5: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Labels
    probabilities: Probabilities

    @property
    def predicted(self) -> Labels:
        """Class index with the highest probability (n,)."""
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each prediction is correct (n,)."""
        return np.asarray(self.predicted == self.labels)


@dataclass(frozen=True)
class ClassMetrics:
    """Precision, recall, F1 and test images of a class."""

    images: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Metrics:
    """The content of metrics.json, and of classes.json as `classes`.

    Attributes:
        accuracy: with Wilson's interval at the level `confidence`; groups of images widen it by their design effect.
        balanced_accuracy, macro_f1: over the classes with test images.
        log_loss: in nats.
        calibration_error: expected, over 15 equal-width bins of the highest probability (Guo et al. 2017, arXiv 1706.04599).
        majority_class: the largest class in training; majority_accuracy: of always predicting it.
        images: of the test split; not_evaluated: classes without any.
        accuracy_without_copies: with its interval, on the `images_without_copies` test images that have no near copy, and no other image
            of their group, in train or val. None if all test images are so, or none is.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    confidence: float
    balanced_accuracy: float
    macro_f1: float
    log_loss: float
    calibration_error: float
    majority_class: str
    majority_accuracy: float
    images: int
    not_evaluated: tuple[str, ...]
    classes: dict[str, ClassMetrics] = field(default_factory=dict)
    accuracy_without_copies: float | None = None
    accuracy_without_copies_low: float | None = None
    accuracy_without_copies_high: float | None = None
    images_without_copies: int | None = None


def make_predictions(rows: Sequence[Row], classes: Sequence[str], probabilities: Probabilities) -> Predictions:
    """Return the predictions of manifest rows with their probabilities (n, classes)."""
    index = {label: i for i, label in enumerate(classes)}
    return Predictions(
        tuple(r.md5 for r in rows), tuple(classes), np.array([index.get(r.label, -1) for r in rows], dtype=np.int64), probabilities
    )


def compute_metrics(predictions: Predictions, confidence: float, trained_on: Mapping[str, int], groups: Sequence[str] = ()) -> Metrics:
    """Return the metrics of predictions.

    Args:
        predictions: on the test split.
        confidence: level of the interval.
        trained_on: training images per class, for the majority baseline.
        groups: of each image, "" where it has none; images of one group are not independent, and widen the interval. Empty: none has.
    """
    n = len(predictions.labels)
    hits = int(predictions.correct.sum())
    low, high = wilson(hits, n, confidence, design_effect(predictions.correct, group_numbers(groups)) if groups else 1.0)
    matrix = confusion(predictions)
    support, predicted, correct = matrix.sum(1), matrix.sum(0), matrix.diagonal()
    recall = correct / support.clip(min=1)
    precision = correct / predicted.clip(min=1)
    f1 = 2 * correct / (support + predicted).clip(min=1)
    evaluated = support > 0
    true_probability = predictions.probabilities[np.arange(n), predictions.labels].clip(min=1e-12) if n else np.ones(1)
    majority = max(sorted(trained_on), key=lambda label: trained_on[label])
    return Metrics(
        accuracy=_rounded(hits / max(n, 1)),
        accuracy_low=_rounded(low),
        accuracy_high=_rounded(high),
        confidence=confidence,
        balanced_accuracy=_rounded(recall[evaluated].mean()) if n else 0.0,
        macro_f1=_rounded(f1[evaluated].mean()) if n else 0.0,
        log_loss=_rounded(-np.log(true_probability).mean()),
        calibration_error=_rounded(calibration_error(predictions)),
        majority_class=majority,
        majority_accuracy=_rounded(float((predictions.labels == predictions.classes.index(majority)).mean()) if n else 0.0),
        images=n,
        not_evaluated=tuple(c for c, evaluated_class in zip(predictions.classes, evaluated, strict=True) if not evaluated_class),
        classes={
            label: ClassMetrics(int(support[i]), _rounded(precision[i]), _rounded(recall[i]), _rounded(f1[i]))
            for i, label in enumerate(predictions.classes)
        },
    )


def without_copies(predictions: Predictions, copied: Sequence[bool], confidence: float) -> dict[str, float | int]:
    """Return the accuracy on the test images that have no copy in training, as fields of `Metrics`; empty if it is that of all, or of none.

    Args:
        copied: whether each image has a near copy, or another image of its group, in train or val.
        confidence: level of the interval.
    """
    correct = predictions.correct[~np.array(copied, bool)] if len(copied) else predictions.correct
    if len(correct) in (0, len(predictions.correct)):
        return {}
    low, high = wilson(int(correct.sum()), len(correct), confidence)
    return {
        "accuracy_without_copies": _rounded(correct.mean()),
        "accuracy_without_copies_low": _rounded(low),
        "accuracy_without_copies_high": _rounded(high),
        "images_without_copies": len(correct),
    }


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0  # adding 0.0 turns -0.0 into 0.0


def confusion(predictions: Predictions) -> Labels:
    """Return the confusion matrix (classes, classes): counts by true class (row) and predicted class (column)."""
    classes = len(predictions.classes)
    known = predictions.labels >= 0
    matrix: Labels = np.bincount(predictions.labels[known] * classes + predictions.predicted[known], minlength=classes * classes).reshape(
        classes, classes
    )
    return matrix


def calibration_error(predictions: Predictions, bins: int = ECE_BINS) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy in equal-width bins, weighted by images."""
    if not len(predictions.labels):
        return 0.0
    confidence = predictions.probabilities.max(1)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            error += inside.mean() * abs(predictions.correct[inside].mean() - confidence[inside].mean())
    return float(error)


def worst_mistakes(predictions: Predictions, most: int) -> list[int]:
    """Return the indices of the most confident mistakes, the most confident first."""
    wrong = np.flatnonzero(~predictions.correct)
    order = np.argsort(-predictions.probabilities[wrong].max(1), kind="stable") if len(wrong) else wrong
    return [int(i) for i in wrong[order][:most]]


def least_certain(predictions: Predictions, most: int) -> list[int]:
    """Return the indices of the images with the smallest margin between the two most probable classes, the smallest first."""
    if len(predictions.classes) < 2:
        return []
    second, first = np.sort(predictions.probabilities, axis=1)[:, -2:].T
    return [int(i) for i in np.argsort(first - second, kind="stable")[:most]]


@dataclass(frozen=True)
class ConfusedPair:
    """How often images of one class were taken for another: indices into the predictions, the most confident first."""

    actual: str
    predicted: str
    images: tuple[int, ...]


def confused_pairs(predictions: Predictions, most: int) -> list[ConfusedPair]:
    """Return the pairs of classes that are confused most often, the most frequent first."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in worst_mistakes(predictions, len(predictions.labels)):
        pairs.setdefault((int(predictions.labels[i]), int(predictions.predicted[i])), []).append(i)
    frequent = sorted(pairs.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:most]
    return [ConfusedPair(predictions.classes[a], predictions.classes[p], tuple(images)) for (a, p), images in frequent if a >= 0]


@dataclass(frozen=True)
class ReliabilityBin:
    """A point of the reliability diagram: the mean stated probability of some images, and the share of them that is correct with its interval."""

    stated: float
    correct: float
    low: float
    high: float
    images: int


def reliability(predictions: Predictions, confidence: float, bins: int = 10) -> list[ReliabilityBin]:
    """Return the reliability diagram (Niculescu-Mizil and Caruana 2005): images in bins of equal count by the probability of their predicted class.

    Args:
        confidence: level of the intervals.
        bins: at most; each has at least ten images where there are ten.
    """
    stated = predictions.probabilities.max(1) if len(predictions.labels) else np.zeros(0)
    parts = np.array_split(np.argsort(stated, kind="stable"), max(min(bins, len(stated) // 10), 1))
    return [
        ReliabilityBin(
            float(stated[part].mean()),
            float(predictions.correct[part].mean()),
            *wilson(int(predictions.correct[part].sum()), len(part), confidence),
            len(part),
        )
        for part in parts
        if len(part)
    ]


def class_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Return the number of images per class."""
    return dict(sorted(Counter(r.label for r in rows).items()))


# --- files ----------------------------------------------------------------------------------------------------------------------------


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write parquet with the columns md5, label, predicted, and one probability column per class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "md5": list(predictions.md5),
        "label": [predictions.classes[i] for i in predictions.labels],
        "predicted": [predictions.classes[i] for i in predictions.predicted],
    }
    columns |= {f"{_PROBABILITY}{label}": predictions.probabilities[:, i].astype(np.float32) for i, label in enumerate(predictions.classes)}
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_predictions(path: Path) -> Predictions:
    """Read the file of `write_predictions`.

    Raises:
        WorkspaceError: it is missing or damaged.
    """
    md5: list[str] = []
    labels: list[str] = []
    classes: tuple[str, ...] = ()
    parts: list[Probabilities] = []
    for batch in records.read_parquet(path, {"md5": str, "label": str}, records.ANEW, prefix=_PROBABILITY):
        md5 += batch.column("md5").to_pylist()
        labels += batch.column("label").to_pylist()
        columns = [name for name in batch.schema.names if name.startswith(_PROBABILITY)]
        classes = tuple(name.removeprefix(_PROBABILITY) for name in columns)
        parts.append(np.stack([batch.column(name).to_numpy() for name in columns], axis=1))
    index = {label: i for i, label in enumerate(classes)}
    if unknown := sorted(set(labels) - set(index)):
        raise records.unlike(path, f"the class {unknown[0]} has no column of probabilities", records.ANEW)
    if not parts:
        raise records.unlike(path, "it has no rows", records.ANEW)
    return Predictions(tuple(md5), classes, np.array([index[label] for label in labels], dtype=np.int64), np.concatenate(parts))


def write_confusion(predictions: Predictions, path: Path) -> None:
    """Write a CSV line with the actual and predicted class of each test image, for `dvc plots`."""
    lines = [
        "actual,predicted",
        *(
            f"{_cell(predictions.classes[a])},{_cell(predictions.classes[p])}"
            for a, p in zip(predictions.labels, predictions.predicted, strict=True)
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    quoted = text.replace('"', '""')
    return f'"{quoted}"' if any(c in text for c in ',"\r\n') else text
