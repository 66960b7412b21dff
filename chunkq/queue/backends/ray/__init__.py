"""The queue in the memory of a Ray actor."""
