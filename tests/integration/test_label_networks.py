"""Networks that return labels: refused, or votes if the job says how many classes there are."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.predictor import Predictor

from chunkq.errors import ErrorCode, JobError, ModelError, PredictionError
from chunkq.job.job_parsing import parse_job
from chunkq.job.resolve import resolve
from chunkq.plan.volume import Volume
from tests.harness.assertions import assert_contains
from tests.harness.volumes import write_zarr
from tests.harness.workspace import Workspace

PATCH = (8, 8)
SHAPE = (20, 18)
VOLUME = np.random.default_rng(3).random(SHAPE, np.float32)
ARGMAX = "(np.floor(x * 5) + np.arange(8) // 4) % 5"
"""Labels 0 to 4 that depend on the position in the patch, so that overlapping patches differ."""


def numpy_keys(folder: Path, returned: str) -> dict[str, Any]:
    (folder / "net.py").write_text(f"import numpy as np\n\ndef net(x):\n    return {returned}\n")
    return {"runtime": "numpy", "type": "class", "class_name": "net"} | {
        "class_file": str(folder / "net.py")
    }


def torch_keys(folder: Path, returned: str) -> dict[str, Any]:
    (folder / "net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        f"        return {returned}\n"
    )
    return {"runtime": "torch", "type": "class", "class_name": "Net"} | {
        "class_file": str(folder / "net.py")
    }


def onnx_keys(folder: Path) -> dict[str, Any]:
    from onnx import TensorProto, helper, save

    start, end = (
        helper.make_tensor_value_info(name, kind, ["n", *PATCH])
        for name, kind in (("x", TensorProto.FLOAT), ("y", TensorProto.INT64))
    )
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)
    graph = helper.make_graph([node], "g", [start], [end])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save(model, folder / "net.onnx")
    return {"runtime": "onnx", "type": "file", "model_file": str(folder / "net.onnx")}


def tensorflow_keys(folder: Path) -> dict[str, Any]:
    (folder / "net.py").write_text(
        "import keras\n\nclass Net(keras.Model):\n    def call(self, x):\n"
        "        return keras.ops.cast(x, 'int32')\n"
    )
    return {"runtime": "tensorflow", "type": "class", "class_name": "Net"} | {
        "class_file": str(folder / "net.py")
    }


def job_values(keys: dict[str, Any], **job: Any) -> dict[str, Any]:
    model = {"model_input_shape": PATCH, "max_batch_size": 4} | keys
    values = {
        "input": "/in.zarr",
        "output": "/out.zarr",
        "inference_type": "sliding_window",
        "strides": [3, 5],
        "weight_function": ["weight_gaussian"],
        "chunksize": [16, 16],
        "threads": 1,
    }
    return values | {"model_config": model} | job


def predict(keys: dict[str, Any], volume: npt.NDArray[Any] = VOLUME, **job: Any) -> Any:
    with Predictor.from_config(job_values(keys, **job)) as predictor:
        result = predictor.predict(volume)
    return result.probabilities if job.get("combine") == "weighted_avg" else result.labels


def refused(keys: dict[str, Any], *fragments: str, **job: Any) -> None:
    with pytest.raises(ModelError) as caught:
        predict(keys, **job)
    assert caught.value.code is ErrorCode.OUTPUT_IS_LABELS
    assert "\n" not in str(caught.value)
    assert_contains(str(caught.value), *fragments)


def keys_of(folder: Path, runtime: str) -> dict[str, Any]:
    """Return a network of a runtime that returns the integer part of its input."""
    if runtime == "numpy":
        return numpy_keys(folder, "x.astype('uint8')")
    if runtime == "torch":
        return torch_keys(folder, "x.to(torch.int64)")
    return onnx_keys(folder) if runtime == "onnx" else tensorflow_keys(folder)


@pytest.mark.parametrize("combine", ["weighted_avg", "soft", "hard"])
@pytest.mark.parametrize("runtime", ["numpy", "torch", "onnx", "tensorflow"])
def test_integers_of_one_channel_are_refused_without_classes_and_are_votes_with_them(
    tmp_path: Path, runtime: str, combine: str
) -> None:
    keys = keys_of(tmp_path, runtime)
    refused(keys, "labels", "set classes", combine=combine)
    volume = np.floor(VOLUME * 5)
    result = predict(keys, volume, combine=combine, classes=5)
    expected = volume == np.arange(5)[:, None, None] if combine == "weighted_avg" else volume
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "uint16", "int32", "uint64"])
@pytest.mark.parametrize("step", ["network", "protected step", "step"])
def test_every_integer_dtype_is_recognized_wherever_it_comes_from(
    tmp_path: Path, dtype: str, step: str
) -> None:
    keys = numpy_keys(tmp_path, f"x.astype({dtype!r})" if step == "network" else "x")
    if step != "network":
        name = "postprocessing" if step == "step" else "postprocessing_protected"
        code = f"def {name}(y):\n    return y.astype({dtype!r})\n"
        (tmp_path / "steps.py").write_text(code)
        keys["processing_steps"] = str(tmp_path / "steps.py")
    if dtype == "bool":
        labels = predict(keys, np.round(VOLUME), combine="hard")
        np.testing.assert_array_equal(labels, np.round(VOLUME))
    else:
        refused(keys, dtype, combine="soft")


@pytest.mark.parametrize("combine", ["weighted_avg", "soft", "hard"])
@pytest.mark.parametrize("runtime", ["numpy", "torch"])
@pytest.mark.parametrize("is_float", [False, True])
def test_votes_of_labels_equal_votes_of_one_hot_predictions(
    tmp_path: Path, combine: str, runtime: str, is_float: bool
) -> None:
    kind = "'f4'" if is_float else "'i4'"
    keys = numpy_keys(tmp_path, f"({ARGMAX}).astype({kind})")
    if runtime == "torch":
        kind = "float32" if is_float else "int64"
        argmax = ARGMAX.replace("np.", "torch.")
        keys = torch_keys(tmp_path, f"({argmax}).to(torch.{kind})")
    votes = predict(keys, combine=combine, classes=5)
    one_hot = f"(({ARGMAX})[:, None] == np.arange(5)[:, None, None]).astype('f4')"
    keys = numpy_keys(tmp_path, one_hot) | {"model_output_shape": [5, *PATCH]}
    expected = predict(keys, combine="hard" if combine == "soft" else combine)
    np.testing.assert_allclose(votes, expected, atol=1e-6)
    assert len(np.unique(votes)) >= 5


def test_integers_of_several_channels_are_scores(tmp_path: Path) -> None:
    one_hot = f"(({ARGMAX})[:, None] == np.arange(5)[:, None, None])"
    labels = [
        predict(
            numpy_keys(tmp_path, f"{one_hot}.astype({dtype!r})")
            | {"model_output_shape": [5, *PATCH]},
            combine="hard",
        )
        for dtype in ("uint8", "bool", "float32")
    ]
    np.testing.assert_array_equal(labels[0], labels[2])
    np.testing.assert_array_equal(labels[1], labels[2])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_an_activation_of_bool_outputs_is_refused(tmp_path: Path, activation: str) -> None:
    keys = numpy_keys(tmp_path, "np.stack([x > 0.5, x < 0.5], 1)")
    keys |= {"model_output_shape": [2, *PATCH]}
    refused(keys, "bool", "remove activation", activation=activation)


# ------------------------------------------------------------------------- labels as floats


@pytest.mark.parametrize("combine", ["soft", "hard"])
def test_whole_numbers_as_floats_are_not_compared_with_a_half(tmp_path: Path, combine: str) -> None:
    refused(numpy_keys(tmp_path, f"({ARGMAX}).astype('f4')"), "set classes", combine=combine)


def test_a_run_that_averages_labels_as_floats_warns(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", VOLUME, (8, 8))
    values = job_values(numpy_keys(tmp_path, f"({ARGMAX}).astype('f4')"))
    workspace = Workspace(tmp_path, values | {"input": "in.zarr", "output": "out.zarr"})
    workspace.write_job()
    result = workspace.call("run", "job.json").ok()
    assert_contains(result.err, "chunkq: warning: ", "labels", "set classes")


@pytest.mark.parametrize("returned", ["x", "x * 2", "x / 7", "(x > 50).astype('f4')", "-x"])
def test_amounts_are_averaged_without_a_warning(
    tmp_path: Path, returned: str, caplog: pytest.LogCaptureFixture
) -> None:
    volume = np.random.default_rng(1).integers(0, 100, SHAPE).astype(np.uint8)
    predict(numpy_keys(tmp_path, returned), volume, combine="weighted_avg")
    assert caplog.records == []


@pytest.mark.filterwarnings("ignore:.*0.5; if the values are logits")
@pytest.mark.parametrize("returned", ["x", "(x > 0.5).astype('f4')", "x * 20 - 10"])
def test_probabilities_masks_and_logits_are_no_labels(tmp_path: Path, returned: str) -> None:
    assert predict(numpy_keys(tmp_path, returned), combine="hard") is not None


# ----------------------------------------------------------------------------- declared classes


@pytest.mark.parametrize("returned", ["x * 5", "np.floor(x * 5) + 1", "np.floor(x * 5) - 1"])
@pytest.mark.parametrize("nan", ["fail", "zero"])
def test_a_value_that_is_no_label_of_the_classes_is_an_error(
    tmp_path: Path, returned: str, nan: str
) -> None:
    with pytest.raises(PredictionError) as caught:
        predict(numpy_keys(tmp_path, returned), classes=5, combine="hard", nan=nan)
    assert caught.value.code is ErrorCode.OUTPUT_IS_LABELS
    assert_contains(str(caught.value), "labels from 0 to 4", "classes", "voxels [0, 0] to [8, 8]")


def test_run_refuses_labels_beyond_the_classes_before_anything_is_written(tmp_path: Path) -> None:
    write_zarr(tmp_path / "in.zarr", VOLUME, (8, 8))
    values = job_values(numpy_keys(tmp_path, "np.floor(x * 9).astype('u1')"), classes=5)
    workspace = Workspace(tmp_path, values | {"input": "in.zarr", "output": "out.zarr"})
    workspace.write_job()
    result = workspace.call("run", "job.json")
    result.refused(1, ErrorCode.OUTPUT_IS_LABELS, "labels from 0 to 4")
    assert not workspace.output.exists()


def test_a_label_that_is_nan_votes_for_nothing_if_the_job_says_so(tmp_path: Path) -> None:
    returned = "np.where(x > 0.9, np.nan, np.floor(x * 2))"
    result = predict(numpy_keys(tmp_path, returned), classes=2, combine="weighted_avg", nan="zero")
    expected = [(np.floor(VOLUME * 2) == label) & (VOLUME <= 0.9) for label in (0, 1)]
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("job", "shape", "key"),
    [
        ({"classes": 4}, [3, *PATCH], "classes"),
        ({"classes": 4, "activation": "softmax"}, [1, *PATCH], "activation"),
        ({"classes": 4, "activation": "sigmoid"}, PATCH, "activation"),
        ({"classes": 4}, PATCH, None),
        ({"classes": 3, "activation": "softmax"}, [3, *PATCH], None),
    ],
)
def test_classes_must_fit_the_output(
    tmp_path: Path, job: dict[str, Any], shape: Any, key: str | None
) -> None:
    keys = numpy_keys(tmp_path, "x") | {"model_output_shape": shape}
    values = parse_job(job_values(keys, **job))
    problems: tuple[str, ...] = ()
    try:
        resolve(values, Volume(SHAPE, "uint8"))
    except JobError as error:
        problems = error.problems
    assert [line.partition(":")[0] for line in problems] == ([key] if key else [])


@pytest.mark.parametrize("classes", [0, 1, 65537, 2.5, True, "five", ["a"], ["a", "a"]])
def test_classes_are_a_number_of_at_least_two_or_different_names(
    tmp_path: Path, classes: Any
) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(job_values(numpy_keys(tmp_path, "x"), classes=classes))
    [line] = caught.value.problems
    assert line.startswith("classes")


def test_labels_of_many_classes_are_stored_in_two_bytes(tmp_path: Path) -> None:
    keys = torch_keys(tmp_path, "(x * 300).to(torch.int16)")
    labels = predict(keys, combine="hard", classes=300)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, torch.from_numpy(VOLUME * 300).to(torch.int16))
