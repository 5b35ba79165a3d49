"""The race: where the evidence leaves the choice open, fine-tuning and the best frozen head are both trained and compared, on the same split.

Fine-tuning gets its real schedule: a trial with a third of its epochs was up to 28 points too low in our measurements. Three interim analyses
are planned. Each compares both arms on the half of validation that selected nothing, and may end the race. The train stage continues from the
winner's checkpoint. `train.budget_minutes` bounds both arms together.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tlpipeline.choice import decide, policy, reasons
from tlpipeline.choice.decision import Decision, InterimResult, Race
from tlpipeline.choice.policy import DecisionPolicy
from tlpipeline.data import splits
from tlpipeline.params import ClusterParams
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import Event, Progress
from tlpipeline.stats import unpack
from tlpipeline.training import ray_train
from tlpipeline.training.callbacks import EpochEnd
from tlpipeline.training.checkpoint import STATE
from tlpipeline.training.config import TrainingConfig

NO_TIME = 1e-9  # minutes: 0 would be no bound
RACE = "race"  # name of the looks, the winner and the reason in the records of the run's state


@dataclass(frozen=True)
class InterimAnalysis:
    """Compares fine-tuning with the frozen head at planned epochs, on validation images that selected nothing; stops at a decision.

    Attributes:
        policy: the evidence, the rule and the prediction.
        frozen_correct: which validation images the frozen head classified correctly, packed.
    """

    policy: DecisionPolicy
    frozen_correct: str

    def on_epoch_end(self, epoch: EpochEnd) -> bool:
        """Record the interim analysis that is planned for this epoch, if one is; stop if it decides the race."""
        state, planned = epoch.state, policy.interim_epochs(epoch.epochs)
        if state.epoch not in planned:
            return False
        judges = np.array([not splits.in_selection_half(row.key) for row in epoch.validation])
        frozen, tuned = (unpack(bits, len(judges))[judges] for bits in (self.frozen_correct, epoch.correct))
        part = policy.LOOKS - len(planned) + planned.index(state.epoch)
        groups = [row.group for row, judging in zip(epoch.validation, judges, strict=True) if judging]
        look = policy.interim_analysis(self.policy, part, state.epoch, epoch.epochs, frozen, tuned, groups=groups)
        winner, ended = policy.stopping_rule(self.policy, part, look)
        looks = [*state.records.get(RACE, {"looks": []})["looks"], asdict(look)]
        state.records[RACE] = {"looks": looks, "winner": winner, "ended": ended}
        text = f"look {part + 1}: fine-tuned {look.tuned:.1%}, frozen {look.frozen:.1%}, {reasons.ENDED[ended] if ended else 'still open'}"
        epoch.on_progress(state.epoch, epoch.epochs, text, important=True)
        return bool(winner)


def run(
    profile: Profile,
    weighed: DecisionPolicy,
    job: Callable[[Decision], TrainingConfig],
    cluster: ClusterParams,
    name: str,
    runs: Path,
    kept: Path,
    progress: Progress,
) -> Decision:
    """Train and compare both ways, and decide by the result.

    Args:
        profile, weighed: the evidence.
        job: makes a job of a decision.
        cluster, name, runs: as for `distributed.run`; an interrupted race is resumed.
        kept: an empty folder that receives what the winner trained.

    Raises:
        ClusterError: as `distributed.run` does.
    """
    arms = {"frozen": decide.decide(profile, weighed, large=False), "tuned": decide.decide(profile, weighed, large=True)}
    progress(Event("choose", 0, 1, f"race: {arms['frozen'].case} against {arms['tuned'].case}"))
    frozen = ray_train.run(job(arms["frozen"]), cluster, f"race-frozen-{name}", runs, progress, "choose")
    history = json.loads((frozen / "history.json").read_text(encoding="utf-8"))["history"]
    spent = json.loads((frozen / STATE).read_text(encoding="utf-8"))["seconds"] / 60
    other = replace(job(arms["tuned"]), callbacks=(InterimAnalysis(weighed, history[0]["correct"]),), checkpoint_only=True)
    if other.budget_minutes:
        other = replace(other, budget_minutes=max(other.budget_minutes - spent, NO_TIME))
    tuned = ray_train.run(other, cluster, f"race-tuned-{name}", runs, progress, "choose")
    state = json.loads((tuned / STATE).read_text(encoding="utf-8"))
    record = state["records"].get(RACE, {"looks": [], "winner": "", "ended": ""})
    looks = tuple(InterimResult(**look) for look in record["looks"])
    images, others = profile.images, 2 * profile.validation
    cost = cost_of(arms["frozen"], images, others) + images + others + state["epoch"] * (3 * images + others)
    winner, ended = record["winner"], record["ended"]
    if not winner:  # the time budget ended the race: there is no time to fine-tune either
        winner, ended = "frozen", "budget"
    race = Race(looks, winner, ended, float(cost))
    shutil.copytree({"frozen": frozen, "tuned": tuned}[race.winner], kept, dirs_exist_ok=True)
    return decide.decide(profile, weighed, race.winner == "tuned", race)


def cost_of(frozen: Decision, images: int, others: int) -> float:
    """Return the forward passes of one image that a frozen head costs."""
    return (images + others) * (1 - frozen.saved_ops)
