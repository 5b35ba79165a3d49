"""Where classes, splits and groups come from: layouts of folders, a table of labels, groups, and zip files."""

import csv
import stat
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.datasets import hashes, md5, put, tiny
from tests.helpers.images import encoded, paint
from tlpipeline.data import archives
from tlpipeline.data.classes import ClassMap, Renames, read_map, vanished, write_map
from tlpipeline.data.dataset import Manifest, ingest, read_manifest, write_manifest
from tlpipeline.data.groups import find_series, group_key
from tlpipeline.data.layouts import split_named, unwrapped
from tlpipeline.data.sources import Rules, Source
from tlpipeline.data.splits import TEST, TRAIN, VAL, needed_exceptions, split_of
from tlpipeline.errors import DataError

LABELS = ("cat", "cow", "dog")


def listed(images: Path, **rules: Any) -> Manifest:
    return ingest(images, {}, lambda done, total: None, source=Source(images, Rules(**rules)))


def refusal(images: Path, **rules: Any) -> str:
    with pytest.raises(DataError) as caught:
        listed(images, **rules)
    return str(caught.value)


def laid_out(folder: Path, path: str, each: int = 30) -> Path:
    """Write images of three classes; `path` has {label}, {side} (train for three of four, then test), {i} and {place}."""
    for number, label in enumerate(LABELS):
        for i in range(each):
            side = "train" if i % 4 else "test"
            name = path.format(label=label, side=side, i=i, place=("berlin", "paris")[i % 2], fold=i % 5)
            put(folder, {name: tiny(number * 1000 + i)})
    return folder


# --- layouts --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", TRAIN), ("training_set", TRAIN), ("train-images", TRAIN), ("traindata", TRAIN), ("dev", VAL), ("valid", VAL),
        ("Validation Set", VAL), ("Testing", TEST), ("test_set", TEST), ("trainer", ""), ("contest", ""), ("set", ""), ("train_cat", ""),
    ],
)  # fmt: skip
def test_a_folder_that_is_named_like_a_split_is_one(name: str, split: str) -> None:
    assert split_named(name) == split


@pytest.mark.parametrize("names", [("Training", "Testing"), ("training_set", "test_set"), ("TRAIN", "test")])
def test_usual_names_of_given_splits_are_taken(tmp_path: Path, names: tuple[str, str]) -> None:
    images = laid_out(tmp_path / "images", "{side}/{label}/{i}.ppm")
    for name, given in zip(names, ("train", "test"), strict=True):
        (images / given).rename(images / f"new-{given}")
        (images / f"new-{given}").rename(images / name)
    manifest = listed(images)
    assert manifest.classes == LABELS
    assert {row.path for row in manifest.rows if row.split == TEST} == {r.path for r in manifest.rows if r.path.startswith(names[1])}


def test_a_layout_without_a_test_folder_divides_val(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "images", "{side}/{label}/{i}.ppm", each=80)
    (images / "test").rename(images / "dev")
    manifest = listed(images)
    assert {row.split for row in manifest.rows if row.path.startswith("train")} == {TRAIN}
    halves = Counter(row.split for row in manifest.rows if row.path.startswith("dev"))
    assert set(halves) == {VAL, TEST}
    assert min(halves.values()) > 15
    assert any("no test folder" in remark for remark in manifest.remarks)


def test_splits_inside_the_classes_are_taken(tmp_path: Path) -> None:
    manifest = listed(laid_out(tmp_path / "images", "{label}/{side}/{i}.ppm"))
    assert manifest.classes == LABELS
    assert all((row.split == TEST) == ("/test/" in row.path) for row in manifest.rows)


@pytest.mark.parametrize("path", ["{place}/{label}/{i}.ppm", "fold{fold}/{label}/{i}.ppm"])
def test_what_could_be_read_in_two_ways_is_refused_with_both(tmp_path: Path, path: str) -> None:
    images = laid_out(tmp_path / "images", path)
    text = refusal(images)
    assert "which all hold only folders, of the same names: cat, cow, dog" in text
    assert "data.class_folder: 2" in text
    assert 'data.group: "^[^/]+"' in text
    assert listed(images, class_folder=2).classes == LABELS
    assert len(listed(images, class_folder=1).classes) in (2, 5)


