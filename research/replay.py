"""What each rule would have chosen on the units of the grid, replayed on their rows.

A predictor that decides on a data set was fitted on the others. Nothing here trains a network, so it takes seconds.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research import fitting
from research.fitting import Observed
from research.grid import ARMS, GRIDS, LEFT_OUT, MORE, SEED, UNITS, Unit, key_of, rank, rows_of
from tlpipeline.choice import policy, predictor
from tlpipeline.choice.predictor import Evidence, GainPredictor
from tlpipeline.params import ChooseParams
from tlpipeline.stats import unpack

RIVALS = ("frozen", "cut", "tuned", "scratch")


HEADS = {"last": "frozen", "cut": "cut", "multi": "multi"}


PENALTY = 0.3  # of .03 to 1 the one with which the prediction errs least on data sets left out (2.1 points; docs/log.md)


OURS = ", our recipe"


@dataclass(frozen=True)
class Measured:
    """A unit and its rows.

    Attributes:
        unit: data set, backbone, images and seed.
        evidence: of its profile.
        arms: the row of each arm.
        slices: the rows of arm `at`, by tap.
        looked: forward passes of the profile.
        profiled: CPU seconds of the profile.
        judges: the validation images that a race may look at.
        also: further rivals.
    """

    unit: Unit
    evidence: Evidence
    arms: dict[str, dict[str, str]]
    slices: dict[str, dict[str, str]]
    looked: int
    profiled: float
    judges: npt.NDArray[np.bool_]
    also: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """The data set."""
        return self.unit.data

    @property
    def backbone(self) -> str:
        """The backbone."""
        return self.unit.backbone

    def accuracy(self, arm: str, half: str = "") -> float:
        """Return an arm's accuracy (0 to 1) on the test images, or on half `a` or `b` of them."""
        return accuracy_of(self.arms[arm], half)

    def cost(self, arm: str) -> float:
        """Return the cost of training an arm, in forward passes of one image; a backward pass counts two."""
        return float(self.arms[arm]["forward"]) + 2 * float(self.arms[arm]["backward"])

    def seconds(self, arm: str) -> float:
        """Return the CPU seconds of training an arm; a forward pass of a frozen arm takes as long as one of the profile."""
        row = self.arms[arm]
        passes = 0.0 if float(row["backward"]) else float(row["forward"]) * self.profiled / self.looked
        return float(row["cpu_s"]) + passes

    @property
    def rivals(self) -> list[str]:
        """The arms that the regret is measured against."""
        return [arm for arm in (*RIVALS, *self.also) if arm in self.arms]

    @property
    def passes_for_taps(self) -> int:
        """Forward passes that tell which taps the last head reads: those of the profile, without gradients and statistics."""
        return self.evidence.sampled + int(self.arms["tuned"]["val"]) - len(self.judges)

    def regret(self, arm: str) -> float:
        """Return the points lost against the best rival: an upper bound, as the same test images select the rival and score it."""
        return 100 * (max(self.accuracy(a) for a in {*self.rivals, arm}) - self.accuracy(arm))

    def half_regret(self, arm: str) -> float:
        """Return a lower bound of it: one half of the test images selects the best rival, the other half scores it; and the reverse."""
        lost = []
        for pick, score in ("ab", "ba"):
            best = max(self.rivals, key=lambda a: self.accuracy(a, pick))
            lost.append(self.accuracy(best, score) - self.accuracy(arm, score))
        return 100 * float(np.mean(lost))

    def slice_regret(self) -> float:
        """Return the points that the head at the slice point loses against the best tap, which the other half of the test images selects."""
        lost = []
        for pick, score in ("ab", "ba"):
            best = max(self.slices.values(), key=lambda row: accuracy_of(row, pick))
            lost.append(accuracy_of(best, score) - self.accuracy("cut", score))
        return 100 * float(np.mean(lost))


def accuracy_of(row: dict[str, str], half: str = "") -> float:
    halves = half or "ab"
    return sum(int(row[f"hits_{h}"]) for h in halves) / sum(int(row[f"test_{h}"]) for h in halves)


