"""The contract of every format of inputs; see chunkq/storage/formats/base.py.

A new format is a function that writes an array and an entry of FORMS. All tests then run for it.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import fsspec
import numcodecs
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from pydantic import TypeAdapter
from zarr.codecs import BytesCodec

from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.storage.formats import gzip_file
from chunkq.storage.formats.precomputed import ShardedArray
from chunkq.storage.formats.registry import BUILT_IN
from chunkq.storage.formats.tensorstore_arrays import FetchedArray, StoreArray
from chunkq.storage.formats.tiff_stack import StackArray
from chunkq.storage.formats.zarr_arrays import TensorStoreArray, ZarrPythonArray
from chunkq.storage.images import ImageSource, find_source
from tests.harness.nifti import write_nifti, write_pair
from tests.harness.packages import install_package
from tests.harness.volumes import random_volume
from tests.harness.written_hdf5 import write_hdf5
from tests.harness.written_tiff import write_stack, write_tiff

OUTSIDE = Path(__file__).parents[1] / "outside_format"
SECRET = "geheim42"
SHAPE = (13, 10, 11)
BOXES = [
    Box((0, 0, 0), (1, 1, 1)),
    Box((12, 9, 10), (13, 10, 11)),
    Box((0, 0, 10), (13, 1, 11)),
    Box((3, 2, 5), (11, 9, 10)),
    Box((4, 4, 4), (8, 8, 8)),
    Box.of_shape(SHAPE),
]
DOCUMENTS = (".json", ".zarray", ".zattrs", "/info")
Voxels = npt.NDArray[Any]


def write_npy(path: str, values: Voxels) -> None:
    with fsspec.open(path, "wb") as file:
        np.save(file, values)


def write_fortran(path: str, values: Voxels) -> None:
    write_npy(path, np.asfortranarray(values))


def write_zarr(
    path: str,
    values: Voxels,
    *,
    zarr_format: int = 3,
    attributes: dict[str, Any] | None = None,
    name: str | None = None,
    **options: Any,
) -> None:
    """Write an array, at a name inside an OME-Zarr image if `attributes` describe one."""
    if attributes is not None:
        zarr.create_group(path, zarr_format=zarr_format, attributes=attributes, overwrite=True)
    native = values.dtype.newbyteorder("=")
    if zarr_format == 3:
        options["serializer"] = BytesCodec(endian="little" if values.dtype == native else "big")
    array = zarr.create_array(
        path,
        name=name,
        shape=values.shape,
        chunks=(4, 4, 4),
        dtype=native if zarr_format == 3 else values.dtype,
        zarr_format=zarr_format,
        fill_value=7,
        overwrite=True,
        **options,
    )
    array[...] = values


def write_sharded(path: str, values: Voxels) -> None:
    write_zarr(path, values, shards=(8, 8, 8))


def write_v2(path: str, values: Voxels) -> None:
    write_zarr(path, values, zarr_format=2)


def write_nested(path: str, values: Voxels) -> None:
    """Write an array whose chunks are nested although its metadata do not say so."""
    write_zarr(path, values, zarr_format=2, chunk_key_encoding={"name": "v2", "separator": "/"})
    change(path, ".zarray", lambda document: document.pop("dimension_separator"))


def write_flat(path: str, values: Voxels) -> None:
    """Write an array whose chunks have names with dots although its metadata name slashes."""
    write_zarr(path, values, chunk_key_encoding={"name": "default", "separator": "."})
    encoding = {"name": "default", "configuration": {"separator": "/"}}
    change(path, "zarr.json", lambda document: document.update(chunk_key_encoding=encoding))


def write_v2_in_fortran_order(path: str, values: Voxels) -> None:
    write_zarr(path, values, zarr_format=2, order="F")


def change(path: str, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON document of an array."""
    filesystem, inner = fsspec.core.url_to_fs(f"{path}/{name}")
    document = json.loads(filesystem.cat_file(inner))
    edit(document)
    filesystem.pipe_file(inner, json.dumps(document).encode())


def write_filtered(path: str, values: Voxels) -> None:
    write_zarr(path, values, zarr_format=2, filters=[numcodecs.Shuffle(values.dtype.itemsize)])


def write_image(path: str, values: Voxels) -> None:
    image = {"axes": [{"name": name, "type": "space"} for name in "zyx"]}
    image["datasets"] = [{"path": "full"}]  # type: ignore[list-item]
    attributes = {"ome": {"version": "0.5", "multiscales": [image]}}
    write_zarr(path, values, attributes=attributes, name="full")


