"""Kill workers, supervisors and Redis: no results are lost, the output is byte-identical."""

import json
import os
import re
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

from chunkq.errors import ErrorCode
from chunkq.job.ledger import Ledger
from chunkq.job.tasks import JobId, Task, chunk_name, path_key
from chunkq.queue.backends.rq import RqExecutor
from chunkq.queue.contract.executor import MAX_ATTEMPTS, TaskCounts, WorkerOptions
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.leases.task_loop import LeaseQueue
from tests.harness.processes import CommandResult, RunningCommand
from tests.harness.servers.redis import RedisServer, admin_client, redis_server
from tests.harness.standard_job import StandardJob, StandardWorkspace
from tests.harness.waiting import wait_until

CHUNKS = 24
DEPTH = 4
ON_CPU = ("work", "--gpus", "none", "--depth", str(DEPTH))
SHORT_LEASE = '{"lease": 1}'
"""Lease in seconds, shorter than the default."""
MAX_RECOVERY_SECONDS = 30.0
OUTAGE_SECONDS = 20.0
"""Outage of Redis, as long as a lease."""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """Yield a Redis server for one test, which may kill it."""
    with redis_server() as server:
        yield server


@pytest.fixture
def workspace(standard_job: StandardJob, tmp_path: Path, server: RedisServer) -> StandardWorkspace:
    return standard_job.workspace(tmp_path, url=server.url)


