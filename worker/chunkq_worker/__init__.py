"""The side that runs networks."""
