"""Queue in Redis with the data layout of RQ, so that the tools of RQ show the state of tasks."""

from chunkq.queue.backends.rq.executor import RqExecutor

__all__ = ["RqExecutor"]
