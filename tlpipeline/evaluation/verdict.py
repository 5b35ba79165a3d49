"""The verdict of the gate: its outcome, its numbers and its sentences."""

from dataclasses import asdict, dataclass, replace
from typing import Any

MAJORITY = "the majority class"
ACCURACY, BALANCED = "accuracy", "balanced_accuracy"
ACCEPTED, UNDECIDED, REJECTED = "accepted", "undecided", "rejected"
WORN = 20  # verdicts after which test images are worn: one of them is wrong by chance at the usual alpha


@dataclass(frozen=True)
class Forgotten:
    """A class whose recall is below the champion's: images of it, and the recall before and now (0 to 1)."""

    label: str
    images: int
    before: float
    now: float


@dataclass(frozen=True)
class Verdict:
    """The result of the gate.

    Attributes:
        outcome: accepted, undecided, or rejected (shown to be worse).
        champion: version that it was compared with, or `the majority class`.
        images: number of compared test images; groups: of those that are independent, the same number where no image has a group.
        left_out: test images that the champion was trained on.
        metric: accuracy, or balanced_accuracy (the mean of the classes' recalls).
        challenger_score, champion_score: the metric on the compared images.
        wins, losses: images that only the challenger, or only the champion, classifies correctly.
        p_value: one-sided, under the null hypothesis that `reason` names.
        low, high: 90% interval of the difference in the metric, in percentage points.
        new_classes: classes that the champion cannot name; lost_classes: those that only the champion can.
        power: probability that these images show a true gain of two points (rule `better`), or that an equal model is not worse.
        images_needed: images for a power of 0.8.
        reason: one sentence with the numbers.
        notes: further sentences: what these images can show, new and lost classes, what was left out.
        judged: how often these test images have judged before, on average.
        because: why a person accepted the model against the verdict, "" if nobody did.
        forgotten: classes whose recall fell, the largest fall first, for a model that started from the weights of the one in production.
    """

    outcome: str
    champion: str
    images: int
    groups: int
    left_out: int
    metric: str
    challenger_score: float
    champion_score: float
    wins: int
    losses: int
    p_value: float
    low: float
    high: float
    new_classes: tuple[str, ...]
    lost_classes: tuple[str, ...]
    power: float
    images_needed: int
    reason: str
    notes: tuple[str, ...] = ()
    judged: int = 0
    because: str = ""
    forgotten: tuple[Forgotten, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the model is registered as better: by the test, or by a person."""
        return self.outcome == ACCEPTED or bool(self.because)

    @property
    def text(self) -> str:
        """The reason and the notes as sentences."""
        return " ".join([self.reason, *self.notes, *([f"Accepted by hand: {self.because}"] if self.because else [])])

    def markdown(self) -> str:
        """Return the reason and the notes as markdown."""
        return "\n".join([f"**{self.reason}**", "", *(f"* {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def with_wear(verdict: Verdict, judged: int) -> Verdict:
    """Return a verdict that says how often its test images have judged before.

    Each verdict has the error probability `alpha`. After 1/alpha of them, expect one model that luck accepted; it is then hard to beat.
    """
    if not judged:
        return verdict
    note = f"These test images have judged {judged} model{'s' * (judged != 1)} before."
    if judged >= WORN:
        note += " They are worn: expect that luck decided some of these verdicts. Add images; 15 % of them go to test."
    return replace(verdict, judged=judged, notes=(*verdict.notes, note))
