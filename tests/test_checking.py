"""The stage check: what is wrong with the data, each kind on data that have it and on data that have not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tests.helpers.datasets import listed, put
from tests.helpers.evidence import planted
from tests.helpers.images import encoded, paint
from tlpipeline.alarms import BLOCK, STOP, WARN, Alarm, by_severity, from_remark
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.checking import checks, quality, signal, suggesting
from tlpipeline.checking import labels as wrong
from tlpipeline.checking.quality import Quality
from tlpipeline.data import dataset
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.facts import Facts, FactStore
from tlpipeline.data.splits import SPLIT_NAMES, TRAIN
from tlpipeline.params import CheckParams

PROFILE, DEFAULT = planted((0.8, 0.9)), CheckParams()
Draw = Callable[[int], Image.Image]


def blob(number: int, size: int = 40) -> Image.Image:
    """Draw a picture of its own that says nothing of its label."""
    small = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def checked(folder: Path, contents: Mapping[str, bytes], params: CheckParams = DEFAULT) -> Quality:
    images = put(folder / "images", contents)
    rows = listed(images).used(*SPLIT_NAMES)
    return checks.check(rows, facts_of(images, rows), [], PROFILE, [], None, params)


def facts_of(images: Path, rows: Sequence[Row]) -> list[Facts]:
    known = {row.md5: facts for row, facts in dataset.facts_of(images, rows, FactStore())}
    return [known[row.md5] for row in rows]


def two_classes(of_b: Callable[[int], tuple[str, bytes]], each: int = 40) -> dict[str, bytes]:
    """Return the same kind of pictures in two classes, b's files made by a function."""
    contents = {f"a/{i}.jpg": encoded(blob(i), "JPEG", quality=90) for i in range(each)}
    for i in range(each, 2 * each):
        name, content = of_b(i)
        contents[f"b/{i}.{name}"] = content
    return contents


def marked(image: Image.Image, box: tuple[int, int, int, int], color: tuple[int, int, int]) -> Image.Image:
    image.paste(color, box)
    return image


def kinds(quality: Quality) -> dict[str, str]:
    return {alarm.kind: alarm.severity for alarm in quality.alarms}


# --- shortcuts ------------------------------------------------------------------------------------------------------------------------


def test_the_same_kind_of_files_in_each_class_is_no_shortcut(tmp_path: Path) -> None:
    assert checked(tmp_path, two_classes(lambda i: ("jpg", encoded(blob(i), "JPEG", quality=90)))).alarms == ()


@pytest.mark.parametrize(
    ("fact", "of_b"),
    [
        ("file format", lambda i: ("png", encoded(blob(i)))),
        ("mode", lambda i: ("jpg", encoded(blob(i).convert("L"), "JPEG", quality=90))),
        ("size", lambda i: ("jpg", encoded(blob(i, 44), "JPEG", quality=90))),
        ("JPEG quality", lambda i: ("jpg", encoded(blob(i), "JPEG", quality=70))),
        ("border at the bottom", lambda i: ("jpg", encoded(marked(blob(i), (0, 38, 40, 40), (0, 0, 0)), "JPEG", quality=90))),
        ("border at the left", lambda i: ("jpg", encoded(marked(blob(i), (0, 0, 1, 40), (255, 255, 255)), "JPEG", quality=95))),
    ],
)
def test_a_class_whose_files_are_of_another_kind_blocks_and_the_fact_is_named(
    tmp_path: Path, fact: str, of_b: Callable[[int], tuple[str, bytes]]
) -> None:
    result = checked(tmp_path, two_classes(of_b))
    assert kinds(result)["shortcut"] == BLOCK
    assert fact in next(alarm.text for alarm in result.alarms if alarm.kind == "shortcut")
    assert any(finding.detail.startswith(fact) for finding in result.findings)


def test_a_camera_that_took_one_class_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[271], exif[272] = "Maker", "Model 5"
    result = checked(tmp_path, two_classes(lambda i: ("jpg", encoded(blob(i), "JPEG", quality=90, exif=exif))))
    assert "camera" in result.alarms[0].text


def test_one_special_class_of_many_is_told_and_does_not_block(tmp_path: Path) -> None:
    contents = {f"{label}/{i}.jpg": encoded(blob(100 * k + i), "JPEG") for k, label in enumerate("abcd") for i in range(30)}
    contents |= {f"e/{i}.png": encoded(blob(900 + i)) for i in range(30)}
    result = checked(tmp_path, contents)
    assert kinds(result) == {"shortcut": WARN}
    assert result.alarms[0].text.startswith("files of e differ from the others by file format")


