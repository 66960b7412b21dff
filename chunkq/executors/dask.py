"""Dask as a queue: kept by the scheduler, worked off by processes that have joined it.

The chunks themselves are no tasks of Dask's: the scheduler would forget who began one how often,
hand a chunk to a worker that is busy, and hold a million of them as so many Python objects.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import dask
import distributed
from distributed.comm.addressing import get_address_host
from distributed.comm.registry import get_backend
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin
from distributed.security import Security
from distributed.utils import get_ip
from distributed.versions import VersionMismatchWarning

from chunkq.errors import JobError, QueueError
from chunkq.executors import credentials
from chunkq.executors.base import WorkerName, WorkerOptions
from chunkq.executors.dask_tls import configured_security, load_security
from chunkq.executors.hosted import (
    HostedQueue,
    QueueHost,
    RemoteWorkers,
    current_device,
    new_group_name,
    run_remote_worker,
)
from chunkq.scratch import scratch_folder

OPERATION = "chunkq"
CONNECT_SECONDS = 10.0
RECONNECT_SECONDS = 2.0
"""The same for a scheduler that answered before."""
ANSWER_SECONDS = 30.0
DEFAULT_PORT = 8786
PROTOCOLS = ("tcp", "tls", "ucx")
UNREACHABLE_ERRORS = (OSError, RuntimeError)
"""Dask's errors for a scheduler that does not answer, and for a connection it has given up."""


class QueuePlugin(SchedulerPlugin):
    """What makes a scheduler the host of a queue."""

    name = OPERATION
    idempotent = True

    async def start(self, scheduler: distributed.Scheduler) -> None:
        """Answer requests from now on."""
        self._host = QueueHost()
        scheduler.handlers[OPERATION] = self._host.answer

    def remove_worker(self, scheduler: object, worker: str, **more: object) -> None:
        """Release at once what a worker held that the scheduler no longer sees."""
        self._host.node_lost(worker)


