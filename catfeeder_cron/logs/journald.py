"""Send log entries to systemd's journal in its own protocol, so that each field can be queried: `journalctl JOB=...`.

The protocol is that of https://systemd.io/JOURNAL_NATIVE_PROTOCOL: one datagram to the journal's socket for each entry,
or, for an entry that is too large, a datagram that holds only the descriptor of a sealed file. If the journal does not
accept the entry, it goes to standard error, where systemd reads a priority before each line, or is dropped and counted.
"""

import errno
import fcntl
import json
import logging
import os
import re
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextvars import Context
from typing import TextIO

from catfeeder_cron.logs.nonblocking import lines_dropped, writer_of

SOCKET = "/run/systemd/journal/socket"

_IDENTIFIER = "catfeeder-cron"
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7

# The first entry for a stopped journal waits for it; after that an entry tries it again this often, without waiting.
_SEND_TIMEOUT_SECONDS = 0.1
_TRY_AGAIN_SECONDS = 1.0
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

# Fields that have another meaning for the journal or for systemd.
_RESERVED = re.compile(
    r"MESSAGE|MESSAGE_ID|PRIORITY|ERRNO|UNIT|USER_UNIT|JOB_ID|JOB_TYPE|JOB_RESULT|(CODE|SYSLOG|OBJECT)_.*"
)
_LONGEST_NAME = 64
_NAMES = {"duration_seconds": "DURATION"}
_FIRST = ("job", "run_id")
# Fields that the journal has already, or that are in the message.
_NOT_FIELDS = {"timestamp", "level", "event", "exception"}


def is_journal(stream: TextIO) -> bool:
    """Return whether systemd has connected `stream` to its journal."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JournalHandler(logging.Handler):
    """Sends records to the journal, with the fields that `fields_of` returns: plain values by name.

    A log call waits at most a fifth of a second, in any state of the journal. What it does not accept goes to `stream`.
    logging holds the handler's lock around `emit`, so no two threads use the socket at the same time.
    """

    def __init__(
        self, fields_of: Callable[[logging.LogRecord], Mapping[str, object]], stream: TextIO, address: str = SOCKET
    ) -> None:
        super().__init__()
        self._fields_of = fields_of
        self._writer = writer_of(stream)
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._try_again_at: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; raise nothing into the code that logs."""
        try:
            fields = self._fields_of(record)
            message, priority = _message(fields), _priority(record.levelno)
            entry = b"".join(_encoded(record, fields, message, priority))
            self._writer.notice = self._notice
            self._writer.tell(self._tell_dropped)
            if not self._deliver(entry):
                self._writer.put(_prefixed(message, priority))
        except Exception:  # noqa: BLE001 - a failure to log must not stop the code that logs
            self.handleError(record)

    def flush(self) -> None:
        """Write what the stream would not take before, if it does now."""
        self._writer.flush()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self._writer.close()
        super().close()

    def _tell_dropped(self, count: int) -> bool:
        if self._pauses():
            return False
        record = lines_dropped(count)
        fields = Context().run(self._fields_of, record)
        return self._deliver(b"".join(_encoded(record, fields, _message(fields), _priority(record.levelno))))

    def _notice(self, count: int) -> str:
        record = lines_dropped(count)
        return _prefixed(_message(self._fields_of(record)), _priority(record.levelno))

    def _pauses(self) -> bool:
        return self._try_again_at is not None and time.monotonic() < self._try_again_at

    def _deliver(self, data: bytes) -> bool:
        if self._pauses():
            return False
        self._socket.settimeout(0 if self._try_again_at else _SEND_TIMEOUT_SECONDS)
        try:
            self._send(data)
        except OSError:
            self._try_again_at = time.monotonic() + _TRY_AGAIN_SECONDS
            return False
        self._try_again_at = None
        return True

    def _send(self, data: bytes) -> None:
        # The path is looked up each time, because a restarted journal has a new socket there.
        try:
            self._socket.sendto(data, self._address)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            with os.fdopen(os.memfd_create(_IDENTIFIER, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb") as file:
                file.write(data)
                file.flush()
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [file.fileno()]))
                self._socket.sendmsg([], [rights], 0, self._address)


def _prefixed(message: str, priority: int) -> str:
    return "".join(f"<{priority}>{line}\n" for line in message.splitlines() or [""])


def _priority(level: int) -> int:
    return next((priority for lowest, priority in _PRIORITIES if level >= lowest), _DEBUG)


def _message(fields: Mapping[str, object]) -> str:
    """Return the text that `journalctl` shows: the event with its fields, and the traceback below."""
    names = sorted(fields.keys() - _NOT_FIELDS - {"logger"}, key=[*_FIRST, *fields].index)
    assignments = [f"{name}={_quoted(fields[name])}" for name in names]
    message = " ".join([str(fields["event"]), *assignments])
    return f"{message}\n{fields['exception']}" if "exception" in fields else message


def _encoded(record: logging.LogRecord, fields: Mapping[str, object], message: str, priority: int) -> Iterator[bytes]:
    yield _assignment("MESSAGE", message)
    yield _assignment("PRIORITY", str(priority))
    yield _assignment("SYSLOG_IDENTIFIER", _IDENTIFIER)
    yield _assignment("CODE_FILE", record.pathname)
    yield _assignment("CODE_LINE", str(record.lineno))
    yield _assignment("CODE_FUNC", record.funcName or "")
    if hasattr(record, "event_dict"):  # one of ours; another library's event is a whole sentence
        yield _assignment("EVENT", str(fields["event"]))
    for name, value in fields.items():
        if name not in _NOT_FIELDS:
            yield _assignment(_name(name), _text(value))


def _name(name: str) -> str:
    """Return a name that the journal accepts: upper-case letters, digits and underscores, a letter first."""
    cleaned = re.sub("[^A-Z0-9_]", "_", _NAMES.get(name, name).upper()).lstrip("_0123456789") or "FIELD"
    return (f"FIELD_{cleaned}" if _RESERVED.fullmatch(cleaned) else cleaned)[:_LONGEST_NAME]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _quoted(value: object) -> str:
    text = _text(value)
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) and re.search(r'[\s"=]|^$', text) else text


def _assignment(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"
