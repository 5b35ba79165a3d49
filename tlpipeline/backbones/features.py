"""Features: pooled outputs at the taps of a frozen network, computed once per image."""

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
from tlpipeline.data.cache import Column, MappedRows, Store
from tlpipeline.data.contents import ImageFolder
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import FORMAT, Images, batch_ranges, normalize
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError, PassTooLarge

NORMAL_SIDE = 224  # pixels
GRIDS = (1, 2, 4)
LEVEL_ROUNDING = 1e-5  # relative to a feature's mean: smaller deviations are rounding errors
MAX_WIDTH = 3072
# The last digits of a network's output depend on the number of images per pass. A constant number makes the output a function of the
# image alone, so that cached and newly computed features are identical. On CPUs 16 is as fast as any other number.
PASS_SIZE = {"cpu": 16, "cuda": 128}


def pooling_at(tap: Tap) -> TapPooling:
    """Return the pyramid that a head reads at this tap: no grid finer than the tap's maps, at most 3,072 features in total."""
    grids: list[int] = []
    for grid in GRIDS:
        if grid == 1 or (min(tap.height, tap.width) >= grid and tap.channels * (sum(g * g for g in grids) + grid * grid) <= MAX_WIDTH):
            grids.append(grid)
    return TapPooling(tap.name, tap.channels, tuple(grids))


def pool(maps: Tensor, grids: Sequence[int]) -> Tensor:
    """Average maps (batch, channel, height, width) over each grid: (batch, channel * sum of grid^2). Vectors are returned unchanged."""
    if maps.dim() == 2:
        return maps
    return torch.cat([functional.adaptive_avg_pool2d(maps, grid).flatten(1) for grid in grids], dim=1)


def pass_size(device: torch.device, side: int) -> int:
    """Return the number of images per forward pass on this device.

    Args:
        side: of an input in pixels. Above 224, a GPU takes fewer images, so that the maps fit. The free memory does not matter, because
            cached features must not depend on it.
    """
    most = PASS_SIZE.get(device.type, 64)
    if device.type == "cpu" or side <= NORMAL_SIDE:
        return most
    return max(1, 1 << int(math.log2(most * (NORMAL_SIDE / side) ** 2)))


