"""How an output is laid out: names and documents of its arrays, as Zarr or as a precomputed volume.

A layout knows the documents of one image and how its arrays are opened. `job.output` decides when
they are written, renamed and compared, which is the same for all layouts.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from typing_extensions import override

from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.levels import Level
from chunkq.job.output_config import codec_of
from chunkq.job.output_documents import parsed, to_text
from chunkq.job.pyramids import method_of
from chunkq.job.tasks import EPOCH_DIGITS
from chunkq.paths import without_secret
from chunkq.plan.plan import Plan
from chunkq.storage.array import Array
from chunkq.storage.codecs import Codec
from chunkq.storage.formats.base import NO_OPTIONS
from chunkq.storage.formats.precomputed_metadata import (
    INFO,
    SEGMENT_PROPERTIES,
    SEGMENTATION_BLOCK,
    SEGMENTATION_HEADER_BYTES,
    SPATIAL_RANK,
    first_voxels,
    info,
    moved,
    scale_metadata,
    segment_properties,
    segmentation_bytes,
    spatial_order,
    stored_dtype,
    volume_metadata,
)
from chunkq.storage.formats.zarr_writing import WritableArray, array_metadata, shard_index_bytes
from chunkq.storage.object_grid import ObjectGrid
from chunkq.storage.objects import ObjectFolder
from chunkq.storage.ome import image_metadata, is_image
from chunkq.storage.value_metadata import array_attributes, label_values

if TYPE_CHECKING:
    from chunkq.job.job_file import Job
    from chunkq.plan.object_sizes import ObjectSizes

SCALE_DOCUMENT = "chunkq.json"
"""Name of the document in the folder of a scale, which readers of the format do not look at."""
EPOCH_SUFFIX = rf"\.[0-9a-f]{{{EPOCH_DIGITS}}}"
ARRAY_DOCUMENTS = frozenset({".zattrs", ".zarray", "zarr.json", SCALE_DOCUMENT})
"""Documents in the folder of an array, which are no objects with voxels."""


@dataclass(frozen=True)
class StoredImage:
    """One output of an image, as it is stored.

    `plan` is that of the output. `axes` are those of level 0, and of each level above it. `scale`
    has the voxels of the input per voxel along each spatial axis.
    """

    job: Job
    plan: Plan
    axes: tuple[tuple[Axis, ...], ...]
    levels: tuple[Level, ...]
    scale: tuple[float, ...]


class OutputLayout(ABC):
    """The names and documents of the arrays of an image, and how the arrays are opened.

    array_document     name of the document in the folder of an array
    other_documents    documents of other layouts, which an image does not have
    has_groups         whether several images are members of a group that has documents
    """

    array_document: str
    other_documents: tuple[str, ...]
    has_groups: ClassVar[bool]

    @abstractmethod
    def names(self, image: StoredImage) -> tuple[str, ...]:
        """Return the names of the arrays of all levels in a sealed image on a local disk."""

    @abstractmethod
    def array_documents(self, image: StoredImage, level: int, name: str) -> dict[str, str]:
        """Return the documents of the array of a level, which has this name, by their paths."""

    @abstractmethod
    def sizes(self, image: StoredImage, level: int) -> ObjectSizes:
        """Return the bytes of the objects of the array of a level."""

    @abstractmethod
    def grid(self, document: str) -> ObjectGrid:
        """Return the objects of the array with this document."""

    @abstractmethod
    def open(self, path: str, document: str) -> WritableArray:
        """Open an array for reading and writing. Raises StoreError."""

    @abstractmethod
    def open_present(self, path: str, document: str) -> Array:
        """Open an array for reading. Raises StoreError."""

    @abstractmethod
    def attributes(self, image: StoredImage, documents: Mapping[str, str]) -> dict[str, Any]:
        """Return what readers need to know of an image.

        `documents` are those of its arrays, by the name of each array.
        """

    def other_written(self, image: StoredImage) -> dict[str, str]:
        """Return the documents of an image beside those of `written`, which name them."""
        return {}

    @abstractmethod
    def written(self, attributes: dict[str, Any]) -> dict[str, str]:
        """Return the documents of an image, or a group, with these attributes, by their names."""

    @abstractmethod
    def stored_attributes(self, objects: ObjectFolder) -> dict[str, Any]:
        """Return the attributes of an image or a group; empty without a valid document."""

    def merged(self, stored: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
        """Return attributes with those that users have added to the stored ones."""
        return stored | attributes

    @abstractmethod
    def array_names(self, attributes: dict[str, Any]) -> list[Any]:
        """Return the names of the arrays that attributes name. Raises KeyError, and the like."""

    @abstractmethod
    def epoch_name(self, folder: str) -> bool | None:
        """Return whether the name of a folder has an epoch; None if it is no array's."""


