"""The outputs of the batch on which a network was checked, which the first chunk can use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, namespace
from chunkq.plan.chunk import Patch

Halos = Sequence[npt.NDArray[Any]]


@dataclass(frozen=True)
class CheckedBatch:
    """Raw outputs (n, C, *Q), one per head, of a batch of patches in host memory.

    `digests` are those of the voxels that the patches read.
    """

    digests: tuple[bytes, ...]
    outputs: tuple[Array, ...]

    @classmethod
    def of(
        cls,
        patches: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        outputs: Sequence[Array],
    ) -> CheckedBatch:
        """Keep copies of the outputs: they can share the memory of the next batch.

        `halos` are the inputs ([C,] *S) from voxel `origin` on.
        """
        copies = tuple(namespace(values).asarray(values, copy=True) for values in outputs)
        return cls(_digests(patches, halos, origin), copies)

    def outputs_of(
        self, patches: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> tuple[Array, ...] | None:
        """Return the outputs if the patches of the batch read the same voxels, else None."""
        return self.outputs if self.digests == _digests(patches, halos, origin) else None


def _digests(patches: Sequence[Patch], halos: Halos, origin: Sequence[int]) -> tuple[bytes, ...]:
    windows = (halo[patch.source.index(origin)] for patch in patches for halo in halos)
    return tuple(_digest(np.ascontiguousarray(window)) for window in windows)


def _digest(values: npt.NDArray[Any]) -> bytes:
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest()
