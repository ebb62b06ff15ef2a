# SPDX-License-Identifier: Apache-2.0
"""Tables on a terminal: with rich where it is installed, as aligned columns where it is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, caption: str = ""
) -> None:
    """Cells are never cut or wrapped, headers may be; every row has the header's length."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    if importlib.util.find_spec("rich") is not None:
        _print_rich(header, rows, widths, title, caption)
        return
    widths = [max(width, len(name)) for width, name in zip(widths, header, strict=True)]
    print(title)
    for row in (header, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    if caption:
        print(caption)


def _print_rich(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    title: str,
    caption: str,
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\n{title}")  # on lines of their own: they may be wider than the table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, width in zip(header, widths, strict=True):
        table.add_column(name, min_width=width)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if caption:
        console.print(caption)
