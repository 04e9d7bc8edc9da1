"""Tables: CSV for machines, aligned text for people."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from research.files import write_output


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of equal keys; replaces the file in one move, so that a reader never sees half of it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_output(path, text.getvalue().encode())


def render(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text under a title; numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in rows[0]:
        numeric = all(not isinstance(row[name], str) or row[name][:1].isdigit() for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    # As wide as it has to be, since rich would cut cells; and text is text, though it hold [brackets] or :colons:.
    console = Console(file=io.StringIO(), width=10_000, highlight=False, markup=False, emoji=False)
    console.print(table)
    return "\n".join([title, *(line.rstrip() for line in console.file.getvalue().splitlines())])
