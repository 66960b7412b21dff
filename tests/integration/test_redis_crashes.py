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
import redis
import zarr

from chunkq.executors.base import MAX_ATTEMPTS, Counts, Shift
from chunkq.executors.leases import LeaseQueue
from chunkq.executors.rq import RqExecutor
from chunkq.executors.settings import WorkerSettings
from chunkq.ledger import JobFolder
from chunkq.tasks import Task, chunk_name, job_key
from tests.integration.support import Crew, Ended, Materials, Place, calm_place, materials
from tests.redis_server import RedisServer, redis_server
from tests.waiting import wait_until

CHUNKS = 24
DEPTH = 4
ON_CPU = ("work", "--gpus", "none", "--depth", str(DEPTH))
SHORT_LEASE = '{"lease": 1}'
"""Seconds; the real one is longer than most tests should be."""
RECOVERED_WITHIN = 30.0
ABSENCE = 20.0
"""Seconds for which Redis is away; the length of a lease."""


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The job done by one worker to which nothing happened, on the embedded queue."""
    return calm_place(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return materials(tmp_path_factory.mktemp)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis of the test's own, to be killed as it likes."""
    with redis_server() as running:
        yield running


@pytest.fixture
def place(shared: Materials, tmp_path: Path, server: RedisServer) -> Place:
    return Place(shared, tmp_path, url=server.url)


def assert_same_bytes(place: Place, calm: Place) -> None:
    """Compare every file of the output."""
    found, expected = place.stored(), calm.stored()
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def assert_ends_like(place: Place, calm: Place) -> None:
    """Finalize, and compare every file of the output; the queue must have forgotten the job."""
    place.finish()
    status = place.status()
    assert status["sealed"]
    assert status["failures"] == []
    assert len(place.done()) == CHUNKS
    assert_same_bytes(place, calm)
    assert place.pieces() == []
    assert left_in_redis(place) == []


def left_in_redis(place: Place) -> list[str]:
    """Every key that names the job, where something is left of it on the queue."""
    key = job_key(str(place.job_folder))
    with redis.Redis.from_url(place.queue_url) as client:
        names = [name.decode() for name in client.keys(f"*{key}*")]
        return sorted(names + [n.decode() for n in client.zrange("chunkq:queues", 0, -1)])


def begun(place: Place) -> dict[str, int]:
    """How often each task still on the queue was begun, by chunk name."""
    found = {}
    with redis.Redis.from_url(place.queue_url) as client:
        for key in client.keys(f"rq:job:{job_key(str(place.job_folder))}-infer-*"):
            left, status = client.hmget(key, "retries_left", "status")
            name = key.decode().rpartition("-")[2].replace("_", ".")
            found[name] = MAX_ATTEMPTS - 1 - int(left) + (status != b"queued")
    return found


def records(place: Place, kind: str = "infer") -> dict[str, dict[str, Any]]:
    """The commit records by chunk name."""
    return {name: json.loads(content) for name, (content, _) in place.done(kind).items()}


def attempts(place: Place) -> dict[str, int]:
    return {name: record["attempt"] for name, record in records(place).items()}


def in_hand(place: Place) -> set[str]:
    """The chunks in flight now."""
    return {chunk_name(item.task.chunk) for item in place.running()}


@dataclass(frozen=True)
class Disturbance:
    """What was done and what was in flight at the moment of a disturbance."""

    place: Place
    when: float
    done: dict[str, tuple[bytes, int]]
    computed: Counter[int]
    in_flight: frozenset[str]

    @classmethod
    def now(cls, place: Place) -> "Disturbance":
        done = place.done()
        in_flight = frozenset(in_hand(place)) - done.keys()
        return cls(place, time.time(), done, place.computed(), in_flight)

    def cost_nothing_done(self) -> None:
        """Assert that what was committed is untouched, and none of its patches was run since."""
        after, computed, patches = self.place.done(), self.place.computed(), self.place.patches()
        assert {name: after[name] for name in self.done} == self.done
        mine = {crc for name in self.done for crc in patches[name]}
        assert {crc: computed[crc] for crc in mine} == {crc: self.computed[crc] for crc in mine}

    def cost_only_what_was_in_flight(self) -> None:
        """Assert besides that nothing else was run twice either."""
        self.cost_nothing_done()
        computed, patches = self.place.computed(), self.place.patches()
        assert computed.keys() == set().union(*patches.values())
        twice = {name for name, own in patches.items() if any(computed[crc] > 1 for crc in own)}
        assert twice <= self.in_flight

    def seconds_to_recover(self) -> float:
        """From the disturbance until the first chunk that was in flight was committed."""
        done = self.place.done()
        return min(done[name][1] for name in self.in_flight) / 1e9 - self.when


