"""Scales of precomputed volumes that are written block by block, and read as they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.access import DEFAULT_ACCESS
from chunkq.geometry.box import Box
from chunkq.storage.array import Array
from chunkq.storage.formats.precomputed import BlockKeys
from chunkq.storage.formats.precomputed_info import Scale
from chunkq.storage.formats.tensorstore_arrays import BlockLayout, block_indices, open_blocks
from chunkq.storage.formats.zarr_writing import WritableArray
from chunkq.storage.object_grid import ObjectGrid

CHANNEL = 3
"""Number of the stored axis with the channels; those before it are x, y and z."""
MEMORY_KEY = "scale"
"""Key of a scale in memory."""


@dataclass(frozen=True)
class OrderedKeys:
    """Names of blocks by their indices along the axes of an array.

    `order` has for each axis of the array the number of the stored axis: x, y, z, channel.
    """

    blocks: BlockKeys
    order: tuple[int, ...]

    def name(self, index: Sequence[int]) -> str:
        """Return the name of a block. All channels are in one block."""
        stored = dict(zip(self.order, index, strict=True))
        return self.blocks.name([stored.get(axis, 0) for axis in range(CHANNEL)])

    def pattern(self, rank: int) -> re.Pattern[str]:
        """Return a pattern that names of blocks match as a whole."""
        return self.blocks.pattern(CHANNEL)

    def index(self, name: str) -> tuple[int, ...]:
        """Return the index of the block with a name that matches the pattern."""
        scale = self.blocks.scale
        starts = [int(match[1]) for match in re.finditer(r"(-?\d+)--?\d+", name)]
        axes = zip(starts, scale.voxel_offset, scale.block, strict=True)
        stored = [*((start - offset) // edge for start, offset, edge in axes), 0]
        return tuple(stored[axis] for axis in self.order)


@dataclass(frozen=True)
class ScaleDocument:
    """What an array in a scale of a volume is: metadata of the volume and of the scale.

    `volume` and `scale` are those for tensorstore. `order` is that of `OrderedKeys`. Stored axes
    that it does not name have one voxel.
    """

    volume: Mapping[str, Any]
    scale: Mapping[str, Any]
    order: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ScaleDocument:
        """Return the document from the result of `text`."""
        values = json.loads(text)
        return cls(values["volume"], values["scale"], tuple(values["order"]))

    @property
    def text(self) -> str:
        """The document as JSON, without the key of the scale: that is the name of its folder."""
        scale = {name: value for name, value in self.scale.items() if name != "key"}
        values = {"volume": dict(self.volume), "scale": scale, "order": self.order}
        return json.dumps(values, indent=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self._ordered([*self.scale["size"], self.volume["num_channels"]])

    @cached_property
    def grid(self) -> ObjectGrid:
        """The objects of the array: one per block, with all its channels."""
        chunk = self._ordered([*self.scale["chunk_size"], self.volume["num_channels"]])
        return ObjectGrid(self.shape, chunk, OrderedKeys(self.keys, self.order))

    @property
    def keys(self) -> BlockKeys:
        """Names of the blocks."""
        values = {**self.scale, "key": "", "chunk_sizes": [self.scale["chunk_size"]]}
        return BlockKeys(Scale.model_validate(values))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored voxels."""
        return np.dtype(str(self.volume["data_type"]))

    def spec(self, key: str) -> dict[str, Any]:
        """Return tensorstore's specification without a kvstore. `key` is that of the scale."""
        return {
            "driver": "neuroglancer_precomputed",
            "multiscale_metadata": dict(self.volume),
            "scale_metadata": {**self.scale, "key": key, "sharding": None},
        }

    def present(self, store: Any) -> Any:
        """Return the view of tensorstore's array that has the axes of the array, from 0 on."""
        import tensorstore as ts

        store = store[ts.d[:].translate_to[0]]
        absent = [axis for axis in range(CHANNEL + 1) if axis not in self.order]
        if absent:
            store = store[ts.d[absent][0]]
        remaining = sorted(self.order)
        return store.transpose([remaining.index(axis) for axis in self.order])

    def _ordered(self, stored: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(stored[axis]) for axis in self.order)


@dataclass(frozen=True)
class WrittenLayout(BlockLayout):
    """Blocks of an array in a scale, in the folder with the name `key`."""

    folder: str
    key: str
    document: ScaleDocument

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the array."""
        return self.document.shape

    @property
    def spec(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The specification of the array."""
        return self.document.spec(self.key)

    @override
    def present(self, store: Any) -> Any:
        return self.document.present(store)

    @override
    def names(self, box: Box) -> Iterator[str]:
        grid = self.document.grid
        for index in block_indices(box.start, box.stop, grid.chunk):
            yield grid.keys.name(index)


class WritableScale(WritableArray):
    """A scale of a volume."""

    def __init__(self, array: Array, document: ScaleDocument) -> None:
        super().__init__(array, document.grid)
        self._document = document

    @override
    def _in_memory(self) -> tuple[Any, Any]:
        import tensorstore as ts

        context, memory = ts.Context(), {"driver": "memory"}
        spec = {**self._document.spec(MEMORY_KEY), "kvstore": memory}
        store = ts.open(spec, context=context, open=True, write=True, assume_metadata=True)
        scale = ts.KvStore.open({**memory, "path": f"{MEMORY_KEY}/"}, context=context)
        return self._document.present(store.result()), scale.result()


def read_scale(path: str, document: ScaleDocument) -> Array:
    """Open the array in the folder of a scale for reading. Missing blocks are 0."""
    layout = WrittenLayout(path, path.rpartition("/")[2], document)
    return open_blocks(path, layout, DEFAULT_ACCESS)


def write_scale(path: str, document: ScaleDocument) -> WritableScale:
    """Open the array in the folder of a scale for reading and writing."""
    return WritableScale(read_scale(path, document), document)
