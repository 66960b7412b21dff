"""Input of the first batch norm of a torch network, compared with that of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from chunkq_worker.value_watch import NormInput, ValueWatch


@contextmanager
def norm_input_watched(module: torch.nn.Module, watch: ValueWatch) -> Iterator[None]:
    """Measure the input of the first trained batch norm inside a `with` block.

    The first one is the one that runs first. Layers of TorchScript and of exported programs call no
    hooks, so nothing is measured there.
    """

    def measure(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if watch.norm_input is None:
            watch.norm_input = _norm_input(names[layer], layer, inputs[0])

    names = {layer: name for name, layer in module.named_modules() if _is_trained_norm(layer)}
    handles = [layer.register_forward_pre_hook(measure) for layer in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_trained_norm(layer: Any) -> bool:
    """Return whether a layer has statistics of a training, in which it has seen batches."""
    if isinstance(layer, torch.jit.ScriptModule) or not isinstance(
        layer, torch.nn.modules.batchnorm._BatchNorm
    ):
        return False
    return layer.running_mean is not None and bool(layer.num_batches_tracked)


def _norm_input(name: str, layer: Any, values: torch.Tensor) -> NormInput:
    """Compare values (N, C, ...) with the statistics (C,) of a layer."""
    channels = values.detach().float().transpose(0, 1).flatten(1)
    deviation = (layer.running_var.float() + layer.eps).sqrt()
    shift = (channels.mean(1) - layer.running_mean.float()).abs() / deviation
    spread = channels.std(1) / deviation
    return NormInput(name, float(shift.median()), float(spread.median()))
