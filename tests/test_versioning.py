"""DVC and git as they really are: workspaces, stages that run once and are recorded as they ran, one lock for every entrance."""

import errno
import json
import os
import re
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from ruamel.yaml import YAML

from tests.helpers.datasets import on, put, tiny
from tests.helpers.images import paint
from tests.helpers.processes import run_python
from tests.helpers.workspaces import dvc_status, flip, set_param
from tlpipeline.data import dataset, splits
from tlpipeline.data.splits import TEST, TRAIN, VAL
from tlpipeline.errors import BackboneError, DataChanged, DataError, ParamsError, Unreachable, WorkspaceError
from tlpipeline.files import file_md5, unlink
from tlpipeline.params import load
from tlpipeline.progress import silent
from tlpipeline.registry.versions import Registration
from tlpipeline.versioning import dvc as versioning
from tlpipeline.versioning import git, lock
from tlpipeline.workspace import create, layout, release, stages

# As little as the pipeline can do: what is tested is who runs it.
CHEAP = {"profile.images": "16", "profile.images_max": "16", "choose.draws": "100", "train.epochs": "1", "cluster.workers": "0"}
OUTPUTS = [
    layout.MANIFEST, layout.QUARANTINE, layout.PROFILE, layout.QUALITY, layout.ALARMS, layout.PROBE, layout.CASE, layout.MODEL, layout.HISTORY, layout.METRICS,
    layout.CLASSES, layout.PREDICTIONS, layout.CONFUSION, layout.RACE, layout.PLANE,
]  # fmt: skip


def never() -> None:
    raise AssertionError("a stage ran that was up to date")


def lock_text(root: Path) -> str:
    return (root / "dvc.lock").read_text(encoding="utf-8") if (root / "dvc.lock").exists() else ""


def contents(root: Path, *names: str) -> dict[str, bytes]:
    """Return the bytes of every file of these outputs."""
    files = [f for name in names for f in (sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name])]
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in files if f.is_file()}


def repro(root: Path, *arguments: str) -> str:
    """Run `dvc repro` and return what it printed."""
    done = run_python(root, "-m", "dvc", "repro", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bring_all_up_to_date(root: Path) -> list[str]:
    """Do what the flow does, and return the stages that had to run."""
    return [name for name in stages.STAGES if stages.bring_up_to_date(root, name, silent)]


@pytest.fixture(scope="module")
def _ingested(_blank_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ingested") / "workspace"
    shutil.copytree(_blank_workspace, root, symlinks=True)
    assert stages.bring_up_to_date(root, "ingest", silent)
    return root


@pytest.fixture
def ingested(_ingested: Path, tmp_path: Path) -> Path:
    """A fresh workspace in which ingest, and nothing else, is recorded."""
    shutil.copytree(_ingested, tmp_path / "workspace", symlinks=True)
    return tmp_path / "workspace"


# --- init -----------------------------------------------------------------------------------------------------------------------------


def test_init_makes_a_workspace_with_everything_committed(workspace: Path) -> None:
    lock.require_workspace(workspace)
    assert load(workspace / "params.yaml").data.name == "workspace"
    assert git.run(workspace, "log", "--format=%s").splitlines() == ["First images", "New workspace"]
    assert git.run(workspace, "status", "--short") == "M params.yaml"  # by the fixture: no workers
    tracked = git.run(workspace, "ls-files").splitlines()
    assert {"dvc.yaml", "params.yaml", "prefect.yaml", "splits.csv", "images.dvc", ".dvc/config", ".gitignore", ".dvcignore"} <= set(
        tracked
    )
    assert not [path for path in tracked if path.startswith(("images/", ".dvc-remote", ".tlpipeline"))]


def test_init_versions_and_publishes_every_image(workspace: Path) -> None:
    assert len(versioning.tracked_files(workspace, "images")) == 72
    assert not versioning.has_changed(workspace, "images")
    assert len([p for p in (workspace / ".dvc-remote").rglob("*") if p.is_file()]) == 73  # and the list of them


def test_init_refuses_a_folder_that_is_not_empty_and_leaves_it_as_it_was(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    put(tmp_path / "mine", {"thesis.txt": b"all of it"})
    with pytest.raises(WorkspaceError, match=r"expected a new or empty folder at .*mine, found files in it\. Choose another one\."):
        create.init(tmp_path / "mine", make_images(), "demonstration", "DEFAULT", None)
    assert contents(tmp_path, "mine") == {"mine/thesis.txt": b"all of it"}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"a.ppm": tiny(1)},
        {"one/a.ppm": tiny(1), "one/b.ppm": tiny(2), "one/c.ppm": tiny(3)},
        {"one/a.png": b"", "two/b.png": b"no image"},
        {f"{label}/{i}.ppm": tiny(10 * label + i) for label in (1, 2) for i in range(2)},
    ],
    ids=["empty", "no classes", "one class", "all broken", "too few"],
)
def test_init_with_images_that_cannot_be_used_leaves_no_folder(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="expected"):
        create.init(tmp_path / "new", put(tmp_path / "images", files), "demonstration", "DEFAULT", None)
    assert not (tmp_path / "new").exists()


def test_init_without_the_images_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a folder of images at .*nowhere, found nothing"):
        create.init(tmp_path / "new", tmp_path / "nowhere", "demonstration", "DEFAULT", None)
    assert not (tmp_path / "new").exists()


