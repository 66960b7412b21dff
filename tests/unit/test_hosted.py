"""Tests of the queue in the head process of a cluster, through the requests of its clients."""

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from chunkq.errors import ErrorCode
from chunkq.job.tasks import JobId
from chunkq.queue.backends.hosted.queue_host import LOST_WORKER_LEASE, VERSION, QueueHost
from chunkq.queue.backends.tables import task_table

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
    request(host, "register_worker", "worker-1", "node")
    for worker in ("worker-1", "worker-2"):
        assert request(host, "reserve", worker, LONG, None, [])["result"][4] == 1
    yield host
    host.close()


def test_releasing_an_owner_releases_the_tasks_of_its_workers_once(host: QueueHost) -> None:
    assert request(host, "release", "node", True) == {"result": 1}
    assert request(host, "counts", *JOB) == {"result": {"queued": 1, "running": 1}}
    assert request(host, "release", "node", True) == {"result": 0}


def test_leases_of_a_lost_owner_are_shortened_and_others_remain(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.expire_workers("node")
    assert request(host, "counts", *JOB) == {"result": {"running": 2}}
    later = time.time() + LOST_WORKER_LEASE + 1
    monkeypatch.setattr(task_table, "time", SimpleNamespace(time=lambda: later))
    assert request(host, "counts", *JOB) == {"result": {"queued": 1, "running": 1}}
    assert request(host, "running", *JOB)["result"][0][1] == "worker-2"


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
