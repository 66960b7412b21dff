"""Check that the packages that write `.slp` files are installed, without importing them."""

from __future__ import annotations

from importlib.util import find_spec

from chunkq.errors import ErrorCode, StoreError
from chunkq.install_hint import install_command


def check_slp_packages() -> None:
    """Raise StoreError if a package that writes `.slp` files is missing."""
    missing = [name for name in ("sleap_io", "h5py") if find_spec(name) is None]
    if missing:
        raise StoreError(
            f"output: .slp files need {missing[0]}, which is not installed; run "
            f"`{install_command('slp')}`",
            code=ErrorCode.PACKAGE_MISSING,
        )
