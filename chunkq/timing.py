"""Where a job's time went: the figures that `report.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STAGES = ("read", "wait", "load", "compute", "write")
"""A chunk's stages, in their order."""
WAITING_STAGES = ("compute", "load", "read", "write", "finalize", "other", "idle")
"""What a worker's time is shared out to, each moment to the first that goes on in it."""
BINS = 60
STRAGGLER_FACTOR, STRAGGLER_SECONDS = 3.0, 1.0
STRAGGLER_RULE = (
    f"more than {STRAGGLER_FACTOR:.0f} times the median and {STRAGGLER_SECONDS:.0f} s above it, "
    "without waiting for the device and loading the network"
)


@dataclass(frozen=True)
class Worker:
    """One worker process. Its time runs from its first chunk's start to its last one's end.

    stage_seconds   summed over its chunks, which overlap; `wait` is for the device
    shares          of its time, by `HOLDERS`: `compute` while the device computes, `load` while it
                    loads the network; else the device stands still, with a chunk being read,
                    being written, a block being finalized, something in flight (`other`), or
                    nothing at all (`idle`). They add up to 1
    tail_seconds    from its end to the job's last chunk's; 0 if chunks were still begun after it
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
    """The job over time, in `BINS` equal bins from its first chunk's start to its last one's end.

    A chunk's voxels count evenly from its start to its end. `workers` is how many were at work on
    average, `computing` how many devices computed.
    """

    bin_seconds: float = 0.0
    voxels_per_second: tuple[float, ...] = ()
    workers: tuple[float, ...] = ()
    computing: tuple[float, ...] = ()


@dataclass(frozen=True)
class Durations:
    """How long chunks took (s): their `own` time is without waiting for device or network.

    quantiles   of `whole`, `own` and each stage, by the share of chunks that took no longer
    edges       of the histogram's bins, growing by a constant factor; `counts` of `own` times
    """

    mean: float = 0.0
    quantiles: dict[str, dict[str, float]] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Straggler:
    """A chunk that took far longer than others, and the stage in which it did."""

    chunk: str
    worker: str
    attempt: int
    seconds: float
    stage: str
    stage_seconds: float
    stage_median: float


@dataclass(frozen=True)
class Stragglers:
    """How many there are, how long they took beyond the median in sum, and the worst of them."""

    rule: str = STRAGGLER_RULE
    median: float = 0.0
    count: int = 0
    excess_seconds: float = 0.0
    worst: tuple[Straggler, ...] = ()


@dataclass(frozen=True)
class FinalizeTiming:
    """Blocks completed: the seconds spent on them in sum, and those after the last chunk."""

    blocks: int = 0
    seconds: float = 0.0
    seconds_after: float = 0.0


@dataclass(frozen=True)
class Timing:
    """A job's figures; bytes are those of uncompressed voxels, seconds are Unix or differences.

    wall_seconds    from the first task's start to the last one's end, finalizing included;
                    `paused_seconds` of them nobody had a task in flight
    work_seconds    from the first chunk's start to the last one's end
    crew_shares     of the workers' time taken together, and of their tails; they add up to 1
    seconds         by stage, over all chunks, and of finalizing

    `planned_array_bytes` are what the arrays of `chunks_in_flight` chunks take at most, by the
    plan; one chunk more takes `one_more_in_flight_bytes` more.
    """

    chunks: int
    planned_chunks: int
    finalized_blocks: int
    planned_blocks: int
    patches: int
    planned_patches: int
    voxels: int
    started: float
    wall_seconds: float
    paused_seconds: float
    work_seconds: float
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

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Timing:
        """Invert `as_dict`, leaving out what else a report holds; raises KeyError, TypeError."""
        found = {name: values[name] for name in cls.__dataclass_fields__}
        rest = found["stragglers"]
        return cls(
            **found
            | {
                "finalizing": FinalizeTiming(**found["finalizing"]),
                "timeline": Timeline(**_tuples(found["timeline"])),
                "durations": Durations(**_tuples(found["durations"])),
                "stragglers": Stragglers(
                    **rest | {"worst": tuple(Straggler(**one) for one in rest["worst"])}
                ),
                "workers": {name: Worker(**one) for name, one in found["workers"].items()},
            }
        )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON's values with its lists as tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
