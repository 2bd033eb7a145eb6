"""As the first process of a container the daemon inherits every process whose parent has ended, and has to reap it.

Otherwise the dead ones stay in the process table for ever. A real init reaps whoever ends; here other code waits for
children of its own at the same time (asyncio, subprocess), whose exit status must not be taken from it. So only those
are reaped that have been dead for a whole round, with nobody waiting for them.
"""

import os
import threading
import time
from contextlib import suppress

_ROUND_SECONDS = 5.0


def reap_orphans_as_init() -> None:
    """Begin to reap orphans, in a thread that ends with the process, if this is the first process of its namespace."""
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
    """Return our children that have ended and that nobody has waited for."""
    dead = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208 - strings are what is wanted
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
            # "pid (name) state ppid ...": the name may hold blanks and parentheses.
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            if state == b"Z" and int(parent) == os.getpid():
                dead.add(int(name))
    return dead
