"""Tests of the queue in the head process of a cluster, through the requests of its clients."""

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from chunkq_producer import workers as producer_workers
from chunkq_producer.workers import NO_ROOM_SECONDS, ClusterWorkers

from chunkq.errors import ErrorCode
from chunkq.job.events import ignore
from chunkq.job.tasks import JobId
from chunkq.queue.backends.hosted import queue_host
from chunkq.queue.backends.hosted.hosted import ANSWER_LOOKS
from chunkq.queue.backends.hosted.queue_host import (
    LOADING_LEASE,
    LOST_WORKER_LEASE,
    MAX_LOADING_DEATHS,
    MAX_OUTAGES,
    OUTAGES_SECONDS,
    VERSION,
    QueueHost,
)
from chunkq.queue.backends.hosted.remote_table import RemoteTable
from chunkq.queue.backends.hosted.worker_group import RemoteWorkers

JOB = JobId("/data/brain.zarr.chunkq", "0a1b2c3d")
LONG = 1000.0


def request(host: QueueHost, name: str, *values: Any, version: str = VERSION) -> dict[str, Any]:
    values_sent = {"method": name, "params": values, "version": version}
    response: dict[str, Any] = json.loads(host.answer(json.dumps(values_sent)))
    return response


@pytest.fixture
def host() -> Iterator[QueueHost]:
    """Return a host with two leases: of a worker with the owner "node", and one without."""
    host = QueueHost()
    request(host, "submit", [[*JOB, name, f"message {name}"] for name in ("a", "b")])
    request(host, "register_worker", "worker-1", "node", True)
    for worker in ("worker-1", "worker-2"):
        assert request(host, "reserve", worker, LONG, None, [])["result"][4] == 1
    yield host
    host.close()


def wait(seconds: float, patch: pytest.MonkeyPatch, put_forward: float = 0.0) -> None:
    """Let time pass. The clock of the machine is also put forward, or back."""
    monotonic, clock = time.monotonic() + seconds, time.time() + seconds + put_forward
    times = SimpleNamespace(monotonic=lambda: monotonic, time=lambda: clock)
    patch.setattr(queue_host, "time", times)


def test_releasing_an_owner_releases_the_tasks_of_its_workers_once(host: QueueHost) -> None:
    assert request(host, "release", "node", True) == {"result": 1}
    assert request(host, "counts", *JOB) == {"result": {"queued": 1, "running": 1}}
    assert request(host, "release", "node", True) == {"result": 0}


