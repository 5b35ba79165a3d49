"""Drift by class: silent on random growth, shown where a class changes, and only from features that the cache has."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageEnhance

from tests.helpers.images import paint
from tests.helpers.workspaces import set_param
from tlpipeline.api import Workspace
from tlpipeline.cli import data_diff
from tlpipeline.data.drift import ADDED, REMOVED, Drift, Sides, View, drift, sides
from tlpipeline.progress import silent
from tlpipeline.workspace import history, layout, stages

Labels = dict[str, str]


def view(features: dict[str, np.ndarray], tap: str = "conv1") -> View:  # type: ignore[type-arg]
    """Return features by md5 as a tap."""

    def cached(md5s: Sequence[str]) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([md5 in features for md5 in md5s], dtype=bool)

    return View(tap, cached, lambda md5s: np.stack([features[md5] for md5 in md5s]))


def drawn(seed: int, shift: float = 0.0, classes: int = 2) -> Drift:
    """Return the drift of classes that got 15 images beside 30; half of those of class 0 are shifted by so many deviations."""
    rng = np.random.default_rng(seed)
    features, compared = {}, []
    for label in range(classes):
        values = rng.normal(size=(45, 12)) * rng.uniform(0.1, 10, 12)
        if label == 0:
            values[:8] += shift * values.std(0)
        names = [f"{label}-{i:02d}" for i in range(45)]
        features |= dict(zip(names, values, strict=True))
        compared.append(Sides(str(label), ADDED, tuple(names[:15]), tuple(names[15:])))
    return drift(compared, [view(features), view({m: x[::-1] ** 3 for m, x in features.items()}, "conv2")], {})


def test_random_growth_is_silent_and_a_planted_drift_is_shown_in_its_class() -> None:
    alarms = sum(bool(drawn(seed).shown) for seed in range(40))
    assert alarms <= 7, "5 % are allowed: more than seven of 40 has a probability below 0.1 %"
    found = [drawn(seed, shift=3) for seed in range(5)]
    assert all("0" in [each.label for each in result.shown] for result in found)
    assert found[0].lines()[0].startswith("0: the 15 added images differ from the 30 before: distance 0.")
    assert all(each.shown[0].distance > each.shown[0].by_chance for each in found)


def test_equal_inputs_give_equal_results() -> None:
    assert drawn(3) == drawn(3)


def test_images_of_a_group_count_as_one() -> None:
    counted = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        bursts = np.repeat(rng.normal(size=(8, 8)), 5, axis=0)  # eight objects, five pictures of each
        values = np.concatenate([bursts + 0.01 * rng.normal(size=bursts.shape), rng.normal(size=(30, 8))])
        names = [f"{i:03d}" for i in range(70)]
        compared, views = [Sides("a", ADDED, tuple(names[:40]), tuple(names[40:]))], [view(dict(zip(names, values, strict=True)))]
        grouped = drift(compared, views, {name: f"object {i // 5}" for i, name in enumerate(names[:40])})
        assert grouped.classes[0].changed == 8
        counted.append((bool(drift(compared, views, {}).shown), bool(grouped.shown)))
    alone, independent = map(sum, zip(*counted, strict=True))
    assert alone == 10
    assert independent <= 3, "more than three of ten has a probability of 0.1 %"


def test_what_is_compared_in_each_class() -> None:
    before = {"1": "cat", "2": "cat", "3": "dog", "4": "emu", "5": "emu"}
    now = {"1": "cat", "6": "cat", "3": "cat", "4": "ostrich", "5": "ostrich", "7": "ostrich", "8": "fox"}
    assert sides(before, now, {"emu": "ostrich"}) == [
        Sides("cat", ADDED, ("3", "6"), ("1", "2")),
        Sides("cat", REMOVED, ("2",), ("1",)),
        Sides("ostrich", ADDED, ("7",), ("4", "5")),
    ]


def test_constant_features_and_few_images_show_nothing() -> None:
    names = [f"{i:02d}" for i in range(12)]
    same = drift([Sides("a", REMOVED, tuple(names[:5]), tuple(names[5:]))], [view(dict.fromkeys(names, np.ones(4)))], {})
    assert (same.shown, same.classes[0].p_value) == ((), 1.0)
    few = drift([Sides("a", ADDED, tuple(names[:4]), tuple(names[4:]))], [view({})], {})
    assert few.lines() == [
        "not compared, with fewer than 5 images with features before or now: a",
        "12 of 12 images of changed classes have no features in the cache and were left out. A run computes those of its training and "
        "validation images",
    ]


def test_a_workspace_tells_drift_from_its_cache_and_computes_nothing_for_it(registered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(300, 330):
        paint(0, index).save(registered / "images" / "class0" / f"{index}.png")
        bright = ImageEnhance.Brightness(paint(1, index)).enhance(0.5)
        bright.save(registered / "images" / "class1" / f"{index}.png")
    ws = Workspace(registered)
    cached = ws.cache.info().bytes
    untold = ws.diff("latest").drift
    assert untold is not None
    assert (untold.classes, untold.missing >= 60) == ((), True)
    assert ws.cache.info().bytes == cached
    ws.commit_data()
    for name in ("ingest", "profile"):
        stages.bring_up_to_date(registered, name, silent)
    told = ws.diff("latest").drift
    assert told is not None
    assert [(each.label, each.change) for each in told.shown] == [("class1", ADDED)]
    assert told.shown == history.diff_of_run(registered, "workspace@v0.1.0").drift.shown  # type: ignore[union-attr]
    data_diff("latest", None, json=False, workspace=registered)
    assert "class1: the " in capsys.readouterr().out
    data_diff("latest", None, json=True, workspace=registered)
    assert json.loads(capsys.readouterr().out)["drift"]["classes"][0]["label"] == "class1"
    set_param(registered, "backbone.weights", "missing.safetensors")
    lost = ws.diff("latest").drift
    assert lost is not None
    assert lost.lines()[0].startswith("not compared: ")
    (registered / layout.PROFILE).unlink()
    assert ws.diff("latest").drift is None, "nothing was measured"
    shutil.rmtree(registered / "images" / "class1")
    assert ws.diff("latest"), "what changed is told in any case"
