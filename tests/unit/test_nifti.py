"""NIfTI files: axes, dtypes and scale factors as in nibabel, and files that are refused."""

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from nibabel import orientations
from pydantic import ValidationError

from chunkq.errors import ChunkReadError, ErrorCode, JobError, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.job.input_config import InputConfig
from chunkq.job.mask_source import mask_axes
from chunkq.storage.formats import gzip_file
from chunkq.storage.formats.nifti import affine_of
from chunkq.storage.images import find_source
from chunkq.storage.selection import Selection
from chunkq.storage.staged import Slabs
from tests.harness.nifti import AFFINE, TURNED, nifti_bytes, write_nifti
from tests.harness.volumes import random_volume

SHAPE = (7, 6, 5)
DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8"]


def read(path: Path, **selection: Any) -> np.ndarray[Any, Any]:
    source = find_source(str(path), Selection(**selection))
    array = source.present(source.open())
    return array.read(Box.of_shape(array.shape))


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [(None, 0.0), (0.5, 3.0), (1.0, 0.0), (0.0, 3.0)])
def test_values_and_dtypes_are_those_of_nibabel(
    tmp_path: Path, dtype: str, version: int, endianness: str, scale: tuple[float | None, float]
) -> None:
    path, (slope, inter) = tmp_path / "in.nii", scale
    write_nifti(
        path, random_volume(SHAPE, dtype), version=version, endianness=endianness, slope=slope,
        inter=inter,
    )  # fmt: skip
    expected = np.asanyarray(nibabel.load(path).dataobj).T  # type: ignore[attr-defined]
    found = read(path)
    assert found.dtype == expected.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, expected)
    if slope in (None, 0.0, 1.0):
        assert found.dtype == np.dtype(dtype)


def test_axes_are_those_of_the_file_from_the_slowest_to_the_fastest(tmp_path: Path) -> None:
    write_nifti(
        tmp_path / "in.nii", np.zeros((2, 3, *SHAPE), "u1"), pixdim=[1, 0.5, 1.5, 2, 0.25, 0, 0, 0],
        toffset=4, units=("micron", "msec"),
    )  # fmt: skip
    source = find_source(str(tmp_path / "in.nii"))
    assert source.axes == (
        Axis("c", "channel", 2),
        Axis("t", "time", 3, "millisecond", 0.25, 4.0),
        Axis("z", "space", 7, "micrometer", 2.0, 11.0),
        Axis("y", "space", 6, "micrometer", 1.5, 3.0),
        Axis("x", "space", 5, "micrometer", 0.5, -7.0),
    )
    np.testing.assert_array_equal(affine_of(source.options), AFFINE)


@pytest.mark.parametrize("flip", [(0, 0), (1, 2)])
def test_an_image_that_is_turned_keeps_its_voxel_sizes_and_has_no_position(
    tmp_path: Path, flip: tuple[int, int]
) -> None:
    affine = AFFINE.copy()
    affine[:3, :3] = affine[:3, [1, 0, 2]] if flip == (1, 2) else affine[:3, :3] * [-1, 1, 1]
    write_nifti(tmp_path / "in.nii", np.zeros(SHAPE, "u1"), affine=affine)
    axes = find_source(str(tmp_path / "in.nii")).axes
    assert [axis.scale for axis in axes] == ([2, 0.5, 1.5] if flip == (1, 2) else [2, 1.5, 0.5])
    assert {axis.translation for axis in axes} == {0}


@pytest.mark.parametrize(
    ("affine", "how"),
    [
        (AFFINE, ""),
        (AFFINE * [-1, 1, 1, 1], "flipped"),
        (TURNED, "flipped or permuted"),
        (TURNED + np.diag([0.125, 0.125, 0.125, 0]), "tilted"),
    ],
)
def test_a_position_that_is_lost_is_named_with_the_cause(
    tmp_path: Path, affine: npt.NDArray[Any], how: str
) -> None:
    path = str(tmp_path / "in.nii")
    write_nifti(path, np.zeros(SHAPE, "u1"), affine=affine)
    (line,) = find_source(path).lost_position() or ("",)
    assert how in line
    assert bool(line) == bool(how)
    if how != "tilted":  # an orientation keeps the positions of axes that are parallel
        assert not find_source(path, Selection(orientation="RAS")).lost_position()
    else:
        assert find_source(path, Selection(orientation="RAS")).lost_position()
    write_nifti(path, np.zeros(SHAPE, "u1"), affine=affine, sform_code=0, qform_code=0)
    assert not find_source(path).lost_position()  # it has none


