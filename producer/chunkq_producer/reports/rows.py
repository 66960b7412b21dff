"""Tables of a report as rows of text, for the terminal and the HTML page."""

from __future__ import annotations

from chunkq.timing.timing import STAGES, Timing, Worker
from chunkq.units import count, counted, money, seconds, si
from chunkq_producer.reports.job_report import JobReport

Rows = list[tuple[str, ...]]
BYTES = {
    "input": "input read",
    "output": "output written",
    "pieces_written": "pieces written",
    "pieces_read": "pieces read",
    "levels": "pyramids written",
    "level_below": "read for pyramids",
}
LEVEL_BYTES = frozenset({"levels", "level_below"})
"""Kinds of bytes that only pyramids have."""
STAGE_LABELS = {
    "compute": "computing",
    "load": "loading the network",
    "read": "waiting for input",
    "write": "waiting for output",
    "finalize": "completing blocks",
    "downsample": "making pyramids",
    "other": "between stages",
    "idle": "no chunk in flight",
    "tail": "waiting for the last worker",
}
"""Labels of the parts of the workers' time."""
STRAGGLER_COLUMNS = ("chunk", "worker", "attempt", "patches", "time", "expected", "cause")


def plan_rows(report: JobReport) -> Rows:
    """Return rows of (label, measured, planned, measured as a percentage of the plan)."""
    timing = report.timing
    counts = {
        "chunks": (timing.chunks, timing.planned_chunks),
        report.unit: (timing.patches, timing.planned_patches),
    }
    if report.images is None:
        counts["blocks finalized"] = timing.finalized_blocks, timing.planned_blocks
    rows: Rows = [
        (label, *map(count, pair), _percent_of_plan(*pair)) for label, pair in counts.items()
    ]
    if report.images is not None:  # the sizes of files are unknown, and nothing is merged
        return [*rows, ("input read", si(timing.bytes["input"], "B"), "", "")]
    if timing.skipped_patches:
        rows.insert(2, ("empty patches", count(timing.skipped_patches), "", ""))
    levels = timing.levels
    if levels.tasks or levels.planned:
        pair = levels.tasks, levels.planned
        rows.append(("parts of pyramids", *map(count, pair), _percent_of_plan(*pair)))
    for key, label in bytes_labels(timing).items():
        moved, planned = timing.bytes[key], timing.planned_bytes[key]
        rows.append((label, si(moved, "B"), si(planned, "B"), _percent_of_plan(moved, planned)))
    return rows


def bytes_labels(timing: Timing) -> dict[str, str]:
    """Return the kinds of bytes of a job, with their labels: those of pyramids if it has any."""
    return {
        key: label
        for key, label in BYTES.items()
        if key not in LEVEL_BYTES or timing.bytes.get(key) or timing.planned_bytes.get(key)
    }


def stage_rows(timing: Timing) -> Rows:
    """Return rows of (stage, total time, median, 99th percentile, maximum per chunk)."""
    rows = []
    for stage in STAGES:
        quantiles = timing.durations.quantiles.get(stage)
        if quantiles:
            columns = (seconds(quantiles[q]) for q in ("0.5", "0.99", "1"))
            rows.append((stage, seconds(timing.seconds[stage]), *columns))
    return rows


def worker_rows(report: JobReport, max_rows: int) -> tuple[Rows, int]:
    """Return up to `max_rows` workers, the least busy first, and the number of omitted ones.

    Columns: label, chunks, time, share of the time that the device computed, largest losses.
    """
    labels = report.labels()
    ordered = sorted(report.timing.workers.items(), key=lambda item: item[1].device_busy_share)
    rows = [(labels[name], *_worker_columns(worker)) for name, worker in ordered[:max_rows]]
    return rows, len(ordered) - len(rows)


def straggler_rows(report: JobReport, max_rows: int) -> Rows:
    """Return the slowest stragglers, with the columns STRAGGLER_COLUMNS.

    The last one is the stage that caused most of the delay.
    """
    labels = report.labels()
    return [
        (
            straggler.chunk,
            labels[straggler.worker],
            str(straggler.attempt),
            count(straggler.patches),
            seconds(straggler.seconds),
            seconds(straggler.expected_seconds),
            f"{straggler.stage} {seconds(straggler.stage_seconds)}",
        )
        for straggler in report.timing.stragglers.worst[:max_rows]
    ]


def memory(report: JobReport) -> str:
    """Return the peak memory of a worker process and the planned size of its arrays."""
    timing = report.timing
    peak = f"at most {si(timing.peak_rss_bytes, 'B')} per worker process"
    if report.images is not None:
        return peak
    return (
        f"{peak}; planned for "
        f"{timing.chunks_in_flight} chunks in flight: {si(timing.planned_array_bytes, 'B')}, plus "
        "libraries and network"
    )


def fetched(timing: Timing) -> str | None:
    """Return what was fetched of the inputs, or None if it was not counted."""
    fetching = timing.fetching
    if not fetching.requests:
        return None
    requests = counted(fetching.requests, "request", "requests")
    text = f"{si(fetching.bytes, 'B')} of stored input in {requests}"
    if fetching.storage_chunks:
        text += f", {fetching.requests / fetching.storage_chunks:.2f} per storage chunk"
        text += " (each worker process has a cache of its own)"
    return text


def headlines(report: JobReport) -> Rows:
    """Return rows of (label, main figure)."""
    timing = report.timing
    output = ("output", si(timing.voxels_per_second, "voxels/s"))
    rows: Rows = [
        ("time", seconds(timing.wall_seconds)),
        ("chunks", count(timing.chunks)),
        (report.unit, count(timing.patches)),
        ("speed", si(timing.patches_per_second, f"{report.unit}/s")),
        *([] if report.images is not None else [output]),
        ("workers", count(len(timing.workers))),
        ("devices computed", f"{timing.worker_time_shares.get('compute', 0.0):.0%}"),
        ("waiting for last worker", seconds(timing.tail_seconds)),
        ("finalizing after last chunk", seconds(timing.finalizing.seconds_after)),
        ("retried chunks", count(timing.retried)),
    ]
    if report.cost is not None:
        rows.append(("price of the devices", money(report.cost)))
    if timing.paused_seconds > 0.01 * timing.wall_seconds:
        rows.append(("paused", seconds(timing.paused_seconds)))
    return rows


def _percent_of_plan(measured: float, planned: float) -> str:
    """Return the measured value as a percentage of the planned one."""
    return f"{measured / planned:.1%}" if planned else "as planned" if not measured else "unplanned"


def _worker_columns(worker: Worker) -> tuple[str, ...]:
    losses = sorted(
        ((share, stage) for stage, share in worker.shares.items() if stage != "compute"),
        reverse=True,
    )
    largest = ", ".join(f"{stage} {share:.0%}" for share, stage in losses[:2] if share >= 0.005)
    return (
        count(worker.chunks),
        seconds(worker.seconds),
        f"{worker.device_busy_share:.0%}",
        largest,
    )
