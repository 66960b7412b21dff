"""Model runtimes: one module per framework."""
