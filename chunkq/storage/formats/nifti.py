"""Format of NIfTI images: `.nii`, `.nii.gz`, and pairs of `.hdr` and `.img`, read with nibabel."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.axes import Axis, AxisKind
from chunkq.geometry.box import Box
from chunkq.install_hint import install_command
from chunkq.paths import is_url, without_secret
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats import gzip_file, suffixes
from chunkq.storage.formats.base import (
    AFFINE,
    NO_OPTIONS,
    NUMBERS,
    ORIENTATION,
    ArrayInfo,
    Format,
    Options,
    native_dtype,
    unreadable_error,
)
from chunkq.storage.formats.single_file import SingleFile, StoredVoxels, opening_error
from chunkq.storage.oriented import Orientation
from chunkq.system import buffers

RANK = 3
"""Spatial axes of the scanner."""
MAX_SHIFT = 1e-3
"""Distance (voxels) by which an affine may move a voxel off its axis and count as unrotated."""
IS_STREAMED = "is_streamed"
"""Option: whether a compressed file is too large to be kept decompressed in memory."""
CODES = ("sform_code", "qform_code")
"""Options: what the affine stands for, as in the header."""
QFORM = "qform"
"""Option: the affine (4, 4) of the qform, as JSON, if the file has a sform and another qform."""
PRESENTED_AFFINE = "presented_affine"
"""Option of an image that is presented in an orientation: the affine of its presented indices."""
COMPRESSED = "it is compressed with gzip"
"""Why a file cannot be read by region."""
HEAD_BYTES = 540
"""Size of a header of NIfTI-2; that of NIfTI-1 is smaller."""
HEAD_COMPRESSED = 1 << 16
"""Compressed bytes that contain a header."""
DIMENSIONS: tuple[tuple[str, AxisKind], ...] = (
    ("x", "space"), ("y", "space"), ("z", "space"), ("t", "time"), ("c", "channel"),
)  # fmt: skip
"""Name and kind of the dimensions of a header, the fastest first."""
UNITS = {
    "meter": "meter",
    "mm": "millimeter",
    "micron": "micrometer",
    "sec": "second",
    "msec": "millisecond",
    "usec": "microsecond",
}
"""Unit in nibabel -> unit of an axis."""
STAND_INS = (
    (b"<", "is a web page or an XML document, not a NIfTI file; download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer; run git lfs pull in the repository"),
)
"""First bytes of a file that is no NIfTI file -> what it is."""
DICOM = (b"DICM", slice(128, 132))
quiet = logging.Logger("nibabel")  # nibabel's own writes what it repairs to standard error
quiet.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class NiftiHeader:
    """What a header says of the voxels.

    shape    sizes of the dimensions, the slowest first: ([c,] [t,] z, y, x), and for colours a last
             axis of 3 or 4
    dtype    that of the stored numbers, in their byte order
    offset   number of bytes before them
    axes     the axes of `shape`
    affine   (4, 4) of voxel indices x, y, z
    codes    sform_code and qform_code
    qform    (4, 4) of the qform, if the affine is that of a sform and differs
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    axes: tuple[Axis, ...]
    labels: tuple[str, ...]
    affine: npt.NDArray[np.float64]
    codes: tuple[int, int]
    qform: npt.NDArray[np.float64] | None = None

    def scaled(self, values: Voxels) -> Voxels:
        """Return values * slope + inter as nibabel does; the values if the header has no slope."""
        if (self.slope, self.inter) == (1, 0):
            return values
        scaling = _nibabel("volumeutils").apply_read_scaling
        scaled: Voxels = scaling(values, np.float64(self.slope), np.float64(self.inter))
        return scaled


