"""What every rule would have chosen on the units of `research.regret`, replayed on the same rows; and the fit of the prediction.

Everything that is fitted is fitted on the other data sets. Nothing here trains a network, so it takes seconds.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research import fitting
from research.fitting import Observed
from research.grid import ARMS, GRIDS, LEFT_OUT, MORE, SEED, UNITS, Unit, rank, rows_of
from tlpipeline.choice import policy, predictor
from tlpipeline.choice.predictor import Evidence, GainPredictor
from tlpipeline.params import ChooseParams
from tlpipeline.stats import unpack, wilson

RIVALS = ("frozen", "cut", "tuned", "scratch")
HEADS = {"last": "frozen", "cut": "cut", "multi": "multi"}
PENALTY = 0.3  # of .03 to 1 the one with which the prediction errs least on data sets left out (2.1 points; docs/log.md)
BINS = 5
FAR = ("always frozen", "size only (n >= 1000)", "random")  # far off the picture, whoever tunes
OURS = ", our recipe"
DRAWS = 2000

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A unit with all that was measured of it."""

    unit: Unit
    evidence: Evidence
    arms: dict[str, dict[str, str]]
    slices: dict[str, dict[str, str]]
    looked: int
    profiled: float
    judges: npt.NDArray[np.bool_]
    also: tuple[str, ...] = ()

    def accuracy(self, arm: str, half: str = "") -> float:
        """Return an arm's accuracy on the test side, or on one half of it."""
        return accuracy_of(self.arms[arm], half)

    def cost(self, arm: str) -> float:
        """Return the forward passes of one image that training this arm costs; a backward pass counts two."""
        return float(self.arms[arm]["forward"]) + 2 * float(self.arms[arm]["backward"])

    def seconds(self, arm: str) -> float:
        """Return the CPU seconds of training this arm; the passes of a frozen one are taken at the profile's seconds a pass."""
        row = self.arms[arm]
        passes = 0.0 if float(row["backward"]) else float(row["forward"]) * self.profiled / self.looked
        return float(row["cpu_s"]) + passes

    @property
    def rivals(self) -> list[str]:
        """The arms that regret is measured against, and what is to be one of them as well."""
        return [arm for arm in (*RIVALS, *self.also) if arm in self.arms]

    @property
    def passes_for_taps(self) -> int:
        """Forward passes that say which taps the last head is to read: the profile's, without gradients and statistics."""
        return self.evidence.sampled + int(self.arms["tuned"]["val"]) - len(self.judges)

    def regret(self, arm: str) -> float:
        """Return points lost against the best rival, winner and score on the same test images: an upper bound."""
        return 100 * (max(self.accuracy(a) for a in {*self.rivals, arm}) - self.accuracy(arm))

    def half_regret(self, arm: str) -> float:
        """Return the same with the winner picked on one half of the test side and scored on the other, halves swapped: a lower bound."""
        lost = []
        for pick, score in ("ab", "ba"):
            best = max(self.rivals, key=lambda a: self.accuracy(a, pick))
            lost.append(self.accuracy(best, score) - self.accuracy(arm, score))
        return 100 * float(np.mean(lost))

    def slice_regret(self) -> float:
        """Return points that the head at the chosen slice point loses against the best one, picked on one half and scored on the other."""
        lost = []
        for pick, score in ("ab", "ba"):
            best = max(self.slices.values(), key=lambda row: accuracy_of(row, pick))
            lost.append(accuracy_of(best, score) - self.accuracy("cut", score))
        return 100 * float(np.mean(lost))


def accuracy_of(row: dict[str, str], half: str = "") -> float:
    halves = half or "ab"
    return sum(int(row[f"hits_{h}"]) for h in halves) / sum(int(row[f"test_{h}"]) for h in halves)