def upload(folder: Path, path: str) -> None:
    """Copy the files of a folder to a path or URL."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    for file in filter(Path.is_file, folder.rglob("*")):
        name = f"{inner}/{file.relative_to(folder)}"
        filesystem.makedirs(name.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(name, file.read_bytes())


def write_n5(path: str, values: Voxels, name: str = "", compression: str = "gzip") -> None:
    metadata = {"blockSize": [4, 4, 4], "compression": {"type": compression}}
    with TemporaryDirectory() as folder:
        if name:
            (Path(folder) / "attributes.json").write_text('{"n5": "4.0.0", "multiScale": true}')
        write_store("n5", str(Path(folder, name)), values.T, metadata=metadata)
        upload(Path(folder), path)


def write_n5_group(path: str, values: Voxels) -> None:
    write_n5(path, values, "s0", "raw")


def write_precomputed(path: str, values: Voxels, sharding: dict[str, Any] | None = None) -> None:
    scale = {
        "size": values.shape[::-1],
        "voxel_offset": [100, 0, -20],
        "resolution": [4, 4, 40],
        "chunk_size": [4, 4, 4],
        "encoding": "raw",
        "sharding": sharding,
    }
    with TemporaryDirectory() as folder:
        stored = values.T[..., np.newaxis]
        write_store("neuroglancer_precomputed", folder, stored, scale_metadata=scale)
        upload(Path(folder), path)


def write_sharded_precomputed(path: str, values: Voxels) -> None:
    bits = {"preshift_bits": 1, "minishard_bits": 2, "shard_bits": 3}
    kind = {"@type": "neuroglancer_uint64_sharded_v1", "hash": "murmurhash3_x86_128"}
    write_precomputed(path, values, kind | bits | {"data_encoding": "gzip"})


def write_gzipped_precomputed(path: str, values: Voxels) -> None:
    """Write a volume whose blocks are gzip files, as cloud-volume does on local disks."""
    write_precomputed(path, values)
    for file in Path(path).glob("*/*-*"):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()


def write_store(driver: str, folder: str, values: Voxels, **metadata: Any) -> None:
    """Write an array with tensorstore, in the order of the driver's axes."""
    import tensorstore as ts

    native = values.astype(values.dtype.newbyteorder("="))
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/"}, **metadata}
    if driver != "n5":
        spec["multiscale_metadata"] = {"type": "image", "num_channels": 1}
    store = ts.open(
        spec, create=True, delete_existing=True, dtype=native.dtype,
        shape=None if driver != "n5" else native.shape,
    ).result()  # fmt: skip
    store[ts.d[:].translate_to[0]].write(native).result()


def write_image_of_nifti(path: str, values: Voxels, **options: Any) -> None:
    endianness = "<" if values.dtype == values.dtype.newbyteorder("<") else ">"
    write_nifti(path, values, endianness=endianness, **options)


def write_nifti_2(path: str, values: Voxels) -> None:
    write_image_of_nifti(path, values, version=2)


def write_pair_of_nifti(path: str, values: Voxels) -> None:
    endianness = "<" if values.dtype == values.dtype.newbyteorder("<") else ">"
    write_pair(path, values, endianness=endianness)


def write_tiff_in(layout: str, compression: str = "none") -> Callable[[str, Voxels], None]:
    def write(path: str, values: Voxels) -> None:
        write_tiff(path, values, layout, compression=compression, axes="ZYX")

    return write


def write_slices(path: str, values: Voxels) -> None:
    """Write a stack of files that match the pattern `FOLDER/*.tif`."""
    write_stack(path.rpartition("/")[0], values, layout="strips", compression="zlib")


def write_hdf5_in(layout: str) -> Callable[[str, Voxels], None]:
    def write(path: str, values: Voxels) -> None:
        write_hdf5(hdf5_file(path), values, layout)

    return write


def hdf5_file(path: str) -> str:
    """Return the file of a path inside an HDF5 file; another path unchanged."""
    return path.partition(".h5/")[0] + ".h5" if ".h5/" in path else path


def write_toy(path: str, values: Voxels) -> None:
    import toy

    toy.write_toy(Path(path), values)


