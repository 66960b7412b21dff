"""Values that a dtype cannot hold are refused where they occur; none wraps or overflows."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.predictor import Predictor

from chunkq.errors import ErrorCode, JobError, ModelError, PredictionError
from chunkq.job.job_parsing import parse_job
from chunkq.job.resolve import resolve
from chunkq.plan.volume import Volume
from tests.harness.assertions import assert_contains
from tests.harness.volumes import read_output, write_zarr
from tests.harness.workspace import Workspace

SHAPE = (16, 16)
STEPS = "model_config.processing_steps"


def job_values(folder: Path, network: str, steps: str = "", **keys: Any) -> dict[str, Any]:
    """Return a job whose network is the body of a function `net(batch)`."""
    (folder / "net.py").write_text(f"import numpy as np\n\ndef net(batch):\n    {network}\n")
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": "net",
        "model_input_shape": [8, 8],
        "max_batch_size": 2,
    } | keys.pop("model", {})
    if steps:
        (folder / "steps.py").write_text(f"import numpy as np\n\n{steps}\n")
        model["processing_steps"] = str(folder / "steps.py")
    values = {"input": "in.zarr", "output": "out.zarr", "chunksize": [8, 8], "threads": 1}
    return values | {"model_config": model} | keys


def predict(volume: npt.NDArray[Any], values: dict[str, Any]) -> npt.NDArray[Any]:
    values = values | {"input": "/in.zarr", "output": "/out.zarr"}
    with Predictor.from_config(values) as predictor:
        probabilities = predictor.predict(volume).probabilities
    assert probabilities is not None
    return np.asarray(probabilities[0])


def refused(volume: npt.NDArray[Any], values: dict[str, Any], *fragments: str) -> None:
    """Assert that the prediction of a volume fails with one line about a dtype."""
    with pytest.raises(PredictionError) as caught:
        predict(volume, values)
    assert caught.value.code is ErrorCode.DTYPE_UNSUITABLE
    assert "\n" not in str(caught.value)
    assert_contains(str(caught.value), *fragments)


# --------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("stored", "dtype", "value", "proposed"),
    [
        ("uint8", "int8", 128, "int16"),
        ("uint16", "int16", 40000, "int32"),
        ("uint32", "int32", 2**31, "int64"),
        ("int64", "int32", -(2**31) - 1, "int64"),
        ("int32", "float16", 70000, "float32"),
        ("float32", "float16", 7e4, "float32"),
        ("float64", "float32", 1e39, "float64"),
        ("float32", "int32", 0.5, "float32"),
        ("float32", "int64", np.nan, "float32"),
    ],
)
def test_one_value_of_the_input_that_the_dtype_cannot_hold_is_refused(
    tmp_path: Path, stored: str, dtype: str, value: float, proposed: str
) -> None:
    values = job_values(tmp_path, "return batch.astype('float32')", model={"dtype": dtype})
    volume = np.ones(SHAPE, stored)
    np.testing.assert_array_equal(predict(volume, values), 1)
    volume[9, 12] = value
    refused(
        volume,
        values,
        f"model_config.dtype: {dtype} ",
        stored,
        f"set dtype: {proposed}",
        "voxels [8, 8] to [16, 16]",
    )


def test_infinity_in_the_input_is_no_matter_of_dtype(tmp_path: Path) -> None:
    values = job_values(tmp_path, "return np.nan_to_num(batch)", model={"dtype": "float32"})
    volume = np.full(SHAPE, np.inf)
    assert (predict(volume, values) == np.finfo(np.float32).max).all()


def test_the_inputs_of_a_joined_job_are_checked_one_by_one(tmp_path: Path) -> None:
    model = {"dtype": "int16", "join_dim": 1, "model_input_shape": [1, 8, 8]}
    model["model_output_shape"] = [8, 8]
    values = job_values(tmp_path, "return batch.sum(1).astype('float32')", model=model)
    values["input"] = ["/a.zarr", "/b.zarr"]
    volumes = [np.ones(SHAPE, np.uint8), np.full(SHAPE, 40000, np.uint16)]
    with (
        Predictor.from_config(values | {"output": "/out.zarr"}) as predictor,
        pytest.raises(PredictionError) as caught,
    ):
        predictor.predict(volumes)
    assert caught.value.code is ErrorCode.DTYPE_UNSUITABLE
    assert_contains(str(caught.value), "input 1 (uint16)")


@pytest.mark.parametrize(
    ("dtype", "pad_value", "fits"),
    [("int8", 200, False), ("int16", 200, True), ("float16", 3000, False)],
)
def test_the_pad_value_fits_the_dtype_of_the_network(
    tmp_path: Path, dtype: str, pad_value: int, fits: bool
) -> None:
    values = job_values(tmp_path, "return batch", model={"dtype": dtype}, pad_value=pad_value)
    job = parse_job(values | {"input": "/in.zarr", "output": "/out.zarr"})
    problems: tuple[str, ...] = ()
    try:
        resolve(job, Volume(SHAPE, "uint16"))
    except JobError as error:
        problems = error.problems
    assert [line.partition(":")[0] for line in problems] == ([] if fits else ["pad_value"])


@pytest.mark.parametrize("dtype", ["longdouble", "complex64", "uint64"])
def test_an_input_that_no_runtime_can_cast_is_refused_by_its_dtype(
    tmp_path: Path, dtype: str
) -> None:
    with pytest.raises(JobError) as caught:
        predict(np.ones(SHAPE, dtype), job_values(tmp_path, "return batch"))
    [line] = caught.value.problems
    assert_contains(line, "input", "dtype", "convert it")


# ---------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("result", "dtype", "problem"),
    [
        ("batch.astype('int64') * 2**31", "int32", "values 2.14748e+09 to"),
        ("batch.astype('uint64') + np.uint64(2**63)", "int64", "values 9.22337e+18 to"),
        ("batch * 0.25", "int16", "fractions such as 0.25"),
        ("batch * np.float64(1e39)", "float32", "values 1e+39 to"),
        ("batch.astype('longdouble') * 1e300", "float32", "values 1e+300 to"),
    ],
)
def test_what_preprocessing_returns_is_checked(
    tmp_path: Path, result: str, dtype: str, problem: str
) -> None:
    steps = f"def preprocessing(batch):\n    return {result}"
    values = job_values(tmp_path, "return batch.astype('float32')", steps, model={"dtype": dtype})
    refused(
        np.ones(SHAPE, np.uint8),
        values,
        f"model_config.dtype: {dtype} ",
        problem,
        "the result of preprocessing",
        STEPS,
        "reads voxels [0, 0] to [8, 8]",
    )


@pytest.mark.parametrize("dtype", ["complex", "str", "object", "M8[s]"])
def test_preprocessing_must_return_real_numbers(tmp_path: Path, dtype: str) -> None:
    steps = f"def preprocessing(batch):\n    return batch.astype({dtype!r})"
    with pytest.raises(ModelError) as caught:
        predict(np.ones(SHAPE, np.uint8), job_values(tmp_path, "return batch", steps))
    assert str(caught.value).startswith(f"{STEPS}: preprocessing returned dtype ")


@pytest.mark.parametrize("runtime", ["numpy", "torch"])
@pytest.mark.parametrize("returned", ["uint64", "longdouble", "uint32", "bool", ">f8", ">i2"])
@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_preprocessing_may_return_any_real_dtype(
    tmp_path: Path, runtime: str, returned: str, dtype: str
) -> None:
    steps = f"def preprocessing(batch):\n    return batch.astype({returned!r})"
    values = job_values(tmp_path, "return batch * 2.0", steps, model={"dtype": dtype})
    if runtime == "torch":
        (tmp_path / "net.py").write_text(
            "import torch\n\nclass net(torch.nn.Module):\n    def forward(self, x):\n"
            "        return x * 2.0\n"
        )
        values["model_config"]["runtime"] = "torch"
    np.testing.assert_array_equal(predict(np.ones(SHAPE, np.uint8), values), 2)


def test_a_step_that_makes_the_values_fit_is_accepted(tmp_path: Path) -> None:
    steps = "def preprocessing(batch):\n    return batch // 512"
    values = job_values(tmp_path, "return batch.astype('f4')", steps, model={"dtype": "int8"})
    volume = np.full(SHAPE, 65535, np.uint16)
    np.testing.assert_array_equal(predict(volume, values), 127)


# -------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("nan", ["fail", "zero"])
@pytest.mark.parametrize(
    ("network", "steps"),
    [
        ("return batch * np.float64(1e39)", ""),
        ("return batch * np.longdouble('1e400')", ""),
        ("return batch", "def postprocessing(batch):\n    return batch * np.float64(1e39)"),
        (
            "return batch",
            "def postprocessing_protected(batch):\n    return batch * np.double(1e39)",
        ),
    ],
)
def test_an_output_beyond_float32_is_no_infinity(
    tmp_path: Path, nan: str, network: str, steps: str
) -> None:
    values = job_values(tmp_path, network, steps, nan=nan)
    refused(np.ones(SHAPE, np.float32), values, "float64", "float32", "voxels [0, 0] to [8, 8]")


@pytest.mark.parametrize("steps", ["", "def postprocessing(batch):\n    return batch + 1j"])
def test_complex_outputs_are_refused(tmp_path: Path, steps: str) -> None:
    values = job_values(tmp_path, "return batch" if steps else "return batch + 1j", steps)
    with pytest.raises(ModelError) as caught:
        predict(np.ones(SHAPE, np.float32), values)
    assert_contains(str(caught.value), "complex", "real numbers")


def test_infinite_outputs_count_as_zero_only_if_the_network_returned_them(tmp_path: Path) -> None:
    network = "return np.where(batch > 1, np.inf, batch.astype('float64'))"
    volume = np.ones(SHAPE, np.float32)
    volume[3, 3] = 2
    result = predict(volume, job_values(tmp_path, network, nan="zero"))
    assert (result[3, 3], result[3, 4]) == (0, 1)


# ----------------------------------------------------------------------------------------- jobs


def test_run_refuses_values_of_the_volume_before_anything_is_written(tmp_path: Path) -> None:
    volume = np.full(SHAPE, 300, np.int64)
    write_zarr(tmp_path / "in.zarr", volume, (8, 8))
    workspace = Workspace(
        tmp_path, job_values(tmp_path, "return batch.astype('f4')", model={"dtype": "int8"})
    )
    workspace.write_job()
    result = workspace.call("run", "job.json", "-w", "1")
    result.refused(2, ErrorCode.DTYPE_UNSUITABLE, "model_config.dtype: int8", "set dtype: int16")
    assert not workspace.output.exists()
    assert not workspace.job_folder.exists()


def test_a_value_in_one_chunk_is_the_failure_of_that_chunk(tmp_path: Path) -> None:
    volume = np.arange(256, dtype=np.int64).reshape(SHAPE) % 100
    volume[2, 3] = 300
    write_zarr(tmp_path / "in.zarr", volume, (8, 8))
    workspace = Workspace(
        tmp_path, job_values(tmp_path, "return batch.astype('f4')", model={"dtype": "int8"})
    )
    workspace.produce()
    workspace.compute_inline()
    [failure] = workspace.failures()
    assert failure.chunk == (0, 0)
    assert_contains(failure.message, "model_config.dtype: int8", "values 0 to 300")
    assert len(workspace.commits()) == 3
    workspace.call("finalize", "out.zarr", "--allow-missing")
    np.testing.assert_array_equal(read_output(workspace.output)[8:, 8:], volume[8:, 8:])
