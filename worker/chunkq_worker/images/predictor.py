"""Predict images from Python: the part of a predictor whose network sees each image whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from chunkq.errors import ArgumentError
from chunkq.images.decoding import (
    Decoded,
    Pixels,
    Reserve,
    decode,
    of_array,
    of_pillow,
    pixels_of,
    unlimited,
)
from chunkq.images.image_error import ImageError
from chunkq.images.image_list import find_images, is_video
from chunkq.images.image_spec import CHANNELS, Mode
from chunkq.images.reading import read_image
from chunkq.job.events import Sink, StageProgress
from chunkq.job.job_file import Job
from chunkq.job.record import JobRecord
from chunkq.paths import is_url
from chunkq_worker.device import get_device
from chunkq_worker.images.chunk_rows import reduced
from chunkq_worker.images.compute import readers
from chunkq_worker.images.engine import Heads, ImageEngine
from chunkq_worker.images.outputs import Outputs
from chunkq_worker.images.rows import FailedRow, RowInput, Values, run_rows
from chunkq_worker.imported_classes import class_name, is_instance
from chunkq_worker.inline import result_of
from chunkq_worker.steps import Steps
from chunkq_worker.user_errors import UserErrors

STAGE = "images"
"""Stage of the progress of a prediction."""
EXPECTED = (
    "expected an image, a list of images, or an array (N, H, W, C); an image is an array (H, W) or "
    "(H, W, C), an image of Pillow, or a path"
)
Read = Callable[[Reserve], Decoded]


class ImagePredictor:
    """A network that predicts images of any number, kept on its device until `release`."""

    def __init__(
        self, job: Job, hashes: Mapping[str, str], network: Any, steps: Steps | None
    ) -> None:
        self._job, self._hashes = job, hashes
        self._network, self._steps = network, steps
        self._engine: ImageEngine | None = None
        self._threads = readers(job)

    def predict(self, images: Any, emit: Sink) -> Outputs:
        """Return the predictions of images; see `Predictor.predict`.

        An image that fails alone raises its ImageError.
        """
        is_single, sources = _sources(images, self._job)
        paths = tuple(path for path, _ in sources)
        reads = [read for _, read in sources]
        device = get_device()
        with UserErrors():
            result_of(device.run(self._prepare))

        def network(batch: Sequence[Values]) -> Heads:
            with UserErrors():
                heads: Heads = result_of(device.run(lambda: self._loaded()(batch)))
            return heads

        values: list[Any] = [None] * len(reads)
        errors: dict[int, ImageError] = {}
        results = run_rows(
            (RowInput(number, read) for number, read in enumerate(reads)),
            self._job.image_spec,
            network,
            max_batch_size=self._job.model.max_batch_size,
            threads=self._threads,
        )
        emit(StageProgress(STAGE, 0, len(reads)))
        with closing(results) as stream:
            for done, result in zip(count(1), stream, strict=False):
                if isinstance(result, FailedRow):
                    errors[result.row] = result.error
                else:
                    values[result.row] = reduced(self._job, result)
                emit(StageProgress(STAGE, done, len(reads)))
        if is_single and errors:
            raise errors[0]

        def pixels(number: int) -> Pixels:
            return pixels_of(reads[number](unlimited))

        return Outputs(self._job, paths, tuple(values), errors, pixels)

    def release(self) -> None:
        """Release the network. Call it on the device thread."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _prepare(self) -> None:
        """Load the network, or use the present weights of an object."""
        self._loaded().runtime.refresh()

    def _loaded(self) -> ImageEngine:
        if self._engine is None:
            record = JobRecord(self._job, (), dict(self._hashes))
            self._engine = ImageEngine(record, self._network, self._steps)
        return self._engine


def _sources(images: Any, job: Job) -> tuple[bool, list[tuple[str | None, Read]]]:
    """Return whether there is one image that is no list, and the path and reader of each image."""
    mode: Mode = job.image_spec.mode
    access = job.inputs[0].access

    def read(path: str, reserve: Reserve) -> Decoded:
        if is_video(path):
            raise ImageError("read", "a video; use a job, or predict its frames as an array")
        return decode(read_image(path, access), mode, reserve)

    def of_path(path: str) -> tuple[str, Read]:
        return path, partial(read, path)

    if isinstance(images, (str, os.PathLike)):
        path = _absolute(images)
        paths = find_images(path, access).paths
        return paths == [path], [of_path(one) for one in paths]
    if _is_pillow(images):
        return True, [_in_memory(of_pillow, images, mode)]
    if isinstance(images, (list, tuple)):
        listed: list[tuple[str | None, Read]] = []
        for one in images:
            if isinstance(one, (str, os.PathLike)):
                listed.append(of_path(_absolute(one)))
            elif _is_pillow(one):
                listed.append(_in_memory(of_pillow, one, mode))
            else:
                listed.append(_in_memory(of_array, _array(one, (2, 3)), mode))
        return False, listed
    array = _array(images, (2, 3, 4))
    if array.ndim == 4:
        return False, [_in_memory(of_array, one, mode) for one in array]
    return True, [_in_memory(of_array, array, mode)]


def _in_memory(
    convert: Callable[[Any, Mode], Decoded], image: Any, mode: Mode
) -> tuple[None, Read]:
    """Return the reader of an image that is in memory, so none of its pixels is decoded."""
    return None, lambda reserve: convert(image, mode)


def _array(image: Any, axes: tuple[int, ...]) -> Any:
    """Return an image, or several, as an array; raise ArgumentError if it cannot be one."""
    if not hasattr(image, "__array__") and not hasattr(image, "__array_interface__"):
        raise ArgumentError(f"images: found {class_name(image)}, {EXPECTED}")
    array = np.asarray(image.detach().cpu() if is_instance(image, "torch", "Tensor") else image)
    channels = array.shape[-1] if array.ndim > 2 else 1
    if array.ndim not in axes or channels not in {*CHANNELS.values(), 2}:
        raise ArgumentError(f"images: found an array of shape {list(array.shape)}, {EXPECTED}")
    return array


def _is_pillow(image: Any) -> bool:
    return is_instance(image, "PIL.Image", "Image")


def _absolute(path: Any) -> str:
    text = str(os.fspath(path))
    return text if is_url(text) else os.path.abspath(text)
