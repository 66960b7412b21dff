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
from tests.integration.support import POISONOUS, Ended, Materials, Place, calm_place, materials
from tests.waiting import wait_until

CHUNKS = 24
PATCHES = 5 * 8 * 9
DEPTH = 2
ON_CPU = ("work", "--gpus", "none", "--depth", str(DEPTH))
SHORT_LEASE = '{"lease": 1}'
"""Seconds; the real one is longer than a test should be."""


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The job done by one worker to which nothing happened."""
    return calm_place(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return materials(tmp_path_factory.mktemp)


@pytest.fixture
def place(shared: Materials, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def assert_same_bytes(place: Place, calm: Place) -> None:
    """Compare every file of the output."""
    found, expected = place.stored(), calm.stored()
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def assert_ends_like(place: Place, calm: Place) -> None:
    """Finalize, and compare every file of the output."""
    place.finish()
    assert place.status()["sealed"]
    assert_same_bytes(place, calm)
    assert place.pieces() == []


@dataclass(frozen=True)
class Done:
    """The commit records at one moment, and how often each patch had been computed by then."""

    records: dict[str, tuple[bytes, int]]
    computed: Counter[int]

    @classmethod
    def so_far(cls, place: Place) -> "Done":
        records = place.done()
        return cls(records, place.computed())

    def was_left_alone_in(self, place: Place) -> None:
        """Assert that these records are untouched, and none of their patches was run since."""
        after, computed, patches = place.done(), place.computed(), place.patches()
        assert {name: after[name] for name in self.records} == self.records
        mine = {crc for name in self.records for crc in patches[name]}
        assert {crc: computed[crc] for crc in mine} == {crc: self.computed[crc] for crc in mine}


# -------------------------------------------------------------------------------- any crew


def test_one_calm_worker_computes_every_patch_exactly_once(calm: Place) -> None:
    patches = calm.patches()
    assert len(patches) == CHUNKS
    every = set().union(*patches.values())
    # All patches differ, so that each can be told by its content.
    assert len(every) == sum(map(len, patches.values())) == PATCHES
    assert calm.computed() == dict.fromkeys(every, 1)


def test_two_workers_give_the_same_bytes_as_one(place: Place, calm: Place) -> None:
    place.produce()
    assert place.work("-w", "2", "--depth", "3").code == 0
    assert_ends_like(place, calm)
    assert len(place.report()["workers"]) == 2
    assert set(place.computed().values()) == {1}


def test_a_chunk_is_read_one_computed_and_one_written_where_nobody_gives_a_depth(
    place: Place, calm: Place
) -> None:
    place.produce()
    with place.start("work", "--burst", "--gpus", "none", "-w", "1", NET_HOLD="forward") as crew:
        place.held()
        place.wait_for_full_hands(3)
        place.open_gate()
        assert crew.ended().code == 0
    place.finish()
    assert place.stored() == calm.stored()


def test_the_order_of_the_chunks_does_not_show_in_the_bytes(place: Place, calm: Place) -> None:
    place.produce()
    order = list(place.job.plan.indices())
    random.Random(1).shuffle(order)
    with place.queue() as queue:
        queue.cancel(str(place.job_folder))
        queue.submit(Task("infer", str(place.job_folder), index) for index in order)
    assert place.work("--depth", "1").code == 0
    times = {name: moment for name, (_, moment) in place.done().items()}
    assert sorted(times, key=times.__getitem__) == [".".join(map(str, i)) for i in order]
    assert_ends_like(place, calm)


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
    place: Place, calm: Place, moment: Moment
) -> None:
    place.produce()
    hold = {"NET_HOLD": moment.reach, "NET_AFTER": str(moment.after)}
    with place.start(*ON_CPU, "--burst", "-w", str(moment.workers), **hold) as crew:
        victim = place.held()
        if moment.full_hands:
            place.wait_for_full_hands(DEPTH)
        os.kill(victim, signal.SIGKILL)
        before = Done.so_far(place)
        assert crew.ended().code == 0
        said = crew.says()
    handed_back = re.search(r"was killed by signal 9; (\d) chunks handed back", said)
    assert handed_back is not None, said
    assert int(handed_back[1]) == DEPTH or not moment.full_hands
    assert len(before.records) >= moment.after
    before.was_left_alone_in(place)

    again = {name for name in place.done() if place.record(name)["attempt"] > 1}
    assert 1 <= len(again) <= int(handed_back[1])
    assert {place.record(name)["attempt"] for name in again} == {2}
    patches, computed = place.patches(), place.computed()
    twice = {crc for crc, times in computed.items() if times > 1}
    assert computed.keys() == set().union(*patches.values())
    assert twice <= set().union(*(patches[name] for name in again))
    assert_ends_like(place, calm)
    assert place.report()["patches"] == PATCHES


@dataclass(frozen=True)
class Stop:
    """One way of being stopped in the middle of a job, and what was seen of it."""

    before: Done
    ended: Ended
    after: Done
    counts: Counts
    attempts: list[int]


@dataclass(frozen=True)
class Stopped:
    """A job stopped by a signal, by two signals, by the supervisor's death, then finished."""

    place: Place
    politely: Stop
    at_once: Stop
    supervisor_killed: Stop
    heirs: Ended


