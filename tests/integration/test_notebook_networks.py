"""Networks and steps that are Python objects: their results, their errors, and their state."""

import functools
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.runtimes.base import load_runtime
from chunkq_worker.runtimes.torch_objects import ObjectModule
from chunkq_worker.steps import Steps

import chunkq
from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.job.job_folder import JobFolder
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline

SHAPE = (13, 9, 15)
SHAPES: dict[str, Any] = {"model_input_shape": [1, 6, 6, 6], "model_output_shape": [3, 6, 6, 6]}
KEYS: dict[str, Any] = {"strides": [3, 4, 3], "chunksize": [6, 6, 6], "threads": 1}
CODE = """
import numpy as np
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 3, 3, padding=1)
        self.norm = torch.nn.BatchNorm3d(3)
        self.drop = torch.nn.Dropout(0.5)
        with torch.no_grad():
            for number, values in enumerate(self.parameters()):
                steps = torch.arange(values.numel(), dtype=torch.float32)
                values.copy_(torch.sin(steps + number).reshape(values.shape) / 10)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x)))


def net(batch):
    return np.concatenate([batch, batch * 2, 50 - batch], axis=1)


def preprocessing(batch):
    return batch / 4


def postprocessing_protected(batch):
    return batch * 3 + 1


def postprocessing(batch):
    return batch[:, ::-1]
"""
NAMES: dict[str, Any] = {}
exec(CODE, NAMES)
Net, net = NAMES["Net"], NAMES["net"]
STEPS = {
    name: NAMES[name] for name in ("preprocessing", "postprocessing_protected", "postprocessing")
}


def predictor_of(model: Any, **keys: Any) -> chunkq.Predictor:
    return chunkq.Predictor.from_model(model, **(SHAPES | KEYS | keys))


def probabilities(model: Any, volume: Any = None, **keys: Any) -> npt.NDArray[Any]:
    with predictor_of(model, **keys) as predictor:
        return found(predictor.predict(random_volume(SHAPE) if volume is None else volume))


def found(prediction: chunkq.Prediction) -> npt.NDArray[Any]:
    assert prediction.probabilities is not None
    return np.asarray(prediction.probabilities)


def job_values(folder: Path, runtime: str, name: str, **model: Any) -> dict[str, Any]:
    """Return the job that has the keys of `predictor_of` and the network as a file."""
    (folder / "net.py").write_text(CODE)
    return {
        "input": str(write_zarr(folder / "in.zarr", random_volume(SHAPE), (8, 8, 8))),
        "output": str(folder / "job.zarr"),
        "inference_type": "sliding_window",
        "weight_function": ["weight_gaussian"],
        **KEYS,
        "model_config": {
            "runtime": runtime,
            "type": "class",
            "class_file": str(folder / "net.py"),
            "class_name": name,
            "max_batch_size": 4,
            **SHAPES,
            **model,
        },
    }


# Results


@pytest.mark.parametrize(
    ("model", "runtime", "name"),
    [(Net, "torch", "Net"), (lambda: net, "numpy", "net")],
    ids=["module", "function"],
)
@pytest.mark.parametrize("with_steps", [False, True])
def test_an_object_gives_the_bytes_of_a_job_with_the_same_keys(
    model: Callable[[], Any], runtime: str, name: str, with_steps: bool, tmp_path: Path
) -> None:
    steps = STEPS if with_steps else {}
    file = {"processing_steps": str(tmp_path / "net.py")} if with_steps else {}
    values = job_values(tmp_path, runtime, name, **file)
    run_inline(values)
    stored = read_output(tmp_path / "job.zarr")
    with predictor_of(model(), **steps) as predictor:
        assert found(predictor.predict(random_volume(SHAPE))).tobytes() == stored.tobytes()
        report = predictor.predict_to_store(values["input"], tmp_path / "object.zarr")
        assert report["missing"] == []
        assert read_output(tmp_path / "object.zarr").tobytes() == stored.tobytes()
    config = {k: v for k, v in values.items() if k not in ("input", "output")}
    config["model_config"].pop("processing_steps", None)
    with chunkq.Predictor.from_config(config, model=model(), **steps) as predictor:
        assert found(predictor.predict(values["input"])).tobytes() == stored.tobytes()


def test_a_network_replaces_that_of_a_job_with_its_runtime(tmp_path: Path) -> None:
    config = job_values(tmp_path, "onnx", "x", type="file", model_file="gone.onnx")
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08")
    for model, runtime in ((Net(), "torch"), (net, "numpy"), (tmp_path / "net.onnx", "onnx")):
        predictor = chunkq.Predictor.from_config(config, model=model)
        assert predictor.job.model.runtime == runtime


