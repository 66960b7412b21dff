"""Timing of a job, as stored in `report.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

STAGES = ("read", "wait", "load", "compute", "write")
"""Stages of a chunk, in the order in which it passes them; `wait` is for the device."""
TIME_PARTS = (
    "compute", "load", "read", "write", "finalize", "downsample", "other", "idle",
)  # fmt: skip
"""Parts of a worker's time. Each moment belongs to the first one that is in progress."""
BINS = 60
"""Number of bins of a timeline."""
STRAGGLER_FACTOR, STRAGGLER_SECONDS = 3.0, 1.0
STRAGGLER_RULE = (
    f"more than {STRAGGLER_FACTOR:.0f} times as long as expected for their patches, and "
    f"{STRAGGLER_SECONDS:.0f} s longer, not counting the time to wait for the device and to load "
    "the network"
)


@dataclass(frozen=True)
class Worker:
    """Timing of one worker process, from the start of its first chunk to the end of its last.

    stage_seconds   seconds by stage, summed over its chunks, which overlap in time
    shares          shares of its time by `TIME_PARTS`; they add up to 1. `compute`: the device
                    computes. `load`: it loads the network. Otherwise the device is idle while a
                    chunk is read (`read`) or written (`write`), a block is finalized (`finalize`),
                    a level of a pyramid is made (`downsample`), another task is in flight
                    (`other`), or no task is in flight (`idle`)
    tail_seconds    from its end to the end of the job's last chunk; 0 if another chunk was started
                    after it, because the worker was then stopped
    """

    host: str
    device: str
    chunks: int
    patches: int
    first: float
    seconds: float
    device_busy_share: float
    device_wait_share: float
    shares: dict[str, float]
    stage_seconds: dict[str, float]
    bytes: dict[str, int]
    chunks_in_flight: int
    peak_rss_bytes: int
    retried: int
    tail_seconds: float


@dataclass(frozen=True)
class Timeline:
    """The job over time, in `BINS` equal bins from its first chunk's start to its last chunk's end.

    patches_per_second   throughput; the patches of a chunk are spread evenly over its duration
    workers              mean number of active workers
    computing            mean number of devices that compute
    """

    bin_seconds: float = 0.0
    patches_per_second: tuple[float, ...] = ()
    workers: tuple[float, ...] = ()
    computing: tuple[float, ...] = ()


@dataclass(frozen=True)
class Durations:
    """Distribution of the durations of chunks, in seconds.

    `whole` is the time from the start to the end of a chunk. `own` excludes the stages `wait` and
    `load`.

    mean        mean of `whole`
    quantiles   quantiles of `whole`, `own` and each stage; keys are fractions such as "0.5"
    edges       edges of the bins of a histogram of `own`, in a geometric progression
    counts      number of chunks per bin
    """

    mean: float = 0.0
    quantiles: dict[str, dict[str, float]] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Straggler:
    """A chunk that took much longer than expected, and the stage that deviates most.

    Computing is expected to take the median time per patch, everything else the median time.
    """

    chunk: str
    worker: str
    attempt: int
    patches: int
    seconds: float
    expected_seconds: float
    stage: str
    stage_seconds: float
    stage_expected: float


@dataclass(frozen=True)
class Stragglers:
    """Number of stragglers, their excess over what is expected, and those that exceed it most.

    `median` is the median duration of all chunks, in seconds.
    """

    rule: str = STRAGGLER_RULE
    median: float = 0.0
    count: int = 0
    excess_seconds: float = 0.0
    worst: tuple[Straggler, ...] = ()


@dataclass(frozen=True)
class FinalizeTiming:
    """Number of finalized blocks, seconds summed over them, and seconds after the last chunk."""

    blocks: int = 0
    seconds: float = 0.0
    seconds_after: float = 0.0


@dataclass(frozen=True)
class LevelTiming:
    """Tasks that made levels of pyramids, those that the plan has, and seconds summed over them."""

    tasks: int = 0
    planned: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Fetching:
    """What the workers fetched of the inputs, as far as it is counted.

    requests        requests for stored objects, or for parts of them
    bytes           size of the answers, compressed as they are stored
    storage_chunks  storage chunks that the job reads; 0 if an input has none
    """

    requests: int = 0
    bytes: int = 0
    storage_chunks: int = 0


@dataclass(frozen=True)
class Timing:
    """Timing of a job. Bytes count uncompressed voxels; times are Unix seconds.

    wall_seconds               from the first task's start to the last task's end, with finalizing
    paused_seconds             part of `wall_seconds` without a task in flight
    work_seconds               from the first chunk's start to the last chunk's end
    planned_patches            of all tasks, without those that are known to be empty beforehand
    skipped_patches            patches of tasks that turned out to be empty
    voxels                     of the output; each patch stands for an equal part of them
    patches_per_second         speed over `work_seconds`, and so is `voxels_per_second`
    seconds                    seconds by stage, summed over all chunks, and `finalize`
    bytes                      moved by kind; `levels` and `level_below` are what the levels of
                               pyramids wrote, and what they read for it
    planned_array_bytes        planned peak of the arrays of `chunks_in_flight` chunks
    one_more_in_flight_bytes   planned increase of that peak per additional chunk in flight
    worker_time_shares         shares of the time and tails of all workers by `TIME_PARTS` and
                               `tail`; they add up to 1
    """

    chunks: int
    planned_chunks: int
    finalized_blocks: int
    planned_blocks: int
    patches: int
    planned_patches: int
    skipped_patches: int
    voxels: int
    started: float
    wall_seconds: float
    paused_seconds: float
    work_seconds: float
    patches_per_second: float
    voxels_per_second: float
    seconds: dict[str, float]
    chunk_seconds_mean: float
    bytes: dict[str, int]
    planned_bytes: dict[str, int]
    peak_rss_bytes: int
    planned_array_bytes: int
    one_more_in_flight_bytes: int
    chunks_in_flight: int
    retried: int
    worker_time_shares: dict[str, float]
    tail_seconds: float
    finalizing: FinalizeTiming
    timeline: Timeline
    durations: Durations
    stragglers: Stragglers
    workers: dict[str, Worker]
    fetching: Fetching = Fetching()
    levels: LevelTiming = LevelTiming()
