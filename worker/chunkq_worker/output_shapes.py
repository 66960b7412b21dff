"""Find the shapes of what a network returns by running one batch of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import to_numpy
from chunkq.errors import ModelError
from chunkq.job.axis_order import channels_first, input_channels
from chunkq.job.job_file import Job
from chunkq.job.output_shapes import head_names, unknown_heads
from chunkq.job.user_modules import UserModules
from chunkq.plan.outputs import HeadName
from chunkq.plan.volume import Volume
from chunkq_worker.batch_layout import BatchLayout
from chunkq_worker.network_loading import thread_count
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.steps import Steps, after_step
from chunkq_worker.user_errors import source_of

Shapes = dict[HeadName, tuple[int, ...]]
"""Head -> shape of an item, as the network returns it."""


def find_output_shapes(
    job: Job, volume: Volume, network: Any = None, steps: Steps | None = None
) -> Shapes:
    """Return the shapes of the heads that a job does not declare, for one of its volumes.

    Load the network, run one batch of zeros, and release the network. The objects `network` and
    `steps` replace those that the job names, if they are not None. Call it on the device thread.
    Raise ModelError if the network cannot be used, or if a head is missing.
    """
    heads, rank = head_names(job), len(volume.shape)
    channels = input_channels(job.model, volume)
    shapes = ItemShapes.of(job.model, rank, channels, volume.inputs, heads, are_known=False)
    item = BatchLayout.of(channels_first(job.model, rank, channels), volume.inputs).item
    threads = thread_count(job)
    modules = UserModules()
    try:
        with modules.collect():
            loaded = Steps.load(job.model.processing_steps) if steps is None else steps
            used = loaded.for_heads(heads)
            runtime = load_runtime(job.model, used, threads, shapes, network=network)
            with closing(runtime):
                batch = np.zeros((job.model.max_batch_size, *item), volume.dtype)
                outputs = _run(runtime, batch, used, heads)
    finally:
        modules.release()
    unknown = unknown_heads(job)
    return {head: shape for head, shape in zip(heads, outputs, strict=True) if head in unknown}


def _run(
    runtime: Runtime, batch: npt.NDArray[Any], steps: Steps, heads: Sequence[HeadName]
) -> list[tuple[int, ...]]:
    """Return the shape of an item of each head for a batch; halve it if it does not fit."""
    while True:
        try:
            sent: Any = batch if steps.preprocessing is None else steps.preprocessing(batch.copy())
            outputs = list(runtime(np.asarray(sent)))
            if steps.postprocessing is not None:
                arrays = [to_numpy(output) for output in outputs]
                outputs = list(after_step(steps.postprocessing, heads, arrays))
            break
        except ModelError:
            raise
        except Exception as error:
            if runtime.is_out_of_memory(error) and len(batch) > 1:
                batch = batch[: len(batch) // 2]
                continue
            raise ModelError(
                f"{source_of(error)} raised {type(error).__name__} on a batch of zeros of shape "
                f"{list(batch.shape)}, which finds the shapes of the outputs: "
                f"{' '.join(str(error).split())[:300]}; fix it, or set "
                "model_config.model_output_shape"
            ) from error
    for head, output in zip(heads, outputs, strict=True):
        if tuple(output.shape[:1]) != (len(batch),) or output.ndim < 2:
            where = "" if head is None else f" in head {head!r}"
            raise ModelError(
                f"the network returned shape {list(output.shape)}{where} for a batch of "
                f"{list(batch.shape)}; fix the network, which must keep the batch axis of "
                f"{len(batch)} items"
            )
    return [tuple(map(int, output.shape[1:])) for output in outputs]
