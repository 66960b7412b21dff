"""Lua scripts that change the queue. Redis runs each script atomically."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.resources import files
from typing import Any

from redis import Redis
from redis.commands.core import Script

PRELUDE = "prelude"


class Scripts:
    """Run the scripts in `lua/` by name on one connection, each in a context of `request`."""

    def __init__(
        self, connection: Redis, request: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._connection, self._request = connection, request
        self._scripts: dict[str, Script] = {}

    def __call__(self, name: str, *arguments: str | bytes | float) -> Any:
        """Run a script and return its result."""
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self._connection.register_script(_source(name))
        with self._request():
            return script(args=list(arguments))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@cache
def _source(name: str) -> str:
    folder = files(__package__) / "lua"
    return (folder / f"{PRELUDE}.lua").read_text() + (folder / f"{name}.lua").read_text()
