"""Processes that outlive a SIGTERM to all processes of a run."""

import signal
import subprocess
import sys

from chunkq.system.signal_masks import sigterm_blocked
from tests.harness.waiting import TIMEOUT

SERVER = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # as Ray's servers do
print("ready", flush=True)
sys.stdin.read()
print("lived")
"""
USER = """
import signal, subprocess, sys
from chunkq.system.signal_masks import discard_blocked_sigterm
discard_blocked_sigterm()
child = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
sys.stdin.read()
child.terminate()
print(child.wait())
"""


def output_after_sigterm(program: str) -> str:
    with sigterm_blocked():
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    return output


def test_a_process_that_is_started_meanwhile_never_receives_sigterm() -> None:
    assert output_after_sigterm(SERVER) == "lived\n"


def test_the_mask_of_the_calling_thread_is_restored() -> None:
    with sigterm_blocked():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_of_the_users_code_in_such_a_process_can_be_terminated() -> None:
    assert output_after_sigterm(USER) == f"{-signal.SIGTERM}\n"
