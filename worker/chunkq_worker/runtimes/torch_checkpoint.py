"""Read checkpoints of torch networks without running code of the file."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from typing import Any

import torch

from chunkq.errors import ErrorCode, ModelError
from chunkq.install_hint import install_command
from chunkq_worker.runtimes.formats import format_of
from chunkq_worker.runtimes.torch_reading import check_format, content_of, reason

NUMPY_NAMES = (
    *("numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
)
"""Names in pickles of NumPy's scalars and arrays, which trainers save beside the weights."""


class SkippedValue:
    """Takes the place of a NumPy value in a checkpoint. No code of NumPy runs for it."""

    def __init__(self, *arguments: object) -> None:
        """Ignore the arguments, which come from the file."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state, which comes from the file."""


def _placeholder(full_name: str) -> type[SkippedValue]:
    """Return a class that torch uses for a name in a pickle."""
    module, _, name = full_name.rpartition(".")
    return type(name, (SkippedValue,), {"__module__": module, "__qualname__": name})


PLACEHOLDERS = tuple(map(_placeholder, NUMPY_NAMES))


def read_checkpoint(path: str) -> Any:
    """Return the content of a torch.save or safetensors file, with tensors in host memory.

    NumPy values are replaced by `SkippedValue`. Raise ModelError for other files, and for other
    objects in a pickle.
    """
    key = f"model_config.checkpoint: {path}"
    content = content_of(path, "checkpoint")
    if format_of(content) == "safetensors":
        return _read_safetensors(content, key)
    check_format("torch_save", content, key, "not a checkpoint")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(PLACEHOLDERS)):
            warnings.simplefilter("ignore", UserWarning)  # for files that torch did not write
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any class if the file has another format
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ModelError(
                f"{key} {_more_than_weights(error, path)}", code=ErrorCode.MODEL_UNTRUSTED
            ) from error
        raise ModelError(
            f"{key} is not a checkpoint ({type(error).__name__}: {reason(error)}); save one with "
            "torch.save(network.state_dict(), path)"
        ) from error


def _read_safetensors(content: bytes, key: str) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ModelError(
            f"{key} is a safetensors file, which requires the package safetensors; run "
            f"`{install_command('torch')}`"
        ) from error
    try:
        return load(content)
    except Exception as error:  # of any class if the file is damaged
        raise ModelError(
            f"{key} is a damaged safetensors file ({reason(error)}); copy or download it again"
        ) from error


def _more_than_weights(error: Exception, path: str) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"contains more than weights ({match[1] if match else reason(error)}), which can run code "
        "when it is unpickled; if you trust it, save the weights alone, torch.save(torch.load("
        f"{path!r}, weights_only=False)['state_dict'], 'weights.pt'), or, if it is a whole "
        "network, use type: file with it as model_file and trusted: true"
    )