def test_leases_of_a_lost_owner_are_shortened_and_others_remain(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.expire_workers("node")
    assert request(host, "counts", *JOB) == {"result": {"running": 2}}
    wait(LOST_WORKER_LEASE + 1, monkeypatch)
    assert request(host, "counts", *JOB) == {"result": {"queued": 1, "running": 1}}
    assert request(host, "running", *JOB)["result"][0][1] == "worker-2"


@pytest.mark.parametrize("put_forward", [-3600.0, 3600.0])
def test_leases_end_in_time_although_the_clock_of_the_head_is_changed(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch, put_forward: float
) -> None:
    wait(LONG / 2, monkeypatch, put_forward)
    assert request(host, "counts", *JOB) == {"result": {"running": 2}}
    wait(LONG + 1, monkeypatch, put_forward)
    assert request(host, "counts", *JOB) == {"result": {"queued": 2}}


def test_a_worker_that_loads_a_network_keeps_its_leases_without_renewing_them(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    request(host, "renew", "worker-1", [[*JOB, "a"]], 20)
    request(host, "set_loading", "worker-1", True)
    wait(LOADING_LEASE - 1, monkeypatch)
    assert request(host, "counts", *JOB) == {"result": {"running": 2}}
    request(host, "set_loading", "worker-1", False)
    request(host, "renew", "worker-1", [[*JOB, "a"]], 20)
    wait(LOADING_LEASE - 1 + 21, monkeypatch)
    assert request(host, "counts", *JOB) == {"result": {"queued": 1, "running": 1}}


def test_the_death_of_a_loading_process_counts_only_when_it_is_repeated(host: QueueHost) -> None:
    for number in range(MAX_LOADING_DEATHS + 1):
        worker = f"loading-{number}"
        request(host, "register_worker", worker, "node")
        request(host, "release", "worker-1", False)
        row = request(host, "reserve", worker, LONG, None, [])["result"]
        assert row[2:] == ["a", "message a", 1]
        request(host, "set_loading", worker, True)
        assert request(host, "is_loading", "node") == {"result": True}
        host.expire_workers("node")
        assert request(host, "is_loading", "node") == {"result": False}
        assert request(host, "counts", *JOB) == {"result": {"queued": 1, "running": 1}}
    row = request(host, "reserve", "last", LONG, None, [])["result"]
    assert row[2:] == ["a", "message a", 2]


def test_chunks_of_a_lost_process_need_a_new_worker_when_no_other_one_is_left(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    request(host, "start_group", "group", JOB.path, "ray://auto", 1, False, 1)
    assert host.wanted_workers("group", active=2, limit=9) == 2
    assert host.wanted_workers("group", active=0, limit=9) == 0
    host.expire_workers("node")
    wait(LOST_WORKER_LEASE + 1, monkeypatch)
    assert host.wanted_workers("group", active=0, limit=9) == 1
    assert host.wanted_workers("group", active=1, limit=9) == 2
    assert host.wanted_workers("group", active=1, limit=1) == 1


def test_a_lost_process_has_worked_only_if_one_of_its_workers_had_its_network(
    host: QueueHost,
) -> None:
    assert not host.expire_workers("unknown")
    request(host, "register_worker", "worker-3", "other")
    request(host, "set_loading", "worker-3", True)
    assert not host.expire_workers("other")
    assert host.expire_workers("node")


def test_a_request_of_another_version_is_rejected_and_changes_nothing(host: QueueHost) -> None:
    response = request(host, "cancel", *JOB, version="0.0.0")
    assert response["code"] == ErrorCode.QUEUE_VERSION_MISMATCH
    assert VERSION in response["error"]
    assert "0.0.0" in response["error"]
    assert request(host, "counts", *JOB) == {"result": {"running": 2}}


def test_only_operations_of_the_queue_are_supported(host: QueueHost) -> None:
    for name in ("close", "answer", "__init__", "_change", "shorten", "expire_workers"):
        response = request(host, name)
        assert response["code"] == ErrorCode.QUEUE_UNAVAILABLE
        assert repr(name) in response["error"]


def test_a_process_is_silent_when_its_leases_have_ended_but_not_while_it_loads(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    request(host, "reserve", "worker-1", 20, None, [])
    wait(19, monkeypatch)
    assert not host.is_silent("node")
    wait(21, monkeypatch)
    assert host.is_silent("node")
    assert not host.is_silent("unknown")
    request(host, "set_loading", "worker-1", True)
    wait(100, monkeypatch)
    assert not host.is_silent("node")
    request(host, "set_loading", "worker-1", False)
    request(host, "renew", "worker-1", [[*JOB, "a"]], 20)
    wait(119, monkeypatch)
    assert not host.is_silent("node")
    wait(121, monkeypatch)
    assert host.is_silent("node")
    request(host, "record_exit", "group", [], "worker-1")
    assert not host.is_silent("node")


def test_a_worker_that_reached_the_queue_again_is_an_error_only_if_this_is_repeated(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outage() -> list[str]:
        request(host, "record_outage", "group", ["unreachable"], "worker-1")
        return host.group("group").messages

    assert not any(outage() for _ in range(3 * MAX_OUTAGES))
    wait(OUTAGES_SECONDS + 1, monkeypatch)
    request(host, "ack", *JOB, "a", "worker-1")
    assert not outage()
    wait(2 * OUTAGES_SECONDS + 2, monkeypatch)
    assert [outage() for _ in range(MAX_OUTAGES)][-1] == ["unreachable"]


class Process:
    """A process of a queue that answers after some looks; the clock leaps at each of them."""

    def __init__(self, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks, self.now = looks, time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def look(self) -> bool:
        self.looks -= 1
        self.now += LONG
        return self.looks <= 0


@pytest.mark.parametrize("looks", [ANSWER_LOOKS, ANSWER_LOOKS + 1])
def test_time_for_which_a_process_of_dask_was_suspended_is_no_time_without_an_answer(
    looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chunkq.queue.backends.dask import executor

    process = Process(looks, monkeypatch)

    class Client:
        loop = SimpleNamespace(asyncio_loop=SimpleNamespace(is_closed=lambda: False))

    def look(futures: list[Any], timeout: float) -> Any:
        return SimpleNamespace(done=futures if process.look() else [])

    def send(call: Any, loop: Any) -> Any:
        call.close()
        return SimpleNamespace(result=lambda: "answer", cancel=lambda: None)

    monkeypatch.setattr(executor.asyncio, "run_coroutine_threadsafe", send)
    monkeypatch.setattr(executor, "wait", look)
    if looks > ANSWER_LOOKS:
        with pytest.raises(executor.UNREACHABLE_ERRORS):
            executor._response(Client, "request")
    else:
        assert executor._response(Client, "request") == "answer"


@pytest.mark.parametrize("looks", [ANSWER_LOOKS, ANSWER_LOOKS + 1])
def test_time_for_which_a_process_of_ray_was_suspended_is_no_time_without_an_answer(
    looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import GetTimeoutError

    from chunkq.queue.backends.ray import executor

    process = Process(looks, monkeypatch)

    def get(reference: str, timeout: float) -> str:
        if not process.look():
            raise GetTimeoutError
        return reference

    monkeypatch.setattr(executor.ray, "get", get)
    if looks > ANSWER_LOOKS:
        with pytest.raises(GetTimeoutError):
            executor._response("answer")
    else:
        assert executor._response("answer") == "answer"


def test_a_run_says_once_that_a_cluster_has_no_room_and_once_that_it_has(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = RemoteTable(host.answer, "dask://host:1")
    table.start_group("group", JOB.path, "dask://host:1", 1)
    lines = {"no_room": "no room", "room": "room"}
    workers = RemoteWorkers(table, "group", has_room=False, **lines)
    run = ClusterWorkers(workers, ignore, lambda: False)
    now = time.monotonic()

    def logged(has_room: bool, seconds: float) -> list[str]:
        nonlocal now
        now += seconds
        monkeypatch.setattr(producer_workers.time, "monotonic", lambda: now)
        host.set_active("group", 1, has_room=has_room)
        caplog.clear()
        assert not run.have_ended()
        return [record.getMessage() for record in caplog.records]

    assert [record.getMessage() for record in caplog.records] == ["no room"]
    assert not run.have_ended()  # before the head has looked
    assert caplog.records[1:] == []
    assert logged(False, 100) == []
    assert logged(True, 100) == ["room"]
    assert logged(False, NO_ROOM_SECONDS - 1) == []
    assert logged(True, 1) == []
    assert logged(False, NO_ROOM_SECONDS + 1) == ["no room"]
    assert logged(False, 100) == []
    assert logged(True, 1) == ["room"]
    host.expire_workers("node")  # it leaves in order
    host.release("worker-1", counted=False)
    assert logged(True, LOST_WORKER_LEASE + 1) == []
    request(host, "register_worker", "worker-1", "node", True)
    host.expire_workers("node")
    assert logged(True, 1) == []
    now += LOST_WORKER_LEASE
    assert [line.split()[2:6] for line in logged(True, 1)] == [["1", "worker", "process", "was"]]
    assert logged(True, 1) == []


def test_the_chunks_of_a_suspended_actor_get_others_and_the_run_does_not_wait_for_it(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chunkq.queue.backends.ray import launcher as ray_launcher
    from chunkq.queue.backends.ray.launcher import RemoteWorkerLauncher, _Worker

    request(host, "start_group", "group", JOB.path, "ray://auto", 1, False, 1)
    launcher = RemoteWorkerLauncher(host)
    launcher._workers["group"] = [_Worker(None, "node", has_started=True)]
    monkeypatch.setattr(launcher, "_create", lambda name, group: _Worker(None, "new"))
    monkeypatch.setattr(ray_launcher, "_end", lambda worker: None)
    wait(LONG + 1, monkeypatch)
    launcher._update("group", [{"CPU": 1}])
    status = request(host, "group_status", "group")["result"]
    assert (host.group("group").active, status["has_room"]) == (2, False)
    request(host, "cancel", *JOB)
    launcher._update("group", [{"CPU": 1}])
    assert request(host, "group_status", "group")["result"]["is_over"]


def test_a_new_queue_of_ray_ends_the_workers_that_wait_for_a_node_and_for_a_lost_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from chunkq.queue.backends.ray import launcher, queue_actor

    actors = {
        number: {"ActorClassName": kind, "Name": name}
        for number, (kind, name) in enumerate([("ChunkqWorker", "a"), ("Other", "b")])
    }
    asked, killed = [], []

    def find(actor_state_name: str) -> dict[int, dict[str, str]]:
        asked.append(actor_state_name)
        return actors

    monkeypatch.setattr(launcher.state, "actors", find)
    monkeypatch.setattr(launcher.ray, "get_actor", lambda name, namespace: name)
    monkeypatch.setattr(launcher.ray, "kill", killed.append)
    assert queue_actor.ChunkqQueue()._launcher
    assert (asked, killed) == (["PENDING_CREATION"], ["a"])
