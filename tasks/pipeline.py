"""The tasks of the pipeline. They are called, not submitted: only training in the main thread can be interrupted."""

import time
from contextvars import ContextVar
from pathlib import Path
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from tlpipeline.errors import Unreachable
from tlpipeline.evaluation.verdict import Verdict
from tlpipeline.progress import Event, Progress, silent
from tlpipeline.registry.versions import Registration
from tlpipeline.tasks.events import send
from tlpipeline.versioning.lock import recording
from tlpipeline.workspace import create, history, layout, release, stages, starting
from tlpipeline.workspace.pinning import pin, pinned_data

# Receives the progress of all stages: the command line sets its progress bar here.
listener: ContextVar[Progress] = ContextVar("listener", default=silent)
SECONDS = 1.0  # between two updates of a progress artifact


class _ProgressArtifact:
    """A progress artifact in the Prefect UI for one stage, created by its first event and updated at most once a second."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.id: UUID | None = None
        self.forward = listener.get()
        self.shown: tuple[int, str] = (-1, "")
        self.latest = self.shown
        self.next_update = 0.0

    def __call__(self, event: Event) -> None:
        self.forward(event)
        self.latest = (int(100 * event.done / event.total) if event.total else 0, event.text)
        if self.id is None and event.done >= event.total:
            return  # a stage with a single step is shown at its end
        if time.monotonic() >= self.next_update:  # each update is a request, so not one per image
            self.show(*self.latest)

    def show(self, percent: int, text: str) -> None:
        """Set the bar."""
        if self.id is None:
            artifact = create_progress_artifact(progress=float(percent), key=self.key, description=text)
            assert isinstance(artifact, UUID)  # it is a coroutine only in an async caller
            self.id = artifact
        elif (percent, text) != self.shown:
            update_progress_artifact(self.id, progress=float(percent), description=text)
        self.shown = (percent, text)
        self.next_update = time.monotonic() + SECONDS

    def end(self, ran: bool) -> None:
        """Complete the bar: a stage may end before its count does, or without any event."""
        self.show(100, (self.latest[1] or "done") if ran else "up to date")


def _follow(workspace: Path, name: str, key: str) -> bool:
    """Bring a stage up to date with a progress bar; return whether it ran."""
    bar = _ProgressArtifact(key)
    ran = stages.bring_up_to_date(workspace, name, bar, pinned_data(workspace))
    bar.end(ran)
    return ran


def _is_unreachable(task, run, state) -> bool:  # type: ignore[no-untyped-def]
    """Retry only if a remote could not be reached: other errors would repeat."""
    return isinstance(state.result(raise_on_failure=False), Unreachable)


@task(task_run_name="version", retries=2, retry_delay_seconds=10, retry_condition_fn=_is_unreachable)
def version(workspace: Path, images: Path | None, labels: Path | None = None) -> str:
    """Version the images as they are now, which the run keeps from here on; return the hash of the data set."""
    with recording(workspace):
        if images is not None:
            create.replace_images(workspace, images, labels, listener.get())
        digest, remarks = create.commit_data(workspace, push_again=False)
        pin(workspace)
    if changed := create.record_code(workspace):
        remarks.append(changed)
    for remark in remarks:
        listener.get()(Event("version", 1, 1, remark))
    return digest


@task(task_run_name="{name}")
def stage(workspace: Path, name: str) -> bool:
    """Bring a stage up to date; return whether it ran."""
    return _follow(workspace, name, name)


@task(task_run_name="choose")
def choose(workspace: Path) -> str:
    """Decide the case, with a race if the evidence is unclear; return its name."""
    bar = _ProgressArtifact("race")
    history.record_former(workspace, pinned_data(workspace))
    ran = stages.bring_up_to_date(workspace, "choose", bar, pinned_data(workspace))
    if bar.id is not None:  # a decision without a race needs no bar
        bar.end(ran)
    create_markdown_artifact(release.decision_markdown(workspace), key="decision", description="Which case, and why")
    return str(layout.read_case(workspace).case)


@task(task_run_name="train-{case}")
def train(workspace: Path, case: str) -> bool:
    """Train the case; return whether it had to run."""
    starting.record(workspace)
    return _follow(workspace, "train", "training")


@task(task_run_name="evaluate")
def evaluate(workspace: Path) -> float:
    """Measure the model on the test split; return its accuracy."""
    _follow(workspace, "evaluate", "evaluate")
    create_markdown_artifact(release.evaluation_markdown(workspace), key="evaluation", description="Metrics on the held-out test side")
    return layout.read_metrics(workspace).accuracy


@task(task_run_name="gate")
def gate(workspace: Path) -> Verdict | None:
    """Compare with the champion on the same test images; return the verdict, or None if the model is already registered."""
    with stages.timed(workspace, "gate"):
        verdict = release.evaluate_gate(workspace, listener.get(), pinned_data(workspace))
    text = release.verdict_markdown(workspace, verdict)
    create_markdown_artifact(text, key="verdict", description=f"The gate: {verdict.outcome if verdict else 'judged before'}")
    return verdict


@task(task_run_name="register", retries=2, retry_delay_seconds=10, retry_condition_fn=_is_unreachable)
def register(workspace: Path, verdict: Verdict | None) -> Registration:
    """Register the model if the gate accepted it or left it undecided; report the verdict as an event."""
    with stages.timed(workspace, "register"):
        registration = release.register(workspace, verdict, pinned_data(workspace))
    if verdict is not None:
        payload = verdict.to_json() | {"version": registration.version, "promoted": registration.promoted}
        name = layout.params_of(workspace).data.name
        send(f"tlpipeline.gate.{verdict.outcome}", f"tlpipeline.model.{name}", payload, "The run is recorded; only the event is missing.")
    return registration


@task(task_run_name="report")
def report(workspace: Path, registration: Registration) -> release.Summary:
    """Write report.html; return the summary of the run."""
    with stages.timed(workspace, "report"):
        changes = history.diff_of_run(workspace, registration.verdict.champion) if registration.verdict else None
        path = release.write_report(workspace, registration, changes, pinned_data(workspace))
    return release.summary(workspace, registration, path, changes)
