"""How many points does the choice of case lose, and what does it save? Every arm is run on real images; rows are kept as they come.

A unit is (data set, number of images, backbone, seed); an arm is a way to train it: frozen, cut, multi (frozen, several taps, nothing cut),
tuned (as the product fine-tunes: half the usual schedule, then a head on several taps is solved), lpft (the usual one: twice the epochs, the head
as its last step left it), plain (the same from a head of zeros), scratch. Images of all sides are pooled and split anew: the subset of n images is
stratified and nested (100 in 500 in 2,000), a sixth of it is validation, and everything outside the largest subset is the test side.
brain_mri loses its copies; cifar10 is a draw of 8,000 images, and no target for weights that were trained on it.

    python -m research.regret profile [--data DIR] [--grid core|full|lite0] [--only TEXT ...]
    python -m research.regret collect [--data DIR] [--grid core|full|lite0] [--only TEXT ...] [--arms ARM ...]
    python -m research.regret rates [--data DIR] [--only TEXT ...]
    python -m research.regret above [--data DIR] [--only TEXT ...]
    python -m research.regret fit
    python -m research.regret report

`profile` measures what the product would measure of each unit and trains the frozen heads; `collect` trains everything, arm by arm, small
subsets first. Both run what has no row yet, so they can be interrupted at any moment, and sort the rows when they are through. `rates` trains
LP-FT on 500 images at a third and three times the recipe's rate, and says what choosing the rate on validation would bring. `above` trains
only the blocks above the first third, and above two thirds, of 500 and 2,000 images, and says what that loses and saves. `fit` refits
tlpipeline/outlook.json, `report` prints the figures and draws regret.svg.
The figures of `report` are those of the core grid: eight data sets, two networks. Three more data sets and two more networks (packages.py) have rows
as well, on which nothing is fitted; they stand below. With --data a folder of one's own, of <name>/<class> or <name>/{train,test}/<class>, rows go to --results.
"""

import tlpipeline  # noqa: F401  (before torch, which reads how threads wait when it is imported)

# isort: split
import argparse
import csv
import dataclasses
import json
import resource
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from research import replay
from research.grid import (
    ABOVE,
    ARMS,
    COLUMNS,
    DATA,
    DRAWN,
    FACTORS,
    FIXED,
    FIXED_AT,
    FROZEN,
    GRIDS,
    LEAST_TEST,
    LEFT_OUT,
    NETWORKS,
    NO_FLIP,
    RATES,
    RESULTS,
    ROOT,
    SCRATCH_FROM,
    SECOND_SEED_UNTIL,
    SEED,
    SLICES_AT,
    TRAINED,
    UNITS,
    USUAL,
    VALIDATION,
    Unit,
    append,
    rank,
    rows_of,
)
from tlpipeline import params
from tlpipeline.backbones import catalogue
from tlpipeline.backbones import classifier as models
from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.features import extract, pooling_at
from tlpipeline.choice import cases, decide, policy, predictor
from tlpipeline.choice.decision import Decision
from tlpipeline.data import dataset, splits
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.loader import Images
from tlpipeline.data.splits import TEST, TRAIN, VAL
from tlpipeline.profiling import measure
from tlpipeline.profiling.profile import slice_test
from tlpipeline.profiling.shift import FIRST_IMAGES
from tlpipeline.progress import silent
from tlpipeline.stats import pack
from tlpipeline.training import train
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.heads import solve_head
from tlpipeline.training.recipe import Recipe

# --- data -----------------------------------------------------------------------------------------------------------------------------


def folders(data: Path, work: Path) -> dict[str, Path]:
    """Return the data sets of a folder by name; archives are unpacked under `work` first, once."""
    found = {p.name: p for p in sorted(data.iterdir()) if p.is_dir()}
    for archive in sorted(data.glob("*.tar.gz")):
        name = archive.name.removesuffix(".tar.gz")
        target = work / name
        if not target.exists():
            draft = work / f".{name}"
            with tarfile.open(archive) as tar:
                tar.extractall(draft, filter="data")
            (folder,) = [p for p in draft.iterdir() if p.is_dir()]
            folder.rename(target)
            draft.rmdir()
        found[name] = target
    return found


