"""Profiling: on images whose truth is planted what is measured is what was planted."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.archives import take
from tests.helpers.evidence import planted
from tests.helpers.scenes import PARAMS, measured, scene, texture, write
from tlpipeline import records
from tlpipeline.backbones import catalogue
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.choice.decide import choose
from tlpipeline.choice.reasons import warnings
from tlpipeline.data import splits
from tlpipeline.data.dataset import Row, ingest
from tlpipeline.data.loader import normalize, resize_and_crop
from tlpipeline.errors import DataError
from tlpipeline.params import ChooseParams, load
from tlpipeline.profiling import gram, measure
from tlpipeline.profiling.probes import head_similarity, leave_one_out, one_hot
from tlpipeline.profiling.profile import Profile, slice_test
from tlpipeline.progress import Event

# --- the sample -----------------------------------------------------------------------------------------------------------------------


def rows_of(counts: Mapping[str, int]) -> list[Row]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Row(f"{i}", f"{i:032x}", label, "train", 8, 8, "RGB", "") for i, label in enumerate(labels)]


def test_a_stratified_sample_has_every_class_in_proportion() -> None:
    rows = rows_of({"rare": 5, "common": 495})
    drawn = measure.sample(rows, 100, seed=0)
    assert len(drawn) == 100
    assert sum(r.label == "rare" for r in drawn) == 1
    assert measure.sample(rows[::-1], 100, seed=0) == drawn
    assert measure.sample(rows, 100, seed=1) != drawn


def test_a_class_of_one_image_in_a_thousand_is_drawn() -> None:
    drawn = measure.sample(rows_of({"rare": 1, "a": 999, "b": 1000}), 64, seed=0)
    assert {r.label for r in drawn} == {"rare", "a", "b"}


def test_with_very_many_classes_as_many_are_probed_as_have_eight_images() -> None:
    rows = rows_of({f"c{i}": 10 for i in range(300)})
    assert len({r.label for r in measure.sample(rows, 512, seed=0)}) == 64
    assert len({r.label for r in measure.sample(rows, 3000, seed=0)}) == 300


# --- on images ------------------------------------------------------------------------------------------------------------------------


def test_the_profile_reads_only_training_and_validation_images(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=30)
    manifest = ingest(folder, {}, lambda done, total: None)
    for row in manifest.used("test"):
        (folder / row.path).unlink()
    assert measured(folder, manifest, images=64).sampled == min(64, len(manifest.used("train")))
    (folder / manifest.used("train")[0].path).unlink()
    with pytest.raises(DataError):
        measured(folder, manifest, images=64)


def test_the_half_of_validation_that_judges_is_never_looked_at(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=60)
    manifest = ingest(folder, {}, lambda done, total: None)
    judging = [row for row in manifest.used("val") if not splits.in_selection_half(row.md5)]
    assert judging
    for row in judging:
        (folder / row.path).unlink()
    found = measured(folder, manifest)
    assert found.validation == len(judging)
    assert found.held_out == len(manifest.used("val")) - len(judging)


def renamed(folder: Path) -> None:
    """Give files and classes other names, in another order."""
    for label in range(3):
        for index, path in enumerate(sorted((folder / f"class{label}").iterdir())):
            path.rename(path.with_name(f"z{index * 7919 % 997:03d}-{path.name}"))
        (folder / f"class{label}").rename(folder / f"{'cab'[label]}-renamed")


@pytest.mark.slow
def test_file_names_class_names_and_order_do_not_matter(tmp_path: Path) -> None:
    folder = write(tmp_path, [(f"class{i % 3}", scene(i) + 5 * texture(i % 3)) for i in range(150)])
    before = measured(folder, tangent=True)
    renamed(folder)
    after = measured(folder, tangent=True)
    assert before.tangent is not None
    assert after.tangent is not None
    assert astuple(after.tangent) == pytest.approx(astuple(before.tangent))  # sums in another order differ in their last digits
    one, other = (choose(profile, load(Path(__file__).parent.parent / "params.yaml").choose) for profile in (before, after))
    assert (one.case, one.slice, one.head) == (other.case, other.slice, other.head)
    assert [t.correct for t in after.taps] == [t.correct for t in before.taps]
    assert [h.correct for h in after.heads] == [h.correct for h in before.heads]
    assert [h.held_out for h in after.heads] == [h.held_out for h in before.heads]
    assert after.head_similarity == pytest.approx(before.head_similarity)


@pytest.mark.slow
def test_class_names_do_not_matter_to_the_learning_curve(tmp_path: Path) -> None:
    """The slope of the curve is a figure of the prediction: a decision must not turn on what the folders are called."""
    folder = write(tmp_path, [(f"class{i % 3}", scene(i) + 5 * texture(i % 3)) for i in range(150)])
    before = measured(folder).learning_curve
    renamed(folder)
    assert measured(folder).learning_curve == before


@pytest.mark.slow
def test_files_of_the_same_name_are_kept_apart(tmp_path: Path) -> None:
    """Every class has an image 000.png; what is cached or compared is the content, never the name."""
    pairs = [(f"class{i % 3}", scene(i) + 5 * texture(i % 3)) for i in range(150)]
    same, different = tmp_path / "same", tmp_path / "different"
    for place, (label, pixels) in enumerate(pairs):
        for folder, name in ((same, f"{place // 3:03d}.png"), (different, f"{label}-{place:03d}.png")):
            (folder / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / name)
    assert measured(same) == measured(different)


def test_the_same_seed_gives_the_same_profile_and_another_seed_another_sample(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=40)
    manifest = ingest(folder, {}, lambda done, total: None)
    assert measured(folder, manifest, images=24) == measured(folder, manifest, images=24)
    rows = manifest.used("train")
    assert measure.sample(rows, 24, 0) != measure.sample(rows, 24, 1)


def test_the_sample_is_doubled_only_while_the_choice_is_open(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=60)
    manifest = ingest(folder, {}, lambda done, total: None)
    assert measured(folder, manifest, images=24).sampled == 24
    assert measured(folder, manifest, images=24, undecided=lambda _: True, solvers=10.0).sampled == 96


def test_many_classes_of_a_few_images_fill_the_sample_and_it_never_shrinks() -> None:
    rows = rows_of({f"c{i:03d}": 3 for i in range(400)})
    drawn = measure.sample(rows, 800, seed=0)
    assert 800 - 8 < len(drawn) <= 800
    assert set(Counter(r.label for r in drawn).values()) == {3}
    sizes = [len(measure.sample(rows, wanted, seed=0)) for wanted in (100, 200, 400, 800, 1600)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_the_sample_does_not_grow_where_the_solvers_would_cost_more_than_their_share_of_the_passes(
    make_images: Callable[..., Path], share: float
) -> None:
    """Counted, not timed: the demonstration network is so small that its solvers are soon a part of what its passes are."""
    folder = make_images(classes=3, each=60)
    manifest = ingest(folder, {}, lambda done, total: None)
    found = measured(folder, manifest, images=24, undecided=lambda _: True, solvers=share)
    readings = [tap.reading for tap in found.taps]
    fit = [n for n in (48, 96) if measure.solving(readings, n, found.classes) <= share * found.forward_ops * n]
    assert found.sampled == (fit[-1] if fit else 24)


@pytest.mark.slow
def test_solvers_grow_faster_than_passes(known: dict[str, Profile]) -> None:
    readings = [tap.reading for tap in known["own"].taps]
    shares = [measure.solving(readings, n, 10) / n for n in (256, 512, 1024, 2048)]
    assert shares == sorted(shares)


def test_a_larger_sample_is_probed_at_the_penalties_that_the_smaller_one_found(make_images: Callable[..., Path]) -> None:
    """Two factorisations a probe instead of a decomposition: the same answers as if all penalties were tried, or nearly."""
    folder = make_images(classes=3, each=60)
    manifest = ingest(folder, {}, lambda done, total: None)
    grown = measured(folder, manifest, images=48, undecided=lambda _: True, solvers=10.0)
    at_once = measured(folder, manifest, images=grown.sampled)
    assert grown.sampled > 48
    for tap, other in zip(grown.taps, at_once.taps, strict=True):
        assert tap.accuracy == pytest.approx(other.accuracy, abs=0.03), tap.name


def test_without_validation_images_no_slice_is_confirmed(tmp_path: Path) -> None:
    """A head must not be confirmed by an image that it was solved on."""
    pairs = [(f"c{i % 3}", scene(i) + 10 * texture(i % 3)) for i in range(180)]
    folder = write(tmp_path, pairs)
    manifest = ingest(folder, {}, lambda done, total: None)
    bare = replace(manifest, rows=tuple(r for r in manifest.rows if r.split != "val"))
    found = measured(folder, bare)
    assert (found.held_out, found.last.held_out) == (0, None)
    test = slice_test(found, 0.01, 300)
    assert test.significance < 0.05
    assert not test.confirmed
    assert any("No validation images are left to confirm a cut" in words for words in warnings(choose(found, ChooseParams()), found))


@pytest.mark.slow
def test_every_class_is_probed_where_the_sample_may_hold_eight_images_of_each(tmp_path: Path) -> None:
    """Fifty of many classes are an easier task than all of them: their accuracy is not that of the head that would be trained."""
    pairs = [(f"c{i % 40:02d}", scene(i)) for i in range(40 * 10)]
    folder = write(tmp_path, pairs)
    manifest = ingest(folder, {}, lambda done, total: None)
    found = measured(folder, manifest, images=100)
    assert (found.classes, found.probed) == (40, 40)
    assert found.sampled > 100
    few = measured(folder, manifest, images=64)
    assert few.probed == 37  # of about seven images each
    assert any("37 of 40 classes" in words for words in warnings(choose(few, ChooseParams()), few))


def test_the_profile_tells_what_it_does_while_it_does_it(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=30)
    net = catalogue.load("demonstration", "DEFAULT")
    told: list[Event] = []
    manifest = ingest(folder, {}, lambda done, total: None)
    measure.measure(net, folder, manifest, 32, replace(PARAMS, tangent=True), lambda _: False, told.append, torch.device("cpu"))
    words = " / ".join(event.text for event in told)
    for part in ("features of", "probes of", "head on", "gradients of"):
        assert part in words
    assert all(0 <= event.done <= event.total for event in told)


def test_an_image_that_does_not_decode_while_profiling_is_named(make_images: Callable[..., Path]) -> None:
    folder = make_images(classes=3, each=20)
    manifest = ingest(folder, {}, lambda done, total: None)
    row = manifest.used("train")[0]
    (folder / row.path).write_bytes(b"no picture")
    with pytest.raises(DataError, match=re.escape(row.path)):
        measured(folder, manifest)


def test_a_profile_survives_json(make_images: Callable[..., Path]) -> None:
    found = measured(make_images(classes=3, each=20))
    assert found.cut is not None
    assert records.parse(Profile, json.dumps(found.to_json()), "profile.json", "") == found
    alone = planted([0.8])
    assert alone.cut is None
    assert records.parse(Profile, json.dumps(alone.to_json()), "profile.json", "") == alone


def test_each_head_reads_the_taps_that_it_says(make_images: Callable[..., Path]) -> None:
    found = measured(make_images(classes=3, each=30))
    names = [t.name for t in found.taps]
    assert found.last.taps == (names[-1],)
    assert found.last.correct == found.taps[-1].correct
    assert found.multi.taps[0] == names[-1]
    assert found.cut is not None
    assert names[-1] not in found.cut.taps
    for head in (found.cut, found.multi):
        assert head.taps == tuple(r.tap for r in found.head_at(head.taps[0]))
        assert sorted(head.taps, key=names.index, reverse=True) == list(head.taps)
        assert len(head.taps) <= 3


# --- planted truth --------------------------------------------------------------------------------------------------------------------


def test_the_source_classes_are_read_best_at_the_last_tap(known: dict[str, Profile]) -> None:
    own = known["own"]
    assert own.best.name == own.taps[-1].name
    assert slice_test(own, 0.01, 500).similar > 0.9


def test_texture_that_pooling_destroys_is_read_early(known: dict[str, Profile]) -> None:
    early = known["early"]
    assert early.best.accuracy > 0.95
    found = slice_test(early, 0.01, 500)
    assert found.tap in ("conv1", "conv2")
    assert found.gain > 0.1
    assert found.confirmed
    assert found.similar < 0.05


def test_head_similarity_is_zero_for_shuffled_labels_and_highest_for_the_own_classes(known: dict[str, Profile]) -> None:
    assert known["shuffled"].head_similarity == pytest.approx(0, abs=0.02)
    assert known["nothing"].head_similarity == pytest.approx(0, abs=0.02)
    similarity = {name: profile.head_similarity or 0.0 for name, profile in known.items()}
    # A class of eight images adds little entropy, and the three others are the source's own as well.
    assert max(v for k, v in similarity.items() if k not in ("own", "rare")) + 0.05 < similarity["own"]


def test_label_noise_costs_what_it_must_and_no_more(known: dict[str, Profile]) -> None:
    """Three tenths of the labels drawn anew of four classes: 77.5 % stay true."""
    clean, noisy = known["own"].last.accuracy, known["noisy"].last.accuracy
    assert 0.6 < noisy < min(0.8, clean - 0.05)


def test_a_rare_class_is_in_the_sample_and_shows_in_the_balanced_accuracy(known: dict[str, Profile]) -> None:
    rare = known["rare"]
    assert rare.classes == 4
    assert rare.smallest <= 8 < 30 < rare.largest
    assert rare.taps[-1].balanced < rare.taps[-1].accuracy


def test_more_classes_than_half_the_sample_are_measured_without_a_crash(known: dict[str, Profile]) -> None:
    many = known["many"]
    assert many.classes == 40
    assert many.images / many.classes < 5


def test_no_signal_is_measured_as_none_at_every_tap(known: dict[str, Profile]) -> None:
    """Random labels: no tap is better than the largest class, and none is worse than a guess."""
    for tap in known["nothing"].taps:
        assert 0.2 < tap.accuracy < known["nothing"].majority + 0.1, tap.name


def test_random_labels_find_no_better_tap(known: dict[str, Profile]) -> None:
    found = slice_test(known["nothing"], 0.01, 500)
    assert found.similar > 0.05
    assert found.significance > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(6))
def test_random_labels_of_equally_large_classes_are_read_as_guesses(tmp_path: Path, draw: int) -> None:
    """The others hold one image less of a left-out image's class: that alone must not make a probe wrong every time, nor another tap better."""
    sides = ["train"] * 150 + ["val"] * 30 + ["test"] * 15
    labels = np.concatenate([np.random.default_rng([draw, 5]).permutation(np.arange(count) % 3) for count in (150, 30, 15)])
    found = measured(
        write(tmp_path, [(f"{side}/c{label}", scene(i, seed=draw + 50)) for i, (side, label) in enumerate(zip(sides, labels, strict=True))])
    )
    assert found.majority == pytest.approx(1 / 3)
    for tap in found.taps:
        assert 0.2 < tap.accuracy < 0.47, tap.name
    assert slice_test(found, 0.01, 500).significance > 0.01