class NiftiArray(Array):
    """Voxels of a NIfTI image as an array ([c,] [t,] z, y, x), scaled as its header says.

    A file without compression is mapped into memory, or read in ranges at a URL. A compressed file
    is decompressed as a whole and kept, unless it `is_streamed`: then each call of `read`
    decompresses it up to the box.
    """

    def __init__(self, path: str, access: Access, *, is_streamed: bool = False) -> None:
        self.path, self._is_streamed = path, is_streamed
        header_path, data_path = parts(path)
        header_file, file = SingleFile(header_path, access), SingleFile(data_path, access)
        start = header_file.head(HEAD_COMPRESSED)
        if start.startswith(gzip_file.MAGIC):
            try:
                start = gzip_file.head(start, HEAD_BYTES)
            except Exception as error:  # zlib_ng.error
                raise header_file.error(f"damaged gzip file: {error}; copy it again") from None
            if not start:
                raise header_file.error("truncated gzip file without a header; copy it again")
        self.header = _parse_header(start, header_file, is_single=header_path == data_path)
        self.shape = self.header.shape
        self.dtype = native_dtype(self.header.scaled(np.zeros(1, self.header.dtype)).dtype)
        self._voxels = StoredVoxels(file, self.header.offset, self.shape, self.header.dtype)
        self._is_compressed = file.head(len(gzip_file.MAGIC)) == gzip_file.MAGIC
        if not self._is_compressed:
            file.require_parts()

    @property
    def is_large(self) -> bool:
        """Whether the file is compressed, and too large to be kept decompressed."""
        return self._is_compressed and self._voxels.end > gzip_file.WHOLE_BYTES

    def check_size(self) -> None:
        """Raise StoreError if the file is shorter than its header says."""
        file, end = self._voxels.file, self._voxels.end
        size = file.size()
        if self._is_compressed:
            is_enough, unit = gzip_file.has_at_least(file, end), " decompressed"
        else:
            is_enough, unit = size is None or size >= end, f", found {size}"
        if not is_enough:
            raise file.error(
                f"truncated, expected {end} bytes{unit} for shape {list(self.shape[::-1])} and "
                f"dtype {self.header.dtype.name}; copy it again"
            )

    @override
    def read(self, box: Box) -> Voxels:
        try:
            return self._converted(self._stored(box))
        except Exception as error:  # each file system raises different errors
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error

    def _stored(self, box: Box) -> Voxels:
        if not self._is_compressed:
            return self._voxels.read(box.slices((0,) * len(self.shape)))
        if not self._is_streamed:
            return gzip_file.read_whole(self._voxels)[box.slices((0,) * len(self.shape))]
        return next(gzip_file.read_boxes(self._voxels, [box], to_end=False))

    @override
    def read_in_order(self, boxes: Iterable[Box]) -> Iterator[Voxels]:
        if not self._is_streamed:
            yield from super().read_in_order(boxes)
            return
        try:
            for values in gzip_file.read_boxes(self._voxels, boxes, to_end=True):
                yield self._converted(values)
        except Exception as error:  # each file system raises different errors
            raise ChunkReadError(
                box_error(self.path, Box.of_shape(self.shape), "read", error)
            ) from error

    def _converted(self, stored: Voxels) -> Voxels:
        """Return scaled voxels in native byte order, which the caller owns."""
        return buffers.cast(self.header.scaled(stored), self.dtype)


