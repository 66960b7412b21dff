"""Show an output and its input in a viewer."""
