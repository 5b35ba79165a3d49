"""The stage check: every check of the data, and how much each weighs by the settings."""

from collections.abc import Sequence
from dataclasses import replace

from tlpipeline.alarms import STOP, WARN, Alarm, by_severity
from tlpipeline.checking import pictures, shortcuts, signal
from tlpipeline.checking.quality import Finding, Quality
from tlpipeline.data.dataset import Row
from tlpipeline.data.facts import Facts
from tlpipeline.params import CheckParams
from tlpipeline.profiling.profile import Profile


def check(rows: Sequence[Row], facts: Sequence[Facts], profile: Profile, params: CheckParams) -> Quality:
    """Look for what is wrong with the data.

    Args:
        rows: the distinct images of all splits; facts: of their files, in the same order.
        profile: what the probes of these images reached.
    """
    findings: list[Finding] = []
    alarms: list[Alarm] = signal.find(profile)
    for listed, said in (shortcuts.find(rows, facts, params.shortcut), pictures.find(rows, facts)):
        findings += listed
        alarms += said
    return Quality(tuple(findings), by_severity([weighed(alarm, params) for alarm in alarms]))


def weighed(alarm: Alarm, params: CheckParams) -> Alarm:
    """Return an alarm with the severity that the settings give its kind."""
    if alarm.kind in params.stop:
        return replace(alarm, severity=STOP)
    return replace(alarm, severity=WARN) if alarm.kind in params.warn else alarm
