"""Tests of chunkq. A package, because sleap-io installs one of the same name."""
