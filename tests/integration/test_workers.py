"""The supervisor and its children, with a child that does as it is told instead of computing."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from chunkq_worker import supervisor
from chunkq_worker.devices import Slot, slots
from chunkq_worker.supervisor import Supervisor

from chunkq.errors import JobError
from chunkq.executors import open_executor
from chunkq.executors.base import EXIT_REFUSED, Counts, Executor
from chunkq.executors.settings import WorkerSettings
from chunkq.tasks import Task

JOB = "/data/out.zarr.chunkq"
FAKE_CHILD = '''
"""Notes its birth, takes what the queue offers, and ends the way the next line of `ends` says."""
import glob, json, os, signal, sys, time

home = os.environ["FAKE_HOME"]
orders = json.loads(sys.stdin.readline())
born = {"orders": orders, "environment": dict(os.environ), "from": time.time(), "pid": os.getpid()}
with open(home + "/ends") as file:
    ends = file.read().split()
try:
    number = 0
    while True:
        try:
            os.mkdir(f"{home}/child-{number}")
            break
        except FileExistsError:
            number += 1
    end = ends[min(number, len(ends) - 1)]
    born["tasks"] = []
    if os.environ.get("FAKE_TAKES"):
        from chunkq.executors import open_executor
        from chunkq.executors.base import WorkerOptions
        queue = open_executor(orders["queue"])
        while taken := queue.reserve(WorkerOptions(orders["worker"])):
            born["tasks"].append([taken.task.id, taken.attempt.number])
        queue.close()
    time.sleep(float(os.environ.get("FAKE_LIVES", "0")))
    while number == 0 and len(glob.glob(home + "/child-*/born")) < int(
        os.environ.get("FAKE_WAITS_FOR", "0")
    ):
        time.sleep(0.005)
    while number > 0 and not os.path.exists(os.environ.get("FAKE_DIES_AFTER", "/")):
        time.sleep(0.005)
    if end == "stay":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open(f"{home}/child-{number}/staying", "w") as file:
            file.write(str(os.getpid()))
        os.rename(f"{home}/child-{number}/staying", f"{home}/child-{number}/stays")
        sys.stdin.read()
        os._exit(1)
finally:
    born["to"] = time.time()
    with open(f"{home}/child-{number}/partial", "w") as file:
        json.dump(born, file)
    os.rename(f"{home}/child-{number}/partial", f"{home}/child-{number}/born")
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end))
'''


@dataclass
class Nursery:
    """Children by the order of their birth, and how they are told to end."""

    home: Path
    queue_url: str
    queue: Executor
    patch: pytest.MonkeyPatch
    settings: WorkerSettings = field(default_factory=lambda: WorkerSettings(restart_delay=0.05))

    def supervise(self, *ends: str, places: int = 1, gpus: list[str] | None = None) -> int:
        """Run a supervisor whose children end one after the other as told, the last for ever."""
        (self.home / "ends").write_text("\n".join(ends))
        taken = [Slot(gpu) for gpu in gpus] if gpus else [Slot(None)] * places
        supervisor = Supervisor(
            self.queue_url,
            self.queue,
            taken,
            depth=2,
            burst=True,
            job=JOB,
            settings=self.settings,
        )
        return supervisor.run()

    @property
    def born(self) -> list[dict[str, Any]]:
        found = sorted(self.home.glob("child-*/born"), key=lambda p: int(p.parent.name[6:]))
        return [json.loads(path.read_text()) for path in found]


@pytest.fixture
def nursery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    package = tmp_path / "fake" / "chunkq_worker"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "child.py").write_text(FAKE_CHILD)
    path = [str(tmp_path / "fake"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("FAKE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
    queue_url = f"sqlite://{tmp_path / 'queue.db'}"
    queue = open_executor(queue_url)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Nursery(tmp_path, queue_url, queue, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    queue.close()


def test_a_child_that_ends_well_is_not_started_again(nursery: Nursery) -> None:
    assert nursery.supervise("0", places=2) == 0
    assert len(nursery.born) == 2


def test_children_get_their_orders_and_names_of_their_own(nursery: Nursery) -> None:
    nursery.supervise("0", places=2)
    orders = [child["orders"] for child in nursery.born]
    assert len({order.pop("worker") for order in orders}) == 2
    expected = {"queue": nursery.queue_url, "depth": 2, "burst": True, "job": JOB}
    assert orders == [{**expected, "deadline": None, "time_limit": None, "quiet": False}] * 2


def test_a_dead_child_is_replaced_and_its_chunks_are_handed_back_at_once(
    nursery: Nursery, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [Task("infer", JOB, (number,)) for number in range(3)]
    nursery.queue.submit(tasks)
    nursery.patch.setenv("FAKE_TAKES", "1")
    assert nursery.supervise("killed", "3", "0") == 0
    assert [child["tasks"] for child in nursery.born] == [
        [[task.id, attempt] for task in tasks] for attempt in (1, 2, 3)
    ]
    # The last one ended well though it held chunks: it was told to stop, so that counts nothing.
    assert nursery.queue.counts(JOB) == Counts(queued=3)
    said = [line for line in capfd.readouterr().err.splitlines() if "handed back" in line]
    names = [child["orders"]["worker"] for child in nursery.born]
    assert len(set(names)) == 3
    assert said == [
        f"chunkq: worker {names[0]} was killed by signal 9; 3 chunks handed back",
        f"chunkq: worker {names[1]} ended with code 3; 3 chunks handed back",
    ]


def test_the_pause_before_a_restart_doubles_from_death_to_death(nursery: Nursery) -> None:
    nursery.settings = WorkerSettings(restart_delay=0.2)
    nursery.supervise("1", "1", "1", "0")
    born = nursery.born
    pauses = [b["from"] - a["to"] for a, b in pairwise(born)]
    assert len(pauses) == 3
    assert all(pause >= least for pause, least in zip(pauses, (0.2, 0.4, 0.8), strict=True))


def test_a_child_that_lived_long_does_not_count_towards_giving_up(nursery: Nursery) -> None:
    nursery.settings = replace(nursery.settings, early_death=0)
    assert nursery.supervise(*["1"] * 7, "0") == 0
    assert len(nursery.born) == 8


def test_a_supervisor_whose_children_die_at_once_again_and_again_gives_up(
    nursery: Nursery, capfd: pytest.CaptureFixture[str]
) -> None:
    assert nursery.supervise("killed") == 1
    assert len(nursery.born) == nursery.settings.early_deaths
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "chunkq: gave up after 5 deaths within seconds of starting"


def test_a_place_given_up_does_not_stop_the_others_but_shows_in_the_end(nursery: Nursery) -> None:
    # The first child goes on until the other place has been given up.
    nursery.patch.setenv("FAKE_WAITS_FOR", str(nursery.settings.early_deaths))
    assert nursery.supervise("0", "killed", places=2) == 1
    assert len(nursery.born) == nursery.settings.early_deaths + 1
    assert nursery.born[0]["to"] > nursery.born[-1]["to"]


def test_no_child_outlives_a_supervisor_that_fails(nursery: Nursery) -> None:
    def fail(place: object, code: int) -> None:
        raise ZeroDivisionError

    nursery.patch.setattr(Supervisor, "_after_death", lambda self, place, code: fail(place, code))
    nursery.patch.setenv("FAKE_DIES_AFTER", str(nursery.home / "child-0" / "stays"))
    with pytest.raises(ZeroDivisionError):
        nursery.supervise("stay", "1", places=2)
    # It was killed before it could write its note.
    assert not (nursery.home / "child-0" / "born").exists()
    pid = int((nursery.home / "child-0" / "stays").read_text())
    assert not psutil.pid_exists(pid)


def test_a_child_that_refuses_ends_everything_without_a_second_try(nursery: Nursery) -> None:
    assert nursery.supervise(str(EXIT_REFUSED)) == 1
    assert len(nursery.born) == 1


def test_never_more_children_live_than_were_asked_for(nursery: Nursery) -> None:
    nursery.patch.setenv("FAKE_LIVES", "0.1")
    nursery.supervise("1", "killed", "1", "1", "0", places=3)
    born = nursery.born
    assert len(born) >= 7
    for child in born:
        alive = [other for other in born if other["from"] <= child["from"] < other["to"]]
        assert len(alive) <= 3


def test_a_signal_reaches_every_child_and_the_supervisor_ends_well(nursery: Nursery) -> None:
    import threading

    def send_when_all_stay() -> None:
        limit = time.monotonic() + 30
        while len(list(nursery.home.glob("child-*/stays"))) < 2 and time.monotonic() < limit:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send_when_all_stay)
    sender.start()
    assert nursery.supervise("stay", places=2) == 0
    sender.join()
    assert len(nursery.born) == 2


# ----------------------------------------------------------------------------- environment


def test_cpu_children_share_the_cores(nursery: Nursery) -> None:
    nursery.patch.delenv("OMP_NUM_THREADS", raising=False)
    nursery.patch.setattr(supervisor, "cores", lambda: 8)
    nursery.supervise("0", places=3)
    for child in nursery.born:
        assert child["environment"]["CHUNKQ_THREADS"] == "2"
        assert child["environment"]["MALLOC_MMAP_MAX_"] == "0"
        assert int(child["environment"]["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30


def test_what_the_user_set_in_the_environment_stays(nursery: Nursery) -> None:
    nursery.patch.setenv("OMP_NUM_THREADS", "5")
    nursery.patch.setenv("MALLOC_TOP_PAD_", "123")
    nursery.supervise("0")
    [child] = nursery.born
    assert child["environment"]["CHUNKQ_THREADS"] == "5"
    assert child["environment"]["OMP_NUM_THREADS"] == "5"
    assert child["environment"]["MALLOC_TOP_PAD_"] == "123"


def test_every_child_sees_one_gpu_and_keeps_it_when_it_is_started_again(nursery: Nursery) -> None:
    nursery.supervise("1", "1", "0", gpus=["2", "GPU-5c1e8b0a", "MIG-0d7f"])
    seen = [child["environment"]["CUDA_VISIBLE_DEVICES"] for child in nursery.born]
    assert sorted(seen[:3]) == ["2", "GPU-5c1e8b0a", "MIG-0d7f"]
    assert set(seen[3:]) <= set(seen[:3])
    assert len(seen) == 5


def test_the_gpus_granted_by_the_environment_are_kept_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for granted in ("2", "2,0", "GPU-5c1e8b0a-77aa", "MIG-0d7f,MIG-11c2", "2, 3"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted)
        assert slots("all", 1) == [Slot(name.strip()) for name in granted.split(",")]


def test_without_a_gpu_there_are_as_many_places_as_workers_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for granted in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted)
        assert slots("all", 3) == [Slot(None)] * 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert slots("all", 2) == [Slot(None)] * 2


def test_none_means_the_cpu_whatever_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert slots("none", 2) == [Slot(None)] * 2


def test_gpus_are_chosen_by_place_or_name_among_those_granted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5c1e,6")
    assert slots("0,1", 1) == [Slot("4"), Slot("GPU-5c1e")]
    assert slots("6, GPU-5c1e", 1) == [Slot("6"), Slot("GPU-5c1e")]
    assert slots("1", 2) == [Slot("GPU-5c1e")] * 2
    assert len(slots("all", 2)) == 6


@pytest.mark.parametrize("wish", ["3", "GPU-none", "0,9", "", "some"])
def test_a_gpu_that_is_not_granted_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(JobError, match=r"--gpus: .*\(4, 5\)") as error:
        slots(wish, 1)
    assert len(error.value.problems) == 1


def test_without_a_word_from_the_environment_the_driver_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots("all", 1) == [Slot("0"), Slot("1")]
    tool.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert slots("all", 1) == [Slot(None)]