@pytest.fixture(scope="module")
def stopped(shared: Materials, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    place = Place(shared, tmp_path_factory.mktemp("stopped"))
    place.produce()
    politely = stop(place, 3, [signal.SIGTERM], lets_finish=True)
    at_once = stop(place, 8, [signal.SIGTERM, signal.SIGTERM])
    supervisor_killed = stop(place, 12, [signal.SIGKILL])
    heirs = place.work("-w", "2", CHUNKQ_WORKER_SETTINGS=SHORT_LEASE)
    place.finish()
    return Stopped(place, politely, at_once, supervisor_killed, heirs)


def stop(
    place: Place, after: int, signals: list[signal.Signals], *, lets_finish: bool = False
) -> Stop:
    """Start a worker, and stop it with its hands full after so many commits."""
    says = ["stopping: chunks in flight are finished first", "handing back what is in flight"]
    hold = {"NET_HOLD": "forward", "NET_AFTER": str(after), "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with place.start(*ON_CPU, **hold) as crew:
        place.held()
        place.wait_for_full_hands(DEPTH)
        before = Done.so_far(place)
        crew.children()
        for number, line in zip(signals, says, strict=False):
            crew.process.send_signal(number)
            if number == signal.SIGTERM:
                wait_until(lambda line=line: line in crew.says(), line)  # type: ignore[misc]
        if lets_finish:
            place.open_gate()
        ended = crew.ended()
        crew.leaves_nothing_behind()
        assert len(crew.known) == 1
    shutil.rmtree(place.folder / "gate")
    return Stop(before, ended, Done.so_far(place), place.counts(), place.attempts())


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
    attempts = [stopped.place.record(name)["attempt"] for name in stopped.place.done()]
    assert sorted(attempts) == [1] * (CHUNKS - DEPTH) + [2] * DEPTH


def test_a_job_stopped_in_every_way_ends_with_the_same_bytes_and_nothing_done_twice(
    stopped: Stopped, calm: Place
) -> None:
    assert_same_bytes(stopped.place, calm)
    for stop in (stopped.politely, stopped.at_once, stopped.supervisor_killed):
        stop.after.was_left_alone_in(stopped.place)
    assert stopped.place.pieces() == []


def test_a_worker_that_wakes_up_after_others_finished_everything_changes_no_byte(
    place: Place, calm: Place
) -> None:
    place.produce()
    hold = {"NET_HOLD": "piece", "NET_AFTER": "4", "CHUNKQ_WORKER_SETTINGS": SHORT_LEASE}
    with place.start(*ON_CPU, "--burst", **hold) as crew:
        sleeper = place.held()
        place.wait_for_full_hands(DEPTH)
        os.kill(sleeper, signal.SIGSTOP)
        half_done = place.done()
        assert place.work(CHUNKQ_WORKER_SETTINGS=SHORT_LEASE).code == 0
        assert_ends_like(place, calm)
        records, blocks = place.done(), place.done("finalize")
        place.open_gate()
        os.kill(sleeper, signal.SIGCONT)
        assert crew.ended().code == 0
    assert len(half_done) <= CHUNKS - DEPTH
    # It really did compute and write: the network saw its chunks' patches twice.
    assert max(place.computed().values()) == 2
    assert place.pieces() == []
    assert_same_bytes(place, calm)
    assert (place.done(), place.done("finalize")) == (records, blocks)
    assert_ends_like(place, calm)


# --------------------------------------------------------------------------- bad chunks


def test_a_poisonous_chunk_fails_alone_and_after_mending_the_bytes_are_the_same(
    place: Place, calm: Place
) -> None:
    poison = place.folder / "poison"
    poison.touch()
    place.produce()
    poisoned = {"1.2.2"}
    assert {
        ".".join(map(str, index))
        for index in place.job.plan.indices()
        for patch in place.job.plan.patches(place.job.plan.chunk(index))
        if all(low <= at < high for low, at, high in zip(*bounds(patch.source), strict=True))
    } == poisoned

    ended = place.work(NET_POISON=str(poison))
    assert ended.code == 3
    [line] = [line for line in ended.complaints if "failed" in line]
    assert line.startswith("chunkq: 1 chunks failed; ")
    assert "Traceback" not in ended.err
    assert [f"attempt {n}" in ended.err for n in range(1, MAX_ATTEMPTS + 2)] == [
        *[True] * MAX_ATTEMPTS,
        False,
    ]
    before = Done.so_far(place)
    assert len(before.records) == CHUNKS - 1
    assert place.counts() == Counts(failed=1)
    status = place.status()
    assert (status["done"], status["failed"], status["queued"]) == (CHUNKS - 1, 1, 0)
    [group] = status["failures"]
    assert group["error"] == "ArithmeticError"
    assert group["message"] == "ArithmeticError: a poisonous voxel"
    assert group["chunks"] == ["1.2.2"]
    assert "net.py" in group["traceback"]
    assert 'raise ArithmeticError("a poisonous voxel")' in group["traceback"]

    refused = place.finalize()
    assert refused.code == 3
    assert refused.complaints == ["chunkq: 1 chunks are not computed yet: 1.2.2"]
    assert not place.status()["sealed"]

    poison.unlink()
    assert place.command("retry", str(place.output)).out == "1 chunks queued again\n"
    assert place.work(NET_POISON=str(poison)).code == 0
    assert place.status()["failures"] == []
    before.was_left_alone_in(place)
    assert_ends_like(place, calm)


def bounds(box: object) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return box.start, POISONOUS, box.stop  # type: ignore[attr-defined]


def test_a_network_that_cannot_be_loaded_stops_the_worker_and_costs_no_attempt(
    shared: Materials, tmp_path: Path
) -> None:
    place = Place(shared, tmp_path, {"model": {"class_name": "Missing"}})
    place.produce()
    with place.start(*ON_CPU) as crew:
        ended = crew.ended()
        crew.leaves_nothing_behind()
    assert ended.code == 1
    assert len([line for line in ended.complaints if "Missing" in line]) == 1
    assert "Traceback" not in ended.err
    assert "class_name" in ended.complaints[-1]
    assert place.counts() == Counts(queued=CHUNKS)
    assert place.attempts() == [0] * CHUNKS
    assert place.done() == {}
    assert place.status()["failures"] == []
