"""Load PyTorch networks from the files that a job names: one loader per type."""

from __future__ import annotations

import io
import logging
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.job.user_code import sibling_imports
from chunkq.paths import read_bytes
from chunkq_worker.created_values import file_values, values_of
from chunkq_worker.runtimes import exported_program, torchscript_code
from chunkq_worker.runtimes.classes import create_network
from chunkq_worker.runtimes.formats import USES, format_of
from chunkq_worker.runtimes.torch_exported import Limits
from chunkq_worker.runtimes.triton_import import hide_triton_after_tensorflow
from chunkq_worker.runtimes.untrusted import untrusted

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Usual keys of the weights, or of the network, in the checkpoints of training scripts."""
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile add to the names of all weights."""

REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module that hold what it has registered."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and the batches it accepts; `limits` is None if the file does not declare them.

    `saved` has the names of the values that a file contains, None if it contains all of them.
    """

    module: Any
    limits: Limits | None = None
    saved: frozenset[str] | None = None


def load_class(model: ModelConfig) -> LoadedNetwork:
    """Create an instance of the user's class and load its checkpoint."""
    module, saved = _created(model), frozenset[str]()
    if model.checkpoint is not None:
        _load_state(module, model.checkpoint)
        saved = frozenset(module.state_dict())
    return LoadedNetwork(_prepared(module, model), saved=saved)


def created_values(module: torch.nn.Module, saved: frozenset[str]) -> list[tuple[str, Any]]:
    """Return parameters, buffers and other tensors of a module that are not among `saved`.

    Floats are added if there are any. The value is None for a parameter that the first batch sets.
    """
    values: list[tuple[str, Any]] = [
        (name, None if torch.nn.parameter.is_lazy(value) else value)
        for values in (module.named_parameters(), module.named_buffers())
        for name, value in values
        if name not in saved
    ]
    for prefix, part in module.named_modules():
        attributes = {k: v for k, v in vars(part).items() if k not in REGISTERED}
        values += values_of(attributes, prefix)
    values += file_values(getattr(type(module), "forward", None))
    return values if any(not isinstance(value, float) for _, value in values) else []


def recreated_values(model: ModelConfig, saved: frozenset[str]) -> list[tuple[str, Any]]:
    """Create an instance of the user's class again; return its `created_values`."""
    module = _created(model)
    return created_values(_in_dtype(module, model), saved)


def _created(model: ModelConfig) -> torch.nn.Module:
    module = create_network(model)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"model_config.class_name: {model.class_name} of {model.class_file} is a "
            f"{type(module).__name__}; expected a torch.nn.Module"
        )
    return module


def _load_state(module: torch.nn.Module, path: str) -> None:
    key = f"model_config.checkpoint: {path}"
    content = _content(path, "checkpoint")
    _check_format("torch_save", content, key, "not a checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # for files that torch did not write
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any class if the file has another format
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ModelError(
                f"{key} {_more_than_weights(error, path)}", code=ErrorCode.MODEL_UNTRUSTED
            ) from error
        raise ModelError(
            f"{key} is not a checkpoint ({type(error).__name__}: {reason(error)}); save one with "
            "torch.save(network.state_dict(), path)"
        ) from error
    state = _unwrap(state, dict)
    if not isinstance(state, dict):
        raise ModelError(
            f"{key} contains {type(state).__name__}, expected a state_dict; save one with "
            "torch.save(network.state_dict(), path)"
        )
    names = module.state_dict().keys()
    try:
        module.load_state_dict({_without_wrappers(str(k), names): v for k, v in state.items()})
    except (RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())
        raise ModelError(f"{key} does not fit the class: {message[:400]}") from error


def _without_wrappers(name: str, network_names: Any) -> str:
    """Remove prefixes of wrappers from the name of a weight unless the network has that name."""
    for prefix in WRAPPER_PREFIXES:
        if name not in network_names:
            name = name.removeprefix(prefix)
    return name


def _more_than_weights(error: Exception, path: str) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"contains more than weights ({match[1] if match else reason(error)}), which can run code "
        "when it is unpickled; if you trust it, save the weights alone, torch.save(torch.load("
        f"{path!r}, weights_only=False)['state_dict'], 'weights.pt'), or, if it is a whole "
        "network, use type: file with it as model_file and trusted: true"
    )


def _unwrap(content: Any, kind: type) -> Any:
    """Return the object of the class `kind` under one of STATE_KEYS, else the content itself."""
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), kind):
            content = content[key]
    return content


