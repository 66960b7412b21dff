"""Short texts and HTML tables of objects, for consoles and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def lengths(shape: Sequence[int]) -> str:
    """Return a shape such as `512 × 512 × 64`."""
    return " × ".join(str(n) for n in shape)


def array_text(array: Any) -> str:
    """Return shape and dtype of an array such as `512 × 64 uint8`."""
    return f"{lengths(array.shape)} {str(array.dtype).removeprefix('torch.')}"


def one_line(name: str, rows: Mapping[str, str]) -> str:
    """Return a representation such as `Plan(chunks: 8, patches: 27)`."""
    return f"{name}({', '.join(f'{key}: {value}' for key, value in rows.items())})"


def html_table(name: str, rows: Mapping[str, str]) -> str:
    """Return a table with one row per entry."""
    from html import escape

    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(key)}</th>"
        f"<td style='text-align:left'>{escape(value)}</td></tr>"
        for key, value in rows.items()
    )
    return f"<table><caption>{escape(name)}</caption>{cells}</table>"
