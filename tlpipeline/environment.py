"""Environment variables that the command line, the workers and a run set. Importing the package sets none."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from tlpipeline.errors import PipelineError


def thread_waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make idle OpenMP threads sleep soon; none where the user has set how they wait.

    By default idle threads spin. Beside another busy process, two spinning threads on two cores take five times as long as one
    (docs/decisions/0010). OpenMP reads these variables when torch is first imported.
    """
    if "OMP_WAIT_POLICY" in environment:
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": environment.get("GOMP_SPINCOUNT", "1000")}


def set_thread_waiting() -> None:
    """Make idle OpenMP threads of this process sleep soon, if torch is not imported yet."""
    os.environ.update(thread_waiting(os.environ))


def patience() -> float:
    """Return for how many seconds a remote or server may be silent: TLPIPELINE_TIMEOUT, by default 30.

    Raises:
        PipelineError: it is no number above 0.
    """
    text = os.environ.get("TLPIPELINE_TIMEOUT", "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise PipelineError(f"expected seconds in the environment variable TLPIPELINE_TIMEOUT, found {text!r}. Set it to 30, or unset it.")
    return seconds


def set_prefect(workspace: Path) -> None:
    """Set what Prefect reads when it is first imported: its records stay in the workspace. The user's own settings win."""
    defaults = {
        "PREFECT_HOME": str(workspace.resolve() / ".tlpipeline" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DVC_NO_ANALYTICS": "1",
        "ITERATIVE_DO_NOT_TRACK": "1",
    }
    if "PREFECT_LOGGING_LEVEL" not in os.environ:
        # The terminal shows our progress bar and one message for a mistake; a server still gets every line.
        defaults["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
