"""The images of a job, and its items: the parts that it computes one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, product
from math import prod

from chunkq.errors import JobError
from chunkq.geometry.axes import Axis
from chunkq.job.axis_order import declared_channels
from chunkq.job.job_file import Job
from chunkq.paths import without_secret
from chunkq.plan.volume import Volume
from chunkq.storage.array import Array
from chunkq.storage.images import ImageSource, find_source

NAME_CHARACTERS = re.compile(r"[^A-Za-z0-9_-]+")
"""Characters that a name in an output group cannot contain."""
STORE = re.compile(
    r"(.*?)(\.ome)?\.(zarr|npy|n5|tiff?|tf[28]|btf|lsm|stk|h5|hdf5?|(nii|hdr|img)(\.gz)?)",
    re.IGNORECASE,
)
"""File or folder of an image; the first group is its name."""
RESERVED_NAMES = frozenset({"labels", "OME"})
"""Names that OME-Zarr gives a meaning in a group."""


@dataclass(frozen=True)
class Image:
    """One image that a job reads, and the one that it writes for it.

    number     its number in the job, from 0
    name       name of its image in the output group; empty if the output is this image
    sources    the arrays that the network sees together; all have the same shape, channels and
               time points
    by_channel whether the network sees one channel at a time
    """

    number: int
    name: str
    sources: tuple[ImageSource, ...]
    by_channel: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether the image is the only one of its job; all inputs of the job are then its."""
        return not self.name

    @property
    def series_axes(self) -> tuple[Axis, ...]:
        """The axes whose positions are computed one by one: time, then channel."""
        time, channel = self.sources[0].time_axis, self.sources[0].channel_axis
        axes = (time, channel if self.by_channel else None)
        return tuple(axis for axis in axes if axis is not None and axis.size > 1)

    @property
    def is_channel_series(self) -> bool:
        """Whether its channels are computed one by one."""
        return any(axis.kind == "channel" for axis in self.series_axes)

    @property
    def spatial_axes(self) -> tuple[Axis, ...]:
        """The spatial axes in the order of the network."""
        return self.sources[0].spatial_axes

    @cached_property
    def volume(self) -> Volume:
        """Spatial shape, dtypes and channels of one item."""
        volumes = [source.volume for source in self.sources]
        joined = Volume.joined(volumes)
        return Volume(joined.shape, joined.dtype, joined.dtypes) if self.by_channel else joined

    def points(self) -> Iterator[tuple[int, ...]]:
        """Yield the position of each item along the series axes, the last axis fastest."""
        return product(*(range(axis.size) for axis in self.series_axes))

    def open(self, *, cached: bool = False) -> tuple[Array, ...]:
        """Open all of each source. Raises StoreError if one cannot be opened.

        `cached` is whether storage chunks may be kept in the cache of this process.
        """
        return tuple(source.open(cached=cached) for source in self.sources)


@dataclass(frozen=True)
class Item:
    """One volume of a job: an image, or one time point or channel of it.

    number   its number in the job, from 0; part of the names of stored objects
    image    the image to which it belongs
    point    its position along the image's series axes; empty if it is the whole image
    """

    number: int
    image: Image
    point: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of its image in the output group; empty if the output is this image."""
        return self.image.name

    @property
    def position(self) -> dict[str, int]:
        """Its position along each series axis, by the name of the axis."""
        axes = self.image.series_axes
        return {axis.name: n for axis, n in zip(axes, self.point, strict=True)}

    @property
    def volume(self) -> Volume:
        """Spatial shape, dtypes and channels."""
        return self.image.volume

    @property
    def series_point(self) -> tuple[int, int | None]:
        """The numbers of its time point, by default 0, and of its only channel, None for all."""
        kinds = {axis.kind: n for axis, n in zip(self.image.series_axes, self.point, strict=True)}
        return kinds.get("time", 0), kinds.get("channel")

    def present(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Return views ([C,] *S) of the opened sources of the image."""
        time, channel = self.series_point
        pairs = zip(self.image.sources, arrays, strict=True)
        return tuple(source.present(array, time, channel) for source, array in pairs)

    def open(self) -> tuple[Array, ...]:
        """Open the views of the sources. Raises StoreError if one cannot be opened."""
        return self.present(self.image.open())


