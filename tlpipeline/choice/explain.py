"""The explanation: a decision and its profile in plain words with their numbers, for the terminal, as markdown, and as rows for plots.

What is said is made once, as sections of paragraphs, tables and lines; the terminal, markdown and the report page only set it.
"""

import io
import math
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import Any

from tlpipeline.choice.cases import CASES, LARGE, SIMILAR, find
from tlpipeline.choice.decision import Decision
from tlpipeline.profiling.profile import Profile

ARMS = {"frozen": "frozen", "cut": "cut", "multi": "multi-tap", "tuned": "fine-tuned"}
LEAST, MOST, MARKDOWN = 40, 110, 76  # columns; longer lines are hard to read
_HALF = 4  # lines of half the plane
_SAFE = str.maketrans({"|": "\\|", "<": "&lt;", "*": "\\*", "\n": " "})
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
        console.print(Text(fill(section.title), style="bold"))
        for part in section.parts:
            if isinstance(part, Table):
                grid = Grid(box=None, pad_edge=False, header_style="dim")
                for i, title in enumerate(part.header):
                    grid.add_column(Text(title), justify="right" if i in part.numbers else "left", overflow="fold", no_wrap=i in part.fixed)
                for row in part.rows:
                    grid.add_row(*map(Text, row), style="bold" if row[0] == "→" else None)
                console.print(grid)
            elif isinstance(part, str):
                console.print(Text(fill(part)))
            else:
                lines = part.lines if part.drawn else [fill(f"- {line}", subsequent_indent="  ") for line in part.lines]
                console.print(Text("\n".join(lines)))
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
    """Return words for a cell of a markdown table."""
    return words.translate(_SAFE)


def plane_rows(decision: Decision) -> list[dict[str, Any]]:
    """Return the points of the plane: the four cases in its corners, and this data set by its two probabilities."""
    corners = [
        {
            "large": float(c.size == LARGE),
            "similar": float(c.likeness == SIMILAR),
            "name": c.name,
            "what": f"{'chosen ' * (c.name == decision.case)}case",
        }
        for c in CASES
    ]
    return [*corners, {"large": decision.large, "similar": decision.similar, "name": "this data set", "what": "data set"}]


def case_rows(decision: Decision) -> list[dict[str, Any]]:
    """Return the probability of each case, and which one was chosen."""
    return [{"case": c, "probability": p, "chosen": "yes" if c == decision.case else "no"} for c, p in decision.probabilities.items()]


def probe_rows(profile: Profile, decision: Decision) -> list[dict[str, Any]]:
    """Return the probe curve, first tap to last: accuracy with its 95% interval, and what becomes of the tap: read, kept or cut off."""
    at, read = [t.name for t in profile.taps].index(decision.slice), {r.tap for r in decision.read}
    uses = ["cut off" if i > at else "read" if t.name in read else "kept" for i, t in enumerate(profile.taps)]
    pairs = zip(profile.taps, uses, strict=True)
    return [{"tap": t.name, "accuracy": t.accuracy, "low": t.low, "high": t.high, "use": use} for t, use in pairs]


def sections(decision: Decision, profile: Profile, width: int = MARKDOWN) -> tuple[Section, ...]:
    """Return what there is to say, the decision first; drawings for so many columns."""
    found = [
        _what(decision, profile),
        Section("why", "Why", (decision.reason,)),
        Section("arms", "What was weighed", _arms(decision, profile)),
        Section("changes", "What would change it", (Lines(decision.changes),) * bool(decision.changes)),
        Section("cases", "How sure the case is", _cases(decision, width)),
        Section("plane", "The plane of size and similarity", (_plane(decision, width), *off_the_plane(decision))),
        Section("probes", "Where the labels can be read", _curve(decision, profile, width)),
        Section("race", "The race", _race(decision)),
        Section("measured", "What else was measured", (Lines(_measured(profile)),) * bool(_measured(profile))),
        Section("warnings", "Warnings", (Lines(decision.warnings),) * bool(decision.warnings)),
    ]
    return tuple(section for section in found if section.parts)


# --- the decision ---------------------------------------------------------------------------------------------------------------------


def chosen(decision: Decision, profile: Profile) -> str | None:
    """Return the arm that was chosen; None where the cut that was forced is none of those that were weighed."""
    weighed = profile.cut is not None and profile.cut.taps[0] == decision.slice
    arms = {"last": "frozen", "cut": "cut" if weighed else None, "multi": "multi"}
    return "tuned" if decision.freeze == "nothing" else arms[decision.head]


def is_cut(decision: Decision, profile: Profile) -> bool:
    """Say whether layers behind the slice point are cut off."""
    return decision.slice != profile.taps[-1].name


def _what(decision: Decision, profile: Profile) -> Section:
    whole = f"all {profile.parameters:,} parameters stay"
    if decision.freeze == "nothing":
        tried = decision.init == "auto" and profile.images >= decision.recipe.scratch_from
        scratch = ", and from random weights where that does not beat the frozen head" if tried else ""
        last = f" When that is done, a head on {' + '.join(r.tap for r in decision.read)} is solved." * decision.recipe.solve_again
        return Section("what", f"{decision.case}: the whole network is fine-tuned{scratch}", (f"Only the old head goes: {whole}.{last}",))
    done = f"everything frozen, a new head on {' + '.join(r.tap for r in decision.readings)}"
    if not is_cut(decision, profile):
        return Section("what", f"{decision.case}: {done}", (f"Only the old head goes: {whole}.",))
    saved = (
        f"The cut saves {decision.saved_parameters:.1%} of the network's {profile.parameters:,} parameters and {decision.saved_ops:.1%} of "
        "the operations of its forward pass, in training and in use."
    )
    return Section("what", f"{decision.case}: cut behind {decision.slice}, {done}", (saved,))


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
        note += f" What is chosen, a cut behind {decision.slice}, is none of these: its accuracy was not measured."
    return Table(("", "arm", "expected", "interval", "cost"), rows, (2, 3, 4), (1, 2, 4)), note


