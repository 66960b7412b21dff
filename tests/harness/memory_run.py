"""A job in memory: chunks, pieces and finalizing with a function in place of the network."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import activate, to_votes
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Accumulator, Contribution, finalize_sums
from chunkq.blend.weights import Weights
from chunkq.geometry.box import Box
from chunkq.geometry.padding import source_indices
from chunkq.plan.chunk import Index
from tests import reference as ref
from tests.strategies import JobPlan

Array = npt.NDArray[Any]
ToDevice = Callable[[Any], Any]
OfBatch = Callable[[Array], Array]


def in_numpy(array: Array) -> Any:
    return array


def in_torch(array: Array) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def unchanged(predictions: Array) -> Array:
    return predictions


def window(plan: JobPlan, volume: Array, source: Box) -> Array:
    """Return the input patch at `source`, padded one axis at a time."""
    for axis, size in enumerate(plan.volume.shape):
        indices = source_indices(source.start[axis], source.stop[axis], size, plan.job.pad_mode)
        volume = np.take(volume, np.maximum(indices, 0), axis=axis)
        outside: list[Any] = [slice(None)] * plan.rank
        outside[axis] = indices < 0
        volume[tuple(outside)] = plan.job.pad_value
    return volume


def infer(
    plan: JobPlan,
    index: Index,
    cache: PatchWeights,
    volume: Array,
    predict: ref.Predict,
    to_device: ToDevice,
    of_batch: OfBatch = unchanged,
) -> Contribution:
    """Compute one chunk like a worker."""
    chunk = plan.chunk(index)
    output = plan.output
    shape = (output.sums_channels, *chunk.region.shape)
    zeros = to_device(np.zeros(shape, output.sums_dtype))
    sums = Accumulator(plan, chunk, cache, zeros)
    patches, size = list(plan.patches(chunk)), plan.grid.batch
    for first in range(0, len(patches), size):
        batch = patches[first : first + size]
        windows = [window(plan, volume, patch.source).astype(np.float64) for patch in batch]
        starts = [patch.source.start for patch in batch]
        predictions = np.stack(list(map(predict, windows, starts)))
        y = to_device(of_batch(predictions).astype(np.float32))
        y = activate(y, output.activation)
        if output.combine == "hard":
            y = to_votes(y)
        sums.add(batch, y)
    return sums.contribution()


def run(
    plan: JobPlan,
    volume: Array,
    predict: ref.Predict,
    weights: Weights | None = None,
    to_device: ToDevice = in_numpy,
    of_batch: OfBatch = unchanged,
) -> Array:
    """Return the output of the job; assert that every voxel is written exactly once.

    `of_batch` changes the predictions of each batch.
    """
    cache = PatchWeights(plan, weights or plan.blend_weights(), to_device)
    out = np.zeros(plan.output_shape, plan.output_dtype)
    writes = np.zeros(plan.region.shape, dtype=int)

    def write(box: Box, values: Array) -> None:
        writes[box.slices(plan.region.start)] += 1
        out[plan.output_box(box).slices((0,) * out.ndim)] = values
        assert values.dtype == plan.output_dtype

    results = {
        index: infer(plan, index, cache, volume, predict, to_device, of_batch)
        for index in plan.active_indices()
    }
    pieces = {piece: sums for result in results.values() for piece, sums in result.pieces}
    for index, result in results.items():
        write(plan.chunk(index).core, result.core)
    for index in plan.to_finalize():
        chunk = plan.chunk(index)
        own_block = results[index].own_block if index in results else None
        incoming = {piece: pieces.pop(piece) for piece in plan.incoming_pieces(chunk)}
        for box, values in finalize_sums(plan, chunk, own_block, incoming):
            write(box, values)
    assert pieces == {}
    assert (writes == 1).all()
    return out
