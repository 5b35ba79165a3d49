"""The Ray Train job: few tests, with real workers; the loop itself is tested in test_train.py without Ray."""

import contextvars
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import paint
from safetensors.torch import load_file
from test_train import decided

from tlpipeline import dataset, distributed
from tlpipeline.cases import CASES
from tlpipeline.errors import BackboneError, ClusterError, MemoryFull, TrainingError
from tlpipeline.features import Reading
from tlpipeline.job import Job
from tlpipeline.params import ClusterParams
from tlpipeline.progress import Event, silent
from tlpipeline.workers import Alone

TWO = ClusterParams(workers=2, gpu=False, max_failures=2, storage="none")
HERE = ClusterParams(workers=0, gpu=False, max_failures=0, storage="none")


@pytest.fixture(scope="module")
def ray_runtime() -> Iterator[None]:
    """One local Ray runtime for the tests of this file."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")
    distributed.runtime(2)
    yield
    distributed.shutdown()


# Without dropout, so that two workers draw what one draws.
DECISION = replace(decided(CASES[2], patience=100), slice="conv3", readings=(Reading("conv3", 128, (1, 2)),))
EPOCHS = 12


@dataclass(frozen=True)
class Whole:
    """A run on two workers that nothing interrupted, what it told, and what makes the same job for another run."""

    finished: Path
    told: list[str]
    job: Callable[[str], Job]


@pytest.fixture(scope="module")
def whole(ray_runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The one reference for all that is interrupted: a fit on Ray costs more than what is trained in it."""
    place = tmp_path_factory.mktemp("whole")
    for label in range(3):
        (place / "pictures" / f"class{label}").mkdir(parents=True)
        for index in range(30):
            paint(label, index).save(place / "pictures" / f"class{label}" / f"{index:03d}.png")
    manifest = dataset.ingest(place / "pictures", {}, lambda done, total: None)
    dataset.write_manifest(manifest, place / "manifest.parquet", place / "quarantine.csv")

    def made(name: str) -> Job:
        return Job(
            workspace=str(place), images=str(place / "pictures"), manifest=str(place / "manifest.parquet"), backbone="demonstration",
            weights="DEFAULT", weights_md5="none", decision=json.loads(json.dumps(DECISION.to_json())), seed=0, epochs=EPOCHS, batch_size=16,
            flip=False, precision="float32", history=str(place / f"{name}.jsonl"),
        )  # fmt: skip

    told: list[str] = []
    torn = place / "runs" / "whole" / "checkpoint_manager_snapshot.json"  # as a kill leaves it: a fit that reads it fails
    torn.parent.mkdir(parents=True)
    torn.write_text('{"checkpoint_results": [')
    finished = distributed.run(made("whole"), TWO, "whole", place / "runs", lambda event: told.append(event.text))
    return Whole(finished, told, made)


def weights(finished: Path) -> dict[str, torch.Tensor]:
    return load_file(finished / "model" / "weights.safetensors")


def curve(finished: Path) -> list[dict[str, float]]:
    return json.loads((finished / "history.json").read_text())["history"]


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return curve(one) == curve(other) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_more_workers_than_cpus_fail_at_once(job: Callable[..., Job], tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"expected a CPU for each of 999 workers, found \d+\. Set cluster\.workers"):
        distributed.run(job(decided(CASES[0])), replace(TWO, workers=999), "many", tmp_path / "runs", silent)
    assert time.monotonic() - started < 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there_fail_at_once() -> None:
    with pytest.raises(ClusterError, match=r"expected a GPU .* found 0.*cluster\.gpu to false"):
        distributed.preflight(replace(TWO, gpu=True))


