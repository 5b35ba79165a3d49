"""How many points does the choice of case lose, and what does it save? Every way to train is run on real images; each result is a row.

A unit is (data set, number of images, backbone, seed). An arm is a way to train it (see research/arms.py). See research/README.md for the rows.

    python -m research.regret profile [--data DIR] [--grid core|full|lite0] [--only TEXT ...]
    python -m research.regret collect [--data DIR] [--grid core|full|lite0] [--only TEXT ...] [--arms ARM ...]
    python -m research.regret fit
    python -m research.regret report [--units]

profile  measures each unit as the product does, and trains the heads of the frozen network
collect  fine-tunes each unit, arm by arm, small subsets first
fit      fits tlpipeline/choice/predictor.json again on the rows
report   prints the figures of all rules and draws docs/images/regret.svg

`profile` and `collect` do what has no row yet, so they can be interrupted at any moment; at the end they sort the rows.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research import report
from research.arms import frozen_arms, train_arm
from research.grid import (
    ARMS,
    COLUMNS,
    DATA,
    FROZEN,
    GRIDS,
    RESULTS,
    ROOT,
    SCRATCH_FROM,
    TRAINED,
    UNITS,
    Unit,
    append,
    key_of,
    percent,
    rewrite,
    rows_of,
)
from research.units import folders, split, units_of
from tlpipeline import params


def profile(options: argparse.Namespace) -> None:
    """Profile the units that have no row yet, and train the heads of the frozen network."""
    sets = folders(options.data, options.work)
    for unit, rows, largest in units_of(options.grid, sets, options.work, options.only):
        if unit.row_key in {key_of(row) for row in rows_of(options.results / UNITS)}:
            continue
        heads = (*unit.row_key, "multi") not in {(*key_of(row), row["arm"]) for row in rows_of(options.results / ARMS)}
        manifest = split(rows, unit.n, largest, unit.seed)
        evidence, arms = frozen_arms(unit, manifest, sets[unit.data], options.weights, heads)
        append(options.results / ARMS, COLUMNS, *arms)
        append(options.results / UNITS, list(evidence), evidence)
        accuracies = ", ".join(f"{row['arm']} {percent(row):.1f} %" for row in arms if row["arm"] != "at")
        print(*unit.key, f"{accuracies}; profile {evidence['cpu_s']} CPU s", flush=True)


def collect(options: argparse.Namespace) -> None:
    """Train the arms that have no row yet, of units that are profiled: the recipe follows from P(similar)."""
    sets = folders(options.data, options.work)
    path = options.results / ARMS
    for arm in options.arms:
        for unit, rows, largest in units_of(options.grid, sets, options.work, options.only):
            done = {(*key_of(row), row["arm"]) for row in rows_of(path)}
            if (*unit.row_key, arm) in done or (arm == "scratch" and unit.n < SCRATCH_FROM):
                continue
            manifest = split(rows, unit.n, largest, unit.seed)
            row = train_arm(unit, arm, similarity(options.results, unit), manifest, sets[unit.data], options.weights)
            append(path, COLUMNS, row)
            print(f"{unit.data} {unit.backbone} n={unit.n} seed={unit.seed} {arm}: {percent(row):.2f} %, {row['cpu_s']} CPU s", flush=True)


def similarity(results: Path, unit: Unit) -> float:
    """Return P(similar) of a unit that is profiled."""
    for row in rows_of(results / UNITS):
        if key_of(row) == unit.row_key:
            return float(row["similar"])
    sys.exit(f"expected a profile of {'/'.join(unit.row_key)}, found none. Run `python -m research.regret profile` first.")


def tidy(results: Path) -> None:
    """Sort the rows as they are committed: by images, seed, network, data set and arm."""
    order = [*FROZEN, *TRAINED, "at"]
    taps = {key_of(row): row["taps"].split() for row in rows_of(results / UNITS)}

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        unit = (int(row["n"]), int(row["seed"]), row["backbone"], row["data"])
        if "arm" not in row:
            return unit
        names = taps.get(key_of(row), [])
        return *unit, order.index(row["arm"]), names.index(row["slice"]) if row["slice"] in names else 0

    for name in (UNITS, ARMS):
        if rows := rows_of(results / name):
            rewrite(results / name, list(rows[0]), sorted(rows, key=place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("profile", "collect", "fit", "report"))
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <name>/ or <name>.tar.gz data sets")
    parser.add_argument("--weights", type=Path, default=DATA, help="folder of the weights files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tlpipeline-regret", help="where archives are unpacked")
    parser.add_argument("--grid", choices=GRIDS, default="core")
    parser.add_argument("--arms", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--only", nargs="*", default=(), help="only units whose data/backbone/n/seed contains one of these")
    parser.add_argument("--units", action="store_true", help="print a line for each unit, too")
    options = parser.parse_args()
    options.data, options.weights = options.data.resolve(), options.weights.resolve()  # jobs take paths from a workspace of their own
    options.work.mkdir(parents=True, exist_ok=True)
    if options.verb in ("profile", "collect"):
        (profile if options.verb == "profile" else collect)(options)
        tidy(options.results)
        return
    rule = params.load(ROOT / "params.yaml").choose
    if options.verb == "fit":
        report.fit(options.results, rule)
    else:
        report.report(options.results, rule, options.units)


if __name__ == "__main__":
    main()
