"""A separate network namespace with only loopback, for servers that listen on all interfaces."""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
LIBC = ctypes.CDLL(None, use_errno=True)


def _current() -> int:
    """Return a file descriptor of the current thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _enter(descriptor: int) -> None:
    if LIBC.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class NetworkNamespace:
    """Network namespace; threads and processes that start inside it stay inside it."""

    def __init__(self) -> None:
        outside = _current()
        if LIBC.unshare(CLONE_NEWNET):
            os.close(outside)
            reason = "Ray listens on all interfaces; run the tests as root to isolate its network"
            if os.environ.get("CI"):
                raise PermissionError(ctypes.get_errno(), reason)
            pytest.skip(reason)
        with socket.socket() as any_socket:
            up = struct.pack("16sh", b"lo", IFF_UP | IFF_RUNNING)
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, up)
        self._descriptor = _current()
        _enter(outside)
        os.close(outside)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Move the current thread into the namespace for the duration of the block."""
        outside = _current()
        _enter(self._descriptor)
        try:
            yield
        finally:
            _enter(outside)
            os.close(outside)

    def close(self) -> None:
        os.close(self._descriptor)