class NiftiFormat(Format):
    """NIfTI-1 and NIfTI-2 images, recognized by their suffix, pairs also by their header.

    The axes are those of the file from the slowest to the fastest: ([c,] [t,] z, y, x). The
    identity has the size, the time of modification (at a URL, the unique key of fsspec) and the
    hash of the first bytes, of both files of a pair. With the option ORIENTATION, `find` describes
    the presented axes; arrays are opened as they are stored.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        name = path.lower()
        if name.endswith(suffixes.NIFTI):
            return is_url(path) or not os.path.isdir(path)
        if not name.endswith(suffixes.NIFTI_PAIR):
            return False
        try:  # ANALYZE and other formats have these suffixes, too
            start = SingleFile(parts(path)[0], Access.of(options)).head(HEAD_COMPRESSED)
        except (FileNotFoundError, IsADirectoryError):
            return False
        if start.startswith(gzip_file.MAGIC):
            start = gzip_file.head(start, HEAD_BYTES)
        return start[344:347] == b"ni1" or start[4:7] == b"ni2"

    @override
    def find(self, path: str, options: Options = NO_OPTIONS) -> ArrayInfo:
        access = Access.of(options)
        array = _open(path, access)
        try:
            array.check_size()
        except StoreError:
            raise
        except Exception as error:  # each file system raises different errors
            raise unreadable_error(path, error) from error
        header = array.header
        if header.dtype.kind not in NUMBERS:
            raise StoreError(
                f"input: {without_secret(path)}: unsupported dtype {header.dtype}; save the image "
                "with a dtype of numbers, such as uint8 or float32",
                code=ErrorCode.STORE_UNSUPPORTED,
            )
        axes = header.axes
        orientation: Orientation = ()
        oriented: Options = {}
        if (codes := options.get(ORIENTATION)) is not None:
            axes, orientation, affine = _presented(header, str(codes), path)
            oriented = {ORIENTATION: codes, PRESENTED_AFFINE: json.dumps(affine.tolist())}
        if header.qform is not None:
            oriented = {**oriented, QFORM: json.dumps(header.qform.tolist())}
        return ArrayInfo(
            path,
            axes,
            str(array.dtype),
            {
                **access.options,
                IS_STREAMED: array.is_large,
                AFFINE: json.dumps(header.affine.tolist()),
                **dict(zip(CODES, header.codes, strict=True)),
                **oriented,
            },
            named_by="the NIfTI header",
            labels=header.labels,
            staged=COMPRESSED if array.is_large else "",
            orientation=orientation,
        )

    @override
    def open(self, path: str, options: Options) -> Array:
        return _open(path, Access.of(options), is_streamed=bool(options.get(IS_STREAMED)))

    @override
    def identity(self, path: str, options: Options) -> str | None:
        access = Access.of(options)
        files = dict.fromkeys(parts(path))
        identities = [SingleFile(file, access).identity(HEAD_BYTES) for file in files]
        known = [identity for identity in identities if identity is not None]
        return " ".join(known) if len(known) == len(identities) else None


def affine_of(options: Options) -> npt.NDArray[np.float64]:
    """Return the affine (4, 4) in the options of a NIfTI image, for presented indices x, y, z."""
    return np.array(json.loads(str(options.get(PRESENTED_AFFINE, options[AFFINE]))), np.float64)


def affines_of(options: Options) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the affines (4, 4) of a NIfTI file for its indices x, y, z: of sform and of qform.

    They are equal if the file has one of them.
    """
    affine = json.loads(str(options[AFFINE]))
    qform = json.loads(str(options[QFORM])) if QFORM in options else affine
    return np.array(affine, np.float64), np.array(qform, np.float64)


def lost_position(options: Options, sizes: Sequence[int]) -> str:
    """Return how the axes of an image lie if they cannot hold its position; empty if they can.

    `sizes` are those of its spatial axes, the fastest first. An image without a position has none
    to lose.
    """
    if AFFINE not in options or not any(int(options.get(code, 0)) for code in CODES):
        return ""
    matrix = affine_of(options)[:3, :3]
    lengths = np.array([*sizes, *[1] * (RANK - len(sizes))])
    if ORIENTATION in options:
        rows = _nibabel("orientations").axcodes2ornt(str(options[ORIENTATION]))[:, 0].astype(int)
        return "" if _is_parallel(matrix, rows, lengths) else "tilted"
    if _is_straight(matrix):
        return ""
    rows = np.abs(matrix).argmax(axis=0)
    is_turned = len(set(rows.tolist())) == RANK and _is_parallel(matrix, rows, lengths)
    return "flipped or permuted" if is_turned else "tilted"


def orientation_of(options: Options) -> str | None:
    """Return the orientation that a job sets for a NIfTI image.

    It is empty if the job sets none, and None for options of another format.
    """
    return str(options.get(ORIENTATION, "")) if AFFINE in options else None


def parts(path: str) -> tuple[str, str]:
    """Return the paths of the file with the header and of the one with the voxels."""
    name = path.lower()
    end = ".gz" if name.endswith(".gz") else ""
    base, suffix = path[: len(path) - len(end) - 4], path[len(path) - len(end) - 4 :]
    if suffix.lower().removesuffix(end) not in (".hdr", ".img"):
        return path, path
    names = (".HDR", ".IMG") if suffix[:4].isupper() else (".hdr", ".img")
    header, data = (f"{base}{name}{suffix[4:]}" for name in names)
    return header, data


