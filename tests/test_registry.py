"""Versions and promotions as tags: what is published, what a killed run left, what GTO withdraws."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from tests.helpers.processes import run_python
from tests.helpers.workspaces import flip, set_param
from tlpipeline.errors import RegistryError, WorkspaceError
from tlpipeline.progress import silent
from tlpipeline.registry import versions
from tlpipeline.versioning import dvc, git
from tlpipeline.workspace import layout, release


@pytest.mark.slow
def test_a_promotion_that_is_not_published_is_taken_back_and_one_made_elsewhere_is_fetched_first(
    registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "origin.git"
    git.run(tmp_path, "init", "--quiet", "--bare", str(origin))
    git.run(registered, "remote", "add", "origin", str(origin))
    git.push(registered)
    version = versions.resolve(registered, "workspace@latest")
    hook = origin / "hooks" / "update"
    hook.write_text('#!/bin/sh\ncase "$1" in *prod*) echo "not today"; exit 1;; esac\n')
    hook.chmod(0o755)
    with pytest.raises(RegistryError, match=r"(?s)Cannot publish the promotion workspace#prod#1: .*The tag was removed; run `git pull`"):
        versions.promote(registered, version)
    assert not [tag for tag in git.tags(registered) if "#" in tag]
    hook.unlink()
    other = tmp_path / "other"
    git.run(tmp_path, "clone", "--quiet", str(origin), str(other))
    git.run(other, "tag", "--annotate", "-m", "elsewhere", "workspace#prod#1", version.commit)
    git.run(other, "push", "--quiet", "--tags", "origin")
    # The gate asks who is in production before it judges.
    monkeypatch.setattr(versions, "find_registered", lambda *_: None)
    verdict = release.evaluate_gate(registered, silent)
    assert verdict is not None
    assert verdict.champion == str(version)
    assert "workspace#prod#1" in git.tags(registered)
    assert versions.promote(registered, version) == "workspace#prod#2"


def test_a_workspace_names_the_networks_of_its_settings_now_and_of_its_versions(registered: Path) -> None:
    assert versions.names_network(registered, "demonstration")
    for network, tag in (("nets:resnet20", "workspace@v0.2.0"), ("nets:other", "draft")):
        set_param(registered, "backbone.name", network)
        git.commit(registered, network, ["params.yaml"])
        git.run(registered, "tag", tag)
    set_param(registered, "backbone.name", "resnet18")
    git.commit(registered, "resnet18", ["params.yaml"])
    assert [n for n in ("nets:resnet20", "nets:other", "resnet18") if versions.names_network(registered, n)] == [
        "nets:resnet20",
        "resnet18",
    ]
    (registered / "params.yaml").write_text("[")
    assert versions.names_network(registered, "nets:resnet20")
    assert not versions.names_network(registered.parent, "nets:resnet20")  # no workspace


# --- what a version is read from ------------------------------------------------------------------------------------------------------


def stored(root: Path, place: str, output: str = "model") -> list[Path]:
    """Return the files in which DVC's cache or its remote keeps a file or folder, the list of a folder first."""
    files = [f for f in sorted((root / output).rglob("*")) if f.is_file()] if (root / output).is_dir() else []
    hashes = [dvc.content_md5(root / output), *map(dvc.content_md5, files)]
    return [root / place / "files" / "md5" / md5[:2] / md5[2:] for md5 in hashes]


CACHE, REMOTE = ".dvc/cache", ".dvc-remote"


@pytest.mark.parametrize("damage", ["flipped", "emptied", "removed", "added"])
def test_a_version_that_is_kept_here_is_fetched_anew_where_it_is_not_as_it_was_recorded(registered: Path, damage: str) -> None:
    version = versions.resolve(registered, "workspace@latest")
    weights = versions.model_folder(registered, version) / "weights.safetensors"
    whole = weights.read_bytes()
    if damage == "flipped":
        flip(weights)
    elif damage == "emptied":
        weights.write_bytes(b"")
    elif damage == "removed":
        weights.unlink()
    else:
        weights.with_name("other.json").write_text("{}")
    folder = versions.model_folder(registered, version)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "weights.safetensors"]
    assert (folder / "weights.safetensors").read_bytes() == whole


