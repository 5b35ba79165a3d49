"""The report on the committed rows, and the fit of the predictor that the package ships."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from research import charts
from research.figures import Figures, brier_skill, calibration_error, figures, paired_by_data, reliability
from research.grid import GRIDS, MORE, RESULTS, ROOT
from research.replay import OURS, PENALTY, Chosen, Measured, core_of, fitted_on, held_out_models, measured, others, product, rules
from tlpipeline.choice import predictor
from tlpipeline.choice.predictor import GainPredictor
from tlpipeline.params import ChooseParams

PRODUCT = "product (auto)"
CHART = ROOT / "docs" / "images" / "regret.svg"


def fit(results: Path, rule: ChooseParams) -> None:
    """Fit the predictor that the package ships on the core grid, and write it as readable data."""
    units = core_of(measured(results))
    model = fitted_on(units, rule, PENALTY)
    predictor.FITTED.write_text(json.dumps(model.to_json(), indent=2) + "\n", encoding="utf-8")
    print(f"{len(units)} units of {len(model.data)} data sets: {predictor.FITTED.name}")
    for name, value in model.coefficients.items():
        print(f"  {value:+.3f}  {name}")
    print(
        f"  {model.intercept:+.3f}  intercept; unexplained {model.deviation:.2f}; calibration {model.platt_slope:.2f}, {model.platt_intercept:+.2f}; remaining gain {model.remaining_gain}"
    )


def report(results: Path, rule: ChooseParams, per_unit: bool) -> None:
    """Print the figures of every rule on the same units, and draw the chart.

    The first figures are those of the core grid. Other data sets and other networks follow: nothing is fitted on them.
    """
    units = measured(results)
    if not units:
        sys.exit(
            f"expected units with the arms frozen, cut, multi and tuned in {results}, found none. Run `profile` and `collect --arms tuned` first."
        )
    models = held_out_models(units, rule, PENALTY)
    core = core_of(units) or units
    choices = rules(core, rule, models)
    by_rule = {name: figures(core, chosen, rule.tolerance) for name, chosen in choices.items()}
    _table(core, choices, by_rule, rule)
    dominating = dominated(core, by_rule, rule, models)
    print(
        "settings (tolerance/effort) that lose less and cost less: "
        + "; ".join(f"{name}: {', '.join(settings) or 'none'}" for name, settings in dominating.items())
    )
    charts.draw(by_rule, CHART if results == RESULTS else results / "regret.svg")
    _probabilities(core, by_rule)
    with_multi = [dataclasses.replace(unit, also=("multi",)) for unit in core]
    print(
        "with multi among the rivals: "
        + ", ".join(summary(name, with_multi, choices[name], rule) for name in (PRODUCT, "always LP-FT", f"always LP-FT{OURS}"))
    )
    if core_of(units):
        _held_out(units, core, rule, models, list(by_rule))
    _other_arms(core)
    if per_unit:
        _units(core, choices[PRODUCT], by_rule[PRODUCT])


def summary(name: str, units: Sequence[Measured], choices: Sequence[Chosen], rule: ChooseParams) -> str:
    """Return a rule's name, regret, good choices and cost as text."""
    f = figures(units, choices, rule.tolerance)
    return f"{name} {f.half.mean():.2f}..{f.raw.mean():.2f}, {f.good.mean():.0%} within {rule.tolerance:g} points, cost {f.cost.mean():.0%}"


def dominated(
    units: Sequence[Measured], by_rule: Mapping[str, Figures], rule: ChooseParams, models: dict[str, GainPredictor]
) -> dict[str, list[str]]:
    """Return for each baseline the settings of choose.tolerance and choose.effort that lose less, by both bounds, and cost less."""
    settings = {}
    for tolerance in (0.0, 0.5, 2.5):
        for effort in ("auto", "quick"):
            changed = dataclasses.replace(rule, tolerance=tolerance, effort=effort)  # type: ignore[arg-type]
            choices = [product(models[unit.data], changed, unit) for unit in units]
            settings[f"{tolerance:g}/{effort}"] = figures(units, choices, rule.tolerance)
    return {
        name: [
            setting
            for setting, product_figures in settings.items()
            if all(getattr(product_figures, what).mean() < getattr(f, what).mean() for what in ("half", "raw", "cost"))
        ]
        for name, f in by_rule.items()
        if not name.startswith(("product", "oracle")) and not name.endswith(OURS)
    }


