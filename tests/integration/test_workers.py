"""The supervisor and its worker processes, with fake processes that end as a test requires."""

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

from chunkq.errors import ErrorCode, JobError
from chunkq.job.tasks import JobId, Task
from chunkq.queue.contract.executor import EXIT_INCOMPLETE, EXIT_REFUSED, Executor, TaskCounts
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.registry import open_executor

JOB = JobId("/data/out.zarr.chunkq", "0a1b2c3d")
FAKE_WORKER_PROCESS = '''
"""Record the start, reserve queued tasks, and end as the next line of `ends` says."""
import glob, json, os, signal, sys, time

folder = os.environ["FAKE_FOLDER"]
options = json.loads(sys.stdin.readline())
record = {
    "options": options, "environment": dict(os.environ), "started": time.time(), "pid": os.getpid()
}
with open(folder + "/ends") as file:
    ends = file.read().split()
try:
    number = 0
    while True:
        try:
            os.mkdir(f"{folder}/process-{number}")
            break
        except FileExistsError:
            number += 1
    end = ends[min(number, len(ends) - 1)]
    record["tasks"] = []
    if os.environ.get("FAKE_RESERVES"):
        from chunkq.queue.registry import open_executor
        from chunkq.queue.contract.executor import WorkerOptions
        queue = open_executor(options["queue"])
        while lease := queue.reserve(WorkerOptions(options["worker"])):
            record["tasks"].append([lease.task.id, lease.attempt.number])
        queue.close()
    for report in os.environ.get("FAKE_LOADING", ""):
        os.write(options["loading"], report.encode())
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    while number == 0 and len(glob.glob(folder + "/process-*/record")) < int(
        os.environ.get("FAKE_WAITS_FOR", "0")
    ):
        time.sleep(0.005)
    while number > 0 and not os.path.exists(os.environ.get("FAKE_ENDS_AFTER", "/")):
        time.sleep(0.005)
    if end == "stay":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        with open(f"{folder}/process-{number}/staying", "w") as file:
            file.write(str(os.getpid()))
        os.rename(f"{folder}/process-{number}/staying", f"{folder}/process-{number}/stays")
        sys.stdin.read()
        os._exit(1)
finally:
    record["ended"] = time.time()
    with open(f"{folder}/process-{number}/partial", "w") as file:
        json.dump(record, file)
    os.rename(f"{folder}/process-{number}/partial", f"{folder}/process-{number}/record")
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end))
'''


