"""Child processes end with their parent, also if the parent is killed."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkq.system import parent_process

TIMEOUT = 20.0
CHILD = """
import os, sys, threading, time
from chunkq.system.parent_process import when_parent_ends

print(sys.stdin.readline().strip(), flush=True)
when_parent_ends(lambda: (os.write(1, b"ended\\n"), os._exit(0)))
[waiting] = [thread for thread in threading.enumerate() if thread.name == "parent"]
waiting.join(0.1)
print("waiting", flush=True)
time.sleep(1000)
"""
PARENT = """
import signal, subprocess, sys
from chunkq.system.parent_process import with_parent_death_signal

kind, child = sys.argv[1:]
command = [sys.executable, "-c", child]
if kind == "signal":
    command = with_parent_death_signal(command, signal.SIGTERM)
process = subprocess.Popen(command, stdin=subprocess.PIPE if kind == "pipe" else None, text=True)
if process.stdin is not None:
    process.stdin.write("started\\n")
    process.stdin.flush()
process.wait()
"""
SIGNALED = """
import os, signal, time

signal.signal(signal.SIGTERM, lambda number, frame: (os.write(1, b"ended\\n"), os._exit(0)))
print("started\\nwaiting", flush=True)
time.sleep(1000)
"""


@pytest.fixture(params=["pipe", "signal"])
def parent(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Start a process whose child writes to the standard output of both."""
    if request.param == "signal" and sys.platform != "linux":
        pytest.skip("only Linux sends a signal")
    child = {"pipe": CHILD, "signal": SIGNALED}[request.param]
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, request.param, child],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)  # returns when the child has ended too


def test_a_child_process_acts_when_its_parent_is_killed(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["started\n", "waiting\n"]
    parent.kill()
    output, _ = parent.communicate(timeout=TIMEOUT)
    assert output == "ended\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a signal")
def test_a_program_is_not_started_if_its_parent_has_ended_before(tmp_path: Path) -> None:
    script, marker = parent_process.__file__, tmp_path / "started"
    command = [sys.executable, "-c", f"open({str(marker)!r}, 'w')"]
    arguments = ["1", str(int(signal.SIGTERM)), *command]
    ended = subprocess.run([sys.executable, "-I", "-S", script, *arguments], check=False)
    assert (ended.returncode, marker.exists()) == (1, False)


def test_a_program_gets_its_arguments_and_its_exit_code_is_kept() -> None:
    program = "import sys; print(sys.argv[1:]); sys.exit(7)"
    command = [sys.executable, "-c", program, "a b", "--option"]
    wrapped = parent_process.with_parent_death_signal(command, signal.SIGTERM)
    ended = subprocess.run(wrapped, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("['a b', '--option']\n", 7)


CLOSING_PARENT = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
process.stdin.close()
process.wait()
"""
RELEASED_CHILD = """
import os, time
from chunkq.system.parent_process import after_parent_ended, when_parent_ends

parent = os.getppid()

def end():
    os.write(1, b"parent runs\\n" if os.getppid() == parent else b"parent ended\\n")
    os._exit(0)

when_parent_ends(after_parent_ended(end))
print("waiting", flush=True)
time.sleep(1000)
"""


def test_what_needs_the_locks_of_the_parent_waits_until_it_has_ended() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", CLOSING_PARENT, RELEASED_CHILD],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "waiting\n"
    parent.kill()
    output, _ = parent.communicate(timeout=TIMEOUT)
    assert output == "parent ended\n"
