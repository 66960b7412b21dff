"""Select the engine and queue of a run, and start or join its cluster."""

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
from chunkq.paths import without_secret
from chunkq.private_files import write_private
from chunkq.scratch import scratch_folder
from chunkq_producer.slurm import Announcement, Step, announce

log = logging.getLogger("chunkq.run")

ENGINES: MappingProxyType[str, str] = MappingProxyType(
    {"sqlite": "sqlite", "inprocess": "inprocess", "rq": "redis", "dask": "dask", "ray": "ray"}
)
"""Value of --executor -> scheme of the queue URL."""
DEFAULT_QUEUES = MappingProxyType(
    {"rq": "redis://127.0.0.1:6379/0", "inprocess": "inprocess://run"}
)
CLUSTERS = ("dask", "ray")
"""Engines that start their own cluster or use the workers of a running one."""


@dataclass(frozen=True)
class Cluster:
    """The queue of a run and how its workers are started.

    launches_remote_workers   the engine starts worker processes inside the cluster; otherwise each
                              node runs `chunkq work` with `per_node` processes and `depth` chunks
                              in flight per process
    is_temporary              the queue ends with this process
    nodes                     number of nodes of the cluster
    announce                  publishes the cluster's address to the other nodes
    has_died                  returns whether a cluster that was started for this run has ended
    """

    url: str
    launches_remote_workers: bool = False
    per_node: int | None = None
    depth: int | None = None
    is_temporary: bool = False
    nodes: int = 1
    announce: Callable[[], None] = field(default=lambda: None)
    has_died: Callable[[], bool] = field(default=lambda: False)


def engine_of(engine: str | None, job: Job, queue: str | None) -> tuple[str, str | None]:
    """Return the engine of a run and its queue URL, None if the engine starts its own queue.

    `engine` and `queue` are the values of --executor and --queue. Raises JobError if they
    contradict each other or the job.
    """
    url = queue or os.environ.get(QUEUE_VARIABLE) or job.queue
    if engine is None:
        url = queue_url(queue, job.queue)
        scheme = url.partition("://")[0]
        engines = [n for n, s in ENGINES.items() if BACKENDS.get(s) == BACKENDS.get(scheme)]
        engine = engines[0] if engines else "sqlite"
    else:
        scheme = (url or ENGINES[engine] + "://").partition("://")[0]
        if BACKENDS.get(scheme) != BACKENDS[ENGINES[engine]]:
            source = (
                "--queue"
                if queue
                else QUEUE_VARIABLE
                if QUEUE_VARIABLE in os.environ
                else "the job's queue"
            )
            raise JobError(
                f"--executor: {engine} cannot use the queue {scheme}:// from {source}; "
                f"set --queue {ENGINES[engine]}://… or remove --executor"
            )
    if engine in CLUSTERS:
        if url is None or url.partition("://")[2] == "":
            return engine, _url_of_running_cluster(engine, job)
        if job.cluster == "slurm":
            raise JobError(
                f"cluster: slurm starts a new {engine} cluster, found the queue "
                f"{without_secret(url)}; remove the queue, or set cluster: running to use its "
                "cluster"
            )
    if url is None:
        url = DEFAULT_QUEUES.get(engine) or queue_url(None)
    return engine, url


def queue_of(job: Job, queue: str | None) -> str:
    """Return the URL of the queue that a job is submitted to; `queue` is the value of --queue.

    Raises JobError for `cluster: running` without exactly one address.
    """
    url = queue or os.environ.get(QUEUE_VARIABLE) or job.queue
    if job.cluster != "running" or (url and url.partition("://")[2]):
        return queue_url(queue, job.queue)
    addresses = {"dask": job.dask_config.address, "ray": job.ray_config.address}
    scheme = url.partition("://")[0] if url else None
    engines = [name for name, address in addresses.items() if address and scheme in (None, name)]
    if len(engines) != 1:
        raise JobError(
            f"cluster: running needs the address of one cluster, found {len(engines)}; set "
            "dask_config.address, ray_config.address or --queue"
        )
    return _url_of_running_cluster(engines[0], job) or queue_url(None)


def _url_of_running_cluster(engine: str, job: Job) -> str | None:
    """Return the queue URL of a job's running cluster; None unless `cluster: running`."""
    if job.cluster != "running":
        return None
    address = job.dask_config.address if engine == "dask" else job.ray_config.address
    if address is None:
        raise JobError(
            f"cluster: running needs the address of the cluster; set {engine}_config.address or "
            f"--queue {engine}://HOST:PORT"
        )
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise JobError(
            f"{engine}_config.address: invalid address {address!r}; expected HOST:PORT"
        ) from None
    host = f"[{host}]" if ":" in host else host
    if engine == "ray":
        return (
            address if parts.scheme == "ray" else _ray_url(f"{host}:{port or job.ray_config.port}")
        )
    config = job.dask_config
    protocol: str = parts.scheme if parts.scheme in ("tls", "ucx") else config.protocol
    options = {"protocol": protocol} if protocol != "tcp" else {}
    options |= {"interface": config.interface} if config.interface else {}
    query = f"?{urlencode(options)}" if options else ""
    return f"dask://{host}:{port or config.scheduler_port}{query}"


