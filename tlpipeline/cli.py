"""The command line: verbs, printing, exit codes. What a user may turn is in params.yaml, not here.

Heavy imports (torch, ray, prefect, dvc) happen inside the functions: `tlpipeline --help` needs none of them.
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tlpipeline.errors import DataError, PipelineError
from tlpipeline.files import is_disk_full, is_out_of_memory, is_permission_error
from tlpipeline.progress import Event

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Version the images.")
registry = typer.Typer(no_args_is_help=True, help="List, show, promote and roll back registered models.")
cache = typer.Typer(no_args_is_help=True, help="See and empty the cache of features and decoded images.")
app.add_typer(data, name="data")
app.add_typer(registry, name="registry")
app.add_typer(cache, name="cache")

_INTERRUPTED = 130
_KEPT = "interrupted; checkpoints are kept, and the next run goes on from the last one"

Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")]


def main() -> None:
    """Run a command; a mistake that the user can mend is one message and exit code 2, Ctrl-C is 130."""
    try:
        code = app(standalone_mode=False)
    except PipelineError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except OSError as error:
        if is_disk_full(error):
            _say(f"error: expected room on the disk, found none: {error}. Nothing half-written is used; free some space and run again.")
        elif is_permission_error(error):
            _say(f"error: expected to be allowed to use a file or folder, but: {error}. Change its rights or its owner, and run again.")
        else:
            raise
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the parser's own: wrong or missing arguments
            _say(f"error: {error.format_message()}")
            sys.exit(error.exit_code)
        if is_out_of_memory(error):
            _say(f"error: expected memory to compute in, found too little: {error}. Set data.size lower, or run where there is more.")
            sys.exit(2)
        raise
    if code == _INTERRUPTED:  # what the parser makes of Ctrl-C
        _say(_KEPT)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _ends_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the body as Ctrl-C does, with all that it started: Prefect's temporary server would stay behind.

    Raises:
        SystemExit: one came; with 128 and its number, as of a process that it ended.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has one ignored
            signal.signal(number, end)
    try:
        yield
    except SystemExit as error:
        _say(_KEPT)
        raise SystemExit(128 + signal.SIGTERM if error.code == signal.SIGTERM else error.code) from None  # Ray leaves with the bare number


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of <class>/<image>, copied in; without it the embedded sample of handwritten digits.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="demonstration, a torchvision classifier, or package.module:callable.")] = "demonstration",
    weights: Annotated[str, typer.Option(help="DEFAULT, a torchvision weights name, a weights file, or none.")] = "DEFAULT",
    remote: Annotated[str | None, typer.Option(help="DVC remote (folder or URL); without it a folder inside the workspace.")] = None,
) -> None:
    """Make a workspace: a git and DVC repository with the pipeline, its settings, and versioned images."""
    from tlpipeline.workspace import create

    with _Bar() as bar:
        create.init(folder, images, backbone, weights, remote, bar)
    print(f"workspace {folder} is ready. Settings: {folder / 'params.yaml'}. Next: tlpipeline run --workspace {shlex.quote(str(folder))}")


@app.command()
def run(
    workspace: Workspace = Path(),
    images: Annotated[Path | None, typer.Option(help="Folder that replaces the workspace's images first.")] = None,
) -> None:
    """Run the whole flow: version, profile, choose, train, evaluate, gate, register, report."""
    _prepare(workspace)
    from tlpipeline.versioning import lock
    from tlpipeline.workspace.create import check

    check(workspace, images)  # a mistake is told before the Prefect server starts
    lock.require_unlocked(workspace)
    from tlpipeline.flows.retrain import reach, retrain
    from tlpipeline.tasks.pipeline import listener

    with _ends_in_order():
        reach()
        with _Bar() as bar:
            token = listener.set(bar)
            try:
                summary = retrain(workspace=workspace, images=images)
            finally:
                listener.reset(token)
    _print_summary(summary)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="ingest, profile, choose, train or evaluate.")],
    workspace: Workspace = Path(),
) -> None:
    """Run one stage, as dvc.yaml does."""
    from tlpipeline.errors import nearest
    from tlpipeline.workspace import stages

    if name not in stages.STAGES:
        raise PipelineError(f"expected a stage, found {name!r}; {nearest(name, stages.STAGES)}")
    _tell_old_settings(workspace)
    with _Bar() as bar:
        try:
            stages.run(workspace, name, bar)
        finally:
            _leave_ray()


@app.command()
def explain(
    workspace: Workspace = Path(),
    markdown: Annotated[bool, typer.Option("--markdown", help="As markdown.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The decision and the points of its two plots, as JSON.")] = False,
) -> None:
    """Say in plain words what was decided and why: the numbers, the plane, the probe curve, what would change it."""
    from tlpipeline.choice import explain as words
    from tlpipeline.workspace import release

    if markdown and json:
        raise PipelineError("expected one of --markdown and --json, found both. Leave one out.")
    decision, profile = release.load_decision(workspace)
    if json:
        from json import dumps

        plots = {"plane": words.plane_rows(decision), "probes": words.probe_rows(profile, decision)}
        print(dumps({"decision": decision.to_json(), **plots}, indent=2))
        return
    if markdown:
        said = words.markdown(decision, profile)
    else:
        from shutil import get_terminal_size

        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        said = words.text(decision, profile, get_terminal_size((100, 24)).columns, color)
    encoding = sys.stdout.encoding or "utf-8"  # a terminal that cannot show a drawing shows question marks
    print(said.encode(encoding, "replace").decode(encoding), end="")


@app.command(hidden=True)
def sample(folder: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write the embedded sample images; a stage of sample/dvc.yaml."""
    from tlpipeline.data import digits

    print(f"{digits.write(folder)} images written to {folder}")


