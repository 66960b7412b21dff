"""The container of a result: its arrays' kinds, and the picture it draws."""

import dataclasses
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from chunkq.errors import ChunkqError
from chunkq.prediction import Prediction

SHAPE = (6, 8, 10)


def blob(shape: tuple[int, ...] = SHAPE, dtype: npt.DTypeLike = "uint8") -> npt.NDArray[Any]:
    """Labels 2 in a box at the low corner, 1 in one beside it along the last axis, else 0."""
    labels = np.zeros(shape, dtype)
    low = tuple(slice(1, 3) for _ in shape)
    labels[low] = 2
    labels[(*low[:-1], slice(3, 5))] = 1
    return labels


def made(shape: tuple[int, ...] = SHAPE, **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "labels": blob(shape),
        "input": np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8),
        "probabilities": np.random.default_rng(1).random((3, *shape), dtype=np.float32),
    }
    return Prediction(**(values | changes))


def arrays(prediction: Prediction) -> list[Any]:
    given = prediction.input
    inputs = given if isinstance(given, tuple) else (given,)
    found = [prediction.labels, *inputs, prediction.probabilities]
    return [array for array in found if array is not None]


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().labels = None  # type: ignore[misc]


def test_numpy_arrays_stay_the_same_objects() -> None:
    here = made()
    for before, after in zip(arrays(here), arrays(here.numpy()), strict=True):
        assert before is after


@pytest.mark.parametrize(
    ("dtype", "there"),
    # torch computes with few wide unsigned integers; the values stay.
    [("uint8", "uint8"), ("uint16", "int32"), ("uint32", "int64"), (">i2", "int16"), ("f4", "f4")],
)
def test_on_a_device_and_back_the_values_are_the_same(dtype: str, there: str) -> None:
    before = made(labels=blob(dtype="uint16"), input=np.arange(480).reshape(SHAPE).astype(dtype))
    on_cpu = before.to("cpu")
    for array in arrays(on_cpu):
        assert isinstance(array, torch.Tensor)
        assert array.device.type == "cpu"
    assert on_cpu.labels.dtype == torch.int32
    after = on_cpu.numpy()
    assert after.input.dtype == np.dtype(there)
    for one, other in zip(arrays(before), arrays(after), strict=True):
        assert isinstance(other, np.ndarray)
        np.testing.assert_array_equal(one, other)
    assert isinstance(on_cpu.to("numpy").labels, np.ndarray)


def test_several_inputs_and_no_probabilities_go_along() -> None:
    volume = np.zeros(SHAPE, np.int16)
    several = made(input=(volume, volume + 1), probabilities=None).to("cpu")
    assert isinstance(several.input, tuple)
    assert [int(array.max()) for array in several.input] == [0, 1]
    assert several.probabilities is None


def test_views_that_torch_refuses_are_copied() -> None:
    flipped = np.arange(480, dtype=np.uint8).reshape(SHAPE)[::-1]
    frozen = np.broadcast_to(np.uint8(3), SHAPE)
    there = made(input=flipped, labels=frozen).to("cpu")
    np.testing.assert_array_equal(there.numpy().input, flipped)
    assert int(there.labels.sum()) == 3 * 480


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta:x"])
def test_a_device_that_is_not_there_is_named_in_one_line(device: str) -> None:
    with pytest.raises(ChunkqError, match=device) as caught:
        made().to(device)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path: Path) -> None:
    with (
        mock.patch.dict(sys.modules, {"torch": None}),
        pytest.raises(ChunkqError, match=r"pip install 'chunkq\[torch\]'"),
    ):
        made().to("cpu")
    with (
        mock.patch.dict(sys.modules, {"matplotlib": None, "chunkq.plot": None}),
        pytest.raises(ChunkqError, match=r"pip install 'chunkq\[plot\]'") as caught,
    ):
        made().plot(tmp_path / "never.png")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def panels(figure: Any) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """The grey plane and the colored one on top of each panel."""
    found = []
    for axes in figure.axes:
        grey, colored = axes.images
        found.append((np.asarray(grey.get_array()), np.asarray(colored.get_array())))
    return found


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_volume_shows_in_the_three_planes_through_what_is_labeled() -> None:
    prediction = made()
    figure = prediction.plot()
    assert [axes.get_title() for axes in figure.axes] == ["[1, :, :]", "[:, 1, :]", "[:, :, 2]"]
    volume, labels = prediction.input, prediction.labels
    for axis, at, (grey, colored) in zip(range(3), (1, 1, 2), panels(figure), strict=True):
        np.testing.assert_array_equal(grey, np.take(volume, at, axis))
        np.testing.assert_array_equal(colored[..., 3] > 0, np.take(labels, at, axis) > 0)
    # As many colors as labels, each label with its own.
    for (_, colored), plane in zip(panels(figure), (labels[1], labels[:, 1]), strict=False):
        colors = {label: {*map(tuple, colored[plane == label])} for label in (1, 2)}
        assert all(len(found) == 1 for found in colors.values())
        assert colors[1] != colors[2]
    assert legend(figure) == ["label 1", "label 2"]


def test_the_planes_go_through_the_voxel_that_is_asked_for() -> None:
    figure = made().plot(at=(5, 7, 9))
    assert [axes.get_title() for axes in figure.axes] == ["[5, :, :]", "[:, 7, :]", "[:, :, 9]"]
    for _, colored in panels(figure):
        assert not colored[..., 3].any()
    for wrong in [(6, 0, 0), (0, 0), (-1, 0, 0)]:
        with pytest.raises(ValueError, match="is no voxel of a volume of shape"):
            made().plot(at=wrong)


def test_nothing_labeled_shows_the_middle_without_a_legend() -> None:
    figure = made(labels=np.zeros(SHAPE, np.uint8)).plot()
    assert [axes.get_title() for axes in figure.axes] == ["[3, :, :]", "[:, 4, :]", "[:, :, 5]"]
    assert figure.legends == []


def test_an_image_shows_whole_and_of_four_axes_the_first_is_cut() -> None:
    [(grey, _)] = panels(made((8, 10)).plot())
    np.testing.assert_array_equal(grey, made((8, 10)).input)
    prediction = made((4, *SHAPE))
    figure = prediction.plot(at=(3, 1, 1, 1))
    assert [axes.get_title() for axes in figure.axes] == [
        "[3, 1, :, :]",
        "[3, :, 1, :]",
        "[3, :, :, 1]",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["axis 3", "axis 3", "axis 2"]
    np.testing.assert_array_equal(panels(figure)[0][0], prediction.input[3, 1])


def test_a_line_shows_the_stretches_of_each_label() -> None:
    labels = np.array([0, 0, 1, 1, 1, 0, 2, 2], np.uint8)
    figure = made(labels=labels, input=np.arange(8.0), probabilities=None).plot()
    [axes] = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.arange(8.0))
    stretches = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert stretches == [(1.5, 4.5), (5.5, 7.5)]
    assert legend(figure) == ["label 1", "label 2"]


def test_the_figure_is_saved_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    made(input=np.full(SHAPE, np.nan)).to("cpu").plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    made(labels=blob().astype(np.int64) * 1000).plot(tmp_path / "picture.pdf")
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")
