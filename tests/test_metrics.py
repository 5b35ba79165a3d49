"""Metrics: those of the reference implementation, intervals of the literature, each image once, nothing lost on the way to disk."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)

from tlpipeline.alarms import WARN, Alarm
from tlpipeline.backbones import catalogue
from tlpipeline.backbones.classifier import Classifier, probabilities
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.data import dataset
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images
from tlpipeline.data.splits import SPLIT_NAMES
from tlpipeline.evaluation.metrics import (
    Predictions,
    calibration_error,
    class_counts,
    compute_metrics,
    confusion,
    make_predictions,
    read_predictions,
    worst_mistakes,
    write_confusion,
    write_predictions,
)
from tlpipeline.registry.card import card
from tlpipeline.stats import design_effect, wilson


def drawn(n: int = 300, classes: int = 5, seed: int = 0, absent: int | None = None) -> Predictions:
    """Random predictions that are right more often than chance; no image is of the absent class."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(classes) if c != absent], n)
    chances = rng.dirichlet(np.ones(classes), n) + 0.5 * np.eye(classes)[labels] * rng.random((n, 1))
    chances = (chances / chances.sum(1, keepdims=True)).astype(np.float32)
    return Predictions(tuple(f"{i:032x}" for i in range(n)), tuple(f"class {c}" for c in range(classes)), labels, chances)


def of(labels: list[int], chances: list[list[float]]) -> Predictions:
    table = np.array(chances, dtype=np.float32)
    names = tuple("abcdef"[: table.shape[1]])
    return Predictions(tuple(map(str, range(len(labels)))), names, np.array(labels), table)


def plain(found: Predictions, confidence: float = 0.95) -> dict[str, float]:
    return asdict(compute_metrics(found, confidence, {label: 1 for label in found.classes}))


