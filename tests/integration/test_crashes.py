"""After killed or stopped workers the output is byte-identical and no chunk is computed again."""

import os
import random
import re
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from chunkq.errors import ErrorCode
from chunkq.job.tasks import Task, chunk_name
from chunkq.queue.contract.executor import MAX_ATTEMPTS, TaskCounts
from tests.harness.processes import CommandResult, RunningCommand
from tests.harness.standard_job import POISONOUS, StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

CHUNKS = 24
PATCHES = 5 * 8 * 12
DEPTH = 2
ON_CPU = ("work", "--gpus", "none", "--depth", str(DEPTH))
SHORT_LEASE = '{"lease": 1, "same_signal": 0}'
"""Seconds. The defaults are too long for a test."""


def assert_same_bytes(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Compare every file of the output."""
    stored, expected = workspace.stored(), undisturbed.stored()
    assert stored.keys() == expected.keys()
    assert [name for name in stored if stored[name] != expected[name]] == []


def finalize_and_compare(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Finalize and compare every file of the output."""
    workspace.finalize().ok()
    assert workspace.status()["sealed"]
    assert_same_bytes(workspace, undisturbed)
    assert workspace.pieces() == []


@dataclass(frozen=True)
class Snapshot:
    """Commit records at one moment, and how often each patch had been computed by then."""

    records: dict[str, tuple[bytes, int]]
    computed: Counter[int]

    @classmethod
    def take(cls, workspace: StandardWorkspace) -> "Snapshot":
        records = workspace.done()
        return cls(records, workspace.computed())

    def assert_unchanged(self, workspace: StandardWorkspace) -> None:
        """Assert that these records are unchanged and that none of their patches ran again."""
        after, computed, patches = workspace.done(), workspace.computed(), workspace.patches()
        assert {name: after[name] for name in self.records} == self.records
        checksums = {crc for name in self.records for crc in patches[name]}
        expected = {crc: self.computed[crc] for crc in checksums}
        assert {crc: computed[crc] for crc in checksums} == expected


# ------------------------------------------------------------------------- undisturbed workers


def test_one_worker_computes_every_patch_exactly_once(undisturbed: StandardWorkspace) -> None:
    patches = undisturbed.patches()
    assert len(patches) == CHUNKS
    checksums = set().union(*patches.values())
    # All patches differ, so their checksums identify them.
    assert len(checksums) == sum(map(len, patches.values())) == PATCHES
    assert undisturbed.computed() == dict.fromkeys(checksums, 1)


def test_two_worker_processes_write_the_same_bytes_as_one(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    assert workspace.work("-w", "2", "--depth", "3").code == 0
    finalize_and_compare(workspace, undisturbed)
    assert len(workspace.report()["workers"]) == 2
    assert set(workspace.computed().values()) == {1}


def test_both_of_two_workers_get_chunks_of_the_automatic_size(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    changes = {"chunksize": None, "storage_chunks": None}
    workspace = standard_job.workspace(tmp_path, changes)
    workspace.produce()
    hold = {"NET_HOLD": "forward", "NET_AFTER": "0"}
    with workspace.start(*ON_CPU, "--burst", "-w", "2", **hold) as command:
        workspace.wait_until_stopped()
        wait_until(lambda: len(workspace.done()) > 0, "the other worker commits a chunk")
        workspace.open_gate()
        assert command.wait().code == 0
    workspace.finalize().ok()
    report = workspace.report()
    assert all(worker["patches"] >= 8 for worker in report["workers"].values())
    assert len(report["workers"]) == 2


def test_the_default_depth_on_a_cpu_is_three_chunks(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start(
        "work", "--burst", "--gpus", "none", "-w", "1", NET_HOLD="forward"
    ) as worker:
        workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(3)
        workspace.open_gate()
        assert worker.wait().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()


def test_the_output_does_not_depend_on_the_order_of_the_chunks(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    order = list(workspace.item.plan.active_indices())
    random.Random(1).shuffle(order)
    with workspace.queue() as queue:
        queue.cancel(workspace.job.id)
        queue.submit(Task("infer", *workspace.job.id, 0, index) for index in order)
    assert workspace.work("--depth", "1").code == 0
    commit_times = {name: time for name, (_, time) in workspace.done().items()}
    assert sorted(commit_times, key=commit_times.__getitem__) == [
        ".".join(map(str, i)) for i in order
    ]
    finalize_and_compare(workspace, undisturbed)


# ----------------------------------------------------------------------- killed and stopped workers


@dataclass(frozen=True)
class Moment:
    """When a worker process is killed: at which stage and after how many commits.

    With `full_depth`, DEPTH chunks are in flight at that moment. `counts` is whether their attempts
    count: those of a process that has not loaded the network do not.
    """

    stage: str
    commits: int
    workers: int
    full_depth: bool = True
    counts: bool = True


MOMENTS = {
    "while it loads the network": Moment("load", 0, 1, counts=False),
    "in its first chunk": Moment("forward", 0, 1),
    "with several chunks in flight": Moment("forward", 8, 2),
    "while it writes pieces": Moment("piece", 4, 2),
    "before it commits, near the end": Moment("commit", CHUNKS - 4, 2, full_depth=False),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_only_chunks_in_flight_of_a_killed_worker_are_computed_again(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace, moment: Moment
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": moment.stage, "NET_AFTER": str(moment.commits)}
    if moment.full_depth:
        hold["NET_OTHERS_WAIT"] = "1"  # otherwise another worker could reserve all other chunks
    with workspace.start(*ON_CPU, "--burst", "-w", str(moment.workers), **hold) as command:
        victim = workspace.wait_until_stopped()
        if moment.full_depth:
            workspace.wait_for_chunks_in_flight(DEPTH)
        os.kill(victim, signal.SIGKILL)
        before = Snapshot.take(workspace)
        assert command.wait().code == 0
        output = command.output()
    requeued = re.search(r"signal 9\b.*?(\d+) chunk", output)
    assert requeued is not None, output
    assert int(requeued[1]) == DEPTH or not moment.full_depth
    assert len(before.records) >= moment.commits
    before.assert_unchanged(workspace)

    retried = {name for name in workspace.done() if workspace.record(name)["attempt"] > 1}
    assert int(moment.counts) <= len(retried) <= int(requeued[1]) * moment.counts
    assert {workspace.record(name)["attempt"] for name in retried} <= {2}
    patches, computed = workspace.patches(), workspace.computed()
    computed_twice = {crc for crc, count in computed.items() if count > 1}
    assert computed.keys() == set().union(*patches.values())
    assert computed_twice <= set().union(*(patches[name] for name in retried))
    finalize_and_compare(workspace, undisturbed)
    assert workspace.report()["patches"] == PATCHES


@pytest.mark.parametrize("commits", [0, CHUNKS])
def test_every_block_is_completed_once_if_a_worker_is_killed_before_it_commits_one(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace, commits: int
) -> None:
    workspace.produce()
    plan = workspace.item.plan
    hold = {"NET_HOLD": "block", "NET_AFTER": str(commits)}
    with workspace.start(*ON_CPU, "--burst", "-w", "2", **hold) as command:
        os.kill(workspace.wait_until_stopped(), signal.SIGKILL)
        before = workspace.done("finalize")
        assert command.wait().code == 0
    by_workers = workspace.done("finalize")
    finalize_and_compare(workspace, undisturbed)
    blocks = workspace.done("finalize")
    assert blocks.keys() == {chunk_name(index) for index in plan.to_finalize()}
    # A block is not completed again, and no chunk without patches has a record.
    assert before.items() <= by_workers.items() <= blocks.items()
    assert workspace.done().keys() == {chunk_name(index) for index in plan.active_indices()}
    without_patches = set(plan.indices()) - set(plan.active_indices())
    assert {chunk_name(index) for index in without_patches} <= blocks.keys()
    assert len(without_patches) == 6


@dataclass(frozen=True)
class Stop:
    """State before and after a worker was stopped in the middle of a job."""

    before: Snapshot
    result: CommandResult
    after: Snapshot
    counts: TaskCounts
    attempts: list[int]


@dataclass(frozen=True)
class StoppedJob:
    """A job stopped by one signal, by two signals and by killing the supervisor, then completed."""

    workspace: StandardWorkspace
    one_signal: Stop
    two_signals: Stop
    supervisor_killed: Stop
    last_worker: CommandResult


@pytest.fixture(scope="module")
def stopped(standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory) -> StoppedJob:
    workspace = standard_job.workspace(tmp_path_factory.mktemp("stopped"))
    workspace.produce()
    one_signal = stop_worker(workspace, 3, [signal.SIGTERM], open_gate=True)
    two_signals = stop_worker(workspace, 8, [signal.SIGTERM, signal.SIGTERM])
    supervisor_killed = stop_worker(workspace, 12, [signal.SIGKILL])
    last_worker = workspace.work("-w", "2", CHUNKQ_WORKER_SETTINGS=SHORT_LEASE)
    workspace.finalize().ok()
    return StoppedJob(workspace, one_signal, two_signals, supervisor_killed, last_worker)


def stop_worker(
    workspace: StandardWorkspace,
    commits: int,
    signals: list[signal.Signals],
    *,
    open_gate: bool = False,
) -> Stop:
    """Start a worker and stop it after some commits, with DEPTH chunks in flight.

    With `open_gate`, the network can finish these chunks after the last signal.
    """
    hold = {"NET_HOLD": "forward", "NET_AFTER": str(commits), "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with workspace.start(*ON_CPU, **hold) as worker:
        workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(DEPTH)
        before = Snapshot.take(workspace)
        worker.children()
        for number in signals:
            count = message_count(worker)
            worker.process.send_signal(number)
            if number == signal.SIGTERM:
                wait_for_next_message(worker, count)
        if open_gate:
            workspace.open_gate()
        result = worker.wait()
        worker.wait_for_children()
        assert len(worker.known) == 1
    shutil.rmtree(workspace.folder / "gate")
    return Stop(before, result, Snapshot.take(workspace), workspace.counts(), workspace.attempts())


def message_count(command: RunningCommand) -> int:
    return sum(line.startswith("chunkq: ") for line in command.output().splitlines())


def wait_for_next_message(command: RunningCommand, count: int) -> None:
    """Wait until the command has printed more than `count` messages."""
    wait_until(lambda: message_count(command) > count, "the command reports the signal")


def test_one_signal_stops_a_worker_after_the_chunks_in_flight(stopped: StoppedJob) -> None:
    stop = stopped.one_signal
    assert stop.result.code == 0
    assert len(stop.before.records) >= 3
    assert len(stop.after.records) == len(stop.before.records) + DEPTH
    assert stop.counts == TaskCounts(queued=CHUNKS - len(stop.after.records))
    assert set(stop.attempts) == {0}


def test_a_second_signal_requeues_the_chunks_in_flight(stopped: StoppedJob) -> None:
    stop = stopped.two_signals
    assert stop.result.code == 0
    assert stop.after.records == stop.before.records
    assert stop.counts == TaskCounts(queued=CHUNKS - len(stop.after.records))
    assert set(stop.attempts) == {0}


def test_worker_processes_end_with_a_killed_supervisor_and_their_chunks_are_requeued(
    stopped: StoppedJob,
) -> None:
    stop = stopped.supervisor_killed
    assert stop.result.code == -signal.SIGKILL
    assert stop.after.records == stop.before.records
    assert sorted(set(stop.attempts)) == [0, 1]
    assert stop.attempts.count(1) == DEPTH
    assert stopped.last_worker.code == 0
    attempts = [stopped.workspace.record(name)["attempt"] for name in stopped.workspace.done()]
    assert sorted(attempts) == [1] * (CHUNKS - DEPTH) + [2] * DEPTH


def test_a_stopped_job_has_the_same_bytes_and_no_chunk_computed_twice(
    stopped: StoppedJob, undisturbed: StandardWorkspace
) -> None:
    assert_same_bytes(stopped.workspace, undisturbed)
    for stop in (stopped.one_signal, stopped.two_signals, stopped.supervisor_killed):
        stop.after.assert_unchanged(stopped.workspace)
    assert stopped.workspace.pieces() == []


def test_a_worker_resumed_after_the_job_is_complete_changes_no_byte(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "piece", "NET_AFTER": "4", "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with workspace.start(*ON_CPU, "--burst", **hold) as command:
        suspended = workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(DEPTH)
        os.kill(suspended, signal.SIGSTOP)
        done_at_suspension = workspace.done()
        assert workspace.work(CHUNKQ_WORKER_SETTINGS=SHORT_LEASE).code == 0
        finalize_and_compare(workspace, undisturbed)
        records, blocks = workspace.done(), workspace.done("finalize")
        workspace.open_gate()
        os.kill(suspended, signal.SIGCONT)
        assert command.wait().code == 0
    assert len(done_at_suspension) <= CHUNKS - DEPTH
    # The suspended worker did compute its chunks: their patches ran twice.
    assert max(workspace.computed().values()) == 2
    assert workspace.pieces() == []
    assert_same_bytes(workspace, undisturbed)
    assert (workspace.done(), workspace.done("finalize")) == (records, blocks)
    finalize_and_compare(workspace, undisturbed)


# ------------------------------------------------------------------------------ failing chunks


def test_one_failing_chunk_does_not_stop_the_others_and_can_be_retried(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    poison = workspace.folder / "poison"
    poison.touch()
    workspace.produce()
    # POISONOUS is a voxel of exactly one chunk.
    assert {
        ".".join(map(str, index))
        for index in workspace.item.plan.indices()
        for patch in workspace.item.plan.patches(workspace.item.plan.chunk(index))
        if all(low <= at < high for low, at, high in zip(*bounds(patch.source), strict=True))
    } == {"1.2.2"}

    result = workspace.work(NET_POISON=str(poison))
    assert result.code == 3
    assert re.match(r"chunkq: .*\b1 chunk", result.messages[-1])
    assert "Traceback" not in result.err
    assert [f"attempt {n}" in result.err for n in range(1, MAX_ATTEMPTS + 2)] == [
        *[True] * MAX_ATTEMPTS,
        False,
    ]
    before = Snapshot.take(workspace)
    assert len(before.records) == CHUNKS - 1
    assert workspace.counts() == TaskCounts(failed=1)
    status = workspace.status()
    assert (status["done"], status["failed"], status["queued"]) == (CHUNKS - 1, 1, 0)
    [group] = status["failures"]
    assert group["error"] == "ArithmeticError"
    assert group["message"] == "ArithmeticError: a poisonous voxel"
    assert group["chunks"] == ["1.2.2"]
    assert "net.py" in group["traceback"]
    assert 'raise ArithmeticError("a poisonous voxel")' in group["traceback"]

    result = workspace.finalize()
    result.refused(3, ErrorCode.JOB_INCOMPLETE, "1.2.2")
    assert len(result.messages) == 1
    assert not workspace.status()["sealed"]

    poison.unlink()
    assert workspace.call("retry", str(workspace.output)).out == "1 chunk queued again\n"
    assert workspace.work(NET_POISON=str(poison)).code == 0
    assert workspace.status()["failures"] == []
    before.assert_unchanged(workspace)
    finalize_and_compare(workspace, undisturbed)


def bounds(box: object) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return box.start, POISONOUS, box.stop  # type: ignore[attr-defined]


def test_a_network_that_cannot_be_loaded_stops_the_worker_without_using_attempts(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, {"model": {"class_name": "Missing"}})
    workspace.produce()
    with workspace.start(*ON_CPU) as worker:
        result = worker.wait()
        worker.wait_for_children()
    assert result.code == 1
    assert len([line for line in result.messages if "Missing" in line]) == 1
    assert "Traceback" not in result.err
    assert "class_name" in result.messages[-1]
    assert workspace.counts() == TaskCounts(queued=CHUNKS)
    assert workspace.attempts() == [0] * CHUNKS
    assert workspace.done() == {}
    assert workspace.status()["failures"] == []
