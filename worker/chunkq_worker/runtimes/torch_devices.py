"""Recognize errors of code that names another device than the job's."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from chunkq.errors import ModelError
from chunkq_worker.runtimes.torch_reading import reason

DEVICE = re.compile(r"\b(cuda|xpu|mps|hpu|npu)\b(?::\d+)?|\b(cpu)\b|\.(cuda)\(", re.IGNORECASE)
DEVICE_ERROR = re.compile(
    r"not compiled with CUDA|No CUDA GPUs|NVIDIA driver|from the '\w+' backend|"
    r"invalid device ordinal|linked with support for \w+ devices|on the same device|"
    r"deserialize object on|Cannot initialize CUDA|device type .* (?:start|prefix)|"
    r"must have its parameters and buffers on device|Expected a '?\w+'? device|"
    r"not (?:compiled|built) with (?:XPU|MPS)|PyTorch with (?:XPU|MPS)",
    re.IGNORECASE,
)
"""Parts of torch's messages about a device that is missing, or is not that of a tensor."""
TRACEBACK_FILE = re.compile(r'File "([^"]+)", line (\d+)')


@contextmanager
def device_errors(device: str) -> Iterator[None]:
    """Raise ModelError for errors inside a `with` block that name another device than the job's."""
    try:
        yield
    except Exception as error:
        if (problem := device_problem(error, device)) is None:
            raise
        raise ModelError(problem) from error


def device_problem(error: BaseException | None, device: str) -> str | None:
    """Return the message for an error of code that names another device, or has caused it.

    The result is None for other errors. `device` is the job's.
    """
    problem = None
    while error is not None:
        if not isinstance(error, ModelError) and DEVICE_ERROR.search(str(error)):
            name, line = _named_device(error, device)
            if name is not None:
                problem = (
                    f"the code of the network{line} uses the device {name}, but "
                    f"model_config.device is {device} ({_first_sentence(error)}); use the device "
                    "of the input there (x.device), or set model_config.device"
                )
        error = error.__cause__
    return problem


def _named_device(error: BaseException, device: str) -> tuple[str | None, str]:
    """Return the other device in the code or the message of an error, and the line of the code."""
    text = str(error)
    files = TRACEBACK_FILE.findall(text)  # of TorchScript
    line = f" ({files[-1][0]}, line {files[-1][1]})" if files else ""
    if (name := _other_device(text, device)) is not None and files:
        return name, line
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (other := _other_device(frame.line or "", device)) is not None and not _is_torch(frame):
            return other, f" ({frame.filename}, line {frame.lineno})"
    return name, line


def _first_sentence(error: BaseException) -> str:
    return re.sub(r"^[\w.]+Error: ", "", reason(error)).partition(". ")[0]


def _is_torch(frame: traceback.FrameSummary) -> bool:
    return "/torch/" in frame.filename or "/chunkq_worker/" in frame.filename


def _other_device(text: str, device: str) -> str | None:
    """Return the most specific name of a device other than the job's in a text, or None."""
    names = [(match[0].strip(".(")).lower() for match in DEVICE.finditer(text)]
    others = [name for name in names if name not in (device, f"{device}:0")]
    return max(others, key=len, default=None)
