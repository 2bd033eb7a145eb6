"""The intervals that all processes keep, and the reasons that the history gives for missed slots and dead runs."""

HEARTBEAT_SECONDS = 10
# Three missed heartbeats.
DEAD_AFTER_SECONDS = 30
# Nobody has been heard of for longer than this: some may not have had time to come back since.
SILENCE_SECONDS = 13
# A run of a process that no heartbeat of which has arrived for so long ends, before others may begin the job: it is
# asked to, and what does not end by itself is killed five seconds later, where it can be.
FENCE_SECONDS = 20
FENCE_GRACE_SECONDS = 5
# After the database went back no run begins that must be the only one: until all that lived have sent a heartbeat, for
# eleven seconds at least, and until those that are cut off have ended their runs at most.
SETTLE_LEAST_SECONDS = HEARTBEAT_SECONDS + 1
SETTLE_SECONDS = FENCE_SECONDS + FENCE_GRACE_SECONDS
# How far apart the clocks of two machines are taken to be at most, where one has just been set by the other.
EARLY_SECONDS = 5

DIED = "its process died or lost the database"
STILL_RUNNING = "still running"
NO_DAEMON = "no daemon alive"
NO_DATABASE = "database unreachable"
NOT_FREE = "no daemon was free"
MOVED = "the database had just moved"
WENT_BACK = "accounted for before the database lost its last seconds"
