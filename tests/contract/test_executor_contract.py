"""The contract of every queue backend: submitted tasks, their states, and workers.

The contract is in chunkq/queue/contract/executor.py. Tests use the interface `Executor` only.
Those in `test_executor_*.py` run on all backends of tests/harness/queue_backends.py.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import MAX_ATTEMPTS, Attempt, Executor, TaskCounts
from chunkq.queue.registry import open_executor
from tests.harness.queue_workers import (
    JOB,
    MOMENT,
    OTHER_JOB,
    SPAWN,
    Recorder,
    blocked_worker,
    burst,
    log_every_task,
    options,
    raises,
    tasks,
)
from tests.harness.waiting import TIMEOUT, wait_until


def test_every_task_has_a_constant_id_that_is_unique_in_its_job() -> None:
    task = Task("infer", *JOB, 0, (1, 22, 3))
    assert task.id == "infer/0/1.22.3" == Task.from_json(task.to_json()).id
    others = [Task("finalize", *JOB, 0, (1, 22, 3)), Task("infer", *JOB, 1, (1, 22, 3))]
    others += [Task("infer", *JOB, 0, (12, 2, 3)), Task("infer", *JOB, 0, (1, 22))]
    assert len({task.id, *(other.id for other in others)}) == 5


@pytest.mark.transport
def test_a_task_is_on_the_queue_once_even_if_submitted_repeatedly(
    queue: Executor, url: str
) -> None:
    assert queue.submit(iter(tasks(5))) == 5
    assert queue.submit(tasks(5)) == 0
    other = open_executor(url)
    assert other.submit(tasks(7)) == 2
    other.close()
    assert queue.counts(JOB) == TaskCounts(queued=7)
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert sorted(recorder.tasks, key=lambda task: task.chunk) == tasks(7)
    assert queue.counts(JOB) == TaskCounts()


def test_jobs_that_are_submitted_together_run_in_their_order(queue: Executor) -> None:
    submitted = [task for n in range(8) for task in tasks(2, JobId(f"/data/{n}.chunkq", JOB.epoch))]
    queue.submit(submitted)
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.tasks == submitted


def test_submit_queues_the_first_tasks_before_it_reads_the_last_one(
    queue: Executor, url: str
) -> None:
    counts = []

    def task_stream() -> Iterator[Task]:
        other = open_executor(url)
        yield from tasks(2500)
        counts.append(other.counts(JOB).queued)
        other.close()
        yield from tasks(2600)

    assert queue.submit(task_stream()) == 2600
    assert 0 < counts[0] <= 2500


def test_submitting_a_running_task_again_changes_nothing(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    with blocked_worker(url, burst()) as blocked:
        wait_until(lambda: blocked.recorder.started, "the task is started")
        before = queue.running(JOB)
        assert queue.submit(tasks(1)) == 0
        assert queue.running(JOB) == before
        assert queue.counts(JOB) == TaskCounts(running=1)
        blocked.end()
    assert queue.counts(JOB) == TaskCounts()
    assert blocked.recorder.numbers == [1]


def test_a_failed_task_submitted_again_has_all_its_attempts(
    queue: Executor,
) -> None:
    queue.submit(tasks(1))
    queue.run_tasks(Recorder(raises(ValueError("no"))), burst())
    assert queue.counts(JOB) == TaskCounts(failed=1)
    assert queue.submit(tasks(2)) == 2
    assert queue.counts(JOB) == TaskCounts(queued=2)
    recorder = Recorder(raises(ValueError("no")))
    queue.run_tasks(recorder, burst())
    assert sorted(recorder.numbers) == sorted([*range(1, MAX_ATTEMPTS + 1)] * 2)


@pytest.mark.transport
def test_tasks_of_several_jobs_are_counted_separately(queue: Executor, url: str) -> None:
    assert queue.jobs() == {}
    assert queue.counts(JOB) == TaskCounts()
    queue.submit(tasks(3))
    queue.submit(tasks(2, OTHER_JOB))
    queue.run_tasks(Recorder(raises(ValueError("no"))), burst(job=OTHER_JOB.path))
    with blocked_worker(url, options("worker-b", job=JOB.path)) as blocked:
        wait_until(lambda: blocked.recorder.started, "a task is started")
        expected = {JOB: TaskCounts(queued=2, running=1), OTHER_JOB: TaskCounts(failed=2)}
        assert queue.jobs() == expected
        assert {job: queue.counts(job) for job in expected} == expected
        assert queue.failed(JOB) == []
        assert set(queue.failed(OTHER_JOB)) == set(tasks(2, OTHER_JOB))


@pytest.mark.transport
def test_running_tasks_are_listed_with_worker_and_start_time(queue: Executor, url: str) -> None:
    queue.submit(tasks(3))
    before = time.time()
    with blocked_worker(url, options("worker-b", depth=2)) as blocked:
        wait_until(lambda: len(blocked.recorder.started) == 2, "two tasks are started")
        running = queue.running(JOB)
        assert {item.task for item in running} == set(blocked.recorder.tasks)
        assert {item.worker for item in running} == {"worker-b"}
        assert all(before - 1 <= item.since <= time.time() + 1 for item in running)
        assert queue.running(OTHER_JOB) == []
    assert queue.running(JOB) == []


def test_a_worker_of_one_job_runs_no_tasks_of_other_jobs(queue: Executor) -> None:
    queue.submit(tasks(2))
    queue.submit(tasks(2, OTHER_JOB))
    recorder = Recorder()
    queue.run_tasks(recorder, burst(job=OTHER_JOB.path))
    assert set(recorder.tasks) == set(tasks(2, OTHER_JOB))
    assert queue.jobs() == {JOB: TaskCounts(queued=2)}


@pytest.mark.transport
def test_retry_queues_the_failed_tasks_of_one_job_with_all_attempts(queue: Executor) -> None:
    queue.submit([*tasks(2), *tasks(1, OTHER_JOB)])
    queue.run_tasks(Recorder(raises(ValueError("no"))), burst())
    queue.submit([Task("infer", *JOB, 0, (9, 9))])
    assert queue.retry(JOB) == 2
    assert queue.jobs() == {JOB: TaskCounts(queued=3), OTHER_JOB: TaskCounts(failed=1)}
    assert queue.retry(JOB) == 0
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.numbers == [1, 1, 1]


@pytest.mark.transport
def test_cancel_removes_one_job_and_lets_running_tasks_finish(queue: Executor, url: str) -> None:
    queue.submit([*tasks(3), *tasks(1, OTHER_JOB)])
    with blocked_worker(url, burst(job=JOB.path)) as blocked:
        wait_until(lambda: blocked.recorder.started, "a task is started")
        assert queue.cancel(JOB) in (2, 3)
        blocked.end()
    assert len(blocked.recorder.finished) == 1
    assert queue.jobs() == {OTHER_JOB: TaskCounts(queued=1)}


def test_a_cancelled_task_can_be_submitted_and_started_while_it_still_runs(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(1))
    with blocked_worker(url, options("worker-b")) as blocked:
        wait_until(lambda: blocked.recorder.started, "the task is started")
        queue.cancel(JOB)
        assert queue.submit(tasks(1)) == 1
        recorder = Recorder()
        queue.run_tasks(recorder, burst())
        assert recorder.numbers == [1]


def test_a_burst_ends_immediately_on_an_empty_queue(queue: Executor) -> None:
    before = time.monotonic()
    queue.run_tasks(Recorder(), burst())
    queue.submit(tasks(1, OTHER_JOB))
    queue.run_tasks(Recorder(), burst(job=JOB.path))
    assert time.monotonic() - before < 5


def test_a_burst_waits_for_running_tasks_of_other_workers(queue: Executor, url: str) -> None:
    queue.submit(tasks(1))
    error = raises(ValueError("no"))
    with blocked_worker(url, options("first"), error) as first:
        wait_until(lambda: first.recorder.started, "the task is started")
        with blocked_worker(url, burst("second")) as second:
            second.go.set()
            time.sleep(MOMENT)
            assert second.is_working
            assert second.recorder.started == []
            first.go.set()
            wait_until(lambda: not second.is_working, "the burst ends")
    numbers = first.recorder.numbers + second.recorder.numbers
    assert sorted(numbers) == [*range(1, len(numbers) + 1)]
    assert len(numbers) >= 2


def test_without_burst_a_worker_waits_for_tasks_until_it_is_stopped(
    queue: Executor, url: str
) -> None:
    worker = options("patient")
    with blocked_worker(url, worker) as blocked:
        blocked.go.set()
        time.sleep(MOMENT)
        assert blocked.is_working
        queue.submit(tasks(1))
        wait_until(lambda: blocked.recorder.finished, "the late task is done")
        worker.stop.set()
        wait_until(lambda: not blocked.is_working, "the worker stops")


def test_depth_tasks_are_in_flight_at_once(queue: Executor) -> None:
    depth = 4
    queue.submit(tasks(2 * depth))
    barrier = threading.Barrier(depth)

    def wait_for_others(task: Task, attempt: Attempt) -> None:
        # Returns when `depth` tasks wait at the same time.
        barrier.wait(TIMEOUT)

    recorder = Recorder(wait_for_others)
    queue.run_tasks(recorder, burst(depth=depth))
    assert len(recorder.finished) == 2 * depth
    assert set(recorder.numbers) == {1}


def test_a_stopped_worker_finishes_tasks_in_flight_and_starts_no_more(
    queue: Executor, url: str
) -> None:
    queue.submit(tasks(6))
    worker = options("worker-b", depth=2)
    with blocked_worker(url, worker) as blocked:
        wait_until(lambda: len(blocked.recorder.started) == 2, "two tasks are started")
        worker.stop.set()
        blocked.end()
    assert len(blocked.recorder.finished) == 2
    assert len(blocked.recorder.started) == 2
    assert queue.counts(JOB) == TaskCounts(queued=4)


def test_a_worker_starts_no_task_that_would_end_after_its_deadline(queue: Executor) -> None:
    queue.submit(tasks(30))
    seconds, deadline = 0.25, time.time() + 1.0
    started = []

    def run_for_a_while(task: Task, attempt: Attempt) -> None:
        started.append(time.time())
        time.sleep(seconds)

    queue.run_tasks(run_for_a_while, options("worker-a", deadline=deadline))
    # A slow machine makes tasks longer, but starts none too late.
    assert started
    assert max(started) + seconds < deadline + 0.05
    assert queue.counts(JOB) == TaskCounts(queued=30 - len(started))


def test_a_worker_past_its_deadline_starts_no_task(queue: Executor) -> None:
    queue.submit(tasks(1))
    recorder = Recorder()
    queue.run_tasks(recorder, options("worker-a", deadline=time.time() - 1))
    assert recorder.started == []


@pytest.mark.processes
def test_many_processes_share_a_queue_and_no_task_runs_twice(
    queue: Executor, url: str, tmp_path: Path
) -> None:
    workers, count, start = 4, 300, tmp_path / "start"
    queue.submit(tasks(count))
    arguments = [(url, n, str(tmp_path / "log"), str(start)) for n in range(workers)]
    processes = [SPAWN.Process(target=log_every_task, args=values) for values in arguments]
    for process in processes:
        process.start()
    wait_until(lambda: len(list(tmp_path.glob("start.*"))) == workers, "all processes are ready")
    start.touch()
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * workers
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert Counter(task for _, task, _ in lines) == Counter(task.id for task in tasks(count))
    assert {number for _, _, number in lines} == {"1"}
    assert len({process for process, _, _ in lines}) == workers
    assert queue.counts(JOB) == TaskCounts()