def test_the_outer_folders_can_be_the_groups(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "images", "site{fold}/{label}/{i}.ppm")
    manifest = listed(images, class_folder=2, group="^[^/]+")
    by_site = defaultdict(set)
    for row in manifest.rows:
        by_site[row.path.split("/")[0]].add(row.split)
    assert all(len(splits) == 1 for splits in by_site.values())


def test_a_test_side_without_labels_is_told_at_once(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "images", "train/{label}/{i}.ppm")
    put(images, {f"test/{i}.ppm": tiny(9000 + i) for i in range(5)})
    assert f"expected class folders in {images / 'test'}, found files and no folder" in refusal(images)


def test_folders_that_only_wrap_the_classes_are_seen_through(tmp_path: Path) -> None:
    images = laid_out(tmp_path / "archive", "photos/pictures/{label}/{i}.ppm")
    put(images, {"__MACOSX/photos/._x.png": b"x", "photos/.DS_Store": b"x"})
    assert unwrapped(images) == images / "photos" / "pictures"
    text = refusal(images / "photos")
    assert "found one, pictures, which holds cat, cow, dog" in text
    assert f"name {images / 'photos' / 'pictures'} as the folder of images" in text


def test_a_table_beside_the_images_is_named(tmp_path: Path) -> None:
    images = put(tmp_path / "set", {"images/1.ppm": tiny(1), "images/2.ppm": tiny(2), "labels.csv": b"path,label\n"})
    text = refusal(images)
    assert "found one folder, images, beside labels.csv" in text
    assert f"--labels {images / 'labels.csv'}" in text


# --- a table of labels ----------------------------------------------------------------------------------------------------------------


