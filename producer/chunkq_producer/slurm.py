"""Coordinate the tasks of one `srun` step: the first task leads, the others follow.

All tasks run the same command. They communicate through the job folder, which all nodes share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from chunkq import json_values
from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.job.job_path import job_folder_of
from chunkq.storage.objects import ObjectFolder

POLL_SECONDS = 1.0
LEADER_TIMEOUT = 900.0
"""Seconds within which the leader must have produced the job and started the cluster."""
OUTSIDE_SLURM = (
    "cluster: slurm requires a SLURM allocation, but SLURM_JOB_ID is missing; set cluster: local, "
    "or start the command with srun"
)


@dataclass(frozen=True)
class Step:
    """This process among the tasks of a job step, one task per node."""

    rank: int
    size: int
    node: str
    name: str

    @classmethod
    def from_environment(cls) -> Self:
        """Read the variables that srun sets. Raises JobError outside of srun."""
        variable = os.environ.get
        if "SLURM_JOB_ID" not in os.environ:
            raise JobError(OUTSIDE_SLURM)
        if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
            raise JobError(
                "cluster: slurm requires one task per node, but this process is the batch script; "
                "run `srun --ntasks-per-node=1 chunkq run …`"
            )
        names = (
            variable("SLURM_JOB_ID"),
            variable("SLURM_STEP_ID"),
            variable("SLURM_RESTART_COUNT", "0"),
        )
        step = cls(
            rank=int(variable("SLURM_PROCID", "0")),
            size=int(variable("SLURM_STEP_NUM_TASKS") or variable("SLURM_NTASKS") or 1),
            node=variable("SLURMD_NODENAME", ""),
            name="cluster-" + "-".join(str(name) for name in names) + ".json",
        )
        if int(variable("SLURM_LOCALID", "0")) > 0:
            raise JobError(
                f"cluster: slurm requires one task per node, found several on node {step.node}; "
                "set --ntasks-per-node=1, since each task uses all devices of its node"
            )
        return step


@dataclass(frozen=True)
class Announcement:
    """What other nodes need to join the cluster: address, and Dask certificate or Ray token."""

    address: str
    secret: str = ""


@contextmanager
def announce(output: str, step: Step | None) -> Iterator[Callable[[Announcement], None]]:
    """Yield a function that publishes an announcement; withdraw the announcement at the end.

    The announcement, with its secret, is a file in the job folder that only this user can read.
    In a bucket, everyone who can read the job folder can read it. Outside of a SLURM step, there
    are no other nodes and nothing is written.
    """
    if step is None:
        yield lambda announcement: None
        return
    folder = ObjectFolder(job_folder_of(output))
    published = False

    def publish(announcement: Announcement) -> None:
        nonlocal published
        folder.put(step.name, json_values.encode(announcement), private=True)
        published = True

    try:
        yield publish
    finally:
        if published:
            folder.delete(step.name)


def wait_for_leader(output: str, step: Step) -> Announcement:
    """Wait for the leader's announcement and return it. Raises ChunkqError after a timeout."""
    deadline = time.monotonic() + LEADER_TIMEOUT
    while (content := ObjectFolder(job_folder_of(output)).get(step.name)) is None:
        if time.monotonic() > deadline:
            raise ChunkqError(
                f"cluster: the first task of this step has not started the cluster within "
                f"{LEADER_TIMEOUT:.0f} s; fix the errors of that task (see srun --label)",
                code=ErrorCode.CLUSTER_UNAVAILABLE,
            )
        time.sleep(POLL_SECONDS)
    return json_values.decode(Announcement, content)


def has_ended(output: str, step: Step) -> bool:
    """Return whether the leader has withdrawn its announcement."""
    return not ObjectFolder(job_folder_of(output)).exists(step.name)
