"""Compute the chunks of a plan: run their patches, blend the predictions, return the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from typing_extensions import override

from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Accumulator, Contribution
from chunkq.plan.chunk import Chunk, Patch
from chunkq.plan.patch_selection import Inside, PatchSelection
from chunkq.plan.plan import Plan
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.runtimes.base import Runtime

Finish = Callable[[], tuple[Contribution, ...] | None]
"""Waits for a chunk's results, one per output. Any thread may call it.

Returns None if an output of the network may not be finite. The caller then starts the chunk again
with `checked=True`, which raises the error, or returns the same results if there is none.
"""


class ChunkRun(ABC):
    """One chunk that is computed. Use it in the thread of its pipeline."""

    @abstractmethod
    def add(self, patches: Sequence[Patch]) -> None:
        """Run patches of the chunk and blend their predictions."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the device has done what was added so far."""

    @abstractmethod
    def add_empty(self, patches: Sequence[Patch]) -> None:
        """Add the predictions of patches that are skipped because they are empty."""

    @abstractmethod
    def finish(self, inside: Inside | None = None) -> Finish:
        """Return the function that waits for the results. Call nothing else afterwards.

        `inside` has for each output which voxels of its region are inside the mask; None if all
        are.
        """


class ChunkPipeline(ABC):
    """Computes chunks of one plan, one after the other."""

    plan: Plan

    @abstractmethod
    def open(self, chunk: Chunk, halos: Halos, *, checked: bool = False) -> ChunkRun:
        """Return a run of a chunk without patches; `halos` contain one array per input.

        If `checked`, `add` raises PredictionError for outputs that are not finite, unless the job
        replaces them.
        """

    def start(
        self,
        chunk: Chunk,
        halos: Halos,
        selection: PatchSelection | None = None,
        *,
        checked: bool = False,
    ) -> Finish:
        """Compute the selected patches of a chunk, by default all."""
        selected = selection or PatchSelection.of_all(self.plan, chunk)
        run = self.open(chunk, halos, checked=checked)
        run.add(selected.run)
        run.add_empty(selected.empty)
        return run.finish(selected.inside)


class HostPipeline(ChunkPipeline):
    """Computes chunks with a runtime whose results are in host memory; each output is checked."""

    def __init__(
        self, plan: Plan, runtime: Runtime, batcher: Batcher, weights: Sequence[PatchWeights]
    ) -> None:
        """Use the weights of each output."""
        self.plan, self._runtime = plan, runtime
        self._batcher, self._weights = batcher, weights

    @override
    def open(self, chunk: Chunk, halos: Halos, *, checked: bool = False) -> ChunkRun:
        sums = []
        for view, weights in zip(self.plan.views, self._weights, strict=True):
            part, output = view.chunk(chunk.index), view.output
            shape = (output.sums_channels, *part.region.shape)
            zeros = self._runtime.zeros(shape, output.sums_dtype)
            sums.append(Accumulator(view, part, weights, zeros))
        return HostRun(self.plan, self._batcher, self._weights, sums, chunk, halos)


class HostRun(ChunkRun):
    """A chunk whose sums are in host memory."""

    def __init__(
        self,
        plan: Plan,
        batcher: Batcher,
        weights: Sequence[PatchWeights],
        sums: Sequence[Accumulator],
        chunk: Chunk,
        halos: Halos,
    ) -> None:
        """Use the weights and the sums of each output."""
        self._plan, self._batcher, self._weights, self._sums = plan, batcher, weights, sums
        self._chunk, self._halos = chunk, halos

    @override
    def add(self, patches: Sequence[Patch]) -> None:
        every = list(self._own(patches))
        for weights, own in zip(self._weights, every, strict=True):
            weights.prepare(own)
        done, origin = 0, self._chunk.halo.start
        for batch, predictions in self._batcher.predictions(patches, self._halos, origin):
            stop = done + len(batch)
            for sums, own, values in zip(self._sums, every, predictions, strict=True):
                sums.add(own[done:stop], values)
            done = stop

    @override
    def wait(self) -> None:
        pass

    @override
    def add_empty(self, patches: Sequence[Patch]) -> None:
        for sums, own in zip(self._sums, self._own(patches), strict=True):
            sums.add_empty(own)

    @override
    def finish(self, inside: Inside | None = None) -> Finish:
        insides = inside or (None,) * len(self._sums)
        results = tuple(
            sums.contribution(within) for sums, within in zip(self._sums, insides, strict=True)
        )
        return lambda: results

    def _own(self, patches: Sequence[Patch]) -> Iterator[Sequence[Patch]]:
        """Yield the patches with the boxes that they have in each output."""
        return (view.own_patches(self._plan, patches) for view in self._plan.views)
