"""Rows of text: a table on a terminal, tab-separated lines elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_rows(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints the rows, under the header on a terminal only."""
    if not console.is_terminal:
        for row in rows:
            console.file.write("\t".join(row) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    for name in header[:-1]:
        table.add_column(name, overflow="fold")
    table.add_column(header[-1])
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
