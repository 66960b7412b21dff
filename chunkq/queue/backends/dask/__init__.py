"""The queue in the memory of a Dask scheduler."""
