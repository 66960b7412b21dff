"""Layers of a viewer: the inputs and outputs of a job, with their types and ranges of values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import numpy as np

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ChunkReadError, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.job.job_handle import JobHandle
from chunkq.paths import is_url, join
from chunkq.plan.outputs import OutputSpec
from chunkq.seams import LABELS
from chunkq.storage.array import Array
from chunkq.storage.formats.zarr_nodes import read_node
from chunkq.storage.images import ImageSource
from chunkq.storage.ome import first_image, is_image
from chunkq_producer.view.served import Served, ServedArray, ServedFolder

READ_BY_VIEWER = frozenset({"zarr", "n5", "precomputed"})
"""Formats whose objects the viewer reads itself."""
SAMPLE_EDGE = 64
"""Voxels along each axis of the box in the middle that is read for the range of values."""
PERCENTILES = (1, 99)
UNITS: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "angstrom": (1e-10, "m"),
        "nanometer": (1e-9, "m"),
        "micrometer": (1e-6, "m"),
        "millimeter": (1e-3, "m"),
        "centimeter": (1e-2, "m"),
        "meter": (1.0, "m"),
        "millisecond": (1e-3, "s"),
        "second": (1.0, "s"),
    }
)
"""Unit of an axis -> its size in a unit of the viewer, and that unit."""
SHADER = """#uicontrol invlerp normalized
#uicontrol vec3 color color(default="white")
void main() { emitRGB(color * normalized()); }
"""


PUBLIC_PAGE = "https://neuroglancer-demo.appspot.com/"
"""Page of Neuroglancer, which reads the data of this server in the user's browser."""


@dataclass(frozen=True)
class Layer:
    """A layer: its name, its type in Neuroglancer, and what is served for it.

    `scheme` is the one of the format. `window` has the values that are black and white. `axes` are
    those of an array whose own metadata do not name them as an OME-Zarr image does; else empty.
    """

    name: str
    type: str
    scheme: str
    served: Served
    window: tuple[float, float] | None = None
    axes: tuple[Axis, ...] = ()
    opacity: float | None = None

    def as_state(self, url: str) -> dict[str, Any]:
        """Return the layer in the state of the viewer. `url` is that of what is served."""
        source: Any = f"{self.scheme}://{url}"
        if self.axes:
            dimensions = {_dimension(axis): _meters(axis) for axis in self.axes}
            source = {"url": source, "transform": {"outputDimensions": dimensions}}
            if any(axis.translation for axis in self.axes):
                source["transform"]["matrix"] = _matrix(self.axes)
        state: dict[str, Any] = {"name": self.name, "type": self.type, "source": source}
        if self.type == "image":
            state["shader"] = SHADER
            if self.window is not None:
                state["shaderControls"] = {"normalized": {"range": list(self.window)}}
        if self.opacity is not None:
            state["opacity" if self.type == "image" else "selectedAlpha"] = self.opacity
        return state


def _dimension(axis: Axis) -> str:
    """Return the name of an axis in the viewer, where a prime marks those of a layer alone."""
    return axis.name if axis.kind in ("space", "time") else f"{axis.name}'"


def _meters(axis: Axis) -> list[Any]:
    """Return the size of a voxel and its unit, with a prefix that the viewer knows."""
    prefix, unit = UNITS.get(axis.unit or "", (1.0, ""))
    return [abs(axis.scale) * prefix, unit]


def _matrix(axes: Sequence[Axis]) -> list[list[float]]:
    """Return the affine map from voxels to positions, in voxels."""
    rank = len(axes)
    return [
        [1.0 if n == number else 0.0 for n in range(rank)] + [axis.translation / axis.scale]
        for number, axis in enumerate(axes)
    ]


def dimensions_of(job: JobHandle) -> dict[str, list[Any]]:
    """Return the spatial axes and the time axis of the first output, x first."""
    axes = job.output.image(job.record.images[0]).axes
    kinds = ("space", "time")
    ordered = [axis for kind in kinds for axis in reversed(axes) if axis.kind == kind]
    return {_dimension(axis): _meters(axis) for axis in ordered}


