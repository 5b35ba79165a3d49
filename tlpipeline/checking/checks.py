"""The stage check: every check of the data, and how much each weighs by the settings."""

from collections.abc import Sequence

from tlpipeline.alarms import Alarm, by_severity, weighed
from tlpipeline.checking import labels, near_copies, pictures, shortcuts, signal
from tlpipeline.checking.quality import Finding, Quality
from tlpipeline.data.copies import Pair
from tlpipeline.data.dataset import Row
from tlpipeline.data.facts import Facts
from tlpipeline.params import CheckParams
from tlpipeline.profiling.probes import Matrix
from tlpipeline.profiling.profile import Profile


def check(
    rows: Sequence[Row],
    facts: Sequence[Facts],
    pairs: Sequence[Pair],
    profile: Profile,
    labeled: Sequence[Row],
    probabilities: Matrix | None,
    params: CheckParams,
) -> Quality:
    """Look for what is wrong with the data.

    Args:
        rows: the distinct images of all splits; facts: of their files, in the same order.
        pairs: near copies among them.
        profile: what the probes of these images reached.
        labeled: images whose labels are checked; probabilities: as from `labels.left_out_probabilities`, None where there are none.
    """
    findings: list[Finding] = []
    alarms: list[Alarm] = signal.find(profile)
    wrong: tuple[list[Finding], list[Alarm]] = ([], [])
    if probabilities is not None:
        wrong = labels.find(labeled, probabilities, params.wrong_label)
    copies = near_copies.find(rows, pairs, params.near_copies)
    for listed, said in (copies, shortcuts.find(rows, facts, params.shortcut), wrong, pictures.find(rows, facts)):
        findings += listed
        alarms += said
    return Quality(tuple(findings), by_severity(weighed(alarms, params.stop, params.warn)))
