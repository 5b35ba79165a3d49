"""The explanation: a decision and its profile in plain words with their numbers, for the terminal, as markdown, and as rows for plots.

The content is made once, as sections of paragraphs, tables and lines; the terminal, markdown and the report page only lay it out.
"""

import io
import math
import re
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import Any

from tlpipeline.choice import reasons
from tlpipeline.choice.cases import CASES, LARGE, SIMILAR
from tlpipeline.choice.decision import CutGain, Decision, TuningGain
from tlpipeline.display import printable
from tlpipeline.profiling.profile import Profile

ARMS = {"frozen": "frozen", "cut": "cut", "multi": "multi-tap", "tuned": "fine-tuned"}
LEAST, MOST, MARKDOWN = 40, 110, 76  # columns; longer lines are hard to read
# In markdown: what starts a table cell, HTML, emphasis, a link, code or a line; an underscore inside a word is none.
_SAFE = str.maketrans({c: f"\\{c}" for c in "\\|*`[]~"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Prefect's fixed-width font, and others, has no drawing characters: what replaces them has another width.
_PLAIN = str.maketrans("┌┬┐├┼┤└┴┘─│●█·╌", "+++++++++-|o#.-")
_PLAIN_CELL = _PLAIN | str.maketrans("├┤", "[]")


@dataclass(frozen=True)
class Table:
    """Rows under a header, the chosen one marked in its first column.

    Attributes:
        numbers: columns that are set to the right; fixed: those whose cells are not broken into lines.
        drawn: whether the fourth column is a drawing.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...]
    fixed: tuple[int, ...] = ()
    drawn: bool = False


@dataclass(frozen=True)
class Lines:
    """A list of sentences, or lines of characters that are drawn under each other."""

    lines: tuple[str, ...]
    drawn: bool = False


@dataclass(frozen=True)
class Section:
    """A key for the report page, a title, and what stands under it: paragraphs, tables, lines."""

    key: str
    title: str
    parts: tuple[str | Table | Lines, ...]


def text(decision: Decision, profile: Profile, width: int, color: bool = False) -> str:
    """Return the explanation for a terminal; no line is longer than `width` columns (at least 40)."""
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    width, out = min(max(width, LEAST), MOST), io.StringIO()
    fill = partial(textwrap.fill, width=width, break_on_hyphens=False)
    console = Console(file=out, width=width, height=1000, force_terminal=color, color_system="standard" if color else None, highlight=False)
    for section in sections(decision, profile, width):
        console.print(Text(printable(fill(section.title)), style="bold"))
        for part in section.parts:
            if isinstance(part, Table):
                grid = Grid(box=None, pad_edge=False, header_style="dim")
                for i, title in enumerate(part.header):
                    grid.add_column(Text(title), justify="right" if i in part.numbers else "left", overflow="fold", no_wrap=i in part.fixed)
                for row in part.rows:
                    grid.add_row(*(Text(printable(cell)) for cell in row), style="bold" if row[0] == "→" else None)
                console.print(grid)
            elif isinstance(part, str):
                console.print(Text(printable(fill(part))))
            else:
                lines = part.lines if part.drawn else [fill(f"- {line}", subsequent_indent="  ") for line in part.lines]
                console.print(Text(printable("\n".join(lines))))
        console.print()
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def markdown(decision: Decision, profile: Profile) -> str:
    """Return the explanation as GitHub-flavoured markdown."""
    lines: list[str] = []
    for section in sections(decision, profile, MARKDOWN):
        lines += [f"{'###' if lines else '##'} {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                rows = [
                    [f"`{w.translate(_PLAIN_CELL)}`" if part.drawn and w and i == 3 else cell(w) for i, w in enumerate(row)]
                    for row in part.rows
                ]
                header = [(" to " if part.drawn and i == 3 else " ").join(w.split()) for i, w in enumerate(part.header)]
                rule = ["---:" if i in part.numbers else "---" for i in range(len(part.header))]
                lines += [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
            elif isinstance(part, Lines):
                lines += ["```text", *(w.translate(_PLAIN) for w in part.lines), "```"] if part.drawn else [f"- {w}" for w in part.lines]
            else:
                lines += [part]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def cell(words: str) -> str:
    """Return words for a cell or sentence of markdown, in which they mean themselves."""
    return _UNDERSCORE.sub(r"\\_", _CONTROL.sub(" ", words).translate(_SAFE))


def to_json(decision: Decision, profile: Profile) -> dict[str, Any]:
    """Return the decision's numbers, its sentences, and the points of its plots."""
    return {
        "decision": decision.to_json(),
        "summary": reasons.summary(decision, profile),
        "changes": reasons.changes(decision, profile),
        "former": reasons.former_sentence(decision, profile),
        "warnings": reasons.warnings(decision, profile),
        "plane": plane_rows(decision),
        "probes": probe_rows(profile, decision),
    }


@dataclass(frozen=True)
class Scale:
    """An axis of gains in points, its border in the middle, and where the counted gain stands on it.

    Attributes:
        border, low, high: in points; the ends lie equally far from the border.
        value: the counted gain, drawn on the side of the border that was chosen even where both are equal in print.
    """

    border: float
    low: float
    high: float
    value: float

    def place(self, points: float) -> float:
        """Return where a gain lies between the ends: 0 to 1, one half at the border."""
        return min(max((points - self.low) / (self.high - self.low), 0.0), 1.0)


def scale(axis: TuningGain | CutGain) -> Scale:
    """Return the scale of an axis, wide enough for its gain and its interval."""
    border, counted = 100 * axis.border, 100 * axis.counted
    ends = (axis.low, axis.high) if isinstance(axis, TuningGain) and axis.why == "prediction" else ()
    reach = 1.2 * max(0.5, *(abs(100 * end - border) for end in (axis.counted, *ends)))
    least = reach / 12  # so that the marker does not stand on the border
    return Scale(border, border - reach, border + reach, max(counted, border + least) if axis.exceeds else min(counted, border - least))


def plane_rows(decision: Decision) -> list[dict[str, Any]]:
    """Return the four cases as rectangles between the borders and the ends of the two axes, and this data set as a point, all in points."""
    x, y = scale(decision.tuning), scale(decision.cutting)
    rows = []
    for case in CASES:
        left, right = (x.border, x.high) if case.size == LARGE else (x.low, x.border)
        bottom, top = (y.low, y.border) if case.likeness == SIMILAR else (y.border, y.high)
        what = f"{'chosen ' * (case.name == decision.case)}case"
        rows.append({"tuning": left, "cutting": bottom, "right": right, "top": top, "name": case.name, "what": what})
    point = {"tuning": x.value, "cutting": y.value, "right": x.value, "top": y.value, "name": "this data set", "what": "data set"}
    return [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in (*rows, point)]


def probe_rows(profile: Profile, decision: Decision) -> list[dict[str, Any]]:
    """Return the probe curve, first tap to last: accuracy with its 95% interval, and what becomes of the tap: read, kept or cut off."""
    at, read = [t.name for t in profile.taps].index(decision.slice), {r.tap for r in decision.read}
    uses = ["cut off" if i > at else "read" if t.name in read else "kept" for i, t in enumerate(profile.taps)]
    pairs = zip(profile.taps, uses, strict=True)
    return [{"tap": t.name, "accuracy": t.accuracy, "low": t.low, "high": t.high, "use": use} for t, use in pairs]


def sections(decision: Decision, profile: Profile, width: int = MARKDOWN) -> tuple[Section, ...]:
    """Return the sections, the decision first; drawings have at most `width` columns."""
    changes, warnings, measured = reasons.changes(decision, profile), reasons.warnings(decision, profile), _measured(profile)
    written = [
        _what(decision, profile),
        Section("axes", "The two comparisons that decide", _axes(decision, width)),
        Section("arms", "What each way to train is expected to reach", _arms(decision, profile)),
        Section("race", "Were both ways trained and compared?", _race(decision, profile)),
        Section("probes", "How well each layer tells the classes apart", _curve(decision, profile, width)),
        Section("changes", "What would change the decision", (Lines(changes),) * bool(changes)),
        Section("measured", "What else was measured", (Lines(measured),) * bool(measured)),
        Section("warnings", "Warnings", (Lines(warnings),) * bool(warnings)),
    ]
    return tuple(section for section in written if section.parts)


# --- the decision ---------------------------------------------------------------------------------------------------------------------


def chosen(decision: Decision, profile: Profile) -> str | None:
    """Return the arm that was chosen; None if a forced cut is none of the considered arms."""
    considered = profile.cut is not None and profile.cut.taps[0] == decision.slice
    arms = {"last": "frozen", "cut": "cut" if considered else None, "multi": "multi"}
    return "tuned" if decision.freeze == "nothing" else arms[decision.head]


def is_cut(decision: Decision, profile: Profile) -> bool:
    """Return whether layers after the slice point are cut off."""
    return decision.slice != profile.taps[-1].name


def action(decision: Decision, profile: Profile) -> str:
    """Return what is done with the network."""
    if decision.freeze == "nothing":
        tried = decision.init == "auto" and profile.images >= decision.recipe.scratch_from
        return "the whole network is fine-tuned" + (", and trained from random weights where that is better" if tried else "")
    head = f"the network stays frozen, a new head reads {' + '.join(r.tap for r in decision.readings)}"
    return f"cut after {decision.slice}, {head}" if is_cut(decision, profile) else head


def _what(decision: Decision, profile: Profile) -> Section:
    if is_cut(decision, profile):
        kept = (
            f"The cut removes {decision.saved_parameters:.1%} of the {profile.parameters:,} parameters and saves {decision.saved_ops:.1%} of the "
            "operations of a forward pass."
        )
    else:
        kept = f"Only the old head is replaced; all {profile.parameters:,} parameters below it stay."
        if decision.freeze == "nothing" and decision.recipe.refit_head:
            kept += f" After fine-tuning, a final head is solved on {' + '.join(r.tap for r in decision.read)}."
    return Section(
        "what",
        f"{decision.case}: {action(decision, profile)}",
        (reasons.summary(decision, profile), kept, *filter(None, [reasons.former_sentence(decision, profile)])),
    )


def _axes(decision: Decision, width: int) -> tuple[str | Table, ...]:
    """Draw each gain beside its border: left of it means no, right of it yes."""
    half = max(min((width - 35) // 2, 20), 3)
    rows = []
    for name, axis in (("fine-tuning", decision.tuning), ("cutting", decision.cutting)):
        at = scale(axis)
        drawn = ["·"] * (2 * half + 1)
        if isinstance(axis, TuningGain) and axis.why == "prediction":
            left, right = (round(at.place(100 * end) * 2 * half) for end in (axis.low, axis.high))
            drawn[left : right + 1] = ["─"] * (right - left + 1)
        marker = round(at.place(at.value) * 2 * half)
        drawn[half] = "┼"
        drawn[max(marker, half + 1) if axis.exceeds else min(marker, half - 1)] = "●"
        rows.append(("", name, f"{100 * axis.counted:+.1f}", "".join(drawn), f"{at.border:.1f}"))
    note = (
        "Gains in points of accuracy: of fine-tuning over the best frozen head, and of cutting over the last layer. The borders are "
        "choose.tolerance and choose.gain; a dot right of its border means yes."
    )
    if decision.forced:
        note += f" {' and '.join(decision.forced)} overrules this."
    return Table(("", "gain of", "points", "no".ljust(2 * half - 2) + "yes", "border"), tuple(rows), (2, 4), (1, 2, 3, 4), drawn=True), note


def _cost(decision: Decision) -> float:
    """Return the cost of fine-tuning, the measure of the others."""
    return next(arm.cost for arm in decision.arms if arm.name == "tuned")


def _arms(decision: Decision, profile: Profile) -> tuple[str | Table, ...]:
    mine, whole = chosen(decision, profile), _cost(decision)
    rows = tuple(
        ("→" * (a.name == mine), ARMS[a.name], f"{a.accuracy:.1%}", f"{a.low * 100:.1f} to {a.high * 100:.1f}", f"{a.cost / whole:.1%}")
        for a in decision.arms
    )
    note = (
        "Frozen heads are measured by probes (95% interval), fine-tuning is predicted (80%). Cost: forward passes of one image, against "
        f"{whole:,.0f} of a fine-tuning run."
    )
    if mine is None:
        note += f" What is chosen, a cut after {decision.slice}, is none of these: its accuracy was not measured."
    loss = (
        f"The choice is expected to lose {decision.regret * 100:.1f} points against the best of these, and with probability "
        f"{decision.p_within_tolerance:.2f} not more than the tolerance."
    )
    return Table(("", "way to train", "expected", "interval", "cost"), rows, (2, 3, 4), (1, 2, 4)), loss, note


def _race(decision: Decision, profile: Profile) -> tuple[str | Table, ...]:
    race, sentence = decision.race, reasons.race_sentence(decision, profile)
    if race is None or not race.looks:
        return (sentence,)
    rows = tuple(
        (f"{s.epoch} of {s.epochs}", f"{s.frozen:.1%}", f"{s.tuned:.1%}", f"{(s.tuned - s.frozen) * 100:+.1f} ± {s.error * 100:.1f}", f"{s.p_tuned_better:.2f}")
        for s in race.looks
    )  # fmt: skip
    note = (
        f"Accuracy on {race.looks[-1].images} validation images that selected nothing; the difference in points with its standard error. P: "
        "fine-tuning ends better by more than choose.tolerance."
    )
    return sentence, Table(("epoch", "frozen", "tuned", "difference", "P"), rows, (1, 2, 3, 4), (1, 2, 4)), note


# --- the probes -----------------------------------------------------------------------------------------------------------------------


def _curve(decision: Decision, profile: Profile, width: int) -> tuple[str | Table, ...]:
    """Draw the probe curve, a line for each tap."""
    rows = probe_rows(profile, decision)
    longest = min(max(len(r["tap"]) for r in rows), (width - 24) // 2)
    length = min(width - max(longest, 3) - 22, 48)
    low, high = math.floor(min(r["low"] for r in rows) * 20) / 20, math.ceil(max(r["high"] for r in rows) * 20) / 20
    lines = []
    for r in rows:
        left, at, right = (round((r[key] - low) / max(high - low, 0.05) * (length - 1)) for key in ("low", "accuracy", "high"))
        drawn = [*("·" * left), *("─" * (right - left + 1)), *("·" * (length - 1 - right))]
        drawn[left], drawn[right], drawn[at] = "├", "┤", "●"
        # The ends of a tap's name say most.
        half, name = (longest - 1) // 3, r["tap"]
        short = name if len(name) <= longest else f"{name[:half]}…{name[len(name) - (longest - 1 - half) :]}"
        lines.append(("", short, f"{r['accuracy']:.1%}", "".join(drawn), r["use"]))
        if name == decision.slice and is_cut(decision, profile):
            lines.append(("", "", "", "╌" * length, "cut"))
    scale = f"{low:.0%}" + f"{high:.0%}".rjust(length - len(f"{low:.0%}"))
    note = (
        f"Leave-one-out accuracy of a ridge probe on each tap, first layer to last, with 95% intervals, on {profile.sampled} of "
        f"{profile.images:,} training images of {profile.classes} classes; the largest class alone would give {profile.majority:.1%}."
    )
    return Table(("", "tap", "probe", scale, ""), tuple(lines), (2,), (1, 2, 3, 4), drawn=True), note


def _measured(profile: Profile) -> tuple[str, ...]:
    said = []
    if len(profile.learning_curve) > 1:
        curve = ", ".join(f"{accuracy:.1%} with {images} images" for images, accuracy in profile.learning_curve)
        said.append(f"Learning curve of a head on several taps: {curve}. The last doubling gained {profile.slope * 100:+.1f} points.")
    if profile.head_similarity is not None:
        said.append(
            f"Head similarity S = {profile.head_similarity:.2f}: the share of the labels' entropy that the source network's classes explain (0 to 1)."
        )
    if (tangent := profile.tangent) is not None:
        said.append(
            f"Empirical NTK: the gradients of {tangent.images} images classify {tangent.accuracy:.1%} correctly, where the features of "
            f"several taps reach {tangent.frozen:.1%}."
        )
    return tuple(said)
