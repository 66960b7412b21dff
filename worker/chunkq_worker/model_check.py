"""Tries a job's network, in a process of its own.

`python -m chunkq_worker.model_check [--whole DEPTH]` reads a job record on standard input and
writes the fields of a `ModelCheckResult` as one line of JSON. Without --whole
it only loads the network and runs a batch of zeros. With it, it also runs patches
from the middle of the volume in several ways, then whole chunks, DEPTH at once, to measure the
memory that a worker will need.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.box import Box
from chunkq.errors import ChunkqError
from chunkq.job_handle import JobHandle
from chunkq.memory import peak_bytes
from chunkq.plan import Patch, Plan
from chunkq.record import JobRecord
from chunkq.sample_job import recreate_job
from chunkq.stores import open_array, read_padded
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.child_env import child_env
from chunkq_worker.devices import cores
from chunkq_worker.inference_engine import InferenceEngine, get_device
from chunkq_worker.measure_memory import measure_memory

FEW_CHUNKS = 1000
ROUNDS = 3
"""Timed batches; the median counts."""


@dataclass
class ModelCheckResult:
    """What trying a network showed; None where it was not looked at.

    `load_seconds` ends with the first batch. Of real patches: `batch_seconds`, the output's
    `lowest` and `highest` before any activation, whether all of it is `finite`, the largest
    difference of a patch's result when it lies elsewhere in the batch (`by_position`) and in a
    batch of another size (`by_batch_size`; `other_size`, None if the network takes one size only).
    `tile_norms` are layers that normalise by statistics of the tile. Bytes are the largest
    resident memory of the process and what was allocated on the device, at the end. The former
    with the network loaded is `loaded_bytes`, and `worker_bytes` after `chunks` whole chunks,
    `depth` at once: libraries, network and arrays of a worker process; `memory_error` says why
    that could not be found out.
    """

    error: str | None = None
    batch: int | None = None
    load_seconds: float | None = None
    batch_seconds: float | None = None
    patches: int | None = None
    finite: bool | None = None
    lowest: float | None = None
    highest: float | None = None
    by_position: float | None = None
    by_batch_size: float | None = None
    other_size: int | None = None
    tile_norms: tuple[str, ...] = ()
    peak_bytes: int | None = None
    device_bytes: int | None = None
    device: str | None = None
    depth: int | None = None
    chunks: int | None = None
    loaded_bytes: int | None = None
    worker_bytes: int | None = None
    memory_error: str | None = None


def main(*arguments: str) -> None:
    """Answer on standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, help="chunks at once; none are tried without it")
    parser.add_argument("--folder", help="where to, empty; whoever asks removes it")
    asked = parser.parse_args(arguments)
    finding = ModelCheckResult()
    try:
        record = JobRecord.from_json(sys.stdin.buffer.read())
        run_check(finding, record, asked.depth, asked.folder)
    except ChunkqError as error:
        finding.error = str(error)
    sys.stdout.write(json.dumps(asdict(finding)) + "\n")


def run_check(
    finding: ModelCheckResult,
    record: JobRecord,
    depth: int | None = None,
    folder: str | None = None,
) -> None:
    """Load the network and fill in a finding; raises ChunkqError.

    All of it with `depth`, the chunks to compute at once, and an empty `folder` for them.
    """
    # Where a worker has its network: libraries keep threads and memory per calling thread.
    on_device = get_device().run
    before = time.perf_counter()
    engine = on_device(lambda: InferenceEngine(record, record.plan())).result()
    finding.load_seconds = time.perf_counter() - before
    finding.loaded_bytes = peak_bytes()
    if depth is not None and folder is not None:
        finding.depth = depth
        _measure_memory(finding, engine, recreate_job(record, folder))
    before = time.perf_counter()
    on_device(engine.batcher.warm_up).result()
    finding.load_seconds += time.perf_counter() - before
    finding.batch, finding.device = engine.batcher.size, engine.runtime.device
    if depth is not None:
        on_device(lambda: _try_patches(finding, engine, record)).result()
    finding.tile_norms = engine.runtime.tile_norms()
    finding.peak_bytes, finding.device_bytes = peak_bytes(), engine.runtime.device_bytes()


