"""Check the network in a separate process, so that this one does not load its libraries."""

from __future__ import annotations

import signal
import subprocess

from chunkq.job.events import Sink, StageProgress, ignore
from chunkq.job.record import JobRecord
from chunkq.job.sample_job import copy_job
from chunkq.model_check import CheckReport, ModelCheck
from chunkq.system.parent_process import with_parent_death_signal
from chunkq.system.python_process import python_module
from chunkq.system.scratch import scratch_folder

STAGE = "checking the network on one batch"


def check_model(record: JobRecord, *, depth: int | None = None, emit: Sink = ignore) -> ModelCheck:
    """Load a job's network on this machine and run a batch of patches.

    With `depth`, also time patches and run whole chunks, `depth` chunks in flight. Raises
    ModelError if the network cannot be used, and JobError if a `dtype` cannot hold the values.
    """
    emit(StageProgress(STAGE))
    # The system may kill the other process for its memory use, so the folder is created here. The
    # job is too, because a worker does not import the libraries that create arrays.
    with scratch_folder("model-check") as folder:
        options = []
        if depth:
            job = copy_job(record, str(folder))
            options = ["--depth", str(depth), "--job", job.folder.path]
        # Not standard output, to which the network may print.
        path = folder / "report.json"
        completed = subprocess.run(
            with_parent_death_signal(
                python_module("chunkq", "check-model", "--report", str(path), *options),
                signal.SIGKILL,
            ),
            input=record.to_json(),
            capture_output=True,
            check=False,
        )
        line = path.read_bytes() if path.exists() else b""
    report = CheckReport.read(line) or CheckReport(exit_code=completed.returncode)
    return report.result(completed.stderr.decode(errors="replace").strip().splitlines())
