"""A job: its file, record, items, ledger and output."""
