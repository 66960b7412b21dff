"""`chunkq run` is stopped in the middle: nothing is lost, and nothing is left running."""

import signal

from tests.harness.standard_job import StandardWorkspace
from tests.harness.waiting import wait_until


def test_ctrl_c_ends_a_run_with_130_and_the_same_command_completes_it(
    workspace: StandardWorkspace, undisturbed: StandardWorkspace
) -> None:
    command = ("run", str(workspace.job_file), "--gpus", "none", "-w", "1", "--depth", "2")
    with workspace.start(*command, NET_HOLD="forward", NET_AFTER="5") as cli:
        workspace.wait_until_stopped()
        workspace.wait_for_chunks_in_flight(2)
        before, worker_processes = workspace.done(), cli.children()
        cli.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping after the chunks in flight" in cli.output(), "told")
        workspace.open_gate()
        ended = cli.wait()
        assert worker_processes
        cli.wait_for_children()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert ended.messages == [
        "chunkq: stopping after the chunks in flight; press Ctrl-C again to requeue them and stop "
        "now",
        "chunkq: stopped; the same command continues where it was",
    ]
    assert ended.err.splitlines()[-1] == ended.messages[-1]
    stopped_at = workspace.done()
    assert len(stopped_at) == len(before) + 2
    assert {name: stopped_at[name] for name in before} == before
    assert set(workspace.attempts()) == {0}

    with workspace.start(*command) as again:
        ended = again.wait()
    assert ended.code == 0
    assert "complete: " in ended.err
    done = workspace.done()
    assert {name: done[name] for name in stopped_at} == stopped_at
    assert workspace.stored() == undisturbed.stored()
    assert set(workspace.computed().values()) == {1}


def test_a_killed_run_leaves_no_process_behind(workspace: StandardWorkspace) -> None:
    command = ("run", str(workspace.job_file), "--gpus", "none", "-w", "2")
    with workspace.start(*command, NET_HOLD="forward") as cli:
        workspace.wait_until_stopped()
        # The supervisor and its two workers.
        wait_until(lambda: len(cli.children()) == 3, "all processes are there")
        cli.process.kill()
        cli.process.wait()
        cli.wait_for_children()
    assert workspace.done().keys() <= {".".join(map(str, i)) for i in workspace.job.plan.indices()}
