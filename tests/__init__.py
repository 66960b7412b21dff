"""Tests. A package with this name, which some libraries install, must not be found first."""
