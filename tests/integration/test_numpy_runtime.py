"""The NumPy runtime: calls, errors, threads and a worker process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import threadpoolctl
from chunkq_worker.predictor import Predictor
from chunkq_worker.runtimes import base
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.runtimes.host_runtime import HostRuntime
from chunkq_worker.runtimes.onnx_host import OnnxRuntime
from chunkq_worker.steps import Steps

from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.install_hint import install_command
from chunkq.job.job_file import job_schema
from chunkq.job.job_parsing import parse_job
from chunkq.job.model_config import ModelConfig
from tests.harness.assertions import assert_contains
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace

PATCH = (4, 4)
SHAPE = (10, 9)


@pytest.fixture(autouse=True)
def _remove_network_input() -> Iterator[None]:
    """Delete the attribute of `sys` in which networks record their input."""
    yield
    if hasattr(sys, "network_input"):
        del sys.network_input


def keys(folder: Path, code: str, name: str = "net", **options: Any) -> dict[str, Any]:
    (folder / "net.py").write_text(f"import sys\nimport numpy as np\n\n{code}\n")
    return {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": name,
        "model_input_shape": [*PATCH],
        "max_batch_size": 4,
        **options,
    }


def job_of(model: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"input": "/in.zarr", "output": "/out.zarr", "model_config": model, **options}


def config(model: dict[str, Any]) -> ModelConfig:
    return parse_job(job_of(model)).model


def load(
    folder: Path, code: str, name: str = "net", *, threads: int | None = 1, **options: Any
) -> Runtime:
    steps = options.pop("steps", Steps())
    return load_runtime(config(keys(folder, code, name, **options)), steps, threads)


def kwargs_file(folder: Path, kwargs: str) -> dict[str, str]:
    (folder / "kwargs.py").write_text(f"kwargs = {kwargs}\n")
    return {"kwargs_file": str(folder / "kwargs.py")}


def batch(dtype: str = "float32", count: int = 3) -> npt.NDArray[Any]:
    return np.arange(count * 16).reshape(count, *PATCH).astype(dtype)


# -------------------------------------------------------------------------------------- calls


def test_a_function_gets_the_kwargs_as_keywords(tmp_path: Path) -> None:
    runtime = load(
        tmp_path,
        "def net(batch, *, gain): return batch * gain",
        **kwargs_file(tmp_path, "{'gain': 3}"),
    )
    np.testing.assert_array_equal(runtime(batch())[0], batch() * 3)


def test_a_class_is_instantiated_once_with_the_kwargs_and_called(tmp_path: Path) -> None:
    code = """
class Net:
    def __init__(self, gain):
        self.gain, self.calls = gain, 0

    def __call__(self, batch):
        self.calls += 1
        return batch * self.gain + self.calls
"""
    runtime = load(tmp_path, code, "Net", **kwargs_file(tmp_path, "{'gain': 3}"))
    np.testing.assert_array_equal(runtime(batch())[0], batch() * 3 + 1)
    np.testing.assert_array_equal(runtime(batch())[0], batch() * 3 + 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64"])
@pytest.mark.parametrize("reversed_view", [False, True])
def test_the_network_gets_a_writable_array_in_c_order_and_the_dtype_of_the_job(
    tmp_path: Path, dtype: str, reversed_view: bool
) -> None:
    code = """
def net(batch):
    flags = batch.flags
    sys.network_input = type(batch), str(batch.dtype), batch.shape, flags.c_contiguous
    batch += 1
    return batch
