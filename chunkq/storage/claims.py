"""Claims: of several processes that want to replace an object, one may do so."""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from chunkq.storage.objects import ObjectFolder

CLAIM_SECONDS = 60.0
"""Seconds after which another process takes over a claim."""


@contextmanager
def hold_claim(folder: ObjectFolder, name: str, content: bytes | None) -> Iterator[bool]:
    """Claim an object that has this content (None: does not exist), in order to replace it.

    Yields whether this process holds the claim and the object has the content. At most one
    process holds the claim for the same content. The claim is a separate object that contains
    its owner. Another process takes over the claim of a process that has ended: on the same
    machine immediately, from other machines after `CLAIM_SECONDS`. Raises OSError if the storage
    fails.
    """
    claim = f"{name}.{hashlib.sha256(content or b'').hexdigest()[:16]}.claim"
    owner = f"{_machine_id()} {os.getpid()} {uuid.uuid4().hex}".encode()
    if not folder.put_new(claim, owner) and not _take_over(folder, claim, owner):
        yield False
        return
    try:
        yield folder.get(name) == content
    finally:
        if folder.get(claim) == owner:  # else another process took it over after CLAIM_SECONDS
            folder.delete(claim)


def replace(folder: ObjectFolder, name: str, before: bytes | None, content: bytes) -> bool:
    """Replace an object whose content is `before`; return False if it has other content.

    Only the process that holds the claim may call this. Raises OSError if the storage fails.
    """
    if before is None:
        return folder.put_new(name, content)
    if folder.get(name) != before:
        return False
    folder.put(name, content)
    return True


def _take_over(folder: ObjectFolder, claim: str, owner: bytes) -> bool:
    """Take over a claim whose owner has ended; return whether this process now holds it."""
    parent, _, file = claim.rpartition("/")
    ages = [time.time() - e.modified for e in folder.list(parent) if e.name == file]
    is_recent = any(age < CLAIM_SECONDS for age in ages)
    if is_recent and not _has_ended(folder.get(claim)):
        return False
    folder.delete(claim)
    return folder.put_new(claim, owner)


def _machine_id() -> str:
    """Return the host name and PID namespace: equal for processes that see each other's ids."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()} {namespace}"


def _has_ended(owner: bytes | None) -> bool:
    """Return whether the owner of a claim is a process of this machine that has ended."""
    if owner is None:
        return True
    machine, _, process = owner.decode(errors="replace").rpartition(" ")[0].rpartition(" ")
    return machine == _machine_id() and process.isdecimal() and not _is_running(int(process))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
