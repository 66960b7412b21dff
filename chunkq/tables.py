"""A table for a terminal, or one line per cell where the terminal is too narrow for its words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from chunkq.terminal import rows, wrap

GAP = 2
"""Columns between two columns of a table."""


@dataclass(frozen=True)
class FittingTable:
    """Table whose words are never split.

    headings  of the columns; empty without a heading line
    cells     one sequence of texts per row
    left      columns that are left-aligned
    wraps     columns that may wrap
    least     least width of a column that wraps, by its number
    """

    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    left: Collection[int] = (0,)
    wraps: Collection[int] = ()
    least: Mapping[int, int] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.fits(options.max_width):
            yield self._table()
            return
        for row in self.cells:
            yield Text("\n".join(self._stacked(row, options.max_width)))

    def fits(self, width: int) -> bool:
        """Return whether the columns fit if only those of `wraps` break, between their words."""
        return sum(GAP + least for least in self._least_widths()) <= width

    def _least_widths(self) -> list[int]:
        lines = [*([self.headings] if self.headings else []), *self.cells]
        return [
            max(
                cell_len(part)
                for cell in column
                for part in (
                    [*cell.split(), " " * self.least.get(number, 0)]
                    if number in self.wraps
                    else [cell]
                )
            )
            for number, column in enumerate(zip(*lines, strict=True))
        ]

    def _table(self) -> Table:
        table = Table(
            box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=bool(self.headings)
        )
        for number, least in enumerate(self._least_widths()):
            table.add_column(
                self.headings[number] if self.headings else "",
                justify="left" if number in self.left else "right",
                no_wrap=number not in self.wraps,
                min_width=least,
            )
        for row in self.cells:
            table.add_row(*map(Text, row))
        return table

    def _stacked(self, row: Sequence[str], width: int) -> list[str]:
        """Return a row as its first cell and one indented line per other cell."""
        names = self.headings or [""] * len(row)
        label = max(map(len, names)) + 2
        pairs = [(name, cell) for name, cell in zip(names[1:], row[1:], strict=True) if cell]
        first = wrap(row[0], width, indent="  ")
        return [*first, *(f"  {line}" for line in rows(pairs, width - 2, label=label))]
