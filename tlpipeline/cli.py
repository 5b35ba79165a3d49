"""The command line: verbs, printing, exit codes. Settings are in params.yaml, not here.

Heavy imports (torch, ray, prefect, dvc) happen inside the functions: `tlpipeline --help` needs none of them.
"""

import errno
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tlpipeline.display import Displayed, printable
from tlpipeline.environment import set_thread_waiting
from tlpipeline.errors import DataError, PipelineError
from tlpipeline.files import is_disk_full, is_out_of_memory, is_permission_error
from tlpipeline.progress import Event, silent

_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(context_settings=_SETTINGS, rich_markup_mode=None, pretty_exceptions_enable=False)
data = typer.Typer(context_settings=_SETTINGS, help="Version the images, and choose which to label next.")
registry = typer.Typer(context_settings=_SETTINGS, help="List, show, promote and roll back models.")
cache = typer.Typer(context_settings=_SETTINGS, help="Show and empty the cache.")
app.add_typer(data, name="data")
app.add_typer(registry, name="registry")
app.add_typer(cache, name="cache")

_ENDING = 120  # seconds after which a run that was told to end is killed
_INTERRUPTED = 130
_CODES = {"undecided": 3, "rejected": 4}  # of `run`, by the verdict of the gate
_MEMORY = "error: expected memory to compute in, found too little: {error}. Set data.size lower, or run where there is more."
_KEPT = "interrupted; checkpoints are kept, and the next run goes on from the last one"

Folder = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")]


def main() -> None:
    """Run a command. A mistake that the user can correct gives one message and exit code 2; Ctrl-C gives 130."""
    set_thread_waiting()  # before a command imports torch, which reads it
    try:
        code = app(prog_name="tlpipeline", standalone_mode=False)
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
        elif error.errno in (errno.ENOMEM, errno.EAGAIN):
            _say(_MEMORY.format(error=error))
        else:
            raise
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the parser's own: wrong or missing arguments
            _say(f"error: {error.format_message()}")
            sys.exit(error.exit_code)
        if is_out_of_memory(error):
            _say(_MEMORY.format(error=str(error) or type(error).__name__))
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
        # An exception that interrupts a library while it takes a lock can leave the lock taken, and the end would wait for it forever.
        signal.alarm(_ENDING)
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
    print(printable(text), file=sys.stderr)


@app.callback(invoke_without_command=True)
def tlpipeline(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Keep image classifiers retrained."""
    if version:
        from tlpipeline import __version__

        print(f"tlpipeline {__version__}")
        raise typer.Exit
    _help_if_bare(context)


@data.callback(invoke_without_command=True)
@registry.callback(invoke_without_command=True)
@cache.callback(invoke_without_command=True)
def _help_if_bare(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of <class>/<image> to copy, or a zip file; without it, the sample digits.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="demonstration, a torchvision classifier, timm:NAME, hf:OWNER/NAME, or package.module:callable.")
    ] = "demonstration",
    weights: Annotated[str, typer.Option(help="DEFAULT, a torchvision weights name, a weights file, or none.")] = "DEFAULT",
    remote: Annotated[str | None, typer.Option(help="DVC remote, a folder or URL; without it, a folder inside the workspace.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Table with the columns path and label, and perhaps split and group.")] = None,
    group: Annotated[str | None, typer.Option(help="Images that belong together: a column of the table, or a regular expression.")] = None,
    class_folder: Annotated[int | None, typer.Option(help="Which folder of a path is the class: 1 for the first.", min=1, max=9)] = None,
) -> None:
    """Make a workspace.

    A workspace is a git and DVC repository with the pipeline, its settings, and the versioned images.
    """
    from tlpipeline.api import Workspace

    with _Bar() as bar:
        root = Workspace.init(folder, images, backbone, weights, remote, bar, labels, group, class_folder).root
    _print(f"workspace {root} is ready. Settings: {root / 'params.yaml'}. Next: tlpipeline run --workspace {shlex.quote(str(root))}")


@app.command()
def run(
    workspace: Folder = Path(),
    images: Annotated[
        Path | None, typer.Option(help="Folder of images, or a zip file, that first replaces those of the workspace.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Table of labels that comes with --images.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run the whole pipeline.

    It versions and profiles the images, chooses a case, trains and evaluates. A model that beats the one in production is registered. A report
    is written. The exit code is 3 if the test images leave it undecided which model is better, and 4 if the new one is worse.
    """
    from tlpipeline.api import Workspace

    _tell_old_settings(workspace)
    with _ends_in_order(), _Bar() as bar:
        summary = Workspace(workspace).run(images, bar, labels)
    if json:
        from json import dumps

        print(dumps(summary.to_json(), indent=2))
    else:
        _show(summary)
    if summary.verdict in _CODES:
        raise typer.Exit(_CODES[summary.verdict])


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="ingest, profile, check, choose, train or evaluate.")],
    workspace: Folder = Path(),
) -> None:
    """Run one stage, as dvc.yaml does."""
    from tlpipeline.api import Workspace

    _tell_old_settings(workspace)
    with _Bar() as bar:
        Workspace(workspace).stage(name, bar)


