"""Check an HDF5 file for parts that lie in other files."""

from __future__ import annotations

from typing import Any

from chunkq_worker.runtimes.tensorflow_import import h5py


def foreign_part(file: Any) -> str | None:
    """Return the name of a link or dataset of an open file that leads to another file, or None."""
    waiting, seen = [file["/"]], set()
    while waiting:
        group = waiting.pop()
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                return f"{group.name.rstrip('/')}/{name}"
            if not isinstance(link, h5py.HardLink):
                continue  # a soft link leads to another name of this file
            item = group[name]
            if isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    return str(item.name)
            elif isinstance(item, h5py.Group):
                address = h5py.h5o.get_info(item.id).addr
                if address not in seen:
                    seen.add(address)
                    waiting.append(item)
    return None
