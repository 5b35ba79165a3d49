"""Runs training jobs in a plain gloo group: a member is `python -m tests.helpers.group RANK SIZE PORT SPEC`, SPEC a JSON file with a list of jobs.

Beside `job` and `folder` an item may say `crash`, the number of the checkpoint right after which the run is given up, `break_off`, the images
whose features each worker has computed in one go when it is given up, and `synchronized`, whether batch normalization is one over all workers.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.helpers.synchronized import synchronized
from tests.helpers.training import Crashing, Interrupted, config_of
from tlpipeline.backbones.features import FeatureExtractor
from tlpipeline.data.loader import Images
from tlpipeline.training.train import run


@contextmanager
def breaking_off(images: int) -> Iterator[None]:
    """Crash as soon as a worker has passed so many images in one go through the network, and has kept them: a shard is a step here. 0: never."""
    plain = FeatureExtractor.compute

    def compute(self: FeatureExtractor, shown: Images, indices: Sequence[int], progress: Callable[[int], None]) -> None:
        self.store.shard_rows = 1 if images else self.store.shard_rows

        def told(done: int) -> None:
            progress(done)
            if 0 < images <= done:
                raise Interrupted

        plain(self, shown, indices, told)

    with patch.object(FeatureExtractor, "compute", compute):
        yield


def attempt(item: Mapping[str, Any], rank: int = 0) -> None:
    """Run a job to its end, or to where its item says that it is given up."""
    folder = Path(item["folder"])
    scratch = folder / f"scratch{rank}"
    scratch.mkdir(parents=True, exist_ok=True)
    with (
        breaking_off(item.get("break_off", 0)),
        synchronized() if item.get("synchronized") else nullcontext(),
        suppress(Interrupted),
    ):
        context = Crashing(folder, item.get("crash", 0))
        context.syncs_batch_norm = bool(item.get("synchronized"))
        run(config_of(item["job"]), context, scratch)


def main(rank: int, size: int, port: int, spec: Path) -> None:
    torch.set_num_threads(int(os.environ.get("GROUP_THREADS", "1")))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    for item in json.loads(spec.read_text()):
        attempt(item, rank)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
