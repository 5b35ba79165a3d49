"""A Prefect server of our own, for a machine that has none. It sets PREFECT_API_URL before Prefect is imported, so this module does not import it."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tlpipeline.errors import WorkspaceError

_API = "PREFECT_API_URL"


@contextmanager
def running(port: int, log: Path) -> Iterator[str]:
    """Give the address of the Prefect server: that of PREFECT_API_URL, else one that listens on this machine alone during the body.

    Raises:
        WorkspaceError: the port is taken, or the server ends before it answers.
    """
    if address := os.environ.get(_API):
        yield address
        return
    with socket.socket() as asking:
        if asking.connect_ex(("127.0.0.1", port)) == 0:
            raise WorkspaceError(
                f"expected the port {port} to be free for a Prefect server, found that somebody listens there. If it is a Prefect server, use it: "
                f"`export {_API}=http://127.0.0.1:{port}/api`. Else choose another port (--port)."
            )
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        # Of its own session: Ctrl-C ends the runs first, which still report to it.
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        os.environ[_API] = f"http://127.0.0.1:{port}/api"
        _await_answer(server, os.environ[_API], log)
        yield os.environ[_API]
    finally:
        os.environ.pop(_API, None)
        server.terminate()
        server.wait()


def _await_answer(server: "subprocess.Popen[bytes]", api: str, log: Path) -> None:
    while True:
        try:
            server.wait(0.5)
        except subprocess.TimeoutExpired:
            try:
                if httpx.get(f"{api}/health", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                continue
        else:
            ending = re.sub(r"\s+", " ", log.read_text(encoding="utf-8", errors="replace"))[-400:]
            raise WorkspaceError(f"expected a Prefect server at {api}, but it ended: {ending} Choose another port (--port), or read {log}.")