def _cases(decision: Decision, width: int) -> tuple[str | Table, ...]:
    length = min(width - 31, 40)
    bars = {name: f"{'█' * round(chance * length):·<{length}}" for name, chance in decision.probabilities.items()}
    rows = tuple(("→" * (name == decision.case), name, f"{decision.probabilities[name]:.2f}", bar) for name, bar in bars.items())
    ladder = f"P(large): {decision.large:.2f} with the probes{'' if decision.race is None else ' and the race'}."
    loss = f"Expected loss against the best arm: {decision.regret * 100:.2f} points; with P {decision.within:.2f} it is within choose.tolerance."
    return Table(("", "case", "P", ""), rows, (2,), (1, 2, 3), drawn=True), ladder, loss


def _race(decision: Decision) -> tuple[str | Table, ...]:
    race = decision.race
    if race is None:
        if decision.race_wanted:
            return ("There was none yet: the choice is open, and `tlpipeline run` or `dvc repro choose` would race for it.",)
        return (f"There was none: {decision.no_race}.",)
    words = (
        f"Won by {'fine-tuning' if race.winner == 'tuned' else 'the frozen head'}: {race.ended}. It cost {race.cost:,.0f} forward passes of "
        f"one image, {race.cost / _cost(decision):.0%} of a fine-tuning run; training goes on from what the winner trained."
    )
    if not race.looks:
        return (words,)
    rows = tuple(
        (f"{s.epoch} of {s.epochs}", f"{s.frozen:.1%}", f"{s.tuned:.1%}", f"{(s.tuned - s.frozen) * 100:+.1f} ± {s.error * 100:.1f}", f"{s.chance:.2f}")
        for s in race.looks
    )  # fmt: skip
    note = (
        f"Accuracy on {race.looks[-1].images} validation images that selected nothing; their difference in points with its standard error; "
        "P: fine-tuning ends better by more than choose.tolerance."
    )
    return words, Table(("epoch", "frozen", "tuned", "difference", "P"), rows, (1, 2, 3, 4), (1, 2, 4)), note


# --- the plane ------------------------------------------------------------------------------------------------------------------------


def off_the_plane(decision: Decision) -> tuple[str, ...]:
    """Say why the chosen case is not the one in whose quadrant the data set lies, if it is not."""
    case = find(decision.case)
    lies = next(c for c in CASES if (c.size == LARGE, c.likeness == SIMILAR) == (decision.large >= 0.5, decision.similar >= 0.5))
    if lies == case:
        return ()
    if decision.forced:
        why = f"it was forced by {' and '.join(decision.forced)}"
    elif lies.size != case.size:
        why = "what decides about the size is the expected gain of fine-tuning, not which side is more probable"
    else:
        why = "it is cut exactly where an earlier tap is significantly better, held-out images confirm it, and no multi-tap head is better still"
    return (f"It lies with {lies.name}, but {case.name} is chosen: {why}.",)


def _plane(decision: Decision, width: int) -> Lines:
    half = min((width - 3) // 2, 26)
    column, row = _place(decision.large, half), 2 * _HALF - _place(decision.similar, _HALF)
    cells = [[*(" " * half), "│", *(" " * half)] for _ in range(2 * _HALF + 1)]
    cells[_HALF] = [*("─" * half), "┼", *("─" * half)]
    for case in CASES:
        first, left = (0 if case.likeness == SIMILAR else _HALF + 1), (half + 1 if case.size == LARGE else 0)
        # The name gives way to the marker.
        cells[first + (2 if row == first + 1 else 1)][left : left + half] = (case.name + " *" * (case.name == decision.case)).center(half)
    cells[row][column] = "●"
    sides = [("├", "┤") if i == _HALF else ("│", "│") for i in range(len(cells))]
    drawn = [f"{left}{''.join(line)}{right}" for (left, right), line in zip(sides, cells, strict=True)]
    top, bottom = (f"{a}{'─' * half}{b}{'─' * half}{c}" for a, b, c in ("┌┬┐", "└┴┘"))
    below = [f"P(large) {decision.large:.2f} →".rjust(2 * half + 3), "● this data set   * chosen"]
    return Lines((f"↑ P(similar) {decision.similar:.2f}", top, *drawn, bottom, *below), drawn=True)


def _place(share: float, half: int) -> int:
    """Return the place of a share between two halves of so many places with a border between them; one half counts to the second."""
    second = share >= 0.5
    return max(min(int((share - 0.5 * second) * 2 * half), half - 1), 0) + (half + 1) * second


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
    if len(profile.hunger) > 1:
        points = ", ".join(f"{accuracy:.1%} with {images} images" for images, accuracy in profile.hunger)
        said.append(f"Learning curve of the head on several taps: {points}; the last doubling brought {profile.slope * 100:+.1f} points.")
    if profile.head_similarity is not None:
        said.append(
            f"Head similarity S = {profile.head_similarity:.2f}: share of the labels' entropy that the source's own classes explain."
        )
    if (tangent := profile.tangent) is not None:
        said.append(
            f"Tangent probe, what gradients say that fine-tuning could read, on {tangent.images} images: {tangent.accuracy:.1%}, where the "
            f"multi-tap features reach {tangent.frozen:.1%}."
        )
    return tuple(said)
