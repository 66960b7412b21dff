"""Counts of a trace of torch's profiler, in the form of its Chrome traces."""

from typing import Any

import pytest

from benchmarks.gpu_trace import counts

DEVICE_THREAD, OTHER_THREAD = 11, 12


def launch(tid: int = DEVICE_THREAD) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": tid, "ts": 0, "dur": 1}


def kernel(start: int, duration: int) -> dict[str, Any]:
    return {"cat": "kernel", "name": "conv", "tid": 7, "ts": start, "dur": duration}


def copy(direction: str, host: str, size: int) -> dict[str, Any]:
    ends = f"{host} -> Device" if direction == "HtoD" else f"Device -> {host}"
    return {"cat": "gpu_memcpy", "name": f"Memcpy {direction} ({ends})", "args": {"bytes": size}}


def sync(name: str, tid: int) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": name, "tid": tid, "ts": 0, "dur": 1}


def test_the_busy_share_counts_parallel_kernels_once() -> None:
    result = counts([kernel(0, 100_000), kernel(50_000, 100_000), kernel(250_000, 50_000)], 0.4)
    assert result["kernels"] == 3
    assert result["kernel_seconds"] == pytest.approx(0.2)
    assert result["busy"] == pytest.approx(0.5)
    assert result["busy_between"] == pytest.approx(2 / 3)
    assert result["outside_seconds"] == pytest.approx(0.1)


def test_short_gaps_between_kernels_are_left_out() -> None:
    events = [kernel(0, 1000), kernel(200, 100), kernel(1050, 1000), kernel(2250, 1000)]
    assert counts(events, 1.0)["gap_seconds"] == pytest.approx(200e-6)


def test_bytes_are_counted_by_direction_and_kind_of_host_memory() -> None:
    events = [
        copy("HtoD", "Pinned", 100),
        copy("HtoD", "Pageable", 10),
        copy("DtoH", "Pinned", 7),
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 1000}},
    ]
    result = counts(events, 1.0)
    assert (result["up"], result["down"], result["pageable"]) == (110, 7, 10)
    assert result["copies"] == 4


def test_waiting_in_the_launching_thread_is_counted_apart() -> None:
    events = [launch(), launch(), launch(OTHER_THREAD), sync("cudaStreamSynchronize", 11)]
    events += [sync("cudaEventSynchronize", OTHER_THREAD)] * 2 + [sync("cudaMalloc", 11)]
    result = counts(events, 1.0)
    assert (result["launches"], result["syncs"], result["syncs_elsewhere"]) == (3, 1, 2)
    assert result["syncs_by_name"] == {"cudaStreamSynchronize": 1, "cudaEventSynchronize": 2}


def test_a_trace_without_launches_has_no_count_of_synchronizations() -> None:
    result = counts([kernel(0, 1), sync("cudaStreamSynchronize", DEVICE_THREAD)], 1.0)
    assert result["syncs"] is None
    assert result["syncs_elsewhere"] is None
