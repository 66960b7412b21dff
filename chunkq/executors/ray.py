"""Ray as a queue: kept by a detached actor, worked off by actors that Ray grants their devices."""

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

from chunkq.errors import JobError, QueueError
from chunkq.executors.base import EXIT_DIED, EXIT_REFUSED, ExitStatus, WorkerName, WorkerOptions
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
"""How long Ray may take to grant a worker its device before the user hears of it."""
ACTOR_START_SECONDS = 5.0
"""How long an actor that lives may take to say so."""
CLIENT_TRIES = 3
"""How often Ray's head is asked for a server for this process, with `ray://HOST:PORT`."""
UNSERVED = "client/server/proxier.py"
"""What Ray says, among others, when the server it began for a client died, or did not answer."""
REMEDY = "pip install 'chunkq[ray]' on its machines"
START_ERRORS = ("MALLOC_", "GLIBC_TUNABLES")
"""What of the environment, by the names' beginning, an actor must be born with."""
RAY_ERRORS = ("CUDA_VISIBLE_DEVICES", "RAY_", "CHUNKQ_QUEUE")
"""What of the environment is not passed on to an actor."""


@dataclass(frozen=True)
class Address:
    """`ray://auto`, the cluster this machine is part of; `ray://HOST:10001`, from outside it.

    `ray://auto?address=HOST:6379` tells several clusters on one machine apart.
    """

    text: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a queue's URL; raises JobError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            asked = parse_qs(parts.query)
        except ValueError:
            host, port, asked = None, None, {}
        if url.rstrip("/") == "ray:":
            raise JobError(
                "queue: ray:// alone is a cluster that `chunkq run` makes for itself; for one "
                "that stays write ray://auto on a machine of it, or ray://HOST:10001"
            )
        if host == "auto" and port is None and not asked.keys() - {"address"}:
            return cls(asked.get("address", ["auto"])[0])
        if host is None or port is None or asked:
            raise JobError(
                f"queue: {url} is no address of a Ray cluster; write ray://auto on a machine of "
                "it, or ray://HOST:10001"
            )
        return cls(f"ray://{host}:{port}")


class _Connection:
    """The one connection that a process can have to a Ray cluster, shared by its executors."""

    _lock = threading.Lock()
    _users: ClassVar[int] = 0
    _address: ClassVar[str | None] = None

    @classmethod
    def open(cls, address: str) -> None:
        """Connect, unless that is done; raises OSError, RuntimeError and ValueError."""
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
        """Disconnect with the last user, if it was connected here."""
        with cls._lock:
            cls._users -= 1
            if not cls._users and cls._address is not None:
                cls._address = None
                ray.shutdown()


