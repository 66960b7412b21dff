"""Redis as the queue, laid out as RQ lays it out, so that RQ's own tools see the true state."""

from chunkq.executors.rq.executor import RqExecutor

__all__ = ["RqExecutor"]