def test_steps_that_are_functions_run_with_a_network_file(tmp_path: Path) -> None:
    job = job_values(tmp_path, "numpy", "net")
    file = {"runtime": "numpy", "type": "class", "class_name": "net"}
    expected = probabilities(net, **STEPS)
    result = probabilities(tmp_path / "net.py", job["input"], **file, **STEPS)
    assert result.tobytes() == expected.tobytes()
    with pytest.raises(JobError, match=r"^model_config\.processing_steps: "):
        predictor_of(tmp_path / "net.py", **file, **STEPS, processing_steps="steps.py")


def test_a_function_of_tensors_runs_in_the_torch_runtime() -> None:
    module = Net().eval()
    expected = probabilities(module)
    assert probabilities(module.forward, runtime="torch").tobytes() == expected.tobytes()
    assert probabilities(functools.partial(module), runtime="torch").tobytes() == expected.tobytes()


# The state of the object


def test_a_module_runs_in_evaluation_mode_and_keeps_its_own() -> None:
    expected = probabilities(Net().eval())
    module = Net().train()
    module.norm.eval()  # a frozen part
    modes = {name: part.training for name, part in module.named_modules()}
    running = module.norm.running_mean.clone()
    assert probabilities(module).tobytes() == expected.tobytes()
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert torch.equal(module.norm.running_mean, running)


