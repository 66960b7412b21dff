"""What a job's figures come to: a sentence, and what to do about the largest loss."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from types import MappingProxyType

from chunkq.timing import Timing

ENOUGH_SECONDS = 20.0
"""Time of all workers from which figures are worth a piece of advice."""
MIN_SHARE_REPORTED, MIN_SHARE_ADVISED = 0.01, 0.1
"""Shares of the crew's time from which a loss is named, and from which something is advised."""
FEW_CHUNKS = 4
"""Chunks per worker below which the first and the last of them weigh."""
MAX_DEPTH = 12
"""Chunks in flight beyond which it is the storage that is slow."""
LOSSES = {
    "load": "into loading the network",
    "read": "into waiting for input",
    "write": "into waiting for output to be written",
    "finalize": "into completing blocks",
    "other": "into the time between a chunk's stages",
    "idle": "by without a chunk to work on",
    "tail": "into waiting for the last worker",
}


def conclusion(times: Timing) -> str:
    """Return in one sentence what the devices did, and where the rest of the time went."""
    if not times.chunks:
        return "No chunk is computed yet."
    shares = times.worker_time_shares
    named = [
        k for k in sorted(LOSSES, key=lambda k: -shares[k]) if shares[k] >= MIN_SHARE_REPORTED
    ][:3]
    losses = [f"{shares[key]:.0%} went {LOSSES[key]}" for key in named]
    return "; ".join([f"The devices computed {shares['compute']:.0%} of the time", *losses]) + "."


def advice(times: Timing) -> str | None:
    """Return what would make such a job faster; None where the figures say too little."""
    spent = sum(worker.seconds + worker.tail_seconds for worker in times.workers.values())
    if spent < ENOUGH_SECONDS:
        return None
    shares = times.worker_time_shares
    loss = max(LOSSES, key=lambda key: shares[key])
    if shares[loss] >= MIN_SHARE_ADVISED:
        return REMEDIES[loss](times)
    if shares["compute"] >= 1 - 2 * MIN_SHARE_ADVISED:
        return "The devices are the limit: more workers, or faster ones, would shorten it."
    return None


def _load(times: Timing) -> str:
    mean, each = times.seconds["load"] / len(times.workers), times.chunks / len(times.workers)
    return (
        f"A worker took {mean:.1f} s to load the network and then had {each:.0f} chunks: with "
        "fewer workers, or a larger volume in one job, that weighs less."
    )


def _tail(times: Timing) -> str:
    if times.chunks < FEW_CHUNKS * len(times.workers):
        return (
            f"With {times.chunks / len(times.workers):.1f} chunks per worker some had nothing "
            "left while others went on: a smaller `chunksize` lets them end together, fewer "
            "workers cost less."
        )
    return "Workers were done long before the last chunk: the stragglers say why."


def _idle(times: Timing) -> str:
    return "The queue had nothing for the workers: chunks were queued late, or came back late."


def _finalize(times: Timing) -> str:
    return "Blocks share much: a larger `chunksize` or smaller `storage_chunks` lower that."


def _other(times: Timing) -> str:
    return "The job folder's storage answers slowly, or other jobs had the devices meanwhile."


def _storage(times: Timing, loss: str) -> str:
    """Advise on devices that wait for input or output."""
    seconds = times.seconds
    cycle = seconds["read"] + seconds["compute"] + seconds["write"]
    wanted = ceil(cycle / seconds["compute"]) if seconds["compute"] else MAX_DEPTH + 1
    what, direction = ("input", "Reading") if loss == "read" else ("output", "Writing")
    if times.chunks < FEW_CHUNKS * len(times.workers):
        return (
            f"With {times.chunks / len(times.workers):.1f} chunks per worker the first one's "
            "reading and the last one's writing weigh: a smaller `chunksize` lets them overlap."
        )
    if times.chunks_in_flight < wanted <= MAX_DEPTH:
        return (
            f"At most {times.chunks_in_flight} chunks were in flight in a worker; with `--depth "
            f"{wanted}` reading and writing fit beside the network, if the memory does "
            f"({times.one_more_in_flight_bytes / 1e6:.0f} MB for each more)."
        )
    moved = times.bytes["input"] if loss == "read" else _written(times)
    speed = moved / seconds[loss] / 1e6 if seconds[loss] else 0.0
    return (
        f"{direction} is the limit, at {speed:.0f} MB/s per chunk in flight: faster storage for "
        f"the {what}, or cheaper compression, would help; more of the same devices would not."
    )


def _written(times: Timing) -> int:
    """Return the bytes that chunks wrote; what finalizing wrote is not theirs."""
    return sum(w.bytes.get("output", 0) + w.bytes.get("pieces", 0) for w in times.workers.values())


REMEDIES: MappingProxyType[str, Callable[[Timing], str]] = MappingProxyType(
    {
        "load": _load,
        "read": lambda times: _storage(times, "read"),
        "write": lambda times: _storage(times, "write"),
        "finalize": _finalize,
        "other": _other,
        "idle": _idle,
        "tail": _tail,
    }
)