def test_the_images_of_a_version_are_read_again_where_a_full_disk_left_an_empty_file(registered: Path) -> None:
    version = versions.resolve(registered, "workspace@latest")
    images = versions.trained_on(registered, version)
    [kept] = [path for path in (registered / ".tlpipeline" / "models").iterdir() if path.is_file()]
    kept.write_bytes(b"")
    assert versions.trained_on(registered, version) == images
    assert images


@pytest.mark.parametrize("part", range(3), ids=["list", "description", "weights"])
def test_a_damaged_cache_is_passed_over_for_the_remote_and_mended(registered: Path, part: int) -> None:
    damaged = stored(registered, CACHE)[part]
    whole = damaged.read_bytes()
    flip(damaged)
    folder = versions.model_folder(registered, versions.resolve(registered, "workspace@latest"))
    assert dvc.content_md5(folder) == dvc.content_md5(registered / "model")
    assert not damaged.exists() or damaged.read_bytes() == whole


def test_a_model_that_is_damaged_wherever_it_is_kept_is_refused_with_both_hashes_and_the_way_out(registered: Path) -> None:
    for place in (CACHE, REMOTE):
        flip(stored(registered, place)[2])
    version = versions.resolve(registered, "workspace@latest")
    recorded = dvc.content_md5(registered / "model")
    with pytest.raises(
        WorkspaceError, match=rf"(?s)Cannot find model of .* was damaged and is removed, .*expected the md5 {recorded}, found .*clone"
    ):
        versions.model_folder(registered, version)
    assert not (registered / ".tlpipeline" / "models" / recorded).exists()
    with pytest.raises(WorkspaceError, match=rf"expected the md5 {recorded}, found "):
        versions.model_folder(registered, version)


@pytest.mark.parametrize("kept", [CACHE, REMOTE])
@pytest.mark.parametrize("before", ["missing", "damaged"])
def test_a_version_that_several_fetch_at_once_is_there_for_all_of_them(
    registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, before: str
) -> None:
    monkeypatch.chdir(tmp_path)
    version = versions.resolve(registered, "workspace@latest")
    recorded = dvc.content_md5(registered / "model")
    if before == "damaged":
        flip(versions.model_folder(registered, version) / "weights.safetensors")
    if kept == REMOTE:
        shutil.rmtree(registered / CACHE)
    start = Barrier(4)

    def fetch(_: int) -> str:
        start.wait()
        return dvc.content_md5(versions.model_folder(registered, version))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetch, range(4))) == [recorded] * 4
    assert [path.name for path in (registered / ".tlpipeline" / "models").iterdir()] == [recorded]
    assert Path.cwd() == tmp_path


@pytest.mark.slow
def test_four_first_predictions_at_once_all_succeed(registered: Path) -> None:
    picture = str(registered / "images" / "class1" / "003.png")
    words = (registered, "-m", "tlpipeline", "predict", "workspace@latest", picture)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: run_python(*words), range(4)))
    assert [(done.returncode, done.stderr) for done in several] == [(0, "predict   1 of 1 images\n")] * 4
    assert len({done.stdout for done in several}) == 1


def test_a_tag_that_is_moved_gives_the_model_of_its_commit(registered: Path) -> None:
    before = versions.model_folder(registered, versions.resolve(registered, "workspace@latest"))
    description = registered / "model" / "model.json"
    description.write_text(description.read_text().replace("{", "{ ", 1))
    run_python(registered, "-m", "dvc", "commit", "--force", "train")
    git.commit(registered, "another model", ["dvc.lock"])
    git.run(registered, "tag", "--force", "--annotate", "-m", "moved", "workspace@v0.1.0", "HEAD")
    after = versions.model_folder(registered, versions.resolve(registered, "workspace@latest"))
    assert (after / "model.json").read_bytes() == description.read_bytes() != (before / "model.json").read_bytes()


