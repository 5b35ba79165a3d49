"""What does growth cost? CPU seconds and peak memory of the steps that touch every file, beside bare DVC.

    python -m benchmarks.scale --files 1000 10000 100000

Each row is a new workspace of tiny generated images (24 x 24 pixels, ten classes). Each step is a process of its own:

* init: the folder is checked, copied, versioned and pushed
* data commit: 1 % of the images are new
* ingest: of a run after init, of a run though nothing changed, and of a run after that data commit
* dvc add, dvc status: the same folder in a bare DVC repository

CPU seconds are those of the process and its children; memory is the largest of any one process.
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
import json, resource, sys, time
from pathlib import Path
started = time.monotonic()
exec(sys.argv[1])
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("\\n" + json.dumps([sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used) / 1024, time.monotonic() - started]))
"""
_INIT = "from tlpipeline.workspace import create; create.init(Path('ws'), Path('images'), 'demonstration', 'DEFAULT', None)"
_COMMIT = "import tlpipeline as tl; tl.Workspace('ws').commit_data()"
_INGEST = "from tlpipeline.workspace import stages as s; from tlpipeline.progress import silent; assert s.bring_up_to_date(Path('ws'), 'ingest', silent) is {ran}"


def generate(folder: Path, count: int, start: int = 0) -> None:
    """Write tiny images in ten classes, no two alike."""
    for i in range(start, start + count):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((24, 24), Image.Resampling.BICUBIC)
        path = folder / f"class{i % 10}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.save(path, quality=85)


def step(place: Path, code: str) -> tuple[float, float, float]:
    """Run code in a process of its own; return its CPU seconds, peak memory in MB, and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _STEP, code], cwd=place, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu, memory, seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return cpu, memory, seconds


def command(place: Path, *words: str) -> str:
    """Run a bare command; return its CPU seconds and peak memory as text."""
    code = f"import subprocess; subprocess.run({[sys.executable, '-m', *words]!r}, check=True, stdout=subprocess.DEVNULL)"
    return shown(step(place, code))


def shown(figures: tuple[float, float, float]) -> str:
    """Return CPU seconds and memory as a cell of the table."""
    return f"{figures[0]:.1f} s, {figures[1]:.0f} MB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    print("| files | dvc add | dvc status | init | ingest, first | run's ingest, nothing changed | data commit, +1 % | ingest, +1 % |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for files in options.files:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            place = Path(folder)
            generate(place / "images", files)
            bare = place / "bare"
            bare.mkdir()
            subprocess.run(["cp", "-r", str(place / "images"), str(bare / "images")], check=True)
            for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
                subprocess.run(words, cwd=bare, check=True)
            cells = [f"{files:,}", command(bare, "dvc", "add", "-q", "images"), command(bare, "dvc", "status", "-q")]
            cells.append(shown(step(place, _INIT)))
            cells.append(shown(step(place, _INGEST.format(ran=True))))
            cells.append(shown(step(place, _INGEST.format(ran=False))))
            generate(place / "ws" / "images", max(1, files // 100), files)
            cells.append(shown(step(place, _COMMIT)))
            cells.append(shown(step(place, _INGEST.format(ran=True))))
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
