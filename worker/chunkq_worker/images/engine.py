"""`ImageEngine`: the network of a job over images, which computes batches of whole images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import as_float, to_numpy
from chunkq.casts import misfit, proposed_dtype
from chunkq.errors import ErrorCode, ModelError, PredictionError
from chunkq.images.image_error import ImageError
from chunkq.images.image_spec import ImageSpec
from chunkq.job.axis_order import LAST
from chunkq.job.model_config import ModelConfig
from chunkq.job.record import JobRecord
from chunkq.job.user_modules import UserModules
from chunkq_worker.created_values import check_created_values
from chunkq_worker.images.rows import Values
from chunkq_worker.network_loading import check_files, thread_count
from chunkq_worker.output_checks import MAX_DIFFERENCE, relative_difference
from chunkq_worker.runtimes.base import BatchFeed, Runtime, load_runtime, real_numbers
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.steps import KEY, Steps, after_step
from chunkq_worker.user_errors import source_of

AXES = 2
"""Spatial axes of an image."""
MESSAGE_LENGTH = 300
"""Characters of a framework's message in an error of chunkq."""
Heads = tuple[npt.NDArray[Any], ...]
log = logging.getLogger("chunkq.worker")


class ImageEngine:
    """A loaded network that computes batches of images. Call it from the device thread only.

    A batch that runs out of memory is computed in parts, and so are later ones; `size` is the
    number of images that fit. If the runtime is prepared for one batch size, the last image of a
    smaller batch is repeated. The first batch is computed twice to find networks that are random,
    unless the job permits them.
    """

    def __init__(self, record: JobRecord, network: Any = None, steps: Steps | None = None) -> None:
        """Load the network; raise ModelError or JobError if the job cannot use it.

        The objects `network` and `steps` replace those that the job names, if they are not None.
        """
        check_files(record)
        job = record.job
        self._model, self.size = job.model, job.model.max_batch_size
        self._shapes = image_shapes(job.model, job.image_spec)
        self.input_shape = _input_shape(job.model, self._shapes)
        self._feed: BatchFeed | None = None
        self._has_run, self._is_repeated = False, job.model.stochastic
        self._modules = UserModules()
        with self._modules.collect():
            loaded = Steps.load(job.model.processing_steps) if steps is None else steps
            self._steps = loaded.for_heads(self._shapes.names)
            self.runtime: Runtime = load_runtime(
                job.model, self._steps, thread_count(job), self._shapes, network=network
            )
            check_created_values(self.runtime, job.model)

    def __call__(self, images: Sequence[Values]) -> Heads:
        """Return one array (n, ...) per head for images (C, h, w) of one shape.

        Outputs with axes for channels, height and width have them in this order. They are float32
        or float64, in memory of their own. Raise ImageError if the network fails for these images,
        but not for zeros of the declared shape. Raise ModelError if it cannot be used,
        PredictionError if its dtype cannot hold the pixels, and the error of the network if it
        fails although it has run before.
        """
        parts: list[Heads] = []
        done = 0
        while done < len(images):
            batch = images[done : done + self.size]
            heads = self._attempt(batch)
            if heads is not None:
                parts.append(heads)
                done += len(batch)
        if len(parts) == 1:
            return parts[0]
        return tuple(np.concatenate(head) for head in zip(*parts, strict=True))

    def close(self) -> None:
        """Release the network, the user's modules and the device's memory."""
        self.runtime.close()
        self._modules.release()

    def _attempt(self, images: Sequence[Values]) -> Heads | None:
        """Compute a batch; return None if it has to be smaller."""
        self._check_dtype(images)
        try:
            heads = self._run(images)
            is_compared = not self._is_repeated and any(_is_varied(image) for image in images)
            again = self._run(images) if is_compared else heads
        except Exception as error:
            if self.runtime.is_out_of_memory(error):
                self._halve(error)
                return None
            raise self._cause(error, images) from error
        if is_compared:
            _check_equal(heads, again)
            self._is_repeated = True
        self._has_run = True
        return heads

    def _run(self, images: Sequence[Values]) -> Heads:
        """Run the steps and the network on images of one shape."""
        batch, steps = self._batch(images), self._steps
        if steps.preprocessing is not None:
            batch = np.asarray(steps.preprocessing(batch))
        sent: Any = batch if self._feed is None else self._feed.send(batch)
        heads = [to_numpy(as_float(output)) for output in self.runtime(sent)]
        if steps.postprocessing is not None:
            returned = after_step(steps.postprocessing, self._shapes.names, heads)
            heads = [real_numbers(head, f"{KEY}: postprocessing") for head in returned]
        for head in heads:
            if head.ndim == 0 or len(head) != len(batch):
                raise ModelError(
                    f"the network returned shape {list(head.shape)} for a batch of {len(batch)} "
                    "images; fix the network, which must keep the axis of the batch"
                )
        # Results can share memory with the next batch.
        return tuple(np.array(head[: len(images)]) for head in heads)

    def _batch(self, images: Sequence[Values]) -> npt.NDArray[Any]:
        """Return the images as a batch, in the buffer of the feed if all images have one shape."""
        count = len(images) if self.runtime.any_batch else self.size
        rows = [*images, *[images[-1]] * (count - len(images))]
        if not self._shapes.has_channels:
            rows = [row[0] for row in rows]
        if None in self._shapes.input:
            return np.stack(rows)
        if self._feed is None:
            self._feed = self.runtime.feed((self.size, *rows[0].shape), np.float32)
        return np.stack(rows, out=self._feed.buffer()[:count])

    def _check_dtype(self, images: Sequence[Values]) -> None:
        """Raise PredictionError if the dtype of the network cannot hold the pixels."""
        if self._steps.preprocessing is not None:
            return
        dtype = self._model.dtype
        for image in images:
            if (problem := misfit(image, dtype)) is not None:
                raise PredictionError(
                    f"model_config.dtype: {dtype} cannot hold {problem} of an image; set dtype: "
                    f"{proposed_dtype(image, dtype)}, or change the keys of image",
                    code=ErrorCode.DTYPE_UNSUITABLE,
                )

    def _halve(self, error: Exception) -> None:
        """Use half of the batch size from here on; raise ModelError if it is 1."""
        if self.size == 1:
            raise ModelError(
                "the network runs out of memory with a batch of one image; use smaller images, or "
                f"a larger device: {str(error).partition(chr(10))[0][:200]}"
            ) from error
        self.size //= 2
        self._feed = None
        log.warning("out of memory: batches have %d images from here on", self.size)

    def _cause(self, error: Exception, images: Sequence[Values]) -> Exception:
        """Return the error for a batch that failed, which is one of its images if zeros succeed."""
        reason = str(error) if isinstance(error, ModelError) else _reason(error)
        shape = list(images[0].shape)
        if not self._fails_for_zeros():
            return ImageError(
                "predict",
                f"{reason} for a shape of {shape}; use a network for such images, or set "
                "image.resize and image.crop",
                code=ErrorCode.IMAGE_UNSUITABLE,
            )
        if self._has_run or isinstance(error, ModelError):
            return error  # the device has failed, or the network can never run
        return ModelError(
            f"{reason} for a batch of shape {[len(images), *shape]}; fix the network, or "
            "model_config.model_input_shape and image"
        )

    def _fails_for_zeros(self) -> bool:
        try:
            self._run([np.zeros(self.input_shape, np.float32)])
        except Exception:
            return True
        return False