class _StopWithWorker(WorkerPlugin):
    """Ends a options when its Dask worker is closed, by the scheduler or for want of one."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self.is_closed = False

    def teardown(self, worker: distributed.Worker) -> None:
        self.is_closed = True
        self._options.stop.set()


@dataclass(frozen=True)
class Address:
    """`dask://HOST:PORT`, with `?protocol=` (tcp, tls, ucx) and `&interface=` (such as ib0).

    `&tls=FILE` names the key and certificate of a cluster that chunkq has started. Without it, the
    protocol `tls` takes the certificates of Dask's own configuration.
    """

    host: str
    port: int
    protocol: str = "tcp"
    interface: str | None = None
    tls: str | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a queue's URL; raises JobError."""
        shown = re.sub(r"(?s)//.*@", "//***@", url)
        wrong = (
            f"queue: {shown} is no address of a Dask scheduler; write dask://HOST:{DEFAULT_PORT}"
        )
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or DEFAULT_PORT
        except ValueError:
            raise JobError(wrong) from None
        if not host:
            raise JobError(
                "queue: dask:// alone is a cluster that `chunkq run` makes for itself; for a "
                f"cluster that stays write dask://HOST:{DEFAULT_PORT}"
            )
        asked = dict(parse_qsl(parts.query))
        if parts.path.strip("/") or "@" in url or asked.keys() - {"protocol", "interface", "tls"}:
            raise JobError(wrong)
        if asked.get("protocol", "tcp") not in PROTOCOLS:
            raise JobError(f"{wrong}, with ?protocol= one of {', '.join(PROTOCOLS)}")
        if asked.get("tls") and asked.get("protocol", "tls") != "tls":
            raise JobError(f"{wrong}; tls=FILE is for protocol=tls")
        return cls(host, port, **({"protocol": "tls"} if asked.get("tls") else {}) | asked)

    @classmethod
    def of(cls, address: str, interface: str | None = None, tls: str | None = None) -> Self:
        """Read an address as Dask writes it."""
        parts = urlsplit(address)
        return cls(parts.hostname or "", parts.port or DEFAULT_PORT, parts.scheme, interface, tls)

    @property
    def url(self) -> str:
        """The queue's URL."""
        asked = {"protocol": self.protocol} if self.protocol != "tcp" else {}
        asked |= {"interface": self.interface} if self.interface else {}
        asked |= {"tls": self.tls} if self.tls else {}
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"dask://{host}:{self.port}" + (f"?{urlencode(asked)}" if asked else "")

    def with_own_certificate(self) -> Self:
        """Add the certificate of a cluster of this user's at this address, if there is one."""
        if self.protocol != "tcp":
            return self
        file = credentials.find_secret("dask", self.host, self.port)
        return replace(self, protocol="tls", tls=str(file)) if file else self

    def security(self) -> Security | None:
        """Return the TLS settings, None for another protocol. Raises QueueError."""
        if self.tls:
            return load_security(self.tls)
        return configured_security() if self.protocol == "tls" else None

    @property
    def text(self) -> str:
        """The address as Dask writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}://{host}:{self.port}"


def silence_dask() -> None:
    """Silence Dask in this process: lost connections and other versions are told in one line."""
    for name in ("distributed", *logging.root.manager.loggerDict):
        if name.partition(".")[0] == "distributed":  # some have a level of their own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=VersionMismatchWarning)


def check_protocol(name: str) -> None:
    """Raise QueueError if Dask cannot speak a protocol here; it would find out late."""
    try:
        get_backend(name).get_connector()
    except (ImportError, ValueError, TypeError, RuntimeError):
        raise QueueError(
            f"queue: Dask cannot speak {name} here; pip install distributed-ucxx, or use tcp"
        ) from None


class DaskExecutor(HostedQueue):
    """`dask://HOST:PORT`, a scheduler that has chunkq installed."""

    def __init__(self, url: str, client: distributed.Client | None = None) -> None:
        super().__init__(url)
        self._owned = client is None
        self._returning = threading.Lock()
        self._client: Any = client or self._connect(url, CONNECT_SECONDS)

    def _connect(self, url: str, seconds: float) -> Any:
        self._address = Address.parse(url).with_own_certificate()
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
                f"queue: the Dask scheduler at {url} has no chunkq, which keeps the queue there; "
                "pip install 'chunkq[dask]' where it runs, and start it again"
            ) from None
        except UNREACHABLE_ERRORS as error:
            client.close()
            raise self._unreachable(error) from None
        except Exception:
            client.close()
            raise
        return client

    def _connected(self) -> Any:
        """Return the client; a scheduler that was away for long is looked for again."""
        with self._returning:
            if self._owned and self._client.status == "closed":
                self._client = self._connect(self.url, RECONNECT_SECONDS)
        if self._client.status in ("connecting", "closing", "closed"):
            raise self._unreachable(ConnectionError("the connection is lost"))
        return self._client

    def _check_versions(self, client: Any) -> None:
        """Refuse a scheduler of another version: Dask only warns, and fails later."""
        theirs = client.sync(client.scheduler.versions)["packages"]
        mine = distributed.versions.get_versions()["packages"]
        for name in ("python", "dask", "distributed"):
            if theirs[name] != mine[name]:
                raise QueueError(
                    f"queue: the Dask scheduler at {self.url} runs {name} {theirs[name]}, and "
                    f"here is {mine[name]}; install one version everywhere"
                )

    def request(self, request: str) -> str:
        """Ask the scheduler."""
        try:
            client = self._connected()
            answer: str | None = client.sync(
                client.scheduler.chunkq, request=request, callback_timeout=ANSWER_SECONDS
            )
        except UNREACHABLE_ERRORS as error:
            raise self._unreachable(error) from None
        if answer is None:  # what Dask says to an operation it does not know
            raise QueueError(
                f"queue: the Dask scheduler at {self.url} was started again and has lost the "
                "queue; `chunkq produce --resume` fills it again"
            )
        return answer

    def _unreachable(self, error: BaseException) -> QueueError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return QueueError(
            f"queue: no Dask scheduler answers at {self.url} ({reason[:200]}); start one with "
            "`dask scheduler`, or check host and port"
        )

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        """Join the cluster as a worker that takes nothing but chunks."""
        stop = _StopWithWorker(options)
        with scratch_folder("dask") as folder:
            try:
                client = self._connected()  # a worker lives in the loop of one client
                worker = client.sync(self._join, options, stop, str(folder))
            except UNREACHABLE_ERRORS as error:
                raise self._unreachable(error) from None
            self.host.register_worker(options.worker, worker.address)
            try:
                yield
            finally:
                closed = stop.is_closed
                with suppress(*UNREACHABLE_ERRORS):
                    client.sync(worker.close, executor_wait=False, callback_timeout=CONNECT_SECONDS)
            if closed:
                raise QueueError(
                    f"queue: the Dask scheduler at {self.url} closed this worker, or is gone"
                )

    async def _join(
        self, options: WorkerOptions, stop: _StopWithWorker, folder: str
    ) -> distributed.Worker:
        address = self._address
        # Its profiler would look at nothing but idle threads, a hundred times a second. Its web
        # pages, which have no access control, show its logs.
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
        # Other people's tasks would share the device with the chunks.
        worker.status = distributed.Status.paused
        return worker

    def launch_remote_workers(
        self, job: str, *, gpu: bool, depth: int, nodes: int = 1
    ) -> RemoteWorkers:
        """Occupy the threads of the cluster's workers, each with one chunk in flight."""
        try:
            client = self._connected()
            there = client.sync(client.scheduler.identity)["workers"].values()
        except UNREACHABLE_ERRORS as error:
            raise self._unreachable(error) from None
        count = sum(worker["nthreads"] for worker in there if worker["status"] == "running")
        if not count:
            raise QueueError(
                f"queue: the Dask cluster at {self.url} has no free workers; start some with "
                "`dask worker`, or use `chunkq work`"
            )
        group = new_group_name()
        lanes = [
            client.submit(
                run_remote_thread, self.url, job, group, key=f"chunkq-{group}-{n}", pure=False
            )
            for n in range(count)
        ]
        distributed.fire_and_forget(lanes)
        return _DaskRemoteWorkers(self, group, lanes)

    def close(self) -> None:
        """Let go of the scheduler."""
        if self._owned:
            self._client.close()