def measured(results: Path, complete: Sequence[str] = ("frozen", "cut", "multi", "tuned", "lpft")) -> list[Measured]:
    """Return the units that have rows of all these arms, without the data sets of LEFT_OUT."""
    arms: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    slices: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows_of(results / ARMS):
        key = key_of(row)
        if row["arm"] == "at":
            slices.setdefault(key, {})[row["slice"]] = row
        else:
            arms.setdefault(key, {})[row["arm"]] = row
    out = []
    for row in rows_of(results / UNITS):
        key = key_of(row)
        unit_arms = arms.get(key, {})
        if row["data"] in LEFT_OUT or not all(arm in unit_arms for arm in complete):
            continue
        values = {f.name: read(row[f.name], f.type) for f in dataclasses.fields(Evidence)}
        judges = unpack(row["judges"], int(unit_arms["tuned"]["val"]))
        unit = Unit(key[0], key[1], int(key[2]), int(key[3]))
        out.append(Measured(unit, Evidence(**values), unit_arms, slices.get(key, {}), int(row["looked"]), float(row["cpu_s"]), judges))
    return out


def read(text: str, kind: object) -> Any:
    """Read a cell of a table as a field of this type."""
    if text == "":
        return None
    return text == "True" if kind is bool else int(text) if kind is int else float(text)


@dataclass(frozen=True)
class Chosen:
    """What a rule chose for a unit.

    Attributes:
        arm: which.
        cost, seconds: forward passes and CPU seconds with everything before it.
        within: P(within tolerance of the best).
        raced: whether it raced.
    """

    arm: str
    cost: float
    seconds: float
    within: float = math.nan
    raced: bool = False


def product(model: GainPredictor, rule: ChooseParams, one: Measured) -> Chosen:
    """Choose as the product does: profile, prediction, and a race if the prediction leaves it open."""
    weighed = policy.DecisionPolicy(one.evidence, rule, model)
    frozen = HEADS[weighed.head]
    before = float(one.looked)
    if weighed.no_race:
        arm = "tuned" if weighed.large else frozen
        return Chosen(arm, before + one.cost(arm), one.profiled + one.seconds(arm), weighed.p_within_tolerance(tuned=weighed.large))
    row = one.arms["tuned"]
    epochs, images = int(row["epochs"]), len(one.judges)
    before += one.cost(frozen)
    spent = one.profiled + one.seconds(frozen)
    solved = int(row["train"]) + images
    for part, epoch in enumerate(policy.interim_epochs(epochs), policy.LOOKS - len(policy.interim_epochs(epochs))):
        bits = [unpack(text, images)[one.judges] for text in (one.arms[frozen]["bits"], row["looks"].split()[part])]
        seen = policy.interim_analysis(weighed, part, epoch, epochs, *bits)
        winner, _ = policy.stopping_rule(weighed, part, seen)
        if winner == "tuned":
            return Chosen(
                "tuned", before + one.cost("tuned"), spent + one.seconds("tuned"), model.p_within_tolerance(seen.p_tuned_within), raced=True
            )
        if winner == "frozen":
            raced = solved + epoch * (images + 3 * int(row["train"]))
            return Chosen(
                frozen,
                before + raced,
                spent + one.seconds("tuned") * epoch / epochs,
                model.p_within_tolerance(1 - seen.p_tuned_better),
                raced=True,
            )
    raise AssertionError("the last look ends the race")


def observed(one: Measured, rule: ChooseParams, heads: Mapping[str, Sequence[float]]) -> Observed:
    """Return a row of the fit."""
    weighed = policy.DecisionPolicy(one.evidence, rule, dataclasses.replace(predictor.NEUTRAL, heads=heads))
    frozen = HEADS[weighed.head]
    row = one.arms["tuned"]
    looks = [float(unpack(bits, len(one.judges)).mean()) for bits in row["looks"].split()] if len(one.judges) else []
    return Observed(
        data=one.data,
        evidence=one.evidence,
        frozen=weighed.frozen,
        frozen_test=one.accuracy(frozen),
        tuned_test=one.accuracy("tuned"),
        test=int(row["test_a"]) + int(row["test_b"]),
        best_test=max(one.accuracy(arm) for arm in {*one.rivals, frozen}),
        cut_test=one.accuracy("cut") - one.accuracy("frozen"),
        multi_test=one.accuracy("multi") - one.accuracy("frozen"),
        looks=tuple(looks),
        validated=float(unpack(one.arms[frozen]["bits"], len(one.judges)).mean()) if len(one.judges) else 0.0,
        validation=len(one.judges),
    )


def others(units: Sequence[Measured], one: Measured) -> list[Measured]:
    """Return the units of other data sets and other networks than those of a unit."""
    return [u for u in units if u.data != one.data and u.backbone != one.backbone]


