"""The contract of every runtime and every form of a network; see chunkq_worker/runtimes/base.py.

A new form adds a function and one entry to tests/models.py, a new runtime one to RUNTIMES here,
and gets the whole suite.
"""

import gc
import logging
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

from chunkq.combine import activate, add_weighted, reduce_and_cast, to_numpy, to_votes
from chunkq.errors import ModelError
from chunkq.job import ModelConfig, parse_job
from chunkq.plan import Plan, Volume
from chunkq.resolve import resolve
from tests import models
from tests.models import CHANNELS, FORMS, PATCH, Form

FORM_BY_RUNTIME = [
    next(form for form in FORMS if form.runtime == name)
    for name in dict.fromkeys(form.runtime for form in FORMS)
]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)
each_runtime = pytest.mark.parametrize("form", FORM_BY_RUNTIME, ids=lambda form: form.runtime)


def torch_is_out_of_memory() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def onnx_is_out_of_memory() -> None:
    import onnx
    import onnxruntime

    n, kind = onnx.helper, onnx.TensorProto
    shape = n.make_tensor_value_info("shape", kind.INT64, [1])
    much = n.make_tensor_value_info("much", kind.FLOAT, None)
    graph = n.make_graph(
        [n.make_node("ConstantOfShape", ["shape"], ["much"])], "g", [shape], [much]
    )
    model = n.make_model(graph, opset_imports=[n.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, {"shape": np.array([1 << 50])})


def tensorflow_is_out_of_memory() -> None:
    """Its own error in its own words; really asked, it tries for ten seconds."""
    from chunkq_worker.runtimes.tensorflow_import import tf

    words = "OOM when allocating tensor with shape[1073741824] and type float by allocator mklcpu"
    raise tf.errors.ResourceExhaustedError(None, None, words)


def numpy_is_out_of_memory() -> None:
    np.empty(1 << 60, np.uint8)


@dataclass(frozen=True)
class Known:
    """What the suite knows of a runtime.

    `own` names the type of the arrays that protected steps are given. `out_of_memory` raises what
    the runtime does where there is no more. `networks` name classes of whose objects `close` leaves
    none.
    """

    own: str
    out_of_memory: Callable[[], None]
    networks: tuple[str, ...]


RUNTIMES = {
    "torch": Known("Tensor", torch_is_out_of_memory, ("Module",)),
    "onnx": Known("ndarray", onnx_is_out_of_memory, ("InferenceSession",)),
    "tensorflow": Known("EagerTensor", tensorflow_is_out_of_memory, ("AutoTrackable",)),
    "numpy": Known("ndarray", numpy_is_out_of_memory, ("SmallNet", "partial")),
}


@dataclass(frozen=True)
class Shop:
    """Makes runtimes; the files are written once per session."""

    make_folder: Callable[[str], Path]

    def keys(self, form: Form, dtype: str = "float32") -> dict[str, Any]:
        return models.keys_of(form, dtype, self.make_folder)

    def runtime(
        self, form: Form, dtype: str = "float32", steps: Steps | None = None, **more: Any
    ) -> Runtime:
        keys = self.keys(form, dtype) | {"max_batch_size": 4} | more
        return load_runtime(config(keys), steps or Steps(), 1)

    def plan(self, form: Form, **more: Any) -> Plan:
        """A job of 16 patches in one chunk."""
        values = {
            "input": "/in.zarr",
            "output": "/out.zarr",
            "chunksize": [32, 32, 8],
            "model_config": self.keys(form) | more,
        }
        return resolve(parse_job(values), Volume((32, 32, 8), "float32"))


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp)


def config(keys: dict[str, Any]) -> ModelConfig:
    """The checked model_config, as a job has it."""
    return parse_job({"input": "/in.zarr", "output": "/out.zarr", "model_config": keys}).model


def batch(count: int = 4, dtype: str = "float32") -> npt.NDArray[Any]:
    """A fixed batch whose values every dtype holds exactly."""
    drawn = np.random.default_rng(11).integers(0, 100, (count, 1, *PATCH))
    return drawn.astype(dtype)


