"""Run a job's network on a device, from one thread."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any

import numpy as np

from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Contribution
from chunkq.geometry.grid_spec import GridSpec
from chunkq.job.axis_order import channels_first, input_channels
from chunkq.job.record import JobRecord
from chunkq.job.user_code import load_blend_weights
from chunkq.job.user_modules import UserModules
from chunkq.plan.chunk import Chunk
from chunkq.plan.patch_selection import PatchSelection
from chunkq.plan.plan import Plan
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.chunk_pipeline import ChunkPipeline, Finish, HostPipeline
from chunkq_worker.created_values import check_created_values
from chunkq_worker.network_heads import head_names
from chunkq_worker.network_loading import check_files, thread_count
from chunkq_worker.output_checks import OutputChecks
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.steps import Steps
from chunkq_worker.value_watch import ValueWatch

ENGINES_CACHED = 2
"""Engines, and with them loaded networks, that a process keeps at most."""


class InferenceEngine:
    """A loaded network with the blend weights and buffers of one plan.

    Call it from the device thread only: math libraries create one thread pool per calling thread.
    """

    def __init__(
        self, record: JobRecord, plan: Plan, network: Any = None, steps: Steps | None = None
    ) -> None:
        """Load the network; raise ModelError or JobError if the job cannot use it.

        The objects `network` and `steps` replace those that the job names, if they are not None.
        """
        check_files(record)
        self._job = job = record.job
        self._network_key = _network_key(record, plan)
        channels = input_channels(job.model, plan.volume)
        self._model = channels_first(job.model, plan.rank, channels)
        heads = head_names(plan.outputs)
        shapes = ItemShapes.of(job.model, plan.rank, channels, plan.volume.inputs, heads)
        self._modules = UserModules()
        with self._modules.collect():
            loaded = Steps.load(job.model.processing_steps) if steps is None else steps
            self._steps = loaded.for_heads(heads)
            self.runtime: Runtime = load_runtime(
                job.model, self._steps, thread_count(job), shapes, network=network
            )
            self.checks = OutputChecks(plan.outputs, is_stochastic=job.model.stochastic)
            self._allocate(plan)
            check_created_values(self.runtime, job.model)

    def for_plan(self, plan: Plan) -> InferenceEngine:
        """Return an engine for the same job and another volume; both share the network."""
        other = copy(self)
        other._allocate(plan)
        return other

    def _allocate(self, plan: Plan) -> None:
        self.plan = plan
        self.batcher = Batcher(
            plan,
            self._model,
            self.runtime,
            self._steps,
            self._network_key,
            self.checks,
            self._job.model,
        )
        self.pipeline = self._create_pipeline(self._load_weights(plan))
        if not self.runtime.any_batch:  # preparing for one batch size is part of loading
            self.batcher.prepare()

    def _load_weights(self, plan: Plan) -> list[PatchWeights]:
        """Return the blend weights of each output.

        Outputs share theirs if they have the same grid, and sums of the same dtype.
        """
        shared: dict[tuple[GridSpec, np.dtype[Any]], PatchWeights] = {}
        keys = [(view.grid, view.output.sums_dtype) for view in plan.views]
        for key, view in zip(keys, plan.views, strict=True):
            if key not in shared:
                weights = load_blend_weights(self._job.weight_function, view)
                shared[key] = PatchWeights(view, weights, self.runtime.to_device)
        return [shared[key] for key in keys]

    def _create_pipeline(self, weights: Sequence[PatchWeights]) -> ChunkPipeline:
        accelerator = self.runtime.accelerator
        if accelerator is None:
            return HostPipeline(self.plan, self.runtime, self.batcher, weights)
        from chunkq_worker.device_pipeline import DevicePipeline  # imports torch

        return DevicePipeline(self.plan, self.runtime, self.batcher, weights, accelerator)

    def compute(
        self, chunk: Chunk, halos: Halos, selection: PatchSelection | None = None
    ) -> tuple[Contribution, ...]:
        """Run the selected patches of a chunk, wait for the results of each output, return them.

        `halos` contain one array (*chunk.halo.shape) per input. By default all patches are run.
        """
        result = self.start(chunk, halos, selection)()
        return self.check(chunk, halos, selection) if result is None else result

    def start(
        self,
        chunk: Chunk,
        halos: Halos,
        selection: PatchSelection | None = None,
        watch: ValueWatch | None = None,
    ) -> Finish:
        """Compute a chunk; return a function that waits for its results.

        The device thread continues with the next chunk. If the function returns None, call `check`.
        The values of the first batch are reported to `watch`, if it is set. Raise PredictionError
        if the network's dtype cannot hold the input of a patch that runs.
        """
        is_partial = selection is not None and len(selection.run) < chunk.patches
        run = selection.run if selection is not None and is_partial else None
        self.batcher.check_input(halos, chunk.halo.start, run)
        with nullcontext() if watch is None else self.batcher.watched_by(watch):
            return self.pipeline.start(chunk, halos, selection)

    def check(
        self, chunk: Chunk, halos: Halos, selection: PatchSelection | None = None
    ) -> tuple[Contribution, ...]:
        """Compute a chunk and check each output; raise PredictionError for one that is not finite.

        Returns the results if all are finite.
        """
        result = self.pipeline.start(chunk, halos, selection, checked=True)()
        if result is None:
            raise RuntimeError("a checked chunk returned no result")
        return result

    def close(self) -> None:
        """Release the network, the user's modules and the device's memory."""
        self.runtime.close()
        self._modules.release()


def _network_key(record: JobRecord, plan: Plan) -> Hashable:
    """Return a key that is equal for networks whose batches need the same memory."""
    model = record.job.model.model_copy(update={"max_batch_size": 1})
    return model.model_dump_json(), plan.volume.inputs, tuple(sorted(record.file_hashes.items()))
