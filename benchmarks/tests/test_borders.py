"""What the border protocols are compared with is what chunkq writes."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.borders import small, whole_volume
from benchmarks.contestant import chunkq, read
from chunkq.job import load_job

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

ROUNDING = 1e-6
"""chunkq sums in float32; the averages lie between 0 and 1."""


@pytest.mark.parametrize("weight", ["weight_gaussian", "weight_linear"])
def test_the_average_over_the_whole_volume_is_what_chunkq_writes(
    tmp_path: Path, weight: str
) -> None:
    job = load_job(small(tmp_path))
    job = job.model_copy(update={"weight_function": (weight,), "chunksize": (24, 24, 24)})
    output = str(tmp_path / "chunkq.zarr")
    chunkq(job, output)()
    expected, written = whole_volume(job), read(output)
    assert expected.dtype == np.float64
    assert written.shape == expected.shape == (3, 72, 72, 24)
    assert np.ptp(expected) > 100 * ROUNDING
    assert np.abs(written - expected).max() < ROUNDING