def test_groups_are_left_out_whole(tmp_path: Path) -> None:
    # Each of six patients has a format of their own by chance: it tells the patient, and only so the label.
    rng = np.random.default_rng(0)
    contents, groups = {}, {}
    for patient in range(6):
        for i in range(20):
            name = f"{'ab'[patient % 2]}/{patient}-{i}.jpg"
            contents[name] = encoded(blob(100 * patient + i, 40 + patient), "JPEG", quality=int(rng.integers(90, 91)))
            groups[name] = f"patient {patient}"
    images = put(tmp_path / "images", contents)
    rows = [replace(row, group=groups[row.path]) for row in listed(images).used(*SPLIT_NAMES)]
    measured = facts_of(images, rows)
    assert checks.check(rows, measured, [], PROFILE, [], None, DEFAULT).alarms == ()
    alone = [replace(row, group="") for row in rows]
    assert kinds(checks.check(alone, measured, [], PROFILE, [], None, DEFAULT)) == {"shortcut": BLOCK}


def test_the_ground_of_a_drawing_is_no_border(tmp_path: Path) -> None:
    def drawn(number: int, ground: int) -> bytes:
        image = Image.new("L", (60, 60), ground)
        rng = np.random.default_rng(number)
        x, y = rng.integers(10, 30, 2).tolist()
        image.paste(255 - ground, (x, y, x + 15 + number % 7, y + 12))
        return encoded(image)

    contents = {f"{label}/{i}.png": drawn(100 * k + i, 255 * k) for k, label in enumerate("ab") for i in range(30)}
    assert "shortcut" not in kinds(checked(tmp_path, contents))


def test_stripes_are_no_border(tmp_path: Path) -> None:
    y, x = np.mgrid[:60, :60]
    patterns = {"rows": y // 3, "columns": x // 3, "checked": y // 3 + x // 3}
    noise = np.random.default_rng(0)
    contents = {
        f"{label}/{i}.png": encoded(Image.fromarray((100 + 60 * (pattern % 2) + noise.normal(0, 4, x.shape)).clip(0, 255).astype(np.uint8)))
        for label, pattern in patterns.items()
        for i in range(20)
    }
    assert "shortcut" not in kinds(checked(tmp_path, contents))


# --- pictures that show little, or lose something -------------------------------------------------------------------------------------


def usual() -> dict[str, bytes]:
    return {f"{label}/{i}.png": encoded(paint(k, i, 48)) for k, label in enumerate("ab") for i in range(12)}


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("flat", Image.new("L", (48, 48), 90)),
        ("dark", Image.fromarray(np.asarray(paint(0, 99, 48)) // 24)),
        ("bright", Image.fromarray(255 - np.asarray(paint(0, 99, 48)) // 24)),
        ("blurred", blob(5, 400).filter(ImageFilter.GaussianBlur(20))),
        ("tiny", paint(0, 99, 8)),
        ("deep", Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48))),
        ("transparent", Image.merge("RGBA", (*paint(0, 99, 48).split(), Image.linear_gradient("L").resize((48, 48))))),
    ],
)
def test_an_odd_picture_is_listed_and_counted(tmp_path: Path, kind: str, image: Image.Image) -> None:
    result = checked(tmp_path, usual() | {"a/odd.png": encoded(image)})
    assert ("a/odd.png", kind) in [(finding.path, finding.kind) for finding in result.findings]
    assert next(alarm for alarm in result.alarms if alarm.kind == kind).text.startswith("1 image is ")


def test_an_image_that_is_not_read_as_it_is_is_listed(tmp_path: Path) -> None:
    pages = {f"a/{i}.tif": encoded(paint(0, 50 + i, 48), "TIFF", save_all=True, append_images=[paint(0, 70 + i, 48)]) for i in range(2)}
    deep = {"b/deep.png": encoded(Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48)))}
    result = checked(tmp_path, usual() | pages | deep)
    assert sorted(finding.path for finding in result.findings if finding.kind in ("pages", "deep")) == ["a/0.tif", "a/1.tif", "b/deep.png"]


