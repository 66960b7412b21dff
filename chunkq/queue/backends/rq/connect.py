"""Connect to Redis, and translate its errors into messages of one line."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from redis import CredentialProvider, Redis
from redis import exceptions as redis_errors
from redis.backoff import NoBackoff
from redis.retry import Retry

from chunkq.errors import RESUME, ErrorCode, QueueError
from chunkq.paths import without_secret
from chunkq.queue.backends import credentials
from chunkq.queue.backends.rq.outages import Outages, PatientRetry
from chunkq.queue.contract.settings import WorkerSettings

ANSWER_SECONDS = 3.0
"""Timeout of a connection that is not patient."""
MAX_PASSWORD_LENGTH = 4096
"""Characters. A longer file is not a password file."""
DEFAULT_PORT = 6379
PASSWORD_VARIABLE = "CHUNKQ_QUEUE_PASSWORD_FILE"
"""Variable with the path of a file that holds the password, for addresses without one."""
FILE_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
CERTIFICATE_CHECKS = {f"CERT_{name.upper()}": name for name in ("none", "optional", "required")}
"""Values of `ssl_cert_reqs` as Celery and Python's `ssl` write them -> those of redis-py."""


def connect(url: str, *, patient: bool = False) -> Redis:
    """Return a client, without connecting yet.

    A `patient` client, for workers, retries while the server is unreachable. Other clients, for
    commands, raise immediately. If the URL has no password, it is read from the file named by
    PASSWORD_VARIABLE, else from the credentials that `chunkq redis` stored for the address.
    Raises QueueError for an invalid URL or password file.
    """
    worker = WorkerSettings.from_environment()
    settings: dict[str, Any] = {
        "socket_connect_timeout": ANSWER_SECONDS,
        "socket_timeout": worker.server_answer if patient else ANSWER_SECONDS,
        "retry": PatientRetry(outages_of(url), worker.lease) if patient else Retry(NoBackoff(), 0),
    }
    if not url.startswith("unix:"):
        settings["socket_keepalive"] = True
    url = _with_known_checks(url)
    try:
        _check(url)
        file = _password_file(url)
        if not file and (provider := LocalServerPassword.at(url)):
            settings["credential_provider"] = provider
        client = Redis.from_url(url, **settings)
        if file:
            values = client.connection_pool.connection_kwargs
            values["credential_provider"] = PasswordFile(file, values.pop("username", None))
        # Celery's addresses can ask for texts. RQ and the scripts exchange bytes.
        client.connection_pool.connection_kwargs["decode_responses"] = False
        client.connection_pool.make_connection()  # raises for unknown options
    except (ValueError, TypeError, redis_errors.RedisError):
        # The original message may contain a part of the password.
        raise QueueError(
            f"queue: {without_secret(url)}: invalid address; use "
            "redis://[user:password@]host[:port][/number], rediss://… for TLS or unix:///path, "
            "with %-codes for special characters in the password and the options of redis-py "
            "(?ssl_cert_reqs=none|optional|required, ?protocol=2 …)",
            code=ErrorCode.QUEUE_ADDRESS_INVALID,
        ) from None
    for name, file in parse_qsl(urlsplit(url).query):
        if name in FILE_OPTIONS and not Path(file).is_file():
            raise QueueError(
                f"queue: {without_secret(url)}: {name}: missing file {file}",
                code=ErrorCode.QUEUE_ADDRESS_INVALID,
            )
    return client


@lru_cache
def outages_of(url: str) -> Outages:
    """Return the outages of a server, as the workers of this process see them."""

    def describe(error: Exception) -> tuple[ErrorCode, str]:
        return _diagnosis(error, url)

    return Outages(without_secret(url), describe)


def _with_known_checks(url: str) -> str:
    """Return the address with a value of `ssl_cert_reqs` that redis-py knows, if it has another."""
    for theirs, ours in CERTIFICATE_CHECKS.items():
        url = re.sub(rf"([?&]ssl_cert_reqs=){theirs}(?=&|$)", rf"\g<1>{ours}", url)
    return url


def server_risks(client: Redis) -> Iterator[str]:
    """Yield one line for each setting of a server that can lose tasks, if it tells them."""
    memory: dict[str, Any] = {}
    disk: dict[str, Any] = {}
    saves = None
    # Hosted servers often have no CONFIG, and some no INFO.
    with suppress(redis_errors.ResponseError):
        memory, disk = client.info("memory"), client.info("persistence")
        saves = client.config_get("save").get("save")
    policy = str(memory.get("maxmemory_policy", ""))
    if memory.get("maxmemory") and policy.startswith("allkeys"):
        yield (
            f"the server deletes keys when it is full (maxmemory-policy {policy}), so chunks can "
            "disappear from the queue; set maxmemory-policy noeviction, or use another server"
        )
    if saves == "" and not disk.get("aof_enabled"):
        yield (
            f"the server stores nothing on disk, so the queue is lost when it ends; then {RESUME} "
            "to queue the missing chunks again"
        )


