"""Apply a changed configuration in a running daemon, and check what the jobs need."""

import threading
from collections.abc import Callable, Iterable

from catfeeder_cron import logs
from catfeeder_cron.checks import check, check_callables
from catfeeder_cron.config import DatabaseSettings, Settings
from catfeeder_cron.config.values import Table
from catfeeder_cron.database import Database
from catfeeder_cron.database.conninfo import differ_in_password_at_most
from catfeeder_cron.errors import CatfeederCronError, ConfigurationError
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import Finding
from catfeeder_cron.scheduler.crons import Crons
from catfeeder_cron.scheduler.listeners import RunListener
from catfeeder_cron.service.signals import StopSignals

log = get_logger("catfeeder_cron.service")


def reload(
    crons: Crons, started_with: Settings, read_again: Callable[[], Settings], signals: StopSignals
) -> str | None:
    """Apply the settings that `read_again` returns. A faulty configuration is refused, and the old one stays in force.

    `started_with` holds the values of the keys that need a restart. Returns the first fault of a refused
    configuration, None for an accepted one.
    """
    try:
        settings = read_again()
    except ConfigurationError as error:
        for fault in error.faults:
            log.error("reload_refused", fault=fault, in_force="the old configuration")
        return error.faults[0]
    logs.configure(settings.logging.level, settings.logging.format)
    try:
        crons.reload(settings)
    except CatfeederCronError as error:
        log.error("reload_incomplete", reason=str(error))
    else:
        log.info("reloaded", config=str(settings.path), jobs=sum(job.enabled for job in settings.jobs.values()))
    for key in _settled_at_start(started_with, settings):
        log.warning("restart_needed", key=key)
    begin_to_check(check_callables(settings), signals)
    return None


class CheckAtFirstBeat(RunListener):
    """Starts the check of what the jobs need at the first heartbeat that reaches the database."""

    def __init__(self, crons: Crons, database: Database, signals: StopSignals) -> None:
        self._crons = crons
        self._database = database
        self._signals = signals
        # Held by the thread of a heartbeat while it looks at `_begun`: heartbeats may come from several threads, and
        # only one of them may start the check.
        self._lock = threading.Lock()
        self._begun = False

    def beat(self, reached: bool, /) -> None:
        """Start the check, once."""
        with self._lock:
            if not reached or self._begun:
                return
            self._begun = True
        begin_to_check(check(self._crons.settings, self._database), self._signals)


def begin_to_check(findings: Iterable[Finding], signals: StopSignals) -> None:
    """Log the findings of a check, each at its own level, in a new thread.

    In a thread, because a callable may take long to import, and must delay neither the first heartbeat nor a reload.
    """

    def work() -> None:
        for finding in findings:
            if signals.requested.is_set():  # the daemon is closing its parts: the check would report them as missing
                return
            level = {"ok": log.debug, "warning": log.warning, "error": log.error}[finding.level]
            level("check_finding", subject=finding.subject, message=finding.message)

    threading.Thread(target=work, name="check", daemon=True).start()


def _settled_at_start(before: Settings, after: Settings) -> list[str]:
    """Return the changed keys that a running process can't take over."""
    keys = {
        "database": (before.database, after.database, {"tables"}),
        "scheduler": (before.scheduler, after.scheduler, {"timezone", "shutdown_grace"}),
        "metrics": (before.metrics, after.metrics, set[str]()),
    }
    return [
        f"{section}.{field.alias or name}"
        for section, (old, new, applied) in keys.items()
        for name, field in type(new).model_fields.items()
        if name not in applied and getattr(old, name) != getattr(new, name) and not _takes_effect(name, old, new)
    ]


def _takes_effect(name: str, old: Table, new: Table) -> bool:
    """Return whether the next connection uses a changed address: if only its password has changed, and in a file."""
    return (
        isinstance(old, DatabaseSettings)
        and isinstance(new, DatabaseSettings)
        and name == "conninfo"
        and old.is_read_again
        and differ_in_password_at_most(old.conninfo.get_secret_value(), new.conninfo.get_secret_value())
    )
