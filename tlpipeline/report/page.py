"""The report page and the model card: values in, text out. The page is one file with nothing outside it."""

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tlpipeline.choice import explain
from tlpipeline.choice.cases import CASES, LARGE, SIMILAR
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.splits import SPLIT_NAMES, TRAIN
from tlpipeline.profiling.profile import Profile

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
    registration: Any,
    case: Any,
    read: Sequence[str],
    profile: Profile,
    metrics: Mapping[str, Any],
    matrix: Sequence[Sequence[int]],
    manifest: Manifest,
    history: str,
    mistakes: Sequence[Mistake],
    remarks: Sequence[str],
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
            told={section.key: section for section in explain.sections(case, profile)},
            profile=profile,
            plane=_plane(case),
            curve=_curve(profile, case.slice, read),
            metrics=metrics,
            classes=list(metrics["classes"]),
            matrix=matrix,
            most=max((max(row) for row in matrix), default=1) or 1,
            images=len(used),
            copies=len(manifest.rows) - len(used),
            sides=sides,
            trained={label: sum(r.label == label and r.split == TRAIN for r in used) for label in manifest.classes},
            rejected=manifest.rejected,
            remarks=remarks,
            epochs=[line for line in csv.DictReader(io.StringIO(history)) if line["arm"] != "head"],
            mistakes=mistakes,
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


def _plane(case: Any) -> dict[str, Any]:
    """Return the plane of size and similarity in the coordinates of a 300 x 300 picture: its quadrants, and where this data set lies."""
    side, left, top = 130, 22, 8
    return {
        "quadrants": [
            {"name": c.name, "x": left + side * (c.size == LARGE), "y": top + side * (c.likeness != SIMILAR), "chosen": c.name == case.case}
            for c in CASES
        ],
        "side": side,
        "left": left,
        "bottom": top + 2 * side,
        "x": round(left + 2 * side * case.large, 1),
        "y": round(top + 2 * side * (1 - case.similar), 1),
    }


def _curve(profile: Profile, cut: str, read: Sequence[str]) -> dict[str, Any]:
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


def card(version: str, facts: Mapping[str, Any]) -> str:
    """Return the model card as markdown: what it is, how good it is, and all that is needed to rebuild it."""
    text: str = _environment().get_template("card.md").render(version=version, **facts)
    return text


def _environment() -> Any:
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = lambda words: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(words))))
    environment.filters["cell"] = explain.cell
    environment.filters["percent"] = lambda value, digits=1: f"{value * 100:.{digits}f} %"
    return environment
