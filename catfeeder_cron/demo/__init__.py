"""The daemon at work on a throw-away PostgreSQL with sample data: `make run`."""
