"""Which devices this machine grants, found without importing any GPU library."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from chunkq.errors import JobError

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one child process runs: a GPU as `CUDA_VISIBLE_DEVICES` names it, or None for CPU."""

    gpu: str | None


def slots(gpus: str, per_device: int, per_node: int | None = None) -> list[Slot]:
    """Return one slot per child process.

    `gpus` is `all`, `none` or a comma-separated choice among the visible ones, by position or
    name. Without a GPU there are `per_device` CPU slots. `per_node`, if given, is how many there
    are in all, spread over the devices.
    """
    visible = [] if gpus == "none" else visible_gpus()
    if gpus not in ("all", "none"):
        visible = [_chosen(name.strip(), visible) for name in gpus.split(",")]
    if per_node is not None:
        return [Slot(visible[n % len(visible)] if visible else None) for n in range(per_node)]
    if not visible:
        return [Slot(None)] * per_device
    return [Slot(gpu) for gpu in visible for _ in range(per_device)]


def visible_gpus() -> list[str]:
    """Return the GPUs granted: `CUDA_VISIBLE_DEVICES` as it is, else what the driver lists."""
    granted = os.environ.get(VISIBLE)
    if granted is not None:
        names = [name.strip() for name in granted.split(",")]
        return [name for name in names if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return listing.stdout.split() if listing.returncode == 0 else []


def cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chosen(name: str, visible: list[str]) -> str:
    if name in visible:
        return name
    if name.isdigit() and int(name) < len(visible):
        return visible[int(name)]
    granted = ", ".join(visible) or "none"
    raise JobError(f"--gpus: {name!r} is not among the visible GPUs ({granted})")
