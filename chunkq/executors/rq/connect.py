"""Connections to Redis, and its errors in one line each."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from redis import CredentialProvider, Redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from chunkq.errors import ErrorCode, QueueError
from chunkq.executors import credentials
from chunkq.executors.settings import WorkerSettings
from chunkq.paths import without_secret

ANSWER_SECONDS = 3.0
"""How long an impatient connection waits for an answer."""
LONGEST_PASSWORD = 4096
"""Characters; what is longer is another file."""
DEFAULT_PORT = 6379
PASSWORD_VARIABLE = "CHUNKQ_QUEUE_PASSWORD_FILE"
"""Names a file that holds the password of an address without one, as container secrets do."""
FILES = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
PATIENT_TRIES = 60
"""Tries of a patient connection, up to 5 s apart: it rides out five minutes of absence."""


def connect(url: str, *, patient: bool = False) -> Redis:
    """Return a client; nothing is sent yet.

    A patient one, for workers, tries again and again while the server is away; the other, for
    commands, says at once that it is. An address without a password takes it from the file that
    the environment names, else from the credentials of a server that `chunkq redis` has started.
    Raises QueueError for a URL that is none, or a file that holds none.
    """
    answer = WorkerSettings.from_environment().server_answer if patient else ANSWER_SECONDS
    backoff = ExponentialBackoff(cap=5, base=0.2) if patient else NoBackoff()
    settings: dict[str, Any] = {
        "socket_connect_timeout": ANSWER_SECONDS,
        "socket_timeout": answer,
        "retry": Retry(backoff, PATIENT_TRIES if patient else 0),
    }
    if not url.startswith("unix:"):
        settings["socket_keepalive"] = True
    try:
        _check(url)
        if file := _password_file(url):
            settings["password"] = _password_in(file, PASSWORD_VARIABLE)
        elif provider := LocalServerPassword.at(url):
            settings["credential_provider"] = provider
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


def _password_file(url: str) -> str | None:
    """Return the file that the environment names for this address; None if it needs none."""
    return (os.environ.get(PASSWORD_VARIABLE) or None) if _lacks_password(url) else None


def _lacks_password(url: str) -> bool:
    """Return whether an address over the network holds no password."""
    parts = urlsplit(url)
    given = parts.password is not None or "password" in dict(parse_qsl(parts.query, True))
    return not given and parts.scheme in ("redis", "rediss")


class LocalServerPassword(CredentialProvider):
    """The password of a server that this user has started, read anew for each connection."""

    def __init__(self, file: str, host: str, port: int) -> None:
        self.file, self._host, self._port = file, host, port

    @classmethod
    def at(cls, url: str) -> Self | None:
        """Return the password's source for an address without one, None if there is none."""
        parts = urlsplit(url)
        if not _lacks_password(url) or parts.username:
            return None
        host, port = parts.hostname or "localhost", parts.port or DEFAULT_PORT
        file = credentials.find_secret("redis", host, port)
        return cls(str(file), host, port) if file else None

    def get_credentials(self) -> tuple[str]:
        """Return the password. Raises QueueError if another user's server has its port."""
        credentials.require_own_listener(self._host, self._port)
        return (_password_in(self.file, "password"),)


def _password_in(file: str, name: str) -> str:
    """Return a file's one line. Raises QueueError where there is none, without what is there."""
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            password = opened.read(LONGEST_PASSWORD + 1).rstrip("\r\n")
    except FileNotFoundError:
        problem = f"no file {file}"
    except UnicodeDecodeError:
        problem = f"{file} is no text file"
    except OSError as error:
        problem = f"{file} cannot be read: {error.strerror or error}"
    else:
        if password and len(password) <= LONGEST_PASSWORD and not set("\r\n") & set(password):
            return password
        problem = f"{file} must hold one line, the password" if password else f"{file} is empty"
    raise QueueError(f"queue: {name}: {problem}", code=ErrorCode.QUEUE_DENIED)


def check_server(client: Redis, url: str) -> None:
    """Raise QueueError for a server that cannot hold a queue: a cluster's node, or a Sentinel.

    A queue's scripts use keys of several hash slots. HELLO is allowed for every user.
    """
    try:
        answer = client.execute_command("HELLO")
    except redis_errors.ResponseError:
        return  # before Redis 6, or a proxy that does not pass it on
    if not isinstance(answer, dict):
        answer = dict(zip(answer[::2], answer[1::2], strict=False))
    mode = next((v for k, v in answer.items() if k in (b"mode", "mode")), b"")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode in _UNSUPPORTED:
        raise QueueError(
            f"queue: {without_secret(url)} {_UNSUPPORTED[mode]}", code=ErrorCode.QUEUE_UNSUPPORTED
        )


