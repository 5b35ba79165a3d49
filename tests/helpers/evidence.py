"""Planted evidence for a choice: profiles and gain predictors whose answers are known."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import numpy as np

from tlpipeline.choice.predictor import NEUTRAL, Evidence, GainPredictor, figures
from tlpipeline.profiling.profile import Head, Probe, Profile, slice_point
from tlpipeline.stats import pack, wilson

SEEN = Evidence(
    images=1000,
    classes=10,
    validation=100,
    majority=0.1,
    parameters=1_000_000,
    forward_ops=10_000_000,
    cut_ops=8_000_000,
    sampled=512,
    head_similarity=0.3,
    last=0.90,
    cut=0.88,
    multi=0.91,
    cut_gain=-0.02,
    cut_error=0.01,
    multi_gain=0.01,
    multi_error=0.01,
    over_gain=0.0,
    over_error=0.01,
    slope=0.02,
    gain=-0.02,
    significance=0.9,
    similar=0.95,
    confirmed=False,
)


NAMES = tuple(figures(SEEN, 0.9))


def model(
    intercept: float = 0.0, deviation: float = 0.3, platt_slope: float = 1.0, platt_intercept: float = 0.0, **coefficients: float
) -> GainPredictor:
    """An outlook of one's own. Keywords are figures with underscores: their effect on the log odds, from the figures of SEEN at 90 %."""
    by_name = {name.replace(" ", "_"): name for name in NAMES}
    wide = {name: 10.0 for name in NAMES}
    return replace(
        NEUTRAL,
        center=figures(SEEN, 0.9),
        spread={name: 1.0 for name in NAMES},
        coefficients={name: 0.0 for name in NAMES} | {by_name[key]: value for key, value in coefficients.items()},
        intercept=intercept,
        deviation=deviation,
        platt_slope=platt_slope,
        platt_intercept=platt_intercept,
        lowest={name: -high for name, high in wide.items()},
        highest=wide,
        rows=100,
        data=("planted",),
    )


def rising(found: GainPredictor) -> None:
    """Hold a model to it on a grid: P(large) and the expected gain never fall as images are added and nothing else changes."""
    grid = product((2, 30, 400), (0.4, 0.8, 0.97, 1.0), (None, 0.9), (-0.05, 0.2), (100_000, 50_000_000), (0.0, 0.005, 0.02))
    for classes, frozen, similarity, gain, parameters, tolerance in grid:
        seen = replace(SEEN, classes=classes, head_similarity=similarity, gain=gain, parameters=parameters)
        told = [found.predict(replace(seen, images=n), frozen, tolerance) for n in (20, 60, 300, 1000, 5000, 40_000, 300_000)]
        for fewer, more in pairwise(told):
            assert 1 - more.p_frozen_within >= 1 - fewer.p_frozen_within - 1e-12
            assert more.gain >= fewer.gain - 1e-12


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
        learning_curve=((m, float(correct[:, -1].mean())),),
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