def test_a_tag_on_a_commit_without_a_model_is_refused(registered: Path) -> None:
    git.run(registered, "tag", "--force", "--annotate", "-m", "moved", "workspace@v0.1.0", "HEAD~1")
    with pytest.raises(WorkspaceError, match=r"expected model of workspace@v0\.1\.0 in the dvc\.lock of its commit .*, found none"):
        versions.model_folder(registered, versions.resolve(registered, "workspace@latest"))


def test_a_tag_of_a_version_that_is_on_no_commit_is_named_with_the_way_out(registered: Path) -> None:
    blob = git.run(registered, "rev-parse", "HEAD:params.yaml")
    git.run(registered, "tag", "notes", blob)
    git.run(registered, "tag", "-a", "workspace-old@v1.0.0", "-m", "another model", blob)
    assert [str(version) for version in versions.versions(registered, "workspace")] == ["workspace@v0.1.0"]
    git.run(registered, "tag", "-a", "workspace@v9.0.0", "-m", "a blob", blob)
    with pytest.raises(RegistryError, match=r"the tag workspace@v9.0.0 on a commit, .* `git tag --delete workspace@v9.0.0`"):
        versions.resolve(registered, "workspace@latest")


@pytest.mark.parametrize("content", ["", "{}", '{"name": "workspace", "version": 1, "stage": "", "before": ""}', "[]"])
def test_a_damaged_record_of_a_publication_is_refused_with_the_way_out(content: str, registered: Path) -> None:
    (registered / ".tlpipeline" / "publishing.json").write_text(content)
    with pytest.raises(RegistryError, match=r"publishing\.json as this version writes it.*Delete it"):
        versions.resume_publication(registered, promoting=True)


# --- a registration that is killed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def origin(registered: Path, tmp_path: Path) -> Path:
    """The bare repository to which the registered workspace was pushed; an accepted version is to be promoted at once."""
    set_param(registered, "gate.promote", "auto")
    git.run(tmp_path, "init", "--quiet", "--bare", "--initial-branch", "main", str(tmp_path / "origin.git"))
    git.run(registered, "remote", "add", "origin", str(tmp_path / "origin.git"))
    git.push(registered)
    return tmp_path / "origin.git"


