"""Format the report of a job: as text, and as an HTML page with plots."""
