"""Compute the chunks of a plan in the memory of an accelerator.

All work of a chunk is enqueued without waiting for the device. While the device computes a chunk,
the input of the next one is copied to it, and the results of the one before are copied back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from typing_extensions import override

from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Contribution, contribution
from chunkq.blend.weights import Weights
from chunkq.plan.empty_rule import Bools
from chunkq.plan.footprint import extra_device_bytes
from chunkq.plan.patch_selection import PatchSelection
from chunkq.plan.plan import Chunk, Patch, Plan
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
        weights: Weights,
        accelerator: Accelerator,
    ) -> None:
        self.plan, self.batcher, self.accelerator = plan, batcher, accelerator
        self.weights = PatchWeights(plan, weights, runtime.to_device)
        self.run_weights = RunWeights(accelerator, self.weights)
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
                return self._start(chunk, halos, selected, checked=checked)
            except Exception as error:
                if not self._runtime.is_out_of_memory(error):
                    raise
                self._use_less_memory(error)
                self.batcher.patches_run = patches_run

    def _start(
        self, chunk: Chunk, halos: Halos, selected: PatchSelection, *, checked: bool
    ) -> Finish:
        # If memory is exhausted, the run and its memory are released with this frame.
        run = self.open(chunk, halos, checked=checked)
        run.add(selected.run)
        run.add_empty(selected.empty)
        return run.finish(selected.inside)

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
        self._sums = DeviceSums(
            pipeline.plan, chunk, pipeline.weights, pipeline.run_weights, accelerator
        )
        self._flag = None if checked else FiniteFlag(accelerator)

    @override
    def add(self, patches: Sequence[Patch]) -> None:
        batches = self._pipeline.batcher.predictions(
            patches, self._halos, self._chunk.halo.start, self._uploaded, self._flag
        )
        try:
            for batch, (predictions,) in batches:
                self._sums.add(batch, predictions)
        finally:
            if self._uploaded is not None:
                self._uploaded.release()

    @override
    def wait(self) -> None:
        accelerator = self._pipeline.accelerator
        accelerator.wait(accelerator.record(accelerator.current()))

    @override
    def add_empty(self, patches: Sequence[Patch]) -> None:
        self._sums.add_empty(patches)

    @override
    def finish(self, inside: Bools | None = None) -> Finish:
        plan, chunk, pipeline = self._pipeline.plan, self._chunk, self._pipeline
        flags = [] if self._flag is None else [self._flag.total]
        with torch.inference_mode():
            arrays = [*flags, *self._sums.results()]
            pending = fetch(pipeline.accelerator, pipeline.download_stream, arrays)
        pipeline.enqueued(pending.done)

        def finish() -> Contribution | None:
            results = pending.wait()
            if flags and not np.isfinite(results[0]).all():
                return None
            return contribution(plan, chunk, results[len(flags) :], inside)

        return finish
