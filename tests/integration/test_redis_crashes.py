"""Workers, their supervisors and Redis itself are killed: nothing is lost, no byte changes."""

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from chunkq.executors.base import MAX_ATTEMPTS, Counts, WorkerOptions
from chunkq.executors.leases import LeaseQueue
from chunkq.executors.rq import RqExecutor
from chunkq.executors.settings import WorkerSettings
from chunkq.ledger import Ledger
from chunkq.tasks import Task, chunk_name, job_key
from tests.harness.processes import CommandResult, RunningCommand
from tests.harness.servers.redis import RedisServer, administrator, redis_server
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

CHUNKS = 24
DEPTH = 4
ON_CPU = ("work", "--gpus", "none", "--depth", str(DEPTH))
SHORT_LEASE = '{"lease": 1}'
"""Seconds; the real one is longer than most tests should be."""
RECOVERED_WITHIN = 30.0
ABSENCE = 20.0
"""Seconds for which Redis is away; the length of a lease."""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis of the test's own, to be killed as it likes."""
    with redis_server() as running:
        yield running


@pytest.fixture
def workspace(standard_job: StandardJob, tmp_path: Path, server: RedisServer) -> StandardWorkspace:
    return standard_job.workspace(tmp_path, url=server.url)


def assert_same_bytes(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Compare every file of the output."""
    found, expected = workspace.stored(), undisturbed.stored()
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def assert_ends_like(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Finalize, and compare every file of the output; the queue must have forgotten the job."""
    workspace.finalize().ok()
    status = workspace.status()
    assert status["sealed"]
    assert status["failures"] == []
    assert len(workspace.done()) == CHUNKS
    assert_same_bytes(workspace, undisturbed)
    assert workspace.pieces() == []
    assert left_in_redis(workspace) == []


def left_in_redis(workspace: StandardWorkspace) -> list[str]:
    """Every key that names the job, where something is left of it on the queue."""
    key = job_key(str(workspace.job_folder))
    with administrator(workspace.queue_url) as client:
        names = [name.decode() for name in client.keys(f"*{key}*")]
        return sorted(names + [n.decode() for n in client.zrange("chunkq:queues", 0, -1)])


def begun(workspace: StandardWorkspace) -> dict[str, int]:
    """How often each task still on the queue was begun, by chunk name."""
    found = {}
    with administrator(workspace.queue_url) as client:
        for key in client.keys(f"rq:job:{job_key(str(workspace.job_folder))}-infer-*"):
            left, status = client.hmget(key, "retries_left", "status")
            name = key.decode().rpartition("-")[2].replace("_", ".")
            found[name] = MAX_ATTEMPTS - 1 - int(left) + (status != b"queued")
    return found


def records(workspace: StandardWorkspace, kind: str = "infer") -> dict[str, dict[str, Any]]:
    """The commit records by chunk name."""
    return {name: json.loads(content) for name, (content, _) in workspace.done(kind).items()}


def attempts(workspace: StandardWorkspace) -> dict[str, int]:
    return {name: record["attempt"] for name, record in records(workspace).items()}


def in_hand(workspace: StandardWorkspace) -> set[str]:
    """The chunks in flight now."""
    return {chunk_name(item.task.chunk) for item in workspace.running()}


@dataclass(frozen=True)
class Disturbance:
    """What was done and what was in flight at the moment of a disturbance."""

    workspace: StandardWorkspace
    when: float
    done: dict[str, tuple[bytes, int]]
    computed: Counter[int]
    in_flight: frozenset[str]

    @classmethod
    def now(cls, workspace: StandardWorkspace) -> "Disturbance":
        done = workspace.done()
        in_flight = frozenset(in_hand(workspace)) - done.keys()
        return cls(workspace, time.time(), done, workspace.computed(), in_flight)

    def cost_nothing_done(self) -> None:
        """Assert that what was committed is untouched, and none of its patches was run since."""
        after, computed, patches = (
            self.workspace.done(),
            self.workspace.computed(),
            self.workspace.patches(),
        )
        assert {name: after[name] for name in self.done} == self.done
        mine = {crc for name in self.done for crc in patches[name]}
        assert {crc: computed[crc] for crc in mine} == {crc: self.computed[crc] for crc in mine}

    def cost_only_what_was_in_flight(self) -> None:
        """Assert besides that nothing else was run twice either."""
        self.cost_nothing_done()
        computed, patches = self.workspace.computed(), self.workspace.patches()
        assert computed.keys() == set().union(*patches.values())
        twice = {name for name, own in patches.items() if any(computed[crc] > 1 for crc in own)}
        assert twice <= self.in_flight

    def seconds_to_recover(self) -> float:
        """From the disturbance until the first chunk that was in flight was committed."""
        done = self.workspace.done()
        return min(done[name][1] for name in self.in_flight) / 1e9 - self.when


def hold_with_full_hands(workspace: StandardWorkspace) -> int:
    """Wait until a worker stands at the gate and has all it may in flight; returns its id."""
    holder = workspace.wait_until_stopped()
    wait_until(
        lambda: len(in_hand(workspace) - workspace.done().keys()) == DEPTH, "its hands are full"
    )
    return holder


def told_to_stop(cli: RunningCommand) -> CommandResult:
    cli.children()
    cli.process.send_signal(signal.SIGTERM)
    return cli.wait()


def wait_for_all(workspace: StandardWorkspace) -> None:
    wait_until(lambda: len(workspace.done()) == CHUNKS, "all chunks are done")


# --------------------------------------- two long stories, which go on behind the other tests


@dataclass(frozen=True)
class Orphaned:
    """Four chunks whose supervisor was killed together with its child, and another worker."""

    workspace: StandardWorkspace
    disturbance: Disturbance
    killed: CommandResult
    heirs: RunningCommand


@pytest.fixture(scope="module")
def orphaned(
    standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Orphaned]:
    with redis_server() as server:
        workspace = standard_job.workspace(tmp_path_factory.mktemp("orphaned"), url=server.url)
        workspace.produce()
        with workspace.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="4") as cli:
            hold_with_full_hands(workspace)
            before = Disturbance.now(workspace)
            cli.children()
            with workspace.start(*ON_CPU, "--burst") as heirs:
                wait_until(lambda: len(in_hand(workspace)) > DEPTH, "another worker is there")
                cli.process.kill()
                disturbance = replace(before, when=time.time())
                killed = cli.wait()
                cli.wait_for_children()
                yield Orphaned(workspace, disturbance, killed, heirs)


