"""Ways to treat the patches that cross chunk borders, store to store, in a process of its own.

Run by borders.py: python protocols.py NAME JOB OUTPUT. The peers' ways are written with the same
parts: the same network in the same batches, the same weights, an output of the same form, the next
chunk's input read ahead, writing in the background. Temporary arrays are neither compressed nor
synced to the disk, and are removed in the end.

`read` and `written` are bytes of uncompressed voxels: of every box asked of a store, and of every
box given to one, temporary ones included.
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
from chunkq.blend import Accumulator, WeightCache
from chunkq.box import Box
from chunkq.job import Job, parse_job
from chunkq.plan import Chunk, Patch, Plan, Volume
from chunkq.resolve import resolve
from chunkq.stores import find_source
from chunkq.user_code import load_blend_weights
from chunkq.weights import built_in

PENDING = 64 << 20
"""Bytes whose writing may be under way."""
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
"""As chunkq compresses its output."""
Voxels = npt.NDArray[Any]


@dataclass
class Stores:
    """What is asked of stores and given to them; at most PENDING bytes are being written."""

    read: int = 0
    written: int = 0
    _flying: deque[tuple[int, Any]] = field(default_factory=deque)
    _pending: int = 0

    def get(self, array: Any, where: Any) -> Any:
        """Start to read; returns a future of the values."""
        part = array[where]
        self.read += part.size * part.dtype.numpy_dtype.itemsize
        return part.read()

    def put(self, array: Any, where: Any, values: Voxels) -> None:
        """Start to write values that nobody changes any more."""
        self._flying.append((values.nbytes, array[where].write(values)))
        self._pending += values.nbytes
        self.written += values.nbytes
        self._wait(PENDING)

    def flush(self) -> None:
        """Wait until all is written."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while self._pending > most:
            size, future = self._flying.popleft()
            future.result()
            self._pending -= size


class Work:
    """One run: the network, the input, an output like chunkq's, and what has been done so far."""

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

    def weights(self, plan: Plan) -> WeightCache:
        """Weights already divided by their sum over all patches at a voxel."""
        return WeightCache(plan, load_blend_weights(plan), torch.from_numpy)

    def temporary(
        self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], **more: Any
    ) -> Any:
        """A scratch array of float32; losing it in a power cut loses only time."""
        path = f"{self.output}.{name}"
        self._temporary.append(path)
        scratch = ts.Context({"file_io_sync": False})
        return create(path, shape, "float32", chunks, context=scratch, **more)

    def inputs(self, boxes: list[Box]) -> Iterator[Voxels]:
        """The input in each box, the next one being read meanwhile."""
        return pipelined(lambda box: self.stores.get(self.source, _at(box)), boxes, 2)

    def forward(
        self, patches: list[Patch], values: Voxels, origin: tuple[int, ...]
    ) -> Iterator[tuple[Patch, torch.Tensor]]:
        self.patches += len(patches)
        return predictions(self.job, self.net, patches, values, origin)

    def finish(self) -> Figures:
        """Wait for the output, remove what was temporary, and tell what was done."""
        self.stores.flush()
        for path in self._temporary:
            shutil.rmtree(path)
        done = self.stores
        return {"patches": self.patches, "read": done.read, "written": done.written}


def _at(box: Box) -> tuple[slice, ...]:
    return box.slices((0,) * len(box.start))


