"""tlpipeline keeps image classifiers retrained.

`Workspace` and `load_model` are the way in (`tlpipeline.api` has an example). Importing the package loads nothing heavy and sets no
environment variable: a module is imported when one of its names is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlpipeline.api import Workspace, list_backbones, load_model
    from tlpipeline.choice.cases import CASES
    from tlpipeline.errors import PipelineError

    __version__: str

_MODULES = {
    "CASES": "tlpipeline.choice.cases",
    "PipelineError": "tlpipeline.errors",
    "Workspace": "tlpipeline.api",
    "list_backbones": "tlpipeline.api",
    "load_model": "tlpipeline.api",
}

__all__ = ["CASES", "PipelineError", "Workspace", "__version__", "list_backbones", "load_model"]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("tlpipeline")
    if name not in _MODULES:
        raise AttributeError(f"module 'tlpipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