@app.command()
def pretrain(
    images: Annotated[Path, typer.Argument(help="Folder of <class>/<image> or {train,test}/<class>/<image>.")],
    backbone: Annotated[str, typer.Option(help="Network to train from random weights.")] = "demonstration",
    output: Annotated[Path, typer.Option(help="Folder for <backbone>.safetensors and its card.")] = Path("weights"),
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 24,
    rate: Annotated[float, typer.Option(help="Learning rate at a batch of 64.")] = 0.03,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of weights, order and augmentation.")] = 0,
    flip: Annotated[bool, typer.Option(help="Mirror images at random; not for text, digits, signs.")] = True,
) -> None:
    """Pretrain a network of your own to transfer from."""
    from tlpipeline.training.pretrain import pretrain as train

    with _Bar() as bar:
        done = train(images, backbone, output, epochs=epochs, rate=rate, seed=seed, flip=flip, progress=bar)
    print(f"{done.weights}: test accuracy {done.accuracy:.1%} ({done.low:.1%} to {done.high:.1%})")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A model folder, name@v1, or name#prod.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    json: Annotated[bool, typer.Option("--json", help="All probabilities, as JSON.")] = False,
    workspace: Workspace = Path(),
) -> None:
    """Print class and probability of images; of files that cannot be read it is said why, and the exit code is 2."""
    from tlpipeline.workspace import release

    found, left = release.predict_images(workspace, model, images)
    if json:
        import dataclasses
        from json import dumps

        print(dumps([dataclasses.asdict(p) for p in found], indent=2))
    else:
        for prediction in found:
            print(f"{prediction.path}  {prediction.label}  {prediction.probability:.4f}")
    if left:
        for path, why in left.items():
            _say(f"{path}: {why}")
        raise DataError(
            f"expected {len(found) + len(left)} images, of which {len(left)} cannot be read; the {len(found)} others are predicted. "
            "Replace those files or leave them out."
        )


# --- data -----------------------------------------------------------------------------------------------------------------------------


@data.command("commit")
def data_commit(
    workspace: Workspace = Path(),
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the git commit.")] = None,
) -> None:
    """Version the images as they are now, push them, and tell a Prefect server, if one is configured, that they changed."""
    _prepare(workspace)
    from tlpipeline.versioning import lock
    from tlpipeline.workspace import create

    lock.require_workspace(workspace)
    with lock.hold(workspace):
        digest, remarks = create.commit_data(workspace, message)
        images = create.count_images(workspace)
    for remark in remarks:
        print(remark)
    print(f"data {digest}: {images} files")
    if os.environ.get("PREFECT_API_URL"):
        from tlpipeline.flows.retrain import announce

        announce(create.model_name(workspace), digest, images)
        print("event tlpipeline.data.updated emitted")
        if unheard := create.missing_trigger(workspace):
            print(unheard)
    else:
        print("no event emitted: PREFECT_API_URL is not set")


# --- registry -------------------------------------------------------------------------------------------------------------------------


@registry.command("list")
def registry_list(workspace: Workspace = Path()) -> None:
    """List the registered versions, newest first."""
    from tlpipeline.workspace import release

    rows = release.version_rows(workspace)
    if not rows:
        print("nothing is registered yet")
        return
    _table(("version", "stages", "case", "accuracy", "interval", "data", "commit"), rows)


@registry.command("show")
def registry_show(
    version: Annotated[str, typer.Argument(help="name@v1, name@latest or name#prod.")], workspace: Workspace = Path()
) -> None:
    """Print the model card of a version."""
    from tlpipeline.workspace import release

    print(release.model_card(workspace, version))


@registry.command("promote")
def registry_promote(
    version: Annotated[str, typer.Argument(help="name@v1 or name@latest.")],
    stage: Annotated[str, typer.Option(help="Stage to put it into.")] = "prod",
    workspace: Workspace = Path(),
) -> None:
    """Put a version into a stage."""
    from tlpipeline.registry import versions as models
    from tlpipeline.versioning import lock

    lock.require_workspace(workspace)
    found = models.resolve(workspace, version)
    print(f"{found} is in {stage} now ({models.promote(workspace, found, stage)})")


@registry.command("rollback")
def registry_rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    stage: Annotated[str, typer.Option(help="Stage to roll back.")] = "prod",
    workspace: Workspace = Path(),
) -> None:
    """Put the version back that was in a stage before."""
    from tlpipeline.registry import versions as models
    from tlpipeline.versioning import lock

    lock.require_workspace(workspace)
    before, now = models.rollback(workspace, name, stage)
    print(f"{now} is in {stage} again, instead of {before}")


