"""Networks of PyTorch out of the files that a job names: four types, one loader each."""

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
from chunkq.job import ModelConfig
from chunkq.paths import read_bytes
from chunkq.user_code import sibling_imports
from chunkq_worker.runtimes import exported_program, torchscript_code
from chunkq_worker.runtimes.classes import create_network
from chunkq_worker.runtimes.formats import USES, format_of
from chunkq_worker.runtimes.torch_exported import Limits
from chunkq_worker.runtimes.triton_import import hide_triton_after_tensorflow
from chunkq_worker.runtimes.untrusted import untrusted

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where training scripts usually put the weights, or the network, inside a checkpoint."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before the names of all weights."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network, and what its file says it takes; None where the file does not say."""

    module: Any
    limits: Limits | None = None


def load_class(model: ModelConfig) -> LoadedNetwork:
    """Make the user's class and give it the weights of its checkpoint."""
    module = create_network(model)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"model_config.class_name: {model.class_name} of {model.class_file} is no "
            "torch.nn.Module"
        )
    if model.checkpoint is not None:
        _load_state(module, model.checkpoint)
    return LoadedNetwork(_prepared(module, model))


def _load_state(module: torch.nn.Module, path: str) -> None:
    key = f"model_config.checkpoint: {path}"
    content = _content(path, "checkpoint")
    _expect("torch_save", content, key, "no checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on files that torch did not write
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, where the file is something else
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ModelError(
                f"{key} {_more_than_weights(error, path)}", code=ErrorCode.MODEL_UNTRUSTED
            ) from error
        raise ModelError(
            f"{key} is no checkpoint ({type(error).__name__}: {reason(error)})"
        ) from error
    state = _unwrapped(state, dict)
    if not isinstance(state, dict):
        raise ModelError(f"{key} holds {type(state).__name__}, not a state_dict")
    own = module.state_dict().keys()
    try:
        module.load_state_dict({_own_name(str(name), own): v for name, v in state.items()})
    except (RuntimeError, TypeError) as error:
        told = " ".join(str(error).split())
        raise ModelError(f"{key} does not fit the class: {told[:400]}") from error


def _own_name(name: str, own: Any) -> str:
    """Take wrappers' prefixes off a weight's name, unless the network has one so called."""
    for prefix in WRAPPERS:
        if name not in own:
            name = name.removeprefix(prefix)
    return name


def _more_than_weights(error: Exception, path: str) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"holds more than weights ({found[1] if found else reason(error)}), which can run any code "
        "when it is unpickled; if you trust it, take the weights out once, torch.save(torch.load("
        f"{path!r}, weights_only=False)['state_dict'], 'weights.pt'), or, if it is a whole "
        "network, use type: file with it as model_file and trusted: true"
    )


def _unwrapped(found: Any, kind: type) -> Any:
    """Return what a checkpoint keeps under one of the usual keys, if that is of the kind."""
    for nested in STATE_KEYS:
        if isinstance(found, dict) and isinstance(found.get(nested), kind):
            found = found[nested]
    return found


def load_file(model: ModelConfig) -> LoadedNetwork:
    """Unpickle a whole module, if the job says that its file may be trusted."""
    path = model.model_file or ""
    key = f"model_config.model_file: {path}"
    content = _content(path, "model_file")
    _expect("torch_save", content, key, "no file of torch.save")
    if not model.trusted:
        raise untrusted(
            path,
            "is unpickled, which can run any code that someone put into it",
            "convert it there: torch.jit.script(network).save(path) for type: torchscript, or "
            "torch.save(network.state_dict(), path) as the checkpoint of type: class",
        )
    try:
        with sibling_imports(path), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on classes that changed since
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{key} was pickled with a class that is not here ({reason(error)}); put the file "
            "that it was imported from beside it, or use type: class"
        ) from error
    except Exception as error:  # of any kind, where the file is something else
        raise ModelError(
            f"{key} cannot be unpickled ({type(error).__name__}: {reason(error)})"
        ) from error
    module = _unwrapped(found, torch.nn.Module)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{key} holds {type(found).__name__}, not a network; if these are weights, use type: "
            "class with class_file, class_name and it as checkpoint"
        )
    return LoadedNetwork(_prepared(module, model))


def _prepared(module: torch.nn.Module, model: ModelConfig) -> torch.nn.Module:
    """Return the module in inference mode, on the device, its weights in the job's dtype."""
    dtype: torch.dtype = getattr(torch, model.dtype)
    module = module.eval().to(model.device)
    return module.to(dtype) if dtype.is_floating_point else module


def load_torchscript(model: ModelConfig) -> LoadedNetwork:
    """Load a scripted or traced module; its weights stay in the dtype they were saved in."""
    path = model.ts_file or ""
    key = f"model_config.ts_file: {path}"
    content = _content(path, "ts_file")
    if format_of(content) == "torch_save":
        raise ModelError(
            f"{key} was written by torch.save, not torch.jit.save; use type: class with it as "
            "checkpoint, or, if it holds the whole network, type: file with it as model_file and "
            "trusted: true, or script the network and save that"
        )
    _expect("torchscript", content, key, "no TorchScript file")
    try:
        if not model.trusted and (part := torchscript_code.unsafe_part(content)) is not None:
            raise untrusted(path, part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(content), map_location=model.device
            )
    except (RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ModelError(f"{key}: {reason(error)}") from error
    # A frozen module has no such mode.
    return LoadedNetwork(module.eval() if hasattr(module, "training") else module)


def load_exported(model: ModelConfig) -> LoadedNetwork:
    """Load a program of torch.export; its dtype, and often its batch size, is in the file."""
    path = model.model_file or ""
    key = f"model_config.model_file: {path}"
    content = _content(path, "model_file")
    _expect("exported", content, key, "no torch.export file")
    try:
        if not model.trusted and (part := exported_program.unsafe_part(content)) is not None:
            raise untrusted(path, part)
        hide_triton_after_tensorflow()  # torch.export imports it
        with _quiet("torch.export"), _quiet("torch._export"):
            program = torch.export.load(io.BytesIO(content))
            if model.device != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, model.device)
            module = program.module()
    except ModelError:
        raise
    except Exception as error:  # of any kind, where the file is damaged
        raise ModelError(
            f"{key} cannot be loaded by torch {torch.__version__} ({type(error).__name__}: "
            f"{reason(error)}); export the network again"
        ) from error
    return LoadedNetwork(module, Limits.of(program, path))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger from telling what is raised as well."""
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


def _expect(form: str, content: bytes, key: str, otherwise: str) -> None:
    """Raise ModelError, naming what to use, unless the content may be of the form."""
    found = format_of(content)
    if found == form:
        return
    if found is not None:
        raise ModelError(f"{key} is {USES[found]}")
    if form != "torch_save":  # which had other forms once
        raise ModelError(f"{key} is {otherwise}; {SAVE[form]}")
    if not content:
        raise ModelError(f"{key} is {otherwise}: it is empty")


SAVE = MappingProxyType(
    {
        "torchscript": "write one with torch.jit.script or trace",
        "exported": "write one with torch.export.export and torch.export.save",
    }
)


def reason(error: BaseException) -> str:
    """Return the line of a message that says most: TorchScript's last, else the first."""
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
"""Type -> loader; each raises ModelError in one line."""
