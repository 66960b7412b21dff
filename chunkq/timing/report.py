"""The figures of a finished job by name, with a short text for consoles and notebooks."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from chunkq.summaries import html_table, one_line
from chunkq.units import duration


class Report(dict[str, Any]):
    """The report of a finished job, by the keys of `report.json`, with a short representation."""

    @override
    def __repr__(self) -> str:
        return one_line("Report", self._summary())

    def _repr_html_(self) -> str:
        return html_table("Report", self._summary())

    def _summary(self) -> dict[str, str]:
        unit = "images" if "images" in self else "patches"
        names = ("chunks", "patches", "missing", "warnings", "wall_seconds", "conclusion")
        if any(name not in self for name in names):  # a copy of which keys were removed
            return {"keys": str(len(self))}
        rows = {
            "chunks": str(self["chunks"]),
            unit: str(self["patches"]),
            "missing": str(len(self["missing"])),
            "time": duration(self["wall_seconds"]),
            "conclusion": self["conclusion"],
        }
        return rows | {f"warning {n}": text for n, text in enumerate(self["warnings"], start=1)}