_UNSUPPORTED = {
    "cluster": "is a node of a Redis cluster, and chunkq needs a server that holds all keys; "
    "use a Redis without cluster mode",
    "sentinel": "is a Redis Sentinel, which holds no data; use the address of the primary "
    "that it monitors (`redis-cli -p PORT sentinel masters`)",
}
"""Mode of a server that cannot hold a queue, as HELLO reports it -> what is wrong, what to do."""


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Turn Redis's errors into QueueErrors of one line, without the password."""
    try:
        yield
    except (redis_errors.RedisError, OSError) as error:
        code, reason = _diagnosis(error, url)
        raise QueueError(f"queue: {without_secret(url)}: {reason}", code=code) from error


def _diagnosis(error: Exception, url: str) -> tuple[ErrorCode, str]:
    said = _NOISE.sub("", " ".join(str(error).split())).rstrip(".")
    if isinstance(error, redis_errors.AuthenticationError):
        return ErrorCode.QUEUE_DENIED, _about_password(said, url)
    if _NO_KEY_IN_SCRIPT.search(said):
        error = redis_errors.NoPermissionError(said)
    is_replica = isinstance(error, redis_errors.MasterDownError)  # a ClusterError for redis-py
    if (isinstance(error, _OF_CLUSTER) and not is_replica) or _IN_CLUSTER.search(said):
        return ErrorCode.QUEUE_UNSUPPORTED, f"{_UNSUPPORTED['cluster']} ({said})"
    if _NOT_SAVED.search(said):
        return ErrorCode.QUEUE_FULL, f"cannot save its data ({said}); free its disk, see its log"
    for kind, (code, told) in _TOLD.items():
        if isinstance(error, kind):
            hint = ""
            if isinstance(error, redis_errors.TimeoutError) and url.startswith("rediss:"):
                hint = "; does that port speak TLS? one that does not wants redis://"
            return code, told.format(said=said) + hint
    return ErrorCode.QUEUE_UNAVAILABLE, _about_connection(error, said, url)


def _about_connection(error: Exception, said: str, url: str) -> str:
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


def _about_password(said: str, url: str) -> str:
    if file := _password_file(url):
        return f"refuses user or password ({said}); {PASSWORD_VARIABLE} names {file}"
    if own := LocalServerPassword.at(url):
        return (
            f"refuses the password of the server that `chunkq redis` started there ({said}); if "
            f"another server has that address now, remove {own.file}"
        )
    user = "" if _WANTED.search(said) else "user"
    hint = f"into the address: redis://{user}:password@host, with %-codes"
    if not url.startswith("unix:"):
        hint += f", or the password into a file that {PASSWORD_VARIABLE} names"
    if not user:
        return f"wants a password; write it {hint}"
    return f"refuses user or password ({said}); write them {hint}"


_NOISE = re.compile(
    r"Error \d+ |Command # \d+ \(.*?\) of pipeline caused error: | script: [0-9a-f]{40}, on @\S+"
)
"""What redis-py and Redis add, and no user wants to read."""
_WANTED = re.compile("HELLO must be called|[Aa]uthentication required|NOAUTH")
_OF_CLUSTER = (
    redis_errors.ClusterError,
    redis_errors.AskError,
    redis_errors.ClusterCrossSlotError,
)
_NO_KEY_IN_SCRIPT = re.compile(
    "can't access at least one of the keys|No permissions to access a key"
)
"""What Redis 7 and Redis 8 say of a script that uses a key of others."""
_IN_CLUSTER = re.compile("in cluster mode|in a cluster node|hash to the same slot")
"""What a cluster's node says that has no error class in redis-py."""
_NOT_SAVED = re.compile("MISCONF|Errors writing to the AOF|No space left on device")
_TOLD: dict[type[Exception], tuple[ErrorCode, str]] = {
    redis_errors.BusyLoadingError: (
        ErrorCode.QUEUE_BUSY,
        "is still loading its data ({said}); try again in a moment",
    ),
    redis_errors.NoPermissionError: (
        ErrorCode.QUEUE_DENIED,
        "this user may not do that ({said}); "
        "chunkq needs the keys rq:* and chunkq:*, scripts and the usual data commands",
    ),
    redis_errors.OutOfMemoryError: (
        ErrorCode.QUEUE_FULL,
        "has no memory left ({said}); raise its maxmemory or let "
        "workers take some chunks, then go on with `chunkq produce --resume`",
    ),
    redis_errors.MasterDownError: (
        ErrorCode.QUEUE_READ_ONLY,
        "is a replica whose primary is away ({said}); name the primary",
    ),
    redis_errors.ReadOnlyError: (
        ErrorCode.QUEUE_READ_ONLY,
        "is a replica that only reads ({said}); name the primary",
    ),
    redis_errors.TimeoutError: (
        ErrorCode.QUEUE_UNAVAILABLE,
        "does not answer ({said}); is it running, and is the host right?",
    ),
}


def _is_about_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
