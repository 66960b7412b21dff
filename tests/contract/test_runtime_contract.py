"""The contract of every runtime and every form of a network; see chunkq_worker/runtimes/base.py.

A new form is a function and an entry of FORMS in tests/models.py. A new runtime is an entry of
RUNTIMES below. All tests then run for it.
"""

import gc
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.batching import Batcher
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.steps import Steps

from chunkq.blend.combine import activate, add_weighted, to_labels, to_numpy, to_votes
from chunkq.errors import ErrorCode, ModelError
from chunkq.job.job_parsing import parse_job
from chunkq.job.model_config import ModelConfig
from chunkq.plan.plan import Plan
from chunkq.plan.volume import Volume
from tests import models
from tests.harness.predictions import each_prediction
from tests.models import CHANNELS, FORMS, PATCH, Form
from tests.strategies import JobPlan

FORM_BY_RUNTIME = [
    next(form for form in FORMS if form.runtime == name)
    for name in dict.fromkeys(form.runtime for form in FORMS)
]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
each_runtime = pytest.mark.parametrize("form", FORM_BY_RUNTIME, ids=lambda form: form.runtime)


def exhaust_torch() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def exhaust_onnx() -> None:
    import onnx
    import onnxruntime

    helper, dtypes = onnx.helper, onnx.TensorProto
    shape = helper.make_tensor_value_info("shape", dtypes.INT64, [1])
    zeros = helper.make_tensor_value_info("zeros", dtypes.FLOAT, None)
    node = helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    graph = helper.make_graph([node], "g", [shape], [zeros])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, {"shape": np.array([1 << 50])})


def exhaust_tensorflow() -> None:
    """Raise TensorFlow's error; a real allocation would retry for ten seconds."""
    from chunkq_worker.runtimes.tensorflow_import import tf

    message = "OOM when allocating tensor with shape[1073741824] and type float by allocator mklcpu"
    raise tf.errors.ResourceExhaustedError(None, None, message)


def exhaust_numpy() -> None:
    np.empty(1 << 60, np.uint8)


@dataclass(frozen=True)
class RuntimeTraits:
    """Properties of a runtime.

    `array_type` is the type name of the arrays that the protected steps get. `exhaust_memory`
    raises the runtime's error for a failed allocation. `close` leaves no instances of the classes
    named in `network_classes`.
    """

    array_type: str
    exhaust_memory: Callable[[], None]
    network_classes: tuple[str, ...]


RUNTIMES = {
    "torch": RuntimeTraits("Tensor", exhaust_torch, ("Module",)),
    "onnx": RuntimeTraits("ndarray", exhaust_onnx, ("InferenceSession",)),
    "tensorflow": RuntimeTraits("EagerTensor", exhaust_tensorflow, ("AutoTrackable",)),
    "numpy": RuntimeTraits("ndarray", exhaust_numpy, ("SmallNet", "partial")),
}


@dataclass(frozen=True)
class RuntimeFactory:
    """Creates runtimes. Model files are written once per session."""

    make_folder: Callable[[str], Path]

    def keys(self, form: Form, dtype: str = "float32") -> dict[str, Any]:
        return models.keys_of(form, dtype, self.make_folder)

    def runtime(
        self, form: Form, dtype: str = "float32", steps: Steps | None = None, **options: Any
    ) -> Runtime:
        keys = self.keys(form, dtype) | {"max_batch_size": 4} | options
        return load_runtime(config(keys), steps or Steps(), 1)

    def plan(self, form: Form, **options: Any) -> Plan:
        """Return the plan of a job with 16 patches in one chunk."""
        values = {
            "input": "/in.zarr",
            "output": "/out.zarr",
            "chunksize": [32, 32, 8],
            "model_config": self.keys(form) | options,
        }
        return JobPlan.of(parse_job(values), Volume((32, 32, 8), "float32"))


@pytest.fixture
def factory(tmp_path_factory: pytest.TempPathFactory) -> RuntimeFactory:
    return RuntimeFactory(tmp_path_factory.mktemp)


def config(keys: dict[str, Any]) -> ModelConfig:
    """Return the validated model_config of a job."""
    return parse_job({"input": "/in.zarr", "output": "/out.zarr", "model_config": keys}).model


def batch(count: int = 4, dtype: str = "float32") -> npt.NDArray[Any]:
    """Return a fixed batch whose values every dtype can represent."""
    values = np.random.default_rng(11).integers(0, 100, (count, 1, *PATCH))
    return values.astype(dtype)


def traits(form: Form) -> RuntimeTraits:
    return RUNTIMES[form.runtime]