def pool(name: str, folder: Path, work: Path) -> list[Row]:
    """Return all distinct images of a data set whatever their side; of a large one a draw by hash."""
    listed = work / f"{name}.parquet"
    if not listed.exists():
        manifest = dataset.ingest(folder, {}, lambda done, total: None)
        dataset.write_manifest(manifest, listed, listed.with_suffix(".csv"))
    rows = [r for r in dataset.read_manifest(listed).rows if not r.duplicate_of]
    rows.sort(key=lambda r: rank(SEED, r.md5))
    return rows[: DRAWN.get(name, len(rows))]


def sizes(total: int, wanted: Sequence[int]) -> list[int]:
    """Return the sizes that leave a test side; the last is cut down to what leaves one, where that still adds a quarter."""
    most = total - LEAST_TEST
    kept = [n for n in wanted if n <= most]
    larger = [n for n in wanted if n > most]
    if larger and most > 1.25 * (kept[-1] if kept else 50):
        kept.append(most)
    return kept


def split(rows: Sequence[Row], n: int, largest: int, seed: int) -> Manifest:
    """Return a manifest with n images for training and validation, and everything outside the largest subset as the test side."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: rank(seed, r.md5)):
        groups.setdefault(row.label, []).append(row)
    # The i-th image of a class comes at (i + 1/2) / (its images): every prefix of this order is stratified, and the prefixes are nested.
    order = sorted(((i + 0.5) / len(group), rank(seed, row.md5), i, row) for group in groups.values() for i, row in enumerate(group))
    out = [dataclasses.replace(row, split=VAL if i % VALIDATION == 2 else TRAIN) for _, _, i, row in order[:n]]
    out += [dataclasses.replace(row, split=TEST) for _, _, _, row in order[largest:]]
    labels = {r.label for r in out if r.split == TRAIN}
    return Manifest(tuple(r for r in out if r.label in labels), (), ())


def grid(which: str, found: dict[str, Path], work: Path, only: Sequence[str]) -> Iterator[tuple[Unit, list[Row], int]]:
    """Yield (unit, rows, largest subset), small subsets first, so that an interrupted run has all data sets."""
    units = []
    for name, folder in found.items():
        rows = pool(name, folder, work)
        for backbone, wanted in GRIDS[which].items():
            if NETWORKS[backbone].source == name:
                continue
            there = sizes(len(rows), wanted)
            for n in there:
                for seed in (0, 1) if n <= SECOND_SEED_UNTIL else (0,):
                    units.append((Unit(name, backbone, n, seed), rows, max(there)))
    units.sort(key=lambda u: (u[0].n, u[0].seed, u[0].backbone, u[0].data))
    for unit, rows, largest in units:
        if not only or any(part in "/".join(map(str, unit.key)) for part in only):
            yield unit, rows, largest


# --- arms -----------------------------------------------------------------------------------------------------------------------------


def row_of(arm: str, similar: float) -> cases.Case:
    """Return the row of the table whose recipe an arm that trains everything follows: as in the product, by P(similar)."""
    return cases.find("large_different" if arm == "scratch" or similar < 0.5 else "large_similar")


def uncut(row: cases.Case, last: cutting.Tap, size: int) -> Decision:
    """Return a decision for this row, whatever the evidence, that keeps the whole network: its head reads the last tap."""
    return Decision(
        case=row.name, slice=last.name, head="last", readings=(pooling_at(last),), size=size, freeze=row.freeze, init=row.init, recipe=row.recipe,
        prior=0.5, probabilities={}, similar=0.0, large=1.0, arms=(), regret=0.0, within=1.0, race=None, race_wanted=False, no_race="",
        saved_parameters=0.0, saved_ops=0.0, reason="", changes=(), warnings=(), forced=(),
    )  # fmt: skip


@contextmanager
def first_blocks_fixed(backbone: cutting.Backbone, last: str, share: float) -> Iterator[None]:
    """Have a share of the blocks, from the first on, stay as they are while all others are trained: their statistics too."""
    named = cutting.parameters_by_tap(backbone, last)
    fixed = {name for block in named[: round(share * len(named))] for name in block}

    class Above(models.Classifier):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            assert fixed <= {name for name, _ in self.trunk.named_parameters()}
            for name, parameter in self.trunk.named_parameters():
                parameter.requires_grad_(name not in fixed)

        def train(self, mode: bool = True) -> "Above":
            super().train(mode)
            for module in self.trunk.modules():
                own = list(module.parameters())
                if own and not any(p.requires_grad for p in own):
                    module.eval()
            return self

    whole, train.Classifier = train.Classifier, Above  # type: ignore[attr-defined, misc]
    try:
        yield
    finally:
        train.Classifier = whole  # type: ignore[attr-defined, misc]


def train_arm(
    unit: Unit, arm: str, similar: float, manifest: Manifest, folder: Path, data: Path, factor: float = 1.0, fixed: float = 0.0
) -> dict[str, object]:
    """Run an arm that trains the whole network, tuned as the product runs it, and return its row.

    Args:
        factor: on the recipe's rates.
        fixed: share of the blocks, from the first on, that are not trained after all.
    """
    net = unit.network
    weights, md5 = (catalogue.NONE, catalogue.NONE) if arm == "scratch" else (str(data / net.weights), net.md5)
    backbone = catalogue.load(net.name, weights, md5=md5, size=net.size, seed=unit.seed)
    taps = cutting.measure_taps(backbone, net.size)
    row = row_of(arm, similar)
    kinds = ("rate_batch", "rate_batch_small", "rate_layer", "rate_none")
    changed = {kind: getattr(row.recipe, kind) * factor for kind in kinds}
    usual = {"tuned": {}, "scratch": {"solve_again": False}}.get(arm, USUAL)
    row = dataclasses.replace(row, recipe=dataclasses.replace(row.recipe, **usual, **changed))
    init = {"plain": "plain", "scratch": "random"}.get(arm, "pretrained")
    decision = dataclasses.replace(uncut(row, taps[-1], net.size), init=init)
    if row.recipe.solve_again:
        look = dataclasses.replace(params.load(ROOT / "params.yaml").profile, tangent=False, shift=False)
        seen = measure.measure(backbone, folder, manifest, net.size, look, lambda profile: False, silent, torch.device("cpu"))
        decision = dataclasses.replace(decision, readings=seen.head_at(taps[-1].name))
    with tempfile.TemporaryDirectory(prefix="regret-") as place:
        here = Path(place)
        dataset.write_manifest(manifest, here / "manifest.parquet", here / "quarantine.csv")
        job = TrainingConfig(
            workspace=place, images=str(folder), manifest=str(here / "manifest.parquet"), backbone=net.name, weights=weights,
            weights_md5=md5, plan=decision.plan, seed=unit.seed, epochs="auto", batch_size="auto", flip=unit.data not in NO_FLIP,
            precision="auto", history=str(here / "history.jsonl"),
        )  # fmt: skip
        started = cpu_seconds()
        (here / "scratch").mkdir()
        with first_blocks_fixed(backbone, taps[-1].name, fixed) if fixed else nullcontext():
            finished = train.run(job, LocalContext(here / "kept"), here / "scratch")
        spent = cpu_seconds() - started
        assert finished is not None
        history = json.loads((finished / "history.json").read_text())["history"]
        model, description = models.load(finished / "model")
        test = manifest.used(TEST)
        chances = models.probabilities(model, Images(folder, test, description.transforms), torch.device("cpu"), lambda _: None).numpy()
    right = chances.argmax(1) == np.array([description.classes.index(r.label) for r in test])
    epochs = [line for line in history if line["arm"] in ("fine-tune", "scratch")]
    train_images, val_images = len(manifest.used(TRAIN)), len(manifest.used(VAL))
    # The looks of a race: a third, two thirds, all of the schedule.
    looks = [epochs[max(round(len(epochs) * part / 3), 1) - 1]["correct"] for part in (1, 2, 3)]
    solved = {"tuned": 2, "lpft": 1}.get(arm, 0) * (train_images + val_images)
    return counted(unit, manifest, right) | {
        "arm": arm, "val_hits": round(epochs[-1]["accuracy"] * val_images), "slice": taps[-1].name,
        "rate": row.recipe.rate(backbone.normalization, net.size), "epochs": len(epochs),
        "forward": solved + len(epochs) * (train_images + val_images), "backward": len(epochs) * train_images,
        "cpu_s": round(spent, 1), "looks": " ".join(looks), "bits": history[0]["correct"] if solved else "",
    }  # fmt: skip


def frozen_arms(
    unit: Unit, manifest: Manifest, folder: Path, data: Path, heads_too: bool
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Profile a unit as the product does, and train the heads that need no fine-tuning; return the evidence and the arms' rows.

    With 500 images the head at every earlier tap is trained as well (arm `at`), for the regret of the slice point.
    """
    net = unit.network
    backbone = catalogue.load(net.name, str(data / net.weights), md5=net.md5, size=net.size, seed=unit.seed)
    rule = params.load(ROOT / "params.yaml")
    started = cpu_seconds()
    profile = measure.measure(
        backbone, folder, manifest, net.size, rule.profile, lambda seen: decide.undecided(seen, rule.choose), silent, torch.device("cpu")
    )
    profiled = cpu_seconds() - started
    found = dataclasses.asdict(predictor.evidence(profile, slice_test(profile, rule.choose.gain / 100, rule.choose.draws)))
    # A gradient is a forward and a backward pass; BatchNorm's statistics layer by layer take a second pass of the first images.
    looked = profile.sampled + profile.held_out + (3 * profile.tangent.images if profile.tangent else 0)
    looked += min(FIRST_IMAGES, profile.sampled) if profile.shift else 0
    key = dict(zip(("data", "backbone", "n", "seed"), unit.key, strict=True))
    judges = pack(np.array([not splits.in_selection_half(r.md5) for r in manifest.used(VAL)]))
    evidence = (
        key | found | {"looked": looked, "cpu_s": round(profiled, 2), "judges": judges, "taps": " ".join(t.name for t in profile.taps)}
    )
    if not heads_too:
        return evidence, []
    taps = cutting.measure_taps(backbone, net.size)
    readings = {tap.name: pooling_at(tap) for tap in taps}
    ops = {tap.name: tap.forward_ops / taps[-1].forward_ops for tap in taps}
    trunk = cutting.cut(backbone, list(readings)).to(memory_format=torch.channels_last)
    sides = {side: manifest.used(side) for side in (TRAIN, VAL, TEST)}
    labels = {side: np.array([manifest.classes.index(r.label) for r in rows]) for side, rows in sides.items()}
    features = {}
    for side, rows in sides.items():
        columns = extract(
            trunk,
            [r.grids for r in readings.values()],
            Images(folder, rows, backbone.transforms.at(net.size)),
            torch.device("cpu"),
            lambda _: None,
        )
        features[side] = dict(zip(readings, columns, strict=True))
    heads = {"frozen": profile.last.taps, "cut": (profile.cut or profile.last).taps, "multi": profile.multi.taps}
    if unit.n == SLICES_AT:
        heads |= {f"at:{tap.name}": tap.head for tap in profile.taps[:-1]}
    out = []
    for arm, names in heads.items():
        started = cpu_seconds()
        x = {side: torch.cat([features[side][name] for name in names], dim=1) for side in sides}
        blocks = [b for name in names for b in readings[name].blocks]
        classes, imbalance = len(manifest.classes), Recipe().imbalance
        weight, bias, penalty = solve_head(x[TRAIN], labels[TRAIN], blocks, classes, imbalance, unit.seed)
        right = (x[VAL] @ weight.T + bias).argmax(1).numpy() == labels[VAL]
        # As in training: judged on validation, then solved once more with it.
        both = torch.cat([x[TRAIN], x[VAL]]), np.concatenate([labels[TRAIN], labels[VAL]])
        weight, bias, _ = solve_head(*both, blocks, classes, imbalance, unit.seed, penalty)
        guessed = (x[TEST] @ weight.T + bias).argmax(1).numpy()
        images = len(sides[TRAIN]) + len(sides[VAL])
        out.append(counted(unit, manifest, guessed == labels[TEST]) | {
            "arm": arm.partition(":")[0], "val_hits": int(right.sum()), "slice": names[0], "rate": "", "epochs": 0,
            "forward": round(images * ops[names[0]], 1), "backward": 0, "cpu_s": round(cpu_seconds() - started, 2), "looks": "", "bits": pack(right),
        })  # fmt: skip
    return evidence, out


