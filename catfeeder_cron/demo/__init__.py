"""Show the daemon at work on a temporary PostgreSQL with sample data: `make run`."""