# --- on real data ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
def test_head_similarity_is_higher_for_the_source_than_for_other_real_sets(real_data: Path) -> None:
    """Photographs of the classes that the network was made for against steel and hands."""
    net = catalogue.load("demonstration", "DEFAULT")
    similarity = {}
    for name in ("cifar10", "neu_steel", "sign_digits"):
        pictures, labels = take(real_data / f"{name}.tar.gz", 20)
        inputs = torch.from_numpy(np.stack([resize_and_crop(picture, net.transforms) for picture in pictures]))
        with torch.inference_mode():
            chances = net.module(normalize(inputs, net.transforms)).softmax(1).double().numpy()
        similarity[name] = head_similarity(chances, np.array(labels))
        assert head_similarity(chances, np.random.default_rng(0).permutation(labels)) < 0.05
    assert similarity["cifar10"] > 0.5
    assert max(v for k, v in similarity.items() if k != "cifar10") + 0.1 < similarity["cifar10"], similarity


def test_a_slice_that_is_as_good_on_held_out_images_is_confirmed() -> None:
    assert slice_test(planted([0.6, 0.92, 0.80], last_held_out=0.9), gain=0.01, draws=200).confirmed


@pytest.mark.slow
def test_heads_are_held_against_images_of_classes_that_they_know(tmp_path: Path) -> None:
    folder = write(tmp_path, [(f"c{i % 40:02d}", scene(i)) for i in range(400)])
    manifest = ingest(folder, {}, lambda done, total: None)
    found = measured(folder, manifest, images=64)
    known = {r.label for r in measure.sample(manifest.used("train"), 256, 0)}
    aside = [r for r in manifest.used("val") if splits.in_selection_half(r.md5)]
    assert found.probed == len(known) == 37
    assert 0 < found.held_out == sum(r.label in known for r in aside) < len(aside)


