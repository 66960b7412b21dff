"""The side that cuts jobs, fills queues, watches and finalizes."""
