"""How much memory this machine, or the control group that this process is in, has to offer."""

from __future__ import annotations

from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files with a group's limit and use: of version 2, of version 1."""


def offered(groups: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that can still be had: the machine's, or fewer where a group limits them."""
    found = int(psutil.virtual_memory().available)
    for folder in _folders(groups, own):
        for limit, used in LIMITS:
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
            except (OSError, ValueError):
                continue  # not a limit of this kind, or `max`
            found = min(found, max(0, left))
    return found


def _folders(groups: Path, own: Path) -> list[Path]:
    """Return the folders of this process's groups and of all groups around them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = [groups, groups / "memory"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        inner = Path(path.lstrip("/"))
        if ".." not in inner.parts:
            found += [root / part for part in (inner, *inner.parents)]
    return found
