"""All errors that a user can fix, as a tree. Each message says what was expected, what was found, and the way out.

    PipelineError
    ├── ParamsError        params.yaml: a key is unknown, of the wrong type or out of range
    ├── DataError          the images: folder missing, no classes, too few images, nothing readable
    │   └── DataChanged    an image differs from the one that the manifest lists
    ├── BackboneError      an unknown backbone or weights name, weights that do not fit, a missing tap
    ├── ClusterError       more workers than the machine or cluster has, or a training job that failed for good
    │   └── PassTooLarge   a forward pass does not fit into a GPU's memory
    ├── TrainingError      training diverges, or does not fit into a GPU's memory
    │   └── OutOfMemory    a worker's share of a batch does not fit into a GPU's memory; smaller parts may
    ├── WorkspaceError     not a git and DVC repository, a busy workspace, a stage that cannot be recorded
    │   ├── WorkspaceBusy  another run is in the workspace
    │   └── Unreachable    a remote that cannot be reached: a second try may succeed
    └── RegistryError      a missing version or stage name, a rejected publication

    try:
        ...
    except PipelineError as error:   # the command line prints it and exits with 2
        print(error)

A bug in our own code is an AssertionError, never one of these.
"""

import difflib
import re
from collections.abc import Iterable

# What stands between :// and the last @ of a URL's host.
_USER = re.compile(r"([a-z][a-z0-9+.-]*)://([^/\s]*)@", re.IGNORECASE)
# Parameters behind ? that let others in, as in Azure's signed addresses.
_SECRET_PARAMETER = re.compile(
    r"([?&;](?:[\w.-]*(?:password|passwd|pwd|passphrase|token|secret|signature|credential|api[_-]?key|access[_-]?key)[\w.-]*|sig|key)=)[^&;#\s'\"]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Return a text with the passwords and tokens of the URLs in it replaced by ***; a mere name of a user stays, except on the web."""

    def mask(match: re.Match[str]) -> str:
        scheme, user = match.groups()
        secret = ":" in user or scheme.lower() in ("http", "https", "webdav", "webdavs")
        return f"{scheme}://***@" if secret else match[0]

    return _SECRET_PARAMETER.sub(r"\1***", _USER.sub(mask, text))


class PipelineError(Exception):
    """Base of all errors that a user can fix. Its message shows no passwords: what git and DVC say goes into it."""

    def __init__(self, *values: object) -> None:
        super().__init__(*(masked(value) if isinstance(value, str) else value for value in values))


class ParamsError(PipelineError):
    """params.yaml is not valid."""


class DataError(PipelineError):
    """The images cannot be used as they are."""


class DataChanged(DataError):
    """An image changed after it was listed in the manifest."""


class BackboneError(PipelineError):
    """A backbone, its weights or one of its taps does not exist or does not fit."""


class ClusterError(PipelineError):
    """There are fewer workers than requested, or training failed for good."""


class TrainingError(PipelineError):
    """Training diverged repeatedly, or its smallest part does not fit into memory."""


class PassTooLarge(ClusterError):
    """A forward pass does not fit into a GPU's memory."""


class OutOfMemory(TrainingError):
    """A worker's share of a batch does not fit into a GPU's memory.

    Args:
        message: as for any error.
        parts: number of parts to split the share into next.
    """

    def __init__(self, message: str, parts: int) -> None:
        super().__init__(message, parts)
        self.parts = parts

    def __str__(self) -> str:
        return str(self.args[0])


class WorkspaceError(PipelineError):
    """The workspace is not a git and DVC repository, is busy, or changed during a run."""


class WorkspaceBusy(WorkspaceError):
    """Another run is in the workspace."""


class Unreachable(WorkspaceError):
    """A DVC or git remote cannot be reached; a second try may succeed."""


class RegistryError(PipelineError):
    """A version or stage does not exist, or a publication was rejected."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the names in `known` closest to `name`, or with some of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    listed = ", ".join(known[:12])
    return f"known: {listed}{', ...' if len(known) > 12 else ''}."
