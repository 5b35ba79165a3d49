"""What goes into a workspace: a table of labels and groups are versioned with the images, and classes are numbered once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.workspaces import REPOSITORY, dvc_status, set_param
from tlpipeline.data import classes, dataset
from tlpipeline.errors import DataError
from tlpipeline.progress import silent
from tlpipeline.versioning import git
from tlpipeline.workspace import create, layout, release, settings, stages


@pytest.fixture
def flat(make_images: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A folder of images without class folders, and the table of their labels."""
    folder, lines = tmp_path / "flat", ["path,label,group"]
    folder.mkdir()
    for path in sorted(make_images(2, 24).rglob("*.png")):
        shutil.copy(path, folder / f"{path.parent.name}_{path.name}")
        lines.append(f"{path.parent.name}_{path.name},{path.parent.name},lot{int(path.stem) // 2}")
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(lines) + "\n")
    return folder, table


def test_a_change_of_the_table_reruns_ingest_and_is_versioned(flat: tuple[Path, Path], tmp_path: Path) -> None:
    images, table = flat
    root = tmp_path / "workspace"
    create.init(root, images, "demonstration", "DEFAULT", None, labels=table)
    assert layout.params_of(root).data.labels == "labels.csv"
    assert stages.bring_up_to_date(root, "ingest", silent)
    assert not stages.bring_up_to_date(root, "ingest", silent)
    rows = dataset.read_manifest(root / layout.MANIFEST).rows
    assert {row.group for row in rows} == {f"lot{i}" for i in range(12)}
    lines = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text("\n".join([line.replace(",class0,", ",other,") if i < 6 else line for i, line in enumerate(lines)]))
    assert "ingest" in dvc_status(root)
    _, remarks = create.commit_data(root)
    assert any(remark.startswith("new class: other") for remark in remarks)
    assert {"classes.csv", "labels.csv"} <= set(git.run(root, "show", "--name-only", "--format=").split())
    assert stages.bring_up_to_date(root, "ingest", silent)
    manifest = dataset.read_manifest(root / layout.MANIFEST)
    assert (manifest.classes, manifest.indices) == (("class0", "class1", "other"), (0, 1, 2))


def test_a_table_in_the_folder_of_images_is_versioned_with_them(flat: tuple[Path, Path], tmp_path: Path, workspace: Path) -> None:
    images, table = flat
    shutil.copy(table, images / "labels.csv")
    set_param(workspace, "data.labels", "images/labels.csv")
    create.replace_images(workspace, images)
    create.commit_data(workspace)
    assert stages.bring_up_to_date(workspace, "ingest", silent)
    manifest = dataset.read_manifest(workspace / layout.MANIFEST, workspace / layout.QUARANTINE)
    assert len(manifest.rows) == 48
    assert not manifest.rejected
    set_param(workspace, "data.labels", str(tmp_path / "labels.csv"))
    with pytest.raises(DataError, match="inside the workspace"):
        layout.source_of(workspace)


def test_the_pipeline_of_an_older_workspace_gets_its_inputs_when_they_are_used(workspace: Path) -> None:
    shutil.copy(REPOSITORY / "tests/data/old_workspace/dvc.yaml", workspace)
    paths = workspace / "params.yaml", workspace / "dvc.yaml"
    before = paths[1].read_text()
    assert not settings.add_inputs(*paths)
    assert paths[1].read_text() == before
    set_param(workspace, "data.group", "'_(.+)_'")
    assert settings.add_inputs(*paths)
    set_param(workspace, "data.labels", "labels.csv")
    assert settings.add_inputs(*paths)
    added = set(paths[1].read_text().splitlines()) - set(before.splitlines())
    assert added == {"      - data", "      - ${data.labels}"}
    set_param(workspace, "data.labels", "none")
    assert settings.add_inputs(*paths)
    assert "data.labels" not in paths[1].read_text()


def test_a_class_that_goes_and_one_that_gets_another_name_are_told(workspace: Path) -> None:
    assert stages.bring_up_to_date(workspace, "ingest", silent)
    (workspace / "images" / "class0").rename(workspace / "images" / "zero")
    _, remarks = create.commit_data(workspace)
    assert "new class: zero with 24 files" in remarks
    assert any("class class0 is gone, and zero has 24 of its 24 files" in remark for remark in remarks)
    stages.bring_up_to_date(workspace, "ingest", silent)
    texts = dataset.read_manifest(workspace / layout.MANIFEST, workspace / layout.QUARANTINE).remarks
    assert [remark.split(":")[0] for remark in texts] == ["vanished"]
    set_param(workspace, "data.rename", "{class0: zero}")
    stages.bring_up_to_date(workspace, "ingest", silent)
    manifest = dataset.read_manifest(workspace / layout.MANIFEST, workspace / layout.QUARANTINE)
    assert (manifest.classes, manifest.indices, manifest.remarks) == (("zero", "class1", "class2"), (0, 1, 2), ())
    assert [line.label for line in classes.read_map(workspace / layout.CLASS_MAP).lines] == ["class0", "class1", "class2", "zero"]


@pytest.mark.slow
def test_a_champion_stays_comparable_when_its_class_gets_another_name(registered: Path) -> None:
    (registered / "images" / "class0").rename(registered / "images" / "zero")
    set_param(registered, "data.rename", "{class0: zero}")
    set_param(registered, "train.seed", "1")
    create.commit_data(registered)
    for name in stages.STAGES:
        stages.bring_up_to_date(registered, name, silent)
    verdict = release.evaluate_gate(registered, silent)
    assert verdict is not None
    assert verdict.new_classes == ()
    assert verdict.champion_score > 0.5
    about = json.loads((registered / layout.MODEL / "model.json").read_text())
    assert (about["classes"], about["indices"]) == (["zero", "class1", "class2"], [0, 1, 2])
