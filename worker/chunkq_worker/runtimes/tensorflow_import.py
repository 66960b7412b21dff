"""Import TensorFlow, Keras and h5py without their log output. The import takes seconds."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

from chunkq.errors import ModelError
from chunkq.system.framework_logs import FRAMEWORKS, set_log_levels, without_log_lines
from chunkq_worker.runtimes.triton_import import import_triton_before_tensorflow

NAME = "tensorflow"
BACKEND = "KERAS_BACKEND"
DEFAULTS = {
    FRAMEWORKS[NAME].level: FRAMEWORKS[NAME].quiet,
    BACKEND: NAME,
    # The autotuner selects algorithms by timing, which can differ between workers.
    "TF_CUDNN_USE_AUTOTUNE": "0",
}
"""Environment variables for the import. Values set by the user have priority."""


def without_log_output() -> AbstractContextManager[None]:
    """Remove TensorFlow's log lines from standard error, unless the user has set a log level."""
    return without_log_lines(NAME)


def _import() -> tuple[Any, Any, Any]:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _check_backend(os.environ[BACKEND])
    import_triton_before_tensorflow()
    with without_log_output():
        tensorflow, keras = import_module(NAME), import_module("keras")
    _check_backend(keras.backend.backend())
    set_log_levels(NAME, tensorflow)
    return tensorflow, keras, import_module("h5py")


def _check_backend(name: str) -> None:
    if name != NAME:
        raise ModelError(
            f"model_config.runtime: tensorflow, but Keras uses the backend {name}; set {BACKEND} "
            "to tensorflow"
        )


tf, keras, h5py = _import()