@dataclass
class FakeWorkers:
    """Run a supervisor whose worker processes only record their start and their end."""

    folder: Path
    queue_url: str
    queue: Executor
    patch: pytest.MonkeyPatch
    settings: WorkerSettings = field(default_factory=lambda: WorkerSettings(restart_delay=0.05))

    def supervise(self, *ends: str, processes: int = 1, gpus: list[str] | None = None) -> int:
        """Run a supervisor and return its exit code.

        The n-th worker process ends with the n-th of `ends`, all further ones with the last.
        """
        (self.folder / "ends").write_text("\n".join(ends))
        worker_slots = [Slot(gpu) for gpu in gpus] if gpus else [Slot(None)] * processes
        supervisor = Supervisor(
            self.queue_url,
            worker_slots,
            depth=2,
            burst=True,
            job=JOB.path,
            settings=self.settings,
        )
        return supervisor.run(self.queue)

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the worker processes recorded, in the order of their start."""
        paths = sorted(self.folder.glob("process-*/record"), key=lambda p: int(p.parent.name[8:]))
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def fake_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorkers]:
    package = tmp_path / "fake" / "chunkq_worker"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "worker_process.py").write_text(FAKE_WORKER_PROCESS)
    path = [str(tmp_path / "fake"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.01)
    queue_url = f"sqlite://{tmp_path / 'queue.db'}"
    queue = open_executor(queue_url)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield FakeWorkers(tmp_path, queue_url, queue, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    queue.close()


def test_a_worker_process_that_ends_with_0_is_not_restarted(fake_workers: FakeWorkers) -> None:
    assert fake_workers.supervise("0", processes=2) == 0
    assert len(fake_workers.records) == 2


def test_a_worker_process_whose_tasks_wait_for_failed_ones_is_not_restarted(
    fake_workers: FakeWorkers,
) -> None:
    assert fake_workers.supervise(str(EXIT_INCOMPLETE), "0", processes=2) == EXIT_INCOMPLETE
    assert len(fake_workers.records) == 2


def test_worker_processes_get_the_options_and_unique_names(fake_workers: FakeWorkers) -> None:
    fake_workers.supervise("0", processes=2)
    options = [record["options"] for record in fake_workers.records]
    assert len({values.pop("worker") for values in options}) == 2
    expected = {"queue": fake_workers.queue_url, "depth": 2, "burst": True, "job": JOB.path}
    expected |= {"deadline": None, "time_limit": None, "quiet": False}
    assert all(value.pop("loading") > 2 for value in options)
    expected |= {"is_early": False, "report": None, "environment": {}, "is_cut_off": False}
    assert options == [expected] * 2


def test_a_crashed_worker_process_is_restarted_and_its_chunks_are_requeued_at_once(
    fake_workers: FakeWorkers, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [Task("infer", *JOB, 0, (number,)) for number in range(3)]
    fake_workers.queue.submit(tasks)
    fake_workers.patch.setenv("FAKE_RESERVES", "1")
    assert fake_workers.supervise("killed", "9", "0") == 0
    assert [record["tasks"] for record in fake_workers.records] == [
        [[task.id, attempt] for task in tasks] for attempt in (1, 2, 3)
    ]
    # The last process ended with 0, so its chunks are requeued without counting an attempt.
    assert fake_workers.queue.counts(JOB) == TaskCounts(queued=3)
    names = [record["options"]["worker"] for record in fake_workers.records]
    assert len(set(names)) == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if "; 3 chunks" in line]
    assert [
        (name in line, "signal 9" in line, "code 9" in line)
        for name, line in zip(names[:2], lines, strict=True)
    ] == [(True, True, False), (True, False, True)]


def test_the_delay_before_a_restart_doubles_with_each_crash(fake_workers: FakeWorkers) -> None:
    fake_workers.settings = WorkerSettings(restart_delay=0.2)
    fake_workers.supervise("1", "1", "1", "0")
    delays = [b["started"] - a["ended"] for a, b in pairwise(fake_workers.records)]
    assert len(delays) == 3
    assert all(delay >= least for delay, least in zip(delays, (0.2, 0.4, 0.8), strict=True))


def test_crashes_long_after_the_start_do_not_count_towards_giving_up(
    fake_workers: FakeWorkers,
) -> None:
    fake_workers.settings = replace(fake_workers.settings, early_death=0)
    assert fake_workers.supervise(*["1"] * 7, "0") == 0
    assert len(fake_workers.records) == 8


def test_a_supervisor_gives_up_after_repeated_crashes_soon_after_the_start(
    fake_workers: FakeWorkers, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fake_workers.supervise("killed") == 1
    assert len(fake_workers.records) == fake_workers.settings.early_deaths
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("chunkq: ")
    assert f" {fake_workers.settings.early_deaths} times " in last


def test_the_leases_of_a_process_that_loads_a_network_are_renewed(
    fake_workers: FakeWorkers,
) -> None:
    extended: list[tuple[str, float]] = []
    fake_workers.patch.setattr(
        fake_workers.queue, "extend", lambda *values: extended.append(values), raising=False
    )
    fake_workers.settings = replace(fake_workers.settings, lease=0.06)
    fake_workers.patch.setenv("FAKE_LOADING", "1")
    fake_workers.patch.setenv("FAKE_SECONDS", "0.3")
    assert fake_workers.supervise("0") == 0
    [record] = fake_workers.records
    assert len(extended) >= 2
    assert set(extended) == {(record["options"]["worker"], 0.06)}


def test_the_leases_of_a_process_that_has_loaded_its_network_are_its_own_concern(
    fake_workers: FakeWorkers,
) -> None:
    extended: list[tuple[str, float]] = []
    fake_workers.patch.setattr(
        fake_workers.queue, "extend", lambda *values: extended.append(values), raising=False
    )
    fake_workers.settings = replace(fake_workers.settings, lease=0.06)
    fake_workers.patch.setenv("FAKE_LOADING", "10")
    fake_workers.patch.setenv("FAKE_SECONDS", "0.3")
    assert fake_workers.supervise("0") == 0
    assert len(extended) <= 1


def test_a_process_that_dies_while_it_loads_a_network_uses_up_no_attempts(
    fake_workers: FakeWorkers,
) -> None:
    task = Task("infer", *JOB, 0, (0,))
    fake_workers.queue.submit([task])
    fake_workers.patch.setenv("FAKE_RESERVES", "1")
    fake_workers.patch.setenv("FAKE_LOADING", "1")
    assert fake_workers.supervise("killed", "1", "killed", "1", "0") == 0
    assert [record["tasks"] for record in fake_workers.records] == [[[task.id, 1]]] * 5


def test_a_supervisor_gives_up_if_loading_always_ends_the_process_however_late(
    fake_workers: FakeWorkers, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_workers.settings = replace(fake_workers.settings, early_death=0)
    fake_workers.patch.setenv("FAKE_LOADING", "1")
    assert fake_workers.supervise("killed") == 1
    assert len(fake_workers.records) == fake_workers.settings.early_deaths
    assert "while it loaded a network" in capfd.readouterr().err.splitlines()[-1]


def test_a_slot_that_has_failed_does_not_stop_the_others_but_sets_the_exit_code(
    fake_workers: FakeWorkers,
) -> None:
    # The first process runs until the other slot has failed.
    fake_workers.patch.setenv("FAKE_WAITS_FOR", str(fake_workers.settings.early_deaths))
    assert fake_workers.supervise("0", "killed", processes=2) == 1
    records = fake_workers.records
    assert len(records) == fake_workers.settings.early_deaths + 1
    assert records[0]["ended"] > records[-1]["ended"]


def test_no_worker_process_outlives_a_supervisor_that_fails(fake_workers: FakeWorkers) -> None:
    def fail(supervisor: Supervisor, slot: object, code: int) -> None:
        raise ZeroDivisionError

    fake_workers.patch.setattr(Supervisor, "_handle_crash", fail)
    stays = fake_workers.folder / "process-0" / "stays"
    fake_workers.patch.setenv("FAKE_ENDS_AFTER", str(stays))
    with pytest.raises(ZeroDivisionError):
        fake_workers.supervise("stay", "1", processes=2)
    # The process was killed before it could write its record.
    assert not (fake_workers.folder / "process-0" / "record").exists()
    assert not psutil.pid_exists(int(stays.read_text()))


def test_a_worker_process_that_refuses_its_job_is_not_restarted(fake_workers: FakeWorkers) -> None:
    assert fake_workers.supervise(str(EXIT_REFUSED)) == 1
    assert len(fake_workers.records) == 1


def test_there_are_never_more_worker_processes_than_slots(fake_workers: FakeWorkers) -> None:
    fake_workers.patch.setenv("FAKE_SECONDS", "0.1")
    fake_workers.supervise("1", "killed", "1", "1", "0", processes=3)
    records = fake_workers.records
    assert len(records) >= 7
    for record in records:
        alive = [r for r in records if r["started"] <= record["started"] < r["ended"]]
        assert len(alive) <= 3


def test_a_signal_stops_every_worker_process_and_the_supervisor_ends_with_0(
    fake_workers: FakeWorkers,
) -> None:
    import threading

    def send_when_all_stay() -> None:
        limit = time.monotonic() + 30
        while (
            len(list(fake_workers.folder.glob("process-*/stays"))) < 2 and time.monotonic() < limit
        ):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send_when_all_stay)
    sender.start()
    assert fake_workers.supervise("stay", processes=2) == 0
    sender.join()
    assert len(fake_workers.records) == 2


# ----------------------------------------------------------------------------- environment


def test_worker_processes_on_the_cpu_share_the_cores(fake_workers: FakeWorkers) -> None:
    fake_workers.patch.delenv("OMP_NUM_THREADS", raising=False)
    fake_workers.patch.setattr(supervisor, "available_cores", lambda: 8)
    fake_workers.supervise("0", processes=3)
    for record in fake_workers.records:
        assert record["environment"]["CHUNKQ_THREADS"] == "2"
        assert record["environment"]["MALLOC_MMAP_MAX_"] == "0"
        assert int(record["environment"]["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30


def test_environment_variables_of_the_user_are_kept(fake_workers: FakeWorkers) -> None:
    fake_workers.patch.setenv("OMP_NUM_THREADS", "5")
    fake_workers.patch.setenv("MALLOC_TOP_PAD_", "123")
    fake_workers.supervise("0")
    [record] = fake_workers.records
    assert record["environment"]["CHUNKQ_THREADS"] == "5"
    assert record["environment"]["OMP_NUM_THREADS"] == "5"
    assert record["environment"]["MALLOC_TOP_PAD_"] == "123"


def test_each_worker_process_sees_one_gpu_and_the_same_one_after_a_restart(
    fake_workers: FakeWorkers,
) -> None:
    fake_workers.supervise("1", "1", "0", gpus=["2", "GPU-5c1e8b0a", "MIG-0d7f"])
    visible = [record["environment"]["CUDA_VISIBLE_DEVICES"] for record in fake_workers.records]
    assert sorted(visible[:3]) == ["2", "GPU-5c1e8b0a", "MIG-0d7f"]
    assert set(visible[3:]) <= set(visible[:3])
    assert len(visible) == 5


def test_all_means_the_gpus_in_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible in ("2", "2,0", "GPU-5c1e8b0a-77aa", "MIG-0d7f,MIG-11c2", "2, 3"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert slots("all", 1) == [Slot(name.strip()) for name in visible.split(",")]


def test_without_a_gpu_there_are_as_many_cpu_slots_as_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for visible in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert slots("all", 3) == [Slot(None)] * 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert slots("all", 2) == [Slot(None)] * 2


def test_none_means_the_cpu_even_if_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert slots("none", 2) == [Slot(None)] * 2


def test_gpus_are_selected_by_position_or_name_among_the_visible_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5c1e,6")
    assert slots("0,1", 1) == [Slot("4"), Slot("GPU-5c1e")]
    assert slots("6, GPU-5c1e", 1) == [Slot("6"), Slot("GPU-5c1e")]
    assert slots("1", 2) == [Slot("GPU-5c1e")] * 2
    assert len(slots("all", 2)) == 6


@pytest.mark.parametrize("gpus", ["3", "GPU-none", "0,9", "", "some"])
def test_a_gpu_that_is_not_visible_is_an_error_that_lists_the_visible_ones(
    monkeypatch: pytest.MonkeyPatch, gpus: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(JobError, match=r"^--gpus: ") as error:
        slots(gpus, 1)
    assert error.value.code is ErrorCode.JOB_INVALID
    [problem] = error.value.problems
    assert repr(gpus.rpartition(",")[2]) in problem
    assert "(4, 5)" in problem


def test_without_the_environment_variable_the_driver_lists_the_gpus(
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
