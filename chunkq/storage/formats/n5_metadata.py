"""Metadata documents of N5: datasets, resolution levels, and what describes the axes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from chunkq.access import Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis, kind_of_name, plain_axes, with_unique_names
from chunkq.geometry.axis_units import unit_name
from chunkq.paths import is_web, join, open_filesystem, without_secret
from chunkq.storage.formats.zarr_nodes import (
    MAX_CANDIDATES,
    MAX_MEMBERS,
    metadata_error,
    read_document,
)

ATTRIBUTES = "attributes.json"
"""Name of the document of an N5 dataset or group."""
NAMED_BY_N5 = "N5 metadata"
PARENTS = 2
"""Groups above a dataset whose attributes describe its axes too."""
MAX_LEVELS = 64
DTYPES = frozenset(
    {f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)}
    | {"float32", "float64"}
)
"""Data types of N5 that are single numbers."""
COMPRESSIONS = ("raw", "gzip", "bzip2", "xz", "zstd", "blosc")
"""Compressions of N5 that tensorstore reads."""


class Compression(BaseModel):
    """Entry `compression`. Its other members matter for writing only."""

    type: str
    use_zlib: bool = Field(False, alias="useZlib")

    @property
    def spec(self) -> dict[str, Any]:
        """The compression for tensorstore, which refuses members that it does not know."""
        blosc = {"cname": "lz4", "clevel": 5, "shuffle": 1}
        members: dict[str, dict[str, Any]] = {"gzip": {"useZlib": self.use_zlib}, "blosc": blosc}
        return {"type": self.type, **members.get(self.type, {})}


class Dataset(BaseModel):
    """The mandatory attributes of an N5 dataset, in stored order, x first."""

    dimensions: tuple[int, ...] = Field(min_length=1)
    block: tuple[int, ...] = Field(alias="blockSize", min_length=1)
    dtype: str = Field(alias="dataType")
    compression: Compression

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(-(-s // b) for s, b in zip(self.dimensions, self.block, strict=True))

    @property
    def metadata(self) -> dict[str, Any]:
        """The attributes that determine the voxels, for tensorstore."""
        return {
            "dimensions": list(self.dimensions),
            "blockSize": list(self.block),
            "dataType": self.dtype,
            "compression": self.compression.spec,
        }


@dataclass(frozen=True)
class N5Node:
    """An N5 dataset or group, with its attributes."""

    path: str
    attributes: dict[str, Any]
    access: Access

    @property
    def is_dataset(self) -> bool:
        """Whether the node is a dataset. Otherwise it is a group."""
        return "dimensions" in self.attributes and "dataType" in self.attributes

    @cached_property
    def dataset(self) -> Dataset:
        """The mandatory attributes. Raises StoreError if they are invalid or unsupported."""
        values = dict(self.attributes)
        compression = values.get("compression", values.get("compressionType", "raw"))
        values["compression"] = (
            {"type": compression} if isinstance(compression, str) else compression
        )
        document = without_secret(join(self.path, ATTRIBUTES))
        if values["dataType"] not in DTYPES:
            raise StoreError(
                f"input: {document}: unsupported dtype {values['dataType']!r}; store the dataset "
                "with a dtype of numbers, such as uint8 or float32",
                code=ErrorCode.STORE_UNSUPPORTED,
            )
        try:
            dataset = Dataset.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise self.error(f"{where}: {first['msg']}") from error
        if dataset.compression.type not in COMPRESSIONS:
            raise StoreError(
                f"input: {document}: unsupported compression {dataset.compression.type!r}; "
                f"expected {', '.join(COMPRESSIONS)}; store the dataset with one of them, or as "
                "Zarr",
                code=ErrorCode.STORE_UNSUPPORTED,
            )
        if len(dataset.block) != len(dataset.dimensions) or min(dataset.block) < 1:
            raise self.error(f"blockSize {list(dataset.block)} does not fit dimensions")
        if min(dataset.dimensions) < 0:
            raise self.error(f"dimensions {list(dataset.dimensions)} are negative")
        return dataset

    def error(self, reason: str) -> StoreError:
        """Return the error for attributes that are invalid."""
        return metadata_error(self.path, ATTRIBUTES, reason, "N5")

    def level_paths(self) -> list[str]:
        """Return the paths of the levels of a group, relative to it; empty without any.

        They are those of the attribute `multiscales`, else the datasets s0, s1, ….
        """
        if paths := [path for path, _ in _multiscale_datasets(self.attributes)]:
            return paths
        paths = []
        for number in range(MAX_LEVELS):
            node = read_n5_node(join(self.path, f"s{number}"), self.access)
            if node is None or not node.is_dataset:
                break
            paths.append(f"s{number}")
        return paths

    def axes(self) -> tuple[tuple[Axis, ...], str]:
        """Return the axes of a dataset as presented, and what names them; empty if nothing does."""
        return described_axes(
            self.attributes,
            _parents(self.path, self.access),
            self.path.rpartition("/")[2],
            self.dataset.dimensions[::-1],
        )


def read_n5_node(path: str, access: Access) -> N5Node | None:
    """Return the N5 node at a path that has attributes, or None.

    Raises StoreError if they are invalid, and the storage's error if they cannot be read.
    """
    content = read_document(path, ATTRIBUTES, access)
    return None if content is None else parse_n5_node(path, content, access)


def parse_n5_node(path: str, content: bytes, access: Access) -> N5Node:
    """Return the N5 node with these attributes. Raises StoreError if they are invalid."""
    try:
        attributes = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise metadata_error(path, ATTRIBUTES, f"not JSON: {error}", "N5") from None
    if not isinstance(attributes, dict):
        raise metadata_error(path, ATTRIBUTES, "not a mapping", "N5")
    return N5Node(path, attributes, access)


def group_members(path: str, access: Access) -> list[str]:
    """Return the names of some folders directly inside a group, for a message."""
    try:
        filesystem, inner = open_filesystem(path, access)
        entries = [] if is_web(path) else filesystem.ls(inner, detail=True)
    except Exception:  # a message without this list is better than another error
        return []
    folders = (entry["name"] for entry in entries if entry["type"] == "directory")
    names = sorted(name.rstrip("/").rpartition("/")[2] for name in folders)
    return names[:MAX_CANDIDATES][:MAX_MEMBERS]


def _parents(path: str, access: Access) -> list[dict[str, Any]]:
    """Return the attributes of the groups above a dataset, up to the root of its container."""
    parents: list[dict[str, Any]] = []
    parent = path.rstrip("/")
    for _ in range(PARENTS):
        parent = parent.rpartition("/")[0]
        if not parent or parent.endswith(":/"):
            break
        try:
            node = read_n5_node(parent, access)
        except Exception:  # each file system raises different errors
            break
        if node is not None:
            parents.append(node.attributes)
            if "n5" in node.attributes:
                break
    return parents


def described_axes(
    attributes: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]],
    name: str,
    shape: Sequence[int],
) -> tuple[tuple[Axis, ...], str]:
    """Return the axes of a dataset of this name and presented shape, and what names them.

    The first that exists counts, in the dataset and then in the groups above: `transform` (COSEM),
    which is in presented order unless it says otherwise, and in stored order `axes`,
    `pixelResolution` or `resolution`, `units`, `downsamplingFactors` or `scales`, and `offset`.
    A voxel of a downsampled level is in the middle of the voxels that it is made of.
    """
    rank, nodes = len(shape), [attributes, *parents]
    transform = _transform(nodes, name, rank)
    names = _strings(transform.get("axes"), rank)
    if names is not None:
        scale = _numbers(transform.get("scale"), rank) or [1.0] * rank
        translation = _numbers(transform.get("translate"), rank) or [0.0] * rank
        units: Sequence[str | None] = _strings(transform.get("units"), rank) or [None] * rank
    else:
        stored = next(filter(None, (_strings(_names(n.get("axes")), rank) for n in nodes)), None)
        names = None if stored is None else stored[::-1]
        spatial = [n for n in range(rank) if kind_of_name((stored or ["x"] * rank)[n]) == "space"]
        size, units = _resolution(nodes, rank, spatial)
        factors = _spread(_factors(nodes, name), rank, spatial, 1.0)
        offset = _spread(_first(nodes, "offset"), rank, spatial, 0.0)
        scale = [s * f for s, f in zip(size, factors, strict=True)][::-1]
        middle = [s * (f - 1) / 2 for s, f in zip(size, factors, strict=True)]
        translation = [o + m for o, m in zip(offset, middle, strict=True)][::-1]
        units = units[::-1]
    described = [
        Axis(
            plain.name if names is None else names[n],
            plain.kind if names is None else kind_of_name(names[n]),
            plain.size,
            unit_name(units[n]),
            scale[n] or 1.0,
            translation[n],
        )
        for n, plain in enumerate(plain_axes(shape))
    ]
    return with_unique_names(described), "" if names is None else NAMED_BY_N5


def _transform(nodes: Sequence[Mapping[str, Any]], name: str, rank: int) -> Mapping[str, Any]:
    """Return the COSEM transform of a dataset in presented order; empty without one."""
    candidates = [nodes[0].get("transform")]
    for parent in nodes[1:]:
        datasets = _multiscale_datasets(parent)
        candidates += [t for path, t in datasets if path.rpartition("/")[2] == name]
    for transform in candidates:
        if isinstance(transform, dict) and _strings(transform.get("axes"), rank) is not None:
            if transform.get("ordering", transform.get("order")) != "F":
                return transform
            return {k: v[::-1] if isinstance(v, list) else v for k, v in transform.items()}
    return {}


def _multiscale_datasets(attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return path and transform of the datasets of the attribute `multiscales`."""
    images = attributes.get("multiscales")
    first = images[0] if isinstance(images, list) and images else None
    datasets = first.get("datasets") if isinstance(first, dict) else None
    if not isinstance(datasets, list):
        return []
    entries = [entry for entry in datasets if isinstance(entry, dict) and entry.get("path")]
    return [(str(entry["path"]).strip("/"), entry.get("transform")) for entry in entries]


