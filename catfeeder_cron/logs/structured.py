"""structlog's loggers on top of the standard library's, so that there is one stream of entries.

An event goes through standard logging, with its fields attached to the record. If the command line called `configure`,
one handler on the root logger turns every record, also APScheduler's and psycopg's, into one kind of entry, on standard
error or in systemd's journal; where nobody reads, entries are dropped, and nothing waits. Otherwise, in a program that
embeds our classes, that program's own handlers get a readable text. Nothing is ever written to standard output.

structlog is imported on first use, because the import takes longer than all of `--help`.
"""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

from catfeeder_cron.imports import load
from catfeeder_cron.logs.nonblocking import NonBlockingWriter, lines_dropped, writer_of
from catfeeder_cron.logs.redaction import redact

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger
    from structlog.typing import EventDict, Processor

Format = Literal["auto", "console", "json", "journald"]

_PACKAGE = "catfeeder_cron"
_HANDLER = "catfeeder_cron"

TRACEBACK = "traceback_text"
"""The name of the attribute that holds the text of a traceback, in a record that comes from another process."""

# Lower levels of these loggers don't help an operator: APScheduler logs every run, for which we have better events, and
# psycopg's pool logs a warning for every attempt, where the database wing logs an outage once.
_QUIET = {"apscheduler": logging.WARNING, "httpx": logging.WARNING, "psycopg.pool": logging.CRITICAL}

# httpcore's debug records hold the headers of every answer, cookies included.
_ALWAYS_QUIET = {"httpcore": logging.WARNING}


def get_logger(name: str) -> "BoundLogger":
    """Return the logger `name`: `log.info("job_finished", deleted=12)`."""
    return cast("BoundLogger", _LazyLogger(name))