def _ray_url(address: str) -> str:
    return f"ray://auto?address={address}"


@contextmanager
def cluster_for(
    job: Job, engine: str, url: str | None, step: Step | None, workers: int | None = None
) -> Iterator[Cluster]:
    """Yield the cluster of a run. A cluster that is started here stops at the end."""
    config = job.dask_config if engine == "dask" else DaskConfig()
    per_node, depth = config.n_workers, config.threads_per_worker
    if engine not in CLUSTERS or url is not None:
        yield Cluster(
            url or queue_url(None),
            launches_remote_workers=engine in CLUSTERS and job.cluster == "running",
            per_node=per_node,
            depth=depth,
            is_temporary=engine == "inprocess",
        )
        return
    single_node = step is None
    start = _dask(config, single_node) if engine == "dask" else _ray(job, single_node, workers)
    with start as own_cluster, announce(job.output, step) as publish:
        yield Cluster(
            own_cluster.url,
            # Ray distributes actors over its nodes; Dask workers are started on each node.
            launches_remote_workers=engine == "ray" and not single_node,
            per_node=per_node,
            depth=depth,
            is_temporary=True,
            nodes=1 if step is None else step.size,
            announce=lambda: publish(Announcement(own_cluster.address, own_cluster.secret)),
            has_died=own_cluster.has_died,
        )


@dataclass(frozen=True)
class _OwnCluster:
    """A cluster started by this run: its queue URL, and the address and secret for other nodes."""

    url: str
    address: str
    secret: str = ""
    has_died: Callable[[], bool] = field(default=lambda: False)


@contextmanager
def _dask(config: DaskConfig, single_node: bool) -> Iterator[_OwnCluster]:
    """Run a Dask scheduler."""
    load_backend("dask")  # raises a one-line error if Dask is not installed
    from chunkq.executors.dask import Address
    from chunkq.executors.dask_scheduler import local_address, start_scheduler
    from chunkq.executors.dask_tls import create_certificate

    port = config.scheduler_port if "scheduler_port" in config.model_fields_set else 0
    host = "127.0.0.1" if single_node else local_address(config.interface)
    with scratch_folder("dask") as folder:
        tls = None if config.protocol == "ucx" else create_certificate(folder)
        if tls is None:
            log.warning(
                "dask_config.protocol: ucx is not encrypted; anyone who can connect to this "
                "cluster can run code as your user; use tls on shared networks"
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
def _ray(job: Job, single_node: bool, workers: int | None) -> Iterator[_OwnCluster]:
    """Run a Ray head node."""
    from chunkq.executors.ray_head import start_head

    port = job.ray_config.port if "port" in job.ray_config.model_fields_set else 0
    # No other job uses a cluster of this run, so more workers than cores may be requested.
    cpus = max(workers or 1, os.cpu_count() or 1) if single_node else None
    with start_head(alone=single_node, cpus=cpus, gpus=not is_cpu_only(job), port=port) as (
        address,
        token,
    ):
        yield _OwnCluster(_ray_url(address), address, token)


@contextmanager
def join_cluster(engine: str, leader: Announcement, job: Job) -> Iterator[Cluster | None]:
    """Join the cluster of the leading node.

    Yields None if the leader starts the workers of this node.
    """
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
    """Write the leader's certificate to a file on this node; yield the queue URL with its path."""
    if not leader.secret:
        yield leader.address
        return
    load_backend("dask")
    from chunkq.executors.dask import Address

    with scratch_folder("dask") as folder:
        file = write_private(folder / "cluster.pem", leader.secret)
        yield replace(Address.parse(leader.address), protocol="tls", tls=str(file)).url


def is_cpu_only(job: Job) -> bool:
    """Return whether a job uses no GPU."""
    return job.model.device == "cpu" or job.hardware == "cpu_only"


def unused_sections(job: Job, engine: str) -> list[str]:
    """Return one line for each section of the job that applies to another engine."""
    sections = {
        "dask": job.dask_config != DaskConfig(),
        "ray": job.ray_config != RayConfig(),
    }
    return [
        f"{name}_config: unused with --executor {engine}; remove it or use --executor {name}"
        for name, is_set in sections.items()
        if is_set and name != engine
    ]
