"""Show an output and its input in napari, if it is installed."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import numpy as np

from chunkq.errors import ChunkqError, ErrorCode
from chunkq.geometry.box import Box
from chunkq.job.job_handle import JobHandle
from chunkq.seams import LABELS
from chunkq.storage.array import Array
from chunkq.storage.images import ImageSource
from chunkq_producer.view.layers import shown_outputs


class LazyArray:
    """An array that reads what is indexed, as napari does plane by plane."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, len(array.shape)

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        keys = (*keys, *[slice(None)] * (self.ndim - len(keys)))
        ranges = [
            range(*k.indices(n)) if isinstance(k, slice) else range(int(k) % n, int(k) % n + 1)
            for k, n in zip(keys, self.shape, strict=True)
        ]
        start = tuple(min(r[0], r[-1]) if r else 0 for r in ranges)
        stop = tuple(max(r[0], r[-1]) + 1 if r else 0 for r in ranges)
        values = self._array.read(Box(start, stop))
        return values[
            tuple(
                slice(None, None, r.step) if isinstance(k, slice) else 0
                for k, r in zip(keys, ranges, strict=True)
            )
        ]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self[()], dtype)


def show(job: JobHandle) -> None:
    """Open napari with the images of a job, and wait until it is closed.

    Raises ChunkqError if it is not installed.
    """
    napari = _napari()
    viewer = napari.Viewer()
    for image in job.record.images:
        for source in image.sources:
            _add_source(viewer, source, "input")
    for shown in shown_outputs(job):
        add = viewer.add_labels if shown.spec.combine in LABELS else viewer.add_image
        add(
            LazyArray(shown.open()), name=shown.spec.name or "output",
            scale=[axis.scale for axis in shown.axes],
            translate=[axis.translation for axis in shown.axes],
        )  # fmt: skip
    napari.run()


def show_source(source: ImageSource) -> None:
    """Open napari with an image, as `show`."""
    napari = _napari()
    _add_source(napari.Viewer(), source, os.path.basename(source.path.rstrip("/")))
    napari.run()


def _napari() -> Any:
    try:
        return import_module("napari")
    except ModuleNotFoundError:
        raise ChunkqError(
            "napari: missing package napari; run `pip install 'napari[all]'`, or use chunkq view "
            "without --napari",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None


def _add_source(viewer: Any, source: ImageSource, name: str) -> None:
    axes = source.stored_axes
    viewer.add_image(
        LazyArray(source.open()), name=name, scale=[axis.scale for axis in axes],
        translate=[axis.translation for axis in axes],
    )  # fmt: skip
