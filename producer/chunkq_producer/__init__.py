"""Producer side of chunkq: create jobs, fill queues, show progress and finalize outputs."""