@dataclass(frozen=True)
class Stranded:
    """Two workers, one of them in the middle of a chunk, whose Redis is gone."""

    workspace: StandardWorkspace
    server: RedisServer
    cli: RunningCommand
    processes: list[int]
    disturbance: Disturbance


@pytest.fixture(scope="module")
def stranded(
    standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stranded]:
    with redis_server() as server:
        workspace = standard_job.workspace(tmp_path_factory.mktemp("stranded"), url=server.url)
        workspace.produce()
        command = ("work", "--gpus", "none", "--depth", "2", "-w", "2", "--burst")
        slowly = {"NET_HOLD": "forward", "NET_AFTER": "3", "NET_SLEEP": "0.1"}
        with workspace.start(*command, **slowly) as cli:
            workspace.wait_until_stopped()
            wait_until(lambda: len(workspace.running()) == 4, "both workers are busy")
            disturbance = Disturbance.now(workspace)
            server.kill()
            yield Stranded(workspace, server, cli, cli.children(), disturbance)


def test_no_child_outlives_a_killed_supervisor(orphaned: Orphaned) -> None:
    assert orphaned.killed.code == -signal.SIGKILL
    assert len(orphaned.disturbance.in_flight) == DEPTH
    assert orphaned.disturbance.in_flight <= in_hand(orphaned.workspace)


