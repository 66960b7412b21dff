"""Queue in the Dask scheduler. Workers of chunkq join the cluster and reserve tasks from it.

Chunks are not Dask tasks: the scheduler would not store the attempts of a task, would assign chunks
to busy workers, and would need a Python object per chunk.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import dask
import distributed
from distributed.comm.addressing import get_address_host
from distributed.comm.registry import get_backend
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.security import Security
from distributed.utils import get_ip
from distributed.versions import VersionMismatchWarning

from chunkq.errors import RESUME, ErrorCode, JobError, QueueError
from chunkq.install_hint import remote_hint
from chunkq.queue.backends import credentials
from chunkq.queue.backends.dask.plugin import OPERATION, QueuePlugin
from chunkq.queue.backends.dask.tls import configured_security, load_security
from chunkq.queue.backends.hosted.hosted import ANSWER_LOOKS, LOOK_SECONDS, HostedQueue
from chunkq.queue.backends.hosted.worker_group import RemoteWorkers, new_group_name
from chunkq.queue.contract.executor import WorkerOptions
from chunkq.system.scratch import scratch_folder

log = logging.getLogger("chunkq.queue")

CONNECT_SECONDS = 10.0
RECONNECT_SECONDS = 2.0
"""Timeout for reconnecting to a scheduler that was reachable before."""
DEFAULT_PORT = 8786
PROTOCOLS = ("tcp", "tls", "ucx")
UNREACHABLE_ERRORS = (OSError, RuntimeError)
"""Errors of Dask for an unreachable scheduler, and for a closed connection."""


class _StopWithWorker(WorkerPlugin):
    """Worker plugin that stops a worker when the scheduler closes its Dask worker or is lost."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self.is_closed = False

    def teardown(self, worker: distributed.Worker) -> None:
        self.is_closed = True
        self._options.stop.set()


