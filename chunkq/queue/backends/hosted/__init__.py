"""Queues in the memory of a head process of a cluster."""
