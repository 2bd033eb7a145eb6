"""Looks at processes from outside."""

from contextlib import suppress
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process runs still; one that has ended and that nobody has reaped does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        # "pid (name) state ppid ...": the name may hold blanks and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
