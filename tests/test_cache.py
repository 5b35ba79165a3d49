"""The cache: an image's features are computed once, by content; nothing half-written is ever used; it keeps to its bound."""

import dataclasses
import errno
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers.mutations import damaged
from tlpipeline.backbones import catalogue
from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.classifier import DESCRIPTION, Classifier, Description, load, probabilities, save
from tlpipeline.backbones.features import FeatureExtractor, extract
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.taps import Backbone
from tlpipeline.data import cache, dataset, splits
from tlpipeline.data.cache import Column, FeatureTable, Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images, resized_cache, square_cache
from tlpipeline.errors import DataError
from tlpipeline.params import ProfileParams
from tlpipeline.profiling import measure
from tlpipeline.progress import silent
from tlpipeline.workspace import layout

CPU = torch.device("cpu")
FIRST, LAST = TapPooling("conv1", 32, (1, 2)), TapPooling("fc2", 128, (1,))


def md5(text: object) -> str:
    return hashlib.md5(str(text).encode()).hexdigest()


def numbers(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


class Counting:
    """Counts the steps of a network and the images in them."""

    def __init__(self, reader: FeatureExtractor) -> None:
        self.steps, self.network = 0, reader.network
        reader.network = self

    def __call__(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        self.steps += 1
        return self.network(inputs)


def reader(store: Store, net: Backbone, *readings: TapPooling, size: int | None = None) -> FeatureExtractor:
    transforms = net.transforms if size is None else net.transforms.at(size)
    trunk = cutting.cut(net, [r.tap for r in readings]).to(memory_format=torch.channels_last)
    return FeatureExtractor(store, net, trunk, readings, transforms, CPU)


def steps(store: Store, net: Backbone, folder: Path, rows: list[Row], *readings: TapPooling) -> int:
    """How many steps of the network reading these images takes."""
    asked = reader(store, net, *readings)
    counting = Counting(asked)
    found = asked.extract(Images(folder, rows, net.transforms), lambda done: None)
    assert [len(rows_) for rows_ in found] == [len(rows)] * len(readings)
    return counting.steps


@pytest.fixture
def net() -> Backbone:
    return catalogue.load("demonstration", "DEFAULT")


@pytest.fixture
def listed(make_images: Callable[..., Path]) -> tuple[Path, list[Row]]:
    folder = make_images(classes=4, each=40)
    return folder, dataset.ingest(folder, {}, lambda done, total: None).used(*splits.SPLIT_NAMES)


# --- by content -----------------------------------------------------------------------------------------------------------------------


def test_new_images_cost_passes_and_known_ones_none(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    folder, rows = listed
    assert len(rows) == 160
    known, new = rows[:144], rows[144:]
    assert steps(Store(tmp_path / "cache"), net, folder, known, FIRST, LAST) == 9
    # Another process, later: the tenth that is new costs a tenth of the passes.
    assert steps(Store(tmp_path / "cache"), net, folder, rows, FIRST, LAST) == 1
    assert steps(Store(tmp_path / "cache"), net, folder, [*new, *known], LAST) == 0


def test_what_is_kept_is_what_is_computed_to_the_bit(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    folder, rows = listed
    for part in (rows[:7], rows[100:113], rows):
        steps(Store(tmp_path / "cache"), net, folder, part, FIRST, LAST)
    kept = [r.all() for r in reader(Store(tmp_path / "cache"), net, FIRST, LAST).rows(rows)]
    images = Images(folder, rows, net.transforms)
    anew = extract(reader(Store(), net, FIRST, LAST).trunk, [FIRST.grids, LAST.grids], images, CPU, lambda done: None)
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))


def test_renamed_images_are_known_and_replaced_ones_are_not(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    folder, rows = listed
    steps(Store(tmp_path / "cache"), net, folder, rows, LAST)
    (folder / rows[3].path).rename(folder / "other.png")
    renamed = [dataclasses.replace(rows[3], path="other.png", label="else"), *rows[:3], *rows[4:]]
    assert steps(Store(tmp_path / "cache"), net, folder, renamed, LAST) == 0
    (folder / rows[5].path).write_bytes((folder / rows[6].path).read_bytes() + b"\0")
    replaced = [dataclasses.replace(rows[5], md5=hashlib.md5((folder / rows[5].path).read_bytes()).hexdigest()), *rows[6:]]
    assert steps(Store(tmp_path / "cache"), net, folder, replaced, LAST) == 1


def test_other_weights_taps_pyramids_and_sizes_are_computed_anew(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    folder, rows = listed[0], listed[1][:16]
    store = Store(tmp_path / "cache")
    assert steps(store, net, folder, rows, LAST) == 1
    assert steps(store, net, folder, rows, TapPooling("conv3", 128, (1, 2))) == 1
    assert steps(store, net, folder, rows, TapPooling("conv3", 128, (1,))) == 1
    assert steps(store, catalogue.load("demonstration", "none", seed=1), folder, rows, LAST) == 1
    assert steps(store, catalogue.load("demonstration", "none", seed=2), folder, rows, LAST) == 1
    square = catalogue.load("nets:resnet20", "none")
    taps = [TapPooling("layer1.0", 16, (1,))]
    counts = []
    for size in (32, 48, 32):
        asked = reader(store, square, *taps, size=size)
        counting = Counting(asked)
        asked.extract(Images(folder, rows, square.transforms.at(size)), lambda done: None)
        counts.append(counting.steps)
    assert counts == [1, 1, 0]
    assert steps(store, net, folder, rows, LAST) == 0


@pytest.mark.parametrize(
    "change", [{"mean": (0.1, 0.2, 0.3)}, {"std": (0.1, 0.2, 0.3)}, {"resize": 40}, {"interpolation": "bicubic"}], ids=str
)
def test_other_transforms_are_read_anew(change: dict[str, Any], net: Backbone) -> None:
    store, rows = Store(), [Row("a.png", md5(0), "a", "train", 32, 32, "RGB", "")]
    asked = [
        reader(store, dataclasses.replace(net, transforms=t), LAST) for t in (net.transforms, dataclasses.replace(net.transforms, **change))
    ]
    asked[0].columns[0].add([md5(0)], numbers(1, 128))
    assert [bool(each.missing(rows)[0]) for each in asked] == [False, True]


def test_an_image_is_known_where_all_that_is_asked_of_it_is(listed: tuple[Path, list[Row]], net: Backbone) -> None:
    folder, rows = listed[0], listed[1][:16]
    for first in (FIRST, LAST):
        store = Store()
        assert steps(store, net, folder, rows, first) == 1
        assert steps(store, net, folder, rows, FIRST, LAST) == 1


def test_shards_are_no_larger_than_their_bound_however_wide_a_row_is(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    """What is not written yet lies in memory."""
    folder, rows = listed
    assert steps(Store(tmp_path, shard_bytes=32 * 4 * 128), net, folder, rows, LAST) == 10
    assert [kept.files for kept in cache.info(tmp_path)] == [5]  # of two steps each


class Listing(Store):
    """Remembers the key of each column that it is asked for, by label."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[str, str] = {}

    def column(self, key: str, label: str) -> Column:
        self.keys[label] = key
        return super().column(key, label)


def test_what_is_kept_is_known_by_the_decoder_that_made_the_pixels(net: Backbone) -> None:
    store = Listing()
    reader(store, net, LAST)
    for decoded in (square_cache(store, Path(), 32), resized_cache(store, Path(), net.transforms)):
        assert len(decoded.column.has([])) == 0
    assert len(store.keys) == 3
    assert all(f"Pillow {PIL.__version__}" in key for key in store.keys.values())


def test_every_column_that_the_profile_keeps_is_known_by_the_decoder(make_images: Callable[..., Path], net: Backbone) -> None:
    store = Listing()
    folder = make_images(classes=2, each=16, name="profiled")
    manifest = dataset.ingest(folder, {}, lambda done, total: None)
    look = ProfileParams(images=16, images_max=16, tangent=True, seed=0)
    measure.measure(net, folder, manifest, 32, look, lambda seen: False, silent, CPU, store)
    assert any("gradients" in label for label in store.keys)
    assert all(f"Pillow {PIL.__version__}" in key for key in store.keys.values())


def test_a_weight_behind_the_tap_plays_no_part_and_one_before_it_does(net: Backbone) -> None:
    before = cutting.tap_fingerprints(net, ["conv2", "fc2"], logits=True)
    with torch.no_grad():
        net.module.get_parameter("conv3.0.weight")[0, 0, 0, 0] += 1
    after = cutting.tap_fingerprints(net, ["conv2", "fc2"], logits=True)
    assert before["conv2"] == after["conv2"]
    assert before["fc2"] != after["fc2"]
    assert before["logits"] != after["logits"]


class Attentive(nn.Module):
    """A block whose tensors say neither how many heads they are for nor how it is called."""

    def __init__(self, heads: int, slope: float, kept: float) -> None:
        super().__init__()
        self.attention, self.slope, self.kept = nn.MultiheadAttention(8, heads, batch_first=True), slope, [torch.full((2,), kept)]

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        tokens = maps.flatten(2).transpose(1, 2)
        answers = self.attention(tokens, tokens, tokens, need_weights=False)[0] * self.slope + self.kept[0][0]
        return answers.transpose(1, 2).reshape(maps.shape)


class Attending(nn.Module):
    taps = ("stem", "block")
    transforms: ClassVar[dict[str, int]] = {"size": 32}

    def __init__(self, heads: int = 2, slope: float = 1.0, kept: float = 0.0) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 8, stride=8), Attentive(heads, slope, kept), nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(images)).mean((2, 3)))


@pytest.mark.parametrize("other", [{"heads": 4}, {"slope": 0.5}, {"kept": 1.0}], ids=str)
def test_the_same_weights_in_a_block_that_is_set_up_otherwise_are_another_network(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(**changes: Any) -> dict[str, str]:
        monkeypatch.setattr(sys.modules[__name__], "brought", lambda: Attending(**changes), raising=False)
        return cutting.tap_fingerprints(catalogue.load(f"{__name__}:brought", "none"), ["stem", "block"])

    assert known() == known()
    assert known(**other)["stem"] == known()["stem"]
    assert known(**other)["block"] != known()["block"]


def test_what_a_block_calls_in_its_file_and_what_it_inherits_is_part_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "from torch import nn\n\n\nclass Base(nn.Module):\n    def forward(self, x):\n        return self.shape(x) * {}\n"
    net = (
        "from torch import nn\nfrom brought_base import Base\n\n\ndef bent(x):\n    return x.clamp({})\n\n\n"
        "class Block(Base):\n    def shape(self, x):\n        return bent(x)\n\n\n"
        "class Net(nn.Module):\n    taps, transforms = ('block',), {{'size': 8}}\n\n"
        "    def __init__(self):\n        super().__init__()\n        self.block, self.head = Block(), nn.Linear(192, 2)\n\n"
        "    def forward(self, x):\n        return self.head(self.block(x).flatten(1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for factor, least in ((1, 0), (1, 0), (2, 0), (1, 1)):
        for name, text in (("brought_base", base.format(factor)), ("brought_net", net.format(least))):
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        found.append(cutting.tap_fingerprints(catalogue.load("brought_net:Net", "none"), ["block"])["block"])
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_an_exported_model_knows_the_features_of_the_network_it_was_cut_from(
    listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path
) -> None:
    folder, rows = listed
    store = Store(tmp_path / "cache")
    steps(store, net, folder, rows, TapPooling("conv2", 64, (1, 2)), FIRST)
    model = Classifier(net, (TapPooling("conv2", 64, (1, 2)), FIRST), 4, frozen=True)
    torch.nn.init.normal_(model.head.weight)
    save(model, Description("demonstration", "conv2", model.readings, tuple("abcd"), net.transforms, frozen=True), tmp_path / "model")
    exported, description = load(tmp_path / "model")
    for row in rows:  # nothing is decoded again
        (folder / row.path).unlink()
    from_cache = probabilities(exported, Images(folder, rows, description.transforms), CPU, lambda done: None, store)
    assert from_cache.shape == (160, 4)


def test_predictions_with_and_without_a_cache_are_the_same_bits(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    folder, rows = listed
    model = Classifier(net, (LAST,), 4, frozen=True)
    torch.nn.init.normal_(model.head.weight)
    images = Images(folder, rows[:45], net.transforms)
    plain = probabilities(model, images, CPU, lambda done: None)
    for _ in range(2):
        assert torch.equal(plain, probabilities(model, images, CPU, lambda done: None, Store(tmp_path / "cache")))


def test_what_a_trained_backbone_reads_is_not_kept(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    """Nobody reads it again, and in a bounded cache it would push out what is."""
    folder, rows = listed
    answers = []
    for frozen in (True, False):
        model = Classifier(net, (LAST,), 4, frozen)
        torch.nn.init.ones_(model.head.weight)
        save(model, Description("demonstration", "fc2", model.readings, tuple("abcd"), net.transforms, frozen), tmp_path / "model")
        exported, description = load(tmp_path / "model")
        assert (exported.frozen, description.frozen) == (frozen, frozen)
        place = tmp_path / f"cache{frozen}"
        images = Images(folder, rows[:20], net.transforms)
        answers.append(probabilities(exported, images, CPU, lambda done: None, Store(place)))
        assert bool(cache.info(place)) is frozen
    assert torch.equal(*answers)


def test_a_model_from_before_it_said_whether_it_is_frozen_is_taken_for_trained(net: Backbone, tmp_path: Path) -> None:
    model = Classifier(net, (LAST,), 4, frozen=True)
    save(model, Description("demonstration", "fc2", model.readings, tuple("abcd"), net.transforms, frozen=True), tmp_path)
    content = json.loads((tmp_path / DESCRIPTION).read_text())
    del content["frozen"]
    (tmp_path / DESCRIPTION).write_text(json.dumps(content))
    assert load(tmp_path)[1].frozen is False


# --- crashes and company --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped in a name", "flipped in a row", "foreign"])
def test_a_damaged_shard_is_thrown_away_and_built_again(damage: str, listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    folder, rows = listed[0], listed[1][:32]
    wanted = [r.all() for r in reader_after(tmp_path, net, folder, rows).rows(rows)]
    (shard,) = (tmp_path / "cache").glob("*/*.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage.startswith("flipped"):
        place = wanted[0][3:4].numpy().tobytes() if damage.endswith("row") else bytes.fromhex(rows[3].md5)
        content[content.index(place) + 5] ^= 1
        shard.write_bytes(content)
    else:
        save_file({"something": torch.zeros(3)}, shard)
    assert steps(Store(tmp_path / "cache"), net, folder, rows, LAST) == 2
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 1  # the damaged one would be read at each start
    again = [r.all() for r in reader(Store(tmp_path / "cache"), net, LAST).rows(rows)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_a_mutant_of_a_shard_never_gives_other_values(tmp_path: Path) -> None:
    names, rows = [f"{i:032x}" for i in range(8)], torch.arange(24.0).reshape(8, 3)
    Store(tmp_path).column("key", "test").add(names, rows)
    (shard,) = tmp_path.glob("*/*.safetensors")
    content = shard.read_bytes()
    for seed in range(100):
        shard.write_bytes(damaged(content, seed))
        column = Store(tmp_path).column("key", "test")
        kept = [name for name, present in zip(names, column.has(names), strict=True) if present]
        assert torch.equal(column.rows(kept).all() if kept else rows[:0], rows[: len(kept)])


def reader_after(tmp_path: Path, net: Backbone, folder: Path, rows: list[Row]) -> FeatureExtractor:
    asked = reader(Store(tmp_path / "cache"), net, LAST)
    asked.extract(Images(folder, rows, net.transforms), lambda done: None)
    return asked


def test_what_was_done_before_a_crash_is_kept(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    folder, rows = listed
    asked = reader(Store(tmp_path / "cache", shard_rows=32), net, LAST)

    class Stop(Exception):
        pass

    def told(done: int) -> None:
        if done > 100:
            raise Stop

    with pytest.raises(Stop):
        asked.extract(Images(folder, rows, net.transforms), told)
    assert steps(Store(tmp_path / "cache"), net, folder, rows, LAST) == 4  # 96 of 160 images were safe


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = Column(tmp_path / "column")

    def full(*_: object, **__: object) -> None:
        (tmp_path / "column" / ".half.draft").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        column.add([md5(0)], numbers(1))
    assert not column.has([md5(0)])[0]
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "column").iterdir()] == [".half.draft"]
    assert not Column(tmp_path / "column").has([md5(0)])[0]


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(file: int) -> None:
        done.append("flushed")
        fsync(file)

    def named(draft: Path, path: Path) -> None:
        done.append("named")
        assert not path.exists()
        replace(draft, path)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    Column(tmp_path).add([md5(0)], numbers(1))
    assert done == ["flushed", "named"]


def test_drafts_of_writers_that_were_killed_go_and_those_of_writers_at_work_stay(tmp_path: Path) -> None:
    Store(tmp_path).column("key", "label").add([md5(0)], numbers(1))
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name, age in (("dead", 2 * 3600), ("alive", 60)):
        (place / f".{name}.draft").write_bytes(b"half")
        os.utime(place / f".{name}.draft", (time.time() - age, time.time() - age))
    cache.prune(tmp_path, 1e9)
    assert [path.name for path in place.glob(".*")] == [".alive.draft"]
    assert len(list(place.glob("*.safetensors"))) == 1


WRITER = """
import hashlib, sys, torch
from pathlib import Path
from typing import Any, ClassVar
from tlpipeline.data.cache import Store
names = [hashlib.md5(str(i).encode()).hexdigest() for i in range(200)]
rows = torch.arange(200.0)[:, None].repeat(1, 3)
for round in range(10):
    column = Store(Path(sys.argv[1])).column("key", "label")
    new = [i for i in range(200) if not column.has([names[i]])[0]][round * 5 : round * 5 + 20]
    column.add([names[i] for i in new], rows[new])
"""


@pytest.mark.slow
def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    column = Store(tmp_path).column("key", "label")
    there = np.flatnonzero(column.has([md5(i) for i in range(200)]))
    assert len(there) >= 100
    assert torch.equal(column.rows([md5(i) for i in there]).all()[:, 0], torch.from_numpy(there).float())


def test_two_readers_at_once_keep_what_one_would(listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path) -> None:
    """Neither waits for the other: an image may be computed twice, to the same bits, and never again."""
    folder, rows = listed
    begun = threading.Barrier(2, timeout=60)
    # Made before: torch.fx replaces the whole process's nn.Module.__call__ while it traces, and two threads at once leave it replaced.
    both = [reader(Store(tmp_path / "cache"), net, FIRST, LAST) for _ in range(2)]

    def read(asked: FeatureExtractor, part: list[Row]) -> int:
        counting = Counting(asked)
        begun.wait()
        asked.extract(Images(folder, part, net.transforms), lambda done: None)
        return counting.steps

    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(read, both, [rows, rows[::-1]]))
    assert len(rows) / 16 <= sum(passed) <= 2 * len(rows) / 16
    assert steps(Store(tmp_path / "cache"), net, folder, rows, FIRST, LAST) == 0
    alone = reader(Store(), net, FIRST, LAST).extract(Images(folder, rows, net.transforms), lambda done: None)
    kept = reader(Store(tmp_path / "cache"), net, FIRST, LAST).rows(rows)
    assert all(torch.equal(a.all(), b.all()) for a, b in zip(kept, alone, strict=True))


class Full(Column):
    def add(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")


def test_shards_that_another_thread_writes_are_the_same_and_its_errors_are_raised(
    listed: tuple[Path, list[Row]], net: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, on a CPU."""
    folder, rows = listed
    images = Images(folder, rows, net.transforms)
    features = []
    for separate in (False, True):
        asked = reader(Store(tmp_path / str(separate), shard_rows=32), net, FIRST, LAST)
        assert not asked.separate_writer
        asked.separate_writer = separate
        features.append([r.all() for r in asked.extract(images, lambda done: None)])
    assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))
    assert len(list((tmp_path / "True").glob("*/*.safetensors"))) == 2 * 5
    for part in (rows, rows[:3]):  # in the middle, and at the end
        asked = reader(Store(tmp_path / "full"), net, FIRST, LAST)
        asked.separate_writer = True
        asked.columns = [Full(tmp_path / "full") for _ in asked.columns]
        with pytest.raises(OSError, match="no room"):
            asked.extract(Images(folder, part, net.transforms), lambda done: None)


def test_a_reader_sees_what_another_wrote_meanwhile(tmp_path: Path) -> None:
    mine, other = Column(tmp_path), Column(tmp_path)
    other.add([md5(1), md5(2)], numbers(2))
    assert not mine.has([md5(1)])[0]
    mine.refresh()
    assert mine.has([md5(2), md5(1), md5(3)]).tolist() == [True, True, False]


def test_a_shard_is_opened_once_however_often_others_are_looked_for(tmp_path: Path) -> None:
    """One that is found damaged when it is opened is deleted."""
    mine = Column(tmp_path)
    mine.add([md5(0)], numbers(1))
    Column(tmp_path).add([md5(1)], numbers(1))
    mine.refresh()
    assert mine.has([md5(1)])[0]
    shards = sorted(tmp_path.glob("*.safetensors"))
    for shard in shards:
        (tmp_path / "damaged").write_bytes(b"damaged")
        (tmp_path / "damaged").replace(shard)
    mine.refresh()
    assert sorted(tmp_path.glob("*.safetensors")) == shards
    assert not Column(tmp_path).has([md5(0), md5(1)]).any()
    assert not list(tmp_path.glob("*.safetensors"))


def test_rows_that_another_run_pruned_stay_readable_to_who_has_them_open(tmp_path: Path) -> None:
    column = Column(tmp_path / "column")
    column.add([md5(0), md5(1)], numbers(2))
    assert cache.prune(tmp_path, 0) == 0
    assert torch.equal(column.rows([md5(1), md5(0)]).all(), numbers(2).flip(0))


def test_what_another_run_pruned_since_it_was_listed_is_passed_over(tmp_path: Path) -> None:
    """A link to nowhere is listed as a file is that is gone a moment later."""
    Column(tmp_path / "column").add([md5(0)], numbers(1))
    for name in ("gone.safetensors", ".gone.draft"):
        (tmp_path / "column" / name).symlink_to("nowhere")
    assert Column(tmp_path / "column").has([md5(0), md5(1)]).tolist() == [True, False]
    assert [kept.files for kept in cache.info(tmp_path)] == [1]
    assert cache.prune(tmp_path, 1e9) == cache.info(tmp_path)[0].bytes


def test_two_runs_that_prune_at_once_do_not_stumble_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "column").mkdir()
    for number in range(500):
        (tmp_path / "column" / f"{number}.safetensors").write_bytes(b"rows")
    begun = threading.Barrier(4, timeout=60)

    def pruned() -> int:
        begun.wait()
        return cache.prune(tmp_path, 0)

    with ThreadPoolExecutor(4) as pool:
        assert [run.result() for run in [pool.submit(pruned) for _ in range(4)]] == [0] * 4


def test_rows_in_hand_are_used_where_the_disk_gives_back_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cache.write_tensors

    def spoilt(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        plain(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    monkeypatch.setattr(cache, "write_tensors", spoilt)
    column = Column(tmp_path)
    column.add([md5(0), md5(1)], numbers(2))
    assert torch.equal(column.rows([md5(0), md5(1)]).all(), numbers(2))
    assert not Column(tmp_path).has([md5(0)])[0]


# --- its size -------------------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_and_mapped_rows_stay_readable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(4):
        store.column(f"column {number}", f"label {number}").add([md5(number)], numbers(1, 1000, number))
        (path,) = (p for p in tmp_path.glob("*/*.safetensors") if p.stat().st_mtime > 10_000)
        os.utime(path, (number + 1, number + 1))
    fresh = Store(tmp_path)
    first = fresh.column("column 0", "label 0").rows([md5(0)])  # used now: the newest
    kept = cache.info(tmp_path)
    assert [k.label for k in kept] == ["label 0", "label 3", "label 2", "label 1"]
    size = kept[0].bytes
    assert cache.prune(tmp_path, 2.5 * size, before=1.5) == 4 * size  # of columns 1 to 3, used at 2 to 4
    assert cache.prune(tmp_path, 2.5 * size) == 2 * size
    assert [k.label for k in cache.info(tmp_path)] == ["label 0", "label 3"]
    assert cache.prune(tmp_path, 2 * size) == 2 * size
    cache.prune(tmp_path, 0)
    assert cache.info(tmp_path) == []
    assert torch.equal(first.all(), numbers(1, 1000, 0))
    cache.clear(tmp_path)
    assert not tmp_path.exists()


def test_a_column_is_shown_by_its_label_and_by_when_any_of_it_was_used_last(tmp_path: Path) -> None:
    for name, damage in (("whole", ""), ("torn", '{"lab'), ("other", "{}"), ("none", "")):
        column = Store(tmp_path).column(name, f"label {name}")
        for number in range(3):
            column.add([md5(number)], numbers(1))
        assert column.folder is not None
        if damage:
            (column.folder / cache.LABEL).write_text(damage)
        elif name == "none":
            (column.folder / cache.LABEL).unlink()
        for age, path in enumerate(column.folder.glob("*.safetensors")):
            os.utime(path, (1000 - age, 1000 - age))
    shown = cache.info(tmp_path)
    assert sorted(kept.label for kept in shown) == ["label whole", "unknown", "unknown", "unknown"]
    assert {(kept.files, kept.used) for kept in shown} == {(3, 1000.0)}
    assert cache.info(tmp_path / "absent") == []


def test_a_run_that_needs_room_takes_it_from_what_was_not_used_for_an_hour(tmp_path: Path) -> None:
    for number, age in ((0, 2 * 3600), (1, 3 * 3600), (2, 60)):
        Store(tmp_path).column(f"column {number}", f"label {number}").add([md5(number)], numbers(1, 1000, number))
        (path,) = tmp_path.glob(f"{hashlib.md5(f'column {number}'.encode()).hexdigest()}/*.safetensors")
        os.utime(path, (time.time() - age, time.time() - age))
    size = cache.info(tmp_path)[0].bytes
    store = Store(tmp_path, 3.5 * size, shard_bytes=0)  # its size is measured at each shard
    mine = store.column("column 3", "label 3")
    mine.add([md5(3)], numbers(1, 1000, 3))
    assert {k.label for k in cache.info(tmp_path)} == {"label 0", "label 2", "label 3"}  # the oldest made room, and only that
    for number in range(4, 9):
        mine.add([md5(number)], numbers(1, 1000, number))
    # All that it works on stays, past the bound; so does what another run used a minute ago.
    assert {k.label: k.files for k in cache.info(tmp_path)} == {"label 2": 1, "label 3": 6}


@pytest.mark.parametrize("limit", [1e9, 1.0])
def test_how_large_the_cache_is_is_not_measured_at_each_shard(limit: float, tmp_path: Path) -> None:
    """Not where it is full of what is in use either. Where it is measured, what killed runs left is deleted."""
    column = Store(tmp_path, limit).column("key", "label")
    assert column.folder is not None
    draft, left = column.folder / ".dead.draft", []
    for number in range(5):
        draft.write_bytes(b"half")
        os.utime(draft, (0, 0))
        column.add([md5(number)], numbers(1, 1000, number))
        left.append(draft.exists())
    assert left == [False, True, True, True, True]


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_leaves_no_more_than_the_bound_whether_it_fails_or_not(fails: bool, tmp_path: Path) -> None:
    (tmp_path / layout.PARAMS).write_text("cache: {max_gb: 0.00001}\n")
    with pytest.raises(DataError) if fails else nullcontext(), layout.open_cache(tmp_path) as kept:
        for number in range(4):
            kept.column("key", "label").add([md5(number)], numbers(1, 1000, number))
        if fails:
            raise DataError("something went wrong")
    assert 0 < sum(k.bytes for k in cache.info(tmp_path / layout.CACHE)) <= 10_000


def test_rows_are_mapped_not_read(tmp_path: Path) -> None:
    """Memory must not grow with the data set; pages that the system may drop at any time do not count."""
    import psutil

    column = Column(tmp_path)
    for part in range(8):
        column.add([md5((part, i)) for i in range(1024)], torch.zeros(1024, 4096) + part)
    again = Column(tmp_path)
    rows = again.rows([md5((part, i)) for part in range(8) for i in range(1024)])
    table = FeatureTable([rows])
    process = psutil.Process()
    table.take(slice(0, 256)).sum()  # what the first time alone needs
    before = process.memory_info()
    total = 0.0
    for start in range(0, len(table), 256):
        total += float(table.take(slice(start, start + 256)).sum())
    after = process.memory_info()
    assert total == sum(range(8)) * 1024 * 4096
    own = (after.rss - after.shared) - (before.rss - before.shared)
    assert own < 20 << 20  # of 128 MiB


def test_tables_put_columns_side_by_side_and_views_below() -> None:
    store = Store()
    names = [md5(i) for i in range(6)]
    a, b = store.column("a", ""), store.column("b", "")
    a.add(names[:4], numbers(4, 2, 1))
    a.add(names[4:], numbers(2, 2, 2))
    b.add(names, numbers(6, 3, 3))
    wanted = torch.cat([torch.cat([numbers(4, 2, 1), numbers(2, 2, 2)]), numbers(6, 3, 3)], 1)
    table = FeatureTable([a.rows(names), b.rows(names)])
    assert table.width == 5
    assert torch.equal(table.all(), wanted)
    order = [5, 0, 5, 2]
    picked = FeatureTable([a.rows([names[i] for i in order]), b.rows([names[i] for i in order])])
    assert torch.equal(picked.all(), wanted[order])
    both = table.concat(picked)
    assert len(both) == 10
    assert torch.equal(both.take(slice(4, 8)), torch.cat([wanted[4:], wanted[order[:2]]]))
    assert torch.equal(both.take(np.array([9, 1])), wanted[[2, 1]])
    assert both.take(np.array([], dtype=int)).shape == (0, 5)


def test_one_row_is_the_one_that_taking_it_copies(tmp_path: Path) -> None:
    column = Column(tmp_path / "c")
    names = [f"{i:032x}" for i in range(5)]
    column.add(names[:2], torch.arange(6, dtype=torch.uint8).reshape(2, 3))
    column.add(names[2:], torch.arange(6, 15, dtype=torch.uint8).reshape(3, 3))
    rows = column.rows([names[i] for i in (4, 0, 2)])
    for i in range(3):
        assert torch.equal(rows.one(i), rows.take([i])[0])
