"""Ray as a queue: kept by a detached actor, worked off by actors that Ray grants their devices."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chunkq.errors import JobError, QueueError
from chunkq.executors.base import EXIT_DIED, Ended, Shift, WorkerName
from chunkq.executors.hosted import (
    Hired,
    Host,
    HostedQueue,
    device,
    new_gang,
    serve_hired,
)
from chunkq.tasks import serve

log = logging.getLogger("chunkq.queue")

NAMESPACE = "chunkq"
KEEPER = "queue"
ANSWER_SECONDS = 30.0
LOOK_SECONDS = 0.2
JOIN_SECONDS = 120.0
GRANT_SECONDS = 15.0
"""How long Ray may take to grant a worker its device before the user hears of it."""
AT_BIRTH = "MALLOC_"
"""What of the environment, by the names' beginning, an actor must be born with."""
OF_RAY = ("CUDA_VISIBLE_DEVICES", "RAY_", "CHUNKQ_QUEUE")
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
        """Connect, unless that is done; raises ConnectionError, RuntimeError and ValueError."""
        with cls._lock:
            if not ray.is_initialized():
                ray.init(
                    address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
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
        self._keeper: Any = None
        try:
            _Connection.open(address.text)
        except Exception as error:  # Ray raises many kinds, some of gRPC
            raise self._away(error) from None
        try:
            self.ask_version()
        except QueueError:
            self.close()
            raise

    def ask_version(self) -> None:
        """Have the host compare versions."""
        self.host.gang("")

    def ask(self, request: str) -> str:
        """Ask the actor that keeps the queue; a cluster that has none gets one."""
        try:
            if self._keeper is None:
                self._keeper = _keeper()
            answer: str = ray.get(self._keeper.answer.remote(request), timeout=ANSWER_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise self._away(error) from None
        except ray.exceptions.RayActorError as error:
            self._keeper = None
            if "No module named 'chunkq" in str(error):
                raise QueueError(
                    f"queue: the Ray cluster at {self.url} has no chunkq, which keeps the queue "
                    "there; pip install 'chunkq[ray]' on its machines"
                ) from None
            raise QueueError(
                f"queue: the Ray cluster at {self.url} has lost the queue; "
                "`chunkq produce --resume` fills it again"
            ) from None
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise self._away(error) from None
        return answer

    def _away(self, error: BaseException) -> QueueError:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "ersion mismatch" in reason:
            return QueueError(
                f"queue: the Ray cluster at {self.url} runs other versions than this process "
                f"({reason[:300]}); install one version everywhere"
            )
        return QueueError(
            f"queue: no Ray cluster answers at {self.url} ({reason[:200]}); start one with "
            "`ray start --head`, or check the address"
        )

    def serve(self, shift: Shift) -> Ended:
        """Work in an actor on this machine, which Ray grants its GPU."""
        name = WorkerName.parse(shift.worker)
        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=self.url != "ray://auto"
        )
        actor = _actor(name.device != "cpu", scheduling_strategy=here, max_concurrency=3).remote()
        orders = {
            "depth": shift.depth,
            "burst": shift.burst,
            "job": shift.job,
            "deadline": shift.deadline,
            "time_limit": shift.time_limit,
        }
        # As an argument, not as Ray's own environment of an actor: that one everyone can look up.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_RAY)}
        ending = actor.serve.remote(self.url, shift.worker, orders, environment)
        started, begun, stopped = actor.is_there.remote(), time.monotonic(), False
        while not ray.wait([ending], timeout=LOOK_SECONDS)[0]:
            if shift.stopping.is_set() and not stopped:
                stopped = True
                actor.stop.remote()
            if started is not None and time.monotonic() - begun > GRANT_SECONDS:
                if not ray.wait([started], timeout=0)[0]:
                    log.warning("Ray has not granted this worker its device and core yet; waiting")
                started = None
        try:
            code, lines = ray.get(ending)
        except ray.exceptions.RayActorError as error:
            code, lines = EXIT_DIED, ["the worker's actor died: " + _first_line(error)]
        finally:
            with suppress(Exception):
                ray.kill(actor)
        return Ended(code, lines)

    def hire(self, job: str, *, gpu: bool, depth: int, nodes: int = 1) -> Hired:
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
            time.sleep(LOOK_SECONDS)
        count = sum(int(node["Resources"].get("GPU", 0)) for node in alive) if gpu else len(alive)
        if not count:
            raise QueueError(f"queue: the Ray cluster at {self.url} has no GPU for this job")
        gang = new_gang()
        for number in range(count):
            _actor(
                gpu,
                name=f"worker-{gang}-{number}",
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                scheduling_strategy="SPREAD",
            ).remote(gang, job, depth)
        return Hired(self, gang, count)

    def close(self) -> None:
        """Let go of the cluster."""
        _Connection.close()


class Crew:
    """One worker process as an actor: its threads are the chunks in flight.

    One that is hired begins by itself, also when Ray starts it again, and ends by itself.
    """

    def __init__(self, gang: str | None = None, job: str = "", depth: int = 1) -> None:
        self._shift: Shift | None = None
        if gang is not None:
            me = ray.get_runtime_context().current_actor
            threading.Thread(target=self._be_hired, args=(gang, job, depth, me)).start()

    def serve(
        self, url: str, home: str, orders: dict[str, Any], environment: dict[str, str]
    ) -> tuple[int, list[str]]:
        """Work until the shift ends; returns the exit code, and why in lines."""
        os.environ.update(environment)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        queue = RayExecutor(url)
        self._shift = Shift(worker=WorkerName.new(device()).text, **orders)
        queue.host.enlist(self._shift.worker, home)
        code, lines = serve(queue, self._shift)
        queue.close()
        return code, list(lines)

    def is_there(self) -> bool:
        """Answer as soon as Ray has made room."""
        return True

    def stop(self) -> None:
        """Finish what is in flight and take no more."""
        if self._shift is not None:
            self._shift.stopping.set()

    def _be_hired(self, gang: str, job: str, depth: int, me: Any) -> None:
        queue = RayExecutor("ray://auto")
        serve_hired(queue, gang, WorkerName.new(device()).text, job, depth)
        ray.kill(me, no_restart=True)


def _actor(gpu: bool, **options: Any) -> Any:
    born = {name: value for name, value in os.environ.items() if name.startswith(AT_BIRTH)}
    return ray.remote(Crew).options(
        num_gpus=1 if gpu else 0, num_cpus=1, runtime_env={"env_vars": born}, **options
    )


def _keeper() -> Any:
    """Find or make the actor that keeps the queue, on the cluster's head."""
    heads = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
    options: dict[str, Any] = {}
    if heads:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(heads[0], soft=True)
    return (
        ray.remote(Host)
        .options(
            name=KEEPER,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            **options,
        )
        .remote()
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
