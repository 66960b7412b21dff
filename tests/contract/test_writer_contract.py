"""The contract of every writer; see chunkq/writers/base.py.

A new writer is an entry of FORMS: how independent software reads what it writes. All tests then run
for it.
"""

import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import tensorstore as ts
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.job.output_name import WRITTEN
from chunkq.storage.images import find_source
from chunkq.storage.selection import Selection
from chunkq.writers import blocks as blocks_module
from chunkq.writers.base import ExportWriter, FileWriter, ImageToWrite, WriterOptions
from chunkq.writers.blocks import Blocks, slabs, tiles
from chunkq.writers.copying import copy_image
from chunkq.writers.registry import FILE_WRITERS, WRITERS
from tests.harness.arrays import ArrayInMemory

Voxels = npt.NDArray[Any]

Z = Axis("z", "space", 20, "micrometer", 2.0, 12.0)
Y = Axis("y", "space", 33, "micrometer", 0.5, 0.0)
X = Axis("x", "space", 70, "micrometer", 0.5, 3.5)
CHANNEL, TIME = Axis("c", "channel", 2), Axis("t", "time", 3, "second", 1.5)
IMAGES = {
    "zyx": (Z, Y, X),
    "yx": (Y, X),
    "czyx": (CHANNEL, Z, Y, X),
    "tzyx": (TIME, Z, Y, X),
    "tczyx": (TIME, CHANNEL, Z, Y, X),
    "zyxc": (Z, Y, X, CHANNEL),
    "xyz": (X, Y, Z),
}
"""Axes of images in several orders."""
DTYPES = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16",
    "float32", "float64",
)  # fmt: skip


def read_zarr(path: str) -> tuple[str, Voxels]:
    group = zarr.open_group(path, mode="r")
    image = group.attrs["ome"]["multiscales"][0]  # type: ignore[index, call-overload]
    return "".join(axis["name"] for axis in image["axes"]), np.asarray(group["0"])


def read_nifti(path: str) -> tuple[str, Voxels]:
    image = nibabel.load(path)
    return "xyztc"[: len(image.shape)], np.asarray(image.dataobj)


def read_tiff(path: str) -> tuple[str, Voxels]:
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        assert file.is_bigtiff
        return file.series[0].axes.lower(), file.series[0].asarray()


def read_hdf5(path: str) -> tuple[str, Voxels]:
    with h5py.File(path) as file:
        return "".join(dimension.label for dimension in file["data"].dims), file["data"][...]


def read_precomputed(path: str) -> tuple[str, Voxels]:
    volumes = sorted(Path(path).glob("t*")) or [Path(path)]
    arrays = []
    for volume in volumes:
        storage = {"driver": "file", "path": f"{volume}/"}
        store = ts.open({"driver": "neuroglancer_precomputed", "kvstore": storage}).result()
        arrays.append(store.read().result())
    return ("txyzc", np.stack(arrays)) if len(volumes) > 1 else ("xyzc", arrays[0])


@dataclass(frozen=True)
class Form:
    """How a format is read: the suffix of its paths, and a reader of names of axes and voxels."""

    format: str
    suffix: str
    read: Callable[[str], tuple[str, Voxels]]

    def writer(self, image: ImageToWrite, path: str, **options: Any) -> ExportWriter:
        return WRITERS[self.format](image, path, WriterOptions(**options))