def _in_channels(box: Box, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    return (slice(None), *box.slices(origin or (0,) * len(box.start)))


def checkerboard(job: Job, output: str) -> Callable[[], Figures]:
    """Eight temporary layers, as zetta_utils has them, one for each parity of the block's index.

    A first pass writes every chunk's weighted sums, with what they spill into the next blocks,
    to the layer where no neighbour writes; a second one adds up the layers block by block. Unlike
    there, no patch is computed twice, and what is stored is weighted already.
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
                sums.add(patch, values)
            stores.put(layer(chunk), _in_channels(chunk.region), zeros.numpy())
        stores.flush()

        def parts(chunk: Chunk) -> list[tuple[Box, Any]]:
            """The sums that lie in a block, each in another layer."""
            found = []
            for down in product((0, 1), repeat=plan.rank):
                index = tuple(i - d for i, d in zip(chunk.index, down, strict=True))
                if index in active:
                    box = chunk.block & active[index].region
                    if box.size:
                        future = stores.get(layer(active[index]), _in_channels(box))
                        found.append((box, future))
            return found

        for chunk, found in _one_ahead(work.chunks(), parts):
            total = np.zeros((plan.channels, *chunk.block.shape), np.float32)
            for box, future in found:
                total[_in_channels(box, chunk.block.start)] += future.result()
            stores.put(work.target, _in_channels(chunk.block), total)
        return work.finish()

    return run


def every_patch(job: Job, output: str) -> Callable[[], Figures]:
    """Every patch's prediction is stored, as vesuvius does, and a second pass blends them.

    An object holds one patch, in parts the size of the output's storage chunks, so that a block
    reads only what lies in it (there, whole patches). Predictions are float32 (there, float16).
    """

    @torch.inference_mode()
    def run() -> Figures:
        work = Work(job, output)
        plan, stores = work.plan, work.stores
        chunks = work.chunks()
        kept: dict[tuple[int, ...], tuple[int, Patch]] = {}
        for chunk in chunks:
            for patch in plan.patches(chunk):
                kept[patch.numbers] = (len(kept), patch)
        item = (plan.channels, *plan.output_patch)
        inner = (1, plan.channels, *map(math.gcd, plan.storage_chunks, plan.output_patch))
        shards = {"name": "sharding_indexed"} | {
            "configuration": {"chunk_shape": inner, "codecs": [RAW]}
        }
        scratch = work.temporary("patches", (len(kept), *item), (1, *item), codecs=[shards])
        active = [chunk for chunk in chunks if chunk.is_active]
        for chunk, halo in zip(active, work.inputs([c.halo for c in active]), strict=True):
            for patch, values in work.forward([*plan.patches(chunk)], halo, chunk.halo.start):
                stores.put(scratch, kept[patch.numbers][0], values.numpy())
        stores.flush()

        def parts(chunk: Chunk) -> list[tuple[Patch, Box, Any]]:
            """What lies in a block of the patches that meet it."""
            axes = zip(plan.axes, chunk.block.start, chunk.block.stop, strict=True)
            meeting = product(*(a.grids[0].touching(low, high) for a, low, high in axes))
            found = []
            for number, patch in (kept[numbers] for numbers in meeting):
                box = chunk.block & patch.target
                where = (number, *_in_channels(box, patch.source.start))
                found.append((patch, box, stores.get(scratch, where)))
            return found

        weights = work.weights(plan)
        for chunk, found in _one_ahead(chunks, parts):
            total = torch.zeros((plan.channels, *chunk.block.shape))
            for patch, box, future in found:
                weight = weights.weights(patch)[box.slices(patch.target.start)]
                part = total[_in_channels(box, chunk.block.start)]
                part.addcmul_(weight, torch.from_numpy(future.result()))
            stores.put(work.target, _in_channels(chunk.block), total.numpy())
        return work.finish()

    return run


def _one_ahead(
    chunks: list[Chunk], start: Callable[[Chunk], list[Any]]
) -> Iterator[tuple[Chunk, list[Any]]]:
    """Each chunk with the reads begun for it, those of the next one being begun as well."""
    later: deque[tuple[Chunk, list[Any]]] = deque()
    for chunk in chunks:
        later.append((chunk, start(chunk)))
        if len(later) > 1:
            yield later.popleft()
    yield from later


def cutouts(plan: Plan) -> list[tuple[Box, Box]]:
    """Each block with the box around it that reaches one overlap further, inside the volume.

    With less, its outermost voxels would lack some of their patches.
    """
    strides = (axis.grids[0].stride for axis in plan.axes)
    margin = [p - s for p, s in zip(plan.output_patch, strides, strict=True)]
    found = []
    for index in plan.indices():
        block = plan.chunk(index).block
        low = tuple(max(0, a - m) for a, m in zip(block.start, margin, strict=True))
        axes = zip(block.stop, margin, plan.volume.shape, strict=True)
        high = tuple(min(b + m, v) for b, m, v in axes)
        found.append((block, Box(low, high)))
    return found


def recompute(job: Job, output: str) -> Callable[[], Figures]:
    """Each chunk reads a margin, runs all patches over chunk and margin, and crops.

    The way of daisy and chunkflow. The patches are laid from the cutout's corner; here every
    cutout starts on the grid of the whole volume, which is kind to this way.
    """

    @torch.inference_mode()
    def run() -> Figures:
        work = Work(job, output)

        @cache
        def over(shape: tuple[int, ...]) -> tuple[Plan, WeightCache]:
            whole = parse_job(job.as_dict() | {"chunksize": list(shape)})
            plan = resolve(whole, Volume(shape, work.plan.volume.dtype))
            return plan, work.weights(plan)

        boxes = cutouts(work.plan)
        for (block, cutout), values in zip(boxes, work.inputs([c for _, c in boxes]), strict=True):
            plan, weights = over(cutout.shape)
            chunk = plan.chunk((0,) * plan.rank)
            zeros = torch.zeros((plan.channels, *cutout.shape))
            sums = Accumulator(plan, chunk, weights, zeros)
            for patch, prediction in work.forward([*plan.patches(chunk)], values, chunk.halo.start):
                sums.add(patch, prediction)
            kept = np.ascontiguousarray(zeros.numpy()[_in_channels(block, cutout.start)])
            work.stores.put(work.target, _in_channels(block), kept)
        return work.finish()

    return run


class PatchInferencer:
    """What chunkflow's Inferencer calls: batch (N, 1, *P) to weighted predictions (N, C, *P)."""

    compute_device = "cpu"

    def __init__(self, net: Any, weights: npt.NDArray[np.float32]) -> None:
        self._net, self._weights, self.patches = net, torch.from_numpy(weights), 0
        self.output_patch_mask_numpy = weights  # chunkflow's name; it divides by their sum

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.patches += len(batch)
        predictions: npt.NDArray[np.float32] = (
            self._net(torch.from_numpy(batch)) * self._weights
        ).numpy()
        return predictions


def chunkflow(job: Job, output: str) -> Callable[[], Figures]:
    """chunkflow's own Inferencer over the same cutouts as `recompute`, cropped alike.

    Chunks, patches, weighted sums and their normalisation are its own; the network and the
    weights are handed to it, reading and writing are as for everybody.
    """
    from chunkflow.chunk import Chunk as Cutout  # type: ignore[import-not-found]
    from chunkflow.flow.divid_conquer.inferencer import Inferencer  # type: ignore[import-not-found]

    @torch.inference_mode()
    def run() -> Figures:
        work = Work(job, output)
        plan = work.plan
        profiles = built_in(job.weight_function[0], plan.output_patch, plan.margin).profiles
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
            # It would scale integers to 0..1.
            given = Cutout(values.astype(np.float32), voxel_offset=cutout.start)
            result = infer(given).array[_in_channels(block, cutout.start)]
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
