"""Run a network on images that it sees whole."""