FORMS = [
    Form("zarr", ".zarr", read_zarr),
    Form("precomputed", "", read_precomputed),
    Form("nifti", ".nii", read_nifti),
    Form("nifti", ".nii.gz", read_nifti),
    Form("tiff", ".tif", read_tiff),
    Form("hdf5", ".h5", read_hdf5),
]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form.format}{form.suffix}")
def form(request: pytest.FixtureRequest) -> Form:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy images in many blocks, as large ones are."""
    monkeypatch.setattr(blocks_module, "COPY_BYTES", 1 << 14)
    monkeypatch.setattr("chunkq.writers.tiff.COPY_BYTES", 1 << 14)
    monkeypatch.setattr("chunkq.writers.tiff.ENCODED_BYTES", 1 << 14)


def image_of(names: str, dtype: str = "uint16", **keys: Any) -> tuple[ImageToWrite, Voxels]:
    """Return an image, and its voxels: integers from 0 to 100 that every dtype holds."""
    image = ImageToWrite(IMAGES[names], dtype, **keys)
    values = np.random.default_rng(3).integers(0, 101, image.shape)
    return image, values > 50 if dtype == "bool" else values.astype(dtype)


def write(writer: ExportWriter, values: Voxels, path: str) -> list[int]:
    """Write an image; return the reported steps."""
    reported: list[int] = []
    copy_image(writer, ArrayInMemory(values), path, reported.append)
    return reported


def files_of(path: str) -> dict[str, str]:
    """Return the hash of each file."""
    root = Path(path)
    files = [root] if root.is_file() else filter(Path.is_file, root.rglob("*"))
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def arranged(names: str, values: Voxels, wanted: str) -> Voxels:
    """Return voxels in another order of axes; those that are new have one position."""
    kept = [name for name in wanted if name in names]
    moved = values.transpose([names.index(name) for name in kept])
    return moved.reshape([moved.shape[kept.index(n)] if n in kept else 1 for n in wanted])


def test_only_writers_of_files_have_a_size() -> None:
    assert {name for name, kind in WRITERS.items() if issubclass(kind, FileWriter)} == {
        *FILE_WRITERS
    }
    assert {*WRITTEN.values()} == {*FILE_WRITERS}  # the names of files that jobs write


@pytest.mark.parametrize("names", IMAGES)
def test_independent_software_reads_every_voxel(form: Form, names: str, tmp_path: Path) -> None:
    image, values = image_of(names)
    path = str(tmp_path / f"out{form.suffix}")
    writer = form.writer(image, path)
    steps = write(writer, values, path)
    assert steps == list(range(1, writer.steps + 1))
    read_names, read = form.read(path)
    np.testing.assert_array_equal(read, arranged(names, values, read_names))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_stored_exactly_or_refused(form: Form, dtype: str, tmp_path: Path) -> None:
    image, values = image_of("zyx", dtype)
    path = str(tmp_path / f"out{form.suffix}")
    if dtype in REFUSED.get(form.format, ()):
        with pytest.raises(StoreError) as caught:
            form.writer(image, path)
        assert caught.value.code is ErrorCode.STORE_UNSUPPORTED
        assert "\n" not in str(caught.value)
        return
    writer = form.writer(image, path)
    write(writer, values, path)
    names, read = form.read(path)
    assert read.dtype == writer.dtype
    np.testing.assert_array_equal(read, arranged("zyx", values.astype(writer.dtype), names))


REFUSED = {"precomputed": {"int64", "float64"}, "tiff": {"int64", "uint64"}}
"""Dtypes that a format cannot hold."""


def test_position_and_voxel_size_are_kept(form: Form, tmp_path: Path) -> None:
    image, values = image_of("zyx")
    path = str(tmp_path / f"out{form.suffix}")
    write(form.writer(image, path), values, path)
    for axis, stored in zip(find_source(path).axes, image.axes, strict=True):
        factor = 1000 if axis.unit == "nanometer" else 1
        assert axis.name == stored.name
        assert axis.unit in ("micrometer", "nanometer")
        assert axis.scale == pytest.approx(stored.scale * factor)
        assert axis.translation == pytest.approx(stored.translation * factor)


def test_writing_again_writes_the_same_bytes(form: Form, tmp_path: Path) -> None:
    image, values = image_of("czyx", is_labels=True)
    contents = []
    for attempt in ("first", "second"):
        path = str(tmp_path / attempt / f"out{form.suffix}")
        Path(path).parent.mkdir()
        write(form.writer(image, path), values, path)
        contents.append(files_of(path))
    assert contents[0] == contents[1]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_killed_writer_continues_or_its_output_is_not_found(
    form: Form, share: float, tmp_path: Path
) -> None:
    image, values = image_of("zyx")
    options = {"levels": 3, "chunks": (8, 16, 16)} if form.format in ("zarr", "precomputed") else {}
    whole, path = (str(tmp_path / name / f"out{form.suffix}") for name in ("whole", "killed"))
    for parent in (whole, path):
        Path(parent).parent.mkdir()
    write(form.writer(image, whole, **options), values, whole)
    writer = form.writer(image, path, **options)
    last = max(1, int(share * writer.steps))

    def kill(done: int) -> None:
        if done == last:
            raise KilledError

    with pytest.raises(KilledError):
        copy_image(writer, ArrayInMemory(values), path, kill)
    if not writer.is_resumable:
        return
    with pytest.raises(StoreError):
        find_source(path)
    # The process of the next attempt writes the steps that are not reported.
    reported: list[int] = []
    copy_image(writer, ArrayInMemory(values), path, reported.append, last)
    assert reported == list(range(last + 1, writer.steps + 1))
    assert files_of(path) == files_of(whole)


@pytest.mark.parametrize("suffix", [".zarr", ""])
@pytest.mark.parametrize("is_labels", [False, True])
def test_levels_are_made_from_the_level_before(
    suffix: str, is_labels: bool, tmp_path: Path
) -> None:
    form = next(form for form in FORMS if form.suffix == suffix)
    image, values = image_of("tczyx", "uint8", is_labels=is_labels)
    path = str(tmp_path / f"out{suffix}")
    writer = form.writer(image, path, levels=3)
    write(writer, values % 3, path)
    volume = path if suffix else f"{path}/t001"
    below = (values % 3)[1]
    for level, factors in ((1, (1, 2, 2)), (2, (1, 2, 2))):
        below = np.stack([reduced(channel, factors, is_labels) for channel in below])
        source = find_source(volume, Selection(level=level))
        array = source.open()
        stored = array.read(Box.of_shape(array.shape))
        np.testing.assert_array_equal(stored[1] if suffix else stored, below)
        z, y, x = source.spatial_axes
        unit = 1000 if z.unit == "nanometer" else 1
        assert (z.scale, y.scale, x.scale) == (2 * unit, 0.5 * 2**level * unit, y.scale)


def reduced(values: Voxels, factors: tuple[int, ...], is_labels: bool) -> Voxels:
    """Return the mean, or the most frequent value, of cells, voxel by voxel."""
    shape = [-(-size // factor) for size, factor in zip(values.shape, factors, strict=True)]
    result = np.zeros(shape, values.dtype)
    for index in np.ndindex(*shape):
        cell = values[
            tuple(slice(n * f, n * f + f) for n, f in zip(index, factors, strict=True))
        ].ravel()
        if is_labels:
            labels, counts = np.unique(cell, return_counts=True)
            result[index] = labels[np.argmax(counts)]
        else:
            result[index] = np.rint(cell.astype(np.float64).mean())
    return result


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    image, values = image_of("zyx", "int32", is_labels=True)
    values[-1, -1, -1] = -1
    path = str(tmp_path / "out")
    with pytest.raises(StoreError, match="values -1 to"):
        write(WRITERS["precomputed"](image, path), values, path)
    assert not (tmp_path / "out" / "info").exists()


def test_axes_that_a_format_cannot_hold_are_refused(form: Form) -> None:
    axes = tuple(Axis(f"dim_{n}", "space", 4) for n in range(4))
    if form.format in ("zarr", "hdf5"):
        form.writer(ImageToWrite(axes, "uint8"), "/out")
        return
    with pytest.raises(StoreError) as caught:
        form.writer(ImageToWrite(axes, "uint8"), "/out")
    assert caught.value.code is ErrorCode.STORE_UNSUPPORTED


def test_labels_are_a_segmentation_with_compressed_blocks(tmp_path: Path) -> None:
    image, values = image_of("zyx", "uint8", is_labels=True)
    path = str(tmp_path / "out")
    write(WRITERS["precomputed"](image, path), values, path)
    info = json.loads((tmp_path / "out" / "info").read_text())
    assert (info["type"], info["data_type"]) == ("segmentation", "uint32")
    assert {scale["encoding"] for scale in info["scales"]} == {"compressed_segmentation"}
    assert info["scales"][0]["voxel_offset"] == [7, 0, 6]
    assert info["scales"][0]["resolution"] == [500, 500, 2000]


def test_memory_is_a_few_blocks(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 22
    for name in ("blocks", "tiff"):
        monkeypatch.setattr(f"chunkq.writers.{name}.COPY_BYTES", size)
    axes = tuple(Axis(name, "space", n) for name, n in zip("zyx", (32, 512, 512), strict=True))
    image = ImageToWrite(axes, "uint16", storage=(4, 128, 128))
    writer = form.writer(image, str(tmp_path / "out"))
    assert prod(writer.blocks.block) * 2 == size
    array = ArrayInMemory(np.zeros(image.shape, np.uint16))
    tracemalloc.start()
    copy_image(writer, array, str(tmp_path / f"out{form.suffix}"), lambda done: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Two blocks, and what is encoded and reduced at a time.
    assert peak < 4 * size


def test_an_axis_that_runs_backwards_is_stored_from_its_other_end(tmp_path: Path) -> None:
    falling = replace(X, scale=-0.5, translation=10.0)
    image = ImageToWrite((Z, Y, falling), "uint8")
    values = image_of("zyx", "uint8")[1]
    path = str(tmp_path / "out")
    write(WRITERS["precomputed"](image, path), values, path)
    _, read = read_precomputed(path)
    np.testing.assert_array_equal(read[..., 0].T, values[..., ::-1])
    info = json.loads((tmp_path / "out" / "info").read_text())
    assert info["scales"][0]["voxel_offset"][0] == round((10.0 - 69 * 0.5) / 0.5)


def test_nifti_2_is_used_for_long_axes_only(tmp_path: Path) -> None:
    for size, kind in ((32_767, nibabel.Nifti1Image), (32_768, nibabel.Nifti2Image)):
        image = ImageToWrite((Axis("x", "space", size),), "uint8")
        path = str(tmp_path / "out.nii")
        write(WRITERS["nifti"](image, path), np.zeros(size, np.uint8), path)
        assert type(nibabel.load(path)) is kind


@st.composite
def arrays(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return a shape, the shape of its storage chunks, and the size of a voxel (bytes)."""
    shape = draw(st.lists(st.integers(1, 17), min_size=1, max_size=4))
    edges = [draw(st.integers(1, 9)) for _ in shape]
    return tuple(shape), tuple(edges), draw(st.sampled_from([1, 2, 4, 8]))