@app.command()
def explain(
    workspace: Folder = Path(),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print markdown.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the decision and the points of its plots as JSON.")] = False,
) -> None:
    """Print which case was chosen, and why."""
    from tlpipeline.api import Workspace

    if markdown and json:
        raise PipelineError("expected one of --markdown and --json, found both. Leave one out.")
    explanation = Workspace(workspace).explain()
    if json:
        from json import dumps

        print(dumps(explanation.to_json(), indent=2))
    elif markdown:
        _write(printable(explanation.markdown()))
    else:
        from shutil import get_terminal_size

        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        _write(explanation.text(get_terminal_size((100, 24)).columns, color))


@app.command()
def backbones(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Text in the name, or a name with * and ?.")] = "*",
    time: Annotated[bool, typer.Option("--time", help="Build each with random weights, and measure a forward pass of one image.")] = False,
    size: Annotated[int | None, typer.Option(help="Side of that image in pixels; without it, that of the weights.", min=1)] = None,
    workspace: Annotated[Path | None, typer.Option("--workspace", "-w", help="Workspace whose own networks are listed, too.")] = None,
) -> None:
    """List the networks that backbone.name may name.

    These are torchvision's, those of timm and Hugging Face where the packages are installed, and your own.
    """
    from tlpipeline.api import list_backbones

    with _Bar() as bar:
        networks = list_backbones(pattern, time or size is not None, size, workspace, bar)
    _show(networks)


