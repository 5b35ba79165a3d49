"""Runs training jobs in a plain gloo group: a member is `python group.py RANK SIZE PORT SPEC`, SPEC a JSON file with a list of jobs."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main(rank: int, size: int, port: int, spec: Path) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("GROUP_THREADS", "1")))
    from tlpipeline.job import Job
    from tlpipeline.train import run
    from tlpipeline.workers import Alone

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    for item in json.loads(spec.read_text()):
        folder = Path(item["folder"])
        scratch = folder / f"scratch{rank}"
        scratch.mkdir(parents=True, exist_ok=True)
        run(Job(**item["job"]), Alone(folder), scratch)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
