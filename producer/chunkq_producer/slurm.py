"""The tasks of one `srun`: each runs the same command, the first leads, the others follow it.

They find each other through the job folder, which all nodes see in any case.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Self

from chunkq.errors import ChunkqError, JobError
from chunkq.ledger import folder_of
from chunkq.objects import ObjectFolder

POLL_SECONDS = 1.0
LEADER_TIMEOUT = 900.0
"""How long the others wait for the first to produce and to start the cluster."""


@dataclass(frozen=True)
class Step:
    """This process's place among the tasks of a job step, one on each node."""

    rank: int
    size: int
    node: str
    name: str

    @classmethod
    def from_environment(cls) -> Self:
        """Read it from what srun has set; raises JobError outside of srun."""
        of = os.environ.get
        if "SLURM_JOB_ID" not in os.environ:
            raise JobError(
                "cluster: slurm, but this is no SLURM allocation; set cluster: local, or start it "
                "with srun"
            )
        if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
            raise JobError(
                "cluster: slurm, but this is the batch script itself; start it on every node with "
                "`srun --ntasks-per-node=1 chunkq run …`"
            )
        names = (of("SLURM_JOB_ID"), of("SLURM_STEP_ID"), of("SLURM_RESTART_COUNT", "0"))
        step = cls(
            rank=int(of("SLURM_PROCID", "0")),
            size=int(of("SLURM_STEP_NUM_TASKS") or of("SLURM_NTASKS") or 1),
            node=of("SLURMD_NODENAME", ""),
            name="cluster-" + "-".join(str(name) for name in names) + ".json",
        )
        if int(of("SLURM_LOCALID", "0")) > 0:
            raise JobError(
                f"cluster: slurm, but node {step.node} runs several tasks of this step; give "
                "--ntasks-per-node=1: each process leads all devices of its node"
            )
        return step


@dataclass(frozen=True)
class Announcement:
    """What the other nodes need to join the cluster: Dask's key and certificate, or Ray's token."""

    address: str
    secret: str = ""


@contextmanager
def announce(output: str, step: Step | None) -> Iterator[Callable[[Announcement], None]]:
    """Yield what tells the others how to join; at the end they are told to leave.

    The job folder holds the secret in a file that only this user can read; in a bucket, whoever
    can read the job folder can read it. Outside of a step there are no others.
    """
    if step is None:
        yield lambda announcement: None
        return
    folder = ObjectFolder(folder_of(output))
    told = False

    def tell(announcement: Announcement) -> None:
        nonlocal told
        folder.put(step.name, json.dumps(asdict(announcement)).encode(), private=True)
        told = True

    try:
        yield tell
    finally:
        if told:
            folder.delete(step.name)


def wait_for_leader(output: str, step: Step) -> Announcement:
    """Return how to join the cluster as soon as the first task has said it."""
    until = time.monotonic() + LEADER_TIMEOUT
    while (found := ObjectFolder(folder_of(output)).get(step.name)) is None:
        if time.monotonic() > until:
            raise ChunkqError(
                f"the first task of this step has not started the cluster within "
                f"{LEADER_TIMEOUT:.0f} s; its own messages say why (srun --label)"
            )
        time.sleep(POLL_SECONDS)
    return Announcement(**json.loads(found))


def has_ended(output: str, step: Step) -> bool:
    """Tell whether the first task has told the others to leave."""
    return not ObjectFolder(folder_of(output)).exists(step.name)