def known(form: Form) -> Known:
    return RUNTIMES[form.runtime]


@contextmanager
def counted_anew() -> Iterator[Callable[[tuple[str, ...]], int]]:
    """Yield what tells how many objects of classes or derived ones were made since, and live."""

    def living(names: tuple[str, ...]) -> int:
        gc.collect()
        kinds = Counter(map(type, gc.get_objects()))
        wanted = set(names)
        return sum(
            n
            for kind, n in kinds.items()
            if not wanted.isdisjoint(c.__name__ for c in kind.__mro__)
        )

    gc.freeze()
    try:
        yield living
    finally:
        gc.unfreeze()


# ------------------------------------------------------------------------------ predictions


@each_form
def test_it_predicts_what_the_torch_class_predicts(shop: Shop, form: Form) -> None:
    given = np.random.default_rng(2).uniform(-50, 150, (4, 1, *PATCH)).astype(np.float32)
    outputs = to_numpy(shop.runtime(form)(given))
    assert outputs.shape == (4, CHANNELS, *PATCH)
    assert outputs.dtype in (np.float32, np.float64)
    np.testing.assert_allclose(outputs, models.predict(given), rtol=0, atol=form.within)


@pytest.mark.parametrize(
    ("form", "dtype"), [(form, dtype) for form in FORMS for dtype in form.dtypes], ids=str
)
def test_every_dtype_of_the_job_reaches_the_network(shop: Shop, form: Form, dtype: str) -> None:
    outputs = to_numpy(shop.runtime(form, dtype)(batch()))
    within = models.COARSE.get(dtype, form.within) if form.casts else form.within
    np.testing.assert_allclose(outputs, models.predict(batch()), rtol=0, atol=within)
    assert outputs.dtype in (np.float32, np.float64)


@each_runtime
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float64"]
)
def test_every_dtype_of_a_volume_is_cast(shop: Shop, form: Form, dtype: str) -> None:
    outputs = to_numpy(shop.runtime(form)(batch(dtype=dtype)))
    np.testing.assert_allclose(outputs, models.predict(batch()), rtol=0, atol=form.within)


@each_form
def test_a_call_does_not_change_the_batch(shop: Shop, form: Form) -> None:
    given = batch()
    first = np.array(to_numpy(shop.runtime(form)(given)))
    np.testing.assert_array_equal(given, batch())
    np.testing.assert_array_equal(to_numpy(shop.runtime(form)(given)), first)


@each_form
def test_what_a_call_gave_stays_as_it_is_when_the_next_follows(shop: Shop, form: Form) -> None:
    runtime, given = shop.runtime(form), batch()
    kept = runtime(given)
    before = np.array(to_numpy(kept))
    given[...] = 3
    runtime(given)
    np.testing.assert_array_equal(to_numpy(kept), before)


