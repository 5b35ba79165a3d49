"""Values that people look at: the same table in a terminal, as plain text, and in a notebook."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 160  # columns of plain text
NOTEBOOK_WIDTH = 110
_HTML = "<pre style=\"line-height:1.3;overflow-x:auto;font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace\">{code}</pre>"


class Displayed(ABC):
    """A value that prints as text, and that rich and notebooks draw."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Return what rich draws."""

    def __str__(self) -> str:
        """Return the same as plain text, without spaces at the ends of lines."""
        console = _console(WIDTH)
        with console.capture() as written:
            console.print(self)
        return "\n".join(line.rstrip() for line in written.get().rstrip().splitlines())

    def _repr_html_(self) -> str:
        """Return the same as HTML, for a notebook."""
        console = _console(NOTEBOOK_WIDTH, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format=_HTML)


def _console(width: int, record: bool = False) -> Console:
    from rich.console import Console

    return Console(width=width, file=io.StringIO(), record=record, force_jupyter=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """Return a table; without a header, the first column names the rows."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*header, box=None, show_header=bool(header), pad_edge=False, header_style="bold")
    if not header:
        drawn.add_column(style="bold", no_wrap=True)
        drawn.add_column(overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn
