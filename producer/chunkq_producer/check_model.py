"""Check the network in a separate process, so that this one does not load its libraries."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from chunkq import json_values
from chunkq.errors import ErrorCode, JobError, ModelError
from chunkq.job.events import Sink, StageProgress, ignore
from chunkq.job.record import JobRecord
from chunkq.job.sample_job import copy_job
from chunkq.model_check import ModelCheck
from chunkq.system.parent_process import with_parent_death_signal
from chunkq.system.scratch import scratch_folder

STAGE = "checking the network on one batch"


def check_model(record: JobRecord, *, depth: int | None = None, emit: Sink = ignore) -> ModelCheck:
    """Load a job's network on this machine and run a batch of zeros and one of patches.

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
        completed = subprocess.run(
            with_parent_death_signal(
                [sys.executable, "-m", "chunkq", "check-model", "--json", *options], signal.SIGKILL
            ),
            input=record.to_json(),
            capture_output=True,
            check=False,
        )
    lines = completed.stdout.decode(errors="replace").strip().splitlines()
    if completed.returncode == 0 and lines:
        return json_values.decode(ModelCheck, lines[-1])
    raise _reported_error(lines) or ModelError(_crash(completed))


def _reported_error(lines: list[str]) -> ModelError | JobError | None:
    """Return the error that the command printed as JSON; None if it crashed.

    It is a JobError if the network can be used but a `dtype` of the job cannot.
    """
    try:
        error = json.loads(lines[-1])["error"]
        code, message = ErrorCode(error["code"]), str(error["message"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    if code is ErrorCode.DTYPE_UNSUITABLE:
        return JobError(message, code=code)
    return ModelError(message, code=code)


def _crash(completed: subprocess.CompletedProcess[bytes]) -> str:
    last_line = completed.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return (
        f"model_config: the check of the network ended with exit code {completed.returncode}: "
        f"{' '.join(last_line) or 'no output'}"
    )
