"""Interrupted or killed `chunkq run`: no result is lost and no process keeps running."""

import os
import signal

from chunkq.errors import ErrorCode
from tests.harness.standard_job import StandardWorkspace
from tests.harness.waiting import wait_until


def test_ctrl_c_stops_a_run_with_130_and_the_same_command_completes_the_job(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    arguments = ("run", str(workspace.job_file), "--gpus", "none", "-w", "1", "--depth", "2")
    with workspace.start(*arguments, NET_HOLD="forward", NET_AFTER="5") as command:
        workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(2)
        before, worker_processes = workspace.done(), command.children()
        command.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in command.output(), "the worker is stopping")
        workspace.open_gate()
        result = command.wait()
        assert worker_processes
        command.wait_for_children()
    assert result.code == 130
    assert "Traceback" not in result.err
    *_, stopping, interrupted = result.messages  # after the ranges of the network's values
    assert interrupted.endswith(f"[{ErrorCode.INTERRUPTED}]")
    assert "stopping" in stopping
    assert result.err.splitlines()[-1] == interrupted
    after_stop = workspace.done()
    assert len(after_stop) == len(before) + 2
    assert {name: after_stop[name] for name in before} == before
    assert set(workspace.attempts()) == {0}

    with workspace.start(*arguments) as command:
        result = command.wait()
    assert result.code == 0
    assert "complete: " in result.err
    done = workspace.done()
    assert {name: done[name] for name in after_stop} == after_stop
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_sigterm_to_all_processes_of_a_run_stops_it_after_the_chunks_in_flight(
    workspace: StandardWorkspace,
) -> None:
    arguments = ("run", str(workspace.job_file), "--gpus", "none", "-w", "1", "--depth", "2")
    with workspace.start(*arguments, NET_HOLD="forward", NET_AFTER="5") as command:
        workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(2)
        before = workspace.done()
        for pid in (command.pid, *command.children()):  # as a service manager or SLURM does
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: "stopping" in command.output(), "the worker is stopping")
        workspace.open_gate()
        assert command.wait().code == 130
        command.wait_for_children()
    assert len(workspace.done()) == len(before) + 2
    assert set(workspace.attempts()) == {0}


def test_a_signal_while_the_network_is_checked_lets_the_first_chunks_be_finished(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    arguments = ("run", str(workspace.job_file), "--gpus", "none", "-w", "1")
    with workspace.start(*arguments, NET_HOLD="load", NET_SLEEP="0.5") as command:
        workspace.wait_until_stopped()
        for pid in (command.pid, *command.children()):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: "stopping" in command.output(), "the signal is acknowledged")
        assert not workspace.job_folder.exists()
        workspace.open_gate()
        assert command.wait().code == 130
        command.wait_for_children()
    done = workspace.done()
    assert 0 < len(done) < len(undisturbed.done())
    assert set(workspace.attempts()) == {0}
    with workspace.start(*arguments) as command:
        assert command.wait().code == 0
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_no_process_of_a_killed_run_keeps_running(workspace: StandardWorkspace) -> None:
    arguments = ("run", str(workspace.job_file), "--gpus", "none", "-w", "2")
    with workspace.start(*arguments, NET_HOLD="forward") as command:
        workspace.wait_until_stopped()
        # The supervisor and its two worker processes.
        wait_until(lambda: len(command.children()) == 3, "all processes are running")
        command.process.kill()
        command.process.wait()
        command.wait_for_children()
    assert workspace.done().keys() <= {".".join(map(str, i)) for i in workspace.item.plan.indices()}
