"""The contract of every queue backend, of tasks that wait for an earlier stage of their job."""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest

from chunkq.errors import ErrorCode, GateClosedError, IncompleteError, MissingJobError
from chunkq.job.tasks import JobId, Task
from chunkq.queue.backends.rq import executor as rq_executor
from chunkq.queue.backends.tables import task_table
from chunkq.queue.contract.executor import (
    EXIT_INCOMPLETE,
    Attempt,
    Executor,
    ExitStatus,
    GateState,
    TaskCounts,
    WorkerOptions,
)
from chunkq.queue.leases.task_loop import LeaseQueue
from chunkq.queue.registry import open_executor
from tests.harness.queue_workers import (
    JOB,
    OTHER_JOB,
    QUICK,
    Recorder,
    blocked_worker,
    burst,
    lease_and_disappear,
    options,
    raises,
)
from tests.harness.waiting import wait_until

GATES = replace(QUICK, waiting_poll=0.02, longest_gate_pause=0.1)
BATCH = 3


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move so few tasks at a time that every gate needs several batches."""
    monkeypatch.setattr(task_table, "GATE_BATCH", BATCH)
    monkeypatch.setattr(rq_executor, "BATCH", BATCH)


def stage(kind: str, count: int, job: JobId = JOB) -> list[Task]:
    return [Task(kind, *job, 0, (0, number)) for number in range(count)]


class Folder:
    """What `check_gate` finds in the job folders; it records each look."""

    def __init__(self, *states: GateState) -> None:
        self._states = states
        self.looks: list[tuple[JobId, str]] = []

    def __call__(self, job: JobId, kind: str) -> GateState:
        self.looks.append((job, kind))
        return self._states[min(len(self.looks), len(self._states)) - 1]


def reserve_all(queue: Executor, worker: WorkerOptions) -> list[Task]:
    """Lease every task that can be reserved; release them again."""
    assert isinstance(queue, LeaseQueue)
    leases = list(iter(lambda: queue.reserve(worker), None))
    queue.release(worker.worker, counted=False)
    return [lease.task for lease in leases]


# ----------------------------------------------------------------------------- waiting tasks


@pytest.mark.transport
def test_a_task_behind_a_closed_gate_waits_until_the_gate_opens(queue: Executor) -> None:
    queue.close_gate(JOB, "infer")
    assert queue.jobs() == {}
    assert queue.submit([*stage("stats", 2), *stage("infer", 7)]) == 9
    assert queue.submit(stage("infer", 7)) == 0
    assert queue.counts(JOB) == TaskCounts(queued=2, waiting=7)
    assert queue.jobs() == {JOB: TaskCounts(queued=2, waiting=7)}
    recorder = Recorder()
    queue.run_tasks(recorder, burst(job=JOB.path))
    assert recorder.tasks == stage("stats", 2)
    assert queue.counts(JOB) == TaskCounts(waiting=7)
    queue.open_gate(JOB, "infer")
    assert queue.counts(JOB) == TaskCounts(queued=7)
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.tasks == stage("infer", 7)
    assert recorder.numbers == [1] * 7


@pytest.mark.transport
def test_closing_a_gate_makes_queued_tasks_of_its_kind_and_job_wait(queue: Executor) -> None:
    mixed = [
        task for pair in zip(stage("infer", 8), stage("stats", 8), strict=True) for task in pair
    ]
    queue.submit([*mixed, *stage("infer", 1, OTHER_JOB)])
    for _ in range(2):
        queue.close_gate(JOB, "infer")
        assert queue.counts(JOB) == TaskCounts(queued=8, waiting=8)
    assert queue.counts(OTHER_JOB) == TaskCounts(queued=1)
    assert sorted(reserve_all(queue, options()), key=lambda task: task.id) == sorted(
        [*stage("stats", 8), *stage("infer", 1, OTHER_JOB)], key=lambda task: task.id
    )
    queue.open_gate(JOB, "infer")
    assert queue.counts(JOB) == TaskCounts(queued=16)


def test_gates_of_two_kinds_are_independent(queue: Executor) -> None:
    for kind in ("infer", "finalize"):
        queue.close_gate(JOB, kind)
    queue.submit([*stage("finalize", 2), *stage("infer", 4)])
    queue.open_gate(JOB, "infer")
    assert queue.counts(JOB) == TaskCounts(queued=4, waiting=2)
    queue.open_gate(JOB, "infer")
    queue.open_gate(JOB, "export")
    queue.open_gate(OTHER_JOB, "infer")
    assert queue.jobs() == {JOB: TaskCounts(queued=4, waiting=2)}


def test_a_running_task_whose_gate_closes_finishes_or_waits(queue: Executor, url: str) -> None:
    queue.submit(stage("infer", 2))
    with blocked_worker(url, options("worker-b", depth=2), fail_first) as blocked:
        wait_until(lambda: len(blocked.recorder.started) == 2, "two tasks are started")
        queue.close_gate(JOB, "infer")
        assert queue.counts(JOB) == TaskCounts(running=2)
        blocked.go.set()
        wait_until(lambda: queue.counts(JOB) == TaskCounts(waiting=1), "both attempts end")
    queue.open_gate(JOB, "infer")
    recorder = Recorder()
    queue.run_tasks(recorder, burst())
    assert recorder.started == [(stage("infer", 1)[0], Attempt(2, "worker-a"))]


def fail_first(task: Task, attempt: Attempt) -> None:
    if task.chunk == (0, 0) and attempt.number == 1:
        raise ValueError("no")


def test_the_tasks_of_a_lost_worker_wait_behind_a_closed_gate(queue: Executor, url: str) -> None:
    queue.submit(stage("infer", 2))
    lease_and_disappear(url, "dead", replace(QUICK, lease=0.05))
    lease_and_disappear(url, "stopped")
    queue.close_gate(JOB, "infer")
    wait_until(lambda: queue.counts(JOB).running == 1, "a lease expires")
    assert queue.counts(JOB) == TaskCounts(running=1, waiting=1)
    assert queue.release("stopped") == 1
    assert reserve_all(queue, options()) == []
    assert queue.counts(JOB) == TaskCounts(waiting=2)


def test_failed_tasks_that_are_queued_again_wait_behind_a_closed_gate(queue: Executor) -> None:
    queue.submit(stage("infer", 2))
    queue.run_tasks(raises(ValueError("no")), burst())
    queue.close_gate(JOB, "infer")
    assert queue.submit(stage("infer", 1)) == 1
    assert queue.counts(JOB) == TaskCounts(failed=1, waiting=1)
    assert queue.retry(JOB) == 1
    assert queue.counts(JOB) == TaskCounts(waiting=2)


@pytest.mark.transport
def test_a_gate_is_deleted_with_the_last_task_of_its_job(queue: Executor) -> None:
    for job in (JOB, OTHER_JOB):
        queue.close_gate(job, "infer")
        queue.submit([*stage("stats", 1, job), *stage("infer", 1, job)])
    assert queue.cancel(JOB) == 2
    queue.open_gate(OTHER_JOB, "infer")
    queue.close_gate(OTHER_JOB, "finalize")
    queue.run_tasks(Recorder(), burst())
    for job in (JOB, OTHER_JOB):
        queue.submit([*stage("infer", 1, job), *stage("finalize", 1, job)])
        assert queue.counts(job) == TaskCounts(queued=2)


def test_a_gate_that_is_closed_before_any_task_is_submitted_stays_closed(queue: Executor) -> None:
    queue.close_gate(JOB, "infer")
    queue.submit(stage("infer", 1, OTHER_JOB))
    queue.run_tasks(Recorder(), burst())
    queue.submit(stage("infer", 1))
    assert queue.jobs() == {JOB: TaskCounts(waiting=1)}


class KilledError(Exception):
    pass


@pytest.mark.processes
def test_opening_a_gate_goes_on_where_a_killed_process_stopped(
    queue: Executor, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.close_gate(JOB, "infer")
    queue.submit(stage("infer", 3 * BATCH))
    with closing(open_executor(url)) as killed:
        stop_after_one_batch(killed, monkeypatch)
        with pytest.raises(KilledError):
            killed.open_gate(JOB, "infer")
    assert queue.counts(JOB) == TaskCounts(queued=BATCH, waiting=2 * BATCH)
    queue.submit([Task("infer", *JOB, 0, (9, 9))])
    assert queue.counts(JOB) == TaskCounts(queued=BATCH + 1, waiting=2 * BATCH)
    assert queue.waiting(options()) == []
    assert len(reserve_and_ack(queue)) == BATCH + 1
    assert queue.waiting(options()) == [(JOB, "infer")]
    queue.open_gate(JOB, "infer")
    assert len(reserve_and_ack(queue)) == 2 * BATCH
    assert queue.jobs() == {}


def stop_after_one_batch(killed: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call of `open_gate` end after its first batch, like that of a killed process."""
    owner, name = {
        "SqliteExecutor": (task_table.TaskTable, "open_gate"),
        "RqExecutor": (rq_executor.Scripts, "__call__"),
    }[type(killed).__name__]
    original = getattr(owner, name)

    def call_and_die(*arguments: object) -> object:
        if arguments[1] in ("open_gate", JOB.path):
            monkeypatch.undo()
            small_batch = {task_table: "GATE_BATCH", rq_executor: "BATCH"}
            for module, constant in small_batch.items():
                monkeypatch.setattr(module, constant, BATCH)
            original(*arguments)
            raise KilledError
        return original(*arguments)

    monkeypatch.setattr(owner, name, call_and_die)


