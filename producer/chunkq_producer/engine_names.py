"""Names of the engines of a run."""

from __future__ import annotations

from types import MappingProxyType

ENGINES: MappingProxyType[str, str] = MappingProxyType(
    {"sqlite": "sqlite", "inprocess": "inprocess", "rq": "redis", "dask": "dask", "ray": "ray"}
)
"""Value of --executor -> scheme of the queue URL."""
CLUSTERS = ("dask", "ray")
"""Engines that start their own cluster or use the workers of a running one."""
WITH_PROCESSES = ("sqlite", "rq")
"""Engines whose workers are processes of this machine, on a queue that the run does not start."""