def hold_with_full_hands(place: Place) -> int:
    """Wait until a worker stands at the gate and has all it may in flight; returns its id."""
    holder = place.held()
    wait_until(lambda: len(in_hand(place) - place.done().keys()) == DEPTH, "its hands are full")
    return holder


def told_to_stop(crew: Crew) -> Ended:
    crew.children()
    crew.process.send_signal(signal.SIGTERM)
    return crew.ended()


def wait_for_all(place: Place) -> None:
    wait_until(lambda: len(place.done()) == CHUNKS, "all chunks are done")


# --------------------------------------- two long stories, which go on behind the other tests


@dataclass(frozen=True)
class Orphaned:
    """Four chunks whose supervisor was killed together with its child, and another worker."""

    place: Place
    disturbance: Disturbance
    killed: Ended
    heirs: Crew


@pytest.fixture(scope="module")
def orphaned(shared: Materials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orphaned]:
    with redis_server() as server:
        place = Place(shared, tmp_path_factory.mktemp("orphaned"), url=server.url)
        place.produce()
        with place.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="4") as crew:
            hold_with_full_hands(place)
            before = Disturbance.now(place)
            crew.children()
            with place.start(*ON_CPU, "--burst") as heirs:
                wait_until(lambda: len(in_hand(place)) > DEPTH, "another worker is there")
                crew.process.kill()
                disturbance = replace(before, when=time.time())
                killed = crew.ended()
                crew.leaves_nothing_behind()
                yield Orphaned(place, disturbance, killed, heirs)


@dataclass(frozen=True)
class Stranded:
    """Two workers, one of them in the middle of a chunk, whose Redis is gone."""

    place: Place
    server: RedisServer
    crew: Crew
    processes: list[int]
    disturbance: Disturbance


@pytest.fixture(scope="module")
def stranded(shared: Materials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranded]:
    with redis_server() as server:
        place = Place(shared, tmp_path_factory.mktemp("stranded"), url=server.url)
        place.produce()
        command = ("work", "--gpus", "none", "--depth", "2", "-w", "2", "--burst")
        slowly = {"NET_HOLD": "forward", "NET_AFTER": "3", "NET_SLEEP": "0.1"}
        with place.start(*command, **slowly) as crew:
            place.held()
            wait_until(lambda: len(place.running()) == 4, "both workers are busy")
            disturbance = Disturbance.now(place)
            server.kill()
            yield Stranded(place, server, crew, crew.children(), disturbance)


def test_no_child_outlives_a_killed_supervisor(orphaned: Orphaned) -> None:
    assert orphaned.killed.code == -signal.SIGKILL
    assert len(orphaned.disturbance.in_flight) == DEPTH
    assert orphaned.disturbance.in_flight <= in_hand(orphaned.place)


def test_while_redis_is_away_workers_finish_what_they_have_and_wait(stranded: Stranded) -> None:
    disturbance = stranded.disturbance
    # One worker stands still, the other one goes on.
    assert len(disturbance.in_flight) > 2
    wait_until(lambda: disturbance.in_flight & stranded.place.done().keys(), "one of them commits")
    assert stranded.crew.process.poll() is None
    assert sorted(stranded.crew.children()) == sorted(stranded.processes)


# ---------------------------------------------------------------------------- dead workers


def test_a_worker_killed_with_four_chunks_in_flight_is_replaced_and_they_are_handed_back(
    place: Place, calm: Place
) -> None:
    place.produce()
    hold = {"NET_HOLD": "forward", "NET_AFTER": "6"}
    with place.start(*ON_CPU, "--burst", **hold) as crew:
        victim = hold_with_full_hands(place)
        killed = Disturbance.now(place)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "chunks handed back" in crew.says(), "they are handed back")
        # Well before the lease ends.
        assert time.time() - killed.when < 10
        assert crew.ended().code == 0
    assert f"was killed by signal 9; {DEPTH} chunks handed back" in crew.says()
    assert len(killed.in_flight) == DEPTH
    assert killed.seconds_to_recover() < RECOVERED_WITHIN
    killed.cost_only_what_was_in_flight()
    again = {name for name, number in attempts(place).items() if number > 1}
    assert again == killed.in_flight
    assert set(attempts(place).values()) == {1, 2}
    assert_ends_like(place, calm)


