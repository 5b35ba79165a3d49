"""The training loop as one Ray Train job, or in this process (`workers: 0`). No other file imports Ray.

Ray is used for four things: the rank, saving a checkpoint, the newest checkpoint, and starting the workers.

No GPU has run this yet: NCCL is chosen on GPUs and gloo on CPUs, and only gloo is tested.
"""

import contextvars
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tlpipeline import errors
from tlpipeline.backbones.precision import enable_tf32
from tlpipeline.data.decoding import available_cpus
from tlpipeline.environment import patience, thread_waiting
from tlpipeline.errors import ClusterError, OutOfMemory, PipelineError
from tlpipeline.files import DISK_FULL, write_json
from tlpipeline.params import AUTO, ClusterParams
from tlpipeline.progress import Event, Progress
from tlpipeline.training import train
from tlpipeline.training.checkpoint import MODEL
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.distributed import DistributedContext, LocalContext
from tlpipeline.training.progress import ProgressReader

Loop = Callable[[TrainingConfig, DistributedContext, Path], Path | None]

# The other workers wait while the first one solves a head, which may take longer than Ray's half hour. Ray itself notices dead workers.
_PATIENCE = 24 * 3600
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # how HTTP/2 begins, which Ray speaks
_OBJECT_STORE = 256 * 2**20  # images never pass through Ray
# Read when Ray Train is first used. A short poll ends each fit up to two seconds earlier; the preemption watcher has no use on one machine.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def preflight(cluster: ClusterParams) -> bool:
    """Check that the workers fit, before anything starts; return whether they use GPUs.

    Raises:
        ClusterError: more workers than this machine has CPUs or GPUs, or GPUs are asked for and there are none. Ray itself would wait for ever.
    """
    gpus = torch.cuda.device_count()
    use_gpu = gpus > 0 if cluster.gpu == AUTO else bool(cluster.gpu)
    if os.environ.get("RAY_ADDRESS") and cluster.workers:
        return use_gpu  # other machines' resources: the cluster is asked, once it was joined
    if use_gpu and gpus < max(cluster.workers, 1):
        raise ClusterError(
            f"expected a GPU for each of {max(cluster.workers, 1)} workers, found {gpus}. Set cluster.workers to {gpus}, or cluster.gpu to false."
        )
    there = available_cpus()
    if cluster.workers > there:
        raise ClusterError(
            f"expected a CPU for each of {cluster.workers} workers, found {there}. Set cluster.workers to {there} or less, "
            "or RAY_ADDRESS to a cluster that has more."
        )
    return use_gpu


def run(
    config: TrainingConfig,
    cluster: ClusterParams,
    name: str,
    folder: Path,
    progress: Progress,
    stage: str = "train",
    loop: Loop = train.run,
) -> Path:
    """Train, and return the folder of the finished run: `model/` and `history.json`; of a job that is `checkpoint_only` its checkpoint.

    Args:
        config: what to train.
        cluster: where.
        name: identifies data, params and code; a run of the same name that was interrupted is resumed.
        folder: for everything that the run leaves behind; delete it once the result is recorded.
        progress: receives the first worker's progress as events of this stage.
        loop: what each worker runs.

    Raises:
        ClusterError: the workers are not there, or died more often than `max_failures`.
        PipelineError: whatever the loop itself raises.
    """
    use_gpu = preflight(cluster)
    folder.mkdir(parents=True, exist_ok=True)
    tail = ProgressReader(Path(config.history), stage, progress)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(0.2):
            tail()

    # In the caller's context: the receiver of the progress may ask which run it belongs to.
    follower = threading.Thread(target=contextvars.copy_context().run, args=(follow,), daemon=True)
    follower.start()
    try:
        if cluster.workers == 0:
            return _in_process(config, use_gpu, folder / name, loop)
        progress(Event(stage, 0, 0, f"starting {cluster.workers} Ray worker{'s' * (cluster.workers > 1)}, which takes about 10 s"))
        while True:
            try:
                return _on_workers(config, cluster, use_gpu, name, folder, loop)
            except OutOfMemory as full:
                # All workers must take equally many parts, so all restart from the last checkpoint.
                config = replace(config, gradient_accumulation_steps=full.parts)
    finally:
        stop.set()
        follower.join()
        tail()


