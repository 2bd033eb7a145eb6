"""Take over the configuration as it is now, in a daemon that runs on."""

import threading
from collections.abc import Callable, Iterable

from catfeeder_cron import logs
from catfeeder_cron.checks import check, check_callables
from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database
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
    """Go on with what `read_again` returns; a faulty one is refused with all its faults, and the old one stays.

    `started_with` is what holds for the keys that need a restart. Returns the first of the faults of one that was
    refused.
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
    """Checks what the jobs need as soon as the database has been reached: until then it would find nothing else."""

    def __init__(self, crons: Crons, database: Database, signals: StopSignals) -> None:
        self._crons = crons
        self._database = database
        self._signals = signals
        self._lock = threading.Lock()  # heartbeats may come from several threads
        self._begun = False

    def beat(self, reached: bool, /) -> None:
        with self._lock:
            if not reached or self._begun:
                return
            self._begun = True
        begin_to_check(check(self._crons.settings, self._database), self._signals)


def begin_to_check(findings: Iterable[Finding], signals: StopSignals) -> None:
    """Log what a check finds, each finding at its own level, in a thread of its own.

    A callable that is slow to be imported must hold up neither the first heartbeat nor a reload.
    """

    def work() -> None:
        for finding in findings:
            if signals.requested.is_set():  # what is being closed now would be found missing
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
        if name not in applied and getattr(old, name) != getattr(new, name)
    ]