def profiles(options: argparse.Namespace) -> None:
    """Profile the units that have no row yet, and train their frozen heads."""
    found = folders(options.data, options.work)
    for unit, rows, largest in grid(options.grid, found, options.work, options.only):
        done = {(r["data"], r["backbone"], int(r["n"]), int(r["seed"])) for r in rows_of(options.results / UNITS)}
        if unit.key in done:
            continue
        there = any(
            (r["data"], r["backbone"], int(r["n"]), int(r["seed"]), r["arm"]) == (*unit.key, "multi")
            for r in rows_of(options.results / ARMS)
        )
        seen, arms = frozen_arms(unit, split(rows, unit.n, largest, unit.seed), found[unit.data], options.weights, not there)
        for row in arms:
            append(options.results / ARMS, COLUMNS, row)
        append(options.results / UNITS, list(seen), seen)
        reached = {str(r["arm"]): (r["hits_a"] + r["hits_b"]) / (r["test_a"] + r["test_b"]) for r in arms if r["arm"] != "at"}  # type: ignore[operator]
        print(*unit.key, {k: round(v, 4) for k, v in reached.items()}, f"profile {seen['cpu_s']} CPU s", flush=True)


def counted(unit: Unit, manifest: Manifest, right: npt.NDArray[np.bool_]) -> dict[str, object]:
    """Return what every arm's row says: the unit, the sides, and the hits on the two halves of the test side."""
    test = manifest.used(TEST)
    first = np.array([rank(SEED, r.md5)[0] in "02468ace" for r in test])
    return {
        "data": unit.data, "backbone": unit.backbone, "n": unit.n, "seed": unit.seed, "classes": len(manifest.classes),
        "train": len(manifest.used(TRAIN)), "val": len(manifest.used(VAL)), "test_a": int(first.sum()), "test_b": int((~first).sum()),
        "hits_a": int(right[first].sum()), "hits_b": int(right[~first].sum()),
    }  # fmt: skip


