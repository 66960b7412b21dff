"""Check that this machine has what a job requires: a SLURM allocation, a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess

from chunkq.errors import JobError
from chunkq.job import Job
from chunkq_producer.cluster import CLUSTERS
from chunkq_producer.slurm import OUTSIDE_SLURM


def check_machine(job: Job, engine: str) -> None:
    """Raise JobError with one line for each requirement that this machine does not meet."""
    problems = []
    if job.cluster == "slurm" and "SLURM_JOB_ID" not in os.environ:
        problems.append(OUTSIDE_SLURM)
    elif job.cluster != "local" and engine not in CLUSTERS:
        problems.append(
            f"cluster: {job.cluster} is unsupported with --executor {engine}, expected dask or "
            "ray; set cluster: local and run `chunkq work` on each node"
        )
    if job.model.device == "cuda" and job.hardware == "cpu_only":
        problems.append(
            "model_config.device: cuda conflicts with hardware: cpu_only; set device: cpu"
        )
    elif job.model.device == "cuda" and job.cluster != "running" and not _has_gpu():
        problems.append(
            "model_config.device: cuda, but no GPU was found on this machine; set device: cpu and "
            "hardware: cpu_only, or run on a machine with a GPU"
        )
    if problems:
        raise JobError(problems)


def _has_gpu() -> bool:
    """Return whether a CUDA device is visible, without importing a CUDA library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False, timeout=30)
    return listing.returncode == 0 and b"GPU" in listing.stdout