def reserve_and_ack(queue: Executor) -> list[Task]:
    assert isinstance(queue, LeaseQueue)
    tasks = []
    while (lease := queue.reserve(options())) is not None:
        tasks.append(lease.task)
        queue.ack(lease)
    return tasks


@pytest.mark.transport
def test_jobs_whose_tasks_only_wait_are_listed_with_the_first_gate(queue: Executor) -> None:
    newer = JobId(JOB.path, "ffffffff")
    for job in (JOB, newer, OTHER_JOB):
        queue.close_gate(job, "infer")
        queue.close_gate(job, "finalize")
        queue.submit([*stage("finalize", 1, job), *stage("infer", 1, job)])
    queue.submit(stage("stats", 1, OTHER_JOB))
    queue.open_gate(newer, "infer")
    queue.run_tasks(Recorder(), burst(job=JOB.path))
    queue.close_gate(newer, "infer")
    assert set(queue.waiting(options())) == {(JOB, "infer"), (newer, "finalize")}
    assert queue.waiting(options(job=OTHER_JOB.path)) == []
    assert queue.waiting(options(job=JOB.path, skipped_jobs={JOB})) == [(newer, "finalize")]
    assert isinstance(queue, LeaseQueue)
    lease = queue.reserve(options())
    assert lease is not None
    assert queue.waiting(options(job=OTHER_JOB.path)) == []
    queue.ack(lease)
    assert queue.waiting(options(job=OTHER_JOB.path)) == [(OTHER_JOB, "infer")]


