"""Keras models and TensorFlow functions that are Python objects."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from chunkq_worker.runtimes.tensorflow_import import keras, tf

import chunkq
from chunkq.errors import ErrorCode, ModelError
from tests.harness.volumes import random_volume, read_output, write_zarr
from tests.harness.workspace import run_inline

SHAPE = (13, 9)
SHAPES: dict[str, Any] = {"model_input_shape": [1, 6, 6], "model_output_shape": [1, 6, 6]}
KEYS: dict[str, Any] = {"strides": [3, 4], "chunksize": [6, 6]}


def trained() -> Any:
    """Return a model on channels first, without a convolution, which a CPU does not have."""
    inputs = keras.Input((1, 6, 6))
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(6)(inputs))
    model = keras.Model(inputs, keras.layers.BatchNormalization(axis=1)(hidden), name="trained")
    for number, weight in enumerate(model.weights):
        steps = np.arange(np.prod(weight.shape)).reshape(weight.shape)
        weight.assign(1 + np.sin(steps + number) / 3)
    return model


def probabilities(model: Any, **keys: Any) -> npt.NDArray[Any]:
    with chunkq.Predictor.from_model(model, **(SHAPES | KEYS | keys)) as predictor:
        result = predictor.predict(random_volume(SHAPE)).probabilities
    assert result is not None
    return np.asarray(result)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras saves
def test_a_keras_model_gives_the_bytes_of_a_job_with_its_file(tmp_path: Path) -> None:
    model = trained()
    model.save(tmp_path / "m.keras")
    path = str(write_zarr(tmp_path / "in.zarr", random_volume(SHAPE)))
    run_inline(
        {
            "input": path,
            "output": str(tmp_path / "job.zarr"),
            "inference_type": "sliding_window",
            "weight_function": ["weight_gaussian"],
            **KEYS,
            "model_config": {
                "runtime": "tensorflow",
                "type": "file",
                "model_file": str(tmp_path / "m.keras"),
                "max_batch_size": 4,
                **SHAPES,
            },
        }
    )
    stored = read_output(tmp_path / "job.zarr")
    with chunkq.Predictor.from_model(model, **SHAPES, **KEYS) as predictor:
        result = predictor.predict(path).probabilities
        assert result is not None
        assert result.tobytes() == stored.tobytes()
        predictor.predict_to_store(path, tmp_path / "out.zarr")
        assert read_output(tmp_path / "out.zarr").tobytes() == stored.tobytes()
        model.weights[1].assign_add(np.full(6, 2.0))  # the weights are used as they are
        changed = predictor.predict(path).probabilities
    assert changed is not None
    assert changed.tobytes() == probabilities(model).tobytes()
    assert not np.array_equal(changed, stored)


def test_functions_and_modules_of_tensorflow_run() -> None:
    model = trained()

    class Twice(tf.Module):  # type: ignore[misc]
        def __call__(self, batch: Any) -> Any:
            return model(batch, training=False)

    expected = probabilities(model)
    function = tf.function(lambda batch: model(batch, training=False))
    for network, keys in (
        (Twice(), {}),
        (function, {}),
        (lambda batch: model(batch, training=False), {"runtime": "tensorflow"}),
    ):
        np.testing.assert_allclose(probabilities(network, **keys), expected, rtol=1e-6)


def test_a_model_without_weights_is_refused_and_stays_without() -> None:
    model = keras.Sequential([keras.layers.Dense(6)])
    with pytest.raises(ModelError, match="random") as caught:
        probabilities(model)
    assert caught.value.code is ErrorCode.MODEL_RANDOM
    assert not model.built