def test_signals_lose_nothing_and_cost_no_attempt(place: Place, calm: Place) -> None:
    place.produce()
    politely = stop(place, 5, 1)
    assert len(politely.in_flight) == DEPTH
    assert place.done().keys() == politely.done.keys() | politely.in_flight
    assert set(begun(place).values()) == {0}

    at_once = stop(place, 10, 2)
    assert len(at_once.in_flight) == DEPTH
    assert place.done() == at_once.done
    assert place.counts() == Counts(queued=CHUNKS - len(at_once.done))
    assert set(begun(place).values()) == {0}

    assert place.work().code == 0
    politely.cost_nothing_done()
    at_once.cost_only_what_was_in_flight()
    assert set(attempts(place).values()) == {1}
    assert_ends_like(place, calm)


def stop(place: Place, after: int, signals: int) -> Disturbance:
    """Send a worker with its hands full so many signals; one signal lets it finish."""
    says = ["stopping: chunks in flight are finished first", "handing back what is in flight"]
    with place.start(*ON_CPU, NET_HOLD="forward", NET_AFTER=str(after)) as crew:
        hold_with_full_hands(place)
        stopped = Disturbance.now(place)
        crew.children()
        for line in says[:signals]:
            crew.process.send_signal(signal.SIGTERM)
            wait_until(lambda line=line: line in crew.says(), line)  # type: ignore[misc]
        if signals == 1:
            place.open_gate()
        assert crew.ended().code == 0
        crew.leaves_nothing_behind()
        assert len(crew.known) == 1
    shutil.rmtree(place.folder / "gate")
    return stopped


# ----------------------- how the long stories end, long before workers give Redis up


def test_chunks_of_a_killed_supervisor_are_taken_over_within_half_a_minute(
    orphaned: Orphaned, calm: Place
) -> None:
    assert orphaned.heirs.ended().code == 0
    place, disturbance = orphaned.place, orphaned.disturbance
    assert disturbance.seconds_to_recover() < RECOVERED_WITHIN
    disturbance.cost_only_what_was_in_flight()
    assert {n for n, number in attempts(place).items() if number == 2} == disturbance.in_flight
    assert set(attempts(place).values()) == {1, 2}
    assert_ends_like(place, calm)


def test_after_redis_was_away_for_twenty_seconds_the_same_processes_go_on(
    stranded: Stranded, calm: Place
) -> None:
    place, crew = stranded.place, stranded.crew
    wait_until(lambda: time.time() - stranded.disturbance.when > ABSENCE, "that time is over")
    assert len(place.done()) < CHUNKS - 2
    stranded.server.start()
    back = time.time()
    wait_until(lambda: len(place.done()) >= CHUNKS - 2, "the other worker has done all it can")
    assert time.time() - back < RECOVERED_WITHIN
    wait_until(lambda: place.counts().queued == 0, "nothing waits")
    assert sorted(crew.children()) == sorted(stranded.processes)
    place.open_gate()
    assert crew.ended().code == 0
    assert crew.known == set(stranded.processes)
    # Leases ran out meanwhile, and nobody used that: who held them could not renew them.
    assert set(place.computed().values()) == {1}
    assert set(attempts(place).values()) == {1}
    assert_ends_like(place, calm)


# ------------------------------------------------------------- zombies and bad chunks


