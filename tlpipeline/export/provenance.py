"""Where a model comes from. Loads no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from, for those who meet it elsewhere; "" where it is not known.

    Attributes:
        model: "name@v1.2.0", or the name of a folder that is registered nowhere.
        commit: of git; data: hash of the data set.
        case: the transfer-learning case.
    """

    model: str
    commit: str = ""
    data: str = ""
    case: str = ""
