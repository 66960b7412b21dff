"""A worker process is replaced before it takes a job of the other framework."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chunkq
from chunkq.executors import open_executor
from chunkq.executors.base import EXIT_RESTART, Counts
from chunkq.executors.settings import WorkerSettings
from chunkq.ledger import JobFolder
from chunkq.tasks import Task
from tests.integration import test_workers
from tests.integration.test_workers import JOB, Nursery

nursery = test_workers.nursery  # its fixture

# ----------------------------------------------------------------------------- supervisor


def test_a_child_to_be_replaced_is_started_again_at_once_and_does_not_count_as_dead(
    nursery: Nursery, capfd: pytest.CaptureFixture[str]
) -> None:
    nursery.settings = WorkerSettings(restart_delay=100.0)
    tasks = [Task("infer", JOB, (number,)) for number in range(2)]
    nursery.queue.submit(tasks)
    nursery.patch.setenv("FAKE_TAKES", "1")
    again = 2 * nursery.settings.early_deaths
    assert nursery.supervise(*[str(EXIT_RESTART)] * again, "0") == 0
    assert len(nursery.born) == again + 1
    # Whatever it still held goes back uncounted.
    assert [child["tasks"] for child in nursery.born] == [[[task.id, 1] for task in tasks]] * (
        again + 1
    )
    assert nursery.queue.counts(JOB) == Counts(queued=2)
    names = [child["orders"]["worker"] for child in nursery.born]
    said = [line for line in capfd.readouterr().err.splitlines() if "worker " in line]
    assert said[1:] == [
        f"chunkq: worker {name} is replaced: the next job needs a new process"
        for name in names[:-1]
    ]


# ---------------------------------------------------------------------------- real packages

NETWORK = {
    "torch": """\
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2 + 1
""",
    "tensorflow": """\
import keras

class Net(keras.Model):
    def call(self, x):
        return keras.ops.relu(x) * 2 + 1
""",
}
WITNESS = """\
import os, sys

def preprocessing(batch):
    loaded = [name for name in ("tensorflow", "torch") if name in sys.modules]
    with open(os.environ["WITNESS"], "a") as file:
        file.write(f"{os.getpid()} {','.join(loaded)}\\n")
    return batch
"""


def write_job(folder: Path, name: str, framework: str, **keys: Any) -> dict[str, Any]:
    (folder / f"{framework}_net.py").write_text(NETWORK[framework])
    return {
        "input": str(folder / "in.npy"),
        "output": str(folder / f"{name}.zarr"),
        "inference_type": "patch",
        "chunksize": [8, 8],
        "threads": 1,
        "model_config": {
            "runtime": framework,
            "type": "class",
            "class_file": str(folder / f"{framework}_net.py"),
            "class_name": "Net",
            "model_input_shape": [8, 8],
            "processing_steps": str(folder / "steps.py"),
            **keys,
        },
    }


@pytest.mark.parametrize(
    "order", [("tensorflow", "torch", "tensorflow"), ("torch", "tensorflow", "torch")]
)
def test_one_worker_serves_jobs_of_both_frameworks_in_processes_of_one_each(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    volume = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)
    np.save(tmp_path / "in.npy", volume)
    (tmp_path / "steps.py").write_text(WITNESS)
    url = f"sqlite://{tmp_path / 'queue.db'}"
    names = [f"{number}-{framework}" for number, framework in enumerate(order)]
    for name, framework in zip(names, order, strict=True):
        # The compiler imports triton, and takes long; one of the orders is enough.
        keys = {"compile": True} if framework == "torch" and order[0] == "tensorflow" else {}
        chunkq.produce(write_job(tmp_path, name, framework, **keys), queue=url)
    command = ["work", "--burst", "--gpus", "none", "-w", "1", "--queue", url]
    done = subprocess.run(
        [sys.executable, "-m", "chunkq", *command],
        env={**os.environ, "WITNESS": str(tmp_path / "witness")},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "killed" not in done.stderr
    assert done.stderr.count("is replaced: the next job needs a new process") == 1, done.stderr
    seen = {tuple(line.split()) for line in (tmp_path / "witness").read_text().splitlines()}
    assert len({pid for pid, _ in seen}) == 2
    assert {loaded for _, loaded in seen} == {"tensorflow", "torch"}  # nowhere both
    for name in names:
        folder = JobFolder(str(tmp_path / f"{name}.zarr.chunkq"))
        ledger = folder.ledger(folder.require_record().epoch)
        assert [commit.attempt for commit in ledger.read_commits("infer")] == [1, 1]
        assert ledger.failures() == []
        chunkq.finalize(folder.output)
        import zarr

        found = zarr.open_array(f"{folder.output}/0", mode="r")[:]
        np.testing.assert_allclose(found, np.maximum(volume, 0) * 2 + 1, rtol=0, atol=1e-5)
    executor = open_executor(url)
    assert executor.jobs() == {}
    executor.close()
