"""The command line: light to start, its verbs frozen, and every mistake of a user is one message with a way out."""

import csv
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from rich.console import Console

from tests.helpers.workspaces import set_param
from tlpipeline import cli
from tlpipeline.data import dataset
from tlpipeline.data.decoding import FORMATS
from tlpipeline.display import printable, table
from tlpipeline.errors import WorkspaceError
from tlpipeline.progress import Event
from tlpipeline.versioning import git, lock
from tlpipeline.workspace import layout

HEAVY = ("torch", "torchvision", "ray", "prefect", "dvc", "gto", "flows", "tasks")
VERBS = {
    "backbones",
    "cache clear",
    "cache info",
    "data commit",
    "data diff",
    "data suggest",
    "deploy",
    "doctor",
    "explain",
    "export",
    "init",
    "predict",
    "registry accept",
    "registry list",
    "registry promote",
    "registry rollback",
    "registry show",
    "run",
    "sample",
    "serve",
    "stage",
}


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """Return a function that runs a command in this process, as the console script does."""
    before = dict(os.environ)

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["tlpipeline", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return Said(int(code or 0), said.out, said.err)

    yield run
    os.environ.clear()
    os.environ.update(before)


def commands() -> dict[str, Any]:
    """Return every command by its words, from the parser itself."""
    found = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", {"": command})
        found |= {f"{name} {word}".strip(): c for word, c in below.items()}
    return found


def imported(code: str) -> set[str]:
    """Return which heavy packages a fresh interpreter has loaded after some code."""
    tell = f"import sys; print('loaded', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def refused(said: Said) -> str:
    """Return the message of a refusal: one line with an end, no traceback, exit code 2."""
    assert said.code == 2, said
    assert "Traceback" not in said.err
    message = said.err.splitlines()[-1]
    assert message.startswith("error: ")
    return message


def history(workspace: Path) -> tuple[str, ...]:
    """Return what git knows: commit, tags, and what differs from the commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=workspace, capture_output=True, text=True, check=True).stdout

    return git("rev-parse", "HEAD"), git("tag"), git("status", "--porcelain")


# --- light, frozen, documented --------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['tlpipeline', '--help']; from tlpipeline.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert imported(code) == set()


@pytest.mark.parametrize("words", [[], ["data"], ["registry"], ["cache"]])
def test_without_a_verb_the_help_is_shown_and_nothing_is_wrong(call: Callable[..., Said], words: list[str]) -> None:
    said = call(*words)
    assert said.code == 0
    assert said.out.startswith("Usage: tlpipeline")
    assert said.err == ""
    assert call(*words, "-h").out == call(*words, "--help").out == said.out


def test_no_line_of_help_is_cut(call: Callable[..., Said]) -> None:
    for words in ([], ["data"], ["registry"], ["cache"]):
        assert not re.search(r"^  .*\.\.\.$", call(*words, "--help").out, re.M)


def test_the_version_is_that_of_the_installed_package(call: Callable[..., Said]) -> None:
    from importlib.metadata import version

    import tlpipeline

    assert call("--version").out == f"tlpipeline {version('tlpipeline')}\n"
    assert tlpipeline.__version__ == version("tlpipeline")


def test_a_shell_completes_the_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"_TLPIPELINE_COMPLETE": "complete_bash", "COMP_WORDS": "tlpipeline reg", "COMP_CWORD": "1"}
    command = str(Path(sys.executable).with_name("tlpipeline"))
    done = subprocess.run([command], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["registry"]
    assert "--install-completion" in subprocess.run([command, "--help"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, ["PASSIVE", "1000"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"]),
    ],
)
def test_the_command_line_makes_threads_wait_asleep_unless_the_user_has_set_how(before: dict[str, str], after: list[str]) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in names} | before
    code = f"import sys, os; sys.argv = ['tlpipeline', '-h']; from tlpipeline.cli import main\ntry: main()\nexcept SystemExit: print(*[os.environ.get(n) for n in {names}])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1].split() == after


def test_the_verbs_are_frozen() -> None:
    # A new verb is a decision; what a user may turn is a key of params.yaml.
    assert set(commands()) == VERBS


def test_every_command_and_every_option_has_help() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_each_verb(call: Callable[..., Said], verb: str) -> None:
    said = call(*verb.split(), "--help")
    assert said.code == 0
    assert "Usage" in said.out + said.err


# --- mistakes in the words ------------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_message_on_stderr_and_exit_code_2() -> None:
    done = subprocess.run([sys.executable, "-m", "tlpipeline", "run", "--workspace", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "expected a workspace at nowhere, found no such folder" in done.stderr
    assert "tlpipeline init DIR" in done.stderr


def test_a_bug_of_ours_is_no_message_but_a_traceback(call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AssertionError("a broken promise")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(AssertionError, match="a broken promise"):
        call("sample", tmp_path / "somewhere")


def test_a_right_that_is_missing_is_one_message(call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise shutil.Error([("a", "b", "[Errno 13] Permission denied: 'a'")])

    monkeypatch.setattr(Image.Image, "save", forbidden)
    assert "Permission denied: 'a'" in refused(call("sample", tmp_path / "somewhere"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("of numpy"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 120000000000 bytes"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    ],
)
def test_memory_that_is_missing_is_one_message(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def starving(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "save", starving)
    assert f"found too little: {error}. Set data.size lower" in refused(call("sample", tmp_path / "somewhere"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage", "ingets"], "did you mean ingest?"),
        (["stage"], "Missing argument"),
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "--color", "red"], "No such option"),
        (["registry", "promote"], "Missing argument"),
    ],
)
def test_wrong_words(call: Callable[..., Said], words: list[str], says: str) -> None:
    assert says in refused(call(*words))


# --- init -----------------------------------------------------------------------------------------------------------------------------


def _empty(folder: Path, _: Path) -> list[str | Path]:
    (folder / "pictures").mkdir()
    return ["--images", folder / "pictures"]


def _no_classes(folder: Path, images: Path) -> list[str | Path]:
    (folder / "pictures").mkdir()
    shutil.copy(images / "class0" / "000.png", folder / "pictures")
    return ["--images", folder / "pictures"]


def _one_class(folder: Path, images: Path) -> list[str | Path]:
    shutil.copytree(images / "class0", folder / "pictures" / "class0")
    return ["--images", folder / "pictures"]


def _too_few(folder: Path, images: Path) -> list[str | Path]:
    shutil.copytree(images, folder / "pictures")
    for path in sorted((folder / "pictures" / "class1").iterdir())[2:]:
        path.unlink()
    return ["--images", folder / "pictures"]


def _no_images(folder: Path, _: Path) -> list[str | Path]:
    for label in ("a", "b"):
        (folder / "pictures" / label).mkdir(parents=True)
        (folder / "pictures" / label / "notes.txt").write_text("no image")
    return ["--images", folder / "pictures"]


def _broken_weights(folder: Path, images: Path) -> list[str | Path]:
    (folder / "w.safetensors").write_bytes(bytes(range(200)))
    return ["--images", images, "--weights", folder / "w.safetensors"]


def _others_weights(folder: Path, images: Path) -> list[str | Path]:
    import torch
    from safetensors.torch import save_file

    save_file({"layer.weight": torch.zeros(3)}, folder / "w.safetensors")
    return ["--images", images, "--weights", folder / "w.safetensors"]


def _inside_the_images(folder: Path, images: Path) -> list[str | Path]:
    shutil.copytree(images, folder / "new", dirs_exist_ok=True)
    return ["--images", folder / "new"]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder, images: ["--images", folder / "nothing"], "found nothing. Give --images a folder"),
        (lambda folder, images: ["--images", images / "class0" / "000.png"], "found a file. Give --images a folder"),
        (_empty, "found an empty folder. Put one folder of images per class there"),
        (_no_classes, "found 1 files and no folder. Sort the images as"),
        (_one_class, "found one with usable images: class0. Add a folder"),
        (_too_few, "found class1: 2"),
        (_no_images, "none of its 2 files can be used"),
        (lambda folder, images: ["--images", images, "--backbone", "resnet81"], "found 'resnet81'; did you mean resnet18"),
        (lambda folder, images: ["--images", images, "--backbone", "no_such.module:net"], "found no module 'no_such'. Install"),
        (lambda folder, images: ["--images", images, "--weights", "IMAGENET9"], "found 'IMAGENET9'; known: DEFAULT, none"),
        (_broken_weights, "expected tensors in"),
        (_others_weights, "Set backbone.name to the architecture"),
    ],
)
def test_init_refuses_before_it_writes(
    call: Callable[..., Said],
    tmp_path: Path,
    make_images: Callable[..., Path],
    prepare: Callable[[Path, Path], list[str | Path]],
    says: str,
) -> None:
    options = prepare(tmp_path, make_images(3, 4, name="good"))
    assert says in refused(call("init", tmp_path / "new", *options))
    assert not (tmp_path / "new").exists()


def test_init_takes_no_folder_that_holds_something(call: Callable[..., Said], tmp_path: Path, make_images: Callable[..., Path]) -> None:
    images = make_images(2, 3)
    before = sorted(images.rglob("*"))
    assert "found files in it. Choose another one" in refused(call("init", images, "--images", images))
    assert "found a file. Choose another one" in refused(call("init", images / "class0" / "000.png", "--images", images))
    assert "Choose another one" in refused(call("init", images / "workspace", "--images", images))
    assert sorted(images.rglob("*")) == before


def test_init_takes_everything_back_when_the_remote_fails(
    call: Callable[..., Said], tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    (tmp_path / "remote").write_text("a file is no remote")
    said = call("init", tmp_path / "new", "--images", make_images(2, 4), "--remote", tmp_path / "remote")
    assert "Check the remote" in refused(said)
    assert not (tmp_path / "new").exists()


def test_init_takes_everything_back_from_a_folder_that_was_there_and_from_those_that_it_made(
    call: Callable[..., Said], tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(2, 4)
    (tmp_path / "remote").write_text("a file is no remote")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", "far/away"):
        assert "Check the remote" in refused(call("init", folder, "--images", images, "--remote", tmp_path / "remote"))
        assert not list((tmp_path / "here").iterdir())


@pytest.mark.slow
def test_a_workspace_is_made_and_read_in_the_c_locale_by_a_user_who_keeps_files_to_himself(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    pictures = make_images(classes=2, each=12)
    (pictures / "class0").rename(pictures / "café")
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}, "LC_ALL": "C"}

    def call(*words: str) -> str:
        command = [sys.executable, "-m", "tlpipeline", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, umask=0o077, capture_output=True, check=True).stdout.decode()

    call("init", "made", "--images", str(pictures))
    call("stage", "ingest", "--workspace", "made")
    assert set(dataset.read_manifest(tmp_path / "made" / layout.MANIFEST).classes) == {"café", "class1"}
    assert (tmp_path / "made" / layout.MANIFEST).stat().st_mode & 0o077 == 0


def test_init_below_a_file_is_refused(call: Callable[..., Said], tmp_path: Path, make_images: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("no folder")
    message = refused(call("init", tmp_path / "file" / "new", "--images", make_images(2, 4)))
    assert f"Cannot create the folder {tmp_path / 'file' / 'new'}: Not a directory. Choose another one." in message


def test_init_in_a_folder_that_may_not_be_written_is_refused_before_anything_is_loaded(
    call: Callable[..., Said], tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, theirs = make_images(2, 4), tmp_path / "theirs"
    theirs.mkdir()
    read_only(theirs, monkeypatch)
    message = refused(call("init", theirs / "new", "--images", images, "--backbone", "unknown"))
    assert f"Cannot create the folder {theirs / 'new'}: Permission denied. Choose another one." in message


def test_init_names_what_to_install_for_a_remote(
    call: Callable[..., Said], tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dvc_s3", None)  # as where it is not installed
    message = refused(call("init", tmp_path / "new", "--images", make_images(2, 4), "--remote", "s3://bucket/key"))
    assert "requires 'dvc-s3' to be installed" in message
    assert "`pip install 'tlpipeline[s3]'`" in message
    assert not (tmp_path / "new").exists()


def test_init_makes_a_workspace_that_names_its_model_and_its_deployments_after_the_folder(
    call: Callable[..., Said], tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    import yaml

    said = call("init", tmp_path / "Steel Plates", "--images", make_images(2, 4))
    assert said.code == 0, said.err
    assert said.out.rstrip().endswith(f"Next: tlpipeline run --workspace '{tmp_path / 'Steel Plates'}'")  # as a shell takes it
    assert yaml.safe_load((tmp_path / "Steel Plates" / "params.yaml").read_text())["data"]["name"] == "steel-plates"
    deployments = yaml.safe_load((tmp_path / "Steel Plates" / "prefect.yaml").read_text())["deployments"]
    assert [d["name"] for d in deployments] == ["steel-plates-nightly", "steel-plates-on-data"]
    assert deployments[1]["triggers"][0]["match"] == {"prefect.resource.id": "tlpipeline.data.steel-plates"}
    assert history(tmp_path / "Steel Plates")[1:] == ("", "")


# --- run ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("cluster.workers", "999", "Set cluster.workers to"),
        ("cluster.workers", "two", "cluster.workers: expected a whole number of at least 0, found 'two'"),
        ("choose.case", "small_simlar", "found 'small_simlar'; did you mean small_similar"),
        ("choose.slice", "conv9", "found 'conv9'; its taps are conv1"),
        ("backbone.name", "resnet81", "did you mean resnet18"),
        ("train.override", "{cliq: 3}", "unknown recipe value 'cliq'; did you mean clip"),
        ("train.epochs", "0", "train.epochs: expected auto or a whole number of at least 1"),
    ],
)
def test_run_refuses_wrong_settings_at_once(call: Callable[..., Said], workspace: Path, key: str, value: str, says: str) -> None:
    set_param(workspace, key, value)
    before = history(workspace)
    assert says in refused(call("run", "--workspace", workspace))
    assert history(workspace) == before
    assert not (workspace / ".tlpipeline" / "prefect").exists(), "no server was started for it"


def test_run_refuses_an_unknown_key_with_its_path(call: Callable[..., Said], workspace: Path) -> None:
    with (workspace / "params.yaml").open("a") as file:
        file.write("  color: red\n")
    assert "params.yaml: cluster.color: there is no such setting; known: workers" in refused(call("run", "-w", workspace))


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        (".git", "expected a git repository"),
        (".dvc", "expected a DVC repository"),
        ("dvc.yaml", "expected the pipeline in"),
        ("params.yaml", "expected the settings in"),
        ("images", "expected the images in"),
    ],
)
def test_run_refuses_what_is_no_workspace(call: Callable[..., Said], workspace: Path, gone: str, says: str) -> None:
    path = workspace / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refused(call("run", "-w", workspace))
    assert says in message
    assert "`" in message, "a way out"


def test_run_refuses_a_detached_head_where_it_would_push(call: Callable[..., Said], workspace: Path, tmp_path: Path) -> None:
    from tlpipeline.workspace import create

    git.run(workspace, "switch", "--quiet", "--detach")
    create.check(workspace)  # nothing would be pushed
    git.run(workspace, "remote", "add", "origin", str(tmp_path / "origin.git"))
    message = refused(call("run", "-w", workspace))
    assert "expected a branch to push to origin, found a detached HEAD at" in message
    assert "`git switch main`" in message
    git.run(workspace, "switch", "--quiet", "-c", "mine")
    create.check(workspace)


@pytest.mark.slow
def test_run_in_a_clone_says_where_its_images_are_when_the_remote_stayed_behind(
    call: Callable[..., Said], workspace: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    git.run(tmp_path, "clone", "--quiet", str(workspace), str(clone))
    git.run(clone, "remote", "remove", "origin")
    message = refused(call("run", "-w", clone))
    assert f"the DVC remote {clone / '.dvc-remote'} is missing too" in message
    assert "`dvc remote modify --local storage url FOLDER/.dvc-remote`" in message
    local = ["remote", "modify", "--local", "storage", "url", str(workspace / ".dvc-remote")]
    for words in (local, ["pull", "images"]):
        subprocess.run([sys.executable, "-m", "dvc", *words], cwd=clone, check=True, capture_output=True)
    assert len(list((clone / "images").rglob("*.png"))) == len(list((workspace / "images").rglob("*.png")))


def test_run_in_a_clone_says_before_it_trains_that_its_origin_would_refuse_the_push(
    call: Callable[..., Said], workspace: Path, tmp_path: Path
) -> None:
    from tlpipeline.workspace import create

    clone = tmp_path / "clone"
    git.run(tmp_path, "clone", "--quiet", str(workspace), str(clone))
    shutil.copytree(workspace / "images", clone / "images")
    message = refused(call("run", "-w", clone))
    assert f"git cannot push to {workspace}, because the branch main is checked out there" in message
    assert "`git switch -c NAME`" in message
    assert "`git remote remove origin`" in message
    git.run(clone, "switch", "--quiet", "-c", "mine")
    create.check(clone)
    git.run(clone, "switch", "--quiet", "main")
    git.run(workspace, "config", "receive.denyCurrentBranch", "updateInstead")
    create.check(clone)
    git.run(clone, "remote", "set-url", "origin", f"file://{workspace}")
    git.run(workspace, "config", "receive.denyCurrentBranch", "refuse")
    with pytest.raises(WorkspaceError, match="the branch main is checked out"):
        git.push(clone)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder, images: ["--images", folder / "nothing"], "found nothing. Put one folder per class there"),
        (_empty, "found an empty folder"),
        (_no_classes, "and no folder. Sort the images"),
    ],
)
def test_run_refuses_images_that_cannot_replace_the_workspace_s(
    call: Callable[..., Said],
    workspace: Path,
    make_images: Callable[..., Path],
    prepare: Callable[[Path, Path], list[str | Path]],
    says: str,
) -> None:
    before = history(workspace), sorted(workspace.rglob("images/*/*"))
    options = prepare(workspace.parent, make_images(3, 4, name="good"))
    assert says in refused(call("run", "-w", workspace, *options))
    assert (history(workspace), sorted(workspace.rglob("images/*/*"))) == before


def test_images_that_make_no_data_set_do_not_replace_the_workspace_s(workspace: Path, make_images: Callable[..., Path]) -> None:
    from tlpipeline.errors import DataError
    from tlpipeline.workspace import create

    before = sorted(workspace.rglob("images/*/*"))
    with pytest.raises(DataError, match="at least two classes"):
        create.replace_images(workspace, make_images(1, 4))
    assert sorted(workspace.rglob("images/*/*")) == before
    create.replace_images(workspace, make_images(2, 4))
    assert sorted(p.name for p in (workspace / "images").iterdir()) == ["class0", "class1"]


# --- stage ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("profile", "manifest.parquet"),
        ("choose", "manifest.parquet, profile.json, alarms.json"),
        ("train", "manifest.parquet, case.json, race"),
        ("evaluate", "manifest.parquet, model"),
    ],
)
def test_a_stage_by_itself_says_which_of_its_inputs_are_missing(
    call: Callable[..., Said], workspace: Path, name: str, missing: str
) -> None:
    message = refused(call("stage", name, "-w", workspace))
    assert f"The stage {name} needs {missing}, found no such file" in message
    assert "`dvc repro`" in message


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_one_line_and_the_next_one_ends_as_if_it_had_not_been(
    call: Callable[..., Said], registered: Path, tmp_path: Path
) -> None:
    for key, value in {"choose.case": "large_similar", "train.epochs": "60"}.items():
        set_param(registered, key, value)
    assert call("stage", "choose", "-w", registered).code == 0
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(registered, undisturbed, symlinks=True)

    # A shell that starts the tests in the background has them ignore Ctrl-C, and what they start as well.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "tlpipeline", "stage", "train", "-w", str(registered)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        signal.signal(signal.SIGINT, ours)
        assert process.stderr
        told = list(itertools.takewhile(lambda line: "fine-tune epoch 1/60" not in line, process.stderr))
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert any("head solved, " in line for line in told)
    assert rest.splitlines()[-1] == "interrupted; checkpoints are kept, and the next run goes on from the last one"
    assert "Traceback" not in rest
    assert "epoch 60/60" not in rest
    weights, wanted = (root / "model" / "weights.safetensors" for root in (registered, undisturbed))
    assert weights.read_bytes() == wanted.read_bytes()  # the model that was there is still there

    again = call("stage", "train", "-w", registered)
    assert again.code == 0, again.err
    assert "head solved, " not in again.err  # it did not begin anew
    assert "epoch 60/60" in again.err
    assert weights.read_bytes() != wanted.read_bytes()
    assert call("stage", "train", "-w", undisturbed).code == 0
    assert weights.read_bytes() == wanted.read_bytes()
    assert (registered / "plots" / "history.csv").read_bytes() == (undisturbed / "plots" / "history.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_takes_the_server_with_it_that_it_started(workspace: Path, number: signal.Signals) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    command = [sys.executable, "-m", "tlpipeline", "run", "-w", str(workspace)]
    before = signal.signal(number, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as process:
        signal.signal(number, before)
        assert process.stderr
        first = process.stderr.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        servers = [child for child in children if b"uvicorn" in Path(f"/proc/{child}/cmdline").read_bytes()]
        process.send_signal(number)
        try:
            rest = process.stderr.read()
        finally:
            process.kill()  # if it has not ended, nobody waits for it
    assert first.startswith("ingest"), first + rest
    assert process.returncode == 128 + number, rest
    assert "interrupted; checkpoints are kept, and the next run goes on from the last one" in rest.splitlines()
    assert "Traceback" not in rest
    assert len(servers) == 1
    assert not Path(f"/proc/{servers[0]}").exists()
    lock.require_unlocked(workspace)


@pytest.mark.slow
def test_the_server_that_a_run_started_ends_with_it_even_if_it_is_killed(workspace: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    command = [sys.executable, "-m", "tlpipeline", "run", "-w", str(workspace)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stderr
        assert process.stderr.readline().startswith("ingest")
        started = psutil.Process(process.pid).children()
        assert any("uvicorn" in child.cmdline() for child in started)
        process.kill()
        _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def test_a_training_run_leaves_its_own_checkpoints_and_no_older_ones(call: Callable[..., Said], registered: Path) -> None:
    """`dvc repro` has yet to record it."""
    runs = registered / ".tlpipeline" / "runs"
    (runs / "small_similar-0123").mkdir(parents=True)
    (runs / "race-tuned-0123.jsonl").write_text("{}\n")
    assert call("stage", "train", "-w", registered).code == 0
    names = sorted(path.name for path in runs.iterdir())
    case = layout.read_case(registered).case
    assert names
    assert all(name.startswith(f"{case}-") and "0123" not in name for name in names), names


# --- data commit ----------------------------------------------------------------------------------------------------------------------


def test_data_commit_without_a_server_versions_and_says_that_nobody_was_told(
    call: Callable[..., Said], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for path in sorted((workspace / "images" / "class0").iterdir())[:4]:
        path.unlink()
    said = call("data", "commit", "-w", workspace, "-m", "Fewer")
    assert said.code == 0, said.err
    assert ": 68 files" in said.out
    assert "no event emitted" in said.out
    assert subprocess.run(["git", "log", "-1", "--format=%s"], cwd=workspace, capture_output=True, text=True).stdout == "Fewer\n"
    assert "images" not in history(workspace)[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"), [(["data", "commit"], "`tlpipeline data commit` again"), (["run"], "Start it (`prefect server start`), or unset")]
)
def test_a_server_that_does_not_answer_is_said(workspace: Path, words: list[str], says: str) -> None:
    # In a process of its own: Prefect reads its settings when it is imported.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-m", "tlpipeline", *words, "-w", str(workspace)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "emitted" not in done.stdout
    message = refused(Said(done.returncode, done.stdout, done.stderr))
    assert " Prefect server at http://127.0.0.1:9/api" in message
    assert says in message


def test_a_name_for_which_no_deployment_waits_is_said(workspace: Path) -> None:
    from tlpipeline.workspace import create

    assert create.missing_trigger(workspace) == ""
    set_param(workspace, "data.name", "work")  # which "workspace" begins with
    assert "waits for tlpipeline.data.work: data.name was changed" in create.missing_trigger(workspace)
    deployments = workspace / "prefect.yaml"
    deployments.write_text(deployments.read_text().replace("tlpipeline.data.workspace", "tlpipeline.data.*"))
    assert create.missing_trigger(workspace) == ""
    deployments.unlink()
    assert create.missing_trigger(workspace) == ""


# --- predict --------------------------------------------------------------------------------------------------------------------------


def test_predict_prints_class_and_probability(call: Callable[..., Said], registered: Path) -> None:
    images = sorted((registered / "images").glob("*/003.png"))
    said = call("predict", "workspace@v0", *images, "-w", registered)
    assert said.code == 0, said.err
    lines = [line.split("  ") for line in said.out.splitlines()]
    assert [path for path, _, _ in lines] == [str(p) for p in images]
    assert [label for _, label, _ in lines] == ["class0", "class1", "class2"]
    assert all(0.5 < float(probability) <= 1 for *_, probability in lines)


def test_predict_as_json_gives_all_probabilities_and_a_folder_says_what_its_version_says(
    call: Callable[..., Said], registered: Path
) -> None:
    image = registered / "images" / "class1" / "003.png"
    texts = ["workspace@v0.1.0", "workspace@latest", registered / "model"]
    found = [json.loads(call("predict", "--json", text, image, "-w", registered).out) for text in texts]
    assert found[0] == found[1] == found[2]
    (one,) = found[0]
    assert one["path"] == str(image)
    assert one["label"] == "class1"
    assert set(one["probabilities"]) == {"class0", "class1", "class2"}
    assert one["probability"] == one["probabilities"]["class1"] == max(one["probabilities"].values())
    assert sum(one["probabilities"].values()) == pytest.approx(1)


def test_predict_takes_a_folder_as_all_files_below_it(call: Callable[..., Said], registered: Path) -> None:
    (registered / "images" / "class1" / ".DS_Store").write_bytes(b"the system's")
    images = sorted((registered / "images").rglob("*.png"))
    said = call("predict", "workspace@v0", registered / "images", images[0], "-w", registered)
    assert said.code == 0, said.err
    assert [line.split("  ")[0] for line in said.out.splitlines()] == [str(p) for p in (*images, images[0])]


def test_predict_says_in_the_row_what_cannot_be_read_and_predicts_the_others(call: Callable[..., Said], registered: Path) -> None:
    folder = registered / "images" / "class1"
    whole = sorted(folder.glob("*.png"))
    before = call("predict", "workspace@v0", *whole, "-w", registered)
    (folder / "000-torn.png").write_bytes(whole[0].read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    (folder / "zz.png").symlink_to("nowhere")
    said = call("predict", "workspace@v0", folder, folder / "gone.png", "-w", registered)
    lines = said.out.splitlines()
    assert "".join(f"{line}\n" for line in lines if "  error: " not in line) == before.out
    torn, notes, link, gone = (line for line in lines if "  error: " in line)
    assert torn.startswith(f"{folder / '000-torn.png'}  error: broken: ")
    assert notes == f"{folder / 'notes.txt'}  error: not an image: the formats are {', '.join(FORMATS)}"
    assert link == f"{folder / 'zz.png'}  error: a link that leads nowhere"
    assert gone == f"{folder / 'gone.png'}  error: no such file"
    n = len(whole)
    assert refused(said).startswith(
        f"error: expected {n + 4} images, of which 4 cannot be read, such as {folder / '000-torn.png'}: broken: "
    )
    assert f"the {n} others are predicted" in refused(said)


def test_predict_writes_csv_and_parquet_with_a_row_for_each_image(call: Callable[..., Said], registered: Path, tmp_path: Path) -> None:
    images = [*sorted((registered / "images").glob("*/003.png")), tmp_path / "gone\udcff.png"]
    text = call("predict", "workspace@v0", *images, "-w", registered, "--format", "csv").out
    for name in ("rows.csv", "rows.parquet", "rows.json"):
        assert call("predict", "workspace@v0", *images, "-w", registered, "--out", tmp_path / name).code == 2
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8", errors="surrogateescape", newline="")))
    assert [row["path"] for row in rows] == [str(path) for path in images]
    assert [row["label"] for row in rows] == ["class0", "class1", "class2", ""]
    assert [row["error"] for row in rows] == ["", "", "", "no such file"]
    assert {row["model"] for row in rows} == {"workspace@v0.1.0"}
    assert [row["label"] for row in csv.DictReader(io.StringIO(text))] == [row["label"] for row in rows]
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["label"] for row in table] == ["class0", "class1", "class2", None]
    assert [row["p:class1"] for row in table[:3]] == pytest.approx([float(row["p:class1"]) for row in rows[:3]])
    assert table[3]["path"].endswith("gone\\udcff.png")
    assert [row["path"] for row in json.loads((tmp_path / "rows.json").read_text())] == [str(path) for path in images]
    assert "expected one of terminal, json, csv, parquet in --format" in refused(
        call("predict", "workspace@v0", *images, "-w", registered, "--format", "cvs")
    )
    assert "--out predictions.parquet" in refused(call("predict", "workspace@v0", *images, "-w", registered, "--format", "parquet"))


def test_predict_takes_patterns_and_tables(call: Callable[..., Said], registered: Path) -> None:
    (registered / "images" / "list.csv").write_text("path\nclass1/003.png\nclass2/004.png\n")
    said = call("predict", "workspace@v0", registered / "images" / "*" / "003.png", registered / "images" / "list.csv", "-w", registered)
    paths = [line.split("  ")[0].removeprefix(f"{registered / 'images'}/") for line in said.out.splitlines()]
    assert paths == ["class0/003.png", "class1/003.png", "class2/003.png", "class1/003.png", "class2/004.png"]
    assert "expected files that match" in refused(call("predict", "workspace@v0", registered / "*.nothing", "-w", registered))
    (registered / "images" / "list.csv").write_text("file\nclass1/003.png\n")
    assert "expected the column path" in refused(call("predict", "workspace@v0", registered / "images" / "list.csv", "-w", registered))


def test_what_is_no_folder_and_no_version_is_one_clear_sentence(call: Callable[..., Said], tmp_path: Path) -> None:
    message = refused(call("predict", "workspace@v0", "image.png", "-w", tmp_path))
    assert f"found no folder workspace@v0 and no workspace at {tmp_path}" in message
    assert "Name one: --onnx model.onnx" in refused(call("export", "workspace@v0", "-w", tmp_path))


@pytest.mark.parametrize(
    ("model", "image", "says"),
    [
        ("workspace@v0", "plots/empty", "expected images in plots/empty, found an empty folder. Name image files"),
        ("workspace@v7", "images/class0/003.png", "found 'v7'; registered: workspace@v0.1.0"),
        ("workspace#prod", "images/class0/003.png", "tlpipeline registry promote workspace@v0.1.0"),
        ("workspace#production", "images/class0/003.png", "Did you mean #prod?"),
        ("workspace#staging", "images/class0/003.png", "tlpipeline registry promote workspace@v0.1.0 --stage staging --new-stage`"),
        ("wrkspace@v0", "images/class0/003.png", "did you mean workspace?"),
        ("images", "images/class0/003.png", "expected a model folder"),
        ("workspace@v0", "images/class0/nothing.png", "such as images/class0/nothing.png: no such file; nothing is predicted"),
        (
            "workspace@v0",
            "params.yaml",
            f"such as params.yaml: not an image: the formats are {', '.join(FORMATS)}; nothing is predicted. Replace",
        ),
        ("workspace@v0", ".tlpipeline/torn.png", "such as .tlpipeline/torn.png: broken: "),
    ],
)
def test_predict_refuses(
    call: Callable[..., Said], registered: Path, monkeypatch: pytest.MonkeyPatch, model: str, image: str, says: str
) -> None:
    monkeypatch.chdir(registered)
    Path("plots/empty").mkdir()
    Path(".tlpipeline/torn.png").write_bytes(Path("images/class0/003.png").read_bytes()[:300])
    assert says in refused(call("predict", model, image))


def read_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody write a folder, as far as whoever asks is told; root, who may run the tests, could in truth."""
    real = os.access

    def access(path: Any, mode: int) -> bool:
        return not (mode & os.W_OK and Path(path).is_relative_to(root)) and real(path, mode)

    monkeypatch.setattr(os, "access", access)


@pytest.mark.parametrize("others", [0, 1])
def test_predict_reads_no_pipe_and_no_device(call: Callable[..., Said], registered: Path, others: int) -> None:
    os.mkfifo(registered / "pipe")
    images = sorted((registered / "images").rglob("*.png"))[:others]
    for path in (registered / "pipe", "/dev/zero"):
        said = call("predict", registered / "model", path, *images, "--workspace", registered)
        assert said.code == 2
        assert f"{path}" in said.err
        assert "a pipe or a device, not a regular file" in said.err
        assert len(said.out.splitlines()) == 1 + others


def test_names_of_files_classes_and_models_do_not_steer_the_terminal(call: Callable[..., Said], registered: Path) -> None:
    description = registered / "model" / "model.json"
    description.write_text(description.read_text().replace('"class1"', json.dumps("Äpfel \u202e\x1b[31m\x07")))
    image, broken = registered / "a\x1b]0;title\x07 é\n.png", registered / "b\x1b[2J.png"
    shutil.copy(registered / "images" / "class1" / "003.png", image)
    broken.write_bytes(b"none")
    said = call("predict", registered / "model", image, broken, "-w", registered)
    assert said.out.startswith(rf"{registered}/a\x1b]0;title\x07 é\n.png  Äpfel \u202e\x1b[31m\x07  ")
    assert len(said.out.splitlines()) == 2
    assert rf"{registered}/b\x1b[2J.png: not an image" in said.err
    said = call("registry", "list", "-w", "c\x1b[2J")
    assert r"expected a workspace at c\x1b[2J" in refused(said)


@pytest.mark.parametrize("text", ["\x1b[31m", "\r", "\x9b2J", "\u202e", "\u2066", "\udc80", "\x7f", "\u2028"])
def test_what_steers_a_terminal_is_escaped_wherever_text_is_drawn(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    escaped = text[0].encode("unicode_escape").decode() + text[1:]
    assert printable(f"naïve 名前\t{text}\n") == f"naïve 名前\t{escaped}\n"
    console = Console(width=80, file=io.StringIO(), force_terminal=True, record=True)
    console.print(table(("name",), [(f"naïve {text}",)]))
    assert f"naïve {escaped}" in console.export_text()
    with cli._Bar() as bar:
        bar(Event("train", 1, 1, f"naïve {text}"))
    assert f"naïve {escaped}" in capsys.readouterr().err


def test_predict_calls_only_what_the_workspace_or_the_user_names(call: Callable[..., Said], registered: Path) -> None:
    description = registered / "model" / "model.json"
    description.write_text(description.read_text().replace('"demonstration"', '"nets:resnet20"'))
    form = ("predict", registered / "model", registered / "images", "--workspace", registered)
    assert "--trust nets:resnet20" in refused(call(*form))
    assert "expected a tap of nets:resnet20" in refused(call(*form, "--trust", "nets:resnet20"))  # it was built


def test_predict_writes_nothing_into_a_workspace_that_can_only_be_read(
    call: Callable[..., Said], registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole() -> dict[Path, int]:
        return {p: p.lstat().st_mtime_ns for p in registered.rglob("*") if p.relative_to(registered).parts[:2] != (".dvc", "tmp")}

    shutil.rmtree(registered / ".tlpipeline" / "models", ignore_errors=True)
    image = registered / "images" / "class1" / "003.png"
    before = whole()
    with monkeypatch.context() as other:
        read_only(registered, other)
        said = call("predict", "workspace@v0", image, "-w", registered)
    assert said.code == 0, said.err
    assert whole() == before
    assert call("predict", "workspace@v0", image, "-w", registered) == said


@pytest.mark.parametrize(
    "words",
    [["run"], ["stage", "ingest"], ["data", "commit"], ["cache", "clear"], ["registry", "promote", "workspace@v0"]],
)
def test_what_would_write_says_that_a_workspace_can_only_be_read(
    call: Callable[..., Said], registered: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(registered)
    before = history(registered)
    with monkeypatch.context() as other:
        read_only(registered, other)
        message = refused(call(*words, "-w", registered))
    assert f"expected a writable workspace, found {registered}, which you may only read" in message
    assert history(registered) == before


# --- registry -------------------------------------------------------------------------------------------------------------------------


def test_the_cache_is_shown_bounded_and_emptied(call: Callable[..., Said], registered: Path, tmp_path: Path) -> None:
    shown = call("cache", "info", "-w", registered)
    assert "demonstration fc2 at 32 pixels" in shown.out
    assert "demonstration gradients at fc2" in shown.out
    assert re.search(r"0\.\d+ of 10 GB \(cache\.max_gb\)", shown.out)
    place = tmp_path / "copy"
    shutil.copytree(registered, place, symlinks=True)
    picture = next((place / "images").rglob("*.png"))
    before = call("predict", place / "model", picture, "-w", place)
    assert re.search(r"\d\.\d MB deleted", call("cache", "clear", "-w", place).out)
    assert not (place / ".tlpipeline" / "cache").exists()
    assert call("predict", place / "model", picture, "-w", place) == before
    set_param(place, "cache.max_gb", "0")
    assert "0.000 of 0 GB" in call("cache", "info", "-w", place).out


def test_the_cache_is_not_emptied_under_a_run(call: Callable[..., Said], registered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock.hold(registered), monkeypatch.context() as other:
        other.setenv("TLPIPELINE_LOCK_HOLDER", "another")  # as another process sees it, which the run did not start
        assert "Another run is using the workspace" in refused(call("cache", "clear", "-w", registered))
    assert (registered / ".tlpipeline" / "cache").exists()


def test_registry_lists_shows_promotes_and_refuses_to_roll_back_to_nothing(
    call: Callable[..., Said], registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(registered)
    listed = call("registry", "list").out
    assert "workspace@v0.1.0" in listed
    assert "small_similar" in listed
    assert call("registry", "show", "workspace@v0").out.startswith("# workspace@v0.1.0")
    assert "is in prod now (workspace#prod#1)" in call("registry", "promote", "workspace@v0").out
    assert "workspace@v0.1.0  prod" in call("registry", "list").out
    assert "found none. Promote another" in refused(call("registry", "rollback", "workspace"))
    assert "nothing to roll back" in refused(call("registry", "rollback", "workspace", "--stage", "staging"))


def test_registry_of_a_new_workspace_is_empty(call: Callable[..., Said], workspace: Path) -> None:
    assert call("registry", "list", "-w", workspace).out == "No model is registered yet.\n"
    assert "nothing is registered yet: `tlpipeline run`" in refused(call("registry", "show", "workspace@v1", "-w", workspace))


# --- the progress bar -----------------------------------------------------------------------------------------------------------------


def test_on_a_terminal_each_stage_has_one_line_with_its_name_and_bar_whatever_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tlpipeline.progress import Event

    for key, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "70", "LINES": "20"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with cli._Bar() as bar:
        bar(Event("profile", 3, 5, "gradients of [a] [/b]"))
        bar(Event("choose", 1, 1, "small_different: " + "a reason that is longer than any terminal is wide, " * 9))
        bar(Event("evaluate", 1, 4, "1 of 4 test images"))
    said = capsys.readouterr()
    assert said.out == ""
    lines = [re.sub(r"\x1b\[[\d;?]*\w", "", line).strip() for line in said.err.replace("\r", "\n").splitlines()]
    one, two, three = [line for line in lines if line][-3:]
    assert re.fullmatch(r"profile +━{24} 0:00:\d\d gradients of \[a\] \[/b\]", one)
    assert re.fullmatch(r"choose +━{24} 0:00:\d\d small_different: a reason .*…", two)
    assert re.fullmatch(r"evaluate +━+╺?╸?━+ 0:00:\d\d 1 of 4 test images", three)
    assert max(map(len, (one, two, three))) <= 70


def test_not_on_a_terminal_what_a_stage_said_last_stands_before_the_next_stage(capsys: pytest.CaptureFixture[str]) -> None:
    from tlpipeline.progress import Event

    with cli._Bar() as bar:
        bar(Event("evaluate", 3, 5, "3 of 5"))
        bar(Event("gate", 5, 5, "5 of 5"))
        bar(Event("report", 1, 2, "1 of 2"))
    assert capsys.readouterr().err.splitlines() == ["evaluate  3 of 5", "gate      5 of 5", "report    1 of 2"]


@pytest.mark.parametrize(
    ("copies", "rejected", "says"),
    [(0, 0, "12 in 3 classes"), (1, 0, "1 exact copy not counted"), (2, 1, "2 exact copies not counted, 1 file left out (quarantine.csv)")],
)
def test_a_run_accounts_for_every_file(copies: int, rejected: int, says: str) -> None:
    from tlpipeline.workspace.release import Summary

    words = {"alarms": (), "case": "c", "reason": "r", "champion": "", "version": "", "new": False, "outcome": "o", "report": "p"}
    summary = Summary(12, 3, copies, rejected, accuracy=1.0, low=0.9, high=1.0, seconds={}, **words)  # type: ignore[arg-type]
    assert str(summary).splitlines()[0].endswith(says)


def test_dvc_draws_no_bars_of_its_own_between_ours() -> None:
    from dvc.progress import Tqdm
    from dvc_data.callbacks import Tqdm as OfData

    from tlpipeline.versioning import dvc

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    dvc.silence()
    for bars in (Tqdm, OfData):
        with bars(total=3, file=Terminal()) as bar:
            assert bar.disable


@pytest.mark.slow
@pytest.mark.server
def test_a_temporary_server_that_does_not_start_in_time_is_one_message(workspace: Path, tmp_path: Path) -> None:
    hurried = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "0", "PREFECT_HOME": str(tmp_path / "prefect")}
    line = [sys.executable, "-m", "tlpipeline", "run", "-w", str(workspace)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **hurried})
    message = refused(Said(done.returncode, done.stdout, done.stderr))
    assert "expected Prefect's temporary server to start, but: " in message
    assert "`prefect server start`" in message


@pytest.mark.parametrize("name", ["x; touch mark", "$(touch mark)", "`touch mark`", "--help", "-rf", "x\ntouch mark"])
def test_a_name_is_never_a_command_or_an_option(
    name: str, call: Callable[..., Said], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    for words in (["registry", "promote", "--", name], ["registry", "show", "--", name], ["registry", "rollback", "--", name]):
        said = call(*words)
        assert said.code == 2
        assert "Traceback" not in said.err
        assert "found no" in said.err or "found none" in said.err
    assert not (workspace / "mark").exists()