@each_form
def test_a_result_does_not_depend_on_its_place_in_the_batch(shop: Shop, form: Form) -> None:
    runtime, given = shop.runtime(form), batch()
    together = np.array(to_numpy(runtime(given)))
    for shift in (1, 2, 3):
        turned = to_numpy(runtime(np.roll(given, shift, axis=0)))
        np.testing.assert_allclose(np.roll(turned, -shift, axis=0), together, rtol=0, atol=1e-6)
    alone = np.zeros_like(given)
    alone[2] = given[2]
    np.testing.assert_allclose(to_numpy(runtime(alone))[2], together[2], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------- arrays and steps


@each_form
def test_its_arrays_are_combined_as_numpys_are(shop: Shop, form: Form) -> None:
    runtime, weights = shop.runtime(form), np.random.default_rng(3).random(PATCH, np.float32)
    outputs = runtime(batch())
    expected = np.array(to_numpy(outputs))
    for activation in ("none", "softmax", "sigmoid"):
        found = activate(outputs, activation)  # type: ignore[arg-type]
        wanted = activate(expected, activation)  # type: ignore[arg-type]
        np.testing.assert_allclose(to_numpy(found), wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(to_votes(outputs)), to_votes(expected))
    total = runtime.zeros((CHANNELS, *PATCH))
    assert not to_numpy(total).any()
    assert to_numpy(total).dtype == np.float32
    for prediction in outputs:
        add_weighted(total, runtime.to_device(weights), prediction)
    wanted = (expected * weights).sum(axis=0)
    np.testing.assert_allclose(to_numpy(total), wanted, rtol=0, atol=1e-5)
    average = reduce_and_cast(total, "weighted_avg", np.float32)
    assert average.dtype == np.float32
    np.testing.assert_allclose(average, wanted, rtol=0, atol=1e-5)
    labels = reduce_and_cast(total, "soft", np.uint8)
    np.testing.assert_array_equal(labels, to_numpy(total).argmax(axis=0))


@each_form
def test_protected_steps_are_given_its_own_arrays_on_the_device(shop: Shop, form: Form) -> None:
    seen: list[tuple[str, tuple[int, ...], str]] = []

    def look(array: Any) -> Any:
        dtype = str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")
        seen.append((type(array).__name__, tuple(array.shape), dtype))
        return array

    def scale(array: Any) -> Any:
        return look(array) * 2 - 10

    def shift(array: Any) -> Any:
        return look(array) * 0.5 + 1

    steps = Steps(preprocessing_protected=scale, postprocessing_protected=shift)
    outputs = to_numpy(shop.runtime(form, steps=steps)(batch(dtype="uint8")))
    own = known(form).own
    shape, given = (4, CHANNELS, *PATCH), (4, 1, *PATCH)
    assert seen == [(own, given, "float32"), (own, shape, "float32")]
    wanted = models.predict(batch() * 2 - 10) * 0.5 + 1
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=form.within)


# ----------------------------------------------------------------------------------- memory


class Tight(Runtime):
    """A runtime on a device that holds `fits` items; it raises what its real one raises."""

    def __init__(self, inner: Runtime, error: Callable[[], None], fits: int) -> None:
        self.device, self.sizes = inner.device, list[int]()
        self._inner, self._error, self._fits = inner, error, fits

    def __call__(self, batch: npt.NDArray[Any]) -> Any:
        self.sizes.append(len(batch))
        if len(batch) > self._fits:
            self._error()
        return self._inner(batch)

    def zeros(self, shape: tuple[int, ...]) -> Any:
        return self._inner.zeros(shape)

    def to_device(self, array: npt.NDArray[Any]) -> Any:
        return self._inner.to_device(array)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return self._inner.is_out_of_memory(error)

    def close(self) -> None:
        self._inner.close()


def predictions(batcher: Batcher, plan: Plan) -> npt.NDArray[Any]:
    chunk = plan.chunk((0, 0, 0))
    values = np.random.default_rng(1).uniform(0, 100, chunk.halo.shape).astype(np.float32)
    found = batcher.predictions(list(plan.patches(chunk)), [values], chunk.halo.start)
    return np.stack([np.array(to_numpy(prediction)) for _, prediction in found])


@each_form
def test_out_of_memory_halves_the_batch_says_so_once_and_is_remembered(
    shop: Shop, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    plan = shop.plan(form, max_batch_size=16)
    runtime = shop.runtime(form, max_batch_size=16)
    whole = predictions(Batcher(plan, runtime, Steps()), plan)
    tight = Tight(runtime, known(form).out_of_memory, fits=5)
    with caplog.at_level(logging.INFO, logger="chunkq.worker"):
        first = Batcher(plan, tight, Steps(), network=("net", form))
        first.warm_up()
        again = Batcher(plan, tight, Steps(), network=("net", form))
        again.warm_up()
        found = predictions(again, plan)
    assert tight.sizes == [16, 8, 4, 4, *[4] * 4]
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: batches have 8 patches from here on",
        "out of memory: batches have 4 patches from here on",
    ]


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
def test_another_error_is_not_taken_for_lack_of_memory(
    shop: Shop, form: Form, error: Exception
) -> None:
    assert not shop.runtime(form).is_out_of_memory(error)


