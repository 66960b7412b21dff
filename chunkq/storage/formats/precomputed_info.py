"""The document `info` of a precomputed volume: its scales, and what of them can be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from chunkq.access import Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.paths import join, without_secret
from chunkq.storage.formats.base import missing_error, unreadable_error
from chunkq.storage.formats.precomputed_metadata import INFO, UNIT
from chunkq.storage.formats.zarr_nodes import first_document, metadata_error

ENCODINGS = ("raw", "compressed_segmentation", "jpeg", "png")
"""Encodings of blocks that tensorstore reads."""
GZIP_MAGIC = b"\x1f\x8b"
"""First bytes of gzip."""
DTYPES = (
    "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "float32",
)  # fmt: skip
"""Data types that tensorstore reads."""
Model = TypeVar("Model", bound=BaseModel)


class Sharding(BaseModel):
    """The part of `sharding` that determines the names of shards."""

    hash: str
    preshift_bits: int = Field(ge=0, le=64)
    minishard_bits: int = Field(ge=0, le=64)
    shard_bits: int = Field(ge=0, le=64)

    def used_shards(self, grid: Sequence[int]) -> int:
        """Return how many of the shards, from 0, can have blocks of a grid."""
        count = 1 << self.shard_bits
        if self.hash != "identity":
            return count
        # A block has a number of as many bits as its indices have together.
        blocks = 1 << sum((size - 1).bit_length() for size in grid)
        return min(count, max(1, blocks >> (self.preshift_bits + self.minishard_bits)))


class Scale(BaseModel):
    """One entry of `scales`; x first."""

    key: str
    size: tuple[int, int, int]
    voxel_offset: tuple[int, int, int] = (0, 0, 0)
    resolution: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    chunk_sizes: tuple[tuple[int, int, int], ...] = Field(min_length=1)
    encoding: str
    compressed_segmentation_block_size: tuple[int, int, int] | None = None
    sharding: dict[str, Any] | None = None

    @property
    def block(self) -> tuple[int, int, int]:
        """Shape of a block."""
        return self.chunk_sizes[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(-(-s // b) for s, b in zip(self.size, self.block, strict=True))

    @property
    def spec(self) -> dict[str, Any]:
        """The metadata for tensorstore."""
        spec = {
            "size": self.size,
            "voxel_offset": self.voxel_offset,
            "resolution": self.resolution,
            "chunk_size": self.block,
            "encoding": self.encoding,
            "sharding": self.sharding,
        }
        if self.compressed_segmentation_block_size is not None:
            spec["compressed_segmentation_block_size"] = self.compressed_segmentation_block_size
        return spec


class Info(BaseModel):
    """The document of a volume."""

    type_id: str | None = Field(None, alias="@type")
    data_type: str
    num_channels: int = Field(1, ge=1)
    scales: tuple[dict[str, Any], ...] = Field(min_length=1)

    @property
    def keys(self) -> list[str]:
        """The keys of the scales, the finest first."""
        return [str(scale.get("key")) for scale in self.scales]


def read_info(path: str, access: Access) -> bytes | None:
    """Return the document of a volume, or None. Raises the storage's error."""
    document = first_document(path, access, [INFO])
    if document is None or not document[1].startswith(GZIP_MAGIC):
        return None if document is None else document[1]
    return gzip.decompress(document[1])  # a bucket can store it with the content encoding gzip


def require_info(path: str, access: Access) -> Info:
    """Return the metadata of a volume. Raises StoreError if there are none or they are invalid."""
    try:
        content = read_info(path, access)
    except StoreError:
        raise
    except Exception as error:  # each file system raises different errors
        raise unreadable_error(path, error) from error
    if content is None:
        raise missing_error(join(path, INFO))
    return parse_info(path, content)


def parse_info(path: str, content: bytes) -> Info:
    """Return the metadata of a volume. Raises StoreError if they are invalid."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise info_error(path, f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise info_error(path, "not a mapping")
    if "scales" not in values:
        kind = str(values.get("@type") or "no volume").removeprefix("neuroglancer_")
        raise StoreError(
            f"input: {without_secret(path)} holds {kind} of Neuroglancer; expected a volume with "
            "scales; fix the path",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    return _validated(path, Info, values)


def _validated(path: str, model: type[Model], values: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise info_error(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def info_error(path: str, reason: str) -> StoreError:
    """Return the error for metadata that are invalid."""
    return metadata_error(path, INFO, reason, "precomputed")


def key_of(level: int | str, keys: Sequence[str]) -> str | None:
    """Return the key that a level names by number or key, or None."""
    if isinstance(level, str):
        return level if level in keys else None
    if level < len(keys):
        return keys[level]
    # Without quotes, the key 8_8_40 is the number 8840 in YAML.
    matches = [key for key in keys if key.replace("_", "") == str(level)]
    return matches[0] if len(matches) == 1 else None


def scale_of(path: str, info: Info, key: str) -> Scale:
    """Return a scale by its key. Raises StoreError if it is missing, invalid or unsupported."""
    if key not in info.keys:
        raise missing_error(join(path, key))
    scale = _validated(path, Scale, info.scales[info.keys.index(key)])
    problems = {
        f"encoding {scale.encoding!r}; expected {', '.join(ENCODINGS)}": (
            scale.encoding not in ENCODINGS
        ),
        f"data_type {info.data_type!r}; expected {', '.join(DTYPES)}": info.data_type not in DTYPES,
    }
    for problem, is_wrong in problems.items():
        if is_wrong:
            raise StoreError(
                f"input: {without_secret(join(path, INFO))}: unsupported {problem}; store the "
                "volume with one of them, or as Zarr",
                code=ErrorCode.STORE_UNSUPPORTED,
            )
    if min(*scale.size, *(edge - 1 for edge in scale.block)) < 0:
        raise info_error(path, f"invalid size or chunk_sizes of scale {key!r}")
    return scale


def axes_of(info: Info, scale: Scale) -> tuple[Axis, ...]:
    """Return the axes of a scale as presented."""
    channels = [Axis("c", "channel", size) for size in channels_of(info)]
    spatial = [
        Axis(name, "space", size, UNIT, resolution, offset * resolution)
        for name, size, resolution, offset in zip(
            "xyz", scale.size, scale.resolution, scale.voxel_offset, strict=True
        )
    ]
    return (*channels, *reversed(spatial))


def channels_of(info: Info) -> tuple[int, ...]:
    """Return the number of channels, as the shape of their axis; a single one has no axis."""
    return (info.num_channels,) if info.num_channels > 1 else ()
