"""The tasks of the pipeline. Called directly, never submitted: training must run in the main thread, where it can be interrupted."""

import time
from contextvars import ContextVar
from pathlib import Path
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from tlpipeline.errors import Unreachable
from tlpipeline.progress import Event, Progress, silent
from tlpipeline.workspace import create, layout, release, stages

# Whoever starts a flow in this process may listen: the command line sets its progress bar here.
listener: ContextVar[Progress] = ContextVar("listener", default=silent)
SECONDS = 1.0  # between two updates of a progress artifact


class _Bar:
    """A progress artifact in the Prefect UI that follows the events of a stage, made by the first and updated once a second at most."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.id: UUID | None = None
        self.told = listener.get()
        self.shown: tuple[int, str] = (-1, "")
        self.wanted = self.shown
        self.next = 0.0

    def __call__(self, event: Event) -> None:
        self.told(event)
        self.wanted = (int(100 * event.done / event.total) if event.total else 0, event.text)
        if self.id is None and event.done >= event.total:
            return  # what is done at once is shown when it has ended
        if time.monotonic() >= self.next:  # each update is a request, which an image should not wait for
            self.show(*self.wanted)

    def show(self, percent: int, text: str) -> None:
        """Set the bar."""
        if self.id is None:
            artifact = create_progress_artifact(progress=float(percent), key=self.key, description=text)
            assert isinstance(artifact, UUID)  # a coroutine only where the caller is one
            self.id = artifact
        elif (percent, text) != self.shown:
            update_progress_artifact(self.id, progress=float(percent), description=text)
        self.shown = (percent, text)
        self.next = time.monotonic() + SECONDS

    def end(self, ran: bool) -> None:
        """Fill the bar: a stage may end before its count does, or without a word where a race has done its work."""
        self.show(100, (self.wanted[1] or "done") if ran else "up to date")


def _follow(workspace: Path, name: str, key: str) -> bool:
    """Bring a stage up to date under a bar; return whether it ran."""
    bar = _Bar(key)
    ran = stages.bring_up_to_date(workspace, name, bar)
    bar.end(ran)
    return ran


def _broken(task, run, state) -> bool:  # type: ignore[no-untyped-def]
    """Retry only what can succeed the second time: a remote that could not be reached."""
    return isinstance(state.result(raise_on_failure=False), Unreachable)


@task(task_run_name="version", retries=2, retry_delay_seconds=10, retry_condition_fn=_broken)
def version(workspace: Path, images: Path | None) -> str:
    """Version the images as they are now; return the hash of the data set."""
    if images is not None:
        create.replace_images(workspace, images)
    digest, remarks = create.commit_data(workspace)
    for remark in remarks:
        listener.get()(Event("version", 1, 1, remark))
    return digest


@task(task_run_name="{name}")
def stage(workspace: Path, name: str) -> bool:
    """Bring a stage up to date; return whether it ran."""
    return _follow(workspace, name, name)


@task(task_run_name="choose")
def choose(workspace: Path) -> str:
    """Decide the case, by a race where the evidence leaves it open; return its name."""
    race = _Bar("race")
    ran = stages.bring_up_to_date(workspace, "choose", race)
    if race.id is not None:  # a decision without a race needs no bar
        race.end(ran)
    create_markdown_artifact(release.decision_markdown(workspace), key="decision", description="Which case, and why")
    return str(layout.read_case(workspace).case)


@task(task_run_name="train-{case}")
def train(workspace: Path, case: str) -> bool:
    """Train the case as one Ray Train job; return whether it had to."""
    return _follow(workspace, "train", "training")


@task(task_run_name="evaluate")
def evaluate(workspace: Path) -> float:
    """Measure the model on the test side; return its accuracy."""
    _follow(workspace, "evaluate", "evaluate")
    create_markdown_artifact(release.evaluation_markdown(workspace), key="evaluation", description="Metrics on the held-out test side")
    return float(layout.read_json(workspace, layout.METRICS)["accuracy"])


@task(task_run_name="gate")
def gate(workspace: Path) -> object:
    """Compare with the champion on the same test images; return the verdict, or nothing for a model that is registered already."""
    with stages.timed(workspace, "gate"):
        return release.evaluate_gate(workspace, listener.get())


@task(task_run_name="register", retries=2, retry_delay_seconds=10, retry_condition_fn=_broken)
def register(workspace: Path, verdict: object) -> release.Registration:
    """Register the model where the gate accepted it."""
    with stages.timed(workspace, "register"):
        return release.register(workspace, verdict)  # type: ignore[arg-type]


@task(task_run_name="report")
def report(workspace: Path, registration: release.Registration) -> release.Summary:
    """Write report.html; return what the run ended with."""
    with stages.timed(workspace, "report"):
        path = release.write_report(workspace, registration)
    return release.summary(workspace, registration, path)
