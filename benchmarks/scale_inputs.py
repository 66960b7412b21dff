"""What a simulation is fed with: other benchmarks' figures, options, assumptions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

MEASURED_PATCH, COPIED_VOXEL_BYTES = 64, 4 + 4
"""network.py's patches, and the bytes of a voxel of its copy: of the input and of the output."""
FILLED = 100_000
"""Tasks in the queues whose size queues.py measures; everywhere else figures name their number."""
QUEUE_FIGURES = {
    "drain": "tasks_per_s",
    "enqueue": "enqueue_per_s",
    "submit": "enqueue_per_s",
    "memory": "task_bytes",
    "held": "task_bytes",
}
"""What a queue's figure gives: by its part in queues.json, its first word in queue_scale.json."""
ASSUMED = "ASSUMED"


def _measured(default: float, unit: str, what: str) -> Any:
    """A figure that a benchmark gives; the default is that of README.md."""
    return field(default=default, metadata={"unit": unit, "what": what, "source": "README.md"})


def _assumed(default: float, unit: str, what: str) -> Any:
    return field(default=default, metadata={"unit": unit, "what": what, "source": ASSUMED})


@dataclass(frozen=True)
class Inputs:
    """All figures a simulation is fed with; units stand beside each. `math.inf` is no limit."""

    rq_tasks_per_s: float = _measured(1600, "1/s", "tasks that Redis leases and ends")
    dask_tasks_per_s: float = _assumed(700, "1/s", "the same, of a Dask scheduler")
    ray_tasks_per_s: float = _assumed(400, "1/s", "the same, of Ray's actor")
    sqlite_tasks_per_s: float = _measured(4200, "1/s", "the same, of a file on one machine")
    rq_enqueue_per_s: float = _measured(23_000, "1/s", "tasks queued by one producer")
    dask_enqueue_per_s: float = _assumed(30_000, "1/s", "the same, of a Dask scheduler")
    ray_enqueue_per_s: float = _assumed(30_000, "1/s", "the same, of Ray's actor")
    sqlite_enqueue_per_s: float = _measured(52_000, "1/s", "the same, of a file")
    rq_task_bytes: float = _measured(523, "B", "memory of a queued task")
    dask_task_bytes: float = _assumed(300, "B", "the same, in Dask's scheduler")
    ray_task_bytes: float = _assumed(300, "B", "the same, in Ray's actor")
    sqlite_task_bytes: float = _measured(389, "B", "the same, on disk")
    queue_latency_s: float = _assumed(0.0005, "s", "way to the queue and back")
    plan_chunks_per_s: float = _measured(14.6e6, "1/s", "chunks that `produce` visits")
    list_records_per_s: float = _measured(600_000, "1/s", "commit records listed")
    patches_per_s: float = _assumed(100, "1/s", "patches through one device")
    codec_bytes_per_s: float = _assumed(1e9, "B/s", "voxels a worker decodes and encodes")
    worker_bytes_per_s: float = _assumed(2.5e9, "B/s", "a worker's own link to the store")
    store_bytes_per_s: float = _assumed(100e9, "B/s", "the store's bandwidth, for all together")
    store_latency_s: float = _assumed(0.002, "s", "one small request to the store")
    store_reads_per_s: float = _assumed(100_000, "1/s", "objects the store opens and reads")
    store_writes_per_s: float = _assumed(30_000, "1/s", "objects the store makes or removes")
    folder_writes_per_s: float = _assumed(5000, "1/s", "objects made in one folder or prefix")
    requests_in_flight: float = _assumed(32, "", "requests of one chunk at a time")
    seal_records_per_s: float = _assumed(
        8000, "1/s", "commit records that sealing reads, sixteen at once"
    )

    def queue(self, executor: str, what: str) -> float:
        """Return a queue's `tasks_per_s`, `enqueue_per_s` or `task_bytes`."""
        return float(getattr(self, f"{executor}_{what}"))

    @classmethod
    def unlimited(cls) -> Inputs:
        """Neither queue nor store cost anything; the device takes a second for a patch."""
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
"""What of the assumptions differs for an object store: 5500 reads and 3500 writes a second of a
prefix, and voxels under 16 prefixes once it has split them; all records are in one."""


