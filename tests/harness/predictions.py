"""Predictions of a batcher, patch by patch."""

from collections.abc import Iterator, Sequence
from typing import Any

from chunkq_worker.batching import Batcher, Halos

from chunkq.plan.chunk import Patch


def each_prediction(
    batcher: Batcher, patches: Sequence[Patch], halos: Halos, origin: Sequence[int]
) -> Iterator[tuple[Patch, Any]]:
    """Yield each patch with its prediction (C, *output patch) for the only output."""
    for batch, (predictions,) in batcher.predictions(patches, halos, origin):
        yield from zip(batch, predictions, strict=True)