def numerics_key(device: torch.device, side: int, half: bool) -> str:
    """Return a key of what changes the last digits of a frozen pass: CPUs agree on them, GPU models do not."""
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
    """Pass images through a network in steps of equal size, the last one padded with zeros.

    Yields:
        (indices, outputs without the padding).

    Args:
        network: in eval mode; maps (step, 3, size, size) to tensors (step, ...).
        size: images per step; None is `pass_size`.

    Raises:
        PassTooLarge: a step does not fit into a GPU's memory.
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
                # Smaller steps may change the last digits, and cached features would depend on the free memory.
                raise PassTooLarge(
                    f"A forward pass of {size} images of {images.transforms.size} pixels does not fit into the GPU's memory. "
                    "Set data.size lower, set cluster.gpu to false, or end other programs on this GPU."
                ) from error
            yield list(batch), [out[: len(batch)] for out in outputs]


def with_pooling(trunk: nn.Module, grids: Sequence[Sequence[int]], half: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """Return a function that calls the trunk and pools its outputs, in float32 at least. Outputs after the last grid are not pooled.

    Args:
        half: compute in bfloat16; else in the caller's precision.
    """

    def pooled_outputs(inputs: Tensor) -> list[Tensor]:
        with autocast(inputs.device, True) if half else nullcontext():
            outputs = [pool(out, grids[i]) if i < len(grids) else out for i, out in enumerate(trunk(inputs))]
        return [out if out.dtype == torch.float64 else out.float() for out in outputs]

    return pooled_outputs


def extract(
    trunk: nn.Module,
    grids: Sequence[Sequence[int]],
    images: Images,
    device: torch.device,
    progress: Callable[[int], None],
    half: bool = False,
) -> list[Tensor]:
    """Pass each image once through a frozen network and return its pooled outputs, without caching.

    Args:
        trunk: returns one tensor per entry of grids; further outputs, such as logits, are not pooled.
        grids: pyramid of each tap.
        images: n images.
        progress: called with the number of images done so far.
        half: compute in bfloat16.

    Returns:
        One float32 tensor (n, features) per output, on the CPU, in the order of the images.
    """
    trunk.eval()
    network = with_pooling(trunk, grids, half)
    done, parts = 0, []
    for batch, outputs in forward_passes(network, images, range(len(images)), device):
        parts.append([out.cpu() for out in outputs])
        done += len(batch)
        progress(done)
    if not parts:
        # An empty answer needs the widths of any other.
        size = images.transforms.size
        with torch.inference_mode():
            parts.append([out[:0].cpu() for out in network(torch.zeros(1, 3, size, size, device=device))])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


class FeatureExtractor:
    """Features of a frozen network: each image is passed through it once, then its features come from the cache.

    Args:
        store: the cache.
        backbone: the uncut network; its tensors identify the columns of the cache.
        trunk: returns one tensor per reading, followed by the source head's logits if `logits` is true.
        readings: what is pooled at which tap.
        half: compute in bfloat16.
        smaller_passes: where a GPU is full, pass fewer images at once. This may change the last digits, so it is only for weights that
            no other model shares.
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
        self.store, self.trunk, self.device, self.smaller_passes = store, trunk, device, smaller_passes
        self.step = pass_size(device, transforms.size)  # images in a pass
        self.separate_writer = device.type != "cpu"  # on a CPU, writing in a second thread gains nothing
        self.network = with_pooling(trunk, [r.grids for r in readings], half)
        self.widths, self.taps = [sum(r.blocks) for r in readings], [r.tap for r in readings]
        self.columns: list[Column] = [
            store.column(key, label) for key, label in _column_keys(backbone, readings, transforms, device, half, logits).items()
        ]

    def missing(self, rows: Sequence[Row]) -> npt.NDArray[np.bool_]:
        """Return for each image whether its features are not cached yet (n,)."""
        md5s = [row.md5 for row in rows]
        return np.asarray(~np.logical_and.reduce([column.has(md5s) for column in self.columns]))

    def compute(self, images: Images, indices: Sequence[int], progress: Callable[[int], None]) -> None:
        """Compute and cache the features of these images, a shard at a time; finished shards survive a crash.

        Raises:
            PassTooLarge: a step does not fit into a GPU's memory; with `smaller_passes`, not even a single image does.
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
        shard: list[list[Tensor]] = []
        names: list[str] = []
        done = 0
        with _ShardWriter(self._store_shard, separate=self.separate_writer) as write:
            for batch, outputs in _one_step_behind(forward_passes(self.network, images, indices, self.device, self.step)):
                shard.append([out.cpu() for out in outputs])
                self._require_finite(shard[-1], [images.rows[i] for i in batch])
                names += [images.rows[i].md5 for i in batch]
                done += len(batch)
                widest = max(out.shape[1] for out in shard[-1]) * 4
                if len(names) + self.step > self.store.rows_in_shard(widest):
                    write(names, shard)
                    names, shard = [], []
                progress(done)
            write(names, shard)

    def _require_finite(self, outputs: Sequence[Tensor], rows: Sequence[Row]) -> None:
        """Check that features are finite before they are cached.

        Raises:
            BackboneError: they are not.
        """
        for tap, out in zip(self.taps, outputs, strict=False):
            if not bool(out.isfinite().all()):
                path = next(row.path for row, finite in zip(rows, out.isfinite().all(1).tolist(), strict=True) if not finite)
                raise BackboneError(
                    f"expected numbers at tap {tap}, found infinities or NaN in {path}. Are the network's weights damaged, or was it "
                    "trained with other pixel statistics? Check backbone.weights, and the mean and std of your own network."
                )

    def _store_shard(self, names: Sequence[str], outputs: Sequence[Sequence[Tensor]]) -> None:
        if names:
            for column, parts in zip(self.columns, zip(*outputs, strict=True), strict=True):
                column.add(names, torch.cat(parts))

    def extract(self, images: Images, progress: Callable[[int], None]) -> list[MappedRows]:
        """Return the features of all images at each output, mapped; missing ones are computed first."""
        self.compute(images, [int(i) for i in np.flatnonzero(self.missing(images.rows))], progress)
        return self.rows(images.rows)

    def rows(self, rows: Sequence[Row]) -> list[MappedRows]:
        """Return the features of these images, all of which must be cached."""
        md5s = [row.md5 for row in rows]
        return [column.rows(md5s) for column in self.columns]


def _column_keys(
    backbone: Backbone, readings: Sequence[TapPooling], transforms: Transforms, device: torch.device, half: bool, logits: bool
) -> dict[str, str]:
    """Return the key of each output's column in the cache, with a label for people."""
    fingerprints = taps.tap_fingerprints(backbone, [r.tap for r in readings], logits=logits)
    outputs = [(fingerprints[r.tap], r.tap, str(r.grids)) for r in readings]
    outputs += [(fingerprints[taps.LOGITS], "logits", "")] if logits else []
    return {
        "|".join((*out, f"{transforms}|{numerics_key(device, transforms.size, half)}|{FORMAT}")): (
            f"{backbone.name} {out[1]} at {transforms.size} pixels"
        )
        for out in outputs
    }


