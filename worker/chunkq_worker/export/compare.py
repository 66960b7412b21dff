"""Run the network of a torch job on random batches, and compare its outputs with a file's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from chunkq.errors import ErrorCode, ModelError
from chunkq.job.job_file import Job
from chunkq.job.output_shapes import head_names
from chunkq.plan.outputs import HeadName
from chunkq_worker.batch_layout import BatchLayout
from chunkq_worker.runtimes.returned_values import HeadReader
from chunkq_worker.runtimes.torch_files import LOADERS
from chunkq_worker.runtimes.torch_reading import reason
from chunkq_worker.steps import Steps

Arrays = tuple[npt.NDArray[np.float64], ...]
"""One array per head."""


class Network:
    """The network of a torch job on the CPU, with random batches as its input.

    `heads` are those that the job's outputs name; None is the only array that it returns.
    """

    def __init__(self, job: Job) -> None:
        model = job.model.model_copy(update={"device": "cpu"})
        self.model, self.steps = model, Steps.load(model.processing_steps)
        self.module, self.heads = LOADERS[model.type](model).module, head_names(job)
        self._reader = HeadReader(self.heads, torch.is_tensor, "tensor", has_step=False)
        # The inputs of a job over images are one list.
        self._item = BatchLayout.of(model, 1 if job.is_image else len(job.input)).item
        self._random = np.random.default_rng(0)

    def batch(self, size: int) -> torch.Tensor:
        """Return a random batch (size, ...) after the processing steps before the network.

        Raise ModelError if a step fails.
        """
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        values: Any = self._random_values((size, *self._item))
        try:
            if self.steps.preprocessing is not None:
                values = self.steps.preprocessing(values)
            values = torch.from_numpy(np.array(values, order="C")).to(dtype)
            if self.steps.preprocessing_protected is not None:
                values = self.steps.preprocessing_protected(values)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"model_config.processing_steps: raised {type(error).__name__} on random input: "
                f"{reason(error)}"
            ) from error
        return torch.as_tensor(values)

    def _random_values(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if not getattr(torch, self.model.dtype).is_floating_point:
            return np.asarray(self._random.integers(0, 100, shape), self.model.dtype)
        spread = float(self._random.choice([1.0, 255.0]))  # like normalized and raw images
        return (self._random.random(shape) * spread).astype(np.float32)

    def __call__(self, batch: torch.Tensor) -> Arrays:
        """Return what the network's heads return for a batch; raise ModelError if it fails."""
        try:
            with torch.inference_mode():
                outputs = self.module(batch.clone())
        except Exception as error:
            raise ModelError(
                f"the network raised {type(error).__name__} on a batch of {list(batch.shape)}: "
                f"{reason(error)}"
            ) from error
        return tuple(tensor.double().numpy() for tensor in self._reader.arrays(outputs))


def difference(
    file: Path,
    heads: Sequence[HeadName],
    expected: Sequence[Arrays],
    actual: Sequence[Arrays],
    allowed: float,
) -> tuple[float, float]:
    """Return the largest absolute and the largest relative difference over all batches and heads.

    A relative difference is divided by the range of its batch's `expected` values of the head.
    Raise ModelError if the largest one exceeds `allowed`, or if shapes or non-finite values differ.
    """
    deviations = []
    for number, head in enumerate(heads):
        first, second = ([arrays[number] for arrays in batch] for batch in (expected, actual))
        deviations.append(_difference(file, head, first, second, allowed))
    return max(largest for largest, _ in deviations), max(relative for _, relative in deviations)


def _difference(
    file: Path,
    head: HeadName,
    expected: Sequence[npt.NDArray[np.float64]],
    actual: Sequence[npt.NDArray[np.float64]],
    allowed: float,
) -> tuple[float, float]:
    where = "" if head is None else f" in head {head!r}"
    largest_deviation = relative = 0.0
    worst_batch = 0
    for reference, output in zip(expected, actual, strict=True):
        if reference.shape != output.shape:
            raise ModelError(
                f"{file} returned shape {list(output.shape)}{where}, expected "
                f"{list(reference.shape)} as from the network",
                code=ErrorCode.EXPORT_DIFFERS,
            )
        finite = np.isfinite(reference)
        if not finite.any():
            raise ModelError(f"the network returned no finite value{where} for random input")
        if not np.array_equal(finite, np.isfinite(output)):
            raise ModelError(
                f"{file} returned NaN or infinity{where} where the network does not",
                code=ErrorCode.EXPORT_DIFFERS,
            )
        values = reference[finite]
        deviation = float(np.abs(values - output[finite]).max())
        fraction = deviation / (float(np.ptp(values)) or float(np.abs(values).max()) or 1.0)
        largest_deviation = max(largest_deviation, deviation)
        if fraction > relative:
            relative, worst_batch = fraction, len(reference)
    if relative > allowed:
        raise ModelError(
            f"{file} differs from the network{where} by up to {largest_deviation:.2g}: "
            f"{relative:.1g} of the range of its outputs in a batch of {worst_batch}, expected at "
            f"most {allowed:.1g}; a network with state or random numbers cannot be exported",
            code=ErrorCode.EXPORT_DIFFERS,
        )
    return largest_deviation, relative