class RayExecutor(HostedQueue):
    """`ray://auto` or `ray://HOST:10001`, a cluster whose machines have chunkq installed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        address = Address.parse(url)
        self._actor: Any = None
        try:
            _Connection.open(address.text)
        except Exception as error:  # Ray raises many kinds, some of gRPC
            raise self._unreachable(error) from None
        try:
            self.ask_version()
        except QueueError:
            self.close()
            raise

    def ask_version(self) -> None:
        """Have the host compare versions."""
        self.host.group_status("")

    def request(self, request: str) -> str:
        """Ask the actor that keeps the queue; a cluster that has none gets one."""
        try:
            if self._actor is None:
                self._actor = _queue_actor()
            answer: str = ray.get(self._actor.answer.remote(request), timeout=ANSWER_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise self._unreachable(error) from None
        except ray.exceptions.RayActorError as error:
            self._actor = None
            if "No module named 'chunkq" in str(error):
                raise QueueError(
                    f"queue: the Ray cluster at {self.url} has no chunkq, which keeps the queue "
                    f"there; {REMEDY}"
                ) from None
            raise QueueError(
                f"queue: the Ray cluster at {self.url} has lost the queue; "
                "`chunkq produce --resume` fills it again"
            ) from None
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise self._unreachable(error) from None
        return answer

    def _unreachable(self, error: BaseException) -> QueueError:
        if isinstance(error, ConnectionAbortedError) and UNSERVED in str(error):
            return QueueError(
                f"queue: the Ray cluster at {self.url} failed {CLIENT_TRIES} times to start its "
                f"server for this process ({_last_line(error)}); start its head with "
                "GRPC_ENABLE_FORK_SUPPORT=0 in the environment, or see its ray_client_server*.err"
            )
        reason = " ".join(str(error).split()) or type(error).__name__
        if "ersion mismatch" in reason:
            return QueueError(
                f"queue: the Ray cluster at {self.url} runs other versions than this process "
                f"({reason[:300]}); install one version everywhere"
            )
        return QueueError(
            f"queue: no Ray cluster answers at {self.url} ({reason[:200]}); start one with "
            "`ray start --head`, or check the address, and the token if it asks for one"
        )

    def run_worker(self, options: WorkerOptions) -> ExitStatus:
        """Work in an actor on this machine, which Ray grants its GPU."""
        name = WorkerName.parse(options.worker)
        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=not self.url.startswith("ray://auto")
        )
        actor = _actor(name.device != "cpu", scheduling_strategy=here, max_concurrency=3).remote()
        try:
            if not self._is_granted(actor, options):
                return ExitStatus()
            return self._wait_until_done(actor, options)
        except ray.exceptions.RayActorError as error:
            if "creation task" in str(error):
                return ExitStatus(EXIT_REFUSED, [_start_problem(error)])
            return ExitStatus(EXIT_DIED, ["the worker's actor died: " + _first_line(error)])
        finally:
            with suppress(Exception):
                ray.kill(actor)

    def _is_granted(self, actor: Any, options: WorkerOptions) -> bool:
        """Wait until Ray has made room for a worker; False if by then it is of no use any more."""
        there, begun, late = actor.ping.remote(), time.monotonic(), False
        while not ray.wait([there], timeout=POLL_SECONDS)[0]:
            if not options.can_start() or (late and options.burst and self.is_drained(options)):
                return False
            if not late and time.monotonic() - begun > GRANT_SECONDS:
                late = True
                log.warning("Ray has not granted this worker its device and core yet; waiting")
        return True

    def _wait_until_done(self, actor: Any, options: WorkerOptions) -> ExitStatus:
        orders = {
            "depth": options.depth,
            "burst": options.burst,
            "job": options.job,
            "deadline": options.deadline,
            "time_limit": options.time_limit,
        }
        # As an argument, not as Ray's own environment of an actor: that one everyone can look up.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(RAY_ERRORS)}
        ending = actor.serve.remote(self.url, options.worker, orders, environment)
        stopped = False
        while not ray.wait([ending], timeout=POLL_SECONDS)[0]:
            if options.stop.is_set() and not stopped:
                stopped = True
                actor.stop.remote()
        code, lines = ray.get(ending)
        return ExitStatus(code, lines)

    def launch_remote_workers(
        self, job: str, *, gpu: bool, depth: int, nodes: int = 1
    ) -> RemoteWorkers:
        """Start actors all over the cluster: one for each GPU, or one on each machine."""
        until = time.monotonic() + JOIN_SECONDS
        while len(alive := [node for node in ray.nodes() if node["Alive"]]) < nodes:
            if time.monotonic() > until:
                log.warning(
                    "only %d of %d nodes have joined the Ray cluster; it goes without the others",
                    len(alive),
                    nodes,
                )
                break
            time.sleep(POLL_SECONDS)
        count = sum(int(node["Resources"].get("GPU", 0)) for node in alive) if gpu else len(alive)
        if not count:
            raise QueueError(f"queue: the Ray cluster at {self.url} has no GPU for this job")
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
        """Let go of the cluster."""
        _Connection.close()


class _RayRemoteWorkers(RemoteWorkers):
    """Hired actors, of which some may never come to life."""

    def __init__(self, queue: HostedQueue, group: str, actors: Sequence[Any]) -> None:
        super().__init__(queue, group, len(actors))
        self._actors = actors
        self._asked = {actor.ping.remote(): actor for actor in actors}
        self._lines: list[str] = []

    def have_ended(self) -> bool:
        """Tell whether all of them have left, or could not come."""
        self._collect_answers(0)
        return super().have_ended()

    def messages(self) -> list[str]:
        """Return why workers left, if not for want of work, or could not come."""
        return super().messages() + self._lines

    def stop(self) -> None:
        """Have them finish what is in flight and leave; those still waiting need not come."""
        super().stop()
        self._asked = {actor.ping.remote(): actor for actor in self._actors}
        self._collect_answers(ACTOR_START_SECONDS)
        while self._asked:
            ray.kill(self._asked.popitem()[1])
            self.count -= 1

    def _collect_answers(self, seconds: float) -> None:
        """Wait for answers, for so long at most, and note who could not be born."""
        asked = list(self._asked)
        if not asked:
            return
        for answer in ray.wait(asked, num_returns=len(asked), timeout=seconds)[0]:
            try:
                ray.get(answer)
            except ray.exceptions.RayActorError as error:
                if answer in self._asked and "creation task" in str(error):
                    self.count -= 1
                    self._lines = [_start_problem(error)]
            self._asked.pop(answer, None)


class WorkerActor:
    """One worker process as an actor: its threads are the chunks in flight.

    One that is hired begins by itself, also when Ray starts it again, and ends by itself.
    """

    def __init__(self, group: str | None = None, job: str = "", depth: int = 1) -> None:
        self._options: WorkerOptions | None = None
        if group is not None:
            me = ray.get_runtime_context().current_actor
            threading.Thread(target=self._run_remote, args=(group, job, depth, me)).start()

    def serve(
        self, url: str, home: str, orders: dict[str, Any], environment: dict[str, str]
    ) -> tuple[int, list[str]]:
        """Work until the options ends; returns the exit code, and why in lines."""
        os.environ.update(environment)
        _hide_ungranted_gpus()
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        queue = RayExecutor(url)
        self._options = WorkerOptions(
            WorkerName.new(current_device()).name, replaceable=True, **orders
        )
        queue.host.register_worker(self._options.worker, home)
        code, lines = run_worker(queue, self._options)
        queue.close()
        return code, list(lines)

    def ping(self) -> bool:
        """Answer as soon as Ray has made room."""
        return True

    def stop(self) -> None:
        """Finish what is in flight and take no more."""
        if self._options is not None:
            self._options.stop.set()

    def _run_remote(self, group: str, job: str, depth: int, me: Any) -> None:
        _hide_ungranted_gpus()
        try:
            queue = RayExecutor("ray://auto")
            try:
                run_remote_worker(queue, group, WorkerName.new(current_device()).name, job, depth)
            except Exception as error:
                queue.host.record_exit(group, [f"{type(error).__name__}: {_first_line(error)}"])
                raise
        finally:  # whatever happened: an actor that only sits there would keep its device
            ray.kill(me, no_restart=True)


def _actor(gpu: bool, **options: Any) -> Any:
    born = {name: value for name, value in os.environ.items() if name.startswith(START_ERRORS)}
    return ray.remote(WorkerActor).options(
        num_gpus=1 if gpu else 0, num_cpus=1, runtime_env={"env_vars": born}, **options
    )


def _queue_actor() -> Any:
    """Find or make the actor that keeps the queue, on the cluster's head."""
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
    """Raise OSError if nobody listens at an address; Ray itself would try for minutes."""
    found = get_ray_address_from_environment(address, None) if address == "auto" else address
    host, _, port = (found or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _connect(address: str) -> None:
    """Connect this process, also where a head's server for it dies at birth now and then.

    Ray forks that server off a process whose gRPC is at work, and the copy may crash.
    """
    for left in reversed(range(CLIENT_TRIES)):
        try:
            ray.init(
                address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except ConnectionAbortedError as error:
            if not left or UNSERVED not in str(error):
                raise
            log.warning("Ray could not start its server for this process; trying again")
        else:
            return


def _hide_ungranted_gpus() -> None:
    """Have an actor without a GPU see none: Ray itself would let it see all of its node's."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _start_problem(error: BaseException) -> str:
    """Say why an actor could not be made on a machine."""
    if "No module named 'chunkq" in str(error):
        return f"queue: a machine of the Ray cluster has no chunkq; {REMEDY}"
    return f"queue: a machine of the Ray cluster cannot make a worker: {_last_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
