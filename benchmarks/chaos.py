"""Kill runs at any moment and in any part, and start them again; nothing may be lost.

    python benchmarks/chaos.py [all] [worker] [driver] [node] [interrupt] [disk] [random] [--times 20] [--seed 0]

Each case runs the pipeline once undisturbed and then, in a copy of the same workspace, disturbed. What survives must have the undisturbed
run's dvc.lock (which names the model and each epoch's losses by their hashes) and weights, a clean `dvc status`, and one registered version.

    random      kills whole runs (SIGKILL, with all their processes) at random moments until a try gets through, --times times, every fourth
                run with two Ray workers
    worker      kills one of two Ray workers while it trains; the run itself must go on
    driver      kills the process that was started, and nothing that it started; the next run must go on
    node        a Ray cluster of two nodes of its own, one CPU each: kills one with all that runs on it, and starts another in its place
    interrupt   Ctrl-C, as a terminal sends it to all processes of the run: once without Ray and once with two Ray workers
    disk        checkpoints on a small file system that runs full in the middle of one; the error must name the disk, and once there is room
                the next run must go on; once without Ray and once with two Ray workers

Training stops early in the undisturbed run, so a run that forgets its best epoch, its place in the schedule or its order of the images ends
elsewhere. Exits with 1 if anything was lost.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

EACH = 60  # images of each class: the sample's first ones, so that a run takes seconds
EPOCHS = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "profile": {"images": 128, "images_max": 128, "tangent": False, "shift": False},
    "choose": {"case": "large_different", "effort": "quick", "draws": 100},
    # A high rate makes validation restless, so that patience ends the run before its schedule does.
    "train": {"epochs": EPOCHS, "override": {"patience": 2, "rate_none": 0.03, "average": 0.9}},
    "cluster": {"gpu": False},
}
# One thread in each process: runs on a busy machine then cost what they compute. All runs share Prefect's folder (see `Run`), whose database
# takes half as long to make as a run.
QUIET = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
LONGEST = 600
SMALL = 64 * 2**20  # of the file system that runs full
LEFT = 3 * 2**20  # what is left on it: less than a checkpoint, more than nothing
MODEL = "model/weights.safetensors"


class Run:
    """A run of the pipeline, whose progress can be waited for."""

    def __init__(self, workspace: Path, **environment: str) -> None:
        self.log = Path(tempfile.mkstemp(prefix=f"{workspace.name}-", suffix=".log", dir=workspace.parent)[1])
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tlpipeline", "run", "--workspace", str(workspace)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
                env={**os.environ, **QUIET, "PREFECT_HOME": str(workspace.parent / "prefect"), **environment},
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def epochs(self) -> list[int]:
        """Return the epochs that it has told of."""
        return [int(found) for found in re.findall(r"fine-tune epoch (\d+)/", self.text())]

    def reach(self, epoch: int, rng: random.Random | None = None) -> None:
        """Wait until this epoch is done, and then, drawn from rng, a little: some way into the next one, or into its checkpoint."""
        while epoch not in self.epochs():
            if self.process.poll() is not None or self.seconds > LONGEST:
                self.kill()
                sys.exit(f"expected epoch {epoch}, but the run ended before:\n{self.text()[-3000:]}")
            time.sleep(0.02)
        if rng is not None:
            time.sleep(rng.uniform(0, 0.3))

    def family(self) -> list[psutil.Process]:
        """Return all that it started, and itself last."""
        try:
            return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill it with all that it started."""
        _kill(self.family())
        self.process.wait()

    def end(self, limit: float = LONGEST) -> int | None:
        """Wait for its end, and return the exit code; None where it had to be killed."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


def _kill(processes: list[psutil.Process]) -> None:
    for member in processes:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


class Chaos:
    """Workspaces to disturb, and what the undisturbed ones came to."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.lost: list[str] = []
        self.calm: dict[int, tuple[dict[str, str], float]] = {}
        self.blank = work / "blank"
        sample, images = work / "sample", work / "images"
        _quietly("sample", str(sample))
        for folder in sorted(sample.iterdir()):
            (images / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:EACH]:
                image.rename(images / folder.name / image.name)
        _quietly("init", str(self.blank), "--images", str(images))

    def workspace(self, name: str, workers: int, **cluster: Any) -> Path:
        """Return a fresh workspace."""
        folder = self.work / name
        shutil.copytree(self.blank, folder, symlinks=True)
        params = yaml.safe_load((folder / "params.yaml").read_text())
        for section, values in SETTINGS.items():
            params[section] |= values
        params["cluster"] |= {"workers": workers, **cluster}
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        return folder

    def undisturbed(self, workers: int) -> tuple[dict[str, str], float]:
        """Return what an undisturbed run with so many workers comes to, and its seconds."""
        if workers not in self.calm:
            folder = self.workspace(f"calm{workers}", workers)
            run = Run(folder)
            if run.end():
                sys.exit(f"the undisturbed run failed:\n{run.text()[-3000:]}")
            self.calm[workers] = state(folder), run.seconds
            found = self.calm[workers][0]
            say(
                "undisturbed",
                f"{workers} workers, {run.seconds:.0f} s, {max(run.epochs())} of {EPOCHS} epochs, weights {found['weights'][:12]}, "
                f"{found['status']!r}, versions {found['tags'].split()}",
            )
            if max(run.epochs()) == EPOCHS:
                say("undisturbed", "on this machine training does not stop early, so that part of its state is not tried")
        return self.calm[workers]

    def judge(self, name: str, story: str, workspace: Path, workers: int, problems: list[str] | None = None) -> None:
        """Say what happened, and what was lost of it."""
        found, calm = state(workspace), self.undisturbed(workers)[0]
        lost = [*(problems or []), *(f"{part} differs" for part in calm if found[part] != calm[part])]
        verdict = f"LOST: {', '.join(lost)}" if lost else f"nothing lost, dvc.lock and weights {found['weights'][:12]} equal"
        say(name, f"{story}; {verdict}")
        if lost:
            self.lost.append(name)
        else:
            shutil.rmtree(workspace, ignore_errors=True)

    # --- the cases --------------------------------------------------------------------------------------------------------------------

    def random(self, times: int) -> None:
        lengths = {workers: self.undisturbed(workers)[1] for workers in (0, 2)}
        number = 0
        while number < times:
            workers = 0 if (number + 1) % 4 else 2
            length = lengths[workers]
            workspace = self.workspace(f"random{number}", workers)
            moments: list[float] = []
            while True:
                # At most two kills each, so that a survivor comes even where a run is long.
                moment = self.rng.uniform(5, length) if len(moments) < 2 else LONGEST
                run = Run(workspace)
                try:
                    code = run.process.wait(moment)
                    break
                except subprocess.TimeoutExpired:
                    run.kill()
                    moments.append(moment)
            if not moments and not code:
                lengths[workers] = max(run.seconds, 6)  # it ended before the moment came: another one, and sooner
                shutil.rmtree(workspace)
                continue
            number += 1
            killed = ", ".join(f"{m:.0f} s" for m in moments) or "never"
            problems = [f"exit code {code}: {run.text()[-1500:]}"] if code else []
            self.judge(f"random {number}/{times}", f"{workers} workers, killed after {killed}", workspace, workers, problems)

    def worker(self) -> None:
        self.undisturbed(2)
        workspace = self.workspace("worker", 2)
        run = Run(workspace)
        run.reach(2, self.rng)
        victim = self.rng.choice(_workers(run.family()))
        _kill([victim])
        before = run.epochs(), run.seconds
        run.end()
        self._resumed("worker", f"killed Ray worker {victim.pid}", workspace, 2, before, run.epochs()[len(before[0]) :], run)

    def driver(self) -> None:
        self.undisturbed(2)
        workspace = self.workspace("driver", 2)
        run = Run(workspace)
        run.reach(2, self.rng)
        *others, _ = run.family()
        run.process.kill()
        run.process.wait()
        before = run.epochs(), run.seconds
        again = Run(workspace)  # at once: what the killed one left running must not get in its way
        again.end()
        left = [p for p in others if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        names = [" ".join(Path(part).name for part in p.cmdline()[:3]) for p in left]
        _kill(left)
        story = f"killed the driver {run.process.pid}; of its {len(others)} processes {len(left)} {names} outlived the next run"
        self._resumed("driver", story, workspace, 2, before, again.epochs(), again)

    def interrupt(self) -> None:
        for workers in (0, 2):
            self.undisturbed(workers)
            workspace = self.workspace(f"interrupt{workers}", workers)
            run = Run(workspace)
            run.reach(1)  # early, so that training has not ended when it comes
            os.killpg(run.process.pid, signal.SIGINT)
            before = run.epochs(), run.seconds
            others, code = run.family(), run.end(60)
            problems = [] if code == 130 else [f"exit code {code} after Ctrl-C, not 130"]
            if "interrupted; checkpoints are kept" not in run.text():
                problems.append("Ctrl-C is not answered with a word on checkpoints")
            story = f"{workers} workers, Ctrl-C, ended {run.seconds - before[1]:.0f} s later with {'SIGKILL' if code is None else code}"
            _, left = psutil.wait_procs(others, 10)
            _kill(left)
            if left:
                problems.append(f"{len(left)} processes left behind")
            again = Run(workspace)
            again.end()
            self._resumed("interrupt", story, workspace, workers, before, again.epochs(), again, problems)

    def node(self) -> None:
        self.undisturbed(2)
        storage = self.work / "shared"
        storage.mkdir()
        workspace = self.workspace("node", 2, storage=str(storage))
        with _two_nodes(self.work) as (address, kill_one):
            run = Run(workspace, RAY_ADDRESS=address)
            run.reach(2, self.rng)
            killed = kill_one()
            before = run.epochs(), run.seconds
            run.end()
        story = f"killed a node: its raylet and {killed} more processes, a Ray worker among them"
        self._resumed("node", story, workspace, 2, before, run.epochs()[len(before[0]) :], run)

    def disk(self) -> None:
        for workers in (0, 2):
            self.undisturbed(workers)
            # On a busy machine a run may be over before its disk is full: then nothing was tried.
            for last in (False, False, True):
                if self._full_disk(workers, last):
                    break

    def _full_disk(self, workers: int, last: bool) -> bool:
        """Have the disk of the checkpoints run full in the middle of a run; say whether it did, which the last try does not excuse."""
        # A worker that meets the full disk meets it again: one more try is enough.
        workspace = self.workspace(f"disk{workers}", workers, max_failures=1, storage=str(self.work / "small") if workers else "none")
        small = self.work / "small" if workers else workspace / ".tlpipeline" / "runs"
        small.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(small)], check=True)
        run = Run(workspace)
        run.reach(1)
        before = run.epochs(), run.seconds
        # Room that comes free, such as that of an older checkpoint, goes at once, so that whatever is written next meets the end of it.
        number = 0
        while run.process.poll() is None:
            if (free := shutil.disk_usage(small).free) > LEFT:
                number += 1
                with (small / f"ballast{number}").open("wb") as file, suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, free - LEFT)
            time.sleep(0.05)
        code = run.end()
        if code == 0 and not last:
            say("disk", f"{workers} workers: the run was over before its disk was full, once more")
            subprocess.run(["umount", str(small)], check=True)
            shutil.rmtree(workspace)
            shutil.rmtree(small, ignore_errors=True)
            return False
        free, said = shutil.disk_usage(small).free, run.text().rpartition("error: ")[2].strip()
        half = [str(path.relative_to(small)) for path in sorted(small.rglob("*.safetensors")) if not _readable(path)]
        say(
            "disk",
            f"{workers} workers: {free // 1024} KiB left, half-written {half or 'nothing'}; exit code {code}, said: {said[-1500:]}",
        )
        problems = [] if code == 2 else [f"exit code {code} on a full disk, not 2"]
        problems += [f"the error does not say {word!r}" for word in ("expected room", "found none", "run again") if word not in said]
        for ballast in small.glob("ballast*"):
            ballast.unlink()
        again = Run(workspace)
        again.end()
        subprocess.run(["umount", str(small)], check=True)
        story = f"{workers} workers, the disk of the checkpoints ran full"
        self._resumed("disk", story, workspace, workers, before, again.epochs(), again, problems)
        return True

    def _resumed(
        self, name: str, story: str, workspace: Path, workers: int, before: tuple[list[int], float], after: list[int], run: Run,
        problems: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Judge a run that was to go on: `before` are the epochs told and the seconds gone when it was disturbed, `after` the epochs since."""
        problems = list(problems)
        if code := run.process.returncode:
            problems.append(f"the run that should go on ended with {code}: {run.text()[-3000:]}")
        if after and after[0] <= 1:
            problems.append("training began again")
        went_on = f"went on with epoch {after[0]}" if after else "no epoch was left"
        epochs, seconds = before
        self.judge(name, f"{story}, after {seconds:.0f} s, epoch {epochs[-1]} done; {went_on}", workspace, workers, problems)


def state(workspace: Path) -> dict[str, str]:
    """Return dvc.lock, the hash of the weights, what `dvc status` says, and the tags."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=workspace, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    lock, weights = workspace / "dvc.lock", workspace / MODEL
    return {
        "dvc.lock": lock.read_text() if lock.exists() else "",
        "weights": hashlib.md5(weights.read_bytes()).hexdigest() if weights.exists() else "none",
        "status": status.stdout.strip(),
        "tags": subprocess.run(["git", "tag"], cwd=workspace, capture_output=True, text=True).stdout,
    }


def say(name: str, text: str) -> None:
    """Print a line."""
    print(f"{name}: {text}", flush=True)


def _quietly(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tlpipeline", *arguments], check=True, capture_output=True)


def _workers(family: list[psutil.Process]) -> list[psutil.Process]:
    """Return those of these processes that are Ray Train workers."""
    return [p for p in family if any("RayTrainWorker" in part for part in p.cmdline())]


def _readable(path: Path) -> bool:
    """Say whether a file of tensors is whole."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        load_file(path)
    except SafetensorError:
        return False
    return True


@contextmanager
def _two_nodes(work: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """Start a Ray cluster of two nodes; give its address, and a function that kills one and starts another in its place."""
    # Ray notes the newest cluster in its temporary folder, where other programs of this machine would find it.
    os.environ |= QUIET | {"RAY_TMPDIR": str(work)}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)

        def kill_one() -> int:
            raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
            members = raylet.children(recursive=True)
            if not _workers(members):
                sys.exit("expected a Ray worker on the node to kill, found none")
            _kill([raylet, *members])
            cluster.add_node(num_cpus=1)
            return len(members)

        yield cluster.address, kill_one
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ("worker", "driver", "node", "interrupt", "disk", "random")
    parser.add_argument(
        "case", nargs="*", default="all", choices=("all", *cases), metavar="case", help=f"all, or some of {', '.join(cases)}"
    )
    parser.add_argument("--times", type=int, default=20, help="of random")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    # A shell starts what runs in its background deaf to Ctrl-C, and all that is started from there inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = cases if "all" in options.case else options.case
    if "disk" in wanted and os.environ.get("CHAOS_OWN_MOUNTS") != "yes":
        # Mounts of its own: they need no root where the system lets users have namespaces, and end with this process.
        own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
        os.environ["CHAOS_OWN_MOUNTS"] = "yes"
        os.execvp("unshare", [*own, sys.executable, *sys.argv])
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(work, options.seed)
    for case in wanted:
        chaos.random(options.times) if case == "random" else getattr(chaos, case)()
    if chaos.lost:
        sys.exit(f"lost something: {'; '.join(chaos.lost)}. Workspaces and logs are in {work}.")
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