@dataclass(frozen=True)
class Form:
    """A way to store an array: its format, the start and end of its path, and how to write it.

    `array` is the class that reads it. `has_chunks` says whether storage chunks can be missing,
    which are read as `fill`. `is_streamed` says that the array is read from the start of its file
    as if it were large.
    """

    format: str
    suffix: str
    write: Callable[[str, Voxels], None]
    scheme: str = ""
    array: type | None = None
    has_chunks: bool = True
    fill: int = 7
    is_streamed: bool = False


FORMS = {
    "npy": Form("npy", ".npy", write_npy, has_chunks=False),
    "npy at a URL": Form("npy", ".npy", write_npy, "memory://", has_chunks=False),
    "npy in Fortran order": Form("npy", ".npy", write_fortran, has_chunks=False),
    "npy in Fortran order at a URL": Form(
        "npy", ".npy", write_fortran, "memory://", has_chunks=False
    ),
    "nifti": Form("nifti", ".nii", write_image_of_nifti, has_chunks=False),
    "nifti 2": Form("nifti", ".nii", write_nifti_2, has_chunks=False),
    "compressed nifti": Form("nifti", ".nii.gz", write_image_of_nifti, has_chunks=False),
    "pair of nifti": Form("nifti", ".img", write_pair_of_nifti, has_chunks=False),
    "nifti at a URL": Form("nifti", ".nii", write_image_of_nifti, "memory://", has_chunks=False),
    "compressed nifti at a URL": Form(
        "nifti", ".nii.gz", write_nifti_2, "memory://", has_chunks=False
    ),
    "streamed nifti": Form(
        "nifti", ".nii.gz", write_image_of_nifti, has_chunks=False, is_streamed=True
    ),
    "streamed nifti at a URL": Form(
        "nifti", ".nii.gz", write_image_of_nifti, "memory://", has_chunks=False, is_streamed=True
    ),
    "zarr v2": Form("zarr", ".zarr", write_v2, array=TensorStoreArray),
    "zarr v3": Form("zarr", ".zarr", write_zarr, array=TensorStoreArray),
    "sharded zarr": Form("zarr", ".zarr", write_sharded, array=TensorStoreArray),
    "ome-zarr": Form("zarr", ".zarr", write_image, array=TensorStoreArray),
    "zarr with a filter": Form("zarr", ".zarr", write_filtered, array=ZarrPythonArray),
    "zarr v2 in Fortran order": Form(
        "zarr", ".zarr", write_v2_in_fortran_order, array=TensorStoreArray
    ),
    "zarr v2 with nested chunks": Form("zarr", ".zarr", write_nested, array=TensorStoreArray),
    "zarr v3 with flat chunks": Form("zarr", ".zarr", write_flat, array=TensorStoreArray),
    "zarr v2 with nested chunks at a URL": Form(
        "zarr", ".zarr", write_nested, "memory://", ZarrPythonArray
    ),
    "zarr v2 at a URL": Form("zarr", ".zarr", write_v2, "memory://", ZarrPythonArray),
    "zarr v3 at a URL": Form("zarr", ".zarr", write_zarr, "memory://", ZarrPythonArray),
    "n5": Form("n5", ".n5", write_n5, array=StoreArray, fill=0),
    "n5 group with levels": Form("n5", ".n5", write_n5_group, array=StoreArray, fill=0),
    "n5 at a URL": Form("n5", ".n5", write_n5, "memory://", FetchedArray, fill=0),
    "precomputed": Form("precomputed", "", write_precomputed, array=StoreArray, fill=0),
    "precomputed with shards": Form(
        "precomputed", "", write_sharded_precomputed, array=ShardedArray, fill=0
    ),
    "precomputed in gzip files": Form(
        "precomputed", "", write_gzipped_precomputed, array=FetchedArray, fill=0
    ),
    "precomputed at a URL": Form(
        "precomputed", "", write_precomputed, "memory://", FetchedArray, fill=0
    ),
    "tiff": Form("tiff", ".tif", write_tiff_in("contiguous"), has_chunks=False),
    "tiff in strips": Form("tiff", ".TIF", write_tiff_in("strips", "zlib"), has_chunks=False),
    "tiff in tiles": Form("tiff", ".tiff", write_tiff_in("tiles", "zlib"), has_chunks=False),
    "ome-tiff": Form("tiff", ".ome.tif", write_tiff_in("OME-TIFF"), has_chunks=False),
    "stack of tiff": Form("tiff", "/*.tif", write_slices, array=StackArray, has_chunks=False),
    "tiff at a URL": Form(
        "tiff", ".tif", write_tiff_in("strips", "zlib"), "memory://", has_chunks=False
    ),
    "uncompressed tiff at a URL": Form(
        "tiff", ".tif", write_tiff_in("pages"), "memory://", has_chunks=False
    ),
    "stack of tiff at a URL": Form(
        "tiff", "/*.tif", write_slices, "memory://", StackArray, has_chunks=False
    ),
    "hdf5": Form("hdf5", ".h5/volume/raw", write_hdf5_in("contiguous"), has_chunks=False),
    "hdf5 in chunks": Form("hdf5", ".h5/volume/raw", write_hdf5_in("gzip"), has_chunks=False),
    "hdf5 at a URL": Form(
        "hdf5", ".h5/volume/raw", write_hdf5_in("gzip"), "memory://", has_chunks=False
    ),
    "toy of another package": Form("toy", ".toy", write_toy, has_chunks=False),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def outside_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(OUTSIDE)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    memory = fsspec.filesystem("memory")
    if memory.exists(str(tmp_path)):
        memory.rm(str(tmp_path), recursive=True)


def path_of(form: Form, folder: Path, name: str = "in") -> str:
    return f"{form.scheme}{folder}/{name}{form.suffix}"


def written(form: Form, folder: Path, values: Voxels) -> ImageSource:
    form.write(path_of(form, folder), values)
    return found(form, path_of(form, folder))


def found(form: Form, path: str) -> ImageSource:
    with mock.patch.object(gzip_file, "WHOLE_BYTES", 0 if form.is_streamed else 1 << 20):
        source = find_source(path)
    assert bool(source.staged) == form.is_streamed
    return source


def voxel_files(source: ImageSource) -> tuple[Any, list[str]]:
    """Return the file system of a source and its files, without metadata documents."""
    filesystem, files = stored_files(source.path)
    return filesystem, [path for path in files if not path.endswith(DOCUMENTS)]


def stored_files(path: str) -> tuple[Any, list[str]]:
    """Return the file system of an array and its files."""
    filesystem, inner = fsspec.core.url_to_fs(hdf5_file(path))
    return filesystem, filesystem.glob(inner) if "*" in inner else filesystem.find(inner)


def truncate(source: ImageSource) -> None:
    filesystem, files = voxel_files(source)
    for path in files:
        content = filesystem.cat_file(path)
        filesystem.pipe_file(path, content[: len(content) // 8])


def read_whole(source: ImageSource) -> Voxels:
    return source.open().read(Box.of_shape(source.shape))


# ------------------------------------------------------------------------- finding and reading


@each_form
def test_a_source_has_the_shape_dtype_and_axes_of_its_array(form: Form, folder: Path) -> None:
    source = written(form, folder, random_volume(SHAPE, "uint16"))
    array = source.open()
    assert source.format == form.format
    assert (source.shape, source.dtype) == (SHAPE, "uint16")
    assert (array.shape, array.dtype) == (SHAPE, np.dtype("uint16"))
    assert [axis.name for axis in source.axes] == ["z", "y", "x"]
    assert {axis.kind for axis in source.axes} == {"space"}
    if form.array is not None:
        assert type(array) is form.array


@each_form
def test_a_source_is_equal_after_a_round_trip_through_json(form: Form, folder: Path) -> None:
    values = random_volume(SHAPE)
    source = written(form, folder, values)
    stored = json.loads(json.dumps(asdict(source)))
    decoded = TypeAdapter(ImageSource).validate_python(stored)
    assert decoded == source
    assert hash(decoded) == hash(source)
    np.testing.assert_array_equal(read_whole(decoded), values)


@each_form
@pytest.mark.parametrize("dtype", ["uint8", ">i4", "<f4"])
def test_every_box_has_the_voxels_that_were_written_in_native_byte_order(
    form: Form, folder: Path, dtype: str
) -> None:
    values = random_volume(SHAPE, dtype)
    source = written(form, folder, values)
    array = source.open()
    assert source.dtype == str(array.dtype) == values.dtype.newbyteorder("=").name
    for box in BOXES:
        region = array.read(box)
        assert region.dtype == array.dtype
        assert region.dtype.isnative
        np.testing.assert_array_equal(region, values[box.slices((0, 0, 0))])


@each_form
def test_threads_that_read_at_the_same_time_get_their_own_voxels(form: Form, folder: Path) -> None:
    values = random_volume(SHAPE, "float32")
    array = written(form, folder, values).open()
    with ThreadPoolExecutor(8) as pool:
        regions = list(pool.map(array.read, BOXES * 8))
    for box, region in zip(BOXES * 8, regions, strict=True):
        np.testing.assert_array_equal(region, values[box.slices((0, 0, 0))])


@each_form
def test_missing_storage_chunks_are_read_as_the_fill_value(form: Form, folder: Path) -> None:
    source = written(form, folder, random_volume(SHAPE))
    if not form.has_chunks:
        return
    filesystem, files = voxel_files(source)
    for path in files:
        filesystem.rm_file(path)
    np.testing.assert_array_equal(read_whole(source), np.full(SHAPE, form.fill, np.uint8))


@each_form
def test_a_path_is_detected_by_its_own_format_only(form: Form, folder: Path) -> None:
    source = written(form, folder, random_volume(SHAPE))
    detected = [name for name, built_in in BUILT_IN.items() if built_in().detects(source.path, {})]
    assert detected == [name for name in BUILT_IN if name == form.format]


@each_form
def test_boxes_in_order_and_together_have_the_voxels_of_boxes_that_are_read_alone(
    form: Form, folder: Path
) -> None:
    values = random_volume(SHAPE, "uint16")
    array = written(form, folder, values).open()
    boxes = [Box((low, 0, 0), (low + 2, 10, 11)) for low in (1, 3, 9)]
    for regions in (list(array.read_in_order(boxes)), array.read_together(boxes[::-1])[::-1]):
        for box, region in zip(boxes, regions, strict=True):
            np.testing.assert_array_equal(region, values[box.slices((0, 0, 0))])


# ------------------------------------------------------------------------- identity and damage


@each_form
def test_the_identity_changes_when_the_array_is_replaced_and_not_when_it_is_read(
    form: Form, folder: Path
) -> None:
    source = written(form, folder, random_volume(SHAPE))
    identity = source.identity()
    assert identity is not None
    read_whole(source)
    assert source.identity() == find_source(path_of(form, folder)).identity() == identity
    other = written(form, folder, random_volume(SHAPE, "uint16"))
    assert other.path == source.path
    assert source.identity() == other.identity() != identity


@each_form
def test_the_identity_of_a_missing_array_is_none(form: Form, folder: Path) -> None:
    source = written(form, folder, random_volume(SHAPE))
    filesystem, files = stored_files(source.path)
    for path in files:
        filesystem.rm_file(path)
    assert source.identity() is None
    with pytest.raises(StoreError) as error:
        read_whole(source)
    assert error.value.code is ErrorCode.STORE_MISSING


@each_form
def test_truncated_voxels_raise_an_error_with_their_box(form: Form, folder: Path) -> None:
    source = written(form, folder, random_volume(SHAPE))
    array = source.open()
    truncate(source)
    with pytest.raises(ChunkReadError, match=r"\[0, 0, 0\] to \[13, 10, 11\]") as error:
        array.read(Box.of_shape(SHAPE))
    assert error.value.code is ErrorCode.INPUT_UNREADABLE
    assert source.path in str(error.value)
    with pytest.raises(ChunkReadError):
        array.read_together([Box.of_shape(SHAPE)])


@pytest.mark.parametrize("stop", [12, 13])
def test_a_npy_file_at_a_url_with_missing_rows_is_truncated(folder: Path, stop: int) -> None:
    source = written(FORMS["npy at a URL"], folder, random_volume(SHAPE))
    filesystem, [path] = voxel_files(source)
    row = SHAPE[1] * SHAPE[2]
    filesystem.pipe_file(path, filesystem.cat_file(path)[: -row * 2])
    with pytest.raises(ChunkReadError):
        source.open().read(Box((10, 0, 0), (stop, 10, 11)))


@each_form
def test_a_path_with_nothing_is_missing(form: Form, folder: Path) -> None:
    path = path_of(form, folder, "nothing")
    with pytest.raises(StoreError) as error:
        find_source(path)
    assert error.value.code is ErrorCode.STORE_MISSING
    assert path in str(error.value)


@pytest.mark.parametrize("form", [form for form in FORMS.values() if form.scheme])
def test_errors_have_no_password_of_the_url(form: Form, folder: Path) -> None:
    values, path = random_volume(SHAPE), f"memory://{folder}/x?password={SECRET}/in{form.suffix}"
    messages = []
    with pytest.raises(StoreError) as missing:
        find_source(path)
    messages.append(missing.value)
    form.write(path, values)
    source = find_source(path)
    array = source.open()
    truncate(source)
    with pytest.raises(ChunkReadError) as damaged:
        array.read(Box.of_shape(SHAPE))
    messages.append(damaged.value)
    filesystem, files = stored_files(path)
    for name in files:
        filesystem.pipe_file(name, b"{")
    with pytest.raises(StoreError) as invalid:
        find_source(path)
    messages.append(invalid.value)
    for message in messages:
        assert SECRET not in str(message)
        assert "***" in str(message)


# ------------------------------------------------------------------------- paths of no format


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"zarr_format": 3, "node_type": "array"}'])
def test_damaged_zarr_metadata_are_invalid_and_not_missing(folder: Path, content: bytes) -> None:
    (folder / "zarr.json").write_bytes(content)
    with pytest.raises(StoreError, match="invalid Zarr metadata") as error:
        find_source(str(folder))
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED


def test_a_path_that_cannot_be_examined_is_not_missing(folder: Path) -> None:
    with pytest.raises(StoreError) as error:
        find_source(f"{folder}/{'n' * 300}")
    assert error.value.code is ErrorCode.STORE_UNUSABLE


def test_a_zarr_array_in_a_folder_with_the_suffix_npy_is_a_zarr_array(folder: Path) -> None:
    values = random_volume(SHAPE)
    write_zarr(f"{folder}/in.npy", values)
    source = find_source(f"{folder}/in.npy")
    assert source.format == "zarr"
    np.testing.assert_array_equal(read_whole(source), values)


@pytest.mark.parametrize("level", ["", ".", "../in.zarr"])
def test_an_image_whose_level_is_a_group_is_rejected(folder: Path, level: str) -> None:
    attributes = {"ome": {"multiscales": [{"datasets": [{"path": level}]}]}}
    zarr.create_group(f"{folder}/in.zarr", attributes=attributes)
    with pytest.raises(StoreError) as error:
        find_source(f"{folder}/in.zarr")
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED


@pytest.mark.parametrize("path", ["in.npy", "in.zarr"])
def test_formats_of_built_in_names_are_found_without_loading_other_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    package(folder / "site", "broken", "broken = missing_module:Format")
    monkeypatch.syspath_prepend(folder / "site")
    values = random_volume(SHAPE)
    (write_npy if path == "in.npy" else write_zarr)(f"{folder}/{path}", values)
    np.testing.assert_array_equal(read_whole(find_source(f"{folder}/{path}")), values)


# ------------------------------------------------------------------------- other packages


def package(site: Path, name: str, line: str) -> None:
    """Install a package that registers a format in a folder of `sys.path`."""
    install_package(site, name, f"[chunkq.formats]\n{line}\n")


@pytest.mark.parametrize(
    "line",
    [
        "broken = missing_module:Format",
        "broken = json:Format",
        "broken = json:loads",
        "broken = builtins:dict",
        "broken = chunkq.storage.formats.base:Format",
    ],
)
def test_a_format_that_cannot_be_loaded_is_one_line_with_its_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    package(folder / "site", "broken-package", line)
    monkeypatch.syspath_prepend(folder / "site")
    with pytest.raises(StoreError, match="broken-package") as error:
        find_source(f"{folder}/in.other")
    assert error.value.code is ErrorCode.PACKAGE_MISSING
    assert "\n" not in str(error.value)
    toy = written(FORMS["toy of another package"], folder, random_volume(SHAPE))
    assert toy.format == "toy"


@pytest.mark.parametrize("name", ["zarr", "toy"])
def test_a_format_with_the_name_of_another_one_is_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package(folder / "site", "second-package", f"{name} = toy:ToyFormat")
    monkeypatch.syspath_prepend(folder / "site")
    with pytest.raises(StoreError, match="second-package"):
        find_source(f"{folder}/in.toy")


def test_a_source_of_a_format_that_is_not_installed_names_the_format(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(FORMS["toy of another package"], folder, random_volume(SHAPE))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(OUTSIDE)])
    for use in (source.open, source.identity):
        with pytest.raises(StoreError, match="'toy'") as error:
            use()
        assert error.value.code is ErrorCode.PACKAGE_MISSING


def test_a_built_in_format_that_cannot_write_raises_an_error(folder: Path) -> None:
    write_npy(f"{folder}/in.npy", random_volume(SHAPE))
    with pytest.raises(StoreError):
        BUILT_IN["npy"]().open_for_writing(f"{folder}/in.npy", {})
