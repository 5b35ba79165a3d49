"""Runs that are killed, interrupted or starved at any moment lose nothing: `make chaos`, some 40 minutes.

Each test runs the pipeline once undisturbed and once, in a copy of the same workspace, disturbed. What survives must have the dvc.lock of the
undisturbed run (it names the model and the losses of each epoch by their hashes), its weights, a clean `dvc status`, and one registered version.
Training stops early in the undisturbed run. So a run that forgets its best epoch, its place in the schedule or the order of its images ends elsewhere.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tests.helpers.runs import ENVIRONMENT, Run, kill, outcome, ray_workers

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

EACH = 60  # images of each class of the sample, so that a run takes seconds
EPOCHS = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "profile": {"images": 128, "images_max": 128, "tangent": False},
    "choose": {"case": "large_different", "effort": "quick", "draws": 100},
    "train": {"epochs": EPOCHS, "override": {"lr_none": 0.03}},
    "cluster": {"gpu": False},
}
DISK_BYTES = 64 * 2**20  # of the file system that runs full
FREE_BYTES = 3 * 2**20  # what is free on it then: less than a checkpoint, more than nothing


class Disturbed:
    """Workspaces to disturb, and the outcome of the undisturbed runs by number of workers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.blank = folder, folder / "blank"
        self.undisturbed: dict[int, tuple[dict[str, str], float]] = {}
        sample, images = folder / "sample", folder / "images"
        _tlpipeline("sample", str(sample))
        for label in sorted(sample.iterdir()):
            (images / label.name).mkdir(parents=True)
            for image in sorted(label.iterdir())[:EACH]:
                image.rename(images / label.name / image.name)
        _tlpipeline("init", str(self.blank), "--images", str(images))

    def workspace(self, name: str, workers: int, **cluster: Any) -> Path:
        """Return a fresh workspace."""
        target = self.folder / name
        shutil.copytree(self.blank, target, symlinks=True)
        params = yaml.safe_load((target / "params.yaml").read_text())
        for section, values in SETTINGS.items():
            params.setdefault(section, {}).update(values)
        params["cluster"] |= {"workers": workers, **cluster}
        (target / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        return target

    def expected(self, workers: int) -> tuple[dict[str, str], float]:
        """Return the outcome of an undisturbed run, and its seconds."""
        if workers not in self.undisturbed:
            workspace = self.workspace(f"undisturbed{workers}", workers)
            run = Run(workspace)
            assert run.exit_code() == 0, run.text()[-3000:]
            self.undisturbed[workers] = outcome(workspace), run.seconds
            early = "" if max(run.epochs()) < EPOCHS else "; training does not stop early on this machine, so that part is not tested"
            print(f"\nundisturbed, {workers} workers: {run.seconds:.0f} s, {max(run.epochs())} of {EPOCHS} epochs{early}")
        return self.undisturbed[workers]

    def check(self, workspace: Path, workers: int, story: str) -> None:
        """Check that the outcome is the undisturbed one, print what happened, and remove the workspace."""
        print(f"\n{story}")
        assert outcome(workspace) == self.expected(workers)[0]
        shutil.rmtree(workspace, ignore_errors=True)

    def check_resumed(self, workspace: Path, workers: int, run: Run, epochs: Sequence[int], story: str) -> None:
        """Check a run that had to resume; `epochs` are those that it trained since."""
        assert run.process.returncode == 0, run.text()[-3000:]
        assert not epochs or epochs[0] > 1, "training began again"
        self.check(workspace, workers, f"{story}; resumed with epoch {epochs[0] if epochs else 'none'}")


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    """Workspaces of the sample. Ctrl-C reaches the runs also if a shell started the tests in its background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Disturbed(tmp_path_factory.mktemp("chaos"))
    signal.signal(signal.SIGINT, before)


@pytest.mark.ray
def test_a_killed_ray_worker_does_not_end_the_run(disturbed: Disturbed) -> None:
    disturbed.expected(2)
    rng = random.Random(0)
    workspace = disturbed.workspace("worker", 2)
    run = Run(workspace)
    run.wait_for_epoch(2, rng)
    kill([rng.choice(ray_workers(run.processes()))])
    before = len(run.epochs())
    run.exit_code()
    disturbed.check_resumed(workspace, 2, run, run.epochs()[before:], f"killed a Ray worker after epoch {before}")


@pytest.mark.ray
def test_a_killed_driver_leaves_the_next_run_free_to_resume(disturbed: Disturbed) -> None:
    """The processes that the driver started stay alive when the next run begins, and must not disturb it."""
    disturbed.expected(2)
    workspace = disturbed.workspace("driver", 2)
    run = Run(workspace)
    run.wait_for_epoch(2, random.Random(0))
    *others, _ = run.processes()
    run.process.kill()
    run.process.wait()
    before = len(run.epochs())
    resumed = Run(workspace)
    resumed.exit_code()
    survivors = [process for process in others if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    kill(survivors)
    story = f"killed the driver after epoch {before}; {len(survivors)} of its {len(others)} processes outlived the next run"
    disturbed.check_resumed(workspace, 2, resumed, resumed.epochs(), story)


@pytest.mark.ray
def test_a_killed_node_is_replaced(disturbed: Disturbed) -> None:
    disturbed.expected(2)
    storage = disturbed.folder / "shared"
    storage.mkdir()
    workspace = disturbed.workspace("node", 2, storage=str(storage))
    with two_nodes(disturbed.folder) as (address, kill_node):
        run = Run(workspace, RAY_ADDRESS=address)
        run.wait_for_epoch(2, random.Random(0))
        killed = kill_node()
        before = len(run.epochs())
        run.exit_code()
    disturbed.check_resumed(workspace, 2, run, run.epochs()[before:], f"killed a node of {killed} processes after epoch {before}")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_ctrl_c_ends_the_run_and_the_next_one_resumes(disturbed: Disturbed, workers: int) -> None:
    disturbed.expected(workers)
    workspace = disturbed.workspace(f"interrupt{workers}", workers)
    run = Run(workspace)
    run.wait_for_epoch(1)  # early, so that training has not ended when it comes
    processes = run.processes()
    os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to all processes of the run
    before, pressed = len(run.epochs()), run.seconds
    assert run.exit_code(60) == 130, run.text()[-3000:]
    seconds = run.seconds - pressed
    _, survivors = psutil.wait_procs(processes, 10)
    kill(survivors)
    assert not survivors, "processes outlived the run"
    assert "interrupted; checkpoints are kept" in run.text()
    resumed = Run(workspace)
    resumed.exit_code()
    story = f"Ctrl-C after epoch {before}, {workers} workers: ended after {seconds:.0f} s"
    disturbed.check_resumed(workspace, workers, resumed, resumed.epochs(), story)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_a_full_disk_is_named_and_with_room_again_the_next_run_resumes(disturbed: Disturbed, workers: int) -> None:
    disturbed.expected(workers)
    for attempt in range(3):  # on a busy machine a run can end before its disk is full
        storage = disturbed.folder / f"disk{workers}-{attempt}"
        # A worker that meets the full disk meets it again: one more try is enough.
        workspace = disturbed.workspace(f"full{workers}-{attempt}", workers, max_failures=1, storage=str(storage) if workers else "none")
        disk = storage if workers else workspace / ".tlpipeline" / "runs"
        with small_disk(disk):
            run = Run(workspace)
            run.wait_for_epoch(1)
            before = len(run.epochs())
            fill_until_the_end(run, disk)
            if run.exit_code() == 0:
                shutil.rmtree(workspace)
                continue
            message = run.text().rpartition("error: ")[2]
            print(f"\n{shutil.disk_usage(disk).free // 1024} KiB free, incomplete {incomplete(disk)}: {message[-1500:].strip()}")
            assert run.process.returncode == 2
            assert all(words in message for words in ("expected room", "found none", "run again")), message
            for ballast in disk.glob("ballast*"):
                ballast.unlink()
            resumed = Run(workspace)
            resumed.exit_code()
        disturbed.check_resumed(workspace, workers, resumed, resumed.epochs(), f"full disk after epoch {before}, {workers} workers")
        return
    pytest.fail("three runs ended before their disks were full")


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.ray] if seed % 4 == 3 else []) for seed in range(20)])
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(disturbed: Disturbed, seed: int) -> None:
    """Every fourth seed has two Ray workers. At most two kills each, so that the run gets through."""
    workers, rng = 2 if seed % 4 == 3 else 0, random.Random(seed)
    longest = disturbed.expected(workers)[1]
    moments: list[float] = []
    workspace = disturbed.workspace(f"random{seed}", workers)
    while True:
        run = Run(workspace)
        if len(moments) == 2:
            break
        moment = rng.uniform(5, longest)
        try:
            code = run.process.wait(moment)
        except subprocess.TimeoutExpired:
            run.kill()
            moments.append(moment)
            continue
        if moments or code:
            break
        # It ended before the first moment: another moment, and sooner.
        longest = max(run.seconds, 6)
        shutil.rmtree(workspace)
        workspace = disturbed.workspace(f"random{seed}", workers)
    assert run.exit_code() == 0, run.text()[-1500:]
    disturbed.check(workspace, workers, f"seed {seed}, {workers} workers: killed after {', '.join(f'{m:.0f} s' for m in moments)}")


def _tlpipeline(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tlpipeline", *arguments], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system; `make chaos` gives the tests a mount namespace, so that no root is needed where users may have one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here ({mounted.stderr.strip()}): run `make chaos`")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_until_the_end(run: Run, disk: Path) -> None:
    """Fill the disk while the run lasts; room that an older checkpoint frees is filled as well."""
    number = 0
    while run.process.poll() is None:
        if (free := shutil.disk_usage(disk).free) > FREE_BYTES:
            number += 1
            with (disk / f"ballast{number}").open("wb") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, free - FREE_BYTES)
        time.sleep(0.05)


def incomplete(disk: Path) -> list[str]:
    """Return the files of tensors that cannot be read."""
    names = []
    for path in sorted(disk.rglob("*.safetensors")):
        try:
            load_file(path)
        except SafetensorError:
            names.append(str(path.relative_to(disk)))
    return names


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """Start a Ray cluster of two nodes, one CPU each; give its address, and a function that kills one and starts another in its place."""
    with pytest.MonkeyPatch.context() as environment:
        # Ray notes the newest cluster in its temporary folder; other programs must not take this one for theirs.
        for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder)}.items():
            environment.setenv(name, value)
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            second = cluster.add_node(num_cpus=1)

            def kill_node() -> int:
                raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
                members = [raylet, *raylet.children(recursive=True)]
                assert ray_workers(members), "no Ray worker runs on the node to kill"
                kill(members)
                cluster.add_node(num_cpus=1)
                return len(members)

            yield cluster.address, kill_node
        finally:
            cluster.shutdown()
