"""The profile as values: the slice test is honest about taps that are better by chance."""

import numpy as np

from tests.helpers.evidence import from_bits, planted
from tlpipeline.profiling.profile import slice_point, slice_test


def test_an_earlier_tap_that_is_clearly_better_is_found() -> None:
    found = slice_test(planted([0.6, 0.92, 0.80]), gain=0.01, draws=1000)
    assert (found.best_earlier, found.tap) == ("tap1", "tap1")
    assert found.significance < 0.01
    assert found.similar < 0.05


def test_where_the_last_tap_is_best_the_data_are_similar() -> None:
    found = slice_test(planted([0.6, 0.8, 0.92]), gain=0.01, draws=1000)
    assert found.similar > 0.9
    assert found.significance > 0.5
    assert found.gain < 0


def test_the_deepest_tap_within_one_standard_error_is_chosen() -> None:
    bits = np.arange(512)[:, None] < np.array([400, 476, 0, 420])
    # Two fewer right than the best, four lost and two won: 0.4 points behind with a standard error of 0.5.
    bits[:, 2] = np.isin(np.arange(512), np.arange(4, 478))
    found = slice_test(from_bits(bits), gain=0.01, draws=500)
    assert (found.best_earlier, found.tap) == ("tap1", "tap2")
    # Ten lost and none won is more than one standard error.
    bits[:, 2] = np.arange(512) < 466
    assert slice_test(from_bits(bits), gain=0.01, draws=500).tap == "tap1"


def test_the_slice_point_is_the_deepest_of_equals_and_never_the_last_tap() -> None:
    assert slice_point(np.ones((20, 4), dtype=bool)) == 2
    assert slice_point(np.arange(20)[:, None] < np.array([5, 10, 20])) == 1
    assert slice_point(np.ones((20, 1), dtype=bool)) is None


def test_the_best_of_many_noisy_taps_is_no_evidence() -> None:
    """Sixteen taps of pure noise: the family-wise test must not fire more often than it says."""
    fired = 0
    for seed in range(60):
        profile = from_bits(np.random.default_rng(seed).random((256, 16)) < 0.5)
        fired += slice_test(profile, gain=0.01, draws=300, seed=seed).significance < 0.10
    assert fired <= 12  # 6 expected; 12 has a probability of 1 %


def test_a_slice_that_is_worse_on_held_out_images_is_not_confirmed() -> None:
    assert slice_test(planted([0.6, 0.92, 0.80]), gain=0.01, draws=200).confirmed
    found = slice_test(planted([0.6, 0.92, 0.80], last_held_out=0.95), gain=0.01, draws=200)
    assert not found.confirmed


def test_a_network_with_one_tap_cannot_be_sliced() -> None:
    found = slice_test(planted([0.8]), gain=0.01, draws=100)
    assert (found.tap, found.similar) == (None, 1.0)


def test_the_same_seed_tests_the_same() -> None:
    profile = planted([0.85, 0.9, 0.88])
    assert slice_test(profile, gain=0.01, draws=300) == slice_test(profile, gain=0.01, draws=300)