# --------------------------------------------------------------------------------- task loop


@pytest.mark.transport
def test_a_worker_opens_the_gates_of_complete_stages_one_after_the_other(queue: Executor) -> None:
    for kind in ("infer", "finalize"):
        queue.close_gate(JOB, kind)
    queue.submit([*stage("finalize", 2), *stage("infer", 2), *stage("stats", 2)])
    folder, recorder = Folder(GateState.OPEN), Recorder()
    queue.run_tasks(recorder, burst(check_gate=folder, settings=GATES))
    assert recorder.tasks == [*stage("stats", 2), *stage("infer", 2), *stage("finalize", 2)]
    assert folder.looks == [(JOB, "infer"), (JOB, "finalize")]
    assert queue.jobs() == {}


def test_a_gate_that_another_process_opens_later_is_looked_at_with_growing_pauses(
    queue: Executor, url: str
) -> None:
    queue.close_gate(JOB, "infer")
    queue.submit(stage("infer", 1))
    folder = Folder(*[GateState.CLOSED] * 3, GateState.BLOCKED, GateState.OPEN)
    worker = options(check_gate=folder, settings=GATES)
    with blocked_worker(url, worker) as blocked:
        blocked.go.set()
        wait_until(lambda: blocked.recorder.finished, "the gate is opened")
    assert folder.looks == [(JOB, "infer")] * 5


def test_a_burst_ends_incomplete_if_an_earlier_stage_cannot_be_completed(queue: Executor) -> None:
    queue.close_gate(JOB, "infer")
    queue.submit([*stage("stats", 1), *stage("infer", 2), *stage("infer", 2, OTHER_JOB)])
    recorder = Recorder(fail_stats)
    with pytest.raises(IncompleteError) as error:
        queue.run_tasks(recorder, burst(check_gate=Folder(GateState.BLOCKED), settings=GATES))
    assert error.value.code is ErrorCode.JOB_INCOMPLETE
    assert str(error.value).startswith("/data/brain.zarr: ")
    assert recorder.finished == stage("infer", 2, OTHER_JOB)
    assert queue.jobs() == {JOB: TaskCounts(failed=1, waiting=2)}
    status = ExitStatus.from_error(error.value)
    assert (status.code, status.lines) == (EXIT_INCOMPLETE, [str(error.value)])


