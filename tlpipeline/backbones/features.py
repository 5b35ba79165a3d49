"""From images to numbers: pooled features at the taps of a frozen network, each computed once."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlpipeline.backbones import taps
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.precision import autocast
from tlpipeline.backbones.taps import Backbone, Tap
from tlpipeline.data.cache import SHARD_BYTES, SHARD_ROWS, Column, MappedRows, Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import FORMAT, Images, batch_ranges, normalize
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError, PassTooLarge

NORMAL_SIDE = 224  # pixels
GRIDS = (1, 2, 4)
LEVEL_ROUNDING = 1e-5  # of what a feature is on average: less than that of change is rounding
MAX_WIDTH = 3072
# A network's answer for an image depends in its last digits on how many images are asked about together. Always the same number makes it a
# function of the image alone, so that what was kept and what is computed anew are the same bits. 16 is as fast as any on CPUs.
PASS_SIZE = {"cpu": 16, "cuda": 128}


def pooling_at(tap: Tap) -> TapPooling:
    """Return the pyramid that a head reads at this tap: grids no finer than its maps, at most 3,072 features in all."""
    grids: list[int] = []
    for grid in GRIDS:
        if grid == 1 or (min(tap.height, tap.width) >= grid and tap.channels * (sum(g * g for g in grids) + grid * grid) <= MAX_WIDTH):
            grids.append(grid)
    return TapPooling(tap.name, tap.channels, tuple(grids))


def pool(maps: Tensor, grids: Sequence[int]) -> Tensor:
    """Average maps (batch, channel, height, width) over each grid: (batch, channel * sum of grid^2). Vectors pass unchanged."""
    if maps.dim() == 2:
        return maps
    return torch.cat([functional.adaptive_avg_pool2d(maps, grid).flatten(1) for grid in grids], dim=1)


def pass_size(device: torch.device, side: int) -> int:
    """Return how many images a network is asked about together on this device, whatever their number in all.

    Args:
        side: of an input, pixels. Above 224 a GPU takes fewer as they get larger, so that the maps fit; never by the memory that is free,
            on which what is kept must not depend.
    """
    most = PASS_SIZE.get(device.type, 64)
    if device.type == "cpu" or side <= NORMAL_SIDE:
        return most
    return max(1, 1 << int(math.log2(most * (NORMAL_SIDE / side) ** 2)))


def numerics_key(device: torch.device, side: int, half: bool) -> str:
    """Return what the last digits of a frozen pass depend on, besides network and image: CPUs agree on them here, GPUs of two models do not."""
    if device.type == "cpu":
        return device.type + (" bfloat16" if half else "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {pass_size(device, side)} at a time, {'bfloat16' if half else 'float32'}"


def forward_passes(
    network: Callable[[Tensor], Sequence[Tensor]],
    images: Images,
    indices: Sequence[int],
    device: torch.device,
    size: int | None = None,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Pass images through a network in steps of one size, the last one filled up with zeros: yield (indices, outputs without the filling).

    Args:
        network: in eval mode; maps (step, 3, size, size) to tensors (step, ...).
        size: of a step, where it is not the usual one.

    Raises:
        PassTooLarge: a GPU has no room for a step.
    """
    size = size or pass_size(device, images.transforms.size)
    with torch.inference_mode():
        parts = [[indices[i] for i in part] for part in batch_ranges(len(indices), size)]
        for batch, pixels in images.batches(parts, pinned=device.type == "cuda"):
            try:
                inputs = normalize(pixels.to(device, non_blocking=True), images.transforms)
                if len(batch) < size:
                    inputs = torch.cat([inputs, inputs.new_zeros(size - len(batch), *inputs.shape[1:])]).to(
                        memory_format=torch.channels_last
                    )
                outputs = network(inputs)
            except torch.cuda.OutOfMemoryError as error:
                # Not in smaller steps: a network may answer in other last digits then, and what is kept of it would depend on free memory.
                raise PassTooLarge(
                    f"expected room in the GPU's memory for a forward pass of {size} images of {images.transforms.size} pixels, found none. "
                    "Set data.size lower, or cluster.gpu to false, or end what else is on this GPU."
                ) from error
            yield list(batch), [out[: len(batch)] for out in outputs]


