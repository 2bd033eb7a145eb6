"""What a custom job prints, as log entries: standard output belongs to the results of a command."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from threading import Lock, enumerate, get_ident
from typing import Any, Literal, TextIO

from catfeeder_cron.logs import get_logger

log = get_logger(__name__)

# A line that does not end (a row of dots, say) is told in pieces of this length.
_LONGEST_LINE = 8192

# False: what is written now is an entry already.
_captured: ContextVar["_Lines | Literal[False] | None"] = ContextVar("captured_output", default=None)
_lock = Lock()
_open: list["_Lines"] = []


@contextmanager
def captured_output() -> Iterator[None]:
    """Log each line that is printed inside the `with` block: by this thread, or by a task of its event loop.

    A thread that came up since then is taken for the block's, unless another block is open that it may belong to:
    a new thread does not inherit what it runs for. What is written past `sys.stdout`, as by programs that are started,
    is not seen.
    """
    lines = _Lines()
    with _lock:
        _open.append(lines)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if not isinstance(stream, _Switch):
                setattr(sys, name, _Switch(stream, name))
    token = _captured.set(lines)
    try:
        yield
    finally:
        _captured.reset(token)
        with _lock:
            _open.remove(lines)
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if not _open and isinstance(stream, _Switch):
                    setattr(sys, name, stream.behind)
        lines.finish()


def standard_error() -> TextIO:
    """Return the stream that log entries go to, while output is captured too."""
    stream = sys.stderr
    return stream.behind if isinstance(stream, _Switch) else stream


class _Lines:
    """Logs what is written, line by line, with the fields that its maker's entries have."""

    def __init__(self) -> None:
        self.threads_before = {thread.ident for thread in enumerate()}
        self._context = copy_context()
        self._context.run(_captured.set, False)
        self._begun: dict[tuple[str, int], str] = {}
        self._lock = Lock()

    def write(self, text: str, stream: str) -> None:
        """Log the lines that end in `text`. Each thread has a line of its own on each stream."""
        source = (stream, get_ident())
        with self._lock:
            *lines, begun = (self._begun.pop(source, "") + text).split("\n")
            if len(begun) > _LONGEST_LINE:
                lines, begun = [*lines, begun], ""
            if begun:
                self._begun[source] = begun
        _log(lines, self._context.copy())  # not under the lock: a handler may have one of its own, and print

    def finish(self) -> None:
        """Log the lines that were begun."""
        with self._lock:
            lines, self._begun = list(self._begun.values()), {}
        _log(lines, self._context.copy())


def _log(lines: Iterable[str], context: Context) -> None:
    for line in lines:
        if line.strip():
            context.run(log.info, "job_output", line=line.rstrip())


class _Switch:
    """Stands in for a standard stream, and passes on to `_Lines` what a captured job writes."""

    def __init__(self, behind: TextIO, name: str) -> None:
        self.behind = behind
        self._name = name

    def write(self, text: str) -> int:
        captured = _captured.get()
        lines = _of_this_thread() if captured is None else captured
        if not lines:
            return self.behind.write(text)
        lines.write(text, self._name)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return not _captured.get() and self.behind.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)


def _of_this_thread() -> _Lines | None:
    with _lock:
        possible = [lines for lines in _open if get_ident() not in lines.threads_before]
    return possible[0] if len(possible) == 1 else None
