"""The statistics of the profile: exact where a formula stands for a loop, and blind where there is nothing to see."""

from collections.abc import Sequence

import numpy as np
import pytest

from tlpipeline.profiling.probes import PENALTIES, guesses, head_similarity, leave_one_out, one_hot
from tlpipeline.stats import pack, paired, unpack, wilson


def noise(seed: int, images: int, features: int) -> np.ndarray:
    """Centered features that know nothing of any label."""
    x = np.random.default_rng(seed).normal(size=(images, features))
    return x - x.mean(0)


# --- the probe ------------------------------------------------------------------------------------------------------------------------


def refitted(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge with an intercept, every image predicted by a fit on the others; the penalty weighs as for all of them."""
    m, d = x.shape
    out = np.zeros_like(y)
    for i in range(m):
        a, b = np.delete(x, i, axis=0), np.delete(y, i, axis=0)
        center, mean = a.mean(0), b.mean(0)
        w = np.linalg.solve((a - center).T @ (a - center) + penalty * m * np.eye(d), (a - center).T @ (b - mean))
        out[i] = (x[i] - center) @ w + mean
    return out


@pytest.mark.parametrize("penalty", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("features", [8, 60])
def test_left_out_predictions_equal_explicit_refits(penalty: float, features: int) -> None:
    x = noise(0, 40, features)
    y = one_hot(np.random.default_rng(0).integers(0, 3, 40))
    assert np.allclose(leave_one_out(x @ x.T, y, penalties=[penalty]).scores, refitted(x, y, penalty), atol=1e-8)


def refitted_without_groups(x: np.ndarray, y: np.ndarray, penalty: float, groups: Sequence[str]) -> np.ndarray:
    """The same, where the fit for an image is made without all images of its group."""
    m, d = x.shape
    out = np.zeros_like(y)
    for i, group in enumerate(groups):
        rest = [j for j in range(m) if j != i and (not group or groups[j] != group)]
        center, mean = x[rest].mean(0), y[rest].mean(0)
        w = np.linalg.solve((x[rest] - center).T @ (x[rest] - center) + penalty * m * np.eye(d), (x[rest] - center).T @ (y[rest] - mean))
        out[i] = (x[i] - center) @ w + mean
    return out


@pytest.mark.parametrize("features", [8, 60])
def test_a_group_is_left_out_whole(features: int) -> None:
    x = noise(0, 40, features)
    y = one_hot(np.random.default_rng(0).integers(0, 3, 40))
    groups = ["" if i % 5 == 0 else f"g{i // 7}" for i in range(40)]
    for penalty in (1e-4, 0.1, 10.0):
        expected = refitted_without_groups(x, y, penalty, groups)
        for penalties in ([penalty], [penalty] * 3):  # by a factorization, and by a decomposition
            for columns in (None, x):
                fit = leave_one_out(x @ x.T, y, penalties, columns, groups)
                assert np.allclose(fit.scores, expected, atol=1e-7)


def test_labels_thrown_by_a_coin_for_each_scene_are_not_read_from_its_other_views() -> None:
    rng = np.random.default_rng(1)
    scenes = np.repeat(rng.normal(size=(60, 200)), 4, axis=0) + 0.01 * rng.normal(size=(240, 200))
    x = scenes - scenes.mean(0)
    labels = np.repeat(rng.permutation(np.arange(60) % 2), 4)
    groups = [f"scene{i // 4}" for i in range(240)]
    y = one_hot(labels)
    assert (guesses(leave_one_out(x @ x.T / 200, y).scores, y) == labels).mean() > 0.95
    assert 0.3 < (guesses(leave_one_out(x @ x.T / 200, y, groups=groups).scores, y, groups) == labels).mean() < 0.7


def test_decomposing_the_features_instead_of_the_kernel_changes_nothing_but_the_cost() -> None:
    x = noise(4, 50, 12)
    x[:, 11] = x[:, 0]  # a direction that is not there twice
    y = one_hot(np.random.default_rng(4).integers(0, 3, 50))
    whole, thin = leave_one_out(x @ x.T, y), leave_one_out(x @ x.T, y, features=x)
    assert thin.penalty == whole.penalty
    assert np.allclose(thin.scores, whole.scores, atol=1e-9)


def test_the_penalty_is_the_one_whose_refits_err_least() -> None:
    rng = np.random.default_rng(3)
    x = noise(3, 40, 12)
    labels = (x[:, 0] + 0.5 * rng.normal(size=40) > 0).astype(np.int64)
    y = one_hot(labels)
    errors = {penalty: float(((refitted(x, y, penalty) - y) ** 2).mean()) for penalty in PENALTIES}
    assert leave_one_out(x @ x.T, y).penalty == min(errors, key=lambda penalty: errors[penalty])


def test_labels_that_the_features_hold_are_read() -> None:
    x = noise(4, 200, 20)
    labels = x[:, :3].argmax(1)
    assert (leave_one_out(x @ x.T, one_hot(labels)).scores.argmax(1) == labels).mean() > 0.85


def test_a_probe_on_noise_is_not_better_than_chance() -> None:
    x = noise(2, 300, 500)
    labels = np.random.default_rng(2).integers(0, 5, 300)
    assert (leave_one_out(x @ x.T / 500, one_hot(labels)).scores.argmax(1) == labels).mean() < 0.3


def test_a_target_is_one_for_the_class_and_the_targets_of_an_image_sum_to_zero() -> None:
    y = one_hot(np.array([7, 3, 3, 9]))
    assert y.tolist() == [[-0.5, 1.0, -0.5], [1.0, -0.5, -0.5], [1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]]


# --- head similarity ------------------------------------------------------------------------------------------------------------------


def head(labels: np.ndarray, source: Sequence[int], sure: float, classes: int = 1000) -> np.ndarray:
    """A source head that sees class source[label], with this probability, and nothing else."""
    chances = np.full((len(labels), classes), (1 - sure) / classes)
    chances[np.arange(len(labels)), np.array(source)[labels]] += sure
    return chances


def test_head_similarity_is_high_for_the_source_classes_and_zero_for_shuffled_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    chances = head(labels, range(0, 35, 7), 0.9)
    assert head_similarity(chances, labels) > 0.8
    assert head_similarity(chances, rng.permutation(labels)) < 0.05


def test_head_similarity_orders_sets_by_how_well_the_source_classes_tell_them_apart() -> None:
    labels = np.random.default_rng(1).integers(0, 6, 600)
    own = head_similarity(head(labels, [10, 20, 30, 40, 50, 60], 0.9), labels)
    doubtful = head_similarity(head(labels, [10, 20, 30, 40, 50, 60], 0.5), labels)
    coarse = head_similarity(head(labels, [10, 10, 30, 30, 50, 50], 0.9), labels)
    unknown = head_similarity(head(labels, [10] * 6, 0.9), labels)
    assert own > max(doubtful, coarse) + 0.1
    assert min(doubtful, coarse) > unknown + 0.1
    assert unknown < 0.05


def test_head_similarity_does_not_ask_for_the_names_of_classes() -> None:
    labels = np.random.default_rng(2).integers(0, 4, 300)
    chances = head(labels, [3, 1, 4, 15], 0.7)
    renamed = np.array([40, 7, 99, 12])[labels]
    assert head_similarity(chances, renamed) == pytest.approx(head_similarity(chances, labels), abs=1e-12)


def test_a_thousand_source_classes_do_not_eat_the_score() -> None:
    """The same answers, spread over ten or a thousand classes of which most hold next to nothing."""
    labels = np.random.default_rng(3).integers(0, 5, 200)
    few, many = (head_similarity(head(labels, range(5), 0.8, classes), labels) for classes in (10, 1000))
    assert many > 0.8 * few


def test_one_class_has_nothing_to_explain() -> None:
    assert head_similarity(np.full((20, 10), 0.1), np.zeros(20, dtype=np.int64)) == 0.0


# --- small things ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 77])
def test_bits_survive_packing(count: int) -> None:
    bits = np.random.default_rng(0).random(count) < 0.4
    assert (unpack(pack(bits), count) == bits).all()


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0)])
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_without_images_an_interval_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_paired_difference_counts_only_the_discordant_images() -> None:
    one, other = np.arange(200) < 150, (np.arange(200) >= 10) & (np.arange(200) < 140)
    difference, error = paired(pack(one), pack(other), 200)
    # Twenty are right once, none the other way round: Var = 0.1 - 0.01.
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx((0.09 / 200) ** 0.5)


def test_two_equal_records_are_no_certainty() -> None:
    bits = pack(np.arange(100) < 90)
    difference, error = paired(bits, bits, 100)
    assert difference == 0
    assert error > 0


def test_what_is_spread_over_many_rare_source_classes_is_read_together() -> None:
    """One class is seen as one source class, the other as any of a thousand that hold a tenth of an image each."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    chances = np.zeros((200, 1001))
    chances[labels == 0, 0] = 1.0
    chances[np.flatnonzero(labels), rng.permutation(1000)[:100] + 1] = 1.0
    chances[labels == 1] = 0.5 * chances[labels == 1] + 0.5 / 1001
    assert head_similarity(chances, labels) > 0.8


def test_left_out_scores_of_noise_are_guesses_and_not_the_other_class() -> None:
    """Two equally large classes and nothing to read: the left-out mean of the own class is always the lower one."""
    y = np.arange(60) % 2
    targets = one_hot(y)
    scores = leave_one_out(np.zeros((60, 60)), targets, [1.0]).scores
    assert (scores.argmax(1) == y).mean() == 0
    assert np.allclose((scores + (targets - targets.mean(0)) / 59), 0)
    x = noise(7, 60, 4)
    hits = [
        (guesses(leave_one_out(x @ x.T, one_hot(z), [10.0]).scores, one_hot(z)) == z).mean()
        for z in (np.random.default_rng(s).permutation(y) for s in range(40))
    ]
    assert 0.4 < np.mean(hits) < 0.6
