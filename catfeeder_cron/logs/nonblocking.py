"""Write log lines to a descriptor that nobody may be reading, without waiting for long (issue 13).

A pipe whose reader hangs, a terminal that was stopped with Ctrl-S and a full socket let a writer wait for ever, and
with it every thread that logs. So a line that can't be written is dropped and counted, and the number is told when the
descriptor takes lines again.
"""

import errno
import io
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, TextIO

from catfeeder_cron.logs.outputs import Room, output_of
from catfeeder_cron.logs.retry_thread import RetryThread

# Of a line that was written in part, no more than this is kept until the rest can be written.
_LONGEST_REST = 1 << 20
_GONE = (errno.EPIPE, errno.EIO)
_NOTHING = memoryview(b"")


class NonBlockingWriter:
    """Writes lines in the order in which they come; all methods may be called from any thread.

    No call waits for more than a tenth of a second altogether, and none waits while the descriptor is known to take
    nothing. A line that was begun is finished before the next one. A process that is forked drops what its parent has
    not written.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to the descriptor of this stream, or to the stream itself if it has none."""
        self._output = output_of(stream)
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._is_closed = False
        self.notice: Callable[[int], str] = "catfeeder-cron: log_lines_dropped lines={}\n".format
        """Makes the line that tells how many were dropped."""
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._process = os.getpid()
        # Guards all that follows. A finalizer or signal handler may log in the middle of any method, in the thread that
        # holds the lock: hence an RLock, and `_busy`, with which such a line waits until the one in hand is done.
        self._lock = threading.RLock()
        self._busy = False
        self._waiting: deque[bytes] = deque()
        self._rest = _NOTHING
        self._dropped = 0
        self._is_blocked = False
        self._is_gone = False  # nobody will read it; in a named pipe, the next line may meet another reader
        self._retry = RetryThread(self._lock)
        self._room = Room(self._output)  # another thread of the parent may be waiting in the old one

    @property
    def descriptor(self) -> int | None:
        """The descriptor of this writer's own that any code may write to without waiting, if there is such a one."""
        return self._output.descriptor if self._output.never_waits else None

    def put(self, text: str) -> None:
        """Write whole lines, or drop and count them."""
        self.put_bytes(self._encoded(text))

    def put_bytes(self, line: bytes) -> None:
        """Do as `put` with lines that are encoded; with none, only do what `flush` does."""
        with self._own_lock():
            self._waiting.append(line)
            if self._busy:
                return
            self._busy = True
            try:
                while self._waiting:
                    self._put(self._waiting.popleft())
            finally:
                self._busy = False

    def tell(self, tell: Callable[[int], bool]) -> None:
        """If lines were dropped, call `tell` with their number, and forget it when that returns True."""
        with self._own_lock():
            if self._dropped and tell(self._dropped):
                self._dropped = 0

    def flush(self) -> None:
        """Finish the line that was begun, and tell how many were dropped, if that is possible now."""
        self.put_bytes(b"")

    def close(self) -> None:
        """Write no more, and close what was opened for this writer; the stream stays open."""
        self.flush()
        with self._own_lock():
            if not self._is_closed:
                self._is_closed = True
                self._output.close()

    def _own_lock(self) -> threading.RLock:
        if self._process != os.getpid():
            self._begin_anew()  # another thread of the parent may have held the lock
        return self._lock

    def _encoded(self, text: str) -> bytes:
        return text.encode(self._encoding, "backslashreplace")

    def _put(self, line: bytes) -> None:
        if self._is_closed:
            return
        if not (self._catch_up() and self._begin(line)) and line:
            self._dropped += line.count(b"\n") or 1
            self._try_again_later()

    def _catch_up(self) -> bool:
        """Write what is left of the line before, then how many were dropped; return whether nothing is left of both."""
        if self._is_blocked and not self._room.may_be_there():
            return False  # without making a notice for each line that is dropped
        self._advance()
        if self._dropped and not self._rest:
            told = self._dropped
            # In an empty context: the fields of the thread's own run are not the notice's.
            notice = Context().run(self.notice, told)
            if self._begin(self._encoded(notice)):
                self._dropped -= told
        return not self._rest and not self._dropped

    def _begin(self, line: bytes) -> bool:
        """Write a line, and keep what is left of it for later; return False if nothing of it was written."""
        self._rest = memoryview(line)
        self._advance()
        if line and len(self._rest) == len(line):
            self._rest = _NOTHING
            return False
        if len(self._rest) > _LONGEST_REST:
            self._rest = memoryview(bytes(self._rest[:_LONGEST_REST]) + b"\n")
            self._dropped += 1
        if self._rest:
            self._try_again_later()
        return True

    def _advance(self) -> None:
        """Write as much as possible of the rest."""
        while self._rest:
            try:
                written = self._output.write(self._rest)
            except BlockingIOError:
                if not self._is_blocked and self._room.wait():
                    continue
                self._is_blocked = True
                return
            except OSError as error:  # a full disk, say
                self._is_blocked = True
                self._is_gone = error.errno in _GONE
                return
            self._rest = self._rest[written:]
            self._is_blocked = self._is_gone = False

    def _try_again_later(self) -> None:
        """Have a thread go on, so that the notice does not wait for the next line."""
        if not self._is_gone:
            self._retry.start(self._try_again)

    def _try_again(self) -> bool:
        """Flush; return whether nothing is left, or nothing more can be written. Called under the lock."""
        self.flush()
        return self._is_closed or self._is_gone or not (self._rest or self._dropped)


class NonBlockingText(io.RawIOBase):
    """The bytes below a text stream that writes lines through a NonBlockingWriter."""

    def __init__(self, writer: NonBlockingWriter, descriptor: int) -> None:
        super().__init__()
        self.writer = writer
        self._descriptor = descriptor

    def write(self, data: Any) -> int:
        """Write lines, or drop and count them."""
        line = bytes(data)
        self.writer.put_bytes(line)
        return len(line)

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of the stream that this one stands for."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether that is a terminal."""
        return os.isatty(self._descriptor)


class _StderrWriter(NonBlockingWriter):
    """The writer below sys.stderr, which handlers share and which lasts as long as the process."""

    def close(self) -> None:
        """Leave it open for others."""
        self.flush()


def lines_dropped(count: int) -> logging.LogRecord:
    """Return the record that tells how many lines were dropped."""
    fields = {"event": "log_lines_dropped", "lines": count}
    level = {"levelno": logging.WARNING, "levelname": "WARNING"}
    return logging.makeLogRecord({"name": "catfeeder_cron.logs", "msg": fields["event"], "event_dict": fields} | level)


def writer_of(stream: TextIO) -> NonBlockingWriter:
    """Return the writer of a stream that has one, or a new one."""
    raw = getattr(stream, "buffer", None)
    return raw.writer if isinstance(raw, NonBlockingText) else NonBlockingWriter(stream)


def use_nonblocking_stderr() -> None:
    """Have nothing in this process wait for the reader of standard error: neither logging nor any other code.

    For the program that owns the process. Python's own messages, such as warnings, go through the writer of the log;
    what C libraries write to the descriptor is lost where nobody reads, except where that is a socket: they wait there.
    """
    stream = sys.stderr
    if stream is None or isinstance(getattr(stream, "buffer", None), NonBlockingText):
        return
    writer = _StderrWriter(stream)
    if (descriptor := writer.descriptor) is not None:
        # Other processes share the description behind the old descriptor, and it stays as it is.
        os.dup2(descriptor, stream.fileno())
    raw = NonBlockingText(writer, stream.fileno())
    sys.stderr = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
