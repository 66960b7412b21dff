"""Import TensorFlow, Keras and h5py without their log output. The import takes seconds."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from chunkq.errors import ModelError
from chunkq_worker.runtimes.triton_import import import_triton_before_tensorflow

LEVEL = "TF_CPP_MIN_LOG_LEVEL"
BACKEND = "KERAS_BACKEND"
DEFAULTS = {
    LEVEL: "3",
    BACKEND: "tensorflow",
    # The autotuner selects algorithms by timing, which can differ between workers.
    "TF_CUDNN_USE_AUTOTUNE": "0",
}
"""Environment variables for the import. Values set by the user have priority."""
LOG_LINE = re.compile(rb"[IWE]\d{4} \d\d:|WARNING: All log messages before absl::InitializeLog")
"""Log lines that TensorFlow writes at import, regardless of the log level."""
SHOW_LOG = os.environ.get(LEVEL, DEFAULTS[LEVEL]) != DEFAULTS[LEVEL]
"""Whether the user has set a log level. A parent process that imported this set the default."""


@contextmanager
def without_log_output() -> Iterator[None]:
    """Remove TensorFlow's log lines from standard error, unless the user has set a log level."""
    try:
        stderr_copy = -1 if SHOW_LOG else os.dup(2)
    except OSError:  # standard error is closed
        stderr_copy = -1
    if stderr_copy < 0:
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            with suppress(AttributeError, OSError, ValueError):  # sys.stderr is None or closed
                sys.stderr.flush()
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)
            captured.seek(0)
            # Other threads may have written to standard error meanwhile.
            os.write(2, b"".join(line for line in captured if not LOG_LINE.match(line)))


def _import() -> tuple[Any, Any, Any]:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _check_backend(os.environ[BACKEND])
    import_triton_before_tensorflow()
    with without_log_output():
        tensorflow, keras = import_module("tensorflow"), import_module("keras")
    _check_backend(keras.backend.backend())
    if not SHOW_LOG:
        for logger in ("tensorflow", "absl"):
            logging.getLogger(logger).setLevel(logging.ERROR)
    return tensorflow, keras, import_module("h5py")


def _check_backend(name: str) -> None:
    if name != "tensorflow":
        raise ModelError(
            f"model_config.runtime: tensorflow, but Keras uses the backend {name}; set {BACKEND} "
            "to tensorflow"
        )


tf, keras, h5py = _import()
