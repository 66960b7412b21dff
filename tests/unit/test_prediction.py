"""`Prediction`: conversion of its arrays, and the figure that it draws."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from chunkq.blend.prediction import Prediction
from chunkq.errors import ChunkqError
from chunkq.install_hint import install_command

SHAPE = (6, 8, 10)


def blob(shape: tuple[int, ...] = SHAPE, dtype: npt.DTypeLike = "uint8") -> npt.NDArray[Any]:
    """Return label 2 in a box at the low corner, 1 in the box after it along the last axis."""
    labels = np.zeros(shape, dtype)
    low = tuple(slice(1, 3) for _ in shape)
    labels[low] = 2
    labels[(*low[:-1], slice(3, 5))] = 1
    return labels


def prediction_of(shape: tuple[int, ...] = SHAPE, **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "labels": blob(shape),
        "input": np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8),
        "probabilities": np.random.default_rng(1).random((3, *shape), dtype=np.float32),
    }
    return Prediction(**(values | changes))


def arrays(prediction: Prediction) -> list[Any]:
    is_tuple = isinstance(prediction.input, tuple)
    inputs = prediction.input if is_tuple else (prediction.input,)
    arrays = [prediction.labels, *inputs, prediction.probabilities]
    return [array for array in arrays if array is not None]


def test_a_prediction_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        prediction_of().labels = None  # type: ignore[misc]


def test_numpy_returns_numpy_arrays_without_copying() -> None:
    prediction = prediction_of()
    for before, after in zip(arrays(prediction), arrays(prediction.numpy()), strict=True):
        assert before is after


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    # torch supports few operations on uint16 and uint32.
    [("uint8", "uint8"), ("uint16", "int32"), ("uint32", "int64"), (">i2", "int16"), ("f4", "f4")],
)
def test_values_survive_a_round_trip_to_a_device(dtype: str, torch_dtype: str) -> None:
    volume = np.arange(480).reshape(SHAPE).astype(dtype)
    before = prediction_of(labels=blob(dtype="uint16"), input=volume)
    on_cpu = before.to("cpu")
    for array in arrays(on_cpu):
        assert isinstance(array, torch.Tensor)
        assert array.device.type == "cpu"
    assert on_cpu.labels.dtype == torch.int32
    after = on_cpu.numpy()
    assert after.input.dtype == np.dtype(torch_dtype)
    for first, second in zip(arrays(before), arrays(after), strict=True):
        assert isinstance(second, np.ndarray)
        np.testing.assert_array_equal(first, second)
    assert isinstance(on_cpu.to("numpy").labels, np.ndarray)


def test_several_inputs_are_converted_and_missing_probabilities_stay_none() -> None:
    volume = np.zeros(SHAPE, np.int16)
    several = prediction_of(input=(volume, volume + 1), probabilities=None).to("cpu")
    assert isinstance(several.input, tuple)
    assert [int(array.max()) for array in several.input] == [0, 1]
    assert several.probabilities is None


def test_views_that_torch_does_not_support_are_copied() -> None:
    flipped = np.arange(480, dtype=np.uint8).reshape(SHAPE)[::-1]
    read_only = np.broadcast_to(np.uint8(3), SHAPE)
    tensors = prediction_of(input=flipped, labels=read_only).to("cpu")
    np.testing.assert_array_equal(tensors.numpy().input, flipped)
    assert int(tensors.labels.sum()) == 3 * 480


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta:x"])
def test_a_missing_device_is_an_error_of_one_line(device: str) -> None:
    with pytest.raises(ChunkqError, match=rf"^Prediction\.to: .*'{device}'") as error:
        prediction_of().to(device)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_an_error_with_the_extra_to_install(tmp_path: Path) -> None:
    with (
        mock.patch.dict(sys.modules, {"torch": None}),
        pytest.raises(ChunkqError, match=re.escape(install_command("torch"))),
    ):
        prediction_of().to("cpu")
    with (
        mock.patch.dict(sys.modules, {"matplotlib": None, "chunkq.blend.plot": None}),
        pytest.raises(ChunkqError, match=re.escape(install_command("plot"))) as error,
    ):
        prediction_of().plot(tmp_path / "never.png")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def panels(figure: Any) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Return the input image and the label image of each panel."""
    images = []
    for axes in figure.axes:
        gray, colored = axes.images
        images.append((np.asarray(gray.get_array()), np.asarray(colored.get_array())))
    return images


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_3d_volume_is_drawn_as_three_planes_through_the_median_labeled_voxel() -> None:
    prediction = prediction_of()
    figure = prediction.plot()
    assert [axes.get_title() for axes in figure.axes] == ["[1, :, :]", "[:, 1, :]", "[:, :, 2]"]
    volume, labels = prediction.input, prediction.labels
    for axis, at, (gray, colored) in zip(range(3), (1, 1, 2), panels(figure), strict=True):
        np.testing.assert_array_equal(gray, np.take(volume, at, axis))
        np.testing.assert_array_equal(colored[..., 3] > 0, np.take(labels, at, axis) > 0)
    # Each label has one color, different from that of other labels.
    for (_, colored), plane in zip(panels(figure), (labels[1], labels[:, 1]), strict=False):
        colors = {label: {*map(tuple, colored[plane == label])} for label in (1, 2)}
        assert [len(colors[1]), len(colors[2])] == [1, 1]
        assert colors[1] != colors[2]
    assert legend(figure) == ["label 1", "label 2"]