def measured(results: Path, complete: Sequence[str] = ("frozen", "cut", "multi", "tuned", "lpft")) -> list[Measured]:
    """Return the units that have all these arms, weather left out: it is too small."""
    arms: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    slices: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows_of(results / ARMS):
        key = (row["data"], row["backbone"], row["n"], row["seed"])
        if row["arm"] == "at":
            slices.setdefault(key, {})[row["slice"]] = row
        else:
            arms.setdefault(key, {})[row["arm"]] = row
    out = []
    for row in rows_of(results / UNITS):
        key = (row["data"], row["backbone"], row["n"], row["seed"])
        there = arms.get(key, {})
        if row["data"] in LEFT_OUT or not all(arm in there for arm in complete):
            continue
        values = {f.name: read(row[f.name], f.type) for f in dataclasses.fields(Evidence)}
        judges = unpack(row["judges"], int(there["tuned"]["val"]))
        unit = Unit(key[0], key[1], int(key[2]), int(key[3]))
        out.append(Measured(unit, Evidence(**values), there, slices.get(key, {}), int(row["looked"]), float(row["cpu_s"]), judges))
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
    """Choose as the product does: the profile, the prediction, and where it is open the race."""
    weighed = policy.DecisionPolicy(one.evidence, rule, model)
    frozen = HEADS[weighed.head]
    before = float(one.looked)
    if weighed.no_race:
        arm = "tuned" if weighed.large else frozen
        return Chosen(arm, before + one.cost(arm), one.profiled + one.seconds(arm), weighed.settled(tuned=weighed.large))
    row = one.arms["tuned"]
    epochs, images = int(row["epochs"]), len(one.judges)
    before += one.cost(frozen)
    spent = one.profiled + one.seconds(frozen)
    solved = int(row["train"]) + images
    for part, epoch in enumerate(policy.look_epochs(epochs), policy.LOOKS - len(policy.look_epochs(epochs))):
        bits = [unpack(text, images)[one.judges] for text in (one.arms[frozen]["bits"], row["looks"].split()[part])]
        seen = policy.look(weighed, part, epoch, epochs, *bits)
        winner, _ = policy.verdict(weighed, part, seen)
        if winner == "tuned":
            return Chosen("tuned", before + one.cost("tuned"), spent + one.seconds("tuned"), model.settled(seen.safe), raced=True)
        if winner == "frozen":
            raced = solved + epoch * (images + 3 * int(row["train"]))
            return Chosen(frozen, before + raced, spent + one.seconds("tuned") * epoch / epochs, model.settled(1 - seen.chance), raced=True)
    raise AssertionError("the last look ends the race")


