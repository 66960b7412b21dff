"""What every queue backend promises, and the types that it shares with workers."""
