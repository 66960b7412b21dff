"""Import ONNX Runtime with telemetry disabled.

Since release 1.29 the official packages for Linux and macOS send usage events to the vendor and
store a device id in the user's cache folder.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from chunkq.system.framework_logs import set_log_levels, without_log_lines

NAME = "onnxruntime"
# ONNX Runtime reads the variable once, at its import. A value set by the user has priority.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
with without_log_lines(NAME):
    onnxruntime: Any = import_module(NAME)
set_log_levels(NAME, onnxruntime)