def test_a_worker_that_wakes_up_after_others_finished_everything_changes_no_byte(
    place: Place, calm: Place
) -> None:
    place.produce()
    hold = {"NET_HOLD": "piece", "NET_AFTER": "4", "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with place.start(*ON_CPU, "--burst", **hold) as crew:
        sleeper = hold_with_full_hands(place)
        os.kill(sleeper, signal.SIGSTOP)
        asleep = Disturbance.now(place)
        assert place.work(CHUNKQ_WORKER_SETTINGS=SHORT_LEASE).code == 0
        assert asleep.seconds_to_recover() < RECOVERED_WITHIN
        assert_ends_like(place, calm)
        done, blocks = place.done(), place.done("finalize")
        place.open_gate()
        os.kill(sleeper, signal.SIGCONT)
        assert crew.ended().code == 0
    assert len(asleep.in_flight) == DEPTH
    # It really did compute and write: the network saw its chunks' patches twice.
    assert max(place.computed().values()) == 2
    asleep.cost_only_what_was_in_flight()
    assert place.pieces() == []
    assert (place.done(), place.done("finalize")) == (done, blocks)
    assert_ends_like(place, calm)


def test_pieces_can_be_written_while_another_tidies_up_after_their_block(tmp_path: Path) -> None:
    folder, over = JobFolder(str(tmp_path / "out.zarr.chunkq")), threading.Event()

    def tidy_up() -> None:
        while not over.wait(0.001):
            folder.delete_pieces((0, 0))

    with ThreadPoolExecutor(1) as other:
        tidying = other.submit(tidy_up)
        try:
            for _ in range(300):
                folder.put_piece((0, 0), "own", [np.zeros(1)])
        finally:
            over.set()
        tidying.result()


def test_a_hung_chunk_ends_its_process_and_only_it_has_used_up_an_attempt(
    place: Place, calm: Place
) -> None:
    place.produce()
    # Loading the network takes longer than this limit, and is not what this is about.
    hang = {"NET_HOLD": "forward", "NET_AFTER": "6", "TEST_PRELOAD": "1"}
    with place.start(*ON_CPU, "--burst", "--time-limit", "3s", **hang) as crew:
        hold_with_full_hands(place)
        hung = Disturbance.now(place)
        ended = crew.ended()
    assert ended.code == 0
    assert len(hung.in_flight) == DEPTH
    assert "was ended because it hung" in ended.err
    [line] = [line for line in ended.complaints if "ran for more than its time limit" in line]
    assert "infer chunk" in line
    hung.cost_only_what_was_in_flight()
    again = [name for name, number in attempts(place).items() if number > 1]
    # Those that merely waited for the device cannot be blamed.
    assert 1 <= len(again) < DEPTH
    assert all(name in line for name in again)
    assert {attempts(place)[name] for name in again} == {2}
    assert_ends_like(place, calm)


def test_a_poisonous_chunk_fails_alone_and_after_mending_the_bytes_are_the_same(
    place: Place, calm: Place
) -> None:
    poison = place.folder / "poison"
    poison.touch()
    place.produce()
    with place.start(*ON_CPU, NET_POISON=str(poison)) as crew:
        wait_until(lambda: place.counts() == Counts(failed=1), "one chunk has failed")
        said = crew.says()
        assert [f"attempt {n}" in said for n in range(1, MAX_ATTEMPTS + 2)] == [
            *[True] * MAX_ATTEMPTS,
            False,
        ]
        poisoned = Disturbance.now(place)
        assert len(poisoned.done) == CHUNKS - 1
        status = place.status()
        assert (status["done"], status["failed"], status["queued"]) == (CHUNKS - 1, 1, 0)
        [group] = status["failures"]
        assert group["message"] == "ArithmeticError: a poisonous voxel"
        assert group["chunks"] == ["1.2.2"]
        assert 'raise ArithmeticError("a poisonous voxel")' in group["traceback"]

        refused = place.finalize()
        assert refused.code == 3
        assert refused.complaints == ["chunkq: 1 chunks are not computed yet: 1.2.2"]

        poison.unlink()
        assert place.command("retry", str(place.output)).out == "1 chunks queued again\n"
        wait_until(lambda: place.counts() == Counts(), "the queue is empty")
        assert told_to_stop(crew).code == 0
    assert place.status()["failures"] == []
    poisoned.cost_nothing_done()
    # The last contributor came late: the workers have completed every block all the same.
    assert place.done("finalize").keys() == calm.done("finalize").keys()
    assert_ends_like(place, calm)


def test_a_network_that_fails_on_every_chunk_stops_the_worker_after_a_few(place: Place) -> None:
    broken = place.folder / "broken"
    broken.touch()
    place.produce()
    with place.start(*ON_CPU, NET_BROKEN=str(broken)) as crew:
        ended = crew.ended()
        crew.leaves_nothing_behind()
    assert ended.code == 1
    [line] = ended.complaints[1:]
    assert "chunks in a row failed alike" in line
    assert "ArithmeticError: broken for every chunk" in line
    assert "Traceback" not in ended.err
    # Chunks that own no patch run no network.
    assert [name for name in place.done() if place.patches()[name]] == []
    assert place.counts() == Counts(queued=CHUNKS - len(place.done()))
    spent = Counter(begun(place).values())
    assert spent.keys() == {0, 1}
    enough = WorkerSettings().same_failures_at_first
    assert enough <= spent[1] < enough + DEPTH
    [group] = place.status()["failures"]
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
    place: Place, server: RedisServer, calm: Place, disturb: Callable[[RedisServer], None]
) -> None:
    place.produce()
    impatient = {"CHUNKQ_WORKER_SETTINGS": '{"server_answer": 1, "lease": 3}'}
    with place.start(*ON_CPU, "--burst", NET_HOLD="forward", NET_AFTER="6", **impatient) as crew:
        hold_with_full_hands(place)
        disturbed = Disturbance.now(place)
        place.open_gate()
        disturb(server)
        assert crew.ended().code == 0
    assert len(disturbed.in_flight) == DEPTH
    assert disturbed.seconds_to_recover() < RECOVERED_WITHIN
    assert len(place.done()) == CHUNKS
    # One name means one process: every new one gets a name of its own.
    assert len({record["worker"] for record in records(place).values()}) == 1
    assert set(place.computed().values()) == {1}
    assert_ends_like(place, calm)


