"""Open a stream's descriptor for a writer that must not wait (nonblocking.py)."""

import errno
import os
import select
import socket
import stat
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TextIO

# A poll promises room for one byte in a terminal, and for PIPE_BUF in a pipe.
_TERMINAL_PIECE = 1


class Output(NamedTuple):
    """Where a writer writes. `write` writes some bytes, one at least, or raises BlockingIOError instead of waiting."""

    descriptor: int
    write: Callable[[memoryview], int]
    close: Callable[[], None]
    never_waits: bool = False
    """Whether other code may write to the descriptor without waiting, too."""


def open_output(stream: TextIO) -> Output:
    """Return where the lines of a stream go: its descriptor, or the stream itself if it has none."""
    try:
        descriptor = stream.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError):
        return Output(-1, partial(_write_text, stream), lambda: None)
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=os.dup(descriptor))
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        return Output(connection.fileno(), lambda data: connection.send(data, flags), connection.close)
    if stat.S_ISREG(mode):
        own = os.dup(descriptor)
        return Output(own, partial(os.write, own), partial(os.close, own))
    return _reopened(descriptor) or _polled(descriptor)


def _reopened(descriptor: int) -> Output | None:
    """Open a pipe or terminal again: O_NONBLOCK is then for this process alone, and not for all that share it."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", flags)
    except OSError:  # no /proc, another user's terminal, a pipe without a reader
        return None
    return Output(own, partial(os.write, own), partial(os.close, own), never_waits=True)


def _polled(descriptor: int) -> Output:
    """Look before each piece whether there is room for it.

    Between the look and the write another process may fill a pipe that it shares with us; then the write waits.
    """
    own = os.dup(descriptor)
    poll = select.poll()
    poll.register(own, select.POLLOUT)
    length = _TERMINAL_PIECE if os.isatty(own) else select.PIPE_BUF

    def write(data: memoryview) -> int:
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(own, data[:length])

    return Output(own, write, partial(os.close, own))


def _write_text(stream: TextIO, data: memoryview) -> int:
    try:
        stream.write(str(data, getattr(stream, "encoding", None) or "utf-8"))
        stream.flush()
    except ValueError as error:
        raise BrokenPipeError(errno.EPIPE, "the stream is closed") from error
    return len(data)