def find_sources(job: Job) -> list[ImageSource]:
    """Find the array of each input of a job. Raises StoreError and JobError.

    The inputs of a job over images are one source, the list of all rows.
    """
    if job.is_image:
        from chunkq.job.image_rows import find_rows  # for such jobs only

        return [find_rows(job).source(job.input_paths[0])]
    return [
        find_source(config.path, config.selection, config.access, allow_empty=job.allow_empty)
        for config in job.inputs
    ]


def images_of(job: Job, sources: Sequence[ImageSource]) -> tuple[Image, ...]:
    """Return the images of a job with these sources.

    Sources are the inputs of one image if `join_dim` is set, or if the network takes as many
    channels as there are sources of one channel each. Else each is an image. Several images have
    the names of their files without suffix; a repeated name gets a number. Raises JobError if
    inputs of one image differ in their axes.
    """
    if not sources:
        return ()
    if job.is_image:
        return (Image(0, "", tuple(sources)),)
    source_channels = sources[0].volume.channels
    channels = declared_channels(
        job.model, len(sources[0].shape), (source_channels, len(sources), 1)
    )
    is_joined = job.model.join_dim is not None
    is_stacked = channels == len(sources) > 1 and all(s.volume.channels == 1 for s in sources)
    if is_joined or is_stacked:
        _check_axes(job, sources)
    by_channel = channels == 1 and not is_joined
    if is_joined or is_stacked or len(sources) == 1:
        return (Image(0, "", tuple(sources), by_channel),)
    names = _distinct([_stem(source.path) for source in sources])
    return tuple(
        Image(number, name, (source,), by_channel)
        for number, (name, source) in enumerate(zip(names, sources, strict=True))
    )


def items_of(images: Sequence[Image]) -> tuple[Item, ...]:
    """Return the items of a job: image by image, the positions of each in their order."""
    points = [(image, point) for image in images for point in image.points()]
    return tuple(Item(number, image, point) for number, (image, point) in enumerate(points))


def largest_image(images: Sequence[Image]) -> Image:
    """Return the image whose items have the most voxels."""
    return max(images, key=lambda image: prod(image.volume.shape))


def _check_axes(job: Job, sources: Sequence[ImageSource]) -> None:
    """Raise JobError unless the sources have one shape and as many channels and time points."""
    first = sources[0]
    properties: dict[str, Callable[[ImageSource], object]] = {
        "shape": lambda source: list(source.shape),
        "channels": lambda source: source.volume.channels,
        "time points": lambda source: len(source.time) or 1,
    }
    problems = [
        f"input.{n}: {without_secret(job.input_paths[n])} has {key} {of(source)}, expected "
        f"{of(first)} like the first input; use inputs of one shape"
        for n, source in enumerate(sources)
        for key, of in properties.items()
        if of(source) != of(first)
    ]
    if problems:
        raise JobError(problems)


def _stem(path: str) -> str:
    """Return a name for an image from the path of its array.

    A stack `FOLDER/*.tif` has the name of the folder.
    """
    parts = [part for part in path.rstrip("/").split("/") if part]
    # An OME-Zarr image is a folder `NAME.ome.zarr` that contains its array.
    stores = [n for n, part in enumerate(parts) if STORE.fullmatch(part)]
    last = (stores or [len(parts) - 1])[-1]
    stems = (STORE.sub(r"\1", part) for part in reversed(parts[: last + 1]))
    names = (NAME_CHARACTERS.sub("_", stem).strip("_") for stem in stems)
    name = next(filter(None, names), "image")
    return f"{name}_" if name in RESERVED_NAMES else name


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names with `_2`, `_3`, … appended where they repeat."""
    taken: set[str] = set()
    distinct = []
    for name in names:
        candidates = chain([name], (f"{name}_{n}" for n in count(2)))
        choice = next(candidate for candidate in candidates if candidate not in taken)
        taken.add(choice)
        distinct.append(choice)
    return distinct
