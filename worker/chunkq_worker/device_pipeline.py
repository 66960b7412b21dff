"""Compute the chunks of a plan in the memory of an accelerator.

All work of a chunk is enqueued without waiting for the device. While the device computes a chunk,
the input of the next one is copied to it, and the results of the one before are copied back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from typing_extensions import override

from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Contribution, contribution
from chunkq.plan.chunk import Chunk, Patch
from chunkq.plan.footprint import extra_device_bytes
from chunkq.plan.patch_selection import Inside, PatchSelection
from chunkq.plan.plan import Plan
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.chunk_pipeline import ChunkPipeline, ChunkRun, Finish
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.runtimes.device_chunk import (
    DeviceInput,
    DeviceSums,
    FiniteFlag,
    InputUploader,
    RunWeights,
)
from chunkq_worker.runtimes.staging import Accelerator, Event, fetch

MAX_IN_FLIGHT = 2
"""Chunks on the device: one is computed, one is copied."""
log = logging.getLogger("chunkq.worker")


class DevicePipeline(ChunkPipeline):
    """Computes chunks with a runtime whose results are on an accelerator.

    Two chunks are in flight if the memory that the first chunk leaves free is large enough. If
    memory is exhausted, one chunk at a time is on the device, then batches are cut on the host,
    then batches become smaller.
    """

    def __init__(
        self,
        plan: Plan,
        runtime: Runtime,
        batcher: Batcher,
        weights: Sequence[PatchWeights],
        accelerator: Accelerator,
    ) -> None:
        """Use the weights of each output."""
        self.plan, self.batcher, self.accelerator = plan, batcher, accelerator
        self.weights = weights
        shared = {id(one): RunWeights(accelerator, one) for one in weights}
        self.run_weights = [shared[id(one)] for one in weights]
        self.download_stream = accelerator.stream()
        self._runtime, self._in_flight = runtime, deque[Event]()
        self.max_in_flight: int | None = None  # unknown before the first chunk
        self._uploader: InputUploader | None = None
        if batcher.is_resident:
            self._uploader = InputUploader(
                accelerator, accelerator.stream(), plan, batcher.model, MAX_IN_FLIGHT
            )
        batcher.release_memory = self._use_one_chunk

    @property
    def is_resident(self) -> bool:
        """Return whether inputs are on the device."""
        return self._uploader is not None

    @override
    def open(self, chunk: Chunk, halos: Halos, *, checked: bool = False) -> ChunkRun:
        while len(self._in_flight) >= (self.max_in_flight or 1):
            self.accelerator.wait(self._in_flight.popleft())
        uploaded = None
        if self._uploader is not None:
            uploaded = self._uploader.upload(halos, chunk.halo.start)
        return DeviceRun(self, chunk, halos, uploaded, checked=checked)

    @override
    def start(
        self,
        chunk: Chunk,
        halos: Halos,
        selection: PatchSelection | None = None,
        *,
        checked: bool = False,
    ) -> Finish:
        selected = selection or PatchSelection.of_all(self.plan, chunk)
        patches_run = self.batcher.patches_run
        while True:
            try:
                # If memory is exhausted, the run and its memory are released with this call.
                return super().start(chunk, halos, selected, checked=checked)
            except Exception as error:
                if not self._runtime.is_out_of_memory(error):
                    raise
                self._use_less_memory(error)
                self.batcher.patches_run = patches_run

    def enqueued(self, done: Event) -> None:
        """Count a chunk as in flight until `done` is complete."""
        self._in_flight.append(done)
        if self.max_in_flight is None:
            is_enough = self.accelerator.free_bytes() >= extra_device_bytes(self.plan)
            self.max_in_flight = MAX_IN_FLIGHT if is_enough else 1

    def _use_one_chunk(self) -> bool:
        """Keep one chunk on the device from here on; return False if that is so already."""
        several, self.max_in_flight = (self.max_in_flight or 1) > 1, 1
        if not several:
            return False
        while self._in_flight:
            self.accelerator.wait(self._in_flight.popleft())
        if self._uploader is not None:
            self._uploader.keep_one()
        log.warning("out of memory: one chunk at a time is on the device from here on")
        return True

    def _use_less_memory(self, error: Exception) -> None:
        if self._use_one_chunk():
            return
        if self._uploader is not None:
            self._uploader = None
            log.warning("out of memory: batches are cut in host memory from here on")
            return
        self.batcher.halve(error)


class DeviceRun(ChunkRun):
    """A chunk whose sums, and input if `uploaded` is not None, are on the device."""

    def __init__(
        self,
        pipeline: DevicePipeline,
        chunk: Chunk,
        halos: Halos,
        uploaded: DeviceInput | None,
        *,
        checked: bool,
    ) -> None:
        self._pipeline, self._chunk, self._halos = pipeline, chunk, halos
        self._uploaded = uploaded
        accelerator = pipeline.accelerator
        self._sums = [
            DeviceSums(view, view.chunk(chunk.index), weights, run_weights, accelerator)
            for view, weights, run_weights in zip(
                pipeline.plan.views, pipeline.weights, pipeline.run_weights, strict=True
            )
        ]
        self._flag = None if checked else FiniteFlag(accelerator)

    @override
    def add(self, patches: Sequence[Patch]) -> None:
        batches = self._pipeline.batcher.predictions(
            patches, self._halos, self._chunk.halo.start, self._uploaded, self._flag
        )
        every, done = [self._own(sums, patches) for sums in self._sums], 0
        try:
            for batch, predictions in batches:
                stop = done + len(batch)
                for sums, own, values in zip(self._sums, every, predictions, strict=True):
                    sums.add(own[done:stop], values)
                done = stop
        finally:
            if self._uploaded is not None:
                self._uploaded.release()

    @override
    def wait(self) -> None:
        accelerator = self._pipeline.accelerator
        accelerator.wait(accelerator.record(accelerator.current()))

    @override
    def add_empty(self, patches: Sequence[Patch]) -> None:
        for sums in self._sums:
            sums.add_empty(self._own(sums, patches))

    @override
    def finish(self, inside: Inside | None = None) -> Finish:
        pipeline, outputs = self._pipeline, [(sums.plan, sums.chunk) for sums in self._sums]
        insides = inside or (None,) * len(outputs)
        flags = [] if self._flag is None else [self._flag.total]
        with torch.inference_mode():
            parts = [sums.results() for sums in self._sums]
            arrays = [*flags, *(array for part in parts for array in part)]
            pending = fetch(pipeline.accelerator, pipeline.download_stream, arrays)
        pipeline.enqueued(pending.done)
        counts = [len(part) for part in parts]

        def finish() -> tuple[Contribution, ...] | None:
            results = pending.wait()
            if flags and not np.isfinite(results[0]).all():
                return None
            arrays = iter(results[len(flags) :])
            return tuple(
                contribution(plan, chunk, list(islice(arrays, count)), within)
                for (plan, chunk), count, within in zip(outputs, counts, insides, strict=True)
            )

        return finish

    def _own(self, sums: DeviceSums, patches: Sequence[Patch]) -> Sequence[Patch]:
        """Return the patches with the boxes that they have in the output of these sums."""
        return sums.plan.own_patches(self._pipeline.plan, patches)
