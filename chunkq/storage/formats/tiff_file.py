"""Parse a TIFF file with tifffile: the series of pages that is its image, and its levels."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.geometry.axes import Axis
from chunkq.install_hint import install_command
from chunkq.paths import is_url, join, mask_secrets, without_secret
from chunkq.storage.formats.base import NUMBERS
from chunkq.storage.formats.file_ranges import open_binary
from chunkq.storage.formats.single_file import SingleFile, opening_error
from chunkq.storage.formats.tiff_axes import (
    described_axes,
    image_metadata,
    level_axes,
    named_by,
)
from chunkq.storage.formats.tiff_pages import Page, PagesArray

BLOCK_BYTES = 1 << 16
"""Size of a cached block of a file at a URL, of which tags are read."""
STAGED_BYTES = 1 << 20
"""Decoded bytes of a compressed strip or tile from which on a file counts as not readable by
region."""
CUT_OFF = re.compile(
    r"invalid page offset|invalid offset to page|corrupted tag list of page"
    r"|TiffTag 270 .*invalid value offset"
)
"""Warnings of tifffile that some of the file is missing. The tag 270 has OME-XML and axes."""
MAX_SEGMENT_BYTES = 1 << 30
"""Decoded bytes of the largest strip or tile that is read."""


@dataclass(frozen=True, eq=False)
class TiffImage:
    """A level of the first image of a file.

    `axes` describe the array of `array`. `files` are the names of other files that contain pages of
    it, relative to the folder of the file. `warnings` are what tifffile logs about the file.
    """

    array: PagesArray
    axes: tuple[Axis, ...]
    named_by: str
    labels: tuple[str, ...]
    files: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def staged(self) -> str:
        """Why the image cannot be read by region; empty if it can."""
        shape, size = _largest_segment(self.array.pages)
        if size < STAGED_BYTES:
            return ""
        decoders = (page.decoder for page in self.array.pages if page.decoder is not None)
        kind = "tiles" if next(decoders).is_tiled else "strips"
        return f"it is compressed in {kind} of {' x '.join(map(str, shape))} voxels"


def read_image(path: str, access: Access, level: int = 0) -> TiffImage:
    """Return a level of the first image of a TIFF file, or of an OME-TIFF of several files.

    Raises StoreError if the file does not exist, is not a TIFF file, or cannot be read.
    """
    tifffile = _tifffile(path)
    file = SingleFile(path, access)
    try:
        with _logged() as warnings, open_tiff(tifffile, file) as tiff:
            return _image(file, tiff, level, access, warnings)
    except StoreError:
        raise
    except (OSError, ImportError) as error:
        raise opening_error(path, error) from None
    except Exception as error:  # of any class, for a damaged file
        raise file.error(_damage(file, error)) from None


@contextmanager
def open_tiff(tifffile: Any, file: SingleFile) -> Iterator[Any]:
    """Open a file with tifffile; a local one by its name, to find the files beside it."""
    if not is_url(file.path):
        with tifffile.TiffFile(file.inner) as tiff:
            yield tiff
        return
    with (
        open_binary(file, BLOCK_BYTES) as stream,
        tifffile.TiffFile(stream, name=os.path.basename(file.inner)) as tiff,
    ):
        yield tiff


def _tifffile(path: str) -> Any:
    try:
        return import_module("tifffile")
    except ImportError as error:
        raise StoreError(
            f"input: {without_secret(path)}: reading TIFF needs the package tifffile ({error}); "
            f"run `{install_command('tiff')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None


class _Collector(logging.Filter):
    """Keeps the warnings that one thread logs, instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._thread = threading.get_ident()

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        if record.levelno >= logging.WARNING:
            text = " ".join(record.getMessage().split())
            self.messages.append(text.partition("> ")[2] if text.startswith("<") else text)
        return False


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Yield a list that gets what tifffile logs in this thread."""
    collector, log = _Collector(), logging.getLogger("tifffile")
    log.addFilter(collector)
    try:
        yield collector.messages
    finally:
        log.removeFilter(collector)


def _image(
    file: SingleFile, tiff: Any, level: int, access: Access, warnings: list[str]
) -> TiffImage:
    has_image = bool(tiff.series)
    _check_warnings(file, warnings)
    if not has_image:
        raise file.error("it has no image; use a file with at least one page")
    base = tiff.series[0]
    if level >= len(base.levels):
        raise file.error(
            f"it has the levels 0 to {len(base.levels) - 1}; found level {level}; use one of these"
        )
    series = base.levels[level]
    _check_series(file, series)
    rank, pages = _pages(file, tiff, series)
    array = PagesArray(file.path, series.shape, rank, pages, access)
    metadata = image_metadata(tiff, base.kind, base.name)
    axes = described_axes(base.axes, base.shape, metadata)
    # A job can say that the slices of a stack are channels.
    count = next((axis.size for axis in axes if axis.kind == "channel"), axes[0].size)
    larger = [other for other in tiff.series[1:] if other.nbytes >= base.nbytes]
    notes = [f"has {len(larger) + 1} images; the first one is read"] if larger else []
    notes += [f"tifffile: {message}" for message in warnings[:1]]
    return TiffImage(
        array,
        level_axes(axes, series.shape),
        named_by(base.kind, base.axes),
        metadata.labels if len(metadata.labels) == count else (),
        _other_files(file, pages),
        tuple(notes),
    )


def _check_warnings(file: SingleFile, warnings: Sequence[str]) -> None:
    """Raise StoreError if pages, or the description of the image, lie behind the end of the file.

    tifffile then goes on without them.
    """
    if any(CUT_OFF.search(message) for message in warnings):
        raise file.error("truncated, some of its pages are missing; copy or save it again")


def _check_series(file: SingleFile, series: Any) -> None:
    """Raise StoreError unless the voxels are numbers whose codec is installed."""
    keyframe = series.keyframe
    if keyframe.dtype is None or keyframe.dtype.kind not in NUMBERS:
        raise file.error(
            f"unsupported dtype of {keyframe.bitspersample} bits; save it with a dtype of numbers, "
            "such as uint8 or float32"
        )
    if series.transform is not None:
        raise file.error("its voxels have to be rescaled; save it as a plain TIFF file")
    for code, codecs, name in (
        (keyframe.compression, "DECOMPRESSORS", "compression"),
        (keyframe.predictor, "UNPREDICTORS", "predictor"),
    ):
        _check_codec(file, code, codecs, name)


def _check_codec(file: SingleFile, code: Any, codecs: str, name: str) -> None:
    if code in (0, 1):
        return
    tiff = import_module("tifffile").TIFF
    try:
        getattr(tiff, codecs)[code]
    except KeyError as error:
        label = getattr(code, "name", code)
        if "imagecodecs" in str(error):
            raise StoreError(
                f"input: {without_secret(file.path)}: {name} {label} needs the package "
                f"imagecodecs; run `{install_command('tiff')}`",
                code=ErrorCode.PACKAGE_MISSING,
            ) from None
        raise file.error(
            f"unsupported {name} {label}; save it uncompressed, or with ZLIB"
        ) from None


def _pages(file: SingleFile, tiff: Any, series: Any) -> tuple[int, list[Page]]:
    """Return the number of axes that enumerate pages, and the pages."""
    keyframe = series.keyframe
    size = prod(keyframe.shape)
    count = prod(series.shape) // size if size else 0
    rank = _leading_rank(series.shape, keyframe.shape, count)
    if rank is None:
        raise file.error(
            f"its pages of shape {list(keyframe.shape)} do not follow the shape "
            f"{list(series.shape)} of its metadata; save it again with tifffile"
        )
    dtype = np.dtype(keyframe.dtype).newbyteorder(keyframe.parent.byteorder)
    if series.dataoffset is not None and keyframe.parent is tiff and not series.is_multifile:
        offsets = range(
            series.dataoffset, series.dataoffset + count * size * dtype.itemsize,
            size * dtype.itemsize,
        )  # fmt: skip
        pages = [Page(file.path, keyframe.shaped, dtype, (offset,), ()) for offset in offsets]
    else:
        frames = list(series)
        missing = sum(frame is None for frame in frames) + max(0, count - len(frames))
        if missing:
            raise file.error(
                f"{missing} of its {count} pages are missing; copy all files of the OME-TIFF into "
                "one local folder"
            )
        pages = [_page(file, tiff, frame, keyframe) for frame in frames[:count]]
    _, largest = _largest_segment(pages)
    if largest > MAX_SEGMENT_BYTES:
        raise file.error(
            f"it is compressed in pieces of {largest / 2**30:.1f} GiB; save it in tiles, or "
            "convert it to Zarr"
        )
    return rank, pages


def _leading_rank(shape: Sequence[int], page: Sequence[int], count: int) -> int | None:
    """Return how many axes of `shape` enumerate pages; None if pages are not whole last axes."""
    stored = [size for size in page if size != 1]
    for rank in range(len(shape) + 1):
        if prod(shape[:rank]) == count and [n for n in shape[rank:] if n != 1] == stored:
            return rank
    return None


def _page(file: SingleFile, tiff: Any, frame: Any, first: Any) -> Page:
    keyframe, path = frame.keyframe, file.path
    if frame.parent is not tiff:
        handle = frame.parent.filehandle
        folder = os.path.realpath(os.path.dirname(path))
        path = join(os.path.dirname(path), os.path.relpath(handle.path, folder))
    if keyframe.shaped != first.shaped or keyframe.dtype != first.dtype:
        raise file.error(
            f"page {frame.index} of {path} has shape {list(keyframe.shape)} and dtype "
            f"{keyframe.dtype}, expected {list(first.shape)} and {first.dtype}; use pages of one "
            "shape and dtype"
        )
    dtype = np.dtype(keyframe.dtype).newbyteorder(frame.parent.byteorder)
    offsets, sizes = frame.dataoffsets, frame.databytecounts
    ends = [start + size for start, size in zip(offsets, sizes, strict=False)]
    if keyframe.is_final and list(offsets[1:]) == ends[: len(offsets) - 1]:
        return Page(path, keyframe.shaped, dtype, offsets[:1], ())
    return Page(path, keyframe.shaped, dtype, offsets, sizes, keyframe, frame.jpegtables)


def check_size(array: PagesArray, access: Access) -> None:
    """Raise StoreError if a file of the array is shorter than its pages say."""
    ends: dict[str, int] = {}
    for page in array.pages:
        ends[page.path] = max(page.stop, ends.get(page.path, 0))
    for path, expected in ends.items():
        file = SingleFile(path, access)
        size = file.size()
        if size is not None and size < expected:
            raise file.error(
                f"truncated, expected {expected} bytes, found {size}; copy or save it again"
            )


def _largest_segment(pages: Sequence[Page]) -> tuple[tuple[int, ...], int]:
    """Return shape and decoded size (bytes) of the largest strip or tile that has to be decoded."""
    shapes = {page.segment_shape: page.dtype.itemsize for page in pages if page.decoder is not None}
    sizes = {shape: prod(shape) * itemsize for shape, itemsize in shapes.items()}
    shape = max(sizes, key=lambda one: sizes[one], default=())
    return tuple(n for n in shape if n != 1), sizes.get(shape, 0)


def _other_files(file: SingleFile, pages: Sequence[Page]) -> tuple[str, ...]:
    """Return the names of the other files of the pages. Raises StoreError if one lies elsewhere."""
    folder = os.path.dirname(file.path)
    others = {page.path for page in pages} - {file.path}
    names = {os.path.relpath(path, folder) for path in others}
    for name in names:
        if name.startswith(os.pardir):
            raise file.error(f"its OME-XML names the file {name}; copy it beside the file")
    return tuple(sorted(names))


def _damage(file: SingleFile, error: Exception) -> str:
    try:
        first = file.head(4)
    except OSError:
        first = b""
    if first[:2] not in (b"II", b"MM", b"EP"):
        return f"not a TIFF file, it begins with {first!r}; fix the path, or copy the file again"
    reason = " ".join(mask_secrets(str(error), file.path).split()) or type(error).__name__
    return f"invalid TIFF file: {reason[:200]}; copy or save it again"
