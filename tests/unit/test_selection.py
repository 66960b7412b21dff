"""What a job reads of a stored array: meaning of its axes, channels, time points and order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, JobError
from chunkq.geometry.axes import Axis, lettered_axes, named_axes, picked, plain_axes
from chunkq.geometry.box import Box
from chunkq.storage.array import Array
from chunkq.storage.formats.base import ArrayInfo
from chunkq.storage.images import ImageSource, source_of
from chunkq.storage.remedies import PYTHON
from chunkq.storage.selection import Selection

LABELS = ("DAPI", "GFP", "GFP")
SIZES = {"t": 3, "c": 4, "z": 5, "y": 6, "x": 7}


class Stored(Array):
    """An array in memory that counts the voxels read."""

    def __init__(self, values: Any) -> None:
        self.path, self.values, self.voxels = "memory", values, 0
        self.shape, self.dtype = values.shape, values.dtype

    def read(self, box: Box) -> Any:
        self.voxels += box.size
        return self.values[box.slices((0,) * len(self.shape))]


def source(names: str, labels: tuple[str, ...] = (), **selection: Any) -> ImageSource:
    """Return the source of an array whose axes have names of one letter."""
    axes = named_axes(names, [SIZES[name] for name in names])
    info = ArrayInfo("/in.zarr", axes, "uint16", {}, "dimension_names", labels)
    return source_of(info, Selection(**selection), "/in.zarr")


def unnamed(shape: tuple[int, ...], **selection: Any) -> ImageSource:
    return source_of(
        ArrayInfo("/in.npy", plain_axes(shape), "uint8"), Selection(**selection), "/in.npy"
    )


def refusal(*args: Any, **more: Any) -> JobError:
    with pytest.raises(JobError) as raised:
        source(*args, **more)
    return raised.value


def values_of(names: str) -> Any:
    shape = [SIZES[name] for name in names]
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


@st.composite
def selections(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Return names of axes in any order, with at least one spatial axis, and a selection."""
    names = "".join(draw(st.permutations("tczyx"))[: draw(st.integers(2, 5))])
    spatial = [name for name in names if name in "zyx"]
    if not spatial:
        return draw(selections())
    keys = {}
    for name, key in (("t", "time"), ("c", "channels")):
        if name in names:
            every = st.permutations(range(SIZES[name]))
            keys[key] = tuple(draw(every)[: draw(st.integers(1, SIZES[name]))])
    if draw(st.booleans()):
        keys["order"] = "".join(draw(st.permutations(spatial)))
    return names, keys


@given(selections(), st.data())
def test_a_view_equals_numpys_indexing_and_transposition(
    case: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    names, keys = case
    stored = Stored(values_of(names))
    selected = source(names, **keys)
    order = keys.get("order") or "".join(name for name in names if name in "zyx")
    letters = [*names]
    for time, point in enumerate(keys.get("time", (0,))):
        expected, axes = stored.values, letters
        if "t" in names:
            expected = np.take(expected, point, names.index("t"))
            axes = [name for name in letters if name != "t"]
        if "c" in names:
            expected = np.take(expected, keys["channels"], axes.index("c"))
        target = [name for name in "c" if name in axes] + [*order]
        expected = expected.transpose([axes.index(name) for name in target])
        if "c" in axes and len(keys["channels"]) == 1:
            expected = expected[0]
        view = selected.present(stored, time)
        assert view.shape == expected.shape
        ranges = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in view.shape]
        ranges = [[low, max(low + 1, high)] if low < n else [n - 1, n]
                  for (low, high), n in zip(ranges, view.shape, strict=True)]  # fmt: skip
        box = Box(tuple(r[0] for r in ranges), tuple(r[1] for r in ranges))
        np.testing.assert_array_equal(view.read(box), expected[box.slices((0,) * len(box.start))])


def test_channels_that_are_far_apart_are_read_one_by_one() -> None:
    stored = Stored(np.arange(100 * 6).reshape(100, 6))
    axes = (Axis("c", "channel", 100), Axis("x", "space", 6))
    info = ArrayInfo("/in.zarr", axes, "int64", {}, "OME-Zarr metadata")
    view = source_of(info, Selection(channels=(99, 0)), "/in.zarr").present(stored)
    np.testing.assert_array_equal(view.read(Box((0, 0), (2, 6))), stored.values[[99, 0]])
    assert stored.voxels == 12


def test_an_array_of_spatial_axes_is_read_without_a_view() -> None:
    stored = Stored(values_of("zyx"))
    assert source("zyx").present(stored) is stored