def test_a_module_can_be_trained_after_and_between_predictions() -> None:
    class Grid(torch.nn.Module):
        """Keeps a tensor that its first call creates."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(3, 1, 1, 1))
            self.grid: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.grid is None:
                self.grid = torch.linspace(0, 1, 6) + 0 * x[:1, :1]
            return x * self.gain * self.grid

    module = Grid()
    with predictor_of(module) as predictor:
        before = found(predictor.predict(random_volume(SHAPE)))
        module(torch.ones(2, 1, 6, 6, 6)).sum().backward()
        with torch.no_grad():
            module.gain.mul_(2)
        np.testing.assert_array_equal(found(predictor.predict(random_volume(SHAPE))), before * 2)
    assert module.gain.grad is not None


@pytest.mark.parametrize("changes", [{"dtype": "float64"}, {"channels_last": True}])
def test_a_predictor_that_needs_other_weights_works_on_a_copy_of_the_present_ones(
    changes: dict[str, Any],
) -> None:
    module = Net().train()
    strides = module.conv.weight.stride()
    with predictor_of(module, **changes) as predictor:
        predictor.predict(random_volume(SHAPE))
        with torch.no_grad():
            module.conv.bias.add_(1)
            module.norm.running_mean.add_(0.5)
        result = found(predictor.predict(random_volume(SHAPE)))
    np.testing.assert_allclose(result, probabilities(module), rtol=0, atol=1e-4)
    assert (module.conv.weight.dtype, module.conv.weight.stride()) == (torch.float32, strides)
    assert module.training


def test_the_dtype_of_a_network_is_that_of_its_weights() -> None:
    predictor = predictor_of(Net().double())
    assert (predictor.job.model.dtype, predictor.job.model.device) == ("float64", "cpu")
    assert predictor_of(net).job.model.dtype == "float32"


def test_a_module_may_change_a_batch_that_was_made_in_inference_mode() -> None:
    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    model = predictor_of(Doubling(), model_output_shape=None).job.model
    runtime = load_runtime(model, Steps(), 1, network=Doubling())
    with torch.inference_mode():  # as batches on a GPU are
        batch = torch.ones((1, 1, 6, 6, 6))
    assert torch.equal(runtime(batch)[0], torch.full((1, 1, 6, 6, 6), 2.0))


def test_a_copy_that_no_longer_fits_its_network_is_an_error() -> None:
    module = Net()
    with predictor_of(module, dtype="float64") as predictor:
        predictor.predict(random_volume(SHAPE))
        module.conv = torch.nn.Conv3d(1, 3, 1)
        with pytest.raises(ModelError, match=r"conv\.weight.*new predictor"):
            predictor.predict(random_volume(SHAPE))


def test_predictors_of_one_process_share_a_network() -> None:
    module = Net()
    with predictor_of(module) as first, predictor_of(module, combine="soft") as second:
        expected = first.predict(random_volume(SHAPE))
        first.close()
        labels = second.predict(random_volume(SHAPE)).labels
    np.testing.assert_array_equal(labels, expected.labels)
    assert module.training


# Random networks and labels


def test_random_and_unset_networks_are_refused() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.5, training=True).repeat(1, 3, 1, 1, 1)

    def noisy(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        noise = np.random.default_rng().random(batch.shape)
        return np.concatenate([batch, batch, noise.astype("f4") * 100], axis=1)

    lazy = torch.nn.LazyConv3d(3, 3, padding=1)
    for model in (Noisy(), noisy, lazy):
        with pytest.raises(ModelError) as caught:
            probabilities(model)
        assert caught.value.code is ErrorCode.MODEL_RANDOM
    assert torch.nn.parameter.is_lazy(lazy.weight)


def test_a_function_that_returns_labels_is_refused() -> None:
    def labels(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return batch.astype("int64") % 3

    with pytest.raises(ModelError) as caught:
        probabilities(labels, model_output_shape=None)
    assert caught.value.code is ErrorCode.OUTPUT_IS_LABELS


# Stores


def test_a_stored_job_of_an_object_continues_only_where_the_object_is(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE), (8, 8, 8))
    output = tmp_path / "out.zarr"

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    module = Net()
    with predictor_of(module) as predictor:
        with pytest.raises(KeyboardInterrupt):
            predictor.predict_to_store(path, output, progress=interrupt)
        with predictor_of(Net()) as other, pytest.raises(JobError) as caught:
            other.predict_to_store(path, output)
        assert caught.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB
        record = JobFolder(f"{output}.chunkq").require_record()
        with pytest.raises(ModelError, match="Python process"):
            batching_engine(record)
        steps: list[int] = []
        predictor.predict_to_store(path, output, progress=lambda done, _: steps.append(done))
        assert steps[0] >= 4
        assert read_output(output).tobytes() == found(predictor.predict(path)).tobytes()
        with torch.no_grad():
            module.conv.bias.add_(1)
        with pytest.raises(JobError, match="content of network") as changed:
            predictor.predict_to_store(path, output)
        assert changed.value.code is ErrorCode.OUTPUT_OF_OTHER_JOB


def batching_engine(record: Any) -> None:
    from chunkq_worker.inference_engine import InferenceEngine

    InferenceEngine(record, record.plan())


# Errors


def broken(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return helper_of_the_user(batch)


def helper_of_the_user(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    raise LookupError("no such layer")


class Broken(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(broken(x.numpy()))


BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "function": (broken, {}, "the network"),
    "module": (Broken(), {}, "the network"),
    "preprocessing": (net, {"preprocessing": broken}, "preprocessing"),
    "protected": (net, {"preprocessing_protected": broken}, "preprocessing_protected"),
    "after": (net, {"postprocessing_protected": broken}, "postprocessing_protected"),
    "postprocessing": (net, {"postprocessing": broken}, "postprocessing"),
}


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_an_error_of_the_users_code_is_shown_with_its_traceback(
    name: str, is_stored: bool, tmp_path: Path
) -> None:
    model, keys, source = BROKEN[name]
    path = write_zarr(tmp_path / "in.zarr", random_volume(SHAPE))
    with predictor_of(model, **keys) as predictor, pytest.raises(ModelError) as caught:
        _ = (
            predictor.predict_to_store(path, tmp_path / "out.zarr")
            if is_stored
            else predictor.predict(path)
        )
    assert f"{source} raised LookupError" in str(caught.value)
    error = caught.value.__cause__
    while isinstance(error, ModelError):  # the record of a job names its output
        error = error.__cause__
    assert isinstance(error, LookupError)
    functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert functions[-2:] == ["broken", "helper_of_the_user"]
    if not is_stored:
        assert functions[0] in ("broken", "forward")
        printed = "".join(traceback.format_exception(caught.value))
        assert printed.count("Traceback (most recent call last)") == 2


def test_an_error_of_a_later_batch_names_the_code_too() -> None:
    def late(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if batch.max() > 99:
            raise ValueError(f"found {batch.max()}")
        return net(batch)

    volume = random_volume(SHAPE) % 90
    volume[12, 8, 14] = 200
    with predictor_of(late) as predictor:
        with pytest.raises(ModelError, match="the network raised ValueError: found 200"):
            predictor.predict(volume)
        assert predictor.predict(volume[:12]).labels.shape == (12, 9, 15)


INVALID_MODELS: dict[str, Callable[[], Any]] = {
    "a class": lambda: Net,
    "a state dict": lambda: Net().state_dict(),
    "a number": lambda: 5,
    "nothing": lambda: None,
    "a list": lambda: [Net()],
}


@pytest.mark.parametrize("name", INVALID_MODELS)
def test_a_model_of_another_type_is_a_type_error_of_one_line(name: str) -> None:
    with pytest.raises(TypeError, match=r"^model: .*torch\.nn\.Module.*Keras") as caught:
        predictor_of(INVALID_MODELS[name]())
    message = str(caught.value)
    assert "\n" not in message
    assert "object at 0x" not in message
    hints = {"a class": "Net()", "a state dict": "load_state_dict"}
    assert hints.get(name, "") in message


INVALID_CALLS: dict[str, Callable[[chunkq.Predictor], Any]] = {
    "a network as a job": lambda _: chunkq.Predictor.from_config(Net()),
    "a network alone": lambda _: chunkq.Predictor(Net()),
    "a shape": lambda _: chunkq.Predictor.from_model(net, model_input_shape=5),  # type: ignore[arg-type]
    "a step": lambda _: predictor_of(net, preprocessing="x.py"),
    "an activation": lambda _: predictor_of(net, activation=np.tanh),
    "progress": lambda p: p.predict(random_volume(SHAPE), progress=3),  # type: ignore[arg-type]
    "no volume": lambda p: p.predict(None),
    "a dict": lambda p: p.predict({"a": 1}),
    "an output": lambda p: p.predict_to_store(random_volume(SHAPE), 5),  # type: ignore[arg-type]
    "a job": lambda _: chunkq.run(Net()),
    "a queued job": lambda _: chunkq.produce([1]),  # type: ignore[arg-type]
    "a path": lambda _: chunkq.status(5),  # type: ignore[arg-type]
    "an input": lambda _: chunkq.run({}, input=random_volume(SHAPE)),  # type: ignore[arg-type]
    "an array": lambda _: chunkq.finalize(random_volume(SHAPE)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", INVALID_CALLS)
def test_an_argument_of_another_type_is_a_type_error_of_one_line(name: str) -> None:
    with predictor_of(net) as predictor, pytest.raises(TypeError) as caught:
        INVALID_CALLS[name](predictor)
    assert isinstance(caught.value, chunkq.JobError)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value) or "use " in str(caught.value)


def test_keys_of_a_file_are_refused_for_an_object() -> None:
    with pytest.raises(JobError) as caught:
        predictor_of(Net(), checkpoint="w.pt", kwargs_file="k.py")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "model_config.kwargs_file",
        "model_config.checkpoint",
    ]
    with pytest.raises(JobError, match=r"^model_config\.runtime: onnx"):
        predictor_of(Net(), runtime="onnx")


# Interruption


def test_a_predictor_can_be_used_after_ctrl_c_and_gives_up_its_chunk() -> None:
    batches: list[int] = []
    is_interrupted = threading.Event()

    def interrupting(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        batches.append(len(batch))
        if len(batches) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert is_interrupted.wait(60)
        return net(batch)

    keys = {"chunksize": None, "max_batch_size": 1}
    with predictor_of(interrupting, **keys) as predictor:
        patches = predictor.plan(SHAPE).costs.patches
        with pytest.raises(KeyboardInterrupt):
            predictor.predict(random_volume(SHAPE))
        is_interrupted.set()
        result = found(predictor.predict(random_volume(SHAPE)))
    # The first batch is repeated, to compare its outputs. No other one of the first call runs.
    assert patches + 1 <= len(batches) <= patches + 2
    assert result.tobytes() == probabilities(net, **keys).tobytes()


# Display


def test_predictors_predictions_and_plans_are_one_line_and_a_table() -> None:
    with predictor_of(Net()) as predictor:
        prediction = predictor.predict(random_volume(SHAPE))
        objects = [predictor, prediction, predictor.plan(SHAPE)]
    for value in objects:
        assert len(repr(value)) < 300
        assert "\n" not in repr(value)
        assert value._repr_html_().startswith("<table>")
    assert "Net" in repr(predictor)
    assert "13 × 9 × 15 uint8" in repr(prediction)


def test_an_object_is_described_without_its_own_representation(tmp_path: Path) -> None:
    script = (
        "import chunkq\n"
        "print([name for name in dir(chunkq) if not name.startswith('_')])\n"
        "names = {}\n"
        "exec('from chunkq import *', names)\n"
        "print(sorted(n for n in names if not n.startswith('__')))\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert completed.stdout.splitlines() == [str(sorted(chunkq.__all__))] * 2


def test_every_package_has_the_mark_of_typed_packages() -> None:
    import chunkq_producer
    import chunkq_worker

    for package in (chunkq, chunkq_producer, chunkq_worker):
        assert package.__file__ is not None
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_a_bar_is_shown_where_somebody_sees_it(capfd: pytest.CaptureFixture[str]) -> None:
    with predictor_of(net) as predictor:
        predictor.predict(random_volume(SHAPE))
        assert capfd.readouterr() == ("", "")
        with mock.patch("chunkq.progress_bar.LINE_INTERVAL_SECONDS", 0.0):
            predictor.predict(random_volume(SHAPE), progress=True)
        total = predictor.plan(SHAPE).costs.chunks
    assert f"computing chunks: {total}/{total}" in capfd.readouterr().err


def test_a_module_on_another_device_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from chunkq_worker.runtimes import torch_objects

    monkeypatch.setattr(torch_objects, "_is_on", lambda tensor, device: False)
    module = Net()
    model = predictor_of(module).job.model
    source = ObjectModule(module, model)
    assert source.module is not module
    assert all(
        a is not b for a, b in zip(module.parameters(), source.module.parameters(), strict=True)
    )
