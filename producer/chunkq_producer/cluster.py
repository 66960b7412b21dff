"""Where a run's queue is and who works on it: the engine, and how its cluster comes about."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from urllib.parse import urlencode, urlsplit

from chunkq.errors import JobError, QueueError
from chunkq.executors import BACKENDS, QUEUE_VARIABLE, credentials, load_backend, queue_url
from chunkq.job import DaskConfig, Job, RayConfig
from chunkq.private_files import write_private
from chunkq.scratch import scratch_folder
from chunkq_producer.slurm import Announcement, Step, announce

log = logging.getLogger("chunkq.run")

ENGINES: MappingProxyType[str, str] = MappingProxyType(
    {"sqlite": "sqlite", "inprocess": "inprocess", "rq": "redis", "dask": "dask", "ray": "ray"}
)
"""Name for --executor -> the scheme of its URLs."""
DEFAULT_QUEUES = MappingProxyType(
    {"rq": "redis://127.0.0.1:6379/0", "inprocess": "inprocess://run"}
)
CLUSTERS = ("dask", "ray")
"""Engines that can be a cluster: they form one, or use the workers of one that runs."""


@dataclass(frozen=True)
class Cluster:
    """A queue's URL and the workers for it.

    With `hires`, the engine's own processes work; else `chunkq work` does on each node, `per_node`
    processes with `depth` chunks in flight. Its queue `ends` with this process.
    `announce` tells the other nodes that there is something to do; `nodes` is how many there are.
    `has_died` tells whether what was made for this run is gone, and will not come back.
    """

    url: str
    launches_remote_workers: bool = False
    per_node: int | None = None
    depth: int | None = None
    ends: bool = False
    nodes: int = 1
    announce: Callable[[], None] = field(default=lambda: None)
    has_died: Callable[[], bool] = field(default=lambda: False)


def engine_of(name: str | None, job: Job, given: str | None) -> tuple[str, str | None]:
    """Return the engine of a run and the queue's URL, None where the engine makes one for itself.

    Raises JobError if the queue is not of the kind asked for.
    """
    named = given or os.environ.get(QUEUE_VARIABLE) or job.queue
    if name is None:
        named = queue_url(given, job.queue)
        scheme = named.partition("://")[0]
        found = [n for n, s in ENGINES.items() if BACKENDS.get(s) == BACKENDS.get(scheme)]
        engine = found[0] if found else "sqlite"
    else:
        engine = name
        scheme = (named or ENGINES[engine] + "://").partition("://")[0]
        if BACKENDS.get(scheme) != BACKENDS[ENGINES[engine]]:
            source = (
                "--queue"
                if given
                else QUEUE_VARIABLE
                if QUEUE_VARIABLE in os.environ
                else "the job"
            )
            raise JobError(
                f"--executor: {engine} does not fit the queue {scheme}:// of {source}; "
                f"give --queue {ENGINES[engine]}://…, or leave --executor out"
            )
    if engine in CLUSTERS and (named is None or named.partition("://")[2] == ""):
        return engine, _configured(engine, job)
    if engine in CLUSTERS and job.cluster == "slurm":
        raise JobError(
            f"cluster: slurm forms a {engine} cluster of its own; leave the queue out, or set "
            "cluster: running to use the one named"
        )
    if named is None:
        named = DEFAULT_QUEUES.get(engine) or queue_url(None)
    return engine, named


def queue_of(job: Job, given: str | None) -> str:
    """Return the URL of the queue that a job is to be put on.

    Raises JobError if it lies on a running cluster and the job does not say on which.
    """
    named = given or os.environ.get(QUEUE_VARIABLE) or job.queue
    if job.cluster != "running" or (named and named.partition("://")[2]):
        return queue_url(given, job.queue)
    addresses = {"dask": job.dask_config.address, "ray": job.ray_config.address}
    asked = named.partition("://")[0] if named else None
    engines = [name for name, where in addresses.items() if where and asked in (None, name)]
    if len(engines) != 1:
        raise JobError(
            "cluster: running, but where? Give one of dask_config.address and ray_config.address, "
            "or --queue"
        )
    return _configured(engines[0], job) or queue_url(None)


def _configured(engine: str, job: Job) -> str | None:
    """Return the URL of the running cluster that a job names, if it does."""
    if job.cluster != "running":
        return None
    address = job.dask_config.address if engine == "dask" else job.ray_config.address
    if address is None:
        raise JobError(
            f"cluster: running, but where? Give {engine}_config.address or --queue {engine}://…"
        )
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise JobError(f"{engine}_config.address: {address!r} is no HOST:PORT") from None
    host = f"[{host}]" if ":" in host else host
    if engine == "ray":
        return (
            address if parts.scheme == "ray" else _ray_url(f"{host}:{port or job.ray_config.port}")
        )
    config = job.dask_config
    protocol: str = parts.scheme if parts.scheme in ("tls", "ucx") else config.protocol
    asked = {"protocol": protocol} if protocol != "tcp" else {}
    asked |= {"interface": config.interface} if config.interface else {}
    query = f"?{urlencode(asked)}" if asked else ""
    return f"dask://{host}:{port or config.scheduler_port}{query}"


def _ray_url(address: str) -> str:
    return f"ray://auto?address={address}"


@contextmanager
def cluster_for(
    job: Job, engine: str, url: str | None, step: Step | None, workers: int | None = None
) -> Iterator[Cluster]:
    """Make or find the cluster of a run; what was made here ends with it."""
    config = job.dask_config if engine == "dask" else DaskConfig()
    per_node, depth = config.n_workers, config.threads_per_worker
    if engine not in CLUSTERS or url is not None:
        hires = engine in CLUSTERS and job.cluster == "running"
        yield Cluster(url or queue_url(None), hires, per_node, depth, ends=engine == "inprocess")
        return
    alone = step is None
    with (
        _dask(config, alone) if engine == "dask" else _ray(job, alone, workers) as made,
        announce(job.output, step) as tell,
    ):
        yield Cluster(
            made.url,
            # Ray spreads its actors by itself; Dask's workers are started on each node.
            launches_remote_workers=engine == "ray" and not alone,
            per_node=per_node,
            depth=depth,
            ends=True,
            nodes=1 if step is None else step.size,
            announce=lambda: tell(Announcement(made.address, made.secret)),
            has_died=made.has_died,
        )


@dataclass(frozen=True)
class _OwnCluster:
    """A cluster of one's own: the queue's URL here; the address and secret for the other nodes."""

    url: str
    address: str
    secret: str = ""
    has_died: Callable[[], bool] = field(default=lambda: False)


@contextmanager
def _dask(config: DaskConfig, alone: bool) -> Iterator[_OwnCluster]:
    load_backend("dask")  # if its package is missing, that is said in one line
    from chunkq.executors.dask import Address
    from chunkq.executors.dask_scheduler import local_address, start_scheduler
    from chunkq.executors.dask_tls import create_certificate

    port = config.scheduler_port if "scheduler_port" in config.model_fields_set else 0
    host = "127.0.0.1" if alone else local_address(config.interface)
    with scratch_folder("dask") as folder:
        tls = None if config.protocol == "ucx" else create_certificate(folder)
        if tls is None:
            log.warning(
                "dask_config.protocol: ucx has no encryption; whoever reaches this cluster can run "
                "code as you"
            )
        process, url = start_scheduler(host, port, config.protocol, config.interface, tls)
        address = Address.parse(url)
        secret = tls.read_text() if tls else ""
        if tls:
            with suppress(QueueError):  # only other commands of this user need it
                credentials.store_secret("dask", address.host, address.port, secret)
        try:
            yield _OwnCluster(
                url, replace(address, tls=None).url, secret, lambda: process.poll() is not None
            )
        finally:
            process.kill()
            process.communicate()
            credentials.remove_secret("dask", address.host, address.port)


@contextmanager
def _ray(job: Job, alone: bool, workers: int | None) -> Iterator[_OwnCluster]:
    from chunkq.executors.ray_head import start_head

    port = job.ray_config.port if "port" in job.ray_config.model_fields_set else 0
    # In a cluster of its own a job has nobody to share cores with, and may crowd them.
    cpus = max(workers or 1, os.cpu_count() or 1) if alone else None
    with start_head(alone=alone, cpus=cpus, gpus=not is_cpu_only(job), port=port) as (
        address,
        token,
    ):
        yield _OwnCluster(_ray_url(address), address, token)


@contextmanager
def join_cluster(engine: str, leader: Announcement, job: Job) -> Iterator[Cluster | None]:
    """Have this node be part of a cluster that another one leads; None if it needs no more."""
    if engine == "ray":
        from chunkq.executors.ray_head import join_cluster

        with join_cluster(leader.address, leader.secret, gpus=not is_cpu_only(job)):
            yield None
    else:
        config = job.dask_config
        with _with_certificate(leader) as url:
            yield Cluster(url, per_node=config.n_workers, depth=config.threads_per_worker)


@contextmanager
def _with_certificate(leader: Announcement) -> Iterator[str]:
    """Store the leader's key on this node; yield the queue's URL with the file."""
    if not leader.secret:
        yield leader.address
        return
    load_backend("dask")
    from chunkq.executors.dask import Address

    with scratch_folder("dask") as folder:
        file = write_private(folder / "cluster.pem", leader.secret)
        yield replace(Address.parse(leader.address), protocol="tls", tls=str(file)).url


def is_cpu_only(job: Job) -> bool:
    """Tell whether a job wants no GPU."""
    return job.model.device == "cpu" or job.hardware == "cpu_only"


def unused_sections(job: Job, engine: str) -> list[str]:
    """Return one line for each section of the job that speaks of another engine."""
    sections = {
        "dask": job.dask_config != DaskConfig(),
        "ray": job.ray_config != RayConfig(),
    }
    return [
        f"{name}_config is for --executor {name}; it is not used here"
        for name, given in sections.items()
        if given and name != engine
    ]
