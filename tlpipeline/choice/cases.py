"""The four cases of transfer learning as rows of one table, and what a decision for one of them says.

A row says where the backbone is cut, what is frozen, how its weights start, and the recipe. Nothing else in this code base asks which case
it is: a fifth case is one row here and one line in the tests. How one is chosen stands in choice.py.
"""

from dataclasses import dataclass

from tlpipeline.errors import ParamsError, nearest
from tlpipeline.training.recipe import Recipe

SMALL, LARGE = "small", "large"
SIMILAR, DIFFERENT = "similar", "different"


@dataclass(frozen=True, slots=True)
class Case:
    """A row: which data it is for, and what is done with the pretrained network.

    Attributes:
        keep: end (only the old head goes) or slice (the layers after the slice point go, too).
        freeze: kept (all that is kept) or nothing.
        init: pretrained (the head is solved on frozen features first, then everything is trained: LP-FT), plain (the same from a head of
            zeros), random, or auto (pretrained; random where fine-tuning does not beat the frozen probe on validation).
    """

    name: str
    size: str
    likeness: str
    keep: str
    freeze: str
    init: str
    recipe: Recipe


# fmt: off
CASES = (
    #    name               size   likeness   keep     freeze     init          recipe
    Case("small_similar",   SMALL, SIMILAR,   "end",   "kept",    "pretrained", Recipe()),                     # good features, little data: only a new head
    Case("small_different", SMALL, DIFFERENT, "slice", "kept",    "pretrained", Recipe()),                     # only the early, general features carry over
    Case("large_similar",   LARGE, SIMILAR,   "end",   "nothing", "pretrained", Recipe()),                     # enough data to adapt all of it, gently
    Case("large_different", LARGE, DIFFERENT, "end",   "nothing", "auto",       Recipe(lr_none=0.03)),       # the same, less gently; from scratch where that is better
)
# fmt: on


def find(name: str) -> Case:
    """Return the row of this name.

    Raises:
        ParamsError: there is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ParamsError(
        f"params.yaml: choose.case: expected auto or the name of a case, found {name!r}; {nearest(name, [c.name for c in CASES])}"
    )
