"""The input pipeline: threads decode image files into network inputs ahead of their use, each file once where the cache has room."""

import functools
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from tlpipeline.data import dataset, decoding
from tlpipeline.data.cache import Column, MappedRows, Store
from tlpipeline.data.contents import ImageFolder
from tlpipeline.data.dataset import Row
from tlpipeline.data.decoding import Pixels
from tlpipeline.data.transforms import INTERPOLATIONS, Transforms

# Part of every cache key: other code or another decoder gives other pixels.
FORMAT = f"4, Pillow {PIL.__version__}"
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}

Augment = Callable[[Image.Image, Row, int, int], Image.Image]


def resize_and_crop(image: Image.Image, transforms: Transforms) -> Pixels:
    """Resize the short side and crop the center: 8-bit RGB (size, size, 3). Profile, training, evaluation and prediction all use it."""
    image = decoding.middle(image)
    short = min(image.size)
    width, height = (int(transforms.resize * side / short) if side != short else transforms.resize for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), _RESAMPLING[transforms.interpolation])
    left, top = round((width - transforms.size) / 2), round((height - transforms.size) / 2)
    return np.asarray(image.crop((left, top, left + transforms.size, top + transforms.size)), dtype=np.uint8)


def normalize(pixels: Tensor, transforms: Transforms) -> Tensor:
    """Turn 8-bit (batch, size, size, 3) into normalized floats (batch, 3, size, size) on the same device, channels last in memory.

    Convolutions read this memory order about twice as fast.
    """
    mean, std = _constants(tuple(transforms.mean), tuple(transforms.std), pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation on the device; creating them at every step would block the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


class PixelSource(Protocol):
    """Gives images decoded: squeezed ones for `augment`, else prepared ones."""

    def pixels(self, row: Row) -> Pixels:
        """Return the image of a row, (side, side, 3)."""


class Images:
    """Images of manifest rows as network inputs, decoded by threads a few batches ahead.

    Args:
        root: folder that the rows' paths start from.
        augment: makes a random square view from the image (possibly squeezed), its row, the side in pixels, and the turn. The n-th
            repetition of an image in an epoch has the index plus n times the number of images.
        decoded: source of decoded images: squeezed squares for `augment`, else resized and cropped; None decodes the files each time.
        clock: seconds, for `waited`.
    """

    def __init__(
        self,
        root: ImageFolder,
        rows: Sequence[Row],
        transforms: Transforms,
        augment: Augment | None = None,
        decoded: PixelSource | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root, self.rows, self.transforms, self.augment, self.decoded = root, rows, transforms, augment, decoded
        self.waited, self._clock = 0.0, clock

    def __len__(self) -> int:
        return len(self.rows)

    def _input(self, index: int) -> Pixels:
        turn, index = divmod(index, len(self.rows))
        row = self.rows[index]
        pixels = None if self.decoded is None else self.decoded.pixels(row)
        if self.augment is None:
            # Decoding at twice the side gives the same pixels as decoding at full size.
            return (
                resize_and_crop(dataset.read_image(self.root, row, 2 * self.transforms.resize), self.transforms)
                if pixels is None
                else pixels
            )
        image = dataset.read_image(self.root, row, 4 * self.transforms.resize) if pixels is None else Image.fromarray(pixels)
        return resize_and_crop(self.augment(image, row, self.transforms.resize, turn), self.transforms)

    def batches(self, batches: Sequence[Sequence[int]], ahead: int = 3, pinned: bool = False) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield (indices, 8-bit tensor (batch, size, size, 3)) for each batch of indices, in order.

        `waited` counts the seconds spent waiting for images.

        Args:
            ahead: number of batches decoded in advance.
            pinned: return page-locked memory, from which a GPU copies while it computes.
        """
        with ThreadPoolExecutor(1) as packer, ThreadPoolExecutor(decoding_threads()) as pool:

            def stacked(futures: list[Future[Pixels]]) -> Tensor:
                pixels = torch.from_numpy(np.stack([f.result() for f in futures]))
                return pixels.pin_memory() if pinned else pixels

            def submitted(batch: Sequence[int]) -> tuple[Sequence[int], Future[Tensor]]:
                return batch, packer.submit(stacked, [pool.submit(self._input, i) for i in batch])

            remaining = iter(batches)
            waiting = deque(submitted(batch) for batch in itertools.islice(remaining, ahead))
            try:
                while waiting:
                    batch, packed = waiting.popleft()
                    started = self._clock()
                    pixels = packed.result()
                    self.waited += self._clock() - started
                    waiting.extend(submitted(following) for following in itertools.islice(remaining, 1))
                    yield batch, pixels
            finally:
                packer.shutdown(wait=False, cancel_futures=True)
                pool.shutdown(cancel_futures=True)


class DecodedCache:
    """Decoded images for training, which needs them in every epoch: 8-bit RGB, all of one size.

    Cached and newly decoded images are identical, so the room in the cache changes no result.

    Args:
        make: decodes an image file to (side, side, 3).
        key: identifies what `make` does; label: describes it to people.
    """

    def __init__(self, store: Store, side: int, make: Callable[[Row], Pixels], key: str, label: str) -> None:
        self.side, self.make = side, make
        self._store, self._key, self._label = store, f"{key}|{FORMAT}", label
        self._place: dict[str, int] = {}
        self._rows: MappedRows | None = None

    @property
    def column(self) -> Column:
        """The column of the images, created on first use."""
        return self._store.column(self._key, self._label)

    def fill(self, rows: Sequence[Row], progress: Callable[[int], None]) -> None:
        """Decode the images that are not cached yet, a shard at a time."""
        self.column.refresh()
        wanted = [row for row, cached in zip(rows, self.column.has([r.md5 for r in rows]), strict=True) if not cached]
        done = 0
        with ThreadPoolExecutor(decoding_threads()) as pool:
            for part in batch_ranges(len(wanted), self._store.rows_in_shard(3 * self.side**2)):
                made = list(pool.map(self.make, [wanted[i] for i in part]))
                self.column.add([wanted[i].md5 for i in part], torch.from_numpy(np.stack(made)))
                done += len(part)
                progress(done)

    def open(self, rows: Sequence[Row]) -> None:
        """Map the images of these rows, all of which must be cached."""
        self._place = {row.md5: i for i, row in enumerate(rows)}
        self._rows = self.column.rows([row.md5 for row in rows])

    def pixels(self, row: Row) -> Pixels:
        """Return an image: mapped if it was opened, else decoded now."""
        if self._rows is None or row.md5 not in self._place:
            return self.make(row)
        return np.asarray(self._rows.one(self._place[row.md5]).numpy())


def square_cache(store: Store, root: ImageFolder, side: int) -> DecodedCache:
    """Return a cache of whole images squeezed into squares.

    Nothing is lost: random crops are stretched to a square anyway, and their shape follows the original proportions.
    """

    def make(row: Row) -> Pixels:
        image = dataset.read_image(root, row, 2 * side)
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8)

    return DecodedCache(store, side, make, f"squeezed|{side}", f"decoded images at {side} pixels")


def resized_cache(store: Store, root: ImageFolder, transforms: Transforms) -> DecodedCache:
    """Return a cache of images as `resize_and_crop` makes them."""

    def make(row: Row) -> Pixels:
        return resize_and_crop(dataset.read_image(root, row, 2 * transforms.resize), transforms)

    key = f"prepared|{transforms.resize}|{transforms.size}|{transforms.interpolation}"
    return DecodedCache(store, transforms.size, make, key, f"prepared images at {transforms.size} pixels")


def decoding_threads() -> int:
    """Return the number of decoding threads: this worker's share of the CPUs, at least two, since one may wait for the disk."""
    return max(2, decoding.available_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def batch_ranges(count: int, size: int) -> list[range]:
    """Split 0..count-1 into consecutive ranges of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def rank_slice(count: int, rank: int, size: int) -> range:
    """Return the indices of one worker: every size-th from `rank` on. All workers together have each index once."""
    return range(rank, count, size)