def observed(one: Measured, rule: ChooseParams, heads: dict[str, Any]) -> Observed:
    """Return a row of the fit."""
    weighed = policy.DecisionPolicy(one.evidence, rule, dataclasses.replace(predictor.NEUTRAL, heads=heads))
    frozen = HEADS[weighed.head]
    row = one.arms["tuned"]
    looks = [float(unpack(bits, len(one.judges)).mean()) for bits in row["looks"].split()] if len(one.judges) else []
    return Observed(
        data=one.unit.data,
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
    """Return the units of other data sets and other networks."""
    return [u for u in units if u.unit.data != one.unit.data and u.unit.backbone != one.unit.backbone]


def told(name: str, units: Sequence[Measured], chosen: Sequence[Chosen], rule: ChooseParams) -> str:
    """Say in a few words what a rule reaches."""
    f = figures(units, chosen, rule.tolerance)
    return f"{name} {f.half.mean():.2f}..{f.raw.mean():.2f}, {f.good.mean():.0%} within {rule.tolerance:g} points, cost {f.cost.mean():.0%}"


def core_of(units: Sequence[Measured]) -> list[Measured]:
    """Return the units of the core grid: what is fitted on. Three more data sets and two more networks are what nothing was fitted on."""
    return [one for one in units if one.unit.backbone in GRIDS["core"] and one.unit.data not in MORE]


def held_out_models(units: Sequence[Measured], rule: ChooseParams, penalty: float) -> dict[str, GainPredictor]:
    """Return for each data set a model that has not seen it: the package's own, or where that was fitted on it, one fitted on the rest of the core grid.

    As the package's own they are fitted at the balanced tolerance, whatever the user prefers.
    """
    rule = dataclasses.replace(rule, prefer="balanced")
    shipped, core = predictor.load_predictor(), core_of(units)
    return {
        name: shipped if name not in shipped.data else fitted_on([one for one in core if one.unit.data != name], rule, penalty)
        for name in sorted({one.unit.data for one in units})
    }


def fitted_on(units: Sequence[Measured], rule: ChooseParams, penalty: float) -> GainPredictor:
    """Fit in two steps: first which frozen head would be trained, then how far fine-tuning lies above it."""
    heads = fitting.fit_heads([observed(one, rule, predictor.NEUTRAL.heads) for one in units])
    return fitting.fit([observed(one, rule, heads) for one in units], penalty, rule.tolerance / 100)


def rules(units: Sequence[Measured], rule: ChooseParams, models: dict[str, GainPredictor]) -> dict[str, list[Chosen]]:
    """Return what every rule chooses for every unit; `models` holds for each data set one that was fitted on the others.

    Every rule but the product fine-tunes by the usual recipe, as those do who use it today, and once more by the product's (OURS), which
    leaves nothing but the choice to compare.
    """
    quick = dataclasses.replace(rule, effort="quick")
    every: dict[str, Callable[[Measured], Chosen]] = {
        "product (auto)": lambda one: product(models[one.unit.data], rule, one),
        "product (quick)": lambda one: product(models[one.unit.data], quick, one),
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
    """Return the rules that fine-tune some units or all, with this arm (lpft or tuned) for that."""

    def best(one: Measured) -> str:
        return HEADS[policy.DecisionPolicy(one.evidence, rule, models[one.unit.data]).head]

    def headroom(one: Measured) -> Chosen:
        most = max(one.evidence.last, one.evidence.cut, one.evidence.multi)
        return probed(best(one) if most >= 0.88 else tuned)(one)

    def textbook(one: Measured) -> Chosen:
        if one.evidence.images >= rule.textbook_images:
            return probed(tuned)(one)
        return probed("frozen" if (one.evidence.head_similarity or 0) >= rule.textbook_similarity else "cut")(one)

    def size(one: Measured) -> Chosen:
        return always(tuned if one.evidence.images >= rule.textbook_images else "frozen")(one)

    def random(one: Measured) -> Chosen:
        arms = ("frozen", "cut", tuned)
        return always(arms[int(rank(SEED, repr(one.unit.key)), 16) % len(arms)])(one)

    def oracle(one: Measured) -> Chosen:
        ways = [tuned if arm == "tuned" else arm for arm in RIVALS]
        return always(max((arm for arm in ways if arm in one.arms), key=one.accuracy))(one)

    return {
        "always LP-FT": always(tuned),
        f"size only (n >= {rule.textbook_images})": size,
        "textbook 2x2": textbook,
        "P_max >= .88": headroom,
        "random": random,
        "oracle": oracle,
    }


def always(arm: str) -> Callable[[Measured], Chosen]:
    """Return the rule that trains this arm, whatever the data; our recipe has to know which taps its last head reads."""

    def chosen(one: Measured) -> Chosen:
        passes = one.passes_for_taps if arm == "tuned" else 0
        return Chosen(arm, passes + one.cost(arm), passes * one.profiled / one.looked + one.seconds(arm))

    return chosen


def probed(arm: str) -> Callable[[Measured], Chosen]:
    """Return the rule that trains this arm after having looked at the data."""
    return lambda one: Chosen(arm, one.looked + one.cost(arm), one.profiled + one.seconds(arm))


# --- figures --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What a rule reaches: a value a unit."""

    raw: Values
    half: Values
    cost: Values
    seconds: Values
    raced: Values
    within: Values
    good: npt.NDArray[np.bool_]


def figures(units: Sequence[Measured], chosen: Sequence[Chosen], tolerance: float) -> Figures:
    """Return regret in points (upper and lower bound), cost against always the usual LP-FT, and whether the choice was within the tolerance."""
    raw = np.array([one.regret(c.arm) for one, c in zip(units, chosen, strict=True)])
    return Figures(
        raw,
        np.array([one.half_regret(c.arm) for one, c in zip(units, chosen, strict=True)]),
        np.array([c.cost / one.cost("lpft") for one, c in zip(units, chosen, strict=True)]),
        np.array([c.seconds / one.seconds("lpft") for one, c in zip(units, chosen, strict=True)]),
        np.array([c.raced for c in chosen], dtype=float),
        np.array([c.within for c in chosen]),
        raw <= tolerance + 1e-9,
    )


def paired_by_data(units: Sequence[Measured], difference: Values) -> tuple[float, float, float]:
    """Return the mean of a difference over data sets, each counting alike, and its 90 % bootstrap interval over data sets."""
    names = sorted({one.unit.data for one in units})
    means = np.array([difference[[one.unit.data == name for one in units]].mean() for name in names])
    draws = means[np.random.default_rng(0).integers(0, len(means), (DRAWS, len(means)))].mean(1)
    return float(means.mean()), float(np.quantile(draws, 0.05)), float(np.quantile(draws, 0.95))


def brier_skill(units: Sequence[Measured], found: Figures) -> tuple[float, float]:
    """Return the Brier score of P(within) and its skill against the base rate of the other data sets."""
    data = np.array([one.unit.data for one in units])
    base = np.array([found.good[data != name].mean() if (data != name).any() else found.good.mean() for name in data])
    score, reference = float(((found.within - found.good) ** 2).mean()), float(((base - found.good) ** 2).mean())
    return score, 1 - score / reference if reference else 0.0


def reliability(found: Figures) -> list[tuple[float, float, int]]:
    """Return (mean probability, share within the tolerance, units) of five bins of equal mass."""
    order = np.argsort(found.within, kind="stable")
    return [(float(found.within[b].mean()), float(found.good[b].mean()), len(b)) for b in np.array_split(order, min(BINS, len(order)))]


def calibration_error(found: Figures) -> tuple[float, float]:
    """Return the expected calibration error over these bins, and what a perfectly calibrated forecast would show on so many units."""

    def error(good: npt.NDArray[np.bool_]) -> float:
        bins = reliability(dataclasses.replace(found, good=good))
        return sum(n * abs(p - share) for p, share, n in bins) / len(good)

    rng = np.random.default_rng(0)
    floor = np.mean([error(rng.random(len(found.within)) < found.within) for _ in range(500)])
    return error(found.good), float(floor)


def drawing(found: dict[str, Figures]) -> str:
    """Return an SVG: regret against cost of the rules that are not FAR off, and the reliability of the product's probability."""
    left, top, width, height = 64, 36, 330, 250
    found = {name: f for name, f in found.items() if not name.startswith(FAR)}
    most = 1.05 * max(f.raw.mean() for f in found.values())
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 340" font-family="sans-serif" font-size="12">',
        '<rect width="920" height="340" fill="#ffffff"/>',
        f'<text x="{left}" y="20" font-weight="bold">Mean regret (points) against cost (always LP-FT = 100 %)</text>',
    ]
    for k in range(7):
        x = left + width * k / 6
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{top + height}" stroke="#e3e7ec"/>')
        parts.append(f'<text x="{x}" y="{top + height + 18}" text-anchor="middle">{20 * k} %</text>')
    for k in range(int(most / 0.5) + 1):
        y = top + height - height * 0.5 * k / most
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e7ec"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{0.5 * k:.1f}</text>')
    for name, f in found.items():
        x = left + width * f.cost.mean() / 1.2
        low, high = (top + height - height * max(v, 0) / most for v in (f.half.mean(), f.raw.mean()))
        color = "#b3372f" if name.startswith("product") else "#2563a8"
        parts.append(f'<line x1="{x}" x2="{x}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}" stroke-width="3"/>')
        early = name.endswith("(quick)")
        at, anchor = (high - 6, "end") if early else ((low + high) / 2 + 4, "start")
        words = name.replace("<", "&lt;").replace(">", "&gt;")
        parts.append(f'<text x="{x + 5:.1f}" y="{at:.1f}" text-anchor="{anchor}" fill="{color}">{words}</text>')
    left = 540
    parts.append(f'<text x="{left}" y="20" font-weight="bold">P(within the tolerance of the best), said and seen</text>')
    parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#c4ccd6"/>')
    parts.append(f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top}" stroke="#c4ccd6" stroke-dasharray="4 4"/>')
    for k in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<text x="{left + width * k}" y="{top + height + 18}" text-anchor="middle">{k:g}</text>')
        parts.append(f'<text x="{left - 6}" y="{top + height - height * k + 4}" text-anchor="end">{k:g}</text>')
    for said, seen, units in reliability(found["product (auto)"]):
        low, high = wilson(round(seen * units), units, 0.9)
        x = left + width * said
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + height * (1 - low):.1f}" y2="{top + height * (1 - high):.1f}" stroke="#b3372f"/>'
        )
        parts.append(f'<circle cx="{x:.1f}" cy="{top + height * (1 - seen):.1f}" r="5" fill="#b3372f"/>')
    parts.append(f'<text x="{left}" y="{top + height + 38}">five bins of equal mass, 90 % intervals</text></svg>')
    return "\n".join(parts) + "\n"