def _resolution(
    nodes: Sequence[Mapping[str, Any]], rank: int, spatial: Sequence[int]
) -> tuple[list[float], list[str | None]]:
    """Return voxel size and units in stored order."""
    listed = next(filter(None, (_strings(node.get("units"), rank) for node in nodes)), None)
    for node in nodes:
        for key in ("pixelResolution", "resolution"):
            value = node.get(key)
            value, unit = (
                (value.get("dimensions"), value.get("unit"))
                if isinstance(value, dict)
                else (value, None)
            )
            size = _spread(value, rank, spatial, 0.0)
            if any(size):
                units = [unit if number else None for number in size]
                return [number or 1.0 for number in size], [*listed] if listed else units
    nothing: list[str | None] = [None] * rank
    return [1.0] * rank, [*listed] if listed else nothing


def _factors(nodes: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the downsampling factors of a level in stored order, or None."""
    own = nodes[0].get("downsamplingFactors")
    if own is not None:
        return own
    number = int(name[1:]) if name[:1] == "s" and name[1:].isdecimal() else None
    for parent in nodes[1:]:
        for key in ("downsamplingFactors", "scales"):
            factors = parent.get(key)
            if number is not None and isinstance(factors, list) and number < len(factors):
                return factors[number]
    return None


def _first(nodes: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((node[key] for node in nodes if key in node), None)


def _spread(values: Any, rank: int, spatial: Sequence[int], default: float) -> list[float]:
    """Return one number per axis, of values for all axes or for the spatial ones."""
    if (numbers := _numbers(values, rank)) is not None:
        return numbers
    spread = [default] * rank
    for axis, number in zip(spatial, _numbers(values, len(spatial)) or [], strict=False):
        spread[axis] = number
    return spread


def _names(axes: Any) -> Any:
    """Return the names of axes, which can be mappings with `name` or `label`."""
    if not isinstance(axes, list):
        return None
    return [a.get("name", a.get("label")) if isinstance(a, dict) else a for a in axes]


def _numbers(values: Any, count: int) -> list[float] | None:
    """Return a list of so many finite numbers, or None for anything else."""
    try:
        numbers = TypeAdapter(list[FiniteFloat]).validate_python(values)
    except ValidationError:
        return None
    return numbers if len(numbers) == count else None


def _strings(values: Any, count: int) -> list[str] | None:
    """Return a list of so many strings, or None for anything else."""
    if not isinstance(values, list) or len(values) != count:
        return None
    return values if all(isinstance(value, str) for value in values) else None