def test_init_with_an_unknown_backbone_leaves_no_folder(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    with pytest.raises(BackboneError):
        create.init(tmp_path / "new", make_images(), "demonstrations", "DEFAULT", None)
    assert not (tmp_path / "new").exists()


def test_an_init_that_fails_half_way_leaves_no_folder(tmp_path: Path, make_images: Callable[..., Path], monkeypatch: Any) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(versioning, "push", full)
    with pytest.raises(OSError, match="No space left"):
        create.init(tmp_path / "new", make_images(), "demonstration", "DEFAULT", None)
    assert not (tmp_path / "new").exists()


def test_a_relative_remote_lies_beside_where_the_user_stands(tmp_path: Path, make_images: Callable[..., Path], monkeypatch: Any) -> None:
    images = make_images(classes=2, each=20)
    monkeypatch.chdir(tmp_path)
    create.init(Path("new"), images, "demonstration", "DEFAULT", "store")
    assert len([p for p in (tmp_path / "store").rglob("*") if p.is_file()]) == 41
    monkeypatch.chdir(tmp_path / "new")
    assert versioning.push(Path()) == 0  # the same store from anywhere else: nothing is missing there


def test_a_remote_is_written_as_it_was_meant(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    meant = {
        str(tmp_path / "a" / ".dvc-remote"): "../.dvc-remote",  # inside: it moves with the workspace
        str(tmp_path / "shared"): str(tmp_path / "shared"),  # a full path stays where it is
        "store": "../../store",  # DVC counts from its own folder
        "s3://bucket/key": "s3://bucket/key",
    }
    for name, (remote, written) in zip("abcd", meant.items(), strict=True):
        (tmp_path / name).mkdir()
        versioning.init(tmp_path / name, remote)
        assert f"url = {written}\n" in (tmp_path / name / ".dvc" / "config").read_text()


PASSWORD = "s3cr@t"  # with a character that ends the part before the host elsewhere


@pytest.mark.parametrize(
    "remote", [f"https://user:{PASSWORD}@host/path", f"https://{PASSWORD}@host/path", f"ssh://user:{PASSWORD}@host/path"]
)
def test_a_password_in_the_url_of_a_remote_stays_in_the_clone(remote: str, tmp_path: Path) -> None:
    versioning.init(tmp_path, remote)
    scheme = remote.partition(":")[0]
    assert f"url = {scheme}://host/path\n" in (tmp_path / ".dvc" / "config").read_text()
    kept = tmp_path / ".dvc" / "config.local"
    assert f"url = {remote}\n" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0
    assert git.run(tmp_path, "check-ignore", ".dvc/config.local") == ".dvc/config.local"
    assert git.run(tmp_path, "grep", "--untracked", "--fixed-strings", PASSWORD, check=False) == ""


def test_a_password_among_the_parameters_of_a_url_stays_in_the_clone(tmp_path: Path) -> None:
    remote = "https://host/path?sv=2024&sig=s3cret%3D&api_key=s3cret"
    versioning.init(tmp_path, remote)
    assert "url = https://host/path?sv=2024&sig=***&api_key=***\n" in (tmp_path / ".dvc" / "config").read_text()
    assert f"url = {remote}\n" in (tmp_path / ".dvc" / "config.local").read_text()
    assert "s3cret" not in str(WorkspaceError(f"Cannot push to {remote}."))


def test_a_user_without_a_password_is_no_secret(tmp_path: Path) -> None:
    versioning.init(tmp_path, "ssh://git@host/path")
    assert "url = ssh://git@host/path\n" in (tmp_path / ".dvc" / "config").read_text()
    assert not (tmp_path / ".dvc" / "config.local").exists()


def test_a_password_is_in_no_message(tmp_path: Path, make_images: Callable[..., Path], capfd: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        remote = f"http://user:{PASSWORD}@127.0.0.1:{free.getsockname()[1]}/path"
    with pytest.raises(WorkspaceError) as caught:
        create.init(tmp_path / "new", make_images(), "demonstration", "DEFAULT", remote)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + "".join(capfd.readouterr())
    assert "Cannot push to the DVC remote" in told
    assert PASSWORD not in told
    assert "s3cr" not in told


def test_a_password_that_a_url_cannot_hold_is_refused_with_how_to_write_it(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    with pytest.raises(WorkspaceError, match=r"Write / # \? and @ of a password as %2F") as caught:
        create.init(tmp_path / "new", make_images(), "demonstration", "DEFAULT", "https://user:pa/ss@host/path")
    assert "ss@" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("password", "s3cret"), ("url", "https://user:s3cret@host/path"), ("url", "https://host/path?sig=s3cret")]
)
def test_a_password_that_a_run_would_commit_is_refused_with_where_to_keep_it(key: str, value: str, workspace: Path) -> None:
    create.check(workspace)
    for name, content in (("url", "https://host/path"), (key, value)):
        assert run_python(workspace, "-m", "dvc", "remote", "modify", "storage", name, content).returncode == 0
    with pytest.raises(
        WorkspaceError, match=rf"found {key} of the remote storage.*`dvc remote modify --local storage {key} VALUE`"
    ) as caught:
        create.check(workspace)
    assert "s3cret" not in str(caught.value)


def test_a_password_in_the_storage_of_a_cluster_is_refused(workspace: Path) -> None:
    set_param(workspace, "cluster.storage", "s3://key:s3cret@bucket/path")
    with pytest.raises(ParamsError, match=r"expected cluster\.storage in params\.yaml.*without a password"):
        create.check(workspace)


def test_a_name_for_commits_is_asked_for_before_anything_else(workspace: Path, monkeypatch: Any) -> None:
    for key in ("user.name", "user.email"):
        git.run(workspace, "config", "--unset", key, check=False)
    git.run(workspace, "config", "user.useConfigOnly", "true")
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.delenv(f"GIT_{who}_{what}", raising=False)
    monkeypatch.delenv("EMAIL", raising=False)
    for enter in (create.check, create.commit_data):
        with pytest.raises(WorkspaceError, match=r"`git config --global user\.name NAME` and `git config --global user\.email ADDRESS`"):
            enter(workspace)


@pytest.mark.slow
def test_an_init_that_was_killed_is_continued_by_the_same_command(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: Any
) -> None:
    images = make_images(2, 20)
    hook = (
        put(tmp_path / "template", {"hooks/pre-commit": b"#!/bin/sh\nkill -9 $(cut -d ' ' -f 4 /proc/$PPID/stat)\n"})
        / "hooks"
        / "pre-commit"
    )
    hook.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEMPLATE_DIR", str(tmp_path / "template"))
        assert run_python(tmp_path, "-m", "tlpipeline", "init", "new", "--images", str(images)).returncode == -9
    assert (tmp_path / "new" / "images").is_dir()
    with pytest.raises(WorkspaceError, match=r"found what an interrupted `tlpipeline init` with other options left\. Repeat that command"):
        create.init(tmp_path / "new", None, "demonstration", "DEFAULT", None)
    put(tmp_path / "new", {"notes.txt": b"mine"})
    create.init(tmp_path / "new", images, "demonstration", "DEFAULT", None)
    assert git.run(tmp_path / "new", "log", "--format=%s").splitlines() == ["First images", "New workspace"]
    assert len(versioning.tracked_files(tmp_path / "new", "images")) == 40
    assert (tmp_path / "new" / "notes.txt").read_bytes() == b"mine"
    with pytest.raises(WorkspaceError, match="expected a new or empty folder"):
        create.init(tmp_path / "new", images, "demonstration", "DEFAULT", None)


@pytest.mark.slow
def test_an_init_that_was_killed_after_its_last_commit_has_made_a_workspace(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: Any
) -> None:
    """What a user does there afterwards is not made anew by the same command."""
    images = make_images(2, 20)
    killing = b"#!/bin/sh\n[ $(git rev-list --count HEAD) = 2 ] && kill -9 $(cut -d ' ' -f 4 /proc/$PPID/stat)\n"
    hook = put(tmp_path / "template", {"hooks/post-commit": killing}) / "hooks" / "post-commit"
    hook.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEMPLATE_DIR", str(tmp_path / "template"))
        assert run_python(tmp_path, "-m", "tlpipeline", "init", "new", "--images", str(images)).returncode == -9
    before = git.head(tmp_path / "new")
    put(tmp_path / "new", {"params.yaml": b"train: {seed: 7}\n"})
    with pytest.raises(WorkspaceError, match="expected a new or empty folder"):
        create.init(tmp_path / "new", images, "demonstration", "DEFAULT", None)
    assert git.head(tmp_path / "new") == before
    assert (tmp_path / "new" / "params.yaml").read_bytes() == b"train: {seed: 7}\n"


# --- what is no workspace -------------------------------------------------------------------------------------------------------------


def test_a_stage_outside_a_dvc_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"DVC failed in .*not inside of a DVC repository"):
        versioning.run_stage(tmp_path, "ingest", never)


def test_a_pipeline_that_cannot_be_read_is_refused(workspace: Path) -> None:
    (workspace / "dvc.yaml").write_text("stages: [")
    with pytest.raises(WorkspaceError, match=r"DVC failed in .*'dvc.yaml'"):
        stages.bring_up_to_date(workspace, "ingest", silent)


def test_a_stage_before_its_dependencies_is_refused_with_what_is_missing(workspace: Path) -> None:
    with pytest.raises(
        WorkspaceError, match=r"The stage choose needs manifest.parquet, profile.json, alarms.json, found no such file.*dvc repro"
    ):
        versioning.run_stage(workspace, "choose", never)


# --- data -----------------------------------------------------------------------------------------------------------------------------


def test_a_small_class_gets_its_sides_once_and_lines_are_only_appended(workspace: Path) -> None:
    splits = workspace / layout.SPLITS
    assert splits.read_text() == "md5,split,label\n"
    put(workspace / "images", {f"small/{i}.ppm": content for i, content in enumerate(on(TRAIN, 4))})
    _, remarks = create.commit_data(workspace)
    first = splits.read_text()
    assert [line.split(",")[1:] for line in first.splitlines()[1:]] == [[TEST, "small"], [VAL, "small"]]
    assert remarks == ["new class: small with 4 files"]

    before = git.head(workspace)
    create.commit_data(workspace)
    assert splits.read_text() == first
    assert git.head(workspace) == before

    put(workspace / "images", {f"tiny/{i}.ppm": content for i, content in enumerate(on(TEST, 3))})
    create.commit_data(workspace)
    assert splits.read_text().startswith(first)
    assert [line.split(",")[1:] for line in splits.read_text()[len(first) :].splitlines()] == [[VAL, "tiny"], [TRAIN, "tiny"]]
    assert git.read_at(workspace, "HEAD", layout.SPLITS) == splits.read_text().strip()


def test_new_images_are_versioned_committed_and_published(workspace: Path) -> None:
    before = versioning.data_hash(workspace, "images")
    paint(0, 500).save(workspace / "images" / "class0" / "new.png")
    assert versioning.has_changed(workspace, "images")
    digest, _ = create.commit_data(workspace, "one more")
    assert digest == versioning.data_hash(workspace, "images") != before
    assert not versioning.has_changed(workspace, "images")
    assert "class0/new.png" in versioning.tracked_files(workspace, "images")
    assert git.run(workspace, "show", "--name-only", "--format=%s") == "one more\n\nclasses.csv\nimages.dvc"
    assert versioning.push(workspace) == 0


@pytest.mark.parametrize("place", [15, -1], ids=["unreadable", "another image"])
def test_an_image_that_is_altered_where_dvc_does_not_see_it_is_refused_with_both_hashes(workspace: Path, place: int) -> None:
    image = workspace / "images" / "class0" / "000.png"
    dvc_status(workspace)  # DVC notes time and size of each file
    before = versioning.content_md5(image)
    flip(image, place)
    assert not versioning.has_changed(workspace, "images")
    shutil.rmtree(workspace / layout.CACHE, ignore_errors=True)  # it was measured when it was versioned, and is not opened again
    with pytest.raises(
        DataError, match=rf"found 1 with another content .* such as class0/000\.png \(md5 .* for {before}\)\. Move them away"
    ):
        stages.ingest(workspace, silent)
    os.utime(image)
    stages.ingest(workspace, silent)


def test_an_image_that_was_measured_and_is_altered_unseen_is_refused_where_it_is_read(workspace: Path) -> None:
    image = workspace / "images" / "class0" / "000.png"
    dvc_status(workspace)
    before = versioning.content_md5(image)
    flip(image, -1)
    stages.ingest(workspace, silent)
    (row,) = [row for row in dataset.read_manifest(workspace / layout.MANIFEST).rows if row.path == "class0/000.png"]
    assert row.md5 == before  # what is registered is what is recorded
    with pytest.raises(DataChanged, match=rf"as it was listed \(md5 {before}\), found other content \(md5 .*`dvc checkout`"):
        dataset.read_image(workspace / "images", row)
    shutil.rmtree(workspace / layout.CACHE)
    with pytest.raises(DataChanged, match=rf"as it was listed \(md5 {before}\)"):
        list(dataset.facts_of(workspace / "images", [row], layout.open_facts(workspace, "check")))


def test_images_come_back_as_they_were_at_a_commit_even_without_the_cache(workspace: Path, tmp_path: Path) -> None:
    before, commit = contents(workspace, "images"), git.head(workspace)
    paint(0, 500).save(workspace / "images" / "class0" / "000.png")
    create.commit_data(workspace)
    shutil.rmtree(workspace / ".dvc" / "cache")
    versioning.download(workspace, commit, "images", tmp_path / "images")
    assert contents(tmp_path, "images") == before


def test_what_is_neither_in_the_cache_nor_in_the_remote_is_refused(workspace: Path, tmp_path: Path) -> None:
    shutil.rmtree(workspace / ".dvc" / "cache")
    shutil.rmtree(workspace / ".dvc-remote")
    with pytest.raises(WorkspaceError, match="Cannot find images of HEAD in the DVC cache or its remote: "):
        versioning.download(workspace, "HEAD", "images", tmp_path / "images")


def test_a_push_without_a_remote_is_refused_with_the_command_that_adds_one(workspace: Path) -> None:
    (workspace / ".dvc" / "config").write_text("[core]\n    analytics = False\n")
    with pytest.raises(WorkspaceError, match=r"expected a DVC remote to publish to, found none. Add one: `dvc remote add"):
        versioning.push(workspace)


def test_a_remote_whose_package_is_not_installed_is_told_with_what_to_install(workspace: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "dvc_s3", None)
    config = workspace / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.dvc-remote", "s3://bucket/key"))
    with pytest.raises(WorkspaceError, match=r"requires 'dvc-s3' to be installed.*`pip install 'tlpipeline\[s3\]'`") as caught:
        versioning.push(workspace)
    assert not isinstance(caught.value, Unreachable)  # a second try does not help
    shutil.rmtree(workspace / ".dvc" / "cache")
    with pytest.raises(WorkspaceError, match="requires 'dvc-s3' to be installed"):
        versioning.download(workspace, "HEAD", "images", workspace / "again")


def test_a_silent_remote_is_named_and_only_asked_for_what_is_not_here(workspace: Path, silent_server: str, tmp_path: Path) -> None:
    config = workspace / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.dvc-remote", f"http://{silent_server}/x"))
    says = rf"DVC remote storage \(http://{silent_server}/x\) within 0.5 seconds, found none.*dvc remote list"
    with pytest.raises(Unreachable, match=says):
        versioning.push(workspace)
    versioning.download(workspace, "HEAD", "images", tmp_path / "images")
    shutil.rmtree(workspace / ".dvc" / "cache")
    with pytest.raises(Unreachable, match=says):
        versioning.download(workspace, "HEAD", "images", tmp_path / "again")


@pytest.mark.slow
def test_a_command_ends_although_the_remote_is_silent(workspace: Path, silent_server: str) -> None:
    config = workspace / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.dvc-remote", f"http://{silent_server}/x"))
    done = run_python(workspace, "-m", "tlpipeline", "data", "commit")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected an answer from the DVC remote storage"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_dvc_cannot_version_is_refused_and_named_when_the_data_are_committed(workspace: Path) -> None:
    (workspace / "images" / "class0" / "dangling.png").symlink_to("nowhere")
    with pytest.raises(WorkspaceError, match=r"Cannot version images with DVC: .*Look there for broken links"):
        versioning.add(workspace, "images")
    with pytest.raises(DataError, match=r"broken links or devices, such as .*dangling\.png"):
        create.commit_data(workspace)


def test_a_link_to_a_folder_is_refused_because_dvc_would_not_version_what_is_behind_it(workspace: Path, tmp_path: Path) -> None:
    (workspace / "images" / "class0").rename(tmp_path / "elsewhere")
    (workspace / "images" / "class0").symlink_to(tmp_path / "elsewhere")
    before = git.head(workspace)
    with pytest.raises(DataError, match=r"found 1 links that lead outside, such as .*class0 to .*elsewhere\. .*Copy the images there"):
        create.commit_data(workspace)
    (workspace / "images" / "class0").unlink()
    (tmp_path / "elsewhere").rename(workspace / "images" / "class0")
    (workspace / "images" / "class3").symlink_to("class1")
    with pytest.raises(DataError, match=r"expected each folder in .* once, found .*class., which leads to .* again"):
        create.commit_data(workspace)
    assert git.head(workspace) == before


@pytest.mark.parametrize("entrance", ["init", "run", "replace", "commit"])
def test_a_link_that_leads_out_of_the_images_is_refused_with_its_target(
    entrance: str, workspace: Path, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    (tmp_path / "secret.png").write_bytes(tiny(1))
    images = workspace / "images" if entrance == "commit" else make_images(2, 20)
    (images / "class0" / "inside.png").symlink_to("001.png")
    (images / "class0" / "linked.png").symlink_to(tmp_path / "secret.png")
    before = git.head(workspace), contents(workspace, "images")
    enter: dict[str, Callable[[], Any]] = {
        "init": lambda: create.init(tmp_path / "new", images, "demonstration", "DEFAULT", None),
        "run": lambda: create.check(workspace, images),
        "replace": lambda: create.replace_images(workspace, images),
        "commit": lambda: create.commit_data(workspace),
    }
    with pytest.raises(DataError, match=r"found 1 links that lead outside, such as .*linked\.png to .*secret\.png\. .*remove the links"):
        enter[entrance]()
    assert (git.head(workspace), contents(workspace, "images")) == before


@pytest.mark.slow
def test_classes_of_images_that_a_stage_writes_keep_their_numbers(workspace: Path) -> None:
    images = workspace / "images"
    images.rename(workspace / "originals")
    (workspace / "images.dvc").unlink()
    (workspace / "making").mkdir()
    (workspace / "making" / "dvc.yaml").write_text(
        "stages:\n  copy:\n    cmd: cp -r ../originals ../images\n    deps: [../originals]\n    outs: [../images]\n"
    )
    (workspace / "classes.csv").unlink()
    git.commit(workspace, "Have a stage write the images", ["images.dvc", "classes.csv", "making/dvc.yaml"])
    create.commit_data(workspace)
    assert [line.split(",")[:2] for line in (workspace / "classes.csv").read_text().splitlines()[1:]] == [
        ["0", "class0"],
        ["1", "class1"],
        ["2", "class2"],
    ]
    (workspace / "originals" / "alpha").mkdir()
    for number in range(6):
        paint(0, 900 + number).save(workspace / "originals" / "alpha" / f"{number}.png")
    _, remarks = create.commit_data(workspace)
    assert "new class: alpha with 6 files" in remarks
    assert git.read_at(workspace, "HEAD", "classes.csv") == (workspace / "classes.csv").read_text().strip()
    stages.bring_up_to_date(workspace, "ingest", silent)
    manifest = dataset.read_manifest(workspace / "manifest.parquet")
    assert dict(zip(manifest.classes, manifest.indices, strict=True)) == {"class0": 0, "class1": 1, "class2": 2, "alpha": 3}


@pytest.mark.slow
def test_an_image_that_is_altered_in_place_does_not_pass_for_its_earlier_version(workspace: Path, tmp_path: Path) -> None:
    path = workspace / "images" / "class0" / "000.png"
    before = path.read_bytes()
    assert run_python(workspace, "-m", "dvc", "config", "cache.type", "hardlink").returncode == 0
    assert run_python(workspace, "-m", "dvc", "checkout", "--relink", "images.dvc").returncode == 0
    assert path.stat().st_nlink == 2
    assert not path.stat().st_mode & 0o222  # whoever is not root cannot alter it
    path.chmod(0o644)
    with path.open("r+b") as file:  # the file of the cache, too
        file.write(tiny(77))
        file.truncate()
    _, remarks = create.commit_data(workspace)
    assert any(remark.startswith("altered in place: 1 images") for remark in remarks)
    for revision, content in (("HEAD~1", before), ("HEAD", tiny(77))):
        versioning.download(workspace, revision, "images", tmp_path / revision)
        assert (tmp_path / revision / "class0" / "000.png").read_bytes() == content


def test_images_that_dvc_links_to_its_cache_are_versioned(workspace: Path) -> None:
    assert run_python(workspace, "-m", "dvc", "config", "cache.type", "symlink").returncode == 0
    shutil.rmtree(workspace / "images")
    assert run_python(workspace, "-m", "dvc", "checkout", "images.dvc").returncode == 0
    assert (workspace / "images" / "class0" / "000.png").is_symlink()
    before = versioning.data_hash(workspace, "images")
    assert create.commit_data(workspace)[0] == before


@pytest.mark.parametrize(
    ("where", "line", "says"),
    [
        (".dvcignore", "class2", r"24 files .*such as .*class2/000\.png"),
        (".dvcignore", "00?.png", r"30 files .*such as .*class0/000\.png"),
        ("images/class1/.dvcignore", "000.png", r"2 files .*such as .*class1/000\.png"),
        ("images/.dvcignore", "*.txt", r"1 files .*such as .*images/\.dvcignore"),
    ],
)
def test_images_that_dvc_is_told_to_ignore_are_refused_because_they_would_be_trained_on(
    workspace: Path, where: str, line: str, says: str
) -> None:
    with (workspace / where).open("a") as file:
        file.write(f"{line}\n")
    before = git.head(workspace), (workspace / "images.dvc").read_text()
    with pytest.raises(DataError, match=rf"A \.dvcignore excludes {says}.*would still be used.*Remove that line"):
        create.commit_data(workspace)
    assert (git.head(workspace), (workspace / "images.dvc").read_text()) == before


def test_a_folder_that_cannot_be_read_is_told_and_not_left_out(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("class0"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"Cannot read the folder .*class0: Permission denied\. Make it readable"):
        dataset.list_files(workspace / "images")


def test_images_that_were_not_versioned_are_before_others_take_their_place(workspace: Path, make_images: Callable[..., Path]) -> None:
    paint(0, 500).save(workspace / "images" / "class0" / "only here.png")
    create.replace_images(workspace, make_images(2, 5))
    assert not (workspace / "images" / "class0" / "only here.png").exists()
    assert git.run(workspace, "show", "--name-only", "--format=%s") == "Images before their replacement\n\nimages.dvc"
    shutil.rmtree(workspace / ".dvc" / "cache")  # the remote has them, too
    versioning.download(workspace, "HEAD", "images", workspace / "before")
    assert (workspace / "before" / "class0" / "only here.png").is_file()


def unplug(workspace: Path) -> Callable[[], None]:
    """Take the remote of a workspace away; return what brings it back."""
    remote, away = workspace / ".dvc-remote", workspace / ".dvc-away"
    remote.rename(away)
    remote.write_text("no folder")

    def plug() -> None:
        remote.unlink()
        away.rename(remote)

    return plug


def test_images_that_cannot_be_pushed_are_not_replaced(workspace: Path, make_images: Callable[..., Path]) -> None:
    paint(0, 500).save(workspace / "images" / "class0" / "only here.png")
    unplug(workspace)
    with pytest.raises(Unreachable, match="Cannot push to the DVC remote"):
        create.replace_images(workspace, make_images(2, 20))
    assert (workspace / "images" / "class0" / "only here.png").is_file()


def test_files_that_dvc_ignores_are_not_lost_when_the_images_are_replaced(workspace: Path, make_images: Callable[..., Path]) -> None:
    put(workspace, {".dvcignore": b"*.txt\n", "images/class0/notes.txt": b"only here"})
    with pytest.raises(DataError, match=r"excludes 1 files of .*such as .*notes\.txt\. They would be lost"):
        create.replace_images(workspace, make_images(2, 20))
    assert (workspace / "images" / "class0" / "notes.txt").read_bytes() == b"only here"


def test_what_a_failed_push_left_behind_is_pushed_by_the_next_one(workspace: Path) -> None:
    plug = unplug(workspace)
    paint(0, 500).save(workspace / "images" / "class0" / "only here.png")
    with pytest.raises(Unreachable):
        create.commit_data(workspace)
    assert not versioning.is_pushed(workspace)
    plug()
    (workspace / "images" / "class0" / "only here.png").unlink()
    create.commit_data(workspace, push_again=False)
    assert versioning.is_pushed(workspace)
    assert versioning.push(workspace) == 0
    shutil.rmtree(workspace / ".dvc" / "cache")
    versioning.download(workspace, "HEAD~1", "images", workspace / "before")
    assert (workspace / "before" / "class0" / "only here.png").is_file()


def test_a_clone_that_lacks_earlier_versions_pushes_what_it_has(workspace: Path, tmp_path: Path) -> None:
    paint(0, 500).save(workspace / "images" / "class0" / "new.png")
    create.commit_data(workspace)
    clone = tmp_path / "clone"
    git.run(tmp_path, "clone", "--quiet", str(workspace), str(clone))
    assert run_python(clone, "-m", "dvc", "remote", "modify", "--local", "storage", "url", str(workspace / ".dvc-remote")).returncode == 0
    assert run_python(clone, "-m", "dvc", "pull", "images.dvc").returncode == 0
    shutil.rmtree(tmp_path / "workspace" / ".dvc-remote")
    assert versioning.push(clone) > 0


# --- one stage ------------------------------------------------------------------------------------------------------------------------


def test_a_stage_that_is_up_to_date_does_not_run(ingested: Path) -> None:
    assert "ingest" not in dvc_status(ingested)
    assert not versioning.run_stage(ingested, "ingest", never)


def test_the_working_directory_does_not_matter(ingested: Path, monkeypatch: Any, tmp_path: Path) -> None:
    for place in (ingested, tmp_path, ingested.parent):
        monkeypatch.chdir(place)
        assert not versioning.run_stage(Path(os.path.relpath(ingested)), "ingest", never)


def test_an_output_that_was_deleted_comes_back_from_the_cache_without_a_run(ingested: Path) -> None:
    before = (ingested / layout.MANIFEST).read_bytes()
    (ingested / layout.MANIFEST).unlink()
    assert "ingest" in dvc_status(ingested)
    assert not versioning.run_stage(ingested, "ingest", never)
    assert (ingested / layout.MANIFEST).read_bytes() == before


def test_an_output_that_was_edited_comes_back_from_the_cache_without_a_run(ingested: Path) -> None:
    before = (ingested / layout.MANIFEST).read_bytes()
    (ingested / layout.MANIFEST).unlink()
    (ingested / layout.MANIFEST).write_bytes(b"edited")
    assert not versioning.run_stage(ingested, "ingest", never)
    assert (ingested / layout.MANIFEST).read_bytes() == before


def test_an_output_that_no_cache_has_is_made_again(ingested: Path) -> None:
    before = lock_text(ingested)
    (ingested / layout.QUARANTINE).unlink()
    assert stages.bring_up_to_date(ingested, "ingest", silent)
    assert (ingested / layout.QUARANTINE).read_text() == "path,reason\n"
    assert lock_text(ingested) == before


def test_an_output_that_is_altered_where_dvc_does_not_see_it_comes_back_from_the_cache(ingested: Path) -> None:
    before = (ingested / layout.MANIFEST).read_bytes()
    dvc_status(ingested)  # DVC notes time and size of each file
    flip(ingested / layout.MANIFEST)
    assert "ingest" not in dvc_status(ingested)
    assert not versioning.run_stage(ingested, "ingest", never)
    assert (ingested / layout.MANIFEST).read_bytes() == before


@pytest.mark.parametrize("missing", [False, True])
def test_an_output_that_is_damaged_in_the_cache_is_made_again_and_kept_whole(ingested: Path, missing: bool) -> None:
    before, md5 = (ingested / layout.MANIFEST).read_bytes(), versioning.content_md5(ingested / layout.MANIFEST)
    kept = ingested / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    flip(kept)
    if missing:
        (ingested / layout.MANIFEST).unlink()
    else:
        flip(ingested / layout.MANIFEST)
    assert stages.bring_up_to_date(ingested, "ingest", silent)
    assert (ingested / layout.MANIFEST).read_bytes() == kept.read_bytes() == before


def test_a_changed_dependency_makes_the_stage_run(ingested: Path) -> None:
    paint(0, 500).save(ingested / "images" / "class0" / "new.png")
    assert "ingest" in dvc_status(ingested)
    assert stages.bring_up_to_date(ingested, "ingest", silent)
    assert len(dataset.read_manifest(ingested / layout.MANIFEST).rows) == 73
    assert not versioning.run_stage(ingested, "ingest", never)


def test_an_image_that_another_one_replaces_is_seen_though_the_clock_went_back(ingested: Path) -> None:
    image = ingested / "images" / "class0" / "003.png"
    paint(0, 500).save(image)
    os.utime(image, (0, 0))
    assert stages.bring_up_to_date(ingested, "ingest", silent)
    rows = {row.path: row.md5 for row in dataset.read_manifest(ingested / layout.MANIFEST).rows}
    assert rows["class0/003.png"] == file_md5(image)


def test_where_training_runs_makes_no_stage_stale(ingested: Path) -> None:
    key = versioning.stage_key(ingested, "ingest")
    set_param(ingested, "cluster.workers", "1")
    assert "ingest" not in dvc_status(ingested)
    assert versioning.stage_key(ingested, "ingest") == key


@pytest.mark.parametrize("change", ["an image", "splits.csv", "the command"])
def test_what_changes_while_the_stage_runs_is_refused_and_nothing_is_recorded(ingested: Path, change: str) -> None:
    paint(0, 500).save(ingested / "images" / "class0" / "new.png")
    before = lock_text(ingested)

    def disturbed() -> None:
        stages.ingest(ingested, silent)
        if change == "an image":
            paint(1, 501).save(ingested / "images" / "class1" / "late.png")
        elif change == "splits.csv":
            splits.write_exceptions(ingested / "splits.csv", [splits.SplitException("0" * 32, TEST, "class0")])
        else:
            text = (ingested / "dvc.yaml").read_text()
            (ingested / "dvc.yaml").write_text(text.replace("tlpipeline stage ingest", "tlpipeline stage ingest --other"))

    moved = {"an image": "images", "splits.csv": "splits.csv", "the command": "dvc.yaml"}[change]
    with pytest.raises(WorkspaceError, match=rf"{moved} changed while the stage ingest ran"):
        versioning.run_stage(ingested, "ingest", disturbed)
    assert lock_text(ingested) == before


def test_a_stage_that_fails_is_not_recorded_and_leaves_its_old_outputs(ingested: Path) -> None:
    before = contents(ingested, layout.MANIFEST, layout.QUARANTINE), lock_text(ingested)
    for path in (ingested / "images" / "class0").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError):
        stages.bring_up_to_date(ingested, "ingest", silent)
    assert (contents(ingested, layout.MANIFEST, layout.QUARANTINE), lock_text(ingested)) == before


def test_seconds_go_to_a_file_that_neither_git_nor_dvc_keeps(ingested: Path) -> None:
    assert set(layout.read_run(ingested).seconds) == {"ingest"}
    assert git.run(ingested, "check-ignore", layout.RUN) == layout.RUN
    assert layout.RUN not in (ingested / "dvc.yaml").read_text()
    stages.bring_up_to_date(ingested, "ingest", silent)
    assert layout.read_run(ingested).seconds == {"ingest": None}


def test_a_run_json_that_a_kill_tore_is_taken_for_empty(registered: Path) -> None:
    for left in ("", '{"seconds": {"ingest": 0.'):
        (registered / layout.RUN).write_text(left)
        assert not stages.bring_up_to_date(registered, "profile", silent)
        assert layout.read_run(registered).seconds == {"profile": None}
        (registered / layout.RUN).write_text(left)
        registration = Registration("workspace@v0.1.0", False, "", None, "again")
        assert release.summary(registered, registration, release.write_report(registered, registration)).seconds == {}


@pytest.mark.parametrize("left", ["", '{"read": {"/somewhere": [{"pid": 1, "c'])
def test_a_list_of_dvc_that_a_kill_tore_does_not_stop_the_next_run(ingested: Path, left: str) -> None:
    listed = ingested / ".dvc" / "tmp" / "rwlock"
    listed.parent.mkdir(exist_ok=True)
    listed.write_text(left)
    (ingested / "dvc.lock").unlink()
    assert stages.bring_up_to_date(ingested, "ingest", silent)
    assert not any(json.loads(listed.read_text()).values())


def test_a_list_of_dvc_that_is_whole_is_left_to_dvc(ingested: Path) -> None:
    """Another command of DVC that is at work has its entries there, and is respected."""
    listed = ingested / ".dvc" / "tmp" / "rwlock"
    listed.parent.mkdir(exist_ok=True)
    whole = json.dumps({"read": {}, "write": {str(ingested / "manifest.parquet"): {"pid": os.getpid(), "cmd": "dvc other"}}})
    listed.write_text(whole)
    with versioning._repo(ingested):
        assert listed.read_text() == whole


# --- a full disk ----------------------------------------------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def check_that_a_full_disk_costs_nothing(root: Path) -> None:
    paint(0, 500).save(root / "images" / "class0" / "new.png")
    before = contents(root, layout.MANIFEST, layout.QUARANTINE), lock_text(root)
    with pytest.raises(WorkspaceError, match=r"expected room on the disk of .*, found none \(No space left on device\).* Free some space"):
        stages.bring_up_to_date(root, "ingest", silent)
    assert (contents(root, layout.MANIFEST, layout.QUARANTINE), lock_text(root)) == before
    assert not (root / ".tlpipeline" / "draft").exists()


@pytest.mark.parametrize("move", range(4))
def test_a_disk_that_fills_while_outputs_are_moved_into_place_leaves_all_the_old_ones(ingested: Path, monkeypatch: Any, move: int) -> None:
    honest, moves = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if "draft" in str(source) or "draft" in str(target):
            moves.append(source)
            if len(moves) == move + 1:
                no_space()
        honest(source, target)

    monkeypatch.setattr(os, "replace", replace)
    check_that_a_full_disk_costs_nothing(ingested)
    assert len(moves) > move


def test_a_disk_that_fills_while_an_output_is_written_leaves_all_the_old_ones(ingested: Path, monkeypatch: Any) -> None:
    def half(table: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"PAR1")
        no_space()

    monkeypatch.setattr(pyarrow.parquet, "write_table", half)
    check_that_a_full_disk_costs_nothing(ingested)


def test_a_disk_that_fills_while_dvc_keeps_the_outputs_records_nothing(ingested: Path, monkeypatch: Any) -> None:
    from dvc.stage import Stage

    paint(0, 500).save(ingested / "images" / "class0" / "new.png")
    before = lock_text(ingested)
    monkeypatch.setattr(Stage, "commit", no_space)
    with pytest.raises(WorkspaceError, match="expected room on the disk of"):
        stages.bring_up_to_date(ingested, "ingest", silent)
    assert lock_text(ingested) == before
    monkeypatch.undo()
    assert stages.bring_up_to_date(ingested, "ingest", silent)  # not lost: the next run does it


def test_an_old_output_that_is_a_link_into_the_cache_is_not_written_through(tmp_path: Path) -> None:
    put(tmp_path, {"cache/file": b"kept", "cache/folder/file": b"kept"})
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "cache" / name)
        unlink(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert set(contents(tmp_path, "cache").values()) == {b"kept"}
    unlink(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    unlink(tmp_path / "cache")


# --- one definition, two entrances ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entrances:
    """Two copies of one workspace: one run as the flow does, one by `dvc repro`; and what their first runs did."""

    flow: Path
    dvc: Path
    ran: list[str]
    printed: str


@pytest.fixture(scope="module")
def entrances(_blank_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Entrances:
    """Run the whole pipeline through each entrance."""
    folder = tmp_path_factory.mktemp("entrances")
    for name in ("flow", "dvc", "again"):
        shutil.copytree(_blank_workspace, folder / name, symlinks=True)
        for key, value in CHEAP.items():
            set_param(folder / name, key, value)
    return Entrances(folder / "flow", folder / "dvc", bring_all_up_to_date(folder / "flow"), repro(folder / "dvc"))


def test_each_entrance_ran_every_stage(entrances: Entrances) -> None:
    assert entrances.ran == list(stages.STAGES)
    assert [line for line in entrances.printed.splitlines() if line.startswith("Running")] == [
        f"Running stage '{n}':" for n in stages.STAGES
    ]


def test_both_entrances_write_the_same_lock(entrances: Entrances) -> None:
    assert lock_text(entrances.flow) == lock_text(entrances.dvc)
    assert list(yaml.safe_load(lock_text(entrances.flow))["stages"]) == list(stages.STAGES)


def test_both_entrances_train_the_same_model(entrances: Entrances) -> None:
    digest = versioning.stage_output(entrances.flow, "train", layout.MODEL)
    assert digest == versioning.stage_output(entrances.dvc, "train", layout.MODEL)
    assert digest.endswith(".dir")
    assert contents(entrances.flow, layout.MODEL) == contents(entrances.dvc, layout.MODEL)


def test_every_output_is_the_same_to_the_byte_whichever_process_wrote_it(entrances: Entrances) -> None:
    ours = contents(entrances.flow, *OUTPUTS)
    assert ours == contents(entrances.dvc, *OUTPUTS)
    recorded = yaml.safe_load(lock_text(entrances.flow))["stages"]
    assert sorted(OUTPUTS) == sorted(out["path"] for stage in recorded.values() for out in stage["outs"])


def test_the_same_run_twice_gives_the_same_bytes(entrances: Entrances) -> None:
    again = entrances.flow.with_name("again")
    assert bring_all_up_to_date(again) == list(stages.STAGES)
    assert contents(again, *OUTPUTS) == contents(entrances.flow, *OUTPUTS)
    assert lock_text(again) == lock_text(entrances.flow)


def test_after_the_flow_dvc_has_nothing_to_report_and_nothing_to_run(entrances: Entrances) -> None:
    before, kept = lock_text(entrances.flow), contents(entrances.flow, str(layout.CACHE))
    assert not dvc_status(entrances.flow)
    printed = repro(entrances.flow)
    assert "Running stage" not in printed
    assert "Data and pipelines are up to date." in printed
    assert lock_text(entrances.flow) == before
    assert contents(entrances.flow, str(layout.CACHE)) == kept != {}


def test_what_dvc_runs_again_finds_the_features_that_are_kept(entrances: Entrances, tmp_path: Path) -> None:
    """DVC deletes what a stage writes before it runs it; the cache is none of that, and nothing is computed or written there anew."""
    shutil.copytree(entrances.dvc, tmp_path / "copy", symlinks=True)
    kept = contents(tmp_path / "copy", str(layout.CACHE))
    assert "Running stage 'train'" in repro(tmp_path / "copy", "--force", "--single-item", "train")
    assert contents(tmp_path / "copy", str(layout.CACHE)) == kept != {}


def test_after_dvc_the_flow_has_nothing_to_run(entrances: Entrances) -> None:
    assert not dvc_status(entrances.dvc)
    assert bring_all_up_to_date(entrances.dvc) == []
    assert not dvc_status(entrances.dvc)


def test_a_run_leaves_only_what_is_to_be_committed(entrances: Entrances) -> None:
    for root in (entrances.flow, entrances.dvc):
        lines = git.run(root, "status", "--short", "--untracked-files=all").splitlines()
        assert sorted(line.split()[-1] for line in lines) == sorted(
            [
                "params.yaml",
                "dvc.lock",
                layout.QUARANTINE,
                layout.PROFILE,
                layout.QUALITY,
                layout.ALARMS,
                layout.CASE,
                layout.METRICS,
                layout.CLASSES,
            ]
        )


def test_nothing_of_the_finished_training_run_is_left(entrances: Entrances) -> None:
    assert not (entrances.flow / layout.RUNS).exists()


@pytest.mark.parametrize(
    ("key", "value", "stale"),
    [
        ("choose.case", "small_similar", ["choose"]),
        ("choose.gain", "2.5", ["choose"]),  # a profile measures; the settings of choose do not change it
        ("profile.tangent", "false", ["profile", "check"]),
        ("backbone.precision", "float32", ["profile", "check", "choose", "train"]),
        ("train.seed", "1", ["choose", "train"]),
        ("evaluate.confidence", "0.9", ["evaluate"]),
        ("gate.margin", "2.0", []),
        ("cache.max_gb", "5", []),
        ("cluster.max_failures", "5", []),
    ],
)
def test_a_setting_makes_exactly_the_stages_stale_that_use_it_whether_the_file_listed_it_or_not(
    entrances: Entrances, tmp_path: Path, key: str, value: str, stale: list[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(entrances.flow, root, symlinks=True)
    set_param(root, key, value)
    assert dvc_status(root) == stale


@pytest.mark.parametrize("entrance", ["flow", "dvc"])
def test_a_setting_that_is_taken_out_of_the_file_has_its_default_and_dvc_goes_on(
    entrances: Entrances, tmp_path: Path, entrance: str
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(entrances.flow, root, symlinks=True)
    content = YAML(typ="safe").load(root / "params.yaml")
    del content["choose"]["tolerance"]
    content["evaluate"] = None  # as if all its lines were commented out
    YAML().dump(content, root / "params.yaml")
    if entrance == "flow":
        assert bring_all_up_to_date(root) == ["choose", "evaluate"]
    else:
        assert re.findall(r"Running stage '(\w+)'", repro(root)) == ["choose", "evaluate"]
    assert dvc_status(root) == []
    assert layout.params_of(root).choose.tolerance == 0.5


def test_a_section_that_the_file_does_not_hold_is_added_empty(entrances: Entrances, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(entrances.flow, root, symlinks=True)
    path = root / "params.yaml"
    content = YAML(typ="safe").load(path)
    del content["evaluate"]
    YAML().dump(content, path)
    assert not stages.bring_up_to_date(root, "evaluate", silent), "an absent section is an empty one"
    assert path.read_text().endswith("\n\nevaluate: {}\n")
    assert dvc_status(root) == []


def test_dvc_runs_an_experiment_with_a_changed_setting(entrances: Entrances, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(entrances.flow, root, symlinks=True)
    git.commit(root, "Record the run", create.TRACKED)
    printed = run_python(root, "-m", "dvc", "exp", "run", "-S", "train.seed=1", "-S", "+choose.gain=2.5")
    assert printed.returncode == 0, printed.stderr
    params = layout.params_of(root)
    assert (params.train.seed, params.choose.gain) == (1, 2.5)
    assert dvc_status(root) == []


def test_a_parameter_that_is_edited_while_its_stage_runs_is_refused_and_nothing_is_recorded(entrances: Entrances, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(entrances.flow, root, symlinks=True)
    set_param(root, "choose.gain", "2.5")
    before = lock_text(root)

    def edited(key: str, value: str) -> Callable[[], None]:
        def run() -> None:
            stages.choose(root, silent)
            set_param(root, key, value)

        return run

    with pytest.raises(WorkspaceError, match=r"params\.yaml changed while the stage choose ran"):
        versioning.run_stage(root, "choose", edited("choose.gain", "3.5"))
    assert lock_text(root) == before
    assert versioning.run_stage(root, "choose", edited("gate.margin", "2.0"))  # none that this stage names


def test_a_recorded_hash_can_be_asked_of_now_and_of_a_commit(entrances: Entrances, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(entrances.flow, root, symlinks=True)
    manifest = versioning.stage_output(root, "ingest", layout.MANIFEST)
    assert manifest == versioning.stage_input(root, "train", layout.MANIFEST) != ""
    assert versioning.stage_input(root, "ingest", "images") == versioning.data_hash(root, "images")
    assert versioning.stage_output(root, "ingest", "no-such-output") == ""
    assert versioning.stage_output(root, "ingest", layout.MANIFEST, "HEAD") == ""
    git.commit(root, "Record the run", create.TRACKED)
    (root / "dvc.lock").unlink()
    assert versioning.stage_output(root, "ingest", layout.MANIFEST) == ""
    assert versioning.stage_output(root, "ingest", layout.MANIFEST, "HEAD") == manifest
