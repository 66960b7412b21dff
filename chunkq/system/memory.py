"""Read the peak memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

PROC_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes.

    On Linux the value excludes the memory of the parent process. Elsewhere `getrusage` can include
    what the parent used when it started this process.
    """
    lines = PROC_STATUS.read_text().splitlines() if PROC_STATUS.exists() else []
    peaks = [line.split() for line in lines if line.startswith("VmHWM:")]
    if peaks:
        return int(peaks[0][1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
