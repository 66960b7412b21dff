"""Count launches, copies and synchronizations in a trace of torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
SYNCHRONIZATIONS = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuCtxSynchronize",
)
LONG_GAP = 100.0
"""Microseconds without a kernel that launching the next one does not explain."""
Event = Mapping[str, Any]


def counts(events: Iterable[Event], seconds: float) -> dict[str, Any]:
    """Return the counts of a run that took `seconds`; `events` are those of a Chrome trace.

    `busy` is the length of the union of all kernels divided by `seconds`; `busy_between` divides
    by the time from the first kernel's start to the last one's end, and `outside_seconds` are the
    rest of the run. `gap_seconds` is the sum of gaps between kernels of at least LONG_GAP. `syncs`
    are blocking calls of the thread that launches most kernels, `syncs_elsewhere` of others. `up`
    and `down` are bytes copied to and from the device, `pageable` those of both from or to unpinned
    memory.
    Without launches in the trace, the thread is unknown, and both are None.
    """
    kernels: list[tuple[float, float]] = []
    launches: Counter[Any] = Counter()
    syncs: Counter[Any] = Counter()
    names: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    number_of_copies = 0
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category == "kernel":
            start = float(event["ts"])
            kernels.append((start, start + float(event["dur"])))
        elif category == "gpu_memcpy":
            number_of_copies += 1
            size = int(event["args"]["bytes"])
            copies["up"] += size if "HtoD" in name else 0
            copies["down"] += size if "DtoH" in name else 0
            copies["pageable"] += size if "Pageable" in name else 0
        elif category in ("cuda_runtime", "cuda_driver"):
            if name.startswith(LAUNCHES):
                launches[event["tid"]] += 1
            elif name.startswith(SYNCHRONIZATIONS):
                syncs[event["tid"]] += 1
                names[name] += 1
    device_thread = launches.most_common(1)[0][0] if launches else None
    union = covered(kernels)
    window = max(end for _, end in kernels) - min(start for start, _ in kernels) if kernels else 0.0
    return {
        "seconds": seconds,
        "busy": union / 1e6 / seconds,
        "busy_between": union / window if window else None,
        "outside_seconds": seconds - window / 1e6,
        "gap_seconds": sum(gap for gap in gaps(kernels) if gap >= LONG_GAP) / 1e6,
        "kernel_seconds": union / 1e6,
        "kernels": len(kernels),
        "launches": sum(launches.values()),
        "syncs": syncs[device_thread] if launches else None,
        "syncs_elsewhere": sum(syncs.values()) - syncs[device_thread] if launches else None,
        "syncs_by_name": dict(names),
        "copies": number_of_copies,
        **{key: copies[key] for key in ("up", "down", "pageable")},
    }


def gaps(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Return the lengths between the spans that no span covers."""
    result, reached = [], float("inf")
    for start, end in sorted(spans):
        if start > reached:
            result.append(start - reached)
        reached = end if reached == float("inf") else max(reached, end)
    return result


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of the spans."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
