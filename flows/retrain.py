"""The retraining flow. prefect.yaml deploys it to run every night, and whenever `tlpipeline data commit` reports changed data."""

import signal
import subprocess
from datetime import UTC
from functools import cache
from pathlib import Path
from uuid import UUID

from prefect import flow, get_client, runtime
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.server.api.server import SubprocessASGIServer
from prefect.states import Cancelled
from prefect.types import DateTime

from tlpipeline.errors import WorkspaceError
from tlpipeline.files import is_out_of_memory
from tlpipeline.tasks import pipeline
from tlpipeline.tasks.events import send
from tlpipeline.workspace.create import exclusive
from tlpipeline.workspace.release import Summary

UPDATED = "tlpipeline.data.updated"


def _run_name() -> str:
    return f"retrain-{Path(flow_run.parameters['workspace']).resolve().name}"


@flow(name="retrain", flow_run_name=_run_name, log_prints=False)
def retrain(workspace: Path = Path(), images: Path | None = None, wait_minutes: float = 0, labels: Path | None = None) -> Summary:
    """Version and profile the data, choose and train a case, evaluate the model, and register it if it is better.

    Args:
        workspace: a folder made by `tlpipeline init`.
        images: folder, or zip file of one, whose copy replaces the workspace's images first; None keeps them.
        wait_minutes: how long to wait for another run in this workspace.
        labels: table of labels whose copy replaces the workspace's with the images; None keeps it.
    """
    workspace = workspace.resolve()
    with exclusive(workspace, wait_minutes, images, labels):
        withdraw_waiting_runs()
        pipeline.version(workspace, images, labels)
        pipeline.stage(workspace, "ingest")
        pipeline.stage(workspace, "profile")
        pipeline.stage(workspace, "check")
        case = pipeline.choose(workspace)
        pipeline.train(workspace, case)
        pipeline.evaluate(workspace)
        verdict = pipeline.gate(workspace)
        registration = pipeline.register(workspace, verdict)
        return pipeline.report(workspace, registration)


def withdraw_waiting_runs() -> None:
    """Cancel the runs of this deployment that wait for this one: it takes the newest data, so they would find nothing to do.

    What is reported while this run goes on starts one more. So a burst of events makes two runs at most.
    """
    if not (deployment := runtime.deployment.id):
        return
    waiting = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[UUID(str(deployment))]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=DateTime.now(UTC)),
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=waiting):
            if str(run.id) != flow_run.id:
                reason = f"{flow_run.name} began later than this run was due, and takes the same data."
                client.set_flow_run_state(run.id, Cancelled(message=reason), force=True)


def reach() -> None:
    """Check that the Prefect server answers. If none is configured, Prefect starts a temporary one.

    Raises:
        WorkspaceError: it does not start, or does not answer.
    """
    # A terminal sends Ctrl-C, and SIGHUP when it is closed, to every process of the run. The temporary server inherits this mask, so it
    # still accepts the report of the interruption; Prefect would retry for minutes to reach a dead server.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        client = get_client(sync_client=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise WorkspaceError(
            f"expected Prefect's temporary server to start, but: {' '.join(str(error).split()).rstrip('.')[:300]}. Run again when the machine is less busy, "
            "set PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more than 120, or start a server (`prefect server start`) and set PREFECT_API_URL."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if server := SubprocessASGIServer().server_process:
        _end_with_this_process(server.pid)
    with client:
        if refused := client.api_healthcheck():
            raise WorkspaceError(
                f"Cannot reach a Prefect server at {client.api_url}: {refused}. Start it (`prefect server start`), or unset PREFECT_API_URL "
                "to run without one."
            ) from refused


@cache
def _end_with_this_process(server: int) -> "subprocess.Popen[bytes]":
    """Have Prefect's temporary server ended even if this process is killed: a shell waits for the end of a pipe that dies with it."""
    wait = 'read -r _; grep -aq prefect.server "/proc/$0/cmdline" && kill "$0"'
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(["sh", "-c", wait, str(server)], stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True)


def announce(name: str, data_hash: str, images: int) -> None:
    """Report changed data to the Prefect server, whose on-data deployment then starts a run.

    Raises:
        WorkspaceError: the server cannot be reached, or refuses the event.
    """
    way_out = "The data are versioned. Start the server, or unset PREFECT_API_URL, and run `tlpipeline data commit` again."
    send(UPDATED, f"tlpipeline.data.{name}", {"hash": data_hash, "images": images}, way_out)
