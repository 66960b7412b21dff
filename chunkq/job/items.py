"""The items of a job: images that one job computes one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count

from chunkq.plan.plan import Volume
from chunkq.storage.images import ImageSource

NAME_CHARACTERS = re.compile(r"[^A-Za-z0-9_-]+")
"""Characters that a name in an output group cannot contain."""
RESERVED_NAMES = frozenset({"labels", "OME"})
"""Names that OME-Zarr gives a meaning in a group."""


@dataclass(frozen=True)
class Item:
    """One image of a job, with a spatial shape of its own.

    number    its number in the job, from 0; part of the names of stored objects
    name      name of its image in the output group; empty if the output is this image
    sources   the arrays that the network sees together; all have one shape
    """

    number: int
    name: str
    sources: tuple[ImageSource, ...]

    @property
    def is_alone(self) -> bool:
        """Whether the item is the only one of its job; all inputs of the job are then its."""
        return not self.name

    @cached_property
    def volume(self) -> Volume:
        """Shape and dtypes of the sources."""
        return Volume.joined([source.volume for source in self.sources])


def items_of(sources: Sequence[ImageSource], *, joined: bool) -> tuple[Item, ...]:
    """Return the items of a job with these sources.

    Sources are the inputs of one item if they are `joined`, else one item each. Several items have
    the names of their files without suffix; a repeated name gets a number.
    """
    if joined or len(sources) == 1:
        return (Item(0, "", tuple(sources)),) if sources else ()
    names = _distinct([_stem(source.path) for source in sources])
    return tuple(
        Item(number, name, (source,))
        for number, (name, source) in enumerate(zip(names, sources, strict=True))
    )


def _stem(path: str) -> str:
    """Return a name for an image from the path of its array."""
    parts = [part for part in path.rstrip("/").split("/") if part]
    # An OME-Zarr image is a folder `NAME.ome.zarr` that contains its array.
    stores = [part for part in parts if part.endswith((".zarr", ".npy"))]
    base = (stores or parts)[-1]
    stem = base.removesuffix(".npy").removesuffix(".zarr").removesuffix(".ome")
    name = NAME_CHARACTERS.sub("_", stem).strip("_") or "image"
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
