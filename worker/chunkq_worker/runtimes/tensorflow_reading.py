"""Read model files for Keras and TensorFlow, and shorten the errors that these raise."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from chunkq.errors import ModelError
from chunkq.paths import is_url, open_filesystem
from chunkq.system.scratch import scratch_folder

MESSAGE = re.compile(r"(?:\x1b|\\x1b)\[1m(.*?)(?:\x1b|\\x1b)\[0m", re.DOTALL)
"""The message of a layer's error: the bold part of Keras's message."""


@contextmanager
def local_copy(path: str, key: str) -> Iterator[str]:
    """Yield the path of a local file or folder, or of a temporary copy if `path` is a URL."""
    if not is_url(path):
        yield path
        return
    with scratch_folder("weights") as folder:
        target = os.path.join(folder, path.rpartition("/")[2])
        try:
            filesystem, inner = open_filesystem(path)
            filesystem.get(inner, target, recursive=filesystem.isdir(inner))
        except OSError as error:
            raise ModelError(f"{key} cannot be read: {error}") from error
        yield target


def content_of(path: str, key: str) -> bytes:
    """Return the content of a local file, or raise ModelError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ModelError(f"{key} cannot be read: {error}") from error


@contextmanager
def with_suffix(path: str, suffix: str) -> Iterator[str]:
    """Yield a path of the file with exactly this suffix, from which Keras derives the format."""
    if os.path.basename(path).partition(".")[2] == suffix[1:]:
        yield path
        return
    with scratch_folder("weights") as folder:
        link = os.path.join(folder, f"file{suffix}")
        os.symlink(os.path.abspath(path), link)
        yield link


@contextmanager
def suppressed_warnings() -> Iterator[None]:
    """Suppress the warnings that Keras and TensorFlow cause with newer NumPy releases."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=kind, module=r"keras|tensorflow|h5py")
        yield


def shape_problem(error: BaseException, shape: Sequence[int], written: Sequence[int]) -> str:
    """Return the message for a network that cannot process a batch of this shape.

    `written` is `model_input_shape` as the job has it.
    """
    kind = type(error).__name__.removeprefix("MultilineMessage")
    source = f"model_config.model_input_shape: {list(written)}"
    return f"{source}: the network raised {kind} on a batch of {list(shape)}: {reason(error)}"


def reason(error: BaseException) -> str:
    """Return the most informative part of a message, on one line."""
    message = str(error)
    if bold := MESSAGE.findall(message):
        return _one_line(bold[-1])
    lines = [line for line in message.splitlines() if line.strip()] or [""]
    return _one_line(lines[-1 if "in user code" in lines[0] else 0])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
