"""The network of a `Predictor`: its configuration, its file, how often it is loaded."""

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from chunkq_worker import inference_engine
from chunkq_worker.model_defaults import job_for_model

import chunkq
from chunkq.errors import ChunkqError, ErrorCode, JobError, ModelError, PredictionError
from chunkq.job.job_file import Job
from tests.harness.predictor_job import POISONED, SHAPE, SLIDING, Conv, keys, save_script
from tests.harness.volumes import random_volume, read_output
from tests.harness.workspace import Workspace


@contextlib.contextmanager
def counting_loads() -> Iterator[mock.Mock]:
    """Yield a mock that counts how often a network is loaded."""
    with mock.patch.object(
        inference_engine, "load_runtime", wraps=inference_engine.load_runtime
    ) as load_runtime:
        yield load_runtime


def test_the_network_is_loaded_once_for_volumes_of_any_shape_and_dtype(tmp_path: Path) -> None:
    values = keys(tmp_path)
    volumes = [
        random_volume((n, 9, 8), t) for n, t in [(9, "u1"), (12, "f4"), (8, "i2"), (9, "u1")]
    ]
    with counting_loads() as load_runtime, chunkq.Predictor.from_config(values) as predictor:
        results = [predictor.predict(volume).probabilities for volume in volumes]
        predictor.predict_to_store(volumes[1], tmp_path / "one.zarr")
        assert load_runtime.call_count == 1
    for number, volume in enumerate(volumes):
        with chunkq.Predictor.from_config(values) as other:
            np.testing.assert_array_equal(other.predict(volume).probabilities, results[number])
    np.testing.assert_array_equal(read_output(tmp_path / "one.zarr"), results[1])


def test_threads_and_predictors_can_share_a_device(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = chunkq.Predictor.from_config(keys(tmp_path))
    second = chunkq.Predictor.from_config(
        keys(tmp_path / "other", combine="soft", model={"max_batch_size": 3})
    )
    volumes = [random_volume((8 + n, 9, 10)) for n in range(4)]
    tasks = [(predictor, volume) for volume in volumes for predictor in (first, second)]
    with first, second:
        expected = [predictor.predict(volume).labels for predictor, volume in tasks]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda task: task[0].predict(task[1]).labels, tasks))
    for labels, expected_labels in zip(results, expected, strict=True):
        np.testing.assert_array_equal(labels, expected_labels)


def test_a_closed_predictor_raises_an_error_and_can_be_closed_again(tmp_path: Path) -> None:
    with chunkq.Predictor.from_config(keys(tmp_path)) as predictor:
        stream = predictor.predict_streaming(random_volume((30, 9, 9)))
        next(stream)
    predictor.close()
    with pytest.raises(ChunkqError, match="predictor is closed"):
        list(stream)
    with pytest.raises(ChunkqError, match="predictor is closed"):
        predictor.predict(random_volume(SHAPE))
    unused = chunkq.Predictor.from_config(keys(tmp_path))
    unused.close()


def test_invalid_output_of_the_network_raises_the_same_errors_as_in_a_job(tmp_path: Path) -> None:
    volume = random_volume(SHAPE)
    volume[16, 13, 18] = 255
    with chunkq.Predictor.from_config(keys(tmp_path, POISONED)) as predictor:
        with pytest.raises(PredictionError, match=r"NaN .* voxels \[11, 8, 13\] to \[17, 14, 19\]"):
            predictor.predict(volume)
        # The predictor is still usable.
        assert predictor.predict(volume[:16]).labels.shape == (16, 14, 19)
    wrong_shape = {"model_output_shape": [4, 6, 6, 6]}
    predictor = chunkq.Predictor.from_config(keys(tmp_path, model=wrong_shape))
    with pytest.raises(ModelError, match=r"\[4, 3, 6, 6, 6\]") as error:
        predictor.predict(volume)
    assert error.value.code is ErrorCode.MODEL_UNUSABLE


def test_a_job_file_configures_a_predictor_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    model = keys(tmp_path)["model_config"]
    for key in ("class_file", "kwargs_file"):
        model[key] = Path(model[key]).name
    job = Workspace(tmp_path, {**SLIDING, "input": 5, "model_config": model}).write_job()
    with chunkq.Predictor.from_config(job) as predictor:
        assert predictor.predict(random_volume(SHAPE)).probabilities is not None
        assert predictor.job.combine == "weighted_avg"
        assert predictor.plan((100, 100, 100)).costs.patches == 33 * 25 * 33


