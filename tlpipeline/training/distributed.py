"""Who trains together: the workers of a job, what they gather, and where their checkpoints go. Neither Ray nor Prefect is known here."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tlpipeline.data.loader import rank_slice
from tlpipeline.files import atomic_write


class DistributedContext(Protocol):
    """Who trains together, and where checkpoints go. `report` and `restore` must be called by all workers alike."""

    rank: int
    size: int
    device: torch.device

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Keep this checkpoint folder (given by the first worker only); returns when it is safe."""

    def restore(self) -> Any:
        """Return a context manager that gives the folder of the newest checkpoint, or None."""


class LocalContext:
    """A world on plain torch: one process, or the members of an initialized process group that share a folder.

    Args:
        folder: where the newest checkpoint is kept; replaced as a whole, so a crash leaves the old or the new one.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if grouped else 0
        self.size = torch.distributed.get_world_size() if grouped else 1
        self.device = device or torch.device("cpu")
        self.folder = folder

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Replace the kept checkpoint."""
        if folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            new, kept, old = self.folder / "new", self.folder / "kept", self.folder / "old"
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(folder, new, copy_function=_copied)
            # After a kill between the two renames the old one is all there is: it goes only where there is a newer one that is complete.
            if kept.exists():
                shutil.rmtree(old, ignore_errors=True)
                kept.rename(old)
            new.rename(kept)
            shutil.rmtree(old, ignore_errors=True)
        if self.size > 1:
            torch.distributed.barrier()

    @contextmanager
    def restore(self) -> Iterator[Path | None]:
        """Give the kept checkpoint."""
        # Killed between the two renames, the newest complete one is called old.
        yield next((path for name in ("kept", "old") if (path := self.folder / name).is_dir()), None)
        # Nobody goes on before all have looked: a first checkpoint that is already there would be taken for one to go on from.
        if self.size > 1:
            torch.distributed.barrier()


def _copied(source: str, target: str) -> None:
    """Copy a file, safely on the disk when this returns."""
    with atomic_write(Path(target)) as draft:
        shutil.copyfile(source, draft)


def all_gather(part: Tensor, total: int, world: DistributedContext) -> Tensor:
    """Put together what each worker computed for its `shard`: (total, ...), on every worker, each row exactly once."""
    if world.size == 1:
        return part
    longest = math.ceil(total / world.size)
    padded = torch.zeros(longest, *part.shape[1:], dtype=part.dtype, device=world.device)
    padded[: len(part)] = part.to(world.device)
    parts = [torch.zeros_like(padded) for _ in range(world.size)]
    torch.distributed.all_gather(parts, padded)
    whole = torch.zeros(total, *part.shape[1:], dtype=part.dtype)
    for rank, got in enumerate(parts):
        indices = rank_slice(total, rank, world.size)
        whole[list(indices)] = got[: len(indices)].cpu()
    return whole


def all_reduce(values: Tensor, world: DistributedContext, how: Any) -> Tensor:
    """Return the sum, minimum or maximum of the workers' values, on the CPU."""
    if world.size == 1:
        return values
    moved = values.to(world.device)
    torch.distributed.all_reduce(moved, how)
    return moved.cpu()


def broadcast(tensors: Sequence[Tensor], world: DistributedContext) -> None:
    """Overwrite these tensors with the first worker's."""
    if world.size > 1:
        for tensor in tensors:
            moved = tensor.data.to(world.device)
            torch.distributed.broadcast(moved, 0)
            tensor.data.copy_(moved)
