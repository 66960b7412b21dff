"""Arrays of zarr-python, opened from metadata that were read before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import zarr
from typing_extensions import override
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, StorePath, WrapperStore

from chunkq.access import S3_SCHEMES, Access, is_forbidden, s3_filesystem
from chunkq.paths import is_url


class ForbiddenIsMissing(WrapperStore[Store]):
    """Store on a server that answers 403 for objects that do not exist.

    `was_forbidden` is set if an object was refused.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.was_forbidden = False

    @override
    async def get(
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        try:
            return await super().get(key, prototype, byte_range)
        except Exception as error:  # each file system raises different errors
            if not is_forbidden(error):
                raise
            self.was_forbidden = True
            return None


def open_store(path: str, access: Access, *, write: bool = False) -> Store:
    """Return zarr-python's store of a folder or URL."""
    if not is_url(path):
        return LocalStore(path, read_only=not write)
    scheme = path.partition("://")[0]
    if scheme in S3_SCHEMES:
        filesystem = s3_filesystem(access, asynchronous=True)
        inner = filesystem._strip_protocol(path)
        return FsspecStore(filesystem, path=inner, read_only=not write)
    options = access.storage_options(scheme)
    return FsspecStore.from_url(path, storage_options=options, read_only=not write)


def open_array(
    store: Store, metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Any:
    """Return the array in a store that has this metadata, which are not read again.

    `config` are settings of zarr-python for the array.

    Raises ValueError, KeyError or TypeError if the metadata are invalid.
    """
    document: Any = dict(metadata)
    settings: Any = None if config is None else dict(config)
    return zarr.Array(zarr.AsyncArray(document, StorePath(store), settings))


def lenient_store(store: Store, check: Callable[[], Any]) -> tuple[Store, Callable[[], None]]:
    """Return a store that reads refused objects as missing, and a function that checks them.

    The function calls `check` if an object was refused. `check` raises if nothing can be read
    anymore.
    """
    lenient = ForbiddenIsMissing(store)

    def check_access() -> None:
        if lenient.was_forbidden:
            check()

    return lenient, check_access
