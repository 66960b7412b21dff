"""Queues in SQL tables."""
