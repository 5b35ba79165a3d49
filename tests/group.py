"""Runs training jobs in a plain gloo group: a member is `python group.py RANK SIZE PORT SPEC`, SPEC a JSON file with a list of jobs.

Beside `job` and `folder` an item may say `crash`, the number of the checkpoint right after which the run is given up, and
`checkpoint_images`, the images after which a part of an epoch is kept.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from tlpipeline import checkpoint, finetune
from tlpipeline.job import Job
from tlpipeline.train import run
from tlpipeline.workers import Alone


class Interrupted(Exception):
    """Stands for a crash right after a checkpoint."""


class Crashing(Alone):
    """A world that crashes right after so many checkpoints."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder)
        self.left = after

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        super().report(metrics, folder)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


def main(rank: int, size: int, port: int, spec: Path) -> None:
    torch.set_num_threads(int(os.environ.get("GROUP_THREADS", "1")))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    usual, checkpoint.SHARE = finetune.CHECKPOINT_IMAGES, 1.0  # whenever there could be one
    for item in json.loads(spec.read_text()):
        folder = Path(item["folder"])
        scratch = folder / f"scratch{rank}"
        scratch.mkdir(parents=True, exist_ok=True)
        finetune.CHECKPOINT_IMAGES = item.get("checkpoint_images", usual)
        with suppress(Interrupted):
            run(Job(**item["job"]), Crashing(folder, item.get("crash", 0)), scratch)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
