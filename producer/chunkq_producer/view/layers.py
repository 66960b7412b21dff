"""Layers of a viewer: images and labels, with their types, voxel sizes and ranges of values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import copysign
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import numpy as np

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.job.exported_output import ExportedOutput
from chunkq.job.exports import ExportedFile
from chunkq.job.job_handle import JobHandle
from chunkq.job.output_documents import parsed
from chunkq.paths import is_url, join, read_bytes, without_secret
from chunkq.plan.outputs import OutputSpec
from chunkq.seams import LABELS
from chunkq.storage.array import Array
from chunkq.storage.formats.precomputed_metadata import INFO, NAMES, UNIT, spatial_order
from chunkq.storage.formats.zarr_nodes import read_node
from chunkq.storage.images import ImageSource, find_source
from chunkq.storage.ome import first_image, is_image
from chunkq_producer.view.served import Served, ServedArray, ServedFolder

PRECOMPUTED = "precomputed"
READ_BY_VIEWER = frozenset({"zarr", "n5", PRECOMPUTED})
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
            if any(axis.translation or _meters(axis)[0] != 1 for axis in self.axes):
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
    """Return the affine map of an array without axes of its own to the dimensions of the viewer.

    The viewer takes a voxel of such an array for one unit, such as a meter. The last column counts
    voxels.
    """
    rank = len(axes)
    return [
        [copysign(_meters(axis)[0], axis.scale) if n == number else 0.0 for n in range(rank)]
        + [axis.translation / abs(axis.scale)]
        for number, axis in enumerate(axes)
    ]


def dimensions_of(axes: Sequence[Axis]) -> dict[str, list[Any]]:
    """Return the spatial axes and the time axis of an image for the viewer, x first."""
    kinds = ("space", "time")
    ordered = [axis for kind in kinds for axis in reversed(axes) if axis.kind == kind]
    return {_dimension(axis): _meters(axis) for axis in ordered}


def axes_of(job: JobHandle) -> tuple[Axis, ...]:
    """Return the axes of the first output of a job, as the viewer names them."""
    axes = job.output.image(job.record.images[0]).axes
    return _as_in_volume(axes) if job.record.job.is_precomputed else axes


def _as_in_volume(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Return axes as those of a precomputed volume: x, y and z, with a unit of length."""
    spatial = [number for number, axis in enumerate(axes) if axis.kind == "space"]
    names = zip(reversed(spatial_order([axes[n] for n in spatial])), NAMES, strict=False)
    renamed = {spatial[number]: name for number, name in names}
    return tuple(
        replace(axis, name=renamed[n], unit=axis.unit or UNIT) if n in renamed else axis
        for n, axis in enumerate(axes)
    )


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
        unique.append(replace(layer, name=name))
    return unique


def layer_of(source: ImageSource) -> Layer:
    """Return the layer of an image that no job has written. Raises StoreError."""
    _check_readable(source)
    layer = _source_layer(source)
    if not _is_segmentation(source):
        return layer
    return replace(layer, type="segmentation", window=None)


def _inputs(job: JobHandle) -> Iterator[Layer]:
    for image in job.record.images:
        for source in image.sources:
            yield _source_layer(source, is_beside_volume=job.record.job.is_precomputed)


def _source_layer(source: ImageSource, *, is_beside_volume: bool = False) -> Layer:
    """Return the layer of a source as an image.

    `is_beside_volume`: a precomputed volume is shown in the same space, whose axes are x, y and z
    with a unit of length.
    """
    name = os.path.basename(source.path.rstrip("/")) or "input"
    access = Access.of(source.options)
    window = None if source.staged else _sampled(source.open())
    root, axes = source.path, source.stored_axes
    if source.format in READ_BY_VIEWER:
        root = _image_root(source, access)
        name = os.path.basename(root.rstrip("/")) or name
    shown_axes = axes
    if is_beside_volume and source.format != PRECOMPUTED:
        shown_axes = _as_in_volume(axes)
    if source.format not in READ_BY_VIEWER or shown_axes != axes:
        return Layer(name, "image", "zarr", ServedArray(source.open(), shown_axes), window)
    is_array = source.format == "zarr" and root == source.path.rstrip("/")
    served = ServedFolder(root, access)
    return Layer(name, "image", source.format, served, window, axes if is_array else ())


