"""Retries while a Redis server is unreachable or refuses writes, and log lines for each outage."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, ReadOnlyError, ResponseError
from redis.retry import Retry
from typing_extensions import override

from chunkq.errors import ErrorCode

log = logging.getLogger("chunkq.queue")

PATIENCE = 300.0
"""Time (s) for which requests are repeated, about."""
LONGEST_PAUSE = 5.0
"""Longest time (s) between two tries, unless leases are short."""
REFUSED = re.compile("READONLY|MASTERDOWN|MISCONF|NOREPLICAS|Errors writing to the AOF")
"""Errors of a server that refuses to write for now: it is a replica, or cannot save its data."""


class _WriteRefusedError(RedisConnectionError):
    """A server refuses to write. A new connection may lead to another one."""


class Outages:
    """Outages of one server, as all connections of this process see them."""

    def __init__(self, server: str, describe: Callable[[Exception], tuple[ErrorCode, str]]) -> None:
        self._server, self._describe = server, describe
        self._lock = threading.Lock()
        self._since: float | None = None

    def begin(self, error: Exception) -> None:
        """Log the first failure of an outage."""
        with self._lock:
            is_new, self._since = self._since is None, self._since or time.monotonic()
        if is_new:
            code, reason = self._describe(_original(error))
            log.warning(
                "queue: %s: %s; waiting for it, for about five minutes [%s]",
                self._server,
                reason,
                code,
            )

    def end(self) -> None:
        """Log that the server answers again, unless another thread has logged it."""
        with self._lock:
            since, self._since = self._since, None
        if since is not None:
            log.warning(
                "queue: %s: the server answers again, after %.0f s",
                self._server,
                time.monotonic() - since,
            )

    def forget(self) -> None:
        """End an outage without a word: whoever waited for it has given up."""
        with self._lock:
            self._since = None


class PatientRetry(Retry):
    """Retries for about five minutes, and reports to the `Outages` of the server."""

    def __init__(self, outages: Outages, lease: float) -> None:
        """Create the retries of a worker.

        The server ends leases (s) that were not renewed, unless it was away for half a lease. So a
        renewal, which is due after a third of a lease, is not delayed by more than a sixth.
        """
        pause = min(LONGEST_PAUSE, lease / 8)
        super().__init__(ExponentialBackoff(cap=pause, base=0.2), round(PATIENCE / pause))
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
            # A connection that the server closed while it was idle fails once.
            if has_failed:
                self._outages.begin(error)
            has_failed = True

        try:
            result = super().call_with_retry(attempt, report, *arguments, **options)
        except Exception as error:
            if has_failed:
                self._outages.forget()
            if isinstance(error, _WriteRefusedError):
                raise _original(error) from None
            raise
        if has_failed:  # a new connection, or a request that only reads, says nothing of a write
            self._outages.end()
        return result


def _original(error: Exception) -> Exception:
    """Return the error of the server."""
    cause = error.__cause__
    return (
        cause if isinstance(error, _WriteRefusedError) and isinstance(cause, Exception) else error
    )
