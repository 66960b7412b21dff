"""Timing of a job from its commit records."""
