"""The retraining flow. Deployed by prefect.yaml: every night, and when `tlpipeline data commit` says that data have changed."""

import signal
from pathlib import Path

import httpx
from prefect import flow, get_client
from prefect.events import Event, Resource
from prefect.runtime import flow_run

from tlpipeline.errors import WorkspaceError
from tlpipeline.tasks import pipeline
from tlpipeline.workspace.create import exclusive
from tlpipeline.workspace.release import Summary

UPDATED = "tlpipeline.data.updated"


def _run_name() -> str:
    return f"retrain-{Path(flow_run.parameters['workspace']).resolve().name}"


@flow(name="retrain", flow_run_name=_run_name, log_prints=False)
def retrain(workspace: Path = Path(), images: Path | None = None, wait_minutes: float = 0) -> Summary:
    """Version the data, profile them, choose and train their case, evaluate, and register the model if it is really better.

    Args:
        workspace: a folder made by `tlpipeline init`.
        images: a folder that replaces the workspace's images first.
        wait_minutes: how long to wait for another run in the same workspace.
    """
    workspace = workspace.resolve()
    with exclusive(workspace, wait_minutes, images):
        pipeline.version(workspace, images)
        pipeline.stage(workspace, "ingest")
        pipeline.stage(workspace, "profile")
        case = pipeline.choose(workspace)
        pipeline.train(workspace, case)
        pipeline.evaluate(workspace)
        verdict = pipeline.gate(workspace)
        registration = pipeline.register(workspace, verdict)
        return pipeline.report(workspace, registration)


def reach() -> None:
    """Check that the Prefect server answers; where none is configured, Prefect starts its temporary one for it.

    Raises:
        WorkspaceError: it does not.
    """
    # A terminal sends Ctrl-C, and SIGHUP where it is closed, to every process of the run. The temporary server inherits this mask and stays
    # to be told that the run was interrupted: Prefect asks a dead one again and again, for minutes.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        client = get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with client:
        if error := client.api_healthcheck():
            raise WorkspaceError(
                f"expected a Prefect server at {client.api_url}, but: {error}. Start it (`prefect server start`), or unset PREFECT_API_URL "
                "to run without one."
            ) from error


def announce(name: str, data_hash: str, images: int) -> None:
    """Tell the Prefect server that a data set has changed; the on-data deployment starts a run, which reads the data as they are then.

    Sent as a request that is answered: an event that is only queued is lost without a word where the server is down.

    Raises:
        WorkspaceError: the server cannot be reached, or refuses.
    """
    event = Event(
        event=UPDATED, resource=Resource({"prefect.resource.id": f"tlpipeline.data.{name}"}), payload={"hash": data_hash, "images": images}
    )
    with get_client(sync_client=True) as client:
        try:
            client.request("POST", "/events", json=[event.model_dump(mode="json")]).raise_for_status()
        except httpx.HTTPError as error:
            raise WorkspaceError(
                f"expected a Prefect server at {client.api_url} to tell that the data have changed, but: {error}. The data are versioned all "
                "the same; start the server, or unset PREFECT_API_URL, and run `tlpipeline data commit` again."
            ) from error