def cached_columns(
    backbone: Backbone, readings: Sequence[TapPooling], size: int, store: Store, device: torch.device, half: bool
) -> dict[str, Column]:
    """Return the features that the cache has, by tap; taps without any are left out. Nothing is computed or written.

    Args:
        readings: what is pooled at which tap.
        size: input side, pixels; half: computed in bfloat16.
    """
    keys = _column_keys(backbone, readings, backbone.transforms.at(size), device, half, logits=False)
    return {r.tap: store.column(key, label) for r, (key, label) in zip(readings, keys.items(), strict=True) if store.holds(key)}


def at_tap(
    backbone: Backbone,
    reading: TapPooling,
    size: int,
    root: ImageFolder,
    rows: Sequence[Row],
    store: Store,
    device: torch.device,
    half: bool,
    progress: Callable[[int], None],
) -> Tensor:
    """Return the features of images at one tap: (n, features), as the profile computes and caches them.

    Args:
        size: input side, pixels; half: compute in bfloat16.
        root: folder that the rows' paths start from.
        progress: called with the number of new images that are done.
    """
    transforms = backbone.transforms.at(size)
    trunk = taps.cut(backbone, [reading.tap]).to(device).to(memory_format=torch.channels_last)
    extractor = FeatureExtractor(store, backbone, trunk, [reading], transforms, device, half=half)
    return extractor.extract(Images(root, rows, transforms), progress)[0].all()


class _ShardWriter:
    """Writes shards, on request in a separate thread while the next one is filled, so that a GPU need not wait for the disk."""

    def __init__(self, keep: Callable[[Sequence[str], Sequence[Sequence[Tensor]]], None], separate: bool) -> None:
        self.keep, self.pool = keep, ThreadPoolExecutor(1) if separate else None
        self.written: Future[None] | None = None

    def __enter__(self) -> "_ShardWriter":
        return self

    def __call__(self, names: Sequence[str], outputs: Sequence[Sequence[Tensor]]) -> None:
        """Write a shard. When this returns, the previous one is on the disk, or its error is raised."""
        if self.pool is None:
            self.keep(names, outputs)
            return
        self._wait()
        self.written = self.pool.submit(self.keep, names, outputs)

    def _wait(self) -> None:
        if self.written is not None:
            self.written.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            if kind is None:
                self._wait()


def _one_step_behind(steps: Iterator[tuple[list[int], list[Tensor]]]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield each step after the next one has started: a GPU computes it while this one's outputs are copied."""
    previous: list[tuple[list[int], list[Tensor]]] = []
    for current in steps:
        yield from previous
        previous = [current]
    yield from previous


# --- scaling --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """Standardization of features that gives each pooled block the same weight: `(x - mean) * scale`.

    `scale` is 1 / (standard deviation * sqrt(features of the block)), so every block has a total variance of one.
    Deviations below a hundredth of their block's are raised to it, so that nearly dead channels do not explode.
    """

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Standardize features (n, d)."""
        return (features.double() - self.mean) * self.scale


def scaling(features: Tensor, blocks: Sequence[int]) -> Scaling:
    """Measure mean and scale of features (n, d), whose d columns are these consecutive blocks."""
    x = features.double()
    mean = x.mean(0)
    deviation = (x - mean).square_().mean(0).sqrt()  # torch's std takes ten times as long along this dimension
    parts = []
    for block, level in zip(torch.split(deviation, list(blocks)), torch.split(mean, list(blocks)), strict=True):
        # A constant feature has only rounding errors: its deviation is compared with its mean.
        floor = max(float(block.square().mean().sqrt()) * 0.01, float(level.square().mean().sqrt()) * LEVEL_ROUNDING, 1e-12)
        parts.append(1 / (block.clamp(min=floor) * len(block) ** 0.5))
    return Scaling(mean, torch.cat(parts))
