"""The task loop of a worker on a queue that leases tasks."""
