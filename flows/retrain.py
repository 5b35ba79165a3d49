"""The retraining flow. Deployed by prefect.yaml: every night, and when `tlpipeline data commit` says that data have changed."""

from pathlib import Path

from prefect import flow
from prefect.events import emit_event

from tasks import pipeline
from tlpipeline.acts import Summary, alone

UPDATED = "tlpipeline.data.updated"


@flow(name="retrain", flow_run_name="retrain-{workspace}", log_prints=False)
def retrain(workspace: Path = Path(), images: Path | None = None, wait_minutes: float = 0) -> Summary:
    """Version the data, profile them, choose and train their case, evaluate, and register the model if it is really better.

    Args:
        workspace: a folder made by `tlpipeline init`.
        images: a folder that replaces the workspace's images first.
        wait_minutes: how long to wait for another run in the same workspace.
    """
    workspace = workspace.resolve()
    with alone(workspace, wait_minutes):
        pipeline.version(workspace, images)
        pipeline.stage(workspace, "ingest")
        pipeline.stage(workspace, "profile")
        case = pipeline.choose(workspace)
        pipeline.train(workspace, case)
        pipeline.evaluate(workspace)
        verdict = pipeline.gate(workspace)
        registration = pipeline.register(workspace, verdict)
        return pipeline.report(workspace, registration)


def announce(name: str, data_hash: str, images: int) -> None:
    """Tell the Prefect server that a data set has changed; the on-data deployment starts a run, which reads the data as they are then."""
    emit_event(
        event=UPDATED,
        resource={"prefect.resource.id": f"tlpipeline.data.{name}"},
        payload={"hash": data_hash, "images": images},
    )
