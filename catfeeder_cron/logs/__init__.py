"""What the program says: structlog over standard logging, for a console, as JSON, and for systemd's journal."""

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
]
