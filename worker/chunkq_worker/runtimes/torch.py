"""Networks of PyTorch: a class with a checkpoint, or TorchScript."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from chunkq.combine import Array
from chunkq.errors import JobError, ModelError
from chunkq.job import ModelConfig
from chunkq.paths import read_bytes
from chunkq.userfile import load_names, neighbours, pick
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.steps import Steps

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where training scripts usually put the weights inside a checkpoint."""


class TorchRuntime(Runtime):
    """A torch module in inference mode."""

    def __init__(self, module: Any, model: ModelConfig, steps: Steps, threads: int | None) -> None:
        self.device, self._steps, self._threads = model.device, steps, threads
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._module = module

    @override
    def __call__(self, batch: npt.NDArray[Any]) -> Array:
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # another job of this process has its own
        with torch.inference_mode():
            given = self.place(batch).to(self._dtype)
            if self._steps.preprocessing_protected is not None:
                given = self._steps.preprocessing_protected(given)
            outputs = self._module(given)
            if not isinstance(outputs, torch.Tensor):
                raise ModelError(
                    f"the network returned {type(outputs).__name__}, not one tensor; "
                    "wrap it so that it returns the prediction alone"
                )
            if self._steps.postprocessing_protected is not None:
                outputs = self._steps.postprocessing_protected(outputs)
            return outputs if outputs.dtype == torch.float64 else outputs.float()

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    @override
    def place(self, array: npt.NDArray[Any]) -> Array:
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            # torch knows few operations on wide unsigned integers; the next wider signed one
            # holds the same values. (uint64, which has none, is refused with the job.)
            array = array.astype(np.dtype(f"i{array.dtype.itemsize * 2}"))
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        tensor = torch.from_numpy(array)
        if self.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
            return True
        return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)

    @override
    def close(self) -> None:
        self._module = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


def load(model: ModelConfig, steps: Steps, threads: int | None) -> Runtime:
    """Load the network a job names; raises ModelError in one line."""
    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model_config.device: cuda, but this worker sees no CUDA device; start it on a GPU "
            "node or set device: cpu"
        )
    module = LOADERS[model.type](model)
    return TorchRuntime(module.eval().to(model.device), model, steps, threads)


def _load_torchscript(model: ModelConfig) -> Any:
    path = model.ts_file or ""
    content = _content(path, "ts_file")
    _expect_torchscript(content, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(content), map_location=model.device
            )
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"model_config.ts_file: {path}: {_first_line(error)}") from error


def _load_class(model: ModelConfig) -> Any:
    path, name = model.class_file or "", model.class_name or ""
    try:
        made = pick(load_names(path, "model_config.class_file"), name, path, "class_name")
        kwargs = _kwargs(model.kwargs_file)
    except JobError as error:
        raise ModelError(str(error)) from error
    try:
        with neighbours(path):
            module = made(**kwargs)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"model_config.class_name: {name}(**kwargs) raised {type(error).__name__}: "
            f"{_first_line(error)}; kwargs were {sorted(kwargs)}"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"model_config.class_name: {name} of {path} is no torch.nn.Module")
    if model.checkpoint is not None:
        _load_state(module, model.checkpoint)
    dtype: torch.dtype = getattr(torch, model.dtype)
    return module.to(dtype) if dtype.is_floating_point else module


def _kwargs(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    key = "model_config.kwargs_file"
    kwargs = pick(load_names(path, key), "kwargs", path, key)
    if not isinstance(kwargs, dict):
        raise ModelError(f"{key}: `kwargs` in {path} is no dict")
    return kwargs


def _load_state(module: torch.nn.Module, path: str) -> None:
    key = "model_config.checkpoint"
    content = _content(path, "checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on files that torch did not write
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{key}: {path} holds more than weights ({_first_line(error)}); save it again with "
            "torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # of any kind, where the file is something else
        raise ModelError(
            f"{key}: {path} is no checkpoint ({type(error).__name__}: {_first_line(error)})"
        ) from error
    for nested in STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(nested), dict):
            state = state[nested]
    if not isinstance(state, dict):
        raise ModelError(f"{key}: {path} holds {type(state).__name__}, not a state_dict")
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{key}: {path} does not fit the class: {reason[:400]}") from error


def _content(path: str, key: str) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise ModelError(f"model_config.{key}: {path} cannot be read: {error}") from error


def _expect_torchscript(content: bytes, path: str) -> None:
    """Tell torch's formats apart by what their zip holds, and name the right type."""
    key = f"model_config.ts_file: {path}"
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ModelError(f"{key} is no TorchScript file; write one with torch.jit.script or trace")
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    if any("/data/weights/" in name for name in names):
        raise ModelError(f"{key} is a torch.export file, which is type: exported")
    if not any("/code/" in name for name in names):
        raise ModelError(
            f"{key} was written by torch.save, not torch.jit.save; use type: class with it as "
            "checkpoint, or script the module and save that"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


LOADERS: MappingProxyType[str, Callable[[ModelConfig], Any]] = MappingProxyType(
    {"class": _load_class, "torchscript": _load_torchscript}
)