def _is_segmentation(source: ImageSource) -> bool:
    """Return whether the metadata of an image say that its values are labels."""
    access = Access.of(source.options)
    try:
        if source.format == PRECOMPUTED:
            info = parsed(read_bytes(join(source.path, INFO), access)) or {}
            return info.get("type") == "segmentation"
        if source.format == "zarr":
            node = read_node(_image_root(source, access), access)
            attributes = {} if node is None else node.attributes
            return "image-label" in attributes.get("ome", attributes)
    except (StoreError, OSError, AttributeError, TypeError):
        pass
    return False


def _check_readable(source: ImageSource) -> None:
    """Raise StoreError if the voxels of a file can only be read from its start."""
    if source.staged:
        path = without_secret(source.path)
        target = os.path.basename(path).partition(".")[0] or "image"
        raise StoreError(
            f"{path}: {source.staged}; run `chunkq convert {path} {target}.zarr`, then view "
            f"{target}.zarr",
            code=ErrorCode.STORE_UNSUPPORTED,
        )


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


@dataclass(frozen=True)
class ShownOutput:
    """One output of an image: its name and what it holds, its array, and what is served for it.

    `axes` are those of the array. `scheme` and `named_axes` are those of the layer.
    """

    name: str
    spec: OutputSpec
    axes: tuple[Axis, ...]
    open: Callable[[], Array]
    scheme: str
    served: Served
    named_axes: tuple[Axis, ...] = ()


def shown_outputs(job: JobHandle) -> Iterator[ShownOutput]:
    """Yield the outputs of a job, where they are now. Raises StoreError."""
    if isinstance(job.output, ExportedOutput) and job.ledger.is_sealed():
        for file in job.output.files:
            yield from _file_outputs(job, file)
        return
    scheme = PRECOMPUTED if job.record.job.is_precomputed else "zarr"
    for image in job.record.images:
        for number, spec in enumerate(job.record.image_plan(image).outputs):
            stored = job.output.image(image, number)
            is_group = scheme == PRECOMPUTED or is_image(stored.axes)
            root = stored.path if is_group else stored.present_path
            yield ShownOutput(
                _output_name(image.name, spec.name, job.folder.output),
                spec,
                stored.axes,
                stored.open_present,
                scheme,
                ServedFolder(root, DEFAULT_ACCESS),
                () if is_group else stored.axes,
            )


def _file_outputs(job: JobHandle, file: ExportedFile) -> Iterator[ShownOutput]:
    """Yield the outputs in a file of a job, presented as OME-Zarr."""
    for number in file.outputs:
        spec = job.record.image_plan(file.image).outputs[number]
        source = find_source(join(file.path, spec.name) if len(file.outputs) > 1 else file.path)
        _check_readable(source)
        axes, name = source.stored_axes, _output_name(file.image.name, spec.name, file.path)
        served = ServedArray(source.open(), axes)
        yield ShownOutput(name, spec, axes, source.open, "zarr", served)


def _output_name(image: str, output: str, root: str) -> str:
    return "/".join(filter(None, (image, output))) or os.path.basename(root)


def _outputs(job: JobHandle) -> Iterator[Layer]:
    for shown in shown_outputs(job):
        layer = Layer(shown.name, "image", shown.scheme, shown.served, None, shown.named_axes)
        if shown.spec.combine in LABELS:
            yield replace(layer, type="segmentation", opacity=0.4)
        else:
            window = _window(shown.spec) or _sampled(shown.open())
            yield replace(layer, window=window, opacity=0.7)


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