# --- the figures ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [None, 0, 3])
@pytest.mark.parametrize(("n", "classes"), [(300, 5), (40, 7), (200, 2)])
def test_the_figures_are_those_of_the_reference_implementation(n: int, classes: int, absent: int | None) -> None:
    if absent is not None and absent >= classes:
        absent = 1
    found = drawn(n, classes, seed=n, absent=absent)
    said = asdict(compute_metrics(found, 0.95, {label: i for i, label in enumerate(found.classes)}))
    y, guess = found.labels, found.predicted
    present = sorted(set(y.tolist()))
    assert said["accuracy"] == pytest.approx(accuracy_score(y, guess), abs=1e-6)
    assert said["macro_f1"] == pytest.approx(f1_score(y, guess, labels=present, average="macro", zero_division=0), abs=1e-6)
    assert said["log_loss"] == pytest.approx(
        log_loss(y, found.probabilities / found.probabilities.sum(1, keepdims=True, dtype=float), labels=range(classes)), abs=1e-5
    )
    assert (confusion(found) == confusion_matrix(y, guess, labels=range(classes))).all()
    # Balanced accuracy as the mean recall of the classes that are there.
    recalls = precision_recall_fscore_support(y, guess, labels=present, zero_division=0)[1]
    assert said["balanced_accuracy"] == pytest.approx(recalls.mean(), abs=1e-6)
    if len(present) == classes:
        assert said["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, guess), abs=1e-6)
    for i, (precision, recall, f1, support) in enumerate(
        zip(*precision_recall_fscore_support(y, guess, labels=range(classes), zero_division=0), strict=True)
    ):
        line = said["classes"][found.classes[i]]
        assert (line["precision"], line["recall"], line["f1"]) == pytest.approx((precision, recall, f1), abs=1e-6)
        assert line["images"] == support


def test_a_class_without_test_images_is_named_and_lowers_nothing() -> None:
    found = of([0, 0, 2, 2], [[0.8, 0.1, 0.1]] * 2 + [[0.1, 0.1, 0.8]] * 2)
    said = plain(found)
    assert said["not_evaluated"] == ("b",)
    assert (said["accuracy"], said["balanced_accuracy"], said["macro_f1"]) == (1, 1, 1)


def test_the_majority_class_is_that_of_the_training_images() -> None:
    found = drawn(100, 3)
    said = asdict(compute_metrics(found, 0.95, {"class 0": 5, "class 1": 90, "class 2": 90}))
    assert said["majority_class"] == "class 1"  # of two equal ones the first
    assert said["majority_accuracy"] == pytest.approx((found.labels == 1).mean())


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_the_accuracy_is_wilson_s(hits: int, n: int, low: float, high: float) -> None:
    """The examples of Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    said = plain(of([0] * n, [[0.9, 0.1]] * hits + [[0.1, 0.9]] * (n - hits)))
    assert (said["accuracy_low"], said["accuracy_high"]) == pytest.approx((low, high), abs=5e-5)
    assert said["accuracy_low"] <= said["accuracy"] <= said["accuracy_high"]


def test_images_of_a_group_are_one_witness_of_the_accuracy() -> None:
    """Forty patients of a hundred frames each: right on all frames of 36 patients. The interval is nearly that of 36 of 40."""
    hits, groups = [[0.9, 0.1]] * 3600 + [[0.1, 0.9]] * 400, [f"patient{i // 100}" for i in range(4000)]
    frames = of([0] * 4000, hits)
    alone, grouped = (compute_metrics(frames, 0.95, {"a": 1, "b": 1}, g) for g in ((), groups))
    assert alone.accuracy_high - alone.accuracy_low < 0.02
    low, high = wilson(36, 40)
    assert (grouped.accuracy_low, grouped.accuracy_high) == pytest.approx((low, high), abs=0.02)
    # Where all are right, nothing says how alike the frames of a patient are: they count as copies.
    perfect = compute_metrics(of([0] * 4000, [[0.9, 0.1]] * 4000), 0.95, {"a": 1, "b": 1}, groups)
    assert perfect.accuracy_low == pytest.approx(wilson(40, 40)[0], abs=0.02)
    single = compute_metrics(frames, 0.95, {"a": 1, "b": 1}, [f"{i}" for i in range(4000)])
    assert single == alone


def test_intervals_of_grouped_images_hold_the_truth_as_often_as_they_say() -> None:
    """300 data sets of 30 patients with 1 to 12 frames, most of which share their fate."""
    held = {True: 0, False: 0}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 13, 30)
        patient = np.repeat(np.arange(30), sizes)
        right = np.where(rng.random(len(patient)) < 0.8, (rng.random(30) < 0.8)[patient], rng.random(len(patient)) < 0.8)
        for grouped in held:
            effect = design_effect(right, patient) if grouped else 1.0
            low, high = wilson(int(right.sum()), len(right), 0.95, effect)
            held[grouped] += low <= 0.8 <= high
    assert held[True] / 300 > 0.92
    assert held[False] / 300 < 0.7


def test_more_confidence_makes_a_wider_interval() -> None:
    narrow, wide = plain(drawn(), 0.8), plain(drawn(), 0.99)
    assert wide["accuracy_low"] < narrow["accuracy_low"] < narrow["accuracy_high"] < wide["accuracy_high"]


def test_calibration_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    """Two images at 0.9, one of them right; two at 0.58, both right: (|0.5 - 0.9| + |1 - 0.58|) / 2."""
    found = of([0, 1, 0, 0], [[0.9, 0.1], [0.9, 0.1], [0.58, 0.42], [0.58, 0.42]])
    assert calibration_error(found) == pytest.approx(0.41, abs=1e-6)
    # In one bin what is too sure and what is not sure enough cancel: |0.75 - 0.74|.
    assert calibration_error(found, bins=1) == pytest.approx(0.01, abs=1e-6)


@pytest.mark.parametrize(("right", "error"), [(4, 0.25), (3, 0.0), (0, 0.75)])
def test_confidence_is_calibrated_where_it_is_the_accuracy(right: int, error: float) -> None:
    assert calibration_error(of([0] * right + [1] * (4 - right), [[0.75, 0.25]] * 4)) == pytest.approx(error, abs=1e-6)


def test_certainty_falls_into_the_last_bin() -> None:
    said = plain(of([0, 1], [[1.0, 0.0], [1.0, 0.0]]))
    assert said["calibration_error"] == 0.5
    assert said["log_loss"] == pytest.approx(-np.log(1e-12) / 2, rel=1e-6)


def test_metrics_are_json_without_a_negative_zero() -> None:
    text = json.dumps(plain(of([0, 1], [[1.0, 0.0], [0.0, 1.0]])), allow_nan=False)
    assert "-0.0" not in text


def test_the_worst_mistakes_are_the_most_confident_ones() -> None:
    found = of([0, 0, 1, 1, 0], [[0.2, 0.8], [0.9, 0.1], [0.99, 0.01], [0.4, 0.6], [0.4, 0.6]])
    assert worst_mistakes(found, 10) == [2, 0, 4]
    assert worst_mistakes(found, 1) == [2]
    assert worst_mistakes(of([0], [[1.0, 0.0]]), 5) == []


# --- rows and predictions -------------------------------------------------------------------------------------------------------------


def row(label: str, md5: str) -> Row:
    return Row(f"{label}/{md5}.png", md5, label, "test", 32, 32, "RGB", "")


def test_rows_and_probabilities_are_put_together_by_the_names_of_the_classes() -> None:
    rows = [row("cat", "1"), row("ant", "2"), row("new", "3")]
    found = make_predictions(rows, ["ant", "bee", "cat"], np.eye(3, dtype=np.float32)[[2, 1, 0]])
    assert found.md5 == ("1", "2", "3")
    assert found.labels.tolist() == [2, 0, -1]
    assert found.correct.tolist() == [True, False, False]  # what the model does not know it cannot get right
    assert confusion(found).sum() == 2


def test_images_are_counted_by_class() -> None:
    assert class_counts([row("b", "1"), row("a", "2"), row("b", "3")]) == {"a": 1, "b": 2}


def test_each_image_is_counted_once(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=8)
    for original in list(folder.rglob("00[0-3].png")):
        (original.parent / f"copy of {original.name}").write_bytes(original.read_bytes())
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    rows = manifest.used(*SPLIT_NAMES)
    net = catalogue.load("demonstration", "none")
    model = Classifier(net, [TapPooling("conv1", 32, (1,))], 3, frozen=True)
    chances = probabilities(model, Images(folder, rows, net.transforms), torch.device("cpu"), lambda _: None)
    found = make_predictions(rows, manifest.classes, chances.numpy())
    assert len(manifest.rows) == 24 + 12
    assert len(set(found.md5)) == len(found.md5) == plain(found)["images"] == confusion(found).sum() == 24


# --- files ----------------------------------------------------------------------------------------------------------------------------


def test_predictions_survive_the_way_to_disk_and_back(tmp_path: Path) -> None:
    found = drawn(50, 4)
    found = Predictions(found.md5, ("plain", "p:odd", 'with "quotes", commas', "größe"), found.labels, found.probabilities)
    write_predictions(found, tmp_path / "predictions.parquet")
    back = read_predictions(tmp_path / "predictions.parquet")
    assert (back.md5, back.classes) == (found.md5, found.classes)
    assert (back.labels == found.labels).all()
    assert (back.probabilities == found.probabilities).all()
    assert back.probabilities.dtype == np.float32
    write_predictions(back, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "predictions.parquet").read_bytes()


def test_the_confusion_matrix_is_written_as_one_line_an_image(tmp_path: Path) -> None:
    found = of([0, 1, 1], [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    found = Predictions(found.md5, ('a "b", c', "d"), found.labels, found.probabilities)
    write_confusion(found, tmp_path / "plots" / "confusion.csv")
    with (tmp_path / "plots" / "confusion.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines == [["actual", "predicted"], ['a "b", c', 'a "b", c'], ["d", 'a "b", c'], ["d", "d"]]


def test_of_equal_majorities_the_first_by_name_is_taken_in_whatever_order_they_come() -> None:
    assert compute_metrics(drawn(100, 3), 0.95, {"class 2": 90, "class 1": 90, "class 0": 5}).majority_class == "class 1"


def test_names_of_classes_mean_themselves_in_the_model_card() -> None:
    names = ("<script>alert(1)</script>", "[a](javascript:b)", "a\n# title", "**b**")
    reached = replace(compute_metrics(drawn(100, 4), 0.95, {"class 0": 9}), not_evaluated=names)
    reached = replace(reached, classes=dict(zip(names, reached.classes.values(), strict=True)))
    facts: dict[str, object] = dict.fromkeys(("why", "data", "model", "params_md5", "seed", "parent"), "x") | {
        "case": {"case": "small_similar", "slice": "fc2", "size": 32}, "read": ["fc2"], "bounded": (), "metrics": reached, "environment": {},
        "verdict": {"text": f"not compared: {', '.join(names)}"}, "start": None, "alarms": (Alarm("left out", WARN, ", ".join(names)),),
        "params": {"backbone": {"name": "net", "weights": "none"}, "cluster": {"workers": 0}},
    }  # fmt: skip
    text = card("x@v0.1.0", facts)
    assert not re.search(r"<script|^# title|[^\\]\[a|[^\\]\*\*b", text, re.M)
    assert text.count(r"\[a\](javascript:b)") == 5