"""
    values = batch(">u2")
    if reversed_view:
        values = values.swapaxes(1, 2)[:, ::-1]
        values.flags.writeable = False
    outputs = load(tmp_path, code, dtype=dtype)(values)[0]
    assert sys.network_input == (np.ndarray, dtype, (3, *PATCH), True)  # type: ignore[attr-defined]
    assert outputs.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_array_equal(outputs, values.astype("int64") + 1)


def test_a_read_only_batch_is_copied(tmp_path: Path) -> None:
    values = batch()
    values.flags.writeable = False  # C order and dtype do not require a copy
    outputs = load(tmp_path, "def net(batch):\n    batch += 1\n    return batch")(values)[0]
    np.testing.assert_array_equal(outputs, batch() + 1)
    np.testing.assert_array_equal(values, batch())


def test_the_batch_is_in_c_order_after_a_protected_step_that_returns_a_view(
    tmp_path: Path,
) -> None:
    code = "def net(batch): return batch + (0 if batch.flags.c_contiguous else 1000)"
    steps = Steps(preprocessing_protected=lambda values: values.swapaxes(1, 2))
    outputs = load(tmp_path, code, steps=steps)(batch())[0]
    np.testing.assert_array_equal(outputs, batch().swapaxes(1, 2))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float16", "float64", "longdouble"])
def test_results_of_every_real_dtype_are_cast_to_float32_or_float64(
    tmp_path: Path, dtype: str
) -> None:
    outputs = load(tmp_path, f"def net(batch): return batch.astype({dtype!r})")(batch())[0]
    assert outputs.dtype == ("float64" if dtype in ("float64", "longdouble") else "float32")
    np.testing.assert_array_equal(outputs, batch().astype(dtype))


def test_a_network_accepts_any_batch_size(tmp_path: Path) -> None:
    assert load(tmp_path, "def net(batch): return batch").any_batch


def test_numpy_and_onnx_share_the_base_class_for_host_arrays(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, "def net(batch): return batch"), HostRuntime)
    assert issubclass(OnnxRuntime, HostRuntime)


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"checkpoint": "/net.npz"}, ("numpy", "class_file")),
        ({"device": "cuda"}, ("numpy", "model_config.device", "cpu")),
        ({"dtype": "bfloat16"}, ("numpy", "bfloat16", "float32")),
        ({"type": "file"}, ("numpy", "file", "class")),
        ({"class_name": None}, ("missing", "class")),
        *(
            ({key: value}, ("torch", "numpy"))
            for key, value in {
                "precision": "bfloat16",
                "compile": True,
                "channels_last": True,
                "cuda_graph": True,
            }.items()
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_error_for_an_unsupported_key_names_it(
    tmp_path: Path, options: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(JobError) as caught:
        config(keys(tmp_path, "", **options))
    assert caught.value.code is ErrorCode.JOB_INVALID
    [line] = caught.value.problems
    [key] = options
    assert line.startswith(f"model_config.{key}: ")
    assert_contains(line, *fragments)


def test_the_schema_lists_the_runtime() -> None:
    model = job_schema()["$defs"]["ModelConfig"]["properties"]
    assert "numpy" in model["runtime"]["enum"]


@pytest.mark.parametrize(
    ("code", "key", "fragments"),
    [
        ("def other(batch): pass", "class_name", ("'net'", "np, other, sys")),
        ("net = 3", "class_name", ("int", "class or a function")),
        ("class net: pass", "class_name", ("__call__(self, batch)",)),
        ("def net(): pass", "class_name", ("too many positional arguments",)),
        ("def net(a, b): pass", "class_name", ("missing a required argument: 'b'",)),
        (
            "class net:\n def __call__(self): pass",
            "class_name",
            ("too many positional arguments",),
        ),
        ("class net:\n def __init__(self): 1 / 0", "class_name", ("ZeroDivisionError",)),
        ("1 / 0", "class_file", ("{path}", "ZeroDivisionError")),
        ("def net(", "class_file", ("{path}", "Python")),
    ],
)
def test_code_without_a_usable_network_is_reported_in_one_line(
    tmp_path: Path, code: str, key: str, fragments: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, code)
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    line = str(caught.value)
    assert line.startswith(f"model_config.{key}: ")
    assert_contains(line, *[text.format(path=tmp_path / "net.py") for text in fragments])
    assert "\n" not in line


def test_the_error_for_an_unexpected_kwarg_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, "def net(batch, gain=1): pass", **kwargs_file(tmp_path, "{'gian': 3}"))
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    line = str(caught.value)
    assert line.startswith("model_config.class_name: ")
    assert_contains(line, "['gian']", "kwargs_file")


@pytest.mark.parametrize(
    ("returned", "fragments"),
    [
        ("None", ("NoneType", "one array")),
        ("(batch, batch)", ("tuple", "one array")),
        ("[batch, [batch]]", ("list", "outputs[0] [", "outputs[1][0] [", "one array")),
        ("{'a': batch, 'b': batch}", ("dict", "outputs['a'] [", "outputs['b'] [", "one array")),
        ("batch.mean()", ("float32", "one array")),
        ("batch.astype(object)", ("dtype object", "real numbers", "float32")),
        ("batch.astype(complex)", ("dtype complex128", "real numbers")),
        ("batch.astype(str)", ("dtype <U", "real numbers")),
    ],
)
def test_the_error_for_an_output_that_is_not_a_real_array_names_its_type(
    tmp_path: Path, returned: str, fragments: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, f"def net(batch): return {returned}")(batch())[0]
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), "the network returned ", *fragments)


def test_a_protected_step_can_convert_complex_numbers_to_real_ones(tmp_path: Path) -> None:
    code = "def net(batch): return batch * 1j"
    outputs = load(tmp_path, code, steps=Steps(postprocessing_protected=np.abs))(batch())[0]
    np.testing.assert_array_equal(outputs, batch())
    steps = Steps(postprocessing_protected=lambda values: values * 1)
    with pytest.raises(ModelError) as caught:
        load(tmp_path, code, steps=steps)(batch())[0]
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), "protected steps", "complex64")


@pytest.mark.parametrize(
    ("body", "fragments"),
    [
        ("return batch[:1]", ("model_output_shape", [1, 4, 4], [2, 4, 4])),
        ("return batch[..., None]", ("model_output_shape", [2, 4, 4, 1])),
        ("return np.zeros(())", ("model_output_shape", " [] ")),
        ("raise KeyError('weights')", ("KeyError", "zeros", "'weights'")),
    ],
)
def test_the_error_for_a_network_that_fails_for_zeros_names_the_cause(
    tmp_path: Path, body: str, fragments: tuple[object, ...]
) -> None:
    with (
        Predictor.from_config(job_of(keys(tmp_path, f"def net(batch): {body}"))) as predictor,
        pytest.raises(ModelError) as caught,
    ):
        predictor.predict(np.zeros(SHAPE, np.float32))
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert_contains(str(caught.value), *fragments)


def test_an_error_in_one_batch_is_the_cause_of_the_error_that_is_raised(tmp_path: Path) -> None:
    code = """
