"""Zarr groups that contain an output, and whether their readers find it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from chunkq.access import DEFAULT_ACCESS
from chunkq.paths import is_url, join, without_secret
from chunkq.storage.formats.zarr_nodes import consolidated_documents, read_node

MAX_PARENTS = 4
"""Folders above an output that can be groups with consolidated metadata."""


def unlisted_in_groups(output: str, zarr_format: int, documents: Mapping[str, str]) -> list[str]:
    """Return a warning for each group above an output whose readers do not find the output.

    `documents` are the metadata of the output's arrays by their names in the output. A group that
    cannot be read has no warning.
    """
    warnings = []
    for group, name in _parents(output):
        try:
            node = read_node(group, DEFAULT_ACCESS)
            listed = consolidated_documents(group, DEFAULT_ACCESS)
        except Exception:  # the output is complete, whatever is wrong with the groups
            break
        printed = without_secret(group)
        if node is not None and not node.is_array and node.zarr_format != zarr_format:
            warnings.append(
                f"output: readers of the Zarr v{node.zarr_format} group {printed} do not find "
                f"{name}, which is Zarr v{zarr_format}; set zarr_format: {node.zarr_format}"
            )
        elif listed is not None and any(
            listed.get(join(name, document)) != json.loads(text)
            for document, text in documents.items()
        ):
            warnings.append(
                f"output: the consolidated metadata of the group {printed} do not list {name} as "
                f"it is now, so readers do not find it; run zarr.consolidate_metadata({printed!r})"
            )
    return warnings


def _parents(output: str) -> Iterator[tuple[str, str]]:
    """Yield the folders above an output, the closest first, and its name in each of them."""
    parent, name = output.rstrip("/"), ""
    for _ in range(MAX_PARENTS):
        parent, _, last = parent.rpartition("/")
        name = join(last, name) if name else last
        if not parent or (is_url(output) and parent.endswith(":/")):
            return
        yield parent, name
