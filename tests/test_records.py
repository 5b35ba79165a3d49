"""Files of ours that were cut off, edited or written by another version: each is read, or refused with its name and the way out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.decisions import decide
from tests.helpers.evidence import planted
from tests.helpers.mutations import damaged, edited
from tlpipeline import params
from tlpipeline.backbones import classifier
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice import explain, reasons
from tlpipeline.data import dataset
from tlpipeline.data.dataset import Manifest, Rejected, Row
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import DataError, PipelineError, WorkspaceError
from tlpipeline.evaluation import metrics
from tlpipeline.workspace import create, layout, release

PROFILE = planted([0.6, 0.8, 0.9])
DESCRIPTION = classifier.Description(
    "demonstration",
    "conv2",
    (TapPooling("conv2", 64, (1, 2)),),
    ("a", "b"),
    Transforms(32, 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear"),
)


@pytest.fixture
def decided(tmp_path: Path) -> Path:
    """A folder with a profile, a decision about it, and the description of a model."""
    shutil.copy(create.TEMPLATE / layout.PARAMS, tmp_path)
    (tmp_path / layout.PROFILE).write_text(json.dumps(PROFILE.to_json()))
    (tmp_path / layout.CASE).write_text(json.dumps(decide(PROFILE).to_json()))
    (tmp_path / layout.MODEL).mkdir()
    (tmp_path / layout.MODEL / classifier.WEIGHTS).touch()
    (tmp_path / layout.MODEL / classifier.DESCRIPTION).write_text(json.dumps(DESCRIPTION.to_json()))
    return tmp_path


def explained(root: Path) -> None:
    """Read the decision, and say all that there is to say about it."""
    decision, profile = release.load_decision(root)
    explain.text(decision, profile, 80)
    explain.markdown(decision, profile)
    explain.to_json(decision, profile)


READERS: dict[str, Callable[[Path], Any]] = {
    layout.PROFILE: explained,
    layout.CASE: explained,
    "model/model.json": layout.read_model,
    layout.PARAMS: layout.params_of,
}


@pytest.mark.parametrize("name", READERS)
def test_each_mutant_is_read_or_refused_as_a_mistake(name: str, decided: Path) -> None:
    text = (decided / name).read_text(encoding="utf-8")
    ends = {"read": 0, "refused": 0}
    for seed in range(400):
        by_value = seed % 3 and name != layout.PARAMS
        (decided / name).write_bytes(edited(text, seed) if by_value else damaged(text.encode(), seed))
        try:
            READERS[name](decided)
            ends["read"] += 1
        except PipelineError as error:
            assert name.rpartition("/")[2] in str(error)  # noqa: PT017
            ends["refused"] += 1
    assert min(ends.values()) > 3, ends  # else nothing was tried


def test_what_was_written_is_read_as_it_was(decided: Path) -> None:
    assert layout.read_profile(decided) == PROFILE
    assert layout.read_case(decided) == decide(PROFILE)
    assert layout.read_model(decided) == DESCRIPTION


@pytest.mark.parametrize("code", [*reasons.WEAK, *reasons.NO_RACE])
def test_every_code_that_has_words_can_be_read(code: str, decided: Path) -> None:
    content = decide(PROFILE).to_json() | ({"weak": [code]} if code in reasons.WEAK else {"no_race": code})
    (decided / layout.CASE).write_text(json.dumps(content))
    explained(decided)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("size", "32", "size: expected a valid integer, found '32'"),
        ("size", None, "size: expected a valid integer, found nothing"),
        ("classes", ..., "classes is missing"),
        ("kernel", 1, "it has kernel, which is unknown"),
        ("taps", [], "it has no taps"),
        ("majority", 1.5, "majority: expected less than or equal to 1, found 1.5"),
    ],
)
def test_the_key_is_named_with_what_was_expected_and_found(key: str, value: Any, words: str, decided: Path) -> None:
    content = PROFILE.to_json() | {key: value}
    if value is ...:
        del content[key]
    (decided / layout.PROFILE).write_text(json.dumps(content))
    with pytest.raises(WorkspaceError) as refused:
        layout.read_profile(decided)
    assert f"{decided / layout.PROFILE} as this version writes it, but {words}. `tlpipeline run` writes it anew" in str(refused.value)


# --- parquet and CSV ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest of 9 images, and of one that was left out."""
    rows = tuple(Row(f"a/{i}.png", f"{i:032x}", "ab"[i % 2], "train", 8, 8, "RGB", "") for i in range(9))
    dataset.write_manifest(Manifest(rows, (Rejected("a/x.png", "empty file"),), ()), tmp_path / "m.parquet", tmp_path / "q.csv")
    return tmp_path / "m.parquet"


