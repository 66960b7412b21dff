"""The memory of a worker depends on its chunks in flight and its cache, not on the volume."""

import json
from pathlib import Path

import numpy as np

from tests.harness.networks import toy_model
from tests.harness.volumes import write_zarr
from tests.harness.workspace import Workspace

BLOCK, PATCH = 36, 18


def peak_bytes(folder: Path, blocks: int) -> int:
    """Return the peak memory of a worker on a cube of `blocks` blocks along each axis, in bytes."""
    folder.mkdir()
    edge = BLOCK * blocks
    plane = np.random.default_rng(0).random((edge, edge), dtype=np.float32)
    volume = np.broadcast_to(plane, (edge, edge, edge))
    write_zarr(folder / "in.zarr", volume, (BLOCK, BLOCK, BLOCK), compressors=None)
    model = toy_model(folder, (PATCH,) * 3, kind="pointwise", channels=2)
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "sliding_window",
        "strides": [16, 16, 16],
        "chunksize": [BLOCK] * 3,
        "storage_chunks": [BLOCK // 2] * 3,
        "combine": "soft",
        "threads": 2,
        "model_config": model,
    }
    workspace = Workspace(folder, values)
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    # The cache of storage chunks may hold up to a fixed size.
    workspace.run("work", "--burst", "--gpus", "none", "--quiet", CHUNKQ_CACHE_BYTES="0").ok()
    commits = workspace.commits()
    assert len(commits) == blocks**3
    status = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)
    assert len(status["workers"]) == 1
    return max(commit.peak_rss for commit in commits)


def test_peak_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    small, large = peak_bytes(tmp_path / "small", 4), peak_bytes(tmp_path / "large", 8)
    # The larger volume has 96 MB, its sums over two classes have twice that.
    assert large < 1.1 * small
    assert small > 50e6
