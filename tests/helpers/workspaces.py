"""The repository, and the settings of a workspace."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def set_param(workspace: Path, key: str, value: str) -> None:
    """Change one value of params.yaml, given as section.key."""
    section, _, name = key.partition(".")
    lines = (workspace / "params.yaml").read_text().splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"{section}:")))
    at = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {name}:"))
    lines[at] = f"  {name}: {value}"
    (workspace / "params.yaml").write_text("\n".join(lines) + "\n")


def dvc_status(workspace: Path) -> list[str]:
    """Return the stages and files that `dvc status` reports as changed."""
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], cwd=workspace, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))
