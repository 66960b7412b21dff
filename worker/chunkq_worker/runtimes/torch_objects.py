"""PyTorch networks that a caller passes as objects, which stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.model_config import ModelConfig


class ObjectModule:
    """The caller's module, or a copy where the device, dtype or memory format has to change.

    The caller's module keeps its device, its dtype and its mode; only its `training` flags are
    false while a batch runs. `module` is the module to run.

    Raise ModelError for a module whose weights the first batch would create, and for one that
    cannot be copied.
    """

    def __init__(self, network: Any, model: ModelConfig) -> None:
        self._original = original = _as_module(network)
        self._key = f"model: {model.class_name}"
        if any(torch.nn.parameter.is_lazy(weight) for weight in original.parameters()):
            raise ModelError(
                f"{self._key} has lazy layers without weights, and the first batch would create "
                "random ones; call it on one batch and load its weights first",
                code=ErrorCode.MODEL_RANDOM,
            )
        self.module = original
        if _has_to_change(original, model):
            self.module = self._copied(model)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Run the module in evaluation mode, without gradients, inside a `with` block."""
        # Tensors that a module keeps in inference mode cannot be used in training afterwards.
        with torch.no_grad(), _evaluation_mode(self.module):
            yield

    def refresh(self) -> None:
        """Copy the present weights of the caller's module if another module runs."""
        if self.module is self._original:
            return
        present = _tensors(self._original)
        with torch.no_grad():
            for name, tensor in _tensors(self.module).items():
                if name not in present or present[name].shape != tensor.shape:
                    raise ModelError(
                        f"{self._key} has other weights than when it was loaded ({name}); create a "
                        "new predictor"
                    )
                tensor.copy_(present[name])

    def _copied(self, model: ModelConfig) -> torch.nn.Module:
        dtype: torch.dtype = getattr(torch, model.dtype)
        try:
            module = copy.deepcopy(self._original).to(model.device)
        except Exception as error:  # of any class: attributes of the module define their copying
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{self._key} cannot be copied to device {model.device}, dtype {model.dtype}: "
                f"{reason}; convert it before, and set device and dtype to its own"
            ) from error
        return module.to(dtype) if _uniform_dtype(module) is not None else module


class _FunctionModule(torch.nn.Module):
    """A function of a batch of tensors as a module."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self._function = [function]  # a list, so that a module is not registered as a part

    @override
    def forward(self, batch: torch.Tensor) -> Any:
        """Call the function."""
        return self._function[0](batch)


def module_defaults(network: Any) -> dict[str, Any]:
    """Return the keys `device` and `dtype` of `model_config` that match a module's weights."""
    if not isinstance(network, torch.nn.Module):
        return {}
    defaults: dict[str, Any] = {}
    if any(tensor.device.type == "cuda" for tensor in _tensors(network).values()):
        defaults["device"] = "cuda"
    if (dtype := _uniform_dtype(network)) is not None:
        defaults["dtype"] = str(dtype).removeprefix("torch.")
    return defaults


def weights_of(network: Any) -> Iterator[tuple[str, bytes]]:
    """Yield the names and bytes of the weights of a module."""
    if isinstance(network, torch.nn.Module):
        for name, tensor in _tensors(network).items():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield name, flat.view(torch.uint8).numpy().tobytes()


def _as_module(network: Any) -> torch.nn.Module:
    return network if isinstance(network, torch.nn.Module) else _FunctionModule(network)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _uniform_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """Return the dtype of all floating-point weights; None if there are none or several dtypes."""
    dtypes = {weight.dtype for weight in module.parameters() if weight.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _has_to_change(module: torch.nn.Module, model: ModelConfig) -> bool:
    tensors = _tensors(module).values()
    if model.channels_last or any(not _is_on(tensor, model.device) for tensor in tensors):
        return True
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype.is_floating_point and _uniform_dtype(module) not in (None, dtype)


def _is_on(tensor: torch.Tensor, device: str) -> bool:
    """Return whether a tensor is in the memory in which a runtime computes."""
    if tensor.device.type != device:
        return False
    return device != "cuda" or tensor.device.index in (None, torch.cuda.current_device())


@contextmanager
def _evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode inside a `with` block, then restore the mode of each part."""
    parts = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    if not any(training for _, training in parts):
        yield
        return
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)  # a module can do more here than set the flags
        for part, training in parts:
            if part.training != training:
                part.training = training
