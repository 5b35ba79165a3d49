"""What a decision expected of the model that it chose, and what the test images showed. Kept over runs, it tells whether to trust the next one."""

from collections.abc import Sequence
from dataclasses import dataclass

from tlpipeline.choice.decision import Decision, Finite
from tlpipeline.choice.explain import chosen
from tlpipeline.profiling.profile import Profile


@dataclass(frozen=True)
class Forecast:
    """Expected and measured accuracy of one model, as shares (0 to 1).

    Attributes:
        expected, low, high: of the chosen way to train, with the interval of its probe (95 %) or of its prediction (80 %).
        measured, measured_low, measured_high: on the test images, with the interval of `evaluate.confidence`.
    """

    expected: Finite
    low: Finite
    high: Finite
    measured: Finite
    measured_low: Finite
    measured_high: Finite

    @property
    def agrees(self) -> bool:
        """Whether the two intervals overlap."""
        return self.low <= self.measured_high and self.measured_low <= self.high

    def __str__(self) -> str:
        expected = f"{self.expected:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f}) was expected"
        if self.agrees:
            return f"{expected}, and {self.measured:.1%} was measured"
        return f"{expected}, but {self.measured:.1%} was measured: {'more' if self.measured > self.expected else 'less'} than both intervals explain"


def forecast(decision: Decision, profile: Profile, accuracy: float, low: float, high: float) -> Forecast | None:
    """Return what was expected beside an accuracy on the test images and its interval; None where a forced cut was not measured by a probe."""
    name = chosen(decision, profile)
    arm = next((arm for arm in decision.arms if arm.name == name), None)
    return Forecast(arm.accuracy, arm.low, arm.high, accuracy, low, high) if arm else None


def calibration(forecasts: Sequence[Forecast]) -> str:
    """Return how well the expectations of several models were met, "" for fewer than two."""
    if len(forecasts) < 2:
        return ""
    error = 100 * sum(one.measured - one.expected for one in forecasts) / len(forecasts)
    size = 100 * sum(abs(one.measured - one.expected) for one in forecasts) / len(forecasts)
    return (
        f"over {len(forecasts)} models, measured minus expected is {error:+.1f} points on average (mean absolute error {size:.1f}); the intervals "
        f"of {sum(one.agrees for one in forecasts)} overlap"
    )