class ZarrLayout(OutputLayout):
    """An OME-Zarr image: a group with one array per level, `0`, `1`, …"""

    has_groups: ClassVar[bool] = True

    def __init__(self, zarr_format: Literal[2, 3]) -> None:
        self._format = zarr_format
        self.array_document = {2: ".zarray", 3: "zarr.json"}[zarr_format]
        self.other_documents = {
            2: ("zarr.json",),
            3: (".zgroup", ".zattrs", ".zarray", ".zmetadata"),
        }[zarr_format]

    @override
    def names(self, image: StoredImage) -> tuple[str, ...]:
        return tuple(map(str, range(len(image.axes))))

    @override
    def array_documents(self, image: StoredImage, level: int, name: str) -> dict[str, str]:
        plan, axes = image.plan, image.axes[level]
        leading = (1,) * (len(axes) - plan.rank)
        chunks, shards = self._chunks(image, level)
        return array_metadata(
            name,
            shape=[axis.size for axis in axes],
            chunks=(*leading, *chunks),
            shards=shards and (*leading, *shards),
            dtype=plan.output_dtype,
            fill_value=plan.output.fill.item(),
            zarr_format=self._format,
            axes=[axis.name for axis in axes] if is_image(axes) else None,
            codec=self._codec(image),
            attributes=array_attributes(plan.output),
        )

    @override
    def sizes(self, image: StoredImage, level: int) -> ObjectSizes:
        from chunkq.plan.object_sizes import ObjectSizes  # not for commands that only read

        output, codec = image.plan.output, self._codec(image)
        chunks, shards = self._chunks(image, level)
        chunk_bytes = prod(chunks) * output.dtype.itemsize + codec.most_extra_bytes
        per_shard = 0 if shards is None else prod(shards) // prod(chunks)
        return ObjectSizes(
            shards or chunks,
            chunks,
            chunk_bytes,
            shard_index_bytes(per_shard) if per_shard else 0,
            output.stored_channels,
            is_exact=codec.name == "none",
        )

    @staticmethod
    def _chunks(image: StoredImage, level: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Return the shapes of storage chunks and shards along the spatial axes of a level."""
        spatial = [axis.size for axis in image.axes[level][-image.plan.rank :]]
        stored = zip(image.plan.storage_chunks, spatial, strict=True)
        chunks = tuple(min(edge, size) for edge, size in stored)
        if image.plan.storage_shards is None:
            return chunks, None
        axes = zip(image.plan.storage_shards, spatial, chunks, strict=True)
        return chunks, tuple(min(shard, -(-size // edge) * edge) for shard, size, edge in axes)

    @staticmethod
    def _codec(image: StoredImage) -> Codec:
        return codec_of(image.job.output_configs()[image.plan.output.name].codec)

    @override
    def grid(self, document: str) -> ObjectGrid:
        return ObjectGrid.of_document(document, self._format)

    @override
    def open(self, path: str, document: str) -> WritableArray:
        from chunkq.storage.formats.zarr import ZARR_FORMAT, ZarrFormat

        return ZarrFormat().open_for_writing(path, {ZARR_FORMAT: self._format})

    @override
    def open_present(self, path: str, document: str) -> Array:
        from chunkq.storage.formats.zarr import ZarrFormat

        return ZarrFormat().open(path, NO_OPTIONS)

    @override
    def attributes(self, image: StoredImage, documents: Mapping[str, str]) -> dict[str, Any]:
        levels = dict(zip(documents, image.axes, strict=True))
        method = method_of(image.job, image.plan.output) if len(levels) > 1 else None
        return image_metadata(levels, self._format, method, label_values(image.plan.output))

    @override
    def written(self, attributes: dict[str, Any]) -> dict[str, str]:
        if self._format == 2:
            return {".zgroup": json.dumps({"zarr_format": 2}), ".zattrs": to_text(attributes)}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        return {"zarr.json": to_text(group)}

    @override
    def stored_attributes(self, objects: ObjectFolder) -> dict[str, Any]:
        document = {2: ".zattrs", 3: "zarr.json"}[self._format]
        stored = parsed(objects.get(document)) or {}
        attributes = stored.get("attributes") if self._format == 3 else stored
        return attributes if isinstance(attributes, dict) else {}

    @override
    def merged(self, stored: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
        ome = stored.get("ome")
        if isinstance(ome, dict) and "ome" in attributes:
            attributes = attributes | {"ome": ome | attributes["ome"]}
        return stored | attributes

    @override
    def array_names(self, attributes: dict[str, Any]) -> list[Any]:
        ome = attributes.get("ome", attributes)
        return [dataset["path"] for dataset in ome["multiscales"][0]["datasets"]]

    @override
    def epoch_name(self, folder: str) -> bool | None:
        match = re.fullmatch(rf"[0-9]+({EPOCH_SUFFIX})?", folder)
        return None if match is None else match[1] is not None


class PrecomputedLayout(OutputLayout):
    """A Neuroglancer precomputed volume: a folder with one folder per scale, and `info`.

    The folder of a scale is named by its voxel size. It has a document of chunkq, because the
    metadata of a scale are otherwise in `info` only, whose name has no epoch. A block has all
    channels.
    """

    has_groups: ClassVar[bool] = False
    array_document = SCALE_DOCUMENT
    other_documents = ("zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata")

    @override
    def names(self, image: StoredImage) -> tuple[str, ...]:
        return tuple(str(self._scale(image, n)["key"]) for n in range(len(image.axes)))

    @override
    def array_documents(self, image: StoredImage, level: int, name: str) -> dict[str, str]:
        from chunkq.storage.formats.precomputed_writing import ScaleDocument

        axes, spatial = image.axes[level], _spatial(image.axes[level])
        channels = [axis.size for axis in axes if axis.kind == "channel"]
        order = [0] * len(spatial)
        for stored, number in enumerate(reversed(spatial_order(spatial))):
            order[number] = stored
        is_labels = image.plan.output.has_labels
        document = ScaleDocument(
            volume_metadata(self._dtype(image), *(channels or [1]), is_labels=is_labels),
            self._scale(image, level),
            (*(SPATIAL_RANK for _ in channels), *order),
        )
        return {f"{name}/{SCALE_DOCUMENT}": document.text}

    def _scale(self, image: StoredImage, level: int) -> dict[str, Any]:
        base, spatial = _spatial(image.axes[0]), _spatial(image.axes[level])
        total = image.levels[level - 1].total if level else (1,) * len(base)
        order = spatial_order(base)
        chunk = self._block(image, level)
        first = self.first_voxels(image)
        return scale_metadata(
            [base[n] for n in order],
            [first[n] for n in order],
            [spatial[n].size for n in order],
            [total[n] for n in order],
            [chunk[n] for n in order],
            is_labels=image.plan.output.has_labels,
        )

    @staticmethod
    def _block(image: StoredImage, level: int) -> tuple[int, ...]:
        """Return the shape of a block of a scale along its spatial axes."""
        axes = zip(image.plan.storage_chunks, _spatial(image.axes[level]), strict=True)
        return tuple(min(edge, axis.size) for edge, axis in axes)

    @override
    def sizes(self, image: StoredImage, level: int) -> ObjectSizes:
        from chunkq.plan.object_sizes import ObjectSizes

        output, block = image.plan.output, self._block(image, level)
        if output.has_labels:
            part = SEGMENTATION_BLOCK[: len(block)]
            most = segmentation_bytes(max(2, output.channels))
            return ObjectSizes(block, part, most, SEGMENTATION_HEADER_BYTES, is_exact=False)
        dtype = self._dtype(image)
        return ObjectSizes(block, (1,) * len(block), dtype.itemsize * output.stored_channels)

    @staticmethod
    def _dtype(image: StoredImage) -> np.dtype[Any]:
        output = image.plan.output
        dtype = stored_dtype(output.dtype.name, is_labels=output.has_labels)
        if dtype is None:
            raise ValueError(f"no dtype for {output.dtype}")
        return dtype

    def first_voxels(self, image: StoredImage) -> list[float]:
        """Return where level 0 begins along its spatial axes, in voxels from the corner."""
        base = _spatial(image.axes[0])
        # A voxel of an output of another resolution has the position of its center.
        pairs = zip(first_voxels(base), image.scale, strict=True)
        return [first - (1 - 1 / scale) / 2 for first, scale in pairs]

    @override
    def grid(self, document: str) -> ObjectGrid:
        from chunkq.storage.formats.precomputed_writing import ScaleDocument

        return ScaleDocument.parse(document).grid

    @override
    def open(self, path: str, document: str) -> WritableArray:
        from chunkq.storage.formats.precomputed_writing import ScaleDocument, write_scale

        return write_scale(path, ScaleDocument.parse(document))

    @override
    def open_present(self, path: str, document: str) -> Array:
        from chunkq.storage.formats.precomputed_writing import ScaleDocument, read_scale

        return read_scale(path, ScaleDocument.parse(document))

    @override
    def attributes(self, image: StoredImage, documents: Mapping[str, str]) -> dict[str, Any]:
        scales = {name: json.loads(text) for name, text in documents.items()}
        volume = next(iter(scales.values()))["volume"]
        if self.other_written(image):
            volume = {**volume, SEGMENT_PROPERTIES: SEGMENT_PROPERTIES}
        return info(volume, [{"key": name, **one["scale"]} for name, one in scales.items()])

    @override
    def other_written(self, image: StoredImage) -> dict[str, str]:
        output = image.plan.output
        if not (output.has_labels and output.class_names):
            return {}
        document = segment_properties(output.class_names)
        return {f"{SEGMENT_PROPERTIES}/{INFO}": to_text(document)}

    @override
    def written(self, attributes: dict[str, Any]) -> dict[str, str]:
        return {INFO: to_text(attributes)}

    @override
    def stored_attributes(self, objects: ObjectFolder) -> dict[str, Any]:
        return parsed(objects.get(INFO)) or {}

    @override
    def array_names(self, attributes: dict[str, Any]) -> list[Any]:
        return [scale["key"] for scale in attributes["scales"]]

    @override
    def epoch_name(self, folder: str) -> bool | None:
        key = "_".join([r"[0-9.]+(e[+-]?[0-9]+)?"] * SPATIAL_RANK)
        if re.fullmatch(f"{key}{EPOCH_SUFFIX}", folder):  # an epoch can look like decimals
            return True
        return None if re.fullmatch(key, folder) is None else False


def check_volume(image: StoredImage, path: str) -> Iterator[str]:
    """Yield notes about what a precomputed volume does not hold exactly.

    `path` names the output in messages. Raises StoreError if a volume cannot hold the image, and
    JobError for keys that it does not have.
    """
    name, axes, output = without_secret(path), image.axes[0], image.plan.output
    spatial = _spatial(axes)
    leading = axes[: len(axes) - len(spatial)]
    series = leading[: len(leading) - 1] if image.plan.channel_axis else leading
    if series:
        raise _unsupported(
            f"{name}: a precomputed volume has no {series[0].kind} axis that is computed one by "
            f"one, found {series[0].name} of {series[0].size}; write a Zarr output, then run "
            "`chunkq convert` of it, or select one position in `input`"
        )
    if len(spatial) > SPATIAL_RANK:
        raise _unsupported(
            f"{name}: a precomputed volume has at most three spatial axes, found {len(spatial)}; "
            "use a Zarr output"
        )
    flipped = [axis.name for axis in spatial if axis.scale < 0]
    if flipped:
        raise _unsupported(
            f"{name}: axis {flipped[0]} runs backwards, and voxel sizes of a precomputed volume "
            "are positive; leave out `orientation`, or write a Zarr output, then run `chunkq "
            "convert` of it"
        )
    fill, skips = output.fill.item(), image.job.mask or image.job.skip_empty is not None
    if fill and (skips or output.value_range is None):
        prefix = f"outputs.{output.name}." if output.name else ""
        values = output.value_range
        remedy = "remove it" if values is None else f"set fill_value: {values.offset:g}"
        raise JobError(
            f"{prefix}fill_value: stored as {fill:g}, but what is not stored of a precomputed "
            f"volume is 0; {remedy}, or use a Zarr output",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    yield from moved(spatial, PrecomputedLayout().first_voxels(image), name)


def _unsupported(problem: str) -> StoreError:
    return StoreError(f"output: {problem}", code=ErrorCode.STORE_UNSUPPORTED)


def _spatial(axes: Sequence[Axis]) -> list[Axis]:
    return [axis for axis in axes if axis.kind == "space"]
