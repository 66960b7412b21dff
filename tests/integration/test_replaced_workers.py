"""A worker process is restarted before it runs a job of the other framework."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chunkq
from chunkq.job.job_folder import JobFolder
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import EXIT_RESTART, TaskCounts
from chunkq.queue.contract.settings import WorkerSettings
from chunkq.queue.registry import open_executor
from tests.integration import test_workers
from tests.integration.test_workers import JOB, FakeWorkers

fake_workers = test_workers.fake_workers  # the fixture

# ----------------------------------------------------------------------------- supervisor


def test_a_process_that_asks_for_a_restart_is_restarted_at_once_and_counts_as_no_crash(
    fake_workers: FakeWorkers, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_workers.settings = WorkerSettings(restart_delay=100.0)
    tasks = [Task("infer", *JOB, 0, (number,)) for number in range(2)]
    fake_workers.queue.submit(tasks)
    fake_workers.patch.setenv("FAKE_RESERVES", "1")
    restarts = 2 * fake_workers.settings.early_deaths
    assert fake_workers.supervise(*[str(EXIT_RESTART)] * restarts, "0") == 0
    records = fake_workers.records
    assert len(records) == restarts + 1
    # Its chunks are requeued without counting an attempt.
    expected = [[task.id, 1] for task in tasks]
    assert [record["tasks"] for record in records] == [expected] * (restarts + 1)
    assert fake_workers.queue.counts(JOB) == TaskCounts(queued=2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "new process" in line]
    assert len(lines) == restarts
    for record, line in zip(records, lines, strict=False):
        assert line.startswith(f"chunkq: worker {record['options']['worker']} ")


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
RECORDING_STEPS = """\
import os, sys

def preprocessing(batch):
    loaded = [name for name in ("tensorflow", "torch") if name in sys.modules]
    with open(os.environ["FRAMEWORKS_FILE"], "a") as file:
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
def test_one_worker_runs_jobs_of_both_frameworks_in_separate_processes(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    volume = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)
    np.save(tmp_path / "in.npy", volume)
    (tmp_path / "steps.py").write_text(RECORDING_STEPS)
    url = f"sqlite://{tmp_path / 'queue.db'}"
    names = [f"{number}-{framework}" for number, framework in enumerate(order)]
    for name, framework in zip(names, order, strict=True):
        # The compiler imports triton and is slow, so it is used in one order only.
        keys = {"compile": True} if framework == "torch" and order[0] == "tensorflow" else {}
        chunkq.produce(write_job(tmp_path, name, framework, **keys), queue=url)
    command = ["work", "--burst", "--gpus", "none", "-w", "1", "--queue", url]
    result = subprocess.run(
        [sys.executable, "-m", "chunkq", *command],
        env={**os.environ, "FRAMEWORKS_FILE": str(tmp_path / "frameworks")},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "killed" not in result.stderr
    assert result.stderr.count("the next job needs a new process") == 1, result.stderr
    lines = {tuple(line.split()) for line in (tmp_path / "frameworks").read_text().splitlines()}
    assert len({pid for pid, _ in lines}) == 2
    assert {loaded for _, loaded in lines} == {"tensorflow", "torch"}  # never both in a process
    for name in names:
        folder = JobFolder(str(tmp_path / f"{name}.zarr.chunkq"))
        ledger = folder.ledger(folder.require_record().epoch).item(0)
        assert [commit.attempt for commit in ledger.read_commits("infer")] == [1, 1]
        assert ledger.failures(["infer"]) == []
        chunkq.finalize(folder.output)
        import zarr

        output = zarr.open_array(f"{folder.output}/0", mode="r")[:]
        np.testing.assert_allclose(output, np.maximum(volume, 0) * 2 + 1, rtol=0, atol=1e-5)
    executor = open_executor(url)
    assert executor.jobs() == {}
    executor.close()
