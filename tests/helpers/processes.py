"""Python in other processes: alone, or as members of a gloo group."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tests.helpers.workspaces import REPOSITORY


def run_python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in another process that is no child of a lock's holder."""
    environment = {k: v for k, v in os.environ.items() if k != "TLPIPELINE_LOCK_HOLDER"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300)


def start_member(
    rank: int, size: int, port: int, spec: Path, environment: Mapping[str, str] | None = None, stderr: IO[str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process of a gloo group that runs the jobs of a JSON file; see `tests.helpers.group`."""
    command = [sys.executable, "-m", "tests.helpers.group", str(rank), str(size), str(port), str(spec)]
    path = os.pathsep.join([str(REPOSITORY / "examples" / "own_backbone"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, stderr=stderr, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path, **(environment or {})})
