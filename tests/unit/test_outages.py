"""Outages of a Redis server as a worker sees them: retries, log lines, and when it gives up."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from chunkq.errors import ErrorCode
from chunkq.queue.backends.rq import outages as module
from chunkq.queue.backends.rq.outages import PATIENCE, STOP_PATIENCE, Outages, PatientRetry


class Server:
    """A server that refuses connections until a time of a simulated clock (s)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.answers_at, self.accepts_at = 0.0, 0.0, 0.0
        self.on_sleep: Callable[[], object] = lambda: None
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr("redis.retry.sleep", self.sleep)
        self.stop = threading.Event()
        self.outages = Outages("redis://test", lambda error: (ErrorCode.QUEUE_UNAVAILABLE, "away"))
        self.outages.start(self.stop)
        self.retry = PatientRetry(self.outages, lease=20)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()

    def send(self) -> None:
        """Send a request as redis-py does: the command connects first, each with its retries."""

        def at(time: float) -> None:
            if self.now < time:
                raise RedisConnectionError

        def command() -> None:
            self.retry.call_with_retry(lambda: at(self.accepts_at), lambda error: None)
            at(self.answers_at)

        with self.outages.request():
            self.retry.call_with_retry(command, lambda error: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return how each log line ends or begins."""
    kinds = {"waiting": "begin", "answers again": "end"}
    lines = [record.getMessage() for record in caplog.records]
    return [kind for line in lines for text, kind in kinds.items() if text in line]


def test_an_outage_has_one_line_when_it_begins_and_one_when_it_ends(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers_at = server.accepts_at = 60
    server.send()
    assert logged(caplog) == ["begin", "end"]
    server.send()
    assert logged(caplog) == ["begin", "end"]


def test_a_connection_that_was_closed_while_it_was_idle_is_no_outage(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers_at = 0.1
    server.send()
    assert logged(caplog) == []


def test_a_server_that_accepts_connections_but_no_request_does_not_answer_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    # As while it saves its data before it ends, or loads them.
    server.accepts_at, server.answers_at = 30, PATIENCE * 2
    with pytest.raises(RedisConnectionError):
        server.send()
    assert logged(caplog) == ["begin"]


def test_all_requests_give_up_five_minutes_after_the_outage_began(server: Server) -> None:
    server.answers_at = server.accepts_at = PATIENCE * 10
    for _ in range(2):  # the second as one of another thread
        with pytest.raises(RedisConnectionError):
            server.send()
    assert PATIENCE <= server.now <= PATIENCE + 2 * module.LONGEST_PAUSE


@pytest.mark.parametrize("begun", [False, True])
def test_a_worker_that_stops_waits_only_for_some_seconds(server: Server, begun: bool) -> None:
    server.answers_at = server.accepts_at = PATIENCE
    if begun:
        server.on_sleep = server.stop.set
    else:
        server.stop.set()
    with pytest.raises(RedisConnectionError):
        server.send()
    assert server.now <= STOP_PATIENCE + 2 * module.LONGEST_PAUSE


def test_a_new_worker_waits_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answers_at = server.accepts_at = PATIENCE * 1.5
    with pytest.raises(RedisConnectionError):
        server.send()
    server.outages.start(threading.Event())
    server.send()
    assert logged(caplog) == ["begin", "begin", "end"]
