"""Near copies: the same picture in other bytes is recognized, others are not; they share a split, and no image ever moves."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tests.helpers.datasets import hashes, put
from tests.helpers.images import encoded
from tlpipeline.alarms import BLOCK, WARN
from tlpipeline.checking import near_copies
from tlpipeline.data import copies, dataset, decoding, digits, facts, splits
from tlpipeline.data.dataset import Row
from tlpipeline.data.facts import FactStore
from tlpipeline.evaluation import metrics


def scene(number: int, side: int = 120) -> Image.Image:
    """Return a picture of its own: blobs of random colors over a slope of light."""
    rng = np.random.default_rng([7, number])
    blobs = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8))
    return blobs.resize((side, side), Image.Resampling.BICUBIC)


def again(image: Image.Image, quality: int = 80) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality))).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded again": lambda image: again(image, 40),
    "half the size": lambda image: image.resize((60, 60)),
    "mirrored": lambda image: again(ImageOps.mirror(image)),
    "darker": lambda image: again(ImageEnhance.Brightness(image).enhance(0.75)),
    "less contrast": lambda image: again(ImageEnhance.Contrast(image).enhance(0.7)),
    "cropped": lambda image: again(image.crop((4, 2, 118, 116))),
    "mirrored and cropped": lambda image: again(ImageOps.mirror(image.crop((6, 0, 120, 114)))),
    "shifted": lambda image: again(image.crop((5, 0, 120, 115))),
}


def pictures(images: list[Image.Image]) -> dict[str, bytes]:
    return {f"{i:032x}": facts.measure(encoded(image)).picture for i, image in enumerate(images)}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_picture_in_other_bytes_is_a_near_copy_and_no_other_is(change: str) -> None:
    scenes = [scene(i) for i in range(20)]
    found = copies.find_copies(pictures(scenes + [CHANGES[change](image) for image in scenes]), FactStore())
    assert [(int(a, 16), int(b, 16)) for a, b, _ in found] == [(i, i + 20) for i in range(20)]


def test_the_same_shape_in_another_color_is_another_picture() -> None:
    red, blue = (
        Image.merge("RGB", [scene(1).convert("L").point(lambda v, k=k: v if k else v // 5) for k in ks]) for ks in ((1, 0, 0), (0, 0, 1))
    )
    assert copies.find_copies(pictures([red, blue]), FactStore()) == []
    assert len(copies.find_copies(pictures([red, again(red)]), FactStore())) == 1


def test_pictures_without_contrast_are_not_compared() -> None:
    rng = np.random.default_rng(0)
    flat = [Image.fromarray((100 + rng.integers(0, 3, (40, 40, 3))).astype(np.uint8)) for _ in range(9)]
    assert copies.find_copies(pictures(flat), FactStore()) == []


def test_different_pictures_of_one_kind_are_no_copies_and_a_copy_among_them_is(tmp_path: Path) -> None:
    digits.write(tmp_path)
    drawn = [decoding.decode(path.read_bytes()) for path in sorted(tmp_path.rglob("*.png"))[::2]]
    assert copies.find_copies(pictures(drawn), FactStore()) == [], "many handwritten digits are alike by chance"
    (pair,) = copies.find_copies(pictures([*drawn, again(drawn[5])]), FactStore())
    assert [int(name, 16) for name in pair[:2]] == [5, len(drawn)]


def test_what_is_found_for_a_pair_does_not_depend_on_when_its_images_came(tmp_path: Path) -> None:
    every = pictures([image for i in range(12) for image in (scene(i), CHANGES["cropped"](scene(i)), CHANGES["mirrored"](scene(i)))])
    at_once = copies.find_copies(every, FactStore())
    assert len(at_once) >= 24
    store, order = FactStore(tmp_path), random.Random(3)
    measured = {name: facts.Facts(picture=picture) for name, picture in every.items()}
    store.add(measured)
    for _ in range(12):
        present = {name: every[name] for name in order.sample(sorted(every), order.randint(1, len(every)))}
        expected = [pair for pair in at_once if pair[0] in present and pair[1] in present]
        assert copies.find_copies(present, FactStore(tmp_path)) == expected


def test_near_copies_in_a_folder_are_a_group_with_one_split(tmp_path: Path) -> None:
    contents = {
        f"{i % 2}/{i}-{k}.jpg": encoded(scene(i).crop((k, k, 116 + k, 116 + k)), "JPEG", quality=80 + k)
        for i in range(30)
        for k in range(4)
    }
    images = put(tmp_path / "images", contents)
    sets, label_of = _sets(images)
    lines, remarks = splits.joined_exceptions(sets, label_of, {}, dict)
    manifest = dataset.ingest(images, {line.md5: line.split for line in lines}, lambda done, total: None)
    groups = {row.path.split("/")[1].split("-")[0]: set[tuple[str, str]]() for row in manifest.rows}
    for row in manifest.rows:
        groups[row.path.split("/")[1].split("-")[0]].add((row.group, row.split))
    assert all(len(members) == 1 for members in groups.values())
    assert len({group for members in groups.values() for group, _ in members}) == 30
    assert remarks == []


def _sets(images: Path) -> tuple[list[list[str]], dict[str, str]]:
    known = {md5: path for path, md5 in hashes(images).items()}
    by_content = {md5: facts.measure((images / path).read_bytes()).picture for md5, path in known.items()}
    return copies.connected(copies.find_copies(by_content, FactStore())), {md5: path.split("/")[0] for md5, path in known.items()}


@pytest.mark.parametrize("seed", range(30))
def test_no_image_ever_moves_over_random_histories_and_new_sets_share_a_split(seed: int) -> None:
    """Images come, go and come back; some newcomers join sets that lay in several splits before."""
    draw = random.Random(seed)
    names = [f"{draw.getrandbits(128):032x}" for _ in range(40)]
    label_of = {name: draw.choice("ab") for name in names}
    links = [(a, b, 1.0) for i, a in enumerate(names) for b in names[:i] if draw.random() < 0.04]
    lines: dict[str, str] = {}
    split_before: dict[str, str] = {}
    for _ in range(12):
        present = draw.sample(names, draw.randint(5, 40))
        sets = copies.connected([pair for pair in links if pair[0] in present and pair[1] in present])
        earlier = dict(split_before)
        shuffled = [draw.sample(members, len(members)) for members in draw.sample(sets, len(sets))]
        labels = {name: label_of[name] for name in present}
        new, remarks = splits.joined_exceptions(sets, labels, lines, lambda earlier=earlier: earlier)
        other, _ = splits.joined_exceptions(shuffled, labels, lines, lambda earlier=earlier: earlier)
        assert {line.md5: line.split for line in new} == {line.md5: line.split for line in other}
        assert not lines.keys() & {line.md5 for line in new}
        lines |= {line.md5: line.split for line in new}
        now = {name: lines.get(name) or splits.split_of(name) for name in present}
        assert all(now[name] == split_before.get(name, now[name]) for name in present)
        divided = 0
        for members in sets:
            was = {earlier[name] for name in members if name in earlier}
            divided += len(was) > 1
            assert {now[name] for name in members if name not in earlier} <= (was or set(splits.SPLIT_NAMES))
            assert len(was) > 1 or len({now[name] for name in members}) == 1
        assert bool(remarks) == bool(divided)
        split_before |= now


def test_a_set_that_is_most_of_a_class_is_for_training() -> None:
    members = [f"{250 + i:02x}" + "0" * 30 for i in range(5)]  # by their content: test
    lines, _ = splits.joined_exceptions([members], dict.fromkeys(members, "a"), {}, dict)
    assert {line.split for line in lines} == {splits.TRAIN}
    assert len(lines) == 5


def _row(name: str, split: str, label: str) -> Row:
    return Row(f"{label}/{name}", name * 32, label, split, 9, 9, "RGB", "")


def test_pairs_across_splits_and_with_two_labels_are_listed_first_and_counted() -> None:
    rows = [_row("1", "train", "a"), _row("2", "train", "a"), _row("3", "test", "a"), _row("4", "train", "b"), _row("5", "test", "b")]
    pairs = [("1" * 32, "2" * 32, 1.0), ("1" * 32, "3" * 32, 0.95), ("3" * 32, "4" * 32, 0.94)]
    findings, (alarm,) = near_copies.find(rows, pairs, 0.02)
    assert [(f.path, f.kind, f.detail) for f in findings] == [
        ("a/3", "near copy", "b/4 in train, labeled b"),
        ("a/3", "near copy", "a/1 in train"),
        ("a/1", "near copy", "a/2"),
    ]
    assert alarm.severity == BLOCK
    assert alarm.text == (
        "4 images are the same picture as another one in other bytes; 1 pair has two labels; "
        "1 of 2 test images have a near copy in training, which makes the accuracy too high (quality.csv)"
    )
    assert near_copies.find(rows, pairs, 0.6)[1][0].severity == WARN
    assert near_copies.find(rows, [], 0.02) == ([], [])


def test_the_accuracy_without_copies_counts_only_test_images_without_one() -> None:
    predictions = metrics.make_predictions(
        [_row(str(i), "test", "ab"[i % 2]) for i in range(4)], ("a", "b"), np.array([[1, 0], [0, 1], [0, 1], [1, 0]], np.float32)
    )
    alone = metrics.without_copies(predictions, [True, False, False, False], 0.95)
    assert alone["accuracy_without_copies"] == pytest.approx(1 / 3, abs=1e-5)
    assert alone["images_without_copies"] == 3
    assert metrics.without_copies(predictions, [False] * 4, 0.95) == {} == metrics.without_copies(predictions, [True] * 4, 0.95)
