"""One module per command: parse options, call a plain function, print the result."""
