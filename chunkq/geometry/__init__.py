"""Integer geometry along axes: boxes, padding, grids of patches."""