def test_the_order_xyz_is_that_of_the_file(tmp_path: Path) -> None:
    values = random_volume(SHAPE)
    write_nifti(tmp_path / "in.nii", values)
    np.testing.assert_array_equal(read(tmp_path / "in.nii", order="xyz"), values.T)


# ------------------------------------------------------------------------- orientations

ALL_CODES = sorted(
    "".join(letters)
    for names in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*names)
)
OBLIQUE = TURNED + np.diag([0.125, 0.125, 0.125, 0])


def in_orientation(path: Path, codes: str) -> Any:
    """Return the image in an orientation, as nibabel turns it."""
    image = nibabel.load(path)  # type: ignore[attr-defined]
    target = orientations.axcodes2ornt(codes)
    return image.as_reoriented(
        orientations.ornt_transform(orientations.io_orientation(image.affine), target)
    )


@pytest.mark.parametrize("affine", [TURNED, OBLIQUE])
@pytest.mark.parametrize("codes", ALL_CODES)
def test_voxels_and_affines_of_every_orientation_are_those_of_nibabel(
    tmp_path: Path, codes: str, affine: npt.NDArray[Any]
) -> None:
    write_nifti(tmp_path / "in.nii", random_volume(SHAPE), affine=affine)
    expected = in_orientation(tmp_path / "in.nii", codes)
    assert "".join(nibabel.aff2axcodes(expected.affine)) == codes  # type: ignore[attr-defined]
    selection = Selection(orientation=codes)
    source = find_source(str(tmp_path / "in.nii"), selection)
    array = source.present(source.open())
    voxels = np.asanyarray(expected.dataobj)
    assert array.shape == source.shape == voxels.T.shape
    np.testing.assert_array_equal(array.read(Box.of_shape(array.shape)), voxels.T)
    part = Box((1, 2, 0), tuple(size - 1 for size in array.shape))
    np.testing.assert_array_equal(array.read(part), voxels.T[part.slices((0, 0, 0))])
    np.testing.assert_allclose(affine_of(source.options), expected.affine)
    assert json.loads(str(source.options["affine"])) == affine.tolist()
    assert source.options["orientation"] == codes
    assert [axis.name for axis in source.axes] == ["z", "y", "x"]
    assert [axis.size for axis in source.stored_axes] == list(SHAPE)
    np.testing.assert_array_equal(read(tmp_path / "in.nii", orientation=codes, order="xyz"), voxels)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_positions_of_every_orientation_are_those_of_the_voxels(tmp_path: Path, codes: str) -> None:
    write_nifti(tmp_path / "in.nii", random_volume(SHAPE), affine=TURNED)
    expected = in_orientation(tmp_path / "in.nii", codes).affine
    write_nifti(tmp_path / "in.nii", random_volume(SHAPE), affine=TURNED + 1e-6 * np.eye(4))
    axes = find_source(str(tmp_path / "in.nii"), Selection(orientation=codes)).axes
    for number, axis in enumerate(reversed(axes)):  # x first
        world = next(n for n, pair in enumerate(("RL", "AP", "SI")) if codes[number] in pair)
        index = np.zeros((axis.size, 4))
        index[:, number], index[:, 3] = np.arange(axis.size), 1
        positions = (index @ expected.T)[:, world]
        np.testing.assert_allclose(
            axis.translation + axis.scale * index[:, number], positions, atol=1e-5
        )
        assert (axis.scale > 0) == (codes[number] in "RAS")
        assert axis.unit == "millimeter"


def test_the_orientation_ras_is_the_closest_canonical_one(tmp_path: Path) -> None:
    values = random_volume((3, *SHAPE))
    write_nifti(tmp_path / "in.nii", values, affine=OBLIQUE)
    image = nibabel.load(tmp_path / "in.nii")  # type: ignore[attr-defined]
    expected = nibabel.as_closest_canonical(image)  # type: ignore[attr-defined]
    source = find_source(str(tmp_path / "in.nii"), Selection(orientation="RAS", time=1))
    array = source.present(source.open())
    np.testing.assert_array_equal(
        array.read(Box.of_shape(array.shape)), np.asanyarray(expected.dataobj)[..., 1].T
    )
    assert {axis.translation for axis in source.spatial_axes} == {0}
    lengths = np.linalg.norm(expected.affine[:3, :3], axis=0)[::-1]
    np.testing.assert_allclose([axis.scale for axis in source.spatial_axes], lengths, rtol=1e-6)


