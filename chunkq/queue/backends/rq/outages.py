"""Retries while a Redis server is unreachable or refuses writes, and log lines for each outage."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, ResponseError
from redis.retry import Retry
from typing_extensions import override

from chunkq.errors import ErrorCode

log = logging.getLogger("chunkq.queue")

PATIENCE = 300.0
"""Time (s) of an outage for which requests are repeated, about."""
STOP_PATIENCE = 10.0
"""The same for a worker that stops: its chunks in flight are committed without the queue."""
UNLIMITED = -1
"""Retries of redis-py: connections, and requests that need one, are nested."""
LONGEST_PAUSE = 5.0
"""Longest time (s) between two tries, unless leases are short."""
REFUSED = re.compile("READONLY|MASTERDOWN|MISCONF|NOREPLICAS|Errors writing to the AOF")
"""Errors of a server that refuses to write for now: it is a replica, or cannot save its data."""


class _WriteRefusedError(RedisConnectionError):
    """A server refuses to write. A new connection may lead to another one."""


class Outages:
    """Outages of one server, as all connections of this process see them.

    An outage ends with a request that fails, is repeated and succeeds: a new connection, or a
    request that only reads, says nothing of a write.
    """

    def __init__(self, server: str, describe: Callable[[Exception], tuple[ErrorCode, str]]) -> None:
        self._server, self._describe = server, describe
        self._lock = threading.Lock()
        self._since: float | None = None
        self._has_given_up = False
        self._request = threading.local()
        self._stop = threading.Event()

    def start(self, stop: threading.Event) -> None:
        """Begin to wait for the server again, for a worker that ends after `stop` is set."""
        with self._lock:
            self._stop, self._since, self._has_given_up = stop, None, False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Run one request, with the connections that it needs; log the end of an outage."""
        self._request.has_failed = False
        yield
        with self._lock:
            since, has_given_up = self._since, self._has_given_up
            if not (self._request.has_failed or has_given_up):
                return
            self._since, self._has_given_up = None, False
        if since is not None and not has_given_up:
            log.warning(
                "queue: %s: the server answers again, after %.0f s",
                self._server,
                time.monotonic() - since,
            )

    def report(self, error: Exception, *, is_first: bool) -> None:
        """Log the first failure of an outage. Raise the error if the worker waits no longer.

        A connection that the server closed while it was idle fails once, so the first failure of a
        call says nothing.
        """
        self._request.has_failed = True
        with self._lock:
            if is_first and self._since is None:
                return
            is_new, self._since = self._since is None, self._since or time.monotonic()
            patience = STOP_PATIENCE if self._stop.is_set() else PATIENCE
            if time.monotonic() - self._since >= patience:
                self._has_given_up = True
        if self._has_given_up:
            raise error
        if is_new:
            code, reason = self._describe(_original(error))
            log.warning(
                "queue: %s: %s; waiting for it, for about %s [%s]",
                self._server,
                reason,
                "five minutes" if patience == PATIENCE else f"{patience:g} s",
                code,
            )


class PatientRetry(Retry):
    """Retries for about five minutes, and reports to the `Outages` of the server."""

    def __init__(self, outages: Outages, lease: float) -> None:
        """Create the retries of a worker.

        The server ends leases (s) that were not renewed, unless it was away for half a lease. So a
        renewal, which is due after a third of a lease, is not delayed by more than a sixth.
        """
        pause = min(LONGEST_PAUSE, lease / 8)
        super().__init__(ExponentialBackoff(cap=pause, base=0.2), UNLIMITED)
        self._outages, self._lease = outages, lease

    def __deepcopy__(self, memo: dict[int, Any]) -> PatientRetry:
        """Return a copy with its own backoff; each connection makes one."""
        return PatientRetry(self._outages, self._lease)

    @override
    def call_with_retry(
        self,
        do: Callable[[], Any],
        fail: Callable[..., Any],
        *arguments: Any,
        **options: Any,
    ) -> Any:
        has_failed = False

        def attempt() -> Any:
            try:
                return do()
            except ResponseError as error:
                # Each change is one script, which has done nothing.
                if isinstance(error, ReadOnlyError | MasterDownError) or REFUSED.search(str(error)):
                    raise _WriteRefusedError(str(error)) from error
                raise

        def report(error: Exception, *count: int) -> None:
            nonlocal has_failed
            fail(error, *count)
            is_first, has_failed = not has_failed, True
            self._outages.report(error, is_first=is_first)

        try:
            return super().call_with_retry(attempt, report, *arguments, **options)
        except _WriteRefusedError as error:
            raise _original(error) from None


def _original(error: Exception) -> Exception:
    """Return the error of the server."""
    cause = error.__cause__
    return (
        cause if isinstance(error, _WriteRefusedError) and isinstance(cause, Exception) else error
    )
