"""No signal: nothing that was measured recognizes the labels better than chance."""

import math

from scipy.stats import norm

from tlpipeline.alarms import BLOCK, Alarm
from tlpipeline.profiling.profile import Profile

KIND = "no signal"
ALPHA = 0.05  # probability that labels thrown by a coin raise no alarm
LEAST, LEAST_PER_CLASS = 30, 5  # images: on fewer, even a good probe is often not significantly better than chance


def find(profile: Profile) -> list[Alarm]:
    """Return an alarm if no probe and no head is significantly better than always naming the largest class.

    The test is one-sided and corrected for the number of probes (Bonferroni): the best of 16 probes of pure noise looks better than chance. On
    uneven classes a probe may also show itself by the mean of the classes' accuracies, whose chance level is one over the classes.
    """
    if profile.sampled < LEAST or profile.sampled < LEAST_PER_CLASS * profile.probed:
        return []
    measured = [(probe.accuracy, profile.sampled) for probe in profile.taps] + [(head.accuracy, profile.sampled) for head in profile.heads]
    if profile.tangent is not None:
        measured.append((profile.tangent.accuracy, profile.tangent.images))
    z = float(norm.ppf(1 - ALPHA / (len(measured) + len(profile.taps))))
    if any(accuracy > profile.majority + z * _error(profile.majority, images) for accuracy, images in measured):
        return []
    chance = 1 / profile.probed
    # The rarest class has the largest error: its images are as many as its share of the sample.
    rarest = max(profile.smallest / profile.images * profile.sampled, 1)
    if max(probe.balanced for probe in profile.taps) > chance + z * _error(chance, rarest) / math.sqrt(profile.probed):
        return []
    best = max(profile.taps, key=lambda probe: probe.accuracy)
    return [
        Alarm(
            KIND,
            BLOCK,
            f"the labels cannot be told from the pictures: the best of {len(profile.taps)} probes is right on {best.accuracy:.1%} of {profile.sampled} images "
            f"({best.low:.1%} to {best.high:.1%}), and always naming the largest class is right on {profile.majority:.1%}",
        )
    ]


def _error(share: float, images: float) -> float:
    return math.sqrt(share * (1 - share) / images)
