"""The report page: values in, HTML out. It is one file with nothing outside it."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tlpipeline.alarms import blocking
from tlpipeline.choice import explain, reasons
from tlpipeline.choice.cases import CASES, LARGE, SIMILAR
from tlpipeline.choice.decision import Decision
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.splits import SPLIT_NAMES, TRAIN
from tlpipeline.evaluation.metrics import Metrics, ReliabilityBin
from tlpipeline.profiling.profile import Profile
from tlpipeline.registry.versions import Registration
from tlpipeline.stats import wilson
from tlpipeline.training.config import Epoch

if TYPE_CHECKING:
    import jinja2

    from tlpipeline.backbones.classifier import Start
    from tlpipeline.data.changes import Changes

TEMPLATE = Path(__file__).with_name("template")
THUMBNAIL = 96


@dataclass(frozen=True)
class Example:
    """A test image: where it is, its class, what the model says and how probable that is (0 to 1), and a picture as a data URL."""

    path: str
    actual: str
    predicted: str
    probability: float
    picture: str


@dataclass(frozen=True)
class Confused:
    """How often images of one class were taken for another, with examples."""

    actual: str
    predicted: str
    count: int
    examples: Sequence[Example]


@dataclass(frozen=True)
class Examples:
    """Test images that a person should look at: the most confident errors, the least certain predictions, and the most confused classes."""

    mistakes: Sequence[Example]
    uncertain: Sequence[Example]
    confused: Sequence[Confused]


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
    start: "Start | None",
    profile: Profile,
    metrics: Metrics,
    matrix: Sequence[Sequence[int]],
    manifest: Manifest,
    history: Sequence[Epoch],
    examples: Examples,
    reliability: Sequence[ReliabilityBin],
    forecast: Sequence[str],
    findings: Sequence[FindingsOfKind],
    changes: "Changes | None",
    seconds: Mapping[str, float | None],
    training: Mapping[str, float],
    data_hash: str,
    commit: str,
) -> str:
    """Return the report as HTML.

    It is read from the top: alarms, verdict, why this case, what changed, classes, errors, then what else was measured. The later sections are
    folded. It has no scripts, and nothing outside the file.
    """
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
            start=start,
            profile=profile,
            plane=_plane(case),
            curve=_curve(profile, case),
            metrics=metrics,
            classes=list(metrics.classes),
            matrix=matrix,
            most=max((max(row) for row in matrix), default=1) or 1,
            images=len(used),
            copies=len(manifest.rows) - len(used),
            sides=sides,
            trained={label: sum(r.label == label and r.split == TRAIN for r in used) for label in manifest.classes},
            rejected=manifest.rejected,
            alarms=registration.alarms,
            changes=changes,
            blocked=bool(blocking(registration.alarms)),
            epochs=[epoch for epoch in history if epoch.arm != "head"],
            examples=examples,
            forecast=forecast,
            recalls={label: wilson(round(c.recall * c.images), c.images, metrics.confidence) for label, c in metrics.classes.items()},
            reliability=_reliability(reliability),
            learning=_learning(profile),
            knows_nothing=math.log(max(len(metrics.classes), 2)),
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


def _curve(profile: Profile, decision: Decision) -> dict[str, object]:
    """Return the probe of each tap, with its places between the ends of a track in percent."""
    low = max(0.0, min(t.low for t in profile.taps) - 0.02)
    high = min(1.0, max(t.high for t in profile.taps) + 0.02)

    def place(share: float) -> float:
        return round(100 * (share - low) / max(high - low, 1e-9), 2)

    rows = explain.probe_rows(profile, decision)
    return {
        "points": [
            {"name": row["tap"], "accuracy": row["accuracy"], "use": row["use"], "at": place(row["accuracy"]), "low": place(row["low"]),
             "high": place(row["high"])}
            for row in rows
        ],
        "from": low, "to": high, "cut": explain.is_cut(decision, profile),
    }  # fmt: skip


class _Chart:
    """Two axes of a small chart of 360 x 250: data coordinates in, coordinates of the picture out."""

    left, right, top, bottom = 46, 338, 10, 206

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        low, high = self._x
        return round(self.left + (self.right - self.left) * (value - low) / max(high - low, 1e-9), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(self.bottom - (self.bottom - self.top) * (value - low) / max(high - low, 1e-9), 1)

    def ticks(self) -> list[float]:
        """Return round values of the vertical axis, which is a share."""
        low, high = self._y
        step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 6), 0.25)
        return [k * step for k in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def _reliability(bins: Sequence[ReliabilityBin]) -> dict[str, object] | None:
    """Return the reliability diagram as a picture; None without images."""
    if not bins:
        return None
    least = min(0.9, math.floor(10 * min(min(b.stated, b.low) for b in bins)) / 10)
    chart = _Chart((least, 1.0), (least, 1.0))
    return {
        "points": [
            {"x": chart.x(b.stated), "y": chart.y(b.correct), "low": chart.y(b.low), "high": chart.y(b.high),
             "title": f"{b.images} images: stated {b.stated:.1%}, correct {b.correct:.1%}"}
            for b in bins
        ],
        "ticks": [{"x": chart.x(v), "y": chart.y(v), "text": f"{v * 100:.0f} %"} for v in chart.ticks()],
        "chart": chart,
    }  # fmt: skip


def _learning(profile: Profile) -> dict[str, object] | None:
    """Return the learning curve as a picture, on a logarithmic axis of images; None for fewer than two points."""
    curve = profile.learning_curve
    if len(curve) < 2:
        return None
    values = [accuracy for _, accuracy in curve]
    chart = _Chart(
        (math.log(curve[0][0]) - 0.2, math.log(curve[-1][0]) + 0.2), (max(min(values) - 0.02, 0.0), min(max(values) + 0.02, 1.0))
    )
    points = [
        {"x": chart.x(math.log(n)), "y": chart.y(accuracy), "text": f"{n:,}", "title": f"{n:,} images: {accuracy:.1%}"}
        for n, accuracy in curve
    ]
    return {
        "points": points,
        "ticks": [{"y": chart.y(v), "text": f"{v * 100:.0f} %"} for v in chart.ticks()],
        "chart": chart,
        "gain": 100 * profile.slope,
    }


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