def test_all_mistakes_in_a_config_are_reported_together(tmp_path: Path) -> None:
    values = keys(tmp_path, stride=[3], combine="sotf", model={"ts_fil": "x"})
    with pytest.raises(JobError) as caught:
        chunkq.Predictor.from_config(values)
    problems = problems_by_key(caught.value)
    assert problems.keys() == {"stride", "combine", "model_config.ts_fil"}
    assert "did you mean 'strides'?" in problems["stride"]
    assert "'sotf'" in problems["combine"]
    assert "did you mean 'soft'?" in problems["combine"]
    assert "did you mean 'ts_file'?" in problems["model_config.ts_fil"]
    with pytest.raises(JobError, match=r"^model_config\.class_file: .*gone\.py"):
        chunkq.Predictor.from_config(keys(tmp_path, model={"class_file": "gone.py"}))


def problems_by_key(error: JobError) -> dict[str, str]:
    """Return key path -> message. Each key may have one problem only."""
    problems = dict(problem.split(": ", 1) for problem in error.problems)
    assert len(problems) == len(error.problems), error.problems
    return problems


def test_a_predictor_needs_only_a_model_file_and_its_shapes(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")
    shapes: dict[str, Any] = {
        "model_input_shape": (1, 6, 1, 7),
        "model_output_shape": (3, 6, 1, 7),
    }
    volume = random_volume((13, 5, 16))
    with chunkq.Predictor.from_model(script, **shapes, threads=1) as predictor:
        prediction = predictor.predict(volume)
        assert predictor.plan(volume.shape).grid.strides == (3, 1, 3)
    assert (predictor.job.model.runtime, predictor.job.model.type) == ("torch", "torchscript")
    explicit = {
        "inference_type": "sliding_window",
        "strides": [3, 1, 3],
        "weight_function": ["weight_gaussian"],
        "combine": "weighted_avg",
        "threads": 1,
        "model_config": {"runtime": "torch", "type": "torchscript", "ts_file": str(script)}
        | {key: list(shape) for key, shape in shapes.items()}
        | {"max_batch_size": 4},
    }
    with chunkq.Predictor.from_config(explicit) as predictor:
        expected = predictor.predict(volume)
    np.testing.assert_array_equal(prediction.probabilities, expected.probabilities)


def test_keywords_are_job_keys_and_override_defaults(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")

    def job(**keywords: Any) -> Job:
        return chunkq.Predictor.from_model(script, model_input_shape=[1, 8, 8], **keywords).job

    sliding = job(strides=(2, 5), weight_function="weight_hann", combine="soft", max_batch_size=9)
    assert sliding.strides == (2, 5)
    assert sliding.weight_function == ("weight_hann",)
    assert (sliding.combine, sliding.model.max_batch_size) == ("soft", 9)
    cropped = job(inference_type="crop_margin", margin=[1, 1], device="cuda", dtype="float16")
    assert (cropped.strides, cropped.weight_function) == (None, ("weight_uniform",))
    assert (cropped.model.device, cropped.model.dtype) == ("cuda", "float16")
    with pytest.raises(JobError) as caught:
        job(stride=[2], max_batchsize=3, xyz=1)
    problems = problems_by_key(caught.value)
    assert problems.keys() == {"stride", "model_config.max_batchsize", "xyz"}
    assert "did you mean 'strides'?" in problems["stride"]
    assert "did you mean 'max_batch_size'?" in problems["model_config.max_batchsize"]
    assert "`chunkq explain`" in problems["xyz"]
    with pytest.raises(JobError, match=r"^model_config: "):
        job(model_config={"device": "cuda"})


def test_default_strides_are_half_the_patch_along_the_axes_of_the_volume(tmp_path: Path) -> None:
    script = save_script(tmp_path / "model.pt")

    def strides(shape: tuple[int, ...], **more: Any) -> tuple[int, ...]:
        predictor = chunkq.Predictor.from_model(script, **more)
        return predictor.plan(shape).grid.strides

    # [1, 8, 8] is a slice of a volume or an image with a channel axis, depending on the volume.
    assert strides((9, 20, 20), model_input_shape=[1, 8, 8]) == (1, 4, 4)
    assert strides((20, 20), model_input_shape=[1, 8, 8]) == (4, 4)
    smaller = {"model_output_shape": [2, 6, 4], "pad_width": [1, 2]}
    assert strides((20, 20), model_input_shape=[8, 8], **smaller) == (3, 2)
    assert strides((20, 9, 9), model_input_shape=[5, 8, 8], lost_dim=0) == (1, 4, 4)
    with pytest.raises(JobError) as caught:
        strides((20, 20, 20), model_input_shape=[8, 8])
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith("model_config.model_input_shape: ")


def zipped(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "")

    return write


def saved_model(path: Path) -> None:
    path.mkdir()
    (path / "saved_model.pb").touch()


def with_content(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def save_exported(path: Path) -> None:
    torch.export.save(torch.export.export(Conv(), (torch.zeros(1, 1, 4, 4, 4),)), path)


MODEL_FILES: dict[str, tuple[str, Callable[[Path], Any], tuple[str, str, str]]] = {
    "scripted": ("m.pt", save_script, ("torch", "torchscript", "ts_file")),
    "scripted, .pth": ("m.pth", save_script, ("torch", "torchscript", "ts_file")),
    "scripted, no suffix": ("m", save_script, ("torch", "torchscript", "ts_file")),
    "exported": ("m.pt2", save_exported, ("torch", "exported", "model_file")),
    "exported, named .pt": ("m.pt", save_exported, ("torch", "exported", "model_file")),
    "exported by an old torch": (
        "m.pt2",
        zipped("version", "serialized_exported_program.json"),
        ("torch", "exported", "model_file"),
    ),
    "onnx": ("m.onnx", with_content(b"\x08\x08"), ("onnx", "file", "model_file")),
    "keras": (
        "m.keras",
        zipped("metadata.json", "config.json", "model.weights.h5"),
        ("tensorflow", "file", "model_file"),
    ),
    "hdf5": ("m.h5", with_content(b"\x89HDF\r\n\x1a\n..."), ("tensorflow", "file", "model_file")),
    "saved model": ("m", saved_model, ("tensorflow", "file", "model_file")),
    "json": (
        "m",
        with_content(b'{"class_name": 1, "config": 2}'),
        ("tensorflow", "json", "json_file"),
    ),
    "a class": ("m.py", with_content(b""), ("torch", "class", "class_file")),
}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_the_type_of_a_model_file_is_detected_from_its_content(name: str, tmp_path: Path) -> None:
    file, write, expected = MODEL_FILES[name]
    runtime, model_type, key = expected
    write(tmp_path / file)
    model = job_for_model(str(tmp_path / file), {})["model_config"]
    assert (model["runtime"], model["type"]) == (runtime, model_type)
    assert model[key] == str(tmp_path / file)


def save_state_dict(path: Path) -> None:
    torch.save(Conv().state_dict(), path)


INVALID_MODEL_FILES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "missing": ("gone.pt", lambda path: None, ["gone.pt"]),
    "a state dict": ("m.pt", save_state_dict, ["m.pt", "class_name=", "checkpoint="]),
    "a text": ("m.pt", with_content(b"hello"), ["m.pt", "runtime=", "type="]),
    "another zip": ("m.pt", zipped("a.txt"), ["m.pt", "runtime=", "type="]),
    "a folder": ("m", Path.mkdir, ["saved_model.pb"]),
    "another suffix": ("m.bin", with_content(b"hello"), ["m.bin", "runtime=", "type="]),
}


@pytest.mark.parametrize("name", INVALID_MODEL_FILES)
def test_an_invalid_model_file_is_an_error_of_one_line(name: str, tmp_path: Path) -> None:
    file, write, fragments = INVALID_MODEL_FILES[name]
    write(tmp_path / file)
    with pytest.raises((JobError, ModelError), match=r"^model: ") as caught:
        chunkq.Predictor.from_model(tmp_path / file, model_input_shape=[8, 8])
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in fragments if part not in message] == [], message


def test_runtime_and_type_keywords_override_the_detection(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "m.pt")
    path = str(tmp_path / "m.pt")
    for keywords, expected in [
        ({"type": "file", "trusted": True}, ("torch", "file")),
        ({"type": "torchscript"}, ("torch", "torchscript")),
        ({"runtime": "tensorflow", "type": "class"}, ("tensorflow", "class")),
        ({"runtime": "onnx", "type": "file"}, ("onnx", "file")),
    ]:
        model = job_for_model(path, keywords)["model_config"]
        assert (model["runtime"], model["type"]) == expected
    with pytest.raises(JobError, match=r"^model_config\.type: .*torchscript.*tensorflow"):
        chunkq.Predictor.from_model(
            save_script(tmp_path / "s.pt"), model_input_shape=[8], runtime="tensorflow"
        )
    with fsspec.open("memory://models/m", "wb") as file:
        file.write((tmp_path / "s.pt").read_bytes())
    assert job_for_model("memory://models/m", {})["model_config"]["ts_file"] == "memory://models/m"