def cpu_seconds() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tidy(results: Path) -> None:
    """Put the rows into the order in which they are committed: images, seed, network, data set, then the arm."""
    order = [*FROZEN, *TRAINED, "at"]
    for name in (UNITS, ARMS):
        rows = rows_of(results / name)
        if not rows:
            continue
        taps = {(r["data"], r["backbone"], r["n"], r["seed"]): r["taps"].split() for r in rows_of(results / UNITS)}

        def place(row: dict[str, str], taps: dict[tuple[str, ...], list[str]] = taps) -> tuple[object, ...]:
            unit = (int(row["n"]), int(row["seed"]), row["backbone"], row["data"])
            if "arm" not in row:
                return unit
            known = taps.get((row["data"], row["backbone"], row["n"], row["seed"]), [])
            return *unit, order.index(row["arm"]), known.index(row["slice"]) if row["slice"] in known else 0

        draft = results / f".{name}"
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=place))
        draft.replace(results / name)


def collect(options: argparse.Namespace) -> None:
    """Run the arms that have no row yet, of the units that are profiled: the recipe follows from P(similar)."""
    found = folders(options.data, options.work)
    path = options.results / ARMS
    for arm in options.arms:
        for unit, rows, largest in grid(options.grid, found, options.work, options.only):
            done = {(r["data"], r["backbone"], int(r["n"]), int(r["seed"]), r["arm"]) for r in rows_of(path)}
            if (*unit.key, arm) in done or (arm == "scratch" and unit.n < SCRATCH_FROM):
                continue
            manifest = split(rows, unit.n, largest, unit.seed)
            row = train_arm(unit, arm, similarity(options.results, unit), manifest, found[unit.data], options.weights)
            append(path, COLUMNS, row)
            accuracy = (row["hits_a"] + row["hits_b"]) / (row["test_a"] + row["test_b"])  # type: ignore[operator]
            print(f"{unit.data} {unit.backbone} n={unit.n} seed={unit.seed} {arm}: {accuracy:.4f}, {row['cpu_s']} CPU s", flush=True)


