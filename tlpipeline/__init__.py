"""tlpipeline keeps image classifiers retrained.

The library: measure a data set against a pretrained network, choose one of the four cases of transfer learning, train it, evaluate it.
Nothing here imports Prefect or Ray; heavy modules are imported when a name is first used.
"""

import os
from typing import TYPE_CHECKING, Any

# Threads that wait for each other sleep instead of spinning: beside another busy process, two spinning threads on two cores take five times
# as long as one (docs/log.md), and in a quiet machine sleeping costs nothing that can be measured. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from tlpipeline.backbones import load as load_backbone
    from tlpipeline.cases import CASES, Decision
    from tlpipeline.choice import choose
    from tlpipeline.dataset import ingest
    from tlpipeline.errors import PipelineError
    from tlpipeline.model import load as load_model
    from tlpipeline.profiling import Profile, measure

_WHERE = {
    "CASES": ("cases", "CASES"),
    "Decision": ("cases", "Decision"),
    "PipelineError": ("errors", "PipelineError"),
    "Profile": ("profiling", "Profile"),
    "choose": ("choice", "choose"),
    "ingest": ("dataset", "ingest"),
    "load_backbone": ("backbones", "load"),
    "load_model": ("model", "load"),
    "measure": ("profiling", "measure"),
}

__all__ = [
    "CASES",
    "Decision",
    "PipelineError",
    "Profile",
    "choose",
    "ingest",
    "load_backbone",
    "load_model",
    "measure",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tlpipeline' has no attribute {name!r}")
    import importlib

    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(f"tlpipeline.{module}"), attribute)
