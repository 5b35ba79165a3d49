"""What the methods of a workspace return: values that print as text and that notebooks draw."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlpipeline.display import Displayed, printable, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tlpipeline.backbones.listing import Available
    from tlpipeline.choice.decision import Decision
    from tlpipeline.data.cache import ColumnInfo
    from tlpipeline.data.changes import Changes
    from tlpipeline.profiling.profile import Profile
    from tlpipeline.workspace.doctor import Check


@dataclass(frozen=True)
class Explanation(Displayed):
    """The decided case, the profile it rests on, and both in words."""

    decision: Decision
    profile: Profile

    def text(self, width: int = 100, color: bool = False) -> str:
        """Return the explanation for a terminal of so many columns."""
        from tlpipeline.choice import explain

        return explain.text(self.decision, self.profile, width, color)

    def markdown(self) -> str:
        """Return the explanation as GitHub-flavored markdown."""
        from tlpipeline.choice import explain

        return explain.markdown(self.decision, self.profile)

    def to_json(self) -> dict[str, Any]:
        """Return the decision and the points of its plots as plain values."""
        from tlpipeline.choice import explain

        return explain.to_json(self.decision, self.profile)

    def __str__(self) -> str:
        return self.text().rstrip("\n")

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        return Text.from_ansi(self.text(color=True).rstrip("\n"))


@dataclass(frozen=True)
class RegisteredVersion:
    """A registered version of a model.

    Attributes:
        name: such as "catalogue@v0.1.0".
        stages: those that it is in now.
        verdict: "accepted", "undecided", or "accepted by hand".
        case: the transfer-learning case that it was trained as.
        accuracy, low, high: on the test images, with its confidence interval; None where the version has no metrics.
        data: hash of the data set.
        commit: of git.
    """

    name: str
    stages: tuple[str, ...]
    verdict: str
    case: str
    accuracy: float | None
    low: float | None
    high: float | None
    data: str
    commit: str


class Backbones(Displayed, tuple["Available", ...]):
    """Networks that can be had."""

    __slots__ = ()

    def __rich__(self) -> RenderableType:
        rows = [
            (
                n.name,
                "" if n.parameters is None else f"{n.parameters / 1e6:.2f}",
                "" if n.size is None else str(n.size),
                "" if n.milliseconds is None else f"{n.milliseconds:.1f}",
                ", ".join(n.weights[:2]) + (f" and {len(n.weights) - 2} more" if len(n.weights) > 2 else ""),
                n.license,
            )
            for n in self
        ]
        return table(("name", "million parameters", "pixels", "ms per image", "weights", "license"), rows)


class Versions(Displayed, tuple[RegisteredVersion, ...]):
    """Registered versions, newest first."""

    __slots__ = ()

    def __rich__(self) -> RenderableType:
        if not self:
            return "No model is registered yet."
        rows = [
            (
                v.name,
                ", ".join(v.stages),
                v.verdict,
                v.case,
                "" if v.accuracy is None else f"{v.accuracy:.1%}",
                "" if v.low is None or v.high is None else f"{v.low:.1%} to {v.high:.1%}",
                v.data[:10],
                v.commit[:10],
            )
            for v in self
        ]
        return table(("version", "stages", "verdict", "case", "accuracy", "interval", "data", "commit"), rows)


@dataclass(frozen=True)
class Promotion:
    """A version that was put into a stage, and the git tag that records it."""

    version: str
    stage: str
    tag: str

    def __str__(self) -> str:
        return f"{self.version} is in {self.stage} now ({self.tag})"


@dataclass(frozen=True)
class Acceptance:
    """A model that a person accepted against the gate's verdict.

    Attributes:
        version: as which it is registered; new: whether it was registered by this.
        promoted: tag of its promotion, "" if `gate.promote` is manual.
        because: the reason, which git records.
    """

    version: str
    new: bool
    promoted: str
    because: str

    def __str__(self) -> str:
        done = f"{self.version} is {'registered and ' if self.new else ''}accepted: {self.because}"
        return f"{done} ({self.promoted})" if self.promoted else f"{done}\nTo use it: tlpipeline registry promote {self.version}"


@dataclass(frozen=True)
class Rollback:
    """A version that was taken out of a stage, and the one that is in it again."""

    before: str
    now: str
    stage: str

    def __str__(self) -> str:
        return f"{self.now} is in {self.stage} again, instead of {self.before}"


@dataclass(frozen=True)
class DataCommit:
    """A versioned state of the images.

    Attributes:
        digest: hash of the data set.
        images: number of files.
        changes: since the version before, None for images that a stage writes.
        remarks: sentences for people.
        announced: whether a Prefect server was told.
    """

    digest: str
    images: int
    changes: Changes | None
    remarks: tuple[str, ...]
    announced: bool

    def __str__(self) -> str:
        changed = "" if self.changes is None else f", {self.changes.summary}"
        lines = [] if self.changes is None else [f"{kind:<9} {text}" for kind, text in self.changes.lines()]
        event = "event tlpipeline.data.updated emitted" if self.announced else "no event emitted: PREFECT_API_URL is not set"
        return "\n".join([f"data {self.digest}: {self.images} files{changed}", *lines, event, *self.remarks])


class Diagnosis(Displayed, tuple["Check", ...]):
    """The checks of `Workspace.doctor`, in the order in which a run needs them."""

    __slots__ = ()

    @property
    def healthy(self) -> bool:
        """Whether no check found a problem; warnings are none."""
        return all(check.status != "problem" for check in self)

    def __rich__(self) -> RenderableType:
        return table(("", "", ""), [(check.status, check.name, check.text) for check in self])


@dataclass(frozen=True)
class CacheInfo(Displayed):
    """What a cache holds, what was used last first.

    Attributes:
        entries: each with a label, a number of files, bytes, and when it was used last.
        max_gb: the limit, `cache.max_gb` in params.yaml.
    """

    entries: tuple[ColumnInfo, ...]
    max_gb: float
    folder: Path

    @property
    def bytes(self) -> int:
        """The bytes that it takes."""
        return sum(entry.bytes for entry in self.entries)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        rows = [(e.label, str(e.files), f"{e.bytes / 1e6:.1f}", _minutes(e.used)) for e in self.entries]
        size = f"{self.bytes / 1e9:.3f} of {self.max_gb:g} GB (cache.max_gb) in {self.folder}"
        total = Text(printable(size), no_wrap=True, overflow="ignore")
        return Group(table(("what", "files", "MB", "last used"), rows), total) if rows else total


def _minutes(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="minutes")
