"""The contract of every queue backend, of attempts at a task, and the leases of workers."""

import time

import pytest

from chunkq.errors import JobError, ModelError
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import MAX_ATTEMPTS, Attempt, Executor, TaskCounts
from chunkq.queue.leases.task_loop import LeaseQueue
from tests.harness.queue_workers import (
    JOB,
    MOMENT,
    OTHER_JOB,
    SHORT_LEASE,
    SPAWN,
    Recorder,
    blocked_worker,
    burst,
    lease_and_disappear,
    options,
    raises,
    start_task_and_die,
    tasks,
)
from tests.harness.waiting import TIMEOUT, wait_until


def test_an_error_costs_an_attempt_and_the_task_is_tried_again(queue: Executor) -> None:
    queue.submit(tasks(1))

    def fail_once(task: Task, attempt: Attempt) -> None:
        if attempt.number == 1:
            raise ValueError("first attempt")

    recorder = Recorder(fail_once)
    queue.run_tasks(recorder, burst("worker-a"))
    assert recorder.started == [(tasks(1)[0], Attempt(n, "worker-a")) for n in (1, 2)]
    assert queue.counts(JOB) == TaskCounts()


def test_a_task_that_failed_is_tried_again_after_all_others(queue: Executor) -> None:
    first, *others = tasks(3)
    queue.submit([first, *others])

    def fail_once(task: Task, attempt: Attempt) -> None:
        if task == first and attempt.number == 1:
            raise ValueError("first attempt")

    recorder = Recorder(fail_once)
    queue.run_tasks(recorder, burst())
    assert recorder.tasks == [first, *others, first]


@pytest.mark.transport
def test_a_task_that_fails_every_attempt_ends_failed_and_the_others_are_done(
    queue: Executor,
) -> None:
    queue.submit(tasks(4))

    def fail_second(task: Task, attempt: Attempt) -> None:
        if task.chunk == (1, 0):
            raise ValueError("never")

    recorder = Recorder(fail_second)
    queue.run_tasks(recorder, burst())
    tries = [attempt for task, attempt in recorder.started if task.chunk == (1, 0)]
    assert [attempt.number for attempt in tries] == [*range(1, MAX_ATTEMPTS + 1)]
    assert [attempt.is_last for attempt in tries] == [False, False, True]
    assert len(recorder.finished) == 3
    assert queue.counts(JOB) == TaskCounts(failed=1)
    assert queue.failed(JOB) == [Task("infer", *JOB, 0, (1, 0))]


@pytest.mark.parametrize("error", [ModelError("no such network"), JobError("no such job")])
def test_an_error_that_affects_every_chunk_is_raised_and_costs_no_attempt(
    queue: Executor, error: Exception
) -> None:
    queue.submit(tasks(5))
    recorder = Recorder(raises(error))
    with pytest.raises(type(error), match="no such"):
        queue.run_tasks(recorder, options("worker-a", depth=2))
    assert 1 <= len(recorder.started) <= 2
    assert queue.counts(JOB) == TaskCounts(queued=5)
    second = Recorder()
    queue.run_tasks(second, burst())
    assert second.numbers == [1] * 5


def test_a_job_that_cannot_run_is_skipped_and_other_jobs_finish_first(
    queue: Executor,
) -> None:
    queue.submit([*tasks(5), *tasks(3, OTHER_JOB)])

    def reject(task: Task, attempt: Attempt) -> None:
        if task.job_id == JOB:
            raise ModelError("no such network")

    recorder = Recorder(reject)
    with pytest.raises(ModelError, match="no such network"):
        queue.run_tasks(recorder, burst())
    assert set(recorder.finished) == set(tasks(3, OTHER_JOB))
    assert len(recorder.started) == 4
    assert queue.jobs() == {JOB: TaskCounts(queued=5)}