def test_while_redis_is_away_workers_finish_what_they_have_and_wait(stranded: Stranded) -> None:
    disturbance = stranded.disturbance
    # One worker stands still, the other one goes on.
    assert len(disturbance.in_flight) > 2
    wait_until(
        lambda: disturbance.in_flight & stranded.workspace.done().keys(), "one of them commits"
    )
    assert stranded.cli.process.poll() is None
    assert sorted(stranded.cli.children()) == sorted(stranded.processes)


# ---------------------------------------------------------------------------- dead workers


def test_a_worker_killed_with_four_chunks_in_flight_is_replaced_and_they_are_handed_back(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "forward", "NET_AFTER": "6"}
    with workspace.start(*ON_CPU, "--burst", **hold) as cli:
        victim = hold_with_full_hands(workspace)
        killed = Disturbance.now(workspace)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "chunks requeued" in cli.output(), "they are requeued")
        # Well before the lease ends.
        assert time.time() - killed.when < 10
        assert cli.wait().code == 0
    assert f"was killed by signal 9; {DEPTH} chunks requeued" in cli.output()
    assert len(killed.in_flight) == DEPTH
    assert killed.seconds_to_recover() < RECOVERED_WITHIN
    killed.cost_only_what_was_in_flight()
    again = {name for name, number in attempts(workspace).items() if number > 1}
    assert again == killed.in_flight
    assert set(attempts(workspace).values()) == {1, 2}
    assert_ends_like(workspace, undisturbed)


