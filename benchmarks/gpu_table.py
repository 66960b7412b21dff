"""Format the figures of gpu.py as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Figures = dict[str, Any]


def table(parts: Mapping[str, Figures]) -> str:
    """Return the most important figures as plain text."""
    lines: list[str] = []
    for name, part in parts.items():
        if "error" in part:
            lines.append(f"{name}: failed: {str(part['error']).strip().splitlines()[-1]}")
        elif "contestants" in part:
            lines += [f"{name}: {part['voxels'] / 1e6:.0f} Mvoxel, {part['rounds']} rounds"]
            lines += _race_lines(part)
        elif "options" in part:
            lines.append(f"{name}: seconds by a plain float32 loop's (with TF32, without); labels")
            lines += [_option_line(label, one) for label, one in part["options"].items()]
        elif "lines" in part:
            lines += [f"{name}: {part['seconds']:.0f} s, set {json.dumps(part['set'])}"]
            lines += [f"  {line}" for line in part["lines"]]
        elif name.endswith("counts"):
            lines.append(f"{name}:")
            lines += [f"  {who:<8} {_short(one)}" for who, one in part.items()]
        else:
            lines.append(f"{name}: {json.dumps(part)[:1500]}")
    return "\n".join(lines) + "\n"


def _race_lines(part: Figures) -> list[str]:
    lines = []
    for name, one in part["contestants"].items():
        ratio = part["ratios"].get(name, {}).get("median")
        beside = f"  chunkq/{name} {ratio:.3f}" if ratio else ""
        if one:
            memory = one.get("device_bytes", 0) / 1e9
            lines.append(
                f"  {name:<8} {one['seconds']:8.2f} s {one['patches_per_second']:8.0f} patches/s "
                f"{memory:6.2f} GB{beside}"
            )
    return lines + [f"  {name:<8} failed" for name in part["errors"]]


def _option_line(label: str, part: Figures) -> str:
    if "error" in part:
        return f"  {label:<62} failed: {str(part['error']).strip().splitlines()[-1][:60]}"
    ratio, other, equal = part["ratio"]["median"], part["float32_ratio"], part["equal"]
    goal = "  reaches the goal" if part["reaches_goal"] else ""
    return f"  {label:<62} {ratio:.3f}  {other:.3f}  {equal:.5f}{goal}"


def _short(figures: Figures) -> str:
    keys = (
        "busy", "busy_between", "kernels_per_patch", "launches_per_patch", "syncs",
        "syncs_per_chunk", "syncs_elsewhere_per_chunk", "synchronizing_calls", "up_per_byte_read",
        "down_per_byte_written", "outside_seconds", "gap_seconds",
    )  # fmt: skip
    return "  ".join(f"{key} {figures[key]:.3g}" for key in keys if figures.get(key) is not None)
