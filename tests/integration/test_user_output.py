"""What the user's code prints does not mix with the results of a command."""

import json
from pathlib import Path

import pytest

from tests.harness.small_job import CHUNKS, small_workspace
from tests.harness.workspace import Workspace

PRINTING_CODE = """
import atexit, os, sys
import numpy as np

def say(where):
    print(f"python in {where}", end="")
    os.write(1, f"library in {where}".encode())
    if where not in ("network", "step"):  # these are called many times
        os.system(f"echo child in {where}")

say("import")
atexit.register(say, "exit")

def net(batch):
    say("network")
    return np.stack([batch / 100, 1 - batch / 100], axis=1).astype(np.float32)

def preprocessing(batch):
    say("step")
    return batch

def weights(shape):
    say("weights")
    if "FAULT" in os.environ:
        raise ValueError("no weights")
    return np.ones(shape)
"""
PRINTERS = ("python", "library", "child")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """The small job, all of whose code prints."""
    workspace = small_workspace(tmp_path)
    (tmp_path / "code.py").write_text(PRINTING_CODE)
    model = {
        "runtime": "numpy",
        "type": "class",
        "class_file": "code.py",
        "class_name": "net",
        "processing_steps": "code.py",
        "model_input_shape": [8, 8],
        "model_output_shape": [2, 8, 8],
        "max_batch_size": 4,
    }
    workspace.write_job(weight_function=["code.py", "weights"], model_config=model)
    return workspace


@pytest.mark.parametrize("options", [[], ["--check-model"]])
def test_the_json_of_plan_is_valid(workspace: Workspace, options: list[str]) -> None:
    result = workspace.run("plan", "job.json", "--json", *options).ok()
    assert json.loads(result.out)
    for printer in PRINTERS:
        assert f"{printer} in weights" in result.err
        assert f"{printer} in exit" in result.err
        assert (f"{printer} in import" in result.err.partition("in weights")[2]) or not options
    assert ("python in network" in result.err) == bool(options)


def test_what_a_network_prints_before_its_check_fails_is_shown(workspace: Workspace) -> None:
    code = PRINTING_CODE.replace('say("network")', 'say("network"); os._exit(7)')
    (workspace.folder / "code.py").write_text(code)
    result = workspace.run("plan", "job.json", "--check-model")
    assert result.code == 1
    assert "library in network" in result.err
    assert "exit code 7" in result.err


def test_an_error_is_valid_json(workspace: Workspace) -> None:
    result = workspace.run("plan", "job.json", "--json", FAULT="1")
    assert result.code == 2
    assert json.loads(result.out)["error"]["code"] == "job_invalid"


@pytest.mark.parametrize("queue", [None, "inprocess://"])
def test_a_run_prints_its_result_alone(workspace: Workspace, queue: str | None) -> None:
    options = [] if queue is None else ["--queue", queue]
    result = workspace.run("run", "job.json", "--gpus", "none", *options).ok()
    assert [line.partition(":")[0] for line in result.out.splitlines()] == ["complete", "time"]
    assert len(workspace.commits()) == len(CHUNKS)
    for printer in PRINTERS:
        for where in ("import", "network", "step", "weights", "exit"):
            is_printed = f"{printer} in {where}" in result.err
            assert is_printed or (printer == "child" and where in ("network", "step"))


def test_a_worker_prints_to_standard_error(workspace: Workspace) -> None:
    workspace.run("produce", "job.json").ok()
    result = workspace.run("work", "--burst", "--gpus", "none").ok()
    assert result.out == ""
    assert "python in network" in result.err
    assert "child in import" in result.err