def test_a_copy_of_a_compressed_image_has_the_stored_order(tmp_path: Path) -> None:
    write_nifti(tmp_path / "in.nii.gz", random_volume((70, 6, 5)), affine=TURNED)
    with mock.patch.object(gzip_file, "WHOLE_BYTES", 0):
        source = find_source(str(tmp_path / "in.nii.gz"), Selection(orientation="RAS"))
    assert source.shape == (6, 5, 70)
    assert source.storage == (6, 5, 64)
    assert Slabs.of(source.stored_axes, 1).shape == (70, 6, 5)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 5), {}),
        (SHAPE, {"sform_code": 0}),
        (SHAPE, {"affine": np.diag([1.0, 0, 2, 1])}),
    ],
)
def test_an_image_whose_orientation_is_unknown_is_refused(
    tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    write_nifti(tmp_path / "in.nii", random_volume(shape), **options)
    with pytest.raises(StoreError, match="orientation") as error:
        find_source(str(tmp_path / "in.nii"), Selection(orientation="RAS"))
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED


def test_an_orientation_of_another_format_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", random_volume(SHAPE))
    with pytest.raises(JobError, match="orientation") as error:
        find_source(str(tmp_path / "in.npy"), Selection(orientation="RAS"))
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED


@pytest.mark.parametrize("codes", ["ras", "RA", "RAR", "RLS", "RASR", "XYZ", "", 3])
def test_letters_that_are_no_orientation_are_refused(codes: object) -> None:
    with pytest.raises(ValidationError, match="expected R or L"):
        InputConfig.model_validate({"path": "in.nii", "orientation": codes})


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_coarser_mask_lies_on_an_image_of_its_orientation(tmp_path: Path, codes: str) -> None:
    write_nifti(tmp_path / "in.nii", random_volume((8, 6, 4)), affine=TURNED)
    coarse = TURNED @ np.diag([2.0, 2, 2, 1])
    coarse[:3, 3] += TURNED[:3, :3] @ [0.5, 0.5, 0.5]
    write_nifti(tmp_path / "mask.nii", random_volume((4, 3, 2)), affine=coarse)
    image = find_source(str(tmp_path / "in.nii"), Selection(orientation=codes))
    mask = find_source(str(tmp_path / "mask.nii"), Selection(orientation=codes))
    axes = mask_axes(mask, image, None)
    assert [axis.count for axis in axes] == [size // 2 for size in image.shape]
    assert {axis.scale for axis in axes} == {2.0}
    np.testing.assert_allclose([axis.shift for axis in axes], 0, atol=1e-6)
    for other in (None, "RSA"):
        stored = find_source(str(tmp_path / "mask.nii"), Selection(orientation=other))
        for scale in (None, (2.0, 2.0, 2.0)):
            with pytest.raises(JobError, match=f"set orientation: {codes} in mask"):
                mask_axes(stored, image, scale)


def test_a_mask_that_runs_against_the_image_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "in.nii", random_volume(SHAPE), affine=TURNED)
    image = find_source(str(tmp_path / "in.nii"), Selection(orientation="RAS"))
    against = replace(image, options={}, axes=tuple(replace(a, scale=-a.scale) for a in image.axes))
    with pytest.raises(JobError, match="flip one of them"):
        mask_axes(against, image, None)


@pytest.mark.parametrize("shape", [(1, *SHAPE), (1, 1, *SHAPE), (1, 1, 1, 1, *SHAPE), (6, 5), (5,)])
def test_axes_of_length_one_are_no_time_and_no_channels(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    values = random_volume(shape)
    write_nifti(tmp_path / "in.nii", values)
    spatial = values.reshape(shape[-3:])
    np.testing.assert_array_equal(read(tmp_path / "in.nii"), spatial)


@pytest.mark.parametrize(("code", "channels"), [(128, 3), (2304, 4)])
def test_colours_are_channels(tmp_path: Path, code: int, channels: int) -> None:
    values = random_volume((*SHAPE, channels))
    content = bytearray(nifti_bytes(np.zeros(SHAPE, "u1"), datatype=code, bitpix=8 * channels))
    (tmp_path / "in.nii").write_bytes(content[:352] + values.tobytes())
    source = find_source(str(tmp_path / "in.nii"))
    assert source.volume.channels == channels
    np.testing.assert_array_equal(read(tmp_path / "in.nii"), np.moveaxis(values, -1, 0))
    np.testing.assert_array_equal(read(tmp_path / "in.nii", channels=("G",)), values[..., 1])


# ------------------------------------------------------------------------- files that are refused

VALID = nifti_bytes(random_volume(SHAPE, "i2"))


def changed(offset: int, content: bytes) -> bytes:
    return VALID[:offset] + content + VALID[offset + len(content) :]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("in.nii", VALID[:-1], "truncated"),
        ("in.nii.gz", gzip.compress(VALID)[:-20], "truncated"),
        ("in.nii.gz", gzip.compress(VALID[:-1]), "truncated"),
        ("in.nii.gz", gzip.compress(VALID)[:20], "truncated"),
        ("in.nii.gz", b"\x1f\x8b" + bytes(600), "gzip"),
        ("in.nii", b"", "empty"),
        ("in.nii", VALID[:100], "NIfTI header"),
        ("in.nii", changed(344, b"xx"), "NIfTI header"),
        ("in.nii", b"\n<!DOCTYPE html><html>" + bytes(600), "web page"),
        ("in.nii.gz", b"<html>" + bytes(600), "web page"),
        ("in.nii.gz", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("in.nii", bytes(128) + b"DICM" + bytes(600), "DICOM"),
        ("in.nii", changed(70, b"\x01\x00"), "data code 1"),
        ("in.nii", changed(40, np.array([3, 5, -6, 7], "<i2").tobytes()), "dimensions"),
        ("in.nii", changed(40, np.array([6, 5, 6, 7, 1, 1, 2], "<i2").tobytes()), "dimensions"),
        ("in.nii", changed(108, b"\0" * 4)[:344] + b"ni1" + VALID[347:], "inside the header"),
    ],
    ids=itertools.count(),
)
def test_a_file_that_is_no_whole_image_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, part: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError) as error:
        find_source(str(tmp_path / name))
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED
    assert str(error.value).startswith(f"input: {tmp_path / name}: ")
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_content_decides_whether_a_file_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "in.nii").write_bytes(gzip.compress(VALID))
    (tmp_path / "in.nii.gz").write_bytes(VALID)
    np.testing.assert_array_equal(read(tmp_path / "in.nii"), read(tmp_path / "in.nii.gz"))