def test_each_mutant_of_a_manifest_is_read_or_refused_as_a_mistake(manifest: Path) -> None:
    content = manifest.read_bytes()
    for seed in range(200):
        manifest.write_bytes(damaged(content, seed))
        try:
            assert all(isinstance(row.width, int) for row in dataset.read_manifest(manifest).rows)
        except DataError as error:
            assert str(manifest) in str(error)  # noqa: PT017


def test_a_manifest_keeps_its_groups_and_one_of_an_older_version_has_none(tmp_path: Path) -> None:
    rows = tuple(Row(f"a/{i}.png", f"{i:032x}", "a", "train", 8, 8, "RGB", "", group=f"scene{i // 2}") for i in range(4))
    path = tmp_path / "m.parquet"
    dataset.write_manifest(Manifest(rows, (), ()), path, tmp_path / "q.csv")
    assert [row.group for row in dataset.read_manifest(path).rows] == ["scene0", "scene0", "scene1", "scene1"]
    pq.write_table(pq.read_table(path).drop_columns(["group"]), path)
    assert [row.group for row in dataset.read_manifest(path).rows] == [""] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop_columns(["width"]), "the column width is missing"),
        (lambda t: t.set_column(1, "md5", pa.array(range(9))), "the column md5 holds int64, not str"),
        (lambda t: t.set_column(2, "label", pa.array(["a", None] * 4 + ["a"])), "the column label has gaps"),
        (lambda t: t.set_column(3, "split", pa.array(["trian"] * 9)), "the split 'trian'"),
        (lambda t: t.set_column(1, "md5", pa.array(["../x"] * 9)), "the md5 '../x'"),
    ],
)
def test_a_manifest_with_other_columns_is_refused_by_their_name(change: Callable[[Any], Any], words: str, manifest: Path) -> None:
    pq.write_table(change(pq.read_table(manifest)), manifest)
    with pytest.raises(DataError) as refused:
        dataset.read_manifest(manifest)
    assert words in str(refused.value)
    assert "tlpipeline run" in str(refused.value)


@pytest.mark.parametrize(
    "content", ["", "path\n", "path,reason\na\n", "path,reason\na,b,c\n", "path,reason,more\n", "\x00", 'path,reason\n"a']
)
def test_a_damaged_list_of_rejected_files_is_refused(content: str, manifest: Path) -> None:
    quarantine = manifest.with_name("q.csv")
    assert dataset.read_manifest(manifest, quarantine).rejected == (Rejected("a/x.png", "empty file"),)
    quarantine.write_text(content)
    with pytest.raises(DataError, match=r"q\.csv as this version writes it"):
        dataset.read_manifest(manifest, quarantine)


@pytest.mark.parametrize(
    "columns", [{}, {"md5": ["a"], "label": ["x"]}, {"md5": ["a"], "label": ["x"], "p:y": [0.5]}, {"md5": [], "label": [], "p:y": []}]
)
def test_predictions_without_their_columns_are_refused(columns: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "predictions.parquet")
    with pytest.raises(WorkspaceError, match=r"predictions\.parquet as this version writes it"):
        metrics.read_predictions(tmp_path / "predictions.parquet")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for read in (dataset.read_manifest, metrics.read_predictions):
        with pytest.raises(PipelineError, match=rf"expected the file {tmp_path / 'none'}, found no such file"):
            read(tmp_path / "none")


@pytest.mark.parametrize(
    "content", ["", "epoch,arm\n1,head\n", "epoch,arm,loss,accuracy,log_loss\n", "epoch,arm,loss,accuracy,log_loss\n1,a,b,c,d\n"]
)
def test_a_damaged_history_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / layout.HISTORY).write_text(content)
    with pytest.raises(WorkspaceError, match=r"history\.csv as this version writes it"):
        layout.read_history(tmp_path)


@pytest.mark.parametrize("place", ["data", "data:\n  size", "train:\n  override:\n    clip", "train:\n  override"])
@pytest.mark.parametrize(
    "value",
    [
        "2024-01-01",
        "2024-01-01T00:00:00+25:00",
        "2024-13-45",
        "!!binary eA==",
        "!!set {a}",
        "1e999",
        "!!timestamp x",
        "!!int x",
        "!!float x",
    ],
)
def test_settings_of_no_type_of_ours_are_refused(value: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(f"{place}: {value}\n")
    with pytest.raises(PipelineError, match=r"params\.yaml"):
        params.load(tmp_path / "params.yaml")