@contextmanager
def new_objects() -> Iterator[Callable[[tuple[str, ...]], int]]:
    """Yield a function that counts existing instances of classes created in the `with` block.

    It includes instances of subclasses.
    """

    def count_instances(class_names: tuple[str, ...]) -> int:
        gc.collect()
        counts = Counter(map(type, gc.get_objects()))
        names = set(class_names)
        return sum(
            count
            for cls, count in counts.items()
            if not names.isdisjoint(base.__name__ for base in cls.__mro__)
        )

    gc.freeze()
    try:
        yield count_instances
    finally:
        gc.unfreeze()


# ------------------------------------------------------------------------------ predictions


@each_form
def test_predictions_equal_those_of_the_torch_class(factory: RuntimeFactory, form: Form) -> None:
    values = np.random.default_rng(2).uniform(-50, 150, (4, 1, *PATCH)).astype(np.float32)
    outputs = to_numpy(factory.runtime(form)(values)[0])
    assert outputs.shape == (4, CHANNELS, *PATCH)
    assert outputs.dtype in (np.float32, np.float64)
    np.testing.assert_allclose(outputs, models.predict(values), rtol=0, atol=form.tolerance)


@pytest.mark.parametrize(
    ("form", "dtype"), [(form, dtype) for form in FORMS for dtype in form.dtypes], ids=str
)
def test_every_dtype_of_the_job_reaches_the_network(
    factory: RuntimeFactory, form: Form, dtype: str
) -> None:
    outputs = to_numpy(factory.runtime(form, dtype)(batch())[0])
    tolerance = form.tolerance
    if form.casts:
        tolerance = models.LOW_PRECISION_TOLERANCE.get(dtype, tolerance)
    np.testing.assert_allclose(outputs, models.predict(batch()), rtol=0, atol=tolerance)
    assert outputs.dtype in (np.float32, np.float64)


@each_runtime
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float64"]
)
def test_every_dtype_of_a_volume_is_cast(factory: RuntimeFactory, form: Form, dtype: str) -> None:
    outputs = to_numpy(factory.runtime(form)(batch(dtype=dtype))[0])
    np.testing.assert_allclose(outputs, models.predict(batch()), rtol=0, atol=form.tolerance)


@each_form
def test_a_call_does_not_change_the_batch(factory: RuntimeFactory, form: Form) -> None:
    values = batch()
    first = np.array(to_numpy(factory.runtime(form)(values)[0]))
    np.testing.assert_array_equal(values, batch())
    np.testing.assert_array_equal(to_numpy(factory.runtime(form)(values)[0]), first)


@each_form
def test_the_next_call_does_not_change_the_last_result(factory: RuntimeFactory, form: Form) -> None:
    runtime, values = factory.runtime(form), batch()
    result = runtime(values)[0]
    copy = np.array(to_numpy(result))
    values[...] = 3
    runtime(values)
    np.testing.assert_array_equal(to_numpy(result), copy)


@each_form
def test_a_result_does_not_depend_on_its_position_in_the_batch(
    factory: RuntimeFactory, form: Form
) -> None:
    runtime, values = factory.runtime(form), batch()
    expected = np.array(to_numpy(runtime(values)[0]))
    for offset in (1, 2, 3):
        outputs = to_numpy(runtime(np.roll(values, offset, axis=0))[0])
        np.testing.assert_allclose(np.roll(outputs, -offset, axis=0), expected, rtol=0, atol=1e-6)
    single_item = np.zeros_like(values)
    single_item[2] = values[2]
    np.testing.assert_allclose(to_numpy(runtime(single_item)[0])[2], expected[2], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------- arrays and steps


@each_form
def test_arrays_of_a_runtime_are_combined_like_numpy_arrays(
    factory: RuntimeFactory, form: Form
) -> None:
    runtime, weights = factory.runtime(form), np.random.default_rng(3).random(PATCH, np.float32)
    [outputs] = runtime(batch())
    expected = np.array(to_numpy(outputs))
    for activation in ("none", "softmax", "sigmoid"):
        activated = activate(outputs, activation)  # type: ignore[arg-type]
        expected_activated = activate(expected, activation)  # type: ignore[arg-type]
        np.testing.assert_allclose(to_numpy(activated), expected_activated, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(to_votes(outputs)), to_votes(expected))
    total = runtime.zeros((CHANNELS, *PATCH))
    assert not to_numpy(total).any()
    assert to_numpy(total).dtype == np.float32
    for prediction in outputs:
        add_weighted(total, runtime.to_device(weights), prediction)
    expected_total = (expected * weights).sum(axis=0)
    np.testing.assert_allclose(to_numpy(total), expected_total, rtol=0, atol=1e-5)
    labels = to_labels(total, np.uint8)
    np.testing.assert_array_equal(labels, to_numpy(total).argmax(axis=0))


@each_form
def test_protected_steps_get_the_arrays_of_the_runtime(factory: RuntimeFactory, form: Form) -> None:
    inputs: list[tuple[str, tuple[int, ...], str]] = []

    def record(array: Any) -> Any:
        dtype = str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")
        inputs.append((type(array).__name__, tuple(array.shape), dtype))
        return array

    def scale(array: Any) -> Any:
        return record(array) * 2 - 10

    def shift(array: Any) -> Any:
        return record(array) * 0.5 + 1

    steps = Steps(preprocessing_protected=scale, postprocessing_protected=shift)
    outputs = to_numpy(factory.runtime(form, steps=steps)(batch(dtype="uint8"))[0])
    array_type = traits(form).array_type
    input_shape, output_shape = (4, 1, *PATCH), (4, CHANNELS, *PATCH)
    assert inputs == [(array_type, input_shape, "float32"), (array_type, output_shape, "float32")]
    expected = models.predict(batch() * 2 - 10) * 0.5 + 1
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=form.tolerance)


