"""Reading the files of Keras's and TensorFlow's networks, and what these say when it fails."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from chunkq.errors import ModelError
from chunkq.paths import is_url, open_filesystem
from chunkq.scratch import scratch_folder

MESSAGE = re.compile(r"(?:\x1b|\\x1b)\[1m(.*?)(?:\x1b|\\x1b)\[0m", re.DOTALL)
"""What a layer raised, in bold in the middle of what Keras makes of it."""


@contextmanager
def local_copy(path: str, key: str) -> Iterator[str]:
    """Yield a local path of a file or directory: its own, or that of a temporary copy."""
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
    """Return a local file's content; raises ModelError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ModelError(f"{key} cannot be read: {error}") from error


@contextmanager
def with_suffix(path: str, suffix: str) -> Iterator[str]:
    """Yield a name of the file that has just this suffix, by which Keras tells its formats."""
    if os.path.basename(path).partition(".")[2] == suffix[1:]:
        yield path
        return
    with scratch_folder("weights") as folder:
        link = os.path.join(folder, f"file{suffix}")
        os.symlink(os.path.abspath(path), link)
        yield link


@contextmanager
def suppressed_warnings() -> Iterator[None]:
    """Hold back what Keras and TensorFlow bring upon themselves with newer NumPys."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=kind, module=r"keras|tensorflow|h5py")
        yield


def shape_problem(error: BaseException, shape: Sequence[int]) -> str:
    """Return the line for a network that cannot take a batch of this shape."""
    kind = type(error).__name__.removeprefix("MultilineMessage")
    return f"the network raised {kind} on a batch of shape {list(shape)}: {reason(error)}"


def reason(error: BaseException) -> str:
    """Return the part of a message that says most, on one line."""
    said = str(error)
    if bold := MESSAGE.findall(said):
        return _flat(bold[-1])
    lines = [line for line in said.splitlines() if line.strip()] or [""]
    return _flat(lines[-1 if "in user code" in lines[0] else 0])


def _flat(text: str) -> str:
    return " ".join(text.split())[:300]
