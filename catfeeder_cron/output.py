"""What a custom job prints, as log entries: standard output belongs to the results of a command."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import TextIO

from catfeeder_cron.logs import get_logger

log = get_logger(__name__)

_captured: ContextVar["_Lines | None"] = ContextVar("captured_output", default=None)
_lock = Lock()


@contextmanager
def captured_output() -> Iterator[None]:
    """Log each line that this thread, or a task of its event loop, prints inside the `with` block."""
    with _lock:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if not isinstance(stream, _Switch):
                setattr(sys, name, _Switch(stream))
    lines = _Lines()
    token = _captured.set(lines)
    try:
        yield
    finally:
        _captured.reset(token)
        lines.close()


class _Lines(io.TextIOBase):
    """Logs what is written, line by line."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        token = _captured.set(None)  # a handler that writes to the same stream must not come back here
        for line in whole:
            if line.strip():
                log.info("job_output", line=line)
        _captured.reset(token)
        return len(text)

    def close(self) -> None:
        if self._begun:
            self.write("\n")


class _Switch(io.TextIOBase):
    """Stands in for a standard stream, and passes on to `_Lines` what a captured job writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return (_captured.get() or self._stream).write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return _captured.get() is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()
