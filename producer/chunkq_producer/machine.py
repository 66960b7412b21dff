"""Whether this machine can run what a job asks for, and on which queue."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import MappingProxyType

from chunkq.errors import JobError
from chunkq.executors import BACKENDS, QUEUE_VARIABLE, queue_url
from chunkq.job import DaskConfig, Job, RayConfig

ENGINES: MappingProxyType[str, str | None] = MappingProxyType(
    {"sqlite": None, "rq": "redis://127.0.0.1:6379/0", "dask": None, "ray": None}
)
"""Name for --executor -> the queue's URL where none is named; None: the embedded queue."""
TO_COME = ("dask", "ray")


def queue_for(engine: str | None, given: str | None, of_job: str | None) -> str:
    """Return the queue's URL; raises JobError if it is not of the kind asked for."""
    if engine in TO_COME:
        raise JobError(f"--executor: {engine} is not in this version; sqlite and rq are")
    if engine is None:
        return queue_url(given, of_job)
    named = given or os.environ.get(QUEUE_VARIABLE) or of_job
    if named is None:
        return queue_url(ENGINES[engine])
    scheme = named.partition("://")[0]
    usual = (ENGINES[engine] or "sqlite://").partition("://")[0]
    if BACKENDS.get(scheme) != BACKENDS[usual]:
        raise JobError(f"--executor: {engine} does not fit the queue {scheme}://")
    return named


def check_machine(job: Job) -> None:
    """Raise JobError with one line for each thing that a job asks of this machine in vain."""
    problems = []
    if job.cluster == "slurm":
        reason = "is not in this version for `run`; submit `chunkq work` with sbatch instead"
        if "SLURM_JOB_ID" not in os.environ:
            reason = "but this is no SLURM allocation; set cluster: local, or start it with srun"
        problems.append(f"cluster: slurm, {reason}")
    elif job.cluster == "running":
        problems.append(
            "cluster: running speaks of a Dask or Ray cluster, which are not in this version; "
            "name a running Redis with --queue and set cluster: local"
        )
    if job.model.device == "cuda" and job.hardware == "cpu_only":
        problems.append("model_config.device: cuda, but hardware is cpu_only; set device: cpu")
    elif job.model.device == "cuda" and not _has_gpu():
        problems.append(
            "model_config.device: cuda, but this machine shows no GPU; set device: cpu and "
            "hardware: cpu_only, or run it where there is one"
        )
    if problems:
        raise JobError(problems)


def unused(job: Job) -> list[str]:
    """Return one line for each section of the job that speaks of another kind of queue."""
    sections = {
        "dask_config": job.dask_config != DaskConfig(),
        "ray_config": job.ray_config != RayConfig(),
    }
    return [
        f"{key} is for --executor {key.partition('_')[0]}; it is not used here"
        for key, given in sections.items()
        if given
    ]


def _has_gpu() -> bool:
    """Tell whether a CUDA device is granted here, without importing a library for it."""
    granted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if granted is not None and granted.strip() in ("", "-1"):
        return False
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False, timeout=30)
    return listing.returncode == 0 and b"GPU" in listing.stdout