def covered(blocks: Blocks) -> Iterator[int]:
    """Yield the number of each voxel in the order of the blocks."""
    numbers = np.arange(prod(blocks.shape)).reshape(blocks.shape)
    for box in blocks.boxes():
        yield from numbers[box.slices((0,) * len(box.shape))].ravel().tolist()


@given(arrays())
def test_slabs_follow_each_other_in_the_order_of_the_file(
    array: tuple[tuple[int, ...], tuple[int, ...], int],
) -> None:
    shape, edges, itemsize = array
    blocks = slabs(shape, itemsize, edges)
    assert list(covered(blocks)) == list(range(prod(shape)))
    rows = prod(shape[-1:]) * itemsize
    assert prod(blocks.block) * itemsize <= max(blocks_module.COPY_BYTES, rows)


@given(arrays())
def test_tiles_are_whole_storage_chunks(
    array: tuple[tuple[int, ...], tuple[int, ...], int],
) -> None:
    shape, edges, itemsize = array
    blocks = tiles(shape, itemsize, edges)
    assert sorted(covered(blocks)) == list(range(prod(shape)))
    for block, edge, size in zip(blocks.block, edges, shape, strict=True):
        assert block % edge == 0 or block >= size
    chunk = prod(min(e, s) for e, s in zip(edges, shape, strict=True)) * itemsize
    assert prod(blocks.block) * itemsize <= max(blocks_module.COPY_BYTES, chunk)
    assert len(list(blocks.boxes(1))) == blocks.count - 1
