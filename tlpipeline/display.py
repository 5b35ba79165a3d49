"""Values that people look at: the same table in a terminal, as plain text, and in a notebook."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Control characters, marks of direction, separators of lines, and the bytes of file names that are no UTF-8.
_OTHER = r"\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_STEERING, _STEERING_OR_END = re.compile(rf"[\x00-\x08{_OTHER}]"), re.compile(rf"[\x00-\x0a{_OTHER}]")
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


def printable(text: str, lines: bool = True) -> str:
    """Return text without characters that steer a terminal or turn the direction of writing; escapes such as \\x1b stand for them.

    Args:
        lines: keep ends of lines and tabs.
    """
    return (_STEERING if lines else _STEERING_OR_END).sub(lambda match: match[0].encode("unicode_escape").decode(), text)


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
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    return drawn