@pytest.mark.parametrize(("asked", "gpus", "address", "found"), [
    ("auto", 2, "x", True), ("auto", 1, "x", False), ("auto", 0, "x", False), (False, 2, "x", False), (True, 2, "x", True), (True, 1, "x", None),
    ("auto", 2, "", False),
], ids=str)  # fmt: skip
def test_a_joined_cluster_says_itself_whether_it_has_gpus(
    asked: Any, gpus: int, address: str, found: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that starts the run may have none, or have one that the cluster's machines lack."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {}))
    use_gpu = asked is True  # as preflight says on this machine, which has none
    if found is None:
        with pytest.raises(ClusterError, match="expected 2 GPUs in the Ray cluster, found 1"):
            distributed._enough(replace(TWO, gpu=asked), use_gpu)
    else:
        assert distributed._enough(replace(TWO, gpu=asked), use_gpu) is found


@pytest.mark.parametrize(("content", "goes"), [('{"checkpoint_results": [', True), ('{"checkpoint_results": []}', False)])
def test_a_torn_list_of_checkpoints_is_removed_with_what_it_lists(content: str, goes: bool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_manager_snapshot.json").write_text(content)
    distributed._mend(tmp_path / "run")
    assert (tmp_path / "run").exists() is not goes


def test_a_full_disk_is_named_with_the_way_out() -> None:
    class Failed(Exception):
        def __init__(self, why: BaseException) -> None:
            self.worker_failures = {0: why}

    told = distributed._translated(Failed(RuntimeError("OSError: [Errno 28] No space left on device")), 1, "somewhere")
    assert isinstance(told, ClusterError)
    assert re.search(r"expected room for checkpoints in somewhere, found none .*the run resumes from it", str(told))
    assert "failed more often than cluster.max_failures (1)" in str(distributed._translated(Failed(RuntimeError("else")), 1, "somewhere"))


def test_in_this_process_the_same_loop_runs_without_ray(job: Callable[..., Job], tmp_path: Path) -> None:
    events: list[Event] = []
    mine = contextvars.ContextVar("mine", default="nobody's")
    mine.set("the caller's")
    seen: set[str] = set()

    def told(event: Event) -> None:
        events.append(event)
        seen.add(mine.get())

    finished = distributed.run(job(decided(CASES[0])), HERE, "here", tmp_path / "runs", told)
    assert seen == {"the caller's"}  # Prefect's artifacts belong to the run that asks for them
    assert (finished / "model" / "model.json").is_file()
    assert any("validation accuracy" in e.text for e in events)


@pytest.mark.ray
def test_workers_have_the_priority_of_who_starts_them(ray_runtime: None) -> None:
    """Ray's own is the lowest but for four: beside any other busy process they would stand still."""
    import ray

    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


def test_two_ray_workers_give_the_model_that_one_process_gives(whole: Whole, tmp_path: Path) -> None:
    single = distributed.run(whole.job("single"), HERE, "single", tmp_path / "runs", silent)
    assert weights(whole.finished).keys() == weights(single).keys()
    for key, value in weights(single).items():
        assert torch.allclose(weights(whole.finished)[key], value, atol=5e-3), key
    assert [(h["arm"], h["epoch"]) for h in curve(whole.finished)] == [(h["arm"], h["epoch"]) for h in curve(single)]
    assert curve(whole.finished)[0] == pytest.approx(curve(single)[0])
    assert [h["loss"] for h in curve(whole.finished)] == pytest.approx([h["loss"] for h in curve(single)], abs=2e-3)
    assert any("head solved" in text for text in whole.told)


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(whole: Whole, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one(event: Event) -> None:
        if f"epoch 2/{EPOCHS}" in event.text and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if any("RayTrainWorker" in part for part in p.cmdline())]
            killed.append(workers[-1].pid)
            os.kill(workers[-1].pid, signal.SIGKILL)

    resumed = distributed.run(whole.job("resumed"), TWO, "resumed", tmp_path / "runs", kill_one)
    assert killed
    assert same(resumed, whole.finished)


@pytest.mark.ray
def test_a_mistake_in_a_worker_reaches_the_user_as_what_it_is(
    ray_runtime: None,
    job: Callable[..., Job],
    tmp_path: Path,
) -> None:
    broken = job(decided(CASES[0]), "broken", weights="gone.safetensors")
    with pytest.raises(BackboneError, match=r"gone\.safetensors"):
        distributed.run(broken, replace(TWO, max_failures=1), "broken", tmp_path / "runs", silent)


def test_workers_without_room_begin_again_in_as_many_parts_as_they_ask_for(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def full(made: Job, *_: object) -> Path:
        tried.append(made.parts)
        if made.parts < 4:
            raise MemoryFull("expected room", 2 * made.parts)
        return tmp_path

    monkeypatch.setattr(distributed, "_on_workers", full)
    assert distributed.run(job(decided(CASES[0]), "parts"), TWO, "name", tmp_path / "runs", silent) == tmp_path
    assert tried == [1, 2, 4]


def test_an_error_that_says_more_than_its_text_comes_back_whole(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(decided(CASES[0]), "full")

    def full(*_: object) -> None:
        raise MemoryFull("expected room", 8)

    monkeypatch.setattr(distributed.train, "run", full)
    monkeypatch.setattr(distributed, "_RayWorld", lambda: Alone(Path(made.workspace)))
    with pytest.raises(MemoryFull):
        distributed._loop(asdict(made))
    with pytest.raises(MemoryFull, match=r"^expected room$") as error:
        distributed._raise_what_gave_up(made)
    assert error.value.parts == 8


def test_a_worker_that_is_started_again_after_an_error_of_the_user_does_not_try_again(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tried = job(decided(CASES[0]), "diverges"), []

    def diverge(*_: object) -> None:
        tried.append(1)
        raise TrainingError("expected it to converge")

    monkeypatch.setattr(distributed.train, "run", diverge)
    monkeypatch.setattr(distributed, "_RayWorld", lambda: Alone(Path(made.workspace)))
    with pytest.raises(TrainingError):
        distributed._loop(asdict(made))
    distributed._loop(asdict(made))
    assert tried == [1]
    with pytest.raises(TrainingError, match="expected it to converge"):
        distributed._raise_what_gave_up(made)
    distributed._raise_what_gave_up(made)  # told once


def test_what_a_killed_worker_left_on_its_machine_is_removed_by_the_next_of_its_rank(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed.tempfile, "tempdir", str(tmp_path))
    made = job(decided(CASES[0]), "killed")

    def killed(rank: int) -> Path:
        with distributed._scratch(made, rank) as folder:
            (folder / "features").mkdir()
            kept = folder.with_name(f"{folder.name}-left")
            folder.rename(kept)  # as if the process had ended here
            folder.mkdir()
        return kept

    left = {rank: killed(rank) for rank in (0, 1)}
    other = distributed._scratch(replace(made, history=str(tmp_path / "other.jsonl")), 0)
    with distributed._scratch(made, 0), other:
        assert not left[0].exists()
        assert left[1].is_dir()
    with distributed._scratch(made, 1):
        assert not left[1].exists()


DRIVER = """
import json, sys
from pathlib import Path
from typing import Any
from tlpipeline import distributed
from tlpipeline.params import ClusterParams
from tlpipeline.progress import silent
from tlpipeline.job import Job
spec = json.loads(Path(sys.argv[1]).read_text())
cluster = ClusterParams(workers=2, gpu=False, max_failures=2, storage="none")
print(distributed.run(Job(**spec["job"]), cluster, spec["name"], Path(spec["runs"]), silent), flush=True)
distributed.shutdown()
"""


@pytest.mark.ray
def test_a_killed_driver_loses_nothing(whole: Whole, tmp_path: Path) -> None:
    """Killed after the second epoch and started again, the run ends as the uninterrupted one, and goes on where it was."""
    script, spec, made = tmp_path / "driver.py", tmp_path / "spec.json", whole.job("killed")
    script.write_text(DRIVER)
    spec.write_text(json.dumps({"job": asdict(made), "name": "killed", "runs": str(tmp_path / "runs")}))
    told = Path(made.history)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, str(script), str(spec)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    driver = start()
    deadline = threading.Event()
    timer = threading.Timer(180, deadline.set)
    timer.start()
    while not (told.exists() and f"epoch 2/{EPOCHS}," in told.read_text()):
        assert driver.poll() is None, driver.communicate()[1]
        assert not deadline.wait(0.05), "no second epoch in three minutes"
    timer.cancel()
    driver.kill()
    driver.communicate()
    before = len(told.read_text().splitlines())
    again = start()
    output, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    after = "\n".join(told.read_text().splitlines()[before:])
    assert f"epoch 1/{EPOCHS}" not in after  # it did not start from the beginning
    assert "head solved" not in after
    assert same(Path(output.split()[-1]), whole.finished)
