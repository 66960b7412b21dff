"""A test session leaves no process and no file, and runs a file's tests in one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.harness.guardian import members
from tests.harness.waiting import TIMEOUT, wait_until

SECONDS_TO_END = 30
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
DAEMON = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
time.sleep(600)
"""
TESTS = """
import multiprocessing, os, pathlib, subprocess, sys, time

import pytest

READY = pathlib.Path({ready!r})


def test_that_starts_processes(redis, tmp_path):
    assert not [name for name in os.environ if name.lower() == "http_proxy"]
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    (READY / "{number}.name").write_text(semaphore._semlock.name)
    (tmp_path / "file").touch()
    pathlib.Path(tmp_path / "file").parent.chmod(0o500)
    subprocess.Popen([sys.executable, "-S", "-c", {stubborn!r}], cwd="/")
    with open(tmp_path.parent / "log-{number}", "w") as log:
        subprocess.run([sys.executable, "-S", "-c", {daemon!r}], cwd="/", env={{}}, stdout=log)
    (READY / "{number}.partial").write_text(os.environ["TEST_SESSION"] + " " + str(os.getpid()))
    (READY / "{number}.partial").rename(READY / "{number}.ready")
    time.sleep({sleep})
"""


def start(folder: Path, *options: str, sleep: int = 600) -> subprocess.Popen[str]:
    """Start pytest on two files with a test each that leaves processes behind."""
    values = {"ready": str(folder), "stubborn": STUBBORN, "daemon": DAEMON, "sleep": sleep}
    for number in range(2):
        (folder / f"test_{number}.py").write_text(TESTS.format(number=number, **values))
    return start_pytest(folder, *options)


def start_pytest(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start pytest on the test files of a folder with this repository's fixtures."""
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", f"--rootdir={folder}"]
    command += ["-p", "conftest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, *options, str(folder)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def wait_for_session(folder: Path) -> tuple[Path, set[int]]:
    """Wait until both tests have started their processes; return session folder and worker pids."""
    wait_until(lambda: len(list(folder.glob("*.ready"))) == 2, "both tests run")
    lines = [path.read_text().split() for path in folder.glob("*.ready")]
    assert len({path for path, _ in lines}) == 1
    return Path(lines[0][0]), {int(pid) for _, pid in lines}


def kill(pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("killed", ["controller", "worker and controller", "all"])
def test_a_killed_session_leaves_no_process_and_no_file(tmp_path: Path, killed: str) -> None:
    pytest_process = start(tmp_path, "-n", "2")
    temporary, workers = wait_for_session(tmp_path)
    assert len(workers) == 2

    def processes() -> tuple[list[int], list[int]]:
        pids = members(str(temporary), set())
        return (
            [pid for pid in pids if STUBBORN in command(pid)],
            [pid for pid in pids if "os.fork" in command(pid)],
        )

    # During its last fork, a daemon is two processes for a moment or is in no list.
    wait_until(lambda: [len(pids) for pids in processes()] == [2, 2], "all processes run")
    stubborn, daemons = processes()
    assert len(list(tmp_path.glob("*.name"))) == 2
    targets = {"controller": set(), "worker and controller": {min(workers)}, "all": workers}
    kill(targets[killed] | {pytest_process.pid})
    pytest_process.communicate()
    semaphores = [
        Path("/dev/shm") / f"sem.{path.read_text().strip('/')}" for path in tmp_path.glob("*.name")
    ]
    limit = time.monotonic() + SECONDS_TO_END
    while (
        temporary.exists()
        or any(path.exists() for path in semaphores)
        or members(str(temporary), set())
    ):
        assert time.monotonic() < limit, [command(pid) for pid in members(str(temporary), set())]
        time.sleep(0.1)
    assert not [pid for pid in {*stubborn, *daemons} if command(pid)]


def test_a_session_prints_the_processes_that_it_leaves(tmp_path: Path) -> None:
    pytest_process = start(tmp_path, sleep=0)
    output, _ = pytest_process.communicate(timeout=TIMEOUT)
    temporary, _ = wait_for_session(tmp_path)
    assert pytest_process.returncode == 0, output
    leaked = [line for line in output.splitlines() if line.startswith("leaked process: ")]
    assert len(leaked) == 4, output
    assert sum("test_0.py::test_that_starts_processes (call)" in line for line in leaked) == 1
    wait_until(lambda: not temporary.exists(), "the folder is removed", SECONDS_TO_END)


def test_the_tests_of_a_file_run_in_one_process(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(
            "import os, pathlib, time, pytest\n\n"
            "@pytest.mark.parametrize('number', range(6))\n"
            "def test_process(number):\n"
            "    time.sleep(0.1)\n"
            f"    file = pathlib.Path({str(tmp_path)!r}) / f'{name}-{{number}}'\n"
            "    file.write_text(os.environ['PYTEST_XDIST_WORKER'])\n"
        )
    pytest_process = start_pytest(tmp_path, "-n", "2")
    output, _ = pytest_process.communicate(timeout=TIMEOUT)
    assert pytest_process.returncode == 0, output
    processes = [{path.read_text() for path in tmp_path.glob(f"{name}-*")} for name in "ab"]
    assert sorted(map(len, processes)) == [1, 1]
    assert processes[0] != processes[1]


def command(pid: int) -> str:
    """Return the command line of a process, empty if it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""
