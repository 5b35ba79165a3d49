"""The workers of a run: what they exchange, and where their checkpoints go. Knows neither Ray nor Prefect."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tlpipeline.data.loader import rank_slice
from tlpipeline.files import atomic_write

_KEPT = ("kept", "old", "older")  # checkpoints, the newest first; the last one only while a new one takes its place


class DistributedContext(Protocol):
    """The workers of a run, and where checkpoints go. All workers must call `report` and `restore`.

    Attributes:
        syncs_batch_norm: whether SyncBatchNorm works on the device; PyTorch has it for GPUs only.
    """

    rank: int
    size: int
    device: torch.device
    syncs_batch_norm: bool

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Keep this checkpoint folder (given by the first worker only); returns when it is safe."""

    def restore(self) -> AbstractContextManager[Sequence[Path]]:
        """Return a context manager that gives the folders of the kept checkpoints, the newest first."""


class LocalContext:
    """Plain torch: one process, or the members of an initialized process group that share a folder.

    Args:
        folder: where the two newest checkpoints are kept; each is put there as a whole.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if grouped else 0
        self.size = torch.distributed.get_world_size() if grouped else 1
        self.device = device or torch.device("cpu")
        self.syncs_batch_norm = self.device.type == "cuda"
        self.folder = folder

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Keep a checkpoint, and the one before it."""
        if folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            new, kept, old, older = (self.folder / name for name in ("new", *_KEPT))
            for left in (new, older):
                shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(folder, new, copy_function=_copied)
            # Whenever it is killed, what was there is still there, or there is a newer one that is complete.
            for place, next_place in ((old, older), (kept, old)):
                if kept.exists() and place.exists():
                    place.rename(next_place)
            new.rename(kept)
            shutil.rmtree(older, ignore_errors=True)
        if self.size > 1:
            torch.distributed.barrier()

    @contextmanager
    def restore(self) -> Iterator[Sequence[Path]]:
        """Give the kept checkpoints."""
        yield [path for name in _KEPT if (path := self.folder / name).is_dir()]
        # No worker continues before all have looked: else one could take a first new checkpoint for one to resume from.
        if self.size > 1:
            torch.distributed.barrier()


def _copied(source: str, target: str) -> None:
    """Copy a file, safely on the disk when this returns."""
    with atomic_write(Path(target)) as draft:
        shutil.copyfile(source, draft)


def all_gather(part: Tensor, total: int, context: DistributedContext) -> Tensor:
    """Put together what each worker computed for its `rank_slice`: (total, ...), on every worker, each row exactly once."""
    if context.size == 1:
        return part
    longest = math.ceil(total / context.size)
    padded = torch.zeros(longest, *part.shape[1:], dtype=part.dtype, device=context.device)
    padded[: len(part)] = part.to(context.device)
    parts = [torch.zeros_like(padded) for _ in range(context.size)]
    torch.distributed.all_gather(parts, padded)
    whole = torch.zeros(total, *part.shape[1:], dtype=part.dtype)
    for rank, got in enumerate(parts):
        indices = rank_slice(total, rank, context.size)
        whole[list(indices)] = got[: len(indices)].cpu()
    return whole


def all_reduce(values: Tensor, context: DistributedContext, how: Any) -> Tensor:
    """Return the sum, minimum or maximum of the workers' values, on the CPU."""
    if context.size == 1:
        return values
    moved = values.to(context.device)
    torch.distributed.all_reduce(moved, how)
    return moved.cpu()


def broadcast(tensors: Sequence[Tensor], context: DistributedContext) -> None:
    """Overwrite these tensors with the first worker's."""
    if context.size > 1:
        for tensor in tensors:
            moved = tensor.data.to(context.device)
            torch.distributed.broadcast(moved, 0)
            tensor.data.copy_(moved)
