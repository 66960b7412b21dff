"""Arithmetic of overlapping predictions: weights, sums, votes and labels. No I/O."""