def core_of(units: Sequence[Measured]) -> list[Measured]:
    """Return the units of the core grid, on which the predictor is fitted."""
    return [one for one in units if one.backbone in GRIDS["core"] and one.data not in MORE]


def held_out_models(units: Sequence[Measured], rule: ChooseParams, penalty: float) -> dict[str, GainPredictor]:
    """Return for each data set a predictor that was not fitted on it.

    That is the shipped one, or one fitted on the rest of the core grid; at the tolerance that it is shipped with.
    """
    shipped, core = predictor.load_predictor(), core_of(units)
    return {
        name: shipped if name not in shipped.data else fitted_on([one for one in core if one.data != name], rule, penalty)
        for name in sorted({one.data for one in units})
    }


def fitted_on(units: Sequence[Measured], rule: ChooseParams, penalty: float) -> GainPredictor:
    """Fit in two steps: which frozen head would be trained, then how much fine-tuning gains over it."""
    heads = fitting.fit_heads([observed(one, rule, predictor.NEUTRAL.heads) for one in units])
    return fitting.fit([observed(one, rule, heads) for one in units], penalty, rule.tolerance / 100)


def rules(units: Sequence[Measured], rule: ChooseParams, models: dict[str, GainPredictor]) -> dict[str, list[Chosen]]:
    """Return what each rule chooses for each unit; `models` has for each data set a predictor fitted on the others.

    Every rule but the product fine-tunes by the usual recipe. Rules with OURS in their name fine-tune by the recipe of the product:
    then only the choice differs.
    """
    quick = dataclasses.replace(rule, effort="quick")
    every: dict[str, Callable[[Measured], Chosen]] = {
        "product (auto)": lambda one: product(models[one.data], rule, one),
        "product (quick)": lambda one: product(models[one.data], quick, one),
        "always frozen": always("frozen"),
        "always cut": probed("cut"),
        "always multi": probed("multi"),
        "always plain FT": always("plain"),
    }
    for tuned, whose in (("lpft", ""), ("tuned", OURS)):
        every |= {f"{name}{whose}": how for name, how in baselines(tuned, rule, models).items()}
    return {
        name: [how(one) for one in units]
        for name, how in every.items()
        if name != "always plain FT" or all("plain" in u.arms for u in units)
    }


def baselines(tuned: str, rule: ChooseParams, models: dict[str, GainPredictor]) -> dict[str, Callable[[Measured], Chosen]]:
    """Return the rules that fine-tune some units or all of them by this arm, lpft or tuned."""

    def best(one: Measured) -> str:
        return HEADS[policy.DecisionPolicy(one.evidence, rule, models[one.data]).head]

    def headroom(one: Measured) -> Chosen:
        most = max(one.evidence.last, one.evidence.cut, one.evidence.multi)
        return probed(best(one) if most >= 0.88 else tuned)(one)

    def textbook(one: Measured) -> Chosen:
        case = policy.textbook(one.evidence)
        if case.freeze == "nothing":
            return probed(tuned)(one)
        return probed("cut" if case.keep == "slice" else "frozen")(one)

    def size(one: Measured) -> Chosen:
        return always(tuned if one.evidence.images >= policy.TEXTBOOK_IMAGES else "frozen")(one)

    def random(one: Measured) -> Chosen:
        arms = ("frozen", "cut", tuned)
        return always(arms[int(rank(SEED, repr(one.unit.key)), 16) % len(arms)])(one)

    def oracle(one: Measured) -> Chosen:
        ways = [tuned if arm == "tuned" else arm for arm in RIVALS]
        return always(max((arm for arm in ways if arm in one.arms), key=one.accuracy))(one)

    return {
        "always LP-FT": always(tuned),
        f"size only (n >= {policy.TEXTBOOK_IMAGES})": size,
        "textbook 2x2": textbook,
        "P_max >= .88": headroom,
        "random": random,
        "oracle": oracle,
    }


def always(arm: str) -> Callable[[Measured], Chosen]:
    """Return the rule that always trains this arm. The recipe of `tuned` needs a profile for the taps of its last head."""

    def chosen(one: Measured) -> Chosen:
        passes = one.passes_for_taps if arm == "tuned" else 0
        return Chosen(arm, passes + one.cost(arm), passes * one.profiled / one.looked + one.seconds(arm))

    return chosen


def probed(arm: str) -> Callable[[Measured], Chosen]:
    """Return the rule that trains this arm after a profile."""
    return lambda one: Chosen(arm, one.looked + one.cost(arm), one.profiled + one.seconds(arm))