@pytest.mark.parametrize("draw", [lambda i: paint(i % 2, i, 48), lambda i: Image.fromarray(np.asarray(paint(i % 2, i, 48)) // 24)])
def test_a_data_set_that_is_alike_lists_nothing_even_if_all_of_it_is_dark(tmp_path: Path, draw: Draw) -> None:
    contents = {f"{'ab'[i % 2]}/{i}.png": encoded(draw(i)) for i in range(24)}
    assert checked(tmp_path, contents).findings == ()


# --- no signal ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accuracies", "alarms"), [((0.1, 0.11), 1), ((0.1, 0.3), 0)])
def test_probes_that_are_no_better_than_chance_block(accuracies: tuple[float, ...], alarms: int) -> None:
    assert [alarm.severity for alarm in signal.find(replace(planted(accuracies), majority=0.1))] == [BLOCK] * alarms


def test_on_uneven_classes_a_probe_shows_itself_by_its_balanced_accuracy() -> None:
    profile = replace(planted((0.9, 0.9)), majority=0.9, classes=2, probed=2, images=1000, smallest=100, largest=900)
    taps = tuple(replace(tap, balanced=0.8) for tap in profile.taps)
    assert signal.find(replace(profile, taps=tuple(replace(tap, balanced=0.5) for tap in taps)))
    assert not signal.find(replace(profile, taps=taps))


def test_too_few_images_raise_no_alarm_about_the_signal() -> None:
    assert not signal.find(replace(planted((0.1, 0.1), m=24), majority=0.5))


# --- wrong labels ---------------------------------------------------------------------------------------------------------------------


def clouds(seed: int = 0, each: int = 40, classes: int = 3) -> tuple[torch.Tensor, np.ndarray]:
    """Return features of classes that lie well apart, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return torch.from_numpy(rng.normal(0, 1, (len(labels), 16)) + 4 * np.eye(16)[labels]).float(), labels


def suspected(features: torch.Tensor, labels: np.ndarray, groups: list[str] | None = None) -> list[int]:
    probabilities = wrong.left_out_probabilities(features, TapPooling("tap", 16, (1,)), labels, groups)
    return [suspect.index for suspect in wrong.suspects(probabilities, labels, DEFAULT.wrong_label)]


def test_labels_that_were_flipped_are_listed_first_and_others_are_not() -> None:
    features, labels = clouds()
    assert suspected(features, labels) == []
    labels[[5, 50]] = 2
    assert sorted(suspected(features, labels)) == [5, 50]


def test_a_wrong_label_is_told_even_if_the_whole_burst_has_it() -> None:
    features, labels = clouds()
    burst = list(range(6))
    features[burst] = features[0] + 0.01 * features[burst]
    labels[burst] = 2
    assert not set(burst) & set(suspected(features, labels))  # each is confirmed by the others
    groups = ["burst" if i in burst else "" for i in range(len(labels))]
    assert set(burst) <= set(suspected(features, labels, groups))


def test_labels_thrown_by_a_coin_are_no_list() -> None:
    features, labels = clouds()
    assert suspected(features, np.random.default_rng(1).permutation(labels)) == []


def test_a_finding_names_both_classes_and_the_alarm_counts() -> None:
    rows = [Row(f"{i}.png", f"{i:032x}", "ab"[i % 2], TRAIN, 9, 9, "RGB", "") for i in range(40)]
    probabilities = np.where(np.arange(40)[:, None] % 2 == np.arange(2), 0.98, 0.02)
    assert wrong.find(rows, probabilities, 0.9) == ([], [])
    probabilities[3] = 0.99, 0.01
    findings, (alarm,) = wrong.find(rows, probabilities, 0.9)
    assert [(f.path, f.detail) for f in findings] == [("3.png", "labeled b (1%); the other images say a (99%)")]
    assert alarm.text.startswith("1 label is probably wrong, of 40 that were checked")


def test_too_few_images_of_a_class_are_not_checked() -> None:
    rows = tuple(Row(f"{i}.png", f"{i:032x}", "abc"[i % 3], TRAIN, 9, 9, "RGB", "") for i in range(12))
    assert wrong.drawn(Manifest(rows, (), ()), 100, 0) == []
    more = tuple(replace(row, path=f"{k}{row.path}", md5=f"{1000 * k + i:032x}") for k in range(2) for i, row in enumerate(rows))
    assert len(wrong.drawn(Manifest(more, (), ()), 100, 0)) == 24
    assert 0 < len(wrong.drawn(Manifest(more, (), ()), 18, 0)) <= 18
    assert wrong.drawn(Manifest(more, (), ()), 0, 0) == []


# --- what to label next ---------------------------------------------------------------------------------------------------------------


def test_images_that_the_model_is_unsure_of_are_chosen_and_a_burst_only_once() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (60, 8))
    probabilities = np.full((60, 3), (0.98, 0.01, 0.01))
    unsure = [3, 20, 21, 22, 40]
    probabilities[unsure] = 0.4, 0.38, 0.22
    features[[20, 21, 22]] = features[20] + 0.001 * features[[20, 21, 22]]
    first = suggesting.choose(probabilities, features, 3)
    assert {3, 40} < set(first)
    assert len({20, 21, 22} & set(first)) == 1
    assert len(set(suggesting.choose(probabilities, features, 100))) == 60


# --- weight, files --------------------------------------------------------------------------------------------------------------------


def test_settings_say_which_kinds_stop_and_which_only_warn(tmp_path: Path) -> None:
    contents = two_classes(lambda i: ("png", encoded(blob(i)))) | {"a/flat.png": encoded(Image.new("L", (40, 40)))}
    result = checked(tmp_path, contents, CheckParams(stop=("flat",), warn=("shortcut",)))
    assert [(alarm.kind, alarm.severity) for alarm in result.alarms] == [("flat", STOP), ("shortcut", WARN)]


def test_findings_and_alarms_are_read_as_they_were_written(tmp_path: Path) -> None:
    result = checked(tmp_path, usual() | {"a/black.png": encoded(Image.new("L", (48, 48)))})
    files = tmp_path / "quality.csv", tmp_path / "alarms.json"
    quality.write_quality(result, *files)
    assert quality.read_quality(*files) == result
    assert result.alarms


def test_alarms_are_ordered_by_severity() -> None:
    alarms = (from_remark("not evaluated: no test image of a"), from_remark("leak: 3 images"))
    assert by_severity(alarms) == (Alarm("leak", BLOCK, "3 images"), Alarm("not evaluated", WARN, "no test image of a"))
