"""Logging: structlog on top of standard logging, for a console, as JSON, and for systemd's journal.

structured    loggers, and one handler for all entries
journald      the handler for systemd's journal
nonblocking   writes lines where nobody may be reading
outputs       opens a stream such that no write to it waits, and waits a moment for its reader
retry_thread  tries again to write what could not be written
redaction     takes secrets out of entries, and makes foreign text fit to be logged
"""

from catfeeder_cron.logs.nonblocking import use_nonblocking_stderr
from catfeeder_cron.logs.redaction import one_line, printable_line
from catfeeder_cron.logs.structured import TRACEBACK, configure, context, get_logger, prepare, show_debug_records

__all__ = [
    "TRACEBACK",
    "configure",
    "context",
    "get_logger",
    "one_line",
    "prepare",
    "printable_line",
    "show_debug_records",
    "use_nonblocking_stderr",
]