@each_form
def test_closing_lets_go_of_the_network(shop: Shop, form: Form) -> None:
    shop.keys(form)
    with counted_anew() as living:
        runtime = shop.runtime(form)
        runtime(batch())
        assert living(known(form).networks) > 0
        runtime.close()
        assert living(known(form).networks) == 0


# ----------------------------------------------------------------------------- bad networks


def refusal(form: Form, keys: dict[str, Any], shop: Shop) -> str:
    """The line with which a changed form is refused, when it is loaded or first called."""
    with pytest.raises(ModelError) as caught:
        load_runtime(config(shop.keys(form) | {"max_batch_size": 4} | keys), Steps(), 1)(batch())
    line = str(caught.value)
    assert line.startswith("model_config."), line
    assert "\n" not in line
    assert "\x1b" not in line
    return line


FILE_KEYS = ("checkpoint", "ts_file", "model_file", "json_file", "class_file")


def main_file(keys: dict[str, Any]) -> str:
    """The key of the file that holds the weights or, as data or code, the network."""
    return next(key for key in FILE_KEYS if key in keys)


@each_form
def test_a_file_that_is_not_there_is_one_line(shop: Shop, form: Form, tmp_path: Path) -> None:
    key = main_file(shop.keys(form))
    line = refusal(form, {key: str(tmp_path / "nowhere.bin")}, shop)
    of_code = "no file " if key == "class_file" else ""
    assert line.startswith(f"model_config.{key}: {of_code}{tmp_path}/nowhere.bin")


@each_form
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and then nothing", bytes(5000)])
def test_a_file_of_something_else_is_one_line(
    shop: Shop, form: Form, tmp_path: Path, content: bytes
) -> None:
    key = main_file(shop.keys(form))
    path = tmp_path / Path(shop.keys(form)[key]).name
    path.write_bytes(content)
    line = refusal(form, {key: str(path)}, shop)
    empty_code = key == "class_file" and not content  # is Python, but without the class
    assert line.startswith(f"model_config.{'class_name' if empty_code else key}: {path}")


RIGHT = {
    "torch_class": ("torch", "class"),
    "torch_file": ("torch", "file", "trusted"),
    "torchscript": ("torch", "torchscript", "ts_file"),
    "exported": ("torch", "exported"),
    "onnx_file": ("onnx", "file"),
    "keras_file": ("tensorflow", "file"),
    "keras_h5": ("tensorflow", "file"),
}
"""What a line must name that refuses such a file where another is due."""


def named(name: str) -> Form:
    return next(form for form in FORMS if form.name == name)


ALSO_RIGHT = [
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
"""Forms whose file may as well be that of another: Keras takes weights out of whole networks."""


@pytest.mark.parametrize(("form", "given"), ALSO_RIGHT)
def test_a_file_that_also_holds_the_weights_will_do(shop: Shop, form: str, given: str) -> None:
    keys, other = shop.keys(named(form)), shop.keys(named(given))
    changed = {main_file(keys): other[main_file(other)], "max_batch_size": 4}
    outputs = to_numpy(load_runtime(config(keys | changed), Steps(), 1)(batch()))
    np.testing.assert_allclose(outputs, models.predict(batch()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "given"),
    [
        (form, given)
        for form in FORMS
        for given in RIGHT
        if given != form.name and (form.name, given) not in ALSO_RIGHT
    ],
    ids=str,
)
def test_a_file_given_as_the_wrong_type_is_recognised_and_the_right_one_named(
    shop: Shop, form: Form, given: str
) -> None:
    other = shop.keys(named(given))
    path = other[main_file(other)]
    line = refusal(form, {main_file(shop.keys(form)): path}, shop)
    assert path in line
    for word in RIGHT[given][form.runtime == RIGHT[given][0] :]:
        assert word in line, (word, line)


@pytest.mark.parametrize("form", [form for form in FORMS if form.fixed], ids=str)
def test_a_dtype_that_the_file_does_not_take_is_one_line(shop: Shop, form: Form) -> None:
    line = refusal(form, {"dtype": "float64"}, shop)
    assert line.startswith("model_config.dtype: ")
    assert "dtype: float32" in line
