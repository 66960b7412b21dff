"""The same job cut into 1, 8 and 60 chunks gives the same volume, and it is the reference's."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests import reference as ref
from tests.harness.networks import toy_model
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline

SHAPE = (37, 23, 30)
PATCH = (8, 8, 8)
CUTS = {1: (40, 24, 32), 8: (20, 12, 16), 60: (8, 8, 8)}
SCALE = 100.0

JOBS: dict[str, tuple[dict[str, Any], ref.Setup]] = {
    "sliding window": (
        {
            "inference_type": "sliding_window",
            "strides": [5, 4, 6],
            "pad_width": [4, 4, 4],
            "pad_mode": "reflect",
            "weight_function": ["weight_gaussian"],
        },
        ref.sliding_window(SHAPE, PATCH, (5, 4, 6), pad_width=(4, 4, 4), pad_mode="reflect"),
    ),
    "patches on three grids": (
        {
            "inference_type": "patch",
            "offsets": [[-4, -4, -4], [3, 0, -2]],
            "pad_mode": "symmetric",
            "weight_function": ["weight_linear"],
        },
        ref.patch(SHAPE, PATCH, offsets=((-4, -4, -4), (3, 0, -2)), pad_mode="symmetric"),
    ),
    "cropped margins": (
        {"inference_type": "crop_margin", "margin": [1, 2, 1], "pad_mode": "edge"},
        ref.crop_margin(SHAPE, PATCH, (1, 2, 1), pad_mode="edge"),
    ),
}
KINDS = [
    ("sliding window", "weighted_avg", "none"),
    ("sliding window", "soft", "softmax"),
    ("sliding window", "hard", "none"),
    ("patches on three grids", "weighted_avg", "sigmoid"),
    ("cropped margins", "weighted_avg", "none"),
]


def expected(job: str, combine: str, activation: str) -> ref.Reference:
    keys, setup = JOBS[job]
    network = ref.predictor("box_blur", 3, PATCH)
    return ref.reference(
        setup,
        random_volume(SHAPE),
        lambda patch, start: network(patch / SCALE, start),
        combine,
        keys.get("weight_function", ["weight_uniform"])[0],
        activation=activation,
    )


def results(tmp_path: Path, job: str, combine: str, activation: str) -> dict[int, npt.NDArray[Any]]:
    """The output for each cut, through the worker's own entry and the finalizer."""
    source = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (16, 16, 16))
    found = {}
    for count, chunksize in CUTS.items():
        values = {
            "input": str(source),
            "output": str(tmp_path / f"out{count}.zarr"),
            "combine": combine,
            "activation": activation,
            "chunksize": list(chunksize),
            "storage_chunks": [4, 4, 4],
            "threads": 1,
            "model_config": toy_model(tmp_path, PATCH, scale=SCALE) | {"max_batch_size": 8},
            **JOBS[job][0],
        }
        opened, report = run_inline(values)
        assert report["chunks"] == count
        assert report["missing"] == []
        found[count] = read_output(opened.folder.output)
    return found


@pytest.mark.parametrize(("job", "combine", "activation"), KINDS)
def test_any_cut_gives_the_same_volume_and_it_is_the_one_of_the_reference(
    tmp_path: Path, job: str, combine: str, activation: str
) -> None:
    truth = expected(job, combine, activation)
    found = results(tmp_path, job, combine, activation)
    if combine == "weighted_avg":
        for count, values in found.items():
            assert values.dtype == np.float32
            assert values.shape == (3, *SHAPE)
            np.testing.assert_allclose(values, truth.average, rtol=0, atol=1e-5, err_msg=str(count))
            np.testing.assert_allclose(values, found[1], rtol=0, atol=1e-5, err_msg=str(count))
        return
    clear = truth.margin_of_decision > 1e-5
    assert clear.mean() > 0.99
    assert len(np.unique(truth.labels)) == 3
    for count, values in found.items():
        assert values.dtype == np.uint8
        assert values.shape == SHAPE
        np.testing.assert_array_equal(values[clear], truth.labels[clear], err_msg=str(count))
        np.testing.assert_array_equal(values[clear], found[1][clear], err_msg=str(count))