@pytest.mark.transport
def test_tasks_of_a_dead_worker_are_available_immediately_after_release(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    lease_and_disappear(url, "dead")
    assert queue.counts(JOB) == TaskCounts(running=1)
    assert queue.release("another worker") == 0
    assert queue.release("dead") == 1
    assert queue.counts(JOB) == TaskCounts(queued=1)
    recorder, before = Recorder(), time.monotonic()
    queue.run_tasks(recorder, burst("heir"))
    assert recorder.started == [(tasks(1)[0], Attempt(2, "heir"))]
    assert time.monotonic() - before < 5


def test_a_task_that_kills_every_worker_ends_failed(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    for number in range(MAX_ATTEMPTS):
        lease_and_disappear(url, f"dead-{number}")
        queue.release(f"dead-{number}")
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.started == []
    assert queue.counts(JOB) == TaskCounts(failed=1)
    assert queue.failed(JOB) == tasks(1)


def test_releasing_a_stopped_worker_repeatedly_counts_no_attempts(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    for number in range(2):
        lease_and_disappear(url, f"stopped-{number}")
        for _ in range(3):
            queue.release(f"stopped-{number}", counted=False)
    recorder = Recorder(raises(ValueError("no")))
    queue.run_tasks(recorder, burst())
    assert recorder.numbers == [*range(1, MAX_ATTEMPTS + 1)]


@pytest.mark.processes
def test_a_killed_worker_process_holds_its_task_until_released(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    process = SPAWN.Process(target=start_task_and_die, args=(url, "dead"))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 9
    assert queue.counts(JOB) == TaskCounts(running=1)
    assert queue.release("dead") == 1
    recorder = Recorder()
    queue.run_tasks(recorder, burst("heir"))
    assert recorder.started == [(tasks(1)[0], Attempt(2, "heir"))]


@pytest.mark.transport
def test_the_task_of_a_lost_worker_runs_again_when_its_lease_expires(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    lease_and_disappear(url, "dead", SHORT_LEASE)
    wait_until(lambda: queue.counts(JOB) == TaskCounts(queued=1), "the lease expires")
    assert queue.running(JOB) == []
    recorder = Recorder()
    queue.run_tasks(recorder, burst("heir"))
    assert recorder.started == [(tasks(1)[0], Attempt(2, "heir"))]
    assert queue.counts(JOB) == TaskCounts()


def test_a_lease_that_its_worker_never_received_expires(queue: Executor) -> None:
    """If the response to `reserve` is lost, the worker does not renew the lease."""
    assert isinstance(queue, LeaseQueue)
    queue.submit(tasks(2))
    worker = options(settings=SHORT_LEASE)
    assert queue.reserve(worker) is not None  # lost
    lease = queue.reserve(worker)
    assert lease is not None

    def only_the_other_task_runs() -> bool:
        queue.renew(worker, [lease])
        return [item.task for item in queue.running(JOB)] == [lease.task]

    wait_until(only_the_other_task_runs, "the lost lease expires")
    assert queue.counts(JOB) == TaskCounts(queued=1, running=1)


@pytest.mark.transport
def test_a_long_task_keeps_its_lease_while_its_worker_runs(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    slow_worker = burst("slow", settings=SHORT_LEASE)
    with blocked_worker(
        url, slow_worker, lambda *arguments: time.sleep(3 * SHORT_LEASE.lease)
    ) as slow:
        wait_until(lambda: slow.recorder.started, "the task is started")
        slow.go.set()
        recorder = Recorder()
        queue.run_tasks(recorder, burst("eager"))
    assert recorder.started == []
    assert slow.recorder.numbers == [1]


def test_extended_leases_of_a_silent_worker_do_not_expire(queue: Executor, url: str) -> None:
    queue.submit(tasks(2))
    lease_and_disappear(url, "loading", SHORT_LEASE)
    lease_and_disappear(url, "dead", SHORT_LEASE)
    queue.extend("loading", TIMEOUT)
    recorder = Recorder()
    wait_until(lambda: queue.counts(JOB) == TaskCounts(1, 1), "the other lease expires")
    queue.run_tasks(recorder, options(deadline=time.time() + MOMENT))
    assert recorder.started == [(tasks(2)[1], Attempt(2, "worker-a"))]
    queue.extend("unknown", TIMEOUT)
    assert queue.counts(JOB) == TaskCounts(running=1)


def test_a_worker_cannot_end_a_task_that_is_leased_to_another_worker_now(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    with blocked_worker(url, options("slow")) as slow:
        wait_until(lambda: slow.recorder.started, "the task is started")
        queue.release("slow")
        with blocked_worker(url, burst("heir")) as heir:
            wait_until(lambda: heir.recorder.started, "the task is started again")
            slow.go.set()
            wait_until(lambda: slow.recorder.finished, "the slow worker finishes")
            time.sleep(MOMENT)
            assert [item.worker for item in queue.running(JOB)] == ["heir"]
            heir.end()
    assert queue.counts(JOB) == TaskCounts()