def net(batch):
    if batch.any():
        raise ArithmeticError("too bright")
    return batch
"""
    with (
        Predictor.from_config(job_of(keys(tmp_path, code))) as predictor,
        pytest.raises(ModelError, match="ArithmeticError: too bright") as caught,
    ):
        predictor.predict(np.ones(SHAPE, np.float32))
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_the_error_for_a_missing_dependency_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    for name in ("numpy", "thread_limit"):
        monkeypatch.delitem(sys.modules, f"{base.__package__}.{name}", raising=False)
    with pytest.raises(ModelError) as caught:
        load(tmp_path, "def net(batch): return batch")
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    line = str(caught.value)
    assert line.startswith("model_config.runtime: numpy ")
    assert_contains(line, "threadpoolctl")
    assert line.endswith(f"`{install_command()}`")


# ------------------------------------------------------------------------------------ threads

RETURNS_THREADS = """
import threadpoolctl

def net(batch):
    batch[...] = max(pool["num_threads"] for pool in threadpoolctl.threadpool_info())
    return batch
"""


def threads_of_process() -> list[int]:
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_threads_of_a_job_apply_only_to_its_batches(tmp_path: Path, threads: int) -> None:
    initial = threads_of_process()
    assert initial
    runtime, other = (
        load(tmp_path, RETURNS_THREADS, threads=threads),
        load(tmp_path, RETURNS_THREADS, threads=1),
    )
    for _ in range(2):
        assert runtime(batch())[0].max() == threads
        assert threads_of_process() == initial
        assert other(batch())[0].max() == 1
    with threadpoolctl.threadpool_limits(2):
        assert runtime(batch())[0].max() == threads
        assert set(threads_of_process()) == {2}
        assert load(tmp_path, RETURNS_THREADS, threads=None)(batch())[0].max() == 2


def test_a_job_without_threads_uses_those_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKQ_THREADS", "1")
    model = keys(tmp_path, RETURNS_THREADS)
    with Predictor.from_config(job_of(model)) as predictor:
        assert predictor.predict(np.zeros(SHAPE, np.float32)).probabilities.max() == 1
    monkeypatch.setenv("CHUNKQ_THREADS", "2")
    with Predictor.from_config(job_of(model)) as predictor:
        assert predictor.predict(np.zeros(SHAPE, np.float32)).probabilities.max() == 2
    with Predictor.from_config(job_of(model, threads=3)) as predictor:
        assert predictor.predict(np.zeros(SHAPE, np.float32)).probabilities.max() == 3


# --------------------------------------------------------------------------- complete jobs


def test_a_predictor_is_created_from_a_python_file(tmp_path: Path) -> None:
    keys(tmp_path, "def net(batch): return batch * 2")
    volume = random_volume(SHAPE, "float32")
    with Predictor.from_model(
        tmp_path / "net.py", runtime="numpy", class_name="net", model_input_shape=PATCH
    ) as predictor:
        probabilities = predictor.predict(volume).probabilities
    assert probabilities is not None
    np.testing.assert_allclose(probabilities[0], volume * 2, rtol=1e-6)


LARGE_MODULES = (
    "torch",
    "tensorflow",
    "keras",
    "onnxruntime",
    "zarr",
    "scipy",
    "pandas",
    "botocore",
)
RECORDS_MODULES = """
import json
import pathlib

