"""One batch of patches from the middle of a volume, on which the network is checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.errors import ErrorCode, JobError, ModelError, PredictionError
from chunkq.geometry.box import Box
from chunkq.job.mask_source import mask_of
from chunkq.job.record import JobRecord
from chunkq.plan.chunk import Chunk, Patch
from chunkq.plan.patch_selection import SkipRules
from chunkq.plan.plan import Plan
from chunkq.plan.sample_chunks import fullest_chunk, sample_chunks
from chunkq.storage.array import Array
from chunkq.storage.padded_reading import read_padded
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.output_checks import OutputChecks, Repeat

MAX_CHUNKS = 8
"""Chunks that are read in search of a patch that is not empty."""
log = logging.getLogger("chunkq.worker")


@dataclass(frozen=True)
class TrialBatch:
    """Patches and the inputs that they read, from voxel `origin` on; see `Batcher`."""

    patches: tuple[Patch, ...]
    halos: Halos
    origin: tuple[int, ...]

    @classmethod
    def read(cls, record: JobRecord, plan: Plan, size: int) -> TrialBatch:
        """Read at most `size` patches of a chunk of the largest item, which has this plan.

        The job's rules for empty patches are followed, unless they skip all patches of the first
        MAX_CHUNKS chunks that are looked at.
        """
        chunk, arrays = fullest_chunk(plan, enough=size), record.largest_item.open()
        first = list(islice(plan.patches(chunk), size))
        if (select := _selection(record, plan)) is not None:
            for other in [chunk, *islice(_others(plan, chunk), MAX_CHUNKS - 1)]:
                run = select(other, cls._read(record, other.halo, arrays))[:size]
                if run:
                    return cls._of(record, run, arrays)
        return cls._of(record, first, arrays)

    @classmethod
    def _of(
        cls, record: JobRecord, patches: Sequence[Patch], arrays: Sequence[Array]
    ) -> TrialBatch:
        window = _bounding_box(patches)
        return cls(tuple(patches), cls._read(record, window, arrays), window.start)

    @staticmethod
    def _read(record: JobRecord, window: Box, arrays: Sequence[Array]) -> Halos:
        job = record.job
        return [read_padded(array, window, job.pad_mode, job.pad_value) for array in arrays]

    def repeat_first(self, batcher: Batcher) -> Repeat | None:
        """Return `OutputChecks.compare`'s argument of this name."""
        if not batcher.can_sample:
            return None
        return lambda: batcher.raw_alone(self.patches[0], self.halos, self.origin)

    def raw(self, batcher: Batcher, patches: Sequence[Patch]) -> tuple[npt.NDArray[Any], ...]:
        """Return the raw outputs (n, C, *Q) of each head for as many patches as fit in a batch."""
        while True:
            outputs = batcher.raw(patches[: batcher.size], self.halos, self.origin)
            if outputs is not None:
                return outputs


def _selection(record: JobRecord, plan: Plan) -> Callable[[Chunk, Halos], Sequence[Patch]] | None:
    """Return a function that selects the patches of a chunk that run; None if all do.

    Storage chunks that are missing are not looked for.
    """
    job, source, inside = record.job, record.mask, None
    if source is not None and job.mask is not None:
        image, (time, _) = record.largest_item.image.sources[0], record.largest_item.series_point
        inside = mask_of(source, source.open(), image, time, job.mask).inside
    rules = SkipRules(inside, job.empty_rule)
    if rules == SkipRules():
        return None
    return lambda chunk, halos: rules.select(plan, chunk, halos).run


def _others(plan: Plan, chunk: Chunk) -> Iterator[Chunk]:
    chunks = sample_chunks(plan)
    return (other for other in chunks if other.patches and other.index != chunk.index)


def check_on_patches(record: JobRecord, plan: Plan, batcher: Batcher) -> None:
    """Run a batch of real patches; raise the errors that concern the whole job.

    Raise JobError if a `dtype` cannot hold values of the volume, of a step or of the network, and
    ModelError as workers do. Workers report other errors with their chunks.
    """
    try:
        batch = TrialBatch.read(record, plan, batcher.size)
        batcher.check_input(batch.halos, batch.origin)
        for _ in batcher.predictions(batch.patches, batch.halos, batch.origin):
            pass
        if batcher.checks is not None and not batcher.checks.is_repeated:
            _repeat_noise(batcher, batcher.checks, batch)
    except (ModelError, JobError):
        raise
    except PredictionError as error:
        if error.code is ErrorCode.DTYPE_UNSUITABLE:
            raise JobError(str(error), code=error.code) from error
        if error.code is ErrorCode.OUTPUT_IS_LABELS:
            raise ModelError(str(error), code=error.code) from error
    except Exception as error:  # of any class, from storage, a step or the network
        log.debug("the network was not checked on patches: %s", error)


def _repeat_noise(batcher: Batcher, checks: OutputChecks, batch: TrialBatch) -> None:
    """Compare two runs on values that differ, because equal ones can hide what is random."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 2, halo.shape).astype(halo.dtype) for halo in batch.halos]
    changed = TrialBatch(batch.patches, noise, batch.origin)
    with suppress(PredictionError):  # a step can return what no patch of the volume gives
        checks.begin()
        outputs = changed.raw(batcher, batch.patches)
        checks.compare(
            outputs,
            lambda: changed.raw(batcher, batch.patches),
            changed.repeat_first(batcher),
            is_repeatable=batcher.is_repeatable,
        )


def _bounding_box(patches: Sequence[Patch]) -> Box:
    starts = [patch.source.start for patch in patches]
    stops = [patch.source.stop for patch in patches]
    return Box(
        tuple(map(min, zip(*starts, strict=True))), tuple(map(max, zip(*stops, strict=True)))
    )