def killed(root: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Register a version, and be killed before one of: push, assign, push the promotion."""
    (root / versions.CARD).write_text("newer")
    pushed: list[Path] = []
    push, gto = git.push, git.gto

    def push_git(where: Path) -> bool:
        pushed.append(where)
        if len(pushed) == {"push": 1, "assign": 0, "push the promotion": 2}[point]:
            raise KeyboardInterrupt
        return push(where)

    def run(where: Path, *arguments: str) -> None:
        if arguments[0] == point:
            raise KeyboardInterrupt
        gto(where, *arguments)

    with monkeypatch.context() as other:
        other.setattr(git, "push", push_git)
        other.setattr(git, "gto", run)
        with pytest.raises(KeyboardInterrupt):
            versions.publish(root, "workspace", (0, 1, 1), "newer", [versions.CARD], "prod")


@pytest.mark.slow
@pytest.mark.parametrize("point", ["push", "assign", "push the promotion"])
def test_what_a_killed_run_registered_is_published_and_promoted_by_the_next(
    registered: Path, origin: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    killed(registered, monkeypatch, point)
    told: list[Any] = []
    assert release.evaluate_gate(registered, told.append) is None
    assert told[0].text.startswith("workspace@v0.1.1 of an interrupted run is published now")
    assert sorted(git.tags(origin)) == ["workspace#prod#1", "workspace@v0.1.0", "workspace@v0.1.1"]
    assert str(versions.resolve(registered, "workspace#prod")) == "workspace@v0.1.1"
    assert git.head(origin) == git.head(registered)
    told.clear()
    assert release.evaluate_gate(registered, told.append) is None
    assert told == []


@pytest.mark.slow
def test_what_a_killed_run_would_have_promoted_does_not_undo_what_was_promoted_since_nor_what_the_settings_say_now(
    registered: Path, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(registered, monkeypatch, "push")
    manual = tmp_path / "manual"
    shutil.copytree(registered, manual, symlinks=True)
    set_param(manual, "gate.promote", "manual")
    release.evaluate_gate(manual, silent)
    assert sorted(git.tags(origin)) == ["workspace@v0.1.0", "workspace@v0.1.1"]

    other = tmp_path / "other"
    git.run(tmp_path, "clone", "--quiet", str(origin), str(other))
    git.run(other, "tag", "--annotate", "-m", "elsewhere", "workspace#prod#1", "workspace@v0.1.0^{commit}")
    git.run(other, "push", "--quiet", "--tags", "origin")
    release.evaluate_gate(registered, silent)
    assert sorted(git.tags(origin)) == ["workspace#prod#1", "workspace@v0.1.0", "workspace@v0.1.1"]
    assert str(versions.resolve(registered, "workspace#prod")) == "workspace@v0.1.0"


@pytest.mark.slow
def test_what_a_killed_run_registered_is_taken_back_where_it_cannot_be_published(
    registered: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(registered, monkeypatch, "push")
    origin.rename(origin.with_name("gone"))
    with pytest.raises(RegistryError, match=r"(?s)Cannot publish workspace@v0\.1\.1: .*Its tag was removed; run `git pull`, and run again"):
        release.evaluate_gate(registered, silent)
    assert list(git.tags(registered)) == ["workspace@v0.1.0"]
    assert versions.resume_publication(registered, True) is None


# --- what GTO withdraws ---------------------------------------------------------------------------------------------------------------


def standing(root: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return each version that is registered, with its stages."""
    return [(str(version), version.stages) for version in versions.versions(root, "workspace")]


@pytest.fixture
def two(registered: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with two versions, tagged a while ago, of which first the older and then the newer was promoted."""
    git.run(registered, "commit", "--quiet", "--allow-empty", "-m", "newer")
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2020-01-01T00:00:00Z")
    for tag, commit in (("@v0.1.0", "HEAD~1"), ("@v0.1.1", "HEAD"), ("#prod#1", "HEAD~1"), ("#prod#2", "HEAD")):
        git.run(registered, "tag", "--force", "--annotate", "-m", "why", f"workspace{tag}", commit)
    monkeypatch.delenv("GIT_COMMITTER_DATE")
    return registered


@pytest.mark.slow
def test_tags_that_gto_does_not_write_are_none_of_ours(two: Path) -> None:
    for tag in (
        "workspace#prod#x",
        "workspace#prod#",
        "workspace##3",
        "workspace@v9",
        "workspace@v9.9.9-rc1",
        "workspaces@v9.9.9",
        "workspace",
    ):
        subprocess.run(["git", "update-ref", f"refs/tags/{tag}", "HEAD"], cwd=two, check=True)
    assert standing(two) == [("workspace@v0.1.0", ()), ("workspace@v0.1.1", ("prod",))]
    assert versions.promote(two, versions.resolve(two, "workspace@v0.1.0")) == "workspace#prod#3"
    assert standing(two) == [("workspace@v0.1.0", ("prod",)), ("workspace@v0.1.1", ())]


@pytest.mark.slow
def test_a_version_that_gto_takes_out_of_a_stage_holds_it_no_more_and_is_not_rolled_back_to(two: Path) -> None:
    git.gto(two, "deprecate", "workspace", "v0.1.1", "prod")
    assert standing(two) == [("workspace@v0.1.0", ("prod",)), ("workspace@v0.1.1", ())]  # as `gto show` says
    with pytest.raises(RegistryError, match=r"expected an earlier version in prod before workspace@v0\.1\.0, found none"):
        versions.rollback(two, "workspace")
    git.gto(two, "deprecate", "workspace", "v0.1.0", "prod")
    assert standing(two) == [("workspace@v0.1.0", ()), ("workspace@v0.1.1", ())]
    with pytest.raises(RegistryError, match=r"expected a version of workspace in stage 'prod', found none"):
        versions.resolve(two, "workspace#prod")
    assert versions.promote(two, versions.resolve(two, "workspace@latest")) == "workspace#prod#5"
    assert standing(two)[1] == ("workspace@v0.1.1", ("prod",))


@pytest.mark.slow
def test_a_version_that_gto_withdraws_is_neither_listed_nor_champion_and_its_number_is_not_given_again(two: Path) -> None:
    case, classes = layout.read_case(two).case, list(layout.read_metrics(two).classes)
    git.gto(two, "deprecate", "workspace", "v0.1.1")
    assert standing(two) == [("workspace@v0.1.0", ("prod",))]
    assert str(versions.champion(two, "workspace")) == str(versions.resolve(two, "workspace@latest")) == "workspace@v0.1.0"
    assert versions.next_number(two, "workspace", classes, case) == (0, 1, 2)
    git.gto(two, "register", "workspace", "HEAD", "--version", "v0.1.1", "--force", "--simple", "false")  # takes it back
    assert standing(two) == [("workspace@v0.1.0", ()), ("workspace@v0.1.1", ("prod",))]


def test_a_model_that_gto_withdraws_is_registered_no_more_and_a_run_does_not_register_it_again(two: Path) -> None:
    case, classes = layout.read_case(two).case, list(layout.read_metrics(two).classes)
    git.gto(two, "deprecate", "workspace")
    assert standing(two) == []
    assert versions.champion(two, "workspace") is None
    with pytest.raises(RegistryError, match="found only withdrawn versions of 'workspace'"):
        versions.resolve(two, "workspace@latest")
    assert versions.next_number(two, "workspace", classes, case) == (0, 1, 2)
    assert release.evaluate_gate(two, silent) is None
    registration = release.register(two, None)
    assert (registration.version, registration.new) == ("", False)
    assert registration.reason == "this model was registered as workspace@v0.1.1, which was withdrawn; it is not registered again."


@pytest.mark.parametrize("behind", [False, True])
def test_promotions_count_in_the_order_in_which_gto_numbered_them_and_by_time_where_it_gave_none(
    two: Path, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if behind:  # a machine whose clock is
        monkeypatch.setenv("GIT_COMMITTER_DATE", "2019-01-01T00:00:00Z")
    git.run(two, "tag", "--annotate", "-m", "why", "workspace#prod#3", "HEAD~1")
    assert standing(two) == [("workspace@v0.1.0", ("prod",)), ("workspace@v0.1.1", ())]
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2090-01-01T00:00:00Z")
    git.run(two, "tag", "--annotate", "-m", "why", "workspace#prod", "HEAD")
    assert standing(two) == [("workspace@v0.1.0", ()), ("workspace@v0.1.1", ("prod",))]


@pytest.mark.slow
def test_a_model_is_rebuilt_from_its_tag(registered: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git.run(tmp_path, "clone", "--quiet", "--branch", "workspace@v0.1.0", str(registered), str(clone))
    for words in (
        ("remote", "modify", "--local", "storage", "url", str(registered / ".dvc-remote")),
        ("pull", "--quiet", "images.dvc"),
        ("repro", "--quiet"),
    ):
        done = run_python(clone, "-m", "dvc", *words)
        assert done.returncode == 0, done.stderr
    assert dvc.stage_output(clone, "train", layout.MODEL) == dvc.stage_output(registered, "train", layout.MODEL)
    assert git.run(clone, "status", "--porcelain") == "", "each file that git keeps is made anew, and none differs"
