"""Tables on stdout: plain columns, as wide as the terminal, or wide enough for whole lines where stdout is a file or a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 200


def results_console() -> Console:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, markup=False, soft_wrap=True, width=_PIPE_WIDTH)


def plain_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; the columns named in `right` hold numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
