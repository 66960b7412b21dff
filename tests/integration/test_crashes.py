"""Whatever happens to workers, the output has the same bytes and nothing done is done again."""

import os
import random
import re
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from chunkq.executors.base import MAX_ATTEMPTS, Counts
from chunkq.tasks import Task
from tests.harness.processes import CommandResult
from tests.harness.standard_job import POISONOUS, StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

CHUNKS = 24
PATCHES = 5 * 8 * 9
DEPTH = 2
ON_CPU = ("work", "--gpus", "none", "--depth", str(DEPTH))
SHORT_LEASE = '{"lease": 1}'
"""Seconds; the real one is longer than a test should be."""


def assert_same_bytes(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Compare every file of the output."""
    found, expected = workspace.stored(), undisturbed.stored()
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def assert_ends_like(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Finalize, and compare every file of the output."""
    workspace.finalize().ok()
    assert workspace.status()["sealed"]
    assert_same_bytes(workspace, undisturbed)
    assert workspace.pieces() == []


@dataclass(frozen=True)
class Done:
    """The commit records at one moment, and how often each patch had been computed by then."""

    records: dict[str, tuple[bytes, int]]
    computed: Counter[int]

    @classmethod
    def so_far(cls, workspace: StandardWorkspace) -> "Done":
        records = workspace.done()
        return cls(records, workspace.computed())

    def was_left_alone_in(self, workspace: StandardWorkspace) -> None:
        """Assert that these records are untouched, and none of their patches was run since."""
        after, computed, patches = workspace.done(), workspace.computed(), workspace.patches()
        assert {name: after[name] for name in self.records} == self.records
        mine = {crc for name in self.records for crc in patches[name]}
        assert {crc: computed[crc] for crc in mine} == {crc: self.computed[crc] for crc in mine}


# -------------------------------------------------------------------------------- any cli


def test_one_calm_worker_computes_every_patch_exactly_once(undisturbed: StandardWorkspace) -> None:
    patches = undisturbed.patches()
    assert len(patches) == CHUNKS
    every = set().union(*patches.values())
    # All patches differ, so that each can be told by its content.
    assert len(every) == sum(map(len, patches.values())) == PATCHES
    assert undisturbed.computed() == dict.fromkeys(every, 1)


def test_two_workers_give_the_same_bytes_as_one(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    assert workspace.work("-w", "2", "--depth", "3").code == 0
    assert_ends_like(workspace, undisturbed)
    assert len(workspace.report()["workers"]) == 2
    assert set(workspace.computed().values()) == {1}


def test_a_chunk_is_read_one_computed_and_one_written_where_nobody_gives_a_depth(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start("work", "--burst", "--gpus", "none", "-w", "1", NET_HOLD="forward") as cli:
        workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(3)
        workspace.open_gate()
        assert cli.wait().code == 0
    workspace.finalize().ok()
    assert workspace.stored() == undisturbed.stored()


def test_the_order_of_the_chunks_does_not_show_in_the_bytes(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    order = list(workspace.job.plan.indices())
    random.Random(1).shuffle(order)
    with workspace.queue() as queue:
        queue.cancel(str(workspace.job_folder))
        queue.submit(Task("infer", str(workspace.job_folder), index) for index in order)
    assert workspace.work("--depth", "1").code == 0
    times = {name: moment for name, (_, moment) in workspace.done().items()}
    assert sorted(times, key=times.__getitem__) == [".".join(map(str, i)) for i in order]
    assert_ends_like(workspace, undisturbed)


# ---------------------------------------------------------------------------- dead workers


@dataclass(frozen=True)
class Moment:
    """When a worker process is killed: at which place in its code, after how many commits."""

    reach: str
    after: int
    workers: int
    full_hands: bool = True


MOMENTS = {
    "while it loads the network": Moment("load", 0, 1),
    "in its first chunk": Moment("forward", 0, 1),
    "with several chunks in flight": Moment("forward", 8, 2),
    "while it writes pieces": Moment("piece", 4, 2),
    "before it commits, near the end": Moment("commit", CHUNKS - 4, 2, full_hands=False),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_worker_killed_at_any_moment_costs_only_what_it_had_in_flight(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace, moment: Moment
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": moment.reach, "NET_AFTER": str(moment.after)}
    if moment.full_hands:
        hold["NET_OTHERS_WAIT"] = "1"  # else another worker could take all that is left
    with workspace.start(*ON_CPU, "--burst", "-w", str(moment.workers), **hold) as cli:
        victim = workspace.wait_until_stopped()
        if moment.full_hands:
            workspace.wait_for_chunks_in_flight(DEPTH)
        os.kill(victim, signal.SIGKILL)
        before = Done.so_far(workspace)
        assert cli.wait().code == 0
        said = cli.output()
    handed_back = re.search(r"was killed by signal 9; (\d) chunks requeued", said)
    assert handed_back is not None, said
    assert int(handed_back[1]) == DEPTH or not moment.full_hands
    assert len(before.records) >= moment.after
    before.was_left_alone_in(workspace)

    again = {name for name in workspace.done() if workspace.record(name)["attempt"] > 1}
    assert 1 <= len(again) <= int(handed_back[1])
    assert {workspace.record(name)["attempt"] for name in again} == {2}
    patches, computed = workspace.patches(), workspace.computed()
    twice = {crc for crc, times in computed.items() if times > 1}
    assert computed.keys() == set().union(*patches.values())
    assert twice <= set().union(*(patches[name] for name in again))
    assert_ends_like(workspace, undisturbed)
    assert workspace.report()["patches"] == PATCHES


@dataclass(frozen=True)
class Stop:
    """One way of being stopped in the middle of a job, and what was seen of it."""

    before: Done
    ended: CommandResult
    after: Done
    counts: Counts
    attempts: list[int]


@dataclass(frozen=True)
class Stopped:
    """A job stopped by a signal, by two signals, by the supervisor's death, then finished."""

    workspace: StandardWorkspace
    politely: Stop
    at_once: Stop
    supervisor_killed: Stop
    heirs: CommandResult


@pytest.fixture(scope="module")
def stopped(standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    workspace = standard_job.workspace(tmp_path_factory.mktemp("stopped"))
    workspace.produce()
    politely = stop(workspace, 3, [signal.SIGTERM], lets_finish=True)
    at_once = stop(workspace, 8, [signal.SIGTERM, signal.SIGTERM])
    supervisor_killed = stop(workspace, 12, [signal.SIGKILL])
    heirs = workspace.work("-w", "2", CHUNKQ_WORKER_SETTINGS=SHORT_LEASE)
    workspace.finalize().ok()
    return Stopped(workspace, politely, at_once, supervisor_killed, heirs)


def stop(
    workspace: StandardWorkspace,
    after: int,
    signals: list[signal.Signals],
    *,
    lets_finish: bool = False,
) -> Stop:
    """Start a worker, and stop it with its hands full after so many commits."""
    says = ["stopping after the chunks in flight", "requeueing the chunks in flight"]
    hold = {"NET_HOLD": "forward", "NET_AFTER": str(after), "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with workspace.start(*ON_CPU, **hold) as cli:
        workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(DEPTH)
        before = Done.so_far(workspace)
        cli.children()
        for number, line in zip(signals, says, strict=False):
            cli.process.send_signal(number)
            if number == signal.SIGTERM:
                wait_until(lambda line=line: line in cli.output(), line)  # type: ignore[misc]
        if lets_finish:
            workspace.open_gate()
        ended = cli.wait()
        cli.wait_for_children()
        assert len(cli.known) == 1
    shutil.rmtree(workspace.folder / "gate")
    return Stop(before, ended, Done.so_far(workspace), workspace.counts(), workspace.attempts())


def test_a_signal_lets_what_is_in_flight_finish_and_loses_nothing(stopped: Stopped) -> None:
    stop = stopped.politely
    assert stop.ended.code == 0
    assert len(stop.before.records) >= 3
    assert len(stop.after.records) == len(stop.before.records) + DEPTH
    assert stop.counts == Counts(queued=CHUNKS - len(stop.after.records))
    assert set(stop.attempts) == {0}


def test_a_second_signal_hands_back_what_is_in_flight_at_once(stopped: Stopped) -> None:
    stop = stopped.at_once
    assert stop.ended.code == 0
    assert stop.after.records == stop.before.records
    assert stop.counts == Counts(queued=CHUNKS - len(stop.after.records))
    assert set(stop.attempts) == {0}


def test_no_worker_outlives_a_killed_supervisor_and_others_take_over(stopped: Stopped) -> None:
    stop = stopped.supervisor_killed
    assert stop.ended.code == -signal.SIGKILL
    assert stop.after.records == stop.before.records
    assert sorted(set(stop.attempts)) == [0, 1]
    assert stop.attempts.count(1) == DEPTH
    assert stopped.heirs.code == 0
    attempts = [stopped.workspace.record(name)["attempt"] for name in stopped.workspace.done()]
    assert sorted(attempts) == [1] * (CHUNKS - DEPTH) + [2] * DEPTH


def test_a_job_stopped_in_every_way_ends_with_the_same_bytes_and_nothing_done_twice(
    stopped: Stopped, undisturbed: StandardWorkspace
) -> None:
    assert_same_bytes(stopped.workspace, undisturbed)
    for stop in (stopped.politely, stopped.at_once, stopped.supervisor_killed):
        stop.after.was_left_alone_in(stopped.workspace)
    assert stopped.workspace.pieces() == []


def test_a_worker_that_wakes_up_after_others_finished_everything_changes_no_byte(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "piece", "NET_AFTER": "4", "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with workspace.start(*ON_CPU, "--burst", **hold) as cli:
        sleeper = workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(DEPTH)
        os.kill(sleeper, signal.SIGSTOP)
        half_done = workspace.done()
        assert workspace.work(CHUNKQ_WORKER_SETTINGS=SHORT_LEASE).code == 0
        assert_ends_like(workspace, undisturbed)
        records, blocks = workspace.done(), workspace.done("finalize")
        workspace.open_gate()
        os.kill(sleeper, signal.SIGCONT)
        assert cli.wait().code == 0
    assert len(half_done) <= CHUNKS - DEPTH
    # It really did compute and write: the network saw its chunks' patches twice.
    assert max(workspace.computed().values()) == 2
    assert workspace.pieces() == []
    assert_same_bytes(workspace, undisturbed)
    assert (workspace.done(), workspace.done("finalize")) == (records, blocks)
    assert_ends_like(workspace, undisturbed)


# --------------------------------------------------------------------------- bad chunks


def test_a_poisonous_chunk_fails_alone_and_after_mending_the_bytes_are_the_same(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    poison = workspace.folder / "poison"
    poison.touch()
    workspace.produce()
    poisoned = {"1.2.2"}
    assert {
        ".".join(map(str, index))
        for index in workspace.job.plan.indices()
        for patch in workspace.job.plan.patches(workspace.job.plan.chunk(index))
        if all(low <= at < high for low, at, high in zip(*bounds(patch.source), strict=True))
    } == poisoned

    ended = workspace.work(NET_POISON=str(poison))
    assert ended.code == 3
    [line] = [line for line in ended.messages if "failed" in line]
    assert line.startswith("chunkq: 1 chunk failed; ")
    assert "Traceback" not in ended.err
    assert [f"attempt {n}" in ended.err for n in range(1, MAX_ATTEMPTS + 2)] == [
        *[True] * MAX_ATTEMPTS,
        False,
    ]
    before = Done.so_far(workspace)
    assert len(before.records) == CHUNKS - 1
    assert workspace.counts() == Counts(failed=1)
    status = workspace.status()
    assert (status["done"], status["failed"], status["queued"]) == (CHUNKS - 1, 1, 0)
    [group] = status["failures"]
    assert group["error"] == "ArithmeticError"
    assert group["message"] == "ArithmeticError: a poisonous voxel"
    assert group["chunks"] == ["1.2.2"]
    assert "net.py" in group["traceback"]
    assert 'raise ArithmeticError("a poisonous voxel")' in group["traceback"]

    refused = workspace.finalize()
    assert refused.code == 3
    assert refused.messages == ["chunkq: 1 chunks are not computed yet: 1.2.2"]
    assert not workspace.status()["sealed"]

    poison.unlink()
    assert workspace.call("retry", str(workspace.output)).out == "1 chunks queued again\n"
    assert workspace.work(NET_POISON=str(poison)).code == 0
    assert workspace.status()["failures"] == []
    before.was_left_alone_in(workspace)
    assert_ends_like(workspace, undisturbed)


def bounds(box: object) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return box.start, POISONOUS, box.stop  # type: ignore[attr-defined]


def test_a_network_that_cannot_be_loaded_stops_the_worker_and_costs_no_attempt(
    standard_job: StandardJob, tmp_path: Path
) -> None:
    workspace = standard_job.workspace(tmp_path, {"model": {"class_name": "Missing"}})
    workspace.produce()
    with workspace.start(*ON_CPU) as cli:
        ended = cli.wait()
        cli.wait_for_children()
    assert ended.code == 1
    assert len([line for line in ended.messages if "Missing" in line]) == 1
    assert "Traceback" not in ended.err
    assert "class_name" in ended.messages[-1]
    assert workspace.counts() == Counts(queued=CHUNKS)
    assert workspace.attempts() == [0] * CHUNKS
    assert workspace.done() == {}
    assert workspace.status()["failures"] == []
