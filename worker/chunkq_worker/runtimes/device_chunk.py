"""One chunk in the memory of an accelerator: its input, its sums, and whether it is finite.

The input is copied to the device once. Batches are cut from it there, and predictions are blended
there. No function waits for the device. A batch is processed run by run (`patch_runs`), so the
number of kernels grows with the rows of patches, not with the patches. The order of additions
depends only on the plan and on the batch size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import add, mul, sub
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from chunkq.blend.combine import Array
from chunkq.blend.empty_patches import add_share
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.rules import rule_of
from chunkq.blend.sums import chunk_results, output_crop, target_slices
from chunkq.blend.weights import Neighbors
from chunkq.geometry.box import Box
from chunkq.job.model_config import ModelConfig
from chunkq.plan.chunk import Chunk, Patch
from chunkq.plan.plan import Plan
from chunkq.plan.value_range import ValueRange
from chunkq_worker.batch_layout import BatchLayout
from chunkq_worker.patch_runs import PatchRun, patch_runs
from chunkq_worker.runtimes.staging import SIGNED_DTYPES, Accelerator, Slot, Stream, as_signed

INTEGERS_AT_A_TIME = 1 << 22
"""Values that are converted to integers at a time, in float64."""
TABLES_CACHED = 1 << 10
"""Tables of profiles on the device; most chunks share theirs."""


class InputUploader:
    """Copies the inputs of chunks to the device on `stream`, through buffers that take turns.

    `chunks` is the number of chunks whose inputs can be on the device at the same time.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stream: Stream,
        plan: Plan,
        model: ModelConfig,
        chunks: int,
    ) -> None:
        self._accelerator, self._stream = accelerator, stream
        self._plan, self._model = plan, model
        self._turns: deque[list[Slot]] = deque([] for _ in range(chunks))

    def keep_one(self) -> None:
        """Release the buffers of all chunks but the last one."""
        self._turns = deque([self._turns[0]])

    @torch.inference_mode()
    def upload(self, halos: Sequence[npt.NDArray[Any]], origin: Sequence[int]) -> DeviceInput:
        """Start the copy of a chunk's inputs; the current stream waits for it."""
        self._turns.rotate(-1)
        slots, accelerator = self._turns[0], self._accelerator
        for number, halo in enumerate(halos):
            _reserve(accelerator, slots, number, halo)
        tensors = []
        for slot, halo in zip(slots, halos, strict=True):
            if slot.sent is not None:
                accelerator.wait(slot.sent)  # the copy of an earlier chunk, two chunks ago
            np.copyto(slot.array[: halo.size].reshape(halo.shape), halo)
            accelerator.wait_on_stream(self._stream, slot.consumed)
            accelerator.copy(slot.device[: halo.size], slot.host[: halo.size], self._stream)
            slot.sent = accelerator.record(self._stream)
            accelerator.wait_on_stream(accelerator.current(), slot.sent)
            tensors.append(slot.device[: halo.size].view(halo.shape))
        return DeviceInput(accelerator, slots, tensors, origin, self._plan, self._model)


def _reserve(
    accelerator: Accelerator, slots: list[Slot], number: int, halo: npt.NDArray[Any]
) -> None:
    """Make slot `number` large enough for an input; keep it if it is."""
    dtype = halo.dtype.newbyteorder("=")
    if number < len(slots):
        if slots[number].array.dtype == dtype and slots[number].array.size >= halo.size:
            return
        del slots[number:]  # release memory before more is allocated
    slots.append(Slot(accelerator, (halo.size,), torch.from_numpy(np.empty(0, dtype)).dtype))


class DeviceInput:
    """The inputs of one chunk on the device. Call `release` after the last `batch`."""

    def __init__(
        self,
        accelerator: Accelerator,
        slots: Sequence[Slot],
        tensors: Sequence[torch.Tensor],
        origin: Sequence[int],
        plan: Plan,
        model: ModelConfig,
    ) -> None:
        self._accelerator, self._slots, self._tensors = accelerator, slots, tensors
        self._origin, self._patch = origin, plan.input_patch
        self._layout = BatchLayout.of(model, len(tensors))
        self._dtype = _batch_dtype(tensors, plan, model)

    @torch.inference_mode()
    def batch(self, patches: Sequence[Patch], count: int) -> torch.Tensor:
        """Return a new batch of `count` items: the patches, and then the last one repeated.

        It is in the model's dtype, or in the common dtype of inputs of several dtypes.
        """
        batch = self._accelerator.empty((count, *self._layout.item), self._dtype)
        for run in patch_runs(patches):
            items = batch[run.first : run.first + run.count]
            for number, tensor in enumerate(self._tensors):
                part = items[(slice(None), *self._layout.index(number))]
                windows = self._windows(tensor, patches[run.first], run)
                part.copy_(as_signed(windows).view(run.count, *self._layout.part))
        if count > len(patches):
            batch[len(patches) :].copy_(batch[len(patches) - 1])
        return batch

    def release(self) -> None:
        """Allow later uploads to overwrite the inputs, after all work enqueued so far."""
        consumed = self._accelerator.record(self._accelerator.current())
        for slot in self._slots:
            slot.consumed = consumed

    def _windows(self, tensor: torch.Tensor, patch: Patch, run: PatchRun) -> torch.Tensor:
        """Return the input patches of a run (count, [C,] *P) as a view."""
        start = list(map(sub, patch.source.start, self._origin))
        return _windows(tensor, start, self._patch, run.axis, run.step, run.count)


