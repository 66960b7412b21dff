"""chunkq: run a trained network over volumes that fit no machine."""

__version__ = "0.1.0"
