"""A format of inputs that an installed package outside chunkq registers by an entry point."""

import os
from pathlib import Path

import numpy as np
import pytest

from chunkq.errors import ErrorCode, StoreError
from tests.harness.small_job import SHAPE, small_workspace
from tests.harness.volumes import random_volume, read_output
from tests.harness.workspace import Workspace
from tests.outside_format.toy import write_toy

OUTSIDE = Path(__file__).parents[1] / "outside_format"
PYTHONPATH = os.pathsep.join([str(OUTSIDE), os.environ.get("PYTHONPATH", "")])


def workspace_with_toy_input(folder: Path) -> Workspace:
    workspace = small_workspace(folder)
    write_toy(folder / "in.toy", random_volume(SHAPE))
    workspace.write_job(input="in.toy")
    return workspace


def test_a_run_over_the_format_of_another_package_has_the_output_of_the_same_voxels_in_zarr(
    tmp_path: Path,
) -> None:
    toy, zarr = workspace_with_toy_input(tmp_path / "toy"), small_workspace(tmp_path / "zarr")
    toy.run("run", "job.json", "--gpus", "none", PYTHONPATH=PYTHONPATH).ok()
    zarr.produce()
    zarr.compute_inline()
    zarr.finalize().ok()
    assert [source.format for source in toy.job.record.sources] == ["toy"]
    np.testing.assert_array_equal(read_output(toy.output), read_output(zarr.output))


def test_a_worker_without_the_package_of_a_format_raises_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_with_toy_input(tmp_path)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(OUTSIDE)
        workspace.call("produce", "job.json").ok()
    with pytest.raises(StoreError, match="'toy'") as error:
        _ = workspace.item.sources
    assert error.value.code is ErrorCode.PACKAGE_MISSING
