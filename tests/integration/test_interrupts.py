"""SIGINT and SIGTERM at every moment of a command's start: one line, code 130, nothing is left."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chunkq.errors import ErrorCode
from tests.harness.files import everything_below
from tests.harness.processes import RunningCommand
from tests.harness.small_job import CHUNKS, small_workspace
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace

HOLD = """
import os, sys, time

held = False


def hold(event, arguments):
    # Imports, opened files, connections: CPython reports them before they happen.
    global held
    if not held and event == os.environ["HOLD_EVENT"]:
        if os.path.basename(str(arguments[0])) == os.environ["HOLD_TEXT"]:
            held = True
            open(os.environ["HELD"], "x").close()
            time.sleep(600)


if os.environ.get("HOLD_PARENT") == str(os.getppid()):
    sys.addaudithook(hold)
"""
"""A `sitecustomize` that stops the command, not its child processes, at an event."""
TERM, INT = signal.SIGTERM, signal.SIGINT
START = [
    ("import", "click", TERM),
    ("import", "chunkq_producer.runner", INT),
    ("open", "job.json", TERM),  # of the user
    ("import", "chunkq_producer.run_steps", INT),  # while the workers import the framework
]
"""Moments before the network is checked."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """The small job, with a folder of its own for temporary files."""
    workspace = small_workspace(tmp_path / "job")
    for name in ("hooks", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(HOLD)
    path = [str(tmp_path / "hooks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    workspace.environment["PYTHONPATH"] = os.pathsep.join(path)
    workspace.environment["TMPDIR"] = str(tmp_path / "temporary")
    return workspace


@contextmanager
def held(workspace: Workspace, event: str, text: str, *arguments: str) -> Iterator[RunningCommand]:
    """Start a command and wait until it stops at an event."""
    marker = workspace.folder.parent / "held"
    hold = {"HOLD_EVENT": event, "HOLD_TEXT": text, "HOLD_PARENT": str(os.getpid())}
    with workspace.start(*arguments, HELD=str(marker), **hold) as command:
        wait_until(
            lambda: marker.exists() or command.process.poll() is not None, "the command stops"
        )
        assert command.process.poll() is None, command.output()
        yield command


def assert_interrupted(workspace: Workspace, command: RunningCommand, number: int) -> None:
    """Send a signal; the command ends with one line, and leaves neither process nor folder."""
    command.children()
    command.process.send_signal(number)
    ended = command.wait(60)
    command.wait_for_children()
    ended.refused(130)
    # The check of the network has lines of its own.
    [line] = [line for line in ended.messages if " the network" not in line]
    assert line.endswith(f"[{ErrorCode.INTERRUPTED}]")
    assert everything_below(workspace.folder.parent / "temporary") == []


@pytest.mark.parametrize(("event", "text", "number"), START)
def test_a_run_that_has_written_nothing_leaves_nothing(
    workspace: Workspace, event: str, text: str, number: int
) -> None:
    before = everything_below(workspace.folder)
    with held(workspace, event, text, "run", "job.json", "--gpus", "none") as command:
        assert_interrupted(workspace, command, number)
    assert everything_below(workspace.folder) == before


@pytest.mark.parametrize(
    ("command", "event", "text"),
    [
        (["run", "job.json", "--gpus", "none"], "os.mkdir", "out.zarr.chunkq"),
        (["produce", "job.json"], "sqlite3.connect", "queue.db"),
    ],
)
def test_a_job_continues_whose_command_was_interrupted_when_it_wrote(
    workspace: Workspace, command: list[str], event: str, text: str
) -> None:
    with held(workspace, event, text, *command) as started:
        assert_interrupted(workspace, started, TERM)
    workspace.call("produce", "job.json").ok()
    assert workspace.counts().queued == len(CHUNKS)


@pytest.mark.parametrize(
    ("command", "event", "text"),
    [
        (["plan", "job.json", "--check-model"], "open", "record.json"),
        (["work", "--gpus", "none"], "import", "chunkq_worker.supervisor"),
        (["tune", "job.json", "--max-time", "30"], "import", "chunkq_worker.tune.search"),
    ],
)
def test_other_commands_end_alike(
    workspace: Workspace, command: list[str], event: str, text: str
) -> None:
    before = everything_below(workspace.folder)
    with held(workspace, event, text, *command) as started:
        assert_interrupted(workspace, started, TERM)
    assert everything_below(workspace.folder) == before


def test_a_command_ignores_the_signals_that_its_caller_ignores(workspace: Workspace) -> None:
    # As a shell lets commands in the background ignore Ctrl-C.
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        run, module = ("run", "job.json", "--gpus", "none"), "chunkq_producer.run_steps"
        with held(workspace, "import", module, *run) as command:
            signal.signal(INT, before)
            command.process.send_signal(INT)
            assert_interrupted(workspace, command, TERM)
    finally:
        signal.signal(INT, before)
