"""The contract of every queue backend, of repeated failures and time limits."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from chunkq.errors import (
    ErrorCode,
    ModelError,
    PredictionError,
    RepeatedFailureError,
    TaskTimeoutError,
)
from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import (
    MAX_ATTEMPTS,
    Attempt,
    Executor,
    Handler,
    TaskCounts,
    TaskResult,
    WorkerOptions,
)
from chunkq.queue.registry import open_executor
from tests.harness.queue_workers import (
    JOB,
    MOMENT,
    OTHER_JOB,
    QUICK,
    SHORT_LEASE,
    Recorder,
    burst,
    options,
    raises,
    tasks,
)
from tests.harness.waiting import TIMEOUT


def fails_in(job: JobId, error: Callable[[Task], Exception]) -> Handler:
    def handler(task: Task, attempt: Attempt) -> None:
        if task.job_id == job:
            raise error(task)

    return handler


def unreadable(task: Task) -> Exception:
    return OSError("volume.zarr: input/output error\nsecond line")


def test_a_job_whose_chunks_fail_with_one_error_is_skipped_and_other_jobs_finish_first(
    queue: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    queue.submit([*tasks(10), *tasks(3, OTHER_JOB)])
    recorder = Recorder(fails_in(JOB, unreadable))
    with pytest.raises(RepeatedFailureError) as failure:
        queue.run_tasks(recorder, burst())
    first, line = QUICK.same_failures_at_first, str(failure.value)
    assert failure.value.code is ErrorCode.REPEATED_FAILURE
    assert line.startswith(f"/data/brain.zarr: {first} ")
    assert "(OSError: volume.zarr: input/output error)" in line
    assert len(line.splitlines()) == 1
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    assert [task.chunk[0] for task in recorder.tasks if task.job_id == JOB] == [*range(first)]
    assert recorder.finished == tasks(3, OTHER_JOB)
    assert queue.jobs() == {JOB: TaskCounts(queued=10)}
    again = Recorder()
    queue.run_tasks(again, burst())
    assert sorted(again.numbers) == [1] * (10 - first) + [2] * first


def test_after_a_success_more_failures_with_one_error_are_tolerated(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=2, same_failures_later=6)
    queue.submit(tasks(20))

    def succeed_first(task: Task, attempt: Attempt) -> None:
        if task.chunk[0] > 0:
            raise unreadable(task)

    recorder = Recorder(succeed_first)
    with pytest.raises(RepeatedFailureError, match=r"brain\.zarr: 6 "):
        queue.run_tasks(recorder, burst(settings=settings))
    assert len(recorder.started) == 1 + 6


def test_chunks_that_did_not_run_the_network_are_not_a_success(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=3)
    queue.submit(tasks(10))

    def run_every_second(task: Task, attempt: Attempt) -> TaskResult:
        if task.chunk[0] % 2:
            raise unreadable(task)
        return TaskResult(ran_network=False)

    with pytest.raises(RepeatedFailureError, match=r"brain\.zarr: 3 "):
        queue.run_tasks(run_every_second, burst(settings=settings))
    assert queue.counts(JOB) == TaskCounts(queued=7)


def test_a_success_resets_the_count_of_failures(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_later=3)
    queue.submit(tasks(12))

    def succeed_every_third(task: Task, attempt: Attempt) -> None:
        if task.chunk[0] % 3 > 0 and attempt.number == 1:
            raise unreadable(task)

    recorder = Recorder(succeed_every_third)
    queue.run_tasks(recorder, burst(settings=settings))
    assert len(recorder.started) == 12 + 8
    assert queue.jobs() == {}


@pytest.mark.parametrize(
    "errors",
    [(OSError("no disk"), OSError("no network")), (ValueError("no"), KeyError("no"))],
    ids=["different messages", "different classes"],
)
def test_different_causes_do_not_add_up(queue: Executor, errors: tuple[Exception, ...]) -> None:
    count = 4 * QUICK.same_failures_at_first
    queue.submit(tasks(count))
    recorder = Recorder(fails_in(JOB, lambda task: errors[task.chunk[0] % 2]))
    queue.run_tasks(recorder, burst())
    assert len(recorder.started) == MAX_ATTEMPTS * count
    assert queue.counts(JOB) == TaskCounts(failed=count)


def test_failures_of_two_jobs_do_not_add_up(queue: Executor) -> None:
    count = QUICK.same_failures_at_first - 1
    queue.submit(tasks(count))
    queue.submit(Task("infer", *OTHER_JOB, 0, (number, 1)) for number in range(count))
    recorder = Recorder(raises(unreadable(tasks(1)[0])))
    queue.run_tasks(recorder, burst())
    assert queue.jobs() == {JOB: TaskCounts(failed=count), OTHER_JOB: TaskCounts(failed=count)}


def test_one_failing_chunk_never_skips_its_job(
    queue: Executor,
) -> None:
    settings = replace(QUICK, same_failures_at_first=2)
    queue.submit(tasks(1))
    retries = 4

    def fail(task: Task, attempt: Attempt) -> None:
        raise unreadable(task)

    recorder = Recorder(fail)

    class RetryingOptions(WorkerOptions):
        """Options of a worker whose failed chunk is queued again a few times before it ends."""

        def can_start(self) -> bool:
            nonlocal retries
            if retries and queue.counts(JOB).failed:
                retries -= queue.retry(JOB)
            return super().can_start()

    queue.run_tasks(recorder, RetryingOptions("worker-a", burst=True, settings=settings))
    assert retries == 0
    assert recorder.numbers == [*range(1, MAX_ATTEMPTS + 1)] * 5
    assert queue.counts(JOB) == TaskCounts(failed=1)


def test_failures_that_differ_only_in_coordinates_count_as_one_error(queue: Executor) -> None:
    chunks = [(i, j) for i in range(4) for j in range(4)]
    queue.submit(Task("infer", *JOB, 0, chunk) for chunk in chunks)

    def not_finite(task: Task) -> Exception:
        low = [64 * i for i in task.chunk]
        return PredictionError(f"the network gave NaN for the patch that reads {low}")

    recorder = Recorder(fails_in(JOB, not_finite))
    with pytest.raises(RepeatedFailureError):
        queue.run_tasks(recorder, burst())
    assert len(recorder.started) == QUICK.same_failures_at_first


def test_a_worker_that_skips_a_job_ends_when_no_other_tasks_remain(
    queue: Executor, url: str
) -> None:
    queue.submit([*tasks(2), *tasks(2, OTHER_JOB)])

    def reject(task: Task, attempt: Attempt) -> None:
        if task.job_id == JOB:
            raise ModelError("no such network")
        time.sleep(0.05)

    worker, errors = options("patient"), []

    def work() -> None:
        executor = open_executor(url)
        try:
            executor.run_tasks(reject, worker)
        except ModelError as error:
            errors.append(error)
        executor.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(3)
    ended = not thread.is_alive()
    worker.stop.set()
    thread.join(TIMEOUT)
    assert queue.jobs() == {JOB: TaskCounts(queued=2)}
    assert len(errors) == 1
    assert ended


@contextmanager
def hanging() -> Iterator[threading.Event]:
    """Yield an event that tasks wait for; at the end set it and join their threads."""
    go = threading.Event()
    try:
        yield go
    finally:
        go.set()
        for thread in threading.enumerate():
            if thread.name.startswith("chunk-"):
                thread.join(TIMEOUT)


def test_a_task_over_its_time_limit_costs_an_attempt_and_requeues_the_others(
    queue: Executor,
) -> None:
    limit = 1.5
    hangs, short, late, *never = tasks(5)
    queue.submit(tasks(5))
    started = []
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            started.append(task)
            if task == short:
                time.sleep(limit * 2 / 3)
            else:
                go.wait(TIMEOUT)

        worker = options("slow", depth=2, time_limit=limit)
        with pytest.raises(TaskTimeoutError, match=r"infer chunk 0\.0\b") as timeout:
            queue.run_tasks(handler, worker)
        assert timeout.value.code is ErrorCode.TASK_TIMEOUT
        assert len(str(timeout.value).splitlines()) == 1
        assert [lease.task for lease in timeout.value.leases] == [hangs]
        assert [lease.attempt for lease in timeout.value.leases] == [Attempt(1, "slow")]
        assert queue.counts(JOB) == TaskCounts(queued=4)
        time.sleep(MOMENT)
        assert set(started) == {hangs, short, late}
        recorder = Recorder()
        queue.run_tasks(recorder, burst("heir"))
        assert {task: attempt.number for task, attempt in recorder.started} == {
            hangs: 2,
            late: 1,
            **dict.fromkeys(never, 1),
        }


def test_the_time_limit_does_not_apply_to_a_task_that_waits_for_another_one(
    queue: Executor,
) -> None:
    hangs, waits = tasks(2)
    queue.submit(tasks(2))
    with hanging() as go:
        worker = options("slow", depth=2, time_limit=0.3, is_waiting=lambda task: task == waits)
        with pytest.raises(TaskTimeoutError) as timeout:
            queue.run_tasks(lambda task, attempt: wait_for(go), worker)
        assert [lease.task for lease in timeout.value.leases] == [hangs]
        recorder = Recorder()
        queue.run_tasks(recorder, burst("heir"))
        assert {task: attempt.number for task, attempt in recorder.started} == {hangs: 2, waits: 1}


def test_a_task_that_hangs_on_every_attempt_ends_failed(queue: Executor) -> None:
    queue.submit(tasks(1))
    with hanging() as go:
        for number in range(MAX_ATTEMPTS):
            with pytest.raises(TaskTimeoutError):
                queue.run_tasks(
                    lambda task, attempt: wait_for(go), options(f"w{number}", time_limit=0.1)
                )
        assert queue.counts(JOB) == TaskCounts(failed=1)


def wait_for(event: threading.Event) -> None:
    event.wait(TIMEOUT)


def test_the_time_limit_follows_the_longest_task_seen(
    queue: Executor,
) -> None:
    settings = replace(SHORT_LEASE, least_time_limit=0.1, time_limit_factor=3.0)
    queue.submit(tasks(3))
    seconds, started = {0: 0.3, 1: 0.5}, {}
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            started[task.chunk[0]] = time.monotonic()
            if task.chunk[0] in seconds:
                time.sleep(seconds[task.chunk[0]])
            else:
                go.wait(TIMEOUT)

        with pytest.raises(TaskTimeoutError) as timeout:
            queue.run_tasks(handler, options("slow", settings=settings))
        assert [lease.task.chunk[0] for lease in timeout.value.leases] == [2]
        assert time.monotonic() - started[2] >= 3.0 * seconds[1]


@pytest.mark.parametrize(
    ("jobs", "hung"), [((JOB,), 0), ((JOB, OTHER_JOB), 1)], ids=["the first", "another job's first"]
)
def test_the_first_task_of_a_job_has_a_separate_time_limit(
    queue: Executor, jobs: tuple[JobId, ...], hung: int
) -> None:
    settings = replace(SHORT_LEASE, first_time_limit=0.5)
    queue.submit(Task("infer", *job, 0, (number,)) for number, job in enumerate(jobs))
    with hanging() as go:

        def handler(task: Task, attempt: Attempt) -> None:
            if task.chunk == (hung,):
                go.wait(TIMEOUT)

        before = time.monotonic()
        with pytest.raises(TaskTimeoutError) as timeout:
            queue.run_tasks(handler, options("slow", settings=settings))
        assert [lease.task.job_id for lease in timeout.value.leases] == [jobs[hung]]
        assert time.monotonic() - before < 10