def test_the_planes_go_through_the_voxel_at() -> None:
    figure = prediction_of().plot(at=(5, 7, 9))
    assert [axes.get_title() for axes in figure.axes] == ["[5, :, :]", "[:, 7, :]", "[:, :, 9]"]
    for _, colored in panels(figure):
        assert not colored[..., 3].any()
    for outside in [(6, 0, 0), (0, 0), (-1, 0, 0)]:
        position = re.escape(str(list(outside)))
        with pytest.raises(ValueError, match=rf"^at: {position} .*\[6, 8, 10\]"):
            prediction_of().plot(at=outside)


def test_a_volume_without_labels_is_drawn_at_its_center_without_a_legend() -> None:
    figure = prediction_of(labels=np.zeros(SHAPE, np.uint8)).plot()
    assert [axes.get_title() for axes in figure.axes] == ["[3, :, :]", "[:, 4, :]", "[:, :, 5]"]
    assert figure.legends == []


def test_a_2d_volume_is_drawn_as_one_plane() -> None:
    [(gray, _)] = panels(prediction_of((8, 10)).plot())
    np.testing.assert_array_equal(gray, prediction_of((8, 10)).input)


def test_a_4d_volume_is_drawn_at_one_index_of_its_first_axis() -> None:
    prediction = prediction_of((4, *SHAPE))
    figure = prediction.plot(at=(3, 1, 1, 1))
    assert [axes.get_title() for axes in figure.axes] == [
        "[3, 1, :, :]",
        "[3, :, 1, :]",
        "[3, :, :, 1]",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["axis 3", "axis 3", "axis 2"]
    np.testing.assert_array_equal(panels(figure)[0][0], prediction.input[3, 1])


def test_a_1d_volume_is_drawn_as_a_line_over_the_intervals_of_each_label() -> None:
    labels = np.array([0, 0, 1, 1, 1, 0, 2, 2], np.uint8)
    figure = prediction_of(labels=labels, input=np.arange(8.0), probabilities=None).plot()
    [axes] = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.arange(8.0))
    intervals = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert intervals == [(1.5, 4.5), (5.5, 7.5)]
    assert legend(figure) == ["label 1", "label 2"]


def test_the_figure_is_saved_to_the_path_in_the_format_of_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    prediction_of(input=np.full(SHAPE, np.nan)).to("cpu").plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    prediction_of(labels=blob().astype(np.int64) * 1000).plot(tmp_path / "picture.pdf")
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")
