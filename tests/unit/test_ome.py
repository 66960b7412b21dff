"""Axes of an image: read from OME-Zarr metadata and written as such."""

from typing import Any

import pytest

from chunkq.geometry.axes import Axis, channel_axis, plain_axes
from chunkq.storage.ome import first_image, image_metadata, read_axes


def axes_of(shape: tuple[int, ...], axes: list[Any], **level: Any) -> tuple[Axis, ...]:
    """Return the axes of an image with one level."""
    image = first_image({"multiscales": [{"axes": axes, "datasets": [{"path": "0", **level}]}]})
    assert image is not None
    return read_axes(image, shape)


def summary(axes: tuple[Axis, ...]) -> list[tuple[str, str, int]]:
    return [(axis.name, axis.kind, axis.size) for axis in axes]


@pytest.mark.parametrize(
    "axes",
    [
        ["t", "c", "y", "x"],
        [{"name": name} for name in "tcyx"],
        [
            {"name": "t", "type": "time"},
            {"name": "c", "type": "channel"},
            {"name": "y", "type": "space"},
            {"name": "x", "type": "another type"},
        ],
    ],
)
def test_the_kind_of_an_axis_is_that_of_its_type_else_of_its_name(axes: list[Any]) -> None:
    assert summary(axes_of((2, 3, 4, 5), axes)) == [
        ("t", "time", 2),
        ("c", "channel", 3),
        ("y", "space", 4),
        ("x", "space", 5),
    ]


@pytest.mark.parametrize(
    "level",
    [
        {},
        {"coordinateTransformations": []},
        {"coordinateTransformations": [{"type": "identity"}]},
        {"coordinateTransformations": [{"type": "scale", "scale": [2.0]}]},
        {"coordinateTransformations": [{"type": "scale", "path": "elsewhere"}]},
    ],
)
@pytest.mark.parametrize("axes", [[], ["z", "y", "x"], [{"name": "y"}], ["y", "y"], ["y", ""]])
def test_missing_and_ambiguous_entries_are_those_of_an_array_without_metadata(
    axes: list[Any], level: dict[str, Any]
) -> None:
    assert axes_of((4, 5), axes, **level) == plain_axes((4, 5))


def test_an_image_of_five_axes_without_names_is_one_of_the_first_versions() -> None:
    kinds = ["time", "channel", "space", "space", "space"]
    assert [axis.kind for axis in axes_of((1, 2, 3, 4, 5), [])] == kinds


@pytest.mark.parametrize(
    "multiscales",
    [
        {"datasets": []},
        [{"datasets": [{}]}],
        [{"datasets": [{"path": 3}]}],
        [{"datasets": [{"path": "0"}], "axes": [7]}],
        *(
            [{"datasets": [{"path": "0", "coordinateTransformations": [transformation]}]}]
            for transformation in (
                {"type": "scale", "scale": ["wide"]},
                {"type": "scale", "scale": [float("nan")]},
                {"type": "translation", "translation": [float("inf")]},
            )
        ),
    ],
)
@pytest.mark.parametrize("has_ome_key", [True, False])
def test_invalid_image_metadata_raise_a_value_error(multiscales: Any, has_ome_key: bool) -> None:
    attributes = {"multiscales": multiscales}
    with pytest.raises(ValueError, match="multiscales"):
        first_image({"ome": attributes} if has_ome_key else attributes)


@pytest.mark.parametrize("attributes", [{}, {"multiscales": []}, {"ome": {}, "other": 1}])
def test_attributes_without_an_image_have_none(attributes: dict[str, Any]) -> None:
    assert first_image(attributes) is None


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("channels", [[], [3]])
def test_written_axes_are_read_unchanged(zarr_format: int, channels: list[int]) -> None:
    axes = (
        *map(channel_axis, channels),
        Axis("x", "space", 4, "micrometer", 0.25, -7.5),
        Axis("y", "space", 5, None, 0.5, 0.0),
    )
    image = first_image(image_metadata({"level": axes}, zarr_format))
    assert image is not None
    assert image.datasets[0].path == "level"
    assert read_axes(image, [axis.size for axis in axes]) == axes


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)])
def test_axes_that_ome_zarr_does_not_know_have_no_image_metadata(shape: tuple[int, ...]) -> None:
    assert image_metadata({"0": plain_axes(shape)}, 3) == {}


def test_the_transformations_of_the_image_follow_those_of_the_level() -> None:
    transformations = [
        [{"type": "scale", "scale": [1, 2, 4]}, {"type": "translation", "translation": [0, 1, 3]}],
        [{"type": "scale", "scale": [30, 0.5, 0.5]},
         {"type": "translation", "translation": [7, 0, 10]}],
    ]  # fmt: skip
    level, image = transformations
    metadata = {
        "axes": [{"name": "t", "type": "time", "unit": "second"}, "y", "x"],
        "datasets": [{"path": "0"}, {"path": "s1", "coordinateTransformations": level}],
        "coordinateTransformations": image,
    }
    read = first_image({"multiscales": [metadata]})
    assert read is not None
    assert read.level(1) == read.level("s1") == read.datasets[1]
    assert read.level(2) is read.level("s2") is None
    assert read_axes(read, (3, 4, 5), read.level(1)) == (
        Axis("t", "time", 3, "second", 30.0, 7.0),
        Axis("y", "space", 4, None, 1.0, 0.5),
        Axis("x", "space", 5, None, 2.0, 11.5),
    )


def test_axes_without_metadata_have_different_names() -> None:
    names = [axis.name for axis in plain_axes((2, 3, 4, 5, 6))]
    assert names == ["dim_0", "dim_1", "z", "y", "x"]
