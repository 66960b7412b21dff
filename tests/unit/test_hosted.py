"""The queue that a cluster's head keeps in its memory, asked as its clients ask it."""

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from chunkq.executors import tables
from chunkq.executors.hosted import LOST_NODE_LEASE, VERSION, QueueHost

JOB = "/data/brain.zarr.chunkq"
LONG = 1000.0


def ask(host: QueueHost, name: str, *values: Any, version: str = VERSION) -> dict[str, Any]:
    request = {"do": name, "with": values, "version": version}
    answer: dict[str, Any] = json.loads(host.answer(json.dumps(request)))
    return answer


@pytest.fixture
def host() -> Iterator[QueueHost]:
    """Two tasks are leased: by a worker whose home is "node", and by one without a home."""
    host = QueueHost()
    ask(host, "submit", [[name, JOB, f"message {name}"] for name in ("a", "b")])
    ask(host, "register_worker", "worker-1", "node")
    for worker in ("worker-1", "worker-2"):
        assert ask(host, "reserve", worker, LONG, None, [])["is"][2] == 1
    yield host
    host.close()


def test_releasing_a_home_releases_the_tasks_of_its_workers_once(host: QueueHost) -> None:
    assert ask(host, "release", "node", True) == {"is": 1}
    assert ask(host, "counts", JOB) == {"is": {"queued": 1, "running": 1}}
    assert ask(host, "release", "node", True) == {"is": 0}


def test_leases_of_a_vanished_home_end_soon_and_others_hold(
    host: QueueHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.node_lost("node")
    assert ask(host, "counts", JOB) == {"is": {"running": 2}}
    later = time.time() + LOST_NODE_LEASE + 1
    monkeypatch.setattr(tables, "time", SimpleNamespace(time=lambda: later))
    assert ask(host, "counts", JOB) == {"is": {"queued": 1, "running": 1}}
    assert ask(host, "running", JOB)["is"][0][1] == "worker-2"


def test_another_version_is_refused_and_changes_nothing(host: QueueHost) -> None:
    answer = ask(host, "cancel", JOB, version="0.0.0")
    assert f"chunkq {VERSION}" in answer["error"]
    assert "0.0.0" in answer["error"]
    assert ask(host, "counts", JOB) == {"is": {"running": 2}}


def test_only_operations_of_the_queue_can_be_asked_for(host: QueueHost) -> None:
    for name in ("close", "answer", "__init__", "_change"):
        assert ask(host, name) == {"error": f"knows no {name!r}"}
