"""Metadata of precomputed volumes that chunkq writes: their dtypes, scales and `info`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from chunkq.geometry.axes import Axis
from chunkq.geometry.axis_units import METERS, common_unit, unit_factor

INFO = "info"
"""Name of the document of a volume."""
SEGMENT_PROPERTIES = "segment_properties"
"""Key of `info`, and name of the folder whose own `info` names the segments."""
UNIT = "nanometer"
DTYPES = frozenset({"uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "float32"})
REPLACED = {"float16": "float32", "bool": "uint8"}
"""Dtypes that the format does not have -> one that holds all of their values."""
SEGMENT_DTYPES = {
    **dict.fromkeys(("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32"), "uint32"),
    **dict.fromkeys(("uint64", "int64"), "uint64"),
}
"""Dtype of labels -> dtype of a segmentation. Negative labels do not fit and are refused later."""
SEGMENTATION_BLOCK = (8, 8, 8)
"""Shape of the blocks inside a compressed block."""
SEGMENTATION_HEADER_BYTES = 4
"""Bytes of a compressed block before those of the blocks inside it."""
INDEX_BITS = (0, 1, 2, 4, 8, 16)
"""Bits per voxel of a block inside a compressed block, which count its different labels."""
SPATIAL_RANK = 3
MAX_SHIFT = 1e-3
"""Distance (voxels) by which a position may be rounded without a note."""
NAMES = ("x", "y", "z")


def stored_dtype(name: str, *, is_labels: bool) -> np.dtype[Any] | None:
    """Return the dtype in which a volume stores a dtype; None if it has none for it."""
    stored = SEGMENT_DTYPES.get(name) if is_labels else REPLACED.get(name, name)
    return np.dtype(stored) if stored in DTYPES else None


def spatial_order(axes: Sequence[Axis]) -> list[int]:
    """Return the numbers of at most three spatial axes in the order z, y, x.

    Axes with other names keep their order.
    """
    names = {axis.name: number for number, axis in enumerate(axes)}
    if set(names) <= set(NAMES) and "x" in names and (len(names) < 2 or "y" in names):
        return [names[name] for name in reversed(NAMES) if name in names]
    return list(range(len(axes)))


def first_voxels(axes: Sequence[Axis]) -> tuple[float, ...]:
    """Return the positions of the first voxel along axes, in voxels."""
    return tuple(axis.translation / (axis.scale or 1.0) for axis in axes)


def scale_metadata(
    axes: Sequence[Axis],
    first: Sequence[float],
    shape: Sequence[int],
    total: Sequence[int],
    block: Sequence[int],
    *,
    is_labels: bool,
) -> dict[str, Any]:
    """Return the metadata of a scale for tensorstore, x first.

    axes   spatial axes of level 0, in the order z, y, x, as all other parameters
    first  position of the first voxel of level 0, in voxels from the corner of the volume
    shape  of the scale, in voxels
    total  voxels of level 0 per voxel
    block  shape of a block
    """
    ordered = _xyz(axes)
    factors = _three(total, 1)
    unit = common_unit((axis.unit for axis in ordered), METERS, [UNIT])
    resolution = [
        abs(axis.scale) * unit_factor(axis.unit, unit, METERS) * factor or 1.0
        for axis, factor in zip(ordered, factors, strict=True)
    ]
    # The offset counts voxels from the corner of the volume, at every level.
    offset = [
        math.floor(start / factor + 0.5 / factor)
        for start, factor in zip(_three(first, 0.0), factors, strict=True)
    ]
    scale: dict[str, Any] = {
        "key": "_".join(f"{size:.10g}" for size in resolution),
        "size": list(_three(shape, 1)),
        "resolution": resolution,
        "voxel_offset": offset,
        "chunk_size": list(_three(block, 1)),
        "encoding": "raw",
    }
    if is_labels:
        scale["encoding"] = "compressed_segmentation"
        scale["compressed_segmentation_block_size"] = list(SEGMENTATION_BLOCK)
    return scale


def segmentation_bytes(labels: int) -> int:
    """Return how many bytes a block inside a compressed block has at most.

    It consists of a header of 8 bytes, an index of each voxel, and the labels as uint32, of which
    the volume has so many.
    """
    voxels = math.prod(SEGMENTATION_BLOCK)
    different = min(labels, voxels)
    bits = next(bits for bits in INDEX_BITS if 2**bits >= different)
    return 8 + voxels * bits // 8 + 4 * different


def volume_metadata(dtype: np.dtype[Any], channels: int, *, is_labels: bool) -> dict[str, Any]:
    """Return the metadata that all scales of a volume have in common, for tensorstore."""
    return {
        "type": "segmentation" if is_labels else "image",
        "data_type": dtype.name,
        "num_channels": channels,
    }


def info(volume: Mapping[str, Any], scales: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the document `info` of a volume with these metadata, and these scales."""
    return {
        "@type": "neuroglancer_multiscale_volume",
        **volume,
        "scales": [
            {
                **{k: v for k, v in scale.items() if k != "chunk_size"},
                "chunk_sizes": [scale["chunk_size"]],
            }
            for scale in scales
        ],
    }


def segment_properties(names: Sequence[str]) -> dict[str, Any]:
    """Return the document with the names of labels from 1 on; `names` begins with that of label 0.

    Label 0 is no segment.
    """
    ids = [str(label) for label in range(1, len(names))]
    label = {"id": "label", "type": "label", "values": list(names[1:])}
    inline = {"ids": ids, "properties": [label]}
    return {"@type": "neuroglancer_segment_properties", "inline": inline}


def moved(axes: Sequence[Axis], first: Sequence[float], name: str) -> Iterator[str]:
    """Yield a line for each axis that does not begin at a whole voxel, as in `scale_metadata`."""
    for axis, start in zip(axes, first, strict=True):
        offset = math.floor(start + 0.5)
        if abs(start - offset) > MAX_SHIFT:
            yield (
                f"output: {name}: {axis.name} begins at voxel {start:.6g}, stored as {offset}, "
                "because a precomputed volume begins at a whole voxel"
            )


def _xyz(axes: Sequence[Axis]) -> list[Axis]:
    """Return three axes, x first; those that the image lacks have one voxel."""
    absent = [Axis(name, "space", 1, axes[-1].unit) for name in NAMES[len(axes) :]]
    return [*reversed(axes), *absent]


def _three(numbers: Sequence[Any], default: Any) -> tuple[Any, ...]:
    """Return three numbers, x first, of some in the order z, y, x."""
    return (*reversed(numbers), *(default,) * (SPATIAL_RANK - len(numbers)))
