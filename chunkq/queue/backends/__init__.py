"""The queue backends of chunkq."""