def table(path: Path, lines: list[Mapping[str, str]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(line) for line in lines]), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    return path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Sixty images of two classes in one folder, and the table of their labels beside it."""
    return put(tmp_path / "pictures", {f"{i:02d}.ppm": tiny(i) for i in range(60)})


def lines_of(flat: Path, **columns: Callable[[int], str]) -> list[dict[str, str]]:
    names = sorted(path.name for path in flat.iterdir())
    return [{"path": name, "label": "ab"[i % 2]} | {key: value(i) for key, value in columns.items()} for i, name in enumerate(names)]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_table_says_the_classes(flat: Path, tmp_path: Path, ending: str) -> None:
    manifest = listed(flat, labels=table(tmp_path / f"labels{ending}", lines_of(flat)))
    assert Counter(row.label for row in manifest.rows) == {"a": 30, "b": 30}
    assert all(row.split == split_of(row.md5) for row in manifest.rows)
    assert not manifest.rejected


def test_what_a_table_leaves_open_is_listed_with_the_reason(flat: Path, tmp_path: Path) -> None:
    lines = lines_of(flat)
    lines[0]["label"] = ""
    del lines[1]
    lines += [{"path": "gone.ppm", "label": "a"}, {"path": "03.ppm", "label": "a"}, {"path": "./04.ppm", "label": "a"}]
    manifest = listed(flat, labels=table(tmp_path / "labels.csv", lines))
    assert {r.path: r.reason for r in manifest.rejected} == {
        "00.ppm": "no label in labels.csv (line 2)",
        "01.ppm": "not in labels.csv",
        "03.ppm": "two labels in labels.csv (lines 4 and 62): b and a",
        "gone.ppm": "in labels.csv, but there is no such file",
    }
    assert len(manifest.rows) == 57


def test_a_table_may_give_splits_and_groups(flat: Path, tmp_path: Path) -> None:
    lines = lines_of(flat, split=lambda i: "Testing" if i >= 48 else "train", group=lambda i: f"patient{i // 6}")
    manifest = listed(flat, labels=table(tmp_path / "labels.csv", lines))
    for row in manifest.rows:
        number = int(row.path[:2])
        assert row.group == f"patient{number // 6}"
        assert row.split == (TEST if number >= 48 else split_of(group_key(row.group), carve_val=True))


def test_a_split_that_is_none_is_listed(flat: Path, tmp_path: Path) -> None:
    lines = lines_of(flat, split=lambda i: ("holdout", "test", "val")[i] if i < 3 else "train")
    manifest = ingest(flat, {}, lambda d, t: None, source=Source(flat, Rules(labels=table(tmp_path / "l.csv", lines))))
    assert [r.reason for r in manifest.rejected] == ["the split 'holdout' in l.csv (line 2) is none of train, val and test"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: {"file": line["path"], "breed": line["label"]}, "found file, breed. Rename the columns"),
        (lambda line: {"path": line["path"], "a": "0", "b": "1"}, r"multi-label.* not supported"),
        (lambda line: {"path": f"pictures/{line['path']}", "label": "a"}, "Write '00.ppm' for 'pictures/00.ppm'"),
        (lambda line: {"path": line["path"].removesuffix(".ppm"), "label": "a"}, "paths have their ending"),
        (lambda line: {"path": line["path"], "label": "a;b" if "3" in line["path"] else line["label"]}, r"found 'a;b'.*multi-label"),
        (lambda line: {"path": line["path"], "label": f"{int(line['path'][:2]) / 7:.2f}"}, r"found 60 numbers.*regression"),
    ],
)
def test_a_table_of_another_kind_is_refused_with_the_way_out(flat: Path, tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"(?s){words}"):
        listed(flat, labels=table(tmp_path / "labels.csv", [change(line) for line in lines_of(flat)]))


@pytest.mark.parametrize("content", [b"", b"path,label\n", b"path,label\n\xff\xfe,a\n", b"path,label\na.ppm\n", b'path,label\n"a,b\n'])
def test_a_damaged_table_is_refused(flat: Path, tmp_path: Path, content: bytes) -> None:
    for ending in ("csv", "parquet"):
        (tmp_path / f"labels.{ending}").write_bytes(content)
        assert "expected" in refusal(flat, labels=tmp_path / f"labels.{ending}")
    assert "found no such file" in refusal(flat, labels=tmp_path / "nowhere.csv")


def test_small_classes_of_a_table_get_their_splits(flat: Path, tmp_path: Path) -> None:
    lines = lines_of(flat)
    for i, name in enumerate(name for name, content in sorted(hashes(flat).items()) if split_of(content) == TRAIN):
        if i < 4:
            next(line for line in lines if line["path"] == name)["label"] = "rare"
    source = Source(flat, Rules(labels=table(tmp_path / "labels.csv", lines)))
    new, _ = needed_exceptions(flat, hashes(flat), {}, frozenset, source)
    manifest = ingest(flat, {line.md5: line.split for line in new}, lambda d, t: None, source=source)
    assert {row.split for row in manifest.rows if row.label == "rare"} == {TRAIN, VAL, TEST}


# --- groups ---------------------------------------------------------------------------------------------------------------------------


def scenes(folder: Path, count: int = 40, views: int = 4) -> Path:
    return put(folder, {f"{'ab'[s % 2]}/scene{s:03d}_{view}.ppm": tiny(s * views + view) for s in range(count) for view in range(views)})


def test_groups_by_an_expression_share_the_split_of_their_name(tmp_path: Path) -> None:
    manifest = listed(scenes(tmp_path / "images"), group=r"(scene\d+)_")
    for row in manifest.rows:
        assert row.group == row.path.split("/")[1][:8]
        assert row.split == split_of(group_key(row.group))
        assert row.key == group_key(row.group)


def test_an_expression_that_makes_no_groups_is_refused(tmp_path: Path) -> None:
    images = scenes(tmp_path / "images")
    assert "found none" in refusal(images, group="patient")
    assert "found only 'scene'" in refusal(images, group="scene")
    assert "a regular expression" in refusal(images, group="(scene")


def test_two_groups_are_too_few_for_three_splits(tmp_path: Path) -> None:
    names = [name for name in (f"site{i}" for i in range(100)) if split_of(group_key(name)) != TRAIN][:2]
    images = put(tmp_path / "images", {f"{'ab'[i % 2]}/{names[i // 2 % 2]}_{i}.ppm": tiny(i) for i in range(80)})
    assert "There are only 2 groups, and each has one split" in refusal(images, group=r"/(site\d+)_")


def test_a_copy_in_groups_of_different_splits_is_used_in_neither(tmp_path: Path) -> None:
    images = scenes(tmp_path / "images")
    by_split = {row.split: row for row in listed(images, group=r"(scene\d+)_").rows if row.label == "a"}
    source, target = by_split[TRAIN], by_split[TEST]
    put(images, {target.path.replace(".ppm", "9.ppm"): (images / source.path).read_bytes()})
    manifest = listed(images, group=r"(scene\d+)_")
    assert source.md5 not in {row.md5 for row in manifest.used(TRAIN, VAL, TEST)}
    assert sum("the same image in groups of different splits" in r.reason for r in manifest.rejected) == 2


def test_groups_across_given_splits_are_told(tmp_path: Path) -> None:
    images = put(
        tmp_path / "images",
        {f"{side}/{label}/p{i // 2}_{i}.ppm": tiny(1000 * len(side) + 100 * ord(label) + i) for side in ("train", "val", "test") for label in "ab" for i in range(8)},
    )  # fmt: skip
    assert any("leak: 4 of 4 groups have images in several of the given splits" in r for r in listed(images, group=r"(p\d+)_").remarks)


def test_a_small_class_gets_whole_groups(tmp_path: Path) -> None:
    names = [name for name in (f"g{i}" for i in range(200)) if split_of(group_key(name)) == TRAIN][:4]
    images = scenes(tmp_path / "images")
    put(images, {f"rare/{name}_{i}.ppm": tiny(5000 + 10 * n + i) for n, name in enumerate(names) for i in range(3)})
    source = Source(images, Rules(group=r"/(.+)_"))
    new, remarks = needed_exceptions(images, hashes(images), {}, frozenset, source)
    assert {line.md5 for line in new} <= {group_key(name) for name in names}
    manifest = ingest(images, {line.md5: line.split for line in new}, lambda d, t: None, source=source)
    splits = defaultdict(set)
    for row in manifest.rows:
        splits[row.group].add(row.split)
    assert not remarks
    assert all(len(each) == 1 for each in splits.values())
    assert {row.split for row in manifest.rows if row.label == "rare"} == {TRAIN, VAL, TEST}


def test_a_group_that_gets_another_name_keeps_its_split(tmp_path: Path) -> None:
    images = scenes(tmp_path / "images")
    before = {row.md5: row.split for row in listed(images, group=r"(scene\d+)_").rows}
    for path in sorted(images.rglob("scene00*")):
        path.rename(path.with_name(path.name.replace("scene00", "scene77")))
    source = Source(images, Rules(group=r"(scene\d+)_"))
    new, _ = needed_exceptions(images, hashes(images), {}, frozenset, source, before)
    assert new
    after = {row.md5: row.split for row in ingest(images, {line.md5: line.split for line in new}, lambda d, t: None, source=source).rows}
    assert after == before


@pytest.mark.parametrize(
    ("name", "setting_makes"),
    [
        (lambda i: f"a/scene{i // 4:03d}_{i % 4}.jpg", 30),
        (lambda i: f"a/person{i // 3}_virus_{i}.jpeg", 40),
        (lambda i: f"a/20240511_14{i // 3 % 60:02d}{i % 3 * 11:02d}.jpg", 40),
        (lambda i: f"a/frame_{i * 10:06d}.jpg", 12),
        (lambda i: f"{'ab'[i % 2]}/clip{i // 8}/{i:04d}.jpg", 30),
        (lambda i: f"a/p{i // 4:03d}_s{i % 4}.png", 30),
        (lambda i: f"{'abc'[i % 3]}/{i // 12:05d}_{i // 3 % 4:05d}.ppm", 10),  # tracks that each class counts anew
    ],
)
def test_series_are_suspected_by_names_time_stamps_and_folders(name: Callable[[int], str], setting_makes: int) -> None:
    paths = [name(i) for i in range(120)]
    series = find_series([(path, path[0]) for path in paths], 1)
    assert series is not None
    assert series.series == setting_makes
    assert f"data.group: '{series.setting}'" in str(series)


def test_of_many_images_some_stretches_are_looked_at() -> None:
    paths = [(f"a/scene{i // 8:06d}_{i % 8}.jpg", "a") for i in range(100_000)]
    series = find_series(paths, 1)
    assert series is not None
    assert series.looked_at == 20_000
    assert series.series == pytest.approx(2500, rel=0.02)


@pytest.mark.parametrize(
    "name",
    [
        lambda i: f"a/{i:04d}.jpg",
        lambda i: f"a/IMG_{i:04d}.jpg",
        lambda i: f"{'ab'[i % 2]}/{('cat', 'dog')[i % 2]}.{i}.jpg",
        lambda i: f"a/{md5(str(i).encode())}.jpg",
        lambda i: f"a/n0{i % 3}_{i}.JPEG",
    ],
)
def test_numbered_and_hashed_names_are_no_series(name: Callable[[int], str]) -> None:
    assert find_series([(name(i), name(i)[0]) for i in range(120)], 1) is None


# --- zip files ------------------------------------------------------------------------------------------------------------------------


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_file_is_unpacked_and_gone_afterwards(tmp_path: Path) -> None:
    files = {f"set/{label}/{i}.png": encoded(paint(number, i)) for number, label in enumerate("ab") for i in range(12)}
    with archives.unpacked(zipped(tmp_path / "set.zip", {**files, "__MACOSX/set/._0.png": b"x"})) as folder:
        assert folder is not None
        assert len(listed(unwrapped(folder)).rows) == 24
    assert not folder.exists()


def test_a_zip_file_that_does_harm_is_refused(tmp_path: Path) -> None:
    outside = zipped(tmp_path / "outside.zip", {"../x.png": b"x"})
    absolute = zipped(tmp_path / "absolute.zip", {"/etc/x.png": b"x"})
    linked = tmp_path / "linked.zip"
    with zipfile.ZipFile(linked, "w") as archive:
        entry = zipfile.ZipInfo("a/link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    bomb = zipped(tmp_path / "bomb.zip", {"a/0.bmp": bytes(10**6)})
    for path, words in (
        (outside, "paths inside"),
        (absolute, "paths inside"),
        (linked, "the link"),
        (bomb, "made to fill"),
    ):
        with pytest.raises(DataError, match=words), archives.unpacked(path, free=1000):
            pass
    with pytest.raises(DataError, match="another archive"):
        archives.is_archive(put(tmp_path, {"a.tar.gz": b"x"}) / "a.tar.gz")


def test_a_zip_file_whose_list_lies_is_stopped_while_it_is_unpacked(tmp_path: Path) -> None:
    content = bytearray(zipped(tmp_path / "a.zip", {"a/0.bmp": bytes(10**6)}).read_bytes())
    for at in (content.index(b"PK\x01\x02") + 24, 22):  # the sizes that the list and the entry state
        content[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "lying.zip").write_bytes(content)
    with pytest.raises(DataError), archives.unpacked(tmp_path / "lying.zip", free=1000):
        pass


# --- classes --------------------------------------------------------------------------------------------------------------------------


def test_names_that_differ_in_composition_or_spaces_are_one_class(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, name in enumerate(("caf\u00e9", "cafe\u0301", "tea", "tea ")):
        put(images, {f"{name}/{i}.ppm": tiny(100 * number + i) for i in range(20)})
    assert Counter(row.label for row in listed(images).rows) == {"caf\u00e9": 40, "tea": 40}


def test_names_that_differ_in_capitals_are_refused_until_somebody_says_what_they_are(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, name in enumerate(("Tea", "tea", "coffee")):
        put(images, {f"{name}/{i}.ppm": tiny(100 * number + i) for i in range(20)})
    text = refusal(images)
    assert "expected class names that a person can tell apart, found 'Tea' and 'tea'" in text
    assert "data.rename: {'Tea': 'tea'}" in text
    assert listed(images, rename={"Tea": "tea"}).classes == ("coffee", "tea")
    assert listed(images, rename={"Tea": "Tea"}).classes == ("Tea", "coffee", "tea")


def test_single_letters_may_differ_in_capitals(tmp_path: Path) -> None:
    images = put(tmp_path / "images", {f"{name}/{i}.ppm": tiny(1000 * ord(name) + i) for name in "aAbB" for i in range(12)})
    assert listed(images).classes == ("A", "B", "a", "b")


def test_a_class_map_only_grows_and_a_renamed_class_keeps_its_index(tmp_path: Path) -> None:
    contents = {label: {f"{label}{i}" for i in range(10)} for label in ("bolt", "nut", "washer")}
    first = ClassMap().updated(contents, {}, Renames())
    later = {"nut": contents["nut"], "hex_bolt": contents["bolt"] | {"new"}, "aaa_pin": {f"p{i}" for i in range(5)}}
    second = first.updated(later, contents, Renames())
    assert [(line.index, line.label, line.like, line.shared) for line in second.lines] == [
        (0, "bolt", "", 0), (1, "nut", "", 0), (2, "washer", "", 0), (3, "aaa_pin", "", 0), (4, "hex_bolt", "bolt", 10),
    ]  # fmt: skip
    assert second.indices(later, Renames()) == {"nut": 1, "aaa_pin": 3, "hex_bolt": 4}
    assert second.indices(later, Renames({"bolt": "hex_bolt"})) == {"hex_bolt": 0, "nut": 1, "aaa_pin": 3}
    texts = vanished(second, later, Renames(), [])
    assert any("bolt is gone, and hex_bolt has 10 of its 10 files" in text and "data.rename: {bolt: hex_bolt}" in text for text in texts)
    assert any("class washer, which had 10 files, is gone" in text and "data.drop: [washer]" in text for text in texts)
    assert vanished(second, later, Renames({"bolt": "hex_bolt"}), ["washer"]) == []
    write_map(tmp_path / "classes.csv", second)
    assert read_map(tmp_path / "classes.csv").lines == second.lines


@pytest.mark.parametrize(
    "content", ["index,label\n", "index,label,images,like,shared\n1,a,3,,0\n", "index,label,images,like,shared\n0,a,3,,0\n1,a,3,,0\n"]
)
def test_a_class_map_that_was_edited_is_refused_with_the_way_back(tmp_path: Path, content: str) -> None:
    (tmp_path / "classes.csv").write_text(content)
    with pytest.raises(DataError, match=r"git checkout classes\.csv"):
        read_map(tmp_path / "classes.csv")


def test_what_was_there_and_is_gone_is_told(tmp_path: Path) -> None:
    images = put(tmp_path / "images", {f"{label}/{i}.ppm": tiny(100 * n + i) for n, label in enumerate("abc") for i in range(20)})
    (images / "d").mkdir()
    put(images, {"e/.syncing": b"", ".f/1.ppm": tiny(900), ".cache/x": b""})
    source = Source(images)
    known = ClassMap().updated({"a": {"1"}, "b": {"2"}, "c": {"3"}, "d": {"4", "5"}}, {}, Renames())
    remarks = ingest(images, {}, lambda done, total: None, source=source, class_map=known).remarks
    assert "empty: folders without images are no classes: d (empty), e (only hidden files)" in remarks
    assert "hidden: folders whose names begin with a dot are not used: .f (1 image)" in remarks
    assert any(remark.startswith("vanished: class d, which had 2 files, is gone") for remark in remarks)


def test_many_files_that_cannot_be_used_are_told_with_the_reasons(tmp_path: Path) -> None:
    images = put(tmp_path / "images", {f"{label}/{i}.ppm": tiny(100 * n + i) for n, label in enumerate("ab") for i in range(20)})
    put(images, {f"a/{i}.heic": b"\0\0\0\x18ftypheic" + bytes(50) for i in range(3)})
    assert not listed(images).remarks
    put(images, {f"a/{i}.heic": b"\0\0\0\x18ftypheic" + bytes(50) for i in range(9)} | {"b/x.png": b""})
    assert listed(images).remarks == (
        "left out: 10 of 50 files cannot be used (a HEIC photo: 9, empty file: 1); quarantine.csv names them",
    )


def test_the_manifest_keeps_the_numbers_of_the_classes(tmp_path: Path) -> None:
    images = put(tmp_path / "images", {f"{label}/{i}.ppm": tiny(100 * n + i) for n, label in enumerate("bca") for i in range(20)})
    known = ClassMap().updated({"b": {"1"}, "gone": {"9"}}, {}, Renames()).updated({"c": {"2"}}, {}, Renames())
    manifest = ingest(images, {}, lambda done, total: None, class_map=known)
    assert (manifest.classes, manifest.indices) == (("b", "c", "a"), (0, 2, 3))
    write_manifest(manifest, tmp_path / "m.parquet", tmp_path / "q.csv")
    again = read_manifest(tmp_path / "m.parquet")
    assert (again.classes, again.indices) == (manifest.classes, manifest.indices)
