"""Which case does the pipeline choose on real images, how good is the model, and what does it cost?

Runs `tlpipeline init` and `tlpipeline run` as a user would on each data set of a folder of `<name>.tar.gz` archives, and prints the table of
docs/benchmarks.md. A finished row is kept in benchmarks/results/ and not run again: delete it after a change of the product. With --force NAME all
four cases are forced on one data set in one workspace, one after the other, and each gate's verdict is printed.

    python -m benchmarks.cases [--data DIR] [--work DIR] [NAME ...]
    python -m benchmarks.cases --force NAME
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tlpipeline.workspace import settings
from tlpipeline.workspace.layout import PARAMS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cases.csv"
COLUMNS = ("data", "backbone", "images", "train", "classes", "size", "case", "slice", "accuracy", "low", "high",
           "majority", "profile_s", "train_s", "run_s", "version")  # fmt: skip
SQUEEZENET = ("squeezenet1_0", "squeezenet1_0-imagenet.safetensors")
RESNET20 = ("nets:resnet20", "resnet20-cifar10.safetensors")
JOBS = {
    "caltech24": SQUEEZENET,
    "neu_steel": SQUEEZENET,
    "pacs_sketch": SQUEEZENET,
    "sign_digits": SQUEEZENET,
    "eurosat": SQUEEZENET,
    "weather": SQUEEZENET,
    "brain_mri": SQUEEZENET,
    "flowers": RESNET20,
}
MOST = {"eurosat": 3000}
NO_FLIP = {"sign_digits"}


def unpack(archive: Path, target: Path, most: int | None) -> Path:
    """Unpack an archive's images; with `most`, those with the smallest hash of their name (classes in proportion, in expectation)."""
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        if most is not None:
            members = sorted(members, key=lambda m: hashlib.md5(m.name.encode()).hexdigest())[:most]
        tar.extractall(target, members=members, filter="data")
    (folder,) = [p for p in target.iterdir() if p.is_dir()]
    return folder


def tlpipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "examples" / "own_backbone"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-m", "tlpipeline", *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"tlpipeline {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done


def workspace(name: str, data: Path, work: Path, workers: int) -> Path:
    backbone, weights = JOBS[name]
    images = unpack(data / f"{name}.tar.gz", work / name, MOST.get(name))
    folder = work / "workspaces" / name.replace("_", "-")
    tlpipeline("init", str(folder), "--images", str(images), "--backbone", backbone, "--weights", str(data / weights))
    settings.change(folder / PARAMS, {"cluster.workers": workers})
    if name in NO_FLIP:
        settings.change(folder / PARAMS, {"train.flip": False})
    return folder


def row(name: str, folder: Path, seconds: float) -> dict[str, object]:
    case = json.loads((folder / "case.json").read_text())
    profile = json.loads((folder / "profile.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    classes = json.loads((folder / "classes.json").read_text())
    spent = json.loads((folder / "run.json").read_text())["seconds"]
    tags = subprocess.run(["git", "tag"], cwd=folder, capture_output=True, text=True).stdout.split()
    rejected = (folder / "quarantine.csv").read_text().splitlines()[1:]
    for remark in rejected[:3] + rejected[-1:]:
        print(f"    {name}: {remark}")
    return {
        "data": name, "backbone": JOBS[name][0], "images": profile["images"] + sum(c["images"] for c in classes.values()),
        "train": profile["images"], "classes": profile["classes"], "size": case["size"], "case": case["case"], "slice": case["slice"],
        "accuracy": metrics["accuracy"], "low": metrics["accuracy_low"],
        "high": metrics["accuracy_high"], "majority": metrics["majority_accuracy"], "profile_s": spent["profile"], "train_s": spent["train"],
        "run_s": round(seconds, 1), "version": tags[-1] if tags else "",
    }  # fmt: skip


def forced(name: str, data: Path, work: Path, workers: int) -> None:
    folder = workspace(name, data, work, workers)
    # `better` would rightly reject what only ties: here all need only be not worse by 5 points than the first, which goes to prod.
    settings.change(folder / PARAMS, {"gate.rule": "not_worse", "gate.margin": 5.0})
    for case in ("small_similar", "small_different", "large_similar", "large_different"):
        settings.change(folder / PARAMS, {"choose.case": case})
        started = time.monotonic()
        done = tlpipeline("run", "--workspace", str(folder))
        found = row(name, folder, time.monotonic() - started)
        arms = (folder / "plots" / "history.csv").read_text().splitlines()
        print(
            f"{case}: slice {found['slice']}, accuracy {found['accuracy']:.4f}, train {found['train_s']} s, run {found['run_s']} s, {len(arms) - 1} lines of history"
        )
        if case == "small_similar":
            tlpipeline("registry", "promote", f"{folder.name}@latest", "--workspace", str(folder))
        print("   ", next((line.strip() for line in done.stdout.splitlines() if "accepted" in line or "rejected" in line), ""))
    print(tlpipeline("registry", "list", "--workspace", str(folder)).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(JOBS), help="data sets; all by default")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TLPIPELINE_DATA", HERE.parent.parent / "shared" / "data")))
    parser.add_argument("--work", type=Path, help="folder for workspaces; a temporary one by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--force", metavar="NAME", help="force all four cases on this data set instead")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="cases-"))
    work.mkdir(parents=True, exist_ok=True)
    if options.force:
        forced(options.force, options.data, work, options.workers)
        return
    for name in options.names or list(JOBS):
        if name in {found["data"] for found in rows()}:
            continue
        started = time.monotonic()
        folder = workspace(name, options.data, work, options.workers)
        tlpipeline("run", "--workspace", str(folder))
        found = row(name, folder, time.monotonic() - started)
        RESULTS.parent.mkdir(exist_ok=True)
        header = not RESULTS.exists()
        with RESULTS.open("a") as file:
            if header:
                print(",".join(COLUMNS), file=file)
            print(",".join(str(found[c]) for c in COLUMNS), file=file)
        print(" | ".join(str(found[c]) for c in COLUMNS), flush=True)
    print("| data | training images | classes | pixels | case | kept up to | test accuracy |")
    print("|---|---|---|---|---|---|---|")
    for found in rows():
        accuracy, low, high = (100 * float(found[key]) for key in ("accuracy", "low", "high"))
        print(
            f"| {found['data']} | {found['train']} | {found['classes']} | {found['size']} | `{found['case']}` | {found['slice']} | "
            f"{accuracy:.1f} % ({low:.1f} to {high:.1f}) |"
        )


def rows() -> list[dict[str, str]]:
    """Return the rows that are there."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
