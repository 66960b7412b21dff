"""The contract of every queue backend, of jobs that need a new worker process."""

import threading
from dataclasses import replace

import pytest

from chunkq.errors import FrameworkConflictError
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import Attempt, Executor, TaskCounts
from tests.harness.queue_workers import JOB, OTHER_JOB, QUICK, Recorder, burst, options, tasks
from tests.harness.waiting import TIMEOUT, wait_until


def conflict_in_other_job(task: Task, attempt: Attempt) -> None:
    if task.job_id == OTHER_JOB:
        raise FrameworkConflictError("another framework")


@pytest.mark.parametrize("ends_when_drained", [False, True])
def test_a_job_that_needs_a_new_process_stays_queued_until_all_other_jobs_are_done(
    queue: Executor, ends_when_drained: bool
) -> None:
    queue.submit(tasks(2, OTHER_JOB))
    queue.submit(tasks(6, JOB))
    recorder = Recorder(conflict_in_other_job)
    with pytest.raises(FrameworkConflictError):
        queue.run_tasks(recorder, options("worker-a", depth=2, burst=ends_when_drained))
    assert sorted(recorder.finished, key=lambda task: task.chunk) == tasks(6, JOB)
    assert queue.jobs() == {OTHER_JOB: TaskCounts(queued=2)}
    fresh = Recorder()
    queue.run_tasks(fresh, burst("worker-b"))
    assert sorted(fresh.tasks, key=lambda task: task.chunk) == tasks(2, OTHER_JOB)
    assert fresh.numbers == [1, 1]


def test_a_job_that_needs_a_new_process_waits_for_other_jobs_for_a_limited_time(
    queue: Executor,
) -> None:
    settings = replace(QUICK, longest_replacement_delay=0.0)
    queue.submit(tasks(1, OTHER_JOB))
    queue.submit(tasks(20, JOB))
    recorder = Recorder(conflict_in_other_job)
    with pytest.raises(FrameworkConflictError):
        queue.run_tasks(recorder, options(settings=settings))
    assert recorder.tasks[-1].job_id == OTHER_JOB
    assert queue.counts(OTHER_JOB) == TaskCounts(queued=1)
    assert queue.counts(JOB) == TaskCounts(queued=20 - len(recorder.finished))


def test_a_process_to_be_replaced_finishes_tasks_in_flight(queue: Executor) -> None:
    go, worker_options = threading.Event(), options(depth=2)
    errors: list[BaseException] = []

    def handle(task: Task, attempt: Attempt) -> None:
        conflict_in_other_job(task, attempt)
        assert go.wait(TIMEOUT)

    def work() -> None:
        try:
            queue.run_tasks(handle, worker_options)
        except FrameworkConflictError as error:
            errors.append(error)

    queue.submit(tasks(1, JOB))
    worker = threading.Thread(target=work)
    worker.start()
    try:
        wait_until(lambda: queue.counts(JOB).running, "a task is in flight")
        queue.submit(tasks(1, OTHER_JOB))
        assert worker_options.stop.wait(TIMEOUT)
        assert queue.jobs() == {JOB: TaskCounts(running=1), OTHER_JOB: TaskCounts(queued=1)}
        assert worker.is_alive()
    finally:
        go.set()
        worker_options.stop.set()
        worker.join(TIMEOUT)
    assert len(errors) == 1
    assert queue.jobs() == {OTHER_JOB: TaskCounts(queued=1)}


def test_a_worker_that_is_stopped_during_a_conflict_ends_without_error(queue: Executor) -> None:
    worker_options = options()

    def handle(task: Task, attempt: Attempt) -> None:
        worker_options.stop.set()
        conflict_in_other_job(task, attempt)

    queue.submit(tasks(1, OTHER_JOB))
    queue.run_tasks(handle, worker_options)
    assert queue.counts(OTHER_JOB) == TaskCounts(queued=1)
