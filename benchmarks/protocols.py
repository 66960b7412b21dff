"""Border protocols: ways to compute patches that cross chunk borders, from store to store.

borders.py starts it in a separate process: python protocols.py NAME JOB OUTPUT. The protocols of
other programs use the same parts: the same network and batches, the same weights, an output with
the same metadata, prefetched input, and writing in the background. Temporary arrays are neither
compressed nor synced to the disk, and are removed at the end.

`read` and `written` are bytes of uncompressed voxels: of all boxes read from a store and of all
boxes written to one, temporary arrays included.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts
import torch
from chunkq_worker.inline import pipelined

from benchmarks.contestant import Contestant, chunkq, compete, create, network, predictions, stored
from benchmarks.turns import Figures
from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Accumulator
from chunkq.blend.weights import built_in_weights
from chunkq.geometry.box import Box
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.job.resolve import resolve
from chunkq.job.user_code import load_blend_weights
from chunkq.plan.chunk import Chunk, Patch
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from chunkq.storage.images import find_source

PENDING = 64 << 20
"""Limit of the bytes that are being written."""
RAW = {"name": "bytes", "configuration": {"endian": "little"}}
LZ4 = {
    "name": "blosc",
    "configuration": {
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "shuffle",
        "typesize": 4,
        "blocksize": 0,
    },
}
"""The compression of chunkq's output."""
Voxels = npt.NDArray[Any]


@dataclass
class Stores:
    """Counts bytes read and written; at most PENDING bytes are being written."""

    read: int = 0
    written: int = 0
    _writes: deque[tuple[int, Any]] = field(default_factory=deque)
    _pending: int = 0

    def get(self, array: Any, index: Any) -> Any:
        """Start to read; return a future of the values."""
        part = array[index]
        self.read += part.size * part.dtype.numpy_dtype.itemsize
        return part.read()

    def put(self, array: Any, index: Any, values: Voxels) -> None:
        """Start to write values, which must not change afterwards."""
        self._writes.append((values.nbytes, array[index].write(values)))
        self._pending += values.nbytes
        self.written += values.nbytes
        self._wait(PENDING)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._wait(0)

    def _wait(self, limit: int) -> None:
        while self._pending > limit:
            size, future = self._writes.popleft()
            future.result()
            self._pending -= size


class Work:
    """One run: network, input, an output like chunkq's, and counters."""

    def __init__(self, job: Job, output: str) -> None:
        volume = find_source(job.input[0]).volume
        self.job, self.output, self.plan = job, output, resolve(job, volume)
        self.stores, self.patches = Stores(), 0
        self.net = network(job)
        self.source = stored(job.input[0])
        self.target = create(
            output,
            self.plan.output_shape,
            "float32",
            (1, *self.plan.storage_chunks),
            codecs=[RAW, LZ4],
        )
        self._temporary: list[str] = []

    def chunks(self) -> list[Chunk]:
        return [self.plan.chunk(index) for index in self.plan.indices()]

    def weights(self, plan: Plan) -> PatchWeights:
        """Return the weights divided by their sum over all patches at a voxel."""
        return PatchWeights(
            plan, load_blend_weights(self.job.weight_function, plan), torch.from_numpy
        )

    def temporary(
        self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], **metadata: Any
    ) -> Any:
        """Create a temporary float32 array, not synced because losing it costs only time."""
        path = f"{self.output}.{name}"
        self._temporary.append(path)
        scratch = ts.Context({"file_io_sync": False})
        return create(path, shape, "float32", chunks, context=scratch, **metadata)

    def inputs(self, boxes: list[Box]) -> Iterator[Voxels]:
        """Yield the input in each box; read the next one meanwhile."""
        return pipelined(lambda box: self.stores.get(self.source, _at(box)), boxes, 2)

    def forward(
        self, patches: list[Patch], values: Voxels, origin: tuple[int, ...]
    ) -> Iterator[tuple[Patch, torch.Tensor]]:
        """Yield each patch with its prediction; count the patches."""
        self.patches += len(patches)
        return predictions(self.job, self.net, patches, values, origin)

    def finish(self) -> Figures:
        """Wait for the output, remove temporary arrays, and return the counters."""
        self.stores.flush()
        for path in self._temporary:
            shutil.rmtree(path)
        counts = self.stores
        return {"patches": self.patches, "read": counts.read, "written": counts.written}


def _at(box: Box) -> tuple[slice, ...]:
    return box.slices((0,) * len(box.start))


