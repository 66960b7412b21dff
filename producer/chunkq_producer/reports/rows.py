"""The tables of a report, as rows of text: the same on a terminal and on a page."""

from __future__ import annotations

from chunkq.timing import STAGES, Timing, Worker
from chunkq_producer.reports.job_report import JobReport
from chunkq_producer.reports.units import count, percent_of_plan, seconds, si

Rows = list[tuple[str, ...]]
BYTES = {
    "input": "input read",
    "output": "output written",
    "pieces_written": "pieces written",
    "pieces_read": "pieces read",
}
IN_FLIGHT_NOTE = {
    "compute": "computing",
    "load": "loading the network",
    "read": "waiting for input",
    "write": "waiting for output",
    "finalize": "completing blocks",
    "other": "between stages",
    "idle": "no chunk in flight",
    "tail": "waiting for the last worker",
}
"""What the workers' time is shared out to, in words."""


def plan_rows(times: Timing) -> Rows:
    """Return what was done, what the plan foresaw, and the former as a share of it."""
    counts = {
        "chunks": (times.chunks, times.planned_chunks),
        "patches": (times.patches, times.planned_patches),
        "blocks finalized": (times.finalized_blocks, times.planned_blocks),
    }
    rows: Rows = [
        (label, *map(count, pair), percent_of_plan(*pair)) for label, pair in counts.items()
    ]
    for key, label in BYTES.items():
        moved, planned = times.bytes[key], times.planned_bytes[key]
        rows.append((label, si(moved, "B"), si(planned, "B"), percent_of_plan(moved, planned)))
    return rows


def stage_rows(times: Timing) -> Rows:
    """Return each stage's seconds in all chunks, its median, 99 % and longest."""
    rows = []
    for stage in STAGES:
        found = times.durations.quantiles.get(stage)
        if found:
            shown = (seconds(found[q]) for q in ("0.5", "0.99", "1"))
            rows.append((stage, seconds(times.seconds[stage]), *shown))
    return rows


def worker_rows(account: JobReport, most: int) -> tuple[Rows, int]:
    """Return up to `most` workers, the least busy first, and how many are left out."""
    labels = account.labels()
    ordered = sorted(account.times.workers.items(), key=lambda item: item[1].device_busy_share)
    rows = [(labels[name], *_worker(worker)) for name, worker in ordered[:most]]
    return rows, len(ordered) - len(rows)


def straggler_rows(account: JobReport, most: int) -> Rows:
    """Return the worst stragglers: chunk, worker, attempt, its time, and where that went."""
    labels = account.labels()
    return [
        (
            one.chunk,
            labels[one.worker],
            str(one.attempt),
            seconds(one.seconds),
            f"{one.stage} {seconds(one.stage_seconds)}",
        )
        for one in account.times.stragglers.worst[:most]
    ]


def memory(times: Timing) -> str:
    """Return the largest memory of a worker beside what the plan knows of it."""
    flight = times.chunks_in_flight
    return (
        f"at most {si(times.peak_rss_bytes, 'B')} in a worker process; planned for its {flight} "
        f"chunks in flight: {si(times.planned_array_bytes, 'B')}, besides libraries and network"
    )


def headlines(times: Timing) -> Rows:
    """Return the main figures with their names."""
    rows: Rows = [
        ("time", seconds(times.wall_seconds)),
        ("chunks", count(times.chunks)),
        ("speed", si(times.voxels_per_second, "voxels/s")),
        ("workers", count(len(times.workers))),
        ("devices computed", f"{times.worker_time_shares.get('compute', 0.0):.0%}"),
        ("last worker awaited", seconds(times.tail_seconds)),
        ("finalizing after", seconds(times.finalizing.seconds_after)),
        ("begun more than once", count(times.retried)),
    ]
    if times.paused_seconds > 0.01 * times.wall_seconds:
        rows.append(("nobody at work", seconds(times.paused_seconds)))
    return rows


def _worker(worker: Worker) -> tuple[str, ...]:
    losses = sorted(
        ((share, holder) for holder, share in worker.shares.items() if holder != "compute"),
        reverse=True,
    )
    told = ", ".join(f"{holder} {share:.0%}" for share, holder in losses[:2] if share >= 0.005)
    return (
        count(worker.chunks),
        seconds(worker.seconds),
        f"{worker.device_busy_share:.0%}",
        told,
    )
