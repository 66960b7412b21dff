"""A job with 1, 8 and 60 blocks gives the same output, which equals that of the reference."""

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
CHUNKSIZES = {1: (40, 24, 32), 8: (20, 12, 16), 60: (8, 8, 8)}
"""Chunk size by number of blocks, of which some own no patch."""
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
    """Return the output by number of blocks, computed with the functions that workers call."""
    source = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (16, 16, 16))
    outputs = {}
    for count, chunksize in CHUNKSIZES.items():
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
        job_handle, report = run_inline(values)
        costs = job_handle.items[0].plan.costs
        assert (costs.blocks, report["chunks"]) == (count, costs.chunks)
        assert report["missing"] == []
        outputs[count] = read_output(job_handle.folder.output)
    return outputs


@pytest.mark.parametrize(("job", "combine", "activation"), KINDS)
def test_the_output_does_not_depend_on_the_chunk_size_and_equals_the_reference(
    tmp_path: Path, job: str, combine: str, activation: str
) -> None:
    reference = expected(job, combine, activation)
    outputs = results(tmp_path, job, combine, activation)
    if combine == "weighted_avg":
        for count, values in outputs.items():
            message, average = f"{count} chunks", reference.average
            assert values.dtype == np.float32
            assert values.shape == (3, *SHAPE)
            np.testing.assert_allclose(values, average, rtol=0, atol=1e-5, err_msg=message)
            np.testing.assert_allclose(values, outputs[1], rtol=0, atol=1e-5, err_msg=message)
        return
    is_clear = reference.margin_of_decision > 1e-5
    assert is_clear.mean() > 0.99
    assert len(np.unique(reference.labels)) == 3
    for count, values in outputs.items():
        message, labels = f"{count} chunks", reference.labels
        assert values.dtype == np.uint8
        assert values.shape == SHAPE
        np.testing.assert_array_equal(values[is_clear], labels[is_clear], err_msg=message)
        np.testing.assert_array_equal(values[is_clear], outputs[1][is_clear], err_msg=message)