def fit(results: Path, rule: ChooseParams) -> None:
    """Refit the model that comes with the package on the core grid, and write it as readable data."""
    units = core_of(measured(results))
    model = fitted_on(units, rule, PENALTY)
    predictor.FITTED.write_text(json.dumps(model.to_json(), indent=2) + "\n", encoding="utf-8")
    print(f"{len(units)} units of {len(model.data)} data sets: {predictor.FITTED.name}")
    for name, value in model.coefficients.items():
        print(f"  {value:+.3f}  {name}")
    print(
        f"  {model.intercept:+.3f}  intercept; unexplained {model.deviation:.2f}; calibration {model.slant:.2f}, {model.offset:+.2f}; lag {model.lag}"
    )


def dominated(
    units: Sequence[Measured], found: dict[str, Figures], rule: ChooseParams, models: dict[str, GainPredictor]
) -> dict[str, list[str]]:
    """Return for each baseline the settings of choose.prefer and choose.effort that lose less, by both bounds, and cost less."""
    settings = {}
    for prefer in policy.LENIENCE:
        for effort in ("auto", "quick"):
            own = dataclasses.replace(rule, prefer=prefer, effort=effort)
            chosen = [product(models[one.unit.data], own, one) for one in units]
            settings[f"{prefer}/{effort}"] = figures(units, chosen, rule.tolerance)
    return {
        name: [
            setting
            for setting, own in settings.items()
            if all(getattr(own, what).mean() < getattr(f, what).mean() for what in ("half", "raw", "cost"))
        ]
        for name, f in found.items()
        if not name.startswith(("product", "oracle")) and not name.endswith(OURS)
    }


