"""Random batches for the network of a torch job, and how far two runs of them are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from chunkq.errors import ModelError
from chunkq.job import Job
from chunkq_worker.runtimes.base import not_one_array
from chunkq_worker.runtimes.torch_files import LOADERS, reason
from chunkq_worker.steps import Steps


class Network:
    """The network of a torch job on the CPU, and batches as it is given them."""

    def __init__(self, job: Job) -> None:
        model = job.model.model_copy(update={"device": "cpu"})
        self.model, self.steps = model, Steps.load(model.processing_steps)
        self.module = LOADERS[model.type](model).module
        self._item = list(model.model_input_shape)
        if model.join_dim is not None:
            self._item[model.join_dim - 1] = len(job.input)
        self._random = np.random.default_rng(0)

    def batch(self, size: int) -> torch.Tensor:
        """Return a random batch (size, ...) as the network sees it: after the steps before it."""
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        given: Any = self._values((size, *self._item))
        try:
            if self.steps.preprocessing is not None:
                given = self.steps.preprocessing(given)
            given = torch.from_numpy(np.array(given, order="C")).to(dtype)
            if self.steps.preprocessing_protected is not None:
                given = self.steps.preprocessing_protected(given)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"model_config.processing_steps: raised {type(error).__name__} on random input: "
                f"{reason(error)}"
            ) from error
        return torch.as_tensor(given)

    def _values(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if not getattr(torch, self.model.dtype).is_floating_point:
            return np.asarray(self._random.integers(0, 100, shape), self.model.dtype)
        spread = float(self._random.choice([1.0, 255.0]))  # as normalised images and as raw ones
        return (self._random.random(shape) * spread).astype(np.float32)

    def __call__(self, batch: torch.Tensor) -> npt.NDArray[np.float64]:
        """Return the network's own output for a batch."""
        try:
            with torch.inference_mode():
                outputs = self.module(batch.clone())
        except Exception as error:
            raise ModelError(
                f"the network raised {type(error).__name__} on a batch of {list(batch.shape)}: "
                f"{reason(error)}"
            ) from error
        if not isinstance(outputs, torch.Tensor):
            raise not_one_array(outputs, "tensor")
        values: npt.NDArray[np.float64] = outputs.double().numpy()
        return values


def difference(
    file: Path,
    expected: Sequence[npt.NDArray[np.float64]],
    found: Sequence[npt.NDArray[np.float64]],
    allowed: float,
) -> tuple[float, float]:
    """Return the largest difference and the largest relative one; ModelError if it is too large."""
    largest = relative = 0.0
    worst = 0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            raise ModelError(f"{file} gives {list(other.shape)}, the network {list(one.shape)}")
        finite = np.isfinite(one)
        if not finite.any():
            raise ModelError("the network gives no finite number for random input to compare")
        if not np.array_equal(finite, np.isfinite(other)):
            raise ModelError(f"{file} gives NaN or infinity where the network does not")
        values = one[finite]
        furthest = float(np.abs(values - other[finite]).max())
        share = furthest / (float(np.ptp(values)) or float(np.abs(values).max()) or 1.0)
        largest = max(largest, furthest)
        if share > relative:
            relative, worst = share, len(one)
    if relative > allowed:
        raise ModelError(
            f"{file} would differ from the network by up to {largest:.2g}, {relative:.1g} of the "
            f"range of its outputs, in a batch of {worst}, where {allowed:.1g} is let through; a "
            "network with a state or with random numbers cannot be exported"
        )
    return largest, relative