def load_file(model: ModelConfig) -> LoadedNetwork:
    """Unpickle a whole module. Raise ModelError unless the job sets `trusted: true`."""
    path = model.model_file or ""
    key = f"model_config.model_file: {path}"
    content = _content(path, "model_file")
    _check_format("torch_save", content, key, "not a torch.save file")
    if not model.trusted:
        raise untrusted(
            path,
            "is a pickle, which can run any code when it is loaded",
            "convert it: torch.jit.script(network).save(path) for type: torchscript, or "
            "torch.save(network.state_dict(), path) as the checkpoint of type: class",
        )
    try:
        with sibling_imports(path), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # for classes that changed since
            pickled = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{key} was pickled with a class that cannot be imported ({reason(error)}); put the "
            "file that defines it in the same folder, or use type: class"
        ) from error
    except Exception as error:  # of any class if the file has another format
        raise ModelError(
            f"{key} cannot be unpickled ({type(error).__name__}: {reason(error)}); save it again "
            "with torch.save"
        ) from error
    module = _unwrap(pickled, torch.nn.Module)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{key} contains {type(pickled).__name__}, expected a torch.nn.Module; if these are "
            "weights, use type: class with class_file, class_name and it as checkpoint"
        )
    return LoadedNetwork(_prepared(module, model))


def _prepared(module: torch.nn.Module, model: ModelConfig) -> torch.nn.Module:
    """Return the module in inference mode, on the device, with weights in the job's dtype."""
    return _in_dtype(module.eval().to(model.device), model)


def _in_dtype(module: torch.nn.Module, model: ModelConfig) -> torch.nn.Module:
    dtype: torch.dtype = getattr(torch, model.dtype)
    return module.to(dtype) if dtype.is_floating_point else module


def load_torchscript(model: ModelConfig) -> LoadedNetwork:
    """Load a scripted or traced module. Its weights keep the dtype in which they were saved."""
    path = model.ts_file or ""
    key = f"model_config.ts_file: {path}"
    content = _content(path, "ts_file")
    if format_of(content) == "torch_save":
        raise ModelError(
            f"{key} was written by torch.save, not torch.jit.save; use type: class with it as "
            "checkpoint, or, if it contains the whole network, type: file with it as model_file "
            "and trusted: true, or save it again with torch.jit.script(network).save(path)"
        )
    _check_format("torchscript", content, key, "not a TorchScript file")
    try:
        if not model.trusted and (part := torchscript_code.unsafe_part(content)) is not None:
            raise untrusted(path, part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(content), map_location=model.device
            )
    except (RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ModelError(
            f"{key} cannot be loaded by torch {torch.__version__} ({reason(error)}); save it again"
        ) from error
    # A frozen module has no training mode.
    return LoadedNetwork(module.eval() if hasattr(module, "training") else module)


def load_exported(model: ModelConfig) -> LoadedNetwork:
    """Load a torch.export program. The file fixes its dtype and often its batch size."""
    path = model.model_file or ""
    key = f"model_config.model_file: {path}"
    content = _content(path, "model_file")
    _check_format("exported", content, key, "not a torch.export file")
    try:
        if not model.trusted and (part := exported_program.unsafe_part(content)) is not None:
            raise untrusted(path, part)
        hide_triton_after_tensorflow()  # torch.export imports triton
        with _suppressed_log("torch.export"), _suppressed_log("torch._export"):
            program = torch.export.load(io.BytesIO(content))
            if model.device != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, model.device)
            module = program.module()
    except ModelError:
        raise
    except Exception as error:  # of any class if the file is damaged
        raise ModelError(
            f"{key} cannot be loaded by torch {torch.__version__} ({type(error).__name__}: "
            f"{reason(error)}); export the network again"
        ) from error
    return LoadedNetwork(module, Limits.from_program(program, path))


@contextmanager
def _suppressed_log(name: str) -> Iterator[None]:
    """Suppress a logger inside a `with` block; the logged errors are also raised."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _content(path: str, key: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise ModelError(f"model_config.{key}: {path} cannot be read: {error}") from error


def _check_format(expected: str, content: bytes, key: str, problem: str) -> None:
    """Raise ModelError if the content has another format than `expected`.

    An unknown format is accepted as `torch_save` unless the content is empty.
    """
    detected = format_of(content)
    if detected == expected:
        return
    if detected is not None:
        raise ModelError(f"{key} is {USES[detected]}")
    if expected != "torch_save":  # old releases wrote other formats
        raise ModelError(f"{key} is {problem}; {SAVE_ADVICE[expected]}")
    if not content:
        raise ModelError(f"{key} is {problem}: the file is empty; save it again with torch.save")


SAVE_ADVICE = MappingProxyType(
    {
        "torchscript": "create one with torch.jit.script or torch.jit.trace",
        "exported": "create one with torch.export.export and torch.export.save",
    }
)


def reason(error: BaseException) -> str:
    """Return the most informative line of a message: TorchScript's last, otherwise the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0][:300]


LOADERS: MappingProxyType[str, Callable[[ModelConfig], LoadedNetwork]] = MappingProxyType(
    {
        "class": load_class,
        "file": load_file,
        "torchscript": load_torchscript,
        "exported": load_exported,
    }
)
"""Type -> loader. Loaders raise ModelError."""
