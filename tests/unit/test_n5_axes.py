"""Axes of N5 datasets, as the conventions of viewers and tools describe them."""

from typing import Any

import pytest

from chunkq.geometry.axes import Axis
from chunkq.storage.formats.n5_metadata import described_axes

SHAPE = (5, 6, 7)
NM = "nanometer"


def spatial(
    unit: str | None = None,
    scale: tuple[float, ...] = (1, 1, 1),
    translation: tuple[float, ...] = (0, 0, 0),
) -> tuple[Axis, ...]:
    """Return axes z, y, x of `SHAPE`."""
    rows = zip("zyx", SHAPE, scale, translation, strict=True)
    return tuple(Axis(name, "space", size, unit, s, t) for name, size, s, t in rows)


TRANSFORM = {
    "axes": ["z", "y", "x"],
    "scale": [40.0, 4.0, 2.0],
    "translate": [20.0, 0.0, 1.0],
    "units": ["nm", "nm", "nm"],
}
COSEM = spatial(NM, (40, 4, 2), (20, 0, 1))
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], tuple[Axis, ...], bool]] = {
    "nothing": ({}, [], spatial(), False),
    "tensorstore": (
        {"axes": ["x", "y", "z"], "units": ["nm", "nm", "nm"], "resolution": [2, 4, 40]},
        [],
        spatial(NM, (40, 4, 2)),
        True,
    ),
    "n5-viewer in a group, level 1": (
        {},
        [
            {
                "scales": [[1, 1, 1], [2, 2, 4]],
                "pixelResolution": {"unit": "um", "dimensions": [0.1, 0.2, 0.5]},
            }
        ],
        spatial("micrometer", (2.0, 0.4, 0.2), (0.75, 0.1, 0.05)),
        False,
    ),
    "n5-spark in the level": (
        {"downsamplingFactors": [2, 2, 1], "pixelResolution": [4, 4, 40]},
        [],
        spatial(None, (40, 8, 8), (0, 2, 2)),
        False,
    ),
    "BigDataViewer": (
        {},
        [
            {"multiScale": True, "resolution": [4.0, 4.0, 40.0]},
            {"downsamplingFactors": [[1, 1, 1], [2, 2, 1]], "dataType": "uint8"},
        ],
        spatial(None, (40, 8, 8), (0, 2, 2)),
        False,
    ),
    "Paintera": (
        {"resolution": [4, 4, 40], "offset": [100, 200, 300]},
        [],
        spatial(None, (40, 4, 4), (300, 200, 100)),
        False,
    ),
    "COSEM": ({"transform": TRANSFORM, "pixelResolution": [9, 9, 9]}, [], COSEM, True),
    "COSEM in Fortran order": (
        {"transform": {"ordering": "F"} | {k: v[::-1] for k, v in TRANSFORM.items()}},
        [],
        COSEM,
        True,
    ),
    "COSEM in the group": (
        {},
        [{"multiscales": [{"datasets": [{"path": "s1", "transform": TRANSFORM}]}]}],
        COSEM,
        True,
    ),
    "values of another length": (
        {"pixelResolution": [4, 4], "downsamplingFactors": [2, 2, 2, 2], "axes": ["x", "y"]},
        [],
        spatial(),
        False,
    ),
    "values of another kind": (
        {"pixelResolution": "4 nm", "transform": {"axes": 3}, "axes": [1, 2, 3], "units": {}},
        [{"scales": 7, "multiscales": [3], "resolution": [float("nan"), 1, 1]}],
        spatial(),
        False,
    ),
}


@pytest.mark.parametrize(
    ("attributes", "parents", "expected", "is_named"), CASES.values(), ids=CASES
)
def test_each_convention_gives_size_unit_and_position_of_voxels(
    attributes: dict[str, Any],
    parents: list[dict[str, Any]],
    expected: tuple[Axis, ...],
    is_named: bool,
) -> None:
    axes, named_by = described_axes(attributes, parents, "s1", SHAPE)
    assert [(a.name, a.kind, a.size, a.unit) for a in axes] == [
        (a.name, a.kind, a.size, a.unit) for a in expected
    ]
    assert [a.scale for a in axes] == pytest.approx([a.scale for a in expected])
    assert [a.translation for a in axes] == pytest.approx([a.translation for a in expected])
    assert bool(named_by) == is_named


def test_channel_and_time_axes_are_named_in_stored_order_and_have_no_voxel_size() -> None:
    attributes = {
        "axes": ["x", "y", "c", "z", "t"],
        "pixelResolution": {"unit": "µm", "dimensions": [0.5, 0.25, 2.0]},
        "downsamplingFactors": [2, 2, 1],
    }
    axes, _ = described_axes(attributes, [], "s1", (2, 5, 3, 6, 7))
    assert [axis.name for axis in axes] == ["t", "z", "c", "y", "x"]
    assert [axis.kind for axis in axes] == ["time", "space", "channel", "space", "space"]
    assert [axis.scale for axis in axes] == [1.0, 2.0, 1.0, 0.5, 1.0]
    assert [axis.unit for axis in axes] == [None, "micrometer", None, "micrometer", "micrometer"]
    assert [axis.translation for axis in axes] == [0.0, 0.0, 0.0, 0.125, 0.25]