def test_files_in_several_parts_of_gzip_are_whole(tmp_path: Path) -> None:
    """As bgzip writes them; the last bytes then say nothing about the size."""
    parts = [VALID[:400], VALID[400:], b""]
    (tmp_path / "in.nii.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    np.testing.assert_array_equal(read(tmp_path / "in.nii.gz"), random_volume(SHAPE, "i2"))


def test_voxels_that_fail_the_checksum_are_an_error(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(VALID))
    content[200] ^= 0xFF
    (tmp_path / "in.nii.gz").write_bytes(content)
    with pytest.raises(ChunkReadError):
        read(tmp_path / "in.nii.gz")


@pytest.mark.parametrize("whole_bytes", [0, 1 << 20])
def test_the_checksum_at_the_end_of_a_file_is_compared(tmp_path: Path, whole_bytes: int) -> None:
    content = bytearray(gzip.compress(VALID + bytes(4 << 20)))  # more than is read ahead
    (tmp_path / "in.nii.gz").write_bytes(content)
    with mock.patch.object(gzip_file, "WHOLE_BYTES", whole_bytes):
        array = find_source(str(tmp_path / "in.nii.gz")).open()
    content[-8] ^= 0xFF
    (tmp_path / "in.nii.gz").write_bytes(content)
    with pytest.raises(ChunkReadError):
        list(array.read_in_order([Box.of_shape(SHAPE)]))


def test_a_replaced_file_is_read_again(tmp_path: Path) -> None:
    path, values = tmp_path / "in.nii.gz", random_volume(SHAPE)
    write_nifti(path, values)
    np.testing.assert_array_equal(read(path), values)
    write_nifti(path, values + 1)
    np.testing.assert_array_equal(read(path), values + 1)


def test_nibabel_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nifti(tmp_path / "in.nii", random_volume(SHAPE))
    monkeypatch.setitem(__import__("sys").modules, "nibabel.nifti1", None)
    with pytest.raises(StoreError, match=r"\[nifti\]") as error:
        find_source(str(tmp_path / "in.nii"))
    assert error.value.code is ErrorCode.PACKAGE_MISSING


def test_files_of_other_formats_with_the_suffix_of_a_pair_are_not_nifti(tmp_path: Path) -> None:
    (tmp_path / "in.img").write_bytes(bytes(600))
    (tmp_path / "in.hdr").write_bytes(bytes(348))
    with pytest.raises(StoreError, match="is a file") as error:
        find_source(str(tmp_path / "in.img"))
    assert error.value.code is ErrorCode.STORE_UNSUPPORTED
