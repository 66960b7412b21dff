"""Whether this machine can run what a job asks for."""

from __future__ import annotations

import os
import shutil
import subprocess

from chunkq.errors import JobError
from chunkq.job import Job
from chunkq_producer.cluster import CLUSTERS


def check_machine(job: Job, engine: str) -> None:
    """Raise JobError with one line for each thing that a job asks of this machine in vain."""
    problems = []
    if job.cluster == "slurm" and "SLURM_JOB_ID" not in os.environ:
        problems.append(
            "cluster: slurm, but this is no SLURM allocation; set cluster: local, or start it "
            "with srun"
        )
    elif job.cluster != "local" and engine not in CLUSTERS:
        problems.append(
            f"cluster: {job.cluster} is for --executor dask and --executor ray; a Redis needs "
            "none: set cluster: local, and start `chunkq work` on the nodes"
        )
    if job.model.device == "cuda" and job.hardware == "cpu_only":
        problems.append("model_config.device: cuda, but hardware is cpu_only; set device: cpu")
    elif job.model.device == "cuda" and job.cluster != "running" and not _has_gpu():
        problems.append(
            "model_config.device: cuda, but this machine shows no GPU; set device: cpu and "
            "hardware: cpu_only, or run it where there is one"
        )
    if problems:
        raise JobError(problems)


def _has_gpu() -> bool:
    """Tell whether a CUDA device is granted here, without importing a library for it."""
    granted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if granted is not None and granted.strip() in ("", "-1"):
        return False
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False, timeout=30)
    return listing.returncode == 0 and b"GPU" in listing.stdout