def _in_process(config: TrainingConfig, use_gpu: bool, folder: Path, loop: Loop) -> Path:
    device = enable_tf32(torch.device("cuda" if use_gpu else "cpu"))
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    finished = loop(config, LocalContext(folder, device), scratch)
    assert finished is not None
    return finished


# --- Ray ------------------------------------------------------------------------------------------------------------------------------


class _RayContext:
    """A Ray Train worker as a DistributedContext."""

    def __init__(self) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self.device = enable_tf32(ray.train.torch.get_device())
        self.syncs_batch_norm = self.device.type == "cuda"

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        import ray.train

        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None)

    @contextmanager
    def restore(self) -> Iterator[Sequence[Path]]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield []
        else:
            with checkpoint.as_directory() as folder:
                newest = Path(folder)
                # Ray names checkpoints by their time. Those of a URL are copied one by one, to a folder without others.
                yield [newest, *sorted((p for p in newest.parent.glob("checkpoint_*") if p.name < newest.name), reverse=True)]


def _loop(loop_config: dict[str, Any]) -> None:
    work(loop_config["config"], _RayContext(), loop_config["loop"])


def work(config: TrainingConfig, context: DistributedContext, loop: Loop = train.run) -> None:
    """Run the training loop as one worker; write down an error that only the user can correct, so that a restarted worker does not meet it again."""
    if error_file(config).exists():
        return
    with worker_scratch(config, context.rank) as scratch:
        try:
            loop(config, context, scratch)
        except PipelineError as error:
            write_json({"kind": type(error).__name__, "values": list(error.args)}, error_file(config))
            raise


@contextmanager
def worker_scratch(config: TrainingConfig, rank: int) -> Iterator[Path]:
    """Give a worker a temporary folder on its machine, and first remove that of a killed worker of this rank and run."""
    run = hashlib.md5(config.history.encode(), usedforsecurity=False).hexdigest()[:12]
    prefix = f"tlpipeline-{run}-{rank}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


def error_file(config: TrainingConfig) -> Path:
    """Return the file in which a worker reports an error. Ray passes on only its text, and restarts workers after any error."""
    return Path(config.history).with_suffix(".error.json")


def raise_worker_error(config: TrainingConfig) -> None:
    """Raise the error that a worker wrote down, once."""
    path = error_file(config)
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        raise getattr(errors, content["kind"])(*content["values"])


def _on_workers(config: TrainingConfig, cluster: ClusterParams, use_gpu: bool, name: str, folder: Path, loop: Loop) -> Path:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    with _interruptible():
        runtime(cluster.workers)
        use_gpu = check_cluster(cluster, use_gpu)
        storage = cluster.storage if cluster.storage != "none" else str(folder.resolve())
        repair(Path(storage) / name)
        threads = max(1, available_cpus() // cluster.workers)
        waiting = {key: os.environ[key] for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if key in os.environ} | thread_waiting(os.environ)
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"config": config, "loop": loop},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=_PATIENCE),
            scaling_config=ray.train.ScalingConfig(num_workers=cluster.workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"} | waiting},
            ),
        )
        error_file(config).unlink(missing_ok=True)
        try:
            result = trainer.fit()
        except SystemExit as stopped:
            raise KeyboardInterrupt from stopped  # Ray's own answer to Ctrl-C
        except ray.train.TrainingFailedError as error:
            raise_worker_error(config)
            raise translate_failure(error, cluster.max_failures, storage) from error
    raise_worker_error(config)
    if result.checkpoint is None:
        raise ClusterError(
            "expected a trained model from the workers, but they kept no checkpoint. Run again with fewer workers to see why."
        )
    finished = folder / f"{name}-finished"
    shutil.rmtree(finished, ignore_errors=True)
    result.checkpoint.to_directory(str(finished))
    if not config.checkpoint_only and not (finished / MODEL).is_dir():
        raise ClusterError(
            "expected a finished model from the workers, but the newest checkpoint is from the middle. Start the run again: it resumes."
        )
    return finished


