"""Select the engine of a run and its queue, and check that this machine can run it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import urlencode, urlsplit

from chunkq.errors import JobError
from chunkq.job.cluster_config import DaskConfig, RayConfig
from chunkq.job.job_file import Job
from chunkq.paths import without_secret
from chunkq.queue.registry import BACKENDS, QUEUE_VARIABLE, checked_scheme, queue_url
from chunkq.system.gpus import visible_gpus
from chunkq_producer.engine_names import CLUSTERS, ENGINES, WITH_PROCESSES
from chunkq_producer.slurm import OUTSIDE_SLURM, Step

DEFAULT_QUEUES = MappingProxyType(
    {"rq": "redis://127.0.0.1:6379/0", "inprocess": "inprocess://run"}
)
ADDRESS_SCHEMES = MappingProxyType({"dask": ("", "tcp", "tls", "ucx"), "ray": ("",)})
"""Schemes of the addresses of running clusters, besides those of queues."""


@dataclass(frozen=True)
class Engine:
    """The engine of a run.

    url       queue URL; None if the engine starts its own queue
    step      this process among the tasks of one `srun`; None unless `cluster: slurm`
    warnings  lines about keys of the job that have no effect with this engine
    """

    name: str
    url: str | None
    step: Step | None
    warnings: tuple[str, ...]

    @property
    def starts_early(self) -> bool:
        """Whether workers are a process of this machine, on a queue that the run does not start."""
        scheme = (self.url or "").partition("://")[0]
        return self.name in WITH_PROCESSES and scheme in BACKENDS


def select_engine(
    job: Job, engine: str | None, queue: str | None, workers: int | None = None
) -> Engine:
    """Return the engine of a run; the arguments are the values of the command's options.

    Raises JobError if they contradict each other or the job, or if this machine does not meet the
    requirements of the job, and for a queue of an unknown scheme.
    """
    name, url = _name_and_url(engine, job, queue)
    _check_machine(job, name)
    if name == "inprocess" and (workers or 1) > 1:
        raise JobError(
            f"workers: the queue inprocess:// runs 1 worker, found {workers}; remove workers or "
            "use another queue"
        )
    step = Step.from_environment() if job.cluster == "slurm" else None
    return Engine(name, url, step, tuple(_unused_sections(job, name)))


def _name_and_url(engine: str | None, job: Job, queue: str | None) -> tuple[str, str | None]:
    """Return the engine of a run and its queue URL, None if the engine starts its own queue.

    `engine` and `queue` are the values of --executor and --queue. Raises JobError if they
    contradict each other or the job.
    """
    url = queue or os.environ.get(QUEUE_VARIABLE) or job.queue
    if engine is None:
        url = queue_url(queue, job.queue)
        scheme = checked_scheme(url)
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
    if address.startswith(f"{engine}://"):
        return address
    if engine == "ray" and address == "auto":
        return "ray://auto"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    if not host or parts.scheme not in ADDRESS_SCHEMES[engine]:
        others = ", ".join(f"{scheme}://HOST:PORT" for scheme in ADDRESS_SCHEMES[engine] if scheme)
        raise JobError(
            f"{engine}_config.address: invalid address {without_secret(address)!r}; expected "
            f"HOST:PORT, {others or 'auto'} or {engine}://HOST:PORT"
        )
    host = f"[{host}]" if ":" in host else host
    if engine == "ray":
        return ray_url(f"{host}:{port or job.ray_config.port}")
    config = job.dask_config
    protocol: str = parts.scheme if parts.scheme in ("tls", "ucx") else config.protocol
    options = {"protocol": protocol} if protocol != "tcp" else {}
    options |= {"interface": config.interface} if config.interface else {}
    query = f"?{urlencode(options)}" if options else ""
    return f"dask://{host}:{port or config.scheduler_port}{query}"


def ray_url(address: str) -> str:
    """Return the queue URL of a Ray cluster."""
    return f"ray://auto?address={address}"


def _check_machine(job: Job, engine: str) -> None:
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
    elif job.model.device == "cuda" and job.cluster != "running" and not visible_gpus():
        problems.append(
            "model_config.device: cuda, but no GPU was found on this machine; set device: cpu and "
            "hardware: cpu_only, or run on a machine with a GPU"
        )
    if problems:
        raise JobError(problems)


def is_cpu_only(job: Job) -> bool:
    """Return whether a job uses no GPU."""
    return job.model.device == "cpu" or job.hardware == "cpu_only"


def _unused_sections(job: Job, engine: str) -> list[str]:
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
