"""Alarms: what is wrong with the data or the training, and how much it weighs."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

Severity = Literal["stop", "block", "warn"]
STOP: Severity = "stop"  # the run ends before it trains
BLOCK: Severity = "block"  # a model may be registered, but is not promoted
WARN: Severity = "warn"  # people are told
_ORDER: tuple[Severity, ...] = (STOP, BLOCK, WARN)

# Kinds that weigh more than a warning. A threshold may still make one of them a warning.
_SEVERITIES: dict[str, Severity] = {"leak": BLOCK, "vanished": BLOCK}
_WORDS: dict[Severity, str] = {STOP: "stops", BLOCK: "blocks", WARN: "warning"}


@dataclass(frozen=True)
class Alarm:
    """Something wrong that touches the verdict.

    Attributes:
        kind: a short name, such as `leak`.
        severity: stop, block or warn.
        text: one sentence with the numbers.
    """

    kind: str
    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"

    @property
    def word(self) -> str:
        """The severity in a word for a label: stops, blocks or warning."""
        return _WORDS[self.severity]


def from_remark(remark: str) -> Alarm:
    """Return a remark of the form `kind: text` as an alarm; one without a kind is a warning about the data."""
    kind, colon, text = remark.partition(": ")
    if not colon:
        return Alarm("data", WARN, remark)
    return Alarm(kind, _SEVERITIES.get(kind, WARN), text)


def weighed(alarms: Iterable[Alarm], stop: Collection[str], warn: Collection[str]) -> list[Alarm]:
    """Return alarms with the severity that the settings give their kinds."""
    by_kind = {kind: WARN for kind in warn} | {kind: STOP for kind in stop}
    return [replace(alarm, severity=by_kind.get(alarm.kind, alarm.severity)) for alarm in alarms]


def by_severity(alarms: Iterable[Alarm]) -> tuple[Alarm, ...]:
    """Return alarms with the gravest first; those of the same severity keep their order."""
    return tuple(sorted(alarms, key=lambda alarm: _ORDER.index(alarm.severity)))


def blocking(alarms: Iterable[Alarm]) -> tuple[Alarm, ...]:
    """Return the alarms that keep a model from being promoted."""
    return tuple(alarm for alarm in alarms if alarm.severity in (STOP, BLOCK))
