"""The model card, committed with each registered version: what it is, how good it is, and all that is needed to rebuild it."""

from collections.abc import Mapping
from pathlib import Path

from tlpipeline.choice.explain import cell

TEMPLATE = Path(__file__).with_name("template") / "card.md"


def card(version: str, facts: Mapping[str, object]) -> str:
    """Return the model card as markdown."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["cell"] = cell
    environment.filters["percent"] = lambda value, digits=1: f"{value * 100:.{digits}f} %"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(version=version, **facts)
