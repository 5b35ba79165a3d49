"""Intervals of proportions, and paired comparisons of correct answers, which are stored as packed bits."""

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

Bits = npt.NDArray[np.bool_]


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion (Wilson 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def pack(bits: Bits) -> str:
    """Return bits as hexadecimal digits, eight bits per byte."""
    return np.packbits(bits).tobytes().hex()


def unpack(text: str, count: int) -> Bits:
    """Return the first `count` bits of a text from `pack`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)


def paired(one: str, other: str, count: int) -> tuple[float, float]:
    """Return the mean difference between two packed records of the same images, one minus other, and its standard error."""
    difference = unpack(one, count).astype(float) - unpack(other, count)
    return float(difference.mean()), float(max(difference.std(), 0.5 / math.sqrt(count)) / math.sqrt(count))
