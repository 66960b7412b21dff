"""Import triton before TensorFlow, or not at all.

The CUDA builds of torch include triton. torch.compile and torch.export import it at first use.
Importing it after TensorFlow crashes the process (seen with triton 3.7.1 and TensorFlow 2.21.0).
The other order works.
"""

from __future__ import annotations

import logging
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

log = logging.getLogger("chunkq.worker")


def import_triton_before_tensorflow() -> None:
    """Import triton if it is installed and TensorFlow is not imported yet."""
    if "tensorflow" in sys.modules or "triton" in sys.modules or find_spec("triton") is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module("triton")
    except Exception as error:  # of any kind; TensorFlow works without it
        log.info("triton cannot be imported (%s: %s)", type(error).__name__, error)


def hide_triton_after_tensorflow() -> None:
    """Make later imports of triton raise ImportError if they would crash the process.

    torch then behaves as if triton were not installed.
    """
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]


def is_triton_hidden() -> bool:
    """Return whether `hide_triton_after_tensorflow` has hidden triton."""
    return sys.modules.get("triton", sys) is None
