"""TLS for Dask clusters that chunkq starts: all members share one key and its certificate."""

from __future__ import annotations

from pathlib import Path

from distributed.security import Security

from chunkq.errors import ErrorCode, QueueError
from chunkq.install_hint import install_command
from chunkq.system.private_files import is_private, write_private


def create_certificate(folder: Path) -> Path:
    """Write a new key and its certificate to a file that only this user can read; return the file.

    Raises QueueError if the package cryptography is missing.
    """
    try:
        security = Security.temporary()
    except ImportError:
        raise QueueError(
            "queue: TLS needs the package cryptography, which is not installed; "
            f"run `{install_command('dask')}`",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    return write_private(folder / "cluster.pem", security.tls_client_cert + security.tls_client_key)


def load_security(file: str) -> Security:
    """Return the TLS settings for a file with the shared key and certificate.

    Raises QueueError if the file is unusable, or other users can read it.
    """
    path = Path(file)
    try:
        private = is_private(path)
    except OSError as error:
        raise QueueError(f"queue: tls: {file}: cannot read the file: {error.strerror}") from None
    if not private:
        raise QueueError(
            f"queue: tls: {file}: other users can read this private key; run chmod 600",
            code=ErrorCode.QUEUE_DENIED,
        )
    roles = {f"tls_{role}_cert": file for role in ("client", "scheduler", "worker")}
    security = Security(require_encryption=True, tls_ca_file=file, **roles)
    try:
        security.get_connection_args("client")
    except OSError as error:  # an ssl.SSLError is one
        raise QueueError(
            f"queue: tls: {file}: expected a PEM file with a certificate and its key ({error})"
        ) from None
    return security


def configured_security() -> Security:
    """Return the TLS settings in the configuration of Dask. Raises QueueError if it has none."""
    security = Security()
    if security.get_connection_args("client").get("ssl_context") is None:
        raise QueueError(
            "queue: protocol=tls: missing certificates; set distributed.comm.tls in the "
            "configuration of Dask, or add ?tls=FILE with a PEM file to the address"
        )
    return security
