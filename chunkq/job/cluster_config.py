"""The sections `dask_config` and `ray_config` of a job file."""

from __future__ import annotations

from typing import Annotated, Literal

from chunkq.job.fields import Positive, Section, key_doc


class DaskConfig(Section):
    """Options to connect to a Dask cluster or to start one."""

    address: Annotated[
        str | None,
        key_doc(
            "Cluster",
            "Scheduler of a running cluster: `HOST`, `HOST:PORT` or `tcp://HOST:PORT`.",
            example="login1:8786",
            unit=None,
            omitted="none; set it for `cluster: running`",
        ),
    ] = None
    protocol: Annotated[
        Literal["tcp", "tls", "ucx"],
        key_doc(
            "Cluster",
            "Transport between the processes of the cluster. `ucx` needs the package "
            "distributed-ucxx and has no encryption.",
            example="tls",
            unit=None,
        ),
    ] = "tcp"
    interface: Annotated[
        str | None,
        key_doc(
            "Cluster",
            "Network interface between the nodes.",
            example="ib0",
            unit=None,
            omitted="chosen by Dask",
        ),
    ] = None
    scheduler_port: Annotated[
        Positive,
        key_doc(
            "Cluster",
            "Port of the scheduler. A cluster that `chunkq run` creates uses any free port unless "
            "this is set.",
            example=8787,
            unit=None,
        ),
    ] = 8786
    n_workers: Annotated[
        Positive | None,
        key_doc(
            "Cluster",
            "Worker processes on each node of a cluster that `chunkq run` creates.",
            example=4,
            unit="processes",
            omitted="one per GPU, or one without GPUs",
        ),
    ] = None
    threads_per_worker: Annotated[
        Positive | None,
        key_doc(
            "Cluster",
            "Chunks in flight in each worker process.",
            example=2,
            unit="chunks",
            omitted="the default of `--depth`",
        ),
    ] = None


class RayConfig(Section):
    """Options to connect to a Ray cluster or to start one."""

    address: Annotated[
        str | None,
        key_doc(
            "Cluster",
            "Head of a running cluster: `HOST` or `HOST:PORT`.",
            example="login1:6379",
            unit=None,
            omitted="none; set it for `cluster: running`",
        ),
    ] = None
    port: Annotated[
        Positive,
        key_doc(
            "Cluster",
            "Port of the head.",
            example=6380,
            unit=None,
        ),
    ] = 6379