def similarity(results: Path, unit: Unit) -> float:
    """Return P(similar) of a unit that is profiled: the recipe follows from it."""
    for row in rows_of(results / UNITS):
        if (row["data"], row["backbone"], int(row["n"]), int(row["seed"])) == unit.key:
            return float(row["similar"])
    sys.exit(f"expected a profile of {'/'.join(map(str, unit.key))}, found none. Run `python -m research.regret profile` first.")


def percent(row: dict[str, str]) -> float:
    """Return the share of the test side that a row got right."""
    return 100 * (int(row["hits_a"]) + int(row["hits_b"])) / (int(row["test_a"]) + int(row["test_b"]))


def arms_of(results: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of all arms by data set, backbone, images, seed and arm."""
    return {(r["data"], r["backbone"], r["n"], r["seed"], r["arm"]): r for r in rows_of(results / ARMS)}


def standard_error(values: npt.ArrayLike) -> float:
    """Return the standard error of a mean, NaN of a single value."""
    of = np.asarray(values)
    return float(of.std(ddof=1) / len(of) ** 0.5) if len(of) > 1 else float("nan")


def rates(options: argparse.Namespace) -> None:
    """Train LP-FT at other rates where it has no row yet, and print what the rate that validation likes best would bring."""
    found = folders(options.data, options.work)
    path = options.results / RATES
    for unit, rows, largest in grid(options.grid, found, options.work, options.only):
        for factor in FACTORS if unit.n == SLICES_AT and unit.seed == 0 and unit.data not in LEFT_OUT else ():
            if (*map(str, unit.key), f"{factor:.2f}") not in {
                (r["data"], r["backbone"], r["n"], r["seed"], r["factor"]) for r in rows_of(path)
            }:
                manifest = split(rows, unit.n, largest, unit.seed)
                row = train_arm(unit, "lpft", similarity(options.results, unit), manifest, found[unit.data], options.weights, factor)
                append(path, (*COLUMNS, "factor"), row | {"factor": f"{factor:.2f}"})
    at: dict[tuple[str, str], dict[float, dict[str, str]]] = {}
    for row in rows_of(path):
        at.setdefault((row["data"], row["backbone"]), {})[float(row["factor"])] = row
    for row in rows_of(options.results / ARMS):
        if row["arm"] == "lpft" and int(row["n"]) == SLICES_AT and row["seed"] == "0" and (row["data"], row["backbone"]) in at:
            at[row["data"], row["backbone"]][1.0] = row
    gained = []
    for unit_of, tried in sorted(at.items()):
        # Equals go to the recipe's rate: validation is small.
        chosen = max(tried, key=lambda f: (int(tried[f]["val_hits"]), f == 1.0))
        right = {f: percent(r) for f, r in sorted(tried.items())}
        gained.append(right[chosen] - right[1.0])
        texts = (f"x {f:.2f}: {value:5.1f} % ({tried[f]['val_hits']} of {tried[f]['val']})" for f, value in right.items())
        print(f"{unit_of[0]:12} {unit_of[1]:10}", *texts, f"chosen x {chosen:.2f}, {gained[-1]:+.1f}", sep="  ")
    error = standard_error(gained)
    print(
        f"chosen on validation against the recipe's rate: {np.mean(gained):+.2f} points (standard error {error:.2f}) for three times the cost"
    )


def above(options: argparse.Namespace) -> None:
    """Train only the later blocks where that has no row yet, and print what it loses against training all, and what it saves."""
    found = folders(options.data, options.work)
    path = options.results / ABOVE
    for unit, rows, largest in grid(options.grid, found, options.work, options.only):
        for share in FIXED if unit.n in FIXED_AT and unit.seed == 0 and unit.data not in LEFT_OUT else ():
            key = (*map(str, unit.key), f"{share:.2f}")
            if key not in {(r["data"], r["backbone"], r["n"], r["seed"], r["fixed"]) for r in rows_of(path)}:
                manifest = split(rows, unit.n, largest, unit.seed)
                row = train_arm(unit, "lpft", similarity(options.results, unit), manifest, found[unit.data], options.weights, fixed=share)
                append(path, (*COLUMNS, "fixed"), row | {"fixed": key[-1]})
    arms = arms_of(options.results)
    lost: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows_of(path):
        unit_of = row["data"], row["backbone"], row["n"], row["seed"]
        whole, frozen = arms[*unit_of, "lpft"], max((arms[*unit_of, arm] for arm in FROZEN), key=percent)
        lost.setdefault((row["fixed"], row["backbone"], row["n"]), []).append(
            (percent(row) - percent(whole), percent(row) - percent(frozen))
        )
        print(
            f"{row['fixed']} fixed",
            *unit_of,
            f"{percent(row):.1f} % all {percent(whole):.1f} % best frozen {percent(frozen):.1f} %",
            sep="  ",
        )
    for kind, points in sorted(lost.items()):
        found_points = np.array(points)
        error = standard_error(found_points[:, 0])
        print(
            f"{kind[0]} of the blocks fixed, {kind[1]}, {kind[2]} images, {len(points)} units: {found_points[:, 0].mean():+.2f} points against "
            f"training all (standard error {error:.2f}), {found_points[:, 1].mean():+.2f} against the best frozen head"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("collect", "profile", "rates", "above", "fit", "report"))
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <name>/ or <name>.tar.gz data sets")
    parser.add_argument("--weights", type=Path, default=DATA, help="folder of the weights files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tlpipeline-regret", help="where archives are unpacked")
    parser.add_argument("--grid", choices=GRIDS, default="core")
    parser.add_argument("--arms", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--only", nargs="*", default=(), help="only units whose data/backbone/n/seed has one of these in it")
    parser.add_argument("--prefer", choices=policy.LENIENCE, default="balanced", help="choose.prefer of the replayed product")
    parser.add_argument("--units", action="store_true", help="print a line for each unit, too")
    options = parser.parse_args()
    options.data, options.weights = options.data.resolve(), options.weights.resolve()  # jobs take paths from a workspace of their own
    options.work.mkdir(parents=True, exist_ok=True)
    if options.verb == "collect":
        collect(options)
        tidy(options.results)
    elif options.verb == "rates":
        rates(options)
    elif options.verb == "above":
        above(options)
    elif options.verb == "profile":
        profiles(options)
        tidy(options.results)
    else:
        rule = params.load(ROOT / "params.yaml").choose
        rule = dataclasses.replace(rule, prefer=options.prefer)
        if options.verb == "fit":
            replay.fit(options.results, rule)
        else:
            replay.report(options.results, rule, options.units)


if __name__ == "__main__":
    main()
