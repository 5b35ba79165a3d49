"""Kill whole runs at random moments; nothing may be lost.

Runs the pipeline once undisturbed, then again and again in fresh copies of the same workspace, each time killing it (SIGKILL, with all its
processes) at a random moment until a try gets through. Every survivor must have the undisturbed run's dvc.lock and model, a clean
`dvc status`, and exactly one registered version.

    python benchmarks/chaos.py [--times 20] [--workers 0]
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def run(workspace: Path, kill_after: float | None) -> bool:
    """Run the pipeline; return whether it ended by itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tlpipeline", "run", "--workspace", str(workspace)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.communicate()
        return False
    if process.returncode:
        sys.exit(f"the run failed on its own:\n{errors[-3000:]}")
    return True


def state(workspace: Path) -> tuple[str, str, str]:
    """Return dvc.lock, what `dvc status` says, and the tags."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=workspace, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    tags = subprocess.run(["git", "tag"], cwd=workspace, capture_output=True, text=True).stdout
    return (workspace / "dvc.lock").read_text(), status.stdout.strip(), tags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    blank = work / "blank"
    subprocess.run([sys.executable, "-m", "tlpipeline", "init", str(blank)], check=True)
    params = blank / "params.yaml"
    # The case that goes through all arms has the most moments to be killed in.
    text = params.read_text().replace("  case: auto ", "  case: large_different ").replace("  epochs: auto ", "  epochs: 4 ")
    params.write_text(text.replace("  workers: 2 ", f"  workers: {options.workers} "))
    shutil.copytree(blank, work / "calm", symlinks=True)
    started = time.monotonic()
    run(work / "calm", None)
    calm, length = state(work / "calm"), time.monotonic() - started
    print(f"undisturbed: {length:.0f} s, {calm[1]!r}, tags {calm[2].split()}", flush=True)
    rng = random.Random(options.seed)
    lost = 0
    for number in range(options.times):
        workspace = work / f"run{number}"
        shutil.copytree(blank, workspace, symlinks=True)
        moments: list[float] = []
        while True:
            # At most three kills each, so that a survivor comes even where a run is long.
            moment = rng.uniform(5, length) if len(moments) < 3 else None
            if run(workspace, moment):
                break
            assert moment is not None
            moments.append(moment)
        same = state(workspace) == calm
        lost += not same
        killed = ", ".join(f"{m:.0f} s" for m in moments) or "never"
        print(f"{number + 1}/{options.times}: killed after {killed}; {'nothing lost' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(workspace)
    shutil.rmtree(work)
    sys.exit(f"{lost} of {options.times} runs lost something" if lost else 0)


if __name__ == "__main__":
    main()