def _restart_with_worker_env() -> None:
    """Start again with the environment of a worker process, unless this is it."""
    born = {**os.environ, **child_env(cores())}
    if born != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], born)


def _measure_memory(finding: ModelCheckResult, engine: InferenceEngine, job: JobHandle) -> None:
    try:
        done = measure_memory(engine, job, finding.depth or 1)
    except Exception as error:  # what is wrong with the network itself shows right after this
        finding.memory_error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    else:
        finding.chunks, finding.worker_bytes = done.chunks, done.worker_bytes


def _try_patches(finding: ModelCheckResult, engine: InferenceEngine, record: JobRecord) -> None:
    patches = middle_patches(engine.plan, engine.batcher.size)
    window = _around(patches)
    job = record.job
    halos = [
        read_padded(open_array(source.array_path), window, job.pad_mode, job.pad_value)
        for source in record.sources
    ]
    _measure(finding, engine, patches, halos, window.start)


def middle_patches(plan: Plan, most: int) -> list[Patch]:
    """Return patches of one chunk, `most` at the most: of the middle one, if it has so many."""
    middle = tuple(blocks // 2 for blocks in plan.blocks)
    few = plan.costs.chunks <= FEW_CHUNKS
    near = map(plan.chunk, plan.indices() if few else [middle, (0,) * plan.rank])
    chunk = min(
        near,
        key=lambda chunk: (
            -min(most, chunk.patches),
            sum(abs(i - m) for i, m in zip(chunk.index, middle, strict=True)),
        ),
    )
    found = []
    for patch in plan.patches(chunk):
        found.append(patch)
        if len(found) == most:
            break
    return found


def _around(patches: Sequence[Patch]) -> Box:
    starts = [patch.source.start for patch in patches]
    stops = [patch.source.stop for patch in patches]
    return Box(
        tuple(map(min, zip(*starts, strict=True))), tuple(map(max, zip(*stops, strict=True)))
    )


def _measure(
    finding: ModelCheckResult,
    engine: InferenceEngine,
    patches: list[Patch],
    halos: Halos,
    origin: tuple[int, ...],
) -> None:
    seconds, first = [], _run(engine.batcher, patches, halos, origin)
    for _ in range(ROUNDS):
        before = time.perf_counter()
        _run(engine.batcher, patches, halos, origin)
        seconds.append(time.perf_counter() - before)
    finding.batch_seconds, finding.patches = median(seconds), len(patches)
    finding.finite = bool(np.isfinite(first).all())
    finding.lowest, finding.highest = float(np.nanmin(first)), float(np.nanmax(first))
    if len(patches) > 1:
        turned = _run(engine.batcher, [*patches[1:], patches[0]], halos, origin)
        finding.by_position = _difference(np.roll(turned, 1, axis=0), first)
    size = engine.batcher.size
    if size > 1:
        other = engine.batcher.of_size(max(1, size // 2))
        try:
            smaller = _run(other, patches[: other.size], halos, origin)
        except Exception:
            return  # a network with its batch size built in; that is no fault
        finding.other_size = other.size
        finding.by_batch_size = _difference(smaller, first[: len(smaller)])


def _run(
    batcher: Batcher, patches: Sequence[Patch], halos: Halos, origin: tuple[int, ...]
) -> npt.NDArray[Any]:
    while True:
        outputs = batcher.raw(patches[: batcher.size], halos, origin)
        if outputs is not None:
            return outputs


def _difference(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    count = min(len(one), len(other))
    return float(np.nanmax(np.abs(one[:count] - other[:count]), initial=0.0))


if __name__ == "__main__":
    logging.getLogger("chunkq").setLevel(logging.ERROR)
    _restart_with_worker_env()
    main(*sys.argv[1:])