# ----------------------------------------------------------------------------------- memory


class LimitedMemoryRuntime(Runtime):
    """Wraps a runtime. Call `exhaust_memory` for batches of more than `max_items` items."""

    def __init__(self, inner: Runtime, exhaust_memory: Callable[[], None], max_items: int) -> None:
        self.device, self.sizes = inner.device, list[int]()
        self._inner, self._exhaust_memory, self._max_items = inner, exhaust_memory, max_items

    def __call__(self, batch: npt.NDArray[Any]) -> Any:
        self.sizes.append(len(batch))
        if len(batch) > self._max_items:
            self._exhaust_memory()
        return self._inner(batch)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Any:
        return self._inner.zeros(shape, dtype)

    def to_device(self, array: npt.NDArray[Any]) -> Any:
        return self._inner.to_device(array)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return self._inner.is_out_of_memory(error)

    def close(self) -> None:
        self._inner.close()


def predictions(batcher: Batcher, plan: Plan) -> npt.NDArray[Any]:
    chunk = plan.chunk((0, 0, 0))
    values = np.random.default_rng(1).uniform(0, 100, chunk.halo.shape).astype(np.float32)
    pairs = each_prediction(batcher, list(plan.patches(chunk)), [values], chunk.halo.start)
    return np.stack([np.array(to_numpy(prediction)) for _, prediction in pairs])


@each_form
def test_out_of_memory_halves_the_batch_size_logs_it_once_and_is_remembered(
    factory: RuntimeFactory, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    plan = factory.plan(form, max_batch_size=16)
    runtime = factory.runtime(form, max_batch_size=16)
    expected = predictions(Batcher(plan, plan.job.model, runtime, Steps()), plan)
    limited = LimitedMemoryRuntime(runtime, traits(form).exhaust_memory, max_items=5)
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        first = Batcher(plan, plan.job.model, limited, Steps(), network=("net", form))
        first.warm_up()
        second = Batcher(plan, plan.job.model, limited, Steps(), network=("net", form))
        second.warm_up()
        outputs = predictions(second, plan)
    assert limited.sizes == [16, 8, 4, 4, *[4] * 4]
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)
    messages = [record.getMessage() for record in caplog.records]
    assert [re.findall(r"\d+", message)[0] for message in messages] == ["8", "4"]
    assert all("out of memory" in message for message in messages)


@each_runtime
@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        RuntimeError("the network fails"),
        ZeroDivisionError(),
        OSError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_do_not_count_as_out_of_memory(
    factory: RuntimeFactory, form: Form, error: Exception
) -> None:
    assert not factory.runtime(form).is_out_of_memory(error)


@each_form
def test_close_releases_the_network(factory: RuntimeFactory, form: Form) -> None:
    factory.keys(form)
    class_names = traits(form).network_classes
    with new_objects() as count_instances:
        runtime = factory.runtime(form)
        runtime(batch())
        assert count_instances(class_names) > 0
        runtime.close()
        assert count_instances(class_names) == 0


# ----------------------------------------------------------------------------- bad networks


