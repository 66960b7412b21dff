"""Opens ONNX files, and says in one line what is wrong with one or what it is instead."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from chunkq.errors import ErrorCode, ModelError
from chunkq.paths import is_url, read_bytes
from chunkq_worker.runtimes.formats import USES, format_of
from chunkq_worker.runtimes.onnx_external import external_files, is_beside
from chunkq_worker.runtimes.onnx_import import onnxruntime

ERROR, FATAL = 3, 4
EXPORT = "; `chunkq export` makes ONNX of such a job's network"
OF_TORCH = frozenset({"torchscript", "exported", "torch_save"})
ELSEWHERE = (
    "keeps weights in another file, which is not there or damaged; put that beside it on a local "
    "disk, or save both as one file"
)
DAMAGED = "is no ONNX file, or a damaged one; export the network again"
REASONS = (
    (
        r"Opset (\d+) is under development.* till opset (\d+)",
        "is of opset {0}, which {here} does not know; install a newer onnxruntime or export it "
        "with opset_version {1} or lower",
    ),
    (
        r"IR version: (\d+), max supported IR version: (\d+)",
        "is of IR version {0}, but {here} knows those up to {1}; install a newer onnxruntime or "
        "save it with model.ir_version = {1}",
    ),
    (
        r"(?:No Op registered for |Fatal error: )([^\s(]+)",
        "uses {0}, an operator that {here} does not have; export the network without it",
    ),
    (
        r"Could not find an implementation for (\S+) node",
        "uses {0} with a dtype that {here} cannot compute; export the network in float32",
    ),
    (
        r"[Ee]xternal (?:data|initializer)",
        ELSEWHERE,
    ),
    (
        r"File doesn't exist|NO_SUCHFILE",
        "is not there",
    ),
    (
        r"INVALID_PROTOBUF|No graph was found",
        DAMAGED,
    ),
)
"""What ONNX Runtime says of a file, and what that means."""
onnxruntime.set_default_logger_severity(ERROR)


def open_session(path: str, threads: int | None, providers: Sequence[Any] = ()) -> Any:
    """Return an onnxruntime.InferenceSession of a local file or a URL, `providers` before the CPU.

    Weights in files beside it are found for a local file only. Raises ModelError in one line.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = FATAL  # what it logs as an error it raises too
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    key = f"model_config.model_file: {path}"
    if os.path.isdir(path):
        raise ModelError(f"{key} {_folder(path)}")
    try:
        source = read_bytes(path) if is_url(path) else path
    except OSError as error:
        raise ModelError(f"{key} cannot be read: {error}") from error
    _expect_weights_beside(source, key)
    try:
        return onnxruntime.InferenceSession(
            source, options, [*providers, "CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        other = _other_format(source if isinstance(source, bytes) else _content(path))
        raise ModelError(f"{key} {other or _reason(error)}") from error


def _expect_weights_beside(source: str | bytes, key: str) -> None:
    """Raise ModelError if weights lie anywhere but in the model's own folder."""
    content = source if isinstance(source, bytes) else _content(source)
    try:
        files = external_files(content)
    except ValueError:
        if content[4:8] == b"ORTM" or _other_format(content) is not None or not content:
            return  # the session reports these
        raise ModelError(f"{key} {DAMAGED}") from None
    if files and isinstance(source, bytes):
        raise ModelError(f"{key} {ELSEWHERE}")
    for location in files:
        if not is_beside(location):
            raise ModelError(
                f"{key} reads weights from {location!r}, outside its folder; save both in one "
                "folder, or as one file",
                code=ErrorCode.MODEL_UNTRUSTED,
            )


def _content(path: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError:
        return b""  # the caller has a complaint of its own


def _folder(path: str) -> str:
    if os.path.exists(os.path.join(path, "saved_model.pb")):
        return "is a SavedModel of TensorFlow; use runtime: tensorflow, type: file and model_file"
    return "is a folder; name the .onnx file in it"


def _other_format(content: bytes) -> str | None:
    """Say what a file is that is something known, but not ONNX."""
    found = format_of(content)
    if found is None or found == "onnx":
        return None
    return f"is {USES[found]}{EXPORT if found in OF_TORCH else ''}"


def _reason(error: Exception) -> str:
    """Put ONNX Runtime's complaint about a file in one line that says what to do."""
    text = " ".join(str(error).split())
    here = f"onnxruntime {onnxruntime.__version__}"
    for pattern, words in REASONS:
        if found := re.search(pattern, text):
            return words.format(*found.groups(), here=here)
    return f"cannot be loaded by {here}: {_short(text)}"


def _short(text: str) -> str:
    """Drop codes and C++ signatures from the front of a message."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    return re.sub(r"^/\S+:\d+ .*\) (?=[A-Z])", "", text)[:300]
