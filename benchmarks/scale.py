"""What does growth cost? CPU seconds and peak memory of the steps that touch every file, beside bare DVC.

    python -m benchmarks.scale --files 1000 10000 100000

Each row is a new workspace of tiny generated images (24 x 24 pixels, ten classes). Each step is a process of its own:

* init: the folder is checked, copied, versioned and pushed
* data commit: 1 % of the images are new
* ingest: of a run after init, of a run though nothing changed, and of a run after that data commit
* dvc add, dvc status: the same folder in a bare DVC repository
* a run's ingest: with the images as the version step of a run pins them; "as they are" is that of `dvc repro`

CPU seconds are those of the process and its children; memory is the largest of any one process. Walks are how often a folder of images below
the workspace was listed, and reads how often its files were opened, per file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

_STEP = """
import json, os, resource, sys, time
from pathlib import Path
started = time.monotonic()
walks = reads = 0


def count(event, arguments):
    global walks, reads
    if event in ("os.scandir", "open") and isinstance(arguments[0], (str, os.PathLike)):
        path = os.fspath(arguments[0])
        # A look at the first class tells the layout; whoever lists the second one walks them all.
        walks += event == "os.scandir" and path.rstrip("/").endswith("images/class1")
        reads += event == "open" and path.endswith(".jpg") and "/images/class" in "/" + path


sys.addaudithook(count)
exec(sys.argv[1])
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("\\n" + json.dumps([sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used) / 1024, walks, reads]))
"""
_INIT = "from tlpipeline.workspace import create; create.init(Path('ws'), Path('images'), 'demonstration', 'DEFAULT', None)"
_COMMIT = "import tlpipeline as tl; tl.Workspace('ws').commit_data()"
_INGEST = """
from tlpipeline.workspace import pinning, stages
from tlpipeline.progress import silent
assert stages.bring_up_to_date(Path('ws'), 'ingest', silent, {pinned}) is {ran}
"""
_VERSION = "from tlpipeline.workspace import create, pinning; create.commit_data(Path('ws'), push_again=False); pinning.pin(Path('ws'))"


def generate(folder: Path, count: int, start: int = 0) -> None:
    """Write tiny images in ten classes, no two alike."""
    for i in range(start, start + count):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((24, 24), Image.Resampling.BICUBIC)
        path = folder / f"class{i % 10}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.save(path, quality=85)


def step(place: Path, code: str) -> tuple[float, float, int, int]:
    """Run code in a process of its own; return its CPU seconds, peak memory in MB, walks, and files opened."""
    done = subprocess.run(
        [sys.executable, "-c", _STEP, code], cwd=place, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu, memory, walks, reads = json.loads(done.stdout.strip().splitlines()[-1])
    return cpu, memory, walks, reads


def shown(figures: tuple[float, float, int, int], files: int) -> str:
    """Return CPU seconds, memory, walks and reads as a cell of the table."""
    cpu, memory, walks, reads = figures
    return f"{cpu:.1f} s, {memory:.0f} MB, {walks}, {reads / files:.2g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    steps = {
        "init": _INIT,
        "a run's version step": _VERSION,
        "a run's ingest": _INGEST.format(ran=True, pinned="pinning.pinned_data(Path('ws'))"),
        "again, version": _VERSION,
        "again, ingest": _INGEST.format(ran=False, pinned="pinning.pinned_data(Path('ws'))"),
        "again, ingest as they are": _INGEST.format(ran=False, pinned=None),
        "data commit, +1 %": _COMMIT,
        "+1 %, version": _VERSION,
        "+1 %, ingest": _INGEST.format(ran=True, pinned="pinning.pinned_data(Path('ws'))"),
    }
    print(f"| files | dvc add | dvc status | {' | '.join(steps)} |")
    print(f"|---:|{'---:|' * (2 + len(steps))}")
    for files in options.files:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            place = Path(folder)
            generate(place / "images", files)
            bare = place / "bare"
            bare.mkdir()
            subprocess.run(["cp", "-r", str(place / "images"), str(bare / "images")], check=True)
            for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
                subprocess.run(words, cwd=bare, check=True)
            print(f"| {files:,} |", end="", flush=True)
            for words in (["add", "-q", "images"], ["status", "-q"]):
                print(f" {shown(step(bare, f'from dvc.cli import main; assert main({words}) == 0'), files)} |", end="", flush=True)
            for name, code in steps.items():
                if name.startswith("data commit"):
                    generate(place / "ws" / "images", max(1, files // 100), files)
                print(f" {shown(step(place, code), files)} |", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
