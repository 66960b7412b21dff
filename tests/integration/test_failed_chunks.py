"""Predictions and stored voxels that are invalid fail their chunk only, and are reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkq.errors import ErrorCode
from tests.harness.networks import toy_model
from tests.harness.small_job import four_chunks
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return four_chunks(tmp_path)


def poisoned(folder: Path, **more: Any) -> Workspace:
    """Create a job without overlap whose network returns NaN for the patch with a voxel of 255."""
    workspace = four_chunks(folder)
    values = random_volume((32, 24))
    values[20, 13] = 255
    write_zarr(folder / "marked.zarr", values, (8, 8))
    workspace.values.update(
        input="marked.zarr",
        inference_type="patch",
        strides=None,
        chunksize=[16, 8],
        model_config=toy_model(folder, (8, 8), scale=100.0, kind="pointwise", poison=200),
        **more,
    )
    workspace.write_job()
    return workspace


def test_a_nan_prediction_fails_only_its_chunk_and_reports_the_patch(
    tmp_path: Path,
) -> None:
    workspace = poisoned(tmp_path)
    answer = workspace.run("run", "job.json", "--gpus", "none")
    assert answer.code == 3
    assert "Traceback" not in answer.err
    [last] = [line for line in answer.err.splitlines() if f"[{ErrorCode.JOB_INCOMPLETE}]" in line]
    assert answer.err.splitlines()[-1] == last
    assert f"`chunkq status {workspace.output}` to see why, then run the same command" in last
    assert "[16, 8] to [24, 16]" in answer.err
    assert {commit.chunk for commit in workspace.commits()} == {
        (i, j) for i in range(2) for j in range(3)
    } - {(1, 1)}
    [failure] = workspace.failures()
    assert failure.error == "PredictionError"
    assert failure.attempt == 3
    [group] = json.loads(workspace.call("status", "out.zarr", "--json").ok().out)["failures"]
    assert group["chunks"] == ["1.1"]
    workspace.call("finalize", "out.zarr").refused(3, ErrorCode.JOB_INCOMPLETE, ": 1.1;")


def test_with_nan_zero_the_job_completes_with_zero_for_nan(tmp_path: Path) -> None:
    workspace = poisoned(tmp_path, nan="zero")
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    assert workspace.failures() == []
    workspace.call("finalize", "out.zarr").ok()
    output = read_output(workspace.output)
    assert np.isfinite(output).all()
    assert output[0, 16, 8] == 0
    assert output[0, 16, 9] != 0
    assert output[1, 16, 8] != 0


def test_a_corrupt_storage_chunk_fails_only_the_chunks_that_read_it_and_is_reported(
    workspace: Workspace,
) -> None:
    stored = workspace.folder / "in.zarr" / "c" / "3" / "2"
    stored.write_bytes(b"\x00garbage" * 3)
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").refused(3, ErrorCode.JOB_INCOMPLETE, ": 1.1;")
    assert {commit.chunk for commit in workspace.commits()} == {(0, 0), (0, 1), (1, 0)}
    [failure] = workspace.failures()
    assert failure.error == "ChunkReadError"
    assert failure.message.startswith(f"{workspace.folder}/in.zarr: voxels [")
    assert "3/2" in failure.message


def test_a_retry_after_the_cause_is_fixed_completes_the_job(workspace: Workspace) -> None:
    stored = workspace.folder / "in.zarr" / "c" / "3" / "2"
    content = stored.read_bytes()
    stored.write_bytes(content[:-9])
    workspace.write_job()
    workspace.call("produce", "job.json").ok()
    workspace.compute_inline()
    workspace.call("cancel", "out.zarr").ok()
    assert workspace.call("retry", "out.zarr").ok().out.startswith("1 ")
    stored.write_bytes(content)
    workspace.compute_inline()
    workspace.call("finalize", "out.zarr").ok()
    assert workspace.failures() == []