def _batch_dtype(tensors: Sequence[torch.Tensor], plan: Plan, model: ModelConfig) -> torch.dtype:
    if len({tensor.dtype for tensor in tensors}) == 1:
        dtype: torch.dtype = getattr(torch, model.dtype)
        return dtype
    common = torch.from_numpy(np.empty(0, plan.volume.dtype)).dtype
    return SIGNED_DTYPES.get(common, (common, common))[1]


def _windows(
    tensor: torch.Tensor,
    start: Sequence[int],
    shape: Sequence[int],
    axis: int,
    step: int,
    count: int,
) -> torch.Tensor:
    """Return `count` windows as a view (count, ..., *shape), `step` voxels apart along `axis`.

    `start` is the first voxel of the first window in the last axes of the tensor.
    """
    leading = tensor.dim() - len(shape)
    strides = tensor.stride()
    spatial = strides[leading:]
    offset = sum(map(mul, start, spatial))
    return tensor.as_strided(
        (count, *tensor.shape[:leading], *shape),
        (step * spatial[axis], *strides),
        tensor.storage_offset() + offset,
    )


class FiniteFlag:
    """A sum of all outputs of a chunk: finite only if each of them is.

    It can also overflow for finite outputs. The caller then has to check them one by one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.total = accelerator.zeros((1,))

    @torch.inference_mode()
    def add(self, outputs: torch.Tensor) -> None:
        """Include the outputs of a batch."""
        self.total.add_(outputs.sum(dtype=torch.float32))


class RunWeights:
    """Normalized weights of runs of patches on the device, from tables of profiles."""

    def __init__(self, accelerator: Accelerator, weights: PatchWeights) -> None:
        self._accelerator, self._weights = accelerator, weights
        self._tables: dict[tuple[int, tuple[Neighbors, ...]], torch.Tensor] = {}
        self._last: tuple[tuple[tuple[Neighbors, ...], ...], torch.Tensor] | None = None

    def product(self, near: tuple[tuple[Neighbors, ...], ...]) -> torch.Tensor:
        """Return w / Σw of the kept voxels, 0 outside the volume, (n, 1, *kept).

        `near` has the neighbors of the patches along each axis, one entry where all patches have
        the same. The last product is kept, because most runs of a chunk share it.
        """
        if self._last is None or self._last[0] != near:
            self._last = None  # release its memory first
            product = self._factor(0, near)
            for axis in range(1, len(near)):
                product = product * self._factor(axis, near)
            self._last = near, product
        return self._last[1]

    def _factor(self, axis: int, near: tuple[tuple[Neighbors, ...], ...]) -> torch.Tensor:
        """Return the profiles along one axis, to be multiplied with those of other axes."""
        table = self._table(axis, near[axis])
        shape = [1] * len(near)
        shape[axis] = table.shape[1]
        return table.view(len(near[axis]), 1, *shape)

    def _table(self, axis: int, near: tuple[Neighbors, ...]) -> torch.Tensor:
        """Return one row per patch with its profile along an axis (n, kept), float32."""
        key = axis, near
        if key not in self._tables:
            while len(self._tables) >= TABLES_CACHED:
                del self._tables[next(iter(self._tables))]
            rows = np.stack([self._weights.profile(axis, n) for n in near])
            self._tables[key] = self._accelerator.to_device(torch.from_numpy(rows))
        return self._tables[key]


class DeviceSums:
    """Weighted sums of one chunk on the device (K, *box), of one output, which has this plan.

    They also cover the voxels outside the volume that patches reach, so that no patch is clipped.
    """

    @torch.inference_mode()
    def __init__(
        self,
        plan: Plan,
        chunk: Chunk,
        weights: PatchWeights,
        run_weights: RunWeights,
        accelerator: Accelerator,
    ) -> None:
        self.plan, self.chunk, self._accelerator = plan, chunk, accelerator
        self._weights, self._run_weights = weights, run_weights
        grids = [axis.grids[0] for axis in plan.axes]
        self._kept = [grid.kept for grid in grids]
        self._kept_slices = tuple(map(slice, plan.margin, map(add, plan.margin, self._kept)))
        self._crop = output_crop(plan)
        self._box = sums_box(plan, chunk)
        self._shift = [grid.lead - o for grid, o in zip(grids, self._box.start, strict=True)]
        output, self._rule = plan.output, rule_of(plan.output)
        self._dtype: torch.dtype = getattr(torch, output.sums_dtype.name)
        self._sums = accelerator.zeros((output.sums_channels, *self._box.shape), self._dtype)

    @torch.inference_mode()
    def add(self, batch: Sequence[Patch], predictions: torch.Tensor) -> None:
        """Add predictions (n, C, *output patch), of a dtype that is promoted to float32."""
        kept = predictions[(slice(None), slice(None), *self._kept_slices)]
        for run in patch_runs(batch):
            patches = batch[run.first : run.first + run.count]
            values = kept[run.first : run.first + run.count]
            if all(map(self._weights.has_no_overlap, patches)):
                self._rule.put(self._windows(run, patches[0]), values.movedim(1, 0))
            elif self._weights.is_product:
                self._add_run(run, patches, values)
            else:
                self._add_patches(patches, predictions[run.first : run.first + run.count])

    @torch.inference_mode()
    def add_empty(self, patches: Sequence[Patch]) -> None:
        """Add the predictions of patches that are skipped because they are empty."""
        if patches and self.plan.output.nothing_counts:
            region = self.chunk.region
            share = self._accelerator.zeros(region.shape, self._dtype)
            add_share(share, self._weights, patches, region)
            self._rule.add_nothing(self._view(region), share)

    @torch.inference_mode()
    def results(self) -> list[Array]:
        """Return the arrays from which `contribution` is made, as small as they are stored."""
        interior, *sums = chunk_results(self.plan, self.chunk, self._view)
        output = self.plan.output
        if output.dtype == np.float16:
            interior = interior.to(torch.float16)
        elif output.value_range is not None:
            interior = as_integers(interior, output.value_range, self._accelerator)
        elif output.has_labels and output.dtype == np.uint16:
            interior = interior.to(torch.int16)  # keeps the lowest 16 bits
        return [interior, *sums]

    def _add_run(self, run: PatchRun, patches: Sequence[Patch], values: torch.Tensor) -> None:
        near = zip(*map(self._weights.neighbors, patches), strict=True)
        weights = self._run_weights.product(tuple(map(_shared, near)))
        # Patches that do not overlap along the axis are added by one kernel.
        phases = min(run.count, -(-self._kept[run.axis] // run.step))
        for phase in range(phases):
            part = slice(phase, run.count, phases)
            every = PatchRun(0, len(range(phase, run.count, phases)), run.axis, run.step * phases)
            used = weights if len(weights) == 1 else weights[part]
            sums = self._windows(every, patches[phase])
            self._rule.add(sums, used.movedim(1, 0), values[part].movedim(1, 0))

    def _add_patches(self, patches: Sequence[Patch], predictions: torch.Tensor) -> None:
        for patch, prediction in zip(patches, predictions, strict=True):
            used = prediction[(slice(None), *target_slices(patch, self._crop))]
            self._rule.add(self._view(patch.target), self._weights.weights(patch), used)

    def _windows(self, run: PatchRun, patch: Patch) -> torch.Tensor:
        """Return the sums of the kept voxels of a run that starts with a patch, (K, n, *kept)."""
        start = list(map(add, patch.source.start, self._shift))
        windows = _windows(self._sums, start, self._kept, run.axis, run.step, run.count)
        return windows.movedim(1, 0)

    def _view(self, box: Box) -> torch.Tensor:
        return self._sums[(slice(None), *box.slices(self._box.start))]


def as_integers(
    values: torch.Tensor, value_range: ValueRange, accelerator: Accelerator
) -> torch.Tensor:
    """Return finite values (C, *S) as `ValueRange.stored` does, bit by bit; uint16 as int16.

    It has the operations of float64 in the same order, which IEEE 754 rounds alike everywhere.
    """
    wraps = value_range.dtype == "uint16"
    dtype: torch.dtype = torch.int16 if wraps else getattr(torch, value_range.dtype)
    result = accelerator.empty(tuple(values.shape), dtype)
    rows = max(1, INTEGERS_AT_A_TIME * values.shape[1] // max(1, values.numel()))
    for first in range(0, values.shape[1], rows):
        part = (slice(None), slice(first, first + rows))
        steps = values[part].to(torch.float64)
        steps = (steps - value_range.low) * value_range.steps
        steps = steps / (value_range.high - value_range.low)
        steps = steps.clamp(0, value_range.steps).round() + value_range.smallest
        result[part].copy_(steps.to(torch.int32) if wraps else steps)
    return result


def _shared(near: tuple[Neighbors, ...]) -> tuple[Neighbors, ...]:
    """Return one entry if all entries are equal."""
    return near[:1] if near.count(near[0]) == len(near) else near


def sums_box(plan: Plan, chunk: Chunk) -> Box:
    """Return the voxels of a chunk's region and those outside the volume that its patches reach."""
    start, stop = list(chunk.region.start), list(chunk.region.stop)
    for a, (lead, kept) in enumerate(zip(plan.grid.lead, plan.grid.kept, strict=True)):
        start[a] = min(start[a], chunk.halo.start[a] + lead)
        stop[a] = max(stop[a], chunk.halo.stop[a] - (plan.input_patch[a] - lead - kept))
    return Box(tuple(start), tuple(stop))