def with_pooling(trunk: nn.Module, grids: Sequence[Sequence[int]], half: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """Return the trunk with its outputs pooled, float32 at least; outputs behind the last entry of grids, such as logits, stay as they are.

    Args:
        half: computed in bfloat16; else as whoever calls it says.
    """

    def read(inputs: Tensor) -> list[Tensor]:
        with autocast(inputs.device, True) if half else nullcontext():
            outputs = [pool(out, grids[i]) if i < len(grids) else out for i, out in enumerate(trunk(inputs))]
        return [out if out.dtype == torch.float64 else out.float() for out in outputs]

    return read


def extract(
    trunk: nn.Module,
    grids: Sequence[Sequence[int]],
    images: Images,
    device: torch.device,
    progress: Callable[[int], None],
    half: bool = False,
) -> list[Tensor]:
    """Pass each image once through a frozen network and return what each output gives, pooled, without keeping anything.

    Args:
        trunk: gives one tensor for each entry of grids (more outputs, such as logits, are returned unpooled behind them).
        grids: pyramid for each tap.
        images: n of them.
        progress: called with the number of images done so far.
        half: in bfloat16.

    Returns:
        One float32 tensor (n, features) an output, on the CPU, in the order of the images.
    """
    trunk.eval()
    network = with_pooling(trunk, grids, half)
    done, parts = 0, []
    for batch, outputs in forward_passes(network, images, range(len(images)), device):
        parts.append([out.cpu() for out in outputs])
        done += len(batch)
        progress(done)
    if not parts:
        # The widths of an empty answer are those of any answer.
        size = images.transforms.size
        with torch.inference_mode():
            parts.append([out[:0].cpu() for out in network(torch.zeros(1, 3, size, size, device=device))])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


class FeatureExtractor:
    """What a frozen network reads in images, each image passed through it once: the rest comes from a store, by content.

    Args:
        backbone: that the trunk was cut from; its tensors say which columns of the store are meant.
        trunk: gives one tensor for each reading, and the source head's logits behind them where `logits` is true.
        half: the network is passed in bfloat16.
        alone: nobody else will read with these weights, so where a GPU is full a pass may take fewer images, whatever that does to last digits.
    """

    def __init__(
        self,
        store: Store,
        backbone: Backbone,
        trunk: nn.Module,
        readings: Sequence["TapPooling"],
        transforms: Transforms,
        device: torch.device,
        *,
        logits: bool = False,
        half: bool = False,
        smaller_passes: bool = False,
    ) -> None:
        self.trunk, self.device, self.smaller_passes = trunk, device, smaller_passes
        self.step = pass_size(device, transforms.size)  # images in a pass
        self.apart = device.type != "cpu"  # on a CPU a second shard in memory would win nothing
        self.network = with_pooling(trunk, [r.grids for r in readings], half)
        known = taps.tap_fingerprints(backbone, [r.tap for r in readings], logits=logits)
        outputs = [(known[r.tap], r.tap, str(r.grids)) for r in readings]
        outputs += [(known[taps.LOGITS], "logits", "")] if logits else []
        self.widths, self.taps = [sum(r.blocks) for r in readings], [r.tap for r in readings]
        self._columns = [
            (
                store,
                "|".join((*out, f"{transforms}|{numerics_key(device, transforms.size, half)}|{FORMAT}")),
                f"{backbone.name} {out[1]} at {transforms.size} pixels",
            )
            for out in outputs
        ]
        self.columns: list[Column] = [store.column(key, label) for store, key, label in self._columns]

    def for_view(self, view: str) -> "FeatureExtractor":
        """Return the same for random views of the images, which the `augment` of the images makes; `view` tells which from every other."""
        other = copy.copy(self)
        other.columns = [store.column(f"{key}|{view}", f"{label}, {view}") for store, key, label in self._columns]
        return other

    def missing(self, rows: Sequence[Row]) -> npt.NDArray[np.bool_]:
        """Say of each image whether it must be passed through the network."""
        md5s = [row.md5 for row in rows]
        return np.asarray(~np.logical_and.reduce([column.has(md5s) for column in self.columns]))

    def compute(self, images: Images, indices: Sequence[int], progress: Callable[[int], None]) -> None:
        """Pass these images through the network and keep what it gives, a shard at a time: what is done is safe.

        Raises:
            PassTooLarge: a GPU has no room for a step; of a reader that is alone for a single image.
        """
        self.trunk.eval()
        while True:
            try:
                self._compute(images, indices, progress)
                return
            except PassTooLarge:
                if not self.smaller_passes or self.step == 1:
                    raise
                self.step //= 2
                missing = self.missing(images.rows)
                indices = [i for i in indices if missing[i]]

    def _compute(self, images: Images, indices: Sequence[int], progress: Callable[[int], None]) -> None:
        kept: list[list[Tensor]] = []
        names: list[str] = []
        done = 0
        with _Writer(self._keep, apart=self.apart) as write:
            for batch, outputs in _behind(forward_passes(self.network, images, indices, self.device, self.step)):
                kept.append([out.cpu() for out in outputs])
                self._numbers(kept[-1], [images.rows[i] for i in batch])
                names += [images.rows[i].md5 for i in batch]
                done += len(batch)
                widest = max(out.shape[1] for out in kept[-1]) * 4
                if len(names) + self.step > min(SHARD_ROWS, max(SHARD_BYTES // widest, self.step)):
                    write(names, kept)
                    names, kept = [], []
                progress(done)
            write(names, kept)

    def _numbers(self, outputs: Sequence[Tensor], rows: Sequence[Row]) -> None:
        """Check that what was read are numbers, before it is kept.

        Raises:
            BackboneError: they are not.
        """
        for tap, out in zip(self.taps, outputs, strict=False):
            if not bool(out.isfinite().all()):
                path = next(row.path for row, good in zip(rows, out.isfinite().all(1).tolist(), strict=True) if not good)
                raise BackboneError(
                    f"expected numbers at tap {tap}, found infinities or NaN in {path}. Are the network's weights damaged, or was it "
                    "trained with other pixel statistics? See backbone.weights, and the mean and std of your own network."
                )

    def _keep(self, names: Sequence[str], kept: Sequence[Sequence[Tensor]]) -> None:
        if names:
            for column, parts in zip(self.columns, zip(*kept, strict=True), strict=True):
                column.add(names, torch.cat(parts))

    def extract(self, images: Images, progress: Callable[[int], None]) -> list[MappedRows]:
        """Return the features of all images at each output, mapped; those that are not kept yet are computed."""
        self.compute(images, [int(i) for i in np.flatnonzero(self.missing(images.rows))], progress)
        return self.rows(images.rows)

    def rows(self, rows: Sequence[Row]) -> list[MappedRows]:
        """Return the features of these images, all of which must be kept."""
        md5s = [row.md5 for row in rows]
        return [column.rows(md5s) for column in self.columns]


class _Writer:
    """Writes shards: at once, or apart in a thread, one while the next is filled, so that a GPU need not wait for the disk."""

    def __init__(self, keep: Callable[[Sequence[str], Sequence[Sequence[Tensor]]], None], apart: bool) -> None:
        self.keep, self.pool = keep, ThreadPoolExecutor(1) if apart else None
        self.written: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __call__(self, names: Sequence[str], kept: Sequence[Sequence[Tensor]]) -> None:
        """Write a shard; the last one is safe, or its error is raised, when this returns."""
        if self.pool is None:
            self.keep(names, kept)
            return
        self._wait()
        self.written = self.pool.submit(self.keep, names, kept)

    def _wait(self) -> None:
        if self.written is not None:
            self.written.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            if kind is None:
                self._wait()


def _behind(steps: Iterator[tuple[list[int], list[Tensor]]]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield each step once the next one has been given to the device: a GPU computes it while this one's outputs are copied."""
    last: list[tuple[list[int], list[Tensor]]] = []
    for this in steps:
        yield from last
        last = [this]
    yield from last


# --- scaling --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """Standardization of features, so that each pooled block counts alike: `(x - mean) * scale`.

    `scale` is 1 / (standard deviation * sqrt(features of the block)): every block has a total variance of one, and probe and head see the
    same thing. Deviations below a hundredth of their block's are raised to it, so that nearly dead channels do not explode.
    """

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Scale (n, d) features."""
        return (features.double() - self.mean) * self.scale


def scaling(features: Tensor, blocks: Sequence[int]) -> Scaling:
    """Measure mean and scale on features (n, d) whose d columns are these consecutive blocks."""
    x = features.double()
    mean = x.mean(0)
    deviation = (x - mean).square_().mean(0).sqrt()  # torch's own std takes ten times as long along the rows
    parts = []
    for block, level in zip(torch.split(deviation, list(blocks)), torch.split(mean, list(blocks)), strict=True):
        # Features that never change are rounding and nothing else: their deviation is measured against what they are.
        floor = max(float(block.square().mean().sqrt()) * 0.01, float(level.square().mean().sqrt()) * LEVEL_ROUNDING, 1e-12)
        parts.append(1 / (block.clamp(min=floor) * len(block) ** 0.5))
    return Scaling(mean, torch.cat(parts))