def _open(path: str, access: Access, *, is_streamed: bool = False) -> NiftiArray:
    try:
        return NiftiArray(path, access, is_streamed=is_streamed)
    except StoreError:
        raise
    except Exception as error:  # each file system raises different errors
        raise opening_error(path, error) from None


def _nibabel(module: str) -> Any:
    return import_module(f"nibabel.{module}")


def _parse_header(start: bytes, file: SingleFile, *, is_single: bool) -> NiftiHeader:
    """Return the header at the start of a file. Raises StoreError."""
    try:
        nifti1, nifti2 = _nibabel("nifti1"), _nibabel("nifti2")
    except ImportError as error:
        raise StoreError(
            f"input: {without_secret(file.path)}: NIfTI files need nibabel ({error}); run "
            f"`{install_command('nifti')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    singles = (nifti1.Nifti1Header, nifti2.Nifti2Header)
    pairs = (nifti1.Nifti1PairHeader, nifti2.Nifti2PairHeader)
    kinds = [kind for kind in (singles if is_single else pairs) if kind.may_contain_header(start)]
    if not kinds:
        raise file.error(_stand_in(start))
    try:
        header = kinds[0](start[: kinds[0].sizeof_hdr], check=False)
        header.check_fix(logger=quiet)
        return _described(header, file)
    except (ValueError, nifti1.HeaderDataError) as error:
        raise file.error(f"invalid NIfTI header: {error}; save the image again") from None


def _stand_in(start: bytes) -> str:
    """Return what a file without the header of NIfTI is, and what to do."""
    for first, problem in STAND_INS:
        if start.lstrip().startswith(first):
            return problem
    magic, place = DICOM
    if start[place] == magic:
        return "is a DICOM file, not a NIfTI file; convert the series, for example with dcm2niix"
    if not start:
        return "is empty; copy it again"
    return "has no NIfTI header; expected NIfTI-1 or NIfTI-2; fix the path, or save it again"


def _described(header: Any, file: SingleFile) -> NiftiHeader:
    """Return what the header of nibabel says."""
    sizes = [int(size) for size in header.get_data_shape()]
    while len(sizes) > len(DIMENSIONS) and sizes[-1] == 1:
        sizes.pop()
    if not sizes or min(sizes) < 1 or len(sizes) > len(DIMENSIONS):
        raise file.error(
            f"has dimensions {sizes}; expected 1 to {len(DIMENSIONS)} dimensions of at least one "
            "voxel"
        )
    stored, offset = np.dtype(header.get_data_dtype()), int(header.get_data_offset())
    if header.is_single and offset < header.sizeof_hdr:
        raise file.error(
            f"the voxels start at byte {offset}, inside the header; name a pair .hdr and .img, or "
            "save the image again"
        )
    slope, inter = header.get_slope_inter()
    labels: tuple[str, ...] = ()
    shape = tuple(reversed(sizes))
    affine = np.asarray(header.get_best_affine(), np.float64)
    axes = _axes(header, sizes, affine)
    if stored.names is not None:  # colours: one channel per field of uint8
        labels, slope, inter = stored.names, None, None
        stored, shape = np.dtype(np.uint8), (*shape, len(labels))
        axes += (Axis("c", "channel", len(labels)),)
    return NiftiHeader(
        shape,
        stored,
        offset,
        1.0 if slope is None else float(slope),
        0.0 if inter is None else float(inter),
        axes,
        labels,
        affine,
        (int(header["sform_code"]), int(header["qform_code"])),
        _other_qform(header, affine),
    )


def _other_qform(header: Any, affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Return the affine of the qform if the header has another sform, which comes first."""
    if not (header["sform_code"] and header["qform_code"]):
        return None
    qform = np.asarray(header.get_qform(), np.float64)
    return None if np.allclose(qform, affine, rtol=1e-5, atol=1e-4) else qform


def _presented(
    header: NiftiHeader, codes: str, path: str
) -> tuple[tuple[Axis, ...], Orientation, npt.NDArray[np.float64]]:
    """Return the axes of an image in an orientation such as `RAS`, and its presented affine.

    A presented axis that is parallel to one of the scanner has positions along it, with a negative
    voxel size if it runs to the left, to the back or down. Raises StoreError.
    """
    numbers = [n for n, axis in enumerate(header.axes) if axis.kind == "space"][::-1]  # x first
    problem = ""
    if len(numbers) < 3:
        problem = f"has {len(numbers)} spatial axes, and an orientation needs 3"
    elif not any(header.codes):
        problem = "has neither sform nor qform, so its orientation is unknown"
    elif not np.isfinite(header.affine).all() or not np.linalg.det(header.affine):
        problem = "has an affine without an inverse, so its orientation is unknown"
    if problem:
        raise StoreError(
            f"input: {without_secret(path)} {problem}; fix its header, or remove orientation",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    nibabel = _nibabel("orientations")
    wanted = nibabel.axcodes2ornt(codes)
    turn = nibabel.ornt_transform(nibabel.io_orientation(header.affine), wanted)
    sizes = [header.axes[number].size for number in numbers]
    affine = header.affine @ nibabel.inv_ornt_aff(turn, sizes)
    matrix = affine[:3, :3]
    lengths = np.empty(RANK)
    lengths[turn[:, 0].astype(int)] = sizes
    rows = wanted[:, 0].astype(int)  # of each presented axis, in the matrix
    is_parallel = _is_parallel(matrix, rows, lengths)
    axes, orientation = list(header.axes), [(n, 1) for n in range(len(header.axes))]
    for number, (target, direction) in zip(numbers, turn.astype(int).tolist(), strict=True):
        place, stored = numbers[target], header.axes[number]
        scale, first = stored.scale, 0.0
        if is_parallel:
            row = rows[target]
            scale, first = float(matrix[row, target]), float(affine[row, 3])
        axes[place] = replace(stored, name=header.axes[place].name, scale=scale, translation=first)
        orientation[place] = (number, direction)
    return tuple(axes), tuple(orientation), affine


def _is_parallel(
    matrix: npt.NDArray[np.float64], rows: npt.NDArray[np.int_], lengths: npt.NDArray[Any]
) -> bool:
    """Return whether the axes x, y and z of an image are parallel to these axes of the scanner.

    `matrix` (3, 3) is that of the affine, and `lengths` are the numbers of voxels.
    """
    across = matrix.copy()
    across[rows, np.arange(RANK)] = 0
    shift = np.abs(across) @ (lengths - 1)
    return bool((shift <= MAX_SHIFT * np.linalg.norm(matrix, axis=0).min()).all())


def _is_straight(matrix: npt.NDArray[np.float64]) -> bool:
    """Return whether the axes of an image are those of the scanner, in their direction."""
    return bool(np.array_equal(matrix, np.diag(np.diag(matrix))) and (matrix >= 0).all())


def _axes(header: Any, sizes: list[int], affine: npt.NDArray[np.float64]) -> tuple[Axis, ...]:
    """Return the axes of dimensions with these sizes, the slowest first.

    The size of a voxel is the length of the affine's column. Its offset is the position of the
    first voxel if the axes of the image are those of the scanner, in their direction.
    """
    matrix = affine[:3, :3]
    is_straight = _is_straight(matrix)
    scales = [float(length) for length in np.linalg.norm(matrix, axis=0)]
    origin = [float(offset) if is_straight else 0.0 for offset in affine[:3, 3]]
    scales += [float(length) for length in header["pixdim"][4:6]]
    origin += [float(header["toffset"]), 0.0]
    try:
        space, time = (UNITS.get(unit) for unit in header.get_xyzt_units())
    except KeyError:  # a code that NIfTI does not define
        space = time = None
    units = {"space": space, "time": time, "channel": None}
    axes = []
    for number, size in enumerate(sizes):
        name, kind = DIMENSIONS[number]
        if kind == "channel":
            axes.append(Axis(name, kind, size))
            continue
        scale, first = scales[number], origin[number]
        scale = scale if math.isfinite(scale) and scale > 0 else 1.0
        first = first if math.isfinite(first) else 0.0
        axes.append(Axis(name, kind, size, units[kind], scale, first))
    return tuple(reversed(axes))
