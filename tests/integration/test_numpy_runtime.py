"""Networks written in NumPy: what is called and with what, what is refused, threads, a worker."""

import json
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
from chunkq_worker.runtimes.onnx import OnnxRuntime
from chunkq_worker.steps import Steps

from chunkq.errors import JobError, ModelError
from chunkq.job import ModelConfig, job_schema, parse_job
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import Workspace

PATCH = (4, 4)
SHAPE = (10, 9)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Networks write what they see to `sys`; nothing of that outlives a test."""
    yield
    if hasattr(sys, "seen_by_network"):
        del sys.seen_by_network


def keys(folder: Path, code: str, name: str = "net", **more: Any) -> dict[str, Any]:
    (folder / "net.py").write_text(f"import sys\nimport numpy as np\n\n{code}\n")
    return {
        "runtime": "numpy",
        "type": "class",
        "class_file": str(folder / "net.py"),
        "class_name": name,
        "model_input_shape": [*PATCH],
        "max_batch_size": 4,
        **more,
    }


def job_of(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"input": "/in.zarr", "output": "/out.zarr", "model_config": model, **more}


def config(model: dict[str, Any]) -> ModelConfig:
    return parse_job(job_of(model)).model


def load(
    folder: Path, code: str, name: str = "net", *, threads: int | None = 1, **more: Any
) -> Runtime:
    steps = more.pop("steps", Steps())
    return load_runtime(config(keys(folder, code, name, **more)), steps, threads)


def kwargs_file(folder: Path, kwargs: str) -> dict[str, str]:
    (folder / "kwargs.py").write_text(f"kwargs = {kwargs}\n")
    return {"kwargs_file": str(folder / "kwargs.py")}


def batch(dtype: str = "float32", count: int = 3) -> npt.NDArray[Any]:
    return np.arange(count * 16).reshape(count, *PATCH).astype(dtype)


# ---------------------------------------------------------------------------- what is called


def test_a_function_gets_the_kwargs_as_keywords(tmp_path: Path) -> None:
    runtime = load(
        tmp_path,
        "def net(batch, *, gain): return batch * gain",
        **kwargs_file(tmp_path, "{'gain': 3}"),
    )
    np.testing.assert_array_equal(runtime(batch()), batch() * 3)


def test_a_class_is_made_once_with_the_kwargs_and_its_object_called(tmp_path: Path) -> None:
    code = """
class Net:
    def __init__(self, gain):
        self.gain, self.calls = gain, 0

    def __call__(self, batch):
        self.calls += 1
        return batch * self.gain + self.calls
"""
    runtime = load(tmp_path, code, "Net", **kwargs_file(tmp_path, "{'gain': 3}"))
    np.testing.assert_array_equal(runtime(batch()), batch() * 3 + 1)
    np.testing.assert_array_equal(runtime(batch()), batch() * 3 + 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_network_is_called_with_a_writable_array_in_c_order_of_the_jobs_dtype(
    tmp_path: Path, dtype: str, turned: bool
) -> None:
    code = """
def net(batch):
    flags = batch.flags
    sys.seen_by_network = type(batch), str(batch.dtype), batch.shape, flags.c_contiguous
    batch += 1
    return batch
