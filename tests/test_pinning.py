"""A run keeps the data that it began with: images come, go and are committed while it trains."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.images import paint
from tests.helpers.workspaces import dvc_status, set_param
from tlpipeline.data import dataset
from tlpipeline.data.contents import PinnedFolder
from tlpipeline.data.facts import FactStore
from tlpipeline.errors import DataChanged
from tlpipeline.progress import Event, silent
from tlpipeline.registry import versions
from tlpipeline.versioning import dvc, git, lock
from tlpipeline.workspace import create, pinning, release, stages


def command(workspace: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a workspace as another user of it would: not as part of the run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "TLPIPELINE_LOCK"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(words, cwd=workspace, capture_output=True, text=True, env=environment)


@dataclass
class Meanwhile:
    """A listener that does something once, when a stage reports its first progress."""

    stage: str
    act: Callable[[], None]
    told: list[str] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if event.stage == self.stage and not self.told:
            self.told.append(event.text)
            self.act()


def change(workspace: Path) -> None:
    """Add an image, remove some, replace some, and commit: all that people do while a run trains."""
    images = workspace / "images"
    paint(0, 500).save(images / "class0" / "new.png")
    for number in range(8):
        (images / "class1" / f"{number:03d}.png").unlink()
        (images / "class2" / f"{number:03d}.png").unlink()
        paint(2, 600 + number).save(images / "class2" / f"{number:03d}.png")
    done = command(workspace, sys.executable, "-m", "tlpipeline", "data", "commit", "-m", "Meanwhile")
    assert done.returncode == 0, done.stderr
    paint(0, 501).save(images / "class0" / "later.png")  # and another one, which nobody commits


def run(workspace: Path, listener: Any = silent) -> release.Summary:
    """Run the steps of the flow."""
    with create.exclusive(workspace, 0):
        with lock.recording(workspace):
            create.commit_data(workspace)
            pinned = pinning.pin(workspace)
        for name in stages.STAGES:
            stages.bring_up_to_date(workspace, name, listener, pinned)
        registration = release.register(workspace, release.evaluate_gate(workspace, listener, pinned), pinned)
        return release.summary(workspace, registration, release.write_report(workspace, registration, pinned=pinned))


@dataclass(frozen=True)
class Changed:
    """A workspace in which images changed during a run, the commit of the data that the run began with, and what the run returned."""

    workspace: Path
    began: str
    summary: release.Summary


@pytest.fixture(scope="module")
def changed(_blank_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """Images were added, removed, replaced and committed while the run trained; read only."""
    workspace = tmp_path_factory.mktemp("changed") / "workspace"
    shutil.copytree(_blank_workspace, workspace, symlinks=True)
    began = git.head(workspace)
    meanwhile = Meanwhile("train", lambda: change(workspace))
    summary = run(workspace, meanwhile)
    assert meanwhile.told
    return Changed(workspace, began, summary)


@pytest.mark.slow
def test_a_run_ends_with_the_data_that_it_began_with(changed: Changed) -> None:
    assert (changed.summary.version, changed.summary.images) == ("workspace@v0.1.0", 72)
    (version,) = versions.versions(changed.workspace, "workspace")
    listed = {row.path for row in versions.manifest_of(changed.workspace, version).rows}
    assert "class1/000.png" in listed
    assert not listed & {"class0/new.png", "class0/later.png"}
    recorded = git.read_at(changed.workspace, changed.began, "images.dvc")
    assert git.read_at(changed.workspace, version.commit, "images.dvc") == recorded
    assert dvc.stage_input(changed.workspace, "ingest", "images", version.commit) in str(recorded)
    assert dvc.data_hash(changed.workspace, "images") not in str(recorded)


@pytest.mark.slow
def test_the_registered_commit_follows_its_data_and_the_branch_keeps_the_newer_ones(changed: Changed) -> None:
    workspace = changed.workspace
    tagged = git.run(workspace, "rev-parse", "workspace@v0.1.0^{commit}")
    assert git.run(workspace, "rev-parse", f"{tagged}^") == changed.began
    assert git.run(workspace, "log", "--format=%s", "--first-parent", "-2").splitlines()[1] == "Meanwhile"
    assert tagged in git.run(workspace, "rev-list", "HEAD").splitlines()
    assert git.read_at(workspace, "HEAD", "images.dvc") == (workspace / "images.dvc").read_text().strip()
    assert git.read_at(workspace, "HEAD", "dvc.lock") == git.read_at(workspace, tagged, "dvc.lock")
    assert git.run(workspace, "status", "--porcelain") == ""


@pytest.mark.slow
def test_a_clone_of_the_tag_has_nothing_to_reproduce(changed: Changed, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--branch", "workspace@v0.1.0", str(changed.workspace), str(clone)], check=True)
    shutil.copytree(changed.workspace / ".dvc-remote", clone / ".dvc-remote")
    assert command(clone, "dvc", "pull").returncode == 0
    before = (clone / "dvc.lock").read_text()
    again = command(clone, "dvc", "repro")
    assert again.stdout.splitlines()[-1] == "Data and pipelines are up to date.", again.stderr
    assert (clone / "dvc.lock").read_text() == before
    assert dvc_status(clone) == []
    assert dvc.content_md5(clone / "model") == dvc.stage_output(clone, "train", "model")


@pytest.mark.slow
def test_the_next_run_takes_the_newer_data(changed: Changed, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(changed.workspace, workspace, symlinks=True)
    assert run(workspace).images == 72 - 8 + 2
    listed = {row.path for row in dataset.read_manifest(workspace / "manifest.parquet").rows}
    assert {"class0/new.png", "class0/later.png"} <= listed
    assert "class1/000.png" not in listed
    assert git.run(workspace, "status", "--porcelain") == ""


# --- the parts ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(listed: tuple[Path, list[dataset.Row]], tmp_path: Path) -> tuple[PinnedFolder, list[dataset.Row]]:
    """A pinned folder of images and its rows; the images are kept by their md5, as DVC keeps them."""
    folder, rows = listed
    for row in rows:
        (tmp_path / "contents" / row.md5[:2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / row.path, tmp_path / "contents" / row.md5[:2] / row.md5[2:])
    return PinnedFolder(folder, tmp_path / "contents"), rows


def test_an_image_that_is_gone_or_altered_is_read_as_it_was_pinned(kept: tuple[PinnedFolder, list[dataset.Row]]) -> None:
    folder, (first, second, third, *_) = kept
    before = [dataset.read_image(folder.path, row).tobytes() for row in (first, second, third)]
    (folder.path / first.path).unlink()
    paint(0, 700).save(folder.path / second.path)
    (folder.path / third.path).unlink()
    (folder.path / third.path).mkdir()
    assert [dataset.read_image(folder, row).tobytes() for row in (first, second, third)] == before
    facts = {row.path: about for row, about in dataset.facts_of(folder, [first, second, third], FactStore())}
    assert not any(about.reason for about in facts.values())
    for row in (first, second):
        with pytest.raises(DataChanged, match="If the folder of images changed during a run"):
            dataset.read_image(folder.path, row)


def test_an_image_that_is_kept_nowhere_is_refused(kept: tuple[PinnedFolder, list[dataset.Row]]) -> None:
    folder, (row, *_) = kept
    (folder.path / row.path).unlink()
    (folder.contents / row.md5[:2] / row.md5[2:]).unlink()
    with pytest.raises(DataChanged, match="found no such file"):
        dataset.read_image(folder, row)


def test_of_a_pinned_folder_the_recorded_files_are_listed_whatever_is_there_now(kept: tuple[PinnedFolder, list[dataset.Row]]) -> None:
    folder, rows = kept
    before = dataset.ingest(folder.path, {}, lambda done, total: None)
    hashes = {row.path: row.md5 for row in before.rows} | {".DS_Store": "0" * 32}
    source = dataset.Source(folder.path)
    (folder.path / rows[0].path).unlink()
    paint(1, 700).save(folder.path / rows[1].path)
    paint(1, 701).save(folder.path / "class1" / "new.png")
    shutil.rmtree(folder.path / "class2")
    after = dataset.ingest(folder, {}, lambda done, total: None, hashes=hashes, source=source)
    assert (after.rows, after.rejected) == (before.rows, before.rejected)


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """A git repository with two commits: files a and b, then another b."""
    git.run(tmp_path, "init", "--quiet", "--initial-branch", "main")
    for text in ("1", "2"):
        (tmp_path / "a").write_text("1")
        (tmp_path / "b").write_text(text)
        git.commit(tmp_path, f"b is {text}", ["a", "b"])
    return tmp_path


def test_a_commit_onto_an_earlier_one_is_merged_and_nothing_else_is_touched(history: Path) -> None:
    head = git.head(history)
    (history / "a").write_text("result")
    (history / "c").write_text("result")
    (history / "b").write_text("not committed")
    made = git.commit(history, "A run", ["a", "c", "missing"], onto=git.run(history, "rev-parse", "HEAD^"))
    assert [git.read_at(history, made, name) for name in "abc"] == ["result", "1", "result"]
    assert [git.read_at(history, "HEAD", name) for name in "abc"] == ["result", "2", "result"]
    assert git.run(history, "rev-parse", "HEAD^1", "HEAD^2").split() == [head, made]
    assert git.run(history, "symbolic-ref", "--short", "HEAD") == "main"
    assert git.run(history, "status", "--porcelain") == "M b"
    assert (history / "b").read_text() == "not committed"


def test_a_commit_onto_the_last_one_is_a_plain_commit(history: Path) -> None:
    (history / "a").write_text("result")
    made = git.commit(history, "A run", ["a"], onto=git.head(history))
    assert git.head(history) == made
    assert git.run(history, "rev-list", "--count", "HEAD") == "3"


def test_data_are_committed_beside_a_run_that_pinned_its_own_and_beside_no_other(workspace: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom tlpipeline.errors import PipelineError\nfrom tlpipeline.workspace import pinning\n"
    code += (
        "try:\n    with pinning.beside_a_run(Path(sys.argv[1])):\n        print('in')\nexcept PipelineError as error:\n    print(error)\n"
    )

    def said() -> str:
        return command(workspace, sys.executable, "-c", code, str(workspace)).stdout

    with lock.hold(workspace):
        assert f"Another run is using the workspace {workspace}: process {os.getpid()} (" in said()
        with lock.recording(workspace):
            pinned = pinning.pin(workspace)
        assert pinned == pinning.pinned_data(workspace)
        assert said() == "in\n"
        pinning.drop(workspace)
        assert pinning.pinned_data(workspace) is None


def test_a_stage_looks_at_nothing_that_is_pinned(registered: Path) -> None:
    with lock.recording(registered):
        pinned = pinning.pin(registered)
    assert pinned is not None
    shutil.rmtree(registered / "images" / "class0")
    for name in stages.STAGES:
        assert dvc.is_fresh(registered, name, pinned.recorded), name
        assert not stages.bring_up_to_date(registered, name, silent, pinned)
    assert not dvc.is_fresh(registered, "ingest")
    assert pinned.is_current(registered)
    (registered / "splits.csv").write_text("md5,split,label\n")
    assert pinned.is_current(registered) == (git.read_at(registered, "HEAD", "splits.csv") == "md5,split,label")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["labels.csv", "images/labels.csv"])
def test_whatever_says_the_classes_is_pinned_too(place: str, make_images: Callable[..., Path], tmp_path: Path) -> None:
    folder, workspace = make_images(each=8), tmp_path / "workspace"
    lines = [f"{path.relative_to(folder).as_posix()},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    text = "\n".join(["path,label", *lines]) + "\n"
    (tmp_path / "labels.csv").write_text(text)
    create.init(workspace, folder, "demonstration", "DEFAULT", None, labels=tmp_path / "labels.csv" if place == "labels.csv" else None)
    if place.startswith("images"):
        (workspace / place).write_text(text)
        set_param(workspace, "data.labels", place)
    create.commit_data(workspace)
    with lock.recording(workspace):
        pinned = pinning.pin(workspace)
    stages.ingest(workspace, silent)
    before = (workspace / "manifest.parquet").read_bytes(), (workspace / "quarantine.csv").read_bytes()
    shutil.rmtree(workspace / "images" / "class1")
    (workspace / place).write_text(text.replace("class0", "other"))
    (workspace / "classes.csv").write_text("index,label,images,like,shared\n0,other,8,,0\n")
    assert stages.bring_up_to_date(workspace, "ingest", silent, pinned)
    assert ((workspace / "manifest.parquet").read_bytes(), (workspace / "quarantine.csv").read_bytes()) == before
    assert not stages.bring_up_to_date(workspace, "ingest", silent, pinned)
