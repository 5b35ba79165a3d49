"""The Ray Train job: few tests, with real workers; the loop itself is tested in test_train.py without Ray."""

import contextvars
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.images import paint
from tests.helpers.training import decided
from tests.helpers.workspaces import REPOSITORY, flip
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice.cases import CASES
from tlpipeline.data import dataset
from tlpipeline.errors import BackboneError, ClusterError, OutOfMemory, TrainingError
from tlpipeline.params import ClusterParams
from tlpipeline.progress import Event, silent
from tlpipeline.training import ray_train
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.distributed import LocalContext

TWO = ClusterParams(workers=2, gpu=False, max_failures=2, storage="none")
NICENESS = "RAY_worker_niceness"
HERE = ClusterParams(workers=0, gpu=False, max_failures=0, storage="none")


@pytest.fixture(scope="module")
def ray_runtime() -> Iterator[None]:
    """One local Ray runtime for the tests of this file."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")
    ray_train.runtime(2)
    yield
    ray_train.shutdown()


# Without dropout, so that two workers draw what one draws.
DECISION = replace(decided(CASES[2]), slice="conv3", readings=(TapPooling("conv3", 128, (1, 2)),))
EPOCHS = 12


@dataclass(frozen=True)
class Whole:
    """A run on two workers that nothing interrupted, what it told, and what makes the same job for another run."""

    finished: Path
    told: list[str]
    job: Callable[[str], TrainingConfig]


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

    def made(name: str) -> TrainingConfig:
        return TrainingConfig(
            workspace=str(place), images=str(place / "pictures"), manifest=str(place / "manifest.parquet"), backbone="demonstration",
            weights="DEFAULT", weights_md5="none", plan=DECISION.plan, seed=0, epochs=EPOCHS, batch_size=16,
            flip=False, precision="float32", history=str(place / f"{name}.jsonl"),
        )  # fmt: skip

    told: list[str] = []
    torn = place / "runs" / "whole" / "checkpoint_manager_snapshot.json"  # as a kill leaves it: a fit that reads it fails
    torn.parent.mkdir(parents=True)
    torn.write_text('{"checkpoint_results": [')
    finished = ray_train.run(made("whole"), TWO, "whole", place / "runs", lambda event: told.append(event.text))
    return Whole(finished, told, made)


def weights(finished: Path) -> dict[str, torch.Tensor]:
    return load_file(finished / "model" / "weights.safetensors")


def curve(finished: Path) -> list[dict[str, float]]:
    return json.loads((finished / "history.json").read_text())["history"]


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return curve(one) == curve(other) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_more_workers_than_cpus_fail_at_once(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"expected a CPU for each of 999 workers, found \d+\. Set cluster\.workers"):
        ray_train.run(job(decided(CASES[0])), replace(TWO, workers=999), "many", tmp_path / "runs", silent)
    assert time.monotonic() - started < 5


def test_gpus_that_are_not_there_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ClusterError, match=r"expected a GPU .* found 0.*cluster\.gpu to false"):
        ray_train.preflight(replace(TWO, gpu=True))


def test_what_a_joined_cluster_has_is_not_judged_by_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    assert ray_train.preflight(replace(TWO, workers=999)) is False
    assert ray_train.preflight(replace(TWO, workers=999, gpu=True)) is True
    with pytest.raises(ClusterError, match="expected a GPU for each of 1 workers, found 0"):
        ray_train.preflight(replace(HERE, gpu=True))  # who trains in this process has this machine alone


@pytest.mark.parametrize(("asked", "gpus", "found"), [("auto", 0, False), ("auto", 1, True), (False, 1, False), (True, 1, True)])
def test_gpus_are_used_where_there_are_some_unless_the_user_says_otherwise(
    asked: Any, gpus: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ray_train.preflight(replace(TWO, workers=1, gpu=asked)) is found
    if found:
        with pytest.raises(ClusterError, match=r"expected a GPU for each of 2 workers, found 1\. Set cluster\.workers to 1"):
            ray_train.preflight(replace(TWO, gpu=asked))


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
            ray_train.check_cluster(replace(TWO, gpu=asked), use_gpu)
    else:
        assert ray_train.check_cluster(replace(TWO, gpu=asked), use_gpu) is found


@pytest.mark.parametrize(
    ("content", "goes"),
    [
        ('{"checkpoint_results": [', True),
        ("[]", True),
        ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}', True),
        ('{"checkpoint_results": []}', False),
    ],
)
def test_a_torn_list_of_checkpoints_is_removed_with_what_it_lists(content: str, goes: bool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_manager_snapshot.json").write_text(content)
    ray_train.repair(tmp_path / "run")
    assert (tmp_path / "run").exists() is not goes


def test_a_full_disk_is_named_with_the_way_out() -> None:
    class Failed(Exception):
        def __init__(self, why: BaseException) -> None:
            self.worker_failures = {0: why}

    told = ray_train.translate_failure(Failed(RuntimeError("OSError: [Errno 28] No space left on device")), 1, "somewhere")
    assert isinstance(told, ClusterError)
    assert re.search(r"expected room for checkpoints in somewhere, found none .*the run resumes from it", str(told))
    quota = ray_train.translate_failure(Failed(RuntimeError("OSError: [Errno 122] Disk quota exceeded")), 1, "somewhere")
    assert "expected room for checkpoints in somewhere" in str(quota)
    assert "failed more often than cluster.max_failures (1)" in str(
        ray_train.translate_failure(Failed(RuntimeError("else")), 1, "somewhere")
    )


def test_an_error_of_ours_that_ray_wrapped_is_found_in_what_it_wrapped() -> None:
    class Failed(Exception):
        def __init__(self, why: BaseException) -> None:
            self.worker_failures = {0: RuntimeError("lost"), 1: why}

    ours = BackboneError("expected weights")
    for wrapped in (RuntimeError("a"), RuntimeError("b")):
        setattr(wrapped, "__cause__" if str(wrapped) == "a" else "__context__", ours)
        assert ray_train.translate_failure(Failed(wrapped), 1, "somewhere") is ours


def test_in_this_process_the_same_loop_runs_without_ray(job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    events: list[Event] = []
    mine = contextvars.ContextVar("mine", default="nobody's")
    mine.set("the caller's")
    seen: set[str] = set()

    def told(event: Event) -> None:
        events.append(event)
        seen.add(mine.get())

    finished = ray_train.run(job(decided(CASES[0])), HERE, "here", tmp_path / "runs", told)
    assert seen == {"the caller's"}  # Prefect's artifacts belong to the run that asks for them
    assert (finished / "model" / "model.json").is_file()
    assert any("validation accuracy" in e.text for e in events)


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_that_is_told_is_passed_on_whether_the_run_fails_or_not(
    fails: bool, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    made, told = job(decided(CASES[0])), []

    def speaks(*_: object) -> Path:
        Path(made.history).write_text('{"done": 1, "total": 2, "text": "the last word"}\n')
        if fails:
            raise TrainingError("expected it to converge")
        return tmp_path

    with pytest.raises(TrainingError) if fails else nullcontext():
        ray_train.run(made, HERE, "name", tmp_path / "runs", told.append, "choose", speaks)
    assert told == [Event("choose", 1, 2, "the last word")]


def test_a_run_in_this_process_has_a_place_of_its_own_and_begins_in_an_empty_one(
    job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    made, seen = job(decided(CASES[0])), []

    def looks(given: TrainingConfig, world: LocalContext, scratch: Path) -> Path:
        assert list(scratch.iterdir()) == []
        (scratch / "left").touch()  # as a kill leaves it
        seen.append(world.folder)
        assert scratch.is_relative_to(world.folder)
        return scratch

    for name in ("one", "one", "other"):
        ray_train.run(made, HERE, name, tmp_path / "runs", silent, loop=looks)
    assert [folder.name for folder in seen] == ["one", "one", "other"]


@pytest.mark.slow
@pytest.mark.ray
def test_workers_have_the_priority_of_who_starts_them(ray_runtime: None) -> None:
    """Ray's own is the lowest but for four: beside any other busy process they would stand still."""
    import ray

    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("token", ["", "another"])