"""
    values = batch(">u2")
    if turned:
        values = values.swapaxes(1, 2)[:, ::-1]
        values.flags.writeable = False
    outputs = load(tmp_path, code, dtype=dtype)(values)
    assert sys.seen_by_network == (np.ndarray, dtype, (3, *PATCH), True)  # type: ignore[attr-defined]
    assert outputs.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_array_equal(outputs, values.astype("int64") + 1)


def test_a_batch_that_cannot_be_written_to_is_copied(tmp_path: Path) -> None:
    values = batch()
    values.flags.writeable = False  # C order and the job's dtype: nothing else needs a copy
    outputs = load(tmp_path, "def net(batch):\n    batch += 1\n    return batch")(values)
    np.testing.assert_array_equal(outputs, batch() + 1)
    np.testing.assert_array_equal(values, batch())


def test_it_is_in_c_order_also_behind_a_protected_step_that_returns_a_view(tmp_path: Path) -> None:
    code = "def net(batch): return batch + (0 if batch.flags.c_contiguous else 1000)"
    steps = Steps(preprocessing_protected=lambda values: values.swapaxes(1, 2))
    outputs = load(tmp_path, code, steps=steps)(batch())
    np.testing.assert_array_equal(outputs, batch().swapaxes(1, 2))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float16", "float64", "longdouble"])
def test_results_of_every_real_dtype_are_cast_to_a_float(tmp_path: Path, dtype: str) -> None:
    outputs = load(tmp_path, f"def net(batch): return batch.astype({dtype!r})")(batch())
    assert outputs.dtype == ("float64" if dtype in ("float64", "longdouble") else "float32")
    np.testing.assert_array_equal(outputs, batch().astype(dtype))


def test_a_small_last_batch_is_not_filled_up(tmp_path: Path) -> None:
    assert load(tmp_path, "def net(batch): return batch").any_batch


def test_numpy_and_onnx_share_one_rule_for_arrays_on_the_host(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, "def net(batch): return batch"), HostRuntime)
    assert issubclass(OnnxRuntime, HostRuntime)


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"checkpoint": "/net.npz"},
            "model_config.checkpoint: runtime numpy reads no checkpoint; load the weights in "
            "class_file and leave it out",
        ),
        (
            {"device": "cuda"},
            "model_config.device: runtime numpy computes on the CPU; set device: cpu",
        ),
        (
            {"dtype": "bfloat16"},
            "model_config.dtype: numpy takes no bfloat16 here; use float32",
        ),
        ({"type": "file"}, "model_config.type: numpy has no file; its types are class"),
        ({"class_name": None}, "model_config.class_name: missing; type class needs it"),
        *(
            ({key: value}, f"model_config.{key}: only for runtime torch, this job's is numpy")
            for key, value in {
                "autocast": "bfloat16",
                "compile": True,
                "channels_last": True,
                "cuda_graph": True,
            }.items()
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_key_that_is_not_numpys_is_one_line(
    tmp_path: Path, more: dict[str, Any], line: str
) -> None:
    with pytest.raises(JobError) as caught:
        config(keys(tmp_path, "", **more))
    assert caught.value.problems == (line,)


def test_the_schema_lists_the_runtime() -> None:
    model = job_schema()["$defs"]["ModelConfig"]["properties"]
    assert "numpy" in model["runtime"]["enum"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def other(batch): pass", "class_name: {path} has no 'net'; it defines np, other, sys"),
        ("net = 3", "class_name: net of {path} is int; expected a class or a function"),
        ("class net: pass", "is a class whose objects cannot be called; add __call__(self, batch)"),
        ("def net(): pass", "cannot be called with one batch: too many positional arguments"),
        (
            "def net(a, b): pass",
            "cannot be called with one batch: missing a required argument: 'b'",
        ),
        ("class net:\n def __call__(self): pass", "cannot be called with one batch"),
        ("class net:\n def __init__(self): 1 / 0", "net(**kwargs) raised ZeroDivisionError"),
        ("1 / 0", "class_file: {path} raised ZeroDivisionError"),
        ("def net(", "class_file: {path} is not Python"),
    ],
)
def test_code_that_holds_no_network_is_one_line(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, code)
    line = str(caught.value)
    assert words.format(path=tmp_path / "net.py") in line
    assert line.startswith("model_config.class_")
    assert "\n" not in line


def test_kwargs_that_the_function_does_not_take_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"and the kwargs \['gian'\]: .*unexpected keyword .*gian"):
        load(tmp_path, "def net(batch, gain=1): pass", **kwargs_file(tmp_path, "{'gian': 3}"))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "returned NoneType, not one array; wrap it so that it returns the prediction"),
        ("(batch, batch)", "returned tuple, not one array"),
        ("[batch]", "returned list, not one array"),
        ("{'a': batch, 'b': 1}", "returned dict of a, b, not one array"),
        ("batch.mean()", "returned float32, not one array"),
        ("batch.astype(object)", "returned dtype object, expected real numbers; return float32"),
        ("batch.astype(complex)", "returned dtype complex128, expected real numbers"),
        ("batch.astype(str)", "expected real numbers"),
    ],
)
def test_what_is_no_array_of_numbers_is_one_line(tmp_path: Path, returned: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, f"def net(batch): return {returned}")(batch())
    assert str(caught.value).startswith("the network returned ")
    assert words in str(caught.value)


def test_a_protected_step_may_make_real_numbers_of_complex_ones(tmp_path: Path) -> None:
    code = "def net(batch): return batch * 1j"
    outputs = load(tmp_path, code, steps=Steps(postprocessing_protected=np.abs))(batch())
    np.testing.assert_array_equal(outputs, batch())
    steps = Steps(postprocessing_protected=lambda values: values * 1)
    with pytest.raises(ModelError, match="the network with its protected steps returned dtype"):
        load(tmp_path, code, steps=steps)(batch())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return batch[:1]", "returned shape [1, 4, 4] for a batch of [4, 4, 4]"),
        ("return batch[..., None]", "returned shape [4, 4, 4, 1]"),
        ("return np.zeros(())", "returned shape []"),
        ("raise KeyError('weights')", "raised KeyError on a batch of zeros: 'weights'"),
    ],
)
def test_a_network_that_cannot_do_zeros_is_one_line(tmp_path: Path, body: str, words: str) -> None:
    with (
        Predictor.from_config(job_of(keys(tmp_path, f"def net(batch): {body}"))) as predictor,
        pytest.raises(ModelError) as caught,
    ):
        predictor.predict(np.zeros(SHAPE, np.float32))
    assert words in str(caught.value)


def test_an_error_in_one_batch_is_raised_as_it_is(tmp_path: Path) -> None:
    code = """
