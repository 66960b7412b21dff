"""This process and its machine: memory, temporary files, child processes."""
