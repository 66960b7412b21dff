"""Check an HDF5 file for parts that are stored in other files."""

from __future__ import annotations

from typing import Any

from chunkq_worker.runtimes.tensorflow_import import h5py


def external_part(file: Any) -> str | None:
    """Return the name of a link or dataset that refers to another file, None if there is none."""
    pending, seen = [file["/"]], set()
    while pending:
        group = pending.pop()
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                return f"{group.name.rstrip('/')}/{name}"
            if not isinstance(link, h5py.HardLink):
                continue  # a soft link refers to another name in this file
            item = group[name]
            if isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    return str(item.name)
            elif isinstance(item, h5py.Group):
                address = h5py.h5o.get_info(item.id).addr
                if address not in seen:
                    seen.add(address)
                    pending.append(item)
    return None
