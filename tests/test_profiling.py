"""The profile: exact probes, honest tests, planted truth."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tlpipeline import backbones, profiling
from tlpipeline.dataset import Manifest, Row, ingest
from tlpipeline.params import ProfileParams
from tlpipeline.profiling import Probe, Profile, chance_of_large, head_similarity, leave_one_out, pack, slice_test, unpack, wilson
from tlpipeline.progress import silent


def probe(name: str, correct: np.ndarray, head: tuple[str, ...] = (), held_out: float | None = 0.9) -> Probe:
    accuracy = float(correct.mean())
    return Probe(name, 8, 4, 4, 100, 1000, (1, 2), accuracy, 0.0, 1.0, accuracy, 0.1, pack(correct), head or (name,), held_out, "")


def planted(accuracies: list[float], m: int = 512, seed: int = 0, last_held_out: float = 0.8) -> Profile:
    """A profile whose taps are right on random images with these probabilities, mostly on the same ones."""
    difficulty = np.random.default_rng(seed).uniform(size=m)
    noise = np.random.default_rng(seed + 1).normal(0, 0.03, (m, len(accuracies)))
    taps = tuple(probe(f"tap{i}", difficulty + noise[:, i] < a) for i, a in enumerate(accuracies))
    return Profile("net", "w", 32, 1000, 10, 0.1, 90, 110, m, 100, None, last_held_out, "", taps)


def exact(counts: list[int], m: int = 512) -> Profile:
    """A profile whose taps are right on exactly the first so many images."""
    taps = tuple(probe(f"tap{i}", np.arange(m) < count) for i, count in enumerate(counts))
    return replace(planted([0.5], m=m), taps=taps)


def test_left_out_predictions_equal_explicit_refits() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 60))
    x -= x.mean(0)
    labels = rng.integers(0, 3, 40)
    y = np.where(labels[:, None] == np.arange(3)[None, :], 1.0, -0.5)
    fit = leave_one_out(x @ x.T, y, penalties=[0.1])
    for i in range(40):
        others = np.arange(40) != i
        # Ridge with an intercept on the other 39 images, the penalty as for all 40.
        a, b = x[others], y[others]
        centre, mean = a.mean(0), b.mean(0)
        w = np.linalg.solve((a - centre).T @ (a - centre) + 0.1 * 40 * np.eye(60), (a - centre).T @ (b - mean))
        assert np.allclose((x[i] - centre) @ w + mean, fit.scores[i], atol=1e-9)


def test_dual_coefficients_predict_other_images_as_the_primal_solution_does() -> None:
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(30, 8)), rng.normal(size=(5, 8))
    z -= x.mean(0)
    x -= x.mean(0)
    y = rng.normal(size=(30, 2))
    fit = leave_one_out(x @ x.T, y, penalties=[0.01])
    w = np.linalg.solve(x.T @ x + 0.01 * 30 * np.eye(8), x.T @ (y - y.mean(0)))
    assert np.allclose(z @ x.T @ fit.dual, z @ w)
    assert np.allclose(profiling.ridge(x @ x.T, y, 0.01), fit.dual)


def test_a_probe_on_noise_stays_at_chance() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 500))
    x -= x.mean(0)
    labels = rng.integers(0, 5, 300)
    y = np.where(labels[:, None] == np.arange(5)[None, :], 1.0, -0.25)
    assert (leave_one_out(x @ x.T / 500, y).scores.argmax(1) == labels).mean() < 0.3


def test_bits_survive_packing() -> None:
    bits = np.random.default_rng(0).random(77) < 0.4
    assert (unpack(pack(bits), 77) == bits).all()


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0)])
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


# --- the slice test -------------------------------------------------------------------------------------------------------------------


def test_an_earlier_tap_that_is_clearly_better_is_found() -> None:
    found = slice_test(planted([0.6, 0.92, 0.80]), gain=0.01, draws=1000)
    assert (found.best_earlier, found.tap) == ("tap1", "tap1")
    assert found.significance < 0.01
    assert found.similar < 0.05


def test_where_the_last_tap_is_best_the_data_are_similar() -> None:
    found = slice_test(planted([0.6, 0.8, 0.92]), gain=0.01, draws=1000)
    assert found.similar > 0.9
    assert found.significance > 0.5


def test_the_deepest_tap_within_one_standard_error_is_chosen() -> None:
    profile = exact([400, 476, 0, 420])
    # Two fewer right than the best, four lost and two won: 0.4 points behind with a standard error of 0.5.
    almost = np.isin(np.arange(512), np.arange(4, 478))
    profile = replace(profile, taps=(*profile.taps[:2], probe("tap2", almost), profile.taps[3]))
    found = slice_test(profile, gain=0.01, draws=500)
    assert (found.best_earlier, found.tap) == ("tap1", "tap2")


def test_the_best_of_many_noisy_taps_is_no_evidence() -> None:
    """Sixteen taps of pure noise: the family-wise test must not fire more often than it says."""
    fired = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        taps = tuple(probe(f"tap{i}", rng.random(256) < 0.5) for i in range(16))
        profile = replace(planted([0.5], m=256), taps=taps)
        fired += slice_test(profile, gain=0.01, draws=300, seed=seed).significance < 0.10
    assert fired <= 12  # 6 expected; 12 has a probability of 1 %


def test_a_slice_that_is_worse_on_held_out_images_is_not_confirmed() -> None:
    profile = planted([0.6, 0.92, 0.80], last_held_out=0.95)
    assert not slice_test(profile, gain=0.01, draws=200).confirmed


def test_a_network_with_one_tap_cannot_be_sliced() -> None:
    found = slice_test(planted([0.8]), gain=0.01, draws=100)
    assert found.tap is None
    assert "one tap" in found.why_not(0.1, 0.01)


def test_headroom_makes_large() -> None:
    assert chance_of_large(planted([0.5, 0.6]), below=0.88, draws=500) > 0.99
    assert chance_of_large(planted([0.5, 0.97]), below=0.88, draws=500) < 0.01
    assert 0.3 < chance_of_large(exact([200, 440], m=500), below=0.88, draws=500) < 0.7


# --- head similarity ------------------------------------------------------------------------------------------------------------------


def test_head_similarity_is_high_for_the_source_classes_and_zero_for_shuffled_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    chances = np.full((400, 1000), 0.1 / 1000)
    chances[np.arange(400), labels * 7] += 0.9
    assert head_similarity(chances, labels) > 0.8
    assert head_similarity(chances, rng.permutation(labels)) < 0.05


# --- on images ------------------------------------------------------------------------------------------------------------------------


def measured(folder: Path, manifest: Manifest, images: int = 64, undecided: Callable[[Profile], bool] = lambda _: False) -> Profile:
    net = backbones.load("demonstration", "DEFAULT")
    params = ProfileParams(images=images, images_max=4 * images, seed=0)
    return profiling.measure(net, folder, manifest, 32, params, undecided, silent, torch.device("cpu"))


def test_the_profile_reads_only_training_and_validation_images(make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_images(classes=3, each=30)
    manifest = ingest(folder, {}, lambda done, total: None)
    seen: list[Row] = []
    from tlpipeline import dataset

    real = dataset.read
    monkeypatch.setattr(dataset, "read", lambda root, row: (seen.append(row), real(root, row))[1])
    measured(folder, manifest)
    assert seen
    assert {row.split for row in seen} <= {"train", "val"}


def test_file_names_class_names_and_order_do_not_matter(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=30)
    before = measured(folder, ingest(folder, {}, lambda done, total: None))
    for label in range(3):
        for path in sorted((folder / f"class{label}").iterdir()):
            path.rename(path.with_name(f"z{hash(path.name) % 9973}-{path.name}"))
        (folder / f"class{label}").rename(folder / f"{'cab'[label]}-renamed")
    after = measured(folder, ingest(folder, {}, lambda done, total: None))
    assert [t.correct for t in after.taps] == [t.correct for t in before.taps]


def test_the_sample_is_doubled_only_while_the_choice_is_open(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=60)
    manifest = ingest(folder, {}, lambda done, total: None)
    assert measured(folder, manifest, images=24).sampled == 24
    assert measured(folder, manifest, images=24, undecided=lambda _: True).sampled == 96


def test_a_stratified_sample_has_every_class_in_proportion() -> None:
    rows = [Row(f"{i}", f"{i:032x}", "rare" if i < 5 else "common", "train", 8, 8, "RGB", "") for i in range(500)]
    drawn = profiling.sample(rows, 100, seed=0)
    assert len(drawn) == 100
    assert sum(r.label == "rare" for r in drawn) == 1
    assert profiling.sample(rows[::-1], 100, seed=0) == drawn


def test_with_very_many_classes_fifty_are_probed() -> None:
    rows = [Row(f"{i}", f"{i:032x}", f"c{i % 300}", "train", 8, 8, "RGB", "") for i in range(3000)]
    assert len({r.label for r in profiling.sample(rows, 512, seed=0)}) == 50


def test_a_profile_survives_json(make_images: Callable[..., Path]) -> None:
    import json

    folder = make_images(classes=3, each=20)
    found = measured(folder, ingest(folder, {}, lambda done, total: None))
    assert Profile.from_json(json.loads(json.dumps(found.to_json()))) == found
