"""The whole stack as it is deployed: a real Prefect server, a worker, the deployments of prefect.yaml, a schedule, and data that change.

These tests notice when a new FastAPI or SQLAlchemy breaks Prefect without a word (see pyproject.toml): deployments that are refused, schedules
that never make a run.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import pytest

from tests.helpers.images import paint
from tlpipeline.registry import versions
from tlpipeline.versioning import dvc

pytestmark = pytest.mark.server

DEADLINE = 180.0  # seconds for any one thing to happen: generous, a busy machine is no failure
Found = TypeVar("Found")


def clean(**more: str) -> dict[str, str]:
    """Return this process's environment without any setting of Prefect, so that nothing but `more` configures it."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "TLPIPELINE_LOCK"))}
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLI_COLORS": "false"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{ours.get('PATH', '')}"
    return ours | quiet | {"PATH": path} | more


def until(what: str, look: Callable[[], Found | None], log: Path | None = None) -> Found:
    """Return what `look` finds; fail with the end of a log where it finds nothing in time."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.25)
    raise AssertionError(f"waited {DEADLINE:.0f} s for {what}" + (f":\n{log.read_text()[-4000:]}" if log else ""))


@contextmanager
def process(words: list[str], log: Path, environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a session of its own; end it and all that it started."""
    with log.open("wb") as file:
        running = subprocess.Popen(words, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield running
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(running.pid, sign)
                running.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        running.wait()


def call(*words: str, environment: dict[str, str], folder: Path) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@dataclass(frozen=True)
class Server:
    """A running Prefect server: where its API is, and the environment that points to it."""

    api: str
    environment: dict[str, str]

    def post(self, path: str, **body: Any) -> Any:
        """Ask the REST API; nothing where it is not there (yet)."""
        try:
            answer = httpx.post(f"{self.api}{path}", json=body, timeout=30)
        except httpx.TransportError:
            return None
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def runs(self, deployment: str, *states: str) -> list[dict[str, Any]]:
        """Return the flow runs of a deployment in these states, in the order in which they were made."""
        wanted: dict[str, Any] = {"deployments": {"name": {"any_": [deployment]}}}
        if states:
            wanted["flow_runs"] = {"state": {"type": {"any_": list(states)}}}
        return sorted(self.post("/flow_runs/filter", **wanted) or [], key=lambda run: str(run["created"]))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Prefect server of our own on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    environment = clean(PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_UI_ENABLED="false")
    log = tmp_path / "server.log"
    words = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with process(words, log, environment, tmp_path) as running:

        def healthy() -> bool:
            assert running.poll() is None, log.read_text()
            try:
                return httpx.get(f"{api}/health").status_code == 200
            except httpx.TransportError:
                return False

        until("the server", healthy, log)
        yield Server(api, environment | {"PREFECT_API_URL": api})


def grow(workspace: Path) -> None:
    """Add 24 new images."""
    for label in range(3):
        for index in range(100, 108):
            paint(label, index).save(workspace / "images" / f"class{label}" / f"{index:03d}.png")


@pytest.mark.slow
def test_new_data_start_a_run_that_registers_a_version_and_the_same_data_do_not(workspace: Path, server: Server, tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tlpipeline.flows.retrain import announce

    server.post("/work_pools/", name="tlpipeline", type="process")
    log = tmp_path / "worker.log"
    words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "tlpipeline"]
    # Started elsewhere: where a run has to be, its deployment must say.
    with process(words, log, server.environment | {"PREFECT_WORKER_QUERY_SECONDS": "2"}, tmp_path):
        call("prefect", "--no-prompt", "deploy", "--all", environment=server.environment, folder=workspace)
        assert {d["name"] for d in server.post("/deployments/filter")} == {"workspace-nightly", "workspace-on-data"}

        grow(workspace)
        told = call("tlpipeline", "data", "commit", environment=server.environment, folder=workspace)
        assert "event tlpipeline.data.updated emitted" in told

        # A cron deployment really gets runs, and nobody started the other one but the event.
        ahead = until("scheduled runs", lambda: server.runs("workspace-nightly", "SCHEDULED"))
        assert all(run["auto_scheduled"] and run["expected_start_time"][11:19] == "03:00:00" for run in ahead)

        def ended(count: int) -> list[dict[str, Any]] | None:
            runs = server.runs("workspace-on-data", "COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            return runs if len(runs) == count else None

        (run,) = until("the run on new data", lambda: ended(1), log)
        assert (run["state_type"], run["name"]) == ("COMPLETED", "retrain-workspace"), log.read_text()[-4000:]
        (version,) = versions.versions(workspace, "workspace")
        assert version.number == (0, 1, 0)
        data = dvc.data_hash(workspace, "images")
        assert f"data {data}: 96 files" in told
        assert f"| data (DVC) | {data} |" in (workspace / "MODEL_CARD.md").read_text()

        # The same data once more: a run, and nothing else.
        with temporary_settings({PREFECT_API_URL: server.api}):
            announce("workspace", data, 96)
        again = until("the run on the same data", lambda: ended(2), log)[1]
        assert again["state_type"] == "COMPLETED", log.read_text()[-4000:]
        assert versions.versions(workspace, "workspace") == [version]


@pytest.mark.slow
def test_a_flow_runs_where_no_server_is_configured(registered: Path) -> None:
    # Prefect's own temporary server; the user's home is not touched, nor is a profile in it.
    home = registered.parent / "home"
    home.mkdir()
    said = call("tlpipeline", "run", environment=clean(HOME=str(home)), folder=registered)
    assert "workspace@v0.1.0 (unchanged)" in said
    assert (registered / "report.html").exists()
    assert (registered / ".tlpipeline" / "prefect" / "prefect.db").exists()
    assert not (home / ".prefect").exists()
    assert "Traceback" not in said


@pytest.mark.slow
def test_deploy_makes_what_is_missing_and_leaves_the_deployments_of_another_clone(workspace: Path, server: Server, tmp_path: Path) -> None:
    said = call("tlpipeline", "deploy", environment=server.environment, folder=workspace)
    assert "workspace-nightly, workspace-on-data. Work pool tlpipeline (new): no worker listens; start one: prefect worker start" in said
    assert {d["name"] for d in server.post("/deployments/filter")} == {"workspace-nightly", "workspace-on-data"}
    assert "Work pool tlpipeline: no worker listens" in call("tlpipeline", "deploy", environment=server.environment, folder=workspace)
    told = call("tlpipeline", "doctor", environment=server.environment, folder=workspace)
    assert "deployed, but no worker listens" in told

    clone = tmp_path / "clone"
    shutil.copytree(workspace, clone, symlinks=True)
    words = [sys.executable, "-m", "tlpipeline", "deploy"]
    refused = subprocess.run(words, cwd=clone, env=server.environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"runs in {workspace}: another clone deployed it" in refused.stderr
    assert "--take-over" in refused.stderr
    call("tlpipeline", "deploy", "--take-over", environment=server.environment, folder=clone)
    told = call("tlpipeline", "doctor", environment=server.environment, folder=workspace)
    assert f"runs in {clone}, not here" in " ".join(told.split())


@pytest.mark.slow
def test_one_process_serves_all_and_a_burst_of_events_makes_two_runs_at_most(workspace: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = clean()
    log = tmp_path / "serve.log"
    words = [sys.executable, "-m", "tlpipeline", "serve", "--port", str(port)]
    server = Server(f"http://127.0.0.1:{port}/api", environment | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"})
    with process(words, log, environment, workspace):
        until("the triggers", lambda: len(server.post("/deployments/filter") or []) == 2, log)
        until("somebody who listens", lambda: "somebody listens" in call_loosely("doctor", server, workspace), log)
        grow(workspace)
        call("tlpipeline", "data", "commit", environment=server.environment, folder=workspace)
        data = dvc.data_hash(workspace, "images")
        event = {
            "event": "tlpipeline.data.updated",
            "resource": {"prefect.resource.id": "tlpipeline.data.workspace"},
            "payload": {"hash": data},
        }
        for number in range(20):
            body = [{**event, "id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "payload": {"hash": data, "number": number}}]
            httpx.post(f"{server.api}/events", json=body, timeout=30).raise_for_status()

        def over() -> list[dict[str, Any]] | None:
            runs = server.runs("workspace-on-data")
            return (
                runs if len(runs) == 21 and all(r["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") for r in runs) else None
            )

        states = [run["state_type"] for run in until("the end of all runs", over, log)]
        assert 1 <= states.count("COMPLETED") <= 2, states
        assert states.count("CANCELLED") == 21 - states.count("COMPLETED"), states
    (version,) = versions.versions(workspace, "workspace")
    assert version.number == (0, 1, 0)
    assert f"| data (DVC) | {data} |" in (workspace / "MODEL_CARD.md").read_text()
    with socket.socket() as asking:
        assert asking.connect_ex(("127.0.0.1", port)) != 0, "the server ends with the process that started it"


def call_loosely(verb: str, server: Server, folder: Path) -> str:
    """Return what a command of ours printed, whatever its exit code."""
    words = [sys.executable, "-m", "tlpipeline", verb]
    return subprocess.run(words, env=server.environment, cwd=folder, capture_output=True, text=True, check=False).stdout
