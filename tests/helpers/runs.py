"""Runs of the pipeline in processes of their own, which tests kill, interrupt and starve."""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

WEIGHTS = "model/weights.safetensors"
# One thread in each process, so that a run on a busy machine costs what it computes.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class Run:
    """`tlpipeline run` on a workspace; its log shows which epoch it has reached.

    All runs beside each other share one Prefect folder: its database takes half as long to make as a run.
    """

    def __init__(self, workspace: Path, limit: float = 600, **environment: str) -> None:
        """Start the run.

        Args:
            workspace: of the run.
            limit: seconds after which a run that is waited for is killed.
            environment: further variables of the process.
        """
        self.limit = limit
        self.log = Path(tempfile.mkstemp(prefix=f"{workspace.name}-", suffix=".log", dir=workspace.parent)[1])
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tlpipeline", "run", "--workspace", str(workspace)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "PREFECT_HOME": str(workspace.parent / "prefect"), **environment},
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def text(self) -> str:
        """Return the log."""
        return self.log.read_text(errors="replace")

    def epochs(self) -> list[int]:
        """Return the epochs of fine-tuning that the log reports."""
        return [int(number) for number in re.findall(r"fine-tune epoch (\d+)/", self.text())]

    def wait_for_epoch(self, epoch: int, rng: random.Random | None = None) -> None:
        """Wait until this epoch is done; with `rng`, up to 0.3 s more, into the next epoch or a checkpoint.

        Raises:
            AssertionError: if the run ends before.
        """
        while epoch not in self.epochs():
            if self.process.poll() is not None or self.seconds > self.limit:
                self.kill()
                raise AssertionError(f"the run ended before epoch {epoch}:\n{self.text()[-3000:]}")
            time.sleep(0.02)
        if rng is not None:
            time.sleep(rng.uniform(0, 0.3))

    def processes(self) -> list[psutil.Process]:
        """Return all processes that it started, and itself last."""
        try:
            return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill it with all that it started."""
        kill(self.processes())
        self.process.wait()

    def exit_code(self, limit: float | None = None) -> int | None:
        """Wait for its end and return the exit code; None if it had to be killed after `limit` seconds."""
        try:
            return self.process.wait(limit or self.limit)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


def kill(processes: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to those of these processes that still run."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def ray_workers(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return those of these processes that are Ray Train workers."""
    return [process for process in processes if any("RayTrainWorker" in part for part in process.cmdline())]


def outcome(workspace: Path) -> dict[str, str]:
    """Return what a run leaves: dvc.lock, the hash of the weights, the output of `dvc status`, and the tags."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=workspace, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    lock, weights = workspace / "dvc.lock", workspace / WEIGHTS
    return {
        "dvc.lock": lock.read_text() if lock.exists() else "",
        "weights": hashlib.md5(weights.read_bytes()).hexdigest() if weights.exists() else "none",
        "status": status.stdout.strip(),
        "tags": subprocess.run(["git", "tag"], cwd=workspace, capture_output=True, text=True).stdout,
    }
