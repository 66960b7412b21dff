"""How much memory this process has taken."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Return this process's largest resident memory, none of its parent's where that is known.

    `getrusage` counts what the parent had when it started this process.
    """
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    found = [line.split() for line in lines if line.startswith("VmHWM:")]
    if found:
        return int(found[0][1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
