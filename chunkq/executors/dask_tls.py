"""TLS of a Dask cluster that chunkq starts: one key, whose certificate every member must show."""

from __future__ import annotations

from pathlib import Path

from distributed.security import Security

from chunkq.errors import ErrorCode, QueueError
from chunkq.private_files import is_private, write_private


def create_certificate(folder: Path) -> Path:
    """Write a new key and its certificate to a file that only this user can read."""
    try:
        security = Security.temporary()
    except ImportError:
        raise QueueError(
            "queue: TLS of a Dask cluster needs a package that is not installed; "
            "pip install 'chunkq[dask]'"
        ) from None
    return write_private(folder / "cluster.pem", security.tls_client_cert + security.tls_client_key)


def load_security(file: str) -> Security:
    """Return the TLS settings of a cluster whose members all have this file.

    Raises QueueError if it cannot be used, or other users can read it.
    """
    path = Path(file)
    try:
        private = is_private(path)
    except OSError as error:
        raise QueueError(f"queue: tls: {file} cannot be read: {error.strerror}") from None
    if not private:
        raise QueueError(
            f"queue: tls: other users can read {file}, which holds a key; run chmod 600",
            code=ErrorCode.QUEUE_DENIED,
        )
    roles = {f"tls_{role}_cert": file for role in ("client", "scheduler", "worker")}
    security = Security(require_encryption=True, tls_ca_file=file, **roles)
    try:
        security.get_connection_args("client")
    except OSError as error:  # an ssl.SSLError is one
        raise QueueError(
            f"queue: tls: {file} holds no certificate with its key ({error})"
        ) from None
    return security


def configured_security() -> Security:
    """Return the TLS settings of Dask's own configuration. Raises QueueError if it has none."""
    security = Security()
    if security.get_connection_args("client").get("ssl_context") is None:
        raise QueueError(
            "queue: protocol=tls needs certificates; set distributed.comm.tls in Dask's "
            "configuration, or name a PEM file with ?tls=FILE"
        )
    return security