class _DaskRemoteWorkers(RemoteWorkers):
    """Threads hired; those whose worker died too often are gone, too."""

    def __init__(self, queue: HostedQueue, name: str, lanes: list[Any]) -> None:
        super().__init__(queue, name, len(lanes))
        self._lanes = lanes

    def have_ended(self) -> bool:
        return all(run_remote_thread.done() for run_remote_thread in self._lanes)

    def messages(self) -> list[str]:
        lines = super().messages()
        errors = {str(lane.exception()) for lane in self._lanes if lane.status == "error"}
        lines += [" ".join(error.split())[:300] for error in sorted(errors)]
        if any(lane.cancelled() for lane in self._lanes):
            lines.append(
                "the connection to the Dask scheduler broke; its workers may go on, "
                "`chunkq status` tells"
            )
        return lines


class _WorkerSideExecutor(DaskExecutor):
    """The queue as seen from a thread of a Dask worker."""

    def __init__(self, url: str) -> None:
        super().__init__(url, distributed.get_client())
        self.place = distributed.get_worker().address

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        self.host.register_worker(options.worker, self.place)
        yield


def run_remote_thread(url: str, job: str, group: str) -> None:
    """Work in one thread of a Dask worker, until the job is done."""
    queue = _WorkerSideExecutor(url)
    own = f"{os.getpid():x}"
    name = WorkerName.new(current_device())
    run_remote_worker(queue, group, WorkerName(name.host, name.device, own).name, job, depth=1)
