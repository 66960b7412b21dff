"""A network of one's own, with nothing in it but loopback: for servers that listen everywhere."""

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


def _here() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _enter(place: int) -> None:
    if LIBC.setns(place, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class NetworkNamespace:
    """Made with the first use; threads and processes started inside stay inside."""

    def __init__(self) -> None:
        outside = _here()
        if LIBC.unshare(CLONE_NEWNET):
            os.close(outside)
            reason = "Ray listens on all interfaces, and only root can give it a network of its own"
            if os.environ.get("CI"):
                raise PermissionError(ctypes.get_errno(), reason)
            pytest.skip(reason)
        with socket.socket() as any_socket:
            up = struct.pack("16sh", b"lo", IFF_UP | IFF_RUNNING)
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, up)
        self._place = _here()
        _enter(outside)
        os.close(outside)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be in this network for a while; of this process only the current thread is."""
        outside = _here()
        _enter(self._place)
        try:
            yield
        finally:
            _enter(outside)
            os.close(outside)

    def close(self) -> None:
        os.close(self._place)