@app.command()
def doctor(
    workspace: Folder = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check whether a workspace can run unattended.

    It looks at packages, git, the remotes, the disk, devices and the Prefect server. Each line is fine or says what to do. The exit code is 1 if a
    run would fail.
    """
    from tlpipeline.api import Workspace

    diagnosis = Workspace(workspace).doctor()
    if json:
        import dataclasses
        from json import dumps

        print(dumps([dataclasses.asdict(check) for check in diagnosis], indent=2))
    else:
        _show(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command()
def deploy(
    workspace: Folder = Path(),
    take_over: Annotated[bool, typer.Option("--take-over", help="Also replace deployments that run in another folder.")] = False,
) -> None:
    """Put the deployments of prefect.yaml on a Prefect server.

    PREFECT_API_URL names the server. Runs wait for a worker: `prefect worker start --pool tlpipeline`.
    """
    from tlpipeline.api import Workspace

    _print(Workspace(workspace).deploy(take_over))


@app.command()
def serve(
    workspace: Folder = Path(),
    port: Annotated[int, typer.Option(help="Of the Prefect server, if PREFECT_API_URL names none.")] = 4200,
) -> None:
    """Run by schedule and by event, all in one process.

    It starts a Prefect server for this machine, unless PREFECT_API_URL names one, and runs until it is interrupted.
    """
    from tlpipeline.api import Workspace

    def on_ready(api: str) -> None:
        _say(
            f"runs are started by schedule and by event; see {api.removesuffix('/api')}. Ctrl-C ends it. For `tlpipeline data commit` elsewhere:"
        )
        print(f"export PREFECT_API_URL={api}", flush=True)

    with _ends_in_order():
        Workspace(workspace).serve(port, on_ready)


@app.command(hidden=True)
def sample(folder: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write the embedded sample images; a stage of sample/dvc.yaml."""
    from tlpipeline.data import digits

    _print(f"{digits.write(folder)} images written to {folder}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A model folder, name@v1, or name#prod.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders of them, patterns, or tables with a column path.")],
    form: Annotated[str, typer.Option("--format", help="terminal, json, csv or parquet; without it, by the ending of --out.")] = "",
    out: Annotated[Path | None, typer.Option(help="File to write to; without it, standard output.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    trust: Annotated[list[str], typer.Option(help="module:callable of a network that a model folder from elsewhere may call.")] = [],  # noqa: B006
    workspace: Folder = Path(),
) -> None:
    """Print the class and probability of images.

    A file that cannot be read is a line with its error, and the exit code is 2.
    """
    from contextlib import nullcontext

    from tlpipeline.api import load_model
    from tlpipeline.registry import formats

    if json and form not in ("", formats.JSON):
        raise PipelineError(f"expected one format, found --json and --format {form}. Leave one out.")
    form = formats.chosen_format(formats.JSON if json else form, out)
    loaded = load_model(model, workspace, trust)
    total, first = 0, ""
    bad = 0
    # On a terminal the lines show the progress, and a bar would be drawn over them.
    with (
        nullcontext() if out is None and sys.stdout.isatty() else _Bar() as bar,
        formats.open_writer(form, out, loaded.classes, _write) as write,
    ):
        for prediction in loaded.predict_files(images, bar or silent):
            total += 1
            if prediction.error:
                bad += 1
                first = first or f"{prediction.path}: {prediction.error}"
            write([prediction])
    if out is not None:
        _say(f"{total} images written to {out}")
    if bad:
        others = f"the {total - bad} others are predicted" if bad < total else "nothing is predicted"
        raise DataError(
            f"expected {total} images, of which {bad} cannot be read, such as {printable(first, lines=False)}; {others}. Replace those files or "
            "leave them out."
        )


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A model folder, name@v1, or name#prod.")],
    onnx: Annotated[Path | None, typer.Option(help="ONNX file to write; needs the extra onnx.")] = None,
    torch: Annotated[Path | None, typer.Option(help="File of torch.export to write, such as model.pt2.")] = None,
    images: Annotated[list[str], typer.Option(help="Images to compare the file on; without them, test images of the workspace.")] = [],  # noqa: B006
    trust: Annotated[list[str], typer.Option(help="module:callable of a network that a model folder from elsewhere may call.")] = [],  # noqa: B006
    workspace: Folder = Path(),
) -> None:
    """Write a model as a file that needs no tlpipeline.

    Its input are decoded images of any size. The file is compared with the model before it takes its name.
    """
    from tlpipeline.api import load_model

    if onnx is None and torch is None:
        raise PipelineError("expected a file to write, found none. Name one: --onnx model.onnx, or --torch model.pt2")
    _print(load_model(model, workspace, trust, "cpu").export(onnx=onnx, torch=torch, images=images or None))


# --- data -----------------------------------------------------------------------------------------------------------------------------


@data.command("commit")
def data_commit(
    workspace: Folder = Path(),
    message: Annotated[str | None, typer.Option("--message", "-m", help="Message of the git commit.")] = None,
) -> None:
    """Version the images as they are now.

    The images are pushed to the DVC remote. If PREFECT_API_URL names a Prefect server, an event is sent there.
    """
    from tlpipeline.api import Workspace

    _tell_old_settings(workspace)
    _print(Workspace(workspace).commit_data(message))


@data.command("suggest")
def data_suggest(
    folder: Annotated[Path, typer.Argument(help="Folder of unlabeled images.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Images to suggest.")] = 50,
    csv: Annotated[Path | None, typer.Option(help="Also write them to this file, with an empty column for the label.")] = None,
    workspace: Folder = Path(),
) -> None:
    """Print which unlabeled images to label next.

    The newest model is unsure of them, and they are unlike each other.
    """
    from tlpipeline.api import Workspace

    with _Bar() as bar:
        suggestions = Workspace(workspace).suggest(folder, count, bar)
    _show(suggestions)
    if csv is not None:
        suggestions.write_csv(csv)
        _say(f"{len(suggestions.chosen)} images written to {csv}; fill in the column label")
    _say(
        f"{len(suggestions.chosen)} of {suggestions.images - suggestions.known} unlabeled images; {suggestions.known} others are in the data set"
        f" already, {suggestions.unreadable} files are no images"
    )


