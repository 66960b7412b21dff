"""The stages of a job: its kinds of tasks, and what each task waits for."""
