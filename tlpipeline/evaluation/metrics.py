"""Exact metrics on the held-out test side: each image once, every figure with its interval where it has one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlpipeline.data.dataset import Row
from tlpipeline.stats import wilson

ECE_BINS = 15

Probabilities = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """What a model says of some images: the content of predictions.parquet.

    Attributes:
        md5: of each image; classes: names in the order of the columns.
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
        """Whether each is right (n,)."""
        return np.asarray(self.predicted == self.labels)


def make_predictions(rows: Sequence[Row], classes: Sequence[str], chances: Probabilities) -> Predictions:
    """Put rows and probabilities together."""
    index = {label: i for i, label in enumerate(classes)}
    return Predictions(
        tuple(r.md5 for r in rows), tuple(classes), np.array([index.get(r.label, -1) for r in rows], dtype=np.int64), chances
    )


def compute_metrics(found: Predictions, confidence: float, trained_on: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of metrics.json.

    Args:
        found: on the test side.
        confidence: of the intervals.
        trained_on: training images by class, for the majority baseline.

    Returns:
        accuracy with Wilson's interval; balanced accuracy and macro F1 over the classes that have test images; expected calibration error
        (15 equal-width bins of the highest probability; Guo et al. 2017); log loss in nats; per class precision, recall, F1 and counts.
    """
    n = len(found.labels)
    hits = int(found.correct.sum())
    low, high = wilson(hits, n, confidence)
    matrix = confusion(found)
    support, guessed, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
    recall = right / support.clip(min=1)
    precision = right / guessed.clip(min=1)
    f1 = 2 * right / (support + guessed).clip(min=1)
    evaluated = support > 0
    chance = found.probabilities[np.arange(n), found.labels].clip(min=1e-12) if n else np.ones(1)
    majority = max(sorted(trained_on), key=lambda label: trained_on[label])
    return {
        "accuracy": _rounded(hits / max(n, 1)),
        "accuracy_low": _rounded(low),
        "accuracy_high": _rounded(high),
        "confidence": confidence,
        "balanced_accuracy": _rounded(recall[evaluated].mean()) if n else 0.0,
        "macro_f1": _rounded(f1[evaluated].mean()) if n else 0.0,
        "log_loss": _rounded(-np.log(chance).mean()),
        "calibration_error": _rounded(calibration_error(found)),
        "majority_class": majority,
        "majority_accuracy": _rounded(float((found.labels == found.classes.index(majority)).mean()) if n else 0.0),
        "images": n,
        "not_evaluated": [c for c, there in zip(found.classes, evaluated, strict=True) if not there],
        "classes": {
            label: {
                "images": int(support[i]),
                "precision": _rounded(precision[i]),
                "recall": _rounded(recall[i]),
                "f1": _rounded(f1[i]),
            }
            for i, label in enumerate(found.classes)
        },
    }


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0  # the loss of certain, right predictions is 0, not -0


def confusion(found: Predictions) -> Labels:
    """Return how often each true class (row) was given each predicted class (column)."""
    k = len(found.classes)
    known = found.labels >= 0
    matrix: Labels = np.bincount(found.labels[known] * k + found.predicted[known], minlength=k * k).reshape(k, k)
    return matrix


def calibration_error(found: Predictions, bins: int = ECE_BINS) -> float:
    """Expected calibration error: the mean distance between confidence and accuracy over equal-width bins, weighted by their images."""
    if not len(found.labels):
        return 0.0
    confidence = found.probabilities.max(1)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            error += inside.mean() * abs(found.correct[inside].mean() - confidence[inside].mean())
    return float(error)


def worst_mistakes(found: Predictions, most: int) -> list[int]:
    """Return the indices of the most confident mistakes, the worst first."""
    wrong = np.flatnonzero(~found.correct)
    order = np.argsort(-found.probabilities[wrong].max(1), kind="stable") if len(wrong) else wrong
    return [int(i) for i in wrong[order][:most]]


def class_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Return images by class."""
    return dict(sorted(Counter(r.label for r in rows).items()))


# --- files ----------------------------------------------------------------------------------------------------------------------------


def write_predictions(found: Predictions, path: Path) -> None:
    """Write parquet with the columns md5, label, predicted and one probability column for each class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "md5": list(found.md5),
        "label": [found.classes[i] for i in found.labels],
        "predicted": [found.classes[i] for i in found.predicted],
    }
    columns |= {f"p:{label}": found.probabilities[:, i].astype(np.float32) for i, label in enumerate(found.classes)}
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    classes = tuple(name[2:] for name in table.column_names if name.startswith("p:"))
    index = {label: i for i, label in enumerate(classes)}
    labels = np.array([index[label] for label in table["label"].to_pylist()], dtype=np.int64)
    chances = np.stack([table[f"p:{label}"].to_numpy() for label in classes], axis=1)
    return Predictions(tuple(table["md5"].to_pylist()), classes, labels, chances)


def write_confusion(found: Predictions, path: Path) -> None:
    """Write a line for each test image with its actual and predicted class, as `dvc plots` wants it."""
    lines = [
        "actual,predicted",
        *(f"{_cell(found.classes[a])},{_cell(found.classes[p])}" for a, p in zip(found.labels, found.predicted, strict=True)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    quoted = text.replace('"', '""')
    return f'"{quoted}"' if any(c in text for c in ',"\n') else text