def report(results: Path, rule: ChooseParams, per_unit: bool) -> None:
    """Print the figures of every rule on the same units."""
    units = measured(results)
    if not units:
        sys.exit(
            f"expected units with the arms frozen, cut, multi and tuned in {results}, found none. Run `profile` and `collect --arms tuned` first."
        )
    models = held_out_models(units, rule, PENALTY)
    core = core_of(units)
    # What differs from the core grid: other data sets, and one network after the other.
    beside = {", ".join(MORE): [u for u in units if u.unit.data in MORE and u.unit.backbone in GRIDS["core"]]}
    for name in sorted({u.unit.backbone for u in units if u.unit.backbone not in GRIDS["core"]}):
        beside[name] = [u for u in units if u.unit.backbone == name]
    units = core or units
    tried = rules(units, rule, models)
    found = {name: figures(units, chosen, rule.tolerance) for name, chosen in tried.items()}
    full = np.array([one.cost("lpft") for one in units])
    print(
        f"{len(units)} units of {len({u.unit.data for u in units})} data sets; tolerance {rule.tolerance} points; regret: lower..upper bound"
    )
    print(
        f"{'rule':22} {'mean regret':>12} {'median':>7} {'p90':>12} {'<=.5':>5} {'<=1':>5} {'cost':>5} {'total':>6} {'CPU':>5} {'raced':>6}  regret minus the product's, by data set"
    )
    for name, f in found.items():
        total = sum(c.cost for c in tried[name]) / full.sum()
        mean, low, high = paired_by_data(units, f.half - found["product (auto)"].half)
        print(
            f"{name:22} {f.half.mean():5.2f}..{f.raw.mean():5.2f} {np.median(f.raw):7.2f} {np.quantile(f.half, 0.9):5.2f}..{np.quantile(f.raw, 0.9):5.2f} "
            f"{(f.raw <= 0.5).mean():5.0%} {(f.raw <= 1).mean():5.0%} {f.cost.mean():5.0%} {total:6.0%} {f.seconds.mean():5.0%} {f.raced.mean():6.0%}"
            + ("" if name == "product (auto)" else f"  {mean:+.2f} ({low:+.2f} to {high:+.2f})")
        )
    beaten = dominated(units, found, rule, models)
    print(
        "settings (prefer/effort) that lose less and cost less: " + "; ".join(f"{k}: {', '.join(v) or 'none'}" for k, v in beaten.items())
    )
    (results / "regret.svg").write_text(drawing(found), encoding="utf-8")
    for name in ("product (auto)", "product (quick)"):
        f = found[name]
        score, skill = brier_skill(units, f)
        error, floor = calibration_error(f)
        bins = ", ".join(f"{p:.2f}: {share:.2f} ({n})" for p, share, n in reliability(f))
        print(
            f"{name}: P(within tolerance): Brier {score:.3f}, skill {skill:+.2f}; calibration error {error:.3f} (floor {floor:.3f}); {bins}"
        )
    with_multi = [dataclasses.replace(one, also=("multi",)) for one in units]
    print(
        "with multi among the rivals: "
        + ", ".join(told(name, with_multi, tried[name], rule) for name in ("product (auto)", "always LP-FT", f"always LP-FT{OURS}"))
    )
    if core:
        kinds = {(one.unit.data, one.unit.backbone): one for one in core}
        without = {kind: fitted_on(others(core, one), rule, PENALTY) for kind, one in kinds.items()}
        unseen = [product(without[one.unit.data, one.unit.backbone], rule, one) for one in core]
        print("fitted without the data set and without the network: " + told("product (auto)", core, unseen, rule))
        shown = (
            "product (auto)",
            "product (quick)",
            *(name for name in found if name.startswith(("always multi", "always LP-FT", "P_max", "oracle"))),
        )
        for name, part in beside.items():
            if part:
                chosen = rules(part, rule, models)
                _, skill = brier_skill(part, figures(part, chosen["product (auto)"], rule.tolerance))
                said = "; ".join(told(which, part, chosen[which], rule) for which in shown)
                print(f"not fitted on {name} ({len(part)} units): {said}; Brier skill {skill:+.2f}")
    for arm in ("plain", "scratch"):
        part = [one for one in units if arm in one.arms]
        if part:
            means = " ".join(f"{a} {np.mean([one.half_regret(a) for one in part]):.2f}" for a in (arm, "lpft"))
            print(f"{arm} on the {len(part)} units that have it: mean regret {means}")
    sliced = [one for one in units if one.slices]
    if sliced:
        lost = np.array([one.slice_regret() for one in sliced])
        print(
            f"slice regret on {len(sliced)} units: mean {lost.mean():.2f}, median {np.median(lost):.2f}, p90 {np.quantile(lost, 0.9):.2f}"
        )
    if per_unit:
        for one, c, r, h in zip(units, tried["product (auto)"], found["product (auto)"].raw, found["product (auto)"].half, strict=True):
            arms = " ".join(
                f"{a} {100 * one.accuracy(a):.1f}" for a in ("frozen", "cut", "multi", "tuned", "lpft", "plain", "scratch") if a in one.arms
            )
            print(
                f"{one.unit.backbone:10} {one.unit.n:5} {one.unit.data:12} {one.unit.seed} {c.arm:6} {'raced' if c.raced else '     '} P {c.within:.2f} regret {h:5.2f}..{r:5.2f} cost {c.cost / one.cost('lpft'):4.0%} | {arms}"
            )
