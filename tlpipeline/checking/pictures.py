"""Pictures that show little: flat, blurred, dark, bright or tiny ones; and pictures that lose something when they are read.

Dark, bright and blurred are judged twice: by a fixed bound, and against the other images. So a data set that is dark by nature, as scans are,
is not one long list.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tlpipeline.alarms import WARN, Alarm
from tlpipeline.checking.quality import Finding
from tlpipeline.data.dataset import Row
from tlpipeline.data.decoding import CHANNEL, CONCEALED, DEEP, DEEP_COLORS, ON_BLACK
from tlpipeline.data.facts import Facts

DARK, BRIGHT = 0.06, 0.94  # mean gray level, 0 to 1
BLURRED = 0.45  # `facts.blur`
TINY, TINY_AGAINST = 32, 0.25  # pixels of the short side, and their share of the median
OUTLYING = 4.0  # robust standard deviations from the median

Values = npt.NDArray[np.float64]


def find(rows: Sequence[Row], facts: Sequence[Facts]) -> tuple[list[Finding], list[Alarm]]:
    """Return the findings, and an alarm with the count of each kind."""
    findings: list[Finding] = []
    alarms: list[Alarm] = []
    flat = np.array([f.flat for f in facts], dtype=bool)
    brightness, blur = np.array([f.brightness / 255 for f in facts]), np.array([f.blur for f in facts])
    short = np.array([min(f.width, f.height) for f in facts])
    # Brightness differs by factors in dark sets, and near white in bright ones: distances are measured in log odds.
    odds = np.log((brightness + 0.005) / (1.005 - brightness))
    dark, bright = _outlying(odds, brightness, DARK, flat), _outlying(-odds, -brightness, -BRIGHT, flat)
    blurred = _outlying(-blur, -blur, -BLURRED, flat)
    tiny = (short < TINY) & (short < TINY_AGAINST * np.median(short)) if len(short) else flat
    kinds: list[tuple[str, npt.NDArray[np.bool_], Values, str, Callable[[Facts], str]]] = [
        ("flat", flat, brightness, "{} one flat color", lambda f: "one color"),
        ("dark", dark, brightness, "{} nearly black, unlike the others", lambda f: f"mean brightness {f.brightness / 255:.1%}"),
        ("bright", bright, -brightness, "{} nearly white, unlike the others", lambda f: f"mean brightness {f.brightness / 255:.1%}"),
        ("blurred", blurred, -blur, "{} blurred, unlike the others", lambda f: f"blur {f.blur:.2f} of 1, median of all images {np.median(blur):.2f}"),
        ("tiny", tiny, short, "{} much smaller than the others", lambda f: f"{f.width} x {f.height} pixels"),
        *_losses(facts),
    ]  # fmt: skip
    for kind, which, rank, text, detail in kinds:
        numbers = sorted(np.flatnonzero(which).tolist(), key=lambda i: (rank[i], rows[i].path))
        findings += [Finding(rows[i].path, kind, detail(facts[i])) for i in numbers]
        if numbers:
            counted = f"{len(numbers)} {'image is' if len(numbers) == 1 else 'images are'}"
            alarms.append(Alarm(kind, WARN, f"{text.format(counted)} (quality.csv)"))
    return findings, alarms


def _losses(facts: Sequence[Facts]) -> list[tuple[str, npt.NDArray[np.bool_], Values, str, Callable[[Facts], str]]]:
    """Return the kinds of images of which something is lost when they are read as 8-bit RGB."""

    def noted(note: str) -> npt.NDArray[np.bool_]:
        return np.array([note in f.notes for f in facts], dtype=bool)

    deep = np.array([f.mode.startswith(("I", "F")) or DEEP_COLORS in f.notes for f in facts], dtype=bool)
    transparent, pages = np.array([f.transparent for f in facts]), np.array([f.pages for f in facts])
    channel, concealed, on_black = noted(CHANNEL), noted(CONCEALED), noted(ON_BLACK)
    seen_through = (transparent > 0) & ~channel & ~concealed & ~on_black
    none = np.zeros(len(facts))
    return [
        ("deep", deep, -deep.astype(float), "{} deeper than 8 bits and read as 8 bits", _depth),
        ("fourth channel", channel, none, "{} read without another channel, such as infrared, which is not used", lambda f: f"mode {f.mode}"),
        ("concealed", concealed, none, "{} fully transparent, and read without the transparency", lambda f: f"mode {f.mode}"),
        ("on black", on_black, none, "{} invisible on white, and laid over black", lambda f: f"mode {f.mode}"),
        (
            "transparent", seen_through, -transparent, "{} partly transparent, and laid over white",
            lambda f: f"mode {f.mode}, {f.transparent:.1%} of the pixels not opaque",
        ),
        ("pages", pages > 1, -pages, "{} one of several pages of a file; the others are not read", lambda f: f"{f.pages} pages"),
    ]  # fmt: skip


def _depth(facts: Facts) -> str:
    if DEEP_COLORS in facts.notes:
        return "16 bits a color, of which the upper 8 are read"
    return f"mode {facts.mode}, scaled from {'its own range' if DEEP in facts.notes or facts.mode == 'F' else 'the full range of 16 bits'}"


def _outlying(scale: Values, value: Values, bound: float, flat: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which images lie below the bound, and far below the median of those that are not flat.

    The distance is in robust standard deviations: 1.4826 times the median absolute deviation (Rousseeuw and Croux 1993).
    """
    kept = scale[~flat]
    if not len(kept):
        return np.zeros_like(flat)
    middle = np.median(kept)
    spread = 1.4826 * np.median(np.abs(kept - middle))
    return np.asarray((value < bound) & (scale < middle - OUTLYING * max(spread, 0.05)) & ~flat)
