"""Queues of tasks: their contract, the task loop of workers, and the backends."""
