"""The repository, and the settings of a workspace."""

import json
import os
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from tlpipeline.workspace import settings

REPOSITORY = Path(__file__).resolve().parents[2]


def set_param(workspace: Path, key: str, value: str) -> None:
    """Change one value of params.yaml, given as section.key and as YAML."""
    settings.change(workspace / "params.yaml", {key: YAML(typ="safe").load(value)})


def dvc_status(workspace: Path) -> list[str]:
    """Return the stages and files that `dvc status` reports as changed."""
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], cwd=workspace, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def flip(path: Path, place: int | None = None) -> None:
    """Change a byte of a file, by default the middle one, and neither its size nor its time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(before.st_mode)
