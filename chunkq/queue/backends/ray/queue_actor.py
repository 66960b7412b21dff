"""The queue of a Ray cluster in an actor on its head, which also starts remote workers."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from chunkq.queue.backends.hosted.queue_host import QueueHost
from chunkq.queue.backends.ray.connection import NAMESPACE
from chunkq.queue.backends.ray.launcher import RemoteWorkerLauncher, end_leftover_workers
from chunkq.queue.backends.ray.metrics import QueueMetrics

QUEUE_ACTOR = "queue"


class ChunkqQueue:
    """A queue and the launcher of its remote workers. Both run in the actor's event loop only."""

    @cached_property
    def _host(self) -> QueueHost:
        return QueueHost()  # at the first request: each thread has a database of its own

    @cached_property
    def _launcher(self) -> RemoteWorkerLauncher:
        end_leftover_workers()
        return RemoteWorkerLauncher(self._host)

    @cached_property
    def _metrics(self) -> QueueMetrics:
        return QueueMetrics(self._host)

    async def answer(self, request: str) -> str:
        """Answer one request, see `QueueHost.answer`."""
        response = self._host.answer(request)
        self._launcher.start()
        self._metrics.request_update()
        return response

    def __repr__(self) -> str:
        """Return the name that Ray's dashboard and logs show."""
        return "chunkq queue"


def queue_actor() -> Any:
    """Return the queue actor of the cluster. Create it on the head if it does not exist."""
    heads = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
    options: dict[str, Any] = {}
    if heads:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(heads[0], soft=True)
    return (
        ray.remote(ChunkqQueue)
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
