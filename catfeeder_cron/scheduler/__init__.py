"""From a slot to a recorded run: APScheduler calls, a slot is claimed, its job runs, listeners are told."""