@data.command("diff")
def data_diff(
    since: Annotated[str, typer.Argument(metavar="[REV]", help="A git revision, v1, or latest.")] = "HEAD",
    until: Annotated[str | None, typer.Option(help="A later revision; without it, the images as they are now.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all paths as JSON.")] = False,
    workspace: Folder = Path(),
) -> None:
    """Print what changed in the images since a version."""
    from tlpipeline.api import Workspace

    changes = Workspace(workspace).diff(since, until)
    if json:
        from json import dumps

        print(dumps(changes.to_json(), indent=2))
    else:
        _show(changes)


# --- registry -------------------------------------------------------------------------------------------------------------------------


@registry.command("list")
def registry_list(workspace: Folder = Path()) -> None:
    """List the registered versions, newest first."""
    from tlpipeline.api import Workspace

    _show(Workspace(workspace).registry.versions())


@registry.command("show")
def registry_show(version: Annotated[str, typer.Argument(help="name@v1, name@latest or name#prod.")], workspace: Folder = Path()) -> None:
    """Print the model card of a version."""
    from tlpipeline.api import Workspace

    _print(Workspace(workspace).registry.show(version))


@registry.command("promote")
def registry_promote(
    version: Annotated[str, typer.Argument(help="name@v1, name@latest, v1 or latest.")],
    stage: Annotated[str, typer.Option(help="Stage to put it into.")] = "prod",
    because: Annotated[str, typer.Option(help="Why, recorded in the tag; needed where alarms block the version.")] = "",
    new_stage: Annotated[bool, typer.Option("--new-stage", help="Make the stage, if no version was in it before.")] = False,
    workspace: Folder = Path(),
) -> None:
    """Put a version into a stage."""
    from tlpipeline.api import Workspace

    _print(Workspace(workspace).promote(version, stage, because, new_stage))


@registry.command("accept")
def registry_accept(
    because: Annotated[str, typer.Option(help="Why the verdict is overruled; git records it.")],
    version: Annotated[str | None, typer.Argument(help="An undecided version; without it, the model of the last run.")] = None,
    workspace: Folder = Path(),
) -> None:
    """Accept a model that the gate rejected or left undecided.

    A model that is not registered yet is registered. With gate.promote: auto, it goes into production.
    """
    from tlpipeline.api import Workspace

    _print(Workspace(workspace).registry.accept(version, because=because))


@registry.command("rollback")
def registry_rollback(
    name: Annotated[str | None, typer.Argument(help="Name of the model; without it, the model of this workspace.")] = None,
    stage: Annotated[str, typer.Option(help="Stage to roll back.")] = "prod",
    workspace: Folder = Path(),
) -> None:
    """Restore the version that was in a stage before."""
    from tlpipeline.api import Workspace

    _print(Workspace(workspace).registry.rollback(name, stage))


# --- cache ----------------------------------------------------------------------------------------------------------------------------


@cache.command("info")
def cache_info(workspace: Folder = Path()) -> None:
    """Show what the cache holds, and how much of cache.max_gb."""
    from tlpipeline.api import Workspace

    _show(Workspace(workspace).cache.info())


@cache.command("clear")
def cache_clear(workspace: Folder = Path()) -> None:
    """Delete the cache; the next run computes it again."""
    from tlpipeline.api import Workspace

    print(f"{Workspace(workspace).cache.clear() / 1e6:.1f} MB deleted; the next run computes what it needs again")


# --- printing -------------------------------------------------------------------------------------------------------------------------


def _tell_old_settings(workspace: Path) -> None:
    """Print a line for each setting of an earlier version in params.yaml."""
    from tlpipeline.params import remarks

    if (path := workspace / "params.yaml").is_file():
        for line in remarks(path):
            _say(line)


def _show(value: Displayed) -> None:
    """Print a value: as rich draws it on a terminal, as plain text for other programs."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(value)
    else:
        _print(value)


def _print(value: object) -> None:
    """Print a value; names of files, classes and models come from anywhere, and must not steer the terminal."""
    _write(f"{printable(str(value))}\n")


def _write(text: str) -> None:
    """Print text; a terminal that cannot show a character of it shows a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="")


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
                self.tasks[event.stage] = self.bar.add_task(printable(event.text), total=event.total or None, stage=event.stage)
            self.bar.update(self.tasks[event.stage], completed=event.done, total=event.total or None, description=printable(event.text))
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
        print(printable(f"{stage:<9} {text}"), file=sys.stderr, flush=True)
