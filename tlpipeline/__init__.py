"""tlpipeline keeps image classifiers retrained.

The library: measure a data set against a pretrained network, choose one of the four cases of transfer learning, train it, evaluate it.
Nothing here imports Prefect or Ray; heavy modules are imported when a name is first used.
"""

import os
from typing import TYPE_CHECKING, Any

# Threads that wait for each other soon go to sleep instead of spinning: beside another busy process, two spinning threads on two cores take five
# times as long as one (docs/decisions/0010). Whoever has said how threads wait is heard. OpenMP reads this when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from tlpipeline.backbones.catalogue import load as load_backbone
    from tlpipeline.backbones.classifier import load as load_model
    from tlpipeline.choice.cases import CASES
    from tlpipeline.choice.decide import choose
    from tlpipeline.choice.decision import Decision
    from tlpipeline.data.dataset import ingest
    from tlpipeline.errors import PipelineError
    from tlpipeline.profiling.measure import measure
    from tlpipeline.profiling.profile import Profile

_WHERE = {
    "CASES": ("choice.cases", "CASES"),
    "Decision": ("choice.decision", "Decision"),
    "PipelineError": ("errors", "PipelineError"),
    "Profile": ("profiling.profile", "Profile"),
    "choose": ("choice.decide", "choose"),
    "ingest": ("data.dataset", "ingest"),
    "load_backbone": ("backbones.catalogue", "load"),
    "load_model": ("backbones.classifier", "load"),
    "measure": ("profiling.measure", "measure"),
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
