"""Damages of a stored output, chosen at random, and what `chunkq verify` must say of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

DOCUMENTS = {"zarr.json", ".zarray", ".zattrs", ".zgroup"}
FOREIGN_NAMES = ("notes.txt", "c/7", "c/0/99/0", "c/0/notes.txt", "c/0/0.tmp")

Damage = Callable[[random.Random, list[Path]], dict[Path, str]]
"""Damage some of these objects; return those that are wrong, and how."""


def objects_of(array: Path) -> list[Path]:
    """Return the objects of an array with voxels, in a fixed order."""
    return sorted(p for p in array.rglob("*") if p.is_file() and p.name not in DOCUMENTS)


def truncate(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    path = rng.choice(objects)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(1, len(content))])
    return {path: "damaged"}


def flip_a_bit(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    path = rng.choice(objects)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return {path: "damaged"}


def delete(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    path = rng.choice(objects)
    path.unlink()
    return {path: "missing"}


def empty(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    path = rng.choice(objects)
    path.write_bytes(b"")
    return {path: "damaged"}


def replace(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    path = rng.choice(objects)
    others = [p for p in objects if p.read_bytes() != path.read_bytes()]
    path.write_bytes(rng.choice(others).read_bytes())
    return {path: "damaged"}


def swap(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    first = rng.choice(objects)
    second = rng.choice([p for p in objects if p.read_bytes() != first.read_bytes()])
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    return {first: "damaged", second: "damaged"}


def extend(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    path = rng.choice(objects)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 20)))
    return {path: "damaged"}


def replace_by_folder(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    path = rng.choice(objects)
    path.unlink()
    path.mkdir()
    return {path: "missing"}


def delete_folder(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    folder = rng.choice(objects).parent
    deleted = [path for path in objects if path.parent == folder]
    for path in deleted:
        path.unlink()
    folder.rmdir()
    return dict.fromkeys(deleted, "missing")


def add_foreign(rng: random.Random, objects: list[Path]) -> dict[Path, str]:
    array = next(p for p in objects[0].parents if (p / "zarr.json").exists())
    path = array / rng.choice(FOREIGN_NAMES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rng.choice(objects).read_bytes())
    return {path: "foreign"}


DAMAGES: tuple[Damage, ...] = (
    truncate, flip_a_bit, delete, empty, replace, swap, extend, replace_by_folder, delete_folder,
    add_foreign,
)  # fmt: skip
