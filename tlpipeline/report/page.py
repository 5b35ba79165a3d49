"""The report page: values in, HTML out. It is one file with nothing outside it."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tlpipeline.alarms import Alarm, blocking
from tlpipeline.choice import explain, reasons
from tlpipeline.choice.cases import CASES, LARGE, SIMILAR
from tlpipeline.choice.decision import Decision
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.splits import SPLIT_NAMES, TRAIN
from tlpipeline.evaluation.metrics import Metrics
from tlpipeline.profiling.profile import Profile
from tlpipeline.registry.versions import Registration
from tlpipeline.training.config import Epoch

if TYPE_CHECKING:
    import jinja2

    from tlpipeline.data.changes import Changes

TEMPLATE = Path(__file__).with_name("template")
THUMBNAIL = 96


@dataclass(frozen=True)
class Mistake:
    """A wrongly classified test image: where it is, what it is, what it was taken for and how surely, and a picture of it."""

    path: str
    actual: str
    predicted: str
    probability: float
    picture: str


@dataclass(frozen=True)
class FindingsOfKind:
    """A kind of findings in the data: how many there are, and the worst of them, each with its path, details and picture."""

    kind: str
    count: int
    worst: Sequence[tuple[str, str, str]]


def thumbnail(image: Image.Image) -> str:
    """Return a small JPEG as a data URL."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(
    *,
    name: str,
    registration: Registration,
    case: Decision,
    read: Sequence[str],
    profile: Profile,
    metrics: Metrics,
    matrix: Sequence[Sequence[int]],
    manifest: Manifest,
    history: Sequence[Epoch],
    mistakes: Sequence[Mistake],
    findings: Sequence[FindingsOfKind],
    alarms: Sequence[Alarm],
    changes: "Changes | None",
    seconds: Mapping[str, float | None],
    training: Mapping[str, float],
    data_hash: str,
    commit: str,
) -> str:
    """Return the report as HTML: verdict, the decision explained, probe curve with the cut, metrics, confusion matrix, classes, errors, seconds."""
    used = [r for r in manifest.rows if not r.duplicate_of]
    sides = {side: sum(r.split == side for r in used) for side in SPLIT_NAMES}
    text: str = (
        _environment()
        .get_template("report.html")
        .render(
            name=name,
            registration=registration,
            verdict=registration.verdict,
            case=case,
            explained={section.key: section for section in explain.sections(case, profile)},
            why=reasons.summary(case, profile),
            action=explain.action(case, profile),
            profile=profile,
            plane=_plane(case),
            curve=_curve(profile, case.slice, read),
            metrics=metrics,
            classes=list(metrics.classes),
            matrix=matrix,
            most=max((max(row) for row in matrix), default=1) or 1,
            images=len(used),
            copies=len(manifest.rows) - len(used),
            sides=sides,
            trained={label: sum(r.label == label and r.split == TRAIN for r in used) for label in manifest.classes},
            rejected=manifest.rejected,
            alarms=alarms,
            changes=changes,
            blocked=bool(blocking(alarms)),
            epochs=[epoch for epoch in history if epoch.arm != "head"],
            mistakes=mistakes,
            findings=findings,
            seconds=seconds,
            pace=pace(training),
            total=sum(s for s in seconds.values() if s),
            data_hash=data_hash,
            commit=commit,
        )
    )
    return text


def pace(training: Mapping[str, float]) -> str:
    """Return a sentence about the speed of training, "" where nothing is known of it."""
    if not training:
        return ""
    if not training["images_per_second"]:
        return "No image was passed through the network: all features were in the cache."
    waited = training["waited_for_data"]
    return f"Training took {training['images_per_second']:.0f} images a second; its first worker waited for data {waited:.0%} of the time."


def _plane(decision: Decision) -> dict[str, object]:
    """Return the two gains as a picture of 350 x 312: a quadrant for each case, borders with their values, and where this data set lies."""
    side, left, top = 130, 58, 8
    x, y = explain.scale(decision.tuning), explain.scale(decision.cutting)

    def across(points: float) -> float:
        return round(left + 2 * side * x.place(points), 1)

    tuning, marked = decision.tuning, round(top + 2 * side * (1 - y.place(y.value)), 1)
    # Names give way to the marker: they stand at the top of a quadrant, or at its bottom where the marker is in its upper half.
    name = 22 if (marked - top) % side > side / 2 else side - 12
    return {
        "quadrants": [
            {"name": c.name, "x": left + side * (c.size == LARGE), "y": top + side * (c.likeness == SIMILAR), "chosen": c.name == decision.case}
            for c in CASES
        ],
        "side": side, "name": name, "left": left, "bottom": top + 2 * side,
        "x": across(x.value), "y": marked,
        "whisker": (across(100 * tuning.low), across(100 * tuning.high)) if tuning.why == "prediction" else None,
        "x_ticks": [(across(value), f"{value:+.1f}") for value in (x.low, x.border, x.high)],
        "y_ticks": [(round(top + 2 * side * (1 - y.place(value)) + 4, 1), f"{value:+.1f}") for value in (y.low, y.border, y.high)],
    }  # fmt: skip


def _curve(profile: Profile, cut: str, read: Sequence[str]) -> dict[str, object]:
    """Return the probe curve in the coordinates of an 720 x 260 picture."""
    low = max(0.0, min(t.low for t in profile.taps) - 0.02)
    high = min(1.0, max(t.high for t in profile.taps) + 0.02)
    left, right, top, bottom = 52, 660, 14, 196

    def x(i: int) -> float:
        return round(left + (right - left) * (i + 0.5) / len(profile.taps), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / max(high - low, 1e-9), 1)

    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 6), 0.25)
    ticks = [k * step for k in range(int(low / step) + 1, int(high / step) + 1)]
    at = [t.name for t in profile.taps].index(cut)
    return {
        "points": [
            {"x": x(i), "y": y(t.accuracy), "low": y(t.low), "high": y(t.high), "name": t.name, "accuracy": t.accuracy, "read": t.name in read}
            for i, t in enumerate(profile.taps)
        ],
        "ticks": [{"y": y(value), "text": f"{value * 100:.0f} %"} for value in ticks],
        "cut": round((x(at) + x(at + 1)) / 2, 1) if at < len(profile.taps) - 1 else None,
        "left": left, "right": right, "top": top, "bottom": bottom,
    }  # fmt: skip


def _environment() -> "jinja2.Environment":
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = lambda words: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(words))))
    environment.filters["capitalize_first"] = lambda words: words[:1].upper() + words[1:]
    environment.filters["percent"] = lambda value, digits=1: f"{value * 100:.{digits}f} %"
    return environment
