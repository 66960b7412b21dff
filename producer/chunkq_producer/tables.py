"""A table for a terminal, or one line per cell where the terminal is too narrow for its words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from chunkq.terminal import rows

GAP = 2
"""Columns between two columns of a table."""


@dataclass(frozen=True)
class FittingTable:
    """Table whose words are never split.

    headings  of the columns; empty without a heading line
    cells     one sequence of texts per row
    left      columns that are left-aligned
    wraps     column that may wrap, None without one
    """

    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    left: Collection[int] = (0,)
    wraps: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield self._table()
            return
        for row in self.cells:
            yield Text("\n".join(self._stacked(row, options.max_width)))

    def _least_width(self) -> int:
        """Return the width at which only the column `wraps` is broken, between its words."""
        lines = [*([self.headings] if self.headings else []), *self.cells]
        columns = list(zip(*lines, strict=True))
        return sum(
            GAP
            + max(
                cell_len(part)
                for cell in column
                for part in (cell.split() or [""] if number == self.wraps else [cell])
            )
            for number, column in enumerate(columns)
        )

    def _table(self) -> Table:
        table = Table(
            box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=bool(self.headings)
        )
        for number in range(len(self.cells[0]) if self.cells else len(self.headings)):
            table.add_column(
                self.headings[number] if self.headings else "",
                justify="left" if number in self.left else "right",
                no_wrap=number != self.wraps,
            )
        for row in self.cells:
            table.add_row(*map(Text, row))
        return table

    def _stacked(self, row: Sequence[str], width: int) -> list[str]:
        """Return a row as its first cell and one indented line per other cell."""
        names = self.headings or [""] * len(row)
        label = max(map(len, names)) + 2
        pairs = [(name, cell) for name, cell in zip(names[1:], row[1:], strict=True) if cell]
        return [row[0], *(f"  {line}" for line in rows(pairs, width - 2, label=label))]
