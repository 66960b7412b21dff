"""TIFF files and stacks as inputs: every layout, what names their axes, and what is refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from chunkq.errors import ChunkReadError, ErrorCode, JobError, StoreError
from chunkq.geometry.box import Box
from chunkq.storage.formats import tiff_pages
from chunkq.storage.formats.registry import format_named
from chunkq.storage.formats.tiff import TiffFormat
from chunkq.storage.images import ImageSource, find_source
from chunkq.storage.selection import Selection
from tests.harness.servers.web import Habits, web_server
from tests.harness.small_job import SHAPE as SMALL
from tests.harness.small_job import small_workspace
from tests.harness.volumes import random_volume, read_output
from tests.harness.written_tiff import COMPRESSIONS, LAYOUTS, PREDICTED, write_stack, write_tiff

SHAPE = (5, 19, 23)
BOX = Box((1, 3, 2), (4, 17, 20))
DTYPES = ("?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
NOT_IN_OME = ("u8", "i8", "f2")
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def read(source: ImageSource, box: Box | None = None) -> npt.NDArray[Any]:
    array = source.open()
    return array.read(box or Box.of_shape(array.shape))


def assert_holds(path: Path | str, values: npt.NDArray[Any]) -> ImageSource:
    """Assert that a file has these voxels, as a whole and in a region."""
    source = find_source(str(path))
    array = source.open()
    assert array.shape == values.shape
    assert source.dtype == str(array.dtype) == values.dtype.newbyteorder("=").name
    inner = Box(
        tuple(n // 3 for n in values.shape), tuple(max(n // 3 + 1, n - 1) for n in values.shape)
    )
    for box in (inner, Box.of_shape(values.shape), inner):
        region = array.read(box)
        assert region.dtype.isnative
        np.testing.assert_array_equal(region, values[box.slices((0,) * values.ndim)])
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
def test_every_dtype_byte_order_and_compression_is_read_as_it_was_written(
    tmp_path: Path, layout: str
) -> None:
    compressions = COMPRESSIONS if layout != "contiguous" else ("none",)
    dtypes = [dtype for dtype in DTYPES if layout != "OME-TIFF" or dtype not in NOT_IN_OME]
    cases = {*zip(dtypes, cycle(compressions), strict=False), *product(("u2", "f4"), compressions)}
    for (dtype, compression), order in product(sorted(cases), "<>"):
        values = random_volume(SHAPE, np.dtype(dtype).newbyteorder(order))
        write_tiff(tmp_path / "in.tif", values, layout, compression=compression, axes="ZYX")
        assert_holds(tmp_path / "in.tif", values)


@pytest.mark.parametrize("layout", ["strips", "tiles"])
def test_predicted_values_are_read_as_they_were_written(tmp_path: Path, layout: str) -> None:
    for dtype, order, compression in product(("u1", "i2", "u4", "f4", "f8"), "<>", PREDICTED):
        values = random_volume(SHAPE, np.dtype(dtype).newbyteorder(order))
        write_tiff(tmp_path / "in.tif", values, layout, compression=compression, predictor=True)
        assert_holds(tmp_path / "in.tif", values)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("layout", ["contiguous", "strips", "tiles"])
def test_samples_are_channels(tmp_path: Path, planar: str, layout: str) -> None:
    shape = (3, 40, 50) if planar == "separate" else (40, 50, 3)
    values = random_volume(shape)
    write_tiff(
        tmp_path / "in.tif",
        values,
        layout,
        axes="SYX" if planar == "separate" else "YXS",
        photometric="rgb",
        planarconfig=planar,
    )
    source = assert_holds(tmp_path / "in.tif", values)
    assert [axis.kind for axis in source.axes].index("channel") == shape.index(3)
    assert source.volume.channels == 3


def test_pages_with_samples_are_slices_with_channels(tmp_path: Path) -> None:
    values = random_volume((4, 40, 50, 3))
    write_tiff(tmp_path / "in.tif", values, "tiles", axes="QYXS", photometric="rgb")
    source = assert_holds(tmp_path / "in.tif", values)
    assert [axis.name for axis in source.axes] == ["z", "y", "x", "c"]


def test_the_indices_of_a_palette_are_read(tmp_path: Path) -> None:
    values = random_volume((19, 23))
    colors = np.zeros((3, 256), np.uint16)
    write_tiff(tmp_path / "in.tif", values, photometric="palette", colormap=colors)
    assert_holds(tmp_path / "in.tif", values)


def test_voxels_of_a_lossy_compression_are_those_of_its_decoder(tmp_path: Path) -> None:
    write_tiff(tmp_path / "in.tif", random_volume((2, 64, 48)), "tiles", compression="jpeg")
    expected = tifffile.imread(tmp_path / "in.tif")
    np.testing.assert_array_equal(read(find_source(f"{tmp_path}/in.tif")), expected)


def test_packed_integers_are_unpacked(tmp_path: Path) -> None:
    values = random_volume((2, 190, 230), "u2") * 40
    write_tiff(tmp_path / "in.tif", values, bitspersample=12)
    assert (tmp_path / "in.tif").stat().st_size < values.nbytes
    assert_holds(tmp_path / "in.tif", values)


def test_tiles_that_were_never_written_are_zero(tmp_path: Path) -> None:
    values = random_volume((32, 32))
    values[16:, :16] = 0
    tiles = [values[:16, :16], values[:16, 16:], None, values[16:, 16:]]
    tifffile.imwrite(
        tmp_path / "in.tif", iter(tiles), shape=(32, 32), dtype="u1", tile=(16, 16),
        compression="zlib",
    )  # fmt: skip
    assert_holds(tmp_path / "in.tif", values)


# ------------------------------------------------------------------------- axes


def axes_of(source: ImageSource) -> dict[str, tuple[Any, ...]]:
    return {a.name: (a.kind, a.scale, a.translation, a.unit) for a in source.axes}


def test_an_ome_tiff_names_its_axes_channels_and_sizes(tmp_path: Path) -> None:
    values = random_volume((2, 3, 4, 19, 23))
    metadata = {
        "PhysicalSizeX": 250.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeZ": 3.0,
        "TimeIncrement": 30.0,
        "Channel": {"Name": ["DAPI", "GFP", "actin"]},
        "Plane": {
            "PositionX": [0.5] * 24,
            "PositionXUnit": ["µm"] * 24,
            "PositionY": [7.0] * 24,
        },
    }
    path = tmp_path / "in.ome.tif"
    write_tiff(path, values, "OME-TIFF", axes="TCZYX", metadata=metadata)
    source = assert_holds(path, values)
    assert axes_of(source) == {
        "t": ("time", 30.0, 0.0, "second"),
        "c": ("channel", 1.0, 0.0, None),
        "z": ("space", 3.0, 0.0, "micrometer"),
        "y": ("space", 0.5, 0.0, "micrometer"),
        "x": ("space", 250.0, pytest.approx(500.0), "nanometer"),
    }
    assert source.named_by == "OME-TIFF metadata"
    picked = find_source(str(path), Selection(channels=("actin", "DAPI")))
    assert picked.channels == (2, 0)


def test_an_imagej_hyperstack_names_its_axes_and_sizes(tmp_path: Path) -> None:
    values = random_volume((2, 4, 3, 19, 23), "u2")
    tifffile.imwrite(
        tmp_path / "in.tif",
        values,
        imagej=True,
        resolution=(4.0, 2.0),
        metadata={"spacing": 3.0, "unit": "um", "finterval": 0.5, "axes": "TZCYX"},
    )
    source = assert_holds(tmp_path / "in.tif", values)
    assert axes_of(source) == {
        "t": ("time", 0.5, 0.0, "second"),
        "z": ("space", 3.0, 0.0, "micrometer"),
        "c": ("channel", 1.0, 0.0, None),
        "y": ("space", 0.5, 0.0, "micrometer"),
        "x": ("space", 0.25, 0.0, "micrometer"),
    }
    assert source.named_by == "ImageJ metadata"


@pytest.mark.parametrize(
    ("axes", "labels", "names"),
    [
        ("ZCYX", ["DAPI", "GFP"] * 3, ("DAPI", "GFP")),
        ("ZCYX", ["1 of 6", "2 of 6", "3 of 6", "4 of 6", "5 of 6", "6 of 6"], ()),
        ("ZYX", ["DAPI\nmore", "GFP", "actin"], ("DAPI", "GFP", "actin")),
        ("ZYX", None, ()),
    ],
)
def test_labels_of_the_slices_of_an_imagej_stack_name_its_channels(
    tmp_path: Path, axes: str, labels: list[str] | None, names: tuple[str, ...]
) -> None:
    values = random_volume((3, 2, 9, 8) if "C" in axes else (3, 9, 8), "u2")
    metadata = {"axes": axes} | ({} if labels is None else {"Labels": labels})
    tifffile.imwrite(tmp_path / "in.tif", values, imagej=True, metadata=metadata)
    meaning = axes.lower() if "C" in axes else "cyx"
    selection = Selection(axes=meaning, channels=("GFP", "DAPI"))
    if names:
        assert find_source(str(tmp_path / "in.tif"), selection).channels == (1, 0)
        return
    with pytest.raises(JobError, match="no labels"):
        find_source(str(tmp_path / "in.tif"), selection)


@pytest.mark.parametrize(
    ("resolution", "unit", "size"),
    [
        ((20_000, 10_000), "CENTIMETER", (1.0, 0.5)),
        ((50_800, 25_400), "INCH", (1.0, 0.5)),
        ((2, 1), "MICROMETER", (1.0, 0.5)),
        ((72, 72), "INCH", (1.0, 1.0)),
        ((118, 118), "CENTIMETER", (1.0, 1.0)),
        ((3, 3), "NONE", (1.0, 1.0)),
    ],
)
def test_the_resolution_is_the_voxel_size_unless_it_is_for_printing(
    tmp_path: Path, resolution: tuple[int, int], unit: str, size: tuple[float, float]
) -> None:
    write_tiff(
        tmp_path / "in.tif", random_volume(SHAPE), resolution=resolution, resolutionunit=unit
    )
    z, y, x = find_source(f"{tmp_path}/in.tif").axes
    assert (y.scale, x.scale) == pytest.approx(size)
    assert x.unit == y.unit == (None if size == (1.0, 1.0) else "micrometer")
    assert (z.scale, z.unit) == (1.0, None)


def test_pages_without_metadata_are_slices(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        for page in random_volume(SHAPE):
            writer.write(page, metadata=None, contiguous=False)
    source = assert_holds(tmp_path / "in.tif", random_volume(SHAPE))
    assert ([axis.name for axis in source.axes], source.named_by) == (["z", "y", "x"], "")


def test_rows_that_could_be_colour_are_refused_until_axes_are_set(tmp_path: Path) -> None:
    write_tiff(tmp_path / "in.tif", random_volume((64, 80, 3)), axes="QYX")
    with pytest.raises(JobError) as error:
        find_source(f"{tmp_path}/in.tif")
    assert error.value.code is ErrorCode.AXES_AMBIGUOUS
    source = find_source(f"{tmp_path}/in.tif", Selection(axes="yxc"))
    assert source.volume.channels == 3


def write_pyramid(path: Path, levels: list[npt.NDArray[Any]], **metadata: Any) -> None:
    with tifffile.TiffWriter(path, ome=True) as writer:
        options: dict[str, Any] = {"tile": (16, 16), "photometric": "minisblack"}
        first = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, **metadata}
        writer.write(levels[0], subifds=len(levels) - 1, metadata=first, **options)
        for values in levels[1:]:
            writer.write(values, subfiletype=1, **options)


def test_each_level_of_a_pyramid_has_its_voxels_and_position(tmp_path: Path) -> None:
    levels = [random_volume((3, 65, 40)), random_volume((3, 32, 20)), random_volume((3, 16, 10))]
    path = tmp_path / "in.ome.tif"
    write_pyramid(path, levels)
    for number, values in enumerate(levels):
        source = find_source(str(path), Selection(level=number))
        np.testing.assert_array_equal(read(source), values)
        scale = 0.5 * 2**number
        position = (scale - 0.5) / 2
        for axis in source.axes[1:]:
            assert (axis.scale, axis.translation) == pytest.approx((scale, position))
        assert source.axes[0].scale == 1.0
    for level in (3, "half"):
        with pytest.raises(StoreError) as error:
            find_source(str(path), Selection(level=level))
        assert error.value.code is ErrorCode.STORE_UNSUPPORTED


# ------------------------------------------------------------------------- several files


def ome_of_files(names: list[str]) -> str:
    """Return OME-XML of a stack with one plane in each file."""
    data = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{z}</UUID>'
        "</TiffData>"
        for z, name in enumerate(names)
    )
    return (
        f'<?xml version="1.0"?><OME xmlns="{OME}" UUID="urn:uuid:0"><Image ID="Image:0" Name="a">'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="23" SizeY="19" '
        f'SizeZ="{len(names)}" SizeC="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
        f"{data}</Pixels></Image></OME>"
    )


def write_files(folder: Path, names: list[str], values: npt.NDArray[Any], **options: Any) -> Path:
    """Write an OME-TIFF of several files; return the first."""
    xml = ome_of_files(names)
    for name, plane in zip(names, values, strict=True):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, plane, description=xml.encode(), metadata=None, **options)
    return folder / names[0]


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "rowsperstrip": 4}])
def test_an_ome_tiff_of_several_files_is_one_array(tmp_path: Path, options: dict[str, Any]) -> None:
    values = random_volume((3, 19, 23))
    path = write_files(tmp_path, ["a.tif", "b.tif", "more/c.tif"], values, **options)
    source = assert_holds(path, values)
    assert source.options["files"] == "b.tif\nmore/c.tif"
    before = source.identity()
    os.utime(tmp_path / "more" / "c.tif", (1, 1))
    assert source.identity() != before
    (tmp_path / "b.tif").unlink()
    assert source.identity() is None
    refused(path, ErrorCode.STORE_UNSUPPORTED, "1 of its 3 pages are missing")


def test_voxels_that_all_lie_in_another_file_are_read_from_it(tmp_path: Path) -> None:
    values = random_volume((19, 23))
    path = write_files(tmp_path, ["a.tif", "b.tif"], np.stack([values * 0, values]))
    xml = ome_of_files(["b.tif"]).replace("urn:uuid:0</UUID>", "urn:uuid:1</UUID>")
    tifffile.imwrite(path, values * 0, description=xml.encode(), metadata=None)
    assert assert_holds(path, values).options["files"] == "b.tif"


def test_a_file_elsewhere_that_the_metadata_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = write_files(tmp_path / "in", ["a.tif", "../b.tif"], random_volume((2, 19, 23)))
    refused(path, ErrorCode.STORE_UNSUPPORTED, "../b.tif")


@pytest.mark.parametrize("options", [{}, {"layout": "strips", "compression": "zlib"}])
def test_a_pattern_is_a_stack_in_natural_order(tmp_path: Path, options: dict[str, Any]) -> None:
    values = random_volume((12, 19, 23))
    pattern = write_stack(tmp_path / "slices", values, **options)
    source = assert_holds(pattern, values)
    assert [axis.name for axis in source.axes] == ["z", "y", "x"]


@pytest.mark.parametrize(
    ("names", "warns"),
    [
        (["a_1_1", "a_1_2", "a_1_3"], 0),
        (["a_1_10", "a_1_20", "a_1_30"], 0),
        (["a_1_08", "a_1_09", "a_1_11"], 1),
        (["z1", "z10", "z11", "z12"], 1),
        (["a_1_1", "a_1_2", "a_2_1", "a_2_2"], 0),
        (["b", "c", "e"], 0),
        (["1", "9"], 0),
    ],
)
def test_a_stack_in_which_a_number_is_missing_is_a_warning(
    tmp_path: Path, names: list[str], warns: int
) -> None:
    for name in names:
        write_tiff(tmp_path / f"{name}.tif", random_volume((19, 23)))
    source = find_source(f"{tmp_path}/*.tif")
    assert len(source.file_doubts()) == warns
    assert find_source(f"{tmp_path}/{names[0]}.tif").file_doubts() == ()


def test_a_file_with_two_images_is_a_warning(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "in.ome.tif") as file:
        for values in (random_volume(SHAPE), random_volume(SHAPE)):
            file.write(values, metadata={"axes": "ZYX"})
    assert len(find_source(str(tmp_path / "in.ome.tif")).file_doubts()) == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("scan.tif", "scan.ome.tif"),
        ("scna.ome.tif", "scan.ome.tif"),
        ("slice/*.tif", ""),
        ("slcies/z1.tif", "slices"),
        ("other/slices/x.tif", ""),
        ("data.h5:raw", "data.h5"),
    ],
)
def test_a_missing_path_names_a_similar_one(tmp_path: Path, path: str, name: str) -> None:
    write_stack(tmp_path / "slices", random_volume(SHAPE))
    for file in ("scan.ome.tif", "data.h5"):
        (tmp_path / file).touch()
    refused(tmp_path / path, ErrorCode.STORE_MISSING, f"did you mean '{name}'" if name else "")


def test_a_stack_of_colour_images_has_channels(tmp_path: Path) -> None:
    values = random_volume((3, 40, 50, 3))
    pattern = write_stack(tmp_path / "slices", values, axes="YXS", photometric="rgb")
    source = assert_holds(pattern, values)
    assert [axis.name for axis in source.axes] == ["z", "y", "x", "c"]


@pytest.mark.parametrize("other", [random_volume((19, 22)), random_volume((19, 23), "u2")])
def test_a_slice_of_another_shape_or_dtype_is_refused_by_name(
    tmp_path: Path, other: npt.NDArray[Any]
) -> None:
    pattern = write_stack(tmp_path, random_volume((3, 19, 23)))
    write_tiff(tmp_path / "z1.tif", other)
    refused(pattern, ErrorCode.STORE_UNSUPPORTED, f"{tmp_path}/z1.tif")


def test_a_stack_is_another_input_after_a_slice_was_added_or_replaced(tmp_path: Path) -> None:
    source = find_source(write_stack(tmp_path, random_volume((3, 19, 23))))
    first = source.identity()
    os.utime(tmp_path / "z1.tif", (1, 1))
    second = source.identity()
    write_tiff(tmp_path / "z3.tif", random_volume((19, 23)))
    assert len({first, second, source.identity()}) == 3
    with pytest.raises(StoreError):
        source.open()


def test_a_slice_that_was_replaced_by_another_shape_is_an_error_of_the_chunk(
    tmp_path: Path,
) -> None:
    array = find_source(write_stack(tmp_path, random_volume((3, 19, 23)))).open()
    write_tiff(tmp_path / "z1.tif", random_volume((25, 25)))
    array.read(Box((0, 0, 0), (1, 19, 23)))
    with pytest.raises(ChunkReadError, match=r"z1\.tif"):
        array.read(Box((0, 0, 0), (3, 19, 23)))


def test_a_pattern_without_files_and_a_folder_of_slices_say_what_to_use(tmp_path: Path) -> None:
    write_stack(tmp_path / "slices", random_volume((3, 19, 23)))
    refused(tmp_path / "none" / "*.tif", ErrorCode.STORE_MISSING, "/none/*.tif")
    refused(tmp_path / "slices", ErrorCode.STORE_UNSUPPORTED, f"{tmp_path}/slices/*.tif")


def test_a_file_whose_name_is_a_pattern_is_a_file(tmp_path: Path) -> None:
    values = random_volume(SHAPE)
    write_tiff(tmp_path / "a[1].tif", values)
    assert_holds(tmp_path / "a[1].tif", values)


# ------------------------------------------------------------------------- damage


@pytest.mark.parametrize("content", [b"", b"II*", b"<!DOCTYPE html>", b"II*\0\xff\xff\xff\xff"])
def test_a_file_that_is_no_tiff_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.tif").write_bytes(content)
    refused(tmp_path / "in.tif", ErrorCode.STORE_UNSUPPORTED, f"{tmp_path}/in.tif: ")


@pytest.mark.parametrize("layout", ["contiguous", "strips", "OME-TIFF"])
def test_a_truncated_file_is_refused_or_its_chunks_fail(tmp_path: Path, layout: str) -> None:
    path, values = tmp_path / "in.tif", random_volume(SHAPE)
    write_tiff(path, values, layout, compression="none" if layout == "contiguous" else "zlib")
    content = path.read_bytes()
    refusals = 0
    for size in range(len(content) - 1, 0, -max(1, len(content) // 40)):
        path.write_bytes(content[:size])
        try:
            region = read(find_source(str(path)))
        except (StoreError, ChunkReadError, JobError):
            refusals += 1
        else:
            assert region.shape == values.shape
            np.testing.assert_array_equal(region, values)
    assert refusals > 35


def test_a_damaged_strip_is_an_error_of_its_chunk(tmp_path: Path) -> None:
    path = tmp_path / "in.tif"
    write_tiff(path, random_volume(SHAPE), "strips", compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset, size = file.pages[2].dataoffsets[1], file.pages[2].databytecounts[1]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    source = find_source(str(path))
    read(source, Box((0, 0, 0), (2, 19, 23)))
    with pytest.raises(ChunkReadError) as error:
        read(source)
    assert error.value.code is ErrorCode.INPUT_UNREADABLE


def test_a_file_with_voxels_that_are_no_numbers_of_one_dtype_is_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "in.tif", random_volume((19, 23)))
    content = (tmp_path / "in.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "in.tif") as file:
        offset = file.pages[0].tags[258].valueoffset
    (tmp_path / "in.tif").write_bytes(content[:offset] + b"\x45\0" + content[offset + 2 :])
    refused(tmp_path / "in.tif", ErrorCode.STORE_UNSUPPORTED, "69 bits")


# ------------------------------------------------------------------------- packages


def test_a_compression_that_is_not_installed_is_named_with_its_package(tmp_path: Path) -> None:
    write_tiff(tmp_path / "in.tif", random_volume(SHAPE), "strips", compression="lzw")
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from chunkq.storage.images import find_source\n"
        "from chunkq.errors import StoreError\n"
        f"try: find_source({str(tmp_path / 'in.tif')!r})\n"
        "except StoreError as error: print(error.code, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(ErrorCode.PACKAGE_MISSING)
    assert "LZW" in done.stdout
    assert "imagecodecs" in done.stdout


def test_tifffile_is_named_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiff(tmp_path / "in.tif", random_volume(SHAPE))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    refused(tmp_path / "in.tif", ErrorCode.PACKAGE_MISSING, "tifffile", "[tiff]")


# ------------------------------------------------------------------------- regions


BIG = (1, 1500, 1500)


@pytest.mark.parametrize(
    ("options", "is_staged"),
    [
        ({"rowsperstrip": 1500, "compression": "zlib"}, True),
        ({"rowsperstrip": 100, "compression": "zlib"}, False),
        ({"tile": (256, 256), "compression": "zlib"}, False),
        ({"rowsperstrip": 1500}, False),
    ],
)
def test_a_file_in_large_compressed_pieces_says_that_it_cannot_be_read_by_region(
    tmp_path: Path, options: dict[str, Any], is_staged: bool
) -> None:
    values = random_volume(BIG, "u2")
    write_tiff(tmp_path / "in.tif", values, axes="ZYX", **options)
    assert bool(TiffFormat().find(f"{tmp_path}/in.tif").staged) is is_staged
    assert_holds(tmp_path / "in.tif", values)


def test_a_piece_is_decoded_once_for_the_boxes_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random_volume(BIG, "u2")
    write_tiff(tmp_path / "in.tif", values, rowsperstrip=1500, compression="zlib")
    decoded: list[int] = []
    decode = tiff_pages._decode
    monkeypatch.setattr(
        tiff_pages, "_decode", lambda *args: decoded.append(args[1]) or decode(*args)
    )
    array = find_source(f"{tmp_path}/in.tif").open()
    for start in range(0, 1500, 300):
        box = Box((0, start, 0), (1, start + 300, 700))
        np.testing.assert_array_equal(array.read(box), values[box.slices((0, 0, 0))])
    assert decoded == [0]


def test_decoded_pieces_are_removed_when_they_need_too_much_memory() -> None:
    cache = tiff_pages.SegmentCache(max_bytes=25)
    for number in range(4):
        cache.put((0, 0, number), np.zeros(10, np.uint8))
        cache.get((0, 0, 0))
    assert [cache.get((0, 0, n)) is not None for n in range(4)] == [True, False, False, True]


def test_a_piece_that_is_too_large_to_be_decoded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkq.storage.formats.tiff_file.MAX_SEGMENT_BYTES", 1 << 20)
    write_tiff(tmp_path / "in.tif", random_volume(BIG, "u2"), rowsperstrip=1500, compression="zlib")
    refused(tmp_path / "in.tif", ErrorCode.STORE_UNSUPPORTED, "tiles")


# ------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "strips", "compression": "zlib"}, {"layout": "OME-TIFF", "axes": "ZYX"}],
)
def test_a_file_on_a_web_server_is_read_in_parts(tmp_path: Path, options: dict[str, Any]) -> None:
    values = random_volume((6, 200, 190), "u2")
    write_tiff(tmp_path / "in.tif", values, **options)
    habits = Habits()
    with web_server(tmp_path, habits) as url:
        source = find_source(f"{url}/in.tif")
        box = Box((2, 50, 60), (4, 90, 120))
        np.testing.assert_array_equal(read(source, box), values[box.slices((0, 0, 0))])
        np.testing.assert_array_equal(read(source), values)
        assert source.identity() is not None
        habits.ranges = False
        refused(f"{url}/in.tif", ErrorCode.STORE_UNSUPPORTED, "parts of files")
        refused(f"{url}/nothing.tif", ErrorCode.STORE_MISSING, f"{url}/nothing.tif")
        refused(f"{url}/*.tif", ErrorCode.STORE_UNSUPPORTED, "lists no files")


# ------------------------------------------------------------------------- jobs


def write_page(folder: Path) -> str:
    write_tiff(folder / "in.tif", random_volume(SMALL), "strips", compression="lzw")
    return "in.tif"


def write_series(folder: Path) -> str:
    """Write a time series whose points are the small volume."""
    write_tiff(folder / "in.ome.tif", random_volume(SMALL)[None], "OME-TIFF", axes="TYX")
    return "in.ome.tif"


@pytest.mark.parametrize("write", [write_page, write_series])
def test_a_job_over_a_tiff_has_the_output_of_the_same_voxels_in_zarr(
    tmp_path: Path, write: Callable[[Path], str]
) -> None:
    tiff, zarr = small_workspace(tmp_path / "tiff"), small_workspace(tmp_path / "zarr")
    tiff.write_job("job.yaml", input=write(tmp_path / "tiff"))
    for workspace in (tiff, zarr):
        workspace.produce()
        workspace.compute_inline()
        workspace.finalize().ok()
    assert [source.format for source in tiff.job.record.sources] == ["tiff"]
    np.testing.assert_array_equal(read_output(tiff.output), read_output(zarr.output))


def test_the_slices_of_a_job_with_several_stacks_are_named_by_their_folders(
    tmp_path: Path,
) -> None:
    workspace = small_workspace(tmp_path)
    for name in ("a", "b"):
        write_stack(tmp_path / name, random_volume((1, *SMALL)))
    write_tiff(tmp_path / "c.ome.tif", random_volume(SMALL))
    inputs = [{"path": f"{name}/*.tif", "axes": "tyx"} for name in "ab"]
    workspace.write_job(input=[*inputs, "c.ome.tif"])
    workspace.call("produce", "job.json").ok()
    assert [image.name for image in workspace.job.record.images] == ["a", "b", "c"]


def test_an_input_on_the_command_line_can_be_a_tiff(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path)
    write_page(tmp_path)
    result = workspace.call("plan", "job.json", "-i", "in.tif")
    result.ok()
    assert "y 32, x 22" in result.out


def test_the_format_is_found_by_its_name() -> None:
    assert isinstance(format_named("tiff"), TiffFormat)
