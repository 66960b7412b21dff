"""HDF5 datasets as inputs: every layout, what names their axes, and what is refused."""

import fcntl
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt
import pytest

from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.box import Box
from chunkq.storage.formats.hdf5 import Hdf5Format
from chunkq.storage.formats.registry import format_named
from chunkq.storage.images import ImageSource, find_source
from tests.harness.servers.web import Habits, web_server
from tests.harness.small_job import SHAPE as SMALL
from tests.harness.small_job import small_workspace
from tests.harness.volumes import random_volume, read_output
from tests.harness.written_hdf5 import LAYOUTS, write_hdf5

SHAPE = (5, 19, 23)
DTYPES = ("?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
UNKNOWN_FILTER = 32_999


def read(source: ImageSource) -> npt.NDArray[Any]:
    array = source.open()
    return array.read(Box.of_shape(array.shape))


def assert_holds(path: Path | str, values: npt.NDArray[Any]) -> ImageSource:
    """Assert that a dataset has these voxels, as a whole and in a region."""
    source = find_source(str(path))
    array = source.open()
    assert source.dtype == str(array.dtype) == values.dtype.newbyteorder("=").name
    for box in (Box((1, 3, 2), (4, 17, 20)), Box.of_shape(values.shape)):
        region = array.read(box)
        assert region.dtype.isnative
        np.testing.assert_array_equal(region, values[box.slices((0, 0, 0))])
    return source


def refused(path: Path | str, code: ErrorCode, *parts: str) -> None:
    """Assert that an input is refused in one line with a code that contains all parts."""
    with pytest.raises(StoreError) as error:
        find_source(str(path))
    assert error.value.code is code
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# ------------------------------------------------------------------------- voxels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_byte_order_is_read_as_it_was_written(tmp_path: Path, layout: str) -> None:
    for dtype, order in product(DTYPES, "<>"):
        values = random_volume(SHAPE, np.dtype(dtype).newbyteorder(order))
        assert_holds(write_hdf5(tmp_path / "in.h5", values, layout), values)


@pytest.mark.parametrize("suffix", [".hdf5", ".hdf", ".H5", ".nxs"])
def test_a_file_is_recognized_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    values = random_volume(SHAPE)
    source = assert_holds(write_hdf5(tmp_path / f"in{suffix}", values), values)
    assert source.format == "hdf5"


def test_an_enumeration_is_read_as_its_numbers(tmp_path: Path) -> None:
    values = random_volume(SHAPE)
    names = {f"n{number}": number for number in range(101)}
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("raw", data=values, dtype=h5py.enum_dtype(names, "u1"))
    assert_holds(tmp_path / "in.h5" / "raw", values)


def test_a_compression_of_a_plugin_is_read(tmp_path: Path) -> None:
    values = random_volume(SHAPE)
    options = hdf5plugin.Blosc(cname="zstd")
    path = write_hdf5(tmp_path / "in.h5", values, "chunks", **options)
    assert_holds(path, values)


def test_a_dataset_in_a_zarr_folder_with_the_suffix_is_zarr(tmp_path: Path) -> None:
    (tmp_path / "in.h5").mkdir()
    assert not Hdf5Format().detects(f"{tmp_path}/in.h5/volume.zarr")


# ------------------------------------------------------------------------- axes


def axes_of(source: ImageSource) -> dict[str, tuple[str, float, float, str | None]]:
    return {a.name: (a.kind, a.scale, a.translation, a.unit) for a in source.axes}


def axistags(*keys: str) -> str:
    """Return the axistags that vigra and ilastik write."""
    axes = [{"key": key, "typeFlags": 2, "resolution": 0, "description": ""} for key in keys]
    return json.dumps({"axes": axes})


def test_an_array_without_names_is_spatial(tmp_path: Path) -> None:
    source = find_source(write_hdf5(tmp_path / "in.h5", random_volume(SHAPE)))
    assert ([axis.name for axis in source.axes], source.named_by) == (["z", "y", "x"], "")


@pytest.mark.parametrize(
    ("written", "named_by"),
    [
        ({"labels": "cyx"}, "DIMENSION_LABELS"),
        ({"attributes": {"axistags": axistags("c", "y", "x")}}, "axistags"),
        ({"labels": "zyx", "attributes": {"axistags": axistags("c", "y", "x")}}, "axistags"),
        ({"labels": "cyx", "attributes": {"axistags": axistags("y", "x")}}, "DIMENSION_LABELS"),
        ({"labels": "cyx", "attributes": {"axistags": "{"}}, "DIMENSION_LABELS"),
    ],
)
def test_labels_and_axistags_name_the_axes(
    tmp_path: Path, written: dict[str, Any], named_by: str
) -> None:
    source = find_source(write_hdf5(tmp_path / "in.h5", random_volume(SHAPE), **written))
    assert [axis.name for axis in source.axes] == ["c", "y", "x"]
    assert source.axes[0].kind == "channel"
    assert source.named_by == named_by


def test_the_size_of_an_element_is_that_of_the_spatial_axes(tmp_path: Path) -> None:
    attributes = {"element_size_um": [3.0, 0.5, 0.25], "axistags": axistags("z", "c", "y", "x")}
    path = write_hdf5(tmp_path / "in.h5", random_volume((4, 2, 5, 6)), attributes=attributes)
    assert axes_of(find_source(path)) == {
        "z": ("space", 3.0, 0.0, "micrometer"),
        "c": ("channel", 1.0, 0.0, None),
        "y": ("space", 0.5, 0.0, "micrometer"),
        "x": ("space", 0.25, 0.0, "micrometer"),
    }


@pytest.mark.parametrize("size", [[1.0, 2.0], [1.0, 0.0, 2.0], "fine", [1.0, np.nan, 1.0]])
def test_a_size_of_an_element_that_has_no_meaning_is_ignored(tmp_path: Path, size: Any) -> None:
    attributes = {"element_size_um": size}
    source = find_source(
        write_hdf5(tmp_path / "in.h5", random_volume(SHAPE), attributes=attributes)
    )
    assert {(axis.scale, axis.unit) for axis in source.axes} == {(1.0, None)}


def test_dimension_scales_name_the_axes_and_their_positions(tmp_path: Path) -> None:
    coordinates = {"time": np.arange(5) * 30.0, "y": 7 + np.arange(19) * 0.5, "x": [*range(22), 40]}
    with h5py.File(tmp_path / "in.h5", "w") as file:
        dataset = file.create_dataset("raw", data=random_volume(SHAPE))
        for number, (name, values) in enumerate(coordinates.items()):
            file[name] = values
            file[name].make_scale(name)
            dataset.dims[number].attach_scale(file[name])
        file["y"].attrs["units"] = "um"
        file["time"].attrs["units"] = np.bytes_(b"s")
    source = find_source(f"{tmp_path}/in.h5")
    assert axes_of(source) == {
        "time": ("time", 30.0, 0.0, "second"),
        "y": ("space", 0.5, 7.0, "micrometer"),
        "x": ("space", 1.0, 0.0, None),
    }
    assert source.named_by == "dimension scales"


# ------------------------------------------------------------------------- paths in a file


def create_tree(path: Path, *names: str) -> None:
    with h5py.File(path, "w") as file:
        for name in names:
            file[name] = random_volume(SHAPE)
        file["version"] = 3
        file["note"] = "text"
        file["table"] = np.arange(4)


@pytest.mark.parametrize("path", ["in.h5", "in.h5/a", "in.h5/a/b"])
def test_a_group_with_one_array_is_this_array(tmp_path: Path, path: str) -> None:
    create_tree(tmp_path / "in.h5", "a/b/raw")
    assert assert_holds(tmp_path / path, random_volume(SHAPE)).path == f"{tmp_path}/in.h5/a/b/raw"


@pytest.mark.parametrize("path", ["in.h5:/b/raw", "in.h5:/b"])
def test_a_colon_can_follow_the_name_of_the_file(tmp_path: Path, path: str) -> None:
    values = random_volume(SHAPE)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["b/raw"] = values
    assert assert_holds(tmp_path / path, values).path == str(tmp_path / "in.h5/b/raw")


def test_the_signal_of_a_nexus_file_is_read_with_its_axes(tmp_path: Path) -> None:
    values = random_volume(SHAPE)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.attrs["default"] = "entry"
        file.create_group("entry").attrs["default"] = "data"
        data = file.create_group("entry/data")
        data.attrs["signal"], data.attrs["axes"] = "counts", [b"z", b".", b"x"]
        data["counts"], data["errors"] = values, values + 1
        data["z"], data["x"] = 4 + 0.5 * np.arange(SHAPE[0]), np.arange(SHAPE[2]) ** 2
        data["z"].attrs["units"] = "um"
    source = assert_holds(tmp_path / "in.h5", values)
    assert (source.path, source.named_by) == (f"{tmp_path}/in.h5/entry/data/counts", "NeXus axes")
    z, _, x = source.axes
    assert (z.name, z.scale, z.translation, z.unit) == ("z", 0.5, 4.0, "micrometer")
    assert (x.name, x.scale, x.translation) == ("x", 1.0, 0.0)  # not evenly spaced
    other = assert_holds(tmp_path / "in.h5" / "entry/data/errors", values + 1)
    assert other.named_by == ""


def test_a_signal_in_another_file_is_not_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.attrs["signal"] = "raw"
        file["raw"] = h5py.ExternalLink("other.h5", "raw")
    refused(tmp_path / "in.h5", ErrorCode.STORE_UNSUPPORTED, "no array")


def test_a_group_with_several_arrays_lists_them(tmp_path: Path) -> None:
    create_tree(tmp_path / "in.h5", "a/raw", "a/labels", *(f"b/{n}" for n in range(9)))
    code = ErrorCode.STORE_UNSUPPORTED
    refused(tmp_path / "in.h5" / "a", code, "2 arrays", "in.h5/a/labels, ", "in.h5/a/raw")
    refused(tmp_path / "in.h5", code, "11 arrays", "and 3 more")


def test_a_name_that_is_missing_is_refused_with_those_beside_it(tmp_path: Path) -> None:
    create_tree(tmp_path / "in.h5", "a/raw", "a/labels")
    code = ErrorCode.STORE_MISSING
    refused(tmp_path / "in.h5" / "a" / "rav", code, "'rav'", "labels, raw")
    refused(tmp_path / "in.h5" / "a" / "raw" / "deeper", code, "'deeper'")


def test_a_file_without_arrays_and_items_that_are_none_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["note"] = "text"
        file["pairs"] = np.zeros(3, [("a", "i4"), ("b", "f4")])
        file["nothing"] = h5py.Empty("f4")
        file["type"] = np.dtype("f4")
    for name in ("", "note", "pairs", "nothing", "type"):
        refused(tmp_path / "in.h5" / name, ErrorCode.STORE_UNSUPPORTED, f"{tmp_path}/in.h5")


# ------------------------------------------------------------------------- links


def test_a_link_inside_the_file_is_followed(tmp_path: Path) -> None:
    create_tree(tmp_path / "in.h5", "a/raw")
    with h5py.File(tmp_path / "in.h5", "a") as file:
        file["first"] = h5py.SoftLink("second")
        file["second"] = h5py.SoftLink("/a")
        file["loop"] = h5py.SoftLink("/loop")
    source = assert_holds(tmp_path / "in.h5" / "first" / "raw", random_volume(SHAPE))
    assert source.path == f"{tmp_path}/in.h5/a/raw"
    refused(tmp_path / "in.h5" / "loop", ErrorCode.STORE_MISSING)


def link_dataset(file: h5py.File, other: str) -> None:
    file["raw"] = h5py.ExternalLink(other, "/volume/raw")


def link_group(file: h5py.File, other: str) -> None:
    file["there"] = h5py.ExternalLink(other, "/volume")
    file["near"] = h5py.SoftLink("/there")


def store_outside(file: h5py.File, other: str) -> None:
    file.create_dataset("raw", SHAPE, "u1", external=[(other, 0, h5py.h5f.UNLIMITED)])


def make_virtual(file: h5py.File, other: str) -> None:
    layout = h5py.VirtualLayout(SHAPE, "u1")
    layout[...] = h5py.VirtualSource(other, "volume/raw", SHAPE)
    file.create_virtual_dataset("raw", layout)


def make_virtual_of_virtual(file: h5py.File, other: str) -> None:
    make_virtual(file, other)
    file.move("raw", "volume/raw")
    make_virtual(file, ".")


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (link_dataset, "raw"),
        (link_group, "there/raw"),
        (link_group, "near/raw"),
        (store_outside, "raw"),
        (make_virtual, "raw"),
        (make_virtual_of_virtual, "raw"),
    ],
)
def test_data_in_another_file_are_refused_with_its_name(
    tmp_path: Path, write: Callable[[h5py.File, str], None], name: str
) -> None:
    write_hdf5(tmp_path / "other.h5", random_volume(SHAPE))
    with h5py.File(tmp_path / "in.h5", "w") as file:
        write(file, str(tmp_path / "other.h5"))
    refused(tmp_path / "in.h5" / name, ErrorCode.STORE_UNSUPPORTED, f"{tmp_path}/other.h5")


