"""The race: where the evidence leaves it open, fine-tuning runs against the best frozen head, on the same split, as a Ray Train job.

Fine-tuning gets its real schedule: a trial with a third of its epochs reads up to 28 points too low in our measurements. At three planned
looks both are compared on the half of validation that selected nothing, and the race ends as soon as the error spent on that look allows.
What the winner trained is kept for the train stage, which goes on where the race ended. `train.budget_minutes` bounds both arms together.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tlpipeline.choice import decide
from tlpipeline.choice.decision import Decision, Look, Race
from tlpipeline.choice.policy import DecisionPolicy
from tlpipeline.params import ClusterParams
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import Event, Progress
from tlpipeline.training import ray_train
from tlpipeline.training.checkpoint import STATE
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.recipe import BUDGET

NO_TIME = 1e-9  # minutes: 0 would be no bound


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
    """Race, and decide by what it found.

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
    terms = {"evidence": dataclasses.asdict(weighed.evidence), "rule": dataclasses.asdict(weighed.rule), "frozen": history[0]["correct"]}
    other = dataclasses.replace(job(arms["tuned"]), race=terms)
    if other.budget_minutes:
        other = dataclasses.replace(other, budget_minutes=max(other.budget_minutes - spent, NO_TIME))
    tuned = ray_train.run(other, cluster, f"race-tuned-{name}", runs, progress, "choose")
    state = json.loads((tuned / STATE).read_text(encoding="utf-8"))
    looks = tuple(Look(**look) for look in state["looks"])
    images, others = profile.images, 2 * profile.validation
    cost = cost_of(arms["frozen"], images, others) + images + others + state["epoch"] * (3 * images + others)
    winner, ended = state["winner"], state["ended"]
    if not winner:  # what had no time to be raced has none to be trained; and what stops early was not ahead
        by = BUDGET if any(said.startswith(BUDGET) for said in state["remarks"]) else "early stopping"
        winner, ended = "frozen", f"{by} ended it undecided"
    race = Race(looks, winner, ended, float(cost))
    shutil.copytree({"frozen": frozen, "tuned": tuned}[race.winner], kept, dirs_exist_ok=True)
    return decide.decide(profile, weighed, race.winner == "tuned", race)


def cost_of(frozen: Decision, images: int, others: int) -> float:
    """Return the forward passes of one image that a frozen head costs."""
    return (images + others) * (1 - frozen.saved_ops)
