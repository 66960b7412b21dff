"""Names of storage chunks, and the search for one that exists."""

from math import prod
from pathlib import Path
from typing import Any

import pytest

from chunkq.access import DEFAULT_ACCESS
from chunkq.paths import join, open_filesystem
from chunkq.storage.formats import zarr_chunks
from chunkq.storage.formats.zarr_chunks import (
    ChunkKeys,
    existing_keys,
    list_chunks,
    stored_keys,
)
from chunkq.storage.formats.zarr_nodes import ZarrNode

NAMES = {
    ChunkKeys("v2", "."): "0.12.3",
    ChunkKeys("v2", "/"): "0/12/3",
    ChunkKeys("default", "/"): "c/0/12/3",
    ChunkKeys("default", "."): "c.0.12.3",
}


def node(path: str = "/in.zarr", **document: Any) -> ZarrNode:
    name = "zarr.json" if document.get("zarr_format") == 3 else ".zarray"
    return ZarrNode(path, name, document, DEFAULT_ACCESS)


@pytest.mark.parametrize("keys", NAMES)
def test_only_the_names_of_an_encoding_match_its_pattern(keys: ChunkKeys) -> None:
    assert keys.name((0, 12, 3)) == NAMES[keys]
    assert ChunkKeys.parse(str(keys)) == keys
    matches = [name for name in NAMES.values() if keys.pattern(3).fullmatch(name)]
    assert matches == [NAMES[keys]]


def test_the_stored_names_follow_the_metadata_or_the_default_of_the_format() -> None:
    assert stored_keys(node()) == ChunkKeys("v2", ".")
    assert stored_keys(node(dimension_separator="/")) == ChunkKeys("v2", "/")
    assert stored_keys(node(zarr_format=3)) == ChunkKeys("default", "/")
    for name, separator in (("default", "/"), ("v2", ".")):
        encoding = {"name": name}
        array = node(zarr_format=3, chunk_key_encoding=encoding)
        assert stored_keys(array) == ChunkKeys(name, separator)


def test_names_of_the_metadata_come_before_others(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0/1").write_bytes(b"")
    array = node(str(tmp_path))
    assert existing_keys(array, (8, 8), (4, 4)) == ChunkKeys("v2", "/")
    (tmp_path / "1.1").write_bytes(b"")
    assert existing_keys(array, (8, 8), (4, 4)) == ChunkKeys("v2", ".")


def test_a_search_that_is_too_long_is_no_empty_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        (tmp_path / f"notes{number}.txt").write_bytes(b"")
    array = node(str(tmp_path))
    assert existing_keys(array, (8, 8), (4, 4)) is None
    monkeypatch.setattr(zarr_chunks, "MAX_ENTRIES", 4)
    assert existing_keys(array, (8, 8), (4, 4)) == ChunkKeys("v2", ".")


@pytest.mark.parametrize("grid", [(1,), (3, 5), (100, 7, 9), (1 << 40, 1 << 40)])
def test_probes_are_different_chunks_of_the_grid_with_the_middle_first(
    grid: tuple[int, ...],
) -> None:
    probes = zarr_chunks._spread(grid)
    assert probes[0] == tuple(n // 2 for n in grid)
    assert len(set(probes)) == len(probes) == min(prod(grid), zarr_chunks.MAX_PROBES)
    assert all(0 <= i < n for probe in probes for i, n in zip(probe, grid, strict=True))


@pytest.mark.parametrize("keys", NAMES)
@pytest.mark.parametrize("remote", [False, True])
def test_a_listing_has_every_chunk_that_exists_and_nothing_else(
    tmp_path: Path, keys: ChunkKeys, remote: bool
) -> None:
    indices = [(0, 12, 3), (1, 0, 0), (0, 0, 11)]
    outside = [(2, 0, 0), (0, 13, 0)]
    root = f"memory://listing/{tmp_path.name}" if remote else str(tmp_path)
    filesystem, inner = open_filesystem(root, DEFAULT_ACCESS)
    names = [keys.name(index) for index in [*indices, *outside]]
    for name in (*names, "zarr.json", ".zarray", "notes.txt", "c/notes/0/0"):
        filesystem.pipe_file(join(inner, name), b"x") if remote else _write(tmp_path / name)
    found = list_chunks(node(root), keys, (7, 50, 45), (4, 4, 4))
    assert sorted(map(tuple, found.tolist())) == sorted(indices)
    empty = list_chunks(node(f"{root}/nothing"), keys, (7, 50, 45), (4, 4, 4))
    assert empty.shape == (0, 3)


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
