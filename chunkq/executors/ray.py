"""Queue in a detached Ray actor. Workers are actors, so that Ray assigns their GPUs."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit

import ray
from ray._private.services import get_ray_address_from_environment
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chunkq.errors import ErrorCode, JobError, QueueError
from chunkq.executors.base import EXIT_CRASHED, EXIT_REFUSED, ExitStatus, WorkerName, WorkerOptions
from chunkq.executors.hosted import (
    HostedQueue,
    QueueHost,
    RemoteWorkers,
    current_device,
    new_group_name,
    run_remote_worker,
)
from chunkq.tasks import run_worker

log = logging.getLogger("chunkq.queue")

NAMESPACE = "chunkq"
QUEUE_ACTOR = "queue"
ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 5.0
POLL_SECONDS = 0.2
JOIN_SECONDS = 120.0
GRANT_SECONDS = 15.0
"""Time after which a worker that waits for its device logs a warning."""
ACTOR_START_SECONDS = 5.0
"""Time in which a running actor answers a ping."""
CLIENT_TRIES = 3
"""Attempts to connect with `ray://HOST:PORT`."""
CLIENT_SERVER_ERROR = "client/server/proxier.py"
"""Part of the error of Ray when the server process that it started for a client died."""
INSTALL_HINT = "run pip install 'chunkq[ray]' on its machines"
START_ENV_PREFIXES = ("MALLOC_", "GLIBC_TUNABLES")
"""Prefixes of environment variables that take effect only at the start of an actor's process."""
EXCLUDED_ENV_PREFIXES = ("CUDA_VISIBLE_DEVICES", "RAY_", "CHUNKQ_QUEUE")
"""Prefixes of environment variables that are not copied to an actor."""


@dataclass(frozen=True)
class Address:
    """Address of a cluster: `ray://auto` on its machines, `ray://HOST:10001` on other machines.

    `ray://auto?address=HOST:6379` selects one of several clusters on this machine.
    """

    text: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse the URL of a queue. Raises JobError if it is invalid."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            options = parse_qs(parts.query)
        except ValueError:
            host, port, options = None, None, {}
        if url.rstrip("/") == "ray:":
            raise JobError(
                "queue: ray:// has no host; use ray://auto or ray://HOST:10001 for a running "
                "cluster, or `chunkq run` to start a temporary one",
                code=ErrorCode.QUEUE_ADDRESS_INVALID,
            )
        if host == "auto" and port is None and not options.keys() - {"address"}:
            return cls(options.get("address", ["auto"])[0])
        if host is None or port is None or options:
            raise JobError(
                f"queue: {url}: invalid address; use ray://auto on a machine of the Ray cluster, "
                "or ray://HOST:10001",
                code=ErrorCode.QUEUE_ADDRESS_INVALID,
            )
        return cls(f"ray://{host}:{port}")


class _Connection:
    """Connection to a Ray cluster, shared by all executors of a process: Ray allows one only."""

    _lock = threading.Lock()
    _users: ClassVar[int] = 0
    _address: ClassVar[str | None] = None

    @classmethod
    def open(cls, address: str) -> None:
        """Connect unless connected. Raises OSError, RuntimeError or ValueError."""
        with cls._lock:
            if not ray.is_initialized():
                _check_listening(address)
                _connect(address)
                cls._address = address
            elif cls._address not in (None, address):
                raise ValueError(f"this process is connected to {cls._address} already")
            cls._users += 1

    @classmethod
    def close(cls) -> None:
        """Disconnect when the last executor closes, unless another library connected."""
        with cls._lock:
            cls._users -= 1
            if not cls._users and cls._address is not None:
                cls._address = None
                ray.shutdown()


