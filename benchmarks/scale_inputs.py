"""Inputs of the simulation: figures of other benchmarks, options and assumptions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

MEASURED_PATCH, COPIED_VOXEL_BYTES = 64, 4 + 4
"""Edge of network.py's patches, and bytes of a voxel of its copy, in input and output."""
FILLED = 100_000
"""Number of tasks in figures of queues.py that do not name it."""
QUEUE_FIGURES = {
    "drain": "tasks_per_s",
    "enqueue": "enqueue_per_s",
    "submit": "enqueue_per_s",
    "memory": "task_bytes",
    "size": "task_bytes",
}
"""Input of a queue for a part of queues.py or for the first word of a queue_scale.py figure."""
ASSUMED = "ASSUMED"


def _measured(default: float, unit: str, label: str) -> Any:
    """Return a field that a benchmark measures; the default is the value in README.md."""
    return field(default=default, metadata={"unit": unit, "label": label, "source": "README.md"})


def _assumed(default: float, unit: str, label: str) -> Any:
    """Return a field that no benchmark measures."""
    return field(default=default, metadata={"unit": unit, "label": label, "source": ASSUMED})


@dataclass(frozen=True)
class Inputs:
    """All inputs of a simulation, with units. `math.inf` means no limit."""

    rq_tasks_per_s: float = _measured(1600, "1/s", "tasks reserved and acked on Redis")
    dask_tasks_per_s: float = _assumed(700, "1/s", "the same on a Dask scheduler")
    ray_tasks_per_s: float = _assumed(400, "1/s", "the same on a Ray actor")
    sqlite_tasks_per_s: float = _measured(4200, "1/s", "the same on a file of one machine")
    rq_enqueue_per_s: float = _measured(23_000, "1/s", "tasks submitted by one producer")
    dask_enqueue_per_s: float = _assumed(30_000, "1/s", "the same on a Dask scheduler")
    ray_enqueue_per_s: float = _assumed(30_000, "1/s", "the same on a Ray actor")
    sqlite_enqueue_per_s: float = _measured(52_000, "1/s", "the same on a file")
    rq_task_bytes: float = _measured(523, "B", "memory of a queued task")
    dask_task_bytes: float = _assumed(300, "B", "the same on a Dask scheduler")
    ray_task_bytes: float = _assumed(300, "B", "the same on a Ray actor")
    sqlite_task_bytes: float = _measured(389, "B", "the same on disk")
    queue_latency_s: float = _assumed(0.0005, "s", "round trip to the queue")
    plan_chunks_per_s: float = _measured(14.6e6, "1/s", "chunks that `produce` visits")
    list_records_per_s: float = _measured(600_000, "1/s", "commit records listed")
    patches_per_s: float = _assumed(100, "1/s", "patches through one device")
    codec_bytes_per_s: float = _assumed(1e9, "B/s", "voxels that a worker decodes and encodes")
    worker_bytes_per_s: float = _assumed(2.5e9, "B/s", "a worker's link to the store")
    store_bytes_per_s: float = _assumed(100e9, "B/s", "the store's total bandwidth")
    store_latency_s: float = _assumed(0.002, "s", "one small request to the store")
    store_reads_per_s: float = _assumed(100_000, "1/s", "objects that the store reads")
    store_writes_per_s: float = _assumed(30_000, "1/s", "objects that the store creates or deletes")
    folder_writes_per_s: float = _assumed(5000, "1/s", "objects created in one folder or prefix")
    requests_in_flight: float = _assumed(32, "", "concurrent requests of one chunk")
    seal_records_per_s: float = _assumed(
        8000, "1/s", "commit records that sealing reads, sixteen at a time"
    )

    def queue(self, executor: str, label: str) -> float:
        """Return a queue's `tasks_per_s`, `enqueue_per_s` or `task_bytes`."""
        return float(getattr(self, f"{executor}_{label}"))

    @classmethod
    def unlimited(cls) -> Inputs:
        """Return inputs without limits, except that a device takes one second per patch."""
        values: dict[str, float] = {f.name: math.inf for f in fields(cls)}
        free = {"queue_latency_s": 0.0, "store_latency_s": 0.0, "patches_per_s": 1.0}
        return cls(**(values | free))


