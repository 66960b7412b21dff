"""Queue in a detached Ray actor. Workers are actors, so that Ray assigns their GPUs."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chunkq.errors import RESUME, ErrorCode, QueueError
from chunkq.paths import without_secret
from chunkq.queue.backends.hosted.hosted import ANSWER_LOOKS, LOOK_SECONDS, HostedQueue
from chunkq.queue.backends.hosted.queue_host import WorkerGroup
from chunkq.queue.backends.hosted.remote_workers import (
    current_device,
    is_outage,
    load_serve,
    run_remote_worker,
)
from chunkq.queue.backends.hosted.worker_group import RemoteWorkers, new_group_name
from chunkq.queue.backends.ray.connection import (
    CLIENT_SERVER_ERROR,
    CLIENT_TRIES,
    Address,
    Connection,
)
from chunkq.queue.backends.ray.errors import INSTALL_HINT, first_line, last_line, start_problem
from chunkq.queue.backends.ray.launcher import room_for_workers
from chunkq.queue.backends.ray.metrics import PatchCounter
from chunkq.queue.backends.ray.queue_actor import queue_actor
from chunkq.queue.backends.ray.workers import cores_per_worker, new_actor, resources_per_worker
from chunkq.queue.contract.executor import (
    EXIT_CRASHED,
    EXIT_DIED_LOADING,
    EXIT_REFUSED,
    ExitStatus,
    Serve,
    WorkerName,
    WorkerOptions,
)
from chunkq.system.signal_masks import discard_blocked_sigterm
from chunkq.terminal import without_colors

log = logging.getLogger("chunkq.queue")

POLL_SECONDS = 0.2
UNUSED_SECONDS = 60.0
"""Time after which an actor that was started and gets no work kills itself."""
END_SECONDS = 10.0
"""Time after which an actor whose worker has ended kills itself, if the queue has not killed it."""
GRANT_SECONDS = 15.0
"""Time after which a worker that waits for its device logs a warning."""
EXCLUDED_ENV_PREFIXES = ("CUDA_VISIBLE_DEVICES", "RAY_", "CHUNKQ_QUEUE")
"""Prefixes of environment variables that are not copied to an actor."""


class RayExecutor(HostedQueue):
    """Queue `ray://auto` or `ray://HOST:10001` in a cluster that has chunkq installed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._address = Address.parse(url)
        self._actor: Any = None
        try:
            Connection.open(self._address.text)
        except Exception as error:  # Ray raises many types, also those of gRPC
            raise self._unreachable(error) from None
        try:
            self.check_version()
        except QueueError:
            self.close()
            raise

    def check_version(self) -> None:
        """Raise QueueError if the queue actor runs another version of chunkq."""
        self.table.group_status("")

    def request(self, request: str) -> str:
        """Send a request to the queue actor, which is created if needed; return its response."""
        try:
            if self._actor is None:
                self._actor = queue_actor()
            response = _response(self._actor.answer.remote(request))
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
                f"queue: {self.url}: the Ray cluster lost the queue; {RESUME} to queue the "
                "remaining chunks",
                code=ErrorCode.QUEUE_LOST,
            ) from None
        except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
            raise self._unreachable(error) from None
        return response

    def _unreachable(self, error: BaseException) -> QueueError:
        if isinstance(error, ConnectionAbortedError) and CLIENT_SERVER_ERROR in str(error):
            return QueueError(
                f"queue: {self.url}: the Ray cluster failed {CLIENT_TRIES} times to start its "
                f"server for this process ({last_line(error)}); start its head with "
                "GRPC_ENABLE_FORK_SUPPORT=0 in the environment, or see its ray_client_server*.err"
            )
        reason = " ".join(without_colors(str(error)).split()) or type(error).__name__
        if "ersion mismatch" in reason:
            return QueueError(
                f"queue: {self.url}: the Ray cluster and this process run different versions "
                f"({reason[:300]}); install the same versions everywhere",
                code=ErrorCode.QUEUE_VERSION_MISMATCH,
            )
        if self._address.text == "auto" and (variable := os.environ.get("RAY_ADDRESS")):
            return QueueError(
                f"queue: {self.url}: the Ray cluster at RAY_ADDRESS={without_secret(variable)} is "
                f"unreachable ({reason[:200]}); set RAY_ADDRESS to a running cluster, or unset it"
            )
        return QueueError(
            f"queue: {self.url}: the Ray cluster is unreachable ({reason[:200]}); start one with "
            "`ray start --head`, or check the address; for one with a token set RAY_AUTH_MODE=token"
        )

    def run_worker(self, serve: Serve, options: WorkerOptions) -> ExitStatus:
        """Run the worker in an actor on this machine, to which Ray assigns a GPU.

        The actor uses the function that is installed in its environment, not `serve`.
        """
        name = WorkerName.parse(options.worker)
        this_node = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=not self.url.startswith("ray://auto")
        )
        actor = new_actor(
            ChunkqWorker,
            **resources_per_worker(gpu=name.device != "cpu"),
            scheduling_strategy=this_node,
            max_concurrency=3,
        ).remote()
        try:
            if not self._wait_for_start(actor, options):
                return ExitStatus()
            return self._wait_until_done(actor, options)
        except ray.exceptions.RayActorError as error:
            if "creation task" in str(error):
                return ExitStatus(EXIT_REFUSED, [start_problem(error)])
            lines = ["the worker's actor died: " + first_line(error)]
            return ExitStatus(
                EXIT_DIED_LOADING if self._was_loading(options) else EXIT_CRASHED, lines
            )
        finally:
            with suppress(Exception):
                ray.kill(actor)

    def _was_loading(self, options: WorkerOptions) -> bool:
        try:
            return self.table.is_loading(options.worker)
        except QueueError:
            return False

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
        self, job: str, *, gpu: bool, depth: int, threads: int | None = None
    ) -> RemoteWorkers:
        """Let the queue start actors: one per GPU, or on the CPU one per `threads` cores.

        Without `threads` there is one per node of the smallest size.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = cores_per_worker(nodes, threads)
        needed = "a GPU" if gpu else f"{cores} core{'s' if cores > 1 else ''}"
        group = new_group_name()
        self.table.start_group(group, job, self.url, depth, gpu=gpu, cores=cores)
        return RemoteWorkers(
            self.table,
            group,
            has_room=room_for_workers(nodes, WorkerGroup(gpu=gpu, cores=cores)) > 0,
            no_room=f"queue: {self.url}: no node of the Ray cluster has {needed}; waiting for one, "
            f"add it with `ray start` or an autoscaler{', or set device: cpu' if gpu else ''}",
            room=f"queue: {self.url}: a node of the Ray cluster has {needed} now",
        )

    def close(self) -> None:
        """Disconnect from the cluster."""
        Connection.close()


class ChunkqWorker:
    """Worker process as an actor. `serve` runs a worker of `chunkq work`, `run` a remote worker."""

    def __init__(self, output: str = "") -> None:
        discard_blocked_sigterm()
        self._options: WorkerOptions | None = None
        self._output = output
        self._is_used = threading.Event()
        if output:  # created by a queue, which may have died meanwhile
            _kill_later(UNUSED_SECONDS, self._is_used)

    def __repr__(self) -> str:
        """Return the name that Ray's dashboard and logs show."""
        return f"chunkq worker {self._output}".rstrip()

    def serve(
        self, url: str, parent: str, values: dict[str, Any], environment: dict[str, str]
    ) -> tuple[int, list[str]]:
        """Run the worker until it ends; return its exit code and messages.

        `parent` is the name of the worker process that waits for it, `values` are the arguments of
        `WorkerOptions`.
        """
        discard_blocked_sigterm()
        os.environ.update(environment)
        _hide_ungranted_gpus()
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        queue = RayExecutor(url)
        name = WorkerName.new(current_device()).name
        self._options = WorkerOptions(
            name,
            replaceable=True,
            on_loading=queue.table.report_loading(name),
            on_success=PatchCounter().add,
            **values,
        )
        queue.table.register_worker(self._options.worker, parent)
        code, lines = load_serve()(queue, self._options)
        queue.close()
        return code, list(lines)

    def ping(self) -> bool:
        """Return True. Ray delays the answer until the actor has started."""
        return True

    def stop(self) -> None:
        """Make the worker finish its tasks in flight and end."""
        if self._options is not None:
            self._options.stop.set()

    def run(self, owner: str, group: str, job: str, depth: int) -> None:
        """Run a remote worker of a group until no chunk can be reserved.

        `owner` is the name of this actor. The queue that has called this ends the actor.
        """
        self._is_used.set()
        discard_blocked_sigterm()
        _hide_ungranted_gpus()
        queue = RayExecutor("ray://auto")
        name = WorkerName.new(current_device()).name
        try:
            queue.table.register_worker(name, owner, is_remote=True)
            run_remote_worker(queue, group, name, job, depth, PatchCounter().add)
        except Exception as error:
            record = queue.table.record_outage if is_outage(error) else queue.table.record_exit
            with suppress(QueueError):
                record(group, [f"{type(error).__name__}: {first_line(error)}"], name)
            raise
        finally:  # the queue may be lost, and an idle actor would keep its device
            _kill_later(END_SECONDS)


def _kill_later(seconds: float, unless: threading.Event | None = None) -> None:
    """Kill the actor of this process after a time, unless an event is set then."""
    actor = ray.get_runtime_context().current_actor

    def kill() -> None:
        if unless is None or not unless.is_set():
            ray.kill(actor, no_restart=True)

    end = threading.Timer(seconds, kill)
    end.daemon = True
    end.start()


def _response(reference: Any) -> str:
    """Wait for a response. Raise OSError if the head of the cluster does not listen."""
    for _ in range(ANSWER_LOOKS - 1):
        with suppress(ray.exceptions.GetTimeoutError):
            return _text(ray.get(reference, timeout=LOOK_SECONDS))
        Connection.check()
    return _text(ray.get(reference, timeout=LOOK_SECONDS))


def _text(response: str) -> str:
    return response


def _hide_ungranted_gpus() -> None:
    """Hide all GPUs from an actor without one. By default Ray makes all GPUs visible to it."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
