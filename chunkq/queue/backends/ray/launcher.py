"""Start remote workers of a Ray cluster as its queue needs them."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state

from chunkq.queue.backends.hosted.queue_host import MAX_LOADING_DEATHS, QueueHost, WorkerGroup
from chunkq.queue.backends.ray.connection import NAMESPACE
from chunkq.queue.backends.ray.errors import first_line, start_problem
from chunkq.queue.backends.ray.workers import new_actor, resources_per_worker

LOOK_SECONDS = 1.0
"""Interval at which the head compares the remote workers with the chunks on the queue."""
SPARE_WORKERS = 8
"""Remote workers that wait for a node, for an autoscaler to see; twice the room for them more."""
LEFT_ORDERLY = ("terminated expectedly", "preempted")
"""Parts of Ray's messages about a node that was stopped or drained, and did not fail."""


@dataclass
class _Worker:
    """A remote worker: its actor, the actor's name, and whether Ray has started it."""

    actor: Any
    name: str
    task: asyncio.Task[None] | None = None
    has_started: bool = False

    @property
    def has_ended(self) -> bool:
        return self.task is not None and self.task.done()


class RemoteWorkerLauncher:
    """Remote workers of the groups of a queue, as actors that the queue's actor creates.

    A remote worker ends when no chunk can be reserved. New ones are created while more chunks are
    queued than remote workers wait for a node. So an autoscaler sees them, nodes that join the
    cluster get some at once, and nodes without any can leave it. Those that wait in vain are ended.
    """

    def __init__(self, host: QueueHost) -> None:
        self._host = host
        self._workers: defaultdict[str, list[_Worker]] = defaultdict(list)
        self._loading_deaths: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the loop in the event loop of the actor if a group needs it."""
        if (self._loop is None or self._loop.done()) and self._host.open_groups():
            self._loop = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while groups := self._host.open_groups():
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            for name in groups:
                self._update(name, nodes)
            await asyncio.sleep(LOOK_SECONDS)

    def _update(self, name: str, nodes: Iterable[Mapping[str, float]]) -> None:
        """Create remote workers of a group, or end some of those that Ray has not started."""
        group = self._host.group(name)
        workers = [worker for worker in self._workers[name] if not worker.has_ended]
        # Others compute the chunks of a suspended process, and the run does not wait for it.
        suspended = [worker for worker in workers if self._host.is_silent(worker.name)]
        workers = [worker for worker in workers if worker not in suspended]
        started = sum(worker.has_started for worker in workers)
        room = room_for_workers(nodes, group)
        limit = 2 * room + SPARE_WORKERS
        wanted = self._host.wanted_workers(name, started, limit)
        waiting = [worker for worker in workers if not worker.has_started]
        for worker in waiting[::-1][: max(0, len(workers) - wanted)]:
            _end(worker)
            workers.remove(worker)
        workers += [self._create(name, group) for _ in range(wanted - len(workers))]
        self._workers[name] = workers + suspended
        self._host.set_active(name, len(workers), has_room=room > len(suspended))

    def _create(self, name: str, group: WorkerGroup) -> _Worker:
        from chunkq.queue.backends.ray.executor import ChunkqWorker

        output = group.job.rpartition("/")[2].removesuffix(".chunkq")
        actor_name = f"{output}-{name}-{next(self._numbers)}"
        actor = new_actor(
            ChunkqWorker,
            **resources_per_worker(gpu=group.gpu, cores=group.cores),
            name=actor_name,
            namespace=NAMESPACE,
            lifetime="detached",
            scheduling_strategy="SPREAD",
        ).remote(output)
        worker = _Worker(actor, actor_name)
        worker.task = asyncio.create_task(self._serve(worker, name, group))
        return worker

    async def _serve(self, worker: _Worker, name: str, group: WorkerGroup) -> None:
        """Run a remote worker until it ends; record why if its actor dies."""
        try:
            await worker.actor.ping.remote()
            worker.has_started = True
            run = worker.actor.run.options(name=f"chunkq {worker.name}")
            await run.remote(worker.name, name, group.job, group.depth)
            self._loading_deaths[name] = 0
        except ray.exceptions.RayActorError as error:
            self._record_death(worker, name, error)
        except ray.exceptions.RayError:
            pass  # an error of the worker, which it has recorded
        finally:
            _end(worker)

    def _record_death(self, worker: _Worker, name: str, error: Exception) -> None:
        """Return the chunks of a remote worker whose actor died.

        An attempt counts unless the node has left the cluster in order, or the network was not
        loaded yet. After some deaths of the last kind in a row the group ends.
        """
        if "creation task" in str(error):
            self._host.record_exit(name, [start_problem(error)])
        elif any(text in str(error) for text in LEFT_ORDERLY):
            self._host.release(worker.name, counted=False)
        elif self._host.expire_workers(worker.name):
            self._loading_deaths[name] = 0
        elif worker.has_started:
            self._loading_deaths[name] += 1
            if self._loading_deaths[name] > MAX_LOADING_DEATHS:
                self._host.record_exit(
                    name,
                    [
                        f"queue: {self._loading_deaths[name]} workers in a row died while they "
                        f"loaded the network, possibly out of memory: {first_line(error)}"
                    ],
                )


def room_for_workers(nodes: Iterable[Mapping[str, float]], group: WorkerGroup) -> int:
    """Return how many remote workers of a group run on nodes with these resources at a time."""
    if group.gpu:
        return sum(int(node.get("GPU", 0)) for node in nodes)
    return sum(int(node.get("CPU", 0) // group.cores) for node in nodes)


def end_leftover_workers() -> None:
    """End remote workers that wait for a node and whose queue has died.

    They would take the first room there is, and nobody would give them chunks. Call this before a
    new queue creates workers.
    """
    for actor in state.actors(actor_state_name="PENDING_CREATION").values():
        with suppress(ValueError):  # another program's actor, or the queue
            if actor["ActorClassName"] == "ChunkqWorker":
                ray.kill(ray.get_actor(actor["Name"], NAMESPACE))


def _end(worker: _Worker) -> None:
    """Kill the actor of a worker, which may have ended. An idle one would keep its device."""
    with suppress(Exception):
        ray.kill(worker.actor)