def repair(folder: Path) -> None:
    """Remove a run if Ray's list of its checkpoints is damaged: the run starts again, and ends the same.

    Ray writes the list in place. If it is killed or the disk is full just then, a part is left, which no further run of this name could read.
    """
    path = folder / "checkpoint_manager_snapshot.json"
    if path.exists():
        try:
            names = [str(result["checkpoint_dir_name"]) for result in json.loads(path.read_text(encoding="utf-8"))["checkpoint_results"]]
        except (ValueError, TypeError, KeyError):
            names = [""]
        if not all(name and (folder / name).is_dir() for name in names):
            shutil.rmtree(folder)


def runtime(workers: int) -> None:
    """Start Ray quietly on this machine, or join the cluster at RAY_ADDRESS; at most one runtime in a process."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            _check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError, OverflowError) as error:
            raise ClusterError(
                f"expected a Ray cluster at RAY_ADDRESS={address}, but: {error}. Start it, or set RAY_ADDRESS to where it is, or unset it."
            ) from error
        return
    # Ray listens on all interfaces, and runs what it is sent. With a token only this process and those that it starts can send something.
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray's default is 15: beside any other busy process its workers would get a twentieth of a processor. On a cluster its owner decides.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(workers, 1),
        object_store_memory=_OBJECT_STORE,
        log_to_driver=False,
        logging_level="ERROR",
    )


def _check_reachable(address: str) -> None:
    """Check that somebody answers at a host and port; Ray would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if "/" not in address and host and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=patience()) as caller:
            caller.sendall(_GREETING)
            caller.recv(1)  # a Ray with TLS refuses this, which is an answer, too


def require_reachable(address: str) -> None:
    """Check that a cluster answers.

    Raises:
        ClusterError: it does not.
    """
    try:
        _check_reachable(address)
    except OSError as error:
        raise ClusterError(
            f"expected a Ray cluster at RAY_ADDRESS={address}, but: {error}. Start it, or set RAY_ADDRESS to where it is, or unset it."
        ) from error


def shutdown() -> None:
    """Stop or leave the Ray runtime, if this process has one."""
    import sys

    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def check_cluster(cluster: ClusterParams, use_gpu: bool) -> bool:
    """Check that the cluster has what the workers need; return whether they use GPUs. In a joined cluster `auto` uses them if it has enough."""
    import ray

    has = ray.cluster_resources()
    if cluster.gpu == AUTO and os.environ.get("RAY_ADDRESS"):
        use_gpu = has.get("GPU", 0) >= cluster.workers
    kind = "GPU" if use_gpu else "CPU"
    there = int(has.get(kind, 0))
    if there < cluster.workers:
        raise ClusterError(
            f"expected {cluster.workers} {kind}s in the Ray cluster, found {there}. Set cluster.workers to {there} or add nodes."
        )
    return use_gpu


def translate_failure(error: Any, allowed: int, storage: str) -> PipelineError:
    """Return the error for the user that a failed Ray run stands for: ours if a worker raised one, else a ClusterError.

    Args:
        allowed: how many failures `cluster.max_failures` allows.
        storage: where the checkpoints lie, named where the disk is full.
    """
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, PipelineError):
                return cause
            cause = cause.__cause__ or cause.__context__
        # Ray hands user exceptions on as text where they cannot be rebuilt.
    first = next(iter(failures.values()), error)
    if any(f"rrno {code}]" in str(first) for code in DISK_FULL):  # of a worker only text comes back
        return ClusterError(
            f"expected room for checkpoints in {storage}, found none ({str(first)[-300:]}). The last complete checkpoint is kept: "
            "free some space there, or on the workers' temporary folders, and run again; the run resumes from it."
        )
    return ClusterError(
        f"expected the workers to finish, but they failed more often than cluster.max_failures ({allowed}) allows: {str(first)[-1500:]}. "
        "What was trained is kept: the next run resumes from the last checkpoint."
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Restore the handler of Ctrl-C: `fit` installs its own in the main thread and leaves it there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
