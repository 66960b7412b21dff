"""Compare the predictions of `chunkq plan --check-model` with a worker and a finalizer."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from chunkq_producer.plan_rows import Trial, peak_memory

from chunkq.job.ledger import CRC_BYTES
from chunkq.model_check import MemoryCheck, ModelCheck, PatchCheck
from chunkq.queue.contract.executor import DEFAULT_DEPTH_CPU
from chunkq.units import si
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, write_zarr
from tests.harness.workspace import Workspace

PATCH = (32, 32, 32)
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
assert status == 0
print(used.ru_maxrss * 1024)
"""
"""A small parent process: the peak memory of a process includes that of its parent at the start."""


def workspace_of(folder: Path, dtype: str, channels: int, **keys: Any) -> Workspace:
    write_zarr(folder / "in.zarr", random_volume((160, 128, 128), dtype), (32, 32, 32))
    model = toy_model(folder, PATCH, kind="pointwise", channels=channels)
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [28, 28, 28],
        "chunksize": [96, 64, 64],
        "threads": 2,
        "model_config": model,
        **keys,
    }
    workspace = Workspace(folder, values)
    workspace.write_job()
    return workspace


def finalizer_peak(workspace: Workspace) -> int:
    """Run `chunkq finalize` and return its peak resident memory in bytes."""
    command = [sys.executable, "-m", "chunkq", "finalize", "out.zarr"]
    launcher = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
        cwd=workspace.folder,
        env={**os.environ, **workspace.env},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(launcher.stdout)


def piece_and_header_bytes(workspace: Workspace) -> tuple[int, int]:
    """Return the size of all stored pieces, and the part of it in first lines and checksums."""
    pieces = [path.read_bytes() for path in workspace.pieces()]
    headers = sum(content.index(b"\n") + 1 + CRC_BYTES for content in pieces)
    return sum(map(len, pieces)), headers


def trial_of(values: dict[str, Any]) -> Trial:
    """Return the trial that `chunkq plan --json` has printed."""
    parts = [
        cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
        for cls in (ModelCheck, PatchCheck, MemoryCheck)
    ]
    return Trial(*parts, values["finalizer_bytes"])


@pytest.mark.parametrize(
    ("dtype", "channels", "depth", "keys"),
    [
        ("float32", 1, 1, {"combine": "weighted_avg"}),
        ("uint8", 3, 2, {"combine": "soft"}),
    ],
    ids=["average-depth-1", "labels-depth-2"],
)
def test_predicted_counts_and_bytes_are_exact_and_memory_is_within_10_percent(
    tmp_path: Path, dtype: str, channels: int, depth: int, keys: dict[str, Any]
) -> None:
    workspace = workspace_of(tmp_path, dtype, channels, **keys)
    arguments = ("plan", "job.json", "--check-model", "--depth", str(depth), "--json")
    planned = json.loads(workspace.run(*arguments).ok().out)
    check = planned["model_check"]
    assert check["memory_error"] is None
    assert check["depth"] == planned["depth"] == depth
    assert not workspace.output.exists()
    trial = trial_of(check)
    text = peak_memory(trial, finalizes=True)
    assert f"{depth} chunks in flight" in text
    for key in ("worker_bytes", "loaded_bytes", "finalizer_bytes"):
        assert si(check[key], "B") in text
    unmeasured = replace(trial, finalizer_bytes=None)
    assert "finalizing: unknown" in peak_memory(unmeasured, finalizes=True)
    assert "finalizing" not in peak_memory(unmeasured, finalizes=False)

    workspace.call("produce", "job.json").ok()
    workspace.run("work", "--burst", "--gpus", "none", "--depth", str(depth), "--quiet").ok()
    workspace.call("finalize", "out.zarr").ok()
    report = json.loads(workspace.call("report", "out.zarr", "--json").ok().out)
    moved = report["bytes"]
    assert report["patches"] == planned["patches"]
    assert moved["input"] == planned["input_bytes"]
    assert moved["output"] == planned["output_bytes"]

    assert check["worker_bytes"] == pytest.approx(report["peak_rss_bytes"], rel=0.1)
    # Without a queue no worker finalizes blocks, so the finalizer does.
    workspace.call("produce", "job.json", "--overwrite").ok()
    workspace.compute_inline()
    stored, headers = piece_and_header_bytes(workspace)
    assert moved["pieces_written"] == moved["pieces_read"] == stored
    assert stored == planned["piece_bytes"] + headers
    assert check["finalizer_bytes"] == pytest.approx(finalizer_peak(workspace), rel=0.1)
    # The arrays are a measurable part of the memory, so the comparison covers them.
    assert check["worker_bytes"] > check["loaded_bytes"] + planned["array_bytes"]


def test_the_plan_prints_the_memory_of_arrays_and_its_depth(tmp_path: Path) -> None:
    workspace = workspace_of(tmp_path, "uint8", 1)
    text = workspace.call("plan", "job.json").ok().out
    default = json.loads(workspace.call("plan", "job.json", "--json").ok().out)
    (line,) = [line for line in text.splitlines() if line.startswith("memory")]
    assert si(default["array_bytes"], "B") in line
    assert f"{DEFAULT_DEPTH_CPU} chunks in flight" in line
    assert "--check-model" in line
    assert "peak memory" not in text
    deeper = json.loads(workspace.call("plan", "job.json", "--depth", "4", "--json").ok().out)
    flat = json.loads(workspace.call("plan", "job.json", "--depth", "1", "--json").ok().out)
    assert deeper["array_bytes"] > flat["array_bytes"]
