"""Actors that are workers: what they use of a Ray cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ray

RESOURCE_STEPS = 10_000
"""Ray counts resources in steps of this fraction."""
START_ENV_PREFIXES = ("MALLOC_", "GLIBC_TUNABLES")
"""Prefixes of environment variables that take effect only at the start of an actor's process."""


def new_actor(actor: type, **options: Any) -> Any:
    """Return an actor class with options, whose process starts with settings of this one."""
    start_env = {k: v for k, v in os.environ.items() if k.startswith(START_ENV_PREFIXES)}
    return ray.remote(actor).options(runtime_env={"env_vars": start_env}, **options)


def resources_per_worker(*, gpu: bool, cores: int = 1) -> dict[str, float]:
    """Return the options of the actor of one worker: a GPU and a core, or a number of cores.

    On a node with fewer cores than GPUs, as SLURM grants them by default, the workers share the
    cores.
    """
    if not gpu:
        return {"num_gpus": 0, "num_cpus": cores}
    return {"num_gpus": 1, "num_cpus": cores_per_gpu([node["Resources"] for node in ray.nodes()])}


def cores_per_gpu(nodes: Iterable[Mapping[str, float]]) -> float:
    """Return the cores of a worker on a GPU: 1, or less if a node has fewer cores than GPUs.

    `nodes` are the resources of the nodes.
    """
    shares = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU")]
    share = min([1.0, *shares])
    return 1 if share == 1 else math.floor(share * RESOURCE_STEPS) / RESOURCE_STEPS


def cores_per_worker(nodes: Iterable[Mapping[str, float]], threads: int | None) -> int:
    """Return the cores of a worker on the CPU: what the job sets, else those of the smallest node.

    So there is one worker per node, unless `threads` makes workers smaller.
    """
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    return threads or min(cores, default=1)
