"""Reap orphans if the daemon is the first process of a container, which inherits every process without a parent.

Without this, dead processes would stay in the process table for ever. A real init reaps every child at once; here other
code (asyncio, subprocess) waits for its own children at the same time and needs their exit status. So only a child that
has been dead for a whole round is reaped.
"""

import os
import threading
import time
from contextlib import suppress

_ROUND_SECONDS = 5.0


def reap_orphans_as_init() -> None:
    """Start a thread that reaps orphans if this is the first process of its namespace; it ends with the process."""
    if os.getpid() == 1:
        threading.Thread(target=_reap_for_ever, name="orphans", daemon=True).start()


def _reap_for_ever() -> None:
    seen: set[int] = set()
    while True:
        dead = _dead_children()
        for pid in dead & seen:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        seen = dead
        time.sleep(_ROUND_SECONDS)


def _dead_children() -> set[int]:
    """Return the ids of our children that have ended and were not reaped."""
    dead = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208 - the names are needed as strings
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
            # "pid (name) state ppid ...": the name may hold blanks and parentheses.
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            if state == b"Z" and int(parent) == os.getpid():
                dead.add(int(name))
    return dead
