"""The contract of every queue backend, of jobs that need a new worker process."""

import threading
from dataclasses import replace

import pytest

from chunkq.errors import FrameworkConflictError
from chunkq.executors.base import Attempt, Counts, Executor
from chunkq.tasks import Task
from tests.contract import test_executor_contract as contract
from tests.contract.test_executor_contract import (
    JOB,
    OTHER_JOB,
    QUICK,
    Diary,
    burst,
    options,
    tasks,
)
from tests.harness.waiting import TIMEOUT, wait_until

pytest_generate_tests = contract.pytest_generate_tests
url, queue = contract.url, contract.queue  # its fixtures


def conflict_in_other_job(task: Task, attempt: Attempt) -> None:
    if task.job == OTHER_JOB:
        raise FrameworkConflictError("another framework")


@pytest.mark.parametrize("ends_when_drained", [False, True])
def test_a_job_that_needs_a_new_process_stays_untouched_and_all_others_are_done_first(
    queue: Executor, ends_when_drained: bool
) -> None:
    queue.submit(tasks(2, OTHER_JOB))
    queue.submit(tasks(6, JOB))
    diary = Diary(conflict_in_other_job)
    with pytest.raises(FrameworkConflictError):
        queue.run_tasks(diary, options("worker-a", depth=2, burst=ends_when_drained))
    assert sorted(diary.ended, key=lambda task: task.chunk) == tasks(6, JOB)
    assert queue.jobs() == {OTHER_JOB: Counts(queued=2)}
    fresh = Diary()
    queue.run_tasks(fresh, burst("worker-b"))
    assert sorted(fresh.tasks, key=lambda task: task.chunk) == tasks(2, OTHER_JOB)
    assert fresh.numbers == [1, 1]


def test_after_a_while_a_job_that_needs_a_new_process_waits_no_longer_for_others(
    queue: Executor,
) -> None:
    settings = replace(QUICK, longest_replacement_delay=0.0)
    queue.submit(tasks(1, OTHER_JOB))
    queue.submit(tasks(20, JOB))
    diary = Diary(conflict_in_other_job)
    with pytest.raises(FrameworkConflictError):
        queue.run_tasks(diary, options(settings=settings))
    assert diary.tasks[-1].job == OTHER_JOB
    assert queue.counts(OTHER_JOB) == Counts(queued=1)
    assert queue.counts(JOB) == Counts(queued=20 - len(diary.ended))


def test_a_process_to_be_replaced_finishes_what_is_in_flight(queue: Executor) -> None:
    go, orders = threading.Event(), options(depth=2)
    errors: list[BaseException] = []

    def handle(task: Task, attempt: Attempt) -> None:
        conflict_in_other_job(task, attempt)
        assert go.wait(TIMEOUT)

    def work() -> None:
        try:
            queue.run_tasks(handle, orders)
        except FrameworkConflictError as error:
            errors.append(error)

    queue.submit(tasks(1, JOB))
    worker = threading.Thread(target=work)
    worker.start()
    try:
        wait_until(lambda: queue.counts(JOB).running, "a task is in flight")
        queue.submit(tasks(1, OTHER_JOB))
        assert orders.stop.wait(TIMEOUT)
        assert queue.jobs() == {JOB: Counts(running=1), OTHER_JOB: Counts(queued=1)}
        assert worker.is_alive()
    finally:
        go.set()
        orders.stop.set()
        worker.join(TIMEOUT)
    assert len(errors) == 1
    assert queue.jobs() == {OTHER_JOB: Counts(queued=1)}


def test_a_worker_that_is_told_to_stop_meanwhile_ends_well(queue: Executor) -> None:
    orders = options()

    def handle(task: Task, attempt: Attempt) -> None:
        orders.stop.set()
        conflict_in_other_job(task, attempt)

    queue.submit(tasks(1, OTHER_JOB))
    queue.run_tasks(handle, orders)
    assert queue.counts(OTHER_JOB) == Counts(queued=1)
