"""What `chunkq plan --check-model` predicts is what a worker and a finalizer then take."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chunkq_producer.commands.plan import peak_memory
from chunkq_producer.model_check import ModelCheck

from chunkq.executors.base import DEPTH_ON_CPU
from chunkq.ledger import CRC_BYTES
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
"""Small itself: a process's largest memory counts what its parent had when it was started."""


def bench_of(folder: Path, dtype: str, channels: int, **keys: Any) -> Workspace:
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
    """Finalize; returns the largest resident memory of the command."""
    command = [sys.executable, "-m", "chunkq", "finalize", "out.zarr"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
        cwd=workspace.folder,
        env={**os.environ, **workspace.env},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def bytes_around_voxels(workspace: Workspace) -> tuple[int, int]:
    """Size of all stored pieces, and how much of it is their first lines and checksums."""
    pieces = [path.read_bytes() for path in workspace.pieces()]
    around = sum(content.index(b"\n") + 1 + CRC_BYTES for content in pieces)
    return sum(map(len, pieces)), around


@pytest.mark.parametrize(
    ("dtype", "channels", "depth", "keys"),
    [
        ("float32", 1, 1, {"combine": "weighted_avg"}),
        ("uint8", 3, 2, {"combine": "soft"}),
    ],
    ids=["average-depth-1", "labels-depth-2"],
)
def test_counts_and_bytes_are_exact_and_memory_is_within_a_tenth(
    tmp_path: Path, dtype: str, channels: int, depth: int, keys: dict[str, Any]
) -> None:
    workspace = bench_of(tmp_path, dtype, channels, **keys)
    asked = workspace.run("plan", "job.json", "--check-model", "--depth", str(depth), "--json").ok()
    foretold = json.loads(asked.out)
    probe = foretold["model_check"]
    assert probe["memory_error"] is None
    assert probe["depth"] == foretold["depth"] == depth
    assert not workspace.output.exists()
    told = peak_memory(ModelCheck(**probe), finalizes=True)
    untried = ModelCheck(**probe | {"finalizer_bytes": None})
    assert "finalizing: unknown" in peak_memory(untried, finalizes=True)
    assert "finalizing" not in peak_memory(untried, finalizes=False)
    assert f"in total per worker process with {depth} chunks in flight" in told
    assert "of it libraries and network)" in told
    assert "in total to finalize blocks" in told

    workspace.call("produce", "job.json").ok()
    workspace.run("work", "--burst", "--gpus", "none", "--depth", str(depth), "--quiet").ok()
    workspace.call("finalize", "out.zarr").ok()
    report = json.loads(workspace.call("report", "out.zarr", "--json").ok().out)
    moved = report["bytes"]
    assert report["patches"] == foretold["patches"]
    assert moved["input"] == foretold["input_bytes"]
    assert moved["output"] == foretold["output_bytes"]

    assert probe["worker_bytes"] == pytest.approx(report["peak_rss_bytes"], rel=0.1)
    # Chunks computed past the queue leave all blocks to the finalizer.
    workspace.call("produce", "job.json", "--overwrite").ok()
    workspace.compute_inline()
    stored, around = bytes_around_voxels(workspace)
    assert moved["pieces_written"] == moved["pieces_read"] == stored
    assert stored == foretold["piece_bytes"] + around
    assert probe["finalizer_bytes"] == pytest.approx(finalizer_peak(workspace), rel=0.1)
    # Not because the process dwarfs all: the arrays show.
    assert probe["worker_bytes"] > probe["loaded_bytes"] + foretold["array_bytes"]


def test_the_plan_says_what_its_memory_is_of(tmp_path: Path) -> None:
    workspace = bench_of(tmp_path, "uint8", 1)
    alone = workspace.call("plan", "job.json").ok().out
    (line,) = [line for line in alone.splitlines() if line.startswith("memory")]
    assert "of arrays per worker process" in line
    assert f"{DEPTH_ON_CPU} chunks in flight" in line
    assert "plus libraries and network (--check-model measures the total)" in line
    assert "peak memory" not in alone
    deeper = json.loads(workspace.call("plan", "job.json", "--depth", "4", "--json").ok().out)
    flat = json.loads(workspace.call("plan", "job.json", "--depth", "1", "--json").ok().out)
    assert deeper["array_bytes"] > flat["array_bytes"]
