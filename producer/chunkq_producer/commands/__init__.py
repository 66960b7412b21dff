"""One module per command: options to values, then a plain function."""