def link(
    page: str, layers: Sequence[dict[str, Any]], dimensions: Mapping[str, Sequence[Any]]
) -> str:
    """Return the link to a Neuroglancer page that shows layers.

    The first dimension is shown from left to right, the second one from top to bottom.
    """
    state = {"dimensions": dict(dimensions), "layers": list(layers), "layout": "4panel"}
    text = json.dumps(state, separators=(",", ":"))
    return f"{page}#!{quote(text, safe='{}:,[]/=()*!@$')}"


def layers_of(job: JobHandle) -> list[Layer]:
    """Return a layer for each input and each output of a job. Raises StoreError."""
    layers = [*_inputs(job), *_outputs(job)]
    names: dict[str, int] = {}
    unique = []
    for layer in layers:
        names[layer.name] = number = names.get(layer.name, 0) + 1
        name = layer.name if number == 1 else f"{layer.name} {number}"
        unique.append(Layer(**{**vars(layer), "name": name}))
    return unique


def _inputs(job: JobHandle) -> Iterator[Layer]:
    for image in job.record.images:
        for source in image.sources:
            name = os.path.basename(source.path.rstrip("/")) or "input"
            access = Access.of(source.options)
            window = None if source.staged else _sampled(source.open())
            if source.format in READ_BY_VIEWER:
                root = _image_root(source, access)
                name = os.path.basename(root.rstrip("/")) or name
                is_array = source.format == "zarr" and root == source.path.rstrip("/")
                axes = source.stored_axes if is_array else ()
                served: Served = ServedFolder(root, access)
                yield Layer(name, "image", source.format, served, window, axes)
            else:
                array = source.open()
                yield Layer(name, "image", "zarr", ServedArray(array, source.stored_axes), window)


def _image_root(source: ImageSource, access: Access) -> str:
    """Return the folder of an input: that of the OME-Zarr image to which a level belongs."""
    path = source.path.rstrip("/")
    if source.format != "zarr":
        return path
    parts = path.rpartition("/")
    for folder in (parts[0], parts[0].rpartition("/")[0]):
        if len(folder) < (len("s3://b") if is_url(path) else 1):
            break
        try:
            node = read_node(folder, access)
            image = None if node is None or node.is_array else first_image(node.attributes)
        except (StoreError, ValueError, OSError):
            continue
        if image is not None and any(join(folder, d.path) == path for d in image.datasets):
            return folder
    return path


def _outputs(job: JobHandle) -> Iterator[Layer]:
    for image in job.record.images:
        plan = job.record.image_plan(image)
        for number, spec in enumerate(plan.outputs):
            output = job.output.image(image, number)
            is_group = is_image(output.axes)
            root = output.path if is_group else output.present_path
            axes = () if is_group else output.axes
            name = "/".join(filter(None, (image.name, spec.name))) or os.path.basename(root)
            served = ServedFolder(root, DEFAULT_ACCESS)
            if spec.combine in LABELS:
                yield Layer(name, "segmentation", "zarr", served, None, axes, 0.4)
            else:
                window = _window(spec) or _sampled(output.open_present())
                yield Layer(name, "image", "zarr", served, window, axes, 0.7)


def _window(spec: OutputSpec) -> tuple[float, float] | None:
    """Return the range of values of an output that follows from its keys."""
    if spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        return float(limits.min), float(limits.max)
    return (0.0, 1.0) if spec.activation in ("softmax", "sigmoid") else None


def _sampled(array: Array) -> tuple[float, float] | None:
    """Return percentiles of the finite voxels in the middle of an array; None without any."""
    start = [max(0, (size - SAMPLE_EDGE) // 2) for size in array.shape]
    sizes = zip(start, array.shape, strict=True)
    stop = [min(size, low + SAMPLE_EDGE) for low, size in sizes]
    try:
        values = array.read(Box(tuple(start), tuple(stop)))
    except ChunkReadError:
        return None
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = np.percentile(finite, PERCENTILES).tolist()
    return (low, high) if low < high else (low - 0.5, high + 0.5)
