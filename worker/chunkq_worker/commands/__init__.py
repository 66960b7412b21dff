"""The commands that load networks."""
