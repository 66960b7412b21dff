"""Load PyTorch networks from the files that a job names: one loader per type."""

from __future__ import annotations

import io
import logging
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from chunkq.errors import ModelError
from chunkq.job.model_config import ModelConfig
from chunkq.job.user_code import sibling_imports
from chunkq_worker.created_values import file_values, values_of
from chunkq_worker.runtimes import exported_program, torchscript_code
from chunkq_worker.runtimes.classes import create_network, source_of
from chunkq_worker.runtimes.formats import format_of
from chunkq_worker.runtimes.torch_checkpoint import read_checkpoint
from chunkq_worker.runtimes.torch_exported import Limits
from chunkq_worker.runtimes.torch_reading import check_format, content_of, reason
from chunkq_worker.runtimes.torch_weights import (
    STATE_KEYS,
    AmbiguousWeightsError,
    NetworkNames,
    assemble_parts,
    describe_misfit,
    nearest_state,
    select_weights,
)
from chunkq_worker.runtimes.triton_import import hide_triton_after_tensorflow
from chunkq_worker.runtimes.untrusted import untrusted

REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module that hold what it has registered."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and the batches it accepts; `limits` is None if the file does not declare them.

    `saved` has the names of the values that a file contains, None if it contains all of them.
    `notes` say which part of a file was used.
    """

    module: Any
    limits: Limits | None = None
    saved: frozenset[str] | None = None
    notes: tuple[str, ...] = ()


def load_class(model: ModelConfig) -> LoadedNetwork:
    """Create an instance of the user's class and load its checkpoint."""
    module, saved, note = _created(model), frozenset[str](), ""
    if model.checkpoint is not None:
        note = _load_state(module, model.checkpoint)
        saved = frozenset(module.state_dict())
    notes = (note,) if note else ()
    return LoadedNetwork(_prepared(module, model), saved=saved, notes=notes)


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
            f"{source_of(model)} is a {type(module).__name__}; expected a torch.nn.Module"
        )
    return module


def _load_state(module: torch.nn.Module, path: str) -> str:
    """Load the weights of a checkpoint. Return a line about the part that was used, or ''."""
    key = f"model_config.checkpoint: {path}"
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise ModelError(
            f"{key} contains {type(content).__name__}, expected a state_dict; save one with "
            "torch.save(network.state_dict(), path)"
        )
    names = NetworkNames.of(module)
    try:
        fit = select_weights(content, names)
    except AmbiguousWeightsError as error:
        raise ModelError(
            f"{key} has several weights that fit the class: {error}; save those to use alone"
        ) from error
    note = "" if fit is None else fit.describe()
    if fit is not None:
        state = dict(fit.state)
    elif (assembled := assemble_parts(content, names)) is not None:
        state, note = assembled
    else:  # hooks of the network may nevertheless convert older names
        state = nearest_state(content, names)
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        problem = describe_misfit(content, state, names.shapes) or " ".join(str(error).split())
        advice = "use the checkpoint of this class, or set its arguments in kwargs_file"
        raise ModelError(f"{key} does not fit the class: {problem[:400]}; {advice}") from error
    return note and f"{key}: {note}"


def _unwrap(content: Any) -> Any:
    """Return the module under one of STATE_KEYS, else the content itself."""
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), torch.nn.Module):
            content = content[key]
    return content


def load_file(model: ModelConfig) -> LoadedNetwork:
    """Unpickle a whole module. Raise ModelError unless the job sets `trusted: true`."""
    path = model.model_file or ""
    key = f"model_config.model_file: {path}"
    content = content_of(path, "model_file")
    check_format("torch_save", content, key, "not a torch.save file")
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
    module = _unwrap(pickled)
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
    content = content_of(path, "ts_file")
    if format_of(content) == "torch_save":
        raise ModelError(
            f"{key} was written by torch.save, not torch.jit.save; use type: class with it as "
            "checkpoint, or, if it contains the whole network, type: file with it as model_file "
            "and trusted: true, or save it again with torch.jit.script(network).save(path)"
        )
    check_format("torchscript", content, key, "not a TorchScript file")
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
    content = content_of(path, "model_file")
    check_format("exported", content, key, "not a torch.export file")
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


LOADERS: MappingProxyType[str, Callable[[ModelConfig], LoadedNetwork]] = MappingProxyType(
    {
        "class": load_class,
        "file": load_file,
        "torchscript": load_torchscript,
        "exported": load_exported,
    }
)
"""Type -> loader. Loaders raise ModelError."""