BUCKET = {
    "store_latency_s": 0.03,
    "store_reads_per_s": 16 * 5500.0,
    "store_writes_per_s": 16 * 3500.0,
    "folder_writes_per_s": 3500.0,
    "requests_in_flight": 64.0,
    "seal_records_per_s": 5000.0,
}
"""Assumptions that differ for an object store: 5500 reads and 3500 writes per second and prefix.
Voxels are in 16 prefixes once the store has split them; all commit records are in one prefix."""


@dataclass(frozen=True)
class Collected:
    """The inputs, and the source of each."""

    inputs: Inputs
    sources: dict[str, str]


def collect(
    folder: Path, *, bucket: bool, patch: int, cpu: bool, options: dict[str, float]
) -> Collected:
    """Collect the inputs: defaults, then the kind of store, then files, then options.

    If two files have a figure of a queue, the one with more tasks is used, or the first one.
    """
    values: dict[str, float] = {}
    sources = {f.name: str(f.metadata["source"]) for f in fields(Inputs)}

    def update(figures: dict[str, float], source: str) -> None:
        values.update(figures)
        sources.update(dict.fromkeys(figures, source))

    if bucket:
        update(BUCKET, ASSUMED)
    update(_read(folder / "planning.json", from_planning), "planning.json")
    counted: dict[str, int] = {}
    for name in ("queues.json", "queue_scale.json"):
        for figure, (count, value) in _read(folder / name, from_queues).items():
            if count > counted.get(figure, 0):
                counted[figure] = count
                update({figure: value}, name)
    network = _read(folder / "network.json", lambda f: from_network(f, patch if cpu else None))
    update(network, "network.json")
    if cpu and "patches_per_s" not in network and "patches_per_s" not in options:
        path = folder / "network.json"
        raise SystemExit(
            f"--device cpu: part `small` is missing in {path}; run `python benchmarks/network.py "
            f"small --json {path}` or set --patches-per-s"
        )
    update(options, "option")
    return Collected(Inputs(**values), sources)


def _read(path: Path, reader: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return the inputs in a benchmark's file; none if the file does not exist."""
    if not path.exists():
        return {}
    try:
        return reader(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise SystemExit(
            f"{path}: invalid figures ({type(error).__name__}: {error}); run the benchmark again "
            "or remove the file"
        ) from None


def from_queues(figures: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Return the inputs in queues.py's or queue_scale.py's figures, with their numbers of tasks.

    Of several figures for one input, the one with most tasks is used.
    """
    inputs: dict[str, tuple[int, float]] = {}
    for figure in figures:
        part, queue, label = figure["part"], figure["queue"], figure["label"]
        name = QUEUE_FIGURES.get(label.split()[0] if part == "scale" else part)
        if name is None or (label.startswith("disk") and queue != "sqlite"):
            continue
        counted = re.search(r"([\d,]+) tasks", label)
        count = int(counted[1].replace(",", "")) if counted else FILLED
        key = f"{queue}_{name}"
        inputs[key] = max(inputs.get(key, (0, 0.0)), (count, float(figure["value"])))
    return inputs


def from_planning(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the inputs in planning.py's figures."""
    planned, listed = figures["plan 10 million chunks"], figures["status of 100 000 chunks"]
    queued = figures["enqueue 100 000 tasks"]
    return {
        "plan_chunks_per_s": planned["chunks"] / planned["seconds"],
        "list_records_per_s": listed["chunks"] / listed["seconds"],
        "sqlite_enqueue_per_s": queued["tasks"] / queued["seconds"],
    }


def from_network(figures: dict[str, Any], patch: int | None) -> dict[str, float]:
    """Return the inputs in network.py's figures; the patch rate only for a `patch` edge.

    The seconds of a patch are assumed to be proportional to its voxels.
    """
    inputs = {}
    if copied := figures.get("copy"):
        voxels = copied["patches"] * MEASURED_PATCH**3
        inputs["codec_bytes_per_s"] = voxels * COPIED_VOXEL_BYTES / copied["seconds"]["chunkq"]
    if patch is not None and (one := figures.get("large") or figures.get("small")):
        rate = one["patches"] / one["seconds"]["bare"]
        inputs["patches_per_s"] = rate * (MEASURED_PATCH / patch) ** 3
    return inputs