class RayExecutor(HostedQueue):
    """Queue `ray://auto` or `ray://HOST:10001` in a cluster that has chunkq installed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        address = Address.parse(url)
        self._actor: Any = None
        try:
            _Connection.open(address.text)
        except Exception as error:  # Ray raises many types, also those of gRPC
            raise self._unreachable(error) from None
        try:
            self.check_version()
        except QueueError:
            self.close()
            raise

    def check_version(self) -> None:
        """Raise QueueError if the queue actor runs another version of chunkq."""
        self.host.group_status("")

    def request(self, request: str) -> str:
        """Send a request to the queue actor, which is created if needed; return its response."""
        try:
            if self._actor is None:
                self._actor = _queue_actor()
            response: str = ray.get(self._actor.answer.remote(request), timeout=ANSWER_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise self._unreachable(error) from None
        except ray.exceptions.RayActorError as error:
            self._actor = None
            if "No module named 'chunkq" in str(error):
                raise QueueError(
                    f"queue: {self.url}: chunkq is not installed in the Ray cluster; "
                    f"{INSTALL_HINT}",
                    code=ErrorCode.PACKAGE_MISSING,
                ) from None
            raise QueueError(
                f"queue: {self.url}: the Ray cluster lost the queue; "
                "run `chunkq produce --resume` to queue the remaining chunks",
                code=ErrorCode.QUEUE_LOST,
            ) from None
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise self._unreachable(error) from None
        return response

    def _unreachable(self, error: BaseException) -> QueueError:
        if isinstance(error, ConnectionAbortedError) and CLIENT_SERVER_ERROR in str(error):
            return QueueError(
                f"queue: {self.url}: the Ray cluster failed {CLIENT_TRIES} times to start its "
                f"server for this process ({_last_line(error)}); start its head with "
                "GRPC_ENABLE_FORK_SUPPORT=0 in the environment, or see its ray_client_server*.err"
            )
        reason = " ".join(str(error).split()) or type(error).__name__
        if "ersion mismatch" in reason:
            return QueueError(
                f"queue: {self.url}: the Ray cluster and this process run different versions "
                f"({reason[:300]}); install the same versions everywhere",
                code=ErrorCode.QUEUE_VERSION_MISMATCH,
            )
        return QueueError(
            f"queue: {self.url}: the Ray cluster is unreachable ({reason[:200]}); start one with "
            "`ray start --head`, or check the address, and the token if it requires one"
        )

    def run_worker(self, options: WorkerOptions) -> ExitStatus:
        """Run the worker in an actor on this machine, to which Ray assigns a GPU."""
        name = WorkerName.parse(options.worker)
        this_node = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=not self.url.startswith("ray://auto")
        )
        actor = _actor(
            name.device != "cpu", scheduling_strategy=this_node, max_concurrency=3
        ).remote()
        try:
            if not self._wait_for_start(actor, options):
                return ExitStatus()
            return self._wait_until_done(actor, options)
        except ray.exceptions.RayActorError as error:
            if "creation task" in str(error):
                return ExitStatus(EXIT_REFUSED, [_start_problem(error)])
            return ExitStatus(EXIT_CRASHED, ["the worker's actor died: " + _first_line(error)])
        finally:
            with suppress(Exception):
                ray.kill(actor)

    def _wait_for_start(self, actor: Any, options: WorkerOptions) -> bool:
        """Wait until Ray starts an actor; return False if its worker is no longer needed."""
        answer, start, late = actor.ping.remote(), time.monotonic(), False
        while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
            if not options.can_start() or (late and options.burst and self.is_drained(options)):
                return False
            if not late and time.monotonic() - start > GRANT_SECONDS:
                late = True
                log.warning("Ray has not yet assigned a device and a core to this worker; waiting")
        return True

    def _wait_until_done(self, actor: Any, options: WorkerOptions) -> ExitStatus:
        values = {
            "depth": options.depth,
            "burst": options.burst,
            "job": options.job,
            "deadline": options.deadline,
            "time_limit": options.time_limit,
        }
        # An argument, because any user of the cluster can read the runtime environment of an actor.
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(EXCLUDED_ENV_PREFIXES)
        }
        result = actor.serve.remote(self.url, options.worker, values, environment)
        stopped = False
        while not ray.wait([result], timeout=POLL_SECONDS)[0]:
            if options.stop.is_set() and not stopped:
                stopped = True
                actor.stop.remote()
        code, lines = ray.get(result)
        return ExitStatus(code, lines)

    def launch_remote_workers(
        self, job: str, *, gpu: bool, depth: int, nodes: int = 1
    ) -> RemoteWorkers:
        """Start detached actors on all machines of the cluster: one per GPU, or one per machine."""
        until = time.monotonic() + JOIN_SECONDS
        while len(alive := [node for node in ray.nodes() if node["Alive"]]) < nodes:
            if time.monotonic() > until:
                log.warning(
                    "only %d of %d nodes joined the Ray cluster; continuing without the others",
                    len(alive),
                    nodes,
                )
                break
            time.sleep(POLL_SECONDS)
        count = sum(int(node["Resources"].get("GPU", 0)) for node in alive) if gpu else len(alive)
        if not count:
            raise QueueError(
                f"queue: {self.url}: the Ray cluster has no GPU for this job; use a cluster with "
                "GPUs, or `device: cpu` in the job file",
                code=ErrorCode.QUEUE_NO_WORKERS,
            )
        group = new_group_name()
        actors = [
            _actor(
                gpu,
                name=f"worker-{group}-{number}",
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                scheduling_strategy="SPREAD",
            ).remote(group, job, depth)
            for number in range(count)
        ]
        return _RayRemoteWorkers(self, group, actors)

    def close(self) -> None:
        """Disconnect from the cluster."""
        _Connection.close()


class _RayRemoteWorkers(RemoteWorkers):
    """Remote workers in actors, of which some may fail to start."""

    def __init__(self, queue: HostedQueue, group: str, actors: Sequence[Any]) -> None:
        super().__init__(queue, group, len(actors))
        self._actors = actors
        self._pings = {actor.ping.remote(): actor for actor in actors}
        self._lines: list[str] = []

    def have_ended(self) -> bool:
        """Return whether all workers have ended or failed to start."""
        self._collect_answers(0)
        return super().have_ended()

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
            self.count -= 1

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
                    self.count -= 1
                    self._lines = [_start_problem(error)]
            self._pings.pop(answer, None)


class WorkerActor:
    """Worker process as an actor.

    With a `group` it is a remote worker: it runs the job without a call, also after Ray restarts
    it, and ends itself. Otherwise `serve` runs it.
    """

    def __init__(self, group: str | None = None, job: str = "", depth: int = 1) -> None:
        self._options: WorkerOptions | None = None
        if group is not None:
            actor = ray.get_runtime_context().current_actor
            threading.Thread(target=self._run_remote, args=(group, job, depth, actor)).start()

    def serve(
        self, url: str, parent: str, values: dict[str, Any], environment: dict[str, str]
    ) -> tuple[int, list[str]]:
        """Run the worker until it ends; return its exit code and messages.

        `parent` is the name of the worker process that waits for it, `values` are the arguments of
        `WorkerOptions`.
        """
        os.environ.update(environment)
        _hide_ungranted_gpus()
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        queue = RayExecutor(url)
        self._options = WorkerOptions(
            WorkerName.new(current_device()).name, replaceable=True, **values
        )
        queue.host.register_worker(self._options.worker, parent)
        code, lines = run_worker(queue, self._options)
        queue.close()
        return code, list(lines)

    def ping(self) -> bool:
        """Return True. Ray delays the answer until the actor has started."""
        return True

    def stop(self) -> None:
        """Make the worker finish its tasks in flight and end."""
        if self._options is not None:
            self._options.stop.set()

    def _run_remote(self, group: str, job: str, depth: int, actor: Any) -> None:
        _hide_ungranted_gpus()
        try:
            queue = RayExecutor("ray://auto")
            try:
                run_remote_worker(queue, group, WorkerName.new(current_device()).name, job, depth)
            except Exception as error:
                queue.host.record_exit(group, [f"{type(error).__name__}: {_first_line(error)}"])
                raise
        finally:  # an idle actor would keep its device
            ray.kill(actor, no_restart=True)


def _actor(gpu: bool, **options: Any) -> Any:
    start_env = {k: v for k, v in os.environ.items() if k.startswith(START_ENV_PREFIXES)}
    return ray.remote(WorkerActor).options(
        num_gpus=1 if gpu else 0, num_cpus=1, runtime_env={"env_vars": start_env}, **options
    )


def _queue_actor() -> Any:
    """Return the queue actor of the cluster. Create it on the head if it does not exist."""
    heads = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
    options: dict[str, Any] = {}
    if heads:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(heads[0], soft=True)
    return (
        ray.remote(QueueHost)
        .options(
            name=QUEUE_ACTOR,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            **options,
        )
        .remote()
    )


def _check_listening(address: str) -> None:
    """Raise OSError if no server listens at an address. Ray itself would retry for minutes."""
    resolved = get_ray_address_from_environment(address, None) if address == "auto" else address
    host, _, port = (resolved or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _connect(address: str) -> None:
    """Connect this process; retry if the server process that Ray starts for it crashes.

    Ray forks that server from a process with active gRPC threads, so it sometimes crashes.
    """
    for remaining in reversed(range(CLIENT_TRIES)):
        try:
            ray.init(
                address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except ConnectionAbortedError as error:
            if not remaining or CLIENT_SERVER_ERROR not in str(error):
                raise
            log.warning("Ray failed to start its server for this process; retrying")
        else:
            return


def _hide_ungranted_gpus() -> None:
    """Hide all GPUs from an actor without one. By default Ray makes all GPUs visible to it."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _start_problem(error: BaseException) -> str:
    """Return the message for an actor that failed to start."""
    if "No module named 'chunkq" in str(error):
        return f"queue: chunkq is not installed on a machine of the Ray cluster; {INSTALL_HINT}"
    return f"queue: cannot start a worker on a machine of the Ray cluster: {_last_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