def _table(units: Sequence[Measured], choices: Mapping[str, Sequence[Chosen]], by_rule: Mapping[str, Figures], rule: ChooseParams) -> None:
    full = np.array([unit.cost("lpft") for unit in units])
    print(
        f"{len(units)} units of {len({unit.data for unit in units})} data sets; tolerance {rule.tolerance} points; regret: lower..upper bound"
    )
    print(
        f"{'rule':22} {'mean regret':>12} {'median':>7} {'p90':>12} {'<=.5':>5} {'<=1':>5} {'cost':>5} {'total':>6} {'CPU':>5} {'raced':>6}  regret minus the product's, by data set"
    )
    for name, f in by_rule.items():
        total = sum(choice.cost for choice in choices[name]) / full.sum()
        mean, low, high = paired_by_data(units, f.half - by_rule[PRODUCT].half)
        print(
            f"{name:22} {f.half.mean():5.2f}..{f.raw.mean():5.2f} {np.median(f.raw):7.2f} {np.quantile(f.half, 0.9):5.2f}..{np.quantile(f.raw, 0.9):5.2f} "
            f"{(f.raw <= 0.5).mean():5.0%} {(f.raw <= 1).mean():5.0%} {f.cost.mean():5.0%} {total:6.0%} {f.seconds.mean():5.0%} {f.raced.mean():6.0%}"
            + ("" if name == PRODUCT else f"  {mean:+.2f} ({low:+.2f} to {high:+.2f})")
        )


def _probabilities(units: Sequence[Measured], by_rule: Mapping[str, Figures]) -> None:
    for name in (PRODUCT, "product (quick)"):
        f = by_rule[name]
        score, skill = brier_skill(units, f)
        error, floor = calibration_error(f)
        bins = ", ".join(f"{p:.2f}: {share:.2f} ({n})" for p, share, n in reliability(f))
        print(
            f"{name}: P(within tolerance): Brier {score:.3f}, skill {skill:+.2f}; calibration error {error:.3f} (floor {floor:.3f}); {bins}"
        )


def _held_out(
    units: Sequence[Measured], core: Sequence[Measured], rule: ChooseParams, models: dict[str, GainPredictor], names: Sequence[str]
) -> None:
    """Print the figures on what nothing was fitted on: without the data set and the network, other data sets, other networks."""
    kinds = {(unit.data, unit.backbone): unit for unit in core}
    without = {kind: fitted_on(others(core, unit), rule, PENALTY) for kind, unit in kinds.items()}
    choices = [product(without[unit.data, unit.backbone], rule, unit) for unit in core]
    print("fitted without the data set and without the network: " + summary(PRODUCT, core, choices, rule))
    parts = {", ".join(MORE): [unit for unit in units if unit.data in MORE and unit.backbone in GRIDS["core"]]}
    for backbone in sorted({unit.backbone for unit in units} - set(GRIDS["core"])):
        parts[backbone] = [unit for unit in units if unit.backbone == backbone]
    printed = [
        PRODUCT,
        "product (quick)",
        *(name for name in names if name.startswith(("always multi", "always LP-FT", "P_max", "oracle"))),
    ]
    for name, part in parts.items():
        if part:
            by_rule = rules(part, rule, models)
            _, skill = brier_skill(part, figures(part, by_rule[PRODUCT], rule.tolerance))
            summaries = "; ".join(summary(each, part, by_rule[each], rule) for each in printed)
            print(f"not fitted on {name} ({len(part)} units): {summaries}; Brier skill {skill:+.2f}")


def _other_arms(units: Sequence[Measured]) -> None:
    for arm in ("plain", "scratch"):
        if part := [unit for unit in units if arm in unit.arms]:
            means = " ".join(f"{a} {np.mean([unit.half_regret(a) for unit in part]):.2f}" for a in (arm, "lpft"))
            print(f"{arm} on the {len(part)} units that have it: mean regret {means}")
    if part := [unit for unit in units if unit.slices]:
        lost = np.array([unit.slice_regret() for unit in part])
        print(f"slice regret on {len(part)} units: mean {lost.mean():.2f}, median {np.median(lost):.2f}, p90 {np.quantile(lost, 0.9):.2f}")


def _units(units: Sequence[Measured], choices: Sequence[Chosen], f: Figures) -> None:
    for unit, choice, raw, half in zip(units, choices, f.raw, f.half, strict=True):
        arms = " ".join(
            f"{a} {100 * unit.accuracy(a):.1f}" for a in ("frozen", "cut", "multi", "tuned", "lpft", "plain", "scratch") if a in unit.arms
        )
        print(
            f"{unit.backbone:10} {unit.unit.n:5} {unit.data:12} {unit.unit.seed} {choice.arm:6} {'raced' if choice.raced else '     '} "
            f"P {choice.within:.2f} regret {half:5.2f}..{raw:5.2f} cost {choice.cost / unit.cost('lpft'):4.0%} | {arms}"
        )
