"""The profile as values: the slice test is honest about taps that are better by chance."""

from collections.abc import Sequence

import numpy as np

from tlpipeline.profiling.profile import Head, Probe, Profile, slice_point, slice_test
from tlpipeline.stats import pack, wilson


def probe(name: str, correct: np.ndarray, head: tuple[str, ...] = (), ops: int = 1000) -> Probe:
    accuracy = float(correct.mean())
    return Probe(name, 8, 4, 4, ops // 10, ops, (1, 2), accuracy, 0.0, 1.0, accuracy, 0.0, 0.0, 0.1, pack(correct), head or (name,))


def head_of(taps: Sequence[str], correct: np.ndarray, held_out: float) -> Head:
    return Head(tuple(taps), float(correct.mean()), *wilson(int(correct.sum()), len(correct)), pack(correct), held_out)


def from_bits(correct: np.ndarray, last_held_out: float = 0.8, multi: np.ndarray | None = None) -> Profile:
    """A profile of 1,000 images in ten classes whose taps were right on these sample images: (images, taps).

    The cut head is as good as its tap and reaches 90 % on held-out images; the multi-tap head is the last tap's unless it is given.
    """
    m, count = correct.shape
    names = [f"tap{i}" for i in range(count)]
    taps = tuple(probe(name, correct[:, i], ops=1000 * (i + 1)) for i, name in enumerate(names))
    at = slice_point(correct)
    return Profile(
        backbone="net",
        weights="w",
        size=32,
        normalization="batch",
        images=1000,
        classes=10,
        majority=0.1,
        smallest=90,
        largest=110,
        validation=200,
        sampled=m,
        held_out=100,
        probed=10,
        head_similarity=0.3,
        hunger=((m, float(correct[:, -1].mean())),),
        taps=taps,
        last=head_of(names[-1:], correct[:, -1], last_held_out),
        multi=head_of(names[-1:], correct[:, -1], last_held_out) if multi is None else head_of(names[:-4:-1], multi, 0.95),
        cut=None if at is None else head_of([names[at]], correct[:, at], 0.9),
    )


def right(accuracies: Sequence[float], m: int = 512, seed: int = 0) -> np.ndarray:
    """Who is right at taps of these accuracies, mostly on the same images."""
    difficulty = np.random.default_rng(seed).uniform(size=m)
    noise = np.random.default_rng(seed + 1).normal(0, 0.03, (m, len(accuracies)))
    return (difficulty[:, None] + noise) < np.array(accuracies)


def planted(accuracies: Sequence[float], m: int = 512, seed: int = 0, last_held_out: float = 0.8, multi: float | None = None) -> Profile:
    """A profile whose taps, and multi-tap head, are right with these probabilities."""
    bits = right([*accuracies, multi or 0.0], m, seed)
    return from_bits(bits[:, :-1], last_held_out, None if multi is None else bits[:, -1])


def exact(counts: Sequence[int], m: int = 512) -> Profile:
    """A profile whose taps are right on exactly the first so many images."""
    return from_bits(np.arange(m)[:, None] < np.array(counts))


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
    assert "was not confirmed on held-out images" in found.why_not(0.1, 0.01)


def test_a_network_with_one_tap_cannot_be_sliced() -> None:
    found = slice_test(planted([0.8]), gain=0.01, draws=100)
    assert (found.tap, found.similar) == (None, 1.0)
    assert "one tap" in found.why_not(0.1, 0.01)


def test_the_same_seed_tests_the_same() -> None:
    profile = planted([0.85, 0.9, 0.88])
    assert slice_test(profile, gain=0.01, draws=300) == slice_test(profile, gain=0.01, draws=300)
