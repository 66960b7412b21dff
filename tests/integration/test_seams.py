"""Visible borders of blocks are measured when a job is finalized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkq import seams
from chunkq.job.job_handle import open_job
from chunkq.seams import Seam
from chunkq.storage.chunk_cache import FetchCounter
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace, run_tasks

CHUNK = 16
WITH_SEAMS = """
def net(batch):
    return batch + 1000 * batch.mean(axis=(1, 2), keepdims=True)
"""
WITHOUT_SEAMS = "def net(batch):\n    return batch * 2\n"
LABELS = """
import numpy as np

def net(batch):
    offset = (batch.astype(np.int64).sum(axis=(1, 2), keepdims=True)) % 2
    return np.stack([np.zeros(batch.shape), offset - 0.5 + 0 * batch], axis=1)
"""


def finalized(folder: Path, network: str, **changes: Any) -> tuple[Workspace, dict[str, Any]]:
    """Run a job whose blocks are one patch each; return it and its report."""
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(network)
    write_zarr(folder / "in.zarr", random_volume((64, 70), "uint8"), (32, 32))
    values = {
        "input": "in.zarr",
        "output": "out.zarr",
        "inference_type": "patch",
        "chunksize": [CHUNK, CHUNK],
        "storage_chunks": [8, 8],
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": "net.py",
            "class_name": "net",
            "dtype": "float32",
            "model_input_shape": [CHUNK, CHUNK],
            **changes.pop("model", {}),
        },
    }
    workspace = Workspace(folder, values | changes)
    workspace.produce()
    run_tasks(workspace.job)
    return workspace, json.loads(workspace.call("finalize", workspace.output, "--json").ok().out)


def naive(output: np.ndarray[Any, np.dtype[Any]], axis: int) -> tuple[float, float, int]:
    """Return the mean differences at all borders and a quarter of a block below, and the pairs.

    Half a block beside the borders of the other axis is compared.
    """
    along = np.moveaxis(output.astype(np.float64), axis, 0)[:, CHUNK // 2 :]
    along = along[:, : len(range(CHUNK, output.shape[1 - axis], CHUNK)) * CHUNK]
    starts = range(CHUNK, len(along), CHUNK)

    def mean(positions: list[int]) -> float:
        return float(np.mean([np.abs(along[p] - along[p - 1]) for p in positions]))

    at, inside = mean([*starts]), mean([start - CHUNK // 4 for start in starts])
    return at, inside, len(starts) * along[0].size


def test_the_figures_are_those_of_a_reference_over_the_whole_output(tmp_path: Path) -> None:
    workspace, report = finalized(tmp_path, WITH_SEAMS)
    output = read_output(str(workspace.output))
    assert [seam["axis"] for seam in report["seams"]] == ["y", "x"]
    for axis, seam in enumerate(report["seams"]):
        at, inside, pairs = naive(output, axis)
        assert seam["at_border"] == pytest.approx(at, rel=1e-9)
        assert seam["inside"] == pytest.approx(inside, rel=1e-9)
        assert seam["ratio"] == pytest.approx(at / inside, rel=1e-9)
        assert seam["pairs"] == pairs
        assert seam["ratio"] > 5


def test_visible_blocks_are_a_warning_if_there_are_pairs_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report = finalized(tmp_path / "few", WITH_SEAMS)
    assert report["warnings"] == []
    monkeypatch.setattr(seams, "MIN_PAIRS", 100)
    workspace, report = finalized(tmp_path / "seams", WITH_SEAMS)
    assert len(report["warnings"]) == 2
    assert "along axis y" in report["warnings"][0]
    text = " ".join(workspace.call("report", workspace.output).ok().out.split())
    assert "blocks are visible along axis x" in text
    _, report = finalized(tmp_path / "none", WITHOUT_SEAMS)
    assert report["warnings"] == []
    assert all(0.8 < seam["ratio"] < 1.2 for seam in report["seams"])
    again = workspace.call("finalize", workspace.output, "--json").ok()
    assert len(json.loads(again.out)["warnings"]) == 2


def test_a_storage_chunk_about_a_corner_is_read_once(tmp_path: Path) -> None:
    workspace, report = finalized(tmp_path, WITHOUT_SEAMS)
    job, counter = open_job(f"{workspace.output}.chunkq"), FetchCounter()
    job.output.image(job.record.images[0]).open_present()
    counter.take()
    figures = [seam.as_dict() for seam in seams.measure_seams(job)]
    assert figures == report["seams"]
    # 3 x 4 corners; the array's document is read when it is opened.
    assert counter.take().requests == 3 * 4 * 2**2 + 1


def test_labels_are_compared_by_the_share_that_differs(tmp_path: Path) -> None:
    workspace, report = finalized(
        tmp_path, LABELS, combine="soft", model={"model_output_shape": [2, CHUNK, CHUNK]}
    )
    output = read_output(str(workspace.output))
    assert set(np.unique(output)) == {0, 1}
    for axis, seam in enumerate(report["seams"]):
        at, inside, _ = naive(output, axis)
        assert (seam["at_border"], seam["inside"]) == (pytest.approx(at), inside)
        assert inside == 0
        assert seam["ratio"] is None


def test_a_job_with_one_block_has_no_borders(tmp_path: Path) -> None:
    _, report = finalized(tmp_path, WITHOUT_SEAMS, chunksize=[64, 80])
    assert report["seams"] == []


@pytest.mark.parametrize(
    ("pairs", "at_border", "inside", "is_visible"),
    [
        (100_000, 1.21, 1.0, True),
        (100_000, 1.2, 1.0, False),
        (99_999, 9.0, 1.0, False),
        (100_000, 0.1, 0.0, True),
        (100_000, 0.0, 0.0, False),
    ],
)
def test_the_limits_of_a_warning(
    pairs: int, at_border: float, inside: float, *, is_visible: bool
) -> None:
    assert Seam("", "x", 10, pairs, at_border, inside).is_visible is is_visible
