"""`ImageEngine`: the network of a job over images, which computes batches of whole images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import to_numpy
from chunkq.errors import ErrorCode, ModelError
from chunkq.images.image_error import ImageError
from chunkq.job.record import JobRecord
from chunkq.job.user_modules import UserModules
from chunkq_worker.child_env import THREADS_VARIABLE
from chunkq_worker.created_values import check_created_values
from chunkq_worker.images.rows import Values
from chunkq_worker.runtimes.base import Runtime, load_runtime, real_numbers
from chunkq_worker.runtimes.item_shapes import ItemShapes
from chunkq_worker.steps import KEY, Steps, after_step
from chunkq_worker.user_errors import source_of

Heads = tuple[npt.NDArray[Any], ...]
MESSAGE_LENGTH = 300
"""Characters of a framework's message in an error of chunkq."""


class ImageEngine:
    """A loaded network that computes batches of images. Call it from the device thread only."""

    def __init__(self, record: JobRecord, network: Any = None, steps: Steps | None = None) -> None:
        """Load the network; raise ModelError or JobError if the job cannot use it.

        The objects `network` and `steps` replace those that the job names, if they are not None.
        """
        if changed := record.changed_files():
            raise ModelError(
                f"{', '.join(changed)}: the file is missing here or has changed since the job was "
                "produced; restore it, or produce the job again with --overwrite"
            )
        share = os.environ.get(THREADS_VARIABLE, "")
        job = record.job
        threads = job.threads or (int(share) if share.isdecimal() else None)
        self._size, self._model = job.model.max_batch_size, job.model
        channels = job.image_spec.channels
        shapes = ItemShapes.of(job.model, 2, channels, 1, are_known=False)
        self.input_shape = tuple(n for n in shapes.input if n is not None)
        self._modules = UserModules()
        self._known_good: Values | None = None
        with self._modules.collect():
            self._steps = Steps.load(job.model.processing_steps) if steps is None else steps
            self.runtime: Runtime = load_runtime(
                job.model, self._steps, threads, shapes, network=network
            )
            check_created_values(self.runtime, job.model)

    def __call__(self, images: Sequence[Values]) -> Heads:
        """Return what the network returns for images (C, h, w) of one shape: (n, ...) per head.

        Raises ImageError if it fails for these images and not for others, and else the error of the
        network. A batch that does not fit in memory is computed in parts.
        """
        try:
            heads = self._run(np.stack(images))
        except ModelError:
            raise
        except Exception as error:
            if self.runtime.is_out_of_memory(error) and len(images) > 1:
                half = len(images) // 2
                parts = zip(self(images[:half]), self(images[half:]), strict=True)
                return tuple(map(np.concatenate, parts))
            if self.runtime.is_out_of_memory(error) or not self._works_for_others():
                raise self._failed(error, images) from error
            raise ImageError(
                "predict",
                f"{_reason(error)} for a shape of {list(images[0].shape)}; use a network for such "
                "images, or set image.resize and image.crop",
                code=ErrorCode.IMAGE_UNSUITABLE,
            ) from error
        if self._known_good is None:
            self._known_good = images[0].copy()
        return heads

    def _works_for_others(self) -> bool:
        """Return whether the network computes an image that it has computed before, or zeros."""
        other = self._known_good
        if other is None:
            other = np.zeros(self.input_shape, np.float32)
        try:
            self._run(other[None])
        except Exception:
            return False
        return True

    def _failed(self, error: Exception, images: Sequence[Values]) -> ModelError:
        """Return the error of a network that fails whatever the image is."""
        shape = [len(images), *images[0].shape]
        return ModelError(
            f"{_reason(error)} for a batch of shape {shape}; fix the network, or "
            "model_config.model_input_shape and image"
        )

    def _run(self, batch: npt.NDArray[np.float32]) -> Heads:
        """Run the steps and the network on a batch (n, C, h, w)."""
        used = len(batch)
        if not self.runtime.any_batch and used < self._size:  # prepared for one batch size
            batch = np.concatenate([batch, np.repeat(batch[-1:], self._size - used, axis=0)])
        before, after = self._steps.preprocessing, self._steps.postprocessing
        if before is not None:
            batch = np.asarray(before(batch))
        feed = self.runtime.feed(batch.shape, batch.dtype)
        heads = [to_numpy(head) for head in self.runtime(feed.send(batch))]
        if after is not None:
            returned = after_step(after, [None], heads)
            heads = [real_numbers(array, f"{KEY}: postprocessing") for array in returned]
        for head in heads:
            if head.ndim == 0 or len(head) != len(batch):
                raise ModelError(
                    f"the network returned shape {list(head.shape)} for a batch of {len(batch)} "
                    "images; fix the network, which must keep the axis of the batch"
                )
        # Results can share memory with the next batch.
        return tuple(np.array(head[:used]) for head in heads)

    def close(self) -> None:
        """Release the network, the user's modules and the device's memory."""
        self.runtime.close()
        self._modules.release()


def _reason(error: Exception) -> str:
    text = " ".join(f"{error}".split())[-MESSAGE_LENGTH:]
    return f"{source_of(error)} raised {type(error).__name__}: {text}"