def image_shapes(model: ModelConfig, spec: ImageSpec) -> ItemShapes:
    """Return the shapes of a network for images.

    Height and width are unknown if images have different sizes. Outputs can have any shape. Those
    with as many axes as the input have their channels where the input has them.
    """
    shapes = ItemShapes.of(model, AXES, spec.channels, 1, are_known=False)
    return replace(
        shapes,
        input=(*shapes.input[:-AXES], *(spec.size or (None, None))),
        heads=tuple(replace(head, outputs=(), follows_input=True) for head in shapes.heads),
    )


def _input_shape(model: ModelConfig, shapes: ItemShapes) -> tuple[int, ...]:
    """Return the declared shape of an image, (C, h, w)."""
    written = model.model_input_shape
    declared = written[:AXES] if shapes.order is LAST else written[-AXES:]
    sizes = zip(shapes.input[-AXES:], declared, strict=True)
    channels = shapes.input[0] if shapes.has_channels else 1
    return (channels or 1, *(other if size is None else size for size, other in sizes))


def _check_equal(first: Heads, second: Heads) -> None:
    """Raise ModelError if a network returned different outputs for one batch."""
    difference = max(map(relative_difference, first, second), default=0.0)
    if difference > MAX_DIFFERENCE:
        raise ModelError(
            f"the network returned different outputs for one batch, by {difference:.3g} of their "
            "range: dropout or another random layer is active; save it in inference mode "
            "(network.eval()) and remove random operations, or set model_config.stochastic: true "
            "if results need not be reproducible",
            code=ErrorCode.MODEL_RANDOM,
        )


def _is_varied(image: Values) -> bool:
    return bool(image.min() != image.max())


def _reason(error: Exception) -> str:
    text = " ".join(f"{error}".split())[-MESSAGE_LENGTH:]
    return f"{source_of(error)} raised {type(error).__name__}: {text}"
