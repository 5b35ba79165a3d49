"""Sides never move, and small classes get one of each kind."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.datasets import hashes, laid_out, listed, md5, on, put, sides, tiny, with_large_class
from tlpipeline.data.sources import Source
from tlpipeline.data.splits import (
    MINIMUM_PER_CLASS,
    TEST,
    TRAIN,
    VAL,
    SplitException,
    needed_exceptions,
    read_exceptions,
    split_of,
    write_exceptions,
)
from tlpipeline.errors import DataError


def test_no_image_changes_side_whatever_is_added_removed_or_renamed(tmp_path: Path) -> None:
    rng = random.Random(11)
    images = tmp_path / "images"
    known: dict[str, str] = {}
    number = 0
    for _ in range(15):
        for label in ("left", "right"):
            put(images, {f"{label}/{number + i}.ppm": tiny(number + i) for i in range(15)})
            number += 15
        files = sorted(p for p in images.rglob("*") if p.is_file())
        for path in rng.sample(files, 6):
            path.unlink()
        for path in rng.sample([p for p in files if p.exists()], 6):
            path.rename(path.with_name(f"renamed-{rng.random()}.ppm"))
        now = sides(listed(images))
        assert all(known.get(content, side) == side for content, side in now.items())
        known |= now
    assert len(known) > 300
    assert set(known.values()) == {TRAIN, VAL, TEST}


def test_an_image_keeps_its_side_when_it_changes_class(tmp_path: Path) -> None:
    contents = {f"{i % 2}/{i}.ppm": tiny(i) for i in range(60)}
    images = put(tmp_path / "images", contents)
    before = sides(listed(images))
    (images / "0/0.ppm").rename(images / "1/0.ppm")
    assert sides(listed(images)) == before


def test_the_shares_are_near_70_15_15() -> None:
    counts = Counter(split_of(md5(tiny(i))) for i in range(20_000))
    assert {side: round(n / 20_000, 2) for side, n in counts.items()} == {
        TRAIN: pytest.approx(0.70, abs=0.011),
        VAL: pytest.approx(0.15, abs=0.011),
        TEST: pytest.approx(0.15, abs=0.011),
    }


def test_the_side_follows_from_the_hash_at_exactly_these_bounds() -> None:
    at = lambda u: f"{round(u * 2**128):032x}"  # noqa: E731
    assert [split_of(at(u)) for u in (0, 0.6999, 0.7001, 0.8499, 0.8501, 0.9999)] == [TRAIN, TRAIN, VAL, VAL, TEST, TEST]


def test_where_test_is_given_val_keeps_its_share_of_the_rest() -> None:
    counts = Counter(split_of(md5(tiny(i)), carve_val=True) for i in range(20_000))
    assert set(counts) == {TRAIN, VAL}
    assert counts[VAL] / 20_000 == pytest.approx(0.15 / 0.85, abs=0.01)


def test_a_line_of_splits_csv_wins_over_the_rule_by_content(make_images: Callable[..., Path]) -> None:
    images = make_images(classes=2, each=20)
    chosen = listed(images).used(TRAIN)[0].md5
    assert sides(listed(images, {chosen: TEST}))[chosen] == TEST


# --- small classes: splits.csv ------------------------------------------------------------------------------------------------------


def asked_never() -> frozenset[str]:
    raise AssertionError("asked for the images of registered versions without need")


def exceptions_of(images: Path, known: Mapping[str, str] | None = None, trained_on: frozenset[str] = frozenset()) -> Any:
    return needed_exceptions(images, hashes(images), known or {}, lambda: trained_on, Source(images))


def test_classes_with_all_sides_need_no_line_and_no_look_at_the_registry(tmp_path: Path) -> None:
    images = with_large_class(tmp_path / "images")
    assert needed_exceptions(images, hashes(images), {}, asked_never, Source(images)) == ([], [])


def test_empty_sides_are_filled_highest_to_test_next_to_val(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    lines, remarks = exceptions_of(with_large_class(tmp_path / "images", small=contents))
    assert lines == [SplitException(md5(contents[4]), TEST, "small"), SplitException(md5(contents[3]), VAL, "small")]
    assert remarks == []


def test_the_lowest_goes_to_train(tmp_path: Path) -> None:
    contents = sorted(on(TEST, 4), key=md5)
    lines, _ = exceptions_of(with_large_class(tmp_path / "images", small=contents))
    assert lines == [SplitException(md5(contents[3]), VAL, "small"), SplitException(md5(contents[0]), TRAIN, "small")]


def test_three_images_get_a_side_each(tmp_path: Path) -> None:
    for case, contents in enumerate((on(TRAIN, 3), on(VAL, 3), on(TEST, 3), on(TRAIN, 2) + on(VAL, 1), on(TEST, 2) + on(VAL, 1))):
        images = with_large_class(tmp_path / str(case), small=contents)
        lines, remarks = exceptions_of(images)
        assert not remarks
        found = listed(images, {line.md5: line.split for line in lines})
        assert sorted(r.split for r in found.rows if r.label == "small") == [TEST, TRAIN, VAL]


def test_any_content_of_small_classes_can_be_trained_validated_and_tested(tmp_path: Path) -> None:
    rng = random.Random(3)
    for trial in range(25):
        start = rng.randrange(10**9)
        classes = {f"class{c}": [tiny(start + 1000 * c + i) for i in range(rng.randint(3, 12))] for c in range(4)}
        images = put(
            tmp_path / str(trial), {f"{c}/{i}.ppm": content for c, contents in classes.items() for i, content in enumerate(contents)}
        )
        lines, _ = exceptions_of(images)
        manifest = listed(images, {line.md5: line.split for line in lines})
        assert not manifest.remarks
        assert {(r.label, r.split) for r in manifest.rows} == {(c, side) for c in classes for side in (TRAIN, VAL, TEST)}


def test_an_image_that_a_registered_version_trained_on_never_goes_to_test(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    lines, remarks = exceptions_of(images, trained_on=frozenset(map(md5, contents[2:])))
    assert lines[0] == SplitException(md5(contents[1]), TEST, "small")
    assert remarks == []


def test_a_class_that_was_trained_on_whole_is_named_as_not_evaluated(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    lines, remarks = exceptions_of(images, trained_on=frozenset(map(md5, contents)))
    assert [line.split for line in lines] == [VAL]
    assert remarks == ["not evaluated: small has no image that could go to test"]
    assert listed(images, {line.md5: line.split for line in lines}).remarks == ("not evaluated: no test image of small",)


def test_what_splits_csv_fixed_is_never_moved_again(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 4), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    lines, _ = exceptions_of(images, known={md5(contents[3]): TRAIN, md5(contents[2]): TRAIN})
    assert lines == [SplitException(md5(contents[1]), TEST, "small"), SplitException(md5(contents[0]), VAL, "small")]


def test_lines_that_are_known_are_not_given_again_while_the_class_grows(tmp_path: Path) -> None:
    contents = on(TRAIN, 12)
    images = with_large_class(tmp_path / "images", small=contents[:4])
    lines, _ = exceptions_of(images)
    known = {line.md5: line.split for line in lines}
    assert len(known) == 2
    before = sides(listed(images, known))
    put(images, {f"small/more-{i}.ppm": content for i, content in enumerate(contents[4:])})
    assert needed_exceptions(images, hashes(images), known, asked_never, Source(images)) == ([], [])
    assert sides(listed(images, known)).items() >= before.items()


def test_a_broken_file_or_a_conflicting_copy_never_takes_a_side(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    put(images, {"small/broken.ppm": b"P6 9 9 255\n", "large/copy.ppm": contents[4]})
    lines, _ = exceptions_of(images)
    assert lines[0] == SplitException(md5(contents[3]), TEST, "small")


def test_hidden_copies_make_no_class(tmp_path: Path) -> None:
    contents = sorted(on(TRAIN, 5), key=md5)
    images = with_large_class(tmp_path / "images", small=contents)
    expected = exceptions_of(images)
    put(images, {f".thumbnails/{i}.ppm": content for i, content in enumerate(contents)})
    put(images, {f"large/.cache/{i}.ppm": content for i, content in enumerate(contents)})
    assert exceptions_of(images) == expected


def test_a_class_below_the_minimum_gets_no_lines(tmp_path: Path) -> None:
    assert exceptions_of(with_large_class(tmp_path / "images", small=on(TRAIN, MINIMUM_PER_CLASS - 1))) == ([], [])


def test_a_given_layout_needs_no_lines(tmp_path: Path) -> None:
    assert exceptions_of(laid_out(tmp_path / "images", {"train": 3, "test": 3})) == ([], [])


def test_lines_are_only_ever_appended(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    write_exceptions(path, [])
    assert path.read_text() == "md5,split,label\n"
    write_exceptions(path, [SplitException("a", TEST, "cat, black")])
    before = path.read_bytes()
    write_exceptions(path, [])
    assert path.read_bytes() == before
    write_exceptions(path, [SplitException("b", VAL, "dog")])
    assert path.read_bytes() == before + b"b,val,dog\n"
    assert read_exceptions(path) == {"a": TEST, "b": VAL}


def test_a_last_line_that_an_editor_left_open_is_closed_first(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    path.write_text("md5,split,label\na,test,cat")
    write_exceptions(path, [SplitException("b", VAL, "dog")])
    assert read_exceptions(path) == {"a": TEST, "b": VAL}


def test_no_splits_csv_is_no_exception(tmp_path: Path) -> None:
    assert read_exceptions(tmp_path / "splits.csv") == {}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"md5,side,label\n", "md5,side,label"),
        (b"md5,split,label\na,testing,cat\n", "the split testing"),
        (b"md5,split,label\na\n", "the split None"),
        (b"a,test,cat\n", "a,test,cat"),
        (b"", "an empty file"),
        ("md5,split,label\n".encode("utf-16"), "'utf-8' codec can't decode"),
        (b"md5,split,label\n" + b"a" * 200_000, "field larger than"),
    ],
    ids=str,
)
def test_a_splits_csv_that_cannot_be_read_is_refused_with_the_way_back(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "splits.csv").write_bytes(content)
    with pytest.raises(
        DataError, match=r"expected the columns md5,split,label and the splits train, val, test .*`git checkout splits\.csv`"
    ) as caught:
        read_exceptions(tmp_path / "splits.csv")
    assert f", found {found}" in str(caught.value)


def test_lines_that_give_an_image_two_splits_are_refused_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    line = f"{'0' * 32},test,cat\n"
    path.write_text(f"md5,split,label\n{line}\n{line}{'1' * 32},val,cat\n{'0' * 32},train,cat\n")
    with pytest.raises(DataError, match=r"found test in line 2 and train in line 6 for 0{32}\. Remove one of them"):
        read_exceptions(path)
    path.write_text(f"md5,split,label\n{line}{line}")
    assert read_exceptions(path) == {"0" * 32: "test"}
