"""TensorFlow, Keras and h5py, imported without their chatter; this module is slow to import."""

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
    # Else the fastest algorithm of a first try is taken, which differs from worker to worker.
    "TF_CUDNN_USE_AUTOTUNE": "0",
}
"""Environment that must be there before the import; what the user has set stays."""
CHATTER = re.compile(rb"[IWE]\d{4} \d\d:|WARNING: All log messages before absl::InitializeLog")
"""Lines that the level does not hold back: the libraries write them while they are loaded."""
WANTS_CHATTER = os.environ.get(LEVEL, DEFAULTS[LEVEL]) != DEFAULTS[LEVEL]
"""Whether the user has set a level; that of a parent process is the default again."""


@contextmanager
def without_log_output() -> Iterator[None]:
    """Keep TensorFlow's own lines off standard error, unless the user has set a level."""
    try:
        kept_back = -1 if WANTS_CHATTER else os.dup(2)
    except OSError:  # there is no standard error
        kept_back = -1
    if kept_back < 0:
        yield
        return
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            with suppress(AttributeError, OSError, ValueError):  # none, or closed
                sys.stderr.flush()
            os.dup2(kept_back, 2)
            os.close(kept_back)
            said.seek(0)
            # Other threads may have had something to say meanwhile.
            os.write(2, b"".join(line for line in said if not CHATTER.match(line)))


def _import() -> tuple[Any, Any, Any]:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _expect_backend(os.environ[BACKEND])
    import_triton_before_tensorflow()
    with without_log_output():
        tensorflow, keras = import_module("tensorflow"), import_module("keras")
    _expect_backend(keras.backend.backend())
    if not WANTS_CHATTER:
        for logger in ("tensorflow", "absl"):
            logging.getLogger(logger).setLevel(logging.ERROR)
    return tensorflow, keras, import_module("h5py")


def _expect_backend(name: str) -> None:
    if name != "tensorflow":
        raise ModelError(
            f"model_config.runtime: tensorflow, but Keras is set to its backend {name} here; "
            f"unset {BACKEND}, or set it to tensorflow"
        )


tf, keras, h5py = _import()
