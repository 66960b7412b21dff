"""A job's report for a reader: as text, and as one page with plots."""