# --- cache ----------------------------------------------------------------------------------------------------------------------------


@cache.command("info")
def cache_info(workspace: Workspace = Path()) -> None:
    """Say what is kept, what was used last first, and how much of cache.max_gb it takes."""
    from tlpipeline.workspace import create

    rows, summary = create.cache_rows(workspace)
    if rows:
        _table(("what", "files", "MB", "last used"), rows)
    print(summary)


@cache.command("clear")
def cache_clear(workspace: Workspace = Path()) -> None:
    """Delete all of it; the next run computes it again."""
    from tlpipeline.workspace import create

    print(create.clear_cache(workspace))


# --- printing -------------------------------------------------------------------------------------------------------------------------


def _tell_old_settings(workspace: Path) -> None:
    """Print a line for each setting of an earlier version in params.yaml."""
    from tlpipeline.params import remarks

    if (path := workspace / "params.yaml").is_file():
        for line in remarks(path):
            print(line, file=sys.stderr)


def _prepare(workspace: Path) -> None:
    """Set what Prefect must know before it is imported; a user's own settings win."""
    _tell_old_settings(workspace)
    home = workspace.resolve() / ".tlpipeline" / "prefect"
    quiet = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DVC_NO_ANALYTICS": "1",
        "ITERATIVE_DO_NOT_TRACK": "1",
    }
    if "PREFECT_LOGGING_LEVEL" not in os.environ:
        # The terminal shows our bar and one message for a mistake; a server still gets every line.
        quiet["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    for key, value in quiet.items():
        os.environ.setdefault(key, value)


def _leave_ray() -> None:
    if "ray" in sys.modules:
        from tlpipeline.training import ray_train

        ray_train.shutdown()


class _Bar:
    """A progress bar on a terminal, a line for each stage and epoch elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self.console = Console(stderr=True)
        self.live = self.console.is_terminal
        self.bar = Progress(
            # Whatever a stage says, it is what gives way where the terminal is narrow.
            TextColumn("{task.fields[stage]}", markup=False, table_column=Column(no_wrap=True, min_width=9)),
            BarColumn(bar_width=24, table_column=Column(min_width=12)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self.console,
            expand=True,
            transient=False,
            redirect_stdout=False,  # what is written there is for other programs; a library that resets its colors at exit keeps it, too
            disable=not self.live,
        )
        self.tasks: dict[str, Any] = {}
        self.last: dict[str, str] = {}

    def __enter__(self) -> "_Bar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if not self.live:
            for stage, text in self.last.items():
                self._line(stage, text)

    def __call__(self, event: Event) -> None:
        if self.live:
            if event.stage not in self.tasks:
                for task in self.bar.tasks:  # what came before has ended, and sometimes before its count did
                    self.bar.update(task.id, total=task.total or 1, completed=task.total or 1)
                self.tasks[event.stage] = self.bar.add_task(event.text, total=event.total or None, stage=event.stage)
            self.bar.update(self.tasks[event.stage], completed=event.done, total=event.total or None, description=event.text)
            return
        # Not on a terminal: what ends an epoch or a stage is worth a line, the rest is not.
        for stage in [name for name in self.last if name != event.stage]:
            self._line(stage, self.last.pop(stage))  # it ended before its count did
        if event.done == event.total or "validation" in event.text:
            self.last.pop(event.stage, None)
            self._line(event.stage, event.text)
        else:
            self.last[event.stage] = event.text

    def _line(self, stage: str, text: str) -> None:
        print(f"{stage:<9} {text}", file=sys.stderr, flush=True)


def _print_summary(summary: Any) -> None:
    seconds = ", ".join(f"{name} {'up to date' if s is None else f'{s:.1f}'}" for name, s in summary.seconds.items())
    rows = [
        (
            "images",
            f"{summary.images} in {summary.classes} classes"
            + (f", {_counted(summary.copies, 'exact copy', 'exact copies')} not counted" if summary.copies else "")
            + (f", {_counted(summary.rejected, 'file', 'files')} left out (quarantine.csv)" if summary.rejected else ""),
        ),
        *[("", remark) for remark in summary.remarks],
        ("case", summary.case),
        ("why", summary.reason),
        (
            "accuracy",
            f"{summary.accuracy:.1%} ({summary.low:.1%} to {summary.high:.1%})" + (f", {summary.champion}" if summary.champion else ""),
        ),
        ("version", summary.version + ("" if summary.new else " (unchanged)") if summary.version else "none registered"),
        ("", summary.outcome),
        ("report", summary.report),
        ("seconds", seconds),
    ]
    _table((), rows)


def _counted(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _table(header: tuple[str, ...], rows: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*header, box=None, show_header=bool(header), pad_edge=False, header_style="bold")
    if not header:
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    console = Console(width=160)
    with console.capture() as written:
        console.print(table)
    print("\n".join(line.rstrip() for line in written.get().splitlines()))  # a column's padding is nothing to other programs