def _check(url: str) -> None:
    """Raise ValueError for an address of which redis-py would ignore a part.

    An unescaped `/`, `?` or `#` in a password ends the host name.
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
    """Return the password file for an address, or None if the address or none is set."""
    return (os.environ.get(PASSWORD_VARIABLE) or None) if _lacks_password(url) else None


def _lacks_password(url: str) -> bool:
    """Return whether an address of a network server has no password."""
    parts = urlsplit(url)
    has_password = parts.password is not None or "password" in dict(parse_qsl(parts.query, True))
    return not has_password and parts.scheme in ("redis", "rediss")


class PasswordFile(CredentialProvider):
    """Password of a file that the user names, read again for each connection: it can change."""

    def __init__(self, file: str, user: str | None) -> None:
        self._file, self._user = file, user
        self.get_credentials()  # an unusable file is an error before the first connection

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return user, if any, and password. Raises QueueError if the file is unusable."""
        password = _password_in(self._file, PASSWORD_VARIABLE)
        return (self._user, password) if self._user else (password,)


class LocalServerPassword(CredentialProvider):
    """Password of a server that this user started, read again for each connection."""

    def __init__(self, file: str, host: str, port: int) -> None:
        self.file, self._host, self._port = file, host, port

    @classmethod
    def at(cls, url: str) -> Self | None:
        """Return the provider for an address without a password, or None if none is stored."""
        parts = urlsplit(url)
        if not _lacks_password(url) or parts.username:
            return None
        host, port = parts.hostname or "localhost", parts.port or DEFAULT_PORT
        file = credentials.find_secret("redis", host, port)
        return cls(str(file), host, port) if file else None

    def get_credentials(self) -> tuple[str]:
        """Return the password. Raises QueueError if another user listens on the port."""
        credentials.require_own_listener(self._host, self._port)
        return (_password_in(self.file, "password"),)


def _password_in(file: str, name: str) -> str:
    """Return the single line of a file. Raises QueueError, without the content, if invalid."""
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            password = stream.read(MAX_PASSWORD_LENGTH + 1).rstrip("\r\n")
    except FileNotFoundError:
        problem = f"missing file {file}"
    except UnicodeDecodeError:
        problem = f"{file}: expected a UTF-8 text file"
    except OSError as error:
        problem = f"{file}: cannot read the file: {error.strerror or error}"
    else:
        if password and len(password) <= MAX_PASSWORD_LENGTH and not set("\r\n") & set(password):
            return password
        content = f"several lines or over {MAX_PASSWORD_LENGTH} characters"
        problem = (
            f"{file}: expected one line with the password, found "
            f"{content if password else 'an empty file'}"
        )
    raise QueueError(f"queue: {name}: {problem}", code=ErrorCode.QUEUE_DENIED)


def check_server(client: Redis, url: str) -> None:
    """Raise QueueError for a node of a Redis cluster and for a Sentinel.

    The scripts of a queue use keys of several hash slots. Every user may run HELLO.
    """
    try:
        answer = client.execute_command("HELLO")
    except redis_errors.ResponseError:
        return  # Redis before 6, or a proxy that does not forward HELLO
    if not isinstance(answer, dict):
        answer = dict(zip(answer[::2], answer[1::2], strict=False))
    mode = next((v for k, v in answer.items() if k in (b"mode", "mode")), b"")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode in _UNSUPPORTED:
        raise QueueError(
            f"queue: {without_secret(url)}: {_UNSUPPORTED[mode]}", code=ErrorCode.QUEUE_UNSUPPORTED
        )


