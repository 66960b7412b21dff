"""Connections to Redis, and its errors in one line each."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from redis import Redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from chunkq.errors import QueueError
from chunkq.paths import without_secret

ANSWER_SECONDS = 3.0
"""How long an impatient connection waits for an answer."""
STEADY_ANSWER_SECONDS = 30.0
FILES = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
STEADY_TRIES = 60
"""Tries of a patient connection, up to 5 s apart: it rides out five minutes of absence."""


def connect(url: str, *, patient: bool = False) -> Redis:
    """Return a client; nothing is sent yet.

    A patient one, for workers, tries again and again while the server is away; the other, for
    commands, says at once that it is. Raises QueueError for a URL that is none.
    """
    answer = STEADY_ANSWER_SECONDS if patient else ANSWER_SECONDS
    backoff = ExponentialBackoff(cap=5, base=0.2) if patient else NoBackoff()
    settings: dict[str, Any] = {
        "socket_connect_timeout": ANSWER_SECONDS,
        "socket_timeout": answer,
        "retry": Retry(backoff, STEADY_TRIES if patient else 0),
    }
    if not url.startswith("unix:"):
        settings["socket_keepalive"] = True
    try:
        _check(url)
        client = Redis.from_url(url, **settings)
        client.connection_pool.make_connection()  # options that it does not know
    except (ValueError, TypeError):
        # The original message may hold a part of the password.
        raise QueueError(
            f"queue: {without_secret(url)} is no Redis address; write "
            "redis://[user:password@]host[:port][/number], rediss://… for TLS or unix:///path, "
            "with %-codes for special characters in the password"
        ) from None
    for name, file in parse_qsl(urlsplit(url).query):
        if name in FILES and not Path(file).is_file():
            raise QueueError(f"queue: {without_secret(url)}: {name}: no file {file}")
    return client


def _check(url: str) -> None:
    """Raise ValueError for an address of which redis-py would leave out a part.

    A password with `/`, `?` or `#` as they are would end the host's name there.
    """
    parts = urlsplit(url)
    options = [option for option in parts.query.split("&") if option]
    number = parts.path.removeprefix("/")
    if (
        parts.fragment
        or any("=" not in option for option in options)
        or (parts.scheme != "unix" and number and not number.isdecimal())
    ):
        raise ValueError


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Turn Redis's errors into QueueErrors of one line, without the password."""
    try:
        yield
    except (redis_errors.RedisError, OSError) as error:
        raise QueueError(f"queue: {without_secret(url)}: {_reason(error, url)}") from error


def _reason(error: Exception, url: str) -> str:
    said = _NOISE.sub("", " ".join(str(error).split())).rstrip(".")
    if isinstance(error, redis_errors.AuthenticationError) and _WANTED.search(said):
        return "wants a password; write it into the address: redis://:password@host, with %-codes"
    if "can't access at least one of the keys" in said:
        error = redis_errors.NoPermissionError(said)
    for kind, told in _TOLD.items():
        if isinstance(error, kind):
            hint = ""
            if isinstance(error, redis_errors.TimeoutError) and url.startswith("rediss:"):
                hint = "; does that port speak TLS? one that does not wants redis://"
            return told.format(said=said) + hint
    if isinstance(error, redis_errors.InvalidResponse):
        return f"does not speak Redis ({said}); are host and port right?"
    if _is_about_tls(error):
        return (
            f"TLS fails ({said}); is it a TLS port, and is its certificate known here? "
            "rediss:// speaks TLS, redis:// does not; ?ssl_ca_certs=FILE names the authority"
        )
    if isinstance(error, (redis_errors.ConnectionError, OSError)):
        closed = "closed" in said or "reset" in said or isinstance(error, ConnectionResetError)
        hint = "; a TLS port wants rediss://" if closed and url.startswith("redis:") else ""
        where = "is the path right" if url.startswith("unix:") else "are host and port right"
        return f"cannot be reached ({said}){hint}; is it running, and {where}?"
    return said


_NOISE = re.compile(
    r"Error \d+ |Command # \d+ \(.*?\) of pipeline caused error: | script: [0-9a-f]{40}, on @\S+"
)
"""What redis-py and Redis add, and no user wants to read."""
_WANTED = re.compile("HELLO must be called|[Aa]uthentication required|NOAUTH")
_TOLD: dict[type[Exception], str] = {
    redis_errors.BusyLoadingError: "is still loading its data ({said}); try again in a moment",
    redis_errors.AuthenticationError: "refuses user or password ({said}); "
    "write them into the address: redis://user:password@host, with %-codes",
    redis_errors.NoPermissionError: "this user may not do that ({said}); "
    "chunkq needs the keys rq:* and chunkq:*, scripts and the usual data commands",
    redis_errors.OutOfMemoryError: "has no memory left ({said}); raise its maxmemory or let "
    "workers take some chunks, then go on with `chunkq produce --resume`",
    redis_errors.ReadOnlyError: "is a replica that only reads ({said}); name the primary",
    redis_errors.TimeoutError: "does not answer ({said}); is it running, and is the host right?",
}


def _is_about_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
