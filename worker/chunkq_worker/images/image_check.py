"""Check of the network of a job over images, on some images of the list."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from chunkq.errors import ErrorCode, ModelError
from chunkq.images.transform import Placement
from chunkq.job.image_rows import sample_rows
from chunkq.job.record import JobRecord
from chunkq.model_check import ModelCheck, PatchCheck, ValueCheck
from chunkq.paths import without_secret
from chunkq.system.memory import peak_bytes
from chunkq.units import counted
from chunkq_worker.device import get_device
from chunkq_worker.images.chunk_rows import columns_of, reduced
from chunkq_worker.images.compute import readers, row_inputs
from chunkq_worker.images.engine import Heads, ImageEngine
from chunkq_worker.images.rows import FailedRow, RowOutput, Values, run_rows

ROUNDS = 3
"""Number of timed batches; the median is reported."""


def check_images(record: JobRecord, *, is_timed: bool = False) -> ModelCheck:
    """Load the network and run it on images of the list; raise ChunkqError if it is unusable.

    Images that cannot be read are left out. If all of the sample are, the network runs on zeros.
    """
    job, device = record.job, get_device()
    before = time.perf_counter()
    engine = device.load_images(record).result()
    load_seconds = time.perf_counter() - before
    loaded_bytes, batches = peak_bytes(), list[Sequence[Values]]()
    size = job.model.max_batch_size

    def network(batch: Sequence[Values]) -> Heads:
        batches.append(batch)
        return device.run(lambda: engine(batch)).result()

    sample = sample_rows(record.sources[0])
    sample = sample[:: max(1, -(-len(sample) // size))]
    inputs = row_inputs(
        job,
        [path for path, _, _ in sample],
        [frame for _, frame, _ in sample],
        [state for _, _, state in sample],
    )
    results = list(
        run_rows(inputs, job.image_spec, network, max_batch_size=size, threads=readers(job))
    )
    predicted = [one for one in results if isinstance(one, RowOutput)]
    refused = [one.error for one in results if isinstance(one, FailedRow)]
    notes: list[str] = []
    if not batches:
        if refused:
            tried = counted(len(refused), "image", "images")
            path = without_secret(sample[0][0])
            notes.append(f"of {tried} of the list none can be read ({path}: {refused[0]})")
        shape = engine.input_shape
        heads = tuple(head[0] for head in network([np.zeros(shape, np.float32)]))
        frame = (shape[1], shape[2])
        predicted = [RowOutput(0, heads, Placement(frame, frame, (0, 0), frame))]
    elif not predicted and all(error.code is ErrorCode.IMAGE_UNSUITABLE for error in refused):
        raise ModelError(f"{refused[0]}")
    columns_of(job, [reduced(job, one) for one in predicted])
    outputs = [one.values[0] for one in predicted]
    return ModelCheck(
        batch=len(batches[0]),
        device=engine.runtime.device,
        load_seconds=load_seconds,
        loaded_bytes=loaded_bytes,
        peak_bytes=peak_bytes(),
        device_bytes=engine.runtime.device_bytes(),
        notes=(*engine.runtime.notes(), *notes),
        # Of a network of sleap-nn the pixels are those of the frames, and the outputs no values.
        # Zeros in the place of images say nothing either.
        values=ValueCheck()
        if job.model.package is not None or len(refused) == len(sample)
        else ValueCheck(_span(batches[0]), _span(outputs), has_preprocessing=False),
        patches=_timed(engine, batches[0]) if is_timed else None,
    )


def _timed(engine: ImageEngine, batch: Sequence[Values]) -> PatchCheck:
    seconds: list[float] = []
    for _ in range(ROUNDS):
        before = time.perf_counter()
        heads = get_device().run(lambda: engine(batch)).result()
        seconds.append(time.perf_counter() - before)
    largest = max(float(np.nanmax(np.abs(head), initial=0.0)) for head in heads)
    is_finite = all(bool(np.isfinite(head).all()) for head in heads)
    return PatchCheck(len(batch), median(seconds), is_finite, largest)


def _span(arrays: Sequence[Values]) -> tuple[float, float] | None:
    """Return the smallest and the largest value of arrays, None without any."""
    if not arrays:
        return None
    lows, highs = zip(*((float(np.min(a)), float(np.max(a))) for a in arrays), strict=True)
    return min(lows), max(highs)