def test_a_slice_is_confirmed_by_heads_that_weigh_taps_as_training_does(
    make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of features has a variance of one: a tap of more blocks counts more, and the penalties mean what they mean in training."""
    given: list[float] = []
    real = gram.solve_kernel
    monkeypatch.setattr(
        gram,
        "solve_kernel",
        lambda kernel, *rest, **more: (given.append(kernel.trace() / len(kernel)), real(kernel, *rest, **more))[1],
    )
    found = measured(make_images(classes=3, each=40))
    assert found.cut is not None
    blocks = {tap.name: len(tap.reading.blocks) for tap in found.taps}
    assert given == pytest.approx([sum(blocks[tap] for tap in head.taps) for head in (found.last, found.cut)], rel=0.1)
    assert given[1] > given[0]


def test_gradients_are_held_against_features_that_are_centered_over_the_same_images() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=draw)
    labels = (x[:, 1] + 0.5 * torch.randn(80, generator=draw) > 0).long().numpy()
    sample = gram.gram_matrices([TapPooling("tap", 6, (1,))], [x], labels, {})
    first = [i for i in range(80) if x[i, 0] > 0]  # far from the middle of the sample
    own = sample.read[0][first].astype(float)
    own -= own.mean(0)
    kernel = own @ own.T
    kernel /= kernel.trace() / len(first)
    targets = one_hot(labels[first])
    told = sample.tangent([0], kernel, first)
    assert [told.error, told.frozen_error] == pytest.approx(
        [float(((leave_one_out(kernel, targets).scores - targets) ** 2).mean())] * 2, rel=1e-5
    )


def test_the_gain_of_a_tap_is_over_the_last_one(tmp_path: Path) -> None:
    found = measured(write(tmp_path, [(f"c{i % 3}", scene(i) + 5 * texture(i % 3)) for i in range(150)]))
    assert found.taps[0].accuracy != found.taps[-1].accuracy
    for tap in found.taps:
        assert tap.gain == pytest.approx(tap.accuracy - found.taps[-1].accuracy)
    assert found.taps[-1].gain_error == 0