def assert_same_bytes(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Compare every file of the output."""
    files, expected = workspace.stored(), undisturbed.stored()
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []


def assert_finalized_like(workspace: StandardWorkspace, undisturbed: StandardWorkspace) -> None:
    """Finalize, compare every file of the output, and check that the queue has no keys of it."""
    workspace.finalize().ok()
    status = workspace.status()
    assert status["sealed"]
    assert status["failures"] == []
    assert len(workspace.done()) == CHUNKS
    assert_same_bytes(workspace, undisturbed)
    assert workspace.pieces() == []
    assert remaining_keys(workspace) == []


def remaining_keys(workspace: StandardWorkspace) -> list[str]:
    """Return the keys of the job, and all queues."""
    key = path_key(str(workspace.job_folder))
    with admin_client(workspace.queue_url) as client:
        names = [name.decode() for name in client.keys(f"*{key}*")]
        return sorted(names + [n.decode() for n in client.zrange("chunkq:queues", 0, -1)])


def rq_prefix(workspace: StandardWorkspace) -> str:
    return f"{path_key(str(workspace.job_folder))}-{workspace.job.id.epoch}"


def used_attempts(workspace: StandardWorkspace) -> dict[str, int]:
    """Return the number of used attempts of each task on the queue, by chunk name."""
    counts = {}
    with admin_client(workspace.queue_url) as client:
        for key in client.keys(f"rq:job:{rq_prefix(workspace)}-infer-*"):
            retries, status = client.hmget(key, "retries_left", "status")
            name = key.decode().rpartition("-")[2].replace("_", ".")
            counts[name] = MAX_ATTEMPTS - 1 - int(retries) + (status != b"queued")
    return counts


def records(workspace: StandardWorkspace, kind: str = "infer") -> dict[str, dict[str, Any]]:
    """Return the commit records by chunk name."""
    return {name: json.loads(content) for name, (content, _) in workspace.done(kind).items()}


def attempts(workspace: StandardWorkspace) -> dict[str, int]:
    return {name: record["attempt"] for name, record in records(workspace).items()}


def running_chunks(workspace: StandardWorkspace) -> set[str]:
    """Return the names of the chunks in flight."""
    return {chunk_name(item.task.chunk) for item in workspace.running()}


@dataclass(frozen=True)
class Snapshot:
    """Committed chunks and chunks in flight at the time of a fault."""

    workspace: StandardWorkspace
    time: float
    done: dict[str, tuple[bytes, int]]
    computed: Counter[int]
    in_flight: frozenset[str]

    @classmethod
    def now(cls, workspace: StandardWorkspace) -> "Snapshot":
        done = workspace.done()
        in_flight = frozenset(running_chunks(workspace)) - done.keys()
        return cls(workspace, time.time(), done, workspace.computed(), in_flight)

    def assert_commits_kept(self) -> None:
        """Assert that commits are unchanged, and their patches were not run again."""
        after, computed, patches = (
            self.workspace.done(),
            self.workspace.computed(),
            self.workspace.patches(),
        )
        assert {name: after[name] for name in self.done} == self.done
        committed = {crc for name in self.done for crc in patches[name]}
        expected = {crc: self.computed[crc] for crc in committed}
        assert {crc: computed[crc] for crc in committed} == expected

    def assert_only_in_flight_repeated(self) -> None:
        """Assert that only patches of chunks in flight were run twice."""
        self.assert_commits_kept()
        computed, patches = self.workspace.computed(), self.workspace.patches()
        assert computed.keys() == set().union(*patches.values())
        repeated = {name for name, crcs in patches.items() if any(computed[c] > 1 for c in crcs)}
        assert repeated <= self.in_flight

    def seconds_to_recover(self) -> float:
        """Return the time (s) from the fault to the commit of the first chunk in flight."""
        done = self.workspace.done()
        return min(done[name][1] for name in self.in_flight) / 1e9 - self.time


def wait_for_full_worker(workspace: StandardWorkspace) -> int:
    """Wait until a worker is blocked with DEPTH chunks in flight; return its process id."""
    pid = workspace.wait_until_stopped()
    wait_until(
        lambda: len(running_chunks(workspace) - workspace.done().keys()) == DEPTH,
        "all its chunks are in flight",
    )
    return pid


def stop_worker(cli: RunningCommand) -> CommandResult:
    cli.children()
    cli.process.send_signal(signal.SIGTERM)
    return cli.wait()


def wait_for_all(workspace: StandardWorkspace) -> None:
    wait_until(lambda: len(workspace.done()) == CHUNKS, "all chunks are done")


# --------------------------------------------------- two long scenarios in the background


@dataclass(frozen=True)
class Orphaned:
    """A killed supervisor with four chunks in flight, and another worker."""

    workspace: StandardWorkspace
    snapshot: Snapshot
    killed: CommandResult
    other: RunningCommand


@pytest.fixture(scope="module")
def orphaned(
    standard_job: StandardJob, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Orphaned]:
    with redis_server() as server:
        workspace = standard_job.workspace(tmp_path_factory.mktemp("orphaned"), url=server.url)
        workspace.produce()
        with workspace.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="4") as cli:
            wait_for_full_worker(workspace)
            before = Snapshot.now(workspace)
            cli.children()
            with workspace.start(*ON_CPU, "--burst") as other:
                wait_until(
                    lambda: len(running_chunks(workspace)) > DEPTH, "another worker is running"
                )
                cli.process.kill()
                snapshot = replace(before, time=time.time())
                killed = cli.wait()
                cli.wait_for_children()
                yield Orphaned(workspace, snapshot, killed, other)


@dataclass(frozen=True)
class Stranded:
    """Two workers during an outage of Redis, one of them blocked in a chunk."""

    workspace: StandardWorkspace
    server: RedisServer
    cli: RunningCommand
    processes: list[int]
    snapshot: Snapshot


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
            snapshot = Snapshot.now(workspace)
            server.kill()
            yield Stranded(workspace, server, cli, cli.children(), snapshot)


def test_worker_processes_end_with_a_killed_supervisor(orphaned: Orphaned) -> None:
    assert orphaned.killed.code == -signal.SIGKILL
    assert len(orphaned.snapshot.in_flight) == DEPTH
    assert orphaned.snapshot.in_flight <= running_chunks(orphaned.workspace)


def test_during_an_outage_of_redis_workers_finish_their_chunks_and_wait(stranded: Stranded) -> None:
    snapshot = stranded.snapshot
    # One worker is blocked, the other one continues.
    assert len(snapshot.in_flight) > 2
    wait_until(
        lambda: snapshot.in_flight & stranded.workspace.done().keys(),
        "one chunk in flight is committed",
    )
    assert stranded.cli.process.poll() is None
    assert sorted(stranded.cli.children()) == sorted(stranded.processes)


# ---------------------------------------------------------------------------- dead workers


def test_a_killed_worker_is_replaced_and_its_chunks_are_requeued(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "forward", "NET_AFTER": "6"}
    with workspace.start(*ON_CPU, "--burst", **hold) as cli:
        pid = wait_for_full_worker(workspace)
        killed = Snapshot.now(workspace)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "signal 9" in cli.output(), "the chunks are requeued")
        # Long before the leases expire.
        assert time.time() - killed.time < 10
        assert cli.wait().code == 0
    assert re.search(rf"signal 9\b.*\b{DEPTH} chunks", cli.output())
    assert len(killed.in_flight) == DEPTH
    assert killed.seconds_to_recover() < MAX_RECOVERY_SECONDS
    killed.assert_only_in_flight_repeated()
    repeated = {name for name, number in attempts(workspace).items() if number > 1}
    assert repeated == killed.in_flight
    assert set(attempts(workspace).values()) == {1, 2}
    assert_finalized_like(workspace, undisturbed)


def test_signals_lose_no_chunks_and_count_no_attempts(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    graceful = stop(workspace, 5, 1)
    assert len(graceful.in_flight) == DEPTH
    assert workspace.done().keys() == graceful.done.keys() | graceful.in_flight
    assert set(used_attempts(workspace).values()) == {0}

    immediate = stop(workspace, 10, 2)
    assert len(immediate.in_flight) == DEPTH
    assert workspace.done() == immediate.done
    assert workspace.counts() == TaskCounts(queued=CHUNKS - len(immediate.done))
    assert set(used_attempts(workspace).values()) == {0}

    assert workspace.work().code == 0
    graceful.assert_commits_kept()
    immediate.assert_only_in_flight_repeated()
    assert set(attempts(workspace).values()) == {1}
    assert_finalized_like(workspace, undisturbed)


def stop(workspace: StandardWorkspace, after: int, signals: int) -> Snapshot:
    """Send signals to a worker with DEPTH chunks in flight. With one signal it finishes them."""
    hold = {"NET_HOLD": "forward", "NET_AFTER": str(after)}
    settings = '{"same_signal": 0}'
    with workspace.start(*ON_CPU, **hold, CHUNKQ_WORKER_SETTINGS=settings) as cli:
        wait_for_full_worker(workspace)
        stopped = Snapshot.now(workspace)
        cli.children()
        before = cli.output().count("in flight")
        for number in range(1, signals + 1):
            cli.process.send_signal(signal.SIGTERM)
            wait_until(
                lambda number=number: cli.output().count("in flight") == before + number,  # type: ignore[misc]
                f"message {number}",
            )
        if signals == 1:
            workspace.open_gate()
        assert cli.wait().code == 0
        cli.wait_for_children()
        assert len(cli.known) == 1
    shutil.rmtree(workspace.folder / "gate")
    return stopped


# ------------------------------------------------------- the end of the long scenarios


def test_chunks_of_a_killed_supervisor_are_run_again_within_half_a_minute(
    orphaned: Orphaned, undisturbed: StandardWorkspace
) -> None:
    assert orphaned.other.wait().code == 0
    workspace, snapshot = orphaned.workspace, orphaned.snapshot
    assert snapshot.seconds_to_recover() < MAX_RECOVERY_SECONDS
    snapshot.assert_only_in_flight_repeated()
    assert {n for n, number in attempts(workspace).items() if number == 2} == snapshot.in_flight
    assert set(attempts(workspace).values()) == {1, 2}
    assert_finalized_like(workspace, undisturbed)


def test_after_an_outage_of_twenty_seconds_the_same_processes_continue(
    stranded: Stranded, undisturbed: StandardWorkspace
) -> None:
    workspace, cli = stranded.workspace, stranded.cli
    wait_until(
        lambda: time.time() - stranded.snapshot.time > OUTAGE_SECONDS, "the end of the outage"
    )
    assert len(workspace.done()) < CHUNKS - 2
    stranded.server.start()
    restart = time.time()
    wait_until(
        lambda: len(workspace.done()) >= CHUNKS - 2,
        "the other worker has computed all other chunks",
    )
    assert time.time() - restart < MAX_RECOVERY_SECONDS
    wait_until(lambda: workspace.counts().queued == 0, "no task is queued")
    assert sorted(cli.children()) == sorted(stranded.processes)
    workspace.open_gate()
    assert cli.wait().code == 0
    assert cli.known == set(stranded.processes)
    # Expired leases are extended after an outage, so no task was reserved again.
    assert set(workspace.computed().values()) == {1}
    assert set(attempts(workspace).values()) == {1}
    assert_finalized_like(workspace, undisturbed)


# ------------------------------------------------- suspended workers and failing chunks


def test_a_worker_that_was_suspended_until_the_job_was_done_changes_no_byte(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "piece", "NET_AFTER": "4", "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with workspace.start(*ON_CPU, "--burst", **hold) as cli:
        suspended = wait_for_full_worker(workspace)
        os.kill(suspended, signal.SIGSTOP)
        snapshot = Snapshot.now(workspace)
        assert workspace.work(CHUNKQ_WORKER_SETTINGS=SHORT_LEASE).code == 0
        assert snapshot.seconds_to_recover() < MAX_RECOVERY_SECONDS
        assert_finalized_like(workspace, undisturbed)
        done, blocks = workspace.done(), workspace.done("finalize")
        workspace.open_gate()
        os.kill(suspended, signal.SIGCONT)
        assert cli.wait().code == 0
    assert len(snapshot.in_flight) == DEPTH
    # The suspended worker did compute its chunks: the network ran their patches twice.
    assert max(workspace.computed().values()) == 2
    snapshot.assert_only_in_flight_repeated()
    assert workspace.pieces() == []
    assert (workspace.done(), workspace.done("finalize")) == (done, blocks)
    assert_finalized_like(workspace, undisturbed)


def test_pieces_can_be_written_while_another_process_deletes_pieces_of_their_block(
    tmp_path: Path,
) -> None:
    ledger, end = Ledger(str(tmp_path / "out.zarr.chunkq"), "0a1b2c3d").item(0), threading.Event()

    def delete_pieces() -> None:
        while not end.wait(0.001):
            ledger.delete_pieces((0, 0))

    with ThreadPoolExecutor(1) as other:
        future = other.submit(delete_pieces)
        try:
            for _ in range(300):
                ledger.put_piece((0, 0), "own", [np.zeros(1)])
        finally:
            end.set()
        future.result()


def test_a_hung_chunk_ends_its_process_and_only_it_uses_an_attempt(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    # Load the network first, because that takes longer than this limit.
    hang = {"NET_HOLD": "forward", "NET_AFTER": "6", "TEST_PRELOAD": "1"}
    with workspace.start(*ON_CPU, "--burst", "--time-limit", "3s", **hang) as cli:
        wait_for_full_worker(workspace)
        hung = Snapshot.now(workspace)
        result = cli.wait()
    assert result.code == 0
    assert len(hung.in_flight) == DEPTH
    [line] = [line for line in result.messages if "infer chunk" in line]
    assert " 3 s" in line
    hung.assert_only_in_flight_repeated()
    repeated = [name for name, number in attempts(workspace).items() if number > 1]
    # Chunks that waited for the device use no attempt.
    assert 1 <= len(repeated) < DEPTH
    assert all(name in line for name in repeated)
    assert {attempts(workspace)[name] for name in repeated} == {2}
    assert_finalized_like(workspace, undisturbed)


def test_one_failing_chunk_can_be_retried_and_the_output_is_byte_identical(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    poison = workspace.folder / "poison"
    poison.touch()
    workspace.produce()
    with workspace.start(*ON_CPU, NET_POISON=str(poison)) as cli:
        wait_until(lambda: workspace.counts() == TaskCounts(failed=1), "one chunk has failed")
        output = cli.output()
        assert [f"attempt {n}" in output for n in range(1, MAX_ATTEMPTS + 2)] == [
            *[True] * MAX_ATTEMPTS,
            False,
        ]
        poisoned = Snapshot.now(workspace)
        assert len(poisoned.done) == CHUNKS - 1
        status = workspace.status()
        assert (status["done"], status["failed"], status["queued"]) == (CHUNKS - 1, 1, 0)
        [group] = status["failures"]
        assert group["message"] == "ArithmeticError: a poisonous voxel"
        assert group["chunks"] == ["1.2.2"]
        assert 'raise ArithmeticError("a poisonous voxel")' in group["traceback"]

        workspace.finalize().refused(3, ErrorCode.JOB_INCOMPLETE, "1.2.2")

        poison.unlink()
        assert re.match(r"1\b", workspace.call("retry", str(workspace.output)).ok().out)
        wait_until(lambda: workspace.counts() == TaskCounts(), "the queue is empty")
        assert stop_worker(cli).code == 0
    assert workspace.status()["failures"] == []
    poisoned.assert_commits_kept()
    # The workers complete every block, although the last contributor was late.
    assert workspace.done("finalize").keys() == undisturbed.done("finalize").keys()
    assert_finalized_like(workspace, undisturbed)


def test_a_network_that_fails_on_every_chunk_stops_the_worker_after_a_few(
    workspace: StandardWorkspace,
) -> None:
    broken = workspace.folder / "broken"
    broken.touch()
    workspace.produce()
    with workspace.start(*ON_CPU, NET_BROKEN=str(broken)) as cli:
        result = cli.wait()
        cli.wait_for_children()
    assert result.code == 1
    [line] = result.messages[1:]
    limit = WorkerSettings().same_failures_at_first
    assert limit <= int(re.search(r"out\.zarr: (\d+) ", line)[1]) < limit + DEPTH  # type: ignore[index]
    assert "ArithmeticError: broken for every chunk" in line
    assert "Traceback" not in result.err
    # Only chunks without patches succeed.
    assert [name for name in workspace.done() if workspace.patches()[name]] == []
    assert workspace.counts() == TaskCounts(queued=CHUNKS - len(workspace.done()))
    used = Counter(used_attempts(workspace).values())
    assert used.keys() == {0, 1}
    assert limit <= used[1] < limit + DEPTH
    [group] = workspace.status()["failures"]
    assert len(group["chunks"]) == used[1]


# -------------------------------------------------------------------- outages of Redis


def kill_and_restart(server: RedisServer) -> None:
    server.kill()
    server.start()


def freeze(server: RedisServer) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    # Longer than the timeout of clients, which repeat their requests.
    time.sleep(2.5)
    os.kill(server.pid, signal.SIGCONT)


OUTAGES = {"killed and restarted": kill_and_restart, "frozen": freeze}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES.keys())
def test_workers_survive_that_redis_is(
    workspace: StandardWorkspace,
    server: RedisServer,
    undisturbed: StandardWorkspace,
    outage: Callable[[RedisServer], None],
) -> None:
    workspace.produce()
    short_timeout = {"CHUNKQ_WORKER_SETTINGS": '{"server_answer": 1, "lease": 3}'}
    with workspace.start(
        *ON_CPU, "--burst", NET_HOLD="forward", NET_AFTER="6", **short_timeout
    ) as cli:
        wait_for_full_worker(workspace)
        disturbed = Snapshot.now(workspace)
        workspace.open_gate()
        outage(server)
        assert cli.wait().code == 0
    assert len(disturbed.in_flight) == DEPTH
    assert disturbed.seconds_to_recover() < MAX_RECOVERY_SECONDS
    assert len(workspace.done()) == CHUNKS
    # Every process has a unique name, so none was restarted.
    assert len({record["worker"] for record in records(workspace).values()}) == 1
    assert set(workspace.computed().values()) == {1}
    assert_finalized_like(workspace, undisturbed)


def test_the_first_worker_after_an_outage_cannot_reserve_running_tasks_of_others(
    server: RedisServer,
) -> None:
    workers = {
        name: WorkerOptions(name, settings=WorkerSettings(lease=0.5))
        for name in ("first", "second")
    }
    job = JobId("/data/out.zarr.chunkq", "0a1b2c3d")
    with queue_on(server) as queue:
        queue.submit(Task("infer", *job, 0, (n,)) for n in range(2))
        leases = {name: queue.reserve(worker) for name, worker in workers.items()}
        assert None not in leases.values()
        server.kill()
        outage = time.time()
        wait_until(lambda: time.time() - outage > 1, "the leases expire")
        server.start()
        # After the outage one worker renews its lease before the other one.
        queue.renew(workers["first"], [leases["first"]])  # type: ignore[list-item]
        assert queue.reserve(workers["first"]) is None
        queue.renew(workers["second"], [leases["second"]])  # type: ignore[list-item]
        assert queue.counts(job) == TaskCounts(running=2)


@contextmanager
def queue_on(server: RedisServer) -> Iterator[LeaseQueue]:
    queue = RqExecutor(server.url)
    yield queue
    queue.close()


def test_after_redis_was_flushed_resume_completes_the_job_and_its_blocks(
    workspace: StandardWorkspace, server: RedisServer, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    with workspace.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="8") as cli:
        wait_for_full_worker(workspace)
        wiped = Snapshot.now(workspace)
        with server.client as client:
            client.flushall()
        resumed = workspace.produce("--resume")
        assert f"{len(wiped.done)} done, {CHUNKS - len(wiped.done)} newly queued" in resumed.out
        workspace.open_gate()
        wait_for_all(workspace)
        wait_until(lambda: workspace.counts() == TaskCounts(), "the queue is empty")
        assert len(wiped.in_flight) == DEPTH
        wiped.assert_only_in_flight_repeated()

        # The contributions to blocks were deleted, too.
        blocks = undisturbed.done("finalize").keys()
        before = workspace.done("finalize")
        assert before.keys() < blocks
        result = workspace.call("finalize", str(workspace.output), "--distribute")
        assert result.code == 0, result.err
        after = workspace.done("finalize")
        assert after.keys() == blocks
        assert {name: after[name] for name in before} == before
        [worker] = {record["worker"] for record in records(workspace).values()}
        assert {record["worker"] for record in records(workspace, "finalize").values()} == {worker}
        assert stop_worker(cli).code == 0
    assert_finalized_like(workspace, undisturbed)


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
    assert remaining_keys(workspace) == []
    assert_finalized_like(workspace, undisturbed)
    assert workspace.done("finalize") == blocks
    assert set(workspace.computed().values()) == {1}


def test_finalize_completes_the_blocks_of_a_contributor_that_was_killed(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    workspace.produce()
    hold = {"NET_HOLD": "block", "NET_AFTER": "12"}
    with workspace.start(*ON_CPU, "--burst", **hold) as cli:
        pid = workspace.wait_until_stopped()
        killed = Snapshot.now(workspace)
        blocks = workspace.done("finalize")
        os.kill(pid, signal.SIGKILL)
        assert cli.wait().code == 0
    assert len(workspace.done()) == CHUNKS
    killed.assert_commits_kept()
    missing = undisturbed.done("finalize").keys() - workspace.done("finalize").keys()
    assert 1 <= len(missing) <= 2 * DEPTH
    assert {path.parent.name for path in workspace.pieces()} == missing
    assert_finalized_like(workspace, undisturbed)
    after = records(workspace, "finalize")
    assert {name for name in after if ":" not in after[name]["worker"]} == missing
    assert {name: workspace.done("finalize")[name] for name in blocks} == blocks


def test_on_the_embedded_queue_all_blocks_are_complete_after_the_last_chunk(
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
        assert database.execute("SELECT count(*) FROM contributions").fetchone() == (0,)
    database.close()


def test_distribute_completes_blocks_that_the_embedded_queue_has_lost(
    standard_job: StandardJob, tmp_path: Path, undisturbed: StandardWorkspace
) -> None:
    workspace = standard_job.workspace(tmp_path)
    workspace.produce()
    blocks = undisturbed.done("finalize").keys()
    with workspace.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="8") as cli:
        workspace.wait_until_stopped()
        with sqlite3.connect(tmp_path / "queue.db") as database:
            database.execute("DELETE FROM contributions")
        database.close()
        workspace.open_gate()
        wait_for_all(workspace)
        wait_until(lambda: workspace.counts() == TaskCounts(), "the queue is empty")
        before = workspace.done("finalize")
        assert before.keys() < blocks
        result = workspace.call("finalize", str(workspace.output), "--distribute")
        assert result.code == 0, result.err
        assert stop_worker(cli).code == 0
    [worker] = {record["worker"] for record in records(workspace).values()}
    assert {record["worker"] for record in records(workspace, "finalize").values()} == {worker}
    after = workspace.done("finalize")
    assert after.keys() == blocks
    assert {name: after[name] for name in before} == before
    assert workspace.pieces() == []
    assert_same_bytes(workspace, undisturbed)


# ----------------------------------------------------------------------- jobs side by side


def test_two_jobs_on_one_redis_are_independent(
    standard_job: StandardJob,
    tmp_path: Path,
    server: RedisServer,
    workspace: StandardWorkspace,
    undisturbed: StandardWorkspace,
) -> None:
    (tmp_path / "other").mkdir()
    labels = standard_job.workspace(tmp_path / "other", {"combine": "soft"}, server.url)
    for one in (workspace, labels):
        one.produce()
    assert workspace.call("cancel", str(workspace.output)).out.startswith(f"{CHUNKS} ")
    assert (workspace.counts(), labels.counts()) == (TaskCounts(), TaskCounts(queued=CHUNKS))
    workspace.produce("--resume")

    assert labels.work("--job", str(labels.output)).code == 0
    assert len(labels.done()) == CHUNKS
    assert workspace.done() == {}
    assert workspace.counts() == TaskCounts(queued=CHUNKS)
    assert set(used_attempts(workspace).values()) == {0}

    assert workspace.work().code == 0
    labels.finalize().ok()
    assert_finalized_like(workspace, undisturbed)
    # Each label is the class with the largest average, which the other job stores.
    assert np.array_equal(voxels(labels), voxels(undisturbed).argmax(0))
    assert labels.done("finalize").keys() == undisturbed.done("finalize").keys()
    assert labels.pieces() == []


def voxels(workspace: StandardWorkspace) -> npt.NDArray[Any]:
    return np.asarray(zarr.open_array(workspace.output / "0", mode="r")[:])
