"""The result of inference on one volume, as arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from chunkq.blend.combine import Array, to_numpy
from chunkq.blend.image_objects import ImageGeometry, to_nibabel, to_xarray
from chunkq.errors import ArgumentError, ChunkqError
from chunkq.install_hint import install_command
from chunkq.plan.value_range import ValueRange
from chunkq.summaries import array_text, html_table, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

What = Literal["labels", "probabilities", "values"]
"""Which array of a prediction is converted."""

COMBINES: Mapping[str, str] = MappingProxyType(
    {
        "labels": "soft, hard or weighted_avg",
        "probabilities": "weighted_avg",
        "values": "std or entropy",
    }
)
"""Array of a prediction -> values of `combine` with which it is stored."""


class Unread:
    """An input that `read` returns, and that is read when it is first used."""

    def __init__(self, read: Callable[[], Array | tuple[Array, ...]]) -> None:
        self.read = read


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The result for one volume of shape (*S), with spatial axes in the volume's order.

    If time points or channels were predicted one by one, they are axes before those of each array.

    Attributes:
        labels: `(*S)` uint8, or uint16 for more than 256 classes: the class with the largest
            probability, the lowest one in a tie; for a single channel, whether it is at least 0.5.
            None with `combine` std or entropy.
        input: The input volume `([C,] *S)` in its own dtype; a tuple of them for several inputs. An
            input that was not in memory, such as a path or a dask array, is read at first use.
        probabilities: `(C, *S)` float32, or `output_dtype`: the outputs of the network after
            activation and averaging; None with another `combine` than weighted_avg.
        geometry: What is known of the axes of the input: names, voxel sizes, affine.
        values: The standard deviations `([C,] *S)` of `combine` std or the entropy `(*S)`, float32,
            or `output_dtype`; else None.
        range: How `probabilities` or `values` are stored as integers: they are
            `stored * range.scale + range.offset`, which `range.values` returns. None for
            floating-point numbers.

    Arrays are NumPy arrays, or torch tensors after `to`.
    """

    labels: Array | None
    input: Array | tuple[Array, ...]
    probabilities: Array | None = None
    geometry: ImageGeometry = field(default_factory=ImageGeometry)
    values: Array | None = None
    range: ValueRange | None = None

    def __post_init__(self) -> None:
        if isinstance(self.input, Unread):
            vars(self)["_unread"] = vars(self).pop("input")

    def __getattr__(self, name: str) -> Any:
        if name != "input" or "_unread" not in vars(self):
            raise AttributeError(f"'Prediction' object has no attribute {name!r}")
        value = vars(self)["input"] = vars(self)["_unread"].read()
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # reads an unread input

    def __repr__(self) -> str:
        return one_line("Prediction", self._summary())

    def _repr_html_(self) -> str:
        return html_table("Prediction", self._summary())

    def _summary(self) -> dict[str, str]:
        rows = {
            what: array_text(getattr(self, what))
            for what in get_args(What)
            if getattr(self, what) is not None
        }
        if self.range is not None:
            rows["range"] = self.range.text
        axes = self.geometry.axes
        if any(axis.scale != 1 or axis.unit for axis in axes):
            units = {axis.unit for axis in axes} - {None}
            unit = f" {units.pop()}" if len(units) == 1 else ""
            rows["voxel size"] = " × ".join(f"{n:.6g}" for n in self.voxel_size) + unit
        return rows

    @property
    def affine(self) -> Any:
        """The affine (4, 4) of a nibabel image or of a NIfTI file that was the input, else None.

        That of a file is for voxel indices x, y, z, although the labels are z, y, x.
        """
        return self.geometry.affine

    @property
    def voxel_size(self) -> tuple[float, ...]:
        """Voxel size along each spatial axis of the labels, in `geometry.axes[n].unit`."""
        return tuple(abs(axis.scale) for axis in self.geometry.axes)

    def to_nibabel(self, what: What = "labels", *, affine: Any = None) -> Any:
        """Return one of the arrays as a NIfTI image with the affine of the input.

        Labels of a NIfTI file are turned into the order of the file, x, y, z. Set `affine` (4, 4)
        if the input was neither a nibabel image nor a NIfTI file; its columns are in the order of
        the axes of the labels. Time points become the fourth axis, channels the fifth, float16
        becomes float32. Integers of a
        range stay integers, with a slope and an intercept in the header. Raises ChunkqError if
        nibabel is not installed, without an affine, and for 4-D volumes.
        """
        image = to_nibabel(self._array(what), self.geometry, affine)
        if (span := self._range_of(what)) is not None:
            image.header.set_slope_inter(span.scale, span.offset)
        return image

    def to_xarray(self, what: What = "labels") -> Any:
        """Return one of the arrays as a DataArray.

        It has the dimensions and coordinates of the input, or the positions of the voxels.
        Channels are the dimension `c` before the spatial ones. Integers of a range have the
        attributes `scale_factor` and `add_offset`. Raises ChunkqError if xarray is not installed.
        """
        array = to_xarray(self._array(what), self.geometry, what)
        if (span := self._range_of(what)) is not None:
            array.attrs |= {"scale_factor": span.scale, "add_offset": span.offset}
        return array

    def numpy(self) -> Prediction:
        """Return the prediction with NumPy arrays; arrays in host memory are shared, not copied."""
        return self._map(to_numpy)

    def to(self, device: str) -> Prediction:
        """Return the prediction with torch tensors on a device such as `cpu`, `cuda` or `cuda:1`.

        `to("numpy")` is the same as `numpy()`. On the CPU, memory is shared where torch allows it.
        uint16 arrays become int32 and uint32 arrays int64, with the same values, because torch
        supports few operations on them. Raises ChunkqError if torch is not installed or the device
        does not exist.
        """
        if device == "numpy":
            return self.numpy()
        try:
            import torch
        except ImportError as error:
            raise ChunkqError(
                f"Prediction.to: torch is not installed ({error}); run `{install_command('torch')}`"
            ) from None
        try:
            target = torch.device(device)
            return self._map(lambda array: torch.as_tensor(_for_torch(array), device=target))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ChunkqError(
                f"Prediction.to: cannot use device {device!r}: {reason}; "
                "use 'cpu' or another available device"
            ) from None

    def plot(self, path: str | Path | None = None, *, at: Sequence[int] | None = None) -> Figure:
        """Draw the labels over the first channel and return the figure; save it to `path` if set.

        Draws three planes through voxel `at` of a 3-D volume, all of a 2-D volume, and a line for a
        1-D volume. For a 4-D volume, draws entry `at[0]` of its first axis. `at` has one entry per
        axis of the labels; the default is the first time point and channel, and the median of its
        labeled voxels. Label 0 is transparent. The suffix
        of `path` sets the format. Raises ChunkqError if matplotlib is not installed, and ValueError
        if `at` is outside the volume.
        """
        try:
            from chunkq.blend.plot import draw
        except ImportError as error:
            raise ChunkqError(
                f"Prediction.plot: matplotlib is not installed ({error}); "
                f"run `{install_command('plot')}`"
            ) from None
        first = self.input[0] if isinstance(self.input, tuple) else self.input
        image, labels = to_numpy(first), self._array("labels")
        leading = len(self.geometry.series)
        point = (0,) * leading if at is None else tuple(at)[:leading]
        if any(not 0 <= n < size for n, size in zip(point, labels.shape, strict=False)):
            raise ValueError(
                f"at: {list(point)} is not in the axes {list(labels.shape[:leading])}; use one "
                "index per axis, within the shape"
            )
        image, labels = image[point], labels[point]
        at = None if at is None else tuple(at)[leading:]
        figure = draw(image if image.ndim == labels.ndim else image[0], labels, at)
        if path is not None:
            figure.savefig(path)
        return figure

    def _array(self, what: What) -> Any:
        """Return one of the arrays as a NumPy array."""
        if what not in get_args(What):
            raise ArgumentError(
                f"what: expected 'labels', 'probabilities' or 'values', found {what!r}"
            )
        array = getattr(self, what)
        if array is None:
            raise ChunkqError(f"Prediction: no {what} are stored; use combine {COMBINES[what]}")
        return to_numpy(array)

    def _range_of(self, what: What) -> ValueRange | None:
        """Return how an array is stored as integers."""
        return None if what == "labels" else self.range

    def _map(self, convert: Callable[[Array], Array]) -> Prediction:
        """Return the prediction with every array converted."""

        def convert_input(value: Any) -> Any:
            return tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)

        unread = None if "input" in vars(self) else vars(self)["_unread"]
        arrays: dict[str, Any] = {
            what: None if getattr(self, what) is None else convert(getattr(self, what))
            for what in get_args(What)
        }
        return replace(
            self,
            input=convert_input(self.input)
            if unread is None
            else Unread(lambda: convert_input(unread.read())),
            **arrays,
        )


def _for_torch(array: Array) -> Any:
    """Return the array with a dtype and memory layout that torch supports."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(f"i{min(8, array.dtype.itemsize * 2)}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch rejects negative strides and warns about read-only memory.
    is_supported = array.flags.writeable and all(step >= 0 for step in array.strides)
    return array if is_supported else array.copy()
