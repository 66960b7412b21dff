"""The contract of every queue backend, of successive jobs on one output path."""

import pytest

from chunkq.errors import ErrorCode, MissingJobError
from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import Attempt, Contribution, Executor, TaskCounts, jobs_at
from tests.harness.queue_workers import (
    JOB,
    OTHER_JOB,
    Recorder,
    blocked_worker,
    burst,
    options,
    raises,
    tasks,
)
from tests.harness.waiting import wait_until

NEW_JOB = JobId(JOB.path, "ffffffff")


def replaced(task: Task, attempt: Attempt) -> None:
    """Handler that finds NEW_JOB in the job folder."""
    if task.job_id == JOB:
        raise MissingJobError("the job was replaced", code=ErrorCode.JOB_REPLACED)


@pytest.mark.transport
def test_tasks_of_two_jobs_on_one_path_are_separate(queue: Executor, url: str) -> None:
    assert queue.submit(tasks(2)) == 2
    assert queue.submit(tasks(3, NEW_JOB)) == 3
    assert queue.jobs() == {JOB: TaskCounts(queued=2), NEW_JOB: TaskCounts(queued=3)}
    with blocked_worker(url, options("worker-b", depth=3)) as blocked:
        wait_until(lambda: len(blocked.recorder.started) == 3, "three tasks are started")
        assert [item.task for item in queue.running(NEW_JOB)] == tasks(1, NEW_JOB)
        assert queue.cancel(JOB) == 2
        assert queue.counts(NEW_JOB) == TaskCounts(queued=2, running=1)
    assert queue.jobs() == {NEW_JOB: TaskCounts(queued=2)}


def test_contributions_to_two_jobs_on_one_path_do_not_add_up(queue: Executor) -> None:
    queue.submit([*tasks(1), *tasks(1, NEW_JOB)])
    for job, number, complete in [(JOB, 0, False), (NEW_JOB, 1, False), (NEW_JOB, 0, True)]:
        task = Task("finalize", *job, 0, (7,))
        expected = [task] if complete else []
        assert queue.record_contributions(job, [Contribution(task, number, 2)]) == expected


def test_failures_of_a_replaced_job_are_not_retried_with_those_of_its_successor(
    queue: Executor,
) -> None:
    queue.submit([*tasks(1), *tasks(2, NEW_JOB)])
    queue.run_tasks(raises(ValueError("no")), burst())
    assert queue.failed(NEW_JOB) == tasks(2, NEW_JOB)
    assert queue.retry(NEW_JOB) == 2
    assert queue.jobs() == {JOB: TaskCounts(failed=1), NEW_JOB: TaskCounts(queued=2)}


def test_jobs_at_a_path_are_listed_with_their_counts(queue: Executor) -> None:
    queue.submit([*tasks(1, NEW_JOB), *tasks(2), *tasks(1, OTHER_JOB)])
    counts = jobs_at(queue, JOB.path)
    assert list(counts.items()) == [(JOB, TaskCounts(queued=2)), (NEW_JOB, TaskCounts(queued=1))]


@pytest.mark.transport
@pytest.mark.parametrize("only", [None, JOB.path])
def test_tasks_of_a_replaced_job_are_set_aside_and_the_others_are_done(
    queue: Executor, only: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    queue.submit([*tasks(8), *tasks(8, NEW_JOB)])
    recorder = Recorder(replaced)
    worker = burst(depth=2, job=only)
    queue.run_tasks(recorder, worker)
    assert sorted(recorder.finished, key=lambda task: task.chunk) == tasks(8, NEW_JOB)
    assert len(recorder.started) <= 8 + 2
    assert worker.skipped_jobs == {JOB}
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert JOB.epoch in line
    assert queue.jobs() == {JOB: TaskCounts(queued=8)}
    again = Recorder()
    queue.run_tasks(again, burst("worker-b"))
    assert again.numbers == [1] * 8


def test_a_worker_that_set_a_job_aside_waits_for_other_tasks(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    with blocked_worker(url, options("patient", job=JOB.path), replaced) as blocked:
        blocked.go.set()
        wait_until(lambda: blocked.recorder.started, "the task is started")
        queue.submit(tasks(1, NEW_JOB))
        wait_until(lambda: blocked.recorder.finished, "the task of the new job is done")
        assert blocked.is_working
    assert blocked.recorder.finished == tasks(1, NEW_JOB)
    assert queue.jobs() == {JOB: TaskCounts(queued=1)}
