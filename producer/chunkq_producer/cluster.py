"""Start or join the cluster of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from chunkq.errors import JobError, QueueError
from chunkq.job.cluster_config import DaskConfig
from chunkq.job.job_file import Job
from chunkq.queue.backends import credentials
from chunkq.queue.registry import load_backend, queue_url
from chunkq.system.cores import available_cores
from chunkq.system.private_files import write_private
from chunkq.system.scratch import scratch_folder
from chunkq_producer.engine import Engine, is_cpu_only, ray_url
from chunkq_producer.engine_names import CLUSTERS
from chunkq_producer.slurm import Announcement, announce

log = logging.getLogger("chunkq.run")


@dataclass(frozen=True)
class Cluster:
    """The queue of a run and how its workers are started.

    launches_remote_workers   the engine starts worker processes inside the cluster; otherwise each
                              node runs `chunkq work` with `per_node` processes and `depth` chunks
                              in flight per process
    is_temporary              the queue ends with this process
    announce                  publishes the cluster's address to the other nodes
    has_died                  returns whether a cluster that was started for this run has ended
    """

    url: str
    launches_remote_workers: bool = False
    per_node: int | None = None
    depth: int | None = None
    is_temporary: bool = False
    announce: Callable[[], None] = field(default=lambda: None)
    has_died: Callable[[], bool] = field(default=lambda: False)


@contextmanager
def cluster_for(job: Job, engine: Engine, workers: int | None = None) -> Iterator[Cluster]:
    """Yield the cluster of a run. A cluster that is started here stops at the end."""
    name, url, step = engine.name, engine.url, engine.step
    config = job.dask_config if name == "dask" else DaskConfig()
    per_node, depth = config.n_workers, config.threads_per_worker
    if name not in CLUSTERS or url is not None:
        yield Cluster(
            url or queue_url(None),
            launches_remote_workers=name in CLUSTERS and job.cluster == "running",
            per_node=per_node,
            depth=depth,
            is_temporary=name == "inprocess",
        )
        return
    single_node = step is None
    start = _dask(config, single_node) if name == "dask" else _ray(job, single_node, workers)
    with start as own_cluster, announce(job.output, step) as publish:
        yield Cluster(
            own_cluster.url,
            # Ray distributes actors over its nodes; Dask workers are started on each node.
            launches_remote_workers=name == "ray" and not single_node,
            per_node=per_node,
            depth=depth,
            is_temporary=True,
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
    from chunkq.queue.backends.dask.executor import Address
    from chunkq.queue.backends.dask.scheduler import local_address, start_scheduler
    from chunkq.queue.backends.dask.tls import create_certificate

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
            with suppress(QueueError, JobError):  # only other commands of this user need it
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
    from chunkq.queue.backends.ray.head import start_head

    port = job.ray_config.port if "port" in job.ray_config.model_fields_set else 0
    # No other job uses a cluster of this run, so more workers than cores may be requested.
    cpus = max(workers or 1, available_cores()) if single_node else None
    with start_head(alone=single_node, cpus=cpus, gpus=not is_cpu_only(job), port=port) as head:
        yield _OwnCluster(ray_url(head.address), head.address, head.token, head.has_died)


@contextmanager
def join_cluster(engine: str, leader: Announcement, job: Job) -> Iterator[Cluster]:
    """Join the cluster of the leading node, which may start the workers of this node, too."""
    if engine == "ray":
        from chunkq.queue.backends.ray.head import join_cluster

        with join_cluster(leader.address, leader.secret, gpus=not is_cpu_only(job)) as has_died:
            url = ray_url(leader.address)
            yield Cluster(url, launches_remote_workers=True, has_died=has_died)
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
    from chunkq.queue.backends.dask.executor import Address

    with scratch_folder("dask") as folder:
        file = write_private(folder / "cluster.pem", leader.secret)
        yield replace(Address.parse(leader.address), protocol="tls", tls=str(file)).url
