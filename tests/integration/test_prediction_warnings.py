"""Warnings of a predictor about values and axes that are probably a mistake."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.model_check import run_check

import chunkq
from chunkq import PredictionWarning, Predictor
from chunkq.create import check_job
from chunkq.job.job_reading import load_job
from tests.harness.volumes import random_volume, write_zarr

SHAPE = (24, 20)
X = random_volume(SHAPE, "float32")
KEYS: dict[str, Any] = {"model_input_shape": [1, 8, 8], "chunksize": [8, 8], "threads": 1}


def pair(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([batch, 1 - batch], 1)


CASES: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "logits": (lambda x: 8 * x - 4, {"combine": "soft"}, "activation: sigmoid"),
    "second softmax": (
        pair,
        {"activation": "softmax", "model_output_shape": [2, 8, 8]},
        "softmax makes almost equal",
    ),
    "second sigmoid": (lambda x: x, {"activation": "sigmoid"}, "moves them to 0.5"),
    "constant": (lambda x: 0 * x + 5.5, {}, "almost the same value, 5.5"),
    "labels": (lambda x: np.rint(6 * x), {}, "set classes"),
}


def stored(predictor: Predictor, volume: Any, folder: Path) -> None:
    predictor.predict_to_store(volume, folder / "out.zarr", overwrite=True)


METHODS: dict[str, Callable[[Predictor, Any, Path], Any]] = {
    "predict": lambda predictor, volume, _: predictor.predict(volume),
    "stream": lambda predictor, volume, _: list(predictor.predict_streaming(volume)),
    "store": stored,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_probably_a_mistake_is_one_warning_at_the_line_of_the_caller(
    name: str, method: str, tmp_path: Path
) -> None:
    network, keys, text = CASES[name]
    with (
        warnings.catch_warnings(record=True) as caught,
        Predictor.from_model(network, **KEYS, **keys) as predictor,
    ):
        warnings.simplefilter("always")
        METHODS[method](predictor, X, tmp_path)
        METHODS[method](predictor, X[:16], tmp_path)
    (warning,) = caught
    assert warning.category is PredictionWarning
    assert text in str(warning.message)
    assert warning.filename == __file__


def test_usual_values_give_no_warning_also_if_the_border_is_background(tmp_path: Path) -> None:
    volume = np.zeros((64, 64), np.float32)
    volume[20:44, 20:44] = random_volume((24, 24), "float32")
    for method in METHODS.values():
        with Predictor.from_model(lambda x: x * 1.0, **KEYS) as predictor:
            method(predictor, volume, tmp_path)


def test_another_cause_is_a_warning_of_its_own() -> None:
    with Predictor.from_model(lambda x: x * 1.0, **KEYS, combine="soft") as predictor:
        with pytest.warns(PredictionWarning, match="sigmoid"):
            predictor.predict(X * 9)
        predictor.predict(X * 8)
        with pytest.warns(PredictionWarning, match="almost the same"):
            predictor.predict(X * 1e-6 + 7)


class Normed(torch.nn.Module):
    """A network whose batch norm has seen values around 100."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(1)
        self.train()
        for seed in range(60):
            generator = torch.Generator().manual_seed(seed)
            self(100 + 20 * torch.randn((4, 1, 8, 8), generator=generator))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(x)
        return result


def test_an_input_far_from_the_training_is_a_warning_with_the_layer() -> None:
    with Predictor.from_model(Normed(), **KEYS) as predictor:
        predictor.predict(70 + 60 * X)
        with pytest.warns(PredictionWarning, match="layer norm") as caught:
            predictor.predict(X)
    assert len(caught) == 1


def test_the_warnings_are_those_of_the_check_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def net(batch): return 8 * batch - 4")
    write_zarr(tmp_path / "in.zarr", X)
    model = {"runtime": "numpy", "type": "class", "class_name": "net"}
    model |= {"class_file": f"{tmp_path}/net.py", "model_input_shape": [1, 8, 8]}
    values = {"input": f"{tmp_path}/in.zarr", "output": f"{tmp_path}/out.zarr"}
    values |= {"combine": "soft", "chunksize": [8, 8], "model_config": model}
    check = run_check(check_job(load_job(values)).record)
    with Predictor.from_config(values) as predictor, pytest.warns(PredictionWarning) as caught:
        predictor.predict(X)
    assert [str(one.message) for one in caught] == list(check.values.warnings)


def test_a_first_axis_that_can_be_colour_is_a_warning_until_axes_are_named() -> None:
    volume = random_volume((3, 64, 64), "float32")
    keys = {"model_input_shape": [1, 3, 8, 8], "inference_type": "patch"}
    with Predictor.from_model(lambda x: x * 1.0, **keys) as predictor:
        predictor.predict(volume, axes="zyx")
        with pytest.warns(chunkq.PredictionWarning, match='axes="cyx"'):
            predictor.predict(volume)


@pytest.mark.parametrize("method", METHODS)
def test_if_the_usual_chunk_is_skipped_another_one_is_watched(method: str, tmp_path: Path) -> None:
    volume = np.zeros((64, 64), np.float32)
    volume[:8, :8] = random_volume((8, 8), "float32")
    with (
        Predictor.from_model(lambda x: 9 * x, **KEYS, combine="soft", skip_empty=0) as predictor,
        pytest.warns(PredictionWarning, match="activation: sigmoid") as caught,
    ):
        METHODS[method](predictor, volume, tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_first_chunk_gives_no_warning_if_the_usual_one_runs() -> None:
    volume = random_volume((64, 64), "float32")
    volume[:8, :8] *= 9
    with Predictor.from_model(lambda x: x * 1.0, **KEYS, combine="soft", skip_empty=0) as predictor:
        predictor.predict(volume)