def test_signals_lose_nothing_and_cost_no_attempt(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    politely = stop(workspace, 5, 1)
    assert len(politely.in_flight) == DEPTH
    assert workspace.done().keys() == politely.done.keys() | politely.in_flight
    assert set(begun(workspace).values()) == {0}

    at_once = stop(workspace, 10, 2)
    assert len(at_once.in_flight) == DEPTH
    assert workspace.done() == at_once.done
    assert workspace.counts() == Counts(queued=CHUNKS - len(at_once.done))
    assert set(begun(workspace).values()) == {0}

    assert workspace.work().code == 0
    politely.cost_nothing_done()
    at_once.cost_only_what_was_in_flight()
    assert set(attempts(workspace).values()) == {1}
    assert_ends_like(workspace, undisturbed)


def stop(workspace: StandardWorkspace, after: int, signals: int) -> Disturbance:
    """Send a worker with its hands full so many signals; one signal lets it finish."""
    says = ["stopping after the chunks in flight", "requeueing the chunks in flight"]
    with workspace.start(*ON_CPU, NET_HOLD="forward", NET_AFTER=str(after)) as cli:
        hold_with_full_hands(workspace)
        stopped = Disturbance.now(workspace)
        cli.children()
        for line in says[:signals]:
            cli.process.send_signal(signal.SIGTERM)
            wait_until(lambda line=line: line in cli.output(), line)  # type: ignore[misc]
        if signals == 1:
            workspace.open_gate()
        assert cli.wait().code == 0
        cli.wait_for_children()
        assert len(cli.known) == 1
    shutil.rmtree(workspace.folder / "gate")
    return stopped


# ----------------------- how the long stories end, long before workers give Redis up


def test_chunks_of_a_killed_supervisor_are_taken_over_within_half_a_minute(
    orphaned: Orphaned, undisturbed: StandardWorkspace
) -> None:
    assert orphaned.heirs.wait().code == 0
    workspace, disturbance = orphaned.workspace, orphaned.disturbance
    assert disturbance.seconds_to_recover() < RECOVERED_WITHIN
    disturbance.cost_only_what_was_in_flight()
    assert {n for n, number in attempts(workspace).items() if number == 2} == disturbance.in_flight
    assert set(attempts(workspace).values()) == {1, 2}
    assert_ends_like(workspace, undisturbed)


def test_after_redis_was_away_for_twenty_seconds_the_same_processes_go_on(
    stranded: Stranded, undisturbed: StandardWorkspace
) -> None:
    workspace, cli = stranded.workspace, stranded.cli
    wait_until(lambda: time.time() - stranded.disturbance.when > ABSENCE, "that time is over")
    assert len(workspace.done()) < CHUNKS - 2
    stranded.server.start()
    back = time.time()
    wait_until(lambda: len(workspace.done()) >= CHUNKS - 2, "the other worker has done all it can")
    assert time.time() - back < RECOVERED_WITHIN
    wait_until(lambda: workspace.counts().queued == 0, "nothing waits")
    assert sorted(cli.children()) == sorted(stranded.processes)
    workspace.open_gate()
    assert cli.wait().code == 0
    assert cli.known == set(stranded.processes)
    # Leases ran out meanwhile, and nobody used that: who held them could not renew them.
    assert set(workspace.computed().values()) == {1}
    assert set(attempts(workspace).values()) == {1}
    assert_ends_like(workspace, undisturbed)


# ------------------------------------------------------------- zombies and bad chunks


def test_a_worker_that_wakes_up_after_others_finished_everything_changes_no_byte(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "piece", "NET_AFTER": "4", "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with workspace.start(*ON_CPU, "--burst", **hold) as cli:
        sleeper = hold_with_full_hands(workspace)
        os.kill(sleeper, signal.SIGSTOP)
        asleep = Disturbance.now(workspace)
        assert workspace.work(CHUNKQ_WORKER_SETTINGS=SHORT_LEASE).code == 0
        assert asleep.seconds_to_recover() < RECOVERED_WITHIN
        assert_ends_like(workspace, undisturbed)
        done, blocks = workspace.done(), workspace.done("finalize")
        workspace.open_gate()
        os.kill(sleeper, signal.SIGCONT)
        assert cli.wait().code == 0
    assert len(asleep.in_flight) == DEPTH
    # It really did compute and write: the network saw its chunks' patches twice.
    assert max(workspace.computed().values()) == 2
    asleep.cost_only_what_was_in_flight()
    assert workspace.pieces() == []
    assert (workspace.done(), workspace.done("finalize")) == (done, blocks)
    assert_ends_like(workspace, undisturbed)


def test_pieces_can_be_written_while_another_tidies_up_after_their_block(tmp_path: Path) -> None:
    ledger, over = Ledger(str(tmp_path / "out.zarr.chunkq"), "0a1b2c3d"), threading.Event()

    def tidy_up() -> None:
        while not over.wait(0.001):
            ledger.delete_pieces((0, 0))

    with ThreadPoolExecutor(1) as other:
        tidying = other.submit(tidy_up)
        try:
            for _ in range(300):
                ledger.put_piece((0, 0), "own", [np.zeros(1)])
        finally:
            over.set()
        tidying.result()


def test_a_hung_chunk_ends_its_process_and_only_it_has_used_up_an_attempt(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    # Loading the network takes longer than this limit, and is not what this is about.
    hang = {"NET_HOLD": "forward", "NET_AFTER": "6", "TEST_PRELOAD": "1"}
    with workspace.start(*ON_CPU, "--burst", "--time-limit", "3s", **hang) as cli:
        hold_with_full_hands(workspace)
        hung = Disturbance.now(workspace)
        ended = cli.wait()
    assert ended.code == 0
    assert len(hung.in_flight) == DEPTH
    assert "ended because a chunk exceeded its time limit" in ended.err
    [line] = [line for line in ended.messages if "ran for more than its time limit" in line]
    assert "infer chunk" in line
    hung.cost_only_what_was_in_flight()
    again = [name for name, number in attempts(workspace).items() if number > 1]
    # Those that merely waited for the device cannot be blamed.
    assert 1 <= len(again) < DEPTH
    assert all(name in line for name in again)
    assert {attempts(workspace)[name] for name in again} == {2}
    assert_ends_like(workspace, undisturbed)


def test_a_poisonous_chunk_fails_alone_and_after_mending_the_bytes_are_the_same(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    poison = workspace.folder / "poison"
    poison.touch()
    workspace.produce()
    with workspace.start(*ON_CPU, NET_POISON=str(poison)) as cli:
        wait_until(lambda: workspace.counts() == Counts(failed=1), "one chunk has failed")
        said = cli.output()
        assert [f"attempt {n}" in said for n in range(1, MAX_ATTEMPTS + 2)] == [
            *[True] * MAX_ATTEMPTS,
            False,
        ]
        poisoned = Disturbance.now(workspace)
        assert len(poisoned.done) == CHUNKS - 1
        status = workspace.status()
        assert (status["done"], status["failed"], status["queued"]) == (CHUNKS - 1, 1, 0)
        [group] = status["failures"]
        assert group["message"] == "ArithmeticError: a poisonous voxel"
        assert group["chunks"] == ["1.2.2"]
        assert 'raise ArithmeticError("a poisonous voxel")' in group["traceback"]

        refused = workspace.finalize()
        assert refused.code == 3
        assert refused.messages == ["chunkq: 1 chunk is not computed yet: 1.2.2; run a worker"]

        poison.unlink()
        assert workspace.call("retry", str(workspace.output)).out == "1 chunks queued again\n"
        wait_until(lambda: workspace.counts() == Counts(), "the queue is empty")
        assert told_to_stop(cli).code == 0
    assert workspace.status()["failures"] == []
    poisoned.cost_nothing_done()
    # The last contributor came late: the workers have completed every block all the same.
    assert workspace.done("finalize").keys() == undisturbed.done("finalize").keys()
    assert_ends_like(workspace, undisturbed)


def test_a_network_that_fails_on_every_chunk_stops_the_worker_after_a_few(
    workspace: StandardWorkspace,
) -> None:
    broken = workspace.folder / "broken"
    broken.touch()
    workspace.produce()
    with workspace.start(*ON_CPU, NET_BROKEN=str(broken)) as cli:
        ended = cli.wait()
        cli.wait_for_children()
    assert ended.code == 1
    [line] = ended.messages[1:]
    assert "chunks in a row failed alike" in line
    assert "ArithmeticError: broken for every chunk" in line
    assert "Traceback" not in ended.err
    # Chunks that own no patch run no network.
    assert [name for name in workspace.done() if workspace.patches()[name]] == []
    assert workspace.counts() == Counts(queued=CHUNKS - len(workspace.done()))
    spent = Counter(begun(workspace).values())
    assert spent.keys() == {0, 1}
    enough = WorkerSettings().same_failures_at_first
    assert enough <= spent[1] < enough + DEPTH
    [group] = workspace.status()["failures"]
    assert len(group["chunks"]) == spent[1]


# ------------------------------------------------------------------------ Redis in trouble


def kill_and_restart(server: RedisServer) -> None:
    server.kill()
    server.start()


def freeze(server: RedisServer) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    # Longer than clients wait for an answer: they ask again, and all of it is read in the end.
    time.sleep(2.5)
    os.kill(server.pid, signal.SIGCONT)


TROUBLES = {"killed and started again": kill_and_restart, "frozen for a while": freeze}


@pytest.mark.parametrize("disturb", TROUBLES.values(), ids=TROUBLES.keys())
def test_workers_ride_out_that_redis_is(
    workspace: StandardWorkspace,
    server: RedisServer,
    undisturbed: StandardWorkspace,
    disturb: Callable[[RedisServer], None],
) -> None:
    workspace.produce()
    impatient = {"CHUNKQ_WORKER_SETTINGS": '{"server_answer": 1, "lease": 3}'}
    with workspace.start(*ON_CPU, "--burst", NET_HOLD="forward", NET_AFTER="6", **impatient) as cli:
        hold_with_full_hands(workspace)
        disturbed = Disturbance.now(workspace)
        workspace.open_gate()
        disturb(server)
        assert cli.wait().code == 0
    assert len(disturbed.in_flight) == DEPTH
    assert disturbed.seconds_to_recover() < RECOVERED_WITHIN
    assert len(workspace.done()) == CHUNKS
    # One name means one process: every new one gets a name of its own.
    assert len({record["worker"] for record in records(workspace).values()}) == 1
    assert set(workspace.computed().values()) == {1}
    assert_ends_like(workspace, undisturbed)


def test_a_worker_that_is_back_first_does_not_take_what_others_still_work_on(
    server: RedisServer,
) -> None:
    workers = {
        name: WorkerOptions(name, settings=WorkerSettings(lease=0.5))
        for name in ("first", "second")
    }
    job = "/data/out.zarr.chunkq"
    with queue_on(server) as queue:
        queue.submit(Task("infer", job, (n,)) for n in range(2))
        held = {name: queue.reserve(worker) for name, worker in workers.items()}
        assert None not in held.values()
        server.kill()
        away = time.time()
        wait_until(lambda: time.time() - away > 1, "the leases ran out")
        server.start()
        # The first beat of a heart after the absence comes from one of them; the other is asleep.
        queue.renew(workers["first"], [held["first"]])  # type: ignore[list-item]
        assert queue.reserve(workers["first"]) is None
        queue.renew(workers["second"], [held["second"]])  # type: ignore[list-item]
        assert queue.counts(job) == Counts(running=2)


@contextmanager
def queue_on(server: RedisServer) -> Iterator[LeaseQueue]:
    queue = RqExecutor(server.url)
    yield queue
    queue.close()


def test_after_redis_was_wiped_resuming_completes_the_job_and_workers_what_blocks_are_left(
    workspace: StandardWorkspace, server: RedisServer, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="8") as cli:
        hold_with_full_hands(workspace)
        wiped = Disturbance.now(workspace)
        with server.client as client:
            client.flushall()
        resumed = workspace.produce("--resume")
        assert f"{len(wiped.done)} done, {CHUNKS - len(wiped.done)} newly queued" in resumed.out
        workspace.open_gate()
        wait_for_all(workspace)
        wait_until(lambda: workspace.counts() == Counts(), "the queue is empty")
        assert len(wiped.in_flight) == DEPTH
        wiped.cost_only_what_was_in_flight()

        # Who had contributed to which block was forgotten with all else.
        blocks = undisturbed.done("finalize").keys()
        before = workspace.done("finalize")
        assert before.keys() < blocks
        ended = workspace.call("finalize", str(workspace.output), "--distribute")
        assert ended.code == 0, ended.err
        after = workspace.done("finalize")
        assert after.keys() == blocks
        assert {name: after[name] for name in before} == before
        [worker] = {record["worker"] for record in records(workspace).values()}
        assert {record["worker"] for record in records(workspace, "finalize").values()} == {worker}
        assert told_to_stop(cli).code == 0
    assert_ends_like(workspace, undisturbed)


# ------------------------------------------------------------------- completing the blocks


def test_when_the_last_chunk_is_committed_all_blocks_are_complete(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    assert workspace.work("-w", "2").code == 0
    assert workspace.done("finalize").keys() == undisturbed.done("finalize").keys()
    assert len(workspace.done("finalize")) > CHUNKS / 2
    blocks = workspace.done("finalize")
    assert workspace.pieces() == []
    assert left_in_redis(workspace) == []
    assert_ends_like(workspace, undisturbed)
    assert workspace.done("finalize") == blocks
    assert set(workspace.computed().values()) == {1}


def test_a_block_whose_last_contributor_died_before_it_was_complete_is_left_to_finalize(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "block", "NET_AFTER": "12"}
    with workspace.start(*ON_CPU, "--burst", **hold) as cli:
        victim = workspace.wait_until_stopped()
        killed = Disturbance.now(workspace)
        blocks = workspace.done("finalize")
        os.kill(victim, signal.SIGKILL)
        assert cli.wait().code == 0
    assert len(workspace.done()) == CHUNKS
    killed.cost_nothing_done()
    left = undisturbed.done("finalize").keys() - workspace.done("finalize").keys()
    assert 1 <= len(left) <= 2 * DEPTH
    assert {path.parent.name for path in workspace.pieces()} == left
    assert_ends_like(workspace, undisturbed)
    after = records(workspace, "finalize")
    assert {name for name in after if ":" not in after[name]["worker"]} == left
    assert {name: workspace.done("finalize")[name] for name in blocks} == blocks


def test_on_the_embedded_queue_too_all_blocks_are_complete_after_the_last_chunk(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    workspace = standard_job.workspace(tmp_path)
    workspace.produce()
    assert workspace.work("-w", "2").code == 0
    assert workspace.done("finalize").keys() == undisturbed.done("finalize").keys()
    assert workspace.pieces() == []
    workspace.finalize().ok()
    assert_same_bytes(workspace, undisturbed)
    with sqlite3.connect(tmp_path / "queue.db") as database:
        assert database.execute("SELECT count(*) FROM blocks").fetchone() == (0,)
    database.close()


def test_workers_complete_the_blocks_that_the_embedded_queue_knew_nothing_of_when_asked(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    workspace = standard_job.workspace(tmp_path)
    workspace.produce()
    blocks = undisturbed.done("finalize").keys()
    with workspace.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="8") as cli:
        workspace.wait_until_stopped()
        with sqlite3.connect(tmp_path / "queue.db") as database:
            database.execute("DELETE FROM blocks")
        database.close()
        workspace.open_gate()
        wait_for_all(workspace)
        wait_until(lambda: workspace.counts() == Counts(), "the queue is empty")
        before = workspace.done("finalize")
        assert before.keys() < blocks
        ended = workspace.call("finalize", str(workspace.output), "--distribute")
        assert ended.code == 0, ended.err
        assert told_to_stop(cli).code == 0
    [worker] = {record["worker"] for record in records(workspace).values()}
    assert {record["worker"] for record in records(workspace, "finalize").values()} == {worker}
    after = workspace.done("finalize")
    assert after.keys() == blocks
    assert {name: after[name] for name in before} == before
    assert workspace.pieces() == []
    assert_same_bytes(workspace, undisturbed)


# ----------------------------------------------------------------------- jobs side by side


def test_two_jobs_on_one_redis_leave_each_other_alone(
    standard_job: StandardJob,
    tmp_path: Path,
    server: RedisServer,
    workspace: StandardWorkspace,
    undisturbed: StandardWorkspace,
) -> None:
    (tmp_path / "other").mkdir()
    labels = standard_job.workspace(tmp_path / "other", {"combine": "soft"}, server.url)
    for each in (workspace, labels):
        each.produce()
    assert workspace.call("cancel", str(workspace.output)).out.startswith(
        f"{CHUNKS} chunks taken off"
    )
    assert (workspace.counts(), labels.counts()) == (Counts(), Counts(queued=CHUNKS))
    workspace.produce("--resume")

    assert labels.work("--job", str(labels.output)).code == 0
    assert len(labels.done()) == CHUNKS
    assert workspace.done() == {}
    assert workspace.counts() == Counts(queued=CHUNKS)
    assert set(begun(workspace).values()) == {0}

    assert workspace.work().code == 0
    labels.finalize().ok()
    assert_ends_like(workspace, undisturbed)
    # Each label is the class whose average, which the other job stores, is the largest.
    assert np.array_equal(voxels(labels), voxels(undisturbed).argmax(0))
    assert labels.done("finalize").keys() == undisturbed.done("finalize").keys()
    assert labels.pieces() == []


def voxels(workspace: StandardWorkspace) -> npt.NDArray[Any]:
    return np.asarray(zarr.open_array(workspace.output / "0", mode="r")[:])