class _LazyLogger:
    """Makes structlog's logger at its first use, so that a command that logs nothing does not import structlog."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        # Import before cached_property takes its lock: Python 3.11 has one lock for all loggers, and the thread that
        # does the import may come here, too, so the two could wait for each other.
        load("structlog")
        return getattr(self._bound, attribute)

    @cached_property
    def _bound(self) -> "BoundLogger":
        from structlog.contextvars import merge_contextvars
        from structlog.stdlib import BoundLogger, filter_by_level

        # The logger has its own processors, so a host program's structlog.configure() is neither needed nor changed.
        return BoundLogger(
            logging.getLogger(self._name),
            processors=[filter_by_level, merge_contextvars, redact, _to_standard_logging],
            context={},
        )


def prepare() -> None:
    """Import what the first entry needs; a program that logs from several threads calls this before it starts them."""
    load("structlog")


def context(**fields: object) -> AbstractContextManager[None]:
    """Add `fields` to every entry that this thread (or asyncio task) logs inside the `with` block."""
    load("structlog")
    from structlog.contextvars import bound_contextvars

    return bound_contextvars(**fields)


def configure(level: str, format: Format = "auto", stream: TextIO | None = None) -> None:
    """Send the entries of this whole process to `stream` (default: standard error), through one handler.

    `level` is a standard level's name in any case. "auto" means "journald" if systemd has connected the stream to its
    journal, "console" on a terminal, and "json" otherwise. A further call replaces level and format. If the stream is
    closed or breaks, entries are lost and nothing is raised. Where nobody reads, an entry waits at most a tenth of a
    second; what can't be written is dropped, and `log_lines_dropped` tells later how many lines that were.
    """
    stream = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the process
    handler = _handler(format, stream)
    handler.set_name(_HANDLER)
    handler.addFilter(_load_structlog)
    logging.raiseExceptions = False

    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == _HANDLER]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    debugging = root.level <= logging.DEBUG
    for name, quiet_level in _QUIET.items():
        logging.getLogger(name).setLevel(logging.NOTSET if debugging else quiet_level)
    for name, quiet_level in _ALWAYS_QUIET.items():
        logging.getLogger(name).setLevel(quiet_level)


def _load_structlog(_record: logging.LogRecord) -> bool:
    """Import structlog in a filter, which logging calls before it takes the handler's lock.

    The thread that does the import may need that lock, so the import must not happen while another thread holds it.
    """
    prepare()
    return True


def show_debug_records() -> None:
    """Send this package's debug records to the handlers of a program that embeds us, or to standard error without any.

    The program's own loggers, levels and handlers are not changed.
    """
    ours = logging.getLogger(_PACKAGE)
    ours.setLevel(logging.DEBUG)
    if not any(isinstance(handler, _LastResort) for handler in ours.handlers):
        ours.addHandler(_LastResort())


class _LastResort(logging.Handler):
    """Writes the records to standard error that no other handler gets.

    It looks for another handler at every record, because a program may configure its logging at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not self._is_handled_elsewhere(record.name):
            try:
                sys.stderr.write(f"{self.format(record)}\n")
            except Exception:  # noqa: BLE001 - logging raises nothing into the code that logs
                self.handleError(record)

    def _is_handled_elsewhere(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _handler(format: Format, stream: TextIO) -> logging.Handler:
    load("catfeeder_cron.logs.journald")
    from catfeeder_cron.logs.journald import JournalHandler, is_journal

    if format == "journald" or (format == "auto" and is_journal(stream)):
        return JournalHandler(_fields, stream)
    handler = _LineHandler(writer_of(stream))
    handler.setFormatter(_LazyFormatter(lambda: _formatter(format, terminal=_is_terminal(stream))))
    return handler


class _LineHandler(logging.Handler):
    """Writes entries as lines of text."""

    def __init__(self, writer: NonBlockingWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; raise nothing into the code that logs."""
        try:
            line = self.format(record)
            self._writer.notice = self._notice  # not before: this has imported what it needs
            self._writer.put(f"{line}\n")
        except Exception:  # noqa: BLE001 - a failure to log must not stop the code that logs
            self.handleError(record)

    def flush(self) -> None:
        """Write what could not be written before, if that is possible now."""
        self._writer.flush()

    def close(self) -> None:
        """Close what was opened for the writer."""
        self._writer.close()
        super().close()

    def _notice(self, count: int) -> str:
        return f"{self.format(lines_dropped(count))}\n"


class _LazyFormatter(logging.Formatter):
    """Makes its formatter at the first record, so that a command that logs nothing does not import structlog."""

    def __init__(self, make: Callable[[], logging.Formatter]) -> None:
        super().__init__()
        self._make = make

    def format(self, record: logging.LogRecord) -> str:
        return self._made.format(record)

    @cached_property
    def _made(self) -> logging.Formatter:
        return self._make()


def _fields(record: logging.LogRecord) -> "EventDict":
    """Return the fields that a formatter would render."""
    from structlog.processors import ExceptionRenderer

    fields: EventDict = {"event": record.getMessage(), "_record": record, "exc_info": record.exc_info}
    for process in (_entry, ExceptionRenderer(), redact):
        fields = process(None, "", fields)
    return fields


def _formatter(format: Format, *, terminal: bool) -> logging.Formatter:
    from structlog.dev import ConsoleRenderer, plain_traceback
    from structlog.processors import ExceptionRenderer, JSONRenderer
    from structlog.stdlib import ProcessorFormatter

    renderer: Processor
    if format == "json" or (format == "auto" and not terminal):
        renderer = JSONRenderer()
    else:
        colors = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        renderer = ConsoleRenderer(colors=colors, exception_formatter=plain_traceback, sort_keys=False)
    # ExceptionRenderer's tracebacks show no local variables: those may hold tokens.
    return ProcessorFormatter(processors=[_entry, ExceptionRenderer(), redact, renderer])


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _to_standard_logging(_logger: Any, _method: str, event_dict: "EventDict") -> tuple[tuple[str], dict[str, Any]]:
    """Return the arguments for the standard logger: a text for any handler, and the fields for our formatter."""
    exc_info = event_dict.pop("exc_info", None)
    fields = (f"{key}={value}" for key, value in event_dict.items() if key != "event")
    text = " ".join((str(event_dict["event"]), *fields))
    extra = {"event_dict": event_dict}
    return (text,), {"exc_info": exc_info, "extra": extra, "stacklevel": _levels_to_the_caller()}


def _levels_to_the_caller() -> int:
    """Return how many of structlog's frames stand between standard logging and the line that logs."""
    frame, levels = sys._getframe(2), 0  # noqa: SLF001 - as logging itself does
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "structlog":
        frame, levels = frame.f_back, levels + 1
    return levels


def _entry(_logger: Any, _method: str, event_dict: "EventDict") -> "EventDict":
    """Return the entry of a log record, with the most important fields first; `event_dict` is ProcessorFormatter's."""
    from structlog.contextvars import get_contextvars

    record: logging.LogRecord = event_dict["_record"]
    fields: EventDict = getattr(record, "event_dict", {"event": event_dict["event"]})
    entry = {
        "timestamp": datetime.fromtimestamp(record.created, UTC),
        "level": record.levelname.lower(),
        "event": fields["event"],
        "logger": record.name,
    }
    added = {**get_contextvars(), **fields, "exc_info": event_dict.get("exc_info")}
    if hasattr(record, TRACEBACK):
        added["exception"] = getattr(record, TRACEBACK)
    return entry | {key: value for key, value in added.items() if key not in entry}