def net(batch):
    if batch.any():
        raise ArithmeticError("too bright")
    return batch
"""
    with (
        Predictor.from_config(job_of(keys(tmp_path, code))) as predictor,
        pytest.raises(ArithmeticError, match="too bright"),
    ):
        predictor.predict(np.ones(SHAPE, np.float32))


def test_what_is_missing_is_named_with_the_package_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    for name in ("numpy", "thread_limit"):
        monkeypatch.delitem(sys.modules, f"{base.__package__}.{name}", raising=False)
    with pytest.raises(ModelError, match=r"numpy is not installed here .*pip install 'chunkq'$"):
        load(tmp_path, "def net(batch): return batch")


# ------------------------------------------------------------------------------------ threads

COUNTING = """
import threadpoolctl

def net(batch):
    batch[...] = max(pool["num_threads"] for pool in threadpoolctl.threadpool_info())
    return batch
"""


def threads_of_process() -> list[int]:
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_jobs_threads_limit_every_batch_and_nothing_else(tmp_path: Path, threads: int) -> None:
    before = threads_of_process()
    assert before
    runtime, other = load(tmp_path, COUNTING, threads=threads), load(tmp_path, COUNTING, threads=1)
    for _ in range(2):
        assert runtime(batch()).max() == threads
        assert threads_of_process() == before
        assert other(batch()).max() == 1
    with threadpoolctl.threadpool_limits(2):
        assert runtime(batch()).max() == threads
        assert set(threads_of_process()) == {2}
        assert load(tmp_path, COUNTING, threads=None)(batch()).max() == 2


def test_a_job_without_threads_gets_the_workers_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKQ_THREADS", "1")
    model = keys(tmp_path, COUNTING)
    with Predictor.from_config(job_of(model)) as predictor:
        assert predictor.predict(np.zeros(SHAPE, np.float32)).probabilities.max() == 1
    monkeypatch.setenv("CHUNKQ_THREADS", "2")
    with Predictor.from_config(job_of(model)) as predictor:
        assert predictor.predict(np.zeros(SHAPE, np.float32)).probabilities.max() == 2
    with Predictor.from_config(job_of(model, threads=3)) as predictor:
        assert predictor.predict(np.zeros(SHAPE, np.float32)).probabilities.max() == 3


# ----------------------------------------------------------------------------- whole jobs


def test_a_predictor_is_made_from_a_python_file(tmp_path: Path) -> None:
    keys(tmp_path, "def net(batch): return batch * 2")
    volume = random_volume(SHAPE, "float32")
    with Predictor.from_model(
        tmp_path / "net.py", runtime="numpy", class_name="net", model_input_shape=PATCH
    ) as predictor:
        found = predictor.predict(volume).probabilities
    assert found is not None
    np.testing.assert_allclose(found[0], volume * 2, rtol=1e-6)


HEAVY = ("torch", "tensorflow", "keras", "onnxruntime", "zarr", "scipy", "pandas", "botocore")
TELLING = """
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
        "model_config": keys(tmp_path, TELLING),
    }
    made = Workspace(tmp_path, job)
    made.write_job()
    return made


def test_a_worker_process_imports_no_framework_for_it(workspace: Workspace) -> None:
    workspace.call("produce", "job.json").ok()
    workspace.run("work", "--burst").ok()
    workspace.call("finalize", "out.zarr").ok()
    np.testing.assert_array_equal(read_output(workspace.output), random_volume(SHAPE) * 2.0)
    loaded = json.loads((workspace.folder / "modules.json").read_text())
    assert "chunkq_worker.runtimes.numpy" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_export_refuses_it_in_one_line(workspace: Workspace) -> None:
    answer = workspace.call("export", "job.json", "-o", "net.onnx")
    answer.refused(2, "model_config.runtime: unsupported value numpy")


def test_tune_refuses_precisions_of_torch(workspace: Workspace) -> None:
    answer = workspace.call("tune", "job.json", "--precision", "bfloat16")
    answer.refused(2, "--precision: only for runtime torch, this job's is numpy")


def test_plan_tries_it_on_patches_of_the_volume(workspace: Workspace) -> None:
    answer = workspace.run("plan", "job.json", "--check-model", "--json").ok()
    tried = json.loads(answer.out)["model_check"]
    assert (tried["device"], tried["finite"], tried["tile_norms"]) == ("cpu", True, [])
