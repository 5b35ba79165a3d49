"""What changed in the images: every kind of change is told once, from `data diff` to the report."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.images import paint
from tests.helpers.workspaces import set_param
from tlpipeline.api import Workspace
from tlpipeline.cli import data_diff
from tlpipeline.data.changes import File, Move, compare
from tlpipeline.errors import WorkspaceError
from tlpipeline.progress import silent
from tlpipeline.versioning import git
from tlpipeline.workspace import history, layout, release, stages


def files(**classes: str) -> dict[str, File]:
    """Return files from class=contents: `cat="abc"` is three files of the class cat, whose contents are a, b and c."""
    return {f"{label}/{content}.png": File(content, label) for label, contents in classes.items() for content in contents}


def test_each_kind_of_change_is_told_once() -> None:
    before = files(cat="abcdef", dog="ghij", emu="xyz")
    now = files(cat="abcd", dog="ghij", ostrich="xyz")
    now |= {
        "cat/moved.png": now.pop("cat/a.png"),
        "dog/b.png": File("b", "dog"),
        "dog/new.png": File("n", "dog"),
        "dog/g.png": File("G", "dog"),
    }
    del now["cat/b.png"]
    changes = compare(before, now, "v1")
    assert changes.added == ("dog/new.png",)
    assert changes.removed == ("cat/e.png", "cat/f.png")
    assert changes.replaced == ("dog/g.png",)
    assert changes.moved == (Move("cat/a.png", "cat/moved.png", "cat", "cat"),)
    assert changes.relabeled[0] == Move("cat/b.png", "dog/b.png", "cat", "dog")
    assert changes.renamed == {"emu": "ostrich"}
    assert changes.counts == {"added": 1, "removed": 2, "replaced": 1, "moved": 1, "relabeled": 1, "in a renamed class": 3}
    assert changes.sizes == {"cat": (6, 3), "dog": (4, 6), "emu": (3, 0), "ostrich": (0, 3)}
    text = str(changes)
    for line in (
        "dog/new.png",
        "cat/b.png from cat to dog",
        "emu is ostrich now, with all its images",
        "cat: 6 to 3 images",
        "since      v1",
    ):
        assert line in text
    assert "gone" not in text, "a renamed class is not also told as gone"


def test_nothing_changed_is_said_and_is_false() -> None:
    changes = compare(files(cat="ab"), files(cat="ab"))
    assert not changes
    assert changes.summary == "nothing changed"


def test_copies_are_matched_one_to_one() -> None:
    before = {"cat/1.png": File("a", "cat")}
    now = {"cat/1.png": File("a", "cat"), "cat/2.png": File("a", "cat"), "dog/3.png": File("a", "dog")}
    assert compare(before, now).counts == {"added": 2}
    assert compare(now, before).counts == {"removed": 2}
    assert compare(before, {"dog/3.png": File("a", "dog"), "cat/2.png": File("a", "cat")}).counts == {"added": 1, "moved": 1}


@pytest.mark.parametrize(("now", "renamed"), [
    (files(dog="a", kitten="bcd"), {"cat": "kitten"}),  # all that is left of a class that is gone
    (files(dog="a", kitten="b"), {}),  # most of it was removed
    (files(dog="a", kitten="bc", kit="de"), {}),  # it was divided
    (files(dog="abcde"), {}),  # it went into a class that was there
    (files(dog="a", cat="b", kitten="cde"), {}),  # it is still there
])  # fmt: skip
def test_a_class_is_renamed_if_it_is_gone_and_a_new_one_has_what_is_left_of_it(now: dict[str, File], renamed: dict[str, str]) -> None:
    assert compare(files(dog="a", cat="bcde"), now).renamed == renamed


def test_a_commit_says_what_changed_and_a_diff_what_is_not_committed_yet(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ws = Workspace(workspace)
    images = workspace / "images"
    assert not ws.diff()
    assert "72 files, nothing changed" in str(ws.commit_data())
    first = git.head(workspace)
    (images / "class0" / "000.png").rename(images / "class1" / "a.png")
    (images / "class1" / "001.png").rename(images / "class1" / "b.png")
    paint(2, 900).save(images / "class2" / "new.png")
    assert ws.diff().counts == {"added": 1, "moved": 1, "relabeled": 1}
    said = str(ws.commit_data())
    assert "73 files, 1 added, 1 moved, 1 relabeled" in said
    assert "class2/new.png" in said
    assert not ws.diff()
    data_diff(first, "HEAD", json=True, workspace=workspace)
    assert json.loads(capsys.readouterr().out)["added"] == ["class2/new.png"]
    with pytest.raises(WorkspaceError, match="expected a git revision, such as HEAD~1"):
        ws.diff("no such thing")


def test_a_clone_fetches_the_list_of_an_earlier_version(workspace: Path, tmp_path: Path) -> None:
    ws = Workspace(workspace)
    (workspace / "images" / "class0" / "000.png").unlink()
    ws.commit_data()
    shutil.rmtree(workspace / ".dvc" / "cache")
    assert ws.diff("HEAD~1", "HEAD").removed == ("class0/000.png",)
    shutil.rmtree(workspace / ".dvc" / "cache")
    shutil.rmtree(workspace / ".dvc-remote" / "files")
    with pytest.raises(WorkspaceError, match="Cannot find the list of images at HEAD"):
        ws.diff("HEAD~1", "HEAD")


def test_another_label_in_the_table_is_a_relabeled_image(workspace: Path) -> None:
    ws = Workspace(workspace)
    paths = sorted(path.relative_to(workspace / "images").as_posix() for path in (workspace / "images").rglob("*.png"))
    table = workspace / "labels.csv"
    table.write_text("".join(["path,label\n", *(f"{path},{path.split('/')[0]}\n" for path in paths)]))
    set_param(workspace, "data.labels", "labels.csv")
    ws.commit_data()
    table.write_text(table.read_text().replace("class0/003.png,class0", "class0/003.png,class1"))
    assert ws.diff().relabeled == (Move("class0/003.png", "class0/003.png", "class0", "class1"),)


def test_a_run_says_what_changed_since_the_champion_and_how_the_champion_does_on_the_new_images(registered: Path) -> None:
    for index in range(300, 340):
        paint(0, index).save(registered / "images" / "class0" / f"{index}.png")
    Workspace(registered).commit_data()
    for name in stages.STAGES:
        stages.bring_up_to_date(registered, name, silent)
    verdict = release.evaluate_gate(registered, silent)
    assert verdict is not None
    new = [row for row in layout_rows(registered) if row.split == "test" and int(row.path.split("/")[1][:-4]) >= 300]
    assert new
    assert any(note.startswith(f"On the {len(new)} test images that are new since workspace@v0.1.0, it is right") for note in verdict.notes)
    registration = release.register(registered, verdict)
    changes = history.diff_of_run(registered, verdict.champion)
    told = release.summary(registered, registration, release.write_report(registered, registration, changes), changes)
    assert told.changes is not None
    assert told.changes.counts == {"added": 40}
    assert "40 added since workspace@v0.1.0" in str(told)
    assert "What changed in the images since workspace@v0.1.0" in (registered / release.REPORT).read_text(encoding="utf-8")
    assert history.diff_of_run(registered, "the majority class") is None


def layout_rows(root: Path) -> list:  # type: ignore[type-arg]
    """Return the rows of the manifest."""
    from tlpipeline.data import dataset

    return list(dataset.read_manifest(root / layout.MANIFEST).rows)
