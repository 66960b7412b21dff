"""Retries while a Redis server is unreachable, with a line in the log when it goes and returns."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from typing_extensions import override

log = logging.getLogger("chunkq.queue")

TRIES = 60
"""Retries, up to 5 s apart: about five minutes."""


class Outages:
    """Outages of one server, as all connections of this process see them."""

    def __init__(self, server: str, describe: Callable[[Exception], str]) -> None:
        self._server, self._describe = server, describe
        self._lock = threading.Lock()
        self._since: float | None = None

    def begin(self, error: Exception) -> None:
        """Log the first failure of an outage."""
        with self._lock:
            is_new, self._since = self._since is None, self._since or time.monotonic()
        if is_new:
            log.warning(
                "queue: %s: %s; waiting for it, for about five minutes",
                self._server,
                self._describe(error),
            )

    def end(self) -> None:
        """Log that the server answers again, if it did not."""
        if self._since is None:
            return
        with self._lock:
            since, self._since = self._since, None
        if since is not None:
            log.warning(
                "queue: %s: the server answers again, after %.0f s",
                self._server,
                time.monotonic() - since,
            )


class PatientRetry(Retry):
    """Retries for about five minutes, and reports to the `Outages` of the server."""

    def __init__(self, outages: Outages) -> None:
        super().__init__(ExponentialBackoff(cap=5, base=0.2), TRIES)
        self._outages = outages

    def __deepcopy__(self, memo: dict[int, Any]) -> PatientRetry:
        """Return a copy with its own backoff; each connection makes one."""
        return PatientRetry(self._outages)

    @override
    def call_with_retry(
        self,
        do: Callable[[], Any],
        fail: Callable[..., Any],
        *arguments: Any,
        **options: Any,
    ) -> Any:
        has_failed = False

        def report(error: Exception, *count: int) -> None:
            nonlocal has_failed
            fail(error, *count)
            # A connection that the server closed while it was idle fails once.
            if has_failed:
                self._outages.begin(error)
            has_failed = True

        result = super().call_with_retry(do, report, *arguments, **options)
        self._outages.end()
        return result
