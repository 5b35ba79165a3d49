"""The input pipeline: image files as inputs the way the weights want them, decoded by threads ahead of the network, each once where there is room."""

import functools
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from tlpipeline.data import dataset, decoding
from tlpipeline.data.cache import SHARD_BYTES, SHARD_ROWS, Column, MappedRows, Store
from tlpipeline.data.dataset import Row
from tlpipeline.data.decoding import Pixels
from tlpipeline.data.transforms import Transforms

# Part of every key: other code makes other rows of an image, and another decoder other pixels.
FORMAT = f"3, Pillow {PIL.__version__}"
ELONGATED = 128  # long sides a short one, above which an image loses its ends before it is resized
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Augment = Callable[[Image.Image, Row, int, int], Image.Image]


def resize_and_crop(image: Image.Image, transforms: Transforms) -> Pixels:
    """Resize the short side, crop the center: 8-bit RGB (size, size, 3). The same for profile, training, evaluation and prediction."""
    short = min(image.size)
    if max(image.size) > ELONGATED * short:
        # Only its middle is looked at; as wide as it is, a line of pixels would be enlarged to gigabytes.
        width, height = (min(side, ELONGATED * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    width, height = (int(transforms.resize * side / short) if side != short else transforms.resize for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), _RESAMPLING[transforms.interpolation])
    left, top = round((width - transforms.size) / 2), round((height - transforms.size) / 2)
    return np.asarray(image.crop((left, top, left + transforms.size, top + transforms.size)), dtype=np.uint8)


def normalize(pixels: Tensor, transforms: Transforms) -> Tensor:
    """Turn 8-bit (batch, size, size, 3) into normalized floats (batch, 3, size, size) on the same device, channels last in memory.

    Convolutions read that order about twice as fast.
    """
    mean, std = _constants(tuple(transforms.mean), tuple(transforms.std), pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation on the device: made at every step they would be waited for at every step."""
    with torch.inference_mode(False):
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


class Images:
    """The images of some manifest rows as inputs, decoded by threads a few batches ahead.

    Args:
        root: folder that the rows' paths start from.
        augment: makes a random square view of an image; it is given the image (maybe squeezed), its row, the side of the square, and the turn: an
            image that comes back is asked for by its index plus `turn` times the number of images.
        decoded: gives the images decoded: squeezed ones for `augment`, else prepared ones; None decodes the files each time.
    """

    def __init__(
        self, root: Path, rows: Sequence[Row], transforms: Transforms, augment: Augment | None = None, decoded: "DecodedCache | None" = None
    ) -> None:
        self.root, self.rows, self.transforms, self.augment, self.decoded = root, rows, transforms, augment, decoded
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.rows)

    def _input(self, index: int) -> Pixels:
        turn, index = divmod(index, len(self.rows))
        row = self.rows[index]
        pixels = None if self.decoded is None else self.decoded.pixels(row)
        if self.augment is None:
            # Twice the side, so that what is thrown away while decoding cannot be told from a full decoding.
            return (
                resize_and_crop(dataset.read_image(self.root, row, 2 * self.transforms.resize), self.transforms)
                if pixels is None
                else pixels
            )
        image = dataset.read_image(self.root, row, 4 * self.transforms.resize) if pixels is None else Image.fromarray(pixels)
        return resize_and_crop(self.augment(image, row, self.transforms.resize, turn), self.transforms)

    def batches(self, batches: Sequence[Sequence[int]], ahead: int = 3, pinned: bool = False) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield (indices, 8-bit tensor (batch, size, size, 3)) for each batch of indices, in order; `waited` counts the seconds idle.

        Args:
            pinned: in memory from which a GPU copies while it computes.
        """
        with ThreadPoolExecutor(1) as packer, ThreadPoolExecutor(_threads()) as pool:

            def together(futures: list[Future[Pixels]]) -> Tensor:
                pixels = torch.from_numpy(np.stack([f.result() for f in futures]))
                return pixels.pin_memory() if pinned else pixels

            def submitted(batch: Sequence[int]) -> tuple[Sequence[int], Future[Tensor]]:
                return batch, packer.submit(together, [pool.submit(self._input, i) for i in batch])

            rest = iter(batches)
            waiting = deque(submitted(batch) for batch in itertools.islice(rest, ahead))
            try:
                while waiting:
                    batch, packed = waiting.popleft()
                    started = time.monotonic()
                    pixels = packed.result()
                    self.waited += time.monotonic() - started
                    waiting.extend(submitted(following) for following in itertools.islice(rest, 1))
                    yield batch, pixels
            finally:
                packer.shutdown(wait=False, cancel_futures=True)
                pool.shutdown(cancel_futures=True)


class DecodedCache:
    """Decoded images for training, which comes back to them every epoch: 8-bit RGB, all of one size.

    What was kept in a store, by content, and what is made on the spot are the same bits: how much room there is changes no result.

    Args:
        make: turns an image file into what is kept, (side, side, 3).
        key: tells what `make` does from everything else; label: says it to people.
    """

    def __init__(self, store: Store, side: int, make: Callable[[Row], Pixels], key: str, label: str) -> None:
        self.side, self.make = side, make
        self._store, self._key, self._label = store, f"{key}|{FORMAT}", label
        self._place: dict[str, int] = {}
        self._rows: MappedRows | None = None

    @property
    def column(self) -> Column:
        """Where the images are kept; made when it is first asked for."""
        return self._store.column(self._key, self._label)

    def fill(self, rows: Sequence[Row], progress: Callable[[int], None]) -> None:
        """Decode the images that are not kept yet, a shard at a time."""
        self.column.refresh()
        wanted = [row for row, there in zip(rows, self.column.has([r.md5 for r in rows]), strict=True) if not there]
        done = 0
        with ThreadPoolExecutor(_threads()) as pool:
            for part in batch_ranges(len(wanted), min(SHARD_ROWS, max(1, SHARD_BYTES // (3 * self.side**2)))):
                made = list(pool.map(self.make, [wanted[i] for i in part]))
                self.column.add([wanted[i].md5 for i in part], torch.from_numpy(np.stack(made)))
                done += len(part)
                progress(done)

    def open(self, rows: Sequence[Row]) -> None:
        """Map the images of these rows, all of which must be kept."""
        self._place = {row.md5: i for i, row in enumerate(rows)}
        self._rows = self.column.rows([row.md5 for row in rows])

    def pixels(self, row: Row) -> Pixels:
        """Return an image: what was opened, or made anew."""
        if self._rows is None or row.md5 not in self._place:
            return self.make(row)
        return np.asarray(self._rows.one(self._place[row.md5]).numpy())


def square_cache(store: Store, root: Path, side: int) -> DecodedCache:
    """Return whole images squeezed into squares.

    That loses nothing: a random crop is stretched to the network's square input anyway, and its shape is drawn by the image's own proportions.
    """

    def make(row: Row) -> Pixels:
        image = dataset.read_image(root, row, 2 * side)
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8)

    return DecodedCache(store, side, make, f"squeezed|{side}", f"decoded images at {side} pixels")


def resized_cache(store: Store, root: Path, transforms: Transforms) -> DecodedCache:
    """Return images as `prepare` makes them."""

    def make(row: Row) -> Pixels:
        return resize_and_crop(dataset.read_image(root, row, 2 * transforms.resize), transforms)

    key = f"prepared|{transforms.resize}|{transforms.size}|{transforms.interpolation}"
    return DecodedCache(store, transforms.size, make, key, f"prepared images at {transforms.size} pixels")


def _threads() -> int:
    """Return how many threads decode: a worker's share of the CPUs of its machine, at least two, because one of them may wait for the disk."""
    return max(2, decoding.available_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def batch_ranges(count: int, size: int) -> list[range]:
    """Cut 0..count-1 into consecutive batches."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def rank_slice(count: int, rank: int, size: int) -> range:
    """Return the indices of one worker's share: every size-th from rank on; together each index exactly once."""
    return range(rank, count, size)
