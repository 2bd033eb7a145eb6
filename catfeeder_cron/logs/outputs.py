"""Write to a stream without waiting: to its descriptor opened anew, or after asking it for room before each piece."""

import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TextIO

# A reader that is only slow is waited for: this long at once, and for this share of the time in the long run.
_WAIT_SECONDS = 0.1
_WAIT_SHARE = 0.1
# A poll promises room for one byte in a terminal, and for this many in a pipe.
_TERMINAL_PIECE = 1


class Output(NamedTuple):
    """Where a writer writes. `write` writes some bytes, one at least, or raises BlockingIOError instead of waiting."""

    descriptor: int
    """The descriptor that is written to, or -1 where there is none."""
    write: Callable[[memoryview], int]
    close: Callable[[], None]
    never_waits: bool = False
    """Whether other code may write to the descriptor without waiting, too."""


class Room:
    """Waits until an output takes something, but not for long. No two threads may call its methods at once."""

    def __init__(self, output: Output) -> None:
        self._has_descriptor = output.descriptor >= 0
        self._poll = select.poll()
        if self._has_descriptor:
            self._poll.register(output.descriptor, select.POLLOUT)
        self._wait_left = _WAIT_SECONDS
        self._waited_at = time.monotonic()

    def may_be_there(self) -> bool:
        """Return whether the output may take something now; only of a descriptor can that be known."""
        return not self._has_descriptor or bool(self._poll.poll(0))

    def wait(self) -> bool:
        """Wait until the output takes something; return False if it does not, or there was too much waiting."""
        begun = time.monotonic()
        self._wait_left = min(_WAIT_SECONDS, self._wait_left + (begun - self._waited_at) * _WAIT_SHARE)
        milliseconds = int(self._wait_left * 1000)
        is_ready = milliseconds > 0 and bool(self._poll.poll(milliseconds))
        self._waited_at = time.monotonic()
        self._wait_left -= self._waited_at - begun
        return is_ready


def output_of(stream: TextIO) -> Output:
    """Return an output to the descriptor of this stream, or to the stream itself if it has none."""
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
