"""The reference average of the border protocols agrees with chunkq's output."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.borders import small, whole_volume
from benchmarks.contestant import chunkq, read
from chunkq.job.job_reading import load_job

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

ROUNDING = 1e-6
"""Tolerance for chunkq's float32 sums; the averages are between 0 and 1."""


@pytest.mark.parametrize("weight", ["weight_gaussian", "weight_linear"])
def test_the_reference_average_agrees_with_chunkqs_output(tmp_path: Path, weight: str) -> None:
    job = load_job(small(tmp_path))
    job = job.model_copy(update={"weight_function": (weight,), "chunksize": (24, 24, 24)})
    output = str(tmp_path / "chunkq.zarr")
    chunkq(job, output)()
    expected, written = whole_volume(job), read(output)
    assert expected.dtype == np.float64
    assert written.shape == expected.shape == (3, 72, 72, 24)
    assert np.ptp(expected) > 100 * ROUNDING
    assert np.abs(written - expected).max() < ROUNDING