def test_a_worker_that_is_back_first_does_not_take_what_others_still_work_on(
    server: RedisServer,
) -> None:
    workers = {
        name: Shift(name, settings=WorkerSettings(lease=0.5)) for name in ("first", "second")
    }
    job = "/data/out.zarr.chunkq"
    with queue_on(server) as queue:
        queue.submit(Task("infer", job, (n,)) for n in range(2))
        held = {name: queue.take(worker) for name, worker in workers.items()}
        assert None not in held.values()
        server.kill()
        away = time.time()
        wait_until(lambda: time.time() - away > 1, "the leases ran out")
        server.start()
        # The first beat of a heart after the absence comes from one of them; the other is asleep.
        queue.renew(workers["first"], [held["first"]])  # type: ignore[list-item]
        assert queue.take(workers["first"]) is None
        queue.renew(workers["second"], [held["second"]])  # type: ignore[list-item]
        assert queue.counts(job) == Counts(running=2)


@contextmanager
def queue_on(server: RedisServer) -> Iterator[LeaseQueue]:
    queue = RqExecutor(server.url)
    yield queue
    queue.close()


def test_after_redis_was_wiped_resuming_completes_the_job_and_workers_what_blocks_are_left(
    place: Place, server: RedisServer, calm: Place
) -> None:
    place.produce()
    with place.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="8") as crew:
        hold_with_full_hands(place)
        wiped = Disturbance.now(place)
        with server.client as client:
            client.flushall()
        resumed = place.produce("--resume")
        assert f"{len(wiped.done)} done, {CHUNKS - len(wiped.done)} newly queued" in resumed.out
        place.open_gate()
        wait_for_all(place)
        wait_until(lambda: place.counts() == Counts(), "the queue is empty")
        assert len(wiped.in_flight) == DEPTH
        wiped.cost_only_what_was_in_flight()

        # Who had contributed to which block was forgotten with all else.
        blocks = calm.done("finalize").keys()
        before = place.done("finalize")
        assert before.keys() < blocks
        ended = place.command("finalize", str(place.output), "--distribute")
        assert ended.code == 0, ended.err
        after = place.done("finalize")
        assert after.keys() == blocks
        assert {name: after[name] for name in before} == before
        [worker] = {record["worker"] for record in records(place).values()}
        assert {record["worker"] for record in records(place, "finalize").values()} == {worker}
        assert told_to_stop(crew).code == 0
    assert_ends_like(place, calm)


# ------------------------------------------------------------------- completing the blocks


def test_when_the_last_chunk_is_committed_all_blocks_are_complete(
    place: Place, calm: Place
) -> None:
    place.produce()
    assert place.work("-w", "2").code == 0
    assert place.done("finalize").keys() == calm.done("finalize").keys()
    assert len(place.done("finalize")) > CHUNKS / 2
    blocks = place.done("finalize")
    assert place.pieces() == []
    assert left_in_redis(place) == []
    assert_ends_like(place, calm)
    assert place.done("finalize") == blocks
    assert set(place.computed().values()) == {1}


