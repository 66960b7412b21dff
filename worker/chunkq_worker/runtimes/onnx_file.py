"""Open ONNX files. Report unusable files in one line, with their actual format."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from chunkq.errors import ErrorCode, ModelError
from chunkq.paths import is_url, read_bytes
from chunkq_worker.runtimes.formats import USES, format_of
from chunkq_worker.runtimes.onnx_external import external_files, is_in_folder
from chunkq_worker.runtimes.onnx_import import onnxruntime

FATAL = 4
EXPORT = "; `chunkq export` converts the network of such a job to ONNX"
TORCH_FORMATS = frozenset({"torchscript", "exported", "torch_save"})
EXTERNAL_WEIGHTS = (
    "keeps weights in another file, which is missing or damaged; put both in one folder on a local "
    "disk, or save both as one file"
)
DAMAGED = "is not an ONNX file, or is damaged; export the network again"
REASONS = (
    (
        r"Opset (\d+) is under development.* till opset (\d+)",
        "uses opset {0}, but {version} supports opsets up to {1}; install a newer onnxruntime or "
        "export it with opset_version {1} or lower",
    ),
    (
        r"IR version: (\d+), max supported IR version: (\d+)",
        "uses IR version {0}, but {version} supports versions up to {1}; install a newer "
        "onnxruntime or save it with model.ir_version = {1}",
    ),
    (
        r"(?:No Op registered for |Fatal error: )([^\s(]+)",
        "uses {0}, an operator that {version} does not support; export the network without it",
    ),
    (
        r"Could not find an implementation for (\S+) node",
        "uses {0} with a dtype that {version} does not support; export the network in float32",
    ),
    (
        r"[Ee]xternal (?:data|initializer)",
        EXTERNAL_WEIGHTS,
    ),
    (
        r"File doesn't exist|NO_SUCHFILE",
        "is missing; fix the path",
    ),
    (
        r"INVALID_PROTOBUF|No graph was found",
        DAMAGED,
    ),
)
"""Pattern of a message of ONNX Runtime -> explanation and advice for the user."""


def open_session(path: str, threads: int | None, providers: Sequence[Any] = ()) -> Any:
    """Open a local file or URL as onnxruntime.InferenceSession, or raise ModelError.

    `providers` have priority over the CPU provider. External weights need a local file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = FATAL  # errors are raised as well
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    key = f"model_config.model_file: {path}"
    if os.path.isdir(path):
        raise ModelError(f"{key} {_explain_folder(path)}")
    try:
        source = read_bytes(path) if is_url(path) else path
    except OSError as error:
        raise ModelError(f"{key} cannot be read: {error}") from error
    _check_external_weights(source, key)
    try:
        return onnxruntime.InferenceSession(
            source, options, [*providers, "CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        other = _other_format(source if isinstance(source, bytes) else _content(path))
        raise ModelError(f"{key} {other or _explain(error)}") from error


def _check_external_weights(source: str | bytes, key: str) -> None:
    """Raise ModelError if the model refers to weights outside its folder."""
    content = source if isinstance(source, bytes) else _content(source)
    try:
        files = external_files(content)
    except ValueError:
        if content[4:8] == b"ORTM" or _other_format(content) is not None or not content:
            return  # opening the session reports these
        raise ModelError(f"{key} {DAMAGED}") from None
    if files and isinstance(source, bytes):
        raise ModelError(f"{key} {EXTERNAL_WEIGHTS}")
    for location in files:
        if not is_in_folder(location):
            raise ModelError(
                f"{key} reads weights from {location!r}, outside its folder; save both in one "
                "folder or as one file",
                code=ErrorCode.MODEL_UNTRUSTED,
            )


def _content(path: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError:
        return b""  # opening the session reports it


def _explain_folder(path: str) -> str:
    if os.path.exists(os.path.join(path, "saved_model.pb")):
        return "is a TensorFlow SavedModel; use runtime: tensorflow, type: file and model_file"
    return "is a folder; set it to the .onnx file inside"


def _other_format(content: bytes) -> str | None:
    """Return a description of the file if it has a known format other than ONNX, else None."""
    name = format_of(content)
    if name is None or name == "onnx":
        return None
    return f"is {USES[name]}{EXPORT if name in TORCH_FORMATS else ''}"


def _explain(error: Exception) -> str:
    """Convert an error of ONNX Runtime to one line with advice."""
    text = " ".join(str(error).split())
    version = f"onnxruntime {onnxruntime.__version__}"
    for pattern, template in REASONS:
        if match := re.search(pattern, text):
            return template.format(*match.groups(), version=version)
    return f"cannot be loaded by {version}: {_without_prefix(text)}"


def _without_prefix(text: str) -> str:
    """Remove error codes and C++ signatures from the start of a message."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    return re.sub(r"^/\S+:\d+ .*\) (?=[A-Z])", "", text)[:300]
