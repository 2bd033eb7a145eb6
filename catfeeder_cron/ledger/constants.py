"""The intervals that all processes keep, and the reasons that the history gives for missed slots and dead runs."""

HEARTBEAT_SECONDS = 10
# Three missed heartbeats.
DEAD_AFTER_SECONDS = 30

DIED = "its process died or lost the database"
STILL_RUNNING = "still running"
NO_DAEMON = "no daemon alive"
NO_DATABASE = "database unreachable"
NOT_FREE = "no daemon was free"