def fail_stats(task: Task, attempt: Attempt) -> None:
    if task.kind == "stats":
        raise ValueError("no")


def test_a_burst_ends_without_error_if_another_process_opens_the_gate(queue: Executor) -> None:
    queue.close_gate(JOB, "infer")
    queue.submit(stage("infer", 2))
    queue.run_tasks(Recorder(), burst(settings=GATES))
    assert queue.jobs() == {JOB: TaskCounts(waiting=2)}


def test_a_burst_waits_for_the_running_tasks_of_an_earlier_stage(queue: Executor, url: str) -> None:
    queue.close_gate(JOB, "infer")
    queue.submit([*stage("stats", 1), *stage("infer", 1)])
    folder, first_options = Folder(GateState.OPEN), options("first")
    with blocked_worker(url, first_options) as first:
        wait_until(lambda: first.recorder.started, "the first stage is started")
        second_options = burst("second", check_gate=folder, settings=GATES)
        with blocked_worker(url, second_options) as second:
            second.go.set()
            assert not second_options.stop.wait(0.1)
            assert folder.looks == []
            first_options.stop.set()
            first.go.set()
            wait_until(lambda: not second.is_working, "the burst ends")
    assert second.recorder.finished == stage("infer", 1)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_task_whose_stage_is_not_ready_is_handed_back_uncounted_and_closes_its_gate(
    queue: Executor, depth: int
) -> None:
    queue.submit(stage("infer", 4))
    ready = threading.Event()

    def look(job: JobId, kind: str) -> GateState:
        return GateState.OPEN if ready.is_set() else GateState.CLOSED

    def need_statistics(task: Task, attempt: Attempt) -> None:
        if not ready.is_set():
            raise GateClosedError("no statistics")

    recorder = Recorder(need_statistics)
    queue.run_tasks(recorder, burst(depth=depth, check_gate=look, settings=GATES))
    assert 1 <= len(recorder.started) <= depth
    assert queue.jobs() == {JOB: TaskCounts(waiting=4)}
    ready.set()
    again = Recorder(need_statistics)
    queue.run_tasks(again, burst(check_gate=look, settings=GATES))
    assert sorted(again.finished, key=lambda task: task.chunk) == stage("infer", 4)
    assert again.numbers == [1] * 4


def test_a_gate_that_opens_too_early_is_opened_again_after_a_pause(queue: Executor) -> None:
    queue.submit(stage("infer", 1))
    folder = Folder(GateState.OPEN)
    tries = iter([GateClosedError("no statistics")] * 3)

    def need_statistics(task: Task, attempt: Attempt) -> None:
        for error in tries:
            raise error

    recorder = Recorder(need_statistics)
    queue.run_tasks(recorder, burst(check_gate=folder, settings=GATES))
    assert recorder.numbers == [1] * 4
    assert folder.looks == [(JOB, "infer")] * 3
    assert queue.jobs() == {}


def unreadable(error: Exception) -> Callable[[JobId, str], GateState]:
    def look(job: JobId, kind: str) -> GateState:
        if job == JOB:
            raise error
        return GateState.OPEN

    return look


def test_waiting_tasks_of_a_replaced_job_are_set_aside(
    queue: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    for job in (JOB, OTHER_JOB):
        queue.close_gate(job, "infer")
        queue.submit(stage("infer", 1, job))
    recorder = Recorder()
    worker = burst(check_gate=unreadable(MissingJobError("replaced")), settings=GATES)
    queue.run_tasks(recorder, worker)
    assert recorder.tasks == stage("infer", 1, OTHER_JOB)
    assert worker.skipped_jobs == {JOB}
    assert queue.jobs() == {JOB: TaskCounts(waiting=1)}
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert JOB.epoch in line


def test_a_burst_ends_incomplete_if_a_job_folder_cannot_be_read(queue: Executor) -> None:
    for job in (JOB, OTHER_JOB):
        queue.close_gate(job, "infer")
        queue.submit(stage("infer", 1, job))
    recorder, worker = Recorder(), burst(check_gate=unreadable(OSError("no disk")), settings=GATES)
    with pytest.raises(IncompleteError):
        queue.run_tasks(recorder, worker)
    assert recorder.tasks == stage("infer", 1, OTHER_JOB)
    assert queue.jobs() == {JOB: TaskCounts(waiting=1)}