def net(batch):
    pathlib.Path(__file__).with_name("modules.json").write_text(json.dumps(sorted(sys.modules)))
    return batch * 2
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (5, 5))
    job = {
        "input": str(tmp_path / "in.zarr"),
        "output": str(tmp_path / "out.zarr"),
        "chunksize": [4, 4],
        "threads": 1,
        "model_config": keys(tmp_path, RECORDS_MODULES),
    }
    workspace = Workspace(tmp_path, job)
    workspace.write_job()
    return workspace


def test_a_worker_process_imports_no_framework(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.run("work", "--burst").ok()
    workspace.call("finalize", "out.zarr").ok()
    np.testing.assert_array_equal(read_output(workspace.output), random_volume(SHAPE) * 2.0)
    loaded = json.loads((workspace.folder / "modules.json").read_text())
    assert "chunkq_worker.runtimes.numpy" in loaded
    assert [name for name in LARGE_MODULES if name in loaded] == []


LISTS_MODULES = """
import sys
from chunkq import Predictor

with Predictor.from_config("job.json") as predictor:
    predictor.predict_to_store("in.zarr", "out.zarr")
print(*sys.modules)
"""


def test_a_job_imports_no_masked_arrays(workspace: Workspace) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LISTS_MODULES],
        cwd=workspace.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = result.stdout.split()
    assert "chunkq.timing.aggregation" in loaded
    assert "numpy.ma" not in loaded


def test_export_supports_only_torch(workspace: Workspace) -> None:
    result = workspace.call("export", "job.json", "-o", "net.onnx")
    result.refused(2, ErrorCode.JOB_INVALID, "model_config.runtime: ", " numpy;", "torch")


def test_tune_supports_precisions_only_for_torch(workspace: Workspace) -> None:
    result = workspace.call("tune", "job.json", "--precision", "bfloat16")
    result.refused(2, ErrorCode.JOB_INVALID, "--precision: ", "torch", "numpy")


def test_plan_checks_the_model_on_patches_of_the_volume(workspace: Workspace) -> None:
    result = workspace.run("plan", "job.json", "--check-model", "--json").ok()
    check = json.loads(result.out)["model_check"]
    assert (check["device"], check["finite"], check["tile_norms"]) == ("cpu", True, [])