def test_a_block_whose_last_contributor_died_before_it_was_complete_is_left_to_finalize(
    place: Place, calm: Place
) -> None:
    place.produce()
    hold = {"NET_HOLD": "block", "NET_AFTER": "12"}
    with place.start(*ON_CPU, "--burst", **hold) as crew:
        victim = place.held()
        killed = Disturbance.now(place)
        blocks = place.done("finalize")
        os.kill(victim, signal.SIGKILL)
        assert crew.ended().code == 0
    assert len(place.done()) == CHUNKS
    killed.cost_nothing_done()
    left = calm.done("finalize").keys() - place.done("finalize").keys()
    assert 1 <= len(left) <= 2 * DEPTH
    assert {path.parent.name for path in place.pieces()} == left
    assert_ends_like(place, calm)
    after = records(place, "finalize")
    assert {name for name in after if ":" not in after[name]["worker"]} == left
    assert {name: place.done("finalize")[name] for name in blocks} == blocks


def test_on_the_embedded_queue_too_all_blocks_are_complete_after_the_last_chunk(
    shared: Materials, tmp_path: Path, calm: Place
) -> None:
    place = Place(shared, tmp_path)
    place.produce()
    assert place.work("-w", "2").code == 0
    assert place.done("finalize").keys() == calm.done("finalize").keys()
    assert place.pieces() == []
    place.finish()
    assert_same_bytes(place, calm)
    with sqlite3.connect(tmp_path / "queue.db") as database:
        assert database.execute("SELECT count(*) FROM blocks").fetchone() == (0,)
    database.close()


def test_workers_complete_the_blocks_that_the_embedded_queue_knew_nothing_of_when_asked(
    shared: Materials, tmp_path: Path, calm: Place
) -> None:
    place = Place(shared, tmp_path)
    place.produce()
    blocks = calm.done("finalize").keys()
    with place.start(*ON_CPU, NET_HOLD="forward", NET_AFTER="8") as crew:
        place.held()
        with sqlite3.connect(tmp_path / "queue.db") as database:
            database.execute("DELETE FROM blocks")
        database.close()
        place.open_gate()
        wait_for_all(place)
        wait_until(lambda: place.counts() == Counts(), "the queue is empty")
        before = place.done("finalize")
        assert before.keys() < blocks
        ended = place.command("finalize", str(place.output), "--distribute")
        assert ended.code == 0, ended.err
        assert told_to_stop(crew).code == 0
    [worker] = {record["worker"] for record in records(place).values()}
    assert {record["worker"] for record in records(place, "finalize").values()} == {worker}
    after = place.done("finalize")
    assert after.keys() == blocks
    assert {name: after[name] for name in before} == before
    assert place.pieces() == []
    assert_same_bytes(place, calm)


# ----------------------------------------------------------------------- jobs side by side


def test_two_jobs_on_one_redis_leave_each_other_alone(
    shared: Materials, tmp_path: Path, server: RedisServer, place: Place, calm: Place
) -> None:
    (tmp_path / "other").mkdir()
    labels = Place(shared, tmp_path / "other", {"combine": "soft"}, server.url)
    for each in (place, labels):
        each.produce()
    assert place.command("cancel", str(place.output)).out.startswith(f"{CHUNKS} chunks taken off")
    assert (place.counts(), labels.counts()) == (Counts(), Counts(queued=CHUNKS))
    place.produce("--resume")

    assert labels.work("--job", str(labels.output)).code == 0
    assert len(labels.done()) == CHUNKS
    assert place.done() == {}
    assert place.counts() == Counts(queued=CHUNKS)
    assert set(begun(place).values()) == {0}

    assert place.work().code == 0
    labels.finish()
    assert_ends_like(place, calm)
    # Each label is the class whose average, which the other job stores, is the largest.
    assert np.array_equal(voxels(labels), voxels(calm).argmax(0))
    assert labels.done("finalize").keys() == calm.done("finalize").keys()
    assert labels.pieces() == []


def voxels(place: Place) -> npt.NDArray[Any]:
    return np.asarray(zarr.open_array(place.output / "0", mode="r")[:])
