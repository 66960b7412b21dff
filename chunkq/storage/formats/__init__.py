"""Formats of stored arrays: one module per format, behind the contract in `base`."""
