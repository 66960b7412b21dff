"""What the plugin of the Dask scheduler counts: deaths of workers, and whether it is idle."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from distributed.scheduler import KilledWorker

from chunkq.queue.backends.dask.plugin import (
    OPERATION,
    REMOTE_TASK,
    QueuePlugin,
    RemoteWorkerLauncher,
)
from chunkq.queue.backends.hosted.queue_host import MAX_LOADING_DEATHS, VERSION, QueueHost


def test_deaths_of_a_worker_count_against_a_thread_only_before_it_has_its_network() -> None:
    plugin = QueuePlugin(has_page=False)
    scheduler = SimpleNamespace(handlers={}, idle_since=0.0, idle_timeout=None, tasks={})
    asyncio.run(plugin.start(scheduler))
    keys = (f"{REMOTE_TASK}-ab-0", "x-1", ("x", 2))
    scheduler.tasks |= {key: SimpleNamespace(suspicious=3) for key in keys}
    plugin.remove_worker(scheduler, "tcp://node")  # no worker of chunkq ran there
    assert [task.suspicious for task in scheduler.tasks.values()] == [3, 3, 3]
    call = {"method": "register_worker", "params": ["worker", "tcp://node"], "version": VERSION}
    scheduler.handlers[OPERATION](json.dumps(call))
    plugin.remove_worker(scheduler, "tcp://node")
    assert [task.suspicious for task in scheduler.tasks.values()] == [0, 3, 3]


@pytest.mark.parametrize(
    ("allowed", "tolerated"), [(0, MAX_LOADING_DEATHS), (3, 0)], ids=["of a site", "of Dask"]
)
def test_tasks_that_dask_gives_up_end_a_group_after_four_deaths_in_a_row(
    allowed: int, tolerated: int
) -> None:
    host = QueueHost()
    host.start_group("ab", "/out.zarr.chunkq", "dask://host:1", 1, gpu=False, cores=1)
    scheduler = SimpleNamespace(allowed_failures=allowed, workers={}, task_prefixes={})
    launcher = RemoteWorkerLauncher(scheduler, host)

    def is_reported() -> bool:
        error = KilledWorker("task", None, allowed)
        state = SimpleNamespace(exception=error)
        given_up = SimpleNamespace(status="error", done=lambda: True, _state=state)
        launcher._tasks["ab"] = [given_up]
        launcher._update(None, "ab")
        return bool(host.group("ab").messages)

    assert not any(is_reported() for _ in range(tolerated))
    launcher.record_death(has_worked=True, was_loading=False)
    assert not any(is_reported() for _ in range(tolerated))
    assert is_reported()


def test_workers_that_dask_loses_while_they_load_end_a_group_in_the_end() -> None:
    plugin = QueuePlugin(has_page=False)
    scheduler = SimpleNamespace(
        handlers={}, idle_timeout=None, tasks={}, allowed_failures=3, workers={}, task_prefixes={}
    )

    def call(method: str, *arguments: object) -> None:
        values = {"method": method, "params": arguments, "version": VERSION}
        assert "result" in json.loads(plugin._host.answer(json.dumps(values)))

    def lose(number: int) -> bool:
        """Lose a worker, which has a new address each time; return whether the group has ended."""
        address = f"tcp://node:{number}"
        call("register_worker", f"worker-{number}", address)
        call("set_loading", f"worker-{number}", True)
        plugin.remove_worker(scheduler, address)
        plugin._launcher._update(None, "ab")
        return bool(plugin._host.group("ab").messages)

    asyncio.run(plugin.start(scheduler))
    call("start_group", "ab", "/out.zarr.chunkq", "dask://host:1", 1, False, 1)
    assert [lose(number) for number in range(3)] == [False] * 3
    job = ("/out.zarr.chunkq", "00000001")
    call("submit", [(*job, "infer/0/1", "{}")])
    call("reserve", "worker", 60.0, None, [])
    call("ack", *job, "infer/0/1", "worker")
    assert [lose(number) for number in range(4)] == [False, False, False, True]


def test_a_scheduler_with_an_idle_timeout_is_idle_when_its_queue_is_empty() -> None:
    plugin = QueuePlugin(has_page=False)
    scheduler = SimpleNamespace(handlers={}, idle_timeout=60.0, periodic_callbacks={})

    def is_idle_after(method: str, *arguments: object) -> bool:
        call = {"method": method, "params": arguments, "version": VERSION}
        assert "result" in json.loads(scheduler.handlers[OPERATION](json.dumps(call)))
        scheduler.idle_since = 1.0  # as the scheduler sets it, without tasks of its own
        scheduler.periodic_callbacks[OPERATION].callback()
        return scheduler.idle_since is not None

    async def states() -> list[bool]:
        await plugin.start(scheduler)
        job = ("/out.zarr.chunkq", "00000001")
        return [
            is_idle_after("jobs"),
            is_idle_after("submit", [(*job, "infer/0/1", "{}")]),
            is_idle_after("reserve", "worker", 60.0, None, []),
            is_idle_after("ack", *job, "infer/0/1", "worker"),
        ]

    assert asyncio.run(states()) == [True, False, False, True]