@pytest.mark.parametrize(
    ("key", "picks", "indices"),
    [
        ("channels", None, (0, 1, 2, 3)),
        ("channels", "1:3", (1, 2)),
        ("channels", ":", (0, 1, 2, 3)),
        ("channels", "0:4:2", (0, 2)),
        ("channels", 2, (2,)),
        ("channels", (2, "DAPI"), (2, 0)),
        ("time", "1:", (1, 2)),
        ("time", (2, 0), (2, 0)),
    ],
)
def test_a_list_has_picks_and_a_string_is_a_range(
    key: str, picks: Any, indices: tuple[int, ...]
) -> None:
    assert getattr(source("tcyx", LABELS, **{key: picks}), key) == indices


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ("tcyx", {"channels": (4,)}),
        ("tcyx", {"channels": (1, 1)}),
        ("tcyx", {"channels": ("GFP",)}),
        ("tcyx", {"channels": ("RFP",)}),
        ("tcyx", {"channels": "0:5"}),
        ("tcyx", {"channels": "3:3"}),
        ("tcyx", {"time": "1-2"}),
        ("tyx", {"channels": (0,)}),
        ("cyx", {"time": 0}),
        ("zyx", {"order": "xy"}),
        ("yx", {"order": "zyx"}),
        ("zyx", {"axes": "yx"}),
    ],
)
def test_a_selection_that_the_array_does_not_have_is_refused(
    names: str, keys: dict[str, Any]
) -> None:
    error = refusal(names, LABELS, **keys)
    assert error.code is ErrorCode.JOB_INVALID
    assert str(error).startswith("input: /in.zarr")


@pytest.mark.parametrize("shape", [(48, 48, 3), (64, 100, 4), (2, 64, 64, 3)])
def test_a_shape_that_can_be_colour_is_refused_until_axes_are_named(
    shape: tuple[int, ...],
) -> None:
    letters = "zyxc"[-len(shape) :]
    with pytest.raises(JobError, match=f"axes: {letters}") as raised:
        unnamed(shape)
    assert raised.value.code is ErrorCode.AXES_AMBIGUOUS
    assert unnamed(shape, axes=letters).volume.channels == shape[-1]
    assert unnamed(shape, axes="tzyx"[-len(shape) :]).shape == shape[-3:]


@pytest.mark.parametrize("shape", [(47, 48, 3), (100, 3), (64, 64, 5), (3, 64, 64), (64, 64, 2)])
def test_other_shapes_without_names_are_spatial(shape: tuple[int, ...]) -> None:
    assert unnamed(shape).shape == shape


@pytest.mark.parametrize("shape", [(3, 48, 48), (4, 64, 100), (3, 5, 64, 64)])
def test_a_first_axis_that_can_be_colour_is_spatial_with_a_doubt(shape: tuple[int, ...]) -> None:
    letters = "c" + "zyx"[-(len(shape) - 1) :]
    spatial = unnamed(shape)
    assert spatial.shape == shape
    (line,) = spatial.doubts()
    assert f"axes: {letters} in input" in line
    assert f'axes="{letters}"' in spatial.doubts(PYTHON)[0]
    assert unnamed(shape, axes=letters).doubts() == ()
    assert unnamed(shape, axes="tzyx"[-len(shape) :]).doubts() == ()


@pytest.mark.parametrize("shape", [(3, 47, 48), (3, 100), (5, 500, 500), (2, 64, 64), (64, 64, 64)])
def test_other_first_axes_raise_no_doubt(shape: tuple[int, ...]) -> None:
    assert unnamed(shape).doubts() == ()


def test_messages_of_a_predictor_name_its_arguments() -> None:
    info = ArrayInfo("/in.zarr", plain_axes((64, 64, 3)), "uint8")
    with pytest.raises(JobError) as raised:
        source_of(info, Selection(), "the array", remedies=PYTHON)
    assert 'axes="yxc"' in str(raised.value)
    assert "input: {" not in str(raised.value)
    with pytest.raises(JobError, match="pass axes="):
        source_of(info, Selection(axes="zyx", channels=0), "the array", remedies=PYTHON)


def test_a_named_last_axis_is_no_colour() -> None:
    axes = (Axis("z", "space", 64), Axis("y", "space", 64), Axis("x", "space", 3))
    info = ArrayInfo("/in.zarr", axes, "uint8", {}, "dimension_names")
    assert source_of(info, Selection(), "/in.zarr").shape == (64, 64, 3)


@pytest.mark.parametrize("names", [["c", "channel", "x"], ["t", "time", "x"], ["t", "c"]])
def test_axes_without_a_clear_meaning_are_refused(names: list[str]) -> None:
    axes = named_axes(names, [4] * len(names))
    info = ArrayInfo("/in.zarr", axes, "uint8", {}, "dimension_names")
    with pytest.raises(JobError) as raised:
        source_of(info, Selection(), "/in.zarr")
    assert raised.value.code is ErrorCode.AXES_AMBIGUOUS


def test_letters_keep_the_scale_of_an_axis_unless_its_kind_changes() -> None:
    axes = (Axis("t", "time", 4, "second", 30.0, 5.0), Axis("a", "space", 5, "nm", 2.0, 1.0))
    assert lettered_axes("zx", axes) == (Axis("z", "space", 4), Axis("x", "space", 5, "nm", 2.0, 1))


@pytest.mark.parametrize(
    ("picks", "scale", "translation", "unit"),
    [((1, 2), 30, 35, "s"), ((0, 2), 60, 5, "s"), ((2,), 30, 65, "s"), ((2, 0), 1, 0, None),
     ((0, 1, 3), 1, 0, None)],
)  # fmt: skip
def test_picked_time_points_keep_their_positions_if_they_are_evenly_spaced(
    picks: tuple[int, ...], scale: float, translation: float, unit: str | None
) -> None:
    axis = picked(Axis("t", "time", 4, "s", 30.0, 5.0), picks)
    assert axis == Axis("t", "time", len(picks), unit, scale, translation)
