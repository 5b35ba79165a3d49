"""How often the decision flips while a data set grows, with and without the former decision as a part of it, and what that costs.

Each version has one percent more of the images than the one before. `python -m research.stability DATA WORK SET... --versions 50` prints a row for
each set: changes of the case and of the slice point over all versions, and the expected accuracy that keeping the former decision loses.
"""

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch

from research.units import folders, pool
from tlpipeline.backbones import catalogue
from tlpipeline.choice import decide
from tlpipeline.choice.decision import Decision, Former
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.splits import split_of
from tlpipeline.params import ChooseParams, ProfileParams
from tlpipeline.profiling import measure
from tlpipeline.profiling.profile import Profile
from tlpipeline.progress import silent

RULE = ChooseParams()


def former_of(decision: Decision, images: int) -> Former:
    """Return a decision as the former one of the next version."""
    return Former(
        "before", "", "", decision.case, decision.slice, decision.head, decision.freeze, decision.cutting.exceeds, images,
        decision.tuning.counted, decision.cutting.counted,
    )  # fmt: skip


def expected(decision: Decision, profile: Profile) -> float:
    """Return the accuracy that a decision is expected to have: of the predicted arm, or of the probe at its slice point."""
    if decision.freeze == "nothing":
        return next(arm.accuracy for arm in decision.arms if arm.name == "tuned")
    if decision.head == "cut" and profile.cut is not None and profile.cut.taps[0] != decision.slice:
        return next(tap.accuracy for tap in profile.taps if tap.name == decision.slice)
    return profile.head(decision.head).accuracy


def profiles(data: Path, work: Path, name: str, versions: int, network: str, weights: str, md5: str) -> list[Profile]:
    """Return the profile of each version; they are kept in `work`, because measuring takes minutes."""
    kept = work / f"stability-{name}-{network}-{versions}.json"
    if kept.exists():
        from pydantic import TypeAdapter

        return TypeAdapter(list[Profile]).validate_json(kept.read_text())
    folder = folders(data, work)[name]
    rows = [replace(row, split=split_of(row.md5)) for row in pool(name, folder, work)]
    rows.sort(key=lambda row: hashlib.md5(f"arrival {row.md5}".encode(), usedforsecurity=False).hexdigest())
    backbone = catalogue.load(network, weights, md5=md5)
    params, store = ProfileParams(tangent=False), Store(work / "cache", 2e9)
    measured = []
    for version in range(versions):
        part = rows[: round(len(rows) / 1.01 ** (versions - 1 - version))]
        manifest = Manifest(tuple(part), (), ())
        measured.append(
            measure.measure(
                backbone,
                folder,
                manifest,
                backbone.transforms.size,
                params,
                lambda p: decide.undecided(p, RULE),
                silent,
                torch.device("cpu"),
                store,
            )
        )
        print(f"{name}: version {version + 1} of {versions}, {len(part)} images", flush=True)
    kept.write_text(json.dumps([asdict(profile) for profile in measured]))
    return measured


def main() -> None:
    """Print a row for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--versions", type=int, default=50)
    parser.add_argument("--network", default="demonstration")
    parser.add_argument("--weights", default="DEFAULT")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    md5 = hashlib.md5(Path(options.weights).read_bytes(), usedforsecurity=False).hexdigest() if Path(options.weights).is_file() else "none"
    print("| set | cases alone | slice points alone | cases kept | slice points kept | points lost, mean | most |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.sets:
        alone: list[Decision] = []
        kept: list[Decision] = []
        lost = []
        for profile in profiles(options.data, options.work, name, options.versions, options.network, options.weights, md5):
            alone.append(decide.choose(profile, RULE))
            kept.append(decide.choose(profile, RULE, former_of(kept[-1], profile.images) if kept else None))
            lost.append(100 * (expected(alone[-1], profile) - expected(kept[-1], profile)))
        flips = [sum(getattr(a, key) != getattr(b, key) for a, b in pairwise(made)) for made in (alone, kept) for key in ("case", "slice")]
        print(f"| {name} | {' | '.join(map(str, flips))} | {sum(lost) / len(lost):+.2f} | {max(lost):+.2f} |", flush=True)


if __name__ == "__main__":
    main()
