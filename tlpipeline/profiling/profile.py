"""The profile as values: what was measured at each tap of a network, and the test whether an earlier tap beats the last.

The probes answer two questions. Is the data set large enough to fine-tune this network (headroom)? Is it similar to the network's original
training images (do the last layers still help)?
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.stats import Bits, unpack

# What an edited file may hold; the pipeline itself writes nothing else.
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**53)]


@dataclass(frozen=True)
class Probe:
    """One tap, and how well its features predict the labels.

    Attributes:
        name, channels, height, width, parameters, forward_ops, grids: of the tap and the head's pyramid there.
        accuracy, low, high: leave-one-out accuracy of a ridge probe on this tap alone, with its Wilson 95 % interval.
        balanced: the mean of the per-class accuracies.
        gain, gain_error: accuracy minus the last tap's, and the paired standard error of that difference.
        penalty: the ridge penalty that was chosen.
        correct: a bit for each image of the sample, as hexadecimal: whether it is classified correctly when left out.
        head: taps that a head reads when the network is cut here, deepest first: this one and the two best earlier ones.
    """

    name: str
    channels: Size
    height: Size
    width: Size
    parameters: Count
    forward_ops: Count
    grids: tuple[int, ...]
    accuracy: Share
    low: Share
    high: Share
    balanced: Share
    gain: Annotated[float, Field(allow_inf_nan=False)]
    gain_error: Annotated[float, Field(allow_inf_nan=False)]
    penalty: float
    correct: Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]
    head: tuple[str, ...]

    @property
    def reading(self) -> TapPooling:
        """Return what a head reads at this tap."""
        return TapPooling(self.name, self.channels, self.grids)


@dataclass(frozen=True)
class Head:
    """A head that could be trained on frozen features.

    Attributes:
        taps: what it reads, deepest first.
        accuracy, low, high, correct: leave-one-out on the sample, as in Probe, for all its taps together.
        held_out: accuracy of the head itself, solved on the sample, on the half of validation that may select (the other half judges
            races); None if it was not measured.
    """

    taps: tuple[str, ...]
    accuracy: Share
    low: Share
    high: Share
    correct: Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]
    held_out: Share | None = None


@dataclass(frozen=True)
class Tangent:
    """The result of the tangent probe, and of the multi-tap head on the same images (at most TANGENT_IMAGES).

    Attributes:
        images: how many.
        accuracy, error: leave-one-out accuracy and mean squared error of ridge on the tangent kernel.
        frozen, frozen_error: of the multi-tap features alone.
    """

    images: Size
    accuracy: Share
    error: float
    frozen: Share
    frozen_error: float


@dataclass(frozen=True)
class Profile:
    """The content of profile.json.

    Attributes:
        backbone, weights: name of the network and fingerprint of its weights.
        size: input side, pixels.
        normalization: batch, layer or none.
        images, classes: numbers of training images and classes; majority: share of the largest class; smallest, largest: images of a class.
        validation: images of the half of validation that judges races.
        sampled, held_out: images of the probes' sample, and of the half of validation that selects.
        probed: classes in the sample.
        head_similarity: S, the share of the labels' entropy that the source head's classes explain (cross-fitted LEEP); None without head.
        learning_curve: (images, leave-one-out accuracy) of the multi-tap head on a quarter, half and all of the sample, three draws each.
        taps: first to last.
        last: the head on the last tap; multi: on the last tap and the two best earlier ones, nothing cut off; cut: on the taps at and below
            the best slice point, None where there is one tap only.
        tangent: the tangent probe, None if it is switched off.
    """

    backbone: str
    weights: str
    size: Size
    normalization: str
    images: Size
    classes: Size
    majority: Share
    smallest: Size
    largest: Size
    validation: Count
    sampled: Size
    held_out: Count
    probed: Size
    head_similarity: Share | None
    learning_curve: tuple[tuple[Size, Share], ...]
    taps: tuple[Probe, ...]
    last: Head
    multi: Head
    cut: Head | None
    tangent: Tangent | None = None

    @property
    def best(self) -> Probe:
        """Return the tap with the most accurate probe, the deepest of equals."""
        return max(reversed(self.taps), key=lambda t: t.accuracy)

    @property
    def heads(self) -> tuple[Head, ...]:
        """Return the heads that could be trained on frozen features, the simplest first."""
        return (self.last, self.multi) if self.cut is None else (self.last, self.cut, self.multi)

    def head(self, name: str) -> Head:
        """Return the frozen head of this name: last, cut or multi; without an earlier tap the cut one is the last one."""
        return {"last": self.last, "cut": self.cut or self.last, "multi": self.multi}[name]

    @property
    def parameters(self) -> int:
        """Parameters of the network without its old head: what fine-tuning would train."""
        return self.taps[-1].parameters

    @property
    def forward_ops(self) -> int:
        """Floating-point operations of one image's forward pass."""
        return self.taps[-1].forward_ops

    @property
    def slope(self) -> float:
        """Accuracy that the frozen features gained by the last doubling of the sample."""
        return self.learning_curve[-1][1] - self.learning_curve[-2][1] if len(self.learning_curve) > 1 else 0.0

    @property
    def last_head(self) -> tuple[TapPooling, ...]:
        """Return what the head of the uncut network reads: the last tap."""
        return (self.taps[-1].reading,)

    def head_at(self, tap: str) -> tuple[TapPooling, ...]:
        """Return what the head reads when the network is cut at this tap, deepest first."""
        by_name = {t.name: t for t in self.taps}
        return tuple(by_name[name].reading for name in by_name[tap].head)

    def correct(self) -> Bits:
        """Return which images the probe of each tap classifies correctly: (sampled, taps)."""
        return np.stack([unpack(t.correct, self.sampled) for t in self.taps], axis=1)

    def contradiction(self) -> str:
        """Return in words where the values of an edited file contradict each other, "" if they do not."""
        names = [tap.name for tap in self.taps]
        if not names:
            return "it has no taps"
        if strange := [name for tap in self.taps for name in tap.head or ("",) if name not in names]:
            return f"a head reads {strange[0]!r}, which is not one of its taps"
        if strange := [name for head in self.heads for name in head.taps or ("",) if name not in names]:
            return f"a head reads {strange[0]!r}, which is not one of its taps"
        measured: list[Probe | Head] = [*self.taps, *self.heads]
        for at in measured:
            if len(at.correct) != 2 * math.ceil(self.sampled / 8):
                return f"`correct` has not a bit for each of {self.sampled} images"
            if not at.low - 1e-3 <= at.accuracy <= at.high + 1e-3:  # they are rounded
                return f"an accuracy of {at.accuracy:g} lies outside of its interval"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for profile.json."""
        return asdict(self)


# --- the slice point ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceTest:
    """Does an earlier tap beat the last one?

    Attributes:
        tap: the slice point: the deepest earlier tap within one standard error of the best one; None where there is one tap only.
        best_earlier: the earlier tap with the best probe; gain: its accuracy minus the last tap's (0 to 1).
        corrected: the same, corrected for taking the best of several: median-unbiased, above the asked gain exactly where `similar` is below 0.5.
        significance: family-wise p-value of `no earlier tap is better`.
        similar: the same of `no earlier tap is better by the asked gain`: P(similar).
        confirmed: there are held-out images, and the head at `tap` is not worse there than the last tap's.
    """

    tap: str | None
    best_earlier: str | None
    gain: float
    corrected: float
    significance: float
    similar: float
    confirmed: bool


def slice_point(correct: Bits) -> int | None:
    """Return the index of the deepest earlier tap within one standard error of the best earlier one; None where there is one tap only.

    The one-standard-error rule (Breiman et al. 1984), here toward keeping more of the network.

    Args:
        correct: whether each image is classified correctly at each tap, (images, taps).
    """
    if correct.shape[1] < 2:
        return None
    earlier = correct[:, :-1].astype(float)
    best = int(np.flatnonzero(earlier.mean(0) == earlier.mean(0).max())[-1])
    shortfall = earlier[:, [best]] - earlier
    return int(np.flatnonzero(shortfall.mean(0) <= shortfall.std(0) / math.sqrt(len(earlier)))[-1])


def slice_test(profile: Profile, gain: float, draws: int, seed: int = 0) -> SliceTest:
    """Compare every earlier tap with the last by a centered paired bootstrap of the largest t (max-T, Westfall and Young 1993).

    The correction for looking at many taps matters: the best of 16 taps of pure noise looks 4.7 points better than chance.

    Args:
        gain: what an earlier tap must gain for the data to count as different, as a share (0 to 1).
    """
    correct = profile.correct()
    at = slice_point(correct)
    if at is None or profile.cut is None:
        return SliceTest(None, None, 0.0, 0.0, 1.0, 1.0, False)
    m = len(correct)
    difference = correct[:, :-1].astype(float) - correct[:, -1:]
    gains = difference.mean(0)
    errors = (difference.std(0) / math.sqrt(m)).clip(min=0.5 / m)
    counts = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=draws) / m
    largest = ((counts @ difference - gains) / errors).max(1)

    def p_value(asked: float) -> float:
        observed = ((gains - asked) / errors).max()
        return float((1 + (largest >= observed).sum()) / (1 + draws))

    best = int(np.flatnonzero(gains == gains.max())[-1])
    cut, last = profile.cut.held_out, profile.last.held_out
    confirmed = cut is not None and last is not None and cut >= last
    # Where the p-value passes one half: (1 + how many draws reach the observed t) / (1 + draws) < 1/2.
    median = np.sort(largest)[-max(math.ceil((1 + draws) / 2) - 1, 1)]
    corrected = float((gains - median * errors).max())
    return SliceTest(profile.taps[at].name, profile.taps[best].name, float(gains[best]), corrected, p_value(0.0), p_value(gain), confirmed)
