"""Open ONNX files. Report unusable files in one line, with their actual format."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.allowed_paths import OPTION, AllowedPaths
from chunkq.job.onnx_external import external_files, is_in_folder
from chunkq.paths import is_url, read_bytes
from chunkq_worker.runtimes.formats import format_of
from chunkq_worker.runtimes.onnx_import import onnxruntime
from chunkq_worker.runtimes.stand_ins import describe, first_stand_in

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
        r"escapes model directory|outside model directory",
        "keeps weights behind a link out of its folder, which {version} does not follow; copy the "
        "file into the folder, or install a newer onnxruntime",
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
    locations = _external_weights(source, key)
    with contextlib.ExitStack() as stack:
        if isinstance(source, str):
            _add_linked_files(options, source, locations, key, stack)
        return _session(source, path, options, providers, key)


def _session(
    source: str | bytes, path: str, options: Any, providers: Sequence[Any], key: str
) -> Any:
    try:
        return onnxruntime.InferenceSession(
            source, options, [*providers, "CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        other = _other_format(source if isinstance(source, bytes) else _content(path))
        raise ModelError(f"{key} {other or _explain(error)}") from error


def _add_linked_files(
    options: Any, model: str, locations: Sequence[str], key: str, stack: contextlib.ExitStack
) -> None:
    """Let a session read weights behind links out of the model's folder, which it refuses itself.

    The files are mapped into memory until the stack is closed. Raise ModelError if a file cannot be
    used.
    """
    folder = os.path.dirname(model)
    linked = {}
    for location in locations:
        path = os.path.join(folder, location)
        target = os.path.realpath(path)
        is_inside = target.startswith(os.path.realpath(folder) + os.sep)
        subject = f"{key} keeps weights in another file, {location}"
        if os.path.islink(path):
            subject += f", a link to {target}"
        if not os.path.isfile(path):
            raise ModelError(f"{subject}, which is missing; copy it there, or save one file")
        if (problem := first_stand_in([path])) is not None:
            raise ModelError(f"{subject}, but {problem}")
        if not is_inside:
            _check_allowed(path, subject)
            linked[location] = path
    add_files = getattr(options, "add_external_initializers_from_files_in_memory", None)
    if not linked or add_files is None:  # releases without this method follow links
        return
    maps = [stack.enter_context(_mapped(path)) for path in linked.values()]
    add_files(list(linked), maps, [len(content) for content in maps])


def _check_allowed(path: str, subject: str) -> None:
    """Raise ModelError if this worker may not load the target of a link."""
    allowed = AllowedPaths.from_environment()
    if allowed is not None and allowed.locate(path) is None:
        raise ModelError(
            f"{subject}, outside the paths from which this worker loads files; copy it there, or "
            f"use {OPTION} with its folder too",
            code=ErrorCode.PATH_NOT_ALLOWED,
        )


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            yield b""  # an empty file cannot be mapped
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def _external_weights(source: str | bytes, key: str) -> list[str]:
    """Return the locations of weights in other files, relative to the model's folder.

    Raise ModelError for one outside the folder.
    """
    content = source if isinstance(source, bytes) else _content(source)
    try:
        files = external_files(content)
    except ValueError:
        if content[4:8] == b"ORTM" or _other_format(content) is not None or not content:
            return []  # opening the session reports these
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
    return files


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
    """Return a description of a file that is recognized as no ONNX file, else None."""
    name = format_of(content)
    if name == "onnx" or (description := describe(content)) is None:
        return None
    return f"is {description}{EXPORT if name in TORCH_FORMATS else ''}"


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