def _in_channels(box: Box, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    return (slice(None), *box.slices(origin or (0,) * len(box.start)))


def checkerboard(job: Job, output: str) -> Callable[[], Figures]:
    """Write sums to eight temporary layers, as zetta_utils does, one per parity of the block index.

    A first pass writes every chunk's weighted sums, including the overlap with the next blocks, to
    the layer in which no neighbor writes. A second pass adds the layers block by block. In contrast
    to zetta_utils, no patch is computed twice, and the stored values are already weighted.
    """

    @torch.inference_mode()
    def run() -> Figures:
        work = Work(job, output)
        plan, stores = work.plan, work.stores
        shape, storage = (plan.channels, *plan.volume.shape), (plan.channels, *plan.storage_chunks)
        layers = {
            parity: work.temporary("layer" + "".join(map(str, parity)), shape, storage)
            for parity in product((0, 1), repeat=plan.rank)
        }

        def layer(chunk: Chunk) -> Any:
            return layers[tuple(i % 2 for i in chunk.index)]

        active = {chunk.index: chunk for chunk in work.chunks() if chunk.is_active}
        weights = work.weights(plan)
        for chunk, halo in zip(
            active.values(), work.inputs([c.halo for c in active.values()]), strict=True
        ):
            zeros = torch.zeros((plan.channels, *chunk.region.shape))
            sums = Accumulator(plan, chunk, weights, zeros)
            for patch, values in work.forward([*plan.patches(chunk)], halo, chunk.halo.start):
                sums.add([patch], values[None])
            stores.put(layer(chunk), _in_channels(chunk.region), zeros.numpy())
        stores.flush()

        def parts(chunk: Chunk) -> list[tuple[Box, Any]]:
            """Return the sums inside a block, each from another layer."""
            reads = []
            for down in product((0, 1), repeat=plan.rank):
                index = tuple(i - d for i, d in zip(chunk.index, down, strict=True))
                if index in active:
                    box = chunk.block & active[index].region
                    if box.size:
                        future = stores.get(layer(active[index]), _in_channels(box))
                        reads.append((box, future))
            return reads

        for chunk, reads in _prefetched(work.chunks(), parts):
            total = np.zeros((plan.channels, *chunk.block.shape), np.float32)
            for box, future in reads:
                total[_in_channels(box, chunk.block.start)] += future.result()
            stores.put(work.target, _in_channels(chunk.block), total)
        return work.finish()

    return run


def every_patch(job: Job, output: str) -> Callable[[], Figures]:
    """Store every patch's prediction, as vesuvius does, and blend them in a second pass.

    An object has one patch, in parts of the size of the output's storage chunks, so a block reads
    only its voxels (vesuvius: complete patches). Predictions are float32 (vesuvius: float16).
    """

    @torch.inference_mode()
    def run() -> Figures:
        work = Work(job, output)
        plan, stores = work.plan, work.stores
        chunks = work.chunks()
        slots: dict[tuple[int, ...], tuple[int, Patch]] = {}
        for chunk in chunks:
            for patch in plan.patches(chunk):
                slots[patch.numbers] = (len(slots), patch)
        item = (plan.channels, *plan.output_patch)
        inner = (1, plan.channels, *map(math.gcd, plan.storage_chunks, plan.output_patch))
        shards = {"name": "sharding_indexed"} | {
            "configuration": {"chunk_shape": inner, "codecs": [RAW]}
        }
        scratch = work.temporary("patches", (len(slots), *item), (1, *item), codecs=[shards])
        active = [chunk for chunk in chunks if chunk.is_active]
        for chunk, halo in zip(active, work.inputs([c.halo for c in active]), strict=True):
            for patch, values in work.forward([*plan.patches(chunk)], halo, chunk.halo.start):
                stores.put(scratch, slots[patch.numbers][0], values.numpy())
        stores.flush()

        def parts(chunk: Chunk) -> list[tuple[Patch, Box, Any]]:
            """Return the voxels of a block in the patches that intersect it."""
            axes = zip(plan.axes, chunk.block.start, chunk.block.stop, strict=True)
            intersecting = product(*(a.grids[0].touching(low, high) for a, low, high in axes))
            reads = []
            for number, patch in (slots[numbers] for numbers in intersecting):
                box = chunk.block & patch.target
                index = (number, *_in_channels(box, patch.source.start))
                reads.append((patch, box, stores.get(scratch, index)))
            return reads

        weights = work.weights(plan)
        for chunk, reads in _prefetched(chunks, parts):
            total = torch.zeros((plan.channels, *chunk.block.shape))
            for patch, box, future in reads:
                weight = weights.weights(patch)[box.slices(patch.target.start)]
                part = total[_in_channels(box, chunk.block.start)]
                part.addcmul_(weight, torch.from_numpy(future.result()))
            stores.put(work.target, _in_channels(chunk.block), total.numpy())
        return work.finish()

    return run


def _prefetched(
    chunks: list[Chunk], start: Callable[[Chunk], list[Any]]
) -> Iterator[tuple[Chunk, list[Any]]]:
    """Yield each chunk with the reads started for it, after those of the next one have started."""
    queue: deque[tuple[Chunk, list[Any]]] = deque()
    for chunk in chunks:
        queue.append((chunk, start(chunk)))
        if len(queue) > 1:
            yield queue.popleft()
    yield from queue


def cutouts(plan: Plan) -> list[tuple[Box, Box]]:
    """Return each block with its cutout: the block and one overlap around it, inside the volume.

    With a smaller cutout, the outermost voxels of the block would lack some of their patches.
    """
    strides = (axis.grids[0].stride for axis in plan.axes)
    margin = [p - s for p, s in zip(plan.output_patch, strides, strict=True)]
    pairs = []
    for index in plan.indices():
        block = plan.chunk(index).block
        low = tuple(max(0, a - m) for a, m in zip(block.start, margin, strict=True))
        axes = zip(block.stop, margin, plan.volume.shape, strict=True)
        high = tuple(min(b + m, v) for b, m, v in axes)
        pairs.append((block, Box(low, high)))
    return pairs


def recompute(job: Job, output: str) -> Callable[[], Figures]:
    """Read each chunk with a margin, run all patches over it, crop; as daisy and chunkflow do.

    They start the patches at the cutout's corner. Here every cutout starts on the grid of the
    volume, which favors this protocol.
    """

    @torch.inference_mode()
    def run() -> Figures:
        work = Work(job, output)

        @cache
        def plan_for(shape: tuple[int, ...]) -> tuple[Plan, PatchWeights]:
            cutout_job = parse_job(job.as_dict() | {"chunksize": list(shape)})
            plan = resolve(cutout_job, Volume(shape, work.plan.volume.dtype))
            return plan, work.weights(plan)

        boxes = cutouts(work.plan)
        for (block, cutout), values in zip(boxes, work.inputs([c for _, c in boxes]), strict=True):
            plan, weights = plan_for(cutout.shape)
            chunk = plan.chunk((0,) * plan.rank)
            zeros = torch.zeros((plan.channels, *cutout.shape))
            sums = Accumulator(plan, chunk, weights, zeros)
            for patch, prediction in work.forward([*plan.patches(chunk)], values, chunk.halo.start):
                sums.add([patch], prediction[None])
            cropped = np.ascontiguousarray(zeros.numpy()[_in_channels(block, cutout.start)])
            work.stores.put(work.target, _in_channels(block), cropped)
        return work.finish()

    return run


class PatchInferencer:
    """Callable for chunkflow's Inferencer: batch (N, 1, *P) -> weighted predictions (N, C, *P)."""

    compute_device = "cpu"

    def __init__(self, net: Any, weights: npt.NDArray[np.float32]) -> None:
        self._net, self._weights, self.patches = net, torch.from_numpy(weights), 0
        self.output_patch_mask_numpy = weights  # chunkflow's name; it divides by the sum of masks

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.patches += len(batch)
        predictions: npt.NDArray[np.float32] = (
            self._net(torch.from_numpy(batch)) * self._weights
        ).numpy()
        return predictions


def chunkflow(job: Job, output: str) -> Callable[[], Figures]:
    """Run chunkflow's Inferencer over the cutouts of `recompute`, with the same cropping.

    Chunks, patches, weighted sums and their normalization are chunkflow's. The network, the
    weights, and reading and writing are those of the other protocols.
    """
    from chunkflow.chunk import Chunk as Cutout  # type: ignore[import-not-found]
    from chunkflow.flow.divid_conquer.inferencer import Inferencer  # type: ignore[import-not-found]

    @torch.inference_mode()
    def run() -> Figures:
        work = Work(job, output)
        plan = work.plan
        profiles = built_in_weights(job.weight_function[0], plan.output_patch, plan.margin).profiles
        weights = np.exp(reduce(np.add.outer, profiles)).astype(np.float32)
        forward = PatchInferencer(work.net, weights)
        strides = (axis.grids[0].stride for axis in plan.axes)
        infer = Inferencer(
            forward,
            None,
            input_patch_size=plan.input_patch,
            output_patch_overlap=[p - s for p, s in zip(plan.output_patch, strides, strict=True)],
            num_output_channels=plan.channels,
            framework="prebuilt",
            batch_size=job.model.max_batch_size,
            mask_output_chunk=True,
        )
        boxes = cutouts(plan)
        for (block, cutout), values in zip(boxes, work.inputs([c for _, c in boxes]), strict=True):
            # float32, because chunkflow scales integers to 0..1.
            chunk = Cutout(values.astype(np.float32), voxel_offset=cutout.start)
            result = infer(chunk).array[_in_channels(block, cutout.start)]
            work.stores.put(work.target, _in_channels(block), np.ascontiguousarray(result))
        work.patches = forward.patches
        return work.finish()

    return run


PROTOCOLS: dict[str, Contestant] = {
    "chunkq": chunkq,
    "recompute": recompute,
    "chunkflow": chunkflow,
    "checkerboard": checkerboard,
    "every_patch": every_patch,
}

if __name__ == "__main__":
    compete(PROTOCOLS)
