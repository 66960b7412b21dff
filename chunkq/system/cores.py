"""Count the CPU cores that this process may use: affinity, and the CPU quota of its container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from chunkq.system.control_groups import MEMBERSHIP, ROOT, group_folders

MOUNTS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
"""Folders in which the CPU controller of version 1 can be mounted."""


def available_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    A quota of 2.5 cores counts as 3. The least quota of the process's control group and the groups
    above it counts.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, cpu_quotas())]))


def cpu_quotas(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of the control groups of this process.

    `root` is where the control groups are mounted; `membership` lists those of this process.
    """
    for folder in group_folders("cpu", MOUNTS, root, membership):
        for quota in (_quota_v2(folder), _quota_v1(folder)):
            if quota is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    """Return the quota in `cpu.max`: microseconds, or `max`, per period."""
    return _ratio(_words(folder / "cpu.max"))


def _quota_v1(folder: Path) -> float | None:
    """Return the quota of version 1; the kernel writes -1 for none."""
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return _ratio([*quota[:1], *period[:1]])


def _ratio(words: list[str]) -> float | None:
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        return None
    return int(words[0]) / int(words[1])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []
