"""ONNX Runtime, imported with its telemetry off.

Since release 1.29 the official packages for Linux and macOS send usage events to their maker and
store a device id below the user's cache folder.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# ONNX Runtime reads this once, at its import. A value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
onnxruntime: Any = import_module("onnxruntime")
