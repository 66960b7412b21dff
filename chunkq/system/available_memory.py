"""Return the memory that is available on this machine or in this process's control group."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
LIMIT_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files with the limit and the usage of a control group: cgroup v2, cgroup v1."""


def available_memory(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the available bytes: the machine's, or fewer if a control group limits them.

    `root` is where the control groups are mounted; `membership` lists those of this process.
    """
    available = int(psutil.virtual_memory().available)
    for folder in _cgroup_folders(root, membership):
        for limit_file, usage_file in LIMIT_FILES:
            try:
                limit = int((folder / limit_file).read_text())
                usage = int((folder / usage_file).read_text())
            except (OSError, ValueError):
                continue  # the file does not exist, or its limit is `max`
            available = min(available, max(0, limit - usage))
    return available


def _cgroup_folders(root: Path, membership: Path) -> list[Path]:
    """Return the folders of this process's control groups and of all their parents."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    folders = [root, root / "memory"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        group = Path(path.lstrip("/"))
        if ".." not in group.parts:
            folders += [base / part for part in (group, *group.parents)]
    return folders
