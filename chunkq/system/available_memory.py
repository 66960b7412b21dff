"""Return the memory that is available on this machine or in this process's control group."""

from __future__ import annotations

from pathlib import Path

import psutil

from chunkq.system.control_groups import MEMBERSHIP, ROOT, group_folders

LIMIT_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files with the limit and the usage of a control group: cgroup v2, cgroup v1."""


def available_memory(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Return the available bytes: the machine's, or fewer if a control group limits them.

    `root` is where the control groups are mounted; `membership` lists those of this process.
    """
    available = int(psutil.virtual_memory().available)
    for folder in group_folders("memory", ("memory",), root, membership):
        for limit_file, usage_file in LIMIT_FILES:
            try:
                limit = int((folder / limit_file).read_text())
                usage = int((folder / usage_file).read_text())
            except (OSError, ValueError):
                continue  # the file does not exist, or its limit is `max`
            available = min(available, max(0, limit - usage))
    return available
