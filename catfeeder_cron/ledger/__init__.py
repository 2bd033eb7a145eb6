"""The ledger that all daemons share: which slots are claimed, which runs are open, and how runs ended."""

from catfeeder_cron.ledger.constants import (
    DEAD_AFTER_SECONDS,
    DIED,
    HEARTBEAT_SECONDS,
    MOVED,
    NO_DAEMON,
    NO_DATABASE,
    NOT_FREE,
    STILL_RUNNING,
    WENT_BACK,
)
from catfeeder_cron.ledger.ledger import Ledger
from catfeeder_cron.ledger.records import Heartbeat, Missed, Process, Retries, RunRecord, SlotClaim, Trigger

__all__ = [
    "DEAD_AFTER_SECONDS",
    "DIED",
    "HEARTBEAT_SECONDS",
    "MOVED",
    "NOT_FREE",
    "NO_DAEMON",
    "NO_DATABASE",
    "STILL_RUNNING",
    "WENT_BACK",
    "Heartbeat",
    "Ledger",
    "Missed",
    "Process",
    "Retries",
    "RunRecord",
    "SlotClaim",
    "Trigger",
]
