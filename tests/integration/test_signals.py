"""`chunkq run` is stopped in the middle: nothing is lost, and nothing is left running."""

import signal
from pathlib import Path

import pytest

from tests.integration.support import Materials, Place, calm_place, materials
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The job done by one worker to which nothing happened."""
    return calm_place(tmp_path_factory.mktemp)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Place:
    shared: Materials = materials(tmp_path_factory.mktemp)
    return Place(shared, tmp_path)


def test_ctrl_c_ends_a_run_with_130_and_the_same_command_completes_it(
    place: Place, calm: Place
) -> None:
    command = ("run", str(place.job_file), "--gpus", "none", "-w", "1", "--depth", "2")
    with place.start(*command, NET_HOLD="forward", NET_AFTER="5") as crew:
        place.held()
        place.wait_for_full_hands(2)
        before, worker_processes = place.done(), crew.children()
        crew.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping: chunks in flight are finished first" in crew.says(), "told")
        place.open_gate()
        ended = crew.ended()
        assert worker_processes
        crew.leaves_nothing_behind()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert ended.complaints == [
        "chunkq: stopping: chunks in flight are finished first; once more hands them back at once",
        "chunkq: stopped; the same command continues where it was",
    ]
    assert ended.err.splitlines()[-1] == ended.complaints[-1]
    stopped_at = place.done()
    assert len(stopped_at) == len(before) + 2
    assert {name: stopped_at[name] for name in before} == before
    assert set(place.attempts()) == {0}

    with place.start(*command) as again:
        ended = again.ended()
    assert ended.code == 0
    assert "complete: " in ended.err
    done = place.done()
    assert {name: done[name] for name in stopped_at} == stopped_at
    assert place.stored() == calm.stored()
    assert set(place.computed().values()) == {1}


def test_a_killed_run_leaves_no_process_behind(place: Place) -> None:
    command = ("run", str(place.job_file), "--gpus", "none", "-w", "2")
    with place.start(*command, NET_HOLD="forward") as crew:
        place.held()
        # The supervisor and its two workers.
        wait_until(lambda: len(crew.children()) == 3, "all processes are there")
        crew.process.kill()
        crew.process.wait()
        crew.leaves_nothing_behind()
    assert place.done().keys() <= {".".join(map(str, i)) for i in place.job.plan.indices()}
