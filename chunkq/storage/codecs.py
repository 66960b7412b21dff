"""`Codec`: how the storage chunks of an output are compressed."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

CodecName = Literal["lz4", "zstd", "none"]
DEFAULT_LEVELS: MappingProxyType[str, int] = MappingProxyType({"lz4": 5, "zstd": 1})
"""Codec -> default level of Blosc."""
MAX_LEVEL = 9


BLOSC_HEADER_BYTES = 16
"""By which a storage chunk that cannot be compressed is larger than its voxels."""


@dataclass(frozen=True)
class Codec:
    """LZ4 or Zstandard in the container format Blosc, which shuffles bytes first, or nothing.

    `level` is Blosc's, from 1 to 9.
    """

    name: CodecName = "lz4"
    level: int | None = None

    @property
    def most_extra_bytes(self) -> int:
        """By how many bytes a storage chunk can be larger than its voxels."""
        return 0 if self.name == "none" else BLOSC_HEADER_BYTES

    def compressor(self, zarr_format: int) -> Any:
        """Return the codec as zarr-python expects it for arrays of a Zarr format; None for none."""
        if self.name == "none":
            return None
        level = self.level or DEFAULT_LEVELS[self.name]
        if zarr_format == 3:
            from zarr.codecs import BloscCodec

            return BloscCodec(cname=self.name, clevel=level)
        import numcodecs

        return numcodecs.Blosc(cname=self.name, clevel=level)


DEFAULT_CODEC = Codec()