@dataclass(frozen=True)
class Address:
    """Address of a scheduler: `dask://HOST:PORT?protocol=PROTOCOL&interface=NAME&tls=FILE`.

    `protocol` is tcp, tls or ucx; `interface` is a network interface such as ib0. `tls` is the file
    with key and certificate of a cluster that chunkq started. Without it, the protocol tls uses
    the certificates in the configuration of Dask.
    """

    host: str
    port: int
    protocol: str = "tcp"
    interface: str | None = None
    tls: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse the URL of a queue. Raises JobError if it is invalid."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or DEFAULT_PORT
        except ValueError:
            raise _invalid_address(url) from None
        if not host:
            raise JobError(
                "queue: dask:// has no host; use dask://HOST:"
                f"{DEFAULT_PORT} for a running cluster, or `chunkq run` to start a temporary one",
                code=ErrorCode.QUEUE_ADDRESS_INVALID,
            )
        options = dict(parse_qsl(parts.query))
        if parts.path.strip("/") or "@" in url or options.keys() - {"protocol", "interface", "tls"}:
            raise _invalid_address(url)
        if options.get("protocol", "tcp") not in PROTOCOLS:
            raise _invalid_address(url, f" with ?protocol= one of {', '.join(PROTOCOLS)}")
        if options.get("tls") and options.get("protocol", "tls") != "tls":
            raise _invalid_address(url, " with ?protocol=tls for tls=FILE")
        return cls(host, port, **({"protocol": "tls"} if options.get("tls") else {}) | options)

    @classmethod
    def from_dask(cls, address: str, interface: str | None = None, tls: str | None = None) -> Self:
        """Parse an address in the form that Dask uses."""
        parts = urlsplit(address)
        return cls(parts.hostname or "", parts.port or DEFAULT_PORT, parts.scheme, interface, tls)

    @property
    def url(self) -> str:
        """The URL of the queue."""
        options = {"protocol": self.protocol} if self.protocol != "tcp" else {}
        options |= {"interface": self.interface} if self.interface else {}
        options |= {"tls": self.tls} if self.tls else {}
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"dask://{host}:{self.port}" + (f"?{urlencode(options)}" if options else "")

    def with_stored_certificate(self) -> Self:
        """Add the certificate that a cluster of this user has stored for this address, if any."""
        if self.protocol != "tcp":
            return self
        file = credentials.find_secret("dask", self.host, self.port)
        return replace(self, protocol="tls", tls=str(file)) if file else self

    def security(self) -> Security | None:
        """Return the TLS settings, or None for another protocol. Raises QueueError."""
        if self.tls:
            return load_security(self.tls)
        return configured_security() if self.protocol == "tls" else None

    @property
    def text(self) -> str:
        """The address in the form that Dask uses."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}://{host}:{self.port}"


def _invalid_address(url: str, options: str = "") -> JobError:
    printed = re.sub(r"(?s)//.*@", "//***@", url)
    return JobError(
        f"queue: {printed}: invalid address; use dask://HOST:{DEFAULT_PORT}{options}",
        code=ErrorCode.QUEUE_ADDRESS_INVALID,
    )


def silence_dask() -> None:
    """Disable the log messages of Dask in this process; chunkq reports errors in one line."""
    for name in ("distributed", *logging.root.manager.loggerDict):
        if name.partition(".")[0] == "distributed":  # some loggers set their own level
            logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=VersionMismatchWarning)


def check_protocol(name: str) -> None:
    """Raise QueueError if Dask cannot use a protocol in this process. Dask checks it too late."""
    try:
        get_backend(name).get_connector()
    except (ImportError, ValueError, TypeError, RuntimeError):
        raise QueueError(
            f"queue: protocol={name}: unsupported by Dask on this machine; "
            "run `pip install distributed-ucxx`, or use tcp",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None


def _response(client: Any, request: str) -> str | None:
    """Send a request; return its response, or None if the scheduler does not know it.

    Raises one of UNREACHABLE_ERRORS. The timeout of Dask would count the time for which this
    process was suspended.
    """

    async def send() -> str | None:
        response: str | None = await client.scheduler.chunkq(request=request)
        return response

    loop = client.loop.asyncio_loop
    if loop.is_closed():
        raise RuntimeError("the event loop has ended")
    response = asyncio.run_coroutine_threadsafe(send(), loop)
    for _ in range(ANSWER_LOOKS):
        if wait([response], LOOK_SECONDS).done:
            return response.result()
    response.cancel()
    raise TimeoutError(f"no response within {ANSWER_LOOKS * LOOK_SECONDS:.0f} s")


class DaskExecutor(HostedQueue):
    """Queue `dask://HOST:PORT` in a scheduler whose environment has chunkq installed."""

    def __init__(self, url: str, client: distributed.Client | None = None) -> None:
        super().__init__(url)
        self._owns_client = client is None
        self._address = Address.parse(url)
        self._reconnect_lock = threading.Lock()
        self._client: Any = client or self._connect(url, CONNECT_SECONDS)

    def _connect(self, url: str, seconds: float) -> Any:
        self._address = Address.parse(url).with_stored_certificate()
        check_protocol(self._address.protocol)
        silence_dask()
        self._security = self._address.security()
        try:
            client = distributed.Client(
                self._address.text,
                timeout=seconds,
                set_as_default=False,
                name=OPERATION,
                security=self._security,
            )
        except UNREACHABLE_ERRORS as error:
            raise self._unreachable(error) from None
        try:
            self._check_versions(client)
            client.register_plugin(QueuePlugin())
        except ModuleNotFoundError:
            client.close()
            raise QueueError(
                f"queue: {url}: chunkq is not installed in the environment of the Dask scheduler; "
                f"{remote_hint('dask', 'there')}, then restart the scheduler",
                code=ErrorCode.PACKAGE_MISSING,
            ) from None
        except UNREACHABLE_ERRORS as error:
            client.close()
            raise self._unreachable(error) from None
        except Exception:
            client.close()
            raise
        return client

    def _connected(self) -> Any:
        """Return the client. Reconnect if it was closed because the scheduler was unreachable."""
        with self._reconnect_lock:
            if self._owns_client and self._client.status == "closed":
                self._client = self._connect(self.url, RECONNECT_SECONDS)
        if self._client.status in ("connecting", "closing", "closed"):
            raise self._unreachable(ConnectionError("connection lost"))
        return self._client

    def _check_versions(self, client: Any) -> None:
        """Raise QueueError if the scheduler runs other versions. Dask only logs a warning."""
        remote = client.sync(client.scheduler.versions)["packages"]
        local = distributed.versions.get_versions()["packages"]
        for name in ("python", "dask", "distributed"):
            if remote[name] != local[name]:
                raise QueueError(
                    f"queue: {self.url}: the Dask scheduler runs {name} {remote[name]}, but this "
                    f"process runs {local[name]}; install the same version everywhere",
                    code=ErrorCode.QUEUE_VERSION_MISMATCH,
                )

    def request(self, request: str) -> str:
        """Send a request to the scheduler; return its response."""
        try:
            response = _response(self._connected(), request)
        except UNREACHABLE_ERRORS as error:
            raise self._unreachable(error) from None
        if response is None:  # Dask returns None for an unknown operation
            raise QueueError(
                f"queue: {self.url}: the Dask scheduler was restarted and lost the queue; {RESUME} "
                "to queue the remaining chunks",
                code=ErrorCode.QUEUE_LOST,
            )
        return response

    def _unreachable(self, error: BaseException) -> QueueError:
        reason = " ".join(str(error).split()) or type(error).__name__
        tls = ", and add ?protocol=tls if it uses TLS" if self._address.protocol == "tcp" else ""
        return QueueError(
            f"queue: {self.url}: the Dask scheduler is unreachable ({reason[:200]}); start one "
            f"with `dask scheduler`, or check host and port{tls}"
        )

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        """Join the cluster as a Dask worker that runs no Dask tasks while the context is open."""
        stop = _StopWithWorker(options)
        with scratch_folder("dask") as folder:
            try:
                client = self._connected()  # the worker runs in the event loop of this client
                worker = client.sync(self._join, options, stop, str(folder))
            except UNREACHABLE_ERRORS as error:
                raise self._unreachable(error) from None
            self.table.register_worker(options.worker, worker.address)
            try:
                yield
            finally:
                closed = stop.is_closed
                with suppress(*UNREACHABLE_ERRORS):
                    client.sync(worker.close, executor_wait=False, callback_timeout=CONNECT_SECONDS)
            if closed:
                raise QueueError(
                    f"queue: {self.url}: the Dask scheduler closed this worker or ended; "
                    "check the scheduler"
                )

    async def _join(
        self, options: WorkerOptions, stop: _StopWithWorker, folder: str
    ) -> distributed.Worker:
        address = self._address
        # The threads of the Dask worker are idle, so it needs no profiler, which samples them 100
        # times per second. Its web pages show its logs without access control.
        settings = {
            "distributed.worker.profile.enabled": False,
            "distributed.worker.http.routes": [],
        }
        with dask.config.set(settings):
            worker = distributed.Worker(
                address.text,
                name=options.worker,
                nthreads=options.depth,
                interface=address.interface,
                host=None if address.interface else get_ip(get_address_host(address.text)),
                protocol=address.protocol,
                security=self._security,
                memory_limit=0,
                dashboard=False,
                local_directory=folder,
                plugins=(stop,),
                death_timeout=CONNECT_SECONDS,
            )
        await worker
        # Dask tasks of other users would share the device with the chunks.
        worker.status = distributed.Status.paused
        return worker

    def launch_remote_workers(
        self, job: str, *, gpu: bool, depth: int, threads: int | None = None
    ) -> RemoteWorkers:
        """Let the scheduler run workers with one chunk in flight each in the cluster's threads."""
        try:
            client = self._connected()
            workers = client.sync(client.scheduler.identity)["workers"].values()
        except UNREACHABLE_ERRORS as error:
            raise self._unreachable(error) from None
        group = new_group_name()
        self.table.start_group(group, job, self.url, 1)
        return RemoteWorkers(
            self.table,
            group,
            has_room=any(worker["status"] == "running" for worker in workers),
            no_room=f"queue: {self.url}: the Dask cluster has no free workers; waiting for some, "
            "start them with `dask worker`",
            room=f"queue: {self.url}: the Dask cluster has workers now",
        )

    def close(self) -> None:
        """Disconnect from the scheduler."""
        if self._owns_client:
            self._client.close()
