"""Stored arrays and the formats that hold them."""