_UNSUPPORTED = {
    "cluster": "unsupported node of a Redis cluster; use a Redis server without cluster mode",
    "sentinel": "unsupported Redis Sentinel; use the address of the primary that it monitors "
    "(`redis-cli -p PORT sentinel masters`)",
}
"""Mode of an unsupported server, as returned by HELLO -> message."""


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Translate errors of Redis into QueueErrors with one line and without the password."""
    try:
        yield
    except (redis_errors.RedisError, OSError) as error:
        code, reason = _diagnosis(error, url)
        raise QueueError(f"queue: {without_secret(url)}: {reason}", code=code) from error


def _diagnosis(error: Exception, url: str) -> tuple[ErrorCode, str]:
    message = _NOISE.sub("", " ".join(str(error).split())).rstrip(".")
    if isinstance(error, redis_errors.AuthenticationError):
        return ErrorCode.QUEUE_DENIED, _password_problem(message, url)
    if command := _UNKNOWN_COMMAND.search(message):
        return ErrorCode.QUEUE_UNSUPPORTED, _missing_command(command[1].upper())
    if _NO_KEY_IN_SCRIPT.search(message):
        error = redis_errors.NoPermissionError(message)
    is_replica = isinstance(error, redis_errors.MasterDownError)  # a ClusterError in redis-py
    if (isinstance(error, _CLUSTER_ERRORS) and not is_replica) or _IN_CLUSTER.search(message):
        return ErrorCode.QUEUE_UNSUPPORTED, f"{_UNSUPPORTED['cluster']} ({message})"
    if _NOT_SAVED.search(message):
        return ErrorCode.QUEUE_FULL, (
            f"cannot save its data ({message}); free disk space on the server, see its log"
        )
    for kind, (code, text) in _DIAGNOSES.items():
        if isinstance(error, kind):
            hint = ""
            if isinstance(error, redis_errors.TimeoutError) and url.startswith("rediss:"):
                hint = "; if the port does not use TLS, use redis://"
            return code, text.format(message=message) + hint
    return ErrorCode.QUEUE_UNAVAILABLE, _connection_problem(error, message, url)


def _missing_command(command: str) -> str:
    if command == "HELLO":
        return (
            "the server has no command HELLO; use Redis 6 or newer, or add ?protocol=2 to the "
            "address"
        )
    return f"the server has no command {command}; scripts (EVALSHA, SCRIPT) must be allowed"


def _connection_problem(error: Exception, message: str, url: str) -> str:
    if isinstance(error, redis_errors.InvalidResponse):
        return f"the server does not use the Redis protocol ({message}); check host and port"
    if _is_tls_error(error):
        return (
            f"TLS connection failed ({message}); use rediss:// for a TLS port only, and "
            "?ssl_ca_certs=FILE for the certificate of its authority"
        )
    if isinstance(error, (redis_errors.ConnectionError, OSError)):
        closed = (
            "closed" in message or "reset" in message or isinstance(error, ConnectionResetError)
        )
        hint = "; use rediss:// for a TLS port" if closed and url.startswith("redis:") else ""
        parts = "the path" if url.startswith("unix:") else "host and port"
        return f"server unreachable ({message}){hint}; start the server, or check {parts}"
    return message


def _password_problem(message: str, url: str) -> str:
    if file := _password_file(url):
        return f"invalid user or password ({message}); fix {file}, named by {PASSWORD_VARIABLE}"
    if stored := LocalServerPassword.at(url):
        return (
            f"invalid password in {stored.file}, stored by `chunkq redis` ({message}); if another "
            "server uses this address now, remove the file"
        )
    user = "" if _PASSWORD_MISSING.search(message) else "user"
    hint = f"redis://{user}:password@host with %-codes for special characters"
    if not url.startswith("unix:"):
        hint += f", or set {PASSWORD_VARIABLE} to a file with the password"
    if not user:
        return f"missing password; use {hint}"
    return f"invalid user or password ({message}); use {hint}"


_NOISE = re.compile(
    r"Error \d+ |Command # \d+ \(.*?\) of pipeline caused error: | script: [0-9a-f]{40}, on @\S+"
)
"""Parts of messages of redis-py and Redis that do not help users."""
_PASSWORD_MISSING = re.compile("HELLO must be called|[Aa]uthentication required|NOAUTH")
_CLUSTER_ERRORS = (
    redis_errors.ClusterError,
    redis_errors.AskError,
    redis_errors.ClusterCrossSlotError,
)
_NO_KEY_IN_SCRIPT = re.compile(
    "can't access at least one of the keys|No permissions to access a key"
)
"""Messages of Redis 7 and Redis 8 for a script that uses a forbidden key."""
_IN_CLUSTER = re.compile("in cluster mode|in a cluster node|hash to the same slot")
"""Messages of cluster nodes without an error class in redis-py."""
_UNKNOWN_COMMAND = re.compile("unknown command .?([A-Za-z]+)")
_NOT_SAVED = re.compile("MISCONF|Errors writing to the AOF|No space left on device")
_DIAGNOSES: dict[type[Exception], tuple[ErrorCode, str]] = {
    redis_errors.BusyLoadingError: (
        ErrorCode.QUEUE_BUSY,
        "the server is loading its data ({message}); run the command again later",
    ),
    redis_errors.NoPermissionError: (
        ErrorCode.QUEUE_DENIED,
        "the user has no permission ({message}); "
        "allow the keys rq:* and chunkq:*, scripts and data commands",
    ),
    redis_errors.OutOfMemoryError: (
        ErrorCode.QUEUE_FULL,
        "the server has no memory left ({message}); increase its maxmemory or start workers, then "
        + RESUME,
    ),
    redis_errors.MasterDownError: (
        ErrorCode.QUEUE_READ_ONLY,
        "unsupported replica, whose primary is unreachable ({message}); use the address of the "
        "primary",
    ),
    redis_errors.ReadOnlyError: (
        ErrorCode.QUEUE_READ_ONLY,
        "unsupported read-only replica ({message}); use the address of the primary",
    ),
    redis_errors.TimeoutError: (
        ErrorCode.QUEUE_UNAVAILABLE,
        "no response ({message}); start the server, or check the host",
    ),
}


def _is_tls_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
