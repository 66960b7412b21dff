"""`chunkq run` starts its workers while it checks the job; the first one checks the network."""

import json
import os
import signal
import time
from collections.abc import Iterable
from math import ceil
from pathlib import Path

import pytest

from chunkq.errors import ErrorCode
from chunkq.system.cores import available_cores
from chunkq.system.interrupts import SAME_SIGNAL_SECONDS
from tests.harness.files import everything_below
from tests.harness.networks import toy_model
from tests.harness.processes import is_alive
from tests.harness.small_job import CHUNKS, small_workspace
from tests.harness.waiting import wait_until
from tests.harness.workspace import Workspace

RECORD_IMPORTS = """
import os, sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            with open(os.environ["NET_TRACE"], "a") as file:
                file.write(f"import {os.getpid()}\\n")

if "NET_TRACE" in os.environ:
    sys.meta_path.insert(0, Recorder())
"""
NETWORK = """
import os, signal, sys, time
import numpy as np

sys.stdout.write("no newline, and [1, 2] {}")
sys.stderr.write("a warning of the network\\n")


def trace(event):
    with open(os.environ["NET_TRACE"], "a") as file:
        file.write(f"{event} {os.getpid()} {os.environ.get('CHUNKQ_THREADS')}")
        file.write(f" visible:{os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")


class Net:
    def __init__(self):
        trace("load")
        if os.environ.get("NET_FAULT") == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("NET_FAULT") == "exits":
            os._exit(3)
        if os.environ.get("NET_FAULT") == "hangs":
            time.sleep(1000)

    def __call__(self, batch):
        trace("call" if batch.any() else "zeros")
        if os.environ.get("NET_FAULT") == "raises":
            raise ValueError("no such layer")
        return np.stack([batch / 100, 1 - batch / 100], axis=1).astype(np.float32)
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """The small job with a network that records its loads and calls, and prints."""
    workspace = small_workspace(tmp_path / "job")
    (workspace.folder / "net.py").write_text(NETWORK)
    workspace.values["model_config"] = {
        "runtime": "numpy",
        "type": "class",
        "class_file": "net.py",
        "class_name": "Net",
        "model_input_shape": [8, 8],
        "model_output_shape": [2, 8, 8],
        "max_batch_size": 4,
    }
    workspace.write_job()
    workspace.environment["NET_TRACE"] = str(tmp_path / "trace")
    return workspace


def traced_fields(workspace: Workspace, event: str) -> list[list[str]]:
    """Return for each event the id of its process, its threads and the GPUs that are visible."""
    path = Path(workspace.environment["NET_TRACE"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1:] for line in lines if line.split()[0] == event]


def traced(workspace: Workspace, event: str) -> list[str]:
    """Return the ids of the processes of an event, in its order."""
    return [process for process, *_ in traced_fields(workspace, event)]


def wait_for_end(pids: Iterable[str]) -> None:
    wait_until(lambda: not any(is_alive(int(pid)) for pid in pids), "the workers have ended")


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_loads_the_network_once_and_computes_with_it(
    workspace: Workspace, workers: int
) -> None:
    arguments = ("run", "job.json", "--gpus", "none", "-w", str(workers))
    result = workspace.run(*arguments, CUDA_VISIBLE_DEVICES="0").ok()
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, available_cores() // workers)
    assert {tuple(fields[1:]) for fields in traced_fields(workspace, "load")} == {
        (str(threads), "visible:")
    }
    loads = traced(workspace, "load")
    assert len(loads) == len(set(loads)) == workers
    assert set(traced(workspace, "call")) <= set(loads)
    assert len(set(traced(workspace, "zeros"))) == workers - 1  # all but the one that checks
    assert len(workspace.commits()) == len(CHUNKS)
    assert "complete: " in result.out
    assert result.err.count("a warning of the network") == workers


def test_a_chunk_uses_the_outputs_of_the_batch_of_the_check(workspace: Workspace) -> None:
    workspace.write_job(chunksize=[32, 24])
    workspace.run("run", "job.json", "--gpus", "none").ok()
    [commit] = workspace.commits()
    stored, calls = workspace.stored(), len(traced(workspace, "call"))
    batches = ceil(commit.patches / 4)
    assert calls == batches + 1  # the check repeats a patch
    workspace.run("run", "job.json", "--queue", "inprocess://run", "--overwrite").ok()
    assert workspace.stored() == stored


def test_the_framework_is_imported_in_one_process(tmp_path: Path) -> None:
    workspace = small_workspace(tmp_path / "job")
    workspace.write_job(model_config=toy_model(workspace.folder, (8, 8), runtime="torch"))
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(RECORD_IMPORTS)
    path = os.pathsep.join([str(hooks), *filter(None, [os.environ.get("PYTHONPATH")])])
    workspace.environment["NET_TRACE"] = str(tmp_path / "trace")
    workspace.run("run", "job.json", "--gpus", "none", PYTHONPATH=path).ok()
    assert len(set(traced(workspace, "import"))) == 1


@pytest.mark.parametrize(
    ("fault", "fragments"),
    [
        ("raises", ["ValueError on a batch of zeros: no such layer"]),
        ("killed", ["exit code -9: a warning of the network"]),
        ("exits", ["exit code 3: a warning of the network"]),
    ],
)
def test_an_unusable_network_is_refused_in_one_line_before_anything_is_written(
    workspace: Workspace, fault: str, fragments: list[str]
) -> None:
    before = everything_below(workspace.folder)
    result = workspace.run("run", "job.json", "--gpus", "none", "-w", "2", NET_FAULT=fault)
    result.refused(1, ErrorCode.MODEL_UNUSABLE, *fragments)
    assert len(result.err.splitlines()) == 2  # what the run does, and the error
    assert set(everything_below(workspace.folder)) - set(before) <= {"__pycache__"}
    loads = traced(workspace, "load")
    assert 1 <= len(loads) <= 2  # no process is restarted
    wait_for_end(loads)


def test_run_and_plan_refuse_a_network_with_the_same_line(workspace: Workspace) -> None:
    run = workspace.run("run", "job.json", "--gpus", "none", NET_FAULT="raises")
    plan = workspace.run("plan", "job.json", "--check-model", NET_FAULT="raises")
    # The lines before are what the network printed.
    assert plan.err.splitlines()[-1:] == run.err.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_during_the_check_leaves_no_process_and_no_file(
    workspace: Workspace, number: signal.Signals
) -> None:
    before = everything_below(workspace.folder)
    with workspace.start("run", "job.json", "--gpus", "none", NET_FAULT="hangs") as command:
        loads = wait_until(lambda: traced(workspace, "load"), "the network is loaded")
        for pid in (command.pid, *command.children()):  # as SLURM and service managers do
            os.kill(pid, number)
        first = time.monotonic()
        wait_until(lambda: "stopping" in command.output(), "the first signal is acknowledged")
        wait_until(lambda: time.monotonic() > first + 2 * SAME_SIGNAL_SECONDS, "another one counts")
        assert all(map(is_alive, command.known))
        command.process.send_signal(number)
        command.wait().refused(130, "stopping", ErrorCode.INTERRUPTED)
        assert len(command.output().splitlines()) == 3  # after what the run does
        assert not any(map(is_alive, command.known))
    assert set(everything_below(workspace.folder)) - set(before) <= {"__pycache__"}
    wait_for_end(loads)


def test_an_invalid_job_ends_the_workers_at_once(workspace: Workspace) -> None:
    before = everything_below(workspace.folder)
    workspace.write_job("bad.json", input="missing.zarr")
    result = workspace.run("run", "bad.json", "--gpus", "none")
    result.refused(2, ErrorCode.STORE_MISSING, "missing.zarr")
    assert set(everything_below(workspace.folder)) - set(before) == {"bad.json"}
    assert not traced(workspace, "load")


def test_workers_that_cannot_start_are_reported_before_anything_is_written(
    workspace: Workspace,
) -> None:
    settings = json.dumps({"no_such_setting": 1})
    before = everything_below(workspace.folder)
    result = workspace.run("run", "job.json", CHUNKQ_WORKER_SETTINGS=settings)
    assert result.code == 1
    assert "no_such_setting" in result.err
    assert result.messages[-1].endswith(f"[{ErrorCode.WORKER_FAILED}]")
    assert everything_below(workspace.folder) == before


def test_a_complete_job_needs_no_network(workspace: Workspace) -> None:
    workspace.run("run", "job.json", "--gpus", "none").ok()
    loads = traced(workspace, "load")
    workspace.run("run", "job.json", "--gpus", "none", NET_FAULT="raises").ok()
    assert traced(workspace, "load") == loads
