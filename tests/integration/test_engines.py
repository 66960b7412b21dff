"""The same job on every engine: the same commands, the same bytes, the same story in `status`."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.support import Materials, Place, calm_place, materials
from tests.waiting import wait_until

ENGINES = ("sqlite", "rq", "dask", "ray")
FIXTURES = {"rq": "redis", "dask": "dask", "ray": "ray"}
CHUNKS = 24
ON_CPU = ("work", "--gpus", "none", "--burst")


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The job done by one worker to which nothing happened, on the embedded queue."""
    return calm_place(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return materials(tmp_path_factory.mktemp)


@pytest.fixture(params=ENGINES)
def place(request: pytest.FixtureRequest, shared: Materials, tmp_path: Path, calm: Place) -> Place:
    """The job in a folder of its own, on an engine's queue."""
    url = None
    if request.param in FIXTURES:
        found = request.getfixturevalue(FIXTURES[request.param])
        url = getattr(found, "url", found)
    return Place(shared, tmp_path, url=url)


def test_the_job_gives_the_same_bytes(place: Place, calm: Place) -> None:
    place.produce()
    assert place.counts().queued == CHUNKS
    with place.start(*ON_CPU, "-w", "2") as crew:
        ended = crew.ended()
    assert ended.code == 0, ended.err
    place.finish()
    assert place.stored() == calm.stored()
    assert set(place.computed().values()) == {1}
    crew.leaves_nothing_behind()


def test_a_worker_process_killed_in_the_middle_loses_nothing(place: Place, calm: Place) -> None:
    place.produce()
    with place.start(*ON_CPU, "--depth", "2", NET_HOLD="piece", NET_AFTER="4") as crew:
        held = place.held()
        committed = set(place.done())
        assert len(place.running()) == 2
        os.kill(held, signal.SIGKILL)
        place.open_gate()
        ended = crew.ended()
    assert ended.code == 0, ended.err
    assert "handed back" in ended.err
    place.finish()
    assert place.stored() == calm.stored()
    ours = place.patches()
    again = {patch for patch, times in place.computed().items() if times > 1}
    assert not any(again & ours[name] for name in committed)
    crew.leaves_nothing_behind()


def test_failures_and_retries_look_the_same_in_status(place: Place, calm: Place) -> None:
    poison = place.folder / "poison"
    poison.touch()
    place.produce()
    ended = place.work(NET_POISON=str(poison))
    assert ended.code == 3, ended.err
    status = place.status()
    assert {key: status[key] for key in ("chunks", "done", "running", "queued", "failed")} == {
        "chunks": CHUNKS, "done": CHUNKS - 1, "running": 0, "queued": 0, "failed": 1
    }  # fmt: skip
    [failure] = status["failures"]
    assert (failure["error"], failure["chunks"]) == ("ArithmeticError", ["1.2.2"])
    assert failure["message"] == "ArithmeticError: a poisonous voxel"
    assert failure["traceback"].endswith("ArithmeticError: a poisonous voxel\n")
    [worker] = status["workers"]
    assert (worker["device"], worker["recent_chunks"]) == ("cpu", CHUNKS - 1)
    record = json.loads((place.job_folder / "failed" / "1.2.2.json").read_text())
    assert record["attempt"] == 3
    unfinished = place.finalize()
    assert unfinished.code == 3
    poison.unlink()
    assert place.command("retry", str(place.output)).code == 0
    assert place.counts().queued == 1
    assert place.work().code == 0
    place.finish()
    assert place.stored() == calm.stored()


def test_ctrl_c_finishes_what_is_in_flight_and_the_same_again_goes_on(
    place: Place, calm: Place
) -> None:
    place.produce()
    with place.start(*ON_CPU, NET_HOLD="piece", NET_AFTER="3") as crew:
        place.held()
        crew.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in crew.says(), "it has heard")
        place.open_gate()
        ended = crew.ended()
    assert ended.code == 0, ended.err
    done = len(place.done())
    assert 3 < done < CHUNKS
    counts = place.counts()
    assert (counts.running, counts.failed, counts.queued) == (0, 0, CHUNKS - done)
    assert place.work().code == 0
    place.finish()
    assert place.stored() == calm.stored()
    assert set(place.computed().values()) == {1}