def test_a_virtual_dataset_over_its_own_file_is_read(tmp_path: Path) -> None:
    path, values = tmp_path / "in.h5", random_volume(SHAPE)
    write_hdf5(path, values)
    with h5py.File(path, "a") as file:
        make_virtual(file, ".")
    assert_holds(path / "raw", values)
    with h5py.File(path, "a") as file:
        del file["volume/raw"]
    refused(path / "raw", ErrorCode.STORE_MISSING)


# ------------------------------------------------------------------------- damage


@pytest.mark.parametrize("content", [b"", b"\x89HDF", b"<!DOCTYPE html>", b"\x89HDF\r\n\x1a\n\0"])
def test_a_file_that_is_no_hdf5_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.h5").write_bytes(content)
    refused(tmp_path / "in.h5" / "raw", ErrorCode.STORE_UNSUPPORTED, f"{tmp_path}/in.h5/raw: ")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "in.h5", random_volume(SHAPE), "gzip")
    content = (tmp_path / "in.h5").read_bytes()
    for size in range(len(content) - 1, 0, -max(1, len(content) // 40)):
        (tmp_path / "in.h5").write_bytes(content[:size])
        refused(path, ErrorCode.STORE_UNSUPPORTED, f"{path}: ")


@pytest.mark.parametrize("layout", ["gzip", "checksum"])
def test_a_damaged_chunk_is_an_error_of_its_boxes(tmp_path: Path, layout: str) -> None:
    path, values = (
        write_hdf5(tmp_path / "in.h5", random_volume(SHAPE), layout),
        random_volume(SHAPE),
    )
    with h5py.File(tmp_path / "in.h5") as file:
        chunk = file["volume/raw"].id.get_chunk_info(0)
    content = bytearray((tmp_path / "in.h5").read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    content[chunk.byte_offset] = 1
    (tmp_path / "in.h5").write_bytes(content)
    array = find_source(path).open()
    inner = Box((2, 8, 8), SHAPE)
    np.testing.assert_array_equal(array.read(inner), values[2:, 8:, 8:])
    with pytest.raises(ChunkReadError) as error:
        array.read(Box.of_shape(SHAPE))
    assert error.value.code is ErrorCode.INPUT_UNREADABLE


def test_a_dataset_that_was_replaced_is_an_error_of_the_chunk(tmp_path: Path) -> None:
    array = find_source(write_hdf5(tmp_path / "in.h5", random_volume(SHAPE))).open()
    write_hdf5(tmp_path / "in.h5", random_volume((6, 20, 24)))
    with pytest.raises(ChunkReadError):
        array.read(Box.of_shape(SHAPE))


# ------------------------------------------------------------------------- packages and locks


def test_a_filter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((5, 5, 5))
    properties.set_filter(UNKNOWN_FILTER, h5py.h5z.FLAG_OPTIONAL)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        space = h5py.h5s.create_simple(SHAPE)
        h5py.h5d.create(file.id, b"raw", h5py.h5t.NATIVE_UINT8, space, properties)
    refused(tmp_path / "in.h5", ErrorCode.PACKAGE_MISSING, str(UNKNOWN_FILTER), "hdf5plugin")


def test_h5py_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hdf5(tmp_path / "in.h5", random_volume(SHAPE))
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(path, ErrorCode.PACKAGE_MISSING, "h5py", "[hdf5]")


def test_a_file_that_another_program_has_locked_is_read(tmp_path: Path) -> None:
    path, values = write_hdf5(tmp_path / "in.h5", random_volume(SHAPE)), random_volume(SHAPE)
    with (tmp_path / "in.h5").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_holds(path, values)


# ------------------------------------------------------------------------- URLs and jobs


@pytest.mark.parametrize("layout", ["contiguous", "gzip"])
def test_a_file_on_a_web_server_is_read(tmp_path: Path, layout: str) -> None:
    values = random_volume(SHAPE, "u2")
    write_hdf5(tmp_path / "in.h5", values, layout)
    habits = Habits()
    with web_server(tmp_path, habits) as url:
        source = assert_holds(f"{url}/in.h5", values)
        assert source.path == f"{url}/in.h5/volume/raw"
        assert source.identity() is not None
        habits.ranges = False
        refused(f"{url}/in.h5", ErrorCode.STORE_UNSUPPORTED, "parts of files")
        refused(f"{url}/nothing.h5", ErrorCode.STORE_MISSING, f"{url}/nothing.h5")


def test_a_job_over_hdf5_has_the_output_of_the_same_voxels_in_zarr(tmp_path: Path) -> None:
    hdf5, zarr = small_workspace(tmp_path / "hdf5"), small_workspace(tmp_path / "zarr")
    write_hdf5(tmp_path / "hdf5" / "in.h5", random_volume(SMALL), "gzip")
    hdf5.write_job("job.yaml", input="in.h5/volume/raw")
    for workspace in (hdf5, zarr):
        workspace.produce()
        workspace.compute_inline()
        workspace.finalize().ok()
    assert [source.format for source in hdf5.job.record.sources] == ["hdf5"]
    np.testing.assert_array_equal(read_output(hdf5.output), read_output(zarr.output))


def test_the_images_of_several_files_are_named_by_the_files(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path)
    for name in ("a", "b"):
        write_hdf5(tmp_path / f"{name}.h5", random_volume(SMALL))
    workspace.write_job(input=["a.h5", "b.h5/volume/raw"])
    workspace.call("produce", "job.json").ok()
    assert [image.name for image in workspace.job.record.images] == ["a", "b"]


def test_the_format_is_found_by_its_name() -> None:
    assert isinstance(format_named("hdf5"), Hdf5Format)