def test_who_has_not_the_token_of_our_ray_runs_nothing_in_it(ray_runtime: None, tmp_path: Path, token: str) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    code = f"import ray; ray.init({address!r}, log_to_driver=False); print(ray.get(ray.remote(lambda: 'ran').remote()))"
    others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}
    if token:
        others |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = subprocess.run([sys.executable, "-c", code], env=others, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ran" not in done.stdout.split()
    assert f"Failed to connect to Ray cluster at {address}" in done.stderr
    assert ray.get(ray.remote(lambda: "ran").remote()) == "ran"


def test_two_ray_workers_give_the_model_that_one_process_gives(whole: Whole, tmp_path: Path) -> None:
    single = ray_train.run(whole.job("single"), HERE, "single", tmp_path / "runs", silent)
    assert weights(whole.finished).keys() == weights(single).keys()
    for key, value in weights(single).items():
        assert torch.allclose(weights(whole.finished)[key], value, atol=5e-3), key
    assert [(h["phase"], h["epoch"]) for h in curve(whole.finished)] == [(h["phase"], h["epoch"]) for h in curve(single)]
    assert curve(whole.finished)[0] == pytest.approx(curve(single)[0])
    assert [h["loss"] for h in curve(whole.finished)] == pytest.approx([h["loss"] for h in curve(single)], abs=2e-3)
    assert any("head solved" in text for text in whole.told)


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(whole: Whole, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one(event: Event) -> None:
        if f"epoch 2/{EPOCHS}" in event.text and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if any("RayTrainWorker" in part for part in p.cmdline())]
            killed.append(workers[-1].pid)
            os.kill(workers[-1].pid, signal.SIGKILL)

    resumed = ray_train.run(whole.job("resumed"), TWO, "resumed", tmp_path / "runs", kill_one)
    assert killed
    assert same(resumed, whole.finished)


@pytest.mark.slow
@pytest.mark.ray
def test_a_damaged_checkpoint_of_workers_is_passed_over_for_the_one_before_it(whole: Whole, tmp_path: Path) -> None:
    made, told = whole.job("damaged"), []
    ray_train.run(made, TWO, "damaged", tmp_path / "runs", silent)
    newest = max((tmp_path / "runs" / "damaged").glob("checkpoint_2*"))
    flip(newest / "model" / "weights.safetensors")
    again = ray_train.run(made, TWO, "damaged", tmp_path / "runs", told.append)
    assert same(again, whole.finished)
    [text] = [event.text for event in told if "is damaged" in event.text]
    assert "(model/weights.safetensors changed since it was written) and not used; continues from an earlier one" in text


@pytest.mark.slow
@pytest.mark.ray
def test_a_mistake_in_a_worker_reaches_the_user_as_what_it_is(
    ray_runtime: None,
    job: Callable[..., TrainingConfig],
    tmp_path: Path,
) -> None:
    broken = job(decided(CASES[0]), "broken", weights="gone.safetensors")
    with pytest.raises(BackboneError, match=r"gone\.safetensors"):
        ray_train.run(broken, replace(TWO, max_failures=1), "broken", tmp_path / "runs", silent)


def test_an_error_that_says_more_than_its_text_comes_back_whole(job: Callable[..., TrainingConfig]) -> None:
    made = job(decided(CASES[0]), "full")

    def full(*_: object) -> None:
        raise OutOfMemory("expected room", 8)

    with pytest.raises(OutOfMemory):
        ray_train.work(made, LocalContext(Path(made.workspace)), full)
    with pytest.raises(OutOfMemory, match=r"^expected room$") as error:
        ray_train.raise_worker_error(made)
    assert error.value.parts == 8


def test_a_worker_that_is_started_again_after_an_error_of_the_user_does_not_try_again(job: Callable[..., TrainingConfig]) -> None:
    made, tried = job(decided(CASES[0]), "diverges"), []

    def diverge(*_: object) -> None:
        tried.append(1)
        raise TrainingError("expected it to converge")

    context = LocalContext(Path(made.workspace))
    with pytest.raises(TrainingError):
        ray_train.work(made, context, diverge)
    ray_train.work(made, context, diverge)
    assert tried == [1]
    with pytest.raises(TrainingError, match="expected it to converge"):
        ray_train.raise_worker_error(made)
    ray_train.raise_worker_error(made)  # told once


def test_what_a_killed_worker_left_on_its_machine_is_removed_by_the_next_of_its_rank(
    job: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = job(decided(CASES[0]), "killed")

    def killed(rank: int) -> Path:
        with ray_train.worker_scratch(made, rank) as folder:
            (folder / "features").mkdir()
            kept = folder.with_name(f"{folder.name}-left")
            folder.rename(kept)  # as if the process had ended here
            folder.mkdir()
        return kept

    left = {rank: killed(rank) for rank in (0, 1)}
    other = ray_train.worker_scratch(replace(made, history=str(tmp_path / "other.jsonl")), 0)
    with ray_train.worker_scratch(made, 0) as mine, other:
        assert not left[0].exists()
        assert mine.is_dir()  # another run on the same machine lets it be
        assert left[1].is_dir()
    with ray_train.worker_scratch(made, 1):
        assert not left[1].exists()


# --- what Ray is asked for ------------------------------------------------------------------------------------------------------------


class Asked:
    """Stands for Ray: notes what it is asked for, and fits nothing."""

    def __init__(self) -> None:
        self.named: dict[str, Any] = {}
        self.started: list[dict[str, Any]] = []
        self.fits: Callable[[], Any] = lambda: SimpleNamespace(checkpoint=None)

    def trainer(self, loop: Any, **named: Any) -> Any:
        self.named = named
        return SimpleNamespace(fit=lambda: self.fits())

    def start(self, **named: Any) -> None:
        self.started.append(named)


def checkpoint(folder: Path, *names: str) -> Any:
    """A checkpoint of Ray's with these files."""
    from ray.train import Checkpoint

    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return SimpleNamespace(checkpoint=Checkpoint.from_directory(str(folder)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    import ray
    import ray.train.torch

    made = Asked()
    for key in [*ray_train.ENVIRONMENT, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", NICENESS]:
        monkeypatch.setenv(key, "1")  # so that it is as before afterwards
        monkeypatch.delenv(key)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", made.trainer)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", made.start)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return made


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine at which somebody answers."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"\0")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def joined(asked: Asked, port: int, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The same where RAY_ADDRESS names a cluster."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    return asked


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_fit_is_asked_for_as_the_settings_say(
    elsewhere: bool, asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    place = tmp_path / ("storage" if elsewhere else "runs")
    torn = place / "name" / "checkpoint_manager_snapshot.json"
    torn.parent.mkdir(parents=True)
    torn.write_text("{")
    cluster = ClusterParams(workers=3, gpu=False, max_failures=5, storage=str(place) if elsewhere else "none")
    made = job(decided(CASES[0]))
    with pytest.raises(ClusterError, match="they kept no checkpoint"):
        ray_train.run(made, cluster, "name", tmp_path / "runs", silent)
    assert not torn.exists()
    assert asked.named["train_loop_config"] == {"config": made, "loop": ray_train.train.run}
    kept, scale, group = asked.named["run_config"], asked.named["scaling_config"], asked.named["torch_config"]
    assert (kept.name, kept.storage_path, kept.failure_config.max_failures) == ("name", str(place), 5)
    assert kept.checkpoint_config.num_to_keep == 2  # or a long run fills the disk
    assert (scale.num_workers, scale.use_gpu) == (3, False)
    assert (group.backend, group.timeout_s) == ("gloo", 24 * 3600)  # the others wait while the first one solves a head
    assert kept.worker_runtime_env["env_vars"] == {
        "OMP_NUM_THREADS": "2",
        "PYTHONWARNINGS": "ignore",
        "OMP_WAIT_POLICY": "ACTIVE",
    }  # the user's own


@pytest.mark.parametrize(("workers", "threads"), [(1, "8"), (8, "1")])
def test_workers_of_one_machine_share_its_cpus_for_computing(
    workers: int, threads: str, asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    with pytest.raises(ClusterError):
        ray_train.run(job(decided(CASES[0])), replace(TWO, workers=workers), "name", tmp_path / "runs", silent)
    assert asked.named["run_config"].worker_runtime_env["env_vars"]["OMP_NUM_THREADS"] == threads


def test_workers_on_a_cluster_with_more_cpus_than_this_machine_compute_with_a_thread_each(
    joined: Asked, job: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(ClusterError, match="they kept no checkpoint"):
        ray_train.run(job(decided(CASES[0])), replace(TWO, workers=8), "name", tmp_path / "runs", silent)
    assert joined.named["run_config"].worker_runtime_env["env_vars"]["OMP_NUM_THREADS"] == "1"


def test_a_joined_cluster_that_has_gpus_trains_on_them(
    joined: Asked, job: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    with pytest.raises(ClusterError):
        ray_train.run(job(decided(CASES[0])), replace(TWO, gpu="auto"), "name", tmp_path / "runs", silent)
    assert joined.named["scaling_config"].use_gpu is True
    assert joined.named["torch_config"].backend == "nccl"


def test_a_joined_cluster_with_too_few_cpus_is_refused_with_the_way_out(
    joined: Asked, job: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match=r"expected 9 CPUs in the Ray cluster, found 8\. Set cluster\.workers to 8 or add nodes"):
        ray_train.run(job(decided(CASES[0])), replace(TWO, workers=9), "name", tmp_path / "runs", silent)
    assert not joined.named  # Ray would wait for ever


def test_a_cluster_is_joined_as_it_is(joined: Asked, port: int) -> None:
    ray_train.runtime(2)
    assert joined.started == [{"address": f"127.0.0.1:{port}", "log_to_driver": False, "logging_level": "ERROR"}]
    assert not [key for key in os.environ if key.startswith("RAY_AUTH")]


def test_a_cluster_that_does_not_answer_is_named_at_once_with_the_way_out(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would go on asking for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        ClusterError, match=rf"at RAY_ADDRESS={address}, but: .*refused\. Start it, or set RAY_ADDRESS to where it is, or unset"
    ):
        ray_train.runtime(2)
    assert not asked.started


def test_a_cluster_that_is_silent_is_named_with_the_way_out(asked: Asked, silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", silent_server)
    with pytest.raises(ClusterError, match=rf"at RAY_ADDRESS={silent_server}, but: timed out\. Start it"):
        ray_train.runtime(2)
    assert not asked.started


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("auto", ConnectionError("could not find any")),
        ("nonsense", ValueError("invalid address format")),
        ("ray://127.0.0.1:10001", ValueError("requires ray[client]")),
        ("127.0.0.1:PORT", RuntimeError("version mismatch")),
    ],
    ids=lambda value: str(value),
)
def test_a_cluster_that_ray_cannot_join_is_named_with_the_way_out(
    address: str, error: Exception, asked: Asked, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refused(**_: Any) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", address.replace("PORT", str(port)))
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(ClusterError, match=f"but: {re.escape(str(error))}. Start it, or set RAY_ADDRESS to where it is, or unset it"):
        ray_train.runtime(2)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_ray_of_ones_own_is_local_and_as_small_as_its_workers(workers: int, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv(NICENESS, "7")
    ray_train.runtime(workers)
    (started,) = asked.started
    assert (started["address"], started["num_cpus"], started["include_dashboard"]) == ("local", max(workers, 1), False)
    assert started["object_store_memory"] == 256 << 20
    assert os.environ[NICENESS] == "7"  # whoever has said it is heard
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    ray_train.runtime(workers)
    assert len(asked.started) == 1


@pytest.mark.parametrize("said", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_who_has_said_how_ray_admits_is_heard(asked: Asked, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(said, "x")
    ray_train.runtime(2)
    assert {key: value for key, value in os.environ.items() if key.startswith("RAY_AUTH")} == {said: "x"}


def test_what_the_user_has_said_to_ray_is_heard(
    asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1000")
    with pytest.raises(ClusterError):
        ray_train.run(job(decided(CASES[0])), TWO, "name", tmp_path / "runs", silent)
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "1000"
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"


# --- how a fit ends -------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_its_newest_checkpoint_and_nothing_of_an_earlier_one(
    asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    made = job(decided(CASES[0]))
    (tmp_path / "runs" / "name-finished" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "name-finished" / "model" / "earlier.json").write_text("{}")
    asked.fits = lambda: checkpoint(tmp_path / "newest", "model/model.json", "history.json")
    finished = ray_train.run(made, TWO, "name", tmp_path / "runs", silent)
    assert finished == tmp_path / "runs" / "name-finished"
    assert sorted(path.name for path in finished.rglob("*") if path.is_file()) == ["history.json", "model.json"]


def test_a_checkpoint_from_the_middle_is_the_end_of_a_race_and_of_nothing_else(
    asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    asked.fits = lambda: checkpoint(tmp_path / "middle", "state.json")
    with pytest.raises(ClusterError, match=r"newest checkpoint is from the middle\. Start the run again: it resumes"):
        ray_train.run(job(decided(CASES[0])), TWO, "name", tmp_path / "runs", silent)
    finished = ray_train.run(job(decided(CASES[0]), checkpoint_only=True), TWO, "name", tmp_path / "runs", silent)
    assert (finished / "state.json").is_file()


def test_an_interruption_that_ray_answers_is_one(asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray leaves a handler of its own
        raise SystemExit(0)

    asked.fits = interrupted
    with pytest.raises(KeyboardInterrupt):
        ray_train.run(job(decided(CASES[0])), TWO, "name", tmp_path / "runs", silent)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fit_may_be_started_from_any_thread(asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    asked.fits = lambda: checkpoint(tmp_path / "newest", "model/model.json")
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(ray_train.run, job(decided(CASES[0])), TWO, "name", tmp_path / "runs", silent).result()
    assert (finished / "model").is_dir()


def test_workers_without_room_begin_again_in_as_many_parts_as_they_ask_for(
    asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    made, tried, events = job(decided(CASES[0])), list[int](), list[Event]()

    def fits() -> Any:
        parts = asked.named["train_loop_config"]["config"].gradient_accumulation_steps
        tried.append(parts)
        if parts == 4:
            return checkpoint(tmp_path / "newest", "model/model.json")
        ray_train.error_file(made).write_text(json.dumps({"kind": "OutOfMemory", "values": ["expected room", 2 * parts]}))
        return SimpleNamespace(checkpoint=None)

    asked.fits = fits
    ray_train.run(made, TWO, "name", tmp_path / "runs", events.append)
    assert tried == [1, 2, 4]
    assert events[0] == Event("train", 0, 0, "starting 2 Ray workers, which takes about 10 s")  # longer than anyone likes to see nothing


@pytest.mark.parametrize("tried_again", [False, True])
def test_an_error_that_a_worker_wrote_down_is_raised_whether_ray_tried_again_or_not(
    tried_again: bool, asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    from ray.train import TrainingFailedError

    made = job(decided(CASES[0]))

    def fails() -> Any:
        ray_train.error_file(made).write_text('{"kind": "TrainingError", "values": ["expected room"]}')
        if tried_again:
            return SimpleNamespace(checkpoint=None)
        raise TrainingFailedError("only its text")

    asked.fits = fails
    with pytest.raises(TrainingError, match=r"^expected room$"):
        ray_train.run(made, TWO, "name", tmp_path / "runs", silent)
    assert not ray_train.error_file(made).exists()


def test_an_error_that_an_earlier_run_left_is_forgotten(asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    """A driver that was killed has not read it, and workers that find it do nothing."""
    made = job(decided(CASES[0]))
    ray_train.error_file(made).write_text('{"kind": "TrainingError", "values": ["expected it to converge"]}')
    asked.fits = lambda: checkpoint(tmp_path / "newest", "model/model.json")
    assert ray_train.run(made, TWO, "name", tmp_path / "runs", silent)
    assert not ray_train.error_file(made).exists()


def test_workers_that_failed_too_often_say_what_is_kept(asked: Asked, job: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    from ray.train import TrainingFailedError

    def fails() -> Any:
        raise TrainingFailedError("a worker died")

    asked.fits = fails
    with pytest.raises(ClusterError, match=r"max_failures \(2\) allows: a worker died\. What was trained is kept"):
        ray_train.run(job(decided(CASES[0])), TWO, "name", tmp_path / "runs", silent)


DRIVER = """
import json, sys
from pathlib import Path
from typing import Any
from tests.helpers.workspaces import REPOSITORY
from tests.helpers.training import config_of
from tlpipeline.params import ClusterParams
from tlpipeline.progress import silent
from tlpipeline.training import ray_train
spec = json.loads(Path(sys.argv[1]).read_text())
cluster = ClusterParams(workers=2, gpu=False, max_failures=2, storage="none")
print(ray_train.run(config_of(spec["job"]), cluster, spec["name"], Path(spec["runs"]), silent), flush=True)
ray_train.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_driver_loses_nothing(whole: Whole, tmp_path: Path) -> None:
    """Killed after the second epoch and started again, the run ends as the uninterrupted one, and goes on where it was."""
    script, spec, made = tmp_path / "driver.py", tmp_path / "spec.json", whole.job("killed")
    script.write_text(DRIVER)
    spec.write_text(json.dumps({"job": asdict(made), "name": "killed", "runs": str(tmp_path / "runs")}))
    told = Path(made.history)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), str(spec)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip

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
