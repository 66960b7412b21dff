"""Remote workers in the threads of a Dask cluster that runs already."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import distributed
from distributed.diagnostics.plugin import WorkerPlugin

from chunkq.queue.backends.dask.executor import DaskExecutor
from chunkq.queue.backends.hosted.queue_host import VERSION
from chunkq.queue.backends.hosted.remote_workers import current_device, run_remote_worker
from chunkq.queue.contract.executor import WorkerName, WorkerOptions


class _ReturnChunks(WorkerPlugin):
    """Worker plugin that requeues the chunks of a remote worker when its Dask worker is closed.

    The chunk in flight may still be finished and committed.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.name = f"chunkq-{id(options)}"
        self._options = options

    async def teardown(self, worker: Any) -> None:
        self._options.stop.set()
        call = {"method": "release", "params": [self._options.worker, False], "version": VERSION}
        await worker.scheduler.chunkq(request=json.dumps(call))


class _WorkerSideExecutor(DaskExecutor):
    """Executor for a thread of a Dask worker, which has a connection to the scheduler."""

    def __init__(self, url: str) -> None:
        super().__init__(url, distributed.get_client())
        self._dask_worker = distributed.get_worker()

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        address = self._dask_worker.address
        self.table.register_worker(options.worker, address, is_remote=True)
        plugin = _ReturnChunks(options)
        self._dask_worker.loop.add_callback(self._dask_worker.plugin_add, plugin, plugin.name)
        try:
            yield
        finally:
            self._dask_worker.loop.add_callback(self._dask_worker.plugins.pop, plugin.name, None)


def run_remote_thread(url: str, job: str, group: str) -> None:
    """Run a worker in one thread of a Dask worker until no chunk of the job can be reserved."""
    queue = _WorkerSideExecutor(url)
    suffix = f"{os.getpid():x}"
    name = WorkerName.new(current_device())
    run_remote_worker(queue, group, WorkerName(name.host, name.device, suffix).name, job, depth=1)
