"""Every mistake that a user can make, as a tree. Each message says what was expected, what was found, and the way out.

    PipelineError
    ├── ParamsError       params.yaml: a key is missing, unknown, of the wrong type or out of range
    ├── DataError         the images: folder missing, no classes, too few images, nothing readable
    │   └── DataChanged   an image is no longer the one that the manifest lists
    ├── BackboneError     an unknown backbone or weights name, weights that do not fit, a tap that does not exist
    ├── ClusterError      more workers than the machine or cluster has, or a training job that failed for good
    ├── TrainingError     training that diverges, or does not fit into a GPU's memory
    │   └── MemoryFull    a GPU has no room for its share of a batch; in smaller parts it may
    ├── WorkspaceError    not a git + DVC repository, a busy workspace, a stage that cannot be recorded
    │   └── Unreachable   a remote that could not be reached: a second try may succeed
    └── RegistryError     a version or stage name that does not exist, a publication that was refused

    try:
        ...
    except PipelineError as error:   # the command line prints it and exits with 2
        print(error)

A broken promise of our own code is an AssertionError, never one of these.
"""

import difflib
from collections.abc import Iterable


class PipelineError(Exception):
    """Base of everything that a user can mend."""


class ParamsError(PipelineError):
    """params.yaml does not say what it must."""


class DataError(PipelineError):
    """The images cannot be used as they are."""


class DataChanged(DataError):
    """An image changed after it was listed in the manifest."""


class BackboneError(PipelineError):
    """A backbone, its weights or one of its taps does not exist or does not fit."""


class ClusterError(PipelineError):
    """The workers that were asked for are not there, or training failed for good."""


class TrainingError(PipelineError):
    """Training diverged again and again, or its smallest part does not fit into memory."""


class PassTooLarge(ClusterError):
    """A GPU has no room for a forward pass of as many images as are passed together."""


class OutOfMemory(TrainingError):
    """A GPU has no room for its share of a batch.

    Args:
        message: as of any error.
        parts: into how many the share would have to be cut next.
    """

    def __init__(self, message: str, parts: int) -> None:
        super().__init__(message, parts)
        self.parts = parts

    def __str__(self) -> str:
        return str(self.args[0])


class WorkspaceError(PipelineError):
    """The workspace is not a git + DVC repository, is busy, or changed under a run."""


class Unreachable(WorkspaceError):
    """A DVC or git remote could not be reached; a second try may succeed."""


class RegistryError(PipelineError):
    """A version, stage or publication that the registry cannot give."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known names closest to `name`, or lists some of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    listed = ", ".join(known[:12])
    return f"known: {listed}{', ...' if len(known) > 12 else ''}."
