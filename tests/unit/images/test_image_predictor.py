"""Predictions of images from Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from chunkq import Predictor
from chunkq.errors import (
    ArgumentError,
    ErrorCode,
    JobError,
    ModelError,
    PredictionError,
    PredictionWarning,
)
from chunkq.images.image_error import ImageError
from chunkq.images.poses import Poses

RNG = np.random.default_rng(1)
PHOTOS = RNG.integers(0, 256, (5, 6, 7, 3), np.uint8)
watched: list[list[str]] = []


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for files in watched:
            files.append(str(arguments[0]))


sys.addaudithook(note)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Yield a list that gets the files which this process opens inside a `with` block."""
    files: list[str] = []
    watched.append(files)
    try:
        yield files
    finally:
        watched.remove(files)


def means(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return 10 * batch.mean(axis=(2, 3))


def predictor(network: Any = means, **keys: Any) -> Predictor:
    defaults = {"image": {"scale": 255}, "model_input_shape": [3, 6, 7], "max_batch_size": 2}
    return Predictor.from_model(network, inference_type="image", **defaults | keys)


@pytest.fixture(scope="module")
def colors() -> Iterator[Predictor]:
    with predictor(classes=["red", "green", "blue"]) as one:
        yield one


def test_arrays_have_the_outputs_of_the_network_without_a_file(colors: Predictor) -> None:
    colors.predict(PHOTOS[:1])  # loads the network
    with opened_files() as files:
        outputs = colors.predict(list(PHOTOS))
        values, scores, labels = outputs.numpy(), outputs.scores, outputs.labels
    assert files == []
    expected = 10 * (PHOTOS / 255).mean(axis=(1, 2))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    powers = np.exp(expected)
    np.testing.assert_allclose(scores, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)
    assert labels == [["red", "green", "blue"][n] for n in expected.argmax(axis=1)]
    assert len(outputs) == 5


def test_images_are_arrays_files_and_images_of_pillow_alike(
    colors: Predictor, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(5)]
    for path, photo in zip(paths, PHOTOS, strict=True):
        Image.fromarray(photo).save(path)
    expected = colors.predict(PHOTOS).numpy()
    listed = [paths[0], str(paths[1]), Image.open(paths[2]), PHOTOS[3], Image.fromarray(PHOTOS[4])]
    for images in (listed, tmp_path, f"{tmp_path}/*.png"):
        np.testing.assert_array_equal(colors.predict(images).numpy(), expected)
    np.testing.assert_array_equal(colors.predict(paths[1]).numpy(), expected[1:2])
    np.testing.assert_array_equal(colors.predict(PHOTOS[1]).numpy(), expected[1:2])


def test_a_broken_image_of_a_list_is_an_error_of_its_row(colors: Predictor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [PHOTOS[0], tmp_path / "broken.png", PHOTOS[1]]
    with pytest.warns(PredictionWarning):
        outputs = colors.predict(images)
    assert {n: e.code for n, e in outputs.errors.items()} == {1: ErrorCode.IMAGE_DAMAGED}
    assert np.isnan(outputs.numpy()).all(axis=1).tolist() == [False, True, False]
    assert [label is None for label in outputs.labels] == [False, True, False]
    table = outputs.to_pandas()
    assert table["label"].isna().tolist() == [False, True, False]
    assert table["error"].isna().tolist() == [True, False, True]
    assert table["path"].tolist()[1] == str(tmp_path / "broken.png")
    with pytest.raises(ImageError):
        colors.predict(tmp_path / "broken.png")


def test_without_a_prediction_there_are_no_labels(colors: Predictor) -> None:
    with pytest.warns(PredictionWarning):
        outputs = colors.predict(["/missing/a.png", "/missing/b.mp4"])
    assert outputs.labels == [None, None]
    assert outputs.scores.shape == (2, 0)
    assert "job" in str(outputs.errors[1])
    assert colors.predict([]).labels == []


def test_images_with_different_numbers_of_scores_have_no_table() -> None:
    with predictor(lambda batch: batch.mean(axis=(1, 2))) as one:
        outputs = one.predict([PHOTOS[0], PHOTOS[1][:, :5]])
        with pytest.raises(ModelError, match="5 scores for an image and 7"):
            outputs.to_arrow()


@pytest.mark.parametrize("keys", [{}, {"peaks": {}}])
def test_a_network_that_returns_nothing_is_refused(keys: dict[str, Any]) -> None:
    with (
        predictor(lambda batch: batch[:, :, :0] if keys else batch[:, :0, 0, 0], **keys) as one,
        pytest.raises(ModelError),
    ):
        one.predict(PHOTOS)


def test_keypoints_are_where_the_maps_are_largest() -> None:
    points = np.array([[3, 2], [5, 4]])

    def maps(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        result = np.zeros((len(batch), 2, 6, 7), np.float32)
        for n, (x, y) in enumerate(points):
            result[:, n, y, x] = 1
        return result

    with predictor(maps, peaks={}, image={"resize": [6, 7]}) as one:
        outputs = one.predict(np.zeros((2, 60, 70, 3), np.uint8))
    expected = np.stack([points * 10 + 4.5] * 2)
    np.testing.assert_allclose(outputs.numpy(), expected)
    assert all(isinstance(poses, Poses) for poses in outputs.keypoints)
    with pytest.raises(ArgumentError):
        assert outputs.labels


def test_a_figure_shows_the_image_with_its_label(colors: Predictor, tmp_path: Path) -> None:
    outputs = colors.predict(PHOTOS)
    [axes] = outputs.plot(1, tmp_path / "figure.png").axes
    np.testing.assert_array_equal(axes.images[0].get_array(), PHOTOS[1])
    assert str(outputs.labels[1]) in axes.get_title()
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_outputs_become_tensors(colors: Predictor) -> None:
    outputs = colors.predict(PHOTOS)
    np.testing.assert_array_equal(outputs.to("cpu").numpy(), outputs.numpy())


@pytest.mark.parametrize(
    "images", [3, [object()], np.zeros((6, 7, 5)), np.zeros((2, 6, 7, 3, 1)), [np.zeros(4)], None]
)
def test_what_is_no_image_is_refused(colors: Predictor, images: Any) -> None:
    with pytest.raises(ArgumentError):
        colors.predict(images)


def test_methods_and_arguments_of_volumes_are_refused(colors: Predictor) -> None:
    for call in (
        lambda: colors.plan((6, 7)),
        lambda: colors.predict_streaming(PHOTOS),
        lambda: colors.predict_to_store(PHOTOS, "out.zarr"),
        lambda: colors.predict(PHOTOS, axes="zyx"),
    ):
        with pytest.raises(JobError) as error:
            call()
        assert error.value.code is ErrorCode.JOB_INVALID


# ------------------------------------------------------------------------------ the network


def test_a_network_that_refuses_the_shape_of_an_image_costs_that_image() -> None:
    def picky(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if batch.shape[2] == 9:
            raise ValueError("nine rows, no thanks")
        return means(batch)

    images = [PHOTOS[0], np.zeros((9, 7, 3), np.uint8), PHOTOS[1]]
    with predictor(picky) as one, pytest.warns(PredictionWarning):
        outputs = one.predict(images)
    assert {n: e.code for n, e in outputs.errors.items()} == {1: ErrorCode.IMAGE_UNSUITABLE}


def test_a_network_that_fails_for_zeros_too_is_an_error_of_the_job() -> None:
    def broken(_: npt.NDArray[Any]) -> npt.NDArray[Any]:
        raise ValueError("always")

    with predictor(broken) as one, pytest.raises(ModelError) as error:
        one.predict(PHOTOS)
    assert isinstance(error.value.__cause__, ValueError)


def test_a_device_that_fails_in_the_middle_is_no_error_of_an_image() -> None:
    calls = []

    def failing(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        calls.append(len(batch))
        if len(calls) > 3:
            raise RuntimeError("unspecified launch failure")
        return means(batch)

    with predictor(failing) as one, pytest.raises(ModelError):
        one.predict(PHOTOS)


def test_a_batch_that_does_not_fit_is_computed_in_halves_and_so_are_later_ones() -> None:
    sizes: list[int] = []

    def hungry(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        sizes.append(len(batch))
        if len(batch) > 1:
            raise MemoryError
        return means(batch)

    with predictor(hungry, max_batch_size=4, stochastic=True) as one:
        values = one.predict(PHOTOS).numpy()
    np.testing.assert_allclose(values, 10 * (PHOTOS / 255).mean(axis=(1, 2)), rtol=1e-5)
    assert sizes == [4, 2, 1, 1, 1, 1, 1]


def test_a_random_network_is_refused_unless_the_job_permits_it() -> None:
    def noisy(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return means(batch) + RNG.normal(size=(len(batch), 3))

    with predictor(noisy) as one, pytest.raises(ModelError) as error:
        one.predict(PHOTOS)
    assert error.value.code is ErrorCode.MODEL_RANDOM
    with predictor(noisy, stochastic=True) as one:
        assert len(one.predict(PHOTOS)) == 5


def test_pixels_that_the_dtype_of_the_network_cannot_hold_are_refused() -> None:
    with predictor(dtype="int8", image={}) as one, pytest.raises(PredictionError) as error:
        one.predict(PHOTOS)
    assert error.value.code is ErrorCode.DTYPE_UNSUITABLE
