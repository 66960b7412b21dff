"""Summarize the timing of a job in one sentence, and advise on its largest loss of time."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from types import MappingProxyType

from chunkq.timing.timing import Timing
from chunkq.units import si

MIN_ADVISED_SECONDS = 20.0
"""Time of all workers below which there is no advice."""
MIN_SHARE_REPORTED, MIN_SHARE_ADVISED = 0.01, 0.1
"""Smallest shares of the workers' time of a loss that is reported, and of one with advice."""
FEW_CHUNKS = 4
"""Chunks per worker below which the first and the last chunk of a worker dominate."""
MAX_DEPTH = 12
"""Largest number of chunks in flight that is advised; beyond it, storage is the limit."""
LOSSES = {
    "load": "loading the network",
    "read": "waiting for input",
    "write": "waiting for output to be written",
    "finalize": "finalizing blocks",
    "downsample": "making pyramids",
    "other": "between the stages of a chunk",
    "idle": "waiting for tasks",
    "tail": "waiting for the last worker",
}
"""Shares of the workers' time in which no device computes, with their descriptions."""


def conclusion(timing: Timing) -> str:
    """Return a sentence with the share of time that devices computed and the largest losses."""
    if not timing.chunks:
        return "No chunk is computed yet."
    shares = timing.worker_time_shares
    largest = [
        k for k in sorted(LOSSES, key=lambda k: -shares[k]) if shares[k] >= MIN_SHARE_REPORTED
    ][:3]
    losses = ", ".join(f"{shares[key]:.0%} {LOSSES[key]}" for key in largest)
    computing = f"The devices computed {shares['compute']:.0%} of the time"
    return f"{computing}; other time: {losses}." if losses else f"{computing}."


def advice(timing: Timing) -> str | None:
    """Return how to make such a job faster; None if it was too short or has no large loss."""
    total = sum(worker.seconds + worker.tail_seconds for worker in timing.workers.values())
    if total < MIN_ADVISED_SECONDS:
        return None
    shares = timing.worker_time_shares
    loss = max(LOSSES, key=lambda key: shares[key])
    if shares[loss] >= MIN_SHARE_ADVISED:
        return REMEDIES[loss](timing)
    if shares["compute"] >= 1 - 2 * MIN_SHARE_ADVISED:
        return "The devices are the limit. Use more workers or faster devices."
    return None


def _load(timing: Timing) -> str:
    workers = len(timing.workers)
    return (
        f"A worker took {timing.seconds['load'] / workers:.1f} s to load the network and computed "
        f"{timing.chunks / workers:.0f} chunks. Use fewer workers, or a larger volume per job."
    )


def _tail(timing: Timing) -> str:
    if timing.chunks < FEW_CHUNKS * len(timing.workers):
        return (
            f"There are only {timing.chunks / len(timing.workers):.1f} chunks per worker, so some "
            "workers finished early. Set a smaller `chunksize`, or use fewer workers."
        )
    return "Some workers finished long before the last chunk. Check the stragglers in the report."


def _idle(timing: Timing) -> str:
    return (
        "Workers waited for tasks, which were queued or requeued late. Queue the job before the "
        "workers start, and check the chunks that were retried."
    )


def _finalize(timing: Timing) -> str:
    return "Blocks overlap a lot. Set a larger `chunksize` or smaller `storage_chunks`."


def _downsample(timing: Timing) -> str:
    return "Making pyramids took long. Put the output on faster storage."


def _other(timing: Timing) -> str:
    return (
        "The job folder's storage is slow, or other jobs used the devices. Put the job folder on "
        "faster storage, or run fewer jobs at a time."
    )


def _storage(timing: Timing, loss: str) -> str:
    """Return advice for devices that wait for input ("read") or output ("write")."""
    seconds = timing.seconds
    cycle = seconds["read"] + seconds["compute"] + seconds["write"]
    depth = ceil(cycle / seconds["compute"]) if seconds["compute"] else MAX_DEPTH + 1
    if timing.chunks < FEW_CHUNKS * len(timing.workers):
        return (
            f"There are only {timing.chunks / len(timing.workers):.1f} chunks per worker, so the "
            "first read and the last write of a worker overlap with no computation. Set a smaller "
            "`chunksize`."
        )
    if timing.chunks_in_flight < depth <= MAX_DEPTH:
        return (
            f"A worker had at most {timing.chunks_in_flight} chunks in flight. Set `--depth "
            f"{depth}` to read and write while the network computes; each additional chunk needs "
            f"{si(timing.one_more_in_flight_bytes, 'B')} of memory."
        )
    volume, direction = ("input", "Reading") if loss == "read" else ("output", "Writing")
    moved = timing.bytes["input"] if loss == "read" else _written_by_chunks(timing)
    speed = moved / seconds[loss] if seconds[loss] else 0.0
    return (
        f"{direction} is the limit, at {si(speed, 'B/s')} per chunk in flight. Use faster storage "
        f"for the {volume}, or cheaper compression; more devices do not help."
    )


def _written_by_chunks(timing: Timing) -> int:
    """Return the bytes that chunks wrote, without those written by finalizing."""
    workers = timing.workers.values()
    return sum(w.bytes.get("output", 0) + w.bytes.get("pieces", 0) for w in workers)


REMEDIES: MappingProxyType[str, Callable[[Timing], str]] = MappingProxyType(
    {
        "load": _load,
        "read": lambda timing: _storage(timing, "read"),
        "write": lambda timing: _storage(timing, "write"),
        "finalize": _finalize,
        "downsample": _downsample,
        "other": _other,
        "idle": _idle,
        "tail": _tail,
    }
)
"""Functions that return the advice for each loss."""
