"""Arrays that are written object by object, with a checksum of each."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import pytest

from chunkq.geometry.box import Box
from chunkq.storage.checksums import NOT_STORED, object_checksum
from chunkq.storage.formats import zarr_writing
from chunkq.storage.formats.zarr import ZARR_FORMAT, ZarrFormat
from chunkq.storage.formats.zarr_arrays import TensorStoreArray
from chunkq.storage.formats.zarr_writing import (
    WritableArray,
    array_metadata,
)

SHAPE, CHUNK = (1, 9, 13, 8), (1, 4, 5, 4)
BOX = Box((0, 4, 0, 0), (1, 9, 13, 8))


def new_array(path: str, zarr_format: Literal[2, 3], dtype: str) -> None:
    metadata = array_metadata(
        "0", shape=SHAPE, chunks=CHUNK, dtype=dtype, fill_value=7, zarr_format=zarr_format,
        axes=None,
    )  # fmt: skip
    filesystem, inner = fsspec.core.url_to_fs(path)
    filesystem.makedirs(inner, exist_ok=True)
    for name, text in metadata.items():
        filesystem.pipe_file(f"{inner}/{name.removeprefix('0/')}", text.encode())


def values(dtype: str) -> npt.NDArray[Any]:
    """Voxels of `BOX`; one object has the fill value only."""
    array = np.random.default_rng(0).integers(0, 200, BOX.shape).astype(dtype)
    array[:, :4, 5:10, :4] = 7
    return array


def objects(path: str) -> dict[str, bytes]:
    filesystem, inner = fsspec.core.url_to_fs(path)
    names = filesystem.find(inner)
    return {name.removeprefix(f"{inner}/"): filesystem.cat_file(name) for name in names}


def written(path: str, zarr_format: Literal[2, 3], dtype: str) -> tuple[WritableArray, list[int]]:
    new_array(path, zarr_format, dtype)
    array = ZarrFormat().open_for_writing(path, {ZARR_FORMAT: zarr_format})
    return array, array.store(BOX, values(dtype))


@pytest.mark.parametrize("slab_bytes", [1, 200, 1 << 20])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_checksums_are_those_of_the_objects_that_tensorstore_would_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zarr_format: Literal[2, 3],
    dtype: str,
    slab_bytes: int,
) -> None:
    monkeypatch.setattr(zarr_writing, "SLAB_BYTES", slab_bytes)
    _, checksums = written(f"{tmp_path}/a", zarr_format, dtype)
    new_array(f"{tmp_path}/b", zarr_format, dtype)
    TensorStoreArray(f"{tmp_path}/b", zarr_format, write=True).write(BOX, values(dtype))
    stored = objects(f"{tmp_path}/a")
    assert stored == objects(f"{tmp_path}/b")
    prefix, separator = ("c/", "/") if zarr_format == 3 else ("", "/")
    names = [
        prefix + separator.join(map(str, (0, i, j, k)))
        for i in (1, 2) for j in (0, 1, 2) for k in (0, 1)
    ]  # fmt: skip
    assert checksums == [
        zlib.crc32(stored[name]) if name in stored else NOT_STORED for name in names
    ]
    assert checksums.count(NOT_STORED) == 1


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_storage_that_tensorstore_does_not_access_gets_the_same_objects(
    tmp_path: Path, zarr_format: Literal[2, 3]
) -> None:
    url = f"memory://{tmp_path.name}-{zarr_format}"
    array, checksums = written(url, zarr_format, "uint16")
    _, local_checksums = written(f"{tmp_path}/a", zarr_format, "uint16")
    assert checksums == local_checksums
    assert objects(url) == objects(f"{tmp_path}/a")
    np.testing.assert_array_equal(array.read(BOX), values("uint16"))


def test_an_object_never_has_the_checksum_of_one_that_is_not_stored() -> None:
    assert object_checksum(NOT_STORED) != NOT_STORED
    assert object_checksum(5) == 5


def test_arrays_with_an_axis_of_length_1_lose_no_object(tmp_path: Path) -> None:
    shape, chunk = (1, 5, 9, 8, 9), (1, 2, 4, 4, 4)
    metadata = array_metadata(
        "0", shape=shape, chunks=chunk, dtype="float32", fill_value=0, zarr_format=3, axes=None
    )
    (tmp_path / "zarr.json").write_text(metadata["0/zarr.json"])
    array = ZarrFormat().open_for_writing(str(tmp_path), {ZARR_FORMAT: 3})
    noise = np.random.default_rng(0).random(shape, np.float32)
    box = Box.of_shape(shape)
    assert NOT_STORED not in array.store(box, noise)
    np.testing.assert_array_equal(array.read(box), noise)