@dataclass(frozen=True)
class Fed:
    """The inputs, and where each of them comes from."""

    inputs: Inputs
    sources: dict[str, str]


def feed(folder: Path, *, bucket: bool, patch: int, cpu: bool, given: dict[str, float]) -> Fed:
    """Collect the figures: defaults, then the store's kind, then files, then options.

    Of a queue's figures in two files, that of more tasks is taken; of as many, the first.
    """
    values: dict[str, float] = {}
    sources = {f.name: str(f.metadata["source"]) for f in fields(Inputs)}

    def take(found: dict[str, float], source: str) -> None:
        values.update(found)
        sources.update(dict.fromkeys(found, source))

    if bucket:
        take(BUCKET, ASSUMED)
    take(_read(folder / "planning.json", from_planning), "planning.json")
    counted: dict[str, int] = {}
    for name in ("queues.json", "queue_scale.json"):
        for figure, (count, value) in _read(folder / name, from_queues).items():
            if count > counted.get(figure, 0):
                counted[figure] = count
                take({figure: value}, name)
    network = _read(folder / "network.json", lambda f: from_network(f, patch if cpu else None))
    take(network, "network.json")
    if cpu and "patches_per_s" not in network and "patches_per_s" not in given:
        path = folder / "network.json"
        raise SystemExit(
            f"--device cpu: {path} does not have the part `small`; run `python "
            f"benchmarks/network.py small --json {path}`, or give --patches-per-s"
        )
    take(given, "option")
    return Fed(Inputs(**values), sources)


def _read(path: Path, reader: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What a benchmark's file gives, if it is there."""
    if not path.exists():
        return {}
    try:
        return reader(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise SystemExit(
            f"{path} is not what its benchmark writes ({type(error).__name__}: {error}); "
            "run that benchmark again, or remove the file"
        ) from None


def from_queues(figures: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Take figures of queues.py and queue_scale.py: of each the one of most tasks, and how many."""
    found: dict[str, tuple[int, float]] = {}
    for figure in figures:
        part, queue, what = figure["part"], figure["queue"], figure["what"]
        name = QUEUE_FIGURES.get(what.split()[0] if part == "scale" else part)
        if name is None or (what.startswith("disk") and queue != "sqlite"):
            continue
        counted = re.search(r"([\d,]+) tasks", what)
        count = int(counted[1].replace(",", "")) if counted else FILLED
        key = f"{queue}_{name}"
        found[key] = max(found.get(key, (0, 0.0)), (count, float(figure["value"])))
    return found


def from_planning(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Take planning.py's figures."""
    planned, listed = figures["plan 10 million chunks"], figures["status of 100 000 chunks"]
    queued = figures["enqueue 100 000 tasks"]
    return {
        "plan_chunks_per_s": planned["chunks"] / planned["seconds"],
        "list_records_per_s": listed["chunks"] / listed["seconds"],
        "sqlite_enqueue_per_s": queued["tasks"] / queued["seconds"],
    }


def from_network(figures: dict[str, Any], patch: int | None) -> dict[str, float]:
    """Take network.py's figures; those of its processor only for patches of a given edge.

    Seconds are taken to grow with a patch's voxels.
    """
    found = {}
    if copied := figures.get("copy"):
        voxels = copied["patches"] * MEASURED_PATCH**3
        found["codec_bytes_per_s"] = voxels * COPIED_VOXEL_BYTES / copied["seconds"]["chunkq"]
    if patch is not None and (one := figures.get("large") or figures.get("small")):
        rate = one["patches"] / one["seconds"]["bare"]
        found["patches_per_s"] = rate * (MEASURED_PATCH / patch) ** 3
    return found
