"""The time limit of a task counts the time for which its process runs."""

import time
from types import SimpleNamespace

import pytest

from chunkq.errors import TaskTimeoutError
from chunkq.job.tasks import Task
from chunkq.queue.backends.inprocess import InProcessExecutor
from chunkq.queue.contract.executor import Attempt, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.leases import task_loop
from tests.harness.waiting import wait_until

LIMIT = 0.6


@pytest.mark.parametrize("leap", [1000 * LIMIT, 0.0], ids=["suspended", "hangs"])
def test_time_for_which_a_process_was_suspended_is_not_that_of_its_task(
    monkeypatch: pytest.MonkeyPatch, leap: float
) -> None:
    queue, offset, checks = InProcessExecutor(f"inprocess://limit-{leap}"), 0.0, 0
    queue.submit([Task("infer", "/out.zarr.chunkq", "00000001", 0, (0,))])
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + offset, time=lambda: time.time() + offset
    )
    monkeypatch.setattr(task_loop, "time", clock)
    check = task_loop._TaskLoops.check_timeouts

    def counted(loops: task_loop._TaskLoops) -> None:
        nonlocal checks
        check(loops)
        checks += 1

    monkeypatch.setattr(task_loop._TaskLoops, "check_timeouts", counted)

    def handler(task: Task, attempt: Attempt) -> None:
        nonlocal offset
        offset += leap
        if leap:
            wait_until(lambda n=checks + 2: checks >= n, "the limit is checked")
        else:
            time.sleep(3 * LIMIT)

    settings = WorkerSettings(lease=LIMIT / 2)
    options = WorkerOptions("worker", burst=True, time_limit=LIMIT, settings=settings)
    if leap:
        queue.run_tasks(handler, options)
    else:
        with pytest.raises(TaskTimeoutError):
            queue.run_tasks(handler, options)
