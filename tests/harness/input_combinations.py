"""One small image, written by independent tools in every way that they offer.

To add a tool, write a function that yields `Combination`s and add it to `TOOLS`.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.storage.formats.registry import BUILT_IN
from tests.harness.all_pairs import Row, all_pairs

SHAPE = (9, 8, 7)
CHUNKS = (4, 4, 4)
FIXTURES = Path(__file__).parents[1] / "fixtures"
"""Folder with the images of tools that need an environment of their own (`make parity`)."""
ONE_BYTE = ("bool", "uint8", "int8")
DTYPES = (
    *ONE_BYTE,
    *(
        f"{order}{kind}"
        for kind in ("u2", "i2", "u4", "i4", "i8", "f2", "f4", "f8")
        for order in "<>"
    ),
)
NATIVE = tuple(dict.fromkeys(np.dtype(dtype).newbyteorder("=").name for dtype in DTYPES))
Voxels = npt.NDArray[Any]


def image(dtype: str) -> Voxels:
    """Return the image: integers from 0 to 100 that every dtype holds, or bool."""
    values = np.random.default_rng(7).integers(0, 101, SHAPE)
    return values > 50 if dtype == "bool" else values.astype(dtype)


@dataclass(frozen=True)
class Combination:
    """A way in which a tool stores the image.

    `write(path, values)` stores an array at a path without suffix and returns the path of the
    input. `keys` are other keys of the input that present it as z, y, x.
    """

    tool: str
    form: str
    dtype: str
    write: Callable[[Path, Voxels], str] = field(compare=False)
    keys: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.tool} {self.form} {self.dtype}"


def _named(row: Row) -> str:
    """Return the options of a row but the dtype, for the name of a test."""
    return " ".join(str(value) for key, value in row.items() if key != "dtype")


# ------------------------------------------------------------------------- zarr-python


def zarr_v2() -> Iterator[Combination]:
    axes = {
        "dtype": DTYPES,
        "compressor": ("none", "zlib", "gzip", "bz2", "lzma", "zstd", "lz4", "blosc"),
        "order": ("C", "F"),
        "separator": (".", "/"),
    }
    for row in all_pairs(axes):
        yield Combination("zarr-python", f"v2 {_named(row)}", row["dtype"], partial(_write_v2, row))


def _write_v2(row: Row, path: Path, values: Voxels) -> str:
    import numcodecs
    import zarr

    compressors: dict[str, Any] = {
        "none": None,
        "zlib": numcodecs.Zlib(),
        "gzip": numcodecs.GZip(),
        "bz2": numcodecs.BZ2(),
        "lzma": numcodecs.LZMA(),
        "zstd": numcodecs.Zstd(),
        "lz4": numcodecs.LZ4(),
        "blosc": numcodecs.Blosc(cname="zstd", shuffle=1),
    }
    keys: Any = {"name": "v2", "separator": row["separator"]}
    array = zarr.create_array(
        f"{path}.zarr",
        shape=values.shape,
        chunks=CHUNKS,
        dtype=values.dtype,
        zarr_format=2,
        order=row["order"],
        compressors=compressors[row["compressor"]],
        chunk_key_encoding=keys,
    )
    array[...] = values
    return f"{path}.zarr"


def zarr_v3() -> Iterator[Combination]:
    axes = {
        "dtype": DTYPES,
        "compressor": ("none", "gzip", "zstd", "blosc", "crc32c"),
        "order": ("C", "F"),
        "keys": ("default/", "default.", "v2/", "v2."),
        "shards": ("unsharded", "sharded"),
    }
    for row in all_pairs(axes):
        yield Combination("zarr-python", f"v3 {_named(row)}", row["dtype"], partial(_write_v3, row))


def _write_v3(row: Row, path: Path, values: Voxels) -> str:
    import zarr
    from zarr.codecs import (
        BloscCodec,
        BytesCodec,
        Crc32cCodec,
        GzipCodec,
        TransposeCodec,
        ZstdCodec,
    )

    compressors: dict[str, Any] = {
        "none": None,
        "gzip": GzipCodec(),
        "zstd": ZstdCodec(),
        "blosc": BloscCodec(cname="lz4"),
        "crc32c": Crc32cCodec(),
    }
    native = values.dtype.newbyteorder("=")
    keys: Any = {"name": row["keys"][:-1], "separator": row["keys"][-1]}
    array = zarr.create_array(
        f"{path}.zarr",
        shape=values.shape,
        chunks=CHUNKS,
        shards=(8, 8, 8) if row["shards"] == "sharded" else None,
        dtype=native,
        serializer=BytesCodec(endian="little" if values.dtype == native else "big"),
        filters=TransposeCodec(order=(2, 1, 0)) if row["order"] == "F" else None,
        compressors=compressors[row["compressor"]],
        chunk_key_encoding=keys,
    )
    array[...] = values
    return f"{path}.zarr"


# ------------------------------------------------------------------------- NumPy


def npy() -> Iterator[Combination]:
    axes = {"dtype": DTYPES, "order": ("C", "F"), "version": ((1, 0), (2, 0), (3, 0))}
    for row in all_pairs(axes):
        yield Combination("NumPy", f"npy {_named(row)}", row["dtype"], partial(_write_npy, row))


def _write_npy(row: Row, path: Path, values: Voxels) -> str:
    with open(f"{path}.npy", "wb") as file:
        np.lib.format.write_array(file, np.array(values, order=row["order"]), row["version"])
    return f"{path}.npy"


# ------------------------------------------------------------------------- tensorstore


def n5() -> Iterator[Combination]:
    axes = {
        "dtype": [name for name in NATIVE if name not in ("bool", "float16")],
        "compression": ("raw", "gzip", "zlib", "bzip2", "xz", "zstd", "blosc"),
        "place": ("dataset", "level", "named"),
    }
    for row in all_pairs(axes):
        yield Combination("tensorstore", f"n5 {_named(row)}", row["dtype"], partial(_write_n5, row))


def _write_n5(row: Row, path: Path, values: Voxels) -> str:
    compressions: dict[str, Any] = {
        "zlib": {"type": "gzip", "useZlib": True},
        "blosc": {"type": "blosc", "cname": "zlib", "clevel": 3, "shuffle": 1},
    }
    kind = row["compression"]
    metadata = {"compression": compressions.get(kind, {"type": kind}), "blockSize": CHUNKS[::-1]}
    is_level = row["place"] == "level"
    folder = f"{path}.n5/s0/" if is_level else f"{path}.n5/"
    _write_store({"driver": "n5", "metadata": metadata}, folder, values.T)
    return f"n5://{path}.n5" if row["place"] == "named" else f"{path}.n5"


def precomputed() -> Iterator[Combination]:
    axes = {
        "dtype": [name for name in NATIVE if name not in ("bool", "int64", "float16", "float64")],
        "encoding": ("raw", "png", "compressed_segmentation"),
        "shards": ("unsharded", "identity raw", "identity gzip", "murmurhash3_x86_128 gzip"),
        "offset": ((0, 0, 0), (100, 5, -20)),
        "place": ("found", "named"),
    }
    dtypes = {"png": ("uint8", "uint16"), "compressed_segmentation": ("uint32",)}
    for row in all_pairs(axes, lambda r: r["dtype"] in dtypes.get(r["encoding"], axes["dtype"])):
        yield Combination(
            "tensorstore",
            f"precomputed {_named(row)}",
            row["dtype"],
            partial(_write_precomputed, row),
        )


def _write_precomputed(row: Row, path: Path, values: Voxels) -> str:
    sharding = None
    if row["shards"] != "unsharded":
        hash_name, encoding = row["shards"].split()
        sharding = {
            "@type": "neuroglancer_uint64_sharded_v1",
            "hash": hash_name,
            "preshift_bits": 1,
            "minishard_bits": 2,
            "shard_bits": 2,
            "minishard_index_encoding": encoding,
            "data_encoding": encoding,
        }
    scale: dict[str, Any] = {
        "size": values.shape[::-1],
        "voxel_offset": row["offset"],
        "resolution": (4, 4, 40),
        "chunk_size": CHUNKS[::-1],
        "encoding": row["encoding"],
        "sharding": sharding,
    }
    if row["encoding"] == "compressed_segmentation":
        scale["compressed_segmentation_block_size"] = (2, 4, 8)
    spec = {
        "driver": "neuroglancer_precomputed",
        "multiscale_metadata": {"type": "image", "num_channels": 1},
        "scale_metadata": scale,
    }
    _write_store(spec, f"{path}/", values.T[..., np.newaxis])
    return f"precomputed://{path}" if row["place"] == "named" else str(path)


def _write_store(spec: dict[str, Any], folder: str, values: Voxels) -> None:
    import tensorstore as ts

    spec = {**spec, "kvstore": {"driver": "file", "path": folder}}
    shape = values.shape if spec["driver"] == "n5" else None
    store = ts.open(spec, create=True, dtype=values.dtype, shape=shape).result()
    store[ts.d[:].translate_to[0]].write(values).result()


# ------------------------------------------------------------------------- files


def tiff() -> Iterator[Combination]:
    axes = {
        "dtype": [dtype for dtype in DTYPES if dtype != "bool"],
        "layout": ("contiguous", "pages", "strips", "tiles", "BigTIFF", "OME-TIFF", "stack"),
        "compression": ("none", "zlib", "lzw", "zstd", "packbits"),
    }

    def is_possible(row: Row) -> bool:
        return row["layout"] != "OME-TIFF" or row["dtype"][-2:] not in ("i8", "f2")

    for row in all_pairs(axes, is_possible):
        yield Combination("tifffile", f"tiff {_named(row)}", row["dtype"], partial(_tiff, row))


def _tiff(row: Row, path: Path, values: Voxels) -> str:
    from tests.harness.written_tiff import write_stack, write_tiff

    options = {"compression": row["compression"]}
    if row["layout"] == "stack":
        return write_stack(path, values, **options)
    write_tiff(f"{path}.tif", values, row["layout"], axes="ZYX", **options)
    return f"{path}.tif"


def hdf5() -> Iterator[Combination]:
    layouts = ("contiguous", "chunks", "gzip", "lzf", "shuffle", "checksum")
    for row in all_pairs({"dtype": DTYPES, "layout": layouts, "name": ("raw", "a/b/raw")}):
        yield Combination("h5py", f"hdf5 {_named(row)}", row["dtype"], partial(_hdf5, row))


def _hdf5(row: Row, path: Path, values: Voxels) -> str:
    from tests.harness.written_hdf5 import write_hdf5

    return write_hdf5(f"{path}.h5", values, row["layout"], name=row["name"])


def nifti() -> Iterator[Combination]:
    axes = {
        "dtype": [dtype for dtype in DTYPES if dtype[-2:] not in ("ol", "f2")],
        "suffix": (".nii", ".nii.gz"),
        "version": (1, 2),
    }
    for row in all_pairs(axes):
        yield Combination("nibabel", f"nifti {_named(row)}", row["dtype"], partial(_nifti, row))


def _nifti(row: Row, path: Path, values: Voxels) -> str:
    from tests.harness.nifti import write_nifti

    endianness = ">" if row["dtype"].startswith(">") else "<"
    file = f"{path}{row['suffix']}"
    write_nifti(file, values, version=row["version"], endianness=endianness)
    return file


# ------------------------------------------------------------------------- fixtures


def fixtures() -> Iterator[Combination]:
    """Yield the images that `tests/fixtures/write_inputs.py` has written with other tools."""
    for file in sorted(FIXTURES.glob("*.zip")):
        with zipfile.ZipFile(file) as archive:
            rows = json.loads(archive.read("manifest.json"))
        for row in rows:
            yield Combination(file.stem, row["form"], row["dtype"], partial(_unpack, file, row))


def _unpack(file: Path, row: Row, path: Path, values: Voxels) -> str:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{row['folder']}/")]
        archive.extractall(path.parent, names)
    target = path.with_suffix(row["suffix"])
    (path.parent / row["folder"]).rename(target)
    return row["scheme"] + str(target) + row["inner"]


TOOLS: tuple[tuple[str, Callable[[], Iterator[Combination]]], ...] = (
    ("zarr", zarr_v2),
    ("zarr", zarr_v3),
    ("npy", npy),
    ("n5", n5),
    ("precomputed", precomputed),
    ("tiff", tiff),
    ("hdf5", hdf5),
    ("nifti", nifti),
    ("zarr", fixtures),
)
"""Format that must be built in, and the combinations of a tool."""


@cache
def all_combinations() -> tuple[Combination, ...]:
    """Return the combinations of all tools whose format is built in."""
    tools = (rows for name, rows in TOOLS if name in BUILT_IN)
    return tuple(combination for rows in tools for combination in rows())
