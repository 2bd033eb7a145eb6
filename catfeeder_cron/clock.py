"""The clock that two processes on different machines run by, up to its zero: it goes on while a machine sleeps."""

import time


def elapsed_seconds() -> float:
    """Seconds on a clock that nobody sets and that suspending the machine does not stop, unlike Linux's monotonic one.

    A lease and a heartbeat grow old by it.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