def load_error(
    form: Form,
    keys: dict[str, Any],
    factory: RuntimeFactory,
    code: ErrorCode = ErrorCode.MODEL_UNUSABLE,
) -> str:
    """Load a form with changed keys and call it. Return the message of its ModelError."""
    with pytest.raises(ModelError) as caught:
        load_runtime(config(factory.keys(form) | {"max_batch_size": 4} | keys), Steps(), 1)(batch())
    line = str(caught.value)
    assert caught.value.code is code, line
    assert line.startswith("model_config."), line
    assert "\n" not in line
    assert "\x1b" not in line
    return line


FILE_KEYS = ("checkpoint", "ts_file", "model_file", "json_file", "class_file")


def main_file(keys: dict[str, Any]) -> str:
    """Return the key of the file with the weights or the network."""
    return next(key for key in FILE_KEYS if key in keys)


@each_form
def test_a_missing_file_is_reported_in_one_line(
    factory: RuntimeFactory, form: Form, tmp_path: Path
) -> None:
    key = main_file(factory.keys(form))
    line = load_error(form, {key: str(tmp_path / "missing.bin")}, factory)
    assert line.startswith(f"model_config.{key}: ")
    assert f"{tmp_path}/missing.bin" in line


@each_form
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and then nothing", bytes(5000)])
def test_a_file_with_other_content_is_reported_in_one_line(
    factory: RuntimeFactory, form: Form, tmp_path: Path, content: bytes
) -> None:
    key = main_file(factory.keys(form))
    path = tmp_path / Path(factory.keys(form)[key]).name
    path.write_bytes(content)
    line = load_error(form, {key: str(path)}, factory)
    lacks_class = key == "class_file" and not content  # an empty file is valid Python
    assert line.startswith(f"model_config.{'class_name' if lacks_class else key}: {path}")


KEYS_TO_USE = {
    "torch_class": ("torch", "class"),
    "torch_file": ("torch", "file", "trusted"),
    "torchscript": ("torch", "torchscript", "ts_file"),
    "exported": ("torch", "exported"),
    "onnx_file": ("onnx", "file"),
    "keras_file": ("tensorflow", "file"),
    "keras_h5": ("tensorflow", "file"),
}
"""Form -> the keys and values that the error for a file of this form must name."""


def form_named(name: str) -> Form:
    return next(form for form in FORMS if form.name == name)


ALSO_ACCEPTED = [
    ("torch_class", "torch_nested"),
    ("torch_nested", "torch_class"),
    ("keras_file", "keras_h5"),
    ("keras_h5", "keras_file"),
    ("keras_saved_model", "keras_file"),
    ("keras_saved_model", "keras_h5"),
    ("keras_class", "keras_h5"),
    ("keras_json", "keras_h5"),
    ("keras_json", "keras_file"),
]
"""Pairs (form, form of a file that it also accepts). Keras can read weights from networks."""


@pytest.mark.parametrize(("form", "file_form"), ALSO_ACCEPTED)
def test_another_file_with_the_weights_is_accepted(
    factory: RuntimeFactory, form: str, file_form: str
) -> None:
    keys, other = factory.keys(form_named(form)), factory.keys(form_named(file_form))
    changed = {main_file(keys): other[main_file(other)], "max_batch_size": 4}
    outputs = to_numpy(load_runtime(config(keys | changed), Steps(), 1)(batch())[0])
    np.testing.assert_allclose(outputs, models.predict(batch()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "file_form"),
    [
        (form, file_form)
        for form in FORMS
        for file_form in KEYS_TO_USE
        if file_form != form.name and (form.name, file_form) not in ALSO_ACCEPTED
    ],
    ids=str,
)
def test_the_error_for_a_file_of_another_type_names_the_keys_to_use(
    factory: RuntimeFactory, form: Form, file_form: str
) -> None:
    other = factory.keys(form_named(file_form))
    path = other[main_file(other)]
    reads_weights_only = form.name in ("torch_class", "torch_nested")
    is_pickle = file_form == "torch_file" and reads_weights_only
    code = ErrorCode.MODEL_UNTRUSTED if is_pickle else ErrorCode.MODEL_UNUSABLE
    line = load_error(form, {main_file(factory.keys(form)): path}, factory, code)
    assert path in line
    keys = KEYS_TO_USE[file_form]
    for key in keys[form.runtime == keys[0] :]:
        assert key in line, (key, line)


@pytest.mark.parametrize("form", [form for form in FORMS if form.fixed], ids=str)
def test_a_dtype_unsupported_by_the_file_is_reported_in_one_line(
    factory: RuntimeFactory, form: Form
) -> None:
    line = load_error(form, {"dtype": "float64"}, factory)
    assert line.startswith("model_config.dtype: ")
    assert "dtype: float32" in line
