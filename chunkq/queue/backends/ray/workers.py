"""Remote workers in actors of a Ray cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray

from chunkq.queue.backends.hosted.remote_table import RemoteTable
from chunkq.queue.backends.hosted.worker_group import RemoteWorkers
from chunkq.queue.backends.ray.errors import start_problem

RESOURCE_STEPS = 10_000
"""Ray counts resources in steps of this fraction."""
ACTOR_START_SECONDS = 5.0
"""Time in which a running actor answers a ping."""
START_ENV_PREFIXES = ("MALLOC_", "GLIBC_TUNABLES")
"""Prefixes of environment variables that take effect only at the start of an actor's process."""


def new_actor(actor: type, gpu: bool, **options: Any) -> Any:
    """Return an actor class with its resources: one core, and one GPU if `gpu`.

    On a node with fewer cores than GPUs, as SLURM grants them by default, the workers share the
    cores.
    """
    start_env = {k: v for k, v in os.environ.items() if k.startswith(START_ENV_PREFIXES)}
    return ray.remote(actor).options(
        num_gpus=1 if gpu else 0,
        num_cpus=cores_per_gpu([node["Resources"] for node in ray.nodes()]) if gpu else 1,
        runtime_env={"env_vars": start_env},
        **options,
    )


def cores_per_gpu(nodes: Iterable[Mapping[str, float]]) -> float:
    """Return the cores of a worker on a GPU: 1, or less if a node has fewer cores than GPUs.

    `nodes` are the resources of the nodes.
    """
    shares = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU")]
    share = min([1.0, *shares])
    return 1 if share == 1 else math.floor(share * RESOURCE_STEPS) / RESOURCE_STEPS


class RayRemoteWorkers(RemoteWorkers):
    """Remote workers in actors, of which some may fail to start."""

    def __init__(self, table: RemoteTable, group: str, actors: Sequence[Any]) -> None:
        super().__init__(table, group)
        self._actors, self._count = actors, len(actors)
        self._pings = {actor.ping.remote(): actor for actor in actors}
        self._lines: list[str] = []

    def have_ended(self) -> bool:
        """Return whether all workers have ended or failed to start."""
        self._collect_answers(0)
        return self._table.group_status(self.name).ended >= self._count

    def messages(self) -> list[str]:
        """Return the error messages of workers that ended or failed to start."""
        return super().messages() + self._lines

    def stop(self) -> None:
        """Make running workers finish their tasks and end; kill actors that have not started."""
        super().stop()
        self._pings = {actor.ping.remote(): actor for actor in self._actors}
        self._collect_answers(ACTOR_START_SECONDS)
        while self._pings:
            ray.kill(self._pings.popitem()[1])
            self._count -= 1

    def _collect_answers(self, seconds: float) -> None:
        """Wait up to `seconds` for answers to pings; record the actors that failed to start."""
        pings = list(self._pings)
        if not pings:
            return
        for answer in ray.wait(pings, num_returns=len(pings), timeout=seconds)[0]:
            try:
                ray.get(answer)
            except ray.exceptions.RayActorError as error:
                if answer in self._pings and "creation task" in str(error):
                    self._count -= 1
                    self._lines = [start_problem(error)]
            self._pings.pop(answer, None)
