"""The GPUs that this process may use, found without importing a GPU library."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess

VISIBLE = "CUDA_VISIBLE_DEVICES"
TOOL_SECONDS = 30.0
"""Time for the driver's tool to answer; a GPU that has failed can make it hang."""
NO_DEVICES = "No devices were found"
"""What the tool prints on a machine without GPUs."""
MAX_PROBLEM = 200
log = logging.getLogger("chunkq.system")


def visible_gpus() -> list[str]:
    """Return the names in `CUDA_VISIBLE_DEVICES`, or the driver's list where that is unset."""
    listed = os.environ.get(VISIBLE)
    if listed is None:
        return _driver_gpus()
    names = [name.strip() for name in listed.split(",")]
    return [name for name in names if name and name != "-1"]


def _driver_gpus() -> list[str]:
    """Return the numbers that `nvidia-smi` lists; none if it is missing or finds no GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listing = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=TOOL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        problem = f"gave no answer within {TOOL_SECONDS:g} s"
    except OSError as error:
        problem = f"cannot be run: {error.strerror or error}"
    else:
        output = (listing.stdout + b"\n" + listing.stderr).decode(errors="replace")
        lines = [line.strip() for line in output.split("\n") if line.strip()]
        numbers = [line for line in lines if re.fullmatch(r"[0-9]{1,4}", line)]
        problems = [line for line in lines if line not in numbers and NO_DEVICES not in line]
        if numbers or not problems:
            if problems:
                used = ", ".join(numbers)
                log.warning("nvidia-smi: %s; using GPU %s", problems[0][:MAX_PROBLEM], used)
            return numbers
        problem = f"failed: {problems[0][:MAX_PROBLEM]}"
    log.warning("nvidia-smi %s; no GPU is used, unless %s names some", problem, VISIBLE)
    return []
