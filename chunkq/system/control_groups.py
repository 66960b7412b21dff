"""Control groups of this process: their folders, of version 1 and 2."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
"""Where the control groups are mounted."""
MEMBERSHIP = Path("/proc/self/cgroup")
"""The list of the control groups of this process."""


def group_folders(
    controller: str, mounts: tuple[str, ...], root: Path = ROOT, membership: Path = MEMBERSHIP
) -> list[Path]:
    """Return the folders of this process's control groups and of all their parents.

    Of version 1, the groups of a controller are returned; `mounts` are the folders in which it can
    be mounted. A group outside of what a container sees counts as the root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    folders = [root, *(root / mount for mount in mounts)]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        if ".." not in group.parts:
            bases = [root / mount for mount in mounts] if controllers else [root]
            folders += [base / part for base in bases for part in (group, *group.parents)]
    return list(dict.fromkeys(folders))
