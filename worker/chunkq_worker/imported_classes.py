"""Recognize objects of packages that the caller has imported, without importing any."""

from __future__ import annotations

import sys
from typing import Any


def is_instance(value: Any, package: str, *names: str) -> bool:
    """Return whether a value is of one of these classes of a package, such as `nn.Module`."""
    for name in names:
        owner: Any = sys.modules.get(package)
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if isinstance(owner, type) and isinstance(value, owner):
            return True
    return False


def class_name(value: Any) -> str:
    """Return the name of a value's class for a message."""
    return "None" if value is None else type(value).__name__
